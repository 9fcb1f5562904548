//! Checks that the repository still holds what was archived there: the newest segment and tail
//! before anything counts as stored, and the other objects from time to time.
//!
//! The two kinds of loss have different consequences:
//! - If the newest sealed segment is missing, or the newest tail after it, the place is an older
//!   state of the repository (a mounted copy, a snapshot). Nothing is stored there, because it
//!   would be missing in the right repository. WAL waits in the spool until the right repository
//!   is back or an operator accepts the loss.
//! - If any other object is missing, archiving continues. The loss is reported until the objects
//!   are back or the loss is accepted.
//!
//! Invariant: a loss is recorded ([`LossRecord`]) before the catalog forgets the objects. If the
//! record cannot be written, for example on a full disk, the loss is only logged.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use catalog::{Catalog, Guard, RefreshReport};
use repository::{
    Error as StoreError, Loss, LossRecord, Missing, RecordedLosses, Repository, WalRange,
    expire::Intervals, name_losses,
};
use status::cluster_status::ClusterStatus;
use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, ObjectKey, SealedHeader, SegmentNo, WalIdentity,
};

use super::{
    archive::Archive,
    holes::{self, Found},
};
use crate::{error::Result, spool::Spool};

/// The number of segments, of backups besides the newest one, of parts of the newest backup and of
/// parts of the other backups, whose presence is checked in a bucket once a minute. Each check is a
/// HEAD request.
const BUCKET_SAMPLES: usize = 4;
/// The same numbers for a folder, where the check is made once a second and costs no money.
const FOLDER_SAMPLES: usize = 32;
/// The number of the last accepted losses whose objects are checked to be back.
const ACCEPTED_SAMPLES: usize = 4;
/// The number of checks of a folder between two checks of its identity.
const CHECKS_PER_IDENTITY: u64 = 5;
/// After a bucket was found to hold the newest objects, a stored tail does not cause another check
/// for this time.
const NEWEST_INTERVAL: Duration = Duration::from_secs(10);

/// The knowledge of the caller of [`refresh`], and what it does with missing objects.
pub(super) struct Reader<'a> {
    /// Returns true if the WAL of a missing range is in the spool.
    pub(super) is_spooled: &'a dyn Fn(&WalRange) -> bool,
    /// True if the place is known to be the one that held the newest WAL.
    pub(super) is_same_place: bool,
    /// Receives the missing objects before they are recorded, and whether a place that is away may
    /// hold them.
    pub(super) missing: &'a dyn Fn(&[Loss], bool) -> repository::Result<()>,
}

/// Updates the catalog to match the repository. Records what is missing first.
///
/// # Errors
/// [`StoreError::OlderState`] if the newest segment or tail is missing; then the catalog forgets
/// nothing.
pub(super) fn refresh(
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
    reader: &Reader<'_>,
) -> repository::Result<RefreshReport> {
    let report = catalog.refresh_guarded(
        repository,
        &Guard {
            is_spooled: reader.is_spooled,
            is_same_place: reader.is_same_place,
            missing: &|missing| {
                let missing = losses.without_accepted(missing)?;
                // A place that is away may hold the missing objects.
                let is_unproved = repository.is_partly_away();
                (reader.missing)(&missing.losses, is_unproved)?;
                if is_unproved {
                    if let Err(error) = losses.add_unproved(&missing.losses) {
                        not_recorded(&missing.losses, &error);
                    }
                    return Ok(());
                }
                if let Some(error) = missing.older_state(repository) {
                    return Err(error);
                }
                if let Err(error) = losses.add(&missing.losses) {
                    // A full disk must not keep WAL out of the repository.
                    not_recorded(&missing.losses, &error);
                }
                Ok(())
            },
        },
    )?;
    // Now the catalog contains what is back.
    if let Err(error) = losses.keep(|loss| still_missing(catalog, repository, loss)) {
        tracing::error!(event = "loss_not_recorded", %error, "the record of lost objects is not updated");
    }
    Ok(report)
}

fn not_recorded(losses: &[Loss], error: &StoreError) {
    tracing::error!(
        event = "loss_not_recorded", %error,
        "objects are missing in the repository: {}", name_losses(losses)
    );
}

