//! TLS of the walsender: certificate chain and key from two PEM files, read when the cluster
//! starts.
//!
//! libpq 17 and later offer the protocol name `postgresql` (ALPN) and require it with direct TLS
//! negotiation.

use std::path::Path;

use tokio_rustls::TlsAcceptor;

use crate::server_certificate::load;

pub(super) fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, String> {
    Ok(TlsAcceptor::from(
        load(certificate, key, b"postgresql")?.config,
    ))
}
