//! Records each timeline to which the archive follows the server, for the audit trail.
//!
//! The record is stored before the history file of the timeline. After a crash between the two, the
//! timeline is new again, and the record is found.

use status::outcomes::ended;
use wal_format::{Branch, OutcomeKind, TimelineHistory};

use super::archive::Archive;
use crate::error::{Error, Result};

impl Archive {
    /// Records the failover to `branch`, whose history file is `history`. A repository that cannot
    /// be reached is an error, because the caller tries again. Any other problem is logged: WAL is
    /// archived without the record.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub(super) fn record_failover(&self, branch: Branch, history: &[u8]) -> Result<()> {
        match self.put_failover(branch, history) {
            Err(Error::Repository(error)) if error.is_transient() => Err(error.into()),
            Err(error) => {
                tracing::warn!(
                    event = "action_not_recorded", kind = %OutcomeKind::Failover, %branch, %error,
                    "the failover could not be recorded in the repository"
                );
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn put_failover(&self, branch: Branch, history: &[u8]) -> Result<()> {
        let (trail, system) = (
            self.repository()
                .audit_trail(None, Some(OutcomeKind::Failover))?,
            self.identity().system_identifier,
        );
        let is_known = |(of, record): &(_, wal_format::Outcome)| {
            *of == system && record.branch == Some(branch)
        };
        if trail.records.iter().any(is_known) {
            return Ok(());
        }
        let parent = TimelineHistory::parse(branch.timeline, history)
            .ok()
            .and_then(|history| history.parent());
        let mut message = format!("the server continues on timeline {}", branch.timeline);
        if let Some(parent) = parent {
            message += &format!(", which left timeline {} at {}", parent.timeline, parent.to);
        }
        let now = jiff::Timestamp::now();
        if let Some(mut record) = ended(OutcomeKind::Failover, now, true, &message) {
            record.branch = Some(branch);
            self.repository().put_outcome(system, &record)?;
        }
        Ok(())
    }
}
