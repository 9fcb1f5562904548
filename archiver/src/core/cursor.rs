//! Where the next byte of a branch belongs: compared with what is held, appended, or refused; and where files and tails
//! begin and end.
//!
//! Invariant: bytes are taken in order and without gaps; what is held is compared and never written again.

use wal_format::{Lsn, SegmentNo, SegmentSize};

/// The place of one branch in its stream and its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    size: SegmentSize,
    /// The end of what the files hold.
    written: Lsn,
    /// Where the stream's next byte belongs; before `written` while the overlap is compared.
    incoming: Lsn,
    /// The end of what the repository has, or is given, of the open segment as tails.
    tail_end: Lsn,
    /// Bytes before the open segment that are at hand to be compared.
    before: u64,
}

/// What to do with the next bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Compare so many with what is held.
    Compare(u64),
    /// Append so many: they end within the open segment and do not cross the end of its tails.
    Append(u64),
}

/// What an append reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// A place like any other.
    Nothing,
    /// The end of the open segment.
    SegmentEnd,
    /// The end of what the repository has as tails.
    TailEnd,
}

/// A stream that does not continue what is held; where it would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfOrder {
    /// Where it would.
    pub expected: Lsn,
}

impl Cursor {
    /// At the start of a segment of which nothing was read yet.
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

    /// The end of what the files hold.
    #[must_use]
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// Where the stream is.
    #[must_use]
    pub fn incoming(&self) -> Lsn {
        self.incoming
    }

    /// The start of the open segment: where a stream resumes.
    #[must_use]
    pub fn resume_lsn(&self) -> Lsn {
        self.written.align_down(self.size.bytes())
    }

    /// So many bytes before the open segment are at hand. Without them a stream that resumes between two segments would have
    /// nothing to be compared with.
    pub fn hold_before(&mut self, bytes: u64) {
        self.before = bytes;
    }

    /// Where a stream begins that is compared with what is held: in the open segment, or before it while that is empty.
    #[must_use]
    pub fn compare_lsn(&self) -> Lsn {
        let resume = self.resume_lsn();
        if self.written == resume {
            Lsn(resume.0.saturating_sub(self.before))
        } else {
            resume
        }
    }

    /// The segment that the next new byte belongs to.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.size.segment_of(self.written)
    }

    /// A new stream begins.
    ///
    /// # Errors
    /// [`OutOfOrder`] when that leaves a gap, or lies before what is at hand.
    pub fn begin(&mut self, start_lsn: Lsn) -> Result<(), OutOfOrder> {
        if start_lsn > self.written || start_lsn < self.compare_lsn() {
            return Err(OutOfOrder {
                expected: self.resume_lsn(),
            });
        }
        self.incoming = start_lsn;
        Ok(())
    }

    /// What to do with `length` bytes, more than none, that the stream has at `start_lsn`.
    ///
    /// # Errors
    /// [`OutOfOrder`] when they do not follow the ones before.
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

    /// Bytes up to the next cut: the end of the segment, or of the tails that the repository has.
    #[must_use]
    pub fn room(&self) -> u64 {
        let mut end = self.segment().end_lsn(self.size);
        if self.tail_end > self.written {
            end = end.min(self.tail_end);
        }
        end.bytes_since(self.written)
    }

    /// Bytes were compared and are the same.
    pub fn compared(&mut self, bytes: u64) {
        self.incoming = self.incoming.add(bytes);
    }

    /// Bytes are in the file.
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

    /// The range from the last tail to here, if there is any.
    pub fn cut_tail(&mut self) -> Option<(Lsn, Lsn)> {
        if self.written <= self.tail_end {
            return None;
        }
        let from = std::mem::replace(&mut self.tail_end, self.written);
        Some((from, self.written))
    }
}

/// Where a branch is taken up: behind everything that is held of it. The repository may be ahead of a spool that was lost or
/// put back from an older copy; `start_lsn` counts where nothing is held.
#[must_use]
pub fn take_up_at(spooled: Option<Lsn>, stored: Option<Lsn>, start_lsn: Lsn) -> Lsn {
    spooled.max(stored).unwrap_or(start_lsn)
}

/// Whether the first file that was not renamed is still the open segment: it ends at `file_end`, the archive at `end`. The
/// repository may be ahead of it, or have all of it up to a range that was declared lost.
#[must_use]
pub fn is_still_open(segment: SegmentNo, file_end: Lsn, end: Lsn, size: SegmentSize) -> bool {
    // Written to its last byte but not renamed, it ends where the next segment begins.
    let is_full = file_end == segment.end_lsn(size);
    segment >= size.segment_of(end) || (is_full && end <= file_end)
}

/// Which segment is open: the first file that was not renamed, or the one behind the complete ones.
///
/// # Errors
/// With the segment that is missing before complete ones.
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
