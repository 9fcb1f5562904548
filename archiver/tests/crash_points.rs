//! The archiver is killed, or fails once, at every named crash point (`repository::CrashPoint`).
//! Each time it streams again without an operator, and every acknowledged byte can be read back and
//! equals the server's own WAL.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use postgres::{Client, NoTls};
use repository::{CrashPoint, crash_points};
use wal_format::{Lsn, SealedReader, SegmentName, SegmentSize};

use crate::support::{Place, Server, postgres_bin, store_goes_down, succeed, wait_flushed};

/// The time limit for reaching a point, and for streaming again after it.
const REACHED_MAX: Duration = Duration::from_secs(30);
/// The interval between two checks.
const POLL: Duration = Duration::from_millis(5);
/// The pause after each statement. While a segment is open, a tail of it is stored
/// (`remote_flush_interval`). When it is complete, its file leaves the spool before more WAL
/// arrives.
const STEP: Duration = Duration::from_millis(100);
const SETTINGS: &str = "remote_flush_interval = '50ms'\n";

/// A server on timeline 2, and an archive of it.
struct Scene {
    server: Server,
    client: Client,
    place: Place,
    is_remote: bool,
    /// The initial position of the slot. Nothing was acknowledged before the slot advanced.
    begin: Lsn,
    /// The start of the first segment that was not compared completely.
    compared: Lsn,
}

impl Scene {
    fn new(bin: &Path, acknowledge: &str) -> Self {
        let server = Server::start(bin, "autovacuum=off\ncheckpoint_timeout=1h");
        // A history file has to be archived, too.
        server.down("fast");
        fs::write(server.data().join("standby.signal"), "").expect("a file");
        server.up();
        server.promote();
        server.sql("CREATE TABLE load (number int, filler text)");
        let mut client = Client::connect(&server.conninfo(), NoTls).expect("it connects");
        let slot =
            "SELECT lsn::text FROM pg_create_physical_replication_slot('tidemark_main', true)";
        let begin = client.query_one(slot, &[]).expect("a slot");
        let begin: Lsn = begin.get::<_, String>(0).parse().expect("an LSN");
        let place = Place::new();
        let settings = format!("acknowledge = '{acknowledge}'\n{SETTINGS}");
        fs::write(configuration(&place), settings).expect("a configuration");
        Self {
            server,
            client,
            place,
            is_remote: acknowledge == "remote",
            begin,
            compared: begin.align_down(1 << 20),
        }
    }

