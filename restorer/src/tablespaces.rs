//! Tablespaces that the replay creates.
//!
//! `CREATE TABLESPACE` writes its directory into the WAL, and the replay creates a link to that
//! directory (`tblspc_redo` in `tablespace.c`). On the parent's host the copy would then write into
//! the files of the running parent. Invariant: after [`settle`], every tablespace of the replay has
//! a directory that was empty or is the target's own. `wal-fetch` delivers no creation that the
//! plan does not name, and none whose directory belongs to another server by then.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use repository::WalRange;
use serde::{Deserialize, Serialize};
use wal_format::{
    BackupInfo, Branch, Lsn, SegmentSummary, WalChange, WalEvent, WalIndexer,
    rewrite::{NewCreation, RewriteError, change_creation},
};

use crate::{
    Error, PlanError, RestorePlan, Result, Stop,
    execute::{
        Owned, apart, check_directories, in_use, is_free, is_of, mapping_of, place_tablespaces,
        plan_in,
    },
    inventory::{Archive, Inventory},
    plan::{Coverage, PathPart, cover},
};

/// The length of WAL that contains the whole record of a creation: the record is shorter than a
/// page, and may continue on the next pages.
pub(crate) const RECORD_BYTES: u64 = 3 * 8192;

/// A tablespace that the replay creates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayedTablespace {
    /// Its OID.
    pub oid: u32,
    /// The directory that the WAL names; empty for an in-place tablespace, which is inside the data
    /// directory.
    pub location: String,
    /// The start of the record that creates it.
    pub lsn: Lsn,
    /// The start of the record that drops it; `None` if the drop is not replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<Lsn>,
    /// The directory that the tablespace gets; `None` for an in-place tablespace.
    pub directory: Option<PathBuf>,
    /// True if the restore creates its link itself and the replay skips the record, because the new
    /// directory's name is too long for the record.
    #[serde(default)]
    pub passed_over: bool,
}

/// The operator's options for the directories of a restore.
#[derive(Clone, Copy, Debug)]
pub struct Directories<'a> {
    /// The data directory; `None` if only the plan is wanted.
    pub target: Option<&'a Path>,
    /// The mapping of tablespaces: old directory to new directory.
    pub mapping: &'a BTreeMap<PathBuf, PathBuf>,
    /// True to keep files of an existing data directory that equal those of the backup.
    pub delta: bool,
    /// True to follow the archive permanently: all archived WAL is replayed, regardless of the
    /// stop.
    pub standby: bool,
}

/// Returns the directories of the tablespaces that the plan's backup has and that the replay
/// creates, as the parent names them. In-place tablespaces have none.
///
/// # Errors
/// Errors of reading the archive.
pub(crate) fn locations(archive: &Archive, plan: &RestorePlan) -> Result<Vec<PathBuf>> {
    let backups = archive.catalog.backups()?;
    let Some(backup) = backups.iter().find(|backup| backup.id == plan.backup) else {
        return Ok(Vec::new());
    };
    let path: Vec<PathPart> = plan.path.iter().chain(&plan.later).cloned().collect();
    let coverage = cover(archive, &path, plan.start_lsn)?;
    let (found, _) = replayed(archive, backup, &coverage, Some(plan.stop))?;
    let in_backup = backup.tablespaces.iter().map(|one| one.location.clone());
    let mut locations: Vec<PathBuf> = in_backup
        .chain(found.into_iter().map(|one| one.location))
        .map(PathBuf::from)
        .filter(|location| location.is_absolute())
        .collect();
    locations.sort();
    locations.dedup();
    Ok(locations)
}

