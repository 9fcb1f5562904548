//! WAL segments: [`SegmentSize`], [`SegmentNo`], [`SegmentName`] and the other file names of
//! `pg_wal`.
//!
//! A name is `TTTTTTTTXXXXXXXXYYYYYYYY`: timeline, segment number / n and segment number % n, where
//! n = 4 GiB / segment size (`XLogFileName` in `xlog_internal.h`). A name does not contain the
//! segment size.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Lsn, TimelineId};

/// `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub struct SegmentSize(u32);

/// A number that is not a WAL segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes is no WAL segment size; it is a power of two from 1 MiB to 1 GiB")]
pub struct InvalidSegmentSize {
    /// The number of bytes given.
    pub bytes: u64,
}

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Checks a number of bytes.
    ///
    /// # Errors
    /// [`InvalidSegmentSize`] when it is not a power of two from 1 MiB to 1 GiB.
    pub fn new(bytes: u64) -> Result<Self, InvalidSegmentSize> {
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && (1 << 20..=1 << 30).contains(&size) => {
                Ok(Self(size))
            }
            _ => Err(InvalidSegmentSize { bytes }),
        }
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The size in bytes, for buffers.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no segment size is empty")]
    pub fn len(self) -> usize {
        self.0 as usize
    }

    /// Returns the number of segments that share the middle eight digits of a name
    /// (`XLogSegmentsPerXLogId`).
    #[must_use]
    pub fn per_log(self) -> u64 {
        (1u64 << 32) >> self.0.trailing_zeros()
    }

    /// Returns the segment that contains `lsn`.
    #[must_use]
    pub fn segment_of(self, lsn: Lsn) -> SegmentNo {
        SegmentNo(lsn.0 >> self.0.trailing_zeros())
    }

    /// The offset of `lsn` inside its segment.
    #[must_use]
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 & self.bytes().wrapping_sub(1)
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = InvalidSegmentSize;

    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Self::new(u64::from(bytes))
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> Self {
        size.0
    }
}

/// A segment's number: its first LSN divided by the segment size (`XLogSegNo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SegmentNo(pub u64);

impl SegmentNo {
    /// The first LSN of this segment. Saturates.
    #[must_use]
    pub fn start_lsn(self, size: SegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(size.bytes()))
    }

    /// The first LSN after this segment. Saturates.
    #[must_use]
    pub fn end_lsn(self, size: SegmentSize) -> Lsn {
        self.start_lsn(size).add(size.bytes())
    }

    /// The next segment.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The previous segment. `None` at the first.
    #[must_use]
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// The 24 hexadecimal digits of a segment's name, split into fields but independent of a segment
/// size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline: the first eight digits.
    pub timeline: TimelineId,
    /// The middle eight digits.
    pub log: u32,
    /// The last eight digits.
    pub seg: u32,
}

impl SegmentName {
    /// The name of `segment` on `timeline`.
    #[must_use]
    pub fn new(timeline: TimelineId, segment: SegmentNo, size: SegmentSize) -> Self {
        let per_log = size.per_log();
        let log = segment.0.checked_div(per_log).unwrap_or_default();
        let seg = segment.0.checked_rem(per_log).unwrap_or_default();
        Self {
            timeline,
            log: u32::try_from(log).unwrap_or(u32::MAX),
            seg: u32::try_from(seg).unwrap_or(u32::MAX),
        }
    }

    /// Returns the segment's number, or `None` if the last eight digits are too large for the
    /// segment size.
    #[must_use]
    pub fn segment(self, size: SegmentSize) -> Option<SegmentNo> {
        let per_log = size.per_log();
        if u64::from(self.seg) >= per_log {
            return None;
        }
        u64::from(self.log)
            .checked_mul(per_log)?
            .checked_add(u64::from(self.seg))
            .map(SegmentNo)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08X}{:08X}{:08X}",
            self.timeline.get(),
            self.log,
            self.seg
        )
    }
}

/// Text that is not the name of a file in `pg_wal`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no WAL file name")]
pub struct ParseWalFileNameError(String);

