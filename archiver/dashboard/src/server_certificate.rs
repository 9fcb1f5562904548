//! A TLS server's certificate chain and key from two PEM files: of the dashboard and of the
//! walsender.

use std::{fmt, path::Path, sync::Arc};

use repository::config::require_private;
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use wal_format::PgTimestamp;
use x509_cert::{Certificate, der::Decode};

/// The certificate chain and key of a TLS server.
pub struct ServerCertificate {
    /// For the acceptor.
    pub config: Arc<ServerConfig>,
    /// When the certificate ends.
    pub expiry: Option<PgTimestamp>,
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate")
            .field("expiry", &self.expiry)
            .finish_non_exhaustive()
    }
}

/// Reads both files. `protocol` is the only one that is spoken behind them (ALPN).
///
/// # Errors
/// Which file, and why it cannot be used.
pub fn load(certificate: &Path, key: &Path, protocol: &[u8]) -> Result<ServerCertificate, String> {
    let bad = |path: &Path, error: &dyn fmt::Display| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(certificate, &error))?;
    let expiry = chain.first().and_then(expiry);
    require_private(key).map_err(|problem| bad(key, &problem))?;
    // The parser's own words could quote the key.
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|_| bad(key, &"no private key in PEM can be read from it"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| bad(certificate, &error))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(ServerCertificate {
        config: Arc::new(config),
        expiry,
    })
}

fn expiry(certificate: &CertificateDer<'_>) -> Option<PgTimestamp> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let end = certificate.tbs_certificate().validity().not_after;
    let seconds = i64::try_from(end.to_unix_duration().as_secs()).ok()?;
    Some(PgTimestamp::from_unix_seconds(seconds))
}
