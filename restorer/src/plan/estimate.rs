//! The estimated duration of a restore, and its basis: the rates of the last restore drill that
//! measured them, else assumed ones.

use repository::Repository;
use wal_format::{Outcome, OutcomeKind, SystemIdentifier};

use super::RestorePlan;

/// The assumed rates of extraction and replay on unknown hardware, in bytes per second.
const EXTRACT_BYTES_PER_SECOND: u64 = 100 << 20;
const REPLAY_BYTES_PER_SECOND: u64 = 60 << 20;
const MIB: f64 = 1_048_576.0;

/// Estimates with assumed rates.
pub(super) fn assume(plan: &mut RestorePlan) {
    plan.estimated_seconds = (plan.unpacked_bytes / EXTRACT_BYTES_PER_SECOND)
        .saturating_add(plan.replayed_bytes / REPLAY_BYTES_PER_SECOND)
        .saturating_add(1);
    plan.estimate_basis = format!(
        "assumed, because no restore drill has measured it: {} MiB/s of unpacked data and {} MiB/s of replayed WAL",
        EXTRACT_BYTES_PER_SECOND >> 20,
        REPLAY_BYTES_PER_SECOND >> 20
    );
}

/// Estimates with the rates of the last drill that passed and measured them, if there is one.
pub(crate) fn measure(repository: &Repository, system: SystemIdentifier, plan: &mut RestorePlan) {
    let wanted = |drill: &Outcome| drill.passed && rates(drill).is_some();
    match repository.newest_outcome(system, OutcomeKind::Drill, wanted) {
        Ok(Some(drill)) => apply(&drill, plan),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(event = "drill_unreadable", %error, "the last restore drill cannot be read");
        }
    }
}

fn apply(drill: &Outcome, plan: &mut RestorePlan) {
    let Some((fetch, replay)) = rates(drill) else {
        return;
    };
    let seconds = number(plan.backup_bytes) / fetch + number(plan.replayed_bytes) / replay;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is not negative, and a cast saturates"
    )]
    let seconds = seconds.ceil() as u64;
    plan.estimated_seconds = seconds.saturating_add(1);
    plan.estimate_basis = format!(
        "measured by the restore drill of {}: {:.0} MiB/s of stored data and {:.0} MiB/s of replayed WAL",
        drill.finished,
        fetch / MIB,
        replay / MIB
    );
}

/// Returns the rates of a drill in bytes per second: fetching the backup, and replaying WAL.
fn rates(drill: &Outcome) -> Option<(f64, f64)> {
    let rate = |bytes: Option<u64>, seconds: Option<f64>| {
        let rate = number(bytes?) / seconds.filter(|seconds| *seconds > 0.0)?;
        (rate > 0.0).then_some(rate)
    };
    Some((
        rate(drill.fetched_bytes, drill.fetch_seconds)?,
        rate(drill.replayed_bytes, drill.replay_seconds)?,
    ))
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}
