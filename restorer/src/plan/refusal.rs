//! [`PlanError`]: the reason why a target cannot be reached, with the nearest reachable targets.

use std::path::{Path, PathBuf};

use wal_format::{BackupId, Branch, Lsn, PgTimestamp};

use super::{Stop, minimal};
use crate::execute::mapping_of;

/// The remedy for a mapped directory that has content.
const OR_EMPTY: &str = ", or remove this one if an earlier restore left it and no server uses it";

/// The reason why a target cannot be reached.
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
        /// The stop of the newer backup.
        newer_stop: Stop,
        /// The older backup.
        older: BackupId,
        /// The stop of the older backup.
        older_stop: Stop,
    },
    /// Several restore points have the name.
    #[error("several restore points have the name \"{name}\": {points}; choose one with --at-lsn")]
    AmbiguousName {
        /// The name.
        name: String,
        /// The LSNs and times of the restore points.
        points: String,
    },
    /// The archive ends before the target, or its end was never proved.
    #[error(
        "the target {target} lies beyond the archive, which is proved up to {proven} (last commit {last_commit}, WAL up to \
         {end_lsn}); restore without a target for everything that is archived, or to an earlier time"
    )]
    BeyondArchive {
        /// The requested target.
        target: String,
        /// The last time up to which the archive is proved, or `nothing`.
        proven: String,
        /// The time of the last commit, or `none since the backup began`.
        last_commit: String,
        /// The end of the archived WAL.
        end_lsn: Lsn,
    },
    /// The repository holds an older state than this host has archived.
    #[error(
        "{url} holds an older state of the repository, or its newest WAL is lost: this host archived WAL up to {end_lsn}, and \
         {missing} is not there. Mount the right disk or bring the objects back; or name a target before it, or restore \
         the newest state that is there with --force"
    )]
    OlderState {
        /// The URL of the repository.
        url: String,
        /// The end of the WAL that this host archived.
        end_lsn: Lsn,
        /// The missing objects.
        missing: String,
    },
    /// The data for this moment has expired.
    #[error("{refusal}. What was there expired: {expired}")]
    Expired {
        /// The reason why the target cannot be reached.
        refusal: Box<Self>,
        /// The expired data, with the time and the policy.
        expired: String,
    },
    /// The named backup has expired.
    #[error(
        "backup {backup}, which ended {finished}, expired {marked}: {policy}; see `pitr-restore list`"
    )]
    ExpiredBackup {
        /// The backup.
        backup: BackupId,
        /// The time when the backup ended.
        finished: PgTimestamp,
        /// The time when the backup was marked as expired.
        marked: PgTimestamp,
        /// The policy under which it expired.
        policy: String,
    },
    /// WAL is missing between the backup and the target.
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
    /// The server had `wal_level = minimal` between the backup and the target.
    #[error(
        "the server wrote WAL with wal_level = minimal from {lsn} on timeline {branch}{moment}, before the target is reached: \
         changes may be missing from it, so a recovery over it loses rows; {nearest}",
        moment = since.map_or_else(String::new, |time| format!(" (after {time})")),
        nearest = minimal::print_nearest(nearest)
    )]
    MinimalWal {
        /// The branch.
        branch: Branch,
        /// The record that announces `wal_level = minimal`.
        lsn: Lsn,
        /// The last known time before this record.
        since: Option<PgTimestamp>,
        /// The options that select the nearest reachable targets.
        nearest: Vec<String>,
    },
    /// There is no backup.
    #[error("no base backup is archived; take one with `wal-archiver backup`")]
    NoBackup,
    /// The requested backup is not on the path to the wanted timeline.
    #[error(
        "backup {backup} was taken on timeline {branch}, which the path {path} does not cross before its end at {stop_lsn}; \
         leave out --backup, or choose with --target-timeline a timeline that continues {branch}"
    )]
    BackupElsewhere {
        /// The backup.
        backup: BackupId,
        /// The timeline of the backup.
        branch: Branch,
        /// The end of the backup.
        stop_lsn: Lsn,
        /// The timelines of the path.
        path: String,
    },
    /// A file system has less space than the restore needs.
    #[error(
        "too little space: {shortages}; free some, give another directory with --target-dir or --tablespace-mapping, or restore \
         anyway with --force"
    )]
    NoSpace {
        /// The directories on each such file system, with the needed and the free space.
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
        /// The timelines of the path.
        path: String,
    },
    /// The replay creates a tablespace in a directory that is in use here.
    #[error(
        "the replay creates tablespace {oid} at {lsn} in {location}, and {directory} {why}: the copy would write into files \
         that may be another server's; choose an empty or new directory with --tablespace-mapping {mapping}{remedy}",
        directory = directory.display(),
        mapping = mapping_of(Path::new(location)),
        remedy = if directory.as_os_str() == location.as_str() { "" } else { OR_EMPTY }
    )]
    TablespaceInUse {
        /// The tablespace.
        oid: u32,
        /// The record that creates it.
        lsn: Lsn,
        /// The directory that the WAL names.
        location: String,
        /// The directory that the tablespace would get here.
        directory: PathBuf,
        /// Its state, as the predicate of a sentence.
        why: String,
    },
    /// Several tablespaces need another directory.
    #[error("{}", Self::every_mapping(first, mappings))]
    TablespacesInUse {
        /// The refusal of the first tablespace that the replay creates.
        first: Box<Self>,
        /// The options for all tablespaces, with `NEW` for each new directory.
        mappings: String,
    },
    /// A standby replays the WAL unchanged, so a tablespace that the WAL creates cannot be mapped.
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
    /// The target is before the end of every backup.
    #[error(
        "no base backup ends before the target: the earliest reachable state is that of backup {earliest} at {stop_lsn} \
         ({finished}), --backup {earliest} --target-immediate"
    )]
    TooEarly {
        /// The oldest backup.
        earliest: BackupId,
        /// The stop LSN of this backup.
        stop_lsn: Lsn,
        /// The time at which this backup ended.
        finished: PgTimestamp,
    },
    /// The timeline was never archived.
    #[error("timeline {wanted} is not archived; archived are: {known}")]
    UnknownTimeline {
        /// The requested timeline.
        wanted: String,
        /// The archived timelines.
        known: String,
    },
    /// The named transaction or restore point does not exist.
    #[error(
        "{what} is not in the archive of timeline {path} between {from} and {to}; {remedy}",
        remedy = other_timelines(elsewhere)
    )]
    Unknown {
        /// The missing item, as a noun phrase.
        what: String,
        /// The timelines of the path.
        path: String,
        /// The start of the searched WAL.
        from: Lsn,
        /// The end of the searched WAL.
        to: Lsn,
        /// The timelines that have the item, each with the value of `--target-timeline`.
        elsewhere: Vec<(Branch, String)>,
    },
}

/// Returns the remedy for an item that the path lacks.
fn other_timelines(elsewhere: &[(Branch, String)]) -> String {
    let each = elsewhere.iter().map(|(branch, option)| {
        format!("timeline {branch} has it: restore to it with --target-timeline {option}")
    });
    match elsewhere {
        [] => {
            "see `pitr-restore list`, or choose another timeline with --target-timeline".to_owned()
        }
        _ => each.collect::<Vec<_>>().join(", or "),
    }
}

fn nearest(last: Option<Lsn>) -> String {
    match last {
        Some(last) => format!("the nearest reachable target is --target-lsn {last}"),
        None => "the backup cannot be made consistent, choose another one with --backup".to_owned(),
    }
}

impl PlanError {
    /// Returns a refusal that also names the options for every tablespace that needs a directory.
    pub(crate) fn every_mapping(refusal: &impl std::fmt::Display, mappings: &str) -> String {
        format!("{refusal}. All tablespaces that need another directory: {mappings}")
    }
}
