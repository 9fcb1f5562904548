//! Timelines: [`TimelineId`], the history file ([`TimelineHistory`]) and [`Branch`], our unique
//! name for a timeline.
//!
//! Two promotions can give the same number to two different timelines. A [`Branch`] is the number
//! together with a digest of the history file, so that a second "timeline 2" gets its own place in
//! the repository.

use std::{fmt, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::Lsn;

/// A timeline's number, from 1 (`TimeLineID`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// Timeline 1, which `initdb` creates. It has no history file.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// Returns `None` for 0, which is not a timeline.
    #[must_use]
    pub fn new(timeline: u32) -> Option<Self> {
        NonZeroU32::new(timeline).map(Self)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One line of a history file. The timeline may end before this line's `switch_lsn`; see
/// [`TimelineHistory::spans`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// The switch LSN in the file: the first LSN of the timeline on the next line, or of the file's
    /// own timeline if this is the last line.
    pub switch_lsn: Lsn,
    /// The reason for the switch, as PostgreSQL wrote it.
    pub reason: String,
}

/// A history file (`readTimeLineHistory` in `timeline.c`): the ancestors of a timeline, oldest
/// first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// The timeline whose history this is.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first; empty for timeline 1.
    pub ancestors: Vec<TimelineHistoryEntry>,
}

/// A timeline of a history and its WAL: `[from, to)`, which is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first LSN on it.
    pub from: Lsn,
    /// The first LSN that is no longer on it; [`Lsn::MAX`] for the last timeline of the history.
    pub to: Lsn,
}

/// A history file that PostgreSQL would refuse too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("history file of timeline {timeline}, line {line}: {problem}")]
pub struct ParseHistoryError {
    /// The timeline whose history was read.
    pub timeline: TimelineId,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The problem.
    pub problem: HistoryProblem,
}

/// The problem with a line of a history file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryProblem {
    /// The line does not begin with a timeline's number.
    #[error("expected a numeric timeline ID")]
    Timeline,
    /// No LSN follows the timeline.
    #[error("expected a write-ahead log switchpoint location")]
    SwitchLsn,
    /// The timeline IDs do not increase from line to line.
    #[error("timeline IDs must be in increasing sequence")]
    Order,
    /// A line names the timeline itself or a later one.
    #[error("timeline IDs must be less than the child timeline's ID")]
    NotAncestor,
    /// The file names no ancestor. PostgreSQL never writes such a file, so its content was lost.
    #[error("the file names no ancestor")]
    Empty,
}

impl TimelineHistory {
    /// Timeline 1's history, which is empty and has no file.
    #[must_use]
    pub fn first() -> Self {
        Self {
            timeline: TimelineId::FIRST,
            ancestors: Vec::new(),
        }
    }