fn hex8(text: &str) -> Option<u32> {
    // PostgreSQL writes upper case only. Lower case would name another file.
    let valid = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    if valid {
        u32::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

impl FromStr for SegmentName {
    type Err = ParseWalFileNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let timeline = TimelineId::new(hex8(text.get(0..8)?)?)?;
            Some(Self {
                timeline,
                log: hex8(text.get(8..16)?)?,
                seg: hex8(text.get(16..)?)?,
            })
        };
        parse().ok_or_else(|| ParseWalFileNameError(text.to_owned()))
    }
}

/// The kinds of file that PostgreSQL passes to `archive_command` or requests from
/// `restore_command`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WalFileName {
    /// A complete segment.
    Segment(SegmentName),
    /// `SEGMENT.partial`: the last segment of a timeline that ended with a promotion.
    Partial(SegmentName),
    /// `TTTTTTTT.history`.
    History(TimelineId),
    /// `SEGMENT.OOOOOOOO.backup`: a backup history file, with the offset of the backup's start.
    Backup(SegmentName, u32),
}

impl FromStr for WalFileName {
    type Err = ParseWalFileNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseWalFileNameError(text.to_owned());
        let Some((stem, extension)) = text.split_once('.') else {
            return Ok(Self::Segment(text.parse()?));
        };
        match extension {
            "partial" => Ok(Self::Partial(stem.parse()?)),
            "history" => {
                let timeline = hex8(stem).and_then(TimelineId::new).ok_or_else(wrong)?;
                Ok(Self::History(timeline))
            }
            _ => {
                let offset = extension
                    .strip_suffix(".backup")
                    .and_then(hex8)
                    .ok_or_else(wrong)?;
                Ok(Self::Backup(stem.parse()?, offset))
            }
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => write!(f, "{name}"),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
            Self::Backup(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_match_postgresql_for_every_segment_size() {
        // The results of pg_walfile_name() on a server with each size.
        let timeline = TimelineId::new(1).expect("1 is a timeline");
        for (size, lsn, name) in [
            (1 << 20, Lsn(0x1_0000_0000), "000000010000000100000000"),
            (1 << 20, Lsn(0xFFF0_0000), "000000010000000000000FFF"),
            (16 << 20, Lsn(0x2_FF00_0000), "0000000100000002000000FF"),
            (64 << 20, Lsn(0x1_0400_0000), "000000010000000100000001"),
            (1 << 30, Lsn(0x1_C000_0000), "000000010000000100000003"),
        ] {
            let size = SegmentSize::new(size).expect("a valid size");
            let segment = size.segment_of(lsn);
            assert_eq!(SegmentName::new(timeline, segment, size).to_string(), name);
            assert_eq!(
                name.parse::<SegmentName>()
                    .expect("it parses")
                    .segment(size),
                Some(segment)
            );
        }
    }

    #[test]
    fn every_file_name_of_pg_wal_parses_and_prints_back() {
        for text in [
            "000000010000000000000001",
            "000000010000000000000001.partial",
            "0000000A.history",
            "000000010000000000000001.00000028.backup",
        ] {
            assert_eq!(text.parse::<WalFileName>().expect(text).to_string(), text);
        }
        for bad in [
            "",
            "x",
            "000000000000000000000001",
            "00000001000000000000000g",
            "00000000.history",
            "a.b.c",
            "00000001000000000000000a",
            "000000010000000000000001.gz",
            "000000010000000000000001.28.backup",
        ] {
            assert!(
                bad.parse::<WalFileName>().is_err(),
                "{bad:?} must not parse"
            );
        }
    }

    #[test]
    fn sizes_outside_of_postgresqls_are_refused() {
        for bytes in [0, 1, 512 << 10, (16 << 20) + 1, 2 << 30, u64::MAX] {
            assert!(SegmentSize::new(bytes).is_err(), "{bytes} must be refused");
        }
    }

    proptest! {
        #[test]
        fn a_name_holds_its_segment(shift in 20u32..=30, lsn: u64) {
            let size = SegmentSize::new(1 << shift).expect("a valid size");
            let segment = size.segment_of(Lsn(lsn));
            let timeline = TimelineId::new(7).expect("7 is a timeline");
            prop_assert_eq!(SegmentName::new(timeline, segment, size).segment(size), Some(segment));
            prop_assert!(segment.start_lsn(size) <= Lsn(lsn));
            prop_assert_eq!(segment.start_lsn(size).add(size.offset_of(Lsn(lsn))), Lsn(lsn));
        }
    }
}
