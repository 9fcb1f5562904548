//! The real loss is not greater than the loss that the dashboard shows, except for the second
//! between two polls.
//!
//! `TIDEMARK_LONG=1` kills thirty times and prints the histogram.

use testbed::{tools::servers_or_skip, truth};

#[test]
fn no_more_is_lost_than_the_dashboard_said() {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let times = if testbed::is_long() { 30 } else { 3 };
    let say = |text: &str| eprintln!("PostgreSQL {major}: {text}");
    let deaths = truth::run(&bin, times, &say).unwrap_or_else(|error| panic!("{error:?}"));
    say(&format!(
        "lost more than shown:\n{}",
        truth::histogram(&deaths)
    ));
    for death in &deaths {
        assert!(death.real <= death.reported + 1.0, "{death:?}");
    }
}
