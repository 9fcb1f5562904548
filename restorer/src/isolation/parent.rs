//! The parent of a copy: its addresses, and the check whether it still answers.
//!
//! The check of an address sends the eight bytes of an `SSLRequest`, which every PostgreSQL answers
//! with one byte before authentication. The check of a connection string runs `pg_isready`, which
//! reads the string as libpq does.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Pid, test_kill_process},
};
use serde::{Deserialize, Serialize};

use super::{PORT_DEFAULT, configuration::Configuration, text};
use crate::{Error, Result};

/// The maximum time to wait for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Length and code of an `SSLRequest`.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
/// The default socket directories, which are compiled into PostgreSQL.
const SOCKETS_DEFAULT: [&str; 2] = ["/tmp", "/var/run/postgresql"];

/// The addresses of a parent on its own host, as its configuration files name them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    port: u16,
    /// The paths, decoded (`text.rs`).
    socket_directories: Vec<String>,
    listens: bool,
    /// The items of `listen_addresses`. Empty in the state file of an older version.
    #[serde(default)]
    hosts: Vec<String>,
    /// The value of `data_directory`, decoded.
    #[serde(default)]
    data_directory: Option<String>,
}

impl Addresses {
    pub(super) fn of(configuration: &Configuration) -> Self {
        let mut socket_directories = socket_directories(configuration);
        if configuration.value("unix_socket_directories").is_none() {
            socket_directories = SOCKETS_DEFAULT.map(PathBuf::from).into();
        }
        // A relative path is relative to the parent's data directory, which may be unknown.
        socket_directories.retain(|directory| directory.is_absolute());
        let hosts = configuration
            .value("listen_addresses")
            .unwrap_or("localhost");
        let hosts = list(hosts);
        let socket_directories = socket_directories.iter().map(|one| text::of_path(one));
        Self {
            port: port(configuration),
            socket_directories: socket_directories.collect(),
            listens: !hosts.is_empty(),
            hosts,
            data_directory: configuration.value("data_directory").map(str::to_owned),
        }
    }

    /// Returns the parent's data directory if it is known, exists on this host and is not the
    /// directory `copy`.
    pub(super) fn data_directory(&self, copy: &Path) -> Option<PathBuf> {
        let directory = text::path(self.data_directory.as_deref()?);
        let real = fs::canonicalize(directory).ok()?;
        let is_data = real.join("global/pg_control").exists();
        (is_data && Some(&real) != fs::canonicalize(copy).ok().as_ref()).then_some(real)
    }

    /// Returns the addresses from the configuration files. If the parent's data directory exists on
    /// this host, adds the addresses of its last start.
    fn servers(&self, copy: &Path) -> Vec<Server> {
        let hosts = match self.hosts.as_slice() {
            [] if self.listens => vec!["localhost".to_owned()],
            hosts => hosts.to_vec(),
        };
        let sockets = self.socket_directories.iter().map(|one| text::path(one));
        let mut servers = vec![Server {
            port: self.port,
            sockets: sockets.collect(),
            hosts,
        }];
        if let (Some(data), Some(of_files)) = (self.data_directory(copy), servers.first()) {
            let options = fs::read(data.join("postmaster.opts")).unwrap_or_default();
            let started = of_files.started_with(&text::decode(&options), &data);
            let running = Postmaster::of(&data).map(|running| running.server(&data));
            servers.push(started);
            servers.extend(running);
        }
        servers
    }

