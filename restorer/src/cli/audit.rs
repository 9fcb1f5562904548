//! The record of a restore in the audit trail: an outcome object in the repository, or a file on
//! this host if the repository cannot be written.
//!
//! Invariant: a restore never fails because its record cannot be stored.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use repository::{actor, config::ClusterSettings, durable, outcome_mark, outcome_name};
use wal_format::{BackupId, Outcome, OutcomeKind, PgTimestamp, RestoreRecord};

use super::output;
use crate::{
    Error, RestorePlan, Result,
    inventory::{Archive, Inventory},
};

/// A restore that has ended.
pub(super) struct Ended<'a> {
    pub(super) began: Timestamp,
    /// The target in words.
    pub(super) target: String,
    pub(super) plan: &'a RestorePlan,
    pub(super) directory: &'a Path,
    /// True if PostgreSQL was to be started.
    pub(super) started: bool,
    /// The place where recovery stopped, in PostgreSQL's words, if it was started.
    pub(super) result: &'a Result<Option<String>>,
}

impl Ended<'_> {
    /// Records the restore. A restore that was refused before it changed anything leaves no record.
    pub(super) fn record(self, archive: &Archive, cluster: &ClusterSettings) {
        if matches!(self.result, Err(Error::Usage { .. })) {
            return;
        }
        let Some(outcome) = self.outcome() else {
            output::error("the restore is not recorded: the clock gives no year of four digits");
            return;
        };
        let system = archive.identity().system_identifier;
        match archive.repository.put_outcome(system, &outcome) {
            Ok(id) => tell_the_daemon(cluster, &id),
            Err(error) => self.record_here(cluster, &outcome, &error.to_string()),
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        let (message, exit_code) = match self.result {
            Ok(_) => (
                format!(
                    "restored to {} in {}",
                    self.target,
                    self.directory.display()
                ),
                0,
            ),
            Err(error) => (error.to_string(), error.exit_kind().code()),
        };
        let stopped = self.result.as_ref().ok().cloned().flatten();
        let mut outcome = Outcome::new(
            OutcomeKind::Restore,
            outcome_name(self.began)?,
            PgTimestamp::from_jiff(self.began),
            PgTimestamp::from_jiff(Timestamp::now()),
            self.result.is_ok(),
            message,
        );
        outcome.actor = Some(actor("pitr-restore"));
        outcome.backup = Some(self.plan.backup.clone());
        outcome.restore = Some(Box::new(RestoreRecord {
            target: self.target.clone(),
            directory: self.directory.display().to_string(),
            stop: stopped.unwrap_or_else(|| format!("planned: {}", self.plan.stop)),
            started: self.started,
            exit_code,
        }));
        Some(outcome)
    }

    /// Writes the record next to the target, or else into the directory of the spool.
    fn record_here(&self, cluster: &ClusterSettings, outcome: &Outcome, reason: &str) {
        let spool = cluster.spool.join(cluster.name.as_str());
        let spool = spool.is_dir().then_some(spool);
        let json = serde_json::to_vec_pretty(outcome).unwrap_or_default();
        let mut problem = None;
        for path in places(self.directory, spool.as_deref(), &outcome.id) {
            match durable::replace(&path, &json) {
                Ok(()) => {
                    output::error(&format!(
                        "the record of this restore could not be stored in the repository ({reason}); it is in {}",
                        path.display()
                    ));
                    return;
                }
                Err(error) => problem = Some(error),
            }
        }
        let problem = problem.map_or_else(String::new, |error| format!("; {error}"));
        output::error(&format!(
            "this restore is not recorded: the repository cannot be written ({reason}){problem}"
        ));
    }
}

/// Returns the files that may hold the record of a restore into `target`.
fn places(target: &Path, spool: Option<&Path>, id: &BackupId) -> Vec<PathBuf> {
    let name = format!("tidemark-restore-{id}.json");
    let directories = target.parent().into_iter().chain(spool);
    directories.map(|directory| directory.join(&name)).collect()
}

/// Makes the daemon of this host read the outcome at once.
pub(super) fn tell_the_daemon(cluster: &ClusterSettings, id: &BackupId) {
    let mark = outcome_mark(cluster);
    if mark.parent().is_none_or(|spool| !spool.is_dir()) {
        return;
    }
    if let Err(error) = std::fs::write(&mark, id.as_str()) {
        tracing::debug!(%error, path = %mark.display(), "the daemon of this host sees the record later");
    }
}
