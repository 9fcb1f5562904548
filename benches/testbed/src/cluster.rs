//! [`Cluster`]: a temporary PostgreSQL server on its own Unix socket. Dropping it stops and removes
//! the server.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use postgres::{Client, NoTls};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

use crate::programs::{command, directory, succeed};

/// The port number is only a part of the socket's name. The server does not listen on TCP.
pub const PORT: u16 = 54_321;
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
#[derive(Debug)]
pub struct Cluster {
    directory: TempDir,
    bin: PathBuf,
}

impl Cluster {
    /// Creates and starts a cluster with the server programs in `bin`.
    ///
    /// # Errors
    /// The message of `initdb` or of the server.
    pub fn start(bin: &Path, segment_mib: u32, settings: &str) -> Result<Self> {
        Self::start_with(bin, segment_mib, true, settings)
    }

    /// As [`Cluster::start`], with or without data checksums.
    ///
    /// # Errors
    /// The message of `initdb` or of the server.
    pub fn start_with(
        bin: &Path,
        segment_mib: u32,
        checksums: bool,
        settings: &str,
    ) -> Result<Self> {
        let cluster = Self {
            directory: directory()?,
            bin: bin.to_owned(),
        };
        let segments = format!("--wal-segsize={segment_mib}");
        let mut initdb = cluster.program("initdb")?;
        initdb.arg("-D").arg(cluster.data());
        initdb.args(["-U", "postgres", "-A", "trust", "-N", &segments]);
        if checksums {
            initdb.arg("-k");
        } else if succeed(cluster.program("initdb")?.arg("--help"))?.contains("no-data-checksums") {
            // The default since 18.
            initdb.arg("--no-data-checksums");
        }
        succeed(&mut initdb)?;
        let mut configuration = fs::OpenOptions::new()
            .append(true)
            .open(cluster.data().join("postgresql.conf"))?;
        writeln!(
            configuration,
            "port = {PORT}\nunix_socket_directories = '{}'\nlisten_addresses = ''\n\
             max_wal_size = 4GB\nlog_min_messages = log\n{settings}",
            cluster.directory.path().display()
        )?;
        cluster.pg_ctl(&["start"])?;
        Ok(cluster)
    }

    /// Creates a standby that streams from `primary`. `settings` follow the primary's own.
    ///
    /// # Errors
    /// The message of `pg_basebackup` or of the server.
    pub fn standby_of(primary: &Self, settings: &str) -> Result<Self> {
        let standby = Self {
            directory: directory()?,
            bin: primary.bin.clone(),
        };
        let mut copy = standby.program("pg_basebackup")?;
        copy.arg("-h").arg(primary.socket_directory());
        copy.args(["-p", &PORT.to_string(), "-U", "postgres", "-R"]);
        copy.args(["-X", "stream", "-c", "fast", "-D"]);
        succeed(copy.arg(standby.data()))?;
        let directory = standby.directory.path().display();
        standby.configure(&format!(
            "unix_socket_directories = '{directory}'\nhot_standby = on\n{settings}"
        ))?;
        standby.pg_ctl(&["start"])?;
        Ok(standby)
    }

    /// Upgrades this stopped cluster with `pg_upgrade` and the programs in `bin`. The new cluster
    /// is started and has its own system identifier.
    ///
    /// # Errors
    /// The message of `initdb`, `pg_upgrade` or of the server.
    pub fn upgraded(&self, bin: &Path, segment_mib: u32, settings: &str) -> Result<Self> {
        let new = Self::start(bin, segment_mib, settings)?;
        new.stop()?;
        let mut upgrade = new.program("pg_upgrade")?;
        upgrade.current_dir(new.directory.path());
        upgrade.arg("-b").arg(&self.bin).arg("-B").arg(bin);
        upgrade.arg("-d").arg(self.data()).arg("-D").arg(new.data());
        upgrade.args(["-U", "postgres", "-s"]);
        succeed(upgrade.arg(new.directory.path()))?;
        new.pg_ctl(&["start"])?;
        Ok(new)
    }

    /// Copies this stopped cluster and starts the copy: the same system identifier on the same
    /// timeline.
    ///
    /// # Errors
    /// The message of `cp` or of the server.
    pub fn copied(&self) -> Result<Self> {
        let copy = Self {
            directory: directory()?,
            bin: self.bin.clone(),
        };
        let mut cp = command(Path::new("/bin/cp"))?;
        succeed(cp.arg("-a").arg(self.data()).arg(copy.data()))?;
        let directory = copy.directory.path().display();
        copy.configure(&format!("unix_socket_directories = '{directory}'"))?;
        copy.pg_ctl(&["start"])?;
        Ok(copy)
    }

