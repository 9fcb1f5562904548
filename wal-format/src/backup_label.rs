//! [`BackupLabel`]: `backup_label`, which contains the LSN from which a base backup has to be
//! replayed.
//!
//! PostgreSQL writes it in `build_backup_content` (`xlogbackup.c`) and reads it in
//! `read_backup_label` (`xlogrecovery.c`). The operator's text in LABEL may contain anything, so
//! lines before it are searched from the front, and lines after it from the end.

use crate::{Lsn, SegmentName, TimelineId};

/// The content of `backup_label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// START WAL LOCATION: the LSN where replay begins.
    pub start_lsn: Lsn,
    /// The segment that contains it, on the timeline where the backup began.
    pub start_segment: SegmentName,
    /// CHECKPOINT LOCATION: the LSN of the checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// BACKUP FROM: true if the backup was taken from a standby.
    pub from_standby: bool,
    /// START TIME, in the server's time zone.
    pub start_time: Option<String>,
    /// LABEL: the operator's text.
    pub label: Option<String>,
    /// INCREMENTAL FROM LSN and TLI (17 and later): the backup that this one depends on.
    pub incremental_from: Option<(Lsn, TimelineId)>,
}

/// The reason why a `backup_label` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    /// A line is missing.
    #[error("backup_label has no line \"{name}\"")]
    Missing {
        /// The line's name.
        name: &'static str,
    },
    /// A line differs from the format that PostgreSQL writes.
    #[error("backup_label, \"{name}\": \"{value}\" is malformed")]
    Malformed {
        /// The line's name.
        name: &'static str,
        /// The text after the name.
        value: String,
    },
    /// START TIMELINE and the segment's name contradict each other.
    #[error("backup_label starts on timeline {timeline} in segment {segment}")]
    Timeline {
        /// START TIMELINE.
        timeline: TimelineId,
        /// The segment in START WAL LOCATION.
        segment: SegmentName,
    },
}

impl BackupLabel {
    /// Parses a `backup_label`.
    ///
    /// # Errors
    /// [`BackupLabelError`] when a line is missing or malformed, or two lines contradict each
    /// other.
    pub fn parse(content: &[u8]) -> Result<Self, BackupLabelError> {
        let text = String::from_utf8_lossy(content);
        let start = Line::first(&text, "START WAL LOCATION")?;
        let (start_lsn, start_segment) = start
            .value
            .strip_suffix(')')
            .and_then(|value| value.split_once(" (file "))
            .and_then(|(lsn, segment)| Some((lsn.parse().ok()?, segment.parse().ok()?)))
            .ok_or_else(|| start.malformed())?;
        let checkpoint = Line::first(&text, "CHECKPOINT LOCATION")?;
        let from = Line::first(&text, "BACKUP FROM")?;
        let from_standby = match from.value {
            "standby" => true,
            // Version 13 writes "master".
            "primary" | "master" => false,
            _ => return Err(from.malformed()),
        };
        let optional = |name| {
            Line::first(&text, name)
                .ok()
                .map(|line| line.value.to_owned())
        };
        let label = Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: checkpoint.lsn()?,
            from_standby,
            start_time: optional("START TIME"),
            label: optional("LABEL"),
            incremental_from: match Line::last(&text, "INCREMENTAL FROM LSN") {
                Ok(lsn) => Some((
                    lsn.lsn()?,
                    Line::last(&text, "INCREMENTAL FROM TLI")?.timeline()?,
                )),
                Err(_) => None,
            },
        };
        if let Ok(line) = Line::last(&text, "START TIMELINE") {
            let (timeline, segment) = (line.timeline()?, label.start_segment);
            if timeline != segment.timeline {
                return Err(BackupLabelError::Timeline { timeline, segment });
            }
        }
        Ok(label)
    }
}

/// A line of the form `NAME: value`.
struct Line<'a> {
    name: &'static str,
    value: &'a str,
}

impl<'a> Line<'a> {
    fn first(text: &'a str, name: &'static str) -> Result<Self, BackupLabelError> {
        Self::of(text.lines(), name)
    }

