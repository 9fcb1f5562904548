//! [`Holding`]: the content of one repository, as far as retention needs it.
//!
//! Read from listings. The times of WAL come from an index if it knows the object, else from the
//! end of the object. Memory holds the backups and a few ranges, however many segments there are.

use std::collections::BTreeMap;

use wal_format::{BackupId, BackupInfo, Branch, Lsn, ObjectKey, PgTimestamp, SegmentSize};

use super::{ExpiredSet, Intervals, reach};
use crate::{
    ClusterIdentity, PathPart, Repository, Result, WalRange, incomplete_part, timeline_path,
};

/// A time that exceeds the current time by more than this is considered wrong.
const CLOCK_AHEAD_MAX_MICROS: i64 = 86_400_000_000;

/// An index of known objects, so that not every object has to be read.
pub trait Index {
    /// The base backups, oldest first.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn backups(&self) -> Result<Vec<BackupInfo>>;

    /// The range and times of a WAL object, read from its end if the index does not know it. `None`
    /// if it is not WAL of this cluster.
    ///
    /// # Errors
    /// The errors of reading the object, which has `size` bytes.
    fn range_of(&self, place: &Repository, key: &ObjectKey, size: u64) -> Result<Option<WalRange>>;
}

/// The content of one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// The earliest moment that must remain restorable.
    pub window_start: PgTimestamp,
    /// The base backups that have not expired.
    pub backups: Vec<HeldBackup>,
    /// The timelines.
    pub branches: Vec<HeldBranch>,
}

/// A base backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBackup {
    /// Its ID.
    pub id: BackupId,
    /// The operator's label.
    pub label: String,
    /// Its timeline.
    pub branch: Branch,
    /// The LSN where redo starts.
    pub start_lsn: Lsn,
    /// The LSN where it is consistent.
    pub stop_lsn: Lsn,
    /// The time when it was complete.
    pub finished: PgTimestamp,
    /// Its size in this repository.
    pub stored_bytes: u64,
    /// The reason why it cannot be restored, if there is one.
    pub problem: Option<String>,
}

/// A timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBranch {
    /// The branch.
    pub branch: Branch,
    /// The path of timelines that leads to it.
    pub path: Vec<PathPart>,
    /// Its stored WAL that has not expired.
    pub wal: Intervals,
    /// The ends of its contiguous ranges, with the last known time of each.
    pub ends: Vec<(Lsn, Option<PgTimestamp>)>,
    /// The LSN from which it may contain moments of the window. `None` if all of it is older.
    pub young_from: Option<Lsn>,
    /// True if anything gives the time and place of its WAL. Otherwise all of it is kept.
    pub is_dated: bool,
}

impl HeldBackup {
    /// The key that sorts backups by age.
    pub(super) fn age_order(&self) -> (PgTimestamp, Lsn, BackupId) {
        (self.finished, self.start_lsn, self.id.clone())
    }
}

impl Holding {
    /// The length of a segment.
    pub(super) fn segment(&self) -> u64 {
        self.segment_size.bytes()
    }

