//! [`Lsn`]: a byte position in the WAL, printed `X/X` as PostgreSQL prints it.
//!
//! Ranges of WAL are half-open: `[start_lsn, end_lsn)`, and `end_lsn` is the first byte after.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Log sequence number: a byte position in the WAL (`XLogRecPtr` in `xlogdefs.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

/// The size of a WAL page in bytes (`XLOG_BLCKSZ`). The decoder refuses any other.
pub const PAGE_SIZE: u64 = 8192;

impl Lsn {
    /// `0/0`, which PostgreSQL calls `InvalidXLogRecPtr`.
    pub const ZERO: Self = Self(0);
    /// The greatest position.
    pub const MAX: Self = Self(u64::MAX);

    /// Returns this position moved forward. Saturates at [`Lsn::MAX`].
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "an operator would hide that it saturates"
    )]
    pub fn add(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// Returns the bytes from `earlier` to `self`, or 0 if `earlier` is not earlier.
    #[must_use]
    pub fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This position rounded down to a multiple of `alignment`, which must be a power of two.
    #[must_use]
    pub fn align_down(self, alignment: u64) -> Self {
        debug_assert!(
            alignment.is_power_of_two(),
            "BUG: alignment {alignment} is no power of two"
        );
        Self(self.0 & !alignment.wrapping_sub(1))
    }

    /// Returns this position rounded up to a multiple of `alignment`, which must be a power of two.
    /// Saturates.
    #[must_use]
    pub fn align_up(self, alignment: u64) -> Self {
        self.add(alignment.wrapping_sub(1)).align_down(alignment)
    }

    /// The offset of this position inside its WAL page.
    #[must_use]
    pub fn page_offset(self) -> u64 {
        self.0 & PAGE_SIZE.wrapping_sub(1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// Text that is not an LSN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no LSN; write it as PostgreSQL does, for example 16/B374D848")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |digits: &str| {
            let valid =
                (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if valid {
                u32::from_str_radix(digits, 16).ok()
            } else {
                None
            }
        };
        text.split_once('/')
            .and_then(|(high, low)| Some((half(high)?, half(low)?)))
            .map(|(high, low)| Self((u64::from(high) << 32) | u64::from(low)))
            .ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_as_postgresql_does() {
        for (text, value) in [
            ("0/0", 0),
            ("0/16B3748", 0x16B_3748),
            ("16/B374D848", 0x16_B374_D848),
        ] {
            assert_eq!(text.parse(), Ok(Lsn(value)));
            assert_eq!(Lsn(value).to_string(), text);
        }
        for bad in [
            "",
            "/",
            "1",
            "1/",
            "/1",
            "1/123456789",
            "g/1",
            "+1/2",
            "1/2/3",
            " 1/2",
        ] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?} must not parse");
        }
    }

    #[test]
    fn alignment_rounds_both_ways_and_saturates() {
        assert_eq!(Lsn(8193).align_down(8192), Lsn(8192));
        assert_eq!(Lsn(8193).align_up(8192), Lsn(16384));
        assert_eq!(Lsn(8192).align_up(8192), Lsn(8192));
        assert_eq!(Lsn::MAX.add(1), Lsn::MAX);
    }
}
