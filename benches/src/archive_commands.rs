//! Compares our `archive_command` and `restore_command` with those of pgBackRest and `cp`, per
//! segment and for a whole recovery, on the same pgbench WAL in one run.
//!
//! Each pass processes all segments one after the other, as PostgreSQL's archiver does. The passes
//! alternate.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

mod live;

use testbed::{
    cluster::{Cluster, PORT, connect},
    place::Place,
    programs::{command, succeed},
};

const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(20);
/// `shared_buffers` of the recoveries, the same as in the cluster's own settings.
const BUFFERS: &str = "shared_buffers=512MB";
/// The settings with which `pitr-restore --start` recovers for a promotion.
const OUR_START: [&str; 2] = [BUFFERS, "hot_standby=off"];
/// The reference for the other recoveries: nothing has to be fetched.
const IN_PG_WAL: &str = "all in pg_wal";
/// The same with PostgreSQL's default `hot_standby`.
const READABLE: &str = "all in pg_wal, hot_standby=on";
/// pgBackRest with its fastest codec, lz4, which stores more.
const PGBACKREST: &str = "pgbackrest";
/// pgBackRest with our codec.
const LIKE_OURS: &str = "pgbackrest-zst";
/// pgBackRest with its default codec, gz.
const DEFAULT: &str = "pgbackrest-gz";
/// The size of a segment.
const SEGMENT_BYTES: f64 = 16_777_216.0;
/// The number of segments that PostgreSQL pushes one by one: enough for a median.
const LIVE_MAX: usize = 20;

/// The parameters of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct ArchiveCommands {
    /// The number of segments of 16 MiB.
    pub segments: usize,
    /// The number of passes of each kind.
    pub rounds: usize,
}

/// One program doing one thing: seconds per segment, or per recovery, in each round.
#[derive(Clone, Debug)]
pub struct Pass {
    /// The name.
    pub name: &'static str,
    /// Seconds.
    pub seconds: Vec<f64>,
}

/// The passes of all measured operations.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Storing many waiting segments.
    pub push: Vec<Pass>,
    /// Storing segments one at a time, as PostgreSQL requests it.
    pub live: Vec<Pass>,
    /// The stored size as a percentage of the segments' size.
    pub stored: Vec<(&'static str, f64)>,
    /// Fetching segments.
    pub fetch: Vec<Pass>,
    /// Fetching segments as a recovery requests them, with replay between them.
    pub live_fetch: Vec<Pass>,
    /// The redo of all segments, according to PostgreSQL's log.
    pub recovery: Vec<Pass>,
}

struct Scene {
    cluster: Cluster,
    place: Place,
    names: Vec<PathBuf>,
}

impl ArchiveCommands {
    /// Runs the measurement.
    ///
    /// # Errors
    /// The message of the program that failed.
    pub fn measure(&self, bin: &Path, say: &dyn Fn(&str)) -> Result<Measured> {
        say("making WAL with pgbench");
        let scene = self.scene(bin)?;
        say(&format!("{} segments", scene.names.len()));
        let mut measured = Measured::default();
        for round in 0..self.rounds {
            say(&format!("round {}", round + 1));
            scene.pushes(&mut measured.push)?;
            measured.stored = scene.stored()?;
            live::pushes(bin, self.segments.min(LIVE_MAX), &mut measured.live)?;
            scene.fetches(&mut measured.fetch)?;
            scene.recoveries(bin, &mut measured.recovery)?;
            live::fetches(&scene, bin, &mut measured.live_fetch)?;
        }
        Ok(measured)
    }

    fn scene(&self, bin: &Path) -> Result<Scene> {
        let settings = "shared_buffers = 512MB\nfsync = off\nsynchronous_commit = off\nmax_wal_size = 4GB\n\
                        wal_keep_size = 8GB\nautovacuum = off\narchive_mode = on\narchive_command = '/bin/false'\n";
        let cluster = Cluster::start(bin, 16, settings)?;
        let place = Place::new()?;
        cluster.pgbench(&["-q", "-i", "-s", "50"])?;
        let mut sql = connect(&cluster.conninfo())?;
        let start: String = sql
            .query_one("SELECT pg_walfile_name(pg_switch_wal() + 1)", &[])?
            .get(0);
        // The base backup of the recoveries. The stream has its WAL.
        let daemon = place.daemon(&cluster, "127.0.0.1:0")?;
        let mut backup = place.program("wal-archiver")?;
        succeed(backup.args(["--conninfo", &cluster.conninfo(), "backup"]))?;
        daemon.stop()?;
        let names = loop {
            cluster.pgbench(&["-n", "-c", "8", "-j", "2", "-t", "10000"])?;
            let current: String = sql
                .query_one("SELECT pg_walfile_name(pg_current_wal_lsn())", &[])?
                .get(0);
            let names = segments(&cluster.data().join("pg_wal"), &start, &current)?;
            if names.len() > self.segments {
                break names;
            }
        };
        // Writes dirty pages first, so that nothing else runs during the passes.
        sql.batch_execute("CHECKPOINT")?;
        for (name, compress_type) in [(PGBACKREST, "lz4"), (LIKE_OURS, "zst"), (DEFAULT, "gz")] {
            pgbackrest_configuration(&place, &cluster, name, compress_type)?;
        }
        let names = names.into_iter().take(self.segments).collect();
        Ok(Scene {
            cluster,
            place,
            names,
        })
    }
}