    /// Reads the content of `place`, a single repository, for the cluster's epoch `identity`.
    ///
    /// # Errors
    /// Any error of reading the repository.
    pub fn read(
        place: &Repository,
        identity: &ClusterIdentity,
        index: &dyn Index,
        (window_start, now): (PgTimestamp, PgTimestamp),
        expired: &ExpiredSet,
    ) -> Result<Self> {
        let system = identity.system_identifier;
        let size = identity.wal_segment_size;
        let backups = read_backups(place, identity, index, expired)?;
        let mut dating: BTreeMap<Branch, Dating> = BTreeMap::new();
        let mut histories: Vec<_> = vec![(Branch::FIRST, None, bytes::Bytes::new())];
        for (branch, content) in place.histories(system)? {
            let history = wal_format::TimelineHistory::parse(branch.timeline, &content).ok();
            histories.push((branch, history, content));
            dating.entry(branch).or_default();
        }
        for backup in &backups {
            dating.entry(backup.branch).or_default();
        }
        // Sealed segments first: a tail whose sealed segment exists adds nothing.
        for folder in ["wal", "tail"] {
            place.visit(&format!("{system}/{folder}/"), &mut |key, stored_bytes| {
                let (ObjectKey::Segment(_, branch, _) | ObjectKey::Tail(_, branch, ..)) = &key
                else {
                    return Ok(());
                };
                let known = dating.entry(*branch).or_default();
                if expired.hides(&key, size) || known.has(&key, size) {
                    return Ok(());
                }
                match index.range_of(place, &key, stored_bytes) {
                    Ok(Some(range)) => known.add(&range, (window_start, now), &backups),
                    Ok(None) => {}
                    // A tail that was replaced after the listing.
                    Err(error) if error.is_not_found() => {}
                    Err(crate::Error::Damaged { key, problem, .. }) => {
                        tracing::error!(%key, %problem, "the object is damaged and is treated as missing");
                    }
                    Err(error) => return Err(error),
                }
                Ok(())
            })?;
        }
        let branches = dating.into_iter().map(|(branch, dating)| {
            let path = timeline_path(&histories, branch);
            let is_known = path.is_some();
            let alone = || {
                vec![PathPart {
                    branch,
                    from: Lsn::ZERO,
                    to: Lsn::MAX,
                }]
            };
            dating.branch(branch, path.unwrap_or_else(alone), is_known)
        });
        let mut holding = Self {
            segment_size: size,
            window_start,
            branches: branches.collect(),
            backups,
        };
        holding.prove_wal();
        Ok(holding)
    }

    /// Marks backups that cannot be restored because the WAL that makes them consistent is held
    /// neither on their timeline nor on one that continues it.
    pub(super) fn prove_wal(&mut self) {
        let wal = reach::held(self);
        let size = self.segment();
        for backup in &mut self.backups {
            let on_path = self.branches.iter().filter(|one| reach::is_on(one, backup));
            let end = on_path.map(|branch| reach::end_along(branch, backup, &wal, size));
            let end = end.max();
            if backup.problem.is_none() && end.is_none_or(|end| end < backup.stop_lsn) {
                let from = end.unwrap_or(backup.start_lsn);
                backup.problem = Some(format!(
                    "WAL {from} to {} of timeline branch {} is missing",
                    backup.stop_lsn, backup.branch
                ));
            }
        }
    }
}

/// Facts collected about a timeline's WAL, range by range.
#[derive(Debug, Default)]
pub(super) struct Dating {
    wal: Intervals,
    times: BTreeMap<Lsn, Option<PgTimestamp>>,
    /// The start of the first range that contains a moment of the window.
    young: Option<Lsn>,
    /// The end of the last range before it that ends before the window.
    old_until: Lsn,
    is_dated: bool,
}

impl Dating {
    fn has(&self, key: &ObjectKey, size: SegmentSize) -> bool {
        let ObjectKey::Tail(_, _, name, ..) = key else {
            return false;
        };
        let segment = name.segment(size);
        segment.is_some_and(|one| self.wal.covers(one.start_lsn(size), one.end_lsn(size)))
    }

    pub(super) fn add(
        &mut self,
        range: &WalRange,
        (window_start, now): (PgTimestamp, PgTimestamp),
        backups: &[HeldBackup],
    ) {
        let (start, end) = (range.start_lsn, range.end_lsn);
        let ended_here = |backup: &&HeldBackup| {
            backup.branch == range.branch && start < backup.stop_lsn && backup.stop_lsn <= end
        };
        let finished = backups.iter().filter(ended_here).map(|one| one.finished);
        let sane = |time: &PgTimestamp| time.micros_since(now) <= CLOCK_AHEAD_MAX_MICROS;
        let of_range = [range.min_time, range.max_time, range.proven];
        let last = of_range.into_iter().flatten().filter(sane).max();
        let newest = last.into_iter().chain(finished.filter(sane)).max();
        self.is_dated |= newest.is_some();
        if newest.is_some_and(|time| time >= window_start) {
            self.young = Some(self.young.map_or(start, |known| known.min(start)));
        } else if last.is_some() && self.young.is_none_or(|young| end <= young) {
            self.old_until = self.old_until.max(end);
        }
        self.wal.add(start, end);
        // One entry per contiguous range. The entry of the range that it extends is dropped.
        if let Some((at, known)) = self.times.range(..=end).next_back()
            && *at >= start
        {
            let (at, known) = (*at, *known);
            self.times.remove(&at);
            self.times.insert(end.max(at), last.max(known));
        } else {
            self.times.insert(end, last);
        }
    }

