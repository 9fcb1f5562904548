//! The RPO number: how old is the oldest WAL that the primary has flushed and we do not hold yet.
//!
//! Pure: it is told what was seen and when, by a monotonic clock of this process, so that no clock skew between the
//! primary and us can enter the number. Invariant: what it reports is never less than the truth known to it; where
//! samples have to be merged to bound memory, the older time wins.

use std::{collections::VecDeque, time::Duration};

use wal_format::Lsn;

/// How many positions of the primary one tier remembers. At one sample per second and one per message of the stream
/// this covers minutes exactly; beyond that neighbours are merged, which can only make the age greater.
const SAMPLES_MAX: usize = 1024;

/// How long after the last contact with the primary its position counts as known. The SQL poll runs once a second.
const CONTACT_FRESH: Duration = Duration::from_secs(5);

/// What one tier (local or remote) is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exposure {
    /// The age of the oldest flushed WAL that the tier does not hold; zero when it holds everything. Counts up from
    /// the last contact while the primary can not be seen. `None` until the primary was seen once.
    pub rpo: Option<Duration>,
    /// Bytes between the primary's flush LSN, as last seen, and what the tier holds. `None` until it was seen once.
    pub lag_bytes: Option<u64>,
    /// Whether the primary was seen recently: where it was not, `rpo` is a bound from the last proof, not a reading.
    pub source_known: bool,
}

/// The estimator of one tier.
#[derive(Debug, Default)]
pub struct RpoEstimator {
    /// `(when, flush LSN)` of the primary, both strictly growing, all beyond `durable`.
    uncovered: VecDeque<(Duration, Lsn)>,
    /// The greatest flush LSN of the primary that was seen, and when the primary was last seen at all.
    source: Option<(Duration, Lsn)>,
    durable: Lsn,
}

impl RpoEstimator {
    /// The primary's flush LSN was seen at `now`, by the stream or by the SQL poll. A position behind an earlier one
    /// (an answer that arrived late) still proves contact.
    pub fn source_seen(&mut self, now: Duration, flush_lsn: Lsn) {
        let greatest = self
            .source
            .map_or(flush_lsn, |(_, seen)| seen.max(flush_lsn));
        self.source = Some((now, greatest));
        let newest = self.uncovered.back().map_or(self.durable, |(_, lsn)| *lsn);
        if flush_lsn <= newest {
            return;
        }
        if self.uncovered.len() >= SAMPLES_MAX {
            self.merge_neighbours();
        }
        self.uncovered.push_back((now, flush_lsn));
    }

    /// Everything before `durable` is held by the tier.
    pub fn held(&mut self, durable: Lsn) {
        self.durable = self.durable.max(durable);
        while self
            .uncovered
            .front()
            .is_some_and(|(_, lsn)| *lsn <= self.durable)
        {
            self.uncovered.pop_front();
        }
    }

    /// What the tier is behind at `now`.
    #[must_use]
    pub fn exposure(&self, now: Duration) -> Exposure {
        let Some((last_contact, flush_lsn)) = self.source else {
            return Exposure {
                rpo: None,
                lag_bytes: None,
                source_known: false,
            };
        };
        let unseen_for = now.saturating_sub(last_contact);
        let source_known = unseen_for <= CONTACT_FRESH;
        let behind = self
            .uncovered
            .front()
            .map(|(since, _)| now.saturating_sub(*since));
        let rpo = match behind {
            Some(age) => age,
            None if source_known => Duration::ZERO,
            // Nothing is known of what the primary flushed since: the honest number grows.
            None => unseen_for,
        };
        Exposure {
            rpo: Some(rpo),
            lag_bytes: Some(flush_lsn.bytes_since(self.durable)),
            source_known,
        }
    }

    /// Halves the samples: each pair becomes the older time with the later position.
    fn merge_neighbours(&mut self) {
        let samples: Vec<_> = self.uncovered.drain(..).collect();
        self.uncovered.extend(samples.chunks(2).filter_map(|pair| {
            let (first, last) = (pair.first()?, pair.last()?);
            Some((first.0, last.1))
        }));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn it_is_unknown_before_the_primary_was_seen() {
        let estimator = RpoEstimator::default();
        let exposure = estimator.exposure(at(5));
        assert_eq!(
            exposure,
            Exposure {
                rpo: None,
                lag_bytes: None,
                source_known: false
            }
        );
    }

    #[test]
    fn an_idle_database_shows_zero() {
        let mut estimator = RpoEstimator::default();
        estimator.held(Lsn(100));
        for second in 0..3600 {
            estimator.source_seen(at(second * 1000), Lsn(100));
            let exposure = estimator.exposure(at(second * 1000 + 999));
            assert_eq!(
                (exposure.rpo, exposure.lag_bytes),
                (Some(Duration::ZERO), Some(0))
            );
        }
    }

    #[test]
    fn it_is_the_age_of_the_oldest_position_not_held() {
        let mut estimator = RpoEstimator::default();
        estimator.source_seen(at(1000), Lsn(10));
        estimator.source_seen(at(2000), Lsn(20));
        estimator.source_seen(at(3000), Lsn(20));
        assert_eq!(estimator.exposure(at(3500)).rpo, Some(at(2500)));
        estimator.held(Lsn(15));
        let exposure = estimator.exposure(at(3500));
        assert_eq!(
            (exposure.rpo, exposure.lag_bytes),
            (Some(at(1500)), Some(5))
        );
        estimator.held(Lsn(20));
        assert_eq!(estimator.exposure(at(3500)).rpo, Some(Duration::ZERO));
    }

    #[test]
    fn it_counts_up_while_the_primary_can_not_be_seen() {
        let mut estimator = RpoEstimator::default();
        estimator.source_seen(at(1000), Lsn(10));
        estimator.held(Lsn(10));
        assert_eq!(estimator.exposure(at(4000)).rpo, Some(Duration::ZERO));
        let later = estimator.exposure(at(61_000));
        assert_eq!((later.rpo, later.source_known), (Some(at(60_000)), false));
    }

    proptest! {
        /// Against the definition itself, over the whole history: never less, and equal while nothing was merged.
        #[test]
        fn it_never_reports_less_than_the_definition(
            steps in prop::collection::vec((0u64..50, 0u64..40, 0u64..60), 1..2500),
        ) {
            let mut estimator = RpoEstimator::default();
            // With fewer samples than it remembers nothing is merged.
            let exact = steps.len() < SAMPLES_MAX;
            let (mut now, mut flushed, mut held) = (0, 0, 0);
            let mut history = Vec::new();
            for (passed, written, stored) in steps {
                now += passed;
                flushed += written;
                estimator.source_seen(at(now), Lsn(flushed));
                history.push((now, flushed));
                held = (held + stored / 2).min(flushed);
                estimator.held(Lsn(held));
                history.retain(|(_, lsn)| *lsn > held);
                let truth = history.first().map_or(0, |(since, _)| now - since);
                let reported = estimator.exposure(at(now)).rpo.expect("the primary was seen");
                prop_assert!(reported >= at(truth));
                if exact {
                    prop_assert_eq!(reported, at(truth));
                }
            }
        }
    }
}