    /// Parses the content of `TTTTTTTT.history`.
    ///
    /// # Errors
    /// [`ParseHistoryError`] with the line. A file without ancestors is refused: PostgreSQL treats
    /// a missing file as "no ancestors", and a later promotion would then write a wrong history.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<Self, ParseHistoryError> {
        let mut ancestors: Vec<TimelineHistoryEntry> = Vec::new();
        let text = String::from_utf8_lossy(content);
        for (index, raw) in text.lines().enumerate() {
            let line = index.saturating_add(1);
            let fail = |problem| ParseHistoryError {
                timeline,
                line,
                problem,
            };
            let trimmed = raw.trim_start();
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            let mut fields = trimmed.splitn(3, ['\t', ' ']);
            let ancestor = fields
                .next()
                .and_then(|field| field.parse().ok())
                .and_then(TimelineId::new)
                .ok_or_else(|| fail(HistoryProblem::Timeline))?;
            let switch_lsn = fields
                .next()
                .and_then(|field| field.trim().parse().ok())
                .ok_or_else(|| fail(HistoryProblem::SwitchLsn))?;
            if ancestors
                .last()
                .is_some_and(|last| last.timeline >= ancestor)
            {
                return Err(fail(HistoryProblem::Order));
            }
            if ancestor >= timeline {
                return Err(fail(HistoryProblem::NotAncestor));
            }
            let reason = fields.next().unwrap_or_default().trim_end().to_owned();
            ancestors.push(TimelineHistoryEntry {
                timeline: ancestor,
                switch_lsn,
                reason,
            });
        }
        if ancestors.is_empty() {
            return Err(ParseHistoryError {
                timeline,
                line: 0,
                problem: HistoryProblem::Empty,
            });
        }
        Ok(Self {
            timeline,
            ancestors,
        })
    }

    /// Returns the timelines that contain WAL of this history, oldest first. Their ranges are
    /// contiguous and cover every LSN.
    ///
    /// PostgreSQL can write a line whose switch LSN is below that of an earlier line, for example
    /// `1 0/70000F8`, then `2 0/4000090`: a recovery along the longer path that stops before a fork
    /// is promoted with the history of that path. For an LSN, `tliOfPointInHistory` in `timeline.c`
    /// finds the latest timeline that begins at or before it. An earlier timeline therefore ends at
    /// the lowest switch LSN of its own line and all later lines. A timeline without WAL of its own
    /// is left out.
    #[must_use]
    pub fn spans(&self) -> Vec<TimelineSpan> {
        let mut spans = Vec::new();
        let mut to = Lsn::MAX;
        let mut timeline = self.timeline;
        for entry in self.ancestors.iter().rev() {
            // A timeline begins at the switch LSN of the preceding line in the file.
            let from = entry.switch_lsn;
            if from < to {
                spans.push(TimelineSpan { timeline, from, to });
                to = from;
            }
            timeline = entry.timeline;
        }
        if Lsn::ZERO < to {
            spans.push(TimelineSpan {
                timeline,
                from: Lsn::ZERO,
                to,
            });
        }
        spans.reverse();
        spans
    }

    /// The timeline whose WAL this one continues, with the LSN of the switch in `to`. `None` for a
    /// history without ancestors.
    #[must_use]
    pub fn parent(&self) -> Option<TimelineSpan> {
        self.spans().into_iter().nth_back(1)
    }

    /// Returns the history file of an ancestor, which is a prefix of its descendant's file: a
    /// promotion copies the parent's file and appends a line feed and the line of the timeline that
    /// it leaves (`writeTimeLineHistory`). Returns `None` for an ancestor that has no file or that
    /// `descendant` does not name.
    #[must_use]
    pub fn file_of_ancestor(descendant: &[u8], ancestor: TimelineId) -> Option<&[u8]> {
        let mut start = 0_usize;
        for line in descendant.split(|byte| *byte == b'\n') {
            let number = line.split(u8::is_ascii_whitespace).next();
            let number = number.and_then(|number| str::from_utf8(number).ok()?.parse().ok());
            if number == Some(ancestor.get()) {
                let file = descendant.get(..start.checked_sub(1)?)?;
                let history = Self::parse(ancestor, file).ok()?;
                return (!history.ancestors.is_empty()).then_some(file);
            }
            start = start.saturating_add(line.len()).saturating_add(1);
        }
        None
    }

    /// Returns true if a line names `timeline`, or it is the history's own (`tliInHistory`).
    #[must_use]
    pub fn names(&self, timeline: TimelineId) -> bool {
        let mut ancestors = self.ancestors.iter();
        timeline == self.timeline || ancestors.any(|entry| entry.timeline == timeline)
    }

    /// The timeline that holds the byte at `lsn` (`tliOfPointInHistory`).
    #[must_use]
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.spans()
            .iter()
            .find(|span| lsn < span.to)
            .map_or(self.timeline, |span| span.timeline)
    }
}

/// The unique name of a timeline: its number and the first four bytes of the SHA-256 of its history
/// file (zeros for a timeline without a history file). Printed `00000001` or `00000002-1a2b3c4d`,
/// which sorts by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch {
    /// The timeline's number.
    pub timeline: TimelineId,
    /// The digest of its history file, or zeros.
    pub digest: [u8; 4],
}

impl Branch {
    /// Timeline 1.
    pub const FIRST: Self = Self {
        timeline: TimelineId::FIRST,
        digest: [0; 4],
    };

    /// The branch of a timeline without a history file.
    #[must_use]
    pub fn without_history(timeline: TimelineId) -> Self {
        Self {
            timeline,
            digest: [0; 4],
        }
    }

    /// The branch of a timeline whose history file has this content, byte for byte.
    #[must_use]
    pub fn of_history(timeline: TimelineId, content: &[u8]) -> Self {
        let sum = Sha256::digest(content);
        let mut digest = [0; 4];
        digest
            .iter_mut()
            .zip(sum.iter())
            .for_each(|(to, from)| *to = *from);
        Self { timeline, digest }
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}", self.timeline.get())?;
        if self.digest == [0; 4] {
            Ok(())
        } else {
            write!(f, "-{}", hex::encode(self.digest))
        }
    }
}

