//! Compares the catalog with a listing of the repository before the catalog removes entries.
//!
//! Invariant: archived objects that are missing are passed to the caller before their entries leave
//! the catalog, which may be the only place that still knows of them.

use std::{cell::RefCell, collections::BTreeMap, fmt, path::Path};

use repository::{
    ClusterIdentity, Loss, Missing, Repository, Result, WalRange, WalRangeKind, expire::Intervals,
};
use rocksdb::IteratorMode;
use wal_format::{BackupInfo, Branch, Lsn, ObjectKey};

use super::{
    Catalog, RefreshReport, entries::starting_at, families::Segments, keys::RangeKey,
    refresh::skeleton,
};

/// The functions that a refresh calls before it removes entries of objects that a listing does not
/// contain.
pub struct Guard<'a> {
    /// Returns true if the WAL of a range is in the spool. The archiver stores it again.
    pub is_spooled: &'a dyn Fn(&WalRange) -> bool,
    /// True if the place is known to be the one that held the newest tail. If that tail is missing
    /// otherwise, the place is an older state, although the tail is in the spool.
    pub is_same_place: bool,
    /// Receives the objects that were archived, did not expire and are missing. If it fails, the
    /// catalog removes nothing.
    pub missing: &'a dyn Fn(&Missing) -> Result<()>,
}

impl Guard<'_> {
    /// A guard that lets the catalog remove every entry.
    pub(super) const NONE: Guard<'static> = Guard {
        is_spooled: &|_| false,
        is_same_place: false,
        missing: &|_| Ok(()),
    };
}

impl fmt::Debug for Guard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

impl Catalog {
    /// Returns the objects that the catalog in `directory` knows and the repository lacks. The
    /// catalog may be in use and is not changed. Returns no objects if there is no catalog.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog), [`Error::Store`](repository::Error::Store).
    pub fn missing(
        directory: &Path,
        identity: &ClusterIdentity,
        repository: &Repository,
    ) -> Result<Missing> {
        if !directory.join("CURRENT").is_file() {
            return Ok(Missing::default());
        }
        let copy = Self::copy_of(directory, identity)?;
        Ok(copy.refresh_and_compare(repository)?.1)
    }

    /// Updates a copy of a catalog, and returns the objects that it had and the repository lacks.
    pub(super) fn refresh_and_compare(
        &self,
        repository: &Repository,
    ) -> Result<(RefreshReport, Missing)> {
        let missing = RefCell::new(Missing::default());
        let guard = Guard {
            missing: &|found| {
                let mut missing = missing.borrow_mut();
                missing.losses.extend(found.losses.iter().cloned());
                missing.newest = missing.newest.take().or_else(|| found.newest.clone());
                Ok(())
            },
            ..Guard::NONE
        };
        let report = self.refresh_guarded(repository, &guard)?;
        Ok((report, missing.into_inner()))
    }

    /// Removes the entry of the WAL range that an object contains. An object without an entry is
    /// not an error.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog).
    pub fn forget(&self, key: &ObjectKey) -> Result<()> {
        let Some(skeleton) = skeleton(self, key, 0) else {
            return Ok(());
        };
        match self.get::<Segments>(&RangeKey::new(&skeleton))? {
            Some(range) => self.remove_range(&range),
            None => Ok(()),
        }
    }

    /// Returns the sealed segment with the greatest LSN on the newest timeline.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog).
    pub fn newest_sealed(&self) -> Result<Option<WalRange>> {
        self.newest_sealed_but(&|_| false)
    }

    fn newest_sealed_but(&self, skip: &dyn Fn(&WalRange) -> bool) -> Result<Option<WalRange>> {
        for entry in self.entries::<Segments>(IteratorMode::End) {
            let (_, range) = entry?;
            if range.kind == WalRangeKind::Sealed && !skip(&range) {
                return Ok(Some(range));
            }
        }
        Ok(None)
    }

    /// Returns up to `count` sealed segments in the order of branches and LSNs, beginning after
    /// `after` or with the first segment.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog).
    pub fn sealed_after(&self, after: Option<&WalRange>, count: usize) -> Result<Vec<WalRange>> {
        let after = after.map(RangeKey::new);
        let mode = after
            .as_ref()
            .map_or(IteratorMode::Start, |key| starting_at(key.as_bytes()));
        let mut found = Vec::new();
        for entry in self.entries::<Segments>(mode) {
            let (key, range) = entry?;
            if found.len() == count {
                break;
            }
            let is_after = after.is_none_or(|after| key > after);
            if is_after && range.kind == WalRangeKind::Sealed {
                found.push(range);
            }
        }
        Ok(found)
    }

