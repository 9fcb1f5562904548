//! `pitr-restore locate`: commits, drops and large deletes near a time, of a transaction, or of a
//! relation, each with the flags that restore to just before it.
//!
//! Ends of transactions and the files that they removed come from the archive's summaries. Rows and
//! names come from WAL and a backup, up to `READ_MAX_BYTES`. A note names everything that is not
//! known; nothing is guessed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use repository::{UnseenPlace, WalRange};
use serde::Serialize;
use wal_format::{
    BackupInfo, Branch, Lsn, ManifestFile, PgTimestamp, RelationFile, TransactionEnd,
    TransactionEndKind, WalEvent,
};

use crate::{
    Result,
    inventory::{Archive, Inventory},
    list::RestorePoint,
    plan::{
        PathPart, PlanError, Wishes, cover,
        full_xid::{self, Epochs},
        print_path, timeline_path,
    },
};

mod changes;
mod names;

use changes::Changes;
pub use changes::RowCounts;
use names::Names;

/// The number of unremarkable commits that are listed on each side of a time.
const NEIGHBOURS: usize = 5;
/// The maximum number of transactions that are listed. All of them are counted.
const LISTED_MAX: usize = 200;
/// The number of deleted rows from which a delete is large.
const LARGE_DELETE: u64 = 1000;
/// The maximum amount of WAL that is read to count rows and to learn names.
const READ_MAX_BYTES: u64 = 1 << 30;
/// The length of the WAL before a transaction's end that is searched for its records.
const TRANSACTION_MAX_BYTES: u64 = 256 << 20;

/// The subject of a search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// Transactions near a time: up to `within` before and after it.
    Around {
        /// The time in the middle.
        time: PgTimestamp,
        /// The distance in microseconds.
        within: i64,
    },
    /// The removal of a relation's file: a name, with or without its schema, or a file number.
    Dropped(String),
    /// The end of a transaction. The number may contain its epoch.
    Xid(u64),
}

/// A relation, as far as its name is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Relation {
    /// The file of the relation.
    pub file: RelationFile,
    /// The name of its database; `None` if unknown.
    pub database: Option<String>,
    /// Its schema and name; `None` if unknown.
    pub name: Option<String>,
}

/// Rows of a relation that a transaction changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChangedRows {
    /// The relation.
    pub relation: Relation,
    /// The number of rows.
    #[serde(flatten)]
    pub counts: RowCounts,
}

/// A transaction that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocatedTransaction {
    /// The transaction ID, without its epoch.
    pub xid: u32,
    /// The start of the record of its end.
    pub lsn: Lsn,
    /// The time in that record.
    pub time: PgTimestamp,
    /// The kind of its end.
    pub kind: TransactionEndKind,
    /// Relations whose files its commit removed: by DROP, TRUNCATE, or a rewrite such as VACUUM
    /// FULL.
    pub removed: Vec<Relation>,
    /// The changed rows, as far as they were counted.
    pub rows: Vec<ChangedRows>,
    /// The options of a restore to just before the record; `None` if no backup reaches it.
    pub just_before: Option<String>,
}

/// The answer to a question.
#[derive(Clone, Debug, Serialize)]
pub struct Located {
    /// The timelines that were searched.
    pub timelines: String,
    /// The transactions that match, in the order of the WAL.
    pub transactions: Vec<LocatedTransaction>,
    /// Restore points near the time.
    pub restore_points: Vec<RestorePoint>,
    /// Sentences that name everything that was not searched or is unknown.
    pub notes: Vec<String>,
}

/// Returns the schemas and names of relations, by database and OID, as the backup has them.
///
/// # Errors
/// Errors of reading the backup.
pub(crate) fn names_of(
    archive: &Archive,
    backup: &BackupInfo,
    relations: &BTreeSet<(u32, u32)>,
) -> Result<BTreeMap<(u32, u32), String>> {
    let databases = relations.iter().map(|(database, _)| *database).collect();
    let names = Names::of_backup(archive, backup, &databases)?;
    let named = |key: &(u32, u32)| Some((*key, names.of_oid(key.0, key.1)?));
    Ok(relations.iter().filter_map(named).collect())
}

