//! `archive_command` as PostgreSQL itself runs it, segment by segment as they are written; ours while the daemon streams the
//! same WAL, which is how it is meant to be used.
//!
//! One segment at a time on a server that then rests: what is measured is the command, not a queue.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, thread, time::Instant};

use anyhow::{Context, Result, bail};

use super::{PATIENCE, POLL, Pass, note, pgbackrest_configuration};
use crate::{
    cluster::Cluster,
    main_job::Place,
    programs::{command, ours, succeed},
};

/// Tells how long the command behind it took.
const STOPWATCH: &str = "#!/bin/bash\nlog=$1; shift\nbegan=$EPOCHREALTIME\n\"$@\"\ncode=$?\nended=$EPOCHREALTIME\n\
                         echo \"$((${ended/./} - ${began/./})) $code\" >>\"$log\"\nexit $code\n";
/// Segments before the clock counts: the first finds nothing in any cache.
const WARM_UP: usize = 2;

/// Every way in turn; the median of its segments.
pub(super) fn pushes(bin: &Path, segments: usize, passes: &mut Vec<Pass>) -> Result<()> {
    let settings = "shared_buffers = 256MB\nfsync = off\nsynchronous_commit = off\nmax_wal_size = 4GB\n\
                    autovacuum = off\narchive_mode = on\narchive_command = '/bin/true'\n";
    let cluster = Cluster::start(bin, 16, settings)?;
    let place = Place::new()?;
    cluster.pgbench(&["-q", "-i", "-s", "20"])?;
    let root = place.path().display().to_string();
    let stopwatch = place.path().join("stopwatch");
    fs::write(&stopwatch, STOPWATCH)?;
    fs::set_permissions(&stopwatch, fs::Permissions::from_mode(0o755))?;
    let copies = place.path().join("copies");
    succeed(command(Path::new("/bin/mkdir"))?.arg(&copies))?;
    let pgbackrest = pgbackrest_configuration(&place, &cluster, "live")?;
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
        let log = place.path().join("stopwatch.log");
        if log.exists() {
            fs::remove_file(&log)?;
        }
        let timed = format!(
            "{} {} {archive_command}",
            stopwatch.display(),
            log.display()
        );
        let mut taken = Live {
            cluster: &cluster,
            log: &log,
        }
        .segments(&timed, segments)
        .with_context(|| name.to_owned())?;
        taken.sort_by(f64::total_cmp);
        let median = taken.get(taken.len() / 2).context("no segment")?;
        note(passes, name, *median);
    }
    daemon.stop()
}

struct Live<'a> {
    cluster: &'a Cluster,
    log: &'a Path,
}

impl Live<'_> {
    /// Seconds of each push.
    fn segments(&self, archive_command: &str, count: usize) -> Result<Vec<f64>> {
        let mut sql = self.cluster.connect()?;
        let quoted = archive_command.replace('\'', "''");
        sql.batch_execute(&format!("ALTER SYSTEM SET archive_command = '{quoted}'"))?;
        sql.batch_execute("SELECT pg_reload_conf()")?;
        let mut part = 0;
        while self.taken()?.len() < count + WARM_UP {
            let pushed = self.taken()?.len();
            let began = Instant::now();
            // A hundredth of the accounts at a time, until a segment is full and was pushed.
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

    /// Whether a segment is to be pushed.
    fn waits(&self) -> Result<bool> {
        let marks = fs::read_dir(self.cluster.data().join("pg_wal/archive_status"))?;
        Ok(marks
            .flatten()
            .any(|mark| mark.path().extension().is_some_and(|end| end == "ready")))
    }

    fn taken(&self) -> Result<Vec<f64>> {
        if !self.log.exists() {
            return Ok(Vec::new());
        }
        let mut taken = Vec::new();
        for line in fs::read_to_string(self.log)?.lines() {
            let (micros, code) = line.split_once(' ').context("a line of the stopwatch")?;
            if code != "0" {
                bail!("a push ended with {code}");
            }
            taken.push(micros.parse::<f64>()? / 1e6);
        }
        Ok(taken)
    }
}
