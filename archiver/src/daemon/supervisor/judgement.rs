//! Decides the consequence of an error for a cluster: the program ends, or the connection is
//! retried for a stated reason.
//!
//! Invariant: the program ends only for an error that no retry can repair, or for one that a person
//! has to remove at a first start.

use repository::ExitKind;
use status::cluster_status::ClusterStatus;

use super::state::Supervisor;
use crate::{
    daemon::descriptors,
    error::{Error, Result, may_pass},
};

/// The number of times that a damaged record is requested. Damage during the transfer does not
/// repeat; damage on the server's disk does.
const DECODE_ATTEMPTS_MAX: u32 = 3;

impl Supervisor {
    /// Decides about an error during a shutdown. Returns fatal errors and I/O errors, and logs
    /// others.
    pub(super) fn give_up_or_warn(&self, error: Error) -> Result<()> {
        if self.is_fatal(&error) || matches!(error, Error::Io { .. }) {
            return Err(error);
        }
        tracing::warn!(cluster = %self.settings.name, %error, "stopped while not streaming");
        Ok(())
    }

    /// Decides about an error. Returns the reason for a reconnect, or the error itself if no retry
    /// can repair it.
    pub(super) fn judge(&mut self, error: Error) -> Result<&'static str> {
        if matches!(error, Error::Wal(intake::Error::Decode { .. })) {
            self.damaged += 1;
        }
        if error.is_out_of_resources() {
            note_shortage(&self.status, &error);
            return Ok("resources");
        }
        if self.is_fatal(&error) {
            return Err(error);
        }
        if error.is_catalog_failure() {
            tracing::warn!(event = "catalog_failed", cluster = %self.settings.name, %error, "the catalog on disk is not used any more");
            return Ok("catalog");
        }
        let broken =
            (error.is_broken() || matches!(error, Error::Io { .. })).then(|| error.to_string());
        let message = error.to_string();
        let facts = self.status.facts();
        let mut known = facts.stream_error.as_ref() == Some(&message);
        if matches!(error, Error::Gap { .. }) {
            // Each attempt to close a gap streams for a moment, which clears `stream_error`.
            let reported = self.reported_gap.replace(message.clone());
            known |= reported.as_ref() == Some(&message);
        }
        match (&broken, known) {
            (_, true) => {}
            (Some(_), false) => {
                tracing::error!(cluster = %self.settings.name, state = "broken", %error, "archiving is interrupted");
            }
            (None, false) => {
                tracing::warn!(cluster = %self.settings.name, %error, "not streaming; retrying");
            }
        }
        let is_of_repository = matches!(&error, Error::Repository(error) if error.is_answer());
        self.status.note(|facts| {
            // The same text in both errors means that the primary was not queried.
            if is_of_repository {
                facts.repository_error = Some(message.clone());
            } else if facts.repository_error == facts.stream_error {
                facts.repository_error = None;
            }
            facts.stream_error = Some(message);
            facts.broken = broken;
        });
        Ok(match error {
            Error::Wal(intake::Error::Decode { .. }) => "damaged_record",
            Error::Io { .. } => "disk",
            Error::Gap { .. } => "gap",
            Error::Replication(error) if error.is_slot_in_use() => "slot_in_use",
            Error::Replication(_) => "connection",
            Error::Repository(_) | Error::Wal(intake::Error::Sealed { .. }) => "repository",
            Error::Silent { .. } => "silent",
            Error::SpoolFull => "spool_full",
            _ => "other",
        })
    }

    fn is_fatal(&self, error: &Error) -> bool {
        // Without a free descriptor, a key, a certificate or a password file cannot be opened. The
        // error then looks like a wrong setting.
        if error.is_out_of_resources()
            || (error.exit_kind() == ExitKind::Usage && descriptors::are_short())
        {
            return false;
        }
        match error {
            Error::Wal(intake::Error::Decode { .. }) => self.damaged >= DECODE_ATTEMPTS_MAX,
            Error::Gap { .. }
            | Error::History { .. }
            | Error::LostHistory { .. }
            | Error::ServerBehind { .. }
            | Error::Silent { .. }
            | Error::SpoolFull
            | Error::StreamOutOfOrder { .. }
            | Error::Wal(intake::Error::Sealed { .. }) => false,
            // Uploading WAL to the repository frees space.
            Error::Io { .. } if error.is_disk_full() => false,
            // At the start an error that only a person can remove ends the program at once, with
            // its exit code. A later one may be repaired while the program runs.
            Error::Io { source, .. } => !self.connected_once && !may_pass(source),
            Error::Repository(error) if error.is_spool_full() => false,
            // A store's error does not predict the next attempt, and archiving works without the
            // catalog on disk.
            Error::Repository(error) if error.is_answer() || error.is_catalog_failure() => false,
            // At the start, another cluster's repository, a wrong key or a catalog in use is a
            // mistake and is reported at once. Later the server was upgraded or replaced, or keys
            // are being changed, and a person decides.
            Error::Repository(_) => !self.connected_once,
            // At the start, a wrong password or a missing privilege is reported at once. Later it
            // may be a change in progress.
            Error::Replication(error) => {
                !self.connected_once && error.is_usage()
            }
            // WAL or a spool that contradicts the archive, a server that cannot be archived, a
            // thread that panicked.
            Error::SlotLost { .. }
            | Error::SpoolHole { .. }
            | Error::SpoolDenied { .. }
            | Error::SpoolLocked { .. }
            | Error::SpoolSystemMismatch { .. }
            | Error::ThreadStopped { .. }
            | Error::Unsupported(_)
            | Error::Usage { .. }
            | Error::Wal(_)
            // Errors of other commands.
            | Error::BaseBackup(_)
            | Error::Check { .. }
            | Error::Expire { .. }
            | Error::Http(_)
            | Error::Nagios { .. }
            | Error::NoDaemon { .. }
            | Error::NotDrained { .. }
            | Error::NotNotified { .. }
            | Error::StillPlain { .. }
            | Error::Remove { .. }
            | Error::Audit { .. }
            | Error::Switchover { .. }
            | Error::Verify { .. } => true,
        }
    }
}

/// Logs each new shortage of descriptors or threads once; the light shows it.
pub(super) fn note_shortage(status: &ClusterStatus, error: &Error) {
    let message = format!(
        "{error}; raise LimitNOFILE= of the service (the hard limit of `ulimit -n`) or TasksMax=. It is tried again, nothing \
         is lost meanwhile"
    );
    if status.facts().stream_error.as_ref() != Some(&message) {
        tracing::error!(event = "descriptors_short", cluster = %status.cluster(), "{message}");
    }
    status.note(|facts| facts.stream_error = Some(message));
}
