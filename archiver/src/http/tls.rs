//! HTTPS: certificate and key from two PEM files, taken up again when either changes. A file that
//! cannot be used leaves the old pair in place and says so: a mistake at midnight must not take the
//! dashboard away.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use tokio_rustls::TlsAcceptor;
use wal_format::PgTimestamp;

use crate::server_certificate::{self, ServerCertificate};

/// The pair in use.
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
        used.certificate.expiry
    }
}

fn stamp(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn load(certificate: &Path, key: &Path) -> Result<Used, String> {
    // Before the files are read: what changes after this is seen by the next look.
    let stamps = [stamp(certificate), stamp(key)];
    Ok(Used {
        certificate: server_certificate::load(certificate, key, b"http/1.1")?,
        stamps,
    })
}
