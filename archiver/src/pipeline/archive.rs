//! [`Archive`] is the state that the stages of one cluster share: the spool, the repository, the
//! identity, the catalog and the status.
//!
//! Invariant: every object of this cluster's WAL is stored through [`Archive::store_wal`]. It never
//! replaces archived bytes by other bytes, and it reports an object as stored only after reading it
//! back.

mod open;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::Instant,
};

use catalog::Catalog;
use intake::stored::{WalSource, put_wal};
use repository::{
    ClusterIdentity, CrashPoint, Damage, Loss, LossRecord, Repository, WalRange, WalRangeKind,
    config::ClusterSettings,
};
use status::cluster_status::ClusterStatus;
use wal_format::{
    Branch, DeclaredGap, Lsn, ObjectKey, PgTimestamp, SealedHeader, SegmentNo, SegmentSummary,
    WalIdentity,
};

use super::{losses::Losses, room::Room};
use crate::{
    core::{
        cursor::is_still_open,
        positions::{Coverage, coverage_begin},
        progress::Progress,
        start::Held,
    },
    error::{Error, Result},
    spool::{Spool, branch::BranchSpool, record::SpoolRecord},
};

/// The number of segments remembered as sealed. A tail in flight belongs to one of the newest two;
/// the rest is slack.
const SEALED_REMEMBERED_MAX: usize = 256;

/// The shared state of the stages of one cluster.
#[derive(Debug)]
pub struct Archive {
    number: u64,
    settings: ClusterSettings,
    pub(crate) cluster: ClusterIdentity,
    identity: WalIdentity,
    spool: Arc<Spool>,
    repository: Repository,
    catalog: Catalog,
    status: Arc<ClusterStatus>,
    progress: Arc<Progress>,
    room: Room,
    /// Set if the repository was offline at the start: the spool's record replaces it. `None` if
    /// the repository was read.
    away: Option<Away>,
    /// Locked while a file is removed from the spool.
    leaving: Mutex<()>,
    /// The tails in the repository, by segment. The sealed segment will replace them.
    pub(super) tails: Mutex<BTreeMap<(Branch, SegmentNo), Vec<WalRange>>>,
    /// The segments sealed since the start. A tail in flight whose segment is in this set is
    /// removed again.
    sealed: Mutex<BTreeSet<(Branch, SegmentNo)>>,
    /// The declared losses. No source has this WAL, and nothing waits for it.
    gaps: Vec<DeclaredGap>,
    /// The records of declared losses that cannot be read.
    pub(crate) damaged_records: Vec<Damage>,
    /// The WAL that failovers lost.
    losses: Losses,
    /// The branches whose history file is in the repository.
    histories: Mutex<BTreeSet<Branch>>,
    /// Locked while history files that the repository lacks are stored again.
    pub(super) putting_back: Mutex<()>,
    /// The value of [`Facts::repository_returns`](status::cluster_status::Facts) when the
    /// repository was read.
    read_at_return: u64,
    /// The record of what the archive once had and the repository lacks.
    pub(super) loss_record: LossRecord,
    /// The number of losses that had been accepted when the repository was read.
    pub(super) accepted: usize,
    /// True if the repository was found to lack what was archived.
    pub(super) doubted: AtomicBool,
    /// The last time at which the newest objects were found. Limits how often a bucket is queried
    /// after a tail was stored.
    pub(super) newest_checked: Mutex<Option<Instant>>,
}

/// The state after a start at which the repository was offline.
#[derive(Clone, Debug, Default)]
pub struct Away {
    /// The spool's record of the archive's end, written while the spool held no WAL.
    pub record: Option<SpoolRecord>,
    /// The newest sealed segment or tail, if the repository answers and lacks it.
    pub lacking: Option<Loss>,
    /// Every object that the repository answers to lack.
    pub missing: Vec<Loss>,
}

impl Archive {
    /// The settings of the cluster.
    #[must_use]
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// The identity of the archived WAL.
    #[must_use]
    pub fn identity(&self) -> &WalIdentity {
        &self.identity
    }

    /// The repository, including all mirrors.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The catalog of the repository.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Returns true if the repository was offline at the start. Nothing is sent to it before it was
    /// read.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// The number of this archive in the process, from 1.
    #[must_use]
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The newest sealed segment or tail, if the repository answers and lacks it.
    #[must_use]
    pub fn lacking(&self) -> Option<&Loss> {
        self.away.as_ref()?.lacking.as_ref()
    }

    /// The objects of the catalog that the place lacks, because it holds an older state of the
    /// repository.
    #[must_use]
    pub fn missing(&self) -> &[Loss] {
        self.away.as_ref().map_or(&[], |away| &away.missing)
    }

