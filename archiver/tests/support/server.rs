//! A temporary PostgreSQL server, stopped and removed when dropped.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;
use wal_format::Lsn;

use super::{owned_dir, server_user, succeed};

/// A running server, stopped when dropped.
pub(crate) struct Server {
    dir: TempDir,
    bin: PathBuf,
    pub(crate) port: u16,
}

impl Server {
    /// Creates and starts a cluster with additional `settings`.
    pub(crate) fn start(bin: &Path, settings: &str) -> Self {
        Self::start_with_segments(bin, 1, settings)
    }

    /// As [`Server::start`], with segments of this many MiB.
    pub(crate) fn start_with_segments(bin: &Path, mib: u32, settings: &str) -> Self {
        let server = Self::prepare(bin);
        server.init(mib, settings);
        server
    }

    /// Creates and starts a new cluster in place of this one.
    pub(crate) fn init(&self, mib: u32, settings: &str) {
        let server = self;
        let data = server.data();
        let data = data.to_str().expect("UTF-8");
        succeed(
            "initdb",
            &server
                .command("initdb")
                .args(["-D", data, "-U", "postgres", "-A", "trust", "-N"])
                .arg(format!("--wal-segsize={mib}"))
                .output()
                .expect("initdb runs"),
        );
        server.configure(
            "wal_level=replica\nmax_wal_senders=8\nmax_replication_slots=8\nwal_keep_size=2GB\n\
             max_wal_size=2GB\nhot_standby=on\n",
        );
        server.configure(settings);
        server.up();
    }

    /// Creates a standby that streams from `primary`.
    pub(crate) fn standby_of(primary: &Self) -> Self {
        let server = Self::prepare(&primary.bin);
        let (socket, port) = (primary.dir.path(), primary.port.to_string());
        succeed(
            "pg_basebackup",
            &server
                .command("pg_basebackup")
                .arg("-h")
                .arg(socket)
                .args([
                    "-p", &port, "-U", "postgres", "-X", "stream", "-R", "-c", "fast", "-D",
                ])
                .arg(server.data())
                .output()
                .expect("pg_basebackup runs"),
        );
        server.configure("");
        server.up();
        server
    }

    fn prepare(bin: &Path) -> Self {
        Self {
            dir: owned_dir(),
            bin: bin.to_path_buf(),
            port: testbed::ports::free_port().expect("a free port"),
        }
    }

