//! Commit latency: the time that a commit waits for its synchronous standby, `wal-archiver` or
//! `pg_receivewal --synchronous`, alternately on one server, for each number of clients.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use postgres::Client;

use testbed::{cluster::Cluster, place::Place, programs::directory};

const PATIENCE: Duration = Duration::from_secs(60);
/// One small row, so that the commit is the only cost.
const SCRIPT: &str = "INSERT INTO latency VALUES (1);\n";

/// The parameters of a measurement.
#[derive(Clone, Debug)]
pub struct CommitLatency {
    /// Numbers of clients.
    pub clients: Vec<u32>,
    /// The seconds of each run.
    pub seconds: u32,
    /// The runs of each program for each number of clients.
    pub runs: u32,
}

/// One run of pgbench, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// The median commit.
    pub median: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// Commits per second.
    pub tps: f64,
}

/// Our runs and theirs, for one number of clients.
#[derive(Clone, Debug)]
pub struct AtClients {
    /// The number of clients.
    pub clients: u32,
    /// Pairs of runs.
    pub rounds: Vec<(Latency, Latency)>,
}

#[derive(Clone, Copy)]
enum Standby {
    Ours,
    Theirs,
}

impl CommitLatency {
    /// Runs the measurement.
    ///
    /// # Errors
    /// The message of the program that failed.
    pub fn measure(&self, bin: &Path, say: &dyn Fn(&str)) -> Result<Vec<AtClients>> {
        let cluster = Cluster::start(bin, 16, "max_wal_senders = 8\nmax_connections = 100")?;
        let mut sql = cluster.connect()?;
        sql.batch_execute(
            "CREATE TABLE latency (a int);
             SELECT pg_create_physical_replication_slot('theirs', true)",
        )?;
        let mut measured = Vec::new();
        for &clients in &self.clients {
            let mut rounds = Vec::new();
            for round in 0..self.runs {
                let ours = |sql: &mut Client| self.run(&cluster, sql, clients, Standby::Ours);
                let theirs = |sql: &mut Client| self.run(&cluster, sql, clients, Standby::Theirs);
                let pair = if round % 2 == 0 {
                    let ours = ours(&mut sql)?;
                    (ours, theirs(&mut sql)?)
                } else {
                    let theirs = theirs(&mut sql)?;
                    (ours(&mut sql)?, theirs)
                };
                say(&format!(
                    "{clients} clients: ours {:.2} ms (p99 {:.2}), pg_receivewal {:.2} ms (p99 {:.2})",
                    pair.0.median, pair.0.p99, pair.1.median, pair.1.p99
                ));
                rounds.push(pair);
            }
            measured.push(AtClients { clients, rounds });
        }
        Ok(measured)
    }

    fn run(
        &self,
        cluster: &Cluster,
        sql: &mut Client,
        clients: u32,
        standby: Standby,
    ) -> Result<Latency> {
        match standby {
            Standby::Ours => {
                let place = Place::new()?;
                let daemon = place.daemon(cluster, "127.0.0.1:0")?;
                let latency = self.pgbench(cluster, sql, clients, "tidemark");
                wait_for_no_one(sql)?;
                daemon.stop()?;
                latency
            }
            Standby::Theirs => {
                let place = directory()?;
                let mut receive = cluster.program("pg_receivewal")?;
                receive.arg("-D").arg(place.path()).args([
                    "--synchronous",
                    "--slot=theirs",
                    "-d",
                    &cluster.conninfo(),
                ]);
                let child = receive.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
                let receiver = Receiver(child);
                let latency = self.pgbench(cluster, sql, clients, "pg_receivewal");
                wait_for_no_one(sql)?;
                drop(receiver);
                latency
            }
        }
    }

    fn pgbench(
        &self,
        cluster: &Cluster,
        sql: &mut Client,
        clients: u32,
        name: &str,
    ) -> Result<Latency> {
        sql.batch_execute(&format!(
            "ALTER SYSTEM SET synchronous_standby_names = '{name}'"
        ))?;
        sql.batch_execute("SELECT pg_reload_conf()")?;
        let began = Instant::now();
        while sql
            .query(
                "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync' AND application_name = $1",
                &[&name],
            )?
            .is_empty()
        {
            ensure!(began.elapsed() < PATIENCE, "{name} never became synchronous");
            std::thread::sleep(Duration::from_millis(50));
        }
        let place = directory()?;
        let script = place.path().join("script.sql");
        fs::write(&script, SCRIPT)?;
        let (script_name, prefix) = (script.to_string_lossy(), place.path().join("log"));
        let (clients, seconds) = (clients.to_string(), self.seconds.to_string());
        cluster.pgbench(&[
            "-n",
            "-j",
            "2",
            "-c",
            &clients,
            "-T",
            &seconds,
            "-f",
            &script_name,
            "--log",
            "--log-prefix",
            &prefix.to_string_lossy(),
        ])?;
        let mut latencies = Vec::new();
        for entry in fs::read_dir(place.path())? {
            let path = entry?.path();
            if path != script {
                latencies.extend(fs::read_to_string(path)?.lines().filter_map(latency));
            }
        }
        latencies.sort_by(f64::total_cmp);
        let at = |share: usize| latencies.get(latencies.len() * share / 100).copied();
        let (Some(median), Some(p99)) = (at(50), at(99)) else {
            bail!("pgbench logged nothing");
        };
        Ok(Latency {
            median,
            p99,
            tps: f64::from(u32::try_from(latencies.len())?) / f64::from(self.seconds),
        })
    }
}

/// Reads the latency from a line of pgbench's log: client, number, microseconds, …
fn latency(line: &str) -> Option<f64> {
    let microseconds: f64 = line.split_whitespace().nth(2)?.parse().ok()?;
    Some(microseconds / 1000.0)
}

/// Lets commits continue without a standby before it stops.
fn wait_for_no_one(sql: &mut Client) -> Result<()> {
    sql.batch_execute("ALTER SYSTEM SET synchronous_standby_names = ''")?;
    sql.batch_execute("SELECT pg_reload_conf()")?;
    Ok(())
}

/// Stopped when dropped.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Formats the ratios as a Markdown table. Above 1 is in our favour.
#[must_use]
pub fn table(measured: &[AtClients]) -> String {
    let mut table =
        "| clients | median latency, pg_receivewal / ours | p99, pg_receivewal / ours | \
                     commits per second, ours / pg_receivewal |\n|---|---|---|---|\n"
            .to_owned();
    for at in measured {
        let median = |of: &dyn Fn(&(Latency, Latency)) -> f64| {
            let mut values: Vec<f64> = at.rounds.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        table.push_str(&format!(
            "| {} | {:.2} | {:.2} | {:.2} |\n",
            at.clients,
            median(&|(ours, theirs)| theirs.median / ours.median),
            median(&|(ours, theirs)| theirs.p99 / ours.p99),
            median(&|(ours, theirs)| ours.tps / theirs.tps),
        ));
    }
    table
}