    pub(super) fn branch(self, branch: Branch, path: Vec<PathPart>, is_known: bool) -> HeldBranch {
        HeldBranch {
            branch,
            path,
            // No timestamp exists between these two LSNs.
            young_from: self.young.map(|young| self.old_until.min(young)),
            is_dated: is_known && (self.is_dated || self.wal.is_empty()),
            ends: self.times.into_iter().collect(),
            wal: self.wal,
        }
    }
}

fn read_backups(
    place: &Repository,
    identity: &ClusterIdentity,
    index: &dyn Index,
    expired: &ExpiredSet,
) -> Result<Vec<HeldBackup>> {
    let system = identity.system_identifier;
    let suspects = suspects(place, identity)?;
    let known: BTreeMap<BackupId, BackupInfo> = index
        .backups()?
        .into_iter()
        .map(|backup| (backup.id.clone(), backup))
        .collect();
    let mut backups = Vec::new();
    let mut parts: Option<(BackupId, BTreeMap<ObjectKey, u64>)> = None;
    let mut take = |parts: Option<(BackupId, BTreeMap<ObjectKey, u64>)>| -> Result<()> {
        let Some((id, parts)) = parts else {
            return Ok(());
        };
        let key = ObjectKey::BackupInfo(system, id.clone());
        // Without `backup.json` it is not a backup: either it is being taken, or it is the remains
        // of a failed one.
        if expired.backups().contains(&id) || !parts.contains_key(&key) {
            return Ok(());
        }
        let info = match known.get(&id) {
            Some(info) => info.clone(),
            None => match BackupInfo::parse_of(&key, &place.get(&key)?) {
                Ok(info) => info,
                Err(error) => {
                    tracing::error!(%key, %error, "a backup that cannot be read counts for nothing, and stays");
                    return Ok(());
                }
            },
        };
        let suspect = suspects.iter().find(|one| one.contains(id.as_str()));
        let suspect = suspect.map(|one| format!("the last verification says: {one}"));
        backups.push(HeldBackup {
            problem: incomplete_part(&info, &parts)
                .map(|damage| damage.to_string())
                .or(suspect),
            id,
            label: info.label,
            branch: info.branch,
            start_lsn: info.start_lsn,
            stop_lsn: info.stop_lsn,
            finished: info.finished,
            stored_bytes: info.stored_bytes,
        });
        Ok(())
    };
    place.visit(&format!("{system}/backup/"), &mut |key, size| {
        let (ObjectKey::BackupInfo(_, id)
        | ObjectKey::BackupManifest(_, id)
        | ObjectKey::BackupSlice(_, id, ..)) = &key
        else {
            return Ok(());
        };
        match &mut parts {
            Some((known, parts)) if known == id => {
                parts.insert(key, size);
            }
            _ => {
                let id = id.clone();
                let of_next = (id, BTreeMap::from([(key, size)]));
                take(parts.replace(of_next))?;
            }
        }
        Ok(())
    })?;
    take(parts)?;
    Ok(backups)
}

/// Returns the objects that the last verification found damaged, as it described them.
///
/// # Errors
/// [`Error::Damaged`](crate::Error::Damaged) if that verification cannot be parsed: a backup that
/// it found damaged must not count as one that can be restored.
fn suspects(place: &Repository, identity: &ClusterIdentity) -> Result<Vec<String>> {
    let system = identity.system_identifier;
    let outcome = place.newest_verification(system)?;
    let mut damaged = outcome.map(|outcome| outcome.damaged).unwrap_or_default();
    // With several repositories the outcome names all of them, each with its address.
    let here = place.url();
    damaged.retain(|problem| problem.starts_with(&here) || !problem.contains("://"));
    Ok(damaged)
}
