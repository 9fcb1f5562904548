//! [`SpoolWriter`]: WAL bytes in; checked, indexed and written to one branch's files.
//!
//! compare (what the files hold already) -> decode -> append -> cut into segments and tails.
//! Invariant: `indexer.position() == written`: no byte is in the spool that was not decoded, none is decoded twice. A byte
//! that is in the spool is never written over; the server's second sending of it is compared.

use std::{fs::File, sync::Arc};

use wal_format::{
    Branch, DecodeError, Lsn, PgTimestamp, SegmentNo, SegmentSummary, WalIdentity, WalIndexer,
    lsn::PAGE_SIZE,
};

use super::{
    Before, BranchSpool, OpenSegment,
    open_segment::{is_no_space, renew_complete},
};
use crate::{
    core::cursor::{self, Cursor, OutOfOrder, Reached, Step},
    error::{Error, Result},
};

/// A segment whose last byte was written; it is neither durable nor renamed yet.
#[derive(Debug)]
pub struct CompletedSegment {
    /// Its branch.
    pub branch: Branch,
    /// Its file.
    pub file: OpenSegment,
    /// What it holds.
    pub summary: SegmentSummary,
    /// When the source was last seen to hold nothing beyond it.
    pub proven: Option<PgTimestamp>,
}

/// A range of the open segment that is to go to the repository. Cut it only when it is durable here.
#[derive(Debug)]
pub struct TailCut {
    /// Its branch.
    pub branch: Branch,
    /// The open segment.
    pub segment: SegmentNo,
    /// The segment's file, which stays readable when it is renamed or removed.
    pub file: Arc<File>,
    /// The first byte.
    pub start_lsn: Lsn,
    /// The first byte after.
    pub end_lsn: Lsn,
    /// What the range holds.
    pub summary: SegmentSummary,
    /// When the source was last seen to hold nothing beyond it.
    pub proven: Option<PgTimestamp>,
}

/// Called with a full disk; true to try again, false to give up.
pub(super) type WaitForSpace<'a> = &'a mut dyn FnMut() -> bool;

/// Writes one branch's WAL to the spool.
#[derive(Debug)]
pub struct SpoolWriter {
    spool: BranchSpool,
    indexer: WalIndexer,
    open: Option<OpenSegment>,
    /// The segment before, while the open one is empty.
    before: Option<Before>,
    cursor: Cursor,
    /// The summary of the open segment up to the end of its tails.
    summary: SegmentSummary,
    /// The sending time of the message before the last one.
    previous_send_time: Option<PgTimestamp>,
    proven: Option<PgTimestamp>,
}

impl SpoolWriter {
    /// Opens the branch at the end of what the spool holds, or at `start_lsn`'s segment where it holds nothing. The open
    /// segment is decoded, cut behind its last valid record and made durable; `tail_end` is the end of the tails that the
    /// repository has of it. `earlier` reads segments before the open one, for the record that crosses in.
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
        // A crash between writing a segment and renaming it leaves the next one begun: it is streamed again.
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
            // The last record's padding is covered by no checksum: what a torn write left in it is not the server's.
            let checked = usize::try_from(checked).unwrap_or(usize::MAX);
            if let Some(padding) = bytes.get_mut(checked..) {
                padding.fill(0);
            }
            if bytes.is_empty() {
                // Without a whole record the segment is not open: the stream resumes, and is
                // compared, before it.
                spool.remove_partial(segment)?;
            } else {
                // The bytes may be in the page cache only, of a process that was killed or whose
                // fsync failed: durable from here.
                writer.open = Some(open.renew(spool, &bytes)?);
            }
            writer.indexer = prime()?;
            writer.index(&bytes, &mut completed)?;
        }
        Ok((writer, completed))
    }

    /// The branch.
    #[must_use]
    pub fn branch(&self) -> Branch {
        self.spool.branch()
    }

    /// The end of what was written, and decoded.
    #[must_use]
    pub fn written(&self) -> Lsn {
        self.cursor.written()
    }

    /// Where the stream is: before [`SpoolWriter::written`] while an overlap is compared.
    #[must_use]
    pub fn incoming(&self) -> Lsn {
        self.cursor.incoming()
    }

    /// The start of the segment that the next new byte belongs to: where a stream resumes.
    #[must_use]
    pub fn resume_lsn(&self) -> Lsn {
        self.cursor.resume_lsn()
    }

    /// Where a stream is to begin, so that something of it is compared: see [`SpoolWriter::hold_before`].
    #[must_use]
    pub fn compare_lsn(&self) -> Lsn {
        self.cursor.compare_lsn()
    }

    /// Returns true if a stream that resumes here has nothing to be compared with.
    #[must_use]
    pub fn lacks_overlap(&self) -> bool {
        self.written() == self.resume_lsn() && self.before.is_none()
    }

    /// Takes the segment before the open one, to be compared with what the server sends of it.
    pub fn hold_before(&mut self, before: Option<Before>) {
        if self.written() == self.resume_lsn() {
            self.cursor
                .hold_before(before.as_ref().map_or(0, Before::bytes));
            self.before = before;
        }
    }

    /// The open segment's file, if a byte of it was written.
    #[must_use]
    pub fn open_segment(&self) -> Option<&OpenSegment> {
        self.open.as_ref()
    }

    /// When the source was last seen to hold nothing beyond what was written.
    #[must_use]
    pub fn proven(&self) -> Option<PgTimestamp> {
        self.proven
    }

    /// A new stream begins at `start_lsn`; what the files hold from there is compared with it.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`] when that leaves a gap, or lies before the open segment.
    pub fn begin(&mut self, start_lsn: Lsn) -> Result<()> {
        self.cursor
            .begin(start_lsn)
            .map_err(out_of_order(start_lsn))?;
        self.previous_send_time = None;
        Ok(())
    }

    /// Takes the stream's next bytes. `from` names their source in a divergence.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`], [`intake::Error::Divergence`], [`intake::Error::Decode`]: nothing of the offending bytes was written.
    /// [`Error::Io`]: fatal. After any error the writer is to be opened anew.
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

    /// Learns from a message's header: `wal_end` was the server's flush LSN after the message before was sent, so once we
    /// have `wal_end`, everything flushed before that earlier time is here.
    pub fn note_server(&mut self, wal_end: Lsn, send_time: PgTimestamp) {
        if let Some(previous) = self.previous_send_time
            && self.written() >= wal_end
        {
            self.proven = self.proven.max(Some(previous));
        }
        self.previous_send_time = Some(send_time);
    }

    /// The range from the last tail to here, if there is any; it must be durable by now.
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

    /// Compares bytes at `incoming` with the open segment's file, or with the segment before while
    /// `incoming` is in it.
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

    /// Decodes bytes that the open segment's file holds.
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

    /// Counts bytes that are decoded and in the file; completes the segment, or the part that the repository has.
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

/// The length of the file's valid prefix: up to the end of the last record that is whole and passes its checks; and how much
/// of it comes before that record's padding.
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