/// Reports again what an earlier run found missing while a place was away, and what is still
/// missing. The catalog has forgotten it.
pub(super) fn resume_unproved(
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
    status: &ClusterStatus,
) -> repository::Result<()> {
    for loss in losses.unproved()? {
        let mut left = still_missing(catalog, repository, &loss)?;
        let known = status.facts().unproved;
        left.retain(|loss| !known.contains(loss));
        holes::note_unproved(status, &left);
    }
    Ok(())
}

/// Checks that the repository holds the segment at which the archive ended when the spool was
/// empty, and the newest segment that this host stored. A catalog that was rebuilt does not know
/// these segments if the repository lacks them; the spool's records do. Records what is missing, so
/// that an operator can accept it.
///
/// # Errors
/// [`StoreError::OlderState`] if the repository does not hold one of them.
pub(super) fn check_position(
    spool: &Spool,
    identity: &WalIdentity,
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
) -> Result<()> {
    let system = identity.system_identifier;
    let empty = spool.record()?.map(|record| {
        let is_same = record.cluster.system_identifier == system;
        (is_same, record.branch, record.end_lsn)
    });
    let stored = losses.newest().and_then(|newest| {
        let (branch, _, end_lsn) = newest.wal()?;
        Some((newest.system() == Some(system), branch, end_lsn))
    });
    for (is_same, branch, end_lsn) in [empty, stored].into_iter().flatten() {
        if is_same && end_lsn > Lsn::ZERO {
            check_end(
                spool,
                identity,
                catalog,
                repository,
                losses,
                (branch, end_lsn),
            )?;
        }
    }
    Ok(())
}

/// Checks that the repository holds the segment that ends at `end_lsn`.
fn check_end(
    spool: &Spool,
    identity: &WalIdentity,
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
    (branch, end_lsn): (Branch, Lsn),
) -> Result<()> {
    let (system, size) = (identity.system_identifier, identity.segment_size);
    let start_lsn = size.segment_of(Lsn(end_lsn.0 - 1)).start_lsn(size);
    let newest = catalog.loss(branch, start_lsn, end_lsn);
    let key = newest.key();
    let is_held = match repository.head(&key) {
        Err(error) if error.is_transient() && repository.is_partly_away() => true,
        found => found?.is_some(),
    };
    if is_held || catalog.expired()?.hides(&key, size) {
        return Ok(());
    }
    let is_declared = repository
        .gaps(system)?
        .iter()
        .any(|gap| gap.branch == branch && gap.from_lsn <= start_lsn && end_lsn <= gap.to_lsn);
    if is_declared
        || spool
            .branch(identity, branch)
            .path(size.segment_of(start_lsn))
            .exists()
    {
        return Ok(());
    }
    let held = catalog.ranges(branch, Lsn::ZERO, start_lsn)?;
    let from_lsn = held.last().map_or(start_lsn, |last| last.end_lsn);
    let from_lsn = from_lsn.align_down(size.bytes()).min(start_lsn);
    let missing = Missing {
        losses: vec![catalog.loss(branch, from_lsn, end_lsn)],
        newest: Some(newest),
    };
    let missing = losses.without_accepted(&missing)?;
    let Some(error) = missing.older_state(repository) else {
        return Ok(());
    };
    if let Err(error) = losses.add(&missing.losses) {
        tracing::error!(event = "loss_not_recorded", %error, "the record of lost objects is not updated");
    }
    Err(error.into())
}

/// Records what was missing while a place was away, and is still missing although all places
/// answer. What the spool has is stored again.
pub(super) fn record_unproved(
    spool: &Spool,
    identity: &WalIdentity,
    catalog: &Catalog,
    repository: &Repository,
    (losses, unproved): (&LossRecord, Vec<Loss>),
) -> repository::Result<()> {
    let mut lost = Vec::new();
    for loss in unproved {
        for left in still_missing(catalog, repository, &loss)? {
            lost.extend(holes::not_spooled(left, spool, identity));
        }
    }
    let lost = losses.without_accepted(&Missing {
        losses: lost,
        newest: None,
    })?;
    losses.add(&lost.losses)?;
    losses.end_unproved()
}

