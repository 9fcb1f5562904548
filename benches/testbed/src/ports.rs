//! Free ports of loopback for servers that tests start.
//!
//! Invariant: the ports lie below the range from which the system assigns ports to outgoing
//! connections (32768 and above). A port of that range that is free now may belong to a connection
//! when the server opens it.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    net::TcpListener,
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
};

use anyhow::{Result, bail};

const FIRST: u16 = 12_000;
const COUNT: u16 = 20_000;
/// The number of ports that one process tries before it gives up.
const TRIES: u16 = 2_000;

/// Returns a port on which nothing listens now. A process never returns one port twice, unless it
/// takes more than 20,000.
///
/// # Errors
/// When every tried port is in use.
pub fn free_port() -> Result<u16> {
    // Processes that run at the same time begin at different ports.
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| {
        let random = RandomState::new().hash_one(std::process::id());
        AtomicU16::new(u16::try_from(random % u64::from(COUNT)).unwrap_or_default())
    });
    for _ in 0..TRIES {
        let port = FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!(
        "none of {TRIES} ports between {FIRST} and {} is free",
        FIRST + COUNT
    )
}

/// Returns a loopback address with such a port.
///
/// # Errors
/// As [`free_port`].
pub fn free_address() -> Result<String> {
    Ok(format!("127.0.0.1:{}", free_port()?))
}
