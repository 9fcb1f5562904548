//! Waits until somebody archives the server's WAL, before a base backup copies anything.

use std::time::{Duration, Instant};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use repository::{ClusterIdentity, Repository, config::ClusterSettings};
use wal_format::{Branch, Lsn};

use super::{BaseBackupError, Progress, wait::is_stored};
use crate::{blocking::blocking, core::shutdown::Shutdown, error::Result, spool};

const POLL: Duration = Duration::from_millis(300);
/// The time in which an archiver that was just started connects, or stores what the server has.
const PATIENCE: Duration = Duration::from_secs(8);

/// The evidence that the WAL of a server is archived.
pub(super) struct Watch<'a> {
    pub(super) settings: &'a ClusterSettings,
    pub(super) conninfo: &'a ConnInfo,
    pub(super) repository: &'a Repository,
    pub(super) identity: &'a ClusterIdentity,
    pub(super) branch: Branch,
    /// The end of the server's WAL when the backup was requested.
    pub(super) flush_lsn: Lsn,
}

impl Watch<'_> {
    /// Waits until the WAL is archived, or until it is not known whether it is: the wait for the
    /// backup's WAL then decides.
    ///
    /// # Errors
    /// [`BaseBackupError::NotArchived`] if nobody archives it after [`PATIENCE`];
    /// [`BaseBackupError::Interrupted`].
    pub(super) async fn wait(
        &self,
        progress: &(dyn Fn(Progress) + Sync),
        mut stop: Shutdown,
    ) -> Result<()> {
        let began = Instant::now();
        let mut is_reported = false;
        while !self.may_be_archived().await? {
            if began.elapsed() > PATIENCE {
                return Err(BaseBackupError::NotArchived {
                    slot: self.settings.slot.clone(),
                    lsn: self.flush_lsn,
                    seconds: PATIENCE.as_secs(),
                }
                .into());
            }
            if !is_reported {
                is_reported = true;
                progress(Progress::WaitingForArchiver);
            }
            if !stop.sleep(POLL).await {
                return Err(BaseBackupError::Interrupted.into());
            }
        }
        Ok(())
    }

    /// Returns false only if the server and the repository show that nobody archives the WAL.
    async fn may_be_archived(&self) -> Result<bool> {
        let directory = self.settings.spool.join(self.settings.name.as_str());
        if spool::is_locked(&directory) || self.is_in_use().await.unwrap_or(true) {
            return Ok(true);
        }
        let (repository, identity) = (self.repository.clone(), self.identity.clone());
        let (branch, end) = (self.branch, self.flush_lsn);
        let start = Lsn(end.0.saturating_sub(1));
        blocking(move || is_stored(&repository, &identity, branch, start, end)).await
    }

    /// Returns whether the slot is in use or the server runs an `archive_command`. A standby says
    /// nothing about the archiver of its primary.
    ///
    /// # Errors
    /// Those of the connection: a role that may only replicate cannot ask.
    async fn is_in_use(&self) -> replication::Result<bool> {
        let slot = self.settings.slot.replace('\'', "''");
        let sql = format!(
            "SELECT (pg_catalog.pg_is_in_recovery() OR pg_catalog.current_setting('archive_mode') <> 'off' OR EXISTS \
             (SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = '{slot}' AND active))::text"
        );
        let mut client = ReplicationClient::connect(self.conninfo, ConnectionMode::Sql).await?;
        let rows = client.query(&sql).await?;
        client.close().await;
        let answer = rows.first().and_then(|row| row.first()).cloned().flatten();
        Ok(answer.as_deref() != Some("false"))
    }
}