/// Finds the tablespaces that the replay of `plan` creates, and chooses a directory for each.
///
/// # Errors
/// [`Error::Plan`] when a directory is in use, [`Error::Usage`] for a mapping that is not possible.
pub fn settle(archive: &Archive, plan: &mut RestorePlan, wishes: &Directories<'_>) -> Result<()> {
    let backups = archive.catalog.backups()?;
    let Some(backup) = backups.iter().find(|backup| backup.id == plan.backup) else {
        return Ok(());
    };
    // The segment that contains a fork is archived on both timelines, and `wal-fetch` delivers the
    // later timeline's copy if that contains more WAL. A standby continues on the later timelines.
    let path: Vec<PathPart> = plan.path.iter().chain(&plan.later).cloned().collect();
    let coverage = cover(archive, &path, plan.start_lsn)?;
    let stop = if wishes.standby {
        None
    } else {
        Some(plan.stop)
    };
    let (found, drops) = replayed(archive, backup, &coverage, stop)?;
    let mut holders: Vec<Holder> = Vec::new();
    for one in &backup.tablespaces {
        let location = PathBuf::from(&one.location);
        holders.push(Holder {
            oid: one.oid,
            directory: wishes
                .mapping
                .get(&location)
                .cloned()
                .unwrap_or_else(|| location.clone()),
            location,
            dropped: drops.get(&one.oid).copied(),
        });
    }
    let owned = match wishes.target {
        Some(target) => Owned::of(target, wishes.delta, wishes.mapping)?,
        None => Owned::default(),
    };
    // Returns the new directory of a tablespace of the backup: the replay may create one of them
    // again.
    let placed = |tablespace: &ReplayedTablespace| {
        let one = backup
            .tablespaces
            .iter()
            .find(|one| one.oid == tablespace.oid)?;
        let old = PathBuf::from(&one.location);
        Some(wishes.mapping.get(&old).cloned().unwrap_or(old))
    };
    // Every tablespace that needs another directory, so that one refusal names them all.
    let mut first_refusal = None;
    let of_backup = holders.iter().filter(|holder| {
        let is_placed = wishes.target.is_some() && holder.directory.is_absolute();
        let has = owned.has(holder.oid, &holder.directory);
        is_placed && !has && in_use(&holder.directory).is_some()
    });
    let mut unplaced: Vec<PathBuf> = of_backup.map(|holder| holder.location.clone()).collect();
    for mut tablespace in found {
        if tablespace.location.is_empty() {
            plan.tablespaces.push(tablespace);
            continue;
        }
        let old = PathBuf::from(&tablespace.location);
        let directory = match placed(&tablespace) {
            Some(placed) => placed,
            None => {
                let new = wishes
                    .mapping
                    .get(&old)
                    .cloned()
                    .unwrap_or_else(|| old.clone());
                if new.is_relative() {
                    return Err(Error::usage(format!(
                        "--tablespace-mapping: {} is not absolute",
                        new.display()
                    )));
                }
                if !owned.has(tablespace.oid, &new)
                    && let Some(why) = in_use(&new)
                {
                    first_refusal.get_or_insert_with(|| occupied(&tablespace, new, why));
                    unplaced.push(old);
                    continue;
                }
                new
            }
        };
        let holder = Holder {
            oid: tablespace.oid,
            location: old,
            directory: directory.clone(),
            dropped: tablespace.dropped,
        };
        holder.refuse_shared(&holders, tablespace.lsn)?;
        let old = holder.location.clone();
        holders.push(holder);
        if directory != old {
            if wishes.standby {
                return Err(PlanError::TablespaceOfStandby {
                    oid: tablespace.oid,
                    location: tablespace.location,
                    lsn: tablespace.lsn,
                }
                .into());
            }
            change(archive, plan, &coverage, &mut tablespace, &directory)?;
        }
        tablespace.directory = Some(directory);
        plan.tablespaces.push(tablespace);
    }
    let several = (unplaced.len() > 1).then(|| mappings_of(&unplaced));
    if let Some(refusal) = first_refusal {
        return Err(match several {
            Some(mappings) => PlanError::TablespacesInUse {
                first: Box::new(refusal),
                mappings,
            },
            None => refusal,
        }
        .into());
    }
    // Find conflicts before the copy: two tablespaces with one directory, or a directory inside the
    // target.
    if let Some(target) = wishes.target {
        let placed = place_tablespaces(backup, &plan.tablespaces, wishes.mapping, target)?;
        let checked = check_directories(target, backup, &placed, wishes.mapping, wishes.delta);
        return match (checked, several) {
            (Err(Error::Usage { message }), Some(mappings)) => {
                Err(Error::usage(PlanError::every_mapping(&message, &mappings)))
            }
            (checked, _) => checked,
        };
    }
    Ok(())
}

/// Returns the options that map these directories.
fn mappings_of(directories: &[PathBuf]) -> String {
    let options = directories
        .iter()
        .map(|old| format!("--tablespace-mapping {}", mapping_of(old)));
    options.collect::<Vec<_>>().join(" ")
}