/// Answers a question.
///
/// # Errors
/// [`PlanError::Unknown`] if nothing is found; errors of reading the archive.
pub fn locate(archive: &Archive, question: &Question, timeline: Option<String>) -> Result<Located> {
    let wishes = Wishes {
        backup: None,
        timeline,
    };
    let path = timeline_path(archive, &wishes)?;
    let mut search = Search {
        archive,
        path,
        notes: archive.unseen.iter().map(UnseenPlace::warning).collect(),
    };
    let found = search.ends(question)?;
    let mut names = search.names(&found, question)?;
    let rows = search.rows(&found, question, &mut names)?;
    let reach = search.reach()?;
    let describe = |file: &RelationFile| Relation {
        file: *file,
        database: names.database(file.database),
        name: names.relation(*file),
    };
    let mut transactions: Vec<LocatedTransaction> = Vec::new();
    for (lsn, (branch, end, removed)) in &found {
        let changed = rows.get(&end.xid).into_iter().flatten();
        let mut rows: Vec<ChangedRows> = changed
            .map(|(file, counts)| ChangedRows {
                relation: describe(file),
                counts: *counts,
            })
            .collect();
        rows.sort_by_key(|rows| std::cmp::Reverse(rows.counts.deleted));
        transactions.push(LocatedTransaction {
            xid: end.xid,
            lsn: *lsn,
            time: end.time,
            kind: end.kind,
            removed: removed.iter().map(describe).collect(),
            rows,
            just_before: search.just_before(&reach, *branch, *lsn, !removed.is_empty()),
        });
    }
    search.select(question, &mut transactions);
    let restore_points = search.restore_points(question)?;
    if transactions.is_empty() && restore_points.is_empty() {
        return Err(search.nothing(question));
    }
    if transactions.len() > LISTED_MAX {
        let more = transactions.len() - LISTED_MAX;
        search.notes.push(format!(
            "{more} more were found and are not listed; ask for less with --within"
        ));
        transactions.truncate(LISTED_MAX);
    }
    Ok(Located {
        timelines: print_path(&search.path),
        transactions,
        restore_points,
        notes: search.notes,
    })
}

/// The matching transaction ends by LSN: the timeline that archived each, the end, and the files
/// that it removed.
type Found = BTreeMap<Lsn, (Branch, TransactionEnd, Vec<RelationFile>)>;

struct Search<'a> {
    archive: &'a Archive,
    path: Vec<PathPart>,
    notes: Vec<String>,
}

