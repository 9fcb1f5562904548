//! Loss of the archiver's host: its process, its spool and its catalog disappear at once, and only
//! the bucket remains.
//!
//! Repeats on one primary under load: kill, wipe, restore from the bucket alone, measure the loss,
//! continue with an empty spool.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    cluster::{Cluster, connect},
    ledger::{Ledger, Loss, measure},
    object_store::ObjectStoreServer,
    place::{Place, random_pause},
    programs::succeed,
    restored::Restored,
};

/// The maximum time between our status update to PostgreSQL and the client's notice of the commit.
const REPLIES: Duration = Duration::from_millis(300);

/// Loses the host `times` times. `settings` are lines of `tidemark.toml`. Returns the loss and the
/// duration of the restore each time.
///
/// # Errors
/// Any failure.
pub fn run(
    bin: &Path,
    store: ObjectStoreServer,
    settings: &str,
    times: u32,
    say: &dyn Fn(&str),
) -> Result<Vec<(Loss, Duration)>> {
    let cluster = Cluster::start(bin, 16, "")?;
    let place = Place::in_bucket(store, settings)?;
    let mut daemon = place.daemon(&cluster, "127.0.0.1:0")?;
    connect(&cluster.conninfo())?
        .batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'tidemark'")?;
    connect(&cluster.conninfo())?.batch_execute("SELECT pg_reload_conf()")?;
    let ledger = Ledger::start(&cluster.conninfo(), 4)?;
    let mut backup = place.program("wal-archiver")?;
    let conninfo = cluster.conninfo();
    say(&succeed(backup.args(["--conninfo", &conninfo, "backup"]))?);
    let mut losses = Vec::new();
    for time in 1..=times {
        // Waits from the first streamed byte into steady work.
        std::thread::sleep(Duration::from_secs(1) + random_pause());
        daemon.kill()?;
        std::thread::sleep(REPLIES);
        let acknowledged = ledger.acknowledged();
        std::fs::remove_dir_all(place.path().join("spool"))?;
        let began = Instant::now();
        let restored = Restored::start::<&str>(&place, bin, &[])?;
        let duration = began.elapsed();
        let loss = measure(&mut restored.connect()?, &acknowledged)?;
        say(&format!(
            "loss {time}: {} of {} acknowledged transfers missing, {:.3} s; restored in {:.1} s",
            loss.transfers,
            acknowledged.len(),
            loss.seconds,
            duration.as_secs_f64()
        ));
        losses.push((loss, duration));
        drop(restored);
        daemon = place.daemon(&cluster, "127.0.0.1:0")?;
    }
    cluster.destroy()?;
    daemon.stop()?;
    ledger.finish()?;
    say(&succeed(
        place.program("wal-archiver")?.args(["verify", "--deep"]),
    )?);
    Ok(losses)
}

/// Returns the value below which a `share` of the sorted values is.
#[must_use]
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place among a few dozen values"
    )]
    let at = (share * last as f64).ceil() as usize;
    sorted.get(at.min(last)).copied().unwrap_or_default()
}
