//! `pitr-restore list`: backups, restorable windows, gaps and restore points.

use std::collections::BTreeMap;

use repository::{ExpiredSet, Repository, UnseenPlace};
use serde::Serialize;
use wal_format::{
    BackupId, BackupInfo, Branch, ExpiredWindow, FailoverLoss, Lsn, ObjectKey, PgTimestamp,
    PgVersion, SystemIdentifier,
};

use crate::{
    Result,
    inventory::Inventory,
    plan::{Index, PathPart, Wishes, cover, plan_restore, timeline_option, timeline_path},
    target::RecoveryTarget,
};

/// The complete listing of a cluster.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// The epochs of the cluster, oldest first.
    pub epochs: Vec<ListedEpoch>,
    /// The base backups, oldest first. They and all further fields belong to the epoch that is
    /// listed.
    pub backups: Vec<ListedBackup>,
    /// The archived timelines.
    pub timelines: Vec<Branch>,
    /// The contiguous ranges of WAL.
    pub windows: Vec<Window>,
    /// The ranges in which a restore can stop.
    pub restorable: Vec<Restorable>,
    /// The reason why a restore of the newest state, without a timeline, is refused; `None` if it
    /// is accepted.
    pub refusal: Option<String>,
    /// Missing WAL between the ranges, without WAL that expired.
    pub gaps: Vec<Gap>,
    /// WAL that a server wrote with `wal_level = minimal`: no earlier backup can be restored past
    /// it.
    pub minimal_wal: Vec<MinimalWal>,
    /// Commits that failovers lost. Their WAL stays on the abandoned timeline.
    pub failover_losses: Vec<FailoverLoss>,
    /// The moments that can no longer be restored, because their data expired.
    pub expired: Vec<ExpiredWindow>,
    /// The restore points.
    pub restore_points: Vec<RestorePoint>,
    /// Objects that cannot be parsed. They count as missing.
    pub damaged: Vec<DamagedObject>,
    /// The repositories of the cluster that could not be read. Data that only they contain is
    /// missing above.
    pub unseen_repositories: Vec<UnseenPlace>,
}

/// A period in which the cluster had one system identifier.
#[derive(Clone, Debug, Serialize)]
pub struct ListedEpoch {
    /// The number, from 1.
    pub number: u32,
    /// The system identifier, for `--system`.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgresql_major: PgVersion,
    /// The time when it began.
    pub since: PgTimestamp,
    /// The IDs of its base backups, oldest first.
    pub backups: Vec<BackupId>,
    /// True if the rest of this listing describes this epoch.
    pub listed: bool,
}

/// Returns the epochs of a repository. `listed` is the one that is listed in full.
///
/// # Errors
/// Errors of reading the repository.
pub fn epochs(repository: &Repository, listed: SystemIdentifier) -> Result<Vec<ListedEpoch>> {
    let mut epochs = Vec::new();
    for (number, identity) in repository.epochs()? {
        let system = identity.system_identifier;
        let objects = repository.list(&format!("{system}/backup/"))?.into_iter();
        let expired = repository.expired(system)?;
        epochs.push(ListedEpoch {
            number,
            system_identifier: system,
            postgresql_major: identity.postgresql_major,
            since: identity.created,
            backups: objects
                .filter_map(|(key, _)| match key {
                    ObjectKey::BackupInfo(_, id) if !expired.backups().contains(&id) => Some(id),
                    _ => None,
                })
                .collect(),
            listed: system == listed,
        });
    }
    Ok(epochs)
}

/// An object that cannot be parsed.
#[derive(Clone, Debug, Serialize)]
pub struct DamagedObject {
    /// The object's key.
    pub object: String,
    /// The problem with it.
    pub problem: String,
}

/// A base backup.
#[derive(Clone, Debug, Serialize)]
pub struct ListedBackup {
    /// The backup's ID.
    pub id: BackupId,
    /// The operator's label.
    pub label: String,
    /// The timeline on which it was taken.
    pub branch: Branch,
    /// The LSN where redo starts.
    pub start_lsn: Lsn,
    /// The LSN from which it is consistent.
    pub stop_lsn: Lsn,
    /// The time when it was complete.
    pub finished: PgTimestamp,
    /// Its bytes in the repository.
    pub stored_bytes: u64,
    /// True if the WAL that makes it consistent is archived, and the backup is not known to be
    /// damaged.
    pub usable: bool,
    /// The known damage, with the damaged object.
    pub damage: Option<String>,
}

/// A contiguous range of WAL.
#[derive(Clone, Debug, Serialize)]
pub struct Window {
    /// The timeline.
    pub branch: Branch,
    /// The first byte.
    pub start_lsn: Lsn,
    /// The first byte after it.
    pub end_lsn: Lsn,
    /// The time of the first commit or abort in the range.
    pub first_time: Option<PgTimestamp>,
    /// The latest time in the range.
    pub last_time: Option<PgTimestamp>,
    /// True if a backup leads to a part of the range, so that this part can be restored.
    pub restorable: bool,
}