impl Search<'_> {
    fn ranges(&self, part: &PathPart) -> Result<Vec<WalRange>> {
        let size = self.archive.identity().wal_segment_size.bytes();
        self.archive
            .ranges(part.branch, part.from.align_down(size), part.to)
    }

    /// Returns the transaction ends that match, with the files that they removed.
    fn ends(&self, question: &Question) -> Result<Found> {
        let mut found = Found::new();
        let mut epochs = Epochs::default();
        let epoch_of = match question {
            Question::Xid(xid) if full_xid::names_epoch(*xid) => Some(*xid),
            _ => None,
        };
        for part in &self.path {
            for range in self.ranges(part)? {
                if epoch_of.is_none() && !may_hold(&range, question) {
                    continue;
                }
                let summary = self.archive.summary(&range)?;
                epochs.add(&summary, |lsn| lsn < part.to);
                let mut removed: HashMap<Lsn, Vec<RelationFile>> = HashMap::new();
                for (lsn, event) in summary.events {
                    if let WalEvent::DroppedRelations { relations, .. } = event {
                        removed.entry(lsn).or_default().extend(relations);
                    }
                }
                for end in summary.transactions {
                    let files = removed.remove(&end.lsn).unwrap_or_default();
                    // A later timeline's copy of WAL before the switch counts only if the older
                    // timeline did not archive that WAL itself.
                    if end.lsn < part.to && is_meant(&end, !files.is_empty(), question) {
                        let known = found.entry(end.lsn);
                        known.or_insert((part.branch, end, files));
                    }
                }
            }
        }
        if let Some(xid) = epoch_of {
            found.retain(|_, (_, end, _)| epochs.is(end, xid));
        }
        Ok(found)
    }

    /// Returns the names of relations as of the newest backup before the first match.
    fn names(&mut self, found: &Found, question: &Question) -> Result<Names> {
        let Some(first) = found.keys().next() else {
            return Ok(Names::default());
        };
        let Some(backup) = self.backup_before(*first)? else {
            self.notes.push(
                "no backup ends before it: relations are shown by their file numbers".to_owned(),
            );
            return Ok(Names::default());
        };
        let mut databases: BTreeSet<u32> = found
            .values()
            .flat_map(|(_, _, files)| files)
            .map(|file| file.database)
            .collect();
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
        Names::of_backup(self.archive, &backup, &databases)
    }

    fn backup_before(&self, lsn: Lsn) -> Result<Option<BackupInfo>> {
        let on_path = |backup: &BackupInfo| {
            let mut parts = self.path.iter();
            backup.stop_lsn <= lsn
                && parts.any(|part| part.branch == backup.branch && backup.stop_lsn <= part.to)
        };
        let backups = self.archive.backups()?.into_iter();
        Ok(backups
            .filter(on_path)
            .max_by_key(|backup| backup.start_lsn))
    }

    /// Counts the changed rows of the found transactions, up to [`READ_MAX_BYTES`] of WAL.
    fn rows(
        &mut self,
        found: &Found,
        question: &Question,
        names: &mut Names,
    ) -> Result<HashMap<u32, HashMap<RelationFile, RowCounts>>> {
        let (Some(first), Some(last)) = (found.keys().next(), found.keys().next_back()) else {
            return Ok(HashMap::new());
        };
        let from = match question {
            Question::Around { .. } => *first,
            Question::Xid(_) => Lsn(first.0.saturating_sub(TRANSACTION_MAX_BYTES)),
            // The name of a relation that was created after the backup is in the WAL after it.
            Question::Dropped(_) => match self.backup_before(*first)? {
                Some(backup) => backup.start_lsn,
                None => return Ok(HashMap::new()),
            },
        };
        let mut parts = Vec::new();
        let mut bytes = 0_u64;
        for part in &self.path {
            let mut ranges = self.ranges(part)?;
            // The last record may end in a later range than the one in which it starts.
            let continues = |range: &WalRange| {
                let starts = [range.first_record_lsn, range.open_record_lsn];
                starts.into_iter().flatten().any(|start| start <= *last)
            };
            ranges.retain(|range| {
                range.end_lsn > from && (range.start_lsn <= *last || continues(range))
            });
            let length = |range: &WalRange| range.end_lsn.bytes_since(range.start_lsn);
            bytes = bytes.saturating_add(ranges.iter().map(length).sum());
            parts.push((*part, ranges));
        }
        if bytes > READ_MAX_BYTES {
            let mebibytes = bytes >> 20;
            self.notes.push(match question {
                Question::Dropped(_) => format!(
                    "{mebibytes} MiB of WAL since the backup were not read: a relation that was made since has no name here"
                ),
                _ => format!("rows were not counted in {mebibytes} MiB of WAL; ask for less with --within"),
            });
            return Ok(HashMap::new());
        }
        let mut changes = Changes::new(names);
        for (part, ranges) in parts {
            changes.count(self.archive, &part, &ranges)?;
        }
        if matches!(question, Question::Dropped(_)) {
            return Ok(HashMap::new());
        }
        self.notes.push(format!("rows were counted from {from} on"));
        Ok(changes.by_transaction())
    }

    /// The range of LSNs that each usable backup reaches.
    fn reach(&self) -> Result<Vec<(Lsn, Lsn)>> {
        let mut reach = Vec::new();
        let mut backups = self.archive.backups()?;
        let damaged = self.archive.damaged_backups();
        backups.retain(|backup| !damaged.contains_key(&backup.id));
        for backup in backups {
            let mut parts = self.path.iter();
            if parts.any(|part| part.branch == backup.branch && backup.stop_lsn <= part.to) {
                let coverage = cover(self.archive, &self.path, backup.start_lsn)?;
                reach.push((backup.stop_lsn, coverage.end_lsn));
            }
        }
        Ok(reach)
    }

    /// Returns the options of a restore to just before the record at `lsn` of `branch`.
    fn just_before(
        &self,
        reach: &[(Lsn, Lsn)],
        branch: Branch,
        lsn: Lsn,
        removes: bool,
    ) -> Option<String> {
        // The lock of a DROP is replayed before its commit, so on a paused server nobody can read
        // the relation.
        let action = if removes {
            " --target-action promote"
        } else {
            ""
        };
        let reached = reach.iter().any(|(from, to)| *from <= lsn && lsn < *to);
        reached.then(|| {
            format!("--target-timeline {branch} --target-lsn {lsn} --target-exclusive{action}")
        })
    }

    /// Keeps the transactions that answer the question.
    fn select(&self, question: &Question, transactions: &mut Vec<LocatedTransaction>) {
        match question {
            Question::Xid(_) => {}
            Question::Dropped(wanted) => transactions.retain(|one| {
                one.removed
                    .iter()
                    .any(|relation| is_called(relation, wanted))
            }),
            Question::Around { time, .. } => {
                let before = transactions.iter().filter(|one| one.time <= *time).count();
                let mut index = 0;
                let mut earlier = 0;
                let mut later = 0;
                transactions.retain(|one| {
                    index += 1;
                    let near = if one.time <= *time {
                        earlier += 1;
                        before - earlier < NEIGHBOURS
                    } else {
                        later += 1;
                        later <= NEIGHBOURS
                    };
                    near || is_remarkable(one)
                });
            }
        }
    }

    fn restore_points(&self, question: &Question) -> Result<Vec<RestorePoint>> {
        let Question::Around { time, within } = question else {
            return Ok(Vec::new());
        };
        let points = self.archive.restore_points()?.into_iter();
        let near = points.filter(|(branch, lsn, at, _)| {
            let mut parts = self.path.iter();
            at.micros_since(*time).saturating_abs() <= *within
                && parts.any(|part| part.branch == *branch && part.from <= *lsn && *lsn < part.to)
        });
        Ok(near
            .map(|(branch, lsn, time, name)| RestorePoint {
                branch,
                lsn,
                time,
                name,
            })
            .collect())
    }

    fn nothing(&self, question: &Question) -> crate::Error {
        let what = match question {
            Question::Around { time, .. } => {
                format!("anything near {time} (ask for more with --within)")
            }
            Question::Dropped(name) => {
                format!(
                    "the end of a relation that is known as \"{name}\" (or give the number of its file)"
                )
            }
            Question::Xid(xid) => format!("the end of transaction {xid}"),
        };
        let ranges = self
            .path
            .iter()
            .flat_map(|part| self.ranges(part).unwrap_or_default());
        let bounds: Vec<(Lsn, Lsn)> = ranges
            .map(|range| (range.start_lsn, range.end_lsn))
            .collect();
        let unknown = PlanError::Unknown {
            what,
            path: print_path(&self.path),
            from: bounds
                .iter()
                .map(|(from, _)| *from)
                .min()
                .unwrap_or(Lsn::ZERO),
            to: bounds.iter().map(|(_, to)| *to).max().unwrap_or(Lsn::ZERO),
        };
        unknown.into()
    }
}

