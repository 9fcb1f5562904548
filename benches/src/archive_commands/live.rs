//! `archive_command` and `restore_command` as PostgreSQL itself runs them, segment by segment.
//!
//! Push: as segments are written, with our daemon streaming the same WAL, which is the intended
//! use. One segment at a time on a server that is then idle, so that the command is measured and
//! not a queue. Fetch: in a recovery, with replay between two of them; ours without a plan, as in a
//! hand-written `restore_command`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};

use super::{OUR_START, PATIENCE, POLL, Pass, Scene, note, pgbackrest_configuration};
use testbed::{
    cluster::Cluster,
    place::Place,
    programs::{command, ours, succeed},
};

/// Records the duration of the command that follows.
const STOPWATCH: &str = "#!/bin/bash\nlog=$1; shift\nbegan=$EPOCHREALTIME\n\"$@\"\ncode=$?\nended=$EPOCHREALTIME\n\
                         echo \"$((${ended/./} - ${began/./})) $code\" >>\"$log\"\nexit $code\n";
/// The segments before timing starts: the first one finds cold caches.
const WARM_UP: usize = 2;

/// Runs each variant in turn. Records the median of its segments.
pub(super) fn pushes(bin: &Path, segments: usize, passes: &mut Vec<Pass>) -> Result<()> {
    let settings = "shared_buffers = 256MB\nfsync = off\nsynchronous_commit = off\nmax_wal_size = 4GB\n\
                    autovacuum = off\narchive_mode = on\narchive_command = '/bin/true'\n";
    let cluster = Cluster::start(bin, 16, settings)?;
    let place = Place::new()?;
    cluster.pgbench(&["-q", "-i", "-s", "20"])?;
    let root = place.path().display().to_string();
    let watch = Stopwatch::new(&place)?;
    let copies = place.path().join("copies");
    succeed(command(Path::new("/bin/mkdir"))?.arg(&copies))?;
    let pgbackrest = pgbackrest_configuration(&place, &cluster, "live", "lz4")?;
    let stanza = format!(
        "/usr/bin/pgbackrest --config={} --stanza=main",
        pgbackrest.display()
    );
    succeed(command(Path::new("/bin/sh"))?.args(["-c", &format!("{stanza} stanza-create")]))?;
    let daemon = place.daemon(&cluster, "127.0.0.1:0")?;
    for (name, archive_command) in [
        (
            "wal-archiver push, while the daemon streams",
            format!(
                "{} --repository=file://{root}/repository --spool={root}/spool push %p",
                ours("wal-archiver")?.display()
            ),
        ),
        (
            "pgbackrest archive-push",
            format!("{stanza} archive-push %p"),
        ),
        ("cp", format!("/bin/cp %p {}/%f", copies.display())),
    ] {
        let timed = watch.timed(&archive_command)?;
        let live = Live {
            cluster: &cluster,
            watch: &watch,
        };
        let taken = live.segments(&timed, segments);
        note(
            passes,
            name,
            median(taken.with_context(|| name.to_owned())?)?,
        );
    }
    daemon.stop()
}

/// Runs each variant in turn. Records the median of the segments of one recovery.
pub(super) fn fetches(scene: &Scene, bin: &Path, passes: &mut Vec<Pass>) -> Result<()> {
    let watch = Stopwatch::new(&scene.place)?;
    let wal_fetch = format!(
        "{} --repository=file://{}/repository wal-fetch %f %p",
        ours("pitr-restore")?.display(),
        scene.place.path().display()
    );
    for (name, restore_command) in [
        ("pitr-restore wal-fetch", wal_fetch),
        ("pgbackrest archive-get", scene.archive_get()),
        ("cp", scene.copy_back()),
    ] {
        let timed = watch.timed(&restore_command)?;
        scene.recovery(bin, name, Some(&timed), OUR_START)?;
        // Other requests are for files that the archive does not have: a history file, the segment
        // after the last one.
        let delivered = watch.taken()?.into_iter().filter(|(_, code)| code == "0");
        note(
            passes,
            name,
            median(delivered.map(|(seconds, _)| seconds).collect())?,
        );
    }
    Ok(())
}

fn median(mut seconds: Vec<f64>) -> Result<f64> {
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.get(seconds.len() / 2);
    middle.copied().context("no segment")
}

/// A program that wraps a command, and its log.
struct Stopwatch {
    program: PathBuf,
    log: PathBuf,
}

impl Stopwatch {
    fn new(place: &Place) -> Result<Self> {
        let program = place.path().join("stopwatch");
        fs::write(&program, STOPWATCH)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let log = place.path().join("stopwatch.log");
        Ok(Self { program, log })
    }

    /// Clears the log and returns the wrapped command.
    fn timed(&self, command: &str) -> Result<String> {
        if self.log.exists() {
            fs::remove_file(&self.log)?;
        }
        let (program, log) = (self.program.display(), self.log.display());
        Ok(format!("{program} {log} {command}"))
    }

    /// Returns the seconds and the exit code of each run.
    fn taken(&self) -> Result<Vec<(f64, String)>> {
        if !self.log.exists() {
            return Ok(Vec::new());
        }
        let mut taken = Vec::new();
        for line in fs::read_to_string(&self.log)?.lines() {
            let (micros, code) = line.split_once(' ').context("a line of the stopwatch")?;
            taken.push((micros.parse::<f64>()? / 1e6, code.to_owned()));
        }
        Ok(taken)
    }
}

struct Live<'a> {
    cluster: &'a Cluster,
    watch: &'a Stopwatch,
}

impl Live<'_> {
    /// Returns the seconds of each push.
    fn segments(&self, archive_command: &str, count: usize) -> Result<Vec<f64>> {
        let mut sql = self.cluster.connect()?;
        let quoted = archive_command.replace('\'', "''");
        sql.batch_execute(&format!("ALTER SYSTEM SET archive_command = '{quoted}'"))?;
        sql.batch_execute("SELECT pg_reload_conf()")?;
        let mut part = 0;
        while self.taken()?.len() < count + WARM_UP {
            let pushed = self.taken()?.len();
            let began = Instant::now();
            // Updates a hundredth of the accounts at a time, until a segment is full and was
            // pushed.
            while self.taken()?.len() == pushed {
                if !self.waits()? {
                    sql.batch_execute(&format!(
                        "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 100 = {part}"
                    ))?;
                    part = (part + 1) % 100;
                }
                thread::sleep(POLL);
                if began.elapsed() > PATIENCE {
                    bail!("nothing was pushed within {PATIENCE:?}");
                }
            }
        }
        Ok(self.taken()?.split_off(WARM_UP))
    }

    /// Returns true if a segment waits to be pushed.
    fn waits(&self) -> Result<bool> {
        let marks = fs::read_dir(self.cluster.data().join("pg_wal/archive_status"))?;
        Ok(marks
            .flatten()
            .any(|mark| mark.path().extension().is_some_and(|end| end == "ready")))
    }

    fn taken(&self) -> Result<Vec<f64>> {
        let taken = self.watch.taken()?.into_iter().map(|(seconds, code)| {
            if code != "0" {
                bail!("a push ended with {code}");
            }
            Ok(seconds)
        });
        taken.collect()
    }
}
