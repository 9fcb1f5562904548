//! Opens a cluster's spool at the start. Retries an error that may be temporary: a single disk
//! failure, a full disk, or a full table of open files.
//!
//! Invariant: an error that only a person can remove ends the cluster at once, with its exit code.

use repository::config::ClusterSettings;
use status::cluster_status::ClusterStatus;

use super::retry::{RETRY_MAX, RETRY_MIN};
use crate::jitter::jitter;
use crate::{
    blocking::blocking,
    core::shutdown::Shutdown,
    error::{Error, Result, may_pass},
    spool::Spool,
};

/// Opens the cluster's spool. Returns `None` if a stop was requested first.
///
/// # Errors
/// [`Error::SpoolLocked`]; [`Error::Io`] that only a person can remove.
pub(super) async fn open_spool(
    settings: &ClusterSettings,
    status: &ClusterStatus,
    shutdown: &mut Shutdown,
) -> Result<Option<Spool>> {
    let mut retry = RETRY_MIN;
    loop {
        let (spool, name) = (settings.spool.clone(), settings.name.clone());
        let error = match blocking(move || Spool::open(&spool, &name)).await {
            Err(Error::Io {
                action,
                path,
                source,
            }) if may_pass(&source) => Error::io(action, path)(source),
            outcome => return outcome.map(Some),
        };
        tracing::error!(cluster = %settings.name, %error, "the spool cannot be opened; retrying");
        status.note(|facts| facts.broken = Some(error.to_string()));
        if !shutdown.sleep(jitter(retry)).await {
            return Ok(None);
        }
        retry = (retry * 2).min(RETRY_MAX);
    }
}
