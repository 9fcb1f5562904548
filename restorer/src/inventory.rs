//! [`Inventory`]: the view of the archive on which plans are based. The catalog implements it;
//! tests implement it in memory.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use catalog::Catalog;
use repository::{
    ClusterIdentity, Damage, DamagedBackups, DamagedWal, LostHistory, Missing, Repository,
    UnseenPlace, WalRange, name_losses,
};
use wal_format::{
    BackupId, BackupInfo, BackupManifest, Branch, Lsn, ObjectKey, PgTimestamp, SegmentSize,
    SegmentSummary, TimelineHistory, WalIdentity, WalIndexer,
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
    /// Returns the damage of the object whose name covers the byte of `branch` at `lsn`; `None` if
    /// no such object is known to be damaged.
    fn damaged_wal_at(&self, _branch: Branch, _lsn: Lsn) -> Option<Damage> {
        None
    }
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
    /// The objects that this host archived, that were not accepted as lost, and that the repository
    /// lacks.
    pub missing: Missing,
    damaged_backups: DamagedBackups,
    /// The WAL objects that the last verification found damaged.
    damaged_wal: DamagedWal,
    /// The results of checking objects of `damaged_wal` again. Each object is checked when its
    /// result is first needed.
    checked_wal: Mutex<BTreeMap<ObjectKey, Option<Damage>>>,
}

