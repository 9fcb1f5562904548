//! [`Archive`]: what the stages share for one cluster: where WAL is kept, who it belongs to, what is known of it.
//!
//! Invariant: every object of this cluster's WAL is put through [`Archive::store_wal`], which never lets other bytes take
//! the place of archived ones and calls nothing stored that was not read back.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use catalog::Catalog;
use intake::stored::{WalSource, put_wal};
use repository::{
    ClusterIdentity, CrashPoint, Repository, WalRange, WalRangeKind, config::ClusterSettings,
};
use wal_format::{
    Branch, DeclaredGap, Lsn, ObjectKey, PgTimestamp, SealedHeader, SegmentNo, SegmentSummary,
    WalIdentity,
};

use super::{fork::Losses, histories, room::Room, start::Held};
use crate::{
    cluster_status::ClusterStatus,
    core::{
        cursor::is_still_open,
        positions::{Coverage, coverage_begin},
    },
    error::{Error, Result},
    spool::{BranchSpool, Spool, SpoolRecord},
};

/// Segments remembered as sealed: a tail in flight is of the newest one or two, the rest is slack.
const SEALED_REMEMBERED_MAX: usize = 256;

/// What the stages of one cluster share.
#[derive(Debug)]
pub struct Archive {
    settings: ClusterSettings,
    pub(crate) cluster: ClusterIdentity,
    identity: WalIdentity,
    spool: Arc<Spool>,
    repository: Repository,
    catalog: Catalog,
    status: Arc<ClusterStatus>,
    room: Room,
    /// Why the repository cannot be asked, and what the spool says in its place; `None` in ordinary
    /// times.
    away: Option<Away>,
    /// Held while a file leaves the spool.
    leaving: Mutex<()>,
    /// Tails in the repository, by segment, that the sealed segment will replace.
    pub(super) tails: Mutex<BTreeMap<(Branch, SegmentNo), Vec<WalRange>>>,
    /// Segments sealed since the start, so that a tail in flight does not outlive its segment.
    sealed: Mutex<BTreeSet<(Branch, SegmentNo)>>,
    /// Ranges that were declared lost: nobody has them, and nothing waits for them.
    gaps: Vec<DeclaredGap>,
    /// What failovers lost.
    losses: Losses,
    /// Branches whose history is in the repository.
    histories: Mutex<BTreeSet<Branch>>,
    /// Held while history files that the repository lacks are stored again.
    pub(super) putting_back: Mutex<()>,
    /// [`Facts::repository_returns`](crate::cluster_status::Facts) when the repository was read.
    read_at_return: u64,
}

/// A start at which the repository does not answer.
#[derive(Clone, Debug, Default)]
pub struct Away {
    /// What the spool knows of an archive that it holds nothing of.
    pub record: Option<SpoolRecord>,
}