/// Returns false if no transaction end of a range can match.
fn may_hold(range: &WalRange, question: &Question) -> bool {
    match question {
        Question::Around { time, within } => {
            let near = |at: PgTimestamp| at.micros_since(*time).saturating_abs() <= *within;
            let spans = range.min_time.zip(range.max_time);
            spans.is_some_and(|(min, max)| near(min) || near(max) || (min..=max).contains(time))
        }
        Question::Dropped(_) | Question::Xid(_) => range.transaction_count > 0,
    }
}

fn is_meant(end: &TransactionEnd, removes: bool, question: &Question) -> bool {
    match question {
        Question::Around { time, within } => {
            end.kind.is_commit() && end.time.micros_since(*time).saturating_abs() <= *within
        }
        Question::Dropped(_) => end.kind.is_commit() && removes,
        Question::Xid(xid) => full_xid::may_be(end, *xid),
    }
}

fn is_remarkable(one: &LocatedTransaction) -> bool {
    !one.removed.is_empty()
        || one
            .rows
            .iter()
            .any(|rows| rows.counts.deleted >= LARGE_DELETE)
}

fn is_called(relation: &Relation, wanted: &str) -> bool {
    let name = relation.name.as_deref();
    let bare = name
        .and_then(|name| name.split_once('.'))
        .map(|(_, bare)| bare);
    name == Some(wanted) || bare == Some(wanted) || relation.file.relation.to_string() == wanted
}
