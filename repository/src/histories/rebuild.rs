//! A lost history file, built again from what the archive says of the timeline.
//!
//! A descendant's file begins with its ancestor's, byte for byte. Else the file is the parent's, if
//! it has one, and one line: the parent's number, the switch point, and the reason
//! (`writeTimeLineHistory` in `timeline.c`). The switch point is where the timeline's first records
//! begin, and the reasons of a promotion are few. Invariant: only content with the digest in the
//! timeline's name is returned.

use bytes::Bytes;
use wal_format::{
    Branch, Lsn, ObjectKey, SegmentSummary, SystemIdentifier, TimelineHistory, TimelineId, WalEvent,
};

use crate::{Error, Repository, Result, sound::is_history};

/// Objects of the timeline that are read for its first records: those of the segment of the fork.
const OBJECTS_MAX: usize = 16;
/// Candidates for the switch point that are tried: each is one of the timeline's first records.
const POINTS_MAX: usize = 32;
/// The last record before a switch point begins at most this far before it, when a recovery ended
/// after it.
const LAST_RECORD_BYTES_MAX: u64 = 64 << 10;
/// Lengths of the headers of a page and of a segment's first page (`SizeOfXLogShortPHD`,
/// `SizeOfXLogLongPHD`).
const PAGE_HEADERS: [u64; 2] = [24, 40];

impl Repository {
    /// The content of a history file of which no copy is intact, if the archive tells it; the
    /// source in words.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn rebuilt_history(
        &self,
        system: SystemIdentifier,
        branch: Branch,
    ) -> Result<Option<(Bytes, String)>> {
        let mut known = Vec::new();
        for other in self.history_copies(system)?.into_keys() {
            match self.history(system, other) {
                Ok(content) => known.push((other, content)),
                Err(Error::NotFound { .. } | Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for (descendant, content) in &known {
            if descendant.timeline > branch.timeline
                && let Some(ancestor) = beginning_of(branch, content)
            {
                let source = format!("the history file of timeline {}", descendant.timeline);
                return Ok(Some((ancestor, source)));
            }
        }
        let mut points = Vec::new();
        let mut names = Vec::new();
        for summary in self.first_summaries(system, branch)? {
            switch_points(branch.timeline, &summary, &mut points);
            let events = summary.events.into_iter();
            names.extend(events.filter_map(|(_, event)| match event {
                WalEvent::RestorePoint { name, .. } => Some(name),
                _ => None,
            }));
        }
        let built = built(branch, &known, &points, &names);
        Ok(built.map(|content| {
            let source = "the first records of the timeline".to_owned();
            (content, source)
        }))
    }

    /// The summaries of the first objects of a timeline, in the order of their WAL.
    fn first_summaries(
        &self,
        system: SystemIdentifier,
        branch: Branch,
    ) -> Result<Vec<SegmentSummary>> {
        let mut objects = Vec::new();
        for kind in ["wal", "tail"] {
            for (key, size) in self.list(&format!("{system}/{kind}/{branch}/"))? {
                if let ObjectKey::Segment(_, _, name) | ObjectKey::Tail(_, _, name, ..) = key {
                    objects.push((name, key, size));
                }
            }
        }
        objects.sort_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
        let mut summaries = Vec::new();
        for (_, key, size) in objects.into_iter().take(OBJECTS_MAX) {
            match self.footer(&key, size) {
                Ok(footer) => summaries.push(footer.summary().clone()),
                Err(Error::NotFound { .. } | Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(summaries)
    }
}

/// The beginning of a descendant's file that is the file of `branch`.
fn beginning_of(branch: Branch, descendant: &Bytes) -> Option<Bytes> {
    let ends = descendant
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n');
    // With the line feed that ends the ancestor's last line, or before the one that PostgreSQL puts
    // between the two.
    let mut lengths = ends.flat_map(|(at, _)| [at, at + 1]);
    lengths.find_map(|length| {
        let beginning = descendant.get(..length)?;
        is_history(branch, beginning).then(|| Bytes::copy_from_slice(beginning))
    })
}

/// Collects the LSNs at which the timeline may have begun: one of its first events, or the page
/// header before it.
fn switch_points(on: TimelineId, summary: &SegmentSummary, points: &mut Vec<Lsn>) {
    for (lsn, event) in &summary.events {
        // The segment of the fork begins with a copy of the parent's records, checkpoints among
        // them.
        let is_first = match event {
            WalEvent::Checkpoint { timeline, .. } | WalEvent::EndOfRecovery { timeline, .. } => {
                *timeline == on
            }
            WalEvent::FullPageWrites { .. } | WalEvent::OverwrittenContrecord { .. } => true,
            _ => false,
        };
        if is_first && points.len() < POINTS_MAX {
            points.push(*lsn);
            let offset = lsn.page_offset();
            if PAGE_HEADERS.contains(&offset) {
                points.push(Lsn(lsn.0.saturating_sub(offset)));
            }
        }
    }
}

/// The file of `branch`, if one of its possible parents, switch points and reasons has its digest.
fn built(
    branch: Branch,
    known: &[(Branch, Bytes)],
    points: &[Lsn],
    restore_points: &[String],
) -> Option<Bytes> {
    let first = [(Branch::FIRST, Bytes::new())];
    let parents = first.iter().chain(known).filter(|(parent, content)| {
        let history = TimelineHistory::parse(parent.timeline, content);
        parent.timeline < branch.timeline && (content.is_empty() || history.is_ok())
    });
    for (parent, content) in parents {
        for point in points {
            let found = reasons(*point, restore_points).find_map(|reason| {
                let built = with_line(content, parent.timeline, *point, &reason);
                is_history(branch, &built).then_some(built)
            });
            if let Some(found) = found {
                return Some(found.into());
            }
        }
    }
    None
}

/// A history file as `writeTimeLineHistory` writes it.
fn with_line(parent: &[u8], timeline: TimelineId, switch_lsn: Lsn, reason: &str) -> Vec<u8> {
    let gap = if parent.is_empty() { "" } else { "\n" };
    let line = format!("{gap}{timeline}\t{switch_lsn}\t{reason}\n");
    [parent, line.as_bytes()].concat()
}

/// The reasons that name neither a time nor a transaction (`getRecoveryStopReason` in
/// `xlogrecovery.c`).
fn reasons(point: Lsn, restore_points: &[String]) -> impl Iterator<Item = String> {
    let named = restore_points
        .iter()
        .map(|name| format!("at restore point \"{name}\""))
        .collect::<Vec<_>>();
    let after = (0..=LAST_RECORD_BYTES_MAX / 8)
        .map(move |back| Lsn(point.0.saturating_sub(back * 8)))
        .map(|lsn| format!("after LSN {lsn}\n"));
    ["no recovery target specified", "reached consistency"]
        .into_iter()
        .map(str::to_owned)
        .chain(named)
        .chain(
            [0, PAGE_HEADERS[0], PAGE_HEADERS[1]]
                .map(|header| format!("before LSN {}\n", Lsn(point.0.saturating_add(header)))),
        )
        .chain(after)
}
