//! [`PgTimestamp`]: a time of the server's clock as WAL stores it, in microseconds since 2000-01-01
//! 00:00:00 UTC.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A point in time in microseconds since 2000-01-01 00:00:00 UTC (`TimestampTz` in `timestamp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTimestamp(pub i64);

/// 2000-01-01 00:00:00 UTC in microseconds of the Unix epoch.
const POSTGRES_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

impl PgTimestamp {
    /// Converts seconds of the Unix epoch, as `CheckPoint.time` stores them. Saturates.
    #[must_use]
    pub fn from_unix_seconds(seconds: i64) -> Self {
        Self(
            seconds
                .saturating_mul(1_000_000)
                .saturating_sub(POSTGRES_EPOCH_UNIX_MICROS),
        )
    }

    /// Converts a `jiff` timestamp, truncated to microseconds.
    #[must_use]
    pub fn from_jiff(timestamp: jiff::Timestamp) -> Self {
        Self(
            timestamp
                .as_microsecond()
                .saturating_sub(POSTGRES_EPOCH_UNIX_MICROS),
        )
    }

    /// Converts to a `jiff` timestamp. Returns `None` outside of jiff's range.
    #[must_use]
    pub fn to_jiff(self) -> Option<jiff::Timestamp> {
        jiff::Timestamp::from_microsecond(self.0.checked_add(POSTGRES_EPOCH_UNIX_MICROS)?).ok()
    }

    /// Returns the microseconds from `earlier` to `self`. Negative if `self` is earlier. Saturates.
    #[must_use]
    pub fn micros_since(self, earlier: Self) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Prints RFC 3339 in UTC with six fractional digits: `2026-11-21T10:00:00.000000Z`.
impl fmt::Display for PgTimestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_jiff() {
            Some(timestamp) => write!(f, "{timestamp:.6}"),
            None if self.0 < 0 => f.write_str("-infinity"),
            None => f.write_str("infinity"),
        }
    }
}

impl Serialize for PgTimestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PgTimestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let timestamp: jiff::Timestamp = text.parse().map_err(serde::de::Error::custom)?;
        Ok(Self::from_jiff(timestamp))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_utc_with_microseconds_and_reads_itself_back() {
        let epoch = PgTimestamp(0);
        assert_eq!(epoch.to_string(), "2000-01-01T00:00:00.000000Z");
        let json = serde_json::to_string(&PgTimestamp(1)).expect("a timestamp serializes");
        assert_eq!(json, "\"2000-01-01T00:00:00.000001Z\"");
        assert_eq!(
            serde_json::from_str::<PgTimestamp>(&json).expect("it parses"),
            PgTimestamp(1)
        );
        assert_eq!(PgTimestamp::from_unix_seconds(946_684_800), epoch);
        assert_eq!(PgTimestamp(i64::MAX).to_string(), "infinity");
    }
}