    fn run(&self, armed: Option<&str>) -> Run {
        let log = configuration(&self.place).with_extension("log");
        let mut command = self.place.command(&self.server.conninfo());
        command
            .arg("--config")
            .arg(configuration(&self.place))
            .args(["run", "--http", "127.0.0.1:0"])
            .env("NO_COLOR", "1")
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).expect("a log"));
        if let Some(armed) = armed {
            command.env(crash_points::VARIABLE, armed);
        }
        let child = command.spawn().expect("wal-archiver runs");
        Run { child, log }
    }

    /// Writes WAL, segment after segment, until `done` returns true. Panics if that takes too long.
    fn drive(&mut self, run: &mut Run, what: &str, mut done: impl FnMut(&mut Run) -> bool) {
        let deadline = Instant::now() + REACHED_MAX;
        loop {
            for sql in [
                "INSERT INTO load SELECT n, repeat('x', 900) FROM generate_series(1, 60) n",
                "SELECT pg_switch_wal()",
            ] {
                self.client.batch_execute(sql).expect("the server works");
                let next = Instant::now() + STEP;
                while Instant::now() < next {
                    if done(run) {
                        return;
                    }
                    sleep(POLL);
                }
            }
            assert!(Instant::now() < deadline, "{what}: {}", run.log());
        }
    }

    /// Runs until the process kills itself at the point.
    fn kill_at(&mut self, point: CrashPoint, nth: u32) {
        let armed = format!("{}:kill:{nth}", point.name());
        let mut run = self.run(Some(&armed));
        let mut status = None;
        self.drive(&mut run, &format!("{armed} is never reached"), |run| {
            status = run.ended();
            status.is_some()
        });
        let signal =
            status.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status));
        assert_eq!(signal, Some(9), "{armed}: {}", run.log());
        drop(run);
        self.assert_holds_what_was_acknowledged(&armed);
    }

    /// Runs until the point has failed once. Checks that the same process then streams again and
    /// archives all WAL.
    fn fail_at(&mut self, point: CrashPoint, error: &str, nth: u32) {
        if point == CrashPoint::SpoolDirectoryCreated {
            self.remove_spool();
        }
        let armed = format!("{}:{error}:{nth}", point.name());
        let mut run = self.run(Some(&armed));
        self.drive(&mut run, &format!("{armed} is never reached"), |run| {
            assert_eq!(run.ended(), None, "{armed}: {}", run.log());
            run.log().contains("an armed point fails")
        });
        self.insert();
        self.wait_acknowledged(&mut run, &armed);
        drop(run);
        self.assert_holds_what_was_acknowledged(&armed);
    }

    /// Removes a spool that has all its directories, after the repository has all of its WAL.
    fn remove_spool(&mut self) {
        if !self.place.spool().join("main/wal").exists() {
            return;
        }
        let mut run = self.run(None);
        self.insert();
        self.wait_acknowledged(&mut run, "before the spool is removed");
        assert_eq!(run.terminate().code(), Some(0), "{}", run.log());
        fs::remove_dir_all(self.place.spool()).expect("the spool goes");
    }

    fn insert(&mut self) {
        let sql = "INSERT INTO load SELECT n, repeat('y', 900) FROM generate_series(1, 20) n";
        self.client.batch_execute(sql).expect("the server works");
    }

    fn lsn(&mut self, sql: &str) -> Option<Lsn> {
        let row = self.client.query_opt(sql, &[]).expect("the server works");
        let text: Option<String> = row.and_then(|row| row.get(0));
        text.map(|text| text.parse().expect("an LSN"))
    }

    /// Waits until all of the server's WAL is acknowledged.
    fn wait_acknowledged(&mut self, run: &mut Run, what: &str) {
        let end = self.lsn("SELECT pg_current_wal_flush_lsn()::text");
        let deadline = Instant::now() + REACHED_MAX;
        let replication = "SELECT max(flush_lsn)::text FROM pg_stat_replication";
        while self.lsn(replication) < end {
            assert_eq!(run.ended(), None, "{what}: {}", run.log());
            assert!(
                Instant::now() < deadline,
                "{what}: it does not stream again: {}",
                run.log()
            );
            sleep(POLL);
        }
    }

    /// Compares everything before the slot's position, which is the last acknowledged LSN, with the
    /// server's own files. The spool or the repository must have each byte.
    fn assert_holds_what_was_acknowledged(&mut self, what: &str) {
        // Wait until the server has noticed that the archiver is gone. It has then processed the
        // archiver's last message.
        let slot = "SELECT restart_lsn::text FROM pg_replication_slots WHERE NOT active";
        let deadline = Instant::now() + REACHED_MAX;
        let acknowledged = loop {
            if let Some(acknowledged) = self.lsn(slot) {
                break acknowledged;
            }
            assert!(Instant::now() < deadline, "{what}: the slot stays active");
            sleep(POLL);
        };
        if acknowledged == self.begin {
            return;
        }
        let size = SegmentSize::new(1 << 20).expect("1 MiB");
        let mut start = self.compared;
        self.compared = acknowledged.align_down(size.bytes());
        while start < acknowledged {
            let needed = size.bytes().min(acknowledged.bytes_since(start));
            let needed = usize::try_from(needed).expect("small");
            let name = SegmentName::new(
                wal_format::TimelineId::new(2).expect("a timeline"),
                size.segment_of(start),
                size,
            )
            .to_string();
            let theirs = self.server.data().join("pg_wal").join(&name);
            let theirs = fs::read(theirs).expect("the server keeps it");
            let mut held = vec![false; needed];
            for (offset, ours) in self.sources(&name) {
                let theirs = theirs.iter().skip(offset);
                let bytes = held.iter_mut().skip(offset).zip(ours.iter().zip(theirs));
                for (held, (ours, theirs)) in bytes {
                    *held |= ours == theirs;
                }
            }
            let missing = held.iter().position(|held| !held);
            assert_eq!(
                missing, None,
                "{what}: {acknowledged} was acknowledged, {name} lacks this byte"
            );
            start = start.add(size.bytes());
        }
    }

    /// Returns the archived parts of a segment, each with its offset: the spool's files (unless
    /// only the repository counts), the sealed object, and the tails. They are read in this order,
    /// because a file leaves the spool after its object is stored.
    fn sources(&self, name: &str) -> Vec<(usize, Vec<u8>)> {
        let mut sources = Vec::new();
        if !self.is_remote {
            for path in files_below(&self.place.spool().join("main/wal")) {
                let is_ours = path.file_stem().is_some_and(|stem| stem == name);
                if is_ours && path.extension().is_none_or(|end| end == "partial") {
                    sources.extend(fs::read(path).map(|bytes| (0, bytes)));
                }
            }
        }
        for path in files_below(&self.place.repository()) {
            let text = path.to_string_lossy();
            let is_wal = text.contains("/wal/") || text.contains("/tail/");
            if !is_wal || !text.contains(name) {
                continue;
            }
            let Ok(object) = fs::read(&path) else {
                continue;
            };
            let reader = SealedReader::open(&object).expect("a sound object");
            let header = reader.header();
            let offset = header.segment_size.offset_of(header.start_lsn);
            let mut wal = Vec::new();
            reader.read_all(&mut wal).expect("sound frames");
            sources.push((usize::try_from(offset).expect("small"), wal));
        }
        sources
    }

    /// Stops the archiver normally, and compares everything archived with the server's files.
    fn assert_whole(mut self) {
        let mut run = self.run(None);
        self.insert();
        let switch = "SELECT pg_switch_wal()";
        self.client.batch_execute(switch).expect("it switches");
        self.wait_acknowledged(&mut run, "at the end");
        let end = self.server.lsn();
        assert_eq!(run.terminate().code(), Some(0));
        assert!(self.place.assert_equals_pg_wal(&self.server.data()) >= end);
        let verify = self
            .place
            .command(&self.server.conninfo())
            .args(["verify", "--deep"])
            .output();
        let verdict = succeed("verify", &verify.expect("wal-archiver runs"));
        assert!(verdict.contains("no gap, no damage"), "{verdict}");
        let left: Vec<PathBuf> = files_below(&self.place.spool().join("main/wal"))
            .into_iter()
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name != "history" && !name.ends_with(".partial")
            })
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "stored, and still spooled");
    }
}

