//! The proof that a recovery ended at the planned point: PostgreSQL's own message, then the
//! timeline and the system identifier on disk.
//!
//! Invariant: a copy of another cluster, or of another timeline with the same LSN, is never
//! reported as planned.

use std::{fs, path::Path, thread, time::Duration};

use wal_format::{
    ClusterState, ControlFile, Lsn, SystemIdentifier, TimelineHistory, TimelineId,
    control_file::ControlFileError, history_file_name,
};

use super::log::Events;
use crate::{Error, RestorePlan, Result, Stop, execute::Action};

/// The longest page header (`SizeOfXLogLongPHD`): it may separate the end of a record from the
/// start of the next one.
const PAGE_HEADER_BYTES_MAX: u64 = 40;
/// The number of times that a `pg_control` with a wrong checksum is read again: the server may be
/// writing it.
const READS_MAX: u32 = 10;
/// The pause before `pg_control` is read again.
const READ_PAUSE: Duration = Duration::from_millis(50);

/// Compares the end of a recovery with the plan. Returns the place where it stopped, in
/// PostgreSQL's words.
///
/// # Errors
/// [`Error::PlanMismatch`], [`Error::Damaged`] for a `pg_control` or a history that does not parse.
pub(super) fn prove(
    directory: &Path,
    seen: &Events,
    plan: &RestorePlan,
    system: SystemIdentifier,
    action: Action,
) -> Result<String> {
    let stopped = stopped_as_planned(seen, plan)?;
    let control = read_control(directory)?;
    if control.system_identifier != system {
        return Err(mismatch(
            format!("a copy of system {system}"),
            format!("in a cluster of system {}", control.system_identifier),
        ));
    }
    let timeline = plan.path.last().map(|part| part.branch.timeline);
    match action {
        Action::Promote => promoted_as_planned(directory, &control, plan, timeline)?,
        Action::Pause | Action::Shutdown => {
            let delivered = seen.delivered.map(|name| name.timeline);
            let is_exact = plan.stop != Stop::Consistent;
            if is_exact && delivered.is_some() && delivered != timeline {
                return Err(on_timeline(timeline, delivered));
            }
            let ended = [
                ClusterState::InArchiveRecovery,
                ClusterState::ShutDownInRecovery,
            ];
            if !ended.contains(&control.state) {
                return Err(in_state("a server in recovery", &control));
            }
        }
    }
    Ok(stopped)
}

/// Compares the place where PostgreSQL reports that it stopped with the plan.
fn stopped_as_planned(seen: &Events, plan: &RestorePlan) -> Result<String> {
    let found = seen.stopping.as_deref().unwrap_or("nowhere");
    let position = |prefix: &str| -> Option<Lsn> {
        found.strip_prefix(prefix)?.split('"').nth(1)?.parse().ok()
    };
    let agrees = match plan.stop {
        Stop::Before { lsn } => position("before WAL location (LSN)") == Some(lsn),
        Stop::After { lsn } => position("after WAL location (LSN)") == Some(lsn),
        Stop::Consistent => found.starts_with("after reaching consistency"),
    };
    if agrees {
        return Ok(found.to_owned());
    }
    Err(mismatch(plan.stop.to_string(), found.to_owned()))
}

/// Compares the switch that the promoted server recorded in its history file with the plan.
fn promoted_as_planned(
    directory: &Path,
    control: &ControlFile,
    plan: &RestorePlan,
    wanted: Option<TimelineId>,
) -> Result<()> {
    if control.state != ClusterState::InProduction {
        return Err(in_state("a promoted server", control));
    }
    let own = control.checkpoint.timeline;
    let path = directory.join("pg_wal").join(history_file_name(own));
    let content = fs::read(&path).map_err(Error::io("read", &path))?;
    let history = TimelineHistory::parse(own, &content).map_err(|error| Error::Damaged {
        object: path.display().to_string(),
        problem: error.to_string(),
    })?;
    let Some(switch) = history.ancestors.last() else {
        return Err(on_timeline(wanted, None));
    };
    if Some(switch.timeline) != wanted {
        return Err(on_timeline(wanted, Some(switch.timeline)));
    }
    // PostgreSQL switches at the end of the last record that it replayed (`EndOfLog`).
    let at = switch.switch_lsn;
    let agrees = match plan.stop {
        Stop::Before { lsn } => at <= lsn && lsn.bytes_since(at) <= PAGE_HEADER_BYTES_MAX,
        Stop::After { lsn } => {
            at > lsn && plan.first_dropped.is_none_or(|dropped| at <= dropped.lsn)
        }
        Stop::Consistent => at >= plan.start_lsn,
    };
    if agrees {
        return Ok(());
    }
    let found = format!("with a timeline switch at {at}");
    Err(mismatch(plan.stop.to_string(), found))
}

/// Reads `pg_control`, which the server may be writing.
fn read_control(directory: &Path) -> Result<ControlFile> {
    let path = directory.join("global/pg_control");
    let mut tries = READS_MAX;
    loop {
        let content = fs::read(&path).map_err(Error::io("read", &path))?;
        match ControlFile::parse(&content) {
            Ok(control) => return Ok(control),
            Err(ControlFileError::Crc { .. }) if tries > 0 => {
                tries -= 1;
                thread::sleep(READ_PAUSE);
            }
            Err(error) => {
                return Err(Error::Damaged {
                    object: path.display().to_string(),
                    problem: error.to_string(),
                });
            }
        }
    }
}

fn on_timeline(wanted: Option<TimelineId>, found: Option<TimelineId>) -> Error {
    let name = |timeline: Option<TimelineId>| match timeline {
        Some(timeline) => format!("on timeline {timeline}"),
        None => "on no timeline".to_owned(),
    };
    mismatch(name(wanted), name(found))
}

fn in_state(planned: &str, control: &ControlFile) -> Error {
    let found = format!("with a cluster that is {}", control.state.as_str());
    mismatch(planned.to_owned(), found)
}

fn mismatch(planned: String, found: String) -> Error {
    Error::PlanMismatch { planned, found }
}
