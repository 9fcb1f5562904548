//! The target of a drill: the newest state, a random time that can be restored, or one that the
//! operator names.

use jiff::Timestamp;
use wal_format::{Lsn, PgTimestamp};

use crate::{
    Error, Result,
    inventory::Archive,
    list,
    target::{RecoveryTarget, is_relative, parse_time},
};

/// The value of `--target`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The end of the archive.
    Latest,
    /// A random time in a restorable range.
    Random,
    /// A position.
    Lsn(Lsn),
    /// A time.
    Time(String),
}

/// Parses `latest`, `random`, an LSN or a time.
pub(crate) fn parse_goal(text: &str) -> std::result::Result<Goal, String> {
    Ok(match (text, text.parse::<Lsn>()) {
        ("latest", _) => Goal::Latest,
        ("random", _) => Goal::Random,
        (_, Ok(lsn)) => Goal::Lsn(lsn),
        _ => Goal::Time(text.to_owned()),
    })
}

/// A chosen target.
#[derive(Clone, Debug)]
pub(crate) struct Picked {
    pub(crate) target: RecoveryTarget,
    /// The target in words.
    pub(crate) words: String,
    /// The seed of a random target.
    pub(crate) seed: Option<u64>,
    /// True if the drill chose it, so that the target has to be reachable.
    pub(crate) is_own: bool,
}

/// The number of random times that are tried.
pub(crate) const ATTEMPTS_MAX: u64 = 64;

/// Returns a new seed.
pub(crate) fn new_seed() -> u64 {
    Timestamp::now().as_microsecond().unsigned_abs()
}

/// Chooses the target of a goal. `seed` and `attempt` make a random one repeatable.
///
/// # Errors
/// [`Error::Usage`] for a time that does not parse, and if no time can be restored.
pub(crate) fn pick(
    goal: &Goal,
    (seed, attempt): (u64, u64),
    zone: Option<&str>,
    archive: &Archive,
) -> Result<Picked> {
    let now = Timestamp::now();
    let picked = |target, words: String| Picked {
        target,
        words,
        seed: None,
        is_own: false,
    };
    Ok(match goal {
        Goal::Latest => Picked {
            is_own: true,
            ..picked(RecoveryTarget::Latest, "latest".to_owned())
        },
        Goal::Lsn(lsn) => {
            let (lsn, inclusive) = (*lsn, true);
            picked(RecoveryTarget::Lsn { lsn, inclusive }, format!("LSN {lsn}"))
        }
        Goal::Time(text) => {
            let time = parse_time(text, zone, now)?;
            let relative = is_relative(text);
            let inclusive = true;
            let target = RecoveryTarget::Time {
                time,
                inclusive,
                relative,
            };
            picked(target, format!("time {time}"))
        }
        Goal::Random => {
            let listing = list::list(archive, &archive.damaged_objects())?;
            let ranges: Vec<(PgTimestamp, PgTimestamp)> = listing
                .restorable
                .iter()
                .filter(|range| range.by_default)
                .filter_map(|range| Some((range.first_time?, range.last_time?)))
                .collect();
            let Some(time) = random_time(&ranges, mixed(seed).wrapping_add(attempt)) else {
                return Err(Error::usage(
                    "no time can be restored yet, so no random one can be chosen: see `pitr-restore list`, or use --target latest",
                ));
            };
            Picked {
                target: RecoveryTarget::Time {
                    time,
                    inclusive: true,
                    relative: false,
                },
                words: format!("random time {time}"),
                seed: Some(seed),
                is_own: true,
            }
        }
    })
}

/// Returns a time in one of `ranges`, each microsecond with the same probability; `None` without a
/// range.
fn random_time(ranges: &[(PgTimestamp, PgTimestamp)], seed: u64) -> Option<PgTimestamp> {
    let length = |(first, last): &(PgTimestamp, PgTimestamp)| {
        u64::try_from(last.micros_since(*first)).map_or(0, |length| length.saturating_add(1))
    };
    let total: u64 = ranges.iter().map(length).sum();
    let mut at = mixed(seed).checked_rem(total)?;
    for range in ranges {
        let length = length(range);
        if at < length {
            return Some(PgTimestamp(range.0.0.saturating_add_unsigned(at)));
        }
        at -= length;
    }
    None
}

/// Mixes the bits of a seed (`SplitMix64`).
fn mixed(seed: u64) -> u64 {
    let mut bits = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_time_is_in_a_range_and_repeats_with_its_seed() {
        let ranges = [(10, 19), (100, 100), (200, 289)]
            .map(|(first, last)| (PgTimestamp(first), PgTimestamp(last)));
        let mut met = [0; 3];
        for seed in 0..2000 {
            let time = random_time(&ranges, seed).expect("a time");
            assert_eq!(random_time(&ranges, seed), Some(time));
            let at = ranges
                .iter()
                .position(|(first, last)| *first <= time && time <= *last);
            met[at.expect("it is in a range")] += 1;
        }
        assert!(met.iter().all(|count| *count > 0), "{met:?}");
        assert!(met[2] > met[0], "{met:?}");
        assert_eq!(random_time(&[], 1), None);
        // Clocks that were set back.
        assert_eq!(random_time(&[(PgTimestamp(9), PgTimestamp(3))], 1), None);
    }

    #[test]
    fn a_goal_is_a_word_a_position_or_a_time() {
        assert_eq!(parse_goal("latest"), Ok(Goal::Latest));
        assert_eq!(parse_goal("random"), Ok(Goal::Random));
        assert_eq!(parse_goal("0/3000028"), Ok(Goal::Lsn(Lsn(0x300_0028))));
        let time = "2026-11-21 10:00:00+00";
        assert_eq!(parse_goal(time), Ok(Goal::Time(time.to_owned())));
    }
}