impl Scene {
    /// Returns a pgBackRest command with the configuration and repository `name`.
    fn pgbackrest(&self, name: &str, arguments: &[&str]) -> Result<Command> {
        let mut pgbackrest = command(Path::new("/usr/bin/pgbackrest"))?;
        let configuration = self.place.path().join(format!("{name}.conf"));
        pgbackrest.arg(format!("--config={}", configuration.display()));
        pgbackrest.arg("--stanza=main").args(arguments);
        Ok(pgbackrest)
    }

    /// Returns a command of ours with its own archive below `name`.
    fn ours(&self, program: &str, name: &str) -> Result<Command> {
        let mut ours = command(&testbed::programs::ours(program)?)?;
        let root = self.place.path().join(name);
        ours.arg(format!("--repository=file://{}/repository", root.display()));
        ours.arg(format!("--spool={}/spool", root.display()));
        ours.args(["--conninfo", &self.cluster.conninfo()]);
        Ok(ours)
    }

    /// Removes an archive and creates its directory again.
    fn empty(&self, name: &str) -> Result<PathBuf> {
        let path = self.place.path().join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        succeed(command(Path::new("/bin/mkdir"))?.arg("-p").arg(&path))?;
        Ok(path)
    }

    /// Returns the seconds per segment when all are processed one after the other.
    fn pass(
        &self,
        passes: &mut Vec<Pass>,
        name: &'static str,
        mut each: impl FnMut(&Path) -> Result<Command>,
    ) -> Result<()> {
        // Data written by the previous pass must not be written back during this one.
        succeed(&mut command(Path::new("/bin/sync"))?)?;
        let began = Instant::now();
        for segment in &self.names {
            succeed(&mut each(segment)?)?;
        }
        let seconds = began.elapsed().as_secs_f64() / f64::from(u32::try_from(self.names.len())?);
        note(passes, name, seconds);
        Ok(())
    }

    fn pushes(&self, passes: &mut Vec<Pass>) -> Result<()> {
        self.empty("alone")?;
        self.pass(passes, "wal-archiver push, alone", |segment| {
            let mut push = self.ours("wal-archiver", "alone")?;
            push.arg("push").arg(segment);
            Ok(push)
        })?;
        for (name, title) in [
            (PGBACKREST, "pgbackrest archive-push, lz4"),
            (LIKE_OURS, "pgbackrest archive-push, zst"),
            (DEFAULT, "pgbackrest archive-push, gz"),
        ] {
            self.empty(name)?;
            succeed(&mut self.pgbackrest(name, &["stanza-create"])?)?;
            self.pass(passes, title, |segment| {
                let mut push = self.pgbackrest(name, &["archive-push"])?;
                push.arg(segment);
                Ok(push)
            })?;
        }
        self.with_daemon(passes, "daemon", "wal-archiver push, with the daemon")?;
        let folder = self.empty("copies")?;
        self.pass(passes, "cp", |segment| {
            let mut copy = command(Path::new("/bin/cp"))?;
            copy.arg(segment).arg(&folder);
            Ok(copy)
        })?;
        // Repeats the push on the same archive: everything is stored already, as it is while the
        // daemon streams.
        self.with_daemon(passes, "alone", "wal-archiver push, already streamed")
    }

    /// Returns the stored size of the pushed segments.
    fn stored(&self) -> Result<Vec<(&'static str, f64)>> {
        let pushed = f64::from(u32::try_from(self.names.len())?) * SEGMENT_BYTES;
        let mut stored = Vec::new();
        for name in ["alone/repository", PGBACKREST, LIKE_OURS, DEFAULT] {
            let bytes = bytes_below(&self.place.path().join(name))?;
            stored.push((name, bytes * 100.0 / pushed));
        }
        Ok(stored)
    }

