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
    BackupInfo, Branch, Lsn, PgTimestamp, RelationFile, TransactionEnd, TransactionEndKind,
    WalEvent,
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
mod read;

pub use changes::RowCounts;
use names::Names;

/// The default number of unremarkable commits that are listed on each side of a time.
pub const NEIGHBOURS: usize = 5;
/// The number of transactions that are listed unless a larger limit is given. All are counted.
const LISTED_MAX: usize = 200;
/// The number of deleted rows from which a delete is large.
const LARGE_DELETE: u64 = 1000;

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

/// The numbers of transactions that match a question and are not listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Omitted {
    /// Commits at or before the time, farther from it than the listed ones.
    pub earlier: usize,
    /// Transactions after the last listed one.
    pub later: usize,
}

/// The answer to a question.
#[derive(Clone, Debug, Serialize)]
pub struct Located {
    /// The timelines that were searched.
    pub timelines: String,
    /// The transactions that match, in the order of the WAL.
    pub transactions: Vec<LocatedTransaction>,
    /// The transactions that match and are not listed.
    pub omitted: Omitted,
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

/// Answers a question. `limit` is the number of unremarkable commits to list on each side of a
/// time.
///
/// # Errors
/// [`PlanError::Unknown`] if nothing is found; errors of reading the archive.
pub fn locate(
    archive: &Archive,
    question: &Question,
    timeline: Option<String>,
    limit: usize,
) -> Result<Located> {
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
    let mut named = search.names(&found, question)?;
    let rows = search.rows(&found, question, &mut named)?;
    let reach = search.reach()?;
    let mut transactions: Vec<LocatedTransaction> = Vec::new();
    for (lsn, (branch, end, removed)) in &found {
        let names = named.iter().find(|named| named.covers(*lsn));
        let describe = |file: &RelationFile| Relation {
            file: *file,
            database: names.and_then(|names| names.database(file.database)),
            name: names.and_then(|names| names.relation(*file)),
        };
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
    let mut omitted = select(question, limit, &mut transactions);
    let restore_points = search.restore_points(question)?;
    if transactions.is_empty() && restore_points.is_empty() {
        return Err(search.nothing(question));
    }
    let listed_max = LISTED_MAX.max(limit.saturating_mul(2));
    omitted.later += transactions.len().saturating_sub(listed_max);
    transactions.truncate(listed_max);
    search.note_nameless(&transactions, &named);
    Ok(Located {
        timelines: print_path(&search.path),
        transactions,
        omitted,
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
            elsewhere: Vec::new(),
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

/// Keeps the transactions that answer the question. Returns the number of commits near the time
/// that were left out.
fn select(
    question: &Question,
    limit: usize,
    transactions: &mut Vec<LocatedTransaction>,
) -> Omitted {
    let mut omitted = Omitted::default();
    match question {
        Question::Xid(_) => {}
        Question::Dropped(wanted) => transactions.retain(|one| {
            one.removed
                .iter()
                .any(|relation| is_called(relation, wanted))
        }),
        Question::Around { time, .. } => {
            let mut before = transactions.iter().filter(|one| one.time <= *time).count();
            let mut after = 0;
            transactions.retain(|one| {
                let (is_near, side) = if one.time <= *time {
                    before -= 1;
                    (before < limit, &mut omitted.earlier)
                } else {
                    after += 1;
                    (after <= limit, &mut omitted.later)
                };
                let is_listed = is_near || is_remarkable(one);
                *side += usize::from(!is_listed);
                is_listed
            });
        }
    }
    omitted
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
