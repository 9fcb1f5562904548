//! The clock of series and notifications.

/// Returns the time in seconds of the Unix epoch.
pub(crate) fn unix_second() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default()
}
