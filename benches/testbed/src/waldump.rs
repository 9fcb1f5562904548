//! [`transaction_ends`] and [`records`]: the content of the server's own WAL according to
//! `pg_waldump`. The oracle for plans, which shares no code with our decoder.

use std::process::Command;

use anyhow::{Context, Result};
use wal_format::{Lsn, PgTimestamp};

use crate::{cluster::Cluster, programs::succeed};

/// The kind of a transaction record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ABORT.
    Abort,
    /// `ABORT_PREPARED`.
    AbortPrepared,
    /// COMMIT.
    Commit,
    /// `COMMIT_PREPARED`.
    CommitPrepared,
    /// PREPARE.
    Prepare,
}

impl Kind {
    /// Returns true if the transaction's work is visible afterwards.
    #[must_use]
    pub fn is_commit(self) -> bool {
        matches!(self, Self::Commit | Self::CommitPrepared)
    }

    /// Returns true if a recovery to a time or a transaction may stop at it.
    #[must_use]
    pub fn is_end(self) -> bool {
        self != Self::Prepare
    }
}

/// A record of the transaction manager.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionRecord {
    /// The start LSN.
    pub lsn: Lsn,
    /// The transaction ID. For `COMMIT_PREPARED` and `ABORT_PREPARED`, that of the prepared
    /// transaction.
    pub xid: u32,
    /// Its `xact_time`.
    pub time: PgTimestamp,
    /// Its kind.
    pub kind: Kind,
    /// The name of a prepared transaction, in PREPARE only.
    pub gid: Option<String>,
}

fn pg_waldump(cluster: &Cluster, from: Lsn, to: Lsn) -> Result<Command> {
    let mut command = cluster.program("pg_waldump")?;
    command.env("TZ", "UTC");
    command.arg("-p").arg(cluster.data().join("pg_wal"));
    command.args(["-s", &from.to_string(), "-e", &to.to_string()]);
    Ok(command)
}

/// Returns every transaction record of timeline 1 in `[from, to)`, in order.
///
/// # Errors
/// The message of `pg_waldump`, or the line that could not be parsed.
pub fn transaction_ends(cluster: &Cluster, from: Lsn, to: Lsn) -> Result<Vec<TransactionRecord>> {
    let text = succeed(pg_waldump(cluster, from, to)?.args(["-r", "Transaction"]))?;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(record) =
            transaction(line).with_context(|| format!("pg_waldump's line {line:?}"))?
        {
            found.push(record);
        }
    }
    Ok(found)
}

/// Returns the start of every record of timeline 1 in `[from, to)`.
///
/// # Errors
/// The message of `pg_waldump`.
pub fn records(cluster: &Cluster, from: Lsn, to: Lsn) -> Result<Vec<Lsn>> {
    let text = succeed(&mut pg_waldump(cluster, from, to)?)?;
    Ok(text.lines().filter_map(lsn_of).collect())
}

fn lsn_of(line: &str) -> Option<Lsn> {
    let (_, rest) = line.split_once("lsn: ")?;
    rest.split(',').next()?.parse().ok()
}

fn transaction(line: &str) -> Result<Option<TransactionRecord>> {
    let (_, description) = line.split_once("desc: ").context("it has no description")?;
    let (name, rest) = description.split_once(' ').unwrap_or((description, ""));
    let kind = match name {
        "ABORT" => Kind::Abort,
        "ABORT_PREPARED" => Kind::AbortPrepared,
        "COMMIT" => Kind::Commit,
        "COMMIT_PREPARED" => Kind::CommitPrepared,
        "PREPARE" => Kind::Prepare,
        // ASSIGNMENT and INVALIDATION concern running transactions.
        _ => return Ok(None),
    };
    let (_, xid) = line.split_once("tx:").context("it has no transaction")?;
    let mut xid: u32 = xid.split(',').next().unwrap_or_default().trim().parse()?;
    let (mut gid, mut time) = (None, rest);
    if kind == Kind::Prepare {
        let (name, after) = rest
            .strip_prefix("gid ")
            .and_then(|rest| rest.split_once(": "))
            .context("it has no gid")?;
        (gid, time) = (Some(name.to_owned()), after);
    } else if let Some((prepared, after)) = rest.split_once(": ")
        && let Ok(prepared) = prepared.parse()
    {
        (xid, time) = (prepared, after);
    }
    let time = time.get(..26).context("it has no time")?;
    let time: jiff::Timestamp = format!("{time}Z").parse()?;
    Ok(Some(TransactionRecord {
        lsn: lsn_of(line).context("it has no LSN")?,
        xid,
        time: PgTimestamp::from_jiff(time),
        kind,
        gid,
    }))
}
