//! The pauses between attempts.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// The first pause after a failure. A restarted server is available again within a second.
pub(super) const RETRY_MIN: Duration = Duration::from_millis(200);
/// The longest pause while the server is down. On average, half of it passes unused after the
/// server is back.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);
/// The interval at which the task signals that it is alive.
pub(super) const BEAT: Duration = Duration::from_millis(500);

/// Returns a random duration between three quarters and five quarters of a pause, so that many
/// archivers do not connect at the same time.
pub(crate) fn jitter(pause: Duration) -> Duration {
    let chance = RandomState::new().hash_one(pause) % 512;
    pause * 3 / 4 + pause * u32::try_from(chance).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use crate::daemon::supervisor::retry::*;

    #[test]
    fn jitter_stays_within_a_quarter() {
        for _ in 0..1000 {
            let pause = jitter(Duration::from_secs(4));
            assert!((3..5).contains(&pause.as_secs()), "{pause:?}");
        }
    }
}