    /// Returns the addresses for display.
    pub(super) fn shown(&self, copy: &Path) -> String {
        let servers = self.servers(copy);
        let each = servers.iter().flat_map(|server| {
            let socket = |one: &PathBuf| format!("{}/.s.PGSQL.{}", one.display(), server.port);
            let host = |one: &String| format!("{one}:{}", server.port);
            let sockets = server.sockets.iter().map(socket);
            sockets.chain(server.hosts.iter().map(host))
        });
        let each: BTreeSet<String> = each.collect();
        each.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// Returns the reason why the parent may still run although nothing answers; `None` if its data
    /// directory is here and shows that it was shut down. Called after [`Addresses::answers`].
    pub(super) fn doubt(&self, copy: &Path) -> Option<Doubt> {
        let Some(data) = self.data_directory(copy) else {
            return Some(Doubt::Addresses(self.shown(copy)));
        };
        let lock = data.join("postmaster.pid");
        fs::symlink_metadata(&lock)
            .is_ok()
            .then_some(Doubt::LockFile(lock))
    }

    /// Returns the process that runs in the parent's data directory, or an address at which a
    /// server answers that is not the server of `copy`.
    pub(super) fn answers(&self, copy: &Path) -> Option<String> {
        if let Some(data) = self.data_directory(copy)
            && let Some(process) = Postmaster::of(&data).and_then(|running| running.process())
        {
            return Some(format!("process {process} of {}", data.display()));
        }
        let own = Postmaster::of(copy).map(|own| own.server(copy));
        let servers = self.servers(copy).into_iter();
        let mut answers = servers.map(|server| server.answers(own.as_ref()));
        answers.find_map(|answer| answer)
    }
}

/// The reason why it is not known whether a parent that does not answer still runs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// The addresses of its configuration files may not be those of its last start.
    #[error(
        "nobody answers at {0}, but it may have been started with other options or on another host; name its address with \
         --conninfo, or say --force when it is gone for good"
    )]
    Addresses(String),
    /// Its data directory has the lock file of a server whose process is not here.
    #[error(
        "{path} is there, but no server with its process ID runs here: the parent has crashed, or it runs in another container \
         or on another host that shares the directory; look there, and say --force when it is gone for good",
        path = .0.display()
    )]
    LockFile(PathBuf),
    /// The program that asks the parent was not found.
    #[error(
        "pg_isready of any version, which asks the parent at {source_name}, was not found; name its directory with --pg-bin, or \
         say --force when the parent is gone for good"
    )]
    NotAsked {
        /// The source of the connection string.
        source_name: String,
    },
}

/// The addresses of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Server {
    port: u16,
    sockets: Vec<PathBuf>,
    hosts: Vec<String>,
}

impl Server {
    /// Returns these addresses, changed by the arguments in the text of a `postmaster.opts`, where
    /// each argument is in double quotes (`CreateOptsFile` in `postmaster.c`).
    fn started_with(&self, options: &str, data: &Path) -> Self {
        let mut server = self.clone();
        let mut arguments = options.split('"').skip(1).step_by(2);
        while let Some(argument) = arguments.next() {
            let (name, value) = match argument.strip_prefix("--") {
                Some(long) => long.split_once('=').unwrap_or((long, "")),
                None => {
                    let Some((flag, attached)) = argument.split_at_checked(2) else {
                        continue;
                    };
                    let name = match flag {
                        "-p" => "port",
                        "-k" => "unix_socket_directories",
                        "-h" => "listen_addresses",
                        "-i" => {
                            server.hosts = vec!["*".to_owned()];
                            continue;
                        }
                        "-c" => "",
                        _ => continue,
                    };
                    let value = match attached {
                        "" => arguments.next().unwrap_or_default(),
                        attached => attached,
                    };
                    match name {
                        "" => value.split_once('=').unwrap_or((value, "")),
                        name => (name, value),
                    }
                }
            };
            match name.replace('-', "_").to_ascii_lowercase().as_str() {
                "port" => server.port = value.parse().unwrap_or(server.port),
                "listen_addresses" => server.hosts = list(value),
                "unix_socket_directories" => {
                    let sockets = list(value).into_iter();
                    server.sockets = sockets.map(|one| data.join(text::path(&one))).collect();
                }
                _ => {}
            }
        }
        server
    }

