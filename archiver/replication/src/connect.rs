//! Connects to the servers of a [`ConnInfo`]: each host in turn, socket, TLS, startup,
//! authentication.
//!
//! As in libpq, the next host is tried when a host does not answer or does not match
//! `target_session_attrs`, but never when it refused our authentication.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use postgres_protocol::message::frontend;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{
    ConnInfo, ConnectionMode, Error, Result, ServerVersion,
    authenticate::{Authenticate, authenticate},
    connection::{Duplex, Reader, Writer, halves, rows, text},
    conninfo::{Host, SslMode, TargetSession, TcpSettings, user_name},
    tls,
};

/// The oldest server version whose replication commands equal the ones used here.
const SERVER_VERSION_MIN: u32 = 130_000;
/// The request for TLS, sent in place of a startup message (`NEGOTIATE_SSL_CODE`).
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A connection to a server that is ready for commands.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) version: ServerVersion,
    /// The host, with the address that answered.
    pub(super) host: Host,
}

/// Connects to the first host that answers and matches `target_session_attrs`.
pub(super) async fn connect(info: &ConnInfo, mode: ConnectionMode) -> Result<Connection> {
    let passes: &[TargetSession] = match info.target {
        TargetSession::PreferStandby => &[TargetSession::Standby, TargetSession::Any],
        _ => std::slice::from_ref(&info.target),
    };
    let mut failures = Vec::new();
    for target in passes {
        failures.clear();
        let mut hosts: Vec<&Host> = info.hosts().iter().collect();
        if info.load_balance {
            shuffle(&mut hosts);
        }
        for host in hosts {
            match connect_host(info, mode, host, *target).await {
                Ok(connection) => return Ok(connection),
                Err(error) if error.concerns_one_host() => failures.push(error),
                Err(error) => return Err(error),
            }
        }
    }
    Err(Error::of_hosts(failures))
}

/// Tries each address of a host.
async fn connect_host(
    info: &ConnInfo,
    mode: ConnectionMode,
    host: &Host,
    target: TargetSession,
) -> Result<Connection> {
    let place = host.to_string();
    let failed = |source| Error::Connect {
        place: place.clone(),
        source,
    };
    let mut addresses: Vec<Option<IpAddr>> = match host.address {
        Some(address) => vec![Some(address)],
        None if host.is_socket() => vec![None],
        None => tokio::net::lookup_host((host.name.as_str(), host.port))
            .await
            .map_err(failed)?
            .map(|address| Some(address.ip()))
            .collect(),
    };
    if info.load_balance {
        shuffle(&mut addresses);
    }
    let mut failures = Vec::new();
    for address in addresses {
        let host = Host {
            address,
            ..host.clone()
        };
        let attempt = Box::pin(attempt_transports(info, mode, &host, target));
        let outcome = match info.connect_timeout {
            Some(limit) => match tokio::time::timeout(limit, attempt).await {
                Ok(outcome) => outcome,
                Err(_) => Err(failed(timed_out(limit))),
            },
            None => attempt.await,
        };
        match outcome {
            Ok(connection) => return Ok(connection),
            Err(error) if error.concerns_one_host() => failures.push(error),
            Err(error) => return Err(error),
        }
    }
    match failures.pop() {
        // The other addresses of the same name would give the same answer.
        Some(last) => Err(last),
        None => Err(failed(io::Error::other("the name has no address"))),
    }
}

