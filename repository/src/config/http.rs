//! Access to the dashboard: tokens from a file or the environment, and TLS.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Secret, secret_file};
use crate::{Error, Result};

/// The minimum length of a token. A shorter one could be guessed.
const TOKEN_CHARACTERS_MIN: usize = 16;

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct HttpTable {
    #[serde(default)]
    pub(super) http_allowed_hosts: Vec<String>,
    pub(super) http_operate_token_file: Option<PathBuf>,
    pub(super) http_public_url: Option<String>,
    pub(super) http_tls_certificate: Option<PathBuf>,
    pub(super) http_tls_key: Option<PathBuf>,
    pub(super) http_token_file: Option<PathBuf>,
}

/// The resolved access to the dashboard.
#[derive(Clone, Debug, Default)]
pub struct HttpAccess {
    /// The token that may read everything. Without it, everyone who can connect to a loopback
    /// address may read.
    pub read: Option<Secret>,
    /// The token that may read everything, and request a base backup or a test notification.
    /// Without it nobody may request them.
    pub operate: Option<Secret>,
    /// Names, in lower case and without a port, under which the page may be opened on a loopback
    /// address while reading needs no token. `localhost` and IP addresses are always allowed.
    pub allowed_hosts: Vec<String>,
    /// The URL under which users open the page, without a slash at its end. Notifications link to
    /// it, and its host is allowed too. Default: the address at which the daemon listens.
    pub public_url: Option<String>,
    /// Certificate chain and key, PEM. They are read again when they change.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl HttpAccess {
    /// Returns true if a token is configured.
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
        let allowed_hosts = table.http_allowed_hosts.iter().map(|name| host_name(name));
        let mut allowed_hosts: Vec<String> = allowed_hosts.collect::<Result<_>>()?;
        let public_url = table.http_public_url.as_deref();
        let public_url = public_url
            .map(|url| link("http_public_url", url))
            .transpose()?;
        if let Some(url) = &public_url {
            let host = url.split_once("://").map_or("", |(_, rest)| rest);
            let host = host.split(['/', ':', '?', '#']).next().unwrap_or_default();
            allowed_hosts.extend(host_name(host));
        }
        Ok(Self {
            allowed_hosts,
            public_url,
            read: token(
                "TIDEMARK_HTTP_TOKEN",
                ("http_token_file", table.http_token_file.as_ref()),
            )?,
            operate: token(
                "TIDEMARK_HTTP_OPERATE_TOKEN",
                (
                    "http_operate_token_file",
                    table.http_operate_token_file.as_ref(),
                ),
            )?,
            tls,
        })
    }
}

/// Checks a URL that notifications link to, and returns it without a slash at its end.
pub(super) fn link(key: &str, url: &str) -> Result<String> {
    let is_link = url.starts_with("https://") || url.starts_with("http://");
    if !is_link
        || url.contains(|c: char| c.is_whitespace() || c.is_control() || "<>|\"".contains(c))
    {
        return Err(Error::config(format!(
            "{key} = \"{url}\" is not a link; write for example \"https://tidemark.example.com\""
        )));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

/// Checks an entry of `http_allowed_hosts` and returns it in lower case.
fn host_name(name: &str) -> Result<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.is_empty() || !name.chars().all(is_part) {
        return Err(Error::config(format!(
            "http_allowed_hosts: \"{name}\" is not a host name; write it without scheme, port and \
             path, for example \"tidemark.example.com\""
        )));
    }
    Ok(name.trim_end_matches('.').to_ascii_lowercase())
}

fn token(variable: &str, (key, file): (&str, Option<&PathBuf>)) -> Result<Option<Secret>> {
    let (text, place) = match (std::env::var(variable), file) {
        (Ok(text), _) => (text, variable.to_owned()),
        (_, Some(path)) => (secret_file::read(key, path)?, path.display().to_string()),
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
