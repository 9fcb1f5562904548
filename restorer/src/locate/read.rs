//! The content of the found transactions: the names of their relations, from the newest backup
//! before each event and the WAL after that backup, and the rows that they changed, from the WAL.
//!
//! Invariant: no backup that ends after an event names a relation of that event.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Deref,
};

use repository::WalRange;
use wal_format::{BackupId, BackupInfo, Lsn, ManifestFile, RelationFile};

use super::{
    Found, LocatedTransaction, Question, Relation, RowCounts, Search, changes::Changes,
    names::Names,
};
use crate::{Result, inventory::Inventory};

/// The maximum amount of WAL that is read to count rows and to learn names.
const READ_MAX_BYTES: u64 = 1 << 30;
/// The length of the WAL before a transaction's end that is searched for its records.
const TRANSACTION_MAX_BYTES: u64 = 256 << 20;
/// The maximum number of backups whose names are read: the newest ones before the events.
const BACKUPS_MAX: usize = 32;

/// The names for the events that have the same newest backup before them.
#[derive(Debug)]
pub(super) struct Named {
    /// The start of that backup. WAL from here on adds names.
    pub(super) from: Lsn,
    /// The first of the events.
    first: Lsn,
    /// The last of the events.
    pub(super) last: Lsn,
    pub(super) names: Names,
}

impl Named {
    /// Returns true if the event at `lsn` is one of the events.
    pub(super) fn covers(&self, lsn: Lsn) -> bool {
        self.first <= lsn && lsn <= self.last
    }
}

impl Deref for Named {
    type Target = Names;

    fn deref(&self) -> &Names {
        &self.names
    }
}

