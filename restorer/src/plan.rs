//! START HERE. Decides where PostgreSQL will stop, before a byte is copied: backup, timeline path,
//! stop record.
//!
//! target + inventory -> path of timelines -> the first record at which PostgreSQL stops -> the
//! newest backup that ends before it. No clock, no disk of its own. Invariant: the stop is computed
//! by PostgreSQL's rule (`recoveryStopsBefore` and `recoveryStopsAfter` in `xlogrecovery.c`) and
//! executed as an LSN on a numeric timeline, so that time zones, clocks and idle databases cannot
//! change it.

use std::path::{Path, PathBuf};

use repository::{UnseenPlace, WalRange};

use serde::{Deserialize, Serialize};
use wal_format::{BackupId, BackupInfo, Branch, Lsn, PgTimestamp, TransactionEnd, WalChange};

use crate::{
    Error, Result,
    execute::{Owner, mapping_of},
    inventory::Inventory,
    space::FileSystem,
    tablespaces::ReplayedTablespace,
    target::RecoveryTarget,
    unfinished::{HeldLock, RemovedFiles},
};

mod choice;
mod clock;
pub(crate) mod estimate;
pub(crate) mod full_xid;
mod in_doubt;
mod lost;
mod minimal;
mod path;
mod stop;

pub use choice::NotChosen;
pub use in_doubt::PreparedTransaction;
pub(crate) use in_doubt::in_doubt;

pub(crate) use path::{Coverage, Index, cover};
pub use path::{PathPart, print_path, timeline_path};
use stop::{Found, find_stop, immediate_stop};

/// How many late commits a plan lists; all are counted.
const LATE_COMMITS_LISTED: usize = 20;

/// Where recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stop", rename_all = "snake_case")]
pub enum Stop {
    /// Before the record that starts at this LSN.
    Before {
        /// The record.
        lsn: Lsn,
    },
    /// After the record that starts at this LSN.
    After {
        /// The record.
        lsn: Lsn,
    },
    /// When the backup is consistent.
    Consistent,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Before { lsn } => write!(f, "before the record at {lsn}"),
            Self::After { lsn } => write!(f, "after the record at {lsn}"),
            Self::Consistent => f.write_str("as soon as the backup is consistent"),
        }
    }
}

/// Everything that will happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// The backup.
    pub backup: BackupId,
    /// Why this one.
    pub reason: String,
    /// Newer backups that would have been chosen, and cannot be used.
    #[serde(default)]
    pub not_chosen: Vec<NotChosen>,
    /// The timelines that are replayed, oldest first. The last one holds the stop: it is
    /// `recovery_target_timeline`.
    pub path: Vec<PathPart>,
    /// The timelines on the way to the wanted one that recovery does not enter, because it stops
    /// before. The segment in which they begin starts with a copy of the WAL before the switch, and
    /// may be the only one that was archived.
    #[serde(default)]
    pub later: Vec<PathPart>,
    /// Where redo starts.
    pub start_lsn: Lsn,
    /// Where recovery stops.
    pub stop: Stop,
    /// The last commit that is kept, where the plan had to look at it.
    pub last_kept: Option<TransactionEnd>,
    /// The first transaction that is not.
    pub first_dropped: Option<TransactionEnd>,
    /// The part of the time before the target for which the archive proves nothing; `None` if the
    /// archive is proved up to the target.
    #[serde(default)]
    pub unproved: Option<Unproved>,
    /// How many commits lie behind the stop although their time is not after the target.
    pub late_commit_count: u64,
    /// The first of them.
    pub late_commits: Vec<TransactionEnd>,
    /// The prepared transactions that are neither committed nor rolled back at the stop. They hold
    /// their locks until somebody ends them, as they did on the server.
    #[serde(default)]
    pub in_doubt: Vec<PreparedTransaction>,
    /// The stop that was asked for, if the plan stops right after the last kept commit instead: the
    /// rows are the same, without what an unfinished DROP has done at that stop already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_from: Option<Stop>,
    /// Locks that keep readers out of a server that pauses at the stop.
    #[serde(default)]
    pub locks: Vec<HeldLock>,
    /// True if the locks at the stop were looked for and found out.
    #[serde(default)]
    pub locks_known: bool,
    /// Databases and tablespaces that have lost their files at the stop.
    #[serde(default)]
    pub removed: Vec<RemovedFiles>,
    /// The tablespaces that the replay creates, in the order of the WAL.
    #[serde(default)]
    pub tablespaces: Vec<ReplayedTablespace>,
    /// Bytes that `wal-fetch` delivers instead of the archived ones.
    #[serde(default)]
    pub wal_changes: Vec<WalChange>,
    /// The owner of the claims on the directories of tablespaces; `None` before the restore begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Owner>,
    /// The end of the WAL that the recovery may ask for.
    pub wal_end_lsn: Lsn,
    /// Length of the backup in the repository.
    pub backup_bytes: u64,
    /// Length of the WAL objects that are read.
    pub wal_bytes: u64,
    /// Length of both: the bytes to fetch.
    #[serde(default)]
    pub fetch_bytes: u64,
    /// Length of the unpacked backup.
    #[serde(default)]
    pub unpacked_bytes: u64,
    /// Length of the WAL that is replayed.
    #[serde(default)]
    pub replayed_bytes: u64,
    /// The file systems that the restore writes to; none while no target directory is named.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// The estimated duration, in seconds.
    pub estimated_seconds: u64,
    /// The rates of the estimate, and where they come from.
    #[serde(default)]
    pub estimate_basis: String,
    /// The repositories of the cluster of which nothing was seen: they may hold later WAL.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unseen_repositories: Vec<UnseenPlace>,
}

