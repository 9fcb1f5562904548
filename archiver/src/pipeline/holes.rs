//! Holes: WAL that was archived and that the repository lacks now.
//!
//! Invariant: as soon as a hole is found, nothing after it counts as stored or is acknowledged as
//! stored until the stages have started again with what the repository holds. They store again what
//! the spool has, and the light is red until the repository holds it.

use std::{os::unix::fs::MetadataExt, sync::atomic::Ordering};

use repository::{Loss, WalRange, WalRangeKind, config::ClusterSettings};
use status::cluster_status::{ClusterStatus, Hole};
use wal_format::{Branch, Lsn, ObjectKey, SegmentNo, WalIdentity};

use super::archive::Archive;
use crate::{
    core::{event::Event, positions::Coverage},
    spool::Spool,
};

/// More zeros than a record ends with as a rule. What a torn file lacks is streamed again.
const ZEROS_OF_A_RECORD: u64 = 64;

/// The knowledge of an object in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A place holds it, or it expired.
    Held,
    /// Every place lacks it.
    Absent,
    /// The places that answer lack it, and another one is away.
    Unproved,
    /// No place answered.
    Unknown,
}

impl Found {
    /// Returns true if a place answers and no place that answers holds the object.
    pub(super) fn is_missing(self) -> bool {
        matches!(self, Self::Absent | Self::Unproved)
    }
}

/// Returns a function that returns true if the WAL of a range is in the spool.
pub(super) fn is_spooled(spool: &Spool, identity: &WalIdentity) -> impl Fn(&WalRange) -> bool {
    let (spool, identity) = (spool, *identity);
    move |range| {
        let spool = spool.branch(&identity, range.branch);
        if spool.path(range.segment).exists() {
            return true;
        }
        let open = spool.segments().ok().and_then(|segments| segments.open);
        range.kind == WalRangeKind::Tail
            && open.is_some_and(|(segment, length)| {
                // The content of the file ends before the zeros with which the last record may end.
                let length = length.saturating_add(ZEROS_OF_A_RECORD);
                let end_lsn = segment.start_lsn(identity.segment_size).add(length);
                segment == range.segment && end_lsn >= range.end_lsn
            })
    }
}

/// Returns a function that returns true if the stages store a missing range again when they start:
/// a segment of the spool, or a tail on the branch of a reported hole, which is the archived one.
pub(super) fn is_stored_at_a_start(
    spool: &Spool,
    identity: &WalIdentity,
    status: &ClusterStatus,
) -> impl Fn(&WalRange) -> bool {
    let is_spooled = is_spooled(spool, identity);
    let archived = status.facts().hole.map(|hole| hole.branch);
    move |range| {
        let is_read = range.kind != WalRangeKind::Tail || archived == Some(range.branch);
        is_read && is_spooled(range)
    }
}

/// Returns device and inode of the folder of the only repository. `None` if there is no such
/// folder.
fn folder(settings: &ClusterSettings) -> Option<(u64, u64)> {
    let [place] = &settings.repository.each()[..] else {
        return None;
    };
    let found = std::fs::metadata(place.url.folder()?).ok()?;
    Some((found.dev(), found.ino()))
}

/// Returns true if the place cannot be another one than the one that held the newest WAL: it is the
/// same folder. Several places count as one place, because they fill each other.
pub(super) fn is_same_place(settings: &ClusterSettings, status: &ClusterStatus) -> bool {
    let known = status.facts().folder;
    settings.repository.each().len() > 1 || (known.is_some() && known == folder(settings))
}

impl Archive {
    /// Returns what is known of an object.
    pub(super) fn find(&self, key: &ObjectKey) -> repository::Result<Found> {
        let identity = self.identity();
        let is_one_of_several = self.settings().repository.each().len() > 1;
        let missing = match self.repository().head(key) {
            Err(error) if error.is_transient() && is_one_of_several => {
                if !self.repository().is_partly_away() {
                    return Ok(Found::Unknown);
                }
                Found::Unproved
            }
            found => match found? {
                Some(_) => return Ok(Found::Held),
                None => Found::Absent,
            },
        };
        // Another program may have removed the object since the catalog read what expired.
        let expired = self.repository().expired(identity.system_identifier)?;
        if expired.hides(key, identity.segment_size) {
            return Ok(Found::Held);
        }
        Ok(missing)
    }

    /// Returns true if the stages store a missing range again when they start.
    pub(super) fn is_stored_again(&self, range: &WalRange) -> bool {
        let is_spooled = is_spooled(self.spool(), self.identity());
        is_spooled(range) && is_same_place(self.settings(), self.status())
    }

    /// Takes back what counts as stored from a missing range on, and makes the stages start again.
    /// Returns false if nothing needs the range: it is on another branch than the one being
    /// archived, or before a base backup.
    pub(super) fn note_hole(&self, range: &WalRange, found: Found) -> repository::Result<bool> {
        let loss = self.catalog().loss_of(range);
        let is_stored_again = self.is_stored_again(range);
        self.note_missing(&loss, found == Found::Unproved, is_stored_again)
    }

