//! The role to connect to a restored server with: from the files of its data directory, and by
//! connecting.

use std::{fs, path::Path, time::Duration};

use wal_format::PgVersion;

use crate::{
    Result,
    heap::{mapped, rows},
    plan::PreparedTransaction,
    sql::{Address, Refused},
    start::{Interrupt, SILENCE_MAX},
};

/// The OID of `pg_authid`.
const PG_AUTHID: u32 = 1260;
/// `BOOTSTRAP_SUPERUSERID`.
const BOOTSTRAP: u32 = 10;
/// The places of the columns of `pg_authid` (`FormData_pg_authid`), which are the same in all
/// versions.
const OID_AT: usize = 0;
const NAME_AT: usize = 4;
const IS_SUPERUSER_AT: usize = 68;
const MAY_LOG_IN_AT: usize = 72;
/// The maximum length of `pg_authid`'s file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// `invalid_authorization_specification`: the role does not exist or may not log in.
const NO_ROLE: &str = "28000";
/// Databases that exist on almost every server.
const DATABASES: [&str; 2] = ["postgres", "template1"];
/// The superuser of initdb, if it may log in, and the version of the server.
const FACTS: &str = "SELECT coalesce((SELECT rolname FROM pg_catalog.pg_roles WHERE oid = 10 AND rolcanlogin), current_user) \
     UNION ALL SELECT current_setting('server_version')";

/// A role that could connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Login {
    /// The superuser of initdb if it may log in, else the role that connected.
    pub(crate) role: String,
    pub(crate) database: String,
    pub(crate) server_version: Option<String>,
}

/// The reason why no role could connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoLogin {
    /// The server's answers.
    Refused(String),
    /// The server did not answer in time.
    NoAnswer(String),
}

/// Returns the settings of our sessions in the notation of `PGOPTIONS`. A time limit, a read-only
/// default or a login event trigger of the parent must not decide a query, and the trigger's
/// function must not run.
pub(crate) fn session_options(version: PgVersion) -> String {
    let mut settings = vec![
        "statement_timeout=0",
        "lock_timeout=0",
        "idle_in_transaction_session_timeout=0",
        "default_transaction_read_only=off",
    ];
    if version >= PgVersion::V17 {
        settings.push("event_triggers=off");
    }
    let options: Vec<String> = settings.iter().map(|one| format!("-c {one}")).collect();
    options.join(" ")
}

/// Returns the superusers that may log in according to the files of a data directory, the one of
/// initdb first. The files may be older than the state that the server recovers to.
pub(crate) fn superusers_in(directory: &Path) -> Vec<String> {
    let read = |name: &str| {
        let path = directory.join("global").join(name);
        let length = fs::metadata(&path).ok()?.len();
        (length <= FILE_BYTES_MAX).then(|| fs::read(&path).ok())?
    };
    let map = read("pg_filenode.map").unwrap_or_default();
    let file = mapped(&map, PG_AUTHID).and_then(|file| read(&file.to_string()));
    let file = file.unwrap_or_default();
    let mut found: Vec<(bool, String)> = Vec::new();
    for row in rows(&file) {
        let is_set = |at: usize| row.byte(at) == Some(1);
        if let (true, Some(oid), Some(name)) = (
            is_set(IS_SUPERUSER_AT) && is_set(MAY_LOG_IN_AT),
            row.u32(OID_AT),
            row.name(NAME_AT),
        ) {
            found.push((oid != BOOTSTRAP, name));
        }
    }
    // The newer version of a row usually has the later place.
    found.reverse();
    found.sort_by_key(|(is_other, _)| *is_other);
    let mut names: Vec<String> = found.into_iter().map(|(_, name)| name).collect();
    names.dedup();
    names
}

/// Returns the roles that may exist in a copy in `directory`, the most likely first.
pub(crate) fn candidates(directory: &Path, conninfo: &str) -> Vec<String> {
    let mut names = superusers_in(directory);
    let usual = ["postgres".to_owned()].into_iter();
    let usual = usual.chain(std::env::var("USER").ok());
    for name in usual.chain(conninfo_user(conninfo)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Connects as each of these roles until one succeeds. Without an answer, no other role is tried.
/// `in_doubt` are the prepared transactions of the copy, whose locks a connection may wait for.
/// `tell` receives a notice of a long wait.
///
/// # Errors
/// [`crate::Error::Interrupted`].
pub(crate) fn connect(
    address: &Address,
    candidates: &[String],
    (limit, in_doubt): (Duration, &[PreparedTransaction]),
    interrupt: &Interrupt,
    tell: &dyn Fn(&str),
) -> Result<std::result::Result<Login, NoLogin>> {
    let mut said = Vec::new();
    for user in candidates {
        let address = Address {
            user: user.clone(),
            ..address.clone()
        };
        for database in DATABASES {
            let slow = || tell(&waits_for_connection(user, database, SILENCE_MAX, in_doubt));
            match address.query_reporting(database, FACTS, limit, interrupt, &slow)? {
                Ok(rows) => {
                    let mut rows = rows.into_iter().flatten();
                    return Ok(Ok(Login {
                        role: rows.next().unwrap_or_else(|| user.clone()),
                        database: database.to_owned(),
                        server_version: rows.next(),
                    }));
                }
                Err(refused) if refused.is_timeout() => {
                    let said = waits_for_connection(user, database, limit, in_doubt);
                    return Ok(Err(NoLogin::NoAnswer(said)));
                }
                Err(Refused { code, message }) => {
                    said.push(format!("{user} in {database}: {message}"));
                    if code.as_deref() == Some(NO_ROLE) {
                        break;
                    }
                }
            }
        }
    }
    Ok(Err(NoLogin::Refused(said.join("; "))))
}

/// Returns the state of a connection without an answer. A prepared transaction keeps its locks in
/// the copy, and a session reads catalogs such as `pg_authid` before it can run SQL.
fn waits_for_connection(
    user: &str,
    database: &str,
    waited: Duration,
    in_doubt: &[PreparedTransaction],
) -> String {
    let names: Vec<String> = in_doubt.iter().map(PreparedTransaction::named).collect();
    let reason = if names.is_empty() {
        "the server's log may say what it waits for".to_owned()
    } else {
        format!(
            "it may wait for a lock on a system catalog, which a prepared transaction of the parent              holds: {}; end it on the parent with COMMIT PREPARED or ROLLBACK PREPARED and restore a              later target, or restore one from before it was prepared",
            names.join(", ")
        )
    };
    format!(
        "the connection as {user} to database {database} has no answer after {} s; {reason}",
        waited.as_secs()
    )
}

/// Returns the user of a connection string, if it names one without quotation marks.
fn conninfo_user(conninfo: &str) -> Option<String> {
    let user = match conninfo.split_once("://") {
        Some((_, rest)) => rest.split_once('@')?.0.split(':').next()?,
        None => conninfo
            .split_whitespace()
            .find_map(|word| word.strip_prefix("user="))?,
    };
    Some(user.to_owned()).filter(|user| !user.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_a_connection_string_is_found() {
        for (conninfo, user) in [
            ("host=/run user=tide port=1", Some("tide")),
            ("postgresql://tide:secret@h/db", Some("tide")),
            ("postgresql://h/db", None),
            ("host=h", None),
        ] {
            assert_eq!(conninfo_user(conninfo).as_deref(), user, "{conninfo}");
        }
    }
}
