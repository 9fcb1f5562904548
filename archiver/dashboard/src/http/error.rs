//! [`HttpError`]: the reasons why HTTP cannot be served.

use std::{io, net::SocketAddr};

/// The reason why HTTP cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address can be reached from other hosts, and no token is required.
    #[error(
        "refusing to serve HTTP on {address}: it can be reached from other hosts and no access token is set; \
         set http_token_file (or TIDEMARK_HTTP_TOKEN), or bind 127.0.0.1"
    )]
    Public {
        /// The requested address.
        address: SocketAddr,
    },
    /// The address could not be bound.
    #[error("serve HTTP on {address}: {source}; choose another with --http ADDR:PORT")]
    Bind {
        /// The requested address.
        address: SocketAddr,
        /// The operating system's error.
        source: io::Error,
    },
    /// The certificate or its key is not usable.
    #[error("serve HTTPS: {problem}; mend http_tls_certificate and http_tls_key")]
    Tls {
        /// The file and its problem.
        problem: String,
    },
}