fn configuration(place: &Place) -> PathBuf {
    place.spool().with_extension("toml")
}

fn files_below(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        // The directory may be gone by now, or may not exist yet.
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    found
}

/// A running archiver; killed when dropped.
struct Run {
    child: Child,
    log: PathBuf,
}

impl Run {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }

    fn terminate(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        self.child.wait().expect("it ends")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The occurrences of a point that are tested. The first small file that a start writes is the
/// branch's history; later ones are the position.
fn times(point: CrashPoint) -> &'static [u32] {
    match point {
        CrashPoint::RecordCreated
        | CrashPoint::RecordWritten
        | CrashPoint::RecordSynced
        | CrashPoint::RecordRenamed => &[1, 2],
        _ => &[1],
    }
}

/// Returns whether a full disk is handled in another way than other errors at this point.
fn waits_for_space(point: CrashPoint) -> bool {
    let name = point.name();
    name.starts_with("copy-") || name.starts_with("segment-")
}

#[test]
fn killed_or_failed_once_at_every_point_it_streams_again_and_has_what_it_acknowledged() {
    const ERRORS: [&str; 3] = ["eio", "enospc", "emfile"];
    let Some(bin) = postgres_bin() else { return };
    let long = testbed::is_long();
    let classes = if long {
        ["local", "remote"].as_slice()
    } else {
        &["local"]
    };
    for class in classes {
        let mut scene = Scene::new(&bin, class);
        for (number, point) in CrashPoint::ALL.iter().enumerate() {
            for nth in times(*point) {
                scene.kill_at(*point, *nth);
                for (kind, error) in ERRORS.iter().enumerate() {
                    // The short form tests each kind of error at every third point.
                    let is_waited_for = *error == "enospc" && waits_for_space(*point);
                    if long || number % ERRORS.len() == kind || is_waited_for {
                        scene.fail_at(*point, error, *nth);
                    }
                }
            }
        }
        scene.assert_whole();
    }
}

#[test]
fn an_open_segment_without_content_does_not_stop_the_stream() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let zeros = vec![0; 1 << 20];
    for content in [&[][..], &zeros, &[0x16, 0xD1]] {
        let archiver = place.run(&server.conninfo());
        server.write_wal(1200);
        wait_flushed(&server, server.lsn());
        // The segment that is now complete cannot be stored.
        let comes_back = store_goes_down(&place);
        server.write_wal(10);
        server.sql("SELECT pg_switch_wal()");
        wait_flushed(&server, server.lsn());
        archiver.kill();
        let complete = files_below(&place.spool().join("main/wal"));
        let last = complete.iter().rfind(|path| path.extension().is_none());
        let last = last.expect("a complete segment waits");
        let name: SegmentName = last
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse().ok())
            .expect("a segment");
        let size = SegmentSize::new(1 << 20).expect("1 MiB");
        let next = name.segment(size).expect("a segment").next();
        let next = SegmentName::new(name.timeline, next, size);
        fs::write(last.with_file_name(format!("{next}.partial")), content).expect("a file");
        let archiver = place.run(&server.conninfo());
        server.write_wal(100);
        wait_flushed(&server, server.lsn());
        archiver.kill();
        comes_back();
    }
    let archiver = place.run(&server.conninfo());
    server.write_wal(100);
    place.assert_whole(&server, archiver);
}