/// A tablespace with its directory on the parent and in the copy.
struct Holder {
    oid: u32,
    location: PathBuf,
    directory: PathBuf,
    /// The start of the record that drops it; `None` if the drop is not replayed.
    dropped: Option<Lsn>,
}

impl Holder {
    /// Refuses the directory of a tablespace that is created at `lsn` if one of `others` has it, or
    /// one above or inside of it, at that time. The parent itself has no two tablespaces in one
    /// location at the same time.
    fn refuse_shared(&self, others: &[Self], lsn: Lsn) -> Result<()> {
        let mut present = others.iter().filter(|other| {
            let is_gone = other.dropped.is_some_and(|dropped| dropped < lsn);
            let is_other = other.oid != self.oid && other.location != self.location;
            is_other && !is_gone && other.directory.is_absolute()
        });
        present.try_for_each(|other| {
            let other = std::iter::once(other.directory.as_path());
            apart(&self.location, &self.directory, other)
        })
    }
}

/// Refuses WAL for a server without a plan, for example a standby, when its replay would link to a
/// directory that is in use and does not belong to the server. `data` is the server's data
/// directory.
///
/// # Errors
/// [`Error::Usage`] names the tablespace and its directory.
pub(crate) fn refuse_foreign(summary: &SegmentSummary, data: &Path) -> Result<()> {
    for (lsn, event) in &summary.events {
        let WalEvent::TablespaceCreate { oid, location } = event else {
            continue;
        };
        let directory = Path::new(location);
        let link = fs::read_link(data.join(format!("pg_tblspc/{oid}")));
        let own = link.is_ok_and(|link| link == directory)
            || plan_in(data)
                .and_then(|plan| plan.claim)
                .is_some_and(|owner| is_of(directory, &owner.token));
        if !location.is_empty() && !own && !is_free(directory).unwrap_or(false) {
            return Err(Error::usage(format!(
                "the WAL creates tablespace {oid} at {lsn} in {location}, which exists here, is not empty and is not this \
                 server's: its replay would write into the files of another server; empty the directory if no server uses it, \
                 or take a new base backup"
            )));
        }
    }
    Ok(())
}

/// Checks the creations in an object of `branch` before it is delivered to a recovery with `plan`.
/// `data` is the data directory of the server that requests it. Returns the first creation after
/// the stop. The delivered WAL has to end there, so that a recovery whose target was changed does
/// not replay a creation that the plan does not name.
///
/// # Errors
/// [`Error::Usage`] names a creation that is replayed and that the plan does not name, or whose
/// directory is in use.
pub(crate) fn admit(
    plan: &RestorePlan,
    branch: Branch,
    summary: &SegmentSummary,
    data: Option<&Path>,
) -> Result<Option<Lsn>> {
    let mut parts = plan.path.iter().chain(&plan.later);
    let path_end = parts.find(|part| part.branch == branch).map(|part| part.to);
    let is_on_path = |lsn: Lsn| path_end.is_some_and(|end| lsn < end);
    let mut end: Option<Lsn> = None;
    for (lsn, event) in &summary.events {
        let WalEvent::TablespaceCreate { oid, location } = event else {
            continue;
        };
        // The segment of the redo LSN may begin with records that are not replayed.
        if *lsn < plan.start_lsn {
            continue;
        }
        let mut named = plan.tablespaces.iter();
        if let Some(named) = named.find(|one| one.lsn == *lsn && one.oid == *oid) {
            if let Some(directory) = &named.directory {
                refuse_taken(plan, named, directory, data)?;
            }
            continue;
        }
        // An in-place tablespace, inside the data directory.
        if location.is_empty() {
            continue;
        }
        let (is_replayed, is_read) = match plan.stop {
            // PostgreSQL reads the record at the stop before it stops.
            Stop::Before { lsn: stop } => (*lsn < stop, *lsn <= stop),
            Stop::After { lsn: stop } => (*lsn <= stop, *lsn <= stop),
            Stop::Consistent => (false, false),
        };
        if is_on_path(*lsn) && is_replayed {
            return Err(Error::usage(format!(
                "the WAL creates tablespace {oid} at {lsn} in {location}, and the plan of this restore does not name it: its \
                 replay could write into the files of another server; restore again"
            )));
        }
        if !(is_on_path(*lsn) && is_read) {
            end = Some(end.map_or(*lsn, |end| end.min(*lsn)));
        }
    }
    Ok(end)
}

