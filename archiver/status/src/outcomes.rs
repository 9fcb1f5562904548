//! Names and builds the record of how a run ended ([`Outcome`]).

use wal_format::{BackupId, OUTCOME_FORMAT_VERSION, Outcome, OutcomeKind, PgTimestamp};

/// The kinds of runs whose outcomes are reported.
pub const RUNS: [OutcomeKind; 4] = [
    OutcomeKind::Backup,
    OutcomeKind::Drill,
    OutcomeKind::Expire,
    OutcomeKind::Verify,
];

/// A name from the time at which something began: the second, and 65536ths of it in hexadecimal.
/// Names are in the order of the times, because the newest of a kind is the last by name.
pub fn outcome_id(began: jiff::Timestamp) -> Option<BackupId> {
    let nanoseconds = i64::from(began.subsec_nanosecond()).max(0);
    let part = nanoseconds * 0x1_0000 / 1_000_000_000;
    format!("{}-{part:04x}", began.strftime("%Y%m%dT%H%M%SZ"))
        .parse()
        .ok()
}

/// The outcome of `kind` at this moment, without measurements.
pub fn ended(
    kind: OutcomeKind,
    began: jiff::Timestamp,
    passed: bool,
    message: &str,
) -> Option<Outcome> {
    Some(Outcome {
        format_version: OUTCOME_FORMAT_VERSION,
        kind,
        id: outcome_id(began)?,
        started: PgTimestamp::from_jiff(began),
        finished: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        passed,
        message: message.to_owned(),
        backup: None,
        rto_seconds: None,
        fetched_bytes: None,
        fetch_seconds: None,
        replayed_bytes: None,
        replay_seconds: None,
        loss_seconds: None,
        damaged: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_second_are_in_the_order_of_their_times() {
        let names: Vec<BackupId> = [0, 1_000, 20_000, 500_000, 999_999]
            .map(|micros| 1_700_000_000_000_000 + micros)
            .map(|micros| jiff::Timestamp::from_microsecond(micros).expect("a time"))
            .map(|time| outcome_id(time).expect("a name"))
            .to_vec();
        assert!(names.is_sorted(), "{names:?}");
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}
