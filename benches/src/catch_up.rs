//! Catch-up: `wal-archiver` and `pg_receivewal --synchronous --compress=lz4` receive the same
//! gigabyte of pgbench WAL, alternately, from slots that were created before the load.
//!
//! Our program is timed twice: until the server has received our flush position of the last byte
//! (which is also what `pg_receivewal` is timed for), and until the repository contains everything,
//! sealed, read back and compared, with every commit in the catalog.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use wal_format::Lsn;

use testbed::{
    cluster::Cluster,
    programs::{directory, ours},
    usage::{Usage, Watched},
};

const PATIENCE: Duration = Duration::from_secs(600);
/// pgbench transactions between two checks of the amount of WAL.
const TRANSACTIONS: &str = "20000";

/// The parameters of a measurement.
#[derive(Clone, Debug)]
pub struct CatchUp {
    /// The amount of WAL to produce, in bytes.
    pub wal_bytes: u64,
    /// The number of runs of each program.
    pub runs: u32,
    /// `wal_compression` of the server.
    pub wal_compression: String,
}

/// One run of one program.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Seconds until the last byte was durable here.
    pub seconds: f64,
    /// Seconds until everything was in the repository. Equals `seconds` for `pg_receivewal`.
    pub stored_seconds: f64,
    /// The size of the resulting files.
    pub stored_bytes: u64,
    /// Processor time and memory.
    pub usage: Usage,
}

/// Pairs of runs, and the amount of WAL in each.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The WAL of each run in bytes.
    pub wal_bytes: u64,
    /// Our run and theirs for each round.
    pub rounds: Vec<(Run, Run)>,
}

impl CatchUp {
    /// Produces the WAL and runs the measurement.
    ///
    /// # Errors
    /// The message of the program that failed.
    pub fn measure(&self, bin: &Path, say: &dyn Fn(&str)) -> Result<Measured> {
        let settings = format!(
            "max_replication_slots = {0}\nmax_wal_senders = 8\nshared_buffers = 512MB\nfsync = off\n\
             synchronous_commit = off\nmax_wal_size = 1GB\nautovacuum = off\nwal_compression = {1}",
            self.runs * 2 + 2,
            self.wal_compression
        );
        let cluster = Cluster::start(bin, 16, &settings)?;
        let mut sql = cluster.connect()?;
        cluster.pgbench(&["-q", "-i", "-s", "50"])?;
        sql.batch_execute("CHECKPOINT; SELECT pg_switch_wal()")?;
        for round in 0..self.runs {
            for name in ["ours", "theirs"] {
                let name = format!("{name}_{round}");
                sql.execute(
                    "SELECT pg_create_physical_replication_slot($1, true)",
                    &[&name],
                )?;
            }
        }
        let position = |sql: &mut postgres::Client| -> Result<Lsn> {
            let text: String = sql
                .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])?
                .get(0);
            Ok(text.parse()?)
        };
        let slot_start: String = sql
            .query_one(
                "SELECT min(restart_lsn)::text FROM pg_replication_slots",
                &[],
            )?
            .get(0);
        let start: Lsn = slot_start.parse()?;
        say("making WAL with pgbench");
        loop {
            let made = position(&mut sql)?.bytes_since(start);
            if made >= self.wal_bytes {
                break;
            }
            cluster.pgbench(&["-n", "-c", "8", "-j", "2", "-t", TRANSACTIONS])?;
        }
        // Complete segments for both: pg_receivewal does not compress an open one.
        sql.batch_execute("CHECKPOINT; SELECT pg_switch_wal()")?;
        let end: String = sql
            .query_one("SELECT pg_current_wal_lsn()::text", &[])?
            .get(0);
        let end: Lsn = end.parse::<Lsn>()?.align_down(16 << 20);
        let wal_bytes = end.bytes_since(start.align_down(16 << 20));
        say(&format!("{} MB of WAL", wal_bytes / 1_000_000));
        let mut rounds = Vec::new();
        for round in 0..self.runs {
            let ours = || run_ours(&cluster, round, end);
            let theirs = || run_theirs(&cluster, round, end);
            // Alternate the order, so that neither program always finds the machine as the other
            // left it.
            let pair = if round % 2 == 0 {
                let ours = ours()?;
                (ours, theirs()?)
            } else {
                let theirs = theirs()?;
                (ours()?, theirs)
            };
            say(&format!(
                "run {}: ours {:.2} s flushed, {:.2} s stored; pg_receivewal {:.2} s",
                round + 1,
                pair.0.seconds,
                pair.0.stored_seconds,
                pair.1.seconds
            ));
            rounds.push(pair);
        }
        Ok(Measured { wal_bytes, rounds })
    }
}

fn run_theirs(cluster: &Cluster, round: u32, end: Lsn) -> Result<Run> {
    let place = directory()?;
    let mut receive = cluster.program("pg_receivewal")?;
    receive.arg("-D").arg(place.path()).args([
        "--synchronous",
        "--compress=lz4",
        "--no-loop",
        "--no-password",
        &format!("--slot=theirs_{round}"),
        &format!("--endpos={end}"),
        "-d",
        &cluster.conninfo(),
    ]);
    let child = receive.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let (seconds, usage) = Watched::new(child).end()?;
    Ok(Run {
        seconds,
        stored_seconds: seconds,
        stored_bytes: bytes_below(place.path())?,
        usage,
    })
}

