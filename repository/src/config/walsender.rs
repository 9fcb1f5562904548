//! The walsender: the server from which standbys stream the archive, and its access.
//!
//! Invariant: an address that other hosts can reach is refused without a password.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Secret, secret_file};
use crate::{Error, Result};

/// The user if none is configured.
const USER_DEFAULT: &str = "replicator";

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct WalsenderTable {
    walsender: Option<String>,
    walsender_password_file: Option<PathBuf>,
    walsender_tls_certificate: Option<PathBuf>,
    walsender_tls_key: Option<PathBuf>,
    walsender_user: Option<String>,
}

/// The resolved settings of the walsender.
#[derive(Clone, Debug, PartialEq)]
pub struct WalsenderSettings {
    /// The address on which it listens.
    pub address: SocketAddr,
    /// The user that may stream. Default: replicator.
    pub user: String,
    /// The password, requested by SCRAM-SHA-256. Without it, everyone who can connect may stream.
    pub password: Option<Secret>,
    /// Certificate chain and key, PEM. Default: no TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl WalsenderSettings {
    /// Returns true if a connection without TLS is refused: a certificate is configured and other
    /// hosts can connect.
    #[must_use]
    pub fn requires_tls(&self) -> bool {
        self.tls.is_some() && !self.address.ip().is_loopback()
    }

    /// Resolves the settings of a cluster. Two clusters cannot have the same address.
    pub(super) fn resolve(
        table: &WalsenderTable,
        defaults: &WalsenderTable,
    ) -> Result<Option<Self>> {
        let Some(text) = table.walsender.as_ref().or(defaults.walsender.as_ref()) else {
            return Ok(None);
        };
        let address: SocketAddr = text.parse().map_err(|_| {
            Error::config(format!(
                "walsender = \"{text}\" is no address; write \"127.0.0.1:5433\""
            ))
        })?;
        let file = table.walsender_password_file.as_ref();
        let file = file.or(defaults.walsender_password_file.as_ref());
        let password = file.map(|path| read_password(path)).transpose()?;
        if password.is_none() && !address.ip().is_loopback() {
            return Err(Error::config(format!(
                "walsender = \"{address}\" is reached by other hosts, who could read all WAL: set walsender_password_file, or \
                 use a loopback address"
            )));
        }
        let certificate = table.walsender_tls_certificate.as_ref();
        let certificate = certificate.or(defaults.walsender_tls_certificate.as_ref());
        let key = table.walsender_tls_key.as_ref();
        let tls = match (certificate, key.or(defaults.walsender_tls_key.as_ref())) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            _ => {
                return Err(Error::config(
                    "walsender_tls_certificate and walsender_tls_key are set together or not at all",
                ));
            }
        };
        let user = table.walsender_user.as_ref();
        let user = user.or(defaults.walsender_user.as_ref());
        Ok(Some(Self {
            address,
            user: user.map_or_else(|| USER_DEFAULT.to_owned(), Clone::clone),
            password,
            tls,
        }))
    }
}

fn read_password(path: &Path) -> Result<Secret> {
    let text = secret_file::read("walsender_password_file", path)?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err(Error::config(format!(
            "the password file {} is empty",
            path.display()
        )));
    }
    Ok(Secret::from(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_hosts_need_a_password() {
        let resolve = |text: &str| {
            let table: WalsenderTable = toml::from_str(text).expect("TOML");
            WalsenderSettings::resolve(&table, &WalsenderTable::default())
        };
        assert_eq!(resolve("").expect("nothing is asked"), None);
        let local = resolve("walsender = \"127.0.0.1:5433\"").expect("loopback");
        assert_eq!(local.expect("it listens").user, "replicator");
        for (text, word) in [
            ("walsender = \"0.0.0.0:5433\"", "walsender_password_file"),
            ("walsender = \"5433\"", "no address"),
            (
                "walsender = \"127.0.0.1:1\"\nwalsender_tls_key = \"/k\"",
                "together",
            ),
            (
                "walsender = \"127.0.0.1:1\"\nwalsender_password_file = \"/nonexistent\"",
                "walsender_password_file",
            ),
        ] {
            let error = resolve(text).expect_err(text).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
