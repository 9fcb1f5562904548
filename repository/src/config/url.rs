//! [`RepositoryUrl`]: the place of a repository, as typed. [`RepositoryPlace`]: the URL with
//! everything that is needed to access it.
//!
//! For a folder the URL is sufficient. A bucket also needs an endpoint and credentials.

use std::{fmt, path::Path, path::PathBuf, str::FromStr};

use jiff::Timestamp;

use super::{Required, S3Credentials, S3Settings};
use crate::{
    Error, Result,
    access::FolderAccess,
    encryption::KeySource,
    expire::RetentionPolicy,
    store::{Patience, RequestMeter, RequestReport},
};

/// The place of a repository, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepositoryUrl {
    /// `file:///dir`.
    Folder(PathBuf),
    /// `s3://bucket/prefix`.
    S3 {
        /// The bucket.
        bucket: String,
        /// The prefix of every key, without slashes at its ends. It may be empty.
        prefix: String,
    },
}

impl RepositoryUrl {
    /// Returns the folder of a `file://` repository, or `None` for a bucket.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(folder) => Some(folder),
            Self::S3 { .. } => None,
        }
    }
}

impl FromStr for RepositoryUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("file://") {
            if path.starts_with('/') {
                return Ok(Self::Folder(PathBuf::from(path)));
            }
            let message = format!("repository \"{text}\" is not absolute; write file:///directory");
            return Err(Error::config(message));
        }
        if let Some(place) = text.strip_prefix("s3://") {
            return bucket(text, place);
        }
        let problem = match text.split_once("://") {
            Some(("gs", _)) => "Google Cloud Storage is not supported".to_owned(),
            Some(("az", _)) => "Azure Blob Storage is not supported".to_owned(),
            Some((scheme, _)) => format!("\"{scheme}\" is not a kind of repository"),
            None => "it is not a URL".to_owned(),
        };
        let file = if text.starts_with('/') {
            format!("file://{text}")
        } else {
            "file:///directory".to_owned()
        };
        let message =
            format!("repository \"{text}\": {problem}; write {file} or s3://bucket/prefix");
        Err(Error::config(message))
    }
}

fn bucket(text: &str, place: &str) -> Result<RepositoryUrl> {
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if bucket.len() < 3 || bucket.len() > 63 || !bucket.chars().all(plain) {
        let message = format!(
            "repository \"{text}\": \"{bucket}\" cannot name a bucket; write s3://bucket/prefix"
        );
        return Err(Error::config(message));
    }
    let prefix = prefix.trim_end_matches('/');
    let sound = |part: &str| {
        !part.is_empty() && !part.starts_with('.') && !part.chars().any(char::is_control)
    };
    if !prefix.is_empty() && !prefix.split('/').all(sound) {
        let message = format!(
            "repository \"{text}\": a part of the prefix is empty or begins with a dot; write s3://bucket/prefix"
        );
        return Err(Error::config(message));
    }
    Ok(RepositoryUrl::S3 {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

impl fmt::Display for RepositoryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "file://{}", folder.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

impl<'de> serde::Deserialize<'de> for RepositoryUrl {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A repository with everything that is needed to access it. Prints as its URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryPlace {
    /// The URL.
    pub url: RepositoryUrl,
    /// The access to its bucket. Not used for a folder.
    pub s3: S3Settings,
    /// The source of the keys. `None` if its objects are not encrypted.
    pub encryption: Option<KeySource>,
    /// Further repositories that contain the same objects, in the order in which they are read. In
    /// those this list is empty.
    pub others: Vec<Self>,
    /// The repositories that must contain an object before it counts as stored.
    pub required: Required,
    /// Its retention policy. Default: everything is kept forever.
    pub retention: Option<RetentionPolicy>,
    /// Seen as it was at a time, to read only: `pitr-restore --at`.
    pub as_of: Option<Timestamp>,
    /// The time for which failing requests to its bucket are retried.
    pub patience: Patience,
    /// Counts the requests to its bucket.
    pub requests: RequestMeter,
    /// The group that shares its folder. Default: only the user who created it may use it.
    pub access: Option<FolderAccess>,
}

impl RepositoryPlace {
    /// Returns this repository and the others, each without `others`, in the order in which they
    /// are read.
    #[must_use]
    pub fn each(&self) -> Vec<Self> {
        let first = Self {
            others: Vec::new(),
            ..self.clone()
        };
        std::iter::once(first)
            .chain(self.others.iter().cloned())
            .collect()
    }

    /// Returns the lines of the configuration that name a file by a relative path. A program that
    /// runs in another directory, as `restore_command` does, does not find such a file.
    #[must_use]
    pub fn relative_files(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for place in std::iter::once(self).chain(&self.others) {
            if let Some(KeySource::File(path)) = &place.encryption {
                lines.push(("encryption_key_file", path));
            }
            if place.url.folder().is_none() {
                lines.extend(place.s3.ca_file.iter().map(|path| ("s3_ca_file", path)));
                if let S3Credentials::File(path) = &place.s3.credentials {
                    lines.push(("s3_credentials_file", path));
                }
            }
        }
        let relative = lines.into_iter().filter(|(_, path)| path.is_relative());
        relative
            .map(|(key, path)| format!("{key} = \"{}\"", path.display()))
            .collect()
    }

    /// Returns the sum of the requests to its buckets, or `None` if there is no bucket.
    #[must_use]
    pub fn request_report(&self) -> Option<RequestReport> {
        let mut sum = None;
        for place in std::iter::once(self).chain(&self.others) {
            if place.url.folder().is_none() {
                *sum.get_or_insert_default() += place.requests.report();
            }
        }
        sum
    }
}

impl From<RepositoryUrl> for RepositoryPlace {
    fn from(url: RepositoryUrl) -> Self {
        Self {
            url,
            s3: S3Settings::default(),
            encryption: None,
            others: Vec::new(),
            required: Required::default(),
            retention: None,
            as_of: None,
            patience: Patience::default(),
            requests: RequestMeter::default(),
            access: None,
        }
    }
}

impl fmt::Display for RepositoryPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}
