//! The walsender: a stock PostgreSQL standby, or `pg_receivewal`, streams WAL from the archive with
//! `primary_conninfo`.
//!
//! In reading order: `wire` reads and writes messages, `scram` authenticates the client, `startup`
//! sets a connection up, `command` parses commands, `session` answers them, `stream` sends WAL, and
//! `source` finds it in sealed segments, tails or the spool.
//! Invariant: WAL that is not durable here, or that the primary had not flushed, is never sent. An
//! unauthenticated client receives no WAL.

mod command;
mod refusal;
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
use status::cluster_status::ClusterStatus;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    core::{live_cluster::LiveCluster, progress::Progress},
    error::{Error, Result},
    observe::current::CurrentArchive,
};

/// The maximum number of concurrent connections, like a server's `max_wal_senders`.
const CONNECTIONS_MAX: usize = 32;
/// The number of attempts to bind an address that is in use: two seconds in total.
const BIND_ATTEMPTS_MAX: u32 = 10;
/// The pause after these attempts. Archiving goes on meanwhile.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// The pause after a failed accept. File descriptors become available when connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// State shared by all connections of one cluster.
struct Shared {
    settings: WalsenderSettings,
    cluster: String,
    status: Arc<ClusterStatus>,
    progress: Arc<Progress>,
    archive: Arc<CurrentArchive>,
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

/// Starts a listener for a cluster if its settings ask for one. While the address cannot be bound,
/// the status says so and the listener tries it again: archiving does not depend on it.
///
/// # Errors
/// [`Error::Io`] when no file descriptor is left, [`Error::Usage`] when the certificate or the
/// password cannot be used.
pub async fn start(
    settings: &ClusterSettings,
    LiveCluster { status, progress }: LiveCluster,
    archive: Arc<CurrentArchive>,
) -> Result<Option<Walsender>> {
    status.note(|facts| facts.walsender_problem = None);
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
    // One attempt: archiving starts after it.
    let address = walsender.address;
    let bound = TcpListener::bind(address).await;
    let bound = bound.map_err(Error::io("listen on", address.to_string()));
    if let Err(error) = &bound
        && error.is_out_of_resources()
    {
        return bound.map(|_| None);
    }
    let shared = Arc::new(Shared {
        cluster: settings.name.to_string(),
        settings: walsender,
        status,
        progress,
        archive,
        verifier: verifier.transpose()?,
        tls,
        connections: AtomicUsize::new(0),
    });
    Ok(Some(Walsender {
        listening: tokio::spawn(async move {
            let bound = match bound {
                Ok(listener) => Ok(listener),
                Err(_) => bind(address).await,
            };
            let listener = match bound {
                Ok(listener) => listener,
                Err(error) => bind_later(&shared, &error).await,
            };
            if let Ok(address) = listener.local_addr() {
                let cluster = &shared.cluster;
                tracing::info!(cluster, %address, "standbys may stream from the archive");
            }
            listen(listener, shared).await;
        }),
    }))
}

/// Binds the address, with retries: a restarted cluster may bind before its predecessor has closed
/// the listener.
async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let mut attempts = 1;
    loop {
        match TcpListener::bind(address).await {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && attempts < BIND_ATTEMPTS_MAX =>
            {
                attempts += 1;
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
            bound => return bound.map_err(Error::io("listen on", address.to_string())),
        }
    }
}

/// Reports that the address could not be bound, and tries it until it can be.
async fn bind_later(shared: &Shared, error: &Error) -> TcpListener {
    let problem = format!(
        "standbys cannot stream from the archive: {error}; choose another address for walsender, or stop the program that uses it"
    );
    tracing::error!(
        event = "standbys_unserved",
        cluster = shared.cluster,
        "{problem}. Archiving goes on, and the address is tried again"
    );
    shared
        .status
        .note(|facts| facts.walsender_problem = Some(problem));
    loop {
        tokio::time::sleep(BIND_RETRY).await;
        if let Ok(listener) = bind(shared.settings.address).await {
            shared.status.note(|facts| facts.walsender_problem = None);
            return listener;
        }
    }
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