/// Refuses a creation whose directory meanwhile belongs to another server.
fn refuse_taken(
    plan: &RestorePlan,
    tablespace: &ReplayedTablespace,
    directory: &Path,
    data: Option<&Path>,
) -> Result<()> {
    let token = plan.claim.as_ref().map(|owner| owner.token.as_str());
    // This server has a link to the directory: the creation was replayed before, or an earlier
    // tablespace had the directory.
    let links = data.map(|data| fs::read_dir(data.join("pg_tblspc")));
    let mut links = links.into_iter().flatten().flatten().flatten();
    let is_linked =
        links.any(|link| fs::read_link(link.path()).is_ok_and(|link| link == directory));
    if is_linked || token.is_some_and(|token| is_of(directory, token)) {
        return Ok(());
    }
    match in_use(directory) {
        None => Ok(()),
        Some(why) => Err(Error::usage(format!(
            "the WAL creates tablespace {} at {} in {}, which {why} since the restore was planned: its replay would write \
             into the files of another server; restore again with another directory for it",
            tablespace.oid,
            tablespace.lsn,
            directory.display()
        ))),
    }
}

fn occupied(tablespace: &ReplayedTablespace, directory: PathBuf, why: String) -> PlanError {
    PlanError::TablespaceInUse {
        oid: tablespace.oid,
        lsn: tablespace.lsn,
        location: tablespace.location.clone(),
        directory,
        why,
    }
}

/// Returns the tablespaces that are created up to the stop, in the order of the WAL, and the drops
/// of others by OID; without a stop, up to the end of the archive.
fn replayed(
    archive: &Archive,
    backup: &BackupInfo,
    coverage: &Coverage,
    stop: Option<Stop>,
) -> Result<(Vec<ReplayedTablespace>, BTreeMap<u32, Lsn>)> {
    let is_replayed = |lsn: Lsn| match stop {
        Some(Stop::Before { lsn: stop }) => lsn < stop,
        Some(Stop::After { lsn: stop }) => lsn <= stop,
        Some(Stop::Consistent) => lsn < backup.stop_lsn,
        None => true,
    };
    let mut events: BTreeMap<Lsn, WalEvent> = BTreeMap::new();
    for (index, range) in coverage.ranges.iter().enumerate() {
        // A record that ends in this range may begin before the stop, even if the range begins
        // after it.
        let begins_after = range
            .first_record_lsn
            .is_some_and(|first| !is_replayed(first));
        if begins_after || range.tablespace_count == Some(0) {
            continue;
        }
        let summary = match range.tablespace_count {
            Some(_) => archive.summary(range)?,
            None => decode(archive, &coverage.ranges, index)?,
        };
        let on_path = |lsn: Lsn| coverage.holds(range.branch, lsn) && is_replayed(lsn);
        let found = summary.events.into_iter().filter(|(lsn, event)| {
            let of_tablespace = matches!(
                event,
                WalEvent::TablespaceCreate { .. } | WalEvent::TablespaceDrop { .. }
            );
            of_tablespace && on_path(*lsn)
        });
        events.extend(found);
    }
    let mut tablespaces: Vec<ReplayedTablespace> = Vec::new();
    let mut drops = BTreeMap::new();
    for (lsn, event) in events {
        match event {
            WalEvent::TablespaceCreate { oid, location } => tablespaces.push(ReplayedTablespace {
                oid,
                location,
                lsn,
                dropped: None,
                directory: None,
                passed_over: false,
            }),
            WalEvent::TablespaceDrop { oid } => {
                let mut created = tablespaces.iter_mut().rev();
                match created.find(|created| created.oid == oid) {
                    Some(created) => created.dropped = Some(lsn),
                    None => drop(drops.insert(oid, lsn)),
                }
            }
            _ => {}
        }
    }
    Ok((tablespaces, drops))
}

