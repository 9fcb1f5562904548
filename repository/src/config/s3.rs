//! Access to a bucket: the `s3_*` keys, each allowed in a cluster's table and at the top.
//!
//! Anything that is not configured here comes from the places that every AWS program reads:
//! environment, profile, web identity, the instance's own role.

use std::{fmt, path::PathBuf};

use serde::Deserialize;

use crate::{Error, Result};

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct S3Table {
    s3_access_key: Option<String>,
    s3_ca_file: Option<PathBuf>,
    s3_checksums: Option<bool>,
    s3_credentials_file: Option<PathBuf>,
    s3_endpoint: Option<String>,
    s3_path_style: Option<bool>,
    s3_profile: Option<String>,
    s3_region: Option<String>,
    s3_secret_key: Option<Secret>,
    s3_session_token: Option<Secret>,
}

/// Text that is never printed.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Returns the text, for the code that authenticates with it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("****")
    }
}

/// The credentials that sign the requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum S3Credentials {
    /// The standard chain: environment, profile (with its assumed role), web identity, container,
    /// instance.
    #[default]
    Standard,
    /// An access key in the configuration.
    Keys {
        /// The name of the access key.
        access_key: String,
        /// The secret of the access key.
        secret_key: Secret,
        /// The token of temporary credentials.
        session_token: Option<Secret>,
    },
    /// A file in the form of `~/.aws/credentials`.
    File(PathBuf),
}

/// The resolved access to a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Settings {
    /// The address of a store other than AWS: `https://host:port`.
    pub endpoint: Option<String>,
    /// The region. Default: that of the environment or the profile, else `us-east-1` if an endpoint
    /// is given.
    pub region: Option<String>,
    /// True for `endpoint/bucket`, false for `bucket.endpoint`. Default: true if an endpoint is
    /// given.
    pub path_style: bool,
    /// Certificates that are trusted in addition to those of the system.
    pub ca_file: Option<PathBuf>,
    /// The profile in the standard files.
    pub profile: Option<String>,
    /// The credentials that sign the requests.
    pub credentials: S3Credentials,
    /// True if a checksum is stored with every object and compared when the object is read.
    /// Default: true.
    pub checksums: bool,
}

impl Default for S3Settings {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            path_style: false,
            ca_file: None,
            profile: None,
            credentials: S3Credentials::Standard,
            checksums: true,
        }
    }
}

impl S3Settings {
    /// Resolves the table's keys, with `defaults` for those that it lacks. The keys for credentials
    /// are one choice: if the table has any of them, it replaces all of those in `defaults`.
    pub(super) fn resolve(table: &S3Table, defaults: &S3Table) -> Result<Self> {
        let endpoint = table.s3_endpoint.clone().or(defaults.s3_endpoint.clone());
        if let Some(endpoint) = &endpoint {
            let host = ["http://", "https://"]
                .iter()
                .find_map(|scheme| endpoint.strip_prefix(scheme));
            if host.is_none_or(|host| host.trim_end_matches('/').is_empty()) {
                return Err(Error::config(format!(
                    "s3_endpoint = \"{endpoint}\" is not a URL; write \"https://host:port\""
                )));
            }
        }
        let who = if table.says_who_signs() {
            table
        } else {
            defaults
        };
        Ok(Self {
            region: table.s3_region.clone().or(defaults.s3_region.clone()),
            path_style: table
                .s3_path_style
                .or(defaults.s3_path_style)
                .unwrap_or(endpoint.is_some()),
            ca_file: table.s3_ca_file.clone().or(defaults.s3_ca_file.clone()),
            profile: who.s3_profile.clone(),
            credentials: who.credentials()?,
            checksums: table.s3_checksums.or(defaults.s3_checksums).unwrap_or(true),
            endpoint,
        })
    }

    /// Returns the lines of `config show`, with secrets masked.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let text = |key: &str, value: &Option<String>| {
            value.as_ref().map(|value| format!("{key} = \"{value}\""))
        };
        let file = |key: &str, value: &PathBuf| format!("{key} = \"{}\"", value.display());
        let mut lines: Vec<String> = [
            text("s3_endpoint", &self.endpoint),
            text("s3_region", &self.region),
            text("s3_profile", &self.profile),
            self.ca_file.as_ref().map(|path| file("s3_ca_file", path)),
        ]
        .into_iter()
        .flatten()
        .collect();
        match &self.credentials {
            S3Credentials::Standard => {}
            S3Credentials::Keys {
                access_key,
                secret_key,
                session_token,
            } => {
                lines.push(format!("s3_access_key = \"{access_key}\""));
                lines.push(format!("s3_secret_key = \"{secret_key:?}\""));
                if let Some(token) = session_token {
                    lines.push(format!("s3_session_token = \"{token:?}\""));
                }
            }
            S3Credentials::File(path) => lines.push(file("s3_credentials_file", path)),
        }
        lines.push(format!("s3_path_style = {}", self.path_style));
        lines.push(format!("s3_checksums = {}", self.checksums));
        lines
    }
}

impl S3Table {
    fn says_who_signs(&self) -> bool {
        self.s3_access_key.is_some()
            || self.s3_secret_key.is_some()
            || self.s3_session_token.is_some()
            || self.s3_credentials_file.is_some()
            || self.s3_profile.is_some()
    }

    fn credentials(&self) -> Result<S3Credentials> {
        match (
            &self.s3_access_key,
            &self.s3_secret_key,
            &self.s3_session_token,
            &self.s3_credentials_file,
        ) {
            (None, None, None, None) => Ok(S3Credentials::Standard),
            (None, None, None, Some(path)) => Ok(S3Credentials::File(path.clone())),
            (Some(access_key), Some(secret_key), session_token, None)
                if self.s3_profile.is_none() =>
            {
                Ok(S3Credentials::Keys {
                    access_key: access_key.clone(),
                    secret_key: secret_key.clone(),
                    session_token: session_token.clone(),
                })
            }
            (Some(_), Some(_), _, _) => Err(Error::config(
                "s3_access_key is set together with s3_credentials_file or s3_profile; say only one way to sign",
            )),
            _ => Err(Error::config(
                "s3_access_key and s3_secret_key go together; write both, or neither for the standard AWS places",
            )),
        }
    }
}
