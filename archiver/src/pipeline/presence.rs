//! Checks that the repository still holds what was archived there: the newest segment and tail
//! before anything counts as stored, and the other objects from time to time.
//!
//! The two kinds of loss have different consequences:
//! - If the newest sealed segment is missing, the place is an older state of the repository (a
//!   mounted copy, a snapshot). Nothing is stored there, because it would be missing in the right
//!   repository. WAL waits in the spool until the right repository is back or an operator accepts
//!   the loss.
//! - If any other object is missing, archiving continues. The loss is reported until the objects
//!   are back or the loss is accepted.
//!
//! Invariant: a loss is recorded ([`LossRecord`]) before the catalog forgets the objects. If the
//! record cannot be written, for example on a full disk, the loss is only logged.

use std::{
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use catalog::{Catalog, Guard, RefreshReport};
use repository::{
    Error as StoreError, Loss, LossRecord, Missing, Repository, WalRange, name_losses,
};
use wal_format::{BackupInfo, Branch, Lsn, ObjectKey, SealedHeader, SegmentNo, WalIdentity};

use super::archive::Archive;
use crate::{
    error::Result,
    spool::{BranchSpool, Spool},
};

/// The number of segments, and of backups besides the newest one, whose presence is checked in a
/// bucket once a minute. Each check is a HEAD request.
const BUCKET_SAMPLES: usize = 4;
/// The same numbers for a folder, where the check is made once a second and costs no money.
const FOLDER_SAMPLES: usize = 32;
/// After a bucket was found to hold the newest objects, a stored tail does not cause another check
/// for this time.
const NEWEST_INTERVAL: Duration = Duration::from_secs(10);

/// Updates the catalog to match the repository. Records what is missing first.
///
/// # Errors
/// [`StoreError::OlderState`] if the newest segment is missing; then the catalog forgets nothing.
pub(super) fn refresh(
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
    is_spooled: &dyn Fn(&WalRange) -> bool,
) -> repository::Result<RefreshReport> {
    catalog.refresh_guarded(
        repository,
        &Guard {
            is_spooled,
            missing: &|missing| {
                // A place that is away may hold the missing objects.
                if repository.is_partly_away() {
                    return Ok(());
                }
                let missing = losses.without_accepted(missing)?;
                older_state(repository, &missing)?;
                if let Err(error) = losses.add(&missing.losses) {
                    // A full disk must not keep WAL out of the repository.
                    tracing::error!(
                        event = "loss_not_recorded", %error,
                        "objects are missing in the repository: {}", name_losses(&missing.losses)
                    );
                }
                Ok(())
            },
        },
    )
}

/// Returns the error of a place that lacks the newest segment as `Err`.
fn older_state(repository: &Repository, missing: &Missing) -> repository::Result<()> {
    match &missing.newest {
        None => Ok(()),
        Some(newest) => Err(StoreError::OlderState {
            url: repository.url(),
            missing: name_losses(&missing.losses),
            newest: Box::new(newest.clone()),
        }),
    }
}

/// Checks that the repository holds the segment at which the archive ended when the spool was
/// empty. A catalog that was rebuilt does not know this segment if the repository lacks it; the
/// spool's record does.
///
/// # Errors
/// [`StoreError::OlderState`] if the repository does not hold the segment.
pub(super) fn check_position(
    spool: &Spool,
    identity: &WalIdentity,
    catalog: &Catalog,
    repository: &Repository,
    losses: &LossRecord,
) -> Result<()> {
    let (system, size) = (identity.system_identifier, identity.segment_size);
    let Some(record) = spool
        .record()?
        .filter(|record| record.cluster.system_identifier == system && record.end_lsn > Lsn::ZERO)
    else {
        return Ok(());
    };
    let (branch, end_lsn) = (record.branch, record.end_lsn);
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
    Ok(older_state(
        repository,
        &losses.without_accepted(&missing)?,
    )?)
}

/// Returns a function that returns true if a segment is complete in the spool.
pub(super) fn is_spooled(spool: &Spool, identity: &WalIdentity) -> impl Fn(&WalRange) -> bool {
    let spool = |branch: Branch| -> BranchSpool { spool.branch(identity, branch) };
    move |range| spool(range.branch).path(range.segment).exists()
}

impl Archive {
    /// Updates the catalog to match the repository. Records what is missing first.
    ///
    /// # Errors
    /// [`StoreError::OlderState`]; then the stages start again without the repository.
    pub fn refresh(&self) -> repository::Result<RefreshReport> {
        let is_spooled = |_: &WalRange| false;
        let refreshed = refresh(
            self.catalog(),
            self.repository(),
            &self.loss_record,
            &is_spooled,
        );
        if refreshed.as_ref().is_err_and(StoreError::is_gone) {
            self.doubt();
        }
        refreshed
    }

    /// Returns true if the check of an object may be a billed request, because a place is not a
    /// folder.
    pub(super) fn costs_requests(&self) -> bool {
        let places = self.settings().repository.each();
        places.iter().any(|place| place.url.folder().is_none())
    }

    /// Returns true if an object is proved absent and did not expire. If one of several places is
    /// away, the absence is not proved.
    fn is_absent(&self, key: &ObjectKey) -> repository::Result<bool> {
        let identity = self.identity();
        let is_one_of_several = self.settings().repository.each().len() > 1;
        let found = match self.repository().head(key) {
            Err(error) if error.is_transient() && is_one_of_several => return Ok(false),
            found => found?,
        };
        if found.is_some() {
            return Ok(false);
        }
        // Another program may have removed the object since the catalog read what expired.
        let expired = self.repository().expired(identity.system_identifier)?;
        Ok(!expired.hides(key, identity.segment_size))
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

    /// Checks that what was just stored is in the place that holds the archive, and not in an older
    /// copy of it. In a bucket, only the newest objects are checked, after a tail at most once in
    /// [`NEWEST_INTERVAL`].
    ///
    /// The newest objects are checked first, then the stored one: if the place is exchanged between
    /// the upload and either check, one of the two checks fails.
    pub(super) fn check_place(&self, header: &SealedHeader) -> repository::Result<()> {
        let checked = || {
            let checked = self.newest_checked.lock();
            checked.unwrap_or_else(PoisonError::into_inner)
        };
        let has_price = self.costs_requests();
        if has_price
            && !header.is_whole_segment()
            && checked().is_some_and(|checked| checked.elapsed() < NEWEST_INTERVAL)
        {
            return Ok(());
        }
        let asked = Instant::now();
        self.check_newest()?;
        *checked() = Some(asked);
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

    /// Checks that the place holds the newest segment and the newest tail.
    ///
    /// # Errors
    /// - [`StoreError::OlderState`] and [`StoreError::NotFound`]; then the stages start again.
    /// - Errors of the requests.
    pub(super) fn check_newest(&self) -> repository::Result<()> {
        let sealed = self.catalog().newest_sealed()?;
        if let Some(range) = &sealed
            && self.is_absent(&range.key(&self.cluster))?
        {
            self.doubt();
            let catalog = self.catalog();
            let newest = catalog.loss(range.branch, range.start_lsn, range.end_lsn);
            let missing = Missing {
                losses: vec![newest.clone()],
                newest: Some(newest),
            };
            return older_state(self.repository(), &missing);
        }
        // Only the newest tail of the open segment is checked: other tails may be superseded.
        let branch = self.status().progress().positions().branch();
        let is_newest = |tail: &&WalRange| {
            let before = sealed.as_ref().filter(|sealed| sealed.branch == branch);
            tail.branch == branch && before.is_none_or(|sealed| tail.end_lsn > sealed.end_lsn)
        };
        let newest_tail = || {
            let tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
            let of_branch = tails.range((branch, SegmentNo(0))..=(branch, SegmentNo(u64::MAX)));
            let newest = of_branch.last()?.1.last().filter(is_newest);
            newest.map(|tail| tail.key(&self.cluster))
        };
        if let Some(key) = newest_tail()
            && self.is_absent(&key)?
            // A tail that is no longer the newest one was removed when its segment was sealed.
            && newest_tail().as_ref() == Some(&key)
        {
            self.doubt();
            return Err(StoreError::NotFound {
                key: key.to_string(),
                url: self.repository().url(),
            });
        }
        Ok(())
    }
}

/// The position of the sample that was checked last.
#[derive(Debug, Default)]
pub(super) struct Presence {
    segment: Option<WalRange>,
    /// The number of backups that were checked.
    backups: usize,
}

impl Presence {
    /// Checks the newest segment and tail, the history files, the newest backup, and a sample of
    /// the other backups and of the segments. The samples cover all objects in turn. If an object
    /// is missing, updates the catalog, which records the loss.
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
        archive.check_newest()?;
        if let Some(newest) = archive.catalog().newest_sealed()? {
            archive
                .repository()
                .check_each_place(&newest.key(&archive.cluster));
        }
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
        let sample = archive
            .catalog()
            .sealed_after(self.segment.as_ref(), samples)?;
        for range in &sample {
            lacks |= archive.is_absent(&range.key(&archive.cluster))?;
        }
        let is_end = sample.len() < samples;
        self.segment = sample.into_iter().last().filter(|_| !is_end);
        if lacks {
            archive.refresh()?;
        }
        Ok(())
    }
}

/// Checks the presence of objects, removes from the record what is back, and reports what is
/// missing.
///
/// # Errors
/// Errors of the requests, the catalog and the record.
pub(super) fn look_for_losses(archive: &Archive, presence: &Mutex<Presence>) -> Result<()> {
    let mut presence = presence.lock().unwrap_or_else(PoisonError::into_inner);
    presence.check(archive, &archive.catalog().backups()?)?;
    let losses = &archive.loss_record;
    let mut is_back = false;
    for found in losses.open()? {
        // The last segment may be back before the first one.
        let (first, last) = (found.loss.key(), found.loss.keys().last());
        for key in [Some(first), last].into_iter().flatten() {
            is_back = is_back || archive.repository().head(&key)?.is_some();
        }
    }
    if is_back {
        archive.refresh()?;
        losses.keep(|loss| still_missing(archive, loss))?;
    }
    report_losses(archive)
}

/// Reports what is missing and was not accepted.
///
/// # Errors
/// [`StoreError::Store`] when the record cannot be read.
pub(super) fn report_losses(archive: &Archive) -> Result<()> {
    let losses = &archive.loss_record;
    if losses.accepted()?.len() != archive.accepted {
        // The stages read the declared gap only when they start.
        archive.doubt();
    }
    let open = losses.open()?;
    archive.status().note(|facts| facts.losses = open);
    Ok(())
}

/// Returns the part of a loss that the catalog still lacks.
fn still_missing(archive: &Archive, loss: &Loss) -> repository::Result<Vec<Loss>> {
    let catalog = archive.catalog();
    match loss {
        Loss::Wal {
            branch,
            from_lsn,
            to_lsn,
            ..
        } => {
            let held = catalog.ranges(*branch, *from_lsn, *to_lsn)?;
            let held = held.iter().map(|range| (range.start_lsn, range.end_lsn));
            let held: repository::expire::Intervals = held.collect();
            let left = held.missing_in(*from_lsn, *to_lsn).into_iter();
            Ok(left
                .map(|(from, to)| catalog.loss(*branch, from, to))
                .collect())
        }
        Loss::Backup { id, .. } => {
            let backups = catalog.backups()?;
            let is_back = backups.iter().any(|backup| backup.id == *id);
            Ok(if is_back {
                Vec::new()
            } else {
                vec![loss.clone()]
            })
        }
    }
}