/// Decodes the records that end in a range whose object was written by a version that did not
/// record tablespaces.
fn decode(archive: &Archive, ranges: &[WalRange], index: usize) -> Result<SegmentSummary> {
    let Some(range) = ranges.get(index) else {
        return Ok(SegmentSummary::default());
    };
    let size = archive.identity().wal_segment_size;
    // Decode from the start of a segment: its first page shows where its records begin. A record
    // that continues from the previous range is decoded from that range on.
    let first_segment = size.segment_of(range.start_lsn);
    let before = ranges.get(..index).unwrap_or_default().iter();
    let same_branch = |one: &&WalRange| one.branch == range.branch;
    let mut first = index;
    for (at, one) in before.enumerate().rev().filter(|(_, one)| same_branch(one)) {
        first = at;
        if one.segment < first_segment {
            break;
        }
    }
    let mut indexer: Option<WalIndexer> = None;
    let mut summary = SegmentSummary::default();
    let chosen = ranges.get(first..=index).unwrap_or_default();
    for one in chosen.iter().filter(same_branch) {
        let failed = |error: wal_format::DecodeError| Error::Wal {
            lsn: one.start_lsn,
            problem: error.to_string(),
        };
        let wal = archive.wal(one)?;
        let identity = archive.wal_identity();
        let indexer = indexer.get_or_insert_with(|| WalIndexer::new(identity, one.start_lsn, None));
        // Adjacent tails may overlap.
        let known = indexer.position().bytes_since(one.start_lsn);
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        indexer
            .push(wal.get(known..).unwrap_or_default())
            .map_err(failed)?;
        summary = indexer.take_summary();
    }
    Ok(summary)
}

/// Adds the bytes to the plan with which `wal-fetch` replaces the record of a creation.
fn change(
    archive: &Archive,
    plan: &mut RestorePlan,
    coverage: &Coverage,
    tablespace: &mut ReplayedTablespace,
    directory: &Path,
) -> Result<()> {
    let lsn = tablespace.lsn;
    let size = archive.identity().wal_segment_size;
    let version = archive.identity().postgresql_major;
    let wal = wal_from(archive, coverage, lsn)?;
    let unreadable = |problem: String| Error::Wal { lsn, problem };
    let Some(new) = directory.to_str() else {
        return Err(Error::usage(format!(
            "--tablespace-mapping: {} is not UTF-8",
            directory.display()
        )));
    };
    let changes = match change_creation(version, size, lsn, &wal, NewCreation::In(new)) {
        Err(RewriteError::TooLong { room }) => {
            // The segment of the stop continues on the new timeline, where a later restore has to
            // find the creation unchanged.
            let stop = match plan.stop {
                Stop::Before { lsn } | Stop::After { lsn } => lsn,
                Stop::Consistent => plan.wal_end_lsn,
            };
            if size.segment_of(stop) <= size.segment_of(lsn.add(RECORD_BYTES)) {
                return Err(Error::usage(format!(
                    "--tablespace-mapping: tablespace {} is created at {lsn}, in the segment in which recovery stops; there its \
                     new directory may have {room} bytes at the most, as the old one has: {new} is longer; choose a shorter path, \
                     for example a link to the directory",
                    tablespace.oid
                )));
            }
            tablespace.passed_over = true;
            change_creation(version, size, lsn, &wal, NewCreation::PassedOver)
        }
        changes => changes,
    };
    let changes: Vec<WalChange> = changes.map_err(|error| unreadable(error.to_string()))?;
    plan.wal_changes.extend(changes);
    Ok(())
}

/// Returns the WAL from `lsn` on, long enough for the record that starts there.
fn wal_from(archive: &Archive, coverage: &Coverage, lsn: Lsn) -> Result<Vec<u8>> {
    let mut wal = Vec::new();
    let mut at = lsn;
    let end = lsn.add(RECORD_BYTES);
    let on_path = |branch: Branch, at: Lsn| coverage.holds(branch, at);
    while at < end {
        let holding =
            coverage.ranges.iter().rev().find(|range| {
                range.start_lsn <= at && at < range.end_lsn && on_path(range.branch, at)
            });
        let Some(range) = holding else { break };
        let part = archive.wal(range)?;
        let skip = usize::try_from(at.bytes_since(range.start_lsn)).unwrap_or(usize::MAX);
        let part = part.get(skip..).unwrap_or_default();
        if part.is_empty() {
            break;
        }
        wal.extend_from_slice(part);
        at = at.add(part.len() as u64);
    }
    Ok(wal)
}