/// `sslmode` `allow` and `prefer` retry with the other transport.
async fn attempt_transports(
    info: &ConnInfo,
    mode: ConnectionMode,
    host: &Host,
    target: TargetSession,
) -> Result<Connection> {
    let ways: &[bool] = match info.tls.mode {
        _ if host.is_socket() => &[false],
        SslMode::Disable => &[false],
        SslMode::Allow => &[false, true],
        SslMode::Prefer => &[true, false],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[true],
    };
    let mut first = None;
    for with_tls in ways {
        let mut stream = open(info, host).await?;
        let mut encrypted = *with_tls;
        if *with_tls && !info.tls.direct {
            encrypted = request_tls(&mut stream, &host.to_string(), info.tls.mode).await?;
        }
        let attempt = Attempt {
            info,
            mode,
            host,
            target,
        };
        let outcome = match attempt.greet(stream, encrypted).await {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        if encrypted != *with_tls || !outcome.may_go_the_other_way() {
            return Err(outcome);
        }
        match (first.take(), &outcome) {
            // Prefer the first error: "no TLS" hides the real cause.
            (Some(first), Error::Tls { .. }) => return Err(first),
            _ => {
                if info.tls.mode == SslMode::Prefer && *with_tls {
                    tracing::warn!(error = %outcome, "the connection with TLS failed; trying without TLS (sslmode=prefer)");
                }
                first = Some(outcome);
            }
        }
    }
    Err(first.unwrap_or_else(|| Error::Closed {
        place: host.to_string(),
    }))
}

/// Opens a socket to the host.
async fn open(info: &ConnInfo, host: &Host) -> Result<Box<dyn Duplex>> {
    let place = host.to_string();
    let failed = |source| Error::Connect {
        place: place.clone(),
        source,
    };
    let Some(address) = host.address else {
        let path = format!("{}/.s.PGSQL.{}", host.name, host.port);
        let path = match path.strip_prefix('@') {
            Some(name) => format!("\0{name}"),
            None => path,
        };
        let stream = UnixStream::connect(path).await.map_err(failed)?;
        if let Some(wanted) = info.value("requirepeer") {
            let found = stream.peer_cred().map_err(failed)?.uid();
            let found = user_name(found).unwrap_or_else(|| found.to_string());
            if found != wanted {
                return Err(Error::Auth {
                    place,
                    problem: format!(
                        "requirepeer is \"{wanted}\", but the server runs as \"{found}\""
                    ),
                });
            }
        }
        return Ok(Box::new(stream));
    };
    let stream = TcpStream::connect(SocketAddr::new(address, host.port))
        .await
        .map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    tune(&stream, &info.tcp).map_err(failed)?;
    Ok(Box::new(stream))
}

fn tune(stream: &TcpStream, tcp: &TcpSettings) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, tcp.keepalives)?;
    if tcp.keepalives {
        if let Some(idle) = tcp.idle {
            sockopt::set_tcp_keepidle(stream, idle)?;
        }
        if let Some(interval) = tcp.interval {
            sockopt::set_tcp_keepintvl(stream, interval)?;
        }
        if let Some(count) = tcp.count {
            sockopt::set_tcp_keepcnt(stream, count)?;
        }
    }
    if let Some(limit) = tcp.user_timeout_ms {
        sockopt::set_tcp_user_timeout(stream, limit)?;
    }
    Ok(())
}

/// Requests TLS. Returns whether the server agrees.
pub(super) async fn request_tls(
    stream: &mut (impl Duplex + ?Sized),
    place: &str,
    mode: SslMode,
) -> Result<bool> {
    let lost = |source| Error::of_io(place, source);
    let odd = |what: &str| Error::Protocol {
        place: place.to_owned(),
        what: what.to_owned(),
    };
    stream.write_all(&SSL_REQUEST).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    // The answer is one byte. A second byte would come from an attacker who wants it to be read as
    // if it had been encrypted (CVE-2021-23222).
    let mut answer = [0; 2];
    let length = stream.read(&mut answer).await.map_err(lost)?;
    match (length, answer[0]) {
        (0, _) => Err(lost(io::ErrorKind::UnexpectedEof.into())),
        (1, b'S') => Ok(true),
        (1, b'N') if mode < SslMode::Require => Ok(false),
        (1, b'N') => Err(Error::Tls {
            place: place.to_owned(),
            problem: "the server does not support TLS; set ssl = on there, or sslmode=disable or prefer here"
                .to_owned(),
        }),
        // The server's text is not shown: it was not encrypted, so anybody may have written it
        // (CVE-2024-10977).
        (_, b'E') => Err(odd("the request for TLS with an error; look into its log")),
        (2, b'S' | b'N') => Err(odd(
            "the request for TLS with more than one byte; somebody on the way may be tampering",
        )),
        _ => Err(odd("the request for TLS in a way that no PostgreSQL does; is this its port?")),
    }
}