fn run_ours(cluster: &Cluster, round: u32, end: Lsn) -> Result<Run> {
    let place = directory()?;
    let root = place.path();
    let configuration = root.join("tidemark.toml");
    fs::write(
        &configuration,
        format!("slot = \"ours_{round}\"\nhttp = \"127.0.0.1:0\"\n"),
    )?;
    let log = root.join("log");
    let mut run = testbed::programs::command(&ours("wal-archiver")?)?;
    run.arg("--config").arg(&configuration);
    run.arg(format!("--repository=file://{}/repository", root.display()));
    run.arg(format!("--spool={}/spool", root.display()));
    run.args(["--conninfo", &cluster.conninfo(), "run"]);
    let child = run
        .env("TIDEMARK_LOG", "info")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()?;
    let mut watched = Watched::new(child);
    let measured = (|| {
        let mut address = None;
        watched.until(PATIENCE, || {
            address = testbed::place::served_address(&fs::read_to_string(&log)?);
            Ok(address.is_some())
        })?;
        let address = address.context("no address")?;
        let seconds = watched.until(PATIENCE, || Ok(durable(address, "local")? >= Some(end)))?;
        let stored_seconds =
            watched.until(PATIENCE, || Ok(durable(address, "remote")? >= Some(end)))?;
        // The stop is part of our cost: the processor time includes it.
        Ok((seconds, stored_seconds))
    })();
    let (seconds, stored_seconds) = match measured {
        Ok(both) => both,
        Err(error) => {
            let error: anyhow::Error = error;
            bail!("{error:#}; its log:\n{}", fs::read_to_string(&log)?)
        }
    };
    let usage = watched.terminate()?;
    Ok(Run {
        seconds,
        stored_seconds,
        stored_bytes: bytes_below(&root.join("repository"))?,
        usage,
    })
}

/// Returns the durable LSN of a tier that the daemon reports.
fn durable(address: SocketAddr, tier: &str) -> Result<Option<Lsn>> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(
        b"GET /api/v1/clusters HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without a body")?;
    let clusters: serde_json::Value = serde_json::from_str(body)?;
    let lsn = &clusters[0]["durable"][tier]["lsn"];
    Ok(lsn.as_str().map(str::parse).transpose()?)
}

fn bytes_below(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            bytes_below(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}

impl Measured {
    /// Formats the ratios as a Markdown table: median, minimum and maximum of the rounds. Above 1
    /// is in our favour.
    ///
    /// # Errors
    /// Without any round.
    pub fn table(&self) -> Result<String> {
        ensure!(!self.rounds.is_empty(), "nothing was measured");
        let rows: [(&str, &dyn Fn(&Run, &Run) -> f64); 5] = [
            ("speed until flushed", &|ours, theirs| {
                theirs.seconds / ours.seconds
            }),
            (
                "speed until stored, verified and indexed",
                &|ours, theirs| theirs.seconds / ours.stored_seconds,
            ),
            ("compression", &|ours, theirs| {
                ratio(theirs.stored_bytes, ours.stored_bytes)
            }),
            ("processor time", &|ours, theirs| {
                theirs.usage.cpu_seconds / ours.usage.cpu_seconds
            }),
            ("peak memory", &|ours, theirs| {
                ratio(theirs.usage.peak_kib, ours.usage.peak_kib)
            }),
        ];
        let mut table =
            "| pg_receivewal / wal-archiver | median | least | greatest |\n|---|---|---|---|\n"
                .to_owned();
        for (name, of) in rows {
            let mut values: Vec<f64> = self.rounds.iter().map(|(a, b)| of(a, b)).collect();
            values.sort_by(f64::total_cmp);
            let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
            table.push_str(&format!(
                "| {name} | {:.2} | {:.2} | {:.2} |\n",
                at(values.len() / 2),
                at(0),
                at(values.len() - 1)
            ));
        }
        Ok(table)
    }

    /// Formats the underlying numbers, one line per run.
    #[must_use]
    pub fn figures(&self) -> String {
        let mut text = String::new();
        for (ours, theirs) in &self.rounds {
            for (name, run) in [("wal-archiver", ours), ("pg_receivewal", theirs)] {
                text.push_str(&format!(
                    "{name:14} {:6.2} s flushed {:6.2} s stored {:5.0} MB/s {:5.2} x {:6.2} s CPU {:4} MiB\n",
                    run.seconds,
                    run.stored_seconds,
                    ratio(self.wal_bytes, 1_000_000) / run.seconds,
                    ratio(self.wal_bytes, run.stored_bytes),
                    run.usage.cpu_seconds,
                    run.usage.peak_kib / 1024,
                ));
            }
        }
        text
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a ratio of sizes needs no 53 bits"
)]
fn ratio(dividend: u64, divisor: u64) -> f64 {
    dividend as f64 / divisor as f64
}
