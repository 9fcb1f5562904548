//! The repositories of a cluster and their keys: `repository`, `repositories` and the
//! `encryption_key_*` keys.
//!
//! `repository` is the nearest. Those of `repositories` contain the same objects elsewhere, and
//! each has its own access settings. Encryption keys apply to all of them unless one has its own:
//! an entry that forgets them would leak data.

use std::path::PathBuf;

use serde::Deserialize;

use super::{
    RepositoryPlace, RepositoryUrl, Required, S3Settings,
    keys::{self, Group, Place},
    retention::KeepTable,
    s3::S3Table,
};
use crate::{
    Error, Result,
    encryption::KeySource,
    store::{Patience, RequestMeter},
};

/// The maximum number of repositories. More would be a mistake: every object is written to each.
const REPOSITORIES_MAX: usize = 8;

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct EncryptionTable {
    encryption_key_command: Option<String>,
    encryption_key_env: Option<String>,
    encryption_key_file: Option<PathBuf>,
}

impl EncryptionTable {
    /// Returns the configured source of keys. Fails if there are several.
    fn source(&self) -> Result<Option<KeySource>> {
        let sources = [
            self.encryption_key_file.clone().map(KeySource::File),
            self.encryption_key_env.clone().map(KeySource::Environment),
            self.encryption_key_command.clone().map(KeySource::Command),
        ];
        let mut sources = sources.into_iter().flatten();
        match (sources.next(), sources.next()) {
            (source, None) => Ok(source),
            _ => Err(Error::config(
                "several of encryption_key_file, encryption_key_env and encryption_key_command are set; set one, it may \
                 yield several keys",
            )),
        }
    }

    pub(super) fn resolve(&self, defaults: &Self) -> Result<Option<KeySource>> {
        match self.source()? {
            Some(source) => Ok(Some(source)),
            None => defaults.source(),
        }
    }
}

/// An entry of `repositories`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct RepositoryTable {
    url: RepositoryUrl,
    #[serde(flatten)]
    s3: S3Table,
    #[serde(flatten)]
    encryption: EncryptionTable,
    #[serde(flatten)]
    keep: KeepTable,
}

impl RepositoryTable {
    fn resolve(&self, keys: Option<&KeySource>, keep: &KeepTable) -> Result<RepositoryPlace> {
        Ok(RepositoryPlace {
            url: self.url.clone(),
            s3: S3Settings::resolve(&self.s3, &S3Table::default())?,
            encryption: self.encryption.source()?.or_else(|| keys.cloned()),
            others: Vec::new(),
            required: Required::default(),
            as_of: None,
            retention: self.keep.over(keep).resolve()?,
            patience: Patience::default(),
            requests: RequestMeter::default(),
            access: None,
        })
    }
}

/// Returns the repositories other than the first.
pub(super) fn others(
    tables: &[RepositoryTable],
    first: (&RepositoryUrl, &S3Settings),
    keys: Option<&KeySource>,
    keep: &KeepTable,
) -> Result<Vec<RepositoryPlace>> {
    if tables.len() >= REPOSITORIES_MAX {
        return Err(Error::config(format!(
            "there are {} repositories; {REPOSITORIES_MAX} are the most",
            tables.len() + 1
        )));
    }
    let mut others: Vec<RepositoryPlace> = Vec::new();
    for table in tables {
        let place = table.resolve(keys, keep)?;
        let same = |other: &RepositoryPlace| {
            other.url == place.url && other.s3.endpoint == place.s3.endpoint
        };
        let (url, s3) = first;
        let is_first =
            place.url == *url && (url.folder().is_some() || place.s3.endpoint == s3.endpoint);
        if is_first || others.iter().any(same) {
            return Err(Error::config(format!(
                "repository {place} is listed twice; a second copy needs a second place"
            )));
        }
        others.push(place);
    }
    Ok(others)
}

/// Refuses unknown keys in `repositories`.
pub(super) fn check_keys(table: &toml::Table, place: &str) -> Result<()> {
    let mut known = keys::names(Place::Repository);
    for group in [Group::Bucket, Group::Encryption, Group::Retention] {
        known.extend(keys::names_of(Place::Cluster, group));
    }
    let Some(toml::Value::Array(entries)) = table.get("repositories") else {
        return Ok(());
    };
    for entry in entries.iter().filter_map(toml::Value::as_table) {
        for key in entry.keys() {
            if !known.contains(&key.as_str()) {
                return Err(super::file::unknown(
                    key,
                    &format!(" in repositories{place}"),
                    &known,
                ));
            }
        }
    }
    Ok(())
}
