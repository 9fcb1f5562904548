//! The parent of a copy: its addresses, and the check whether it still answers.
//!
//! The check of an address sends the eight bytes of an `SSLRequest`, which every PostgreSQL answers
//! with one byte before authentication. The check of a connection string runs `pg_isready`, which
//! reads the string as libpq does.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{PORT_DEFAULT, configuration::Configuration};
use crate::{Error, Result};

/// The maximum time to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Length and code of an `SSLRequest`.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// The default socket directories, which are compiled into PostgreSQL.
const SOCKETS_DEFAULT: [&str; 2] = ["/tmp", "/var/run/postgresql"];

/// The addresses of a parent on the host where it ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    port: u16,
    socket_directories: Vec<PathBuf>,
    listens: bool,
}

impl Addresses {
    pub(super) fn of(configuration: &Configuration) -> Self {
        let mut socket_directories = socket_directories(configuration);
        if configuration.value("unix_socket_directories").is_none() {
            socket_directories = SOCKETS_DEFAULT.map(PathBuf::from).into();
        }
        // A relative directory belongs to the parent's data directory, which is unknown here.
        socket_directories.retain(|directory| directory.is_absolute());
        Self {
            port: port(configuration),
            socket_directories,
            listens: configuration
                .value("listen_addresses")
                .is_none_or(|addresses| !addresses.trim().is_empty()),
        }
    }

    /// Returns an address at which a server other than the copy in `directory` answers.
    pub(super) fn answers(&self, directory: &Path) -> Option<String> {
        let own = Postmaster::of(directory);
        for socket in &self.socket_directories {
            let is_own = own.as_ref().is_some_and(|own| {
                own.port == self.port && directory.join(&own.socket_directory) == *socket
            });
            let path = socket.join(format!(".s.PGSQL.{}", self.port));
            if !is_own && UnixStream::connect(&path).is_ok_and(|stream| speaks_unix(&stream)) {
                return Some(path.display().to_string());
            }
        }
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let is_own = own.is_some_and(|own| own.port == self.port && own.listens);
        let connected = || TcpStream::connect_timeout(&address, PATIENCE);
        if self.listens && !is_own && connected().is_ok_and(|stream| speaks_tcp(&stream)) {
            return Some(address.to_string());
        }
        None
    }
}

/// The addresses of the server that runs in a data directory, from its `postmaster.pid`.
struct Postmaster {
    port: u16,
    socket_directory: PathBuf,
    listens: bool,
}

impl Postmaster {
    fn of(directory: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(directory.join("postmaster.pid")).ok()?;
        let lines: Vec<&str> = text.lines().collect();
        Some(Self {
            port: lines.get(3)?.trim().parse().ok()?,
            socket_directory: lines.get(4)?.trim().into(),
            listens: lines
                .get(5)
                .is_some_and(|address| !address.trim().is_empty()),
        })
    }
}

fn speaks_unix(mut stream: &UnixStream) -> bool {
    let patience = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    patience.is_ok() && speaks(&mut stream)
}

fn speaks_tcp(mut stream: &TcpStream) -> bool {
    let patience = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    patience.is_ok() && speaks(&mut stream)
}

fn speaks(stream: &mut (impl Read + Write)) -> bool {
    let mut answer = [0];
    stream
        .write_all(&SSL_REQUEST)
        .and_then(|()| stream.read_exact(&mut answer))
        .is_ok()
        && matches!(answer, [b'S' | b'N' | b'E'])
}

/// Runs `pg_isready` with a connection string. Its messages, which may repeat a secret, are
/// discarded.
///
/// # Errors
/// [`Error::Usage`] if the string cannot be used, [`Error::Io`] if the program cannot be run.
pub(super) fn is_ready(pg_isready: &Path, conninfo: &str) -> Result<bool> {
    let mut command = Command::new(pg_isready);
    command
        .args(["--quiet", "--timeout", &PATIENCE.as_secs().to_string()])
        .arg("--dbname")
        .arg(conninfo)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let status = command.status().map_err(Error::io("run", pg_isready))?;
    match status.code() {
        // 1: the server exists and rejects connections, for example during startup.
        Some(0 | 1) => Ok(true),
        Some(2) => Ok(false),
        _ => Err(Error::usage(
            "the connection text of the parent cannot be used by pg_isready; correct --conninfo, or say --force when the \
             parent is gone for good",
        )),
    }
}

/// Returns the effective port.
pub(super) fn port(configuration: &Configuration) -> u16 {
    let port = configuration
        .value("port")
        .and_then(|port| port.parse().ok());
    port.unwrap_or(PORT_DEFAULT)
}

/// Returns the effective socket directories, without the compiled-in ones.
pub(super) fn socket_directories(configuration: &Configuration) -> Vec<PathBuf> {
    let listed = configuration
        .value("unix_socket_directories")
        .unwrap_or_default();
    let each = listed.split(',').map(|one| one.trim().trim_matches('"'));
    each.filter(|one| !one.is_empty())
        .map(PathBuf::from)
        .collect()
}