    fn last(text: &'a str, name: &'static str) -> Result<Self, BackupLabelError> {
        Self::of(text.lines().rev(), name)
    }

    fn of(
        mut lines: impl Iterator<Item = &'a str>,
        name: &'static str,
    ) -> Result<Self, BackupLabelError> {
        lines
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(|value| Self { name, value })
            .ok_or(BackupLabelError::Missing { name })
    }

    fn lsn(&self) -> Result<Lsn, BackupLabelError> {
        self.value.parse().map_err(|_| self.malformed())
    }

    fn timeline(&self) -> Result<TimelineId, BackupLabelError> {
        let number = self.value.parse().ok();
        number
            .and_then(TimelineId::new)
            .ok_or_else(|| self.malformed())
    }

    fn malformed(&self) -> BackupLabelError {
        BackupLabelError::Malformed {
            name: self.name,
            value: self.value.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000080\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-21 10:00:00 UTC\nLABEL: nightly\nSTART TIMELINE: 1\n";

    fn check(text: &str, expected: &str) {
        let error = BackupLabel::parse(text.as_bytes()).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn a_label_of_postgresql_parses() {
        let label = BackupLabel::parse(TEXT.as_bytes()).expect("it parses");
        assert_eq!(label.start_lsn, Lsn(0x200_0028));
        assert_eq!(label.checkpoint_lsn, Lsn(0x200_0080));
        assert_eq!(label.start_segment.to_string(), "000000010000000000000002");
        assert_eq!(label.label.as_deref(), Some("nightly"));
        assert_eq!(label.start_time.as_deref(), Some("2026-11-21 10:00:00 UTC"));
        assert_eq!((label.from_standby, label.incremental_from), (false, None));
        let old = TEXT.replace("primary", "master");
        assert!(BackupLabel::parse(old.as_bytes()).is_ok_and(|label| !label.from_standby));
        let standby = TEXT.replace("primary", "standby")
            + "INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 2\n";
        let label = BackupLabel::parse(standby.as_bytes()).expect("it parses");
        assert!(label.from_standby);
        let (lsn, timeline) = label.incremental_from.expect("incremental");
        assert_eq!((lsn, timeline.get()), (Lsn(0x100_0028), 2));
    }

    #[test]
    fn what_the_operator_wrote_changes_nothing() {
        let text = TEXT.replace(
            "nightly",
            "x\nSTART WAL LOCATION: 0/9 (file 000000090000000000000009)\nCHECKPOINT LOCATION: 0/9\n\
             BACKUP FROM: standby\nSTART TIMELINE: 9",
        );
        let label = BackupLabel::parse(text.as_bytes()).expect("it parses");
        assert_eq!(label.start_lsn, Lsn(0x200_0028));
        assert_eq!(label.checkpoint_lsn, Lsn(0x200_0080));
        assert!(!label.from_standby);
    }

    #[test]
    fn a_label_that_is_cut_or_contradicts_itself_is_refused() {
        check("", "no line \"START WAL LOCATION\"");
        check("START WAL LOCATION: 0/2000028\n", "malformed");
        check(
            &TEXT.replace("0/2000080", "here"),
            "\"CHECKPOINT LOCATION\": \"here\"",
        );
        check(
            &TEXT.replace("primary", "nobody"),
            "\"BACKUP FROM\": \"nobody\"",
        );
        check(
            &TEXT.replace("BACKUP FROM", "BACKUP TO"),
            "no line \"BACKUP FROM\"",
        );
        check(
            &TEXT.replace("TIMELINE: 1", "TIMELINE: 0"),
            "\"START TIMELINE\": \"0\"",
        );
        check(
            &TEXT.replace("TIMELINE: 1", "TIMELINE: 2"),
            "on timeline 2 in segment",
        );
        check(
            &format!("{TEXT}INCREMENTAL FROM LSN: 0/1000028\n"),
            "no line \"INCREMENTAL FROM TLI\"",
        );
    }
}
