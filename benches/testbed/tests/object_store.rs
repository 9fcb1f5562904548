//! The main job with a bucket as the repository: the archiver's host is lost, and only the bucket
//! remains.
//!
//! `TIDEMARK_LONG=1` loses it fifty times for each class of durability and prints the percentiles.

use testbed::{
    host_loss::{self, percentile},
    object_store::ObjectStoreServer,
    tools::servers_or_skip,
};

fn lose_the_host(settings: &str) -> Vec<f64> {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return Vec::new();
    };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return Vec::new();
    };
    let times = if testbed::is_long() { 50 } else { 2 };
    let say = |text: &str| eprintln!("PostgreSQL {major}, {settings:?}: {text}");
    let losses = host_loss::run(&bin, store, settings, times, &say)
        .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
    let mut seconds: Vec<f64> = losses.iter().map(|(loss, _)| loss.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    say(&format!(
        "{times} losses: p50 {:.3} s, p99 {:.3} s, max {:.3} s",
        percentile(&seconds, 0.5),
        percentile(&seconds, 0.99),
        percentile(&seconds, 1.0)
    ));
    seconds
}

#[test]
fn with_acknowledge_remote_nothing_acknowledged_dies_with_the_host() {
    let seconds = lose_the_host("acknowledge = \"remote\"");
    assert!(seconds.iter().all(|one| *one == 0.0), "{seconds:?}");
}

/// The amount of the loss depends on the machine, so it is printed and not asserted. The test
/// asserts that the loss ends at one point in time and is not a gap.
#[test]
fn with_acknowledge_local_a_moment_dies_with_the_host() {
    lose_the_host("acknowledge = \"local\"");
}
