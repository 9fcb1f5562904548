//! [`Host`]: one of the hosts to try, from the lists in `host`, `hostaddr` and `port`.

use std::{fmt, net::IpAddr, path::Path};

use super::{
    super::Result,
    parse::{Values, problem},
};

/// The default socket directories: Debian's, then PostgreSQL's own.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];
const PORT: u16 = 5432;

/// A host to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A name, an address, or the directory of a Unix socket. Empty if only `hostaddr` was given.
    pub(crate) name: String,
    /// The address to connect to without resolving the name.
    pub(crate) address: Option<IpAddr>,
    /// The port, also for a socket.
    pub(crate) port: u16,
}

impl Host {
    /// Returns the hosts in the order in which they are tried.
    pub(super) fn list(values: &Values) -> Result<Vec<Self>> {
        let list = |keyword: &str| -> Vec<&str> {
            match values.get(keyword).map(String::as_str) {
                None | Some("") => Vec::new(),
                Some(text) => text.split(',').collect(),
            }
        };
        let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = names.len().max(addresses.len()).max(1);
        for (keyword, found) in [("host", names.len()), ("hostaddr", addresses.len())] {
            if found != 0 && found != count {
                return Err(problem(format!(
                    "{keyword} lists {found} places, the other list has {count}; give both the same length"
                )));
            }
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(problem(format!(
                "port lists {} ports for {count} hosts; give one, or one for each",
                ports.len()
            )));
        }
        (0..count)
            .map(|at| {
                let item = |list: &[&str]| list.get(at).map_or("", |text| text.trim()).to_owned();
                let address = match item(&addresses) {
                    text if text.is_empty() => None,
                    text => Some(text.parse().map_err(|_| {
                        problem(format!(
                            "hostaddr {text} is no IP address; a name belongs to host"
                        ))
                    })?),
                };
                let mut name = item(&names);
                if name.is_empty() && address.is_none() {
                    name = default_socket_directory().to_owned();
                }
                let port = ports
                    .get(at)
                    .or_else(|| ports.first().filter(|_| ports.len() == 1));
                let port = match port.map(|text| text.trim()) {
                    None | Some("") => PORT,
                    Some(text) => {
                        text.parse().ok().filter(|port| *port != 0).ok_or_else(|| {
                            problem("port is no number from 1 to 65535".to_owned())
                        })?
                    }
                };
                Ok(Self {
                    name,
                    address,
                    port,
                })
            })
            .collect()
    }

    /// Returns true for a Unix socket: a directory, or a name in the abstract namespace.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        self.address.is_none() && self.name.starts_with(['/', '@'])
    }

    /// The names under which the password file may list this host.
    pub(super) fn password_names(&self) -> Vec<String> {
        if self.is_socket() {
            return vec![self.name.clone(), "localhost".to_owned()];
        }
        match (self.name.as_str(), self.address) {
            ("", Some(address)) => vec![address.to_string()],
            (name, _) => vec![name.to_owned()],
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name.as_str(), self.address) {
            ("", Some(IpAddr::V6(address))) => write!(f, "[{address}]:{}", self.port),
            ("", Some(address)) => write!(f, "{address}:{}", self.port),
            (name, Some(address)) => write!(f, "{name}:{} ({address})", self.port),
            (name, None) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            (name, None) => write!(f, "{name}:{}", self.port),
        }
    }
}

fn default_socket_directory() -> &'static str {
    let [debian, own] = SOCKET_DIRECTORIES;
    if Path::new(debian).is_dir() {
        debian
    } else {
        own
    }
}