impl Archive {
    /// Creates the archive from a repository and its index. Reads which backups and WAL objects are
    /// known to be damaged.
    #[must_use]
    pub fn new(repository: Repository, catalog: Catalog) -> Self {
        let system = catalog.identity().system_identifier;
        let damaged = repository.known_damage(system).unwrap_or_else(|error| {
            // Continue without the result: each part of a backup is checked again before it is
            // used.
            tracing::warn!(
                event = "verdict_unreadable", %error,
                "the result of the last verification cannot be read"
            );
            Default::default()
        });
        let (mut damaged_backups, damaged_wal) = damaged;
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
            missing: Missing::default(),
            damaged_backups,
            damaged_wal,
            checked_wal: Mutex::default(),
        }
    }

    /// Returns every object that cannot be used: its key and its problem.
    #[must_use]
    pub fn damaged_objects(&self) -> Vec<(String, String)> {
        let damaged = self
            .damaged_wal
            .keys()
            .filter_map(|key| self.damage_now(key));
        let damaged = damaged.map(|Damage { object, problem }| (object, problem));
        let mut objects = self.catalog.damaged_objects().to_vec();
        objects.extend(damaged);
        objects
    }

    /// Checks again a WAL object that the last verification found damaged, because it may have been
    /// repaired or replaced since. Returns `None` if the object is intact now, or if the
    /// verification did not find it damaged.
    fn damage_now(&self, key: &ObjectKey) -> Option<Damage> {
        let recorded = self.damaged_wal.get(key)?;
        let mut checked = self
            .checked_wal
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = checked.get(key) {
            return known.clone();
        }
        let problem = match self.repository.wal_problem(key, self.wal_identity()) {
            Ok(problem) => problem.map(|problem| match recorded.problem.strip_prefix(&problem) {
                Some(found) => format!("{problem}{found}"),
                None => format!("{problem}; found by {}", recorded.problem),
            }),
            Err(error) => {
                tracing::debug!(%error, event = "damage_unchecked", "damaged WAL cannot be checked");
                Some(recorded.problem.clone())
            }
        };
        let damage = problem.map(|problem| Damage {
            object: key.to_string(),
            problem,
        });
        checked.insert(key.clone(), damage.clone());
        damage
    }

    /// Returns the refusal of a restore of the newest state, if the repository holds an older state
    /// than this host has archived.
    #[must_use]
    pub fn older_state(&self) -> Option<PlanError> {
        let newest = self.missing.newest.as_ref()?;
        let losses = self.missing.losses.iter().chain([newest]);
        let end_lsn = losses.filter_map(|loss| Some(loss.wal()?.2)).max()?;
        Some(PlanError::OlderState {
            url: self.repository.url(),
            end_lsn,
            missing: name_losses(&self.missing.losses),
        })
    }

    /// Excludes a backup from the plans that follow.
    pub(crate) fn exclude_backup(&mut self, id: BackupId, damage: Damage) {
        self.damaged_backups.insert(id, damage);
    }

    /// Excludes the backups of which an object is missing from the plans that follow.
    ///
    /// # Errors
    /// Errors of the listing.
    pub(crate) fn exclude_incomplete(&mut self) -> Result<()> {
        let system = self.catalog.identity().system_identifier;
        let backups = self.catalog.backups()?;
        let incomplete = self.repository.incomplete_backups(system, &backups)?;
        self.damaged_backups.extend(incomplete);
        Ok(())
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
        let wal = match plan {
            PlanError::Gap { branch, from, .. } => self.damage_at(Some(*branch), *from),
            PlanError::BeyondArchive { end_lsn, .. } => self.damage_at(None, *end_lsn),
            _ => None,
        };
        if let Some((key, Damage { object, problem })) = wal {
            let size = self.catalog.identity().wal_segment_size;
            let range = wal_of(&key, size).map_or_else(String::new, |(from, to)| {
                format!(" and the WAL from {from} to {to} with it")
            });
            return Error::Damaged {
                object,
                problem: format!("{problem}, so it counts as missing{range}: {refusal}"),
            };
        }
        let (PlanError::NoBackup | PlanError::NoBackupOnPath { .. } | PlanError::TooEarly { .. }) =
            plan
        else {
            return refusal;
        };
        let is_backup = |key: &str| matches!(key.parse(), Ok(ObjectKey::BackupInfo(..)));
        let damaged = self.catalog.damaged_objects().iter();
        match damaged.into_iter().find(|(key, _)| is_backup(key)) {
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

    /// Returns the damaged object whose name covers the byte at `lsn`: on `branch`, or on any
    /// branch if `branch` is `None`.
    fn damage_at(&self, branch: Option<Branch>, lsn: Lsn) -> Option<(ObjectKey, Damage)> {
        let size = self.catalog.identity().wal_segment_size;
        let is_it = |key: &ObjectKey| {
            let (ObjectKey::Segment(_, of, _) | ObjectKey::Tail(_, of, ..)) = key else {
                return false;
            };
            let range = wal_of(key, size);
            branch.is_none_or(|branch| branch == *of)
                && range.is_some_and(|(from, to)| (from..to).contains(&lsn))
        };
        let unreadable = self.catalog.damaged_objects().iter();
        let mut unreadable = unreadable.filter_map(|(object, problem)| {
            let key = object.parse().ok().filter(is_it)?;
            let (object, problem) = (object.clone(), problem.clone());
            Some((key, Damage { object, problem }))
        });
        let mut verified = self.damaged_wal.keys().filter(|key| is_it(key));
        unreadable
            .next()
            .or_else(|| verified.find_map(|key| Some((key.clone(), self.damage_now(key)?))))
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

/// Returns the range of WAL that the name of an object covers; `None` if it is not a WAL object.
fn wal_of(key: &ObjectKey, size: SegmentSize) -> Option<(Lsn, Lsn)> {
    match key {
        ObjectKey::Segment(_, _, name) => {
            let number = name.segment(size)?;
            Some((number.start_lsn(size), number.end_lsn(size)))
        }
        ObjectKey::Tail(_, _, _, start, end) => Some((*start, *end)),
        _ => None,
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

    fn damaged_wal_at(&self, branch: Branch, lsn: Lsn) -> Option<Damage> {
        self.damage_at(Some(branch), lsn).map(|(_, damage)| damage)
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
        let mut ranges = self.catalog.ranges(branch, from, to)?;
        if !self.damaged_wal.is_empty() {
            ranges.retain(|range| self.damage_now(&range.key(self.identity())).is_none());
        }
        Ok(ranges)
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
            let before = |range: &WalRange| range.segment >= first && range.start_lsn < lsn;
            for (range, end_lsn) in ranges.iter().filter(|(range, _)| before(range)) {
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