impl Archive {
    /// Takes the parts together; the catalog is brought up to date with the repository, unless that is `away`: then the
    /// catalog counts as it is, which is never more than what is stored.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn open(
        settings: ClusterSettings,
        cluster: ClusterIdentity,
        spool: Arc<Spool>,
        repository: Repository,
        catalog: Catalog,
        status: Arc<ClusterStatus>,
        away: Option<Away>,
    ) -> Result<Self> {
        let identity = WalIdentity {
            version: cluster.postgresql_major,
            system_identifier: cluster.system_identifier,
            segment_size: cluster.wal_segment_size,
        };
        let system = identity.system_identifier;
        let read_at_return = status.facts().repository_returns;
        let (mut gaps, mut losses) = (Vec::new(), Losses::default());
        let mut lost_histories = Vec::new();
        if away.is_none() {
            histories::put_back(&spool, &repository, &identity)?;
            let report = catalog.refresh(&repository)?;
            lost_histories = report.lost_histories;
            gaps = repository.gaps(system)?;
            losses = Losses::of(repository.failover_losses(system)?);
        }
        let branches = catalog.branches()?;
        if away.is_none() {
            let copies = repository.history_copies(system)?;
            for (branch, history, content) in &branches {
                let is_lost = lost_histories.iter().any(|lost| lost.branch == *branch)
                    || copies.get(branch).is_none_or(|copies| *copies < 2);
                if history.is_some() && is_lost {
                    tracing::warn!(
                        event = "history_put_back", %branch,
                        "a history file is missing in the repository and is stored again"
                    );
                    repository.put_history(system, *branch, content)?;
                }
            }
        }
        let histories = branches.into_iter().map(|(branch, ..)| branch).collect();
        Ok(Self {
            room: Room::new(&settings, identity.segment_size),
            settings,
            cluster,
            identity,
            spool,
            repository,
            catalog,
            status,
            away,
            leaving: Mutex::default(),
            tails: Mutex::default(),
            sealed: Mutex::default(),
            gaps,
            losses,
            histories: Mutex::new(histories),
            putting_back: Mutex::default(),
            read_at_return,
        })
    }

    /// The cluster's settings.
    #[must_use]
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// Whose WAL this is.
    #[must_use]
    pub fn identity(&self) -> &WalIdentity {
        &self.identity
    }

    /// The repository.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The catalog.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Returns true if the repository could not be asked at the start: nothing is sent to it before
    /// it was.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// Returns true if the repository was another place meanwhile: what it holds may be other than
    /// what is known here.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        self.status.facts().repository_returns > self.read_at_return
    }

    /// Checks whether the spool may grow.
    #[must_use]
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// What is known of the cluster.
    #[must_use]
    pub fn status(&self) -> &Arc<ClusterStatus> {
        &self.status
    }

    /// Where the cluster's spool is.
    #[must_use]
    pub fn spool_directory(&self) -> &Path {
        self.spool.directory()
    }

    /// One branch's part of the spool.
    #[must_use]
    pub fn branch_spool(&self, branch: Branch) -> BranchSpool {
        self.spool.branch(&self.identity, branch)
    }

    /// The branches the spool holds.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn spooled_branches(&self) -> Result<Vec<BranchSpool>> {
        self.spool.branches(&self.identity)
    }

    /// What was declared lost when the archive was opened.
    #[must_use]
    pub fn gaps(&self) -> &[DeclaredGap] {
        &self.gaps
    }

    /// What failovers lost.
    pub(crate) fn losses(&self) -> &Losses {
        &self.losses
    }

    /// The time of the last commit that is stored of a branch before an LSN.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn last_commit(&self, branch: Branch, before: Lsn) -> Result<Option<PgTimestamp>> {
        let ranges = self.catalog.ranges(branch, Lsn::ZERO, before)?;
        Ok(ranges.iter().filter_map(|range| range.max_time).max())
    }

    /// What the repository holds of a branch without a gap, from its newest backup or else from its first byte on. What
    /// was declared lost is no gap: the archive goes on behind it.
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
        // What expired was stored: nobody has to send it again.
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

    /// The end of what the repository held of a branch when the spool held no WAL, where only the spool can be asked.
    fn recorded(&self, branch: Branch) -> Option<Lsn> {
        let record = self.away.as_ref()?.record.as_ref()?;
        (record.branch == branch).then_some(record.end_lsn)
    }

    /// Removes a sealed segment from the spool. If nothing that is durable in the spool follows it
    /// on the branch that is streamed, the end of the archive is recorded first.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`] from the spool's disk; then the file stays.
    pub fn remove_spooled(&self, branch: Branch, segment: SegmentNo) -> Result<()> {
        let _alone = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        let spool = self.branch_spool(branch);
        let path = spool.path(segment);
        let reached = CrashPoint::SpoolRemovalDue.reach();
        reached.map_err(Error::io("remove", &path))?;
        let left = spool.segments()?;
        let positions = self.status.progress().positions();
        let end_lsn = segment.end_lsn(self.identity.segment_size);
        // An open file of which nothing is durable may be empty after a crash, and then says
        // nothing of the archive.
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

    /// The start of the segment in which a branch left its ancestors, when WAL of one of them is archived.
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

    /// What the archive holds, branch by branch.
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

    /// The segment that is open at `end_lsn`, the end of what the archive holds. An older `.partial` in the spool, which
    /// the repository has whole by now, is compared with it and removed.
    ///
    /// # Errors
    /// [`intake::Error::Divergence`] when they differ; [`Error::Io`], [`Error::Repository`].
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
        // What lies before a range that was declared lost is never sealed: the repository has it as tails.
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

    /// Puts the branch's history into the repository, twice, before any of its WAL.
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
            self.repository
                .put_history(self.identity.system_identifier, branch, content)?;
        }
        self.catalog.put_branch(branch, content.as_deref())?;
        known.insert(branch);
        Ok(())
    }

    /// Puts a sealed range, reads it back, compares it with the WAL it was made of, and enters it in the catalog.
    ///
    /// # Errors
    /// [`intake::Error::Divergence`] when the repository has other WAL under this name; [`Error::Repository`].
    pub fn store_wal(
        &self,
        header: &SealedHeader,
        object: &[u8],
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
        source: &WalSource<'_>,
    ) -> Result<WalRange> {
        let stored_bytes = put_wal(&self.repository, header, object, source)?;
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
        cataloged.reach().map_err(failed)?;
        ClusterStatus::count(&self.status.wal_stored_bytes, stored_bytes);
        Ok(range)
    }

    /// Checks whether the segment is sealed in the repository, as far as the catalog knows.
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

    /// A tail is in the repository; when its segment was sealed meanwhile it goes again.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub fn note_tail(&self, tail: WalRange) -> Result<()> {
        let place = (tail.branch, tail.segment);
        let sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        if sealed.contains(&place) {
            drop(sealed);
            return self.delete_tail(&tail);
        }
        self.tails
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(place)
            .or_default()
            .push(tail);
        Ok(())
    }

    /// Returns true if a segment was sealed since the start: its tails are of no use any more.
    #[must_use]
    pub fn is_sealed(&self, branch: Branch, segment: SegmentNo) -> bool {
        self.sealed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&(branch, segment))
    }

    /// A segment is sealed, stored and verified: its tails are superfluous.
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
            if let Err(error) = self.delete_tail(tail) {
                // The next attempt removes them.
                known().entry(place).or_default().append(&mut tails);
                return Err(error);
            }
            tails.pop();
        }
        Ok(())
    }

    fn delete_tail(&self, tail: &WalRange) -> Result<()> {
        if !self.remove_tail_object(&tail.key(&self.cluster))? {
            return Ok(());
        }
        let reached = CrashPoint::TailRemoved.reach();
        reached.map_err(repository::Error::store("remove", self.spool_directory()))?;
        self.catalog.remove_range(tail)?;
        Ok(())
    }
}
