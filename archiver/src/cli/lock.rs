//! `wal-archiver lock extend`: what the kept backups need stays locked, in buckets with Object Lock.
//!
//! A chain is as long as its weakest lock: with a backup goes all WAL from its start on, every timeline's history, and the
//! keys. Older objects are left to their own dates.

use jiff::{SignedDuration, Timestamp};
use repository::{Repository, config::Settings, extend_locks, store::LockMode};
use wal_format::{BackupId, BackupInfo, Lsn, ObjectKey, SegmentSize};

use super::output;
use crate::error::{Error, Result};

/// More is a mistake that nobody can undo: a compliance lock is not lifted by anyone.
const DAYS_MAX: u32 = 3660;

pub(super) fn extend(
    settings: &Settings,
    days: u32,
    oldest: Option<&BackupId>,
    mode: LockMode,
    dry_run: bool,
) -> Result<()> {
    let usage = |message: String| Error::Usage { message };
    if !(1..=DAYS_MAX).contains(&days) {
        return Err(usage(format!(
            "--days {days} is not between 1 and {DAYS_MAX}"
        )));
    }
    let until = Timestamp::now()
        .checked_add(SignedDuration::from_hours(24 * i64::from(days)))
        .map_err(|error| usage(format!("--days {days}: {error}")))?;
    for cluster in &settings.clusters {
        let repository = Repository::open(&cluster.repository, &cluster.name)?;
        let Some(identity) = repository.identity()? else {
            return Err(usage(format!(
                "{} holds nothing of cluster {}; check --repository and --cluster",
                cluster.repository, cluster.name
            )));
        };
        let mut backups = Vec::new();
        let expired = repository.expired(identity.system_identifier)?;
        for (key, _) in repository.list(&format!("{}/backup/", identity.system_identifier))? {
            let hidden = expired.hides(&key, identity.wal_segment_size);
            if matches!(key, ObjectKey::BackupInfo(..)) && !hidden {
                let content = repository.get(&key)?;
                backups.push(BackupInfo::parse(&content).map_err(|error| {
                    usage(format!(
                        "{key} can not be read: {error}; run `wal-archiver verify`"
                    ))
                })?);
            }
        }
        let kept = Kept::new(&backups, oldest, identity.wal_segment_size).ok_or_else(|| {
            usage(match oldest {
                Some(id) => format!("cluster {} has no backup {id}", cluster.name),
                None => format!(
                    "cluster {} has no backup yet: nothing to keep",
                    cluster.name
                ),
            })
        })?;
        for place in cluster.repository.each() {
            if place.url.folder().is_some() {
                output::line(&format!(
                    "cluster {}: {place} is a folder, which has no locks",
                    cluster.name
                ));
                continue;
            }
            let needed = |key: &ObjectKey| kept.needs(key);
            let report = extend_locks(&place, &cluster.name, (until, mode), &needed, dry_run)?;
            let verb = if dry_run { "would be" } else { "are" };
            output::line(&format!(
                "cluster {}: {} objects {verb} locked until {until} in {place}; {} were for longer already, {} are not \
                 needed by a kept backup",
                cluster.name, report.extended, report.already, report.left
            ));
        }
    }
    Ok(())
}

/// What is needed: the backups from one on, and the WAL from the start of the first of them.
struct Kept {
    ids: Vec<BackupId>,
    from: Lsn,
    size: SegmentSize,
}

impl Kept {
    fn new(backups: &[BackupInfo], oldest: Option<&BackupId>, size: SegmentSize) -> Option<Self> {
        let first = match oldest {
            Some(id) => backups.iter().find(|backup| backup.id == *id)?.started,
            None => backups.iter().map(|backup| backup.started).min()?,
        };
        let kept = || backups.iter().filter(|backup| backup.started >= first);
        Some(Self {
            ids: kept().map(|backup| backup.id.clone()).collect(),
            from: kept().map(|backup| backup.start_lsn).min()?,
            size,
        })
    }

    fn needs(&self, key: &ObjectKey) -> bool {
        match key {
            ObjectKey::BackupInfo(_, id)
            | ObjectKey::BackupManifest(_, id)
            | ObjectKey::BackupSlice(_, id, ..) => self.ids.contains(id),
            ObjectKey::Segment(_, _, name) => name
                .segment(self.size)
                .is_none_or(|segment| segment.end_lsn(self.size) > self.from),
            // A tail lives until its segment is sealed; a lock would only keep what is superfluous.
            ObjectKey::Tail(..) | ObjectKey::Outcome(..) => false,
            ObjectKey::Epoch(_)
            | ObjectKey::Expired(..)
            | ObjectKey::Gap(..)
            | ObjectKey::FailoverLoss(..)
            | ObjectKey::History(..)
            | ObjectKey::HistoryCopy(..) => true,
        }
    }
}
