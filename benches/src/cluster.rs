//! [`Cluster`]: a throwaway PostgreSQL server on a Unix socket of its own; stopped and removed when dropped.

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

/// The port's number is only a part of the socket's name: nothing listens on TCP.
pub const PORT: u16 = 54_321;
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
#[derive(Debug)]
pub struct Cluster {
    directory: TempDir,
    bin: PathBuf,
}

impl Cluster {
    /// Makes and starts a cluster of the server programs in `bin`.
    ///
    /// # Errors
    /// What `initdb` or the server said.
    pub fn start(bin: &Path, segment_mib: u32, settings: &str) -> Result<Self> {
        Self::start_with(bin, segment_mib, true, settings)
    }

    /// As [`Cluster::start`], with or without data checksums.
    ///
    /// # Errors
    /// What `initdb` or the server said.
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

    /// A standby that streams from `primary`, with `settings` after the primary's own.
    ///
    /// # Errors
    /// What `pg_basebackup` or the server said.
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

    /// What `pg_upgrade` makes of this stopped cluster with the programs in `bin`: started, with a system identifier of its
    /// own.
    ///
    /// # Errors
    /// What `initdb`, `pg_upgrade` or the server said.
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

    /// A copy of this stopped cluster, started: the same system identifier on the same timeline.
    ///
    /// # Errors
    /// What `cp` or the server said.
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

    /// Appends settings; the last one counts, at the next start.
    ///
    /// # Errors
    /// When the file can not be written.
    pub fn configure(&self, settings: &str) -> Result<()> {
        let mut configuration = fs::OpenOptions::new()
            .append(true)
            .open(self.data().join("postgresql.conf"))?;
        writeln!(configuration, "{settings}")?;
        Ok(())
    }

    /// From now on commits of new connections wait for these standbys.
    ///
    /// # Errors
    /// What the server said.
    pub fn wait_for_standbys(&self, names: &str) -> Result<()> {
        let mut client = self.connect()?;
        client.batch_execute(&format!(
            "ALTER SYSTEM SET synchronous_standby_names = '{names}'"
        ))?;
        client.batch_execute("SELECT pg_reload_conf()")?;
        Ok(())
    }

    /// Ends a standby's recovery; it is a primary on a new timeline when this returns.
    ///
    /// # Errors
    /// What `pg_ctl` said.
    pub fn promote(&self) -> Result<()> {
        self.pg_ctl(&["promote"])
    }

    /// Stops the server in order: every walsender gets the shutdown checkpoint.
    ///
    /// # Errors
    /// What `pg_ctl` said.
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
        // pg_ctl's output would be held open by the server it starts.
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

    /// A program of this server's version, run as its user.
    ///
    /// # Errors
    /// When the user can not be created.
    pub fn program(&self, name: &str) -> Result<Command> {
        let mut command = command(&self.bin.join(name))?;
        // A walreceiver must load its own version's libpq, not an older one of the system.
        command.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        Ok(command)
    }

    /// Runs pgbench in the database postgres until it ends.
    ///
    /// # Errors
    /// When it fails; what it said is in the error.
    pub fn pgbench(&self, arguments: &[&str]) -> Result<()> {
        let mut pgbench = self.program("pgbench")?;
        pgbench.arg("-h").arg(self.socket_directory());
        pgbench.args(["-p", &PORT.to_string(), "-U", "postgres"]);
        succeed(pgbench.args(arguments).arg("postgres"))?;
        Ok(())
    }

    /// The programs' directory.
    #[must_use]
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Where its socket is.
    #[must_use]
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// How to reach it.
    #[must_use]
    pub fn conninfo(&self) -> String {
        conninfo(self.directory.path(), PORT)
    }

    /// A connection.
    ///
    /// # Errors
    /// When it is refused.
    pub fn connect(&self) -> Result<Client> {
        connect(&self.conninfo())
    }

    /// Stops the server as a crash would (`pg_ctl stop -m immediate`); its data stays.
    ///
    /// # Errors
    /// What `pg_ctl` said.
    pub fn crash(&self) -> Result<()> {
        self.pg_ctl(&["stop", "-m", "immediate"])
    }

    /// Starts the server again.
    ///
    /// # Errors
    /// What `pg_ctl` and the server said.
    pub fn start_again(&self) -> Result<()> {
        self.pg_ctl(&["start"])
    }

    /// Kills every process of the server at once, as a dead host would, and removes its data.
    ///
    /// # Errors
    /// When its process can not be found.
    pub fn destroy(&self) -> Result<()> {
        let pid = fs::read_to_string(self.data().join("postmaster.pid"))?;
        let pid: i32 = pid
            .lines()
            .next()
            .unwrap_or_default()
            .parse()
            .context("postmaster.pid")?;
        let postmaster = process(pid)?;
        // Stopped first, so that it starts no more while its children are listed.
        kill_process(postmaster, Signal::STOP)?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        kill_process(postmaster, Signal::KILL)?;
        for child in children.split_whitespace() {
            // One may have ended by itself.
            let _gone = kill_process(process(child.parse()?)?, Signal::KILL);
        }
        let began = Instant::now();
        while test_kill_process(postmaster).is_ok() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        // The kernel takes a moment to end what each was writing.
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

/// How a server in `directory` is reached.
#[must_use]
pub fn conninfo(directory: &Path, port: u16) -> String {
    format!(
        "host={} port={port} user=postgres dbname=postgres",
        directory.display()
    )
}

/// A connection.
///
/// # Errors
/// When it is refused.
pub fn connect(conninfo: &str) -> Result<Client> {
    Client::connect(conninfo, NoTls).with_context(|| format!("connect to {conninfo}"))
}