/// Text that is not a branch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no timeline branch")]
pub struct ParseBranchError(String);

impl FromStr for Branch {
    type Err = ParseBranchError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseBranchError(text.to_owned());
        let (number, digest) = text
            .split_once('-')
            .map_or((text, None), |(n, d)| (n, Some(d)));
        if number.len() != 8
            || number
                .bytes()
                .any(|b| !matches!(b, b'0'..=b'9' | b'A'..=b'F'))
        {
            return Err(wrong());
        }
        let timeline = u32::from_str_radix(number, 16)
            .ok()
            .and_then(TimelineId::new)
            .ok_or_else(wrong)?;
        let mut bytes = [0; 4];
        if let Some(digest) = digest {
            hex::decode_to_slice(digest, &mut bytes).map_err(|_| wrong())?;
        }
        let branch = Self {
            timeline,
            digest: bytes,
        };
        if branch.to_string() == text {
            Ok(branch)
        } else {
            Err(wrong())
        }
    }
}

impl Serialize for Branch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Branch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).expect("a timeline")
    }

    #[test]
    fn history_with_comments_and_blank_lines_parses() {
        let content = b"# why\n1\t0/3000148\tno recovery target specified\n\n3\t0/5000000\tbefore 2026-11-21\n";
        let history = TimelineHistory::parse(timeline(4), content).expect("it parses");
        assert_eq!(history.ancestors.len(), 2);
        assert_eq!(history.ancestors[0].reason, "no recovery target specified");
        assert!(history.names(timeline(3)) && history.names(timeline(4)));
        assert!(!history.names(timeline(2)));
        assert_eq!(history.timeline_at(Lsn(0x300_0147)), timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x300_0148)), timeline(3));
        assert_eq!(history.timeline_at(Lsn(0x500_0000)), timeline(4));
    }

    #[test]
    fn the_file_of_an_ancestor_is_the_beginning_of_its_descendants() {
        let second = b"1\t0/3000148\tno recovery target specified\n";
        let third = [&second[..], b"\n2\t0/5000000\tbefore 2026-11-21\n"].concat();
        let fourth = [&third[..], b"\n3\t0/6000000\tat restore point \"2\"\n"].concat();
        let file = |of: u32| TimelineHistory::file_of_ancestor(&fourth, timeline(of));
        assert_eq!(file(2), Some(&second[..]));
        assert_eq!(file(3), Some(&third[..]));
        // Timeline 1 has no file, and the others are not ancestors.
        assert_eq!((file(1), file(4), file(5)), (None, None, None));
    }

    fn spans(id: u32, content: &str) -> Vec<(u32, u64, u64)> {
        let history = TimelineHistory::parse(timeline(id), content.as_bytes()).expect("it parses");
        let spans = history.spans().into_iter();
        spans
            .map(|span| (span.timeline.get(), span.from.0, span.to.0))
            .collect()
    }

    #[test]
    fn a_later_line_with_an_earlier_switch_ends_every_timeline_before_it() {
        let end = u64::MAX;
        // Stock PostgreSQL writes this when a recovery along timelines 1 and 2 stops before 2
        // began.
        let content =
            "1\t0/70000F8\tno recovery target specified\n\n2\t0/4000090\tbefore LSN 0/4000090\n";
        assert_eq!(
            spans(3, content),
            [(1, 0, 0x400_0090), (3, 0x400_0090, end)]
        );
        let history = TimelineHistory::parse(timeline(3), content.as_bytes()).expect("it parses");
        let parent = history.parent().expect("a parent");
        assert_eq!((parent.timeline, parent.to), (timeline(1), Lsn(0x400_0090)));
        assert!(history.names(timeline(2)));
        assert_eq!(
            spans(4, "1 0/5\n2 0/9\n3 0/7"),
            [(1, 0, 5), (2, 5, 7), (4, 7, end)]
        );
        assert_eq!(
            spans(4, "1 0/7\n2 0/4\n3 0/9"),
            [(1, 0, 4), (3, 4, 9), (4, 9, end)]
        );
        // The server was promoted twice without a WAL record in between.
        assert_eq!(spans(3, "1 0/5\n2 0/5"), [(1, 0, 5), (3, 5, end)]);
        assert_eq!(spans(2, "1 0/0"), [(2, 0, end)]);
        assert_eq!(TimelineHistory::first().spans().len(), 1);
    }

    /// `readTimeLineHistory` and `tliOfPointInHistory` of `timeline.c`, line by line: the list of
    /// `(tli, begin, end)` has the newest first, and 0 is `InvalidXLogRecPtr`.
    fn tli_of_point_in_history(history: &TimelineHistory, ptr: Lsn) -> TimelineId {
        const INVALID: u64 = 0;
        let mut list = Vec::new();
        let mut prev_end = INVALID;
        for entry in &history.ancestors {
            list.insert(0, (entry.timeline, prev_end, entry.switch_lsn.0));
            prev_end = entry.switch_lsn.0;
        }
        list.insert(0, (history.timeline, prev_end, INVALID));
        for (tli, begin, end) in list {
            if (begin == INVALID || begin <= ptr.0) && (end == INVALID || ptr.0 < end) {
                return tli;
            }
        }
        panic!("timeline history was not contiguous");
    }

    proptest::proptest! {
        /// Generates lines with switch LSNs in any order.
        #[test]
        fn every_lsn_is_on_the_timeline_where_postgresql_finds_it(
            switches in proptest::collection::vec(0_u64..40, 0..7),
            gaps in proptest::collection::vec(1_u32..3, 8),
        ) {
            let mut number = 1;
            let mut ancestors = Vec::new();
            for (switch, gap) in switches.iter().zip(&gaps) {
                ancestors.push(TimelineHistoryEntry {
                    timeline: timeline(number),
                    switch_lsn: Lsn(*switch),
                    reason: String::new(),
                });
                number += gap;
            }
            let history = TimelineHistory { timeline: timeline(number), ancestors };
            let spans = history.spans();
            proptest::prop_assert_eq!(spans.first().map(|span| span.from), Some(Lsn::ZERO));
            proptest::prop_assert_eq!(spans.last().map(|span| span.to), Some(Lsn::MAX));
            for pair in spans.windows(2) {
                proptest::prop_assert_eq!(pair[0].to, pair[1].from);
                proptest::prop_assert!(pair[0].timeline < pair[1].timeline);
            }
            proptest::prop_assert!(spans.iter().all(|span| span.from < span.to));
            for lsn in (0..45).chain([u64::MAX - 1]).map(Lsn) {
                let expected = tli_of_point_in_history(&history, lsn);
                proptest::prop_assert_eq!(history.timeline_at(lsn), expected);
                let span = spans.iter().find(|span| span.from <= lsn && lsn < span.to);
                proptest::prop_assert_eq!(span.map(|span| span.timeline), Some(expected));
            }
        }
    }

    #[test]
    fn garbled_history_is_refused_with_its_line() {
        for (content, line, problem) in [
            (&b"x\t0/1\t"[..], 1, HistoryProblem::Timeline),
            (b"1\n", 1, HistoryProblem::SwitchLsn),
            (b"1\tzz\n", 1, HistoryProblem::SwitchLsn),
            (b"2\t0/1\n1\t0/2\n", 2, HistoryProblem::Order),
            (b"5\t0/1\n", 1, HistoryProblem::NotAncestor),
            (b"", 0, HistoryProblem::Empty),
            (b"\0\0\0", 1, HistoryProblem::Timeline),
        ] {
            let error = TimelineHistory::parse(timeline(5), content).expect_err("it is garbled");
            assert_eq!((error.line, error.problem), (line, problem));
        }
    }

    #[test]
    fn two_timelines_with_one_number_are_two_branches() {
        let one = Branch::of_history(timeline(2), b"1\t0/3000148\tx\n");
        let other = Branch::of_history(timeline(2), b"1\t0/4000148\tx\n");
        assert_ne!(one, other);
        for branch in [one, other, Branch::FIRST] {
            assert_eq!(branch.to_string().parse(), Ok(branch));
        }
        for bad in [
            "",
            "1",
            "00000000",
            "00000002-",
            "00000002-00000000",
            "00000002-1A2B3C4D",
            "0000000a",
        ] {
            assert!(bad.parse::<Branch>().is_err(), "{bad:?} must not parse");
        }
    }
}
