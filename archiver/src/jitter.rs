//! Random pauses, so that many archivers do not act at the same time.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// Returns a random duration between three quarters and five quarters of a pause, so that many
/// archivers do not connect at the same time.
pub(crate) fn jitter(pause: Duration) -> Duration {
    let chance = RandomState::new().hash_one(pause) % 512;
    pause * 3 / 4 + pause * u32::try_from(chance).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_within_a_quarter() {
        for _ in 0..1000 {
            let pause = jitter(Duration::from_secs(4));
            assert!((3..5).contains(&pause.as_secs()), "{pause:?}");
        }
    }
}
