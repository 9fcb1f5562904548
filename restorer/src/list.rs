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
    plan::{Index, PathPart, Wishes, cover, plan_restore, timeline_path},
    target::RecoveryTarget,
};

/// Everything that is listed.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// The system identifiers the cluster has had, oldest first.
    pub epochs: Vec<ListedEpoch>,
    /// The base backups, oldest first; these and all that follows are of the epoch that is listed.
    pub backups: Vec<ListedBackup>,
    /// The stretches of WAL without a gap.
    pub windows: Vec<Window>,
    /// The ones that a restore accepts.
    pub restorable: Vec<Restorable>,
    /// Why a restore of the newest state, without a timeline, is refused; `None` where it is
    /// accepted.
    pub refusal: Option<String>,
    /// What is missing between them, for another reason than that it expired.
    pub gaps: Vec<Gap>,
    /// Where a server wrote WAL with `wal_level = minimal`: no backup before leads over it.
    pub minimal_wal: Vec<MinimalWal>,
    /// Commits that failovers lost; their WAL is kept on the timeline that was left.
    pub failover_losses: Vec<FailoverLoss>,
    /// The moments that retention gave up.
    pub expired: Vec<ExpiredWindow>,
    /// The restore points.
    pub restore_points: Vec<RestorePoint>,
    /// Objects that cannot be understood; they count as missing.
    pub damaged: Vec<DamagedObject>,
    /// The repositories of the cluster of which nothing was seen: what only they hold is missing
    /// above.
    pub unseen_repositories: Vec<UnseenPlace>,
}

/// A time in which the cluster had one system identifier.
#[derive(Clone, Debug, Serialize)]
pub struct ListedEpoch {
    /// Its number, from 1.
    pub number: u32,
    /// `--system` of its restores.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgresql_major: PgVersion,
    /// When it began.
    pub since: PgTimestamp,
    /// The names of its base backups, oldest first.
    pub backups: Vec<BackupId>,
    /// True if the rest of this listing is about it.
    pub listed: bool,
}

/// The epochs of a repository, of which `listed` is listed in full.
///
/// # Errors
/// What reading the repository met.
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

/// An object that cannot be understood.
#[derive(Clone, Debug, Serialize)]
pub struct DamagedObject {
    /// Its key.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A base backup.
#[derive(Clone, Debug, Serialize)]
pub struct ListedBackup {
    /// Its name.
    pub id: BackupId,
    /// What the operator called it.
    pub label: String,
    /// Its timeline.
    pub branch: Branch,
    /// Where redo starts.
    pub start_lsn: Lsn,
    /// From where on it is consistent.
    pub stop_lsn: Lsn,
    /// When it was complete.
    pub finished: PgTimestamp,
    /// Its length in the repository.
    pub stored_bytes: u64,
    /// True if the WAL that makes it consistent is held, and it is not known to be damaged.
    pub usable: bool,
    /// The damage that is known, with its object.
    pub damage: Option<String>,
}

/// A stretch of WAL without a gap.
#[derive(Clone, Debug, Serialize)]
pub struct Window {
    /// Its timeline.
    pub branch: Branch,
    /// Its first byte.
    pub start_lsn: Lsn,
    /// The first byte after it.
    pub end_lsn: Lsn,
    /// The time of the first commit or abort in it.
    pub first_time: Option<PgTimestamp>,
    /// The greatest time in it.
    pub last_time: Option<PgTimestamp>,
    /// True if a backup leads to any of it, so that something of it can be restored.
    pub restorable: bool,
}

/// WAL in which a recovery can stop.
#[derive(Clone, Debug, Serialize)]
pub struct Restorable {
    /// Its timeline.
    pub branch: Branch,
    /// The first byte after which a recovery can stop.
    pub start_lsn: Lsn,
    /// The first byte after the stretch.
    pub end_lsn: Lsn,
    /// The oldest backup that leads here.
    pub backup: BackupId,
    /// When that backup was complete; `None` where it was taken on an older timeline.
    pub first_time: Option<PgTimestamp>,
    /// The greatest time of a commit or abort in the stretch.
    pub last_time: Option<PgTimestamp>,
    /// True if a restore leads here without `--target-timeline`.
    pub by_default: bool,
}

/// Missing WAL.
#[derive(Clone, Debug, Serialize)]
pub struct Gap {
    /// The timeline.
    pub branch: Branch,
    /// The first missing byte.
    pub start_lsn: Lsn,
    /// The first byte that is there again.
    pub end_lsn: Lsn,
}

/// WAL that was written with `wal_level = minimal`.
#[derive(Clone, Debug, Serialize)]
pub struct MinimalWal {
    /// The timeline.
    pub branch: Branch,
    /// The record that announces it.
    pub start_lsn: Lsn,
    /// Where the next restorable stretch of the timeline begins; `None` if there is none.
    pub end_lsn: Option<Lsn>,
}

/// A restore point.
#[derive(Clone, Debug, Serialize)]
pub struct RestorePoint {
    /// The timeline on which it was created.
    pub branch: Branch,
    /// Where.
    pub lsn: Lsn,
    /// When.
    pub time: PgTimestamp,
    /// Its name.
    pub name: String,
}

impl Listing {
    /// Tells what expired from what is missing.
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

/// Lists what is archived.
///
/// # Errors
/// What reading the inventory met.
pub fn list(inventory: &dyn Inventory, damaged: &[(String, String)]) -> Result<Listing> {
    let mut backups = inventory.backups()?;
    // Their names begin with a second, in which two may have begun.
    backups.sort_by_key(|backup| (backup.finished, backup.start_lsn));
    let (mut windows, mut gaps) = (Vec::<Window>::new(), Vec::new());
    for (branch, _, _) in inventory.branches()? {
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

/// Returns true if the WAL that makes a backup consistent is held: on its own timeline, or on one
/// that continues it, whose first segment begins with a copy of the WAL before the switch.
fn is_consistent(inventory: &dyn Inventory, backup: &BackupInfo) -> Result<bool> {
    let branches = inventory.branches()?;
    // Its own timeline first: it is nearly always enough.
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

/// Every restore point once, on the timeline that wrote it: the first segment of a timeline begins
/// with a copy of the WAL before the switch.
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

/// The stretches of every timeline's own WAL in which a recovery can stop, cut where the `default`
/// path leaves it; and the WAL between them that was written with `wal_level = minimal`.
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
        for stretch in found.stretches {
            for (from, to, by_default) in [(own.from, left_at, true), (left_at, Lsn::MAX, false)] {
                let start_lsn = stretch.from_lsn.max(from);
                let end_lsn = stretch.to_lsn.min(to);
                if start_lsn >= end_lsn {
                    continue;
                }
                all.push(Restorable {
                    branch: *branch,
                    start_lsn,
                    end_lsn,
                    backup: stretch.backup.clone(),
                    first_time: (start_lsn == stretch.from_lsn).then_some(stretch.finished),
                    last_time: stretch.last_time(&index, &path, (start_lsn, end_lsn))?,
                    by_default,
                });
            }
        }
    }
    Ok((all, minimal))
}
