//! Names and builds the record of how a run ended ([`Outcome`]).

use repository::outcome_name;
use wal_format::{Outcome, OutcomeKind, PgTimestamp};

/// The kinds of runs whose outcomes are reported.
pub const RUNS: [OutcomeKind; 4] = [
    OutcomeKind::Backup,
    OutcomeKind::Drill,
    OutcomeKind::Expire,
    OutcomeKind::Verify,
];

/// The outcome of `kind` at this moment, without measurements.
pub fn ended(
    kind: OutcomeKind,
    began: jiff::Timestamp,
    passed: bool,
    message: &str,
) -> Option<Outcome> {
    Some(Outcome::new(
        kind,
        outcome_name(began)?,
        PgTimestamp::from_jiff(began),
        PgTimestamp::from_jiff(jiff::Timestamp::now()),
        passed,
        message.to_owned(),
    ))
}
