//! HTTPS: certificate and key from two PEM files, taken up again when either changes. A file that can not be used leaves
//! the old pair in place and says so: a mistake at midnight must not take the dashboard away.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::TlsAcceptor;
use wal_format::PgTimestamp;
use x509_cert::{Certificate, der::Decode};

/// The pair in use.
#[derive(Debug)]
pub(super) struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    used: Mutex<Used>,
}

struct Used {
    config: Arc<ServerConfig>,
    expiry: Option<PgTimestamp>,
    stamps: [Option<SystemTime>; 2],
}

impl std::fmt::Debug for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Used")
            .field("expiry", &self.expiry)
            .finish_non_exhaustive()
    }
}

impl TlsFiles {
    pub(super) fn open(certificate: &Path, key: &Path) -> Result<Self, String> {
        Ok(Self {
            used: Mutex::new(load(certificate, key)?),
            certificate: certificate.to_owned(),
            key: key.to_owned(),
        })
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(Arc::clone(&used.config))
    }

    /// Takes up what changed; when the certificate in use ends.
    pub(super) fn refresh(&self) -> Option<PgTimestamp> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = [stamp(&self.certificate), stamp(&self.key)];
        if stamps != used.stamps {
            match load(&self.certificate, &self.key) {
                Ok(new) => {
                    tracing::info!("the certificate of the dashboard was read again");
                    *used = new;
                }
                Err(error) => {
                    tracing::error!(
                        error,
                        "the new certificate can not be used; the old one stays"
                    );
                    used.stamps = stamps;
                }
            }
        }
        used.expiry
    }
}

fn stamp(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn load(certificate: &Path, key: &Path) -> Result<Used, String> {
    let bad = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let stamps = [stamp(certificate), stamp(key)];
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(certificate, &error))?;
    let expiry = chain
        .first()
        .and_then(|first| Certificate::from_der(first).ok())
        .and_then(|first| {
            let end = first
                .tbs_certificate()
                .validity()
                .not_after
                .to_unix_duration();
            i64::try_from(end.as_secs()).ok()
        })
        .map(PgTimestamp::from_unix_seconds);
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
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Used {
        config: Arc::new(config),
        expiry,
        stamps,
    })
}
