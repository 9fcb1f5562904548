//! Serves the page, the API, the metrics, the live stream and the health routes over HTTP.
//!
//! Every answer is made from the daemon's memory and the catalog on this host. A read request
//! reaches neither the store nor PostgreSQL, so `/readyz` and `/metrics` keep answering while those
//! are down. Unauthorized clients, slow clients and idle connections are limited here, separate
//! from the stages.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use repository::config::HttpAccess;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use self::{
    connections::{Busy, Connections},
    error::HttpError,
    sources::Sources,
    tls::TlsFiles,
};

mod access;
mod answer;
mod api;
mod connections;
pub mod error;
mod health;
mod live;
mod metrics;
mod page;
mod routes;
pub mod sources;
mod tls;

/// The time for which a client may take to send the head of its request, or to finish the TLS
/// handshake.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum lifetime of a connection. It also limits a client that does not read its answer.
const CONNECTION_MAX: Duration = Duration::from_secs(600);
/// The interval at which the certificate's files are checked for changes.
const CERTIFICATE_POLL: Duration = Duration::from_secs(2);
/// The pause after a connection that could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The maximum size of a request's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// A bound server. Binding is separate, so that a port in use is an error at the start and not one
/// of a background task.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<TlsFiles>>,
}

/// Checks the settings without binding the address.
///
/// # Errors
/// As [`HttpServer::bind`], except [`HttpError::Bind`].
pub fn check(address: SocketAddr, access: &HttpAccess) -> Result<(), HttpError> {
    checked(address, access).map(drop)
}

/// Checks the settings. Returns the certificate and its key, if there are any.
fn checked(address: SocketAddr, access: &HttpAccess) -> Result<Option<Arc<TlsFiles>>, HttpError> {
    if !address.ip().is_loopback() && !access.is_guarded() {
        return Err(HttpError::Public { address });
    }
    let Some((certificate, key)) = &access.tls else {
        return Ok(None);
    };
    let files = TlsFiles::open(certificate, key);
    files
        .map(|files| Some(Arc::new(files)))
        .map_err(|problem| HttpError::Tls { problem })
}

impl HttpServer {
    /// Binds `address`.
    ///
    /// # Errors
    /// [`HttpError::Public`] for an address that is not a loopback address, without a token;
    /// [`HttpError::Tls`] for files that are not usable; [`HttpError::Bind`] if the system refuses.
    pub async fn bind(address: SocketAddr, access: &HttpAccess) -> Result<Self, HttpError> {
        let tls = checked(address, access)?;
        if !address.ip().is_loopback() && tls.is_none() {
            tracing::warn!(%address, "tokens travel in clear: set http_tls_certificate and http_tls_key, or put a proxy before it");
        }
        let failed = |source| HttpError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self {
            listener,
            address,
            tls,
        })
    }

    /// The bound address. If port 0 was requested, it contains the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the task is dropped.
    pub async fn serve(self, sources: Sources) -> Infallible {
        let connections = Arc::new(Connections::default());
        if let Some(tls) = self.tls.clone() {
            let monitor = Arc::clone(&sources.monitor);
            tokio::spawn(async move {
                loop {
                    monitor.certificate_ends(tls.refresh());
                    tokio::time::sleep(CERTIFICATE_POLL).await;
                }
            });
        }
        let mut failing = false;
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Probably no file descriptor is free. Connections that end free some.
                    if !failing {
                        tracing::warn!(
                            %error,
                            "no HTTP connection can be accepted; trying again ten times a second"
                        );
                    }
                    failing = true;
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            failing = false;
            if !connections.make_room() {
                continue;
            }
            let (busy, number) = (Busy::default(), connections.number());
            let task = tokio::spawn({
                let (sources, busy) = (sources.clone(), busy.clone());
                let (tls, connections) = (self.tls.clone(), Arc::clone(&connections));
                async move {
                    let served = serve_one(stream, tls, sources, busy);
                    drop(timeout(CONNECTION_MAX, served).await);
                    connections.closed(number);
                }
            });
            connections.opened(number, busy, task.abort_handle());
        }
    }
}

/// Returns the expiry time of the certificate in these files.
///
/// # Errors
/// The reason why they are not usable, as text.
pub fn tls_expiry(
    certificate: &std::path::Path,
    key: &std::path::Path,
) -> Result<Option<wal_format::PgTimestamp>, String> {
    TlsFiles::open(certificate, key).map(|files| files.refresh())
}

async fn serve_one(stream: TcpStream, tls: Option<Arc<TlsFiles>>, sources: Sources, busy: Busy) {
    let Some(tls) = tls else {
        return serve_stream(stream, sources, busy).await;
    };
    match timeout(HEADER_TIMEOUT, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => serve_stream(stream, sources, busy).await,
        Ok(Err(error)) => tracing::debug!(error = %error, "begin TLS with a browser"),
        Err(_) => {}
    }
}

async fn serve_stream<S>(stream: S, sources: Sources, busy: Busy)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (sources, busy) = (sources.clone(), busy.clone());
        async move { Ok::<_, Infallible>(routes::answer(request, &sources, &busy).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(error = %error, "serve an HTTP connection");
    }
}

#[cfg(test)]
mod tests;