impl Archive {
    /// Updates the catalog to match the repository. Records what is missing first.
    ///
    /// # Errors
    /// [`StoreError::OlderState`]; then the stages start again without the repository.
    pub fn refresh(&self) -> repository::Result<RefreshReport> {
        let is_spooled = holes::is_spooled(self.spool(), self.identity());
        let refreshed = refresh(
            self.catalog(),
            self.repository(),
            &self.loss_record,
            &Reader {
                // The stages store this WAL again when they start. Other missing WAL is lost.
                is_spooled: &|range| {
                    is_spooled(range) && self.note_hole(range, Found::Absent).unwrap_or(false)
                },
                is_same_place: holes::is_same_place(self.settings(), self.status()),
                missing: &|losses, is_unproved| {
                    if is_unproved {
                        holes::note_unproved(self.status(), losses);
                    }
                    losses
                        .iter()
                        .try_for_each(|loss| self.note_missing(loss, is_unproved, false).map(drop))
                },
            },
        );
        if refreshed.as_ref().is_err_and(StoreError::is_gone) {
            self.doubt();
        }
        refreshed
    }

    /// Returns the backups of the catalog that the place holds.
    pub(crate) fn held_backups(&self) -> repository::Result<Vec<BackupInfo>> {
        let mut backups = self.catalog().backups()?;
        let missing = self.missing();
        backups.retain(|backup| !missing.iter().any(|loss| loss.backup() == Some(&backup.id)));
        Ok(backups)
    }

    /// Returns the backups that cannot be restored because an object of them is lost.
    pub(crate) fn lost_backups(&self) -> BTreeSet<BackupId> {
        let lost = self.loss_record.all().unwrap_or_default();
        lost.iter()
            .filter_map(|loss| loss.backup().cloned())
            .collect()
    }

    /// Returns true if the check of an object may be a billed request, because a place is not a
    /// folder.
    pub(crate) fn costs_requests(&self) -> bool {
        let places = self.settings().repository.each();
        places.iter().any(|place| place.url.folder().is_none())
    }

    /// Returns true if an object is proved absent and did not expire. If one of several places is
    /// away, the absence is not proved.
    fn is_absent(&self, key: &ObjectKey) -> repository::Result<bool> {
        Ok(self.find(key)? == Found::Absent)
    }

    /// Makes the stages start again with what the repository holds.
    fn doubt(&self) {
        self.doubted.store(true, Ordering::Release);
    }