    /// Does the same for a loss.
    pub(super) fn note_missing(
        &self,
        loss: &Loss,
        is_unproved: bool,
        is_stored_again: bool,
    ) -> repository::Result<bool> {
        let Some((branch, from_lsn, to_lsn)) = loss.wal() else {
            return Ok(false);
        };
        let backups = self.catalog().backups()?;
        let is_before_a_backup = backups
            .iter()
            .any(|backup| backup.branch == branch && backup.start_lsn >= to_lsn);
        if branch != self.progress().positions().branch() || is_before_a_backup {
            return Ok(false);
        }
        self.progress().on(Event::Lacking {
            branch,
            range: (from_lsn, to_lsn),
        });
        if is_unproved || is_stored_again {
            note(self.status(), loss, is_unproved);
        }
        self.doubted.store(true, Ordering::Release);
        Ok(true)
    }

    /// Ends the report of a hole when the repository holds its WAL again, or nothing needs the WAL
    /// any more.
    pub(super) fn note_filled(&self) {
        let hole = self.status().facts().hole;
        if let Some(Hole { branch, to_lsn, .. }) = hole
            && self.progress().positions().stored_on(branch) >= to_lsn
            && !self.is_doubted()
        {
            self.status().note(|facts| facts.hole = None);
        }
    }

    /// Returns true if the catalog left out objects that a place that was away may hold.
    pub(crate) fn is_unproved(&self) -> bool {
        !self.status().facts().unproved.is_empty()
    }

    /// Makes the stages start again when all places answer and one of them may hold objects that
    /// the catalog left out.
    pub(super) fn prove_again(&self) {
        if self.is_unproved() && !self.repository().is_partly_away() {
            self.doubted.store(true, Ordering::Release);
        }
    }

    /// Makes the stages start again if only places answer that are known to lack objects, so that
    /// nothing counts as stored there: what they lack is then stored again, or named.
    pub(super) fn prove_alone(&self) {
        if self.repository().is_partly_away() && self.repository().only_lags() {
            self.doubted.store(true, Ordering::Release);
        }
    }

    /// Removes from `coverage` what an older state of the repository lacks.
    pub(super) fn without_missing(&self, branch: Branch, mut coverage: Coverage) -> Coverage {
        for (on, from_lsn, to_lsn) in self.missing().iter().filter_map(Loss::wal) {
            if on == branch {
                coverage.remove(from_lsn, to_lsn);
            }
        }
        coverage
    }

    /// Remembers the folder that held the newest WAL. It was looked at before the WAL was found.
    pub(super) fn note_folder(&self, folder: Option<(u64, u64)>) {
        if folder.is_some() && self.status().facts().folder != folder {
            self.status().note(|facts| facts.folder = folder);
        }
    }

    /// Returns device and inode of the folder of the only repository.
    pub(super) fn folder(&self) -> Option<(u64, u64)> {
        folder(self.settings())
    }
}

/// Reports a hole.
fn note(status: &ClusterStatus, loss: &Loss, is_unproved: bool) {
    let Some((branch, from_lsn, to_lsn)) = loss.wal() else {
        return;
    };
    let reason = if is_unproved {
        format!(
            "no repository that answers holds {loss}, which was archived; another one is away and may hold it: bring \
             it back. Nothing after this WAL counts as stored. What the spool has is stored again"
        )
    } else {
        format!(
            "the repository lacks {loss}, which was archived; it is stored again from the spool. Nothing after this \
             WAL counts as stored before that"
        )
    };
    tracing::error!(event = "hole_found", cluster = %status.cluster(), "{reason}");
    status.note(|facts| {
        let known = facts.hole.take().filter(|hole| hole.branch == branch);
        let (from, to) = known.map_or((from_lsn, to_lsn), |hole| (hole.from_lsn, hole.to_lsn));
        facts.hole = Some(Hole {
            branch,
            from_lsn: from.min(from_lsn),
            to_lsn: to.max(to_lsn),
            reason,
        });
        if is_unproved && !facts.unproved.contains(loss) {
            facts.unproved.push(loss.clone());
        }
    });
}

/// Records objects that the places that answer lack, while another one is away.
pub(super) fn note_unproved(status: &ClusterStatus, losses: &[Loss]) {
    for loss in losses {
        if loss.wal().is_some() {
            note(status, loss, true);
        } else {
            status.note(|facts| {
                if !facts.unproved.contains(loss) {
                    facts.unproved.push(loss.clone());
                }
            });
        }
    }
}

/// Returns the parts of a loss that are not in the spool.
pub(super) fn not_spooled(loss: Loss, spool: &Spool, identity: &WalIdentity) -> Vec<Loss> {
    let Some((branch, from_lsn, to_lsn)) = loss.wal() else {
        return vec![loss];
    };
    let (spool, size) = (spool.branch(identity, branch), identity.segment_size);
    let mut left = Vec::new();
    let mut number = size.segment_of(from_lsn);
    while number.start_lsn(size) < to_lsn {
        if !spool.path(number).exists() && !spool.partial_path(number).exists() {
            left.push(part(&loss, number, identity));
        }
        number = number.next();
    }
    left
}

/// Returns the part of a loss of sealed segments that is in one segment; the loss of a tail is
/// never divided.
fn part(loss: &Loss, number: SegmentNo, identity: &WalIdentity) -> Loss {
    let size = identity.segment_size;
    let (start, end): (Lsn, Lsn) = (number.start_lsn(size), number.end_lsn(size));
    match loss {
        Loss::Wal {
            system,
            segment_size,
            branch,
            ..
        } => Loss::Wal {
            system: *system,
            segment_size: *segment_size,
            branch: *branch,
            from_lsn: start,
            to_lsn: end,
        },
        other => other.clone(),
    }
}
