//! HTTPS: certificate and key from two PEM files, which are read again when either changes. If the
//! new files are not usable, the old pair stays in use and an error is logged, so that a mistake
//! does not stop the dashboard.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use tokio_rustls::TlsAcceptor;
use wal_format::PgTimestamp;

use crate::server_certificate::{self, ServerCertificate};

/// The certificate and key in use.
#[derive(Debug)]
pub(super) struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    used: Mutex<Used>,
}

struct Used {
    certificate: ServerCertificate,
    stamps: [Option<SystemTime>; 2],
}

impl std::fmt::Debug for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Used")
            .field("expiry", &self.certificate.expiry)
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
        TlsAcceptor::from(Arc::clone(&used.certificate.config))
    }

    /// Reads changed files again. Returns the expiry time of the certificate in use.
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
                        "the new certificate cannot be used; the old one stays"
                    );
                    used.stamps = stamps;
                }
            }
        }
        used.certificate.expiry
    }
}

fn stamp(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn load(certificate: &Path, key: &Path) -> Result<Used, String> {
    // Taken before the files are read: the next check then sees a change that happens after this.
    let stamps = [stamp(certificate), stamp(key)];
    Ok(Used {
        certificate: server_certificate::load(certificate, key, b"http/1.1")?,
        stamps,
    })
}
