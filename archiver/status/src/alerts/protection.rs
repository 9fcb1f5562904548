//! Conditions on protections that are missing, behind or about to run out.

use crate::{report::ClusterReport, units::micros};

/// A repository is behind if it lags the others by more than this.
const OFFSITE_LAG_SECONDS_MAX: f64 = 900.0;
/// The alert fires if the spool will be full sooner than this, so that there is time to act.
const SPOOL_FULL_SECONDS_MIN: f64 = 4.0 * 3600.0;
/// A window that is shorter than promised by up to this is not reported, because it can begin only
/// at the end of a base backup.
const WINDOW_MISSING_SECONDS_MAX: f64 = 3600.0;
/// The time for which a failover that lost commits is reported.
const FAILOVER_NEWS_SECONDS: f64 = 86_400.0;

/// Adds the conditions that hold in `report` to `found`.
pub(super) fn firing(report: &ClusterReport, found: &mut Vec<(&'static str, String)>) {
    let mut raise = |name, summary: String| found.push((name, summary));
    let age = |time| micros(report.as_of.micros_since(time));
    if let (Some(loss), Some(time)) = (&report.failover_loss, report.last_failover_loss)
        && age(time) < FAILOVER_NEWS_SECONDS
    {
        raise("PitrFailoverLoss", loss.clone());
    }
    let is_behind = |lag: f64| lag > OFFSITE_LAG_SECONDS_MAX;
    let mut places = report.repositories.iter();
    if let Some(place) = places.find(|place| is_behind(place.lag_seconds)) {
        let (url, minutes) = (&place.url, place.lag_seconds / 60.0);
        raise(
            "PitrOffsiteBehind",
            format!("The repository {url} is {minutes:.0} min behind the others."),
        );
    }
    let slot = report.slot.as_ref();
    if let Some(archiving) = report.archive_command.as_ref().filter(|one| one.failing) {
        let file = archiving.last_failed_wal.as_deref().unwrap_or("a file");
        raise(
            "PitrPushFailing",
            format!(
                "archive_command fails on the server, last for {file}, {} time(s) since its \
                 statistics were reset.",
                archiving.failed_count
            ),
        );
    }
    if report.slot_missing {
        let name = slot.map_or("", |slot| slot.name.as_str());
        raise(
            "PitrSlotMissing",
            format!("The server has no replication slot {name}."),
        );
    }
    if let Some(slot) = slot.filter(|slot| slot.wal_status.is_some() && !slot.active) {
        raise(
            "PitrSlotInactive",
            format!("The replication slot {} is not in use.", slot.name),
        );
    }
    let mut standbys = report.standbys.iter();
    let failing = standbys.find_map(|standby| Some((&standby.server, standby.problem.as_ref()?)));
    if let Some((server, problem)) = failing {
        raise(
            "PitrStandbySlot",
            format!("A failover to the standby {server} may need a new base backup: {problem}."),
        );
    }
    match report.spool_full_in_seconds {
        Some(seconds) if seconds < SPOOL_FULL_SECONDS_MIN => raise(
            "PitrSpoolFilling",
            format!(
                "At its present growth the spool is full in {:.1} h.",
                seconds / 3600.0
            ),
        ),
        _ => {}
    }
    if let Some(limit) = report.verify_max_age_seconds {
        match report
            .last_verify
            .as_ref()
            .map(|verify| age(verify.finished))
        {
            None if report.looked => raise(
                "PitrVerifyOverdue",
                "The repository was never verified.".to_owned(),
            ),
            Some(age) if age > limit => raise(
                "PitrVerifyOverdue",
                format!(
                    "The repository was verified {:.1} days ago.",
                    age / 86_400.0
                ),
            ),
            _ => {}
        }
    }
    match report.window_missing_seconds {
        Some(missing) if missing > WINDOW_MISSING_SECONDS_MAX => raise(
            "PitrWindowShort",
            format!(
                "The restorable window is {:.1} h shorter than keep_window.",
                missing / 3600.0
            ),
        ),
        _ => {}
    }
    match (report.rto.estimate_seconds, report.rto.target_seconds) {
        (Some(estimate), Some(target)) if estimate > target => raise(
            "PitrRtoOverTarget",
            format!("A restore would take {estimate:.0} s; the target is {target:.0} s."),
        ),
        _ => {}
    }
}
