//! [`Restored`]: a cluster started by `pitr-restore --start`. Dropping it stops and removes the
//! cluster.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use postgres::Client;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    cluster::{PORT, connect, conninfo},
    place::Place,
    programs::{command, directory},
};

/// Settings that make a temporary server fast, because its data need not survive.
const QUICK: [&str; 4] = [
    "fsync=off",
    "shared_buffers=16MB",
    "wal_keep_size=0",
    "autovacuum=off",
];

/// A restored cluster.
#[derive(Debug)]
pub struct Restored {
    directory: TempDir,
    bin: PathBuf,
    /// The document that `--json` printed.
    pub report: Value,
}

impl Restored {
    /// Restores from `place` and starts the cluster. `arguments` name the target.
    ///
    /// # Errors
    /// Both outputs and the server's log when it fails.
    pub fn start<I: AsRef<OsStr>>(place: &Place, bin: &Path, arguments: &[I]) -> Result<Self> {
        let directory = directory()?;
        let output = Self::command(place, bin, directory.path(), arguments)?.output()?;
        if !output.status.success() {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            // The log contains the output of restore_command and is removed with the directory.
            let log = directory.path().join("data/tidemark_recovery.log");
            bail!(
                "pitr-restore: {}\n{}\n{}\n{}",
                output.status,
                text(&output.stdout),
                text(&output.stderr),
                text(&std::fs::read(log).unwrap_or_default())
            );
        }
        let report = serde_json::from_slice(&output.stdout).context("its JSON document")?;
        Ok(Self {
            directory,
            bin: bin.to_owned(),
            report,
        })
    }

    /// Takes over a server that a restore started in `data` below `directory`.
    #[must_use]
    pub fn adopt(directory: TempDir, bin: &Path, report: Value) -> Self {
        Self {
            directory,
            bin: bin.to_owned(),
            report,
        }
    }

    /// Returns the command that restores to `data` below `directory` and starts the server there.
    ///
    /// # Errors
    /// When `pitr-restore` is not built.
    pub fn command<I: AsRef<OsStr>>(
        place: &Place,
        bin: &Path,
        directory: &Path,
        arguments: &[I],
    ) -> Result<Command> {
        let mut restore = place.program("pitr-restore")?;
        restore.arg("--target-dir").arg(directory.join("data"));
        restore.arg("--pg-bin").arg(bin).args(["--start", "--json"]);
        let socket = format!("unix_socket_directories={}", directory.display());
        for setting in QUICK.into_iter().chain([socket.as_str()]) {
            restore.args(["--set", setting]);
        }
        // The server that it starts has its libraries next to its programs.
        restore.env("LD_LIBRARY_PATH", bin.join("../lib"));
        restore.args(arguments).stdin(Stdio::null());
        Ok(restore)
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The point where PostgreSQL stopped, in its own words.
    #[must_use]
    pub fn stopped(&self) -> &str {
        self.report["stopped"].as_str().unwrap_or_default()
    }

    /// The connection string for its socket. The port is read from its `postmaster.pid`, because
    /// each restore chooses a free one.
    #[must_use]
    pub fn conninfo(&self) -> String {
        let running = std::fs::read_to_string(self.data().join("postmaster.pid"));
        let port = running.ok().and_then(|lines| {
            let port = lines.lines().nth(3)?;
            port.trim().parse().ok()
        });
        conninfo(self.directory.path(), port.unwrap_or(PORT))
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// When it is refused.
    pub fn connect(&self) -> Result<Client> {
        connect(&self.conninfo())
    }

    /// Stops the server and keeps its files.
    ///
    /// # Errors
    /// When `pg_ctl` fails.
    pub fn stop(&self) -> Result<()> {
        let mut pg_ctl = command(&self.bin.join("pg_ctl"))?;
        pg_ctl.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        pg_ctl
            .arg("-D")
            .arg(self.data())
            .args(["-m", "immediate", "-w", "stop"]);
        let status = pg_ctl
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            bail!("pg_ctl stop: {status}");
        }
        Ok(())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if self.data().join("postmaster.pid").exists() {
            let _ = self.stop();
        }
    }
}
