//! [`Notify`]: messages to systemd, as `sd_notify(3)` sends them: one datagram with lines
//! `NAME=value`.
//!
//! Without `$NOTIFY_SOCKET` nothing is sent. A message that cannot be sent is logged and not tried
//! again: the next one says the same or more.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// The way to systemd, if it started us.
#[derive(Debug, Default)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// From the environment that systemd made: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`.
    #[must_use]
    pub fn from_environment() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            connect(name.as_bytes())
                .inspect_err(|error| tracing::warn!(%error, socket = ?name, "systemd cannot be told anything"))
                .ok()
        });
        let ours =
            env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let micros = env::var("WATCHDOG_USEC")
            .ok()
            .and_then(|text| text.parse().ok());
        Self {
            watchdog: micros
                .filter(|micros| ours && *micros > 0 && socket.is_some())
                .map(Duration::from_micros),
            socket,
        }
    }

    /// The time for which systemd waits for a `WATCHDOG=1`.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// All configured clusters are being taken care of.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// The configuration is read again. `Type=notify-reload` compares the time with its own
    /// request.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = now
            .tv_sec
            .saturating_mul(1_000_000)
            .saturating_add(now.tv_nsec / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// A line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.send(&format!("STATUS={}", line.replace('\n', " ")));
    }

    /// We live.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::debug!(%error, message, "systemd was not told");
        }
    }
}

/// A name that begins with `@` is in the abstract name space.
fn connect(name: &[u8]) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    // systemd that does not read must not hold us up.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}
