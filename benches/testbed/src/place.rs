//! [`Place`]: the directories of our programs and how to run them there. [`Daemon`]: a running
//! `wal-archiver run`.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::{
    cluster::Cluster,
    object_store::{BUCKET, ObjectStoreServer},
    programs::{command, directory, ours, succeed},
};

/// The time after which any step counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The directories of our programs.
#[derive(Debug)]
pub struct Place {
    directory: TempDir,
    store: Option<ObjectStoreServer>,
    in_bucket: bool,
    /// The cluster's name, unless it is the default.
    cluster: Option<String>,
    /// Environment variables of our programs.
    environment: Vec<(&'static str, String)>,
}

impl Place {
    /// Creates a place.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new() -> Result<Self> {
        Ok(Self {
            directory: directory()?,
            store: None,
            in_bucket: false,
            cluster: None,
            environment: Vec::new(),
        })
    }

    /// Creates a place with further lines of `tidemark.toml`, in which `{place}` is replaced by its
    /// path.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn with_settings(settings: &str) -> Result<Self> {
        let place = Self::new()?;
        let settings = settings.replace("{place}", &place.path().display().to_string());
        std::fs::write(place.path().join("tidemark.toml"), format!("{settings}\n"))?;
        Ok(place)
    }

    /// Creates a place whose repository is in a bucket of `store`. `settings` are further lines of
    /// `tidemark.toml`.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn in_bucket(store: ObjectStoreServer, settings: &str) -> Result<Self> {
        let reached = store.configuration();
        Self::in_bucket_behind(store, &format!("{reached}{settings}"))
    }

    /// The same, but `settings` also say how to reach the store.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn in_bucket_behind(store: ObjectStoreServer, settings: &str) -> Result<Self> {
        let directory = directory()?;
        let lines = format!("repository = \"s3://{BUCKET}/main/job\"\n{settings}\n");
        std::fs::write(directory.path().join("tidemark.toml"), lines)?;
        Ok(Self {
            directory,
            store: Some(store),
            in_bucket: true,
            cluster: None,
            environment: Vec::new(),
        })
    }

    /// Creates another host with the same bucket and its own spool. `settings` are further lines of
    /// its `tidemark.toml`.
    ///
    /// # Errors
    /// When it cannot be created, or this place has no bucket.
    pub fn beside(&self, settings: &str) -> Result<Self> {
        if !self.in_bucket {
            bail!("a place without a bucket has nothing to share");
        }
        let directory = directory()?;
        let lines = std::fs::read_to_string(self.path().join("tidemark.toml"))?;
        let file = directory.path().join("tidemark.toml");
        std::fs::write(file, format!("{lines}{settings}\n"))?;
        Ok(Self {
            directory,
            store: None,
            in_bucket: true,
            cluster: None,
            environment: self.environment.clone(),
        })
    }

    /// Returns the same place with these environment variables for our programs.
    #[must_use]
    pub fn with_environment(self, environment: &[(&'static str, String)]) -> Self {
        Self {
            environment: environment.to_vec(),
            ..self
        }
    }

    /// Sets the environment variables of our programs from now on.
    pub fn set_environment(&mut self, environment: &[(&'static str, String)]) {
        self.environment = environment.to_vec();
    }

    /// Makes our programs work on the cluster of this name from now on.
    pub fn use_cluster(&mut self, name: &str) {
        self.cluster = Some(name.to_owned());
    }

    /// The directory that contains everything.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The store of a place in a bucket.
    #[must_use]
    pub fn store(&self) -> Option<&ObjectStoreServer> {
        self.store.as_ref()
    }

    /// Returns a command for one of our programs, with the repository and spool of this place.
    ///
    /// # Errors
    /// When the program was not built.
    pub fn program(&self, name: &str) -> Result<Command> {
        let mut command = command(&ours(name)?)?;
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let root = self.path().display();
        if self.path().join("tidemark.toml").exists() {
            command.arg(format!("--config={root}/tidemark.toml"));
        }
        if !self.in_bucket {
            command.arg(format!("--repository=file://{root}/repository"));
        }
        command.arg(format!("--spool={root}/spool"));
        if let Some(cluster) = &self.cluster {
            command.arg(format!("--cluster={cluster}"));
        }
        Ok(command)
    }

    /// Takes a base backup of the server at `conninfo`. Returns the program's output.
    ///
    /// # Errors
    /// Both outputs when it fails.
    pub fn back_up(&self, conninfo: &str, more: &[&str]) -> Result<String> {
        let mut backup = self.program("wal-archiver")?;
        succeed(backup.args(["--conninfo", conninfo, "backup"]).args(more))
    }

    /// Starts the daemon and waits until it streams.
    ///
    /// # Errors
    /// Its log when it does not.
    pub fn daemon(&self, cluster: &Cluster, http: &str) -> Result<Daemon> {
        self.daemon_at(&cluster.conninfo(), http, " INFO streaming")
    }

    /// Starts the daemon for the server at `conninfo` and waits until its log contains a text.
    ///
    /// # Errors
    /// Its log when it never does.
    pub fn daemon_at(&self, conninfo: &str, http: &str, until: &str) -> Result<Daemon> {
        let mut daemon = self.spawn(conninfo, http)?;
        daemon.wait_for(|text| text.contains(until))?;
        Ok(daemon)
    }

    /// Starts the daemon without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, conninfo: &str, http: &str) -> Result<Daemon> {
        let path = self.path().join("archiver.log");
        let log = File::create(&path)?;
        let mut run = self.program("wal-archiver")?;
        run.args(["--conninfo", conninfo, "run", "--http", http]);
        run.env("TIDEMARK_LOG", "info").env("NO_COLOR", "1");
        run.stdin(Stdio::null());
        let child = run.stdout(Stdio::null()).stderr(log).spawn()?;
        Ok(Daemon { child, log: path })
    }
}

/// The running archiver.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// The HTTP address, according to its log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn address(&self) -> Result<Option<SocketAddr>> {
        Ok(served_address(&std::fs::read_to_string(&self.log)?))
    }

    /// Waits until its log satisfies `done`.
    ///
    /// # Errors
    /// The log when it never does.
    pub fn wait_for(&mut self, done: impl Fn(&str) -> bool) -> Result<()> {
        let began = Instant::now();
        loop {
            let text = std::fs::read_to_string(&self.log)?;
            if done(&text) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE || self.child.try_wait()?.is_some() {
                bail!("the archiver did not get there; its log:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes it read its configuration again.
    ///
    /// # Errors
    /// When it has ended.
    pub fn reload(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(
            pid,
            rustix::process::Signal::HUP,
        )?)
    }

    /// Kills it without warning.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to stop and waits until everything is in the repository.
    ///
    /// # Errors
    /// When it ends with a failure.
    pub fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        bail!(
            "the archiver ended with {status}; its log:\n{}",
            std::fs::read_to_string(&self.log)?
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A random time from the start of a process into its steady work.
pub(crate) fn random_pause() -> Duration {
    use std::hash::{BuildHasher, RandomState};
    Duration::from_millis(RandomState::new().hash_one(0) % 1200 + 20)
}

/// Returns the HTTP address in the daemon's log.
pub fn served_address(log: &str) -> Option<SocketAddr> {
    let line = log.lines().find(|line| line.contains("serving HTTP"))?;
    let text = line.split_once("address=")?.1;
    text.split_whitespace().next()?.parse().ok()
}