/// A range of WAL in which a recovery can stop.
#[derive(Clone, Debug, Serialize)]
pub struct Restorable {
    /// The timeline.
    pub branch: Branch,
    /// The first byte after which a recovery can stop.
    pub start_lsn: Lsn,
    /// The first byte after the range.
    pub end_lsn: Lsn,
    /// The oldest backup that leads to the range.
    pub backup: BackupId,
    /// The first target time that a plan accepts: the time when that backup was complete, or what
    /// the WAL proves if that is earlier. `None` if the backup was taken on an older timeline, or
    /// if the WAL says nothing of the time.
    pub first_time: Option<PgTimestamp>,
    /// The latest time of a commit or abort in the range.
    pub last_time: Option<PgTimestamp>,
    /// The value of `--target-timeline` that leads to the range.
    pub target_timeline: String,
    /// True if a restore without `--target-timeline` leads to the range.
    pub by_default: bool,
}

/// Missing WAL.
#[derive(Clone, Debug, Serialize)]
pub struct Gap {
    /// The timeline.
    pub branch: Branch,
    /// The first missing byte.
    pub start_lsn: Lsn,
    /// The first archived byte after the gap.
    pub end_lsn: Lsn,
}

/// WAL that was written with `wal_level = minimal`.
#[derive(Clone, Debug, Serialize)]
pub struct MinimalWal {
    /// The timeline.
    pub branch: Branch,
    /// The record that announces `wal_level = minimal`.
    pub start_lsn: Lsn,
    /// The start of the next restorable range of the timeline; `None` if there is none.
    pub end_lsn: Option<Lsn>,
}

/// A restore point.
#[derive(Clone, Debug, Serialize)]
pub struct RestorePoint {
    /// The timeline on which it was created.
    pub branch: Branch,
    /// The start of its record.
    pub lsn: Lsn,
    /// The time in its record.
    pub time: PgTimestamp,
    /// Its name.
    pub name: String,
}

impl Listing {
    /// Separates WAL that expired from WAL that is missing.
    pub fn tell_expired(&mut self, expired: &ExpiredSet) {
        let gaps = std::mem::take(&mut self.gaps).into_iter();
        let missing = gaps.flat_map(|gap| {
            let rest = expired.not_expired(gap.branch, gap.start_lsn, gap.end_lsn);
            rest.into_iter().map(move |(start_lsn, end_lsn)| Gap {
                branch: gap.branch,
                start_lsn,
                end_lsn,
            })
        });
        self.gaps = missing.collect();
        let records = expired.records().iter();
        self.expired = records.flat_map(|record| record.windows.clone()).collect();
        self.expired.sort_unstable();
    }
}

/// Lists the archive of a cluster.
///
/// # Errors
/// Errors of reading the inventory.
pub fn list(inventory: &dyn Inventory, damaged: &[(String, String)]) -> Result<Listing> {
    let mut backups = inventory.backups()?;
    // IDs begin with the second of the start, and two backups may start in the same second.
    backups.sort_by_key(|backup| (backup.finished, backup.start_lsn));
    let (mut windows, mut gaps) = (Vec::<Window>::new(), Vec::new());
    let known = inventory.branches()?.into_iter();
    let branches: Vec<Branch> = known.map(|(branch, ..)| branch).collect();
    for branch in branches.iter().copied() {
        let mut open: Option<Window> = None;
        for range in inventory.ranges(branch, Lsn::ZERO, Lsn::MAX)? {
            if let Some(window) = &mut open
                && range.start_lsn <= window.end_lsn
            {
                window.end_lsn = window.end_lsn.max(range.end_lsn);
                window.first_time = window.first_time.or(range.min_time);
                window.last_time = window.last_time.max(range.max_time);
                continue;
            }
            let fresh = Window {
                branch,
                start_lsn: range.start_lsn,
                end_lsn: range.end_lsn,
                first_time: range.min_time,
                last_time: range.max_time,
                restorable: false,
            };
            if let Some(window) = open.replace(fresh) {
                gaps.push(Gap {
                    branch,
                    start_lsn: window.end_lsn,
                    end_lsn: range.start_lsn,
                });
                windows.push(window);
            }
        }
        windows.extend(open);
    }
    let default = timeline_path(inventory, &Wishes::default());
    let default = default.as_deref().unwrap_or_default();
    let damaged_backups = inventory.damaged_backups();
    let is_whole = |backup: &&BackupInfo| !damaged_backups.contains_key(&backup.id);
    let whole: Vec<BackupInfo> = backups.iter().filter(is_whole).cloned().collect();
    let (restorable, minimal_wal) = restorable(inventory, &whole, default)?;
    for window in &mut windows {
        let of = |one: &Restorable| {
            let touches = one.start_lsn < window.end_lsn && window.start_lsn < one.end_lsn;
            one.branch == window.branch && touches
        };
        window.restorable = restorable.iter().any(of);
    }
    let planned = plan_restore(inventory, &RecoveryTarget::Latest, &Wishes::default());
    let refusal = planned.err().map(|refusal| refusal.to_string());
    let backups = backups
        .into_iter()
        .map(|one| {
            let damage = damaged_backups.get(&one.id).map(ToString::to_string);
            let usable = damage.is_none() && is_consistent(inventory, &one)?;
            Ok(ListedBackup {
                usable,
                damage,
                id: one.id,
                label: one.label,
                branch: one.branch,
                start_lsn: one.start_lsn,
                stop_lsn: one.stop_lsn,
                finished: one.finished,
                stored_bytes: one.stored_bytes,
            })
        })
        .collect::<Result<_>>()?;
    let restore_points = restore_points(inventory)?;
    Ok(Listing {
        epochs: Vec::new(),
        expired: Vec::new(),
        backups,
        timelines: branches,
        windows,
        restorable,
        refusal,
        gaps,
        minimal_wal,
        failover_losses: Vec::new(),
        restore_points,
        damaged: damaged
            .iter()
            .map(|(object, problem)| DamagedObject {
                object: object.clone(),
                problem: problem.clone(),
            })
            .collect(),
        unseen_repositories: Vec::new(),
    })
}