    /// Returns true if the repository was found to lack what was archived.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::Acquire)
    }

    /// Checks before an object is stored that the place holds the archive, and not an older state
    /// of it. In a bucket, at most once in [`NEWEST_INTERVAL`].
    pub(super) fn check_before_put(&self) -> repository::Result<()> {
        if self.costs_requests() && self.is_newest_known() {
            return Ok(());
        }
        self.check_newest().map(drop)
    }

    /// Returns true if the newest objects were found within [`NEWEST_INTERVAL`].
    fn is_newest_known(&self) -> bool {
        let checked = self.newest_checked.lock();
        let checked = *checked.unwrap_or_else(PoisonError::into_inner);
        checked.is_some_and(|checked| checked.elapsed() < NEWEST_INTERVAL)
    }

    /// Checks that what was just stored is in the place that holds the archive, and not in an older
    /// copy of it. In a bucket, only the newest objects are checked, after a tail at most once in
    /// [`NEWEST_INTERVAL`].
    ///
    /// The newest objects are checked first, then the stored one: if the place is exchanged between
    /// the upload and either check, one of the two checks fails.
    pub(super) fn check_place(&self, header: &SealedHeader) -> repository::Result<()> {
        let has_price = self.costs_requests();
        if has_price && !header.is_whole_segment() && self.is_newest_known() {
            return Ok(());
        }
        self.check_newest()?;
        let key = header.key();
        // A tail may have been removed because its segment was sealed.
        if !has_price && header.is_whole_segment() && self.is_absent(&key)? {
            return Err(repository::Error::NotFound {
                key: key.to_string(),
                url: self.repository().url(),
            });
        }
        Ok(())
    }

    /// Stores wrapped keys of an encrypted repository again if the place lacks them, and reports
    /// this as an event.
    fn put_back_keys(&self) -> repository::Result<()> {
        for name in self.repository().put_back_keys()? {
            let message =
                format!("{name}: this wrapped data key had been lost; it was stored again");
            tracing::error!(event = "key_put_back", cluster = %self.cluster.cluster, "{message}");
            self.status().note(|facts| facts.repaired.push(message));
        }
        Ok(())
    }

    /// Checks that the place holds the newest segment and the newest tail. Returns the newest
    /// sealed segment of the catalog.
    ///
    /// # Errors
    /// - [`StoreError::OlderState`]; then the stages start again.
    /// - Errors of the requests.
    pub(crate) fn check_newest(&self) -> repository::Result<Option<WalRange>> {
        let asked = Instant::now();
        let sealed = self.catalog().newest_sealed()?;
        self.find_newest(sealed.as_ref())?;
        let checked = self.newest_checked.lock();
        *checked.unwrap_or_else(PoisonError::into_inner) = Some(asked);
        Ok(sealed)
    }

    fn find_newest(&self, sealed: Option<&WalRange>) -> repository::Result<()> {
        let folder = self.folder();
        if let Some(range) = sealed {
            let found = self.find(&range.key(&self.cluster))?;
            if found.is_missing() {
                return self.refuse_older(range, found);
            }
        }
        // The other tails are checked in turn ([`Presence::check`]).
        let branch = self.progress().positions().branch();
        let is_newest = |tail: &&WalRange| {
            let before = sealed.filter(|sealed| sealed.branch == branch);
            tail.branch == branch && before.is_none_or(|sealed| tail.end_lsn > sealed.end_lsn)
        };
        let newest_tail = || {
            let tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
            let of_branch = tails.range((branch, SegmentNo(0))..=(branch, SegmentNo(u64::MAX)));
            of_branch.last()?.1.last().filter(is_newest).cloned()
        };
        let newest = newest_tail();
        if let Some(tail) = &newest {
            let found = self.find(&tail.key(&self.cluster))?;
            // A tail that is no longer the newest one was removed when its segment was sealed.
            if found.is_missing() && newest_tail().as_ref() == Some(tail) {
                return self.refuse_older(tail, found);
            }
        }
        if let Some(newest) = newest.as_ref().or(sealed) {
            self.repository()
                .check_each_place(&newest.key(&self.cluster));
        }
        self.note_folder(folder);
        Ok(())
    }

    /// Returns the tails that this host has stored and that no sealed segment has replaced.
    fn open_tails(&self) -> Vec<WalRange> {
        let tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        tails.values().flatten().cloned().collect()
    }

    /// Returns true if a stored tail is missing although no sealed segment has replaced it, and no
    /// hole is reported for it. Then the catalog has to be updated, which records the loss. The
    /// tail is not checked again.
    fn lacks_tail(&self, tail: &WalRange) -> repository::Result<bool> {
        let found = self.find(&tail.key(&self.cluster))?;
        if !found.is_missing() {
            return Ok(false);
        }
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_open = false;
        for known in tails.values_mut() {
            let count = known.len();
            known.retain(|known| known != tail);
            is_open |= known.len() < count;
        }
        drop(tails);
        Ok(is_open && !self.note_hole(tail, found)? && found == Found::Absent)
    }

    /// Makes the stages start again, because a place lacks the newest segment or tail. Returns the
    /// error as `Err`, unless another host has replaced the tail by its sealed segment.
    fn refuse_older(&self, range: &WalRange, found: Found) -> repository::Result<()> {
        self.doubt();
        let newest = self.catalog().loss_of(range);
        if let Some(segment) = newest.replaced_by()
            && !self.find(&segment)?.is_missing()
        {
            return Ok(());
        }
        self.note_hole(range, found)?;
        if found == Found::Unproved || self.is_stored_again(range) {
            return Err(StoreError::NotFound {
                key: newest.key().to_string(),
                url: self.repository().url(),
            });
        }
        let missing = Missing {
            losses: vec![newest.clone()],
            newest: Some(newest),
        };
        let older = missing.older_state(self.repository());
        older.map_or(Ok(()), Err)
    }
}

