//! A temporary archive and a running `wal-archiver`. Both are removed when dropped.

use std::{
    fs,
    os::unix::{fs::chown, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    thread::sleep,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use testbed::object_store::{BUCKET, ObjectStoreServer};
use wal_format::{Lsn, SealedReader, SegmentName};

mod server;

pub(crate) use server::{Load, Server};

/// The time after which a test fails.
const PATIENCE: Duration = Duration::from_secs(180);

/// Returns the PostgreSQL to test with: 17 if installed. `None` means to skip, which is a failure
/// in CI.
pub(crate) fn postgres_bin() -> Option<PathBuf> {
    let servers = testbed::tools::servers_or_skip();
    let preferred = servers.iter().position(|(major, _)| *major == 17);
    let found = servers.into_iter().nth(preferred.unwrap_or(0));
    if found.is_none() {
        eprintln!("SKIPPED: no PostgreSQL server is installed; run `make install-tools`");
    }
    found.map(|(_, bin)| bin)
}

/// Returns the user that runs servers, because PostgreSQL refuses to run as root.
pub(crate) fn server_user() -> Option<(u32, u32)> {
    testbed::programs::server_user().expect("a user to run PostgreSQL as")
}

pub(crate) fn succeed(what: &str, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Creates a directory that belongs to the server's user.
pub(crate) fn owned_dir() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("tidemark")
        .tempdir_in("/tmp")
        .expect("a directory");
    if let Some((user, group)) = server_user() {
        chown(dir.path(), Some(user), Some(group)).expect("chown");
    }
    dir
}

/// The directories of an archiver.
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("repository")).expect("a directory");
        Self { dir }
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.dir.path().join("repository")
    }

    pub(crate) fn spool(&self) -> PathBuf {
        self.dir.path().join("spool")
    }

    /// Returns `wal-archiver` with this place's flags.
    pub(crate) fn command(&self, conninfo: &str) -> Command {
        self.command_with_spool(conninfo, &self.spool())
    }

    /// The same with another spool. Any user can execute the program.
    pub(crate) fn command_with_spool(&self, conninfo: &str, spool: &Path) -> Command {
        let program = testbed::programs::ours("wal-archiver").expect("it is built");
        let mut command = Command::new(program);
        command
            .arg("--repository")
            .arg(format!("file://{}", self.repository().display()))
            .arg("--spool")
            .arg(spool)
            .args(["--conninfo", conninfo]);
        command
    }

    /// Returns a function that makes the command with a repository in a bucket.
    pub(crate) fn command_in_bucket(
        &self,
        store: &ObjectStoreServer,
        conninfo: String,
    ) -> impl Fn() -> Command + use<> {
        let configuration = self.spool().with_extension("toml");
        let text = format!(
            "repository = 's3://{BUCKET}/main'\n{}spool = '{}'\n",
            store.configuration(),
            self.spool().display()
        );
        fs::write(&configuration, text).expect("a configuration");
        move || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_wal-archiver"));
            command.arg("--config").arg(&configuration);
            command.args(["--conninfo", &conninfo]);
            command
        }
    }

    pub(crate) fn run(&self, conninfo: &str) -> Archiver {
        self.run_with(self.command(conninfo))
    }

    pub(crate) fn run_with(&self, command: Command) -> Archiver {
        run_command(command, self.dir.path())
    }

    /// Serves HTTP on `address`, which an earlier archiver used.
    pub(crate) fn run_at(&self, command: Command, address: &str) -> Archiver {
        run_command_at(command, self.dir.path(), address)
    }

    pub(crate) fn verify(&self, conninfo: &str) -> String {
        let output = self.command(conninfo).args(["verify", "--deep"]).output();
        succeed("verify", &output.expect("wal-archiver runs"))
    }

    pub(crate) fn files_below(&self, kind: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.repository()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(directory).expect("a directory").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if path.to_string_lossy().contains(kind) {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// Waits until everything is flushed, stops the archiver, and checks that the archive equals
    /// the server's `pg_wal`, without a gap.
    pub(crate) fn assert_whole(&self, server: &Server, archiver: Archiver) {
        let lsn = server.lsn();
        wait_flushed(server, lsn);
        assert_eq!(archiver.terminate().code(), Some(0));
        assert!(self.assert_equals_pg_wal(&server.data()) >= lsn);
        let verdict = self.verify(&server.conninfo());
        assert!(verdict.contains("no gap, no damage"), "{verdict}");
    }

    /// Compares every archived byte with the server's own files. Returns the end of the compared
    /// WAL.
    pub(crate) fn assert_equals_pg_wal(&self, data: &Path) -> Lsn {
        let mut end = Lsn::ZERO;
        let mut compared = 0;
        for path in self
            .files_below("/wal/")
            .iter()
            .chain(&self.files_below("/tail/"))
        {
            let object = fs::read(path).expect("an object");
            let reader = SealedReader::open(&object).expect("a sound object");
            let header = reader.header();
            let mut wal = Vec::new();
            reader.read_all(&mut wal).expect("sound frames");
            let name: SegmentName = header.segment_name();
            let theirs = fs::read(data.join("pg_wal").join(name.to_string()))
                .unwrap_or_else(|error| panic!("pg_wal has no {name}: {error}"));
            let offset =
                usize::try_from(header.segment_size.offset_of(header.start_lsn)).expect("small");
            assert!(
                theirs[offset..offset + wal.len()] == wal,
                "{} differs",
                path.display()
            );
            end = end.max(header.end_lsn);
            compared += 1;
        }
        assert!(compared > 0, "nothing was archived");
        end
    }

    pub(crate) fn sealed(&self) -> usize {
        self.files_below("/wal/").len()
    }
}

/// Lets every put into the repository fail, like a store that is down. Returns a function that ends
/// this.
pub(crate) fn store_refuses(place: &Place) -> impl FnOnce() + use<> {
    folder_refuses(&place.repository())
}

/// Lets every put into a folder of objects fail. Returns a function that ends this.
pub(crate) fn folder_refuses(folder: &Path) -> impl FnOnce() + use<> {
    // Objects are written here before they have a name.
    let temporary = folder.join(".tidemark-tmp");
    drop(fs::remove_dir_all(&temporary));
    fs::write(&temporary, "a file is no folder").expect("in its place");
    move || fs::remove_file(&temporary).expect("the file goes")
}

/// Moves the repository away, like a store that is down. Returns a function that moves it back.
pub(crate) fn store_goes_down(place: &Place) -> impl FnOnce() + use<> {
    let (here, aside) = (
        place.repository(),
        place.repository().with_extension("aside"),
    );
    let back = (aside.clone(), here.clone());
    repository::durable::rename(&here, &aside).expect("the repository goes");
    fs::write(&here, "a file is no folder").expect("in its place");
    move || {
        let (aside, here): (PathBuf, PathBuf) = back;
        fs::remove_file(&here).expect("the file goes");
        repository::durable::rename(&aside, &here).expect("the repository is back");
    }
}

/// Runs `wal-archiver` with these flags and its log in `directory`.
pub(crate) fn run_command(command: Command, directory: &Path) -> Archiver {
    run_command_at(command, directory, "127.0.0.1:0")
}

fn run_command_at(mut command: Command, directory: &Path, address: &str) -> Archiver {
    let log = directory.join("archiver.log");
    let file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .expect("a log");
    let child = command
        .args(["run", "--http", address])
        .env("NO_COLOR", "1")
        .stderr(file)
        .spawn()
        .expect("wal-archiver runs");
    Archiver { child, log }
}

/// A running archiver, killed when dropped.
pub(crate) struct Archiver {
    child: Child,
    log: PathBuf,
}

impl Archiver {
    /// Sends SIGTERM and waits for the end.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        self.wait()
    }

    /// Kills the process, as a power loss would.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("it is gone");
    }

    /// Waits until the process ends on its own.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the archiver ends", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        let status = status.expect("it ended");
        assert_eq!(status.signal(), None, "it crashed: {}", self.log());
        status
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }

    /// The archiver's HTTP address, from its log.
    pub(crate) fn address(&self) -> String {
        let log = self.log();
        log.lines()
            .rfind(|line| line.contains("serving HTTP"))
            .and_then(|line| line.split_once("address="))
            .expect("an address in the log")
            .1
            .to_owned()
    }

    /// Sends a GET request and returns the answer.
    pub(crate) fn get(&self, path: &str) -> String {
        self.ask("GET", path, "")
    }

    /// Sends a request without a body and returns the answer. `headers` end with line breaks.
    pub(crate) fn ask(&self, method: &str, path: &str, headers: &str) -> String {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(self.address()).expect("it listens");
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n"
        )
        .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    pub(crate) fn wait_for_log(&self, text: &str) {
        wait_until(&format!("the archiver says \"{text}\""), || {
            self.log().contains(text)
        });
    }

    /// The peak memory (`VmHWM`) in KiB.
    pub(crate) fn peak_memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).expect("KiB")
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("a signal");
    }
}

impl Drop for Archiver {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The directory may be gone already.
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("the archiver, newest line first: {tail:#?}");
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until the server has received our flush LSN for `lsn`.
pub(crate) fn wait_flushed(server: &Server, lsn: Lsn) {
    wait_until(&format!("flush reaches {lsn}"), || {
        let flushed = server.sql(
            "SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication WHERE application_name = 'tidemark'",
        );
        flushed.parse::<Lsn>().is_ok_and(|flushed| flushed >= lsn)
    });
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(50));
    }
}
