//! START HERE. Decides where PostgreSQL will stop, before a byte is copied: backup, timeline path,
//! stop record.
//!
//! target + inventory -> path of timelines -> the first record at which PostgreSQL stops -> the
//! newest backup that ends before it. No clock, and no I/O except through the inventory. Invariant:
//! the stop is computed by PostgreSQL's rule (`recoveryStopsBefore` and `recoveryStopsAfter` in
//! `xlogrecovery.c`) and executed as an LSN on a numeric timeline, so that time zones, clocks and
//! idle databases cannot change it.

use repository::{UnseenPlace, WalRange};

use serde::{Deserialize, Serialize};
use wal_format::{BackupId, BackupInfo, Lsn, PgTimestamp, TransactionEnd, WalChange};

use crate::{
    Error, Result,
    execute::Owner,
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
mod left_out;
mod lost;
mod minimal;
mod path;
mod refusal;
mod stop;

pub use choice::NotChosen;
pub use in_doubt::PreparedTransaction;
pub(crate) use in_doubt::in_doubt;
pub use left_out::{LeftOut, left_out, name_elsewhere};
pub(crate) use lost::refuse_promotion;

pub(crate) use path::{Coverage, Index, cover, timeline_option};
pub use path::{PathPart, print_path, timeline_path};
pub use refusal::PlanError;
use stop::{Found, find_stop, immediate_stop};

/// The number of late commits that a plan lists. All of them are counted.
const LATE_COMMITS_LISTED: usize = 20;

/// The point at which recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stop", rename_all = "snake_case")]
pub enum Stop {
    /// Before the record that starts at this LSN.
    Before {
        /// The start of the record.
        lsn: Lsn,
    },
    /// After the record that starts at this LSN.
    After {
        /// The start of the record.
        lsn: Lsn,
    },
    /// As soon as the backup is consistent.
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

/// The complete decision of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// The backup to restore.
    pub backup: BackupId,
    /// The reason for the choice of this backup.
    pub reason: String,
    /// Newer backups that would have been chosen but cannot be used.
    #[serde(default)]
    pub not_chosen: Vec<NotChosen>,
    /// The timelines that are replayed, oldest first. The last one contains the stop: it is
    /// `recovery_target_timeline`.
    pub path: Vec<PathPart>,
    /// The timelines on the path to the wanted one that recovery does not enter, because it stops
    /// before them. The first segment of such a timeline starts with a copy of the WAL before the
    /// switch, and that copy may be the only archived one.
    #[serde(default)]
    pub later: Vec<PathPart>,
    /// The LSN where redo starts.
    pub start_lsn: Lsn,
    /// The point where recovery stops.
    pub stop: Stop,
    /// The last commit that is kept; `None` if there is none or the plan did not need it.
    pub last_kept: Option<TransactionEnd>,
    /// The first transaction that is not kept; `None` if there is none.
    pub first_dropped: Option<TransactionEnd>,
    /// The part of the time before the target for which the archive proves nothing; `None` if the
    /// archive is proved up to the target.
    #[serde(default)]
    pub unproved: Option<Unproved>,
    /// The number of commits after the stop whose time is not after the target.
    pub late_commit_count: u64,
    /// The first of these commits.
    pub late_commits: Vec<TransactionEnd>,
    /// The timelines that have newer commits up to the target time, or the target transaction too,
    /// and that the plan does not follow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// The prepared transactions that are neither committed nor rolled back at the stop. They hold
    /// their locks until a user commits or rolls them back, as they did on the server.
    #[serde(default)]
    pub in_doubt: Vec<PreparedTransaction>,
    /// The requested stop, if the plan stops right after the last kept commit instead. The rows are
    /// the same, without the effects that an unfinished DROP already has at the requested stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_from: Option<Stop>,
    /// Locks that block readers on a server that pauses at the stop.
    #[serde(default)]
    pub locks: Vec<HeldLock>,
    /// True if the locks at the stop are known, so that an empty list means that there are none.
    #[serde(default)]
    pub locks_known: bool,
    /// Databases and tablespaces whose files are already removed at the stop.
    #[serde(default)]
    pub removed: Vec<RemovedFiles>,
    /// The tablespaces that the replay creates, in the order of the WAL.
    #[serde(default)]
    pub tablespaces: Vec<ReplayedTablespace>,
    /// Bytes that `wal-fetch` replaces in the archived WAL.
    #[serde(default)]
    pub wal_changes: Vec<WalChange>,
    /// The owner of the claims on the directories of tablespaces; `None` before the restore begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Owner>,
    /// The end of the WAL that recovery needs: the end of the record at the stop. Until the record
    /// was read, and for a standby, the end of the archived WAL.
    pub wal_end_lsn: Lsn,
    /// The bytes of the backup in the repository.
    pub backup_bytes: u64,
    /// The bytes of the WAL objects that are read.
    pub wal_bytes: u64,
    /// The bytes to fetch: the sum of both.
    #[serde(default)]
    pub fetch_bytes: u64,
    /// The bytes of the unpacked backup.
    #[serde(default)]
    pub unpacked_bytes: u64,
    /// The bytes of WAL that are replayed.
    #[serde(default)]
    pub replayed_bytes: u64,
    /// The file systems that the restore writes to; empty while no target directory is given.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// The estimated duration, in seconds.
    pub estimated_seconds: u64,
    /// The rates of the estimate, and their source.
    #[serde(default)]
    pub estimate_basis: String,
    /// The repositories of the cluster that could not be read: they may contain later WAL.
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

/// The operator's choices besides the target.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// The only backup that may be used; `None` for any.
    pub backup: Option<BackupId>,
    /// The timeline: a number, or a branch if the number is ambiguous; `None` for the default.
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
    // Sort by LSN; on one path this is also the order in time.
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
                let says_less = |error: &Error| {
                    matches!(
                        error,
                        Error::Plan(PlanError::Unknown { .. } | PlanError::Gap { last: None, .. })
                    )
                };
                let replaces = match error {
                    PlanError::Unknown { .. } => true,
                    // A newer backup did not find the target, or is not consistent itself. The
                    // refusal of an older backup says more: the target may be in the missing WAL,
                    // or after the WAL of `wal_level = minimal`, and it names the nearest target.
                    PlanError::MinimalWal { .. } | PlanError::Gap { last: Some(_), .. } => {
                        refusal.as_ref().is_some_and(says_less)
                    }
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
                // A damaged backup: its manifest is read here.
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
    // PostgreSQL recovers to the timeline that contains the byte before `until`. With a later
    // timeline as the target, the promoted server's history would contain a switch that was never
    // replayed, and the server would look for the state of a prepared transaction in a file that
    // was not restored.
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
        left_out: Vec::new(),
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
