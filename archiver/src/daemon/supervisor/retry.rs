//! The pauses between attempts.

use std::time::Duration;

/// The first pause after a failure. A restarted server is available again within a second.
pub(super) const RETRY_MIN: Duration = Duration::from_millis(200);
/// The longest pause while the server is down. On average, half of it passes unused after the
/// server is back.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);
/// The interval at which the task signals that it is alive.
pub(super) const BEAT: Duration = Duration::from_millis(500);