    fn with_daemon(&self, passes: &mut Vec<Pass>, folder: &str, name: &'static str) -> Result<()> {
        if folder != "alone" {
            self.empty(folder)?;
        }
        let log = self.place.path().join(folder).join("log");
        let mut run = self.ours("wal-archiver", folder)?;
        run.args(["run", "--http", "127.0.0.1:0"]);
        let mut daemon = run
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let socket = self.place.path().join(folder).join("spool/main.push");
        let began = Instant::now();
        while !socket.exists() {
            if began.elapsed() > PATIENCE {
                bail!("the daemon does not listen: {}", fs::read_to_string(&log)?);
            }
            std::thread::sleep(POLL);
        }
        let outcome = self.pass(passes, name, |segment| {
            let mut push = self.ours("wal-archiver", folder)?;
            push.arg("push").arg(segment);
            Ok(push)
        });
        daemon.kill()?;
        daemon.wait()?;
        outcome
    }

    fn fetches(&self, passes: &mut Vec<Pass>) -> Result<()> {
        let folder = self.empty("fetched")?;
        let destination = folder.join("RECOVERYXLOG");
        // Moves each file away before the next request, as PostgreSQL does: overwriting a file
        // would make ext4 flush it first.
        let taken = folder.join("taken");
        let take = || -> Result<()> {
            if destination.exists() {
                if taken.exists() {
                    fs::remove_file(&taken)?;
                }
                renamed(&destination, &taken)?;
            }
            Ok(())
        };
        let name = |segment: &Path| -> Result<_> {
            take()?;
            segment.file_name().map(ToOwned::to_owned).context("a name")
        };
        self.pass(passes, "pitr-restore wal-fetch", |segment| {
            let mut fetch = self.ours("pitr-restore", "alone")?;
            fetch.arg("wal-fetch").arg(name(segment)?).arg(&destination);
            Ok(fetch)
        })?;
        self.pass(passes, "pgbackrest archive-get", |segment| {
            let mut fetch = self.pgbackrest(PGBACKREST, &["archive-get"])?;
            fetch.arg(name(segment)?).arg(&destination);
            Ok(fetch)
        })?;
        let copies = self.place.path().join("copies");
        self.pass(passes, "cp", |segment| {
            let mut copy = command(Path::new("/bin/cp"))?;
            copy.arg(copies.join(name(segment)?)).arg(&destination);
            Ok(copy)
        })
    }

    fn recoveries(&self, bin: &Path, passes: &mut Vec<Pass>) -> Result<()> {
        // The archive of the recoveries has the segments as `push` stores them.
        for segment in &self.names {
            let mut push = self.place.program("wal-archiver")?;
            push.args(["--conninfo", &self.cluster.conninfo(), "push"]);
            succeed(push.arg(segment))?;
        }
        let (copy, pgbackrest) = (self.copy_back(), self.archive_get());
        let many = ["shared_buffers=2GB", "hot_standby=off"];
        for (name, restore_command, settings) in [
            (IN_PG_WAL, Some("/bin/false"), OUR_START),
            (READABLE, Some("/bin/false"), [BUFFERS, "hot_standby=on"]),
            ("pitr-restore wal-fetch", None, OUR_START),
            ("the same, with --recovery-buffers=2GB", None, many),
            ("cp", Some(copy.as_str()), OUR_START),
            (
                "pgbackrest archive-get",
                Some(pgbackrest.as_str()),
                OUR_START,
            ),
        ] {
            let seconds = self.recovery(bin, name, restore_command, settings)?;
            note(passes, name, seconds);
        }
        Ok(())
    }

    /// The `restore_command` of a plain directory.
    fn copy_back(&self) -> String {
        format!("cp {}/copies/%f %p", self.place.path().display())
    }

    /// The `restore_command` of pgBackRest.
    fn archive_get(&self) -> String {
        format!(
            "/usr/bin/pgbackrest --config={root}/{PGBACKREST}.conf --stanza=main --pg1-path={root}/recovery/data archive-get %f %p",
            root = self.place.path().display()
        )
    }