    /// Returns the newest tail of the newest timeline after its newest sealed segment.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog).
    pub fn newest_tail(&self) -> Result<Option<WalRange>> {
        let Some(newest) = self.entries::<Segments>(IteratorMode::End).next() else {
            return Ok(None);
        };
        let (_, last) = newest?;
        // A sealed segment sorts before the tails that it replaces.
        let is_tail = last.kind == WalRangeKind::Tail && !self.is_sealed(&last)?;
        Ok(is_tail.then_some(last))
    }

    /// Returns true if the catalog contains the sealed segment of a range.
    fn is_sealed(&self, range: &WalRange) -> Result<bool> {
        let of_segment = self.of_segment(range)?;
        Ok(of_segment
            .iter()
            .any(|known| known.kind == WalRangeKind::Sealed))
    }

    /// Returns the loss of these ranges' objects, without those that expired in the meantime and
    /// without tails that a sealed segment replaced.
    pub(super) fn missing_wal(
        &self,
        repository: &Repository,
        guard: &Guard<'_>,
        mut ranges: Vec<WalRange>,
    ) -> Result<Missing> {
        let is_spooled = guard.is_spooled;
        let mut tails = Vec::new();
        for range in &ranges {
            if range.kind == WalRangeKind::Tail && !self.is_sealed(range)? {
                tails.push(range.clone());
            }
        }
        ranges.retain(|range| range.kind == WalRangeKind::Sealed);
        if ranges.is_empty() && tails.is_empty() {
            return Ok(Missing::default());
        }
        // A missing segment that is in the spool proves neither a loss nor that the place is the
        // right one.
        let newest =
            self.newest_sealed_but(&|range| ranges.contains(range) && is_spooled(range))?;
        ranges.retain(|range| !is_spooled(range));
        // Another program may have removed what it marked as expired after the records were read.
        let expired = repository.expired(self.identity.system_identifier)?;
        let size = self.identity.wal_segment_size;
        let hides = |range: &WalRange| expired.hides(&range.key(&self.identity), size);
        ranges.retain(|range| !hides(range));
        tails.retain(|range| !hides(range));
        let newest = newest.filter(|newest| ranges.contains(newest));
        let newest_tail = self
            .newest_tail()?
            .filter(|tail| tails.contains(tail) && !(guard.is_same_place && is_spooled(tail)));
        if newest_tail.is_none() {
            tails.retain(|tail| !is_spooled(tail));
        }
        let mut lost: BTreeMap<Branch, Intervals> = BTreeMap::new();
        for range in &ranges {
            let known = lost.entry(range.branch).or_default();
            known.add(range.start_lsn, range.end_lsn);
        }
        let mut losses = Vec::new();
        for (branch, intervals) in lost {
            for (from_lsn, to_lsn) in intervals.iter() {
                losses.push(self.loss(branch, from_lsn, to_lsn));
            }
        }
        losses.extend(tails.iter().map(|tail| self.loss_of(tail)));
        let newest = newest.or(newest_tail).map(|range| self.loss_of(&range));
        Ok(Missing { losses, newest })
    }

    /// Returns the loss of the object of a range.
    #[must_use]
    pub fn loss_of(&self, range: &WalRange) -> Loss {
        let wal = self.loss(range.branch, range.start_lsn, range.end_lsn);
        match (range.kind, wal) {
            (
                WalRangeKind::Tail,
                Loss::Wal {
                    system,
                    segment_size,
                    branch,
                    from_lsn,
                    to_lsn,
                },
            ) => Loss::Tail {
                system,
                segment_size,
                branch,
                from_lsn,
                to_lsn,
            },
            (_, wal) => wal,
        }
    }

    /// Returns the loss of the sealed segments of a range.
    #[must_use]
    pub fn loss(&self, branch: Branch, from_lsn: Lsn, to_lsn: Lsn) -> Loss {
        Loss::Wal {
            system: self.identity.system_identifier,
            segment_size: self.identity.wal_segment_size,
            branch,
            from_lsn,
            to_lsn,
        }
    }

    /// Returns the loss of these backups, without those that expired in the meantime.
    pub(super) fn missing_backups(
        &self,
        repository: &Repository,
        backups: &[BackupInfo],
    ) -> Result<Missing> {
        if backups.is_empty() {
            return Ok(Missing::default());
        }
        let expired = repository.expired(self.identity.system_identifier)?;
        let is_lost = |backup: &&BackupInfo| !expired.backups().contains(&backup.id);
        let lost = backups.iter().filter(is_lost).map(|backup| Loss::Backup {
            system: self.identity.system_identifier,
            id: backup.id.clone(),
            branch: backup.branch,
            start_lsn: backup.start_lsn,
            stop_lsn: backup.stop_lsn,
        });
        Ok(Missing {
            losses: lost.collect(),
            newest: None,
        })
    }
}
