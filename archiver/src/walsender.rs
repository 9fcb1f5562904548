//! The walsender: a stock PostgreSQL standby, or `pg_receivewal`, streams WAL from the archive by `primary_conninfo`.
//!
//! In reading order: `wire` reads and writes messages, `scram` proves who asks, `startup` brings a connection up,
//! `command` is the grammar, `session` answers commands, `stream` sends WAL, `source` finds it: sealed segments,
//! tails, the spool.
//! Invariant: nothing is sent that is not durable here, and nothing that the primary had not flushed; a stranger gets no
//! byte of WAL.

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

/// Connections at once, as `max_wal_senders` bounds a server's.
const CONNECTIONS_MAX: usize = 32;
/// How often an address that is in use is asked for again: two seconds in all.
const BIND_ATTEMPTS_MAX: u32 = 10;
/// Pause after a failed accept: descriptors come back when connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// What every connection of one cluster shares.
struct Shared {
    settings: WalsenderSettings,
    cluster: String,
    status: Arc<ClusterStatus>,
    verifier: Option<scram::Verifier>,
    tls: Option<TlsAcceptor>,
    connections: AtomicUsize,
}

/// Listens until it is dropped; connections end with it.
#[derive(Debug)]
pub struct Walsender {
    listening: JoinHandle<()>,
}

impl Drop for Walsender {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Listens for a cluster, if its settings say so.
///
/// # Errors
/// [`Error::Io`] when the address can not be had, [`Error::Usage`] when the certificate or the password can not be used.
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

/// A cluster whose settings changed starts anew where its predecessor has just listened.
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
    // Aborted with this task.
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

/// Counts a connection while it lives.
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
        // Who goes without a word has lost its connection or been stopped.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            tracing::debug!(cluster = shared.cluster, peer, "a connection ended");
        }
        Err(error) => {
            tracing::warn!(cluster = shared.cluster, peer, %error, "a standby's connection failed");
        }
    }
}
