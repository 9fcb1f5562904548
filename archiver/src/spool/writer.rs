//! [`SpoolWriter`]: checks the WAL of one branch, indexes it and writes it to the spool's files.
//!
//! Steps: compare with the bytes that the files already hold -> decode -> append -> cut into
//! segments and tails.
//! Invariant: `indexer.position() == written`: every byte in the spool was decoded exactly once. A
//! byte in the spool is never overwritten. If the server sends it again, it is compared.

use std::{fs::File, sync::Arc};

use wal_format::{
    Branch, DecodeError, Lsn, PgTimestamp, SegmentNo, SegmentSummary, WalIdentity, WalIndexer,
    lsn::PAGE_SIZE,
};

use super::{
    before::Before,
    branch::BranchSpool,
    open_segment::{OpenSegment, is_no_space, renew_complete},
};
use crate::{
    core::cursor::{self, Cursor, OutOfOrder, Reached, Step},
    error::{Error, Result},
};

/// A segment whose last byte was written. It is neither durable nor renamed yet.
#[derive(Debug)]
pub struct CompletedSegment {
    /// The branch of the segment.
    pub branch: Branch,
    /// The file, still named `.partial`.
    pub file: OpenSegment,
    /// The summary of the whole segment.
    pub summary: SegmentSummary,
    /// The last time at which the source was known to have flushed nothing after this segment.
    /// `None` if there was none.
    pub proven: Option<PgTimestamp>,
}

/// A range of the open segment for the repository. The range must be durable here before it is cut.
#[derive(Debug)]
pub struct TailCut {
    /// The branch of the segment.
    pub branch: Branch,
    /// The open segment.
    pub segment: SegmentNo,
    /// The file of the segment, which stays readable when it is renamed or removed.
    pub file: Arc<File>,
    /// The first byte of the range.
    pub start_lsn: Lsn,
    /// The first byte after the range.
    pub end_lsn: Lsn,
    /// The summary of the range.
    pub summary: SegmentSummary,
    /// The last time at which the source was known to have flushed nothing after this range. `None`
    /// if there was none.
    pub proven: Option<PgTimestamp>,
}

/// Called when the disk is full. Returns true to try again and false to give up.
pub(super) type WaitForSpace<'a> = &'a mut dyn FnMut() -> bool;

/// Writes one branch's WAL to the spool.
#[derive(Debug)]
pub struct SpoolWriter {
    spool: BranchSpool,
    indexer: WalIndexer,
    open: Option<OpenSegment>,
    /// The previous segment, while the open segment is empty.
    before: Option<Before>,
    cursor: Cursor,
    /// The summary of the open segment up to the end of its tails.
    summary: SegmentSummary,
    /// The time at which the server sent the previous message.
    previous_send_time: Option<PgTimestamp>,
    proven: Option<PgTimestamp>,
}