/// The time between the last proof that the archive is complete and a target that is later. Commits
/// in it, if there are any, are not archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unproved {
    /// The last time up to which the archive is proved; `None` if it contains no time of the
    /// server.
    pub proved: Option<PgTimestamp>,
    /// The target.
    pub target: PgTimestamp,
}

/// Why a target cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Backups disagree about the stop.
    #[error(
        "the target is ambiguous: the server's clock went backwards, so from backup {newer} recovery stops {newer_stop} \
         and from {older} it stops {older_stop}; choose with --backup"
    )]
    Ambiguous {
        /// The newer backup.
        newer: BackupId,
        /// Its stop.
        newer_stop: Stop,
        /// The older one.
        older: BackupId,
        /// Its stop.
        older_stop: Stop,
    },
    /// Several restore points have the name.
    #[error("several restore points have the name \"{name}\": {points}; choose one with --at-lsn")]
    AmbiguousName {
        /// The name.
        name: String,
        /// Their LSNs and times.
        points: String,
    },
    /// The archive ends before the target, or its end was never proved.
    #[error(
        "the target {target} lies beyond the archive, which is proved up to {proven} (last commit {last_commit}, WAL up to \
         {end_lsn}); restore without a target for everything that is archived, or to an earlier time"
    )]
    BeyondArchive {
        /// What was asked for.
        target: String,
        /// Up to when.
        proven: String,
        /// The last commit's time.
        last_commit: String,
        /// The end of the WAL.
        end_lsn: Lsn,
    },
    /// Retention gave the moment up.
    #[error("{refusal}. What was there expired: {expired}")]
    Expired {
        /// Why it cannot be reached.
        refusal: Box<Self>,
        /// What retention gave up, when, and by which policy.
        expired: String,
    },
    /// Retention gave the named backup up.
    #[error(
        "backup {backup}, which ended {finished}, expired {marked}: {policy}; see `pitr-restore list`"
    )]
    ExpiredBackup {
        /// The backup.
        backup: BackupId,
        /// Its end.
        finished: PgTimestamp,
        /// When it was given up.
        marked: PgTimestamp,
        /// The policy.
        policy: String,
    },
    /// WAL is missing on the way.
    #[error(
        "WAL is missing from {from} on timeline {branch}, before the target is reached; {nearest}",
        nearest = nearest(*last)
    )]
    Gap {
        /// The branch.
        branch: Branch,
        /// The first missing byte.
        from: Lsn,
        /// The last record before it that a recovery can stop after.
        last: Option<Lsn>,
    },
    /// The server had `wal_level = minimal` on the way.
    #[error(
        "the server wrote WAL with wal_level = minimal from {lsn} on timeline {branch}{moment}, before the target is reached: \
         changes may be missing from it, so a recovery over it loses rows; {nearest}",
        moment = since.map_or_else(String::new, |time| format!(" (after {time})")),
        nearest = minimal::print_nearest(nearest)
    )]
    MinimalWal {
        /// The branch.
        branch: Branch,
        /// The record that announces it.
        lsn: Lsn,
        /// The last time that is known before it.
        since: Option<PgTimestamp>,
        /// Flags of reachable targets next to it.
        nearest: Vec<String>,
    },
    /// There is no backup.
    #[error("no base backup is archived; take one with `wal-archiver backup`")]
    NoBackup,
    /// The backup that was asked for is not on the way to the wanted timeline.
    #[error(
        "backup {backup} was taken on timeline {branch}, which the path {path} does not cross before its end at {stop_lsn}; \
         leave out --backup, or choose with --target-timeline a timeline that continues {branch}"
    )]
    BackupElsewhere {
        /// The backup.
        backup: BackupId,
        /// Its timeline.
        branch: Branch,
        /// Its end.
        stop_lsn: Lsn,
        /// The timelines on the way.
        path: String,
    },
    /// A file system has not the space that the restore needs.
    #[error(
        "too little space: {shortages}; free some, give another directory with --target-dir or --tablespace-mapping, or restore \
         anyway with --force"
    )]
    NoSpace {
        /// The directories on each such file system, with what is needed and what is free.
        shortages: String,
    },
    /// There is no WAL.
    #[error("no WAL is archived; is `wal-archiver run` running, and is this its --cluster?")]
    NoWal,
    /// There are backups, but none of them leads to the wanted timeline.
    #[error(
        "no base backup leads to timeline {wanted}: each was taken elsewhere, or ends after the path {path} left its timeline; \
         see `pitr-restore list`, or choose another --target-timeline"
    )]
    NoBackupOnPath {
        /// The timeline.
        wanted: Branch,
        /// The timelines on the way.
        path: String,
    },
    /// The replay creates a tablespace in a directory that is in use here.
    #[error(
        "the replay creates tablespace {oid} at {lsn} in {location}, and {directory} {why}: the copy would write into the \
         files of another server; choose an empty or new directory with --tablespace-mapping {mapping}",
        directory = directory.display(),
        mapping = mapping_of(Path::new(location))
    )]
    TablespaceInUse {
        /// The tablespace.
        oid: u32,
        /// The record that creates it.
        lsn: Lsn,
        /// The directory that the WAL names.
        location: String,
        /// The directory that it would get.
        directory: PathBuf,
        /// Its state, as the predicate of a sentence.
        why: String,
    },
    /// A standby reads the WAL as it is archived.
    #[error(
        "the WAL creates tablespace {oid} at {lsn} in {location}, and a standby follows the WAL as it is: --tablespace-mapping \
         works for tablespaces that are older than the backup; take a new backup with `wal-archiver backup`"
    )]
    TablespaceOfStandby {
        /// The tablespace.
        oid: u32,
        /// The directory that the WAL names.
        location: String,
        /// The record that creates it.
        lsn: Lsn,
    },
    /// The target lies before the end of every backup.
    #[error(
        "no base backup ends before the target: the earliest reachable state is that of backup {earliest} at {stop_lsn} \
         ({finished}), --backup {earliest} --target-immediate"
    )]
    TooEarly {
        /// The oldest backup.
        earliest: BackupId,
        /// Its end.
        stop_lsn: Lsn,
        /// When that was.
        finished: PgTimestamp,
    },
    /// The timeline was never archived.
    #[error("timeline {wanted} is not archived; archived are: {known}")]
    UnknownTimeline {
        /// What was asked for.
        wanted: String,
        /// Those that are.
        known: String,
    },
    /// The named thing does not exist.
    #[error(
        "{what} is not in the archive of timeline {path} between {from} and {to}; see `pitr-restore list`, or choose another \
         timeline with --target-timeline"
    )]
    Unknown {
        /// What was asked for.
        what: String,
        /// The timelines on the way.
        path: String,
        /// Where it was looked for.
        from: Lsn,
        /// Until where.
        to: Lsn,
    },
}

