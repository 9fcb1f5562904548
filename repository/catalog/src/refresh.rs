//! Makes a catalog equal to its repository, from listings and the ends of objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

use repository::{Error, LostHistory, Repository, Result, WalRange, WalRangeKind};
use wal_format::{BackupId, BackupInfo, Branch, ObjectKey, SealedFooter, sealed::FooterFromTail};

use super::{Catalog, Guard, families::Segments, keys::RangeKey};
use rocksdb::IteratorMode;

/// The number of objects whose ends are read in parallel. Each read waits for the network.
const READERS: usize = 16;
/// The maximum number of objects whose ends are in memory at the same time.
const ROUND: usize = 512;
/// The maximum number of attempts to read listings while the archiver replaces tails by sealed
/// segments. Each further attempt is short, because the catalog already contains what the one
/// before found.
const LOOKS_MAX: usize = 8;

/// The result of a refresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefreshReport {
    /// The number of WAL ranges and backups that were new to the catalog.
    pub added: usize,
    /// The number of WAL ranges and backups that the repository no longer has.
    pub removed: usize,
    /// Objects that cannot be parsed, with the reason. They count as missing.
    pub damaged: Vec<(String, String)>,
    /// Timelines with archived WAL or backups, but without an intact history file. No restore can
    /// follow them.
    pub lost_histories: Vec<LostHistory>,
}

pub(super) fn refresh(
    catalog: &Catalog,
    repository: &Repository,
    guard: &Guard<'_>,
) -> Result<RefreshReport> {
    let mut report = RefreshReport::default();
    let system = catalog.identity.system_identifier;
    catalog.follow_expired(repository)?;
    count_minimal(catalog)?;
    let mut evidence = BTreeMap::new();
    for _ in 0..LOOKS_MAX {
        report.damaged.clear();
        evidence.clear();
        match refresh_ranges(catalog, repository, guard, &mut report, &mut evidence) {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => {
                if error.is_gone() {
                    // The right repository holds every backup of an older state, too.
                    add_backups(catalog, repository, &mut report)?;
                }
                return Err(error);
            }
        }
    }
    refresh_backups(catalog, repository, guard, &mut report)?;
    for backup in catalog.backups()? {
        let name = || format!("backup {}", backup.id);
        evidence.entry(backup.branch).or_insert_with(name);
    }
    // The histories are read after the WAL, because a timeline's history file is stored before the
    // first of its WAL.
    let histories = repository.histories_of(system, &evidence)?;
    for (branch, content) in &histories.known {
        catalog.put_branch(*branch, Some(content))?;
    }
    for lost in &histories.lost {
        tracing::error!(
            event = "history_lost", repository = %repository.url(), branch = %lost.branch,
            "{lost}"
        );
    }
    report.lost_histories = histories.lost;
    Ok(report)
}

/// Counts the records that announce `wal_level = minimal` in ranges that an earlier version
/// recorded without that count, so that no later reader has to decode their summaries.
fn count_minimal(catalog: &Catalog) -> Result<()> {
    for entry in catalog.entries::<Segments>(IteratorMode::Start) {
        let (_, range) = entry?;
        if range.minimal_count.is_none() {
            let summary = catalog.summary(&range)?;
            let events = summary.events.iter();
            let count = events
                .filter(|(_, event)| event.begins_minimal_wal())
                .count() as u64;
            let minimal_count = Some(count);
            let range = WalRange {
                minimal_count,
                ..range
            };
            catalog.put_range(&range, &summary)?;
        }
    }
    Ok(())
}

