//! [`Inventory`]: the view of the archive on which plans are based. The catalog implements it;
//! tests implement it in memory.

use bytes::Bytes;
use catalog::Catalog;
use repository::{
    ClusterIdentity, Damage, DamagedBackups, LostHistory, Repository, UnseenPlace, WalRange,
};
use wal_format::{
    BackupId, BackupInfo, BackupManifest, Branch, Lsn, ObjectKey, PgTimestamp, SegmentSummary,
    TimelineHistory, WalIdentity, WalIndexer,
};

use crate::{
    Error, PlanError, Result,
    execute::{check_parts, read_manifest},
    wal_fetch,
};

/// The archive of one cluster.
pub trait Inventory {
    /// The identity of the cluster.
    fn identity(&self) -> &ClusterIdentity;
    /// The base backups, oldest first.
    ///
    /// # Errors
    /// Errors of reading them.
    fn backups(&self) -> Result<Vec<BackupInfo>>;
    /// The backups that are known to be damaged; no plan chooses one.
    fn damaged_backups(&self) -> &DamagedBackups;
    /// The timelines: history, and the history file's content.
    ///
    /// # Errors
    /// Errors of reading them.
    fn branches(&self) -> Result<Vec<(Branch, Option<TimelineHistory>, Vec<u8>)>>;
    /// Timelines with archived objects whose history file is lost, so that the path to them is
    /// unknown.
    fn lost_histories(&self) -> &[LostHistory] {
        &[]
    }
    /// The ranges of a branch that reach into `[from, to)`, in order.
    ///
    /// # Errors
    /// Errors of reading them.
    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>>;
    /// The summary of a range.
    ///
    /// # Errors
    /// Errors of reading it.
    fn summary(&self, range: &WalRange) -> Result<SegmentSummary>;
    /// Every restore point.
    ///
    /// # Errors
    /// Errors of reading them.
    fn restore_points(&self) -> Result<Vec<(Branch, Lsn, PgTimestamp, String)>>;
    /// The transactions that were prepared before the backup and not ended when it was taken, from
    /// its `pg_twophase`.
    ///
    /// # Errors
    /// Errors of reading them.
    fn prepared_in(&self, backup: &BackupInfo) -> Result<Vec<u32>>;
    /// Returns the start of the first record at or after `lsn`. Decodes `ranges`, each up to the
    /// LSN in its pair. `None` if there is no such record.
    ///
    /// # Errors
    /// Errors of reading them.
    fn record_at_or_after(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>>;
    /// Returns the start of the last record that ends at or before `lsn`. Decodes `ranges`, each up
    /// to the LSN in its pair. `None` if there is no such record.
    ///
    /// # Errors
    /// Errors of reading them.
    fn record_before(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>>;
}

/// The archive in a repository.
#[derive(Debug)]
pub struct Archive {
    /// The objects.
    pub repository: Repository,
    /// The index of the objects.
    pub catalog: Catalog,
    /// The repositories of the cluster that could not be read.
    pub unseen: Vec<UnseenPlace>,
    damaged_backups: DamagedBackups,
}

impl Archive {
    /// Creates the archive from a repository and its index. Reads which backups are known to be
    /// damaged.
    #[must_use]
    pub fn new(repository: Repository, catalog: Catalog) -> Self {
        let system = catalog.identity().system_identifier;
        let mut damaged_backups = repository.damaged_backups(system).unwrap_or_else(|error| {
            // Continue without the result: each part of a backup is checked again before it is
            // used.
            tracing::warn!(
                event = "verdict_unreadable", %error,
                "the result of the last verification cannot be read"
            );
            DamagedBackups::new()
        });
        for (object, problem) in catalog.damaged_objects() {
            if let Ok(ObjectKey::BackupInfo(_, id)) = object.parse() {
                let (object, problem) = (object.clone(), problem.clone());
                damaged_backups.insert(id, Damage { object, problem });
            }
        }
        Self {
            repository,
            catalog,
            unseen: Vec::new(),
            damaged_backups,
        }
    }

    /// Excludes a backup from the plans that follow.
    pub(crate) fn exclude_backup(&mut self, id: BackupId, damage: Damage) {
        self.damaged_backups.insert(id, damage);
    }

    /// Lets plans choose a backup that the last verification found damaged.
    pub(crate) fn trust_backup(&mut self, id: &BackupId) {
        self.damaged_backups.remove(id);
    }

    /// Replaces a refusal by [`Error::Damaged`] if its cause is an archived object that is damaged.
    #[must_use]
    pub fn explain(&self, refusal: Error) -> Error {
        let Error::Plan(plan) = &refusal else {
            return refusal;
        };
        let is_it = |key: &ObjectKey| match (plan, key) {
            (PlanError::Gap { from, .. } | PlanError::BeyondArchive { end_lsn: from, .. }, _) => {
                self.covers(key, *from)
            }
            (
                PlanError::NoBackup | PlanError::NoBackupOnPath { .. } | PlanError::TooEarly { .. },
                ObjectKey::BackupInfo(..),
            ) => true,
            _ => false,
        };
        let damaged = self.catalog.damaged_objects().iter();
        let found = damaged
            .into_iter()
            .find(|(key, _)| key.parse().is_ok_and(|key| is_it(&key)));
        match found {
            Some((object, problem)) => Error::Damaged {
                object: object.clone(),
                problem: format!("{problem}, so it counts as missing: {refusal}"),
            },
            None => refusal,
        }
    }

    /// Refuses a backup whose description is damaged, or was copied from another backup.
    ///
    /// # Errors
    /// [`Error::Damaged`] names the object.
    pub fn refuse_damaged(&self, id: &BackupId) -> Result<()> {
        let key = ObjectKey::BackupInfo(self.catalog.identity().system_identifier, id.clone());
        let damaged = self.catalog.damaged_objects().iter();
        let found = damaged
            .into_iter()
            .find(|(object, _)| object.parse().is_ok_and(|object: ObjectKey| object == key));
        match found {
            Some((object, problem)) => Err(Error::Damaged {
                object: object.clone(),
                problem: problem.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Compares the listed objects of a backup with its description, before anything is written.
    ///
    /// # Errors
    /// [`Error::Damaged`] names the first object that is missing or of another length.
    pub fn check_backup(&self, id: &BackupId) -> Result<()> {
        let backups = self.catalog.backups()?;
        match backups.iter().find(|backup| backup.id == *id) {
            Some(backup) => check_parts(&self.repository, backup),
            None => Ok(()),
        }
    }

    /// Returns true if an object of WAL contains the byte at `lsn`, according to its name.
    fn covers(&self, key: &ObjectKey, lsn: Lsn) -> bool {
        let size = self.catalog.identity().wal_segment_size;
        match key {
            ObjectKey::Segment(_, _, name) => name.segment(size) == Some(size.segment_of(lsn)),
            ObjectKey::Tail(_, _, _, start, end) => (*start..*end).contains(&lsn),
            _ => false,
        }
    }

    /// The identity of the archived WAL.
    pub(crate) fn wal_identity(&self) -> WalIdentity {
        let identity = self.catalog.identity();
        WalIdentity {
            version: identity.postgresql_major,
            system_identifier: identity.system_identifier,
            segment_size: identity.wal_segment_size,
        }
    }

    /// The manifest of a backup.
    pub(crate) fn manifest(&self, backup: &BackupInfo) -> Result<BackupManifest> {
        let sound = |content: &Bytes| read_manifest(content, backup).is_ok();
        let content = self.repository.get_sound(&backup.manifest_key(), &sound)?;
        read_manifest(&content, backup)
    }

    /// The WAL of a range.
    pub(crate) fn wal(&self, range: &WalRange) -> Result<Vec<u8>> {
        let key = range.key(self.catalog.identity());
        let object = self.repository.get(&key)?;
        let mut wal = Vec::new();
        wal_fetch::read(&key, &object, &mut wal)?;
        Ok(wal)
    }
}

impl Inventory for Archive {
    fn identity(&self) -> &ClusterIdentity {
        self.catalog.identity()
    }

    fn backups(&self) -> Result<Vec<BackupInfo>> {
        Ok(self.catalog.backups()?)
    }

    fn damaged_backups(&self) -> &DamagedBackups {
        &self.damaged_backups
    }

    fn branches(&self) -> Result<Vec<(Branch, Option<TimelineHistory>, Vec<u8>)>> {
        let branches = self.catalog.branches()?;
        Ok(branches
            .into_iter()
            .map(|(branch, history, raw)| (branch, history, raw.to_vec()))
            .collect())
    }

    fn lost_histories(&self) -> &[LostHistory] {
        self.catalog.lost_histories()
    }

    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        Ok(self.catalog.ranges(branch, from, to)?)
    }

    fn summary(&self, range: &WalRange) -> Result<SegmentSummary> {
        Ok(self.catalog.summary(range)?)
    }

    fn restore_points(&self) -> Result<Vec<(Branch, Lsn, PgTimestamp, String)>> {
        Ok(self.catalog.restore_points()?)
    }

    fn prepared_in(&self, backup: &BackupInfo) -> Result<Vec<u32>> {
        let manifest = self.manifest(backup)?;
        let files = manifest
            .files
            .iter()
            .filter_map(|file| file.path.strip_prefix("pg_twophase/"));
        // The name is the transaction ID in hexadecimal; since PostgreSQL 17 it has the epoch in
        // the upper half.
        let xid = |name: &str| u64::from_str_radix(name, 16).ok();
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
        let lower = |full: u64| full as u32;
        Ok(files.filter_map(xid).map(lower).collect())
    }

    fn record_at_or_after(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>> {
        let identity = self.identity();
        let wal_identity = self.wal_identity();
        // Decode from the start of the segment that contains the LSN: a segment's first page shows
        // where its records begin.
        let segment = identity.wal_segment_size.segment_of(lsn);
        let mut indexer: Option<WalIndexer> = None;
        for (range, end_lsn) in ranges.iter().filter(|(range, _)| range.segment >= segment) {
            let mut wal = self.wal(range)?;
            let counts = end_lsn.bytes_since(range.start_lsn);
            wal.truncate(usize::try_from(counts).unwrap_or(usize::MAX));
            let indexer =
                indexer.get_or_insert_with(|| WalIndexer::new(wal_identity, range.start_lsn, None));
            let skip = usize::try_from(indexer.position().bytes_since(range.start_lsn))
                .unwrap_or(usize::MAX);
            let Some(wal) = wal.get(skip..) else { continue };
            let known = usize::try_from(lsn.align_down(8).bytes_since(indexer.position()))
                .unwrap_or(usize::MAX)
                .min(wal.len());
            let (before, after) = wal.split_at(known);
            let failed = |error: wal_format::DecodeError| Error::Wal {
                lsn,
                problem: error.to_string(),
            };
            indexer.push(before).map_err(failed)?;
            // Records start at multiples of 8, so pieces of 8 bytes cannot miss the first start at
            // or after the position.
            for piece in after.chunks(8) {
                indexer.push(piece).map_err(failed)?;
                let seen = indexer.take_summary();
                let found = [
                    seen.first_record_lsn,
                    seen.last_record_lsn,
                    seen.open_record_lsn,
                ];
                if let Some(start) = found.into_iter().flatten().find(|start| *start >= lsn) {
                    return Ok(Some(start));
                }
            }
        }
        Ok(None)
    }

    fn record_before(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>> {
        let size = self.identity().wal_segment_size;
        let mut starts: Vec<_> = ranges.iter().map(|(range, _)| range.segment).collect();
        starts.sort_unstable();
        starts.dedup();
        // The last record may have begun in an earlier segment.
        for first in starts.into_iter().rev() {
            if first.start_lsn(size) >= lsn {
                continue;
            }
            let mut indexer: Option<WalIndexer> = None;
            for (range, end_lsn) in ranges.iter().filter(|(range, _)| range.segment >= first) {
                let wal = self.wal(range)?;
                let indexer = indexer.get_or_insert_with(|| {
                    WalIndexer::new(self.wal_identity(), range.start_lsn, None)
                });
                let offset = |at: Lsn| {
                    usize::try_from(at.bytes_since(range.start_lsn)).unwrap_or(usize::MAX)
                };
                let end = offset((*end_lsn).min(lsn)).min(wal.len());
                let Some(wal) = wal.get(offset(indexer.position())..end) else {
                    continue;
                };
                indexer.push(wal).map_err(|error| Error::Wal {
                    lsn,
                    problem: error.to_string(),
                })?;
            }
            let found = indexer.and_then(|mut indexer| indexer.take_summary().last_record_lsn);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}