    /// Restores the base backup, replays everything, and reads the duration of the redo from
    /// PostgreSQL's log.
    fn recovery(
        &self,
        bin: &Path,
        name: &str,
        restore_command: Option<&str>,
        settings: [&str; 2],
    ) -> Result<f64> {
        let root = self.empty("recovery")?;
        let data = root.join("data");
        let mut restore = self.place.program("pitr-restore")?;
        restore.arg("--target-dir").arg(&data);
        restore.arg("--target-action=promote");
        let socket = format!("unix_socket_directories={}", root.display());
        for setting in [BUFFERS, "listen_addresses=", &socket] {
            restore.args(["--set", setting]);
        }
        if let Some(restore_command) = restore_command {
            restore.args(["--set", &format!("restore_command={restore_command}")]);
        }
        succeed(&mut restore)?;
        if [IN_PG_WAL, READABLE].contains(&name) {
            for segment in &self.names {
                let mut copy = command(Path::new("/bin/cp"))?;
                succeed(copy.arg(segment).arg(data.join("pg_wal")))?;
            }
        }
        succeed(&mut command(Path::new("/bin/sync"))?)?;
        let log = root.join("log");
        let mut pg_ctl = command(&bin.join("pg_ctl"))?;
        pg_ctl.env("LD_LIBRARY_PATH", bin.join("../lib")).arg("-D");
        pg_ctl
            .arg(&data)
            .arg("-l")
            .arg(&log)
            .args(["-w", "-t", "300", "-o"])
            // The same settings as `pitr-restore --start`.
            .arg(settings.map(|setting| format!("-c {setting}")).join(" "))
            .arg("start");
        let started = pg_ctl.stdout(Stdio::null()).status()?;
        let began = Instant::now();
        let text = loop {
            let text = fs::read_to_string(&log)?;
            let ended = text.contains("redo done at") || text.contains("FATAL");
            if ended || began.elapsed() > PATIENCE {
                break text;
            }
            std::thread::sleep(POLL);
        };
        if !started.success() {
            bail!("{name}: the recovery failed:\n{text}");
        }
        let mut stop = command(&bin.join("pg_ctl"))?;
        stop.env("LD_LIBRARY_PATH", bin.join("../lib")).arg("-D");
        stop.arg(&data).args(["-m", "immediate", "-w", "stop"]);
        succeed(&mut stop)?;
        text.lines()
            .find(|line| line.contains("redo done at"))
            .and_then(|line| line.split("elapsed: ").nth(1))
            .and_then(|rest| rest.split(' ').next())
            .and_then(|seconds| seconds.parse().ok())
            .with_context(|| format!("{name}: no redo in the log:\n{text}"))
    }
}

fn bytes_below(directory: &Path) -> Result<f64> {
    let mut bytes = 0.0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() {
            bytes_below(&entry.path())?
        } else {
            // Sizes are small enough to convert without loss.
            f64::from(u32::try_from(entry.metadata()?.len())?)
        };
    }
    Ok(bytes)
}

#[expect(
    clippy::disallowed_methods,
    reason = "a file of a benchmark need not survive the host"
)]
fn renamed(from: &Path, to: &Path) -> Result<()> {
    Ok(fs::rename(from, to)?)
}

/// Returns pgBackRest's configuration for a cluster, with a repository `name` in the place.
fn pgbackrest_configuration(
    place: &Place,
    cluster: &Cluster,
    name: &str,
    compress_type: &str,
) -> Result<PathBuf> {
    let configuration = place.path().join(format!("{name}.conf"));
    let root = place.path().display();
    fs::write(
        &configuration,
        format!(
            "[global]\nrepo1-path={root}/{name}\nlog-path={root}\nlock-path={root}/lock\nspool-path={root}\n\
             log-level-file=off\nlog-level-console=error\ncompress-type={compress_type}\n[main]\npg1-path={}\npg1-socket-path={}\n\
             pg1-port={PORT}\npg1-user=postgres\n",
            cluster.data().display(),
            cluster.socket_directory().display()
        ),
    )?;
    Ok(configuration)
}

fn note(passes: &mut Vec<Pass>, name: &'static str, seconds: f64) {
    match passes.iter_mut().find(|pass| pass.name == name) {
        Some(pass) => pass.seconds.push(seconds),
        None => passes.push(Pass {
            name,
            seconds: vec![seconds],
        }),
    }
}

fn segments(pg_wal: &Path, from: &str, to: &str) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(pg_wal)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.len() == 24 && (from..to).contains(&name)) {
            names.push(path);
        }
    }
    names.sort();
    Ok(names)
}

impl Measured {
    /// Formats medians in milliseconds, and ratios to the first of each group, as Markdown tables.
    #[must_use]
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for (title, unit, passes) in [
            ("push, a segment of many", "ms", &self.push),
            ("push, as PostgreSQL runs it", "ms", &self.live),
            ("fetch, a segment of many", "ms", &self.fetch),
            ("fetch, as PostgreSQL runs it", "ms", &self.live_fetch),
            ("recovery, redo of all segments", "s", &self.recovery),
        ] {
            let scale = if unit == "ms" { 1000.0 } else { 1.0 };
            text.push_str(&format!(
                "| {title} | median, {unit} | least | greatest |\n|---|---|---|---|\n"
            ));
            for pass in passes {
                let mut seconds = pass.seconds.clone();
                seconds.sort_by(f64::total_cmp);
                let at = |index: usize| seconds.get(index).copied().unwrap_or(f64::NAN) * scale;
                text.push_str(&format!(
                    "| {} | {:.2} | {:.2} | {:.2} |\n",
                    pass.name,
                    at(seconds.len() / 2),
                    at(0),
                    at(seconds.len().saturating_sub(1))
                ));
            }
            text.push('\n');
        }
        text.push_str("| stored | % of the WAL |\n|---|---|\n");
        for (name, share) in &self.stored {
            text.push_str(&format!("| {name} | {share:.1} |\n"));
        }
        text
    }
}
