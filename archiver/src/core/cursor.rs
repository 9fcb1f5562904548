//! Decides for the next bytes of a branch whether to compare, append or refuse them, and where
//! files and tails begin and end.
//!
//! Invariant: bytes are accepted in order and without gaps. Stored bytes are compared and never
//! written again.

use wal_format::{Lsn, SegmentNo, SegmentSize};

/// The position of one branch in its stream and its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    size: SegmentSize,
    /// The end of the WAL in the files.
    written: Lsn,
    /// The LSN of the stream's next byte. Less than `written` while the overlap is compared.
    incoming: Lsn,
    /// The end of the open segment's WAL that the repository has, or is receiving, as tails.
    tail_end: Lsn,
    /// The number of bytes before the open segment that are available for comparison.
    before: u64,
}

/// The action for the next bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Compare this many bytes with the stored ones.
    Compare(u64),
    /// Append this many bytes. They end within the open segment and do not cross the end of its
    /// tails.
    Append(u64),
}

/// The boundary that an append reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// No boundary.
    Nothing,
    /// The end of the open segment.
    SegmentEnd,
    /// The end of the WAL that the repository has as tails.
    TailEnd,
}

/// A stream that does not continue the stored WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfOrder {
    /// The LSN at which it would continue it.
    pub expected: Lsn,
}

impl Cursor {
    /// Creates a cursor at the start of a segment of which nothing was read yet.
    #[must_use]
    pub fn new(size: SegmentSize, segment: SegmentNo, tail_end: Lsn) -> Self {
        let start = segment.start_lsn(size);
        Self {
            size,
            written: start,
            incoming: start,
            tail_end: tail_end.max(start),
            before: 0,
        }
    }

    /// The end of the WAL in the files.
    #[must_use]
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// The stream's position.
    #[must_use]
    pub fn incoming(&self) -> Lsn {
        self.incoming
    }

    /// The start of the open segment, where a stream resumes.
    #[must_use]
    pub fn resume_lsn(&self) -> Lsn {
        self.written.align_down(self.size.bytes())
    }

    /// Makes this many bytes before the open segment available for comparison. Without them, a
    /// stream that resumes between two segments would have no overlap to compare.
    pub fn hold_before(&mut self, bytes: u64) {
        self.before = bytes;
    }

    /// Returns the start of a stream whose beginning can be compared: in the open segment, or
    /// before it if that is empty.
    #[must_use]
    pub fn compare_lsn(&self) -> Lsn {
        let resume = self.resume_lsn();
        if self.written == resume {
            Lsn(resume.0.saturating_sub(self.before))
        } else {
            resume
        }
    }

    /// Returns the segment that the next new byte belongs to.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.size.segment_of(self.written)
    }

    /// Begins a new stream.
    ///
    /// # Errors
    /// [`OutOfOrder`] when it would leave a gap, or starts before the available bytes.
    pub fn begin(&mut self, start_lsn: Lsn) -> Result<(), OutOfOrder> {
        if start_lsn > self.written || start_lsn < self.compare_lsn() {
            return Err(OutOfOrder {
                expected: self.resume_lsn(),
            });
        }
        self.incoming = start_lsn;
        Ok(())
    }

    /// Returns the action for `length` bytes (at least one) that the stream has at `start_lsn`.
    ///
    /// # Errors
    /// [`OutOfOrder`] when they do not follow the previous ones.
    pub fn next(&self, start_lsn: Lsn, length: u64) -> Result<Step, OutOfOrder> {
        if start_lsn != self.incoming {
            return Err(OutOfOrder {
                expected: self.incoming,
            });
        }
        if self.incoming < self.written {
            let held = self.written.bytes_since(self.incoming);
            return Ok(Step::Compare(held.min(length)));
        }
        Ok(Step::Append(self.room().min(length)))
    }

    /// Returns the number of bytes up to the next boundary: the end of the segment, or of the tails
    /// that the repository has.
    #[must_use]
    pub fn room(&self) -> u64 {
        let mut end = self.segment().end_lsn(self.size);
        if self.tail_end > self.written {
            end = end.min(self.tail_end);
        }
        end.bytes_since(self.written)
    }

    /// Records that bytes were compared and are equal.
    pub fn compared(&mut self, bytes: u64) {
        self.incoming = self.incoming.add(bytes);
    }

    /// Records that bytes were written to the file.
    pub fn appended(&mut self, bytes: u64) -> Reached {
        self.written = self.written.add(bytes);
        self.incoming = self.written;
        if self.size.offset_of(self.written) == 0 {
            self.tail_end = self.written;
            self.before = 0;
            Reached::SegmentEnd
        } else if self.written == self.tail_end {
            Reached::TailEnd
        } else {
            Reached::Nothing
        }
    }

    /// Returns the range since the last tail, if it is not empty.
    pub fn cut_tail(&mut self) -> Option<(Lsn, Lsn)> {
        if self.written <= self.tail_end {
            return None;
        }
        let from = std::mem::replace(&mut self.tail_end, self.written);
        Some((from, self.written))
    }
}

/// Returns the LSN at which a branch is taken up: after everything that is stored of it. The
/// repository may be ahead of a spool that was lost or restored from an older copy. `start_lsn`
/// applies if nothing is stored.
#[must_use]
pub fn take_up_at(spooled: Option<Lsn>, stored: Option<Lsn>, start_lsn: Lsn) -> Lsn {
    spooled.max(stored).unwrap_or(start_lsn)
}

/// Returns true if the first file without its final name is still the open segment. It ends at
/// `file_end`, the archive at `end`. The repository may be ahead of it, or have everything up to a
/// range that was declared lost.
#[must_use]
pub fn is_still_open(segment: SegmentNo, file_end: Lsn, end: Lsn, size: SegmentSize) -> bool {
    // A file that was written completely but not renamed ends where the next segment begins.
    let is_full = file_end == segment.end_lsn(size);
    segment >= size.segment_of(end) || (is_full && end <= file_end)
}

/// Returns the open segment: the first file without its final name, or the one after the complete
/// ones.
///
/// # Errors
/// The segment that is missing before complete ones.
pub fn open_segment(
    last_complete: Option<SegmentNo>,
    open: Option<SegmentNo>,
    start: SegmentNo,
) -> Result<SegmentNo, SegmentNo> {
    let next = last_complete.map(SegmentNo::next);
    match (open, next) {
        (Some(open), Some(next)) if open < next => Err(open),
        (Some(open), _) => Ok(open),
        (None, Some(next)) => Ok(next.max(start)),
        (None, None) => Ok(start),
    }
}