/// The position of the sample that was checked last.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    segment: Option<WalRange>,
    /// The number of backups that were checked.
    backups: usize,
    /// The number of tails that were checked.
    tails: usize,
    /// The numbers of parts that were checked: of the newest backup, and of the others.
    parts: [usize; 2],
    /// The number of checks so far.
    checks: u64,
}

impl Presence {
    /// Checks the newest segment and tail, the wrapped keys, the history files, the newest backup,
    /// and a sample of the other backups, of the parts of all backups and of the segments. The
    /// samples cover all objects in turn. Stores lost keys and history files again, and records the
    /// loss of any other object.
    ///
    /// # Errors
    /// - [`StoreError::OlderState`].
    /// - Errors of the requests and the catalog.
    pub(super) fn check(&mut self, archive: &Archive, backups: &[BackupInfo]) -> Result<()> {
        let samples = if archive.costs_requests() {
            BUCKET_SAMPLES
        } else {
            FOLDER_SAMPLES
        };
        if let Some(newest) = archive.check_newest()? {
            archive
                .repository()
                .check_each_place(&newest.key(&archive.cluster));
        }
        archive.prove_again();
        archive.put_back_keys()?;
        archive.put_back_histories()?;
        let system = archive.identity().system_identifier;
        let mut lacks = false;
        // The newest backup is checked each time.
        let newest = backups.last().into_iter();
        let others = backups
            .iter()
            .cycle()
            .skip(self.backups % backups.len().max(1));
        for backup in newest.chain(others.take(samples.min(backups.len()))) {
            lacks |= archive.is_absent(&ObjectKey::BackupInfo(system, backup.id.clone()))?;
        }
        self.backups = self.backups.wrapping_add(samples);
        let tails = archive.open_tails();
        let in_turn = tails.iter().cycle().skip(self.tails % tails.len().max(1));
        for tail in in_turn.take(samples.min(tails.len())) {
            lacks |= archive.lacks_tail(tail)?;
        }
        self.tails = self.tails.wrapping_add(samples);
        self.check_parts(archive, backups, samples)?;
        let sample = archive
            .catalog()
            .sealed_after(self.segment.as_ref(), samples)?;
        for range in &sample {
            let found = archive.find(&range.key(&archive.cluster))?;
            lacks |=
                found.is_missing() && !archive.note_hole(range, found)? && found == Found::Absent;
        }
        let is_end = sample.len() < samples;
        self.segment = sample.into_iter().last().filter(|_| !is_end);
        if lacks {
            archive.refresh()?;
        }
        Ok(())
    }

    /// Counts a check. Returns true if it includes the identity, whose objects are listed and read:
    /// each check of a bucket, and every fifth of a folder, which come once a second.
    fn checks_identity(&mut self, archive: &Archive) -> bool {
        self.checks += 1;
        archive.costs_requests() || self.checks % CHECKS_PER_IDENTITY == 1
    }

    /// Checks a sample of the parts of the newest backup, and one of the parts of the others.
    /// Records those that are missing.
    fn check_parts(
        &mut self,
        archive: &Archive,
        backups: &[BackupInfo],
        samples: usize,
    ) -> Result<()> {
        let mut lost = Vec::new();
        let newest = backups.len().saturating_sub(1);
        for (backups, checked) in [&backups[newest..], &backups[..newest]]
            .into_iter()
            .zip(&mut self.parts)
        {
            let count: usize = backups.iter().map(|backup| backup.slices.len() + 1).sum();
            let parts = backups.iter().flat_map(|backup| {
                let slices = backup.slices.iter().map(Some);
                std::iter::once(None)
                    .chain(slices)
                    .map(move |part| (backup, part))
            });
            let parts = parts.cycle().skip(*checked % count.max(1));
            for (backup, part) in parts.take(samples.min(count)) {
                let key = part.map_or_else(|| backup.manifest_key(), |part| backup.slice_key(part));
                if archive.is_absent(&key)? {
                    lost.push(Loss::of_part(backup, key));
                }
            }
            *checked = checked.wrapping_add(samples);
        }
        Ok(archive.loss_record.add(&lost)?)
    }
}