impl SpoolWriter {
    /// Opens the branch at the end of the spool's WAL, or at the segment of `start_lsn` if the
    /// spool has none. Decodes the open segment, cuts it after its last valid record and makes it
    /// durable. `tail_end` is the end of the open segment's tails in the repository. `earlier`
    /// reads segments before the open one, for a record that continues from there.
    ///
    /// # Errors
    /// [`Error::Io`]; those of `earlier`.
    pub fn open(
        spool: &BranchSpool,
        identity: &WalIdentity,
        start_lsn: Lsn,
        tail_end: Lsn,
        mut earlier: impl FnMut(SegmentNo) -> Result<Option<Vec<u8>>>,
    ) -> Result<(Self, Vec<CompletedSegment>)> {
        spool.create()?;
        let size = spool.segment_size();
        let segments = spool.segments()?;
        // A crash between writing a segment and renaming it may leave a file of the next segment,
        // which is streamed again.
        for later in &segments.unacknowledged {
            tracing::info!(segment = %spool.name(*later), "removing an unacknowledged segment behind a torn one");
            spool.remove_partial(*later)?;
        }
        let segment = cursor::open_segment(
            segments.complete.last().copied(),
            segments.open.map(|(open, _)| open),
            size.segment_of(start_lsn),
        )
        .map_err(|missing| Error::SpoolHole {
            path: spool.directory().to_path_buf(),
            missing: spool.name(missing),
        })?;
        if let Some(last) = segments.complete.last() {
            renew_complete(spool, *last)?;
        }
        let segment_start = segment.start_lsn(size);
        let mut prime = || {
            WalIndexer::primed(identity, segment, |wanted| match spool.read(wanted)? {
                Some(bytes) => Ok(Some(bytes)),
                None => earlier(wanted),
            })
        };
        let mut writer = Self {
            indexer: prime()?,
            spool: spool.clone(),
            open: None,
            before: None,
            cursor: Cursor::new(size, segment, tail_end),
            summary: SegmentSummary::default(),
            previous_send_time: None,
            proven: None,
        };
        let mut completed = Vec::new();
        if segments.open.is_some() {
            let open = OpenSegment::open(spool, segment)?;
            let (valid, checked) = valid_length(&open, &mut writer.indexer, segment_start)?;
            let content = segments.open.map_or(0, |(_, length)| length);
            if valid < content {
                tracing::info!(
                    file = %open.partial_path().display(),
                    from = %segment_start.add(valid),
                    bytes = content - valid,
                    "cut the torn end of the spool; it is streamed again"
                );
            }
            let mut bytes = vec![0; usize::try_from(valid).unwrap_or(usize::MAX)];
            open.read_at(&mut bytes, 0)?;
            // No checksum covers the last record's padding. What a torn write left there is not the
            // server's WAL.
            let checked = usize::try_from(checked).unwrap_or(usize::MAX);
            if let Some(padding) = bytes.get_mut(checked..) {
                padding.fill(0);
            }
            if bytes.is_empty() {
                // A file without a whole record does not count as the open segment. The stream
                // resumes before it and is compared there.
                spool.remove_partial(segment)?;
            } else {
                // The bytes may be in the page cache only, if the process that wrote them was
                // killed or its fsync failed. From here on they are durable.
                writer.open = Some(open.renew(spool, &bytes)?);
            }
            writer.indexer = prime()?;
            writer.index(&bytes, &mut completed)?;
        }
        Ok((writer, completed))
    }

    /// The branch of the writer.
    #[must_use]
    pub fn branch(&self) -> Branch {
        self.spool.branch()
    }

    /// The end of the WAL that was decoded and written.
    #[must_use]
    pub fn written(&self) -> Lsn {
        self.cursor.written()
    }

    /// The position of the stream. It is before [`SpoolWriter::written`] while an overlap is
    /// compared.
    #[must_use]
    pub fn incoming(&self) -> Lsn {
        self.cursor.incoming()
    }

    /// The start of the segment that the next new byte belongs to. A stream resumes here.
    #[must_use]
    pub fn resume_lsn(&self) -> Lsn {
        self.cursor.resume_lsn()
    }

    /// The LSN at which a stream should begin so that a part of it is compared: see
    /// [`SpoolWriter::hold_before`].
    #[must_use]
    pub fn compare_lsn(&self) -> Lsn {
        self.cursor.compare_lsn()
    }

    /// Returns true if a stream that resumes here has nothing to be compared with.
    #[must_use]
    pub fn lacks_overlap(&self) -> bool {
        self.written() == self.resume_lsn() && self.before.is_none()
    }

    /// Sets the segment before the open one, for comparison with what the server sends of it. Does
    /// nothing if the open segment has content.
    pub fn hold_before(&mut self, before: Option<Before>) {
        if self.written() == self.resume_lsn() {
            self.cursor
                .hold_before(before.as_ref().map_or(0, Before::bytes));
            self.before = before;
        }
    }