    /// Appends settings. The last value of a setting applies, from the next start.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, settings: &str) -> Result<()> {
        let mut configuration = fs::OpenOptions::new()
            .append(true)
            .open(self.data().join("postgresql.conf"))?;
        writeln!(configuration, "{settings}")?;
        Ok(())
    }

    /// Makes commits of new connections wait for these standbys.
    ///
    /// # Errors
    /// The server's message.
    pub fn wait_for_standbys(&self, names: &str) -> Result<()> {
        let mut client = self.connect()?;
        client.batch_execute(&format!(
            "ALTER SYSTEM SET synchronous_standby_names = '{names}'"
        ))?;
        client.batch_execute("SELECT pg_reload_conf()")?;
        Ok(())
    }

    /// Promotes a standby. When this returns, it is a primary on a new timeline.
    ///
    /// # Errors
    /// The message of `pg_ctl`.
    pub fn promote(&self) -> Result<()> {
        self.pg_ctl(&["promote"])
    }

    /// Shuts the server down normally: every walsender sends the shutdown checkpoint.
    ///
    /// # Errors
    /// The message of `pg_ctl`.
    pub fn stop(&self) -> Result<()> {
        self.pg_ctl(&["stop", "-m", "fast"])
    }

    fn pg_ctl(&self, arguments: &[&str]) -> Result<()> {
        let log = self.directory.path().join("postgresql.log");
        let mut pg_ctl = self.program("pg_ctl")?;
        pg_ctl
            .arg("-D")
            .arg(self.data())
            .arg("-l")
            .arg(&log)
            .arg("-w")
            .args(arguments);
        // The server would inherit pg_ctl's output and keep it open.
        let status = pg_ctl
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()?;
        if status.success() {
            return Ok(());
        }
        bail!(
            "pg_ctl {arguments:?}: {status}\n{}",
            fs::read_to_string(log).unwrap_or_default()
        );
    }

    /// Returns a command for a program of this server's version, run as its user.
    ///
    /// # Errors
    /// When the user cannot be created.
    pub fn program(&self, name: &str) -> Result<Command> {
        let mut command = command(&self.bin.join(name))?;
        // A walreceiver must load its own version's libpq, not an older one of the system.
        command.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        Ok(command)
    }

    /// Runs pgbench in the database postgres until it ends.
    ///
    /// # Errors
    /// Its output when it fails.
    pub fn pgbench(&self, arguments: &[&str]) -> Result<()> {
        let mut pgbench = self.program("pgbench")?;
        pgbench.arg("-h").arg(self.socket_directory());
        pgbench.args(["-p", &PORT.to_string(), "-U", "postgres"]);
        succeed(pgbench.args(arguments).arg("postgres"))?;
        Ok(())
    }

    /// The directory of the programs.
    #[must_use]
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The directory of its socket.
    #[must_use]
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// The connection string.
    #[must_use]
    pub fn conninfo(&self) -> String {
        conninfo(self.directory.path(), PORT)
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// When it is refused.
    pub fn connect(&self) -> Result<Client> {
        connect(&self.conninfo())
    }

    /// Stops the server as a crash would (`pg_ctl stop -m immediate`). Its data remains.
    ///
    /// # Errors
    /// The message of `pg_ctl`.
    pub fn crash(&self) -> Result<()> {
        self.pg_ctl(&["stop", "-m", "immediate"])
    }

    /// Starts the server again.
    ///
    /// # Errors
    /// The message of `pg_ctl` and of the server.
    pub fn start_again(&self) -> Result<()> {
        self.pg_ctl(&["start"])
    }

    /// Kills every process of the server at once, as the loss of a host would, and removes its
    /// data.
    ///
    /// # Errors
    /// When its process cannot be found.
    pub fn destroy(&self) -> Result<()> {
        let pid = fs::read_to_string(self.data().join("postmaster.pid"))?;
        let pid: i32 = pid
            .lines()
            .next()
            .unwrap_or_default()
            .parse()
            .context("postmaster.pid")?;
        let postmaster = process(pid)?;
        // Stopped first, so that it cannot start further children while they are listed.
        kill_process(postmaster, Signal::STOP)?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        kill_process(postmaster, Signal::KILL)?;
        for child in children.split_whitespace() {
            // A child may have ended already.
            let _gone = kill_process(process(child.parse()?)?, Signal::KILL);
        }
        let began = Instant::now();
        while test_kill_process(postmaster).is_ok() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        // The kernel needs a moment until each process has ended its writes.
        while fs::remove_dir_all(self.data()).is_err() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let _ = self.pg_ctl(&["stop", "-m", "immediate"]);
        }
    }
}

fn process(pid: i32) -> Result<Pid> {
    Pid::from_raw(pid).context("a process has no such number")
}

/// Returns the connection string of a server in `directory`.
#[must_use]
pub fn conninfo(directory: &Path, port: u16) -> String {
    format!(
        "host={} port={port} user=postgres dbname=postgres",
        directory.display()
    )
}

/// Opens a connection.
///
/// # Errors
/// When it is refused.
pub fn connect(conninfo: &str) -> Result<Client> {
    Client::connect(conninfo, NoTls).with_context(|| format!("connect to {conninfo}"))
}