    fn configure(&self, settings: &str) {
        use std::io::Write;
        let path = self.data().join("postgresql.conf");
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(path)
            .expect("the configuration");
        let socket = self.dir.path().display();
        write!(
            file,
            "\nport={}\nunix_socket_directories='{socket}'\nlisten_addresses=''\n{settings}\n",
            self.port
        )
        .expect("it is written");
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .current_dir(self.dir.path())
            .env_remove("PGHOST")
            // The walreceiver must load its own version's libpq, not an older one of the system.
            .env("LD_LIBRARY_PATH", self.bin.join("../lib"))
            .env("LC_ALL", "C");
        if let Some((user, group)) = server_user() {
            command.uid(user).gid(group);
        }
        command
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directory of the server's socket.
    pub(crate) fn directory(&self) -> &Path {
        self.dir.path()
    }

    /// Appends settings. The last value of a setting applies.
    pub(crate) fn configure_more(&self, settings: &str) {
        let path = self.data().join("postgresql.auto.conf");
        let mut all = fs::read_to_string(&path).expect("the configuration");
        all += &format!("{settings}\n");
        fs::write(path, all).expect("it is written");
    }

    pub(crate) fn conninfo(&self) -> String {
        format!(
            "host={} port={} user=postgres",
            self.dir.path().display(),
            self.port
        )
    }

    /// Returns a connection string that leads to whichever of two servers is the primary.
    pub(crate) fn conninfo_with(&self, other: &Self) -> String {
        format!(
            "host={},{} port={},{} user=postgres target_session_attrs=primary connect_timeout=5",
            self.directory().display(),
            other.directory().display(),
            self.port,
            other.port
        )
    }

    fn pg_ctl(&self, arguments: &[&str]) {
        let log = self.dir.path().join("log");
        let status = self
            .command("pg_ctl")
            .arg("-D")
            .arg(self.data())
            .arg("-l")
            .arg(log)
            .args(arguments)
            .stdout(Stdio::null())
            .status()
            .expect("pg_ctl runs");
        assert!(status.success(), "pg_ctl {arguments:?}");
    }

    pub(crate) fn up(&self) {
        self.pg_ctl(&["-w", "start"]);
    }

    pub(crate) fn down(&self, mode: &str) {
        self.pg_ctl(&["-w", "-m", mode, "stop"]);
    }

    pub(crate) fn promote(&self) {
        self.pg_ctl(&["-w", "promote"]);
    }

    pub(crate) fn sql(&self, sql: &str) -> String {
        let output = self
            .command("psql")
            .arg("-h")
            .arg(self.dir.path())
            .args([
                "-p",
                &self.port.to_string(),
                "-U",
                "postgres",
                "-qAtX",
                "-c",
                sql,
            ])
            .output()
            .expect("psql runs");
        succeed(sql, &output)
    }

    /// Runs psql, and so libpq, of the server's version with the test's connection string.
    pub(crate) fn psql(&self, conninfo: &str, sql: &str) -> Output {
        self.command("psql")
            .env("HOME", "/nonexistent")
            .args(["-qAtX", "-d", conninfo, "-c", sql])
            .output()
            .expect("psql runs")
    }

    pub(crate) fn lsn(&self) -> Lsn {
        self.sql("SELECT pg_current_wal_flush_lsn()")
            .parse()
            .expect("an LSN")
    }

    /// Writes about this many KiB of WAL, in records that cross pages and segments.
    pub(crate) fn write_wal(&self, kib: u32) {
        self.sql("CREATE TABLE IF NOT EXISTS load (number int, filler text)");
        self.sql(&format!(
            "INSERT INTO load SELECT n, repeat('x', 1000) FROM generate_series(1, {kib}) n"
        ));
    }

    /// Starts a client that commits small transactions until it is killed.
    pub(crate) fn load(&self) -> Load {
        self.sql("CREATE TABLE IF NOT EXISTS load (number int, filler text)");
        let script = self.dir.path().join("load.sql");
        fs::write(
            &script,
            "INSERT INTO load SELECT 1, repeat('x', 500) FROM generate_series(1, 20);\n",
        )
        .expect("a script");
        let child = self
            .command("pgbench")
            .arg("-h")
            .arg(self.dir.path())
            .args([
                "-p",
                &self.port.to_string(),
                "-U",
                "postgres",
                "-n",
                "-c",
                "2",
                "-T",
                "600",
            ])
            .arg("-f")
            .arg(script)
            .arg("postgres")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("pgbench runs");
        Load(child)
    }

    /// Starts a base backup by another program that takes a minute.
    pub(crate) fn slow_backup(&self) -> Load {
        let child = self
            .command("pg_basebackup")
            .args(["-d", &self.conninfo(), "-D", "-", "-Ft", "-X", "none"])
            .args(["--checkpoint=fast", "--max-rate=500k"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("pg_basebackup runs");
        Load(child)
    }

    /// Starts a client with a replication connection that does nothing. It ends if the server
    /// refuses the connection.
    pub(crate) fn replication_client(&self) -> Load {
        let conninfo = format!("{} dbname=postgres replication=true", self.conninfo());
        let child = self
            .command("psql")
            .args(["-X", "-d", &conninfo])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("psql runs");
        Load(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("server on port {}, newest line first: {tail:#?}", self.port);
        }
        let stopped = self
            .command("pg_ctl")
            .arg("-D")
            .arg(self.data())
            .args(["-m", "immediate", "stop"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        drop(stopped);
    }
}

/// A running client, killed when dropped.
pub(crate) struct Load(Child);

impl Load {
    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_none()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
