//! [`RecoveryTarget`]: the point at which recovery stops, as the operator names it.

use jiff::Timestamp;
pub use repository::{explain_time, is_relative};
use wal_format::{Lsn, PgTimestamp};

/// Parses a target time, as [`repository::parse_time`] does.
///
/// # Errors
/// [`crate::Error::Usage`] that shows a valid notation.
pub fn parse_time(text: &str, zone: Option<&str>, now: Timestamp) -> crate::Result<PgTimestamp> {
    repository::parse_time(text, zone, now).map_err(|error| crate::Error::usage(error.to_string()))
}

/// The point at which recovery stops (`recovery_target*` of PostgreSQL).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecoveryTarget {
    /// At the end of the archive.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// Before the first transaction end with a later time; with `inclusive` off, with this time or
    /// a later one.
    Time {
        /// The time.
        time: PgTimestamp,
        /// True if transactions of exactly this time are kept.
        inclusive: bool,
        /// True for `now` and for a span before it ([`is_relative`]): where the archive is not
        /// proved up to the time, recovery stops at the end of the archive.
        relative: bool,
    },
    /// After the first record at or after the LSN; with `inclusive` off, before it.
    Lsn {
        /// The position.
        lsn: Lsn,
        /// True if the record is kept.
        inclusive: bool,
    },
    /// After the end of this transaction; with `inclusive` off, before it.
    Xid {
        /// The transaction, as [`parse_xid`] reads it.
        xid: u64,
        /// True if it is kept.
        inclusive: bool,
    },
    /// After the restore point of this name.
    Name {
        /// The name.
        name: String,
        /// The start or the end of the restore point's record, if several restore points have the
        /// name.
        at_lsn: Option<Lsn>,
    },
}

/// Parses a transaction's number: decimal or, after `0x`, hexadecimal. It has 32 bits, as in WAL
/// and in `xmin`, or the epoch above them, as `pg_current_xact_id()` prints it.
///
/// # Errors
/// The problem and the remedy.
pub fn parse_xid(text: &str) -> Result<u64, String> {
    /// `FirstNormalTransactionId`: smaller numbers are reserved.
    const FIRST_NORMAL: u64 = 3;
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let is_number = |digits: &str| digits.chars().all(|digit| digit.is_ascii_hexdigit());
    let number = match hexadecimal {
        Some(digits) if is_number(digits) => u64::from_str_radix(digits, 16).ok(),
        None if is_number(text) => text.parse().ok(),
        _ => None,
    };
    match number {
        Some(xid) if lower_half(xid) >= FIRST_NORMAL => Ok(xid),
        Some(_) => Err("no transaction has this number; the first one is 3".to_owned()),
        None => Err(
            "write the number of a transaction, as 738, 0x2e2, or with its epoch 12884902626"
                .to_owned(),
        ),
    }
}

fn lower_half(xid: u64) -> u64 {
    xid & u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_a_number_of_32_or_64_bits() {
        for (text, expected) in [
            ("738", 738),
            ("0x2e2", 738),
            ("0X2E2", 738),
            ("12884902626", 3 << 32 | 738),
            ("0x3000002e2", 3 << 32 | 738),
            ("4294967295", 0xFFFF_FFFF),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_xid(text), Ok(expected), "{text}");
        }
        let refused = [
            "",
            "0x",
            "2",
            "0",
            "4294967296",
            "-738",
            "+738",
            "7e2",
            "738 ",
            "0x+1",
            "0x1g",
            "18446744073709551616",
        ];
        for text in refused {
            assert!(parse_xid(text).is_err(), "{text}");
        }
    }
}
