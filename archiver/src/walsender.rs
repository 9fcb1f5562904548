//! The walsender: a stock PostgreSQL standby, or `pg_receivewal`, streams WAL from the archive with
//! `primary_conninfo`.
//!
//! In reading order: `wire` reads and writes messages, `scram` authenticates the client, `startup`
//! sets a connection up, `command` parses commands, `session` answers them, `stream` sends WAL, and
//! `source` finds it in sealed segments, tails or the spool.
//! Invariant: WAL that is not durable here, or that the primary had not flushed, is never sent. An
//! unauthenticated client receives no WAL.

mod command;
mod scram;
mod session;
mod source;
mod startup;
mod stream;
mod tls;
mod wire;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use repository::config::{ClusterSettings, WalsenderSettings};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    cluster_status::ClusterStatus,
    error::{Error, Result},
};

/// The maximum number of concurrent connections, like a server's `max_wal_senders`.
const CONNECTIONS_MAX: usize = 32;
/// The number of attempts to bind an address that is in use: two seconds in total.
const BIND_ATTEMPTS_MAX: u32 = 10;
/// The pause after a failed accept. File descriptors become available when connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// State shared by all connections of one cluster.
struct Shared {
    settings: WalsenderSettings,
    cluster: String,
    status: Arc<ClusterStatus>,
    verifier: Option<scram::Verifier>,
    tls: Option<TlsAcceptor>,
    connections: AtomicUsize,
}

/// A listener. Dropping it closes the listener and its connections.
#[derive(Debug)]
pub struct Walsender {
    listening: JoinHandle<()>,
}

impl Drop for Walsender {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Starts a listener for a cluster if its settings ask for one.
///
/// # Errors
/// [`Error::Io`] when the address cannot be bound, [`Error::Usage`] when the certificate or the
/// password cannot be used.
pub async fn start(
    settings: &ClusterSettings,
    status: Arc<ClusterStatus>,
) -> Result<Option<Walsender>> {
    let Some(walsender) = settings.walsender.clone() else {
        return Ok(None);
    };
    let tls = walsender.tls.as_ref();
    let tls = tls.map(|(certificate, key)| tls::acceptor(certificate, key));
    let tls = tls.transpose().map_err(|message| Error::Usage {
        message: format!("walsender_tls_certificate: {message}"),
    })?;
    let verifier = walsender.password.as_ref();
    let verifier = verifier.map(|password| scram::Verifier::of(password.reveal()));
    let address = walsender.address;
    let listener = bind(address)
        .await
        .map_err(Error::io("listen on", address.to_string()))?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(cluster = %settings.name, %address, "standbys may stream from the archive");
    }
    let shared = Arc::new(Shared {
        cluster: settings.name.to_string(),
        settings: walsender,
        status,
        verifier: verifier.transpose()?,
        tls,
        connections: AtomicUsize::new(0),
    });
    Ok(Some(Walsender {
        listening: tokio::spawn(listen(listener, shared)),
    }))
}

/// Binds the address, with retries: a restarted cluster may bind before its predecessor has closed
/// the listener.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    for _ in 1..BIND_ATTEMPTS_MAX {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
            outcome => return outcome,
        }
    }
    TcpListener::bind(address).await
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    // Dropping the set aborts the connections together with this task.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((socket, _)) => {
                connections.spawn(serve(socket, Arc::clone(&shared)));
            }
            Err(error) => {
                tracing::warn!(%error, "a standby's connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Counts a connection for as long as it exists.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(socket: TcpStream, shared: Arc<Shared>) {
    let peer = socket.peer_addr().map_or_else(
        |_| "somebody".to_owned(),
        |address| address.ip().to_string(),
    );
    let before = shared.connections.fetch_add(1, Ordering::Relaxed);
    let _counted = Counted(&shared.connections);
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "small messages may wait for an acknowledgement");
    }
    let outcome = startup::serve(socket, &shared, before < CONNECTIONS_MAX, &peer).await;
    match outcome {
        Ok(()) => tracing::info!(cluster = shared.cluster, peer, "a standby has left"),
        // The client disconnected without a Terminate message: it lost its connection or was
        // stopped.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            tracing::debug!(cluster = shared.cluster, peer, "a connection ended");
        }
        Err(error) => {
            tracing::warn!(cluster = shared.cluster, peer, %error, "a standby's connection failed");
        }
    }
}
