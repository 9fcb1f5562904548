//! The damage that the newest verification found, without the WAL objects that are intact again.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use repository::{DamagedBackups, DamagedWal, damaged_backups, damaged_wal};
use wal_format::{BackupId, ObjectKey, Outcome, OutcomeKind};

use crate::{error::Result, pipeline::archive::Archive};

/// The interval at which WAL that a verification found damaged is checked again.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// The number of damaged objects that are checked. The others count as damaged until the next
/// verification.
const CHECKS_MAX: usize = 20;

/// The WAL objects that the newest verification found damaged and that are intact again.
#[derive(Debug, Default)]
pub(super) struct Repaired {
    keys: BTreeSet<ObjectKey>,
    /// The verification, and the time at which its damaged objects were last checked.
    checked: Option<(BackupId, Instant)>,
}

impl Repaired {
    /// Reads the damaged WAL objects of the newest verification again, at most once in
    /// [`CHECK_INTERVAL`].
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`] when an object cannot be read.
    pub(super) fn check<'a>(
        &mut self,
        archive: &Archive,
        outcomes: impl Iterator<Item = &'a Outcome>,
    ) -> Result<()> {
        let Some(verdict) = newest_verification(outcomes) else {
            return Ok(());
        };
        let is_fresh =
            |(id, at): &(BackupId, Instant)| *id == verdict.id && at.elapsed() < CHECK_INTERVAL;
        if self.checked.as_ref().is_some_and(is_fresh) {
            return Ok(());
        }
        let damaged = damaged_wal(verdict, &archive.repository().place_urls());
        let mut intact = BTreeSet::new();
        for key in damaged.into_keys().take(CHECKS_MAX) {
            let problem = archive
                .repository()
                .wal_problem(&key, *archive.identity())?;
            if problem.is_none() {
                intact.insert(key);
            }
        }
        self.checked = Some((verdict.id.clone(), Instant::now()));
        self.keys = intact;
        Ok(())
    }

    pub(super) fn keys(&self) -> &BTreeSet<ObjectKey> {
        &self.keys
    }
}

/// Returns the backups and the WAL that the newest verification among `outcomes` found damaged,
/// without the WAL that is intact again.
pub(super) fn find_damaged<'a>(
    archive: &Archive,
    outcomes: impl Iterator<Item = &'a Outcome>,
    repaired: &BTreeSet<ObjectKey>,
) -> (DamagedBackups, DamagedWal) {
    let Some(verdict) = newest_verification(outcomes) else {
        return (DamagedBackups::new(), DamagedWal::new());
    };
    let places = archive.repository().place_urls();
    let mut wal = damaged_wal(verdict, &places);
    wal.retain(|key, _| !repaired.contains(key));
    (damaged_backups(verdict, &places), wal)
}

fn newest_verification<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Option<&'a Outcome> {
    outcomes
        .filter(|outcome| outcome.kind == OutcomeKind::Verify)
        .max_by_key(|outcome| outcome.finished)
}
