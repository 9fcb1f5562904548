//! [`MotoServer`]: moto, a mock of AWS in Python, as a second S3 server. Dropping it stops the
//! server.
//!
//! It differs from SeaweedFS where stores may differ, so code that works with both does not depend
//! on one of them.
//! Invariant: its version is that of `benches/tools/moto.txt`.

use std::{
    env,
    fs::File,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::ports::free_port;

/// Importing it takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const LOCK: &str = include_str!("../../tools/moto.txt");
/// Another version behaves differently, so the test would check something else.
const RUN: &str = "import sys, moto
wanted, port = sys.argv[1:]
if moto.__version__ != wanted:
    sys.exit(f'moto {moto.__version__} is installed in {moto.__path__[0]}, the tests need {wanted}; run `make install-tools`')
from moto.server import main
main(['-H', '127.0.0.1', '-p', port])
";

/// A running server without any bucket.
#[derive(Debug)]
pub struct MotoServer {
    process: Child,
    endpoint: String,
    _log: TempDir,
}

/// The directory in which `benches/tools/install-moto.sh` installs it.
fn home() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = vec!["/var/cache/tidemark/moto".into()];
    let own = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark/moto"));
    places.extend(own);
    places.into_iter().find(|path| path.join("moto").is_dir())
}

fn wanted() -> Option<&'static str> {
    let line = LOCK.lines().find_map(|line| line.strip_prefix("moto=="));
    line?.split(' ').next()
}

impl MotoServer {
    /// Starts the server, or reports that it is missing. In CI a missing server is a failure, not a
    /// skipped test.
    ///
    /// # Panics
    /// In CI when it is missing, and when it does not start.
    #[must_use]
    pub fn start_or_skip() -> Option<Self> {
        let Some(home) = home() else {
            assert!(
                env::var_os("CI").is_none(),
                "moto is not installed; run `make install-tools`"
            );
            eprintln!("SKIPPED: moto is not installed; run `make install-tools`");
            return None;
        };
        Some(Self::start(&home).expect("moto starts"))
    }

    /// Starts the server that is installed in `home`.
    ///
    /// # Errors
    /// Its output when it has another version or does not become ready.
    pub fn start(home: &Path) -> Result<Self> {
        let wanted = wanted().context("benches/tools/moto.txt does not name moto")?;
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
        let directory = tempfile::tempdir()?;
        let log = directory.path().join("moto.log");
        let mut process = Command::new("python3")
            // Ignores other Python packages on this machine.
            .args(["-s", "-c", RUN, wanted, &address.port().to_string()])
            .env("PYTHONPATH", home)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("run python3")?;
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            let ended = process.try_wait()?.is_some();
            if ended || began.elapsed() > PATIENCE {
                let _gone = process.kill();
                let _gone = process.wait();
                bail!(
                    "moto did not become ready: {}",
                    std::fs::read_to_string(log)?
                );
            }
            sleep(Duration::from_millis(100));
        }
        Ok(Self {
            process,
            endpoint: format!("http://{address}"),
            _log: directory,
        })
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for MotoServer {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _ended = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_refused_by_name() {
        let home = tempfile::tempdir().expect("a directory");
        let package = home.path().join("moto");
        std::fs::create_dir(&package).expect("a directory");
        let old = "__version__ = '4.0.1'\n";
        std::fs::write(package.join("__init__.py"), old).expect("a file");
        let error = MotoServer::start(home.path()).expect_err("an old one");
        let said = error.to_string();
        let wanted = format!("the tests need {}", wanted().expect("a version"));
        assert!(
            said.contains("moto 4.0.1") && said.contains(&wanted),
            "{said}"
        );
        assert!(said.contains("make install-tools"), "{said}");
    }
}
