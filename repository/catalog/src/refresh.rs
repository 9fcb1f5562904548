//! Makes a catalog equal to its repository, from listings and the ends of objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

use repository::{Error, LostHistory, Repository, Result, WalRange, WalRangeKind};
use wal_format::{BackupInfo, Branch, ObjectKey, SealedFooter, sealed::FooterFromTail};

use super::{Catalog, RESTORE_POINTS, keys};

/// Ends of objects that are read at a time: each read is a wait for the network.
const READERS: usize = 16;
/// Objects whose ends are in memory at a time.
const ROUND: usize = 512;
/// How often WAL is looked at that moves meanwhile. Each look is short: what the one before found is in the catalog.
const LOOKS_MAX: usize = 8;

/// What a refresh did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefreshReport {
    /// Ranges of WAL and backups that were new to the catalog.
    pub added: usize,
    /// Those that the repository has no more.
    pub removed: usize,
    /// Objects that cannot be understood, with the reason. They count as missing.
    pub damaged: Vec<(String, String)>,
    /// Timelines of which WAL or a backup is archived, and no intact history file: no restore can follow them.
    pub lost_histories: Vec<LostHistory>,
}

pub(super) fn refresh(catalog: &Catalog, repository: &Repository) -> Result<RefreshReport> {
    let mut report = RefreshReport::default();
    let system = catalog.identity.system_identifier;
    catalog.follow_expired(repository)?;
    count_minimal(catalog)?;
    let mut evidence = BTreeMap::new();
    for _ in 0..LOOKS_MAX {
        report.damaged.clear();
        evidence.clear();
        if refresh_ranges(catalog, repository, &mut report, &mut evidence)? {
            break;
        }
    }
    refresh_backups(catalog, repository, &mut report)?;
    for backup in catalog.backups()? {
        let name = || format!("backup {}", backup.id);
        evidence.entry(backup.branch).or_insert_with(name);
    }
    // After the WAL: a timeline's history file is stored before the first of its WAL.
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
    for (_, value) in catalog.all(super::SEGMENTS)? {
        let range: WalRange = catalog.parse(super::SEGMENTS, &value)?;
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

/// Reads the listings once, and puts an object of each timeline into `evidence`. Returns false when something that was listed was gone before it was read, as a tail is whose segment was sealed after
/// the segments were listed. Then this look has seen neither, and a hole where there is none.
fn refresh_ranges(
    catalog: &Catalog,
    repository: &Repository,
    report: &mut RefreshReport,
    evidence: &mut BTreeMap<Branch, String>,
) -> Result<bool> {
    let system = catalog.identity.system_identifier;
    let expired = catalog.expired()?;
    let mut gone = catalog.all_ranges()?;
    // Sealed segments after tails: one that is sealed between the listings is then seen in one of them at least.
    let tails = repository.list(&format!("{system}/tail/"))?;
    let segments = repository.list(&format!("{system}/wal/"))?;
    let (mut sealed, mut is_still) = (BTreeSet::new(), true);
    // A bucket that lets nothing go keeps every tail for ever: one whose segment is sealed and sound is not read.
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
            !gone.remove(keys::range(&skeleton).as_slice())
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
    for key in gone {
        let Some(value) = catalog.get(super::SEGMENTS, &key)? else {
            continue;
        };
        let range: WalRange = catalog.parse(super::SEGMENTS, &value)?;
        catalog.remove_range(&range)?;
        report.removed += 1;
    }
    // Timeline 1 has no history file; what is archived of it says that it exists.
    for branch in evidence.keys().filter(|branch| branch.digest == [0; 4]) {
        catalog.put_branch(*branch, None)?;
    }
    debug_assert!(
        catalog.all(RESTORE_POINTS).is_ok(),
        "BUG: restore points can be read"
    );
    Ok(is_still)
}

/// What an object's name and end say of it, from the catalog where that knows it; `None` when it is no WAL of ours.
pub(super) fn range_of(
    catalog: &Catalog,
    repository: &Repository,
    key: &ObjectKey,
    size: u64,
) -> Result<Option<WalRange>> {
    let Some(skeleton) = skeleton(catalog, key, size) else {
        return Ok(None);
    };
    if let Some(value) = catalog.get(super::SEGMENTS, &keys::range(&skeleton))? {
        return catalog.parse(super::SEGMENTS, &value).map(Some);
    }
    let footer = sound_footer(repository, key, size)?;
    let range = WalRange::of_footer(&footer, skeleton.kind, size);
    Ok((range.key(&catalog.identity) == *key).then_some(range))
}

/// Puts what an object's end says into the catalog; whether it could.
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
        // Replaced by its sealed segment since it was listed: the next look has that.
        Err(error) if error.is_not_found() => {}
        Err(Error::Damaged { key, problem, .. }) => {
            tracing::error!(%key, %problem, "a damaged object counts as missing");
            report.damaged.push((key, problem));
        }
        Err(error) => return Err(error),
    }
    Ok(false)
}

/// The ends of a round's objects, in its order.
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
        // Another place may have it as it was.
        Err(Error::Damaged { .. }) => repository
            .get(key)
            .and_then(|object| footer_of(repository, key, &object)),
        footer => footer,
    }
}

/// What the key alone says of a range: enough to find it in the catalog.
fn skeleton(catalog: &Catalog, key: &ObjectKey, size: u64) -> Option<WalRange> {
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

fn refresh_backups(
    catalog: &Catalog,
    repository: &Repository,
    report: &mut RefreshReport,
) -> Result<()> {
    let system = catalog.identity.system_identifier;
    let known: Vec<_> = catalog
        .backups()?
        .into_iter()
        .map(|backup| backup.id)
        .collect();
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
    for id in known.iter().filter(|id| !found.contains(id)) {
        catalog.remove_backup(id)?;
        report.removed += 1;
    }
    Ok(())
}
