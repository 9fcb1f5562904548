//! TLS of the walsender: certificate chain and key from two PEM files, read when the cluster
//! starts.
//!
//! libpq 17 and later offer the protocol name `postgresql` (ALPN) and require it with direct TLS
//! negotiation.

use std::path::Path;

use dashboard::server_certificate::load;
use tokio_rustls::TlsAcceptor;

pub(super) fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, String> {
    Ok(TlsAcceptor::from(
        load(certificate, key, b"postgresql")?.config,
    ))
}
