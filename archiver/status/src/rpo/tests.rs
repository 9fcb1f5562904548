use proptest::prelude::*;

use super::*;

fn at(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[test]
fn it_is_unknown_before_the_primary_was_seen() {
    let estimator = RpoEstimator::default();
    assert_eq!(estimator.exposure(at(5)), Exposure::default());
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
    /// Compares the estimator with the definition over the whole history: it never reports less,
    /// and the same while nothing was merged.
    #[test]
    fn it_never_reports_less_than_the_definition(
        steps in prop::collection::vec((0u64..50, 0u64..40, 0u64..60), 1..2500),
    ) {
        let mut estimator = RpoEstimator::default();
        // With fewer samples than the estimator remembers, nothing is merged.
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