    /// Returns an address at which a server answers that is not `own`.
    fn answers(&self, own: Option<&Self>) -> Option<String> {
        let own = own.filter(|own| own.port == self.port);
        for directory in &self.sockets {
            let is_own = own.is_some_and(|own| own.sockets.contains(directory));
            let path = directory.join(format!(".s.PGSQL.{}", self.port));
            if !is_own && UnixStream::connect(&path).is_ok_and(|stream| speaks_unix(&stream)) {
                return Some(path.display().to_string());
            }
        }
        let own: Vec<SocketAddr> = own.map(Self::addresses).unwrap_or_default();
        let others = self.addresses().into_iter();
        let mut others = others.filter(|address| !own.contains(address));
        let answers = |address: &SocketAddr| {
            TcpStream::connect_timeout(address, PATIENCE).is_ok_and(|stream| speaks_tcp(&stream))
        };
        others.find(answers).map(|address| address.to_string())
    }

    /// Returns the addresses of `hosts` at which this host can reach the server.
    fn addresses(&self) -> Vec<SocketAddr> {
        let each = self.hosts.iter().flat_map(|host| {
            let hosts = match host.as_str() {
                "*" => vec!["127.0.0.1", "::1"],
                "0.0.0.0" => vec!["127.0.0.1"],
                "::" => vec!["::1"],
                host => vec![host],
            };
            hosts.into_iter().flat_map(|host| {
                let found = (host, self.port).to_socket_addrs();
                found.map(Vec::from_iter).unwrap_or_default()
            })
        });
        each.collect()
    }
}

/// The server that runs in a data directory, from its `postmaster.pid`.
struct Postmaster {
    process: i32,
    port: u16,
    socket_directory: PathBuf,
    host: String,
}

impl Postmaster {
    fn of(directory: &Path) -> Option<Self> {
        let content = text::decode(&fs::read(directory.join("postmaster.pid")).ok()?);
        let lines: Vec<&str> = content.lines().collect();
        Some(Self {
            process: lines.first()?.trim().parse().ok()?,
            port: lines.get(3)?.trim().parse().ok()?,
            socket_directory: text::path(lines.get(4)?.trim()),
            host: lines.get(5).unwrap_or(&"").trim().to_owned(),
        })
    }

    fn server(&self, directory: &Path) -> Server {
        Server {
            port: self.port,
            sockets: vec![directory.join(&self.socket_directory)],
            hosts: list(&self.host),
        }
    }

    /// Returns the process if it runs on this host and is a server. After a crash, another program
    /// may have the same process ID.
    fn process(&self) -> Option<i32> {
        let runs = test_kill_process(Pid::from_raw(self.process)?);
        let name = fs::read_to_string(format!("/proc/{}/comm", self.process));
        let is_server = name.map_or(true, |name| name.trim().starts_with("post"));
        (matches!(runs, Ok(()) | Err(Errno::PERM)) && is_server).then_some(self.process)
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
        .arg(text::path(conninfo))
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
    list(listed).iter().map(|one| text::path(one)).collect()
}

/// Returns the items of a list of names (`SplitGUCList`).
pub(super) fn list(value: &str) -> Vec<String> {
    let each = value.split(',').map(|one| one.trim().trim_matches('"'));
    each.filter(|one| !one.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_start_win_over_the_files() {
        let of_files = Server {
            port: 5432,
            sockets: vec!["/run".into()],
            hosts: vec!["localhost".to_owned()],
        };
        let check = |options: &str, port: u16, sockets: &str, hosts: &[&str]| {
            let options = format!("/usr/bin/postgres {options}\n");
            let found = of_files.started_with(&options, Path::new("/data"));
            assert_eq!(found.port, port, "{options}");
            assert_eq!(found.sockets, [PathBuf::from(sockets)], "{options}");
            assert_eq!(found.hosts, hosts, "{options}");
        };
        check("\"-D\" \"/data\"", 5432, "/run", &["localhost"]);
        check(
            "\"-p\" \"5433\" \"-k\" \"/tmp\"",
            5433,
            "/tmp",
            &["localhost"],
        );
        check("\"-p5434\" \"-i\"", 5434, "/run", &["*"]);
        check(
            "\"-c\" \"port=5435\" \"-h\" \"a, b\"",
            5435,
            "/run",
            &["a", "b"],
        );
        check(
            "\"--port=5436\" \"--listen-addresses=\" \"--unix_socket_directories=s\"",
            5436,
            "/data/s",
            &[],
        );
    }
}
