//! [`TlsSettings`]: `sslmode` and the related keywords, with libpq's default files.

use std::path::PathBuf;

use super::{super::Result, environment::Environment, given::Given, parse::problem};

/// `sslmode`, from the weakest to the strictest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TlsVersion {
    V1,
    V1_1,
    V1_2,
    V1_3,
}

/// The trusted certificate authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RootCertificates {
    /// A file, either named by the user or libpq's default, which may be missing.
    File { path: PathBuf, named: bool },
    /// The operating system's certificates.
    System,
    /// No file, because there is no home directory.
    None,
}

/// The TLS settings of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsSettings {
    pub(crate) mode: SslMode,
    /// TLS from the first byte, without a request (PostgreSQL 17).
    pub(crate) direct: bool,
    pub(crate) roots: RootCertificates,
    pub(crate) revocations: Option<PathBuf>,
    /// The client's certificate and key. Default files may be missing, named ones may not.
    pub(crate) certificate: Option<ClientFiles>,
    pub(crate) sni: bool,
    pub(crate) min_version: TlsVersion,
    pub(crate) max_version: TlsVersion,
}

/// The client's certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) named: bool,
}

impl TlsSettings {
    pub(super) fn of_values(given: &Given<'_>, environment: &Environment) -> Result<Self> {
        let roots = match given.text("sslrootcert") {
            Some("system") => RootCertificates::System,
            Some(path) => RootCertificates::File {
                path: PathBuf::from(path),
                named: true,
            },
            None => match environment.in_home(".postgresql/root.crt") {
                Some(path) => RootCertificates::File { path, named: false },
                None => RootCertificates::None,
            },
        };
        let default = match roots {
            RootCertificates::System => SslMode::VerifyFull,
            _ if environment
                .variable("PGREQUIRESSL")
                .is_some_and(|value| value.starts_with('1')) =>
            {
                SslMode::Require
            }
            _ => SslMode::Prefer,
        };
        let mode = given.choice(
            "sslmode",
            default,
            &[
                ("disable", SslMode::Disable),
                ("allow", SslMode::Allow),
                ("prefer", SslMode::Prefer),
                ("require", SslMode::Require),
                ("verify-ca", SslMode::VerifyCa),
                ("verify-full", SslMode::VerifyFull),
            ],
        )?;
        if roots == RootCertificates::System && mode != SslMode::VerifyFull {
            return Err(problem(
                "sslrootcert=system needs sslmode=verify-full: anybody can get a certificate from a public authority"
                    .to_owned(),
            ));
        }
        let direct = given.choice(
            "sslnegotiation",
            false,
            &[("postgres", false), ("direct", true)],
        )?;
        if direct && mode < SslMode::Require {
            return Err(problem(
                "sslnegotiation=direct needs sslmode=require, verify-ca or verify-full".to_owned(),
            ));
        }
        let version = |keyword, default| {
            let versions = [
                ("", default),
                ("TLSv1", TlsVersion::V1),
                ("TLSv1.1", TlsVersion::V1_1),
                ("TLSv1.2", TlsVersion::V1_2),
                ("TLSv1.3", TlsVersion::V1_3),
            ];
            given.choice(keyword, default, &versions)
        };
        let min_version = version("ssl_min_protocol_version", TlsVersion::V1_2)?;
        let max_version = version("ssl_max_protocol_version", TlsVersion::V1_3)?;
        if max_version < min_version.max(TlsVersion::V1_2) {
            return Err(problem(
                "ssl_max_protocol_version allows no version: TLSv1.2 and TLSv1.3 are spoken, and not less than \
                 ssl_min_protocol_version"
                    .to_owned(),
            ));
        }
        Ok(Self {
            mode,
            direct,
            roots,
            revocations: given.text("sslcrl").map(PathBuf::from).or_else(|| {
                environment
                    .in_home(".postgresql/root.crl")
                    .filter(|path| path.exists())
            }),
            certificate: client_files(given, environment),
            sni: given.number("sslsni")? != Some(0),
            min_version,
            max_version,
        })
    }
}

fn client_files(given: &Given<'_>, environment: &Environment) -> Option<ClientFiles> {
    if given.text("sslcertmode") == Some("disable") {
        return None;
    }
    let file = |keyword: &str, default: &str| match given.text(keyword) {
        Some(path) => Some(PathBuf::from(path)),
        None => environment.in_home(default),
    };
    Some(ClientFiles {
        certificate: file("sslcert", ".postgresql/postgresql.crt")?,
        key: file("sslkey", ".postgresql/postgresql.key")?,
        named: given.text("sslcert").is_some(),
    })
}
