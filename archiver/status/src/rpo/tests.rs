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

#[test]
fn lost_wal_has_the_age_at_which_it_was_first_seen() {
    let mut estimator = RpoEstimator::default();
    estimator.was_caught_up(at(500));
    estimator.held(Lsn(10));
    for second in 1..=100 {
        estimator.source_seen(at(second * 1000), Lsn(second * 10));
        estimator.held(Lsn(second * 10));
    }
    let rpo = |estimator: &RpoEstimator| estimator.exposure(at(101_000)).rpo;
    assert_eq!(rpo(&estimator), Some(Duration::ZERO));
    estimator.held(Lsn(985));
    assert_eq!(rpo(&estimator), Some(at(2000)));
    estimator.held(Lsn(400));
    assert_eq!(rpo(&estimator), Some(at(60_000)));
    // Nothing is known of WAL before the first contact except that an earlier run held it.
    estimator.held(Lsn(3));
    assert_eq!(rpo(&estimator), Some(at(100_500)));
    estimator.held(Lsn(995));
    assert_eq!(rpo(&estimator), Some(at(1000)));
    estimator.held(Lsn(1000));
    assert_eq!(rpo(&estimator), Some(Duration::ZERO));
}

#[test]
fn held_wal_after_a_fork_is_not_lost_wal_of_the_new_path() {
    let mut estimator = RpoEstimator::default();
    estimator.source_seen(at(1000), Lsn(10));
    estimator.source_seen(at(2000), Lsn(20));
    estimator.held(Lsn(20));
    estimator.forked(Lsn(15), |_| None);
    estimator.source_seen(at(3000), Lsn(16));
    estimator.held(Lsn(16));
    estimator.held(Lsn(14));
    assert_eq!(estimator.exposure(at(5000)).rpo, Some(at(3000)));
    estimator.held(Lsn(15));
    assert_eq!(estimator.exposure(at(5000)).rpo, Some(at(2000)));
}

proptest! {
    /// Compares the estimator with the definition over the whole history: it never reports less,
    /// and the same while nothing was merged. The tier may lose what it held.
    #[test]
    fn it_never_reports_less_than_the_definition(
        steps in prop::collection::vec((0u64..50, 0u64..40, 0u64..60, 0u64..1000), 1..2500),
    ) {
        let mut estimator = RpoEstimator::default();
        // With fewer samples than the estimator remembers, nothing is merged.
        let exact = steps.len() < SAMPLES_MAX;
        let (mut now, mut flushed, mut held) = (0, 0, 0);
        let mut history = Vec::new();
        for (passed, written, stored, lost) in steps {
            now += passed;
            flushed += written;
            estimator.source_seen(at(now), Lsn(flushed));
            history.push((now, flushed));
            held = match lost {
                // One step in a hundred loses WAL, up to all of it.
                0..10 => held * lost / 10,
                _ => (held + stored / 2).min(flushed),
            };
            estimator.held(Lsn(held));
            let oldest = history.iter().find(|(_, lsn)| *lsn > held);
            let truth = oldest.map_or(0, |(since, _)| now - since);
            let reported = estimator.exposure(at(now)).rpo.expect("the primary was seen");
            prop_assert!(reported >= at(truth));
            if exact {
                prop_assert_eq!(reported, at(truth));
            }
        }
    }
}