    /// The file of the open segment. `None` if no byte of it was written.
    #[must_use]
    pub fn open_segment(&self) -> Option<&OpenSegment> {
        self.open.as_ref()
    }

    /// The last time at which the source was known to have flushed nothing after the written WAL.
    /// `None` if there was none.
    #[must_use]
    pub fn proven(&self) -> Option<PgTimestamp> {
        self.proven
    }

    /// Begins a stream at `start_lsn`. Its WAL is compared up to the end of the files' content.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`] if that leaves a gap, or if `start_lsn` is before the WAL that
    /// can be compared.
    pub fn begin(&mut self, start_lsn: Lsn) -> Result<()> {
        self.cursor
            .begin(start_lsn)
            .map_err(out_of_order(start_lsn))?;
        self.previous_send_time = None;
        Ok(())
    }

    /// Processes the stream's next bytes. `from` names their source in a divergence error.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`], [`intake::Error::Divergence`], [`intake::Error::Decode`]: the
    /// offending bytes were not written. [`Error::Io`]: fatal. After any error the writer must be
    /// opened again.
    pub fn push(
        &mut self,
        start_lsn: Lsn,
        mut bytes: &[u8],
        from: &'static str,
        completed: &mut Vec<CompletedSegment>,
        wait_for_space: WaitForSpace<'_>,
    ) -> Result<()> {
        let mut at = start_lsn;
        while !bytes.is_empty() {
            let step = self.cursor.next(at, bytes.len() as u64);
            let step = step.map_err(out_of_order(at))?;
            let (Step::Compare(count) | Step::Append(count)) = step;
            let (now, rest) = bytes.split_at(usize::try_from(count).unwrap_or(usize::MAX));
            match step {
                Step::Compare(_) => {
                    self.compare(now, from)?;
                    self.cursor.compared(count);
                }
                Step::Append(_) => {
                    let decoded = self.indexer.push(now);
                    decoded.map_err(|source| self.damaged(source))?;
                    self.append(now, wait_for_space)?;
                    self.advance(count, completed);
                }
            }
            (at, bytes) = (at.add(count), rest);
        }
        Ok(())
    }

    /// Processes a message's header. `wal_end` was the server's flush LSN after the previous
    /// message was sent. Once the WAL up to `wal_end` is here, everything that was flushed before
    /// that message is here.
    pub fn note_server(&mut self, wal_end: Lsn, send_time: PgTimestamp) {
        if let Some(previous) = self.previous_send_time
            && self.written() >= wal_end
        {
            self.proven = self.proven.max(Some(previous));
        }
        self.previous_send_time = Some(send_time);
    }

    /// Returns the range from the end of the last tail to here. `None` if it is empty. The range
    /// must be durable.
    pub fn cut_tail(&mut self) -> Option<TailCut> {
        let open = self.open.as_ref()?;
        let (start_lsn, end_lsn) = self.cursor.cut_tail()?;
        let summary = self.indexer.take_summary();
        let tail = TailCut {
            branch: self.spool.branch(),
            segment: open.segment(),
            file: open.file(),
            start_lsn,
            end_lsn,
            summary: summary.clone(),
            proven: self.proven,
        };
        self.summary.merge(summary);
        Some(tail)
    }

    /// Compares bytes at `incoming` with the open segment's file, or with the previous segment if
    /// `incoming` is in that.
    fn compare(&self, bytes: &[u8], from: &'static str) -> Result<()> {
        let is_in_open = self.incoming() >= self.resume_lsn();
        let (ours, place) = if let Some(open) = self.open.as_ref().filter(|_| is_in_open) {
            let offset = self.spool.segment_size().offset_of(self.incoming());
            let mut ours = vec![0; bytes.len()];
            open.read_at(&mut ours, offset)?;
            (ours, open.partial_path().display().to_string())
        } else {
            let left = self.written().bytes_since(self.incoming());
            let place = "the segment before".to_owned();
            let ours = match &self.before {
                Some(before) => before
                    .read(left, bytes.len())
                    .map_err(Error::io("read", self.spool.directory()))?,
                None => Vec::new(),
            };
            (ours, place)
        };
        if ours == bytes {
            return Ok(());
        }
        match ours.iter().zip(bytes).position(|(ours, new)| ours != new) {
            None => Ok(()),
            Some(index) => Err(Error::Wal(intake::Error::Divergence {
                branch: self.spool.branch(),
                lsn: self.incoming().add(index as u64),
                from,
                ours: place,
            })),
        }
    }

