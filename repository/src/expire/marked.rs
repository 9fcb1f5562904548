//! [`ExpiredSet`]: the union of a repository's expiry records.
//!
//! No program removes a name from the set automatically, so two archivers that expire at the same
//! time cannot contradict each other. Only an operator can withdraw records, within the grace
//! period (`expire --undo`).
//! Invariant: readers hide the named objects before the first byte of them is removed.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use wal_format::{
    BackupId, Branch, EXPIRED_FORMAT_VERSION, Expired, Lsn, ObjectKey, SegmentSize,
    SystemIdentifier,
};

use super::Intervals;
use crate::{Repository, Result};

/// The records and the objects that they name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpiredSet {
    records: Vec<Expired>,
    backups: BTreeSet<BackupId>,
    wal: BTreeMap<Branch, Intervals>,
}

impl From<Vec<Expired>> for ExpiredSet {
    fn from(records: Vec<Expired>) -> Self {
        let mut set = Self::default();
        for record in &records {
            set.backups
                .extend(record.backups.iter().map(|backup| backup.id.clone()));
            for range in &record.wal {
                let known = set.wal.entry(range.branch).or_default();
                known.add(range.from_lsn, range.to_lsn);
            }
        }
        set.records = records;
        set
    }
}

impl ExpiredSet {
    /// The records, by name.
    #[must_use]
    pub fn records(&self) -> &[Expired] {
        &self.records
    }

    /// Returns true if nothing ever expired.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.wal.is_empty()
    }

    /// The expired backups.
    #[must_use]
    pub fn backups(&self) -> &BTreeSet<BackupId> {
        &self.backups
    }

    /// The expired WAL of a branch.
    #[must_use]
    pub fn wal(&self, branch: Branch) -> Intervals {
        self.wal.get(&branch).cloned().unwrap_or_default()
    }

    /// Iterates over the branches with expired WAL.
    pub fn branches(&self) -> impl Iterator<Item = (Branch, &Intervals)> {
        self.wal.iter().map(|(branch, wal)| (*branch, wal))
    }

    /// Returns the parts of `[from, to)` that are missing for a reason other than expiry.
    #[must_use]
    pub fn not_expired(&self, branch: Branch, from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
        match self.wal.get(&branch) {
            Some(wal) => wal.missing_in(from, to),
            None => vec![(from, to)],
        }
    }

    /// Returns true if readers treat this object as absent.
    #[must_use]
    pub fn hides(&self, key: &ObjectKey, size: SegmentSize) -> bool {
        match key {
            ObjectKey::BackupInfo(_, id)
            | ObjectKey::BackupManifest(_, id)
            | ObjectKey::BackupSlice(_, id, ..) => self.backups.contains(id),
            ObjectKey::Segment(_, branch, name) | ObjectKey::Tail(_, branch, name, ..) => {
                let segment = name.segment(size);
                let wal = self.wal.get(branch);
                wal.zip(segment).is_some_and(|(wal, segment)| {
                    wal.covers(segment.start_lsn(size), segment.end_lsn(size))
                })
            }
            ObjectKey::BackupNote(..)
            | ObjectKey::Epoch(_)
            | ObjectKey::EpochCopy(_)
            | ObjectKey::Expired(..)
            | ObjectKey::FailoverLoss(..)
            | ObjectKey::Gap(..)
            | ObjectKey::History(..)
            | ObjectKey::HistoryCopy(..)
            | ObjectKey::Outcome(..) => false,
        }
    }

    /// Returns the intersection: for several repositories, what none of them keeps.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let both = |(branch, wal): (&Branch, &Intervals)| {
            let wal = wal.and(&other.wal(*branch));
            (!wal.is_empty()).then_some((*branch, wal))
        };
        let mut records = self.records.clone();
        for record in &other.records {
            if !records.iter().any(|known| known.id == record.id) {
                records.push(record.clone());
            }
        }
        Self {
            records,
            backups: self.backups.intersection(&other.backups).cloned().collect(),
            wal: self.wal.iter().filter_map(both).collect(),
        }
    }

    /// Returns the records that `chosen` selects.
    #[must_use]
    pub fn part(&self, chosen: impl Fn(&Expired) -> bool) -> Self {
        let records = self.records.iter().filter(|record| chosen(record));
        records.cloned().collect::<Vec<_>>().into()
    }

    /// Returns true if this set names everything that `other` names.
    #[must_use]
    pub fn names_all_in(&self, other: &Self) -> bool {
        let wal = |(branch, wal): (&Branch, &Intervals)| wal.without(&self.wal(*branch)).is_empty();
        other.backups.is_subset(&self.backups) && other.wal.iter().all(wal)
    }

    /// Returns true if this set names everything that `record` names.
    #[must_use]
    pub fn names_all_of(&self, record: &Expired) -> bool {
        let wal = |range: &wal_format::ExpiredWal| {
            let known = self.wal.get(&range.branch);
            known.is_some_and(|known| known.covers(range.from_lsn, range.to_lsn))
        };
        let backup = |backup: &wal_format::ExpiredBackup| self.backups.contains(&backup.id);
        record.backups.iter().all(backup) && record.wal.iter().all(wal)
    }
}

impl Repository {
    /// Returns what has expired. For several repositories, that is what none of the answering ones
    /// keeps: WAL that one of them still has can be restored.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn expired(&self, system: SystemIdentifier) -> Result<ExpiredSet> {
        let mut all: Option<ExpiredSet> = None;
        let mut away = None;
        for place in self.each_place() {
            let of_place = match place.expired_here(system) {
                // The objects that this repository keeps cannot be read either.
                Err(error) if error.is_transient() => {
                    away.get_or_insert(error);
                    continue;
                }
                set => set?,
            };
            all = Some(match all {
                None => of_place,
                Some(known) => known.and(&of_place),
            });
        }
        match (all, away) {
            (None, Some(error)) => Err(error),
            (all, _) => Ok(all.unwrap_or_default()),
        }
    }

    fn expired_here(&self, system: SystemIdentifier) -> Result<ExpiredSet> {
        let mut records = Vec::new();
        for (key, _) in self.list(&format!("{system}/expired/"))? {
            let parse = |json: &Bytes| {
                let record = wal_format::checked_json::from_slice::<Expired>(json);
                record.map_err(|error| error.to_string())
            };
            let read = match self.read_small(&key, parse) {
                // The record was merged into a new one after the listing.
                Err(error) if error.is_not_found() => return self.expired_here(system),
                read => read?,
            };
            match read {
                Ok(record) if record.format_version == EXPIRED_FORMAT_VERSION => {
                    records.push(record);
                }
                // Its expired objects count as kept: nothing is removed because of this record.
                Ok(_) => {
                    tracing::warn!(%key, "a newer Tidemark expired something here; use that one");
                }
                Err(damage) => {
                    tracing::warn!(%damage, "a record of what expired cannot be read");
                }
            }
        }
        Ok(records.into())
    }
}
