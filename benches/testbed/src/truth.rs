//! Compares the RPO on the dashboard with the real loss: a writer inserts a timestamp every 10 ms,
//! server and archiver are killed at a random instant, and only the repository remains.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    cluster::{Cluster, connect},
    object_store::ObjectStoreServer,
    place::{Place, random_pause},
    programs::succeed,
    restored::Restored,
};

/// The interval between two rows.
const STAMP_INTERVAL: Duration = Duration::from_millis(10);

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// The last displayed `rpo_seconds{tier="remote"}`.
    pub reported: f64,
    /// Seconds from the newest restored row to the kill.
    pub real: f64,
}

/// Kills everything `times` times.
///
/// # Errors
/// Any failure.
pub fn run(bin: &Path, times: u32, say: &dyn Fn(&str)) -> Result<Vec<Death>> {
    (1..=times)
        .map(|time| {
            let death = die(bin).with_context(|| format!("death {time}"))?;
            say(&format!(
                "death {time}: reported {:.3} s, really lost {:.3} s",
                death.reported, death.real
            ));
            Ok(death)
        })
        .collect()
}

fn die(bin: &Path) -> Result<Death> {
    let cluster = Cluster::start(bin, 16, "")?;
    // The bucket remains, or a folder if no store is installed.
    let place = match ObjectStoreServer::start_or_skip() {
        Some(store) => Place::in_bucket(store, "")?,
        None => Place::new()?,
    };
    let daemon = place.daemon(&cluster, "127.0.0.1:0")?;
    let mut client = connect(&cluster.conninfo())?;
    client.batch_execute("CREATE TABLE stamp (at timestamptz NOT NULL)")?;
    let mut backup = place.program("wal-archiver")?;
    succeed(backup.args(["--conninfo", &cluster.conninfo(), "backup"]))?;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            // Ends with the server.
            while !stop.load(Ordering::Relaxed)
                && client
                    .execute("INSERT INTO stamp VALUES (clock_timestamp())", &[])
                    .is_ok()
            {
                thread::sleep(STAMP_INTERVAL);
            }
        }
    });
    thread::sleep(Duration::from_secs(1) + random_pause());
    let address = daemon.address()?.context("the daemon serves HTTP")?;
    let reported = reported(address)?;
    let died = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    daemon.kill()?;
    cluster.destroy()?;
    stop.store(true, Ordering::Relaxed);
    drop(writer.join());
    std::fs::remove_dir_all(place.path().join("spool"))?;
    let restored = Restored::start::<&str>(&place, bin, &[])?;
    let newest: f64 = restored
        .connect()?
        .query_one("SELECT extract(epoch FROM max(at))::float8 FROM stamp", &[])?
        .get(0);
    Ok(Death {
        reported,
        real: (died - newest).max(0.0),
    })
}

fn reported(address: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET /api/v1/clusters/main HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("an answer")?;
    let report: Value = serde_json::from_str(body)?;
    report["durable"]["remote"]["rpo_seconds"]
        .as_f64()
        .context("the RPO is known while the archiver streams")
}

/// Returns how often each error of the displayed number occurred: `real - reported`, in steps of 10
/// ms. Lines in between may be empty.
#[must_use]
pub fn histogram(deaths: &[Death]) -> String {
    let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
    for death in deaths {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "seconds, in steps of 10 ms"
        )]
        let step = ((death.real - death.reported) / 0.01).floor() as i64;
        *counts.entry(step).or_default() += 1;
    }
    let (Some(first), Some(last)) = (
        counts.first_key_value().map(|(step, _)| *step),
        counts.last_key_value().map(|(step, _)| *step),
    ) else {
        return String::new();
    };
    (first..=last)
        .map(|step| {
            let marks = "#".repeat(counts.get(&step).copied().unwrap_or_default());
            format!(
                "{:+4} ms to {:+4} ms  {marks}\n",
                step * 10,
                (step + 1) * 10
            )
        })
        .collect()
}