/// A connection attempt to one address with one transport.
pub(super) struct Attempt<'a> {
    pub(super) info: &'a ConnInfo,
    pub(super) mode: ConnectionMode,
    pub(super) host: &'a Host,
    pub(super) target: TargetSession,
}

impl Attempt<'_> {
    /// Performs everything after the socket is open.
    pub(super) async fn greet(
        &self,
        stream: impl Duplex + 'static,
        encrypted: bool,
    ) -> Result<Connection> {
        let place = self.host.to_string();
        let mut end_point = None;
        let (mut reader, mut writer) = if encrypted {
            let secured = Box::pin(tls::secure(&self.info.tls, self.host, stream)).await?;
            end_point = secured.end_point;
            halves(secured.stream, Some(secured.version), &place)
        } else {
            halves(stream, None, &place)
        };
        self.start_up(&mut writer).await?;
        let authentication = Authenticate {
            info: self.info,
            host: self.host,
            mode: self.mode,
            encrypted,
            end_point,
        };
        authenticate(&mut reader, &mut writer, &authentication).await?;
        reader.trust();
        let parameters = parameters(&mut reader).await?;
        let reported = parameters.get("server_version").ok_or_else(|| {
            reader.unexpected("without its server_version; a proxy cannot be archived".to_owned())
        })?;
        let version = ServerVersion::of_parameter(reported);
        if version.num < SERVER_VERSION_MIN {
            return Err(Error::ServerTooOld {
                place,
                version: version.text,
            });
        }
        self.check_target(&mut reader, &mut writer, &parameters)
            .await?;
        Ok(Connection {
            reader,
            writer,
            version,
            host: self.host.clone(),
        })
    }

    async fn start_up(&self, writer: &mut Writer) -> Result<()> {
        let mut parameters = vec![
            ("user", self.info.user()),
            ("application_name", self.info.application_name()),
            ("client_encoding", "UTF8"),
        ];
        parameters.push(match self.mode {
            ConnectionMode::Physical => ("replication", "true"),
            // An ordinary session: a walsender would count against max_wal_senders and appear as a
            // second standby.
            ConnectionMode::Sql => ("database", self.info.dbname()),
        });
        if let Some(options) = self.info.value("options") {
            parameters.push(("options", options));
        }
        writer.encode(|buffer| frontend::startup_message(parameters, buffer))?;
        writer.flush().await
    }

    /// Checks `target_session_attrs`. Servers report both facts since 14.
    async fn check_target(
        &self,
        reader: &mut Reader,
        writer: &mut Writer,
        reported: &BTreeMap<String, String>,
    ) -> Result<()> {
        if self.target == TargetSession::Any {
            return Ok(());
        }
        let mut is_on = async |name: &str| -> Result<bool> {
            if let Some(value) = reported.get(name) {
                return Ok(value == "on");
            }
            let shown = rows(reader, writer, &format!("SHOW {name}")).await?;
            Ok(shown.first().and_then(|row| text(row, 0)).as_deref() == Some("on"))
        };
        let default_read_only = is_on("default_transaction_read_only").await?;
        let standby = match reported.get("in_hot_standby") {
            Some(value) => value == "on",
            // On 13, a session that is read-only although `default_transaction_read_only` is off
            // runs on a standby.
            None => is_on("transaction_read_only").await? && !default_read_only,
        };
        let read_only = standby || default_read_only;
        let (fits, wanted) = match self.target {
            TargetSession::Any | TargetSession::PreferStandby => (true, ""),
            TargetSession::ReadWrite => (!read_only, "read-write"),
            TargetSession::ReadOnly => (read_only, "read-only"),
            TargetSession::Primary => (!standby, "primary"),
            TargetSession::Standby => (standby, "standby"),
        };
        if fits {
            return Ok(());
        }
        Err(Error::OtherSession {
            place: self.host.to_string(),
            found: match (standby, read_only) {
                (true, _) => "a standby",
                (false, true) => "a primary that is read-only by default",
                (false, false) => "a primary",
            },
            wanted,
        })
    }
}

