//! The main job, end to end: stream, take a backup, lose the primary, restore to the last commit
//! and to an earlier moment, and check both with the ledger. The demo shows it, the tests assert
//! it.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use jiff::Timestamp;

use crate::{
    cluster::{Cluster, connect},
    ledger::{Acknowledged, Ledger, Verdict, prove},
    place::{Place, random_pause},
    programs::succeed,
    restored::Restored,
};

/// The parameters of the job.
#[derive(Clone, Debug)]
pub struct Job {
    /// PostgreSQL's programs.
    pub bin: PathBuf,
    /// `wal_segment_size` in MiB.
    pub segment_mib: u32,
    /// True if data pages have checksums.
    pub checksums: bool,
    /// `wal_compression`, with the names of PostgreSQL 15. If the server was built without the
    /// method, it is left off, and the job says so.
    pub wal_compression: &'static str,
    /// The number of ledger clients.
    pub clients: i32,
    /// The duration of the load before the disaster.
    pub load: Duration,
    /// True if the archiver is killed together with the primary, so that its spool has to be
    /// recovered first.
    pub kill_archiver: bool,
    /// The number of kills of the archiver at random moments under load.
    pub kills: u32,
    /// `synchronous_standby_names`.
    pub standbys: &'static str,
    /// `synchronous_commit`.
    pub synchronous_commit: &'static str,
    /// The HTTP address. Port 0 means any.
    pub http: String,
}

/// The result of the job.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The `wal_compression` that was in effect.
    pub wal_compression: &'static str,
    /// The restore to the last commit.
    pub latest: Verdict,
    /// The restore to a moment in the middle.
    pub middle: Verdict,
    /// The time from the disaster until the restored server answered.
    pub recovery: Duration,
}

/// Runs the job. `say` receives a description of each step.
///
/// # Errors
/// The first violated guarantee.
pub fn run(job: &Job, say: &dyn Fn(&str)) -> Result<Outcome> {
    say("starting a throwaway PostgreSQL");
    let cluster = Cluster::start_with(&job.bin, job.segment_mib, job.checksums, "")?;
    let wal_compression = compress_wal(&mut cluster.connect()?, job.wal_compression)?;
    if wal_compression != job.wal_compression {
        say(&format!(
            "SKIPPED: this server was built without wal_compression = {}",
            job.wal_compression
        ));
    }
    let place = Place::new()?;
    let mut daemon = place.daemon(&cluster, &job.http)?;
    let address = daemon.address()?.context("its log names no address")?;
    say(&format!(
        "streaming its WAL; dashboard at http://{address} while this runs"
    ));
    // Every commit waits for the archiver, so no acknowledged transfer may be lost.
    let mut sql = connect(&cluster.conninfo())?;
    for (name, value) in [
        ("synchronous_commit", job.synchronous_commit),
        ("synchronous_standby_names", job.standbys),
    ] {
        sql.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'"))?;
    }
    sql.batch_execute("SELECT pg_reload_conf()")?;
    let ledger = Ledger::start(&cluster.conninfo(), job.clients)?;
    say("taking a base backup under load");
    let mut backup = place.program("wal-archiver")?;
    let said = succeed(backup.args([
        "--conninfo",
        &cluster.conninfo(),
        "backup",
        "--label",
        "first",
    ]))?;
    say(&said);
    std::thread::sleep(job.load / 2);
    let middle = Timestamp::now();
    for kill in 0..job.kills {
        if kill == 0 {
            say("killing the archiver at random moments");
        }
        daemon.kill()?;
        daemon = place.spawn(&cluster.conninfo(), "127.0.0.1:0")?;
        std::thread::sleep(random_pause());
    }
    if job.kills > 0 {
        daemon.kill()?;
        daemon = place.daemon(&cluster, "127.0.0.1:0")?;
    }
    std::thread::sleep(job.load / 2);
    say("killing the primary with -9 and removing its data directory");
    let disaster = Instant::now();
    if job.kill_archiver {
        daemon.kill()?;
        cluster.destroy()?;
        // Without a server to stream from, the archiver first stores the content of the spool.
        say("the archiver died too; a new one stores what its spool holds");
        let daemon = place.daemon_at(&cluster.conninfo(), "127.0.0.1:0", "not streaming")?;
        daemon.stop()?;
    } else {
        cluster.destroy()?;
        daemon.stop()?;
    }
    let acknowledged = ledger.finish()?;
    say(&format!(
        "{} transfers had been acknowledged",
        acknowledged.len()
    ));
    say("restoring to the last commit");
    let latest = restore(job, &place, None, &acknowledged, say)?;
    let recovery = disaster.elapsed();
    say(&format!("restoring to {middle}, in the middle of the load"));
    let middle = restore(job, &place, Some(middle), &acknowledged, say)?;
    say("verifying every object and every record of the archive");
    let said = succeed(place.program("wal-archiver")?.args(["verify", "--deep"]))?;
    say(&said);
    Ok(Outcome {
        wal_compression,
        latest,
        middle,
        recovery,
    })
}

/// Sets `wal_compression` and returns the value in effect. Before 15 there is one method, called
/// "on".
fn compress_wal(client: &mut postgres::Client, method: &'static str) -> Result<&'static str> {
    let version: String = client.query_one("SHOW server_version_num", &[])?.get(0);
    let value = match (version.parse::<u32>()? < 150_000, method) {
        (true, "pglz") => "on",
        _ => method,
    };
    if let Err(error) =
        client.batch_execute(&format!("ALTER SYSTEM SET wal_compression = '{value}'"))
    {
        let unknown = error.code() == Some(&postgres::error::SqlState::INVALID_PARAMETER_VALUE);
        return if unknown {
            Ok("off")
        } else {
            Err(error.into())
        };
    }
    client.batch_execute("SELECT pg_reload_conf()")?;
    Ok(method)
}

/// Restores, starts, checks, stops.
fn restore(
    job: &Job,
    place: &Place,
    until: Option<Timestamp>,
    acknowledged: &[Acknowledged],
    say: &dyn Fn(&str),
) -> Result<Verdict> {
    let arguments: Vec<String> = until
        .iter()
        .map(|until| format!("--target-time={until:.6}"))
        .collect();
    let restored = Restored::start(place, &job.bin, &arguments)?;
    let stopped = restored.stopped();
    say(&format!("PostgreSQL stopped {stopped}, as planned"));
    let until = until
        .map(|until| Timestamp::from_microsecond(until.as_microsecond()))
        .transpose()?;
    prove(&mut restored.connect()?, acknowledged, until)
}
