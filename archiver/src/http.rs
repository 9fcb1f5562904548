//! Serves what is known over HTTP: the page, the API, the metrics, the two health routes. Read only.
//!
//! Every answer is made from [`ClusterReport`]s that the daemon already holds: a request touches neither the store nor
//! PostgreSQL, so `/readyz` and `/metrics` keep answering when those are down, which is when they are needed.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{instruments::Instruments, report::ClusterReport};

mod health;
mod metrics;
mod page;

/// Where the answers come from.
#[derive(Clone)]
pub struct Sources {
    /// One call makes all reports, from memory.
    pub reports: Arc<dyn Fn() -> Vec<ClusterReport> + Send + Sync>,
    /// The process's measurements.
    pub instruments: Instruments,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// How many connections are served at once; the others wait in the listen queue. Each costs a few KiB.
const CONNECTIONS_MAX: usize = 512;
/// How long a client may take to send its request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

const JSON: &str = "application/json";
const PROBLEM: &str = "application/problem+json";
const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const CSP: &str = "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; \
                   form-action 'none'; frame-ancestors 'none'";

/// Why HTTP could not be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address can be reached from other hosts and nothing would keep strangers out.
    #[error(
        "refusing to serve HTTP on {address}: it can be reached from other hosts and this build has no access token; \
         bind 127.0.0.1 and put an authenticating proxy before it"
    )]
    Public {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The address could not be bound.
    #[error("serve HTTP on {address}: {source}; choose another with --http ADDR:PORT")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound server, so that a taken port is an error of the start and not of a background task.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
}

impl HttpServer {
    /// Binds `address`.
    ///
    /// # Errors
    /// [`HttpError::Public`] for an address that is not a loopback one, [`HttpError::Bind`] when the system refuses.
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        if !address.ip().is_loopback() {
            return Err(HttpError::Public { address });
        }
        let failed = |source| HttpError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// The address that was bound, with the port the system chose where 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the task is dropped.
    pub async fn serve(self, sources: Sources) -> Infallible {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
                unreachable!("BUG: the semaphore is never closed");
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: waiting lets connections end.
                    tracing::warn!(error = %error, "accept an HTTP connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let sources = sources.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let response = answer(&request, &sources);
                    async move { Ok::<_, Infallible>(response) }
                });
                let served = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(16 * 1024)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(error = %error, "serve an HTTP connection");
                }
                drop(permit);
            });
        }
    }
}

/// Routes a request. Unknown paths and clusters are 404, other methods 405, both as problem documents.
fn answer(request: &Request<Incoming>, sources: &Sources) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = problem(
            StatusCode::METHOD_NOT_ALLOWED,
            "only GET and HEAD are served",
        );
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    route(
        request.uri().path(),
        request.uri().query().unwrap_or_default(),
        sources,
    )
}

fn route(path: &str, query: &str, sources: &Sources) -> Response<Full<Bytes>> {
    let reports = || (sources.reports)();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match *parts.as_slice() {
        [""] => respond(StatusCode::OK, HTML, page::render(&reports())),
        ["style.css"] => respond(
            StatusCode::OK,
            "text/css; charset=utf-8",
            page::STYLE.to_owned(),
        ),
        // Both say that this process lives and serves; neither looks at the store or at PostgreSQL, so that an
        // orchestrator does not take the archiver away exactly when it is needed.
        ["healthz"] => respond(StatusCode::OK, TEXT, "alive\n".to_owned()),
        ["readyz"] => respond(StatusCode::OK, TEXT, "ready to stream\n".to_owned()),
        ["metrics"] => respond(
            StatusCode::OK,
            metrics::CONTENT_TYPE,
            metrics::render(&reports(), &sources.instruments),
        ),
        ["api", "v1", "clusters"] => json(StatusCode::OK, &reports()),
        ["api", "v1", "clusters", name, ref rest @ ..] => {
            let Some(report) = reports()
                .into_iter()
                .find(|report| report.cluster.as_str() == name)
            else {
                return problem(
                    StatusCode::NOT_FOUND,
                    "no such cluster; see /api/v1/clusters",
                );
            };
            match *rest {
                [] => json(StatusCode::OK, &report),
                ["window"] => json(StatusCode::OK, &report.window),
                ["health"] => match health::judge(&report, query) {
                    Ok(verdict) => json(verdict.status(), &verdict),
                    Err(error) => problem(StatusCode::BAD_REQUEST, &error.to_string()),
                },
                _ => problem(StatusCode::NOT_FOUND, "no such route below a cluster"),
            }
        }
        _ => problem(StatusCode::NOT_FOUND, "no such route"),
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(CSP));
    headers.insert(
        "x-content-type-options",
        HeaderValue::from_static("nosniff"),
    );
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    response
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Full<Bytes>> {
    match serde_json::to_string(value) {
        Ok(body) => respond(status, JSON, body),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// An RFC 9457 problem document.
fn problem(status: StatusCode, detail: &str) -> Response<Full<Bytes>> {
    let title = status.canonical_reason().unwrap_or("error");
    let body = serde_json::json!({
        "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail,
    });
    respond(status, PROBLEM, body.to_string())
}

#[cfg(test)]
mod tests;
