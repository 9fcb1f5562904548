//! Access to the dashboard: tokens from a file or the environment, and TLS.

use std::{fs, path::PathBuf};

use serde::Deserialize;

use super::Secret;
use crate::{Error, Result};

/// Keys of the file. They are allowed at the top only.
pub(super) const HTTP_KEYS: [&str; 4] = [
    "http_operate_token_file",
    "http_tls_certificate",
    "http_tls_key",
    "http_token_file",
];
/// The minimum length of a token. A shorter one could be guessed.
const TOKEN_CHARACTERS_MIN: usize = 16;

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct HttpTable {
    pub(super) http_operate_token_file: Option<PathBuf>,
    pub(super) http_tls_certificate: Option<PathBuf>,
    pub(super) http_tls_key: Option<PathBuf>,
    pub(super) http_token_file: Option<PathBuf>,
}

/// The resolved access to the dashboard.
#[derive(Clone, Debug, Default)]
pub struct HttpAccess {
    /// The token that may read everything. If neither this nor `operate` is set, everyone who can
    /// connect may read.
    pub read: Option<Secret>,
    /// The token that may read everything, and request a base backup or a test notification.
    /// Without it nobody may request them.
    pub operate: Option<Secret>,
    /// Certificate chain and key, PEM. They are read again when they change.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl HttpAccess {
    /// Returns true if requests without a token are refused.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.read.is_some() || self.operate.is_some()
    }

    pub(super) fn resolve(table: &HttpTable) -> Result<Self> {
        let tls = match (&table.http_tls_certificate, &table.http_tls_key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            _ => {
                return Err(Error::config(
                    "http_tls_certificate and http_tls_key are set together or not at all",
                ));
            }
        };
        Ok(Self {
            read: token("TIDEMARK_HTTP_TOKEN", table.http_token_file.as_ref())?,
            operate: token(
                "TIDEMARK_HTTP_OPERATE_TOKEN",
                table.http_operate_token_file.as_ref(),
            )?,
            tls,
        })
    }
}

fn token(variable: &str, file: Option<&PathBuf>) -> Result<Option<Secret>> {
    let (text, place) = match (std::env::var(variable), file) {
        (Ok(text), _) => (text, variable.to_owned()),
        (_, Some(path)) => {
            let text = fs::read_to_string(path).map_err(|error| {
                Error::config(format!("read the token file {}: {error}", path.display()))
            })?;
            (text, path.display().to_string())
        }
        _ => return Ok(None),
    };
    let text = text.trim();
    if text.len() < TOKEN_CHARACTERS_MIN {
        return Err(Error::config(format!(
            "the token in {place} has fewer than {TOKEN_CHARACTERS_MIN} characters; make one with `openssl rand -hex 32`"
        )));
    }
    Ok(Some(Secret::from(text.to_owned())))
}