impl Search<'_> {
    /// Returns the names of relations, for each event as of the newest backup before it.
    pub(super) fn names(&mut self, found: &Found, question: &Question) -> Result<Vec<Named>> {
        let mut spans: BTreeMap<(Lsn, BackupId), (BackupInfo, Vec<Lsn>)> = BTreeMap::new();
        let backups = self.leading_backups()?;
        for lsn in found.keys() {
            let earlier = backups.iter().filter(|backup| backup.stop_lsn <= *lsn);
            if let Some(backup) = earlier.max_by_key(|backup| backup.start_lsn) {
                let key = (backup.start_lsn, backup.id.clone());
                let span = spans.entry(key).or_insert((backup.clone(), Vec::new()));
                span.1.push(*lsn);
            }
        }
        if let Some(unread) = spans
            .len()
            .checked_sub(BACKUPS_MAX)
            .filter(|more| *more > 0)
        {
            self.notes.push(format!(
                "the events lie after {} backups; the names in the oldest {unread} of them were not read; ask for a \
                 shorter time with --within",
                spans.len()
            ));
        }
        let mut named = Vec::new();
        for (backup, events) in spans.into_values().rev().take(BACKUPS_MAX) {
            let (Some(first), Some(last)) = (events.first(), events.last()) else {
                continue;
            };
            let removed = found
                .range(*first..=*last)
                .flat_map(|(_, (.., files))| files);
            let mut databases: BTreeSet<u32> = removed.map(|file| file.database).collect();
            if !matches!(question, Question::Dropped(_)) {
                // The databases of changed rows are known only after the rows are counted.
                let manifest = self.archive.manifest(&backup)?;
                let database = |file: &ManifestFile| {
                    let rest = file.path.strip_prefix("base/")?;
                    rest.split('/').next()?.parse::<u32>().ok()
                };
                databases.extend(manifest.files.iter().filter_map(database));
            }
            databases.remove(&0);
            named.push(Named {
                from: backup.start_lsn,
                first: *first,
                last: *last,
                names: Names::of_backup(self.archive, &backup, &databases)?,
            });
        }
        Ok(named)
    }

    /// Returns the backups that lead to the searched timelines and are not known to be damaged.
    fn leading_backups(&self) -> Result<Vec<BackupInfo>> {
        let mut backups = self.archive.backups()?;
        let damaged = self.archive.damaged_backups();
        backups.retain(|backup| {
            !damaged.contains_key(&backup.id) && repository::leads_to(&self.path, backup)
        });
        Ok(backups)
    }

    /// Counts the changed rows of the found transactions, and adds the names of relations that
    /// were created after the backups. Reads up to [`READ_MAX_BYTES`] of WAL.
    pub(super) fn rows(
        &mut self,
        found: &Found,
        question: &Question,
        named: &mut [Named],
    ) -> Result<HashMap<u32, HashMap<RelationFile, RowCounts>>> {
        let (Some(first), Some(last)) = (found.keys().next(), found.keys().next_back()) else {
            return Ok(HashMap::new());
        };
        // Rows are complete only if the WAL is read from here on.
        let needed = match question {
            Question::Around { .. } => Some(*first),
            Question::Xid(_) => Some(Lsn(first.0.saturating_sub(TRANSACTION_MAX_BYTES))),
            Question::Dropped(_) => None,
        };
        let mut starts: Vec<Lsn> = named.iter().map(|named| named.from).collect();
        starts.retain(|start| needed.is_none_or(|needed| *start < needed));
        starts.extend(needed);
        starts.sort_unstable();
        let mut wal = None;
        for start in starts {
            wal = Some((start, self.wal_between(start, *last)?));
            if wal
                .as_ref()
                .is_some_and(|(_, wal)| wal.bytes <= READ_MAX_BYTES)
            {
                break;
            }
        }
        let Some((from, wal)) = wal else {
            return Ok(HashMap::new());
        };
        let mebibytes = wal.bytes >> 20;
        if wal.bytes > READ_MAX_BYTES {
            self.notes.push(match question {
                Question::Dropped(_) => format!(
                    "{mebibytes} MiB of WAL since the backup were not read: a relation that was created after the \
                     backup has no name here"
                ),
                _ => format!(
                    "rows were not counted in {mebibytes} MiB of WAL; ask for less with --within"
                ),
            });
            return Ok(HashMap::new());
        }
        if named.iter().any(|named| named.from < from) {
            self.notes.push(format!(
                "the WAL between the backup and {from} was not read: a relation that was created in it has no name here"
            ));
        }
        let mut changes = Changes::new(named);
        for (part, ranges) in wal.parts {
            changes.count(self.archive, &part, &ranges)?;
        }
        if matches!(question, Question::Dropped(_)) {
            return Ok(HashMap::new());
        }
        if let Some(start) = wal.start {
            self.notes.push(format!(
                "rows were counted in the WAL from {} on",
                start.max(from)
            ));
        }
        Ok(changes.by_transaction())
    }

    /// Returns the archived WAL from `from` to the end of the record at `last`.
    fn wal_between(&self, from: Lsn, last: Lsn) -> Result<Wal> {
        let mut wal = Wal::default();
        for part in &self.path {
            let mut ranges = self.ranges(part)?;
            // The last record may end in a later range than the one in which it starts.
            let continues = |range: &WalRange| {
                let starts = [range.first_record_lsn, range.open_record_lsn];
                starts.into_iter().flatten().any(|start| start <= last)
            };
            ranges.retain(|range| {
                range.end_lsn > from && (range.start_lsn <= last || continues(range))
            });
            let length = |range: &WalRange| range.end_lsn.bytes_since(range.start_lsn);
            wal.bytes = wal.bytes.saturating_add(ranges.iter().map(length).sum());
            let start = ranges.first().map(|range| range.start_lsn);
            wal.start = wal.start.or(start);
            wal.parts.push((*part, ranges));
        }
        Ok(wal)
    }

    /// Adds a note if relations before the first backup are listed by their file numbers.
    pub(super) fn note_nameless(&mut self, transactions: &[LocatedTransaction], named: &[Named]) {
        let is_nameless = |relation: &Relation| relation.name.is_none();
        let of_none = |one: &&LocatedTransaction| {
            let removed = one.removed.iter();
            let changed = one.rows.iter().map(|rows| &rows.relation);
            !named.iter().any(|named| named.covers(one.lsn))
                && removed.chain(changed).any(is_nameless)
        };
        let count = transactions.iter().filter(of_none).count();
        if count > 0 {
            self.notes.push(format!(
                "no backup ends before {count} of these transactions: their relations are shown by their file numbers. \
                 `SELECT pg_filenode_relation(0, FILE)` in their database names a relation that still exists there"
            ));
        }
    }
}

/// A part of the archived WAL.
#[derive(Debug, Default)]
struct Wal {
    /// The start of its first range.
    start: Option<Lsn>,
    bytes: u64,
    parts: Vec<(crate::plan::PathPart, Vec<WalRange>)>,
}