/// Returns true if the WAL that makes a backup consistent is archived: on its own timeline, or on
/// one that continues it, whose first segment begins with a copy of the WAL before the switch.
fn is_consistent(inventory: &dyn Inventory, backup: &BackupInfo) -> Result<bool> {
    let branches = inventory.branches()?;
    // Check its own timeline first, because that is nearly always enough.
    let own = branches.iter().filter(|one| one.0 == backup.branch);
    let others = branches.iter().filter(|one| one.0 != backup.branch);
    for (branch, ..) in own.chain(others) {
        let path = repository::timeline_path(&branches, *branch).unwrap_or_default();
        if repository::leads_to(&path, backup)
            && cover(inventory, &path, backup.start_lsn)?.end_lsn >= backup.stop_lsn
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns every restore point once, on the timeline that wrote it: the first segment of a timeline
/// begins with a copy of the WAL before the switch.
fn restore_points(inventory: &dyn Inventory) -> Result<Vec<RestorePoint>> {
    let branches = inventory.branches()?;
    let mut points = BTreeMap::new();
    for (branch, lsn, time, name) in inventory.restore_points()? {
        let path = repository::timeline_path(&branches, branch).unwrap_or_default();
        let wrote = path.iter().find(|part| lsn < part.to);
        let branch = wrote.map_or(branch, |part| part.branch);
        let point = RestorePoint {
            branch,
            lsn,
            time,
            name,
        };
        points.insert((lsn, branch), point);
    }
    Ok(points.into_values().collect())
}

/// Returns the ranges of every timeline's own WAL in which a recovery can stop, split where the
/// `default` path leaves the timeline, and the WAL between them that was written with `wal_level =
/// minimal`.
fn restorable(
    inventory: &dyn Inventory,
    backups: &[BackupInfo],
    default: &[PathPart],
) -> Result<(Vec<Restorable>, Vec<MinimalWal>)> {
    let branches = inventory.branches()?;
    let size = inventory.identity().wal_segment_size.bytes();
    let index = Index(inventory);
    let (mut all, mut minimal) = (Vec::new(), Vec::new());
    for (branch, _, _) in &branches {
        let path = repository::timeline_path(&branches, *branch).unwrap_or_default();
        let Some(own) = path.last() else { continue };
        let target_timeline = timeline_option(branches.iter().map(|one| one.0), *branch);
        let left_at = default.iter().find(|part| part.branch == *branch);
        let left_at = left_at.map_or(own.from, |part| part.to);
        let found = repository::Restorable::along(&index, &path, backups, size)?;
        for (_, start_lsn) in found.minimal.iter().filter(|(on, _)| on == branch) {
            let starts = found.stretches.iter().map(|next| next.from_lsn);
            minimal.push(MinimalWal {
                branch: *branch,
                start_lsn: *start_lsn,
                end_lsn: starts.filter(|next| next > start_lsn).min(),
            });
        }
        for stretch in &found.stretches {
            for (from, to, by_default) in [(own.from, left_at, true), (left_at, Lsn::MAX, false)] {
                let start_lsn = stretch.from_lsn.max(from);
                let end_lsn = stretch.to_lsn.min(to);
                if start_lsn >= end_lsn {
                    continue;
                }
                let last_time = stretch.last_time(&index, &path, (start_lsn, end_lsn))?;
                let first_time = found.first_time(stretch, last_time);
                all.push(Restorable {
                    branch: *branch,
                    start_lsn,
                    end_lsn,
                    backup: stretch.backup.clone(),
                    first_time: first_time.filter(|_| start_lsn == stretch.from_lsn),
                    last_time,
                    target_timeline: target_timeline.clone(),
                    by_default,
                });
            }
        }
    }
    Ok((all, minimal))
}