/// Reads the listings once, and adds the name of one object of each timeline to `evidence`. Returns
/// false if a listed object was gone before it was read. That happens to a tail whose segment is
/// sealed after the segments were listed: this attempt saw neither, so the catalog has a hole that
/// the repository does not have.
fn refresh_ranges(
    catalog: &Catalog,
    repository: &Repository,
    guard: &Guard<'_>,
    report: &mut RefreshReport,
    evidence: &mut BTreeMap<Branch, String>,
) -> Result<bool> {
    let system = catalog.identity.system_identifier;
    let expired = catalog.expired()?;
    let mut gone = catalog.all_ranges()?;
    // Sealed segments are listed after tails. A segment that is sealed between the two listings is
    // then in at least one of them.
    let tails = repository.list(&format!("{system}/tail/"))?;
    let segments = repository.list(&format!("{system}/wal/"))?;
    let (mut sealed, mut is_still) = (BTreeSet::new(), true);
    // A bucket that denies deletions keeps every tail forever. Do not read a tail whose segment is
    // sealed and intact.
    for mut listed in [segments, tails] {
        listed.retain(|(key, size)| {
            let Some(skeleton) = skeleton(catalog, key, *size) else {
                return false;
            };
            if expired.hides(key, catalog.identity.wal_segment_size) {
                return false;
            }
            evidence
                .entry(skeleton.branch)
                .or_insert_with(|| key.to_string());
            let place = (skeleton.branch, skeleton.segment);
            match skeleton.kind {
                WalRangeKind::Sealed => {
                    sealed.insert(place);
                }
                WalRangeKind::Tail if sealed.contains(&place) => return false,
                WalRangeKind::Tail => {}
            }
            !gone.remove(&RangeKey::new(&skeleton))
        });
        for round in listed.chunks(ROUND) {
            let footers = read_footers(repository, round);
            for ((key, size), footer) in round.iter().zip(footers) {
                is_still &= !footer.as_ref().is_err_and(Error::is_not_found);
                if !add(catalog, (key, *size), footer, report)?
                    && let Some(skeleton) = skeleton(catalog, key, *size)
                {
                    sealed.remove(&(skeleton.branch, skeleton.segment));
                }
            }
        }
    }
    let mut removed = Vec::new();
    for key in gone {
        removed.extend(catalog.get::<Segments>(&key)?);
    }
    (guard.missing)(&catalog.missing_wal(repository, guard, removed.clone())?)?;
    for range in &removed {
        catalog.remove_range(range)?;
    }
    report.removed += removed.len();
    // Timeline 1 has no history file. Its archived objects prove that it exists.
    for branch in evidence.keys().filter(|branch| branch.digest == [0; 4]) {
        catalog.put_branch(*branch, None)?;
    }
    debug_assert!(
        catalog.restore_points().is_ok(),
        "BUG: restore points can be read"
    );
    Ok(is_still)
}

/// Returns the description of an object from its key and its footer, or from the catalog if it is
/// recorded there. Returns `None` if the object is not WAL of this cluster.
pub(super) fn range_of(
    catalog: &Catalog,
    repository: &Repository,
    key: &ObjectKey,
    size: u64,
) -> Result<Option<WalRange>> {
    let Some(skeleton) = skeleton(catalog, key, size) else {
        return Ok(None);
    };
    if let Some(range) = catalog.get::<Segments>(&RangeKey::new(&skeleton))? {
        return Ok(Some(range));
    }
    let footer = sound_footer(repository, key, size)?;
    let range = WalRange::of_footer(&footer, skeleton.kind, size);
    Ok((range.key(&catalog.identity) == *key).then_some(range))
}

/// Records an object's footer in the catalog. Returns whether that was possible.
fn add(
    catalog: &Catalog,
    (key, size): (&ObjectKey, u64),
    footer: Result<SealedFooter>,
    report: &mut RefreshReport,
) -> Result<bool> {
    match footer {
        Ok(footer) => {
            let kind = match key {
                ObjectKey::Tail(..) => WalRangeKind::Tail,
                _ => WalRangeKind::Sealed,
            };
            let (header, summary) = (footer.header(), footer.summary());
            let range = WalRange::of_footer(&footer, kind, size);
            let ours = header.system_identifier == catalog.identity.system_identifier;
            if range.key(&catalog.identity) != *key || !ours {
                let problem = "its header names another range".to_owned();
                report.damaged.push((key.to_string(), problem));
                return Ok(false);
            }
            catalog.put_range(&range, summary)?;
            report.added += 1;
            return Ok(true);
        }
        // Its sealed segment replaced the tail after the listing. The next attempt finds the
        // segment.
        Err(error) if error.is_not_found() => {}
        Err(Error::Damaged { key, problem, .. }) => {
            tracing::error!(%key, %problem, "the object is damaged and is treated as missing");
            report.damaged.push((key, problem));
        }
        Err(error) => return Err(error),
    }
    Ok(false)
}

/// Reads the footers of a round's objects, in the same order.
fn read_footers(repository: &Repository, round: &[(ObjectKey, u64)]) -> Vec<Result<SealedFooter>> {
    let share = round.len().div_ceil(READERS).max(1);
    thread::scope(|scope| {
        let readers: Vec<_> = round
            .chunks(share)
            .map(|share| {
                let read = move || -> Vec<_> {
                    let one = |(key, size): &(ObjectKey, u64)| sound_footer(repository, key, *size);
                    share.iter().map(one).collect()
                };
                (share.len(), scope.spawn(read))
            })
            .collect();
        let joined = readers.into_iter().flat_map(|(count, reader)| {
            let panicked = || Err(Error::config("BUG: a reader of summaries panicked"));
            let failed = |_| (0..count).map(|_| panicked()).collect();
            reader.join().unwrap_or_else(failed)
        });
        joined.collect()
    })
}