/// Collects the parameters that the server reports until it is ready.
async fn parameters(reader: &mut Reader) -> Result<BTreeMap<String, String>> {
    let mut parameters = BTreeMap::new();
    loop {
        let message = reader.next().await?;
        match message.tag {
            b'S' => {
                let mut texts = message.body.split(|byte| *byte == 0);
                let mut text =
                    || String::from_utf8_lossy(texts.next().unwrap_or_default()).into_owned();
                parameters.insert(text(), text());
            }
            b'E' => return Err(reader.refusal(&message.body)),
            b'Z' => return Ok(parameters),
            b'K' | b'N' => {}
            other => {
                let what = format!("'{}' after authentication", other.escape_ascii());
                return Err(reader.unexpected(what));
            }
        }
    }
}

fn timed_out(limit: Duration) -> io::Error {
    let text = format!("no answer within {} s (connect_timeout)", limit.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// Implements `load_balance_hosts=random`.
fn shuffle<T>(items: &mut [T]) {
    let chance = RandomState::new();
    for at in (1..items.len()).rev() {
        let other = usize::try_from(chance.hash_one(at) % (at as u64 + 1)).unwrap_or(at);
        items.swap(at, other);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A port that accepts connections and sends nothing.
    fn silent() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        (listener, port)
    }

    #[tokio::test]
    async fn the_sockets_options_are_those_of_the_connection_text() {
        let (_listener, port) = silent();
        let open = async |settings: &str| {
            let text = format!("hostaddr=127.0.0.1 port={port} {settings}");
            let info = ConnInfo::parse(&text).expect("it parses");
            let stream = TcpStream::connect(("127.0.0.1", port))
                .await
                .expect("it connects");
            tune(&stream, &info.tcp).expect("it is tuned");
            stream
        };
        let tuned = open(
            "keepalives_idle=77 keepalives_interval=7 keepalives_count=3 tcp_user_timeout=12345",
        )
        .await;
        assert!(sockopt::socket_keepalive(&tuned).expect("a flag"));
        assert_eq!(
            sockopt::tcp_keepidle(&tuned).expect("an option"),
            Duration::from_secs(77)
        );
        assert_eq!(
            sockopt::tcp_keepintvl(&tuned).expect("an option"),
            Duration::from_secs(7)
        );
        assert_eq!(sockopt::tcp_keepcnt(&tuned).expect("an option"), 3);
        assert_eq!(
            sockopt::tcp_user_timeout(&tuned).expect("an option"),
            12_345
        );
        let without = open("keepalives=0 keepalives_idle=77").await;
        assert!(!sockopt::socket_keepalive(&without).expect("a flag"));
        assert_ne!(
            sockopt::tcp_keepidle(&without).expect("an option"),
            Duration::from_secs(77)
        );
    }

    #[tokio::test]
    async fn a_host_that_says_nothing_is_left_after_connect_timeout() {
        let (_first, first) = silent();
        let (_second, second) = silent();
        let text = format!(
            "hostaddr=127.0.0.1,127.0.0.1 port={first},{second} user=x connect_timeout=1 sslmode=disable"
        );
        let info = ConnInfo::parse(&text).expect("it parses");
        let refused = connect(&info, ConnectionMode::Physical)
            .await
            .expect_err("nobody speaks");
        let text = refused.to_string();
        for port in [first, second] {
            assert!(
                text.contains(&format!("127.0.0.1:{port}: no answer within 1 s")),
                "{text}"
            );
        }
        assert!(matches!(refused, Error::Hosts { .. }) && refused.is_unreachable());
    }
}
