//! The keywords of libpq 18, their environment variables, and their treatment here.
//!
//! Invariant: a keyword that would change the result for the user is either obeyed or refused,
//! never ignored.

use super::super::{Error, Result};

/// A keyword of a connection string.
#[derive(Debug)]
pub(super) struct Keyword {
    pub(super) name: &'static str,
    pub(super) variable: Option<&'static str>,
    support: Support,
}

#[derive(Debug)]
enum Support {
    /// The keyword is obeyed.
    Used,
    /// As `Used`, and the value is never shown.
    Secret,
    /// The keyword does not affect anything that the archiver does.
    WithoutEffect,
    /// Only the listed values, which request nothing, are accepted. Any other value is refused with
    /// the remedy.
    Refused(&'static [&'static str], &'static str),
}

use Support::{Refused, Secret, Used, WithoutEffect};

const NO_GSS: &str = "GSSAPI is not supported; use TLS (sslmode) and a password or a certificate";
const NO_OAUTH: &str = "OAuth is not supported; use a password or a certificate";
const NO_KEYS: &str = "SCRAM keys are not supported; use a password";

const fn keyword(name: &'static str, variable: Option<&'static str>, support: Support) -> Keyword {
    Keyword {
        name,
        variable,
        support,
    }
}

/// In libpq's order (`PQconninfoOptions`). The GSSAPI keywords have no variable here: by themselves
/// they request nothing, and the environment is shared with other programs.
pub(super) static KEYWORDS: [Keyword; 50] = [
    keyword("service", Some("PGSERVICE"), Used),
    keyword("user", Some("PGUSER"), Used),
    keyword("password", Some("PGPASSWORD"), Secret),
    keyword("passfile", Some("PGPASSFILE"), Used),
    keyword("channel_binding", Some("PGCHANNELBINDING"), Used),
    keyword("connect_timeout", Some("PGCONNECT_TIMEOUT"), Used),
    keyword("dbname", Some("PGDATABASE"), Used),
    keyword("host", Some("PGHOST"), Used),
    keyword("hostaddr", Some("PGHOSTADDR"), Used),
    keyword("port", Some("PGPORT"), Used),
    // Messages are read as UTF-8, regardless of the environment.
    keyword("client_encoding", Some("PGCLIENTENCODING"), WithoutEffect),
    keyword("options", Some("PGOPTIONS"), Used),
    keyword("application_name", Some("PGAPPNAME"), Used),
    keyword("fallback_application_name", None, Used),
    keyword("keepalives", None, Used),
    keyword("keepalives_idle", None, Used),
    keyword("keepalives_interval", None, Used),
    keyword("keepalives_count", None, Used),
    keyword("tcp_user_timeout", None, Used),
    keyword("sslmode", Some("PGSSLMODE"), Used),
    keyword("sslnegotiation", Some("PGSSLNEGOTIATION"), Used),
    // Without effect in libpq too.
    keyword("sslcompression", Some("PGSSLCOMPRESSION"), WithoutEffect),
    keyword("sslcert", Some("PGSSLCERT"), Used),
    keyword("sslkey", Some("PGSSLKEY"), Used),
    keyword("sslpassword", None, Secret),
    keyword(
        "sslcertmode",
        Some("PGSSLCERTMODE"),
        Refused(
            &["allow", "disable"],
            "sslcertmode=require is not supported; let pg_hba.conf demand the certificate (clientcert=verify-full)",
        ),
    ),
    keyword("sslrootcert", Some("PGSSLROOTCERT"), Used),
    keyword("sslcrl", Some("PGSSLCRL"), Used),
    keyword(
        "sslcrldir",
        Some("PGSSLCRLDIR"),
        Refused(&[""], "put the lists into one file and name it as sslcrl"),
    ),
    keyword("sslsni", Some("PGSSLSNI"), Used),
    keyword(
        "sslkeylogfile",
        None,
        Refused(&[""], "the keys of a connection are never written down"),
    ),
    keyword("requirepeer", Some("PGREQUIREPEER"), Used),
    keyword("require_auth", Some("PGREQUIREAUTH"), Used),
    keyword(
        "min_protocol_version",
        Some("PGMINPROTOCOLVERSION"),
        Refused(&["3.0"], "version 3.0 of the protocol is spoken"),
    ),
    keyword(
        "max_protocol_version",
        Some("PGMAXPROTOCOLVERSION"),
        WithoutEffect,
    ),
    keyword(
        "ssl_min_protocol_version",
        Some("PGSSLMINPROTOCOLVERSION"),
        Used,
    ),
    keyword(
        "ssl_max_protocol_version",
        Some("PGSSLMAXPROTOCOLVERSION"),
        Used,
    ),
    keyword(
        "gssencmode",
        Some("PGGSSENCMODE"),
        Refused(&["disable", "prefer"], NO_GSS),
    ),
    keyword("krbsrvname", None, Refused(&[""], NO_GSS)),
    keyword("gsslib", None, Refused(&[""], NO_GSS)),
    keyword("gssdelegation", None, Refused(&["0"], NO_GSS)),
    // The archiver sets the purpose of a connection itself, as pg_receivewal does.
    keyword("replication", None, WithoutEffect),
    keyword("target_session_attrs", Some("PGTARGETSESSIONATTRS"), Used),
    keyword("load_balance_hosts", Some("PGLOADBALANCEHOSTS"), Used),
    keyword("scram_client_key", None, Refused(&[""], NO_KEYS)),
    keyword("scram_server_key", None, Refused(&[""], NO_KEYS)),
    keyword("oauth_issuer", None, Refused(&[""], NO_OAUTH)),
    keyword("oauth_client_id", None, Refused(&[""], NO_OAUTH)),
    keyword("oauth_client_secret", None, Refused(&[""], NO_OAUTH)),
    keyword("oauth_scope", None, Refused(&[""], NO_OAUTH)),
];

impl Keyword {
    /// Finds a keyword by its exact name, as libpq does.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        KEYWORDS.iter().find(|keyword| keyword.name == name)
    }

    /// Returns true if the value must not be shown.
    pub(super) fn is_secret(&self) -> bool {
        matches!(self.support, Secret)
    }

    /// Refuses a value that cannot be obeyed. `origin` says where it was set.
    pub(super) fn check(&self, value: &str, origin: &str) -> Result<()> {
        match self.support {
            Refused(harmless, remedy) if !harmless.contains(&value) => Err(Error::ConnInfo {
                problem: format!("{} ({origin}) is refused: {remedy}", self.name),
            }),
            _ => Ok(()),
        }
    }

    /// Returns a suggestion for an unknown keyword. Text that resembles no keyword is not repeated:
    /// after a password with an unquoted space it may be the rest of that password.
    pub(super) fn advice(unknown: &str) -> String {
        let nearest = KEYWORDS
            .iter()
            .map(|keyword| {
                (
                    strsim::damerau_levenshtein(unknown, keyword.name),
                    keyword.name,
                )
            })
            .min();
        match nearest {
            Some((distance, name)) if distance <= 2 && distance * 3 <= name.len() => {
                format!("{unknown:?} is no keyword; did you mean \"{name}\"?")
            }
            _ => "it has an unknown keyword (not shown: it may be part of a password); known are host, port, user, \
                  dbname, password, sslmode and the others of libpq; quote a value that holds spaces"
                .to_owned(),
        }
    }
}