    fn damaged(&self, source: DecodeError) -> Error {
        Error::Wal(intake::Error::Decode {
            branch: self.spool.branch(),
            source,
        })
    }

    /// Decodes bytes that are already in the open segment's file.
    fn index(&mut self, mut bytes: &[u8], completed: &mut Vec<CompletedSegment>) -> Result<()> {
        while !bytes.is_empty() {
            let room = usize::try_from(self.cursor.room()).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            let decoded = self.indexer.push(now);
            decoded.map_err(|source| self.damaged(source))?;
            self.advance(now.len() as u64, completed);
            bytes = rest;
        }
        Ok(())
    }

    fn append(&mut self, mut bytes: &[u8], wait_for_space: WaitForSpace<'_>) -> Result<()> {
        while !bytes.is_empty() {
            if self.open.is_none() {
                let segment = self.cursor.segment();
                match OpenSegment::create(&self.spool, segment) {
                    Ok(open) => self.open = Some(open),
                    Err(Error::Io { source, .. }) if is_no_space(&source) => {
                        if wait_for_space() {
                            continue;
                        }
                        return Err(Error::SpoolFull);
                    }
                    Err(error) => return Err(error),
                }
            }
            let open = self
                .open
                .as_mut()
                .expect("BUG: the segment was opened above");
            match open.append(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_no_space(&error) => {
                    if !wait_for_space() {
                        return Err(Error::SpoolFull);
                    }
                }
                Err(error) => return Err(Error::io("write", open.partial_path())(error)),
            }
        }
        Ok(())
    }

    /// Counts bytes that were decoded and are in the file. Completes the segment, or the part that
    /// the repository has as tails.
    fn advance(&mut self, bytes: u64, completed: &mut Vec<CompletedSegment>) {
        let reached = self.cursor.appended(bytes);
        debug_assert_eq!(self.indexer.position(), self.written());
        if reached == Reached::Nothing {
            return;
        }
        self.summary.merge(self.indexer.take_summary());
        if reached == Reached::SegmentEnd {
            self.before = None;
            completed.push(CompletedSegment {
                branch: self.spool.branch(),
                file: self.open.take().expect("BUG: a full segment has a file"),
                summary: std::mem::take(&mut self.summary),
                proven: self.proven,
            });
        }
    }
}

fn out_of_order(found: Lsn) -> impl FnOnce(OutOfOrder) -> Error {
    move |order| Error::StreamOutOfOrder {
        expected: order.expected,
        found,
    }
}

/// Returns the length of the file's valid prefix, which ends with the last whole record that passes
/// its checks, and the part of it before that record's padding.
fn valid_length(
    open: &OpenSegment,
    indexer: &mut WalIndexer,
    start_lsn: Lsn,
) -> Result<(u64, u64)> {
    let page_bytes = usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX);
    let mut page = vec![0; page_bytes];
    let mut offset = 0;
    while offset < open.length() {
        let length = usize::try_from(open.length() - offset)
            .unwrap_or(usize::MAX)
            .min(page_bytes);
        open.read_at(&mut page[..length], offset)?;
        if indexer.push(&page[..length]).is_err() {
            break;
        }
        offset += length as u64;
    }
    let valid = indexer.valid_end_lsn().bytes_since(start_lsn);
    let checked = indexer.checked_end_lsn().bytes_since(start_lsn);
    Ok((valid.min(open.length()), checked))
}