fn nearest(last: Option<Lsn>) -> String {
    match last {
        Some(last) => format!("the nearest reachable target is --target-lsn {last}"),
        None => {
            "the backup can not be made consistent, choose another one with --backup".to_owned()
        }
    }
}

/// The operator's choices besides the target.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// This backup and no other.
    pub backup: Option<BackupId>,
    /// This timeline: a number, or a branch where the number names two.
    pub timeline: Option<String>,
}

/// Chooses the newest base backup that ends before the point where PostgreSQL stops, and names that
/// point.
///
/// # Errors
/// [`Error::Plan`] with the reason and the nearest reachable target.
pub fn plan_restore(
    inventory: &dyn Inventory,
    target: &RecoveryTarget,
    wishes: &Wishes,
) -> Result<RestorePlan> {
    let path = timeline_path(inventory, wishes)?;
    let mut backups = inventory.backups()?;
    let mut choice = choice::Choice::of(inventory, &backups);
    if let Some(id) = &wishes.backup {
        backups.retain(|backup| backup.id == *id);
        if backups.is_empty() {
            return Err(Error::usage(format!(
                "backup {id} is not archived; see `pitr-restore list`"
            )));
        }
    }
    let reachable = |backup: &BackupInfo| repository::leads_to(&path, backup);
    let wished = wishes.backup.as_ref().and(backups.first()).cloned();
    let archived = !backups.is_empty();
    backups.retain(reachable);
    // In the order of the WAL, which on one path is that of time.
    backups.sort_by_key(|backup| backup.start_lsn);
    let Some(oldest) = backups.first().cloned() else {
        return Err(match (wished, path.last()) {
            (Some(wished), _) => PlanError::BackupElsewhere {
                backup: wished.id,
                branch: wished.branch,
                stop_lsn: wished.stop_lsn,
                path: print_path(&path),
            },
            (None, Some(last)) if archived => PlanError::NoBackupOnPath {
                wanted: last.branch,
                path: print_path(&path),
            },
            _ => PlanError::NoBackup,
        }
        .into());
    };
    let mut refusal = None;
    for (index, backup) in backups.iter().enumerate().rev() {
        let coverage = cover(inventory, &path, backup.start_lsn)?;
        if coverage.end_lsn < backup.stop_lsn {
            let gap = PlanError::Gap {
                branch: coverage.gap_branch,
                from: coverage.end_lsn,
                last: None,
            };
            choice.pass_over(
                backup,
                format!(
                    "WAL is missing from {} on timeline {}, before it is consistent",
                    coverage.end_lsn, coverage.gap_branch
                ),
            );
            refusal.get_or_insert(Error::from(gap));
            continue;
        }
        let stop = match target {
            RecoveryTarget::Immediate => immediate_stop(inventory, &coverage, backup),
            _ => find_stop(inventory, &coverage, target),
        };
        let found = match stop {
            Ok(found) => found,
            // A target that a newer backup cannot reach may be reachable from an older one, since
            // that replays more WAL.
            Err(Error::Plan(error)) => {
                let is_unknown =
                    |error: &Error| matches!(error, Error::Plan(PlanError::Unknown { .. }));
                let replaces = match error {
                    PlanError::Unknown { .. } => true,
                    // It was found, and lies before the newer backup.
                    PlanError::MinimalWal { .. } => refusal.as_ref().is_some_and(is_unknown),
                    _ => false,
                };
                if refusal.is_none() || replaces {
                    let error = minimal::name_next_backup(error, &backups);
                    refusal = Some(error.into());
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        if let Found {
            position: Some(position),
            ..
        } = found
            && position < backup.stop_lsn
        {
            continue;
        }
        if let RecoveryTarget::Time {
            time, inclusive, ..
        } = *target
        {
            let stops = |at: PgTimestamp| at > time || (!inclusive && at == time);
            if !clock::is_before(inventory, &coverage, backup, &found, stops)? {
                continue;
            }
            if wishes.backup.is_none() {
                let older = &backups[..index];
                clock::unambiguous(inventory, &path, older, target, backup, &found)?;
            }
        }
        if let Some(damage) = inventory.damaged_backups().get(&backup.id) {
            choice.pass_over_damaged(backup, damage.clone());
            continue;
        }
        let in_doubt = match in_doubt(inventory, &coverage, backup, found.stop) {
            Err(error) => {
                // Its manifest is read for this.
                choice.pass_over_damaged(backup, error.into_damage()?);
                continue;
            }
            Ok(in_doubt) => in_doubt,
        };
        choice.choose(backup, &path, wishes);
        return Ok(make(backup, choice, path, &coverage, found, in_doubt));
    }
    choice.refuse_damaged(wishes, refusal.as_ref())?;
    let earliest = PlanError::TooEarly {
        earliest: oldest.id,
        stop_lsn: oldest.stop_lsn,
        finished: oldest.finished,
    };
    Err(refusal.unwrap_or_else(|| earliest.into()))
}

fn make(
    backup: &BackupInfo,
    choice: choice::Choice,
    path: Vec<PathPart>,
    coverage: &Coverage,
    found: Found,
    in_doubt: Vec<PreparedTransaction>,
) -> RestorePlan {
    let until = match found.stop {
        Stop::Before { lsn } | Stop::After { lsn } => lsn.add(1),
        Stop::Consistent => backup.stop_lsn,
    };
    // The timeline that holds the byte before `until` is the one PostgreSQL recovers to. On a later
    // one it would give the promoted server a history with a switch that it never replayed, and
    // look for the state of a prepared transaction in a file that was not restored.
    let mut path = path;
    let end = path.iter().position(|part| until <= part.to);
    let later = path.split_off(end.map_or(path.len(), |last| last + 1));
    let end_lsn = path.last().map_or(Lsn::MAX, |part| part.to);
    let is_of = |range: &WalRange, part: &PathPart| range.branch == part.branch;
    let (own, copies): (Vec<&WalRange>, Vec<&WalRange>) = coverage
        .ranges
        .iter()
        .filter(|range| range.start_lsn < until)
        .partition(|range| path.iter().any(|part| is_of(range, part)));
    let own_end = own.iter().map(|range| range.end_lsn).max();
    let copies = copies
        .into_iter()
        .filter(|range| own_end < Some(until) && later.iter().any(|part| is_of(range, part)));
    let (mut wal_bytes, mut replayed_bytes, mut wal_end_lsn) = (0u64, 0u64, coverage.start_lsn);
    for range in own.iter().copied().chain(copies) {
        wal_bytes = wal_bytes.saturating_add(range.stored_bytes);
        replayed_bytes = replayed_bytes.saturating_add(range.end_lsn.bytes_since(range.start_lsn));
        wal_end_lsn = wal_end_lsn.max(range.end_lsn.min(end_lsn));
    }
    // The stop record itself may continue in later ranges.
    if matches!(found.stop, Stop::After { .. } | Stop::Before { .. }) {
        wal_end_lsn = coverage.end_lsn.min(end_lsn);
    }
    let mut plan = RestorePlan {
        backup: backup.id.clone(),
        reason: choice.reason,
        not_chosen: choice.not_chosen,
        path,
        later,
        start_lsn: backup.start_lsn,
        stop: found.stop,
        last_kept: found.last_kept,
        first_dropped: found.first_dropped,
        unproved: found.unproved,
        late_commit_count: found.late_commit_count,
        late_commits: found.late_commits,
        in_doubt,
        moved_from: None,
        locks: Vec::new(),
        locks_known: false,
        removed: Vec::new(),
        tablespaces: Vec::new(),
        wal_changes: Vec::new(),
        claim: None,
        wal_end_lsn,
        backup_bytes: backup.stored_bytes,
        wal_bytes,
        fetch_bytes: backup.stored_bytes.saturating_add(wal_bytes),
        unpacked_bytes: backup.raw_bytes,
        replayed_bytes,
        file_systems: Vec::new(),
        estimated_seconds: 0,
        estimate_basis: String::new(),
        unseen_repositories: Vec::new(),
    };
    estimate::assume(&mut plan);
    plan
}

#[cfg(test)]
mod tests;