/// Checks the presence of objects, removes from the record what is back, and reports what is
/// missing.
///
/// # Errors
/// Errors of the requests, the catalog and the record.
pub(crate) fn look_for_losses(archive: &Archive, presence: &Mutex<Presence>) -> Result<()> {
    let mut presence = presence.lock().unwrap_or_else(PoisonError::into_inner);
    presence.check(archive, &archive.catalog().backups()?)?;
    if presence.checks_identity(archive) {
        let problem = match archive.repository().identity() {
            Err(error @ StoreError::Damaged { .. }) => Some(error.to_string()),
            identity => identity.map(|_| None)?,
        };
        archive
            .status()
            .note(|facts| facts.identity_problem = problem);
    }
    let losses = archive.loss_record.snapshot();
    let open = losses.open.iter().map(|found| &found.loss);
    let accepted = losses.accepted.iter().rev().take(ACCEPTED_SAMPLES);
    for loss in open.chain(accepted) {
        if is_partly_back(archive, loss)? {
            archive.refresh()?;
            report_losses(archive);
            return Ok(());
        }
    }
    report(archive, losses);
    Ok(())
}

/// Returns true if an object of a loss is in the repository again, or has expired.
fn is_partly_back(archive: &Archive, loss: &Loss) -> Result<bool> {
    let repository = archive.repository();
    if let Loss::Tail { .. } = loss {
        // Its own object, or WAL that the catalog knows: the sealed segment or other tails.
        let left = still_missing(archive.catalog(), repository, loss)?;
        return Ok(left.is_empty() || repository.holds_one_of([loss.key()])?);
    }
    // The last segment may be back before the first one.
    if repository.holds_one_of([loss.key(), loss.last_key()])? {
        return Ok(true);
    }
    let size = archive.identity().segment_size;
    Ok(archive.catalog().expired()?.hides(&loss.key(), size))
}

/// Reports what is missing and was not accepted.
pub(crate) fn report_losses(archive: &Archive) {
    report(archive, archive.loss_record.snapshot());
}

fn report(archive: &Archive, losses: RecordedLosses) {
    archive.note_filled();
    // The stages read a declared gap only when they start. Until then, the loss is shown.
    let is_current = losses.acceptances == Some(archive.accepted);
    let is_read = losses.acceptances.is_some();
    archive.status().note(|facts| {
        facts.losses_problem = losses.problem;
        if is_current {
            facts.losses = losses.open;
        }
    });
    if is_read && !is_current {
        archive.doubt();
    }
}

/// Returns the part of a loss that the repository still lacks, according to a catalog that was just
/// updated. What has expired is no longer missing.
fn still_missing(
    catalog: &Catalog,
    repository: &Repository,
    loss: &Loss,
) -> repository::Result<Vec<Loss>> {
    let expired = catalog.expired()?;
    let is_missing = match loss {
        Loss::Wal {
            branch,
            from_lsn,
            to_lsn,
            ..
        }
        | Loss::Tail {
            branch,
            from_lsn,
            to_lsn,
            ..
        } => {
            let held = catalog.ranges(*branch, *from_lsn, *to_lsn)?;
            let held = held.iter().map(|range| (range.start_lsn, range.end_lsn));
            let held: Intervals = held.collect();
            let left = held.missing_in(*from_lsn, *to_lsn).into_iter();
            let left = left.flat_map(|(from, to)| expired.not_expired(*branch, from, to));
            if let Loss::Wal { .. } = loss {
                return Ok(left
                    .map(|(from, to)| catalog.loss(*branch, from, to))
                    .collect());
            }
            left.count() > 0
        }
        Loss::Backup { id, .. } => {
            let backups = catalog.backups()?;
            !backups.iter().any(|backup| backup.id == *id) && !expired.backups().contains(id)
        }
        Loss::BackupPart { id, key } => {
            !expired.backups().contains(id) && repository.head(key)?.is_none()
        }
    };
    Ok(is_missing.then(|| loss.clone()).into_iter().collect())
}
