//! Names and builds the record of how a run ended ([`Outcome`]).

use repository::{actor, outcome_name};
use wal_format::{Outcome, OutcomeKind, PgTimestamp};

/// The kinds of runs whose outcomes are reported.
pub const RUNS: [OutcomeKind; 4] = [
    OutcomeKind::Backup,
    OutcomeKind::Drill,
    OutcomeKind::Expire,
    OutcomeKind::Verify,
];

/// Returns the outcome of an operation of `wal-archiver` that ends now, without measurements.
/// `None` if the clock gives no year of four digits.
pub fn ended(
    kind: OutcomeKind,
    began: jiff::Timestamp,
    passed: bool,
    message: &str,
) -> Option<Outcome> {
    let mut outcome = Outcome::new(
        kind,
        outcome_name(began)?,
        PgTimestamp::from_jiff(began),
        PgTimestamp::from_jiff(jiff::Timestamp::now()),
        passed,
        message.to_owned(),
    );
    outcome.actor = Some(actor("wal-archiver"));
    Some(outcome)
}