fn sound_footer(repository: &Repository, key: &ObjectKey, size: u64) -> Result<SealedFooter> {
    match repository.footer(key, size) {
        // Another mirror may have an intact copy.
        Err(Error::Damaged { .. }) => repository
            .get(key)
            .and_then(|object| footer_of(repository, key, &object)),
        footer => footer,
    }
}

/// Returns what the key alone says about a range, which is enough to find it in the catalog.
pub(super) fn skeleton(catalog: &Catalog, key: &ObjectKey, size: u64) -> Option<WalRange> {
    let segment_size = catalog.identity.wal_segment_size;
    let (branch, name, kind, tail) = match key {
        ObjectKey::Segment(_, branch, name) => (*branch, *name, WalRangeKind::Sealed, None),
        ObjectKey::Tail(_, branch, name, start, end) => {
            (*branch, *name, WalRangeKind::Tail, Some((*start, *end)))
        }
        _ => return None,
    };
    let segment = name.segment(segment_size)?;
    let whole = (
        segment.start_lsn(segment_size),
        segment.end_lsn(segment_size),
    );
    let (start_lsn, end_lsn) = tail.unwrap_or(whole);
    Some(WalRange {
        branch,
        segment,
        start_lsn,
        end_lsn,
        kind,
        stored_bytes: size,
        record_count: 0,
        transaction_count: 0,
        prepare_count: None,
        tablespace_count: None,
        minimal_count: None,
        first_record_lsn: None,
        last_record_lsn: None,
        last_record_end_lsn: None,
        open_record_lsn: None,
        min_time: None,
        max_time: None,
        proven: None,
    })
}

fn footer_of(repository: &Repository, key: &ObjectKey, object: &[u8]) -> Result<SealedFooter> {
    let problem = match SealedFooter::from_tail(object.len() as u64, object) {
        Ok(FooterFromTail::Complete(footer)) => return Ok(*footer),
        Ok(FooterFromTail::NeedMore { .. }) => "its footer does not fit its length".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Error::Damaged {
        key: key.to_string(),
        url: repository.url(),
        problem,
    })
}

/// Records the listed backups that are new to the catalog. Returns the names of all listed ones.
fn add_backups(
    catalog: &Catalog,
    repository: &Repository,
    report: &mut RefreshReport,
) -> Result<Vec<BackupId>> {
    let system = catalog.identity.system_identifier;
    let backups = catalog.backups()?;
    let known: Vec<_> = backups.iter().map(|backup| backup.id.clone()).collect();
    let expired = catalog.expired()?;
    let mut found = Vec::new();
    for (key, _) in repository.list(&format!("{system}/backup/"))? {
        let ObjectKey::BackupInfo(_, id) = &key else {
            continue;
        };
        if expired.backups().contains(id) {
            continue;
        }
        found.push(id.clone());
        if known.contains(id) {
            continue;
        }
        let body = match repository.get(&key) {
            Err(Error::Damaged { key, problem, .. }) => {
                tracing::error!(%key, %problem, "a damaged backup counts as missing");
                report.damaged.push((key, problem));
                continue;
            }
            body => body?,
        };
        match BackupInfo::parse_of(&key, &body) {
            Ok(backup) => {
                catalog.put_backup(&backup)?;
                report.added += 1;
            }
            Err(error) => {
                tracing::error!(%key, %error, "a damaged backup counts as missing");
                report.damaged.push((key.to_string(), error.to_string()));
            }
        }
    }
    Ok(found)
}

fn refresh_backups(
    catalog: &Catalog,
    repository: &Repository,
    guard: &Guard<'_>,
    report: &mut RefreshReport,
) -> Result<()> {
    let found = add_backups(catalog, repository, report)?;
    let backups = catalog.backups()?.into_iter();
    let removed: Vec<BackupInfo> = backups
        .filter(|backup| !found.contains(&backup.id))
        .collect();
    (guard.missing)(&catalog.missing_backups(repository, &removed)?)?;
    for backup in &removed {
        catalog.remove_backup(&backup.id)?;
        report.removed += 1;
    }
    Ok(())
}