    /// Returns true if the repository was replaced by another place in the meantime and came back,
    /// or was found to lack what was archived. Its content may then differ from what is known here.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        self.is_doubted() || self.status.facts().repository_returns > self.read_at_return
    }

    /// The limit on the spool's size.
    #[must_use]
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// The status of the cluster.
    #[must_use]
    pub fn status(&self) -> &Arc<ClusterStatus> {
        &self.status
    }

    /// The positions of the cluster's WAL.
    #[must_use]
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// The cluster's spool.
    pub(super) fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The directory of the cluster's spool.
    #[must_use]
    pub fn spool_directory(&self) -> &Path {
        self.spool.directory()
    }

    /// Returns the part of the spool for one branch.
    #[must_use]
    pub fn branch_spool(&self, branch: Branch) -> BranchSpool {
        self.spool.branch(&self.identity, branch)
    }

    /// Returns the branches in the spool.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn spooled_branches(&self) -> Result<Vec<BranchSpool>> {
        self.spool.branches(&self.identity)
    }

    /// The losses that were declared when the archive was opened.
    #[must_use]
    pub fn gaps(&self) -> &[DeclaredGap] {
        &self.gaps
    }

    /// The WAL that failovers lost.
    pub(crate) fn losses(&self) -> &Losses {
        &self.losses
    }

    /// Returns the time of the last stored commit of a branch in the ranges before an LSN.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn last_commit(&self, branch: Branch, before: Lsn) -> Result<Option<PgTimestamp>> {
        let ranges = self.catalog.ranges(branch, Lsn::ZERO, before)?;
        Ok(ranges.iter().filter_map(|range| range.max_time).max())
    }

    /// Returns the WAL of a branch that the repository holds without a gap. It begins at the
    /// branch's newest backup, or without a backup at the first archived byte. A declared loss does
    /// not count as a gap, because the archive continues after it.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn stored(&self, branch: Branch) -> Result<Option<Coverage>> {
        let ranges = self.catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?;
        let gaps = self.gaps.iter().filter(|gap| gap.branch == branch);
        let lost: Vec<(Lsn, Lsn)> = gaps.map(|gap| (gap.from_lsn, gap.to_lsn)).collect();
        let first = ranges.first().map(|range| range.start_lsn);
        let backups = self.catalog.backups()?;
        let backup = backups
            .iter()
            .rev()
            .map(|backup| (backup.branch, backup.start_lsn))
            .find(|backup| backup.0 == branch && first.is_some_and(|first| backup.1 >= first));
        let size = self.identity.segment_size;
        let spooled = self.branch_spool(branch).segments()?;
        let open = spooled.open.map(|(segment, _)| segment);
        let spooled = spooled.complete.first().copied().into_iter().chain(open);
        let spooled = spooled.min().map(|segment| segment.start_lsn(size));
        let (stored, forked) = match backup {
            Some((_, start_lsn)) => (Some(start_lsn), None),
            None => (first, self.forked(branch)?),
        };
        let Some(begin) = coverage_begin(stored, spooled, forked, &lost) else {
            return Ok(None);
        };
        let mut coverage = Coverage::up_to(begin);
        for range in &ranges {
            coverage.add(range.start_lsn, range.end_lsn);
        }
        // Expired WAL was stored before, so the server need not send it again.
        let expired = self.catalog.expired()?.wal(branch);
        for (from_lsn, to_lsn) in lost.into_iter().chain(expired.iter()) {
            coverage.add(from_lsn, to_lsn);
        }
        if let Some(recorded) = self.recorded(branch)
            && spooled.is_none_or(|spooled| recorded <= spooled)
        {
            coverage.add(coverage.end(), recorded);
        }
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        for range in ranges {
            if range.kind == WalRangeKind::Tail {
                let known = tails.entry((branch, range.segment)).or_default();
                if !known
                    .iter()
                    .any(|tail| (tail.start_lsn, tail.end_lsn) == (range.start_lsn, range.end_lsn))
                {
                    known.push(range);
                }
            }
        }
        Ok(Some(coverage))
    }

    /// Returns the end of a branch's WAL in the repository according to the spool's record. `None`
    /// unless the repository is offline.
    fn recorded(&self, branch: Branch) -> Option<Lsn> {
        let record = self.away.as_ref()?.record.as_ref()?;
        (record.branch == branch).then_some(record.end_lsn)
    }

    /// Removes a sealed segment from the spool. If the spool has no durable WAL after it on the
    /// branch that is streamed, the end of the archive is recorded first.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`] from the spool's disk. The file then stays.
    pub fn remove_spooled(&self, branch: Branch, segment: SegmentNo) -> Result<()> {
        let _alone = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        let spool = self.branch_spool(branch);
        let path = spool.path(segment);
        let reached = CrashPoint::SpoolRemovalDue.reach();
        reached.map_err(Error::io("remove", &path))?;
        let left = spool.segments()?;
        let positions = self.progress.positions();
        let end_lsn = segment.end_lsn(self.identity.segment_size);
        // An open file without durable WAL may be empty after a crash. It would not show where the
        // archive ends.
        if (left.open.is_none() || positions.flushed() <= end_lsn)
            && left.complete == [segment]
            && branch == positions.branch()
            && positions.stored_on(branch) >= end_lsn
        {
            self.spool.put_record(&SpoolRecord {
                cluster: self.cluster.clone(),
                branch,
                end_lsn,
            })?;
            let reached = CrashPoint::SpoolPositionRecorded.reach();
            reached.map_err(Error::io("remove", &path))?;
        }
        spool.remove(segment)?;
        let reached = CrashPoint::SpoolFileRemoved.reach();
        reached.map_err(Error::io("remove", &path))
    }

    /// Returns the start of the segment in which a branch left its parent, if WAL of an ancestor is
    /// archived.
    fn forked(&self, branch: Branch) -> Result<Option<Lsn>> {
        let Some(history) = self.history(branch)? else {
            return Ok(None);
        };
        let is_ancestor =
            |known: &Branch| known.timeline != branch.timeline && history.names(known.timeline);
        let spooled = self.spooled_branches()?;
        let spooled = spooled.iter().map(BranchSpool::branch);
        let lost = self.gaps.iter().map(|gap| gap.branch);
        let mut is_held = spooled.chain(lost).any(|known| is_ancestor(&known));
        for (known, _, _) in self.catalog.branches()? {
            is_held = is_held
                || (is_ancestor(&known)
                    && !self.catalog.ranges(known, Lsn::ZERO, Lsn::MAX)?.is_empty());
        }
        let last = history.ancestors.last().filter(|_| is_held);
        Ok(last.map(|last| {
            last.switch_lsn
                .align_down(self.identity.segment_size.bytes())
        }))
    }

    /// Returns the end of each branch in the archive.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`].
    pub fn held(&self) -> Result<Vec<Held>> {
        let mut held: BTreeMap<Branch, Lsn> = BTreeMap::new();
        let archived = self.catalog.branches()?.into_iter().map(|known| known.0);
        for branch in archived.chain(self.gaps.iter().map(|gap| gap.branch)) {
            if let Some(stored) = self.stored(branch)? {
                held.insert(branch, stored.end());
            }
        }
        for spool in self.spooled_branches()? {
            if let Some(end) = spool.end_lsn()? {
                let known = held.entry(spool.branch()).or_default();
                *known = end.max(*known);
            }
        }
        if let Some(record) = self.away.as_ref().and_then(|away| away.record.as_ref()) {
            let known = held.entry(record.branch).or_default();
            *known = record.end_lsn.max(*known);
        }
        Ok(held
            .into_iter()
            .map(|(branch, end_lsn)| Held { branch, end_lsn })
            .collect())
    }

    /// Returns the segment that is open at `end_lsn`, the end of the archive. If the repository
    /// already holds all WAL of the spool's older `.partial`, verifies the file against it and
    /// deletes the file.
    ///
    /// # Errors
    /// [`intake::Error::Divergence`] if they differ; [`Error::Io`], [`Error::Repository`].
    pub fn open_segment(&self, spool: &BranchSpool, end_lsn: Lsn) -> Result<SegmentNo> {
        let size = self.identity.segment_size;
        let open = size.segment_of(end_lsn);
        let Some((partial, length)) = spool.segments()?.open else {
            return Ok(open);
        };
        let file_end = partial.start_lsn(size).add(length);
        if is_still_open(partial, file_end, end_lsn, size) {
            return Ok(partial);
        }
        let ours = spool.read(partial)?.unwrap_or_default();
        let name = spool.name(partial);
        let key = ObjectKey::Segment(self.identity.system_identifier, spool.branch(), name);
        // A segment that ends in a declared loss is never sealed. The repository holds the WAL
        // before the loss as tails.
        let sealed = match self.repository.head(&key)? {
            Some(_) => self.read_object(&key)?,
            None => self.read_tails(spool.branch(), partial)?,
        };
        if sealed.len() < ours.len() {
            return Err(Error::SpoolHole {
                path: spool.directory().to_path_buf(),
                missing: name,
            });
        }
        if let Some(index) = ours.iter().zip(&sealed).position(|(ours, new)| ours != new) {
            return Err(Error::Wal(intake::Error::Divergence {
                branch: spool.branch(),
                lsn: partial.start_lsn(size).add(index as u64),
                from: "the spool",
                ours: format!("{key} in {}", self.repository.url()),
            }));
        }
        spool.remove_partial(partial)?;
        Ok(open)
    }

    /// Stores the branch's history file in the repository, twice, before any of the branch's WAL.
    ///
    /// # Errors
    /// [`Error::Repository`], [`Error::Io`].
    pub fn store_history(&self, branch: Branch) -> Result<()> {
        let mut known = self
            .histories
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.contains(&branch) {
            return Ok(());
        }
        let content = self.branch_spool(branch).history()?;
        if let Some(content) = &content {
            self.check_before_put()?;
            // An archive that begins on this timeline did not follow the server to it.
            if !known.is_empty() {
                self.record_failover(branch, content)?;
            }
            self.repository
                .put_history(self.identity.system_identifier, branch, content)?;
        }
        self.catalog.put_branch(branch, content.as_deref())?;
        known.insert(branch);
        Ok(())
    }

    /// Stores a sealed range, reads it back, compares it with the WAL that it was made from, and
    /// enters it in the catalog.
    ///
    /// # Errors
    /// [`intake::Error::Divergence`] if the repository has other WAL under this name;
    /// [`Error::Repository`].
    pub fn store_wal(
        &self,
        header: &SealedHeader,
        object: &[u8],
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
        source: &WalSource<'_>,
    ) -> Result<WalRange> {
        self.check_before_put()?;
        let stored_bytes = put_wal(&self.repository, header, object, source)
            .inspect_err(|_| self.prove_alone())?;
        self.check_place(header)?;
        let (kind, stored, cataloged) = if header.is_whole_segment() {
            let points = (CrashPoint::SealStored, CrashPoint::SealCataloged);
            (WalRangeKind::Sealed, points.0, points.1)
        } else {
            let points = (CrashPoint::TailStored, CrashPoint::TailCataloged);
            (WalRangeKind::Tail, points.0, points.1)
        };
        let failed = |error| repository::Error::store("catalog", source.path)(error);
        stored.reach().map_err(failed)?;
        let range = WalRange::of_summary(header, kind, stored_bytes, summary, proven);
        self.catalog.put_range(&range, summary)?;
        if kind == WalRangeKind::Sealed {
            self.loss_record.note_newest(&self.catalog.loss_of(&range));
        }
        cataloged.reach().map_err(failed)?;
        ClusterStatus::count(&self.status.wal_stored_bytes, stored_bytes);
        Ok(range)
    }

    /// Returns the sealed range of a segment from the catalog. `None` if the segment is not sealed.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn sealed_range(&self, branch: Branch, segment: SegmentNo) -> Result<Option<WalRange>> {
        let size = self.identity.segment_size;
        let ranges = self
            .catalog
            .ranges(branch, segment.start_lsn(size), segment.end_lsn(size))?;
        Ok(ranges
            .into_iter()
            .find(|range| range.kind == WalRangeKind::Sealed && range.segment == segment))
    }

    /// Records that a tail is in the repository. Deletes the tail again if its segment was sealed
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn note_tail(&self, tail: WalRange) -> Result<()> {
        let place = (tail.branch, tail.segment);
        let sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        if sealed.contains(&place) {
            drop(sealed);
            return self.remove_tail(&tail.key(&self.cluster));
        }
        self.tails
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(place)
            .or_default()
            .push(tail);
        Ok(())
    }

    /// Returns true if the segment was sealed since the start, so that its tails are no longer
    /// needed.
    #[must_use]
    pub fn is_sealed(&self, branch: Branch, segment: SegmentNo) -> bool {
        self.sealed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&(branch, segment))
    }

    /// Records that a segment is sealed, stored and verified, and removes its tails.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn note_sealed(&self, branch: Branch, segment: SegmentNo) -> Result<()> {
        {
            let mut sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
            sealed.insert((branch, segment));
            while sealed.len() > SEALED_REMEMBERED_MAX {
                sealed.pop_first();
            }
        }
        let place = (branch, segment);
        let known = || self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tails = known().remove(&place).unwrap_or_default();
        while let Some(tail) = tails.last() {
            if let Err(error) = self.remove_tail(&tail.key(&self.cluster)) {
                // Keep the remaining tails in the list, so that the next attempt removes them.
                known().entry(place).or_default().append(&mut tails);
                return Err(error);
            }
            tails.pop();
        }
        Ok(())
    }
}
