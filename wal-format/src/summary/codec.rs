//! [`SegmentSummary`] as bytes: columns of varint deltas, so that a transaction's end takes three
//! to five bytes.
//!
//! LSNs are relative to a base, the range's start. `FORMAT.md` describes the bytes.
//! Invariant: decoding never allocates more than a fixed multiple of its input, and never panics,
//! whatever the input.

use super::facts::{
    CheckpointKind, DROPPED_RELATIONS_MAX, RelationFile, SegmentSummary, TransactionEnd,
    TransactionEndKind, WalEvent,
};
use crate::{Lsn, PgTimestamp, TimelineId};

/// The reason why bytes are not a summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeSummaryError {
    /// A count is larger than the rest of the input can hold.
    #[error("a count of {count} is more than the {left} bytes left could hold")]
    Count {
        /// The count.
        count: u64,
        /// The number of bytes left.
        left: usize,
    },
    /// A number is outside of its type's range.
    #[error("a number is out of range")]
    Range,
    /// Bytes follow the last field.
    #[error("{left} bytes follow the summary")]
    TrailingBytes {
        /// The number of bytes after the last field.
        left: usize,
    },
    /// The input ends inside a field.
    #[error("the summary is cut off")]
    Truncated,
    /// An event of a kind that this build does not know.
    #[error("event {tag} is unknown to this build")]
    UnknownEvent {
        /// The event's number.
        tag: u8,
    },
    /// A text is not UTF-8.
    #[error("a name is not UTF-8")]
    Utf8,
}

type Result<T> = std::result::Result<T, DecodeSummaryError>;

/// Numbers of the events. A number is never reused.
mod tag {
    pub(super) const BACKUP_END: u8 = 1;
    pub(super) const CHECKPOINT: u8 = 2;
    pub(super) const DROPPED_RELATIONS: u8 = 3;
    pub(super) const END_OF_RECOVERY: u8 = 4;
    pub(super) const FULL_PAGE_WRITES: u8 = 5;
    pub(super) const OVERWRITTEN_CONTRECORD: u8 = 6;
    pub(super) const PREPARE: u8 = 7;
    pub(super) const RESTORE_POINT: u8 = 8;
    pub(super) const SWITCH: u8 = 9;
    pub(super) const WAL_LEVEL: u8 = 10;
    pub(super) const TABLESPACE_CREATE: u8 = 11;
    pub(super) const TABLESPACE_DROP: u8 = 12;
}

/// Records start at multiples of 8, so their distances are stored in units of 8.
const ALIGNED_SHIFT: u8 = 3;

impl SegmentSummary {
    /// Encodes the summary. `base` is the start of the range.
    #[must_use]
    pub fn encode(&self, base: Lsn) -> Vec<u8> {
        let mut out = Vec::with_capacity(64_usize.saturating_add(self.transactions.len()));
        put_varint(&mut out, self.record_count);
        let lsns = [
            self.first_record_lsn,
            self.last_record_lsn,
            self.last_record_end_lsn,
            self.open_record_lsn,
        ];
        let present = lsns
            .iter()
            .rev()
            .fold(0_u8, |bits, lsn| (bits << 1) | u8::from(lsn.is_some()));
        out.push(present);
        for lsn in lsns.into_iter().flatten() {
            put_lsn(&mut out, base, lsn);
        }
        put_transactions(&mut out, base, &self.transactions);
        put_varint(&mut out, self.events.len() as u64);
        let mut previous = base;
        for (lsn, event) in &self.events {
            put_lsn(&mut out, previous, *lsn);
            previous = *lsn;
            put_event(&mut out, *lsn, event);
        }
        out
    }

    /// Decodes `bytes` that [`SegmentSummary::encode`] returned for the same `base`.
    ///
    /// # Errors
    /// [`DecodeSummaryError`] when `bytes` are not an encoded summary.
    pub fn decode(base: Lsn, bytes: &[u8]) -> Result<Self> {
        let mut input = Input { rest: bytes };
        let record_count = input.varint()?;
        let present = input.byte()?;
        if present > 0b1111 {
            return Err(DecodeSummaryError::Range);
        }
        let mut lsn = |bit: u8| {
            if present & bit == 0 {
                Ok(None)
            } else {
                input.lsn(base).map(Some)
            }
        };
        let first_record_lsn = lsn(1)?;
        let last_record_lsn = lsn(2)?;
        let last_record_end_lsn = lsn(4)?;
        let open_record_lsn = lsn(8)?;
        let transactions = input.transactions(base)?;
        // The smallest event has one byte of distance and its tag.
        let count = input.count(2)?;
        let mut events = Vec::with_capacity(count);
        let mut previous = base;
        for _ in 0..count {
            let lsn = input.lsn(previous)?;
            previous = lsn;
            events.push((lsn, input.event(lsn)?));
        }
        if !input.rest.is_empty() {
            let left = input.rest.len();
            return Err(DecodeSummaryError::TrailingBytes { left });
        }
        Ok(Self {
            record_count,
            first_record_lsn,
            last_record_lsn,
            last_record_end_lsn,
            open_record_lsn,
            transactions,
            events,
        })
    }
}

/// Appends seven bits per byte, least significant first. The top bit means that more follow
/// (LEB128).
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    #[expect(clippy::cast_possible_truncation, reason = "below 0x80")]
    out.push(value as u8);
}

/// Maps small distances of either sign to small numbers: 0, -1, 1, -2, …
fn zigzag(value: i64) -> u64 {
    (value.wrapping_shl(1) ^ value.wrapping_shr(63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ (value & 1).cast_signed().wrapping_neg()
}

fn put_lsn(out: &mut Vec<u8>, base: Lsn, lsn: Lsn) {
    put_varint(out, zigzag(lsn.0.wrapping_sub(base.0).cast_signed()));
}

fn put_time(out: &mut Vec<u8>, time: PgTimestamp) {
    put_varint(out, zigzag(time.0));
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn put_transactions(out: &mut Vec<u8>, base: Lsn, transactions: &[TransactionEnd]) {
    put_varint(out, transactions.len() as u64);
    if transactions.is_empty() {
        return;
    }
    for four in transactions.chunks(4) {
        let bits = four.iter().rev().fold(0, |bits: u8, transaction| {
            (bits << 2) | kind_bits(transaction.kind)
        });
        out.push(bits);
    }
    let unaligned = transactions
        .iter()
        .fold(base.0, |bits, transaction| bits | transaction.lsn.0);
    let shift = if unaligned & 7 == 0 { ALIGNED_SHIFT } else { 0 };
    out.push(shift);
    let mut previous = base.0;
    for transaction in transactions {
        put_varint(out, transaction.lsn.0.wrapping_sub(previous) >> shift);
        previous = transaction.lsn.0;
    }
    let mut previous = 0_u32;
    for transaction in transactions {
        let distance = transaction.xid.wrapping_sub(previous).cast_signed();
        put_varint(out, zigzag(i64::from(distance)));
        previous = transaction.xid;
    }
    let mut previous = 0_i64;
    for transaction in transactions {
        put_varint(out, zigzag(transaction.time.0.wrapping_sub(previous)));
        previous = transaction.time.0;
    }
}

fn kind_bits(kind: TransactionEndKind) -> u8 {
    match kind {
        TransactionEndKind::Commit => 0,
        TransactionEndKind::Abort => 1,
        TransactionEndKind::CommitPrepared => 2,
        TransactionEndKind::AbortPrepared => 3,
    }
}

fn kind_of_bits(bits: u8) -> TransactionEndKind {
    match bits & 3 {
        0 => TransactionEndKind::Commit,
        1 => TransactionEndKind::Abort,
        2 => TransactionEndKind::CommitPrepared,
        _ => TransactionEndKind::AbortPrepared,
    }
}

fn put_event(out: &mut Vec<u8>, lsn: Lsn, event: &WalEvent) {
    match event {
        WalEvent::BackupEnd { start_lsn } => {
            out.push(tag::BACKUP_END);
            put_lsn(out, lsn, *start_lsn);
        }
        WalEvent::Checkpoint {
            kind,
            redo_lsn,
            timeline,
            time,
            next_xid,
        } => {
            out.push(tag::CHECKPOINT);
            out.push(u8::from(*kind == CheckpointKind::Online));
            put_lsn(out, lsn, *redo_lsn);
            put_varint(out, u64::from(timeline.get()));
            put_time(out, *time);
            put_varint(out, *next_xid);
        }
        WalEvent::DroppedRelations { xid, relations } => {
            out.push(tag::DROPPED_RELATIONS);
            put_varint(out, u64::from(*xid));
            let relations = relations.get(..DROPPED_RELATIONS_MAX).unwrap_or(relations);
            put_varint(out, relations.len() as u64);
            for file in relations {
                put_varint(out, u64::from(file.tablespace));
                put_varint(out, u64::from(file.database));
                put_varint(out, u64::from(file.relation));
            }
        }
        WalEvent::EndOfRecovery {
            time,
            timeline,
            previous_timeline,
        } => {
            out.push(tag::END_OF_RECOVERY);
            put_time(out, *time);
            put_varint(out, u64::from(timeline.get()));
            put_varint(out, u64::from(previous_timeline.get()));
        }
        WalEvent::FullPageWrites { enabled } => {
            out.push(tag::FULL_PAGE_WRITES);
            out.push(u8::from(*enabled));
        }
        WalEvent::OverwrittenContrecord { overwritten_lsn } => {
            out.push(tag::OVERWRITTEN_CONTRECORD);
            put_lsn(out, lsn, *overwritten_lsn);
        }
        WalEvent::Prepare { xid, time, gid } => {
            out.push(tag::PREPARE);
            put_varint(out, u64::from(*xid));
            put_time(out, *time);
            put_text(out, gid);
        }
        WalEvent::RestorePoint { time, name } => {
            out.push(tag::RESTORE_POINT);
            put_time(out, *time);
            put_text(out, name);
        }
        WalEvent::Switch => out.push(tag::SWITCH),
        WalEvent::TablespaceCreate { oid, location } => {
            out.push(tag::TABLESPACE_CREATE);
            put_varint(out, u64::from(*oid));
            put_text(out, location);
        }
        WalEvent::TablespaceDrop { oid } => {
            out.push(tag::TABLESPACE_DROP);
            put_varint(out, u64::from(*oid));
        }
        WalEvent::WalLevel { level } => {
            out.push(tag::WAL_LEVEL);
            put_varint(out, zigzag(i64::from(*level)));
        }
    }
}

/// The rest of the input.
struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn byte(&mut self) -> Result<u8> {
        let (byte, rest) = self
            .rest
            .split_first()
            .ok_or(DecodeSummaryError::Truncated)?;
        self.rest = rest;
        Ok(*byte)
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .rest
            .split_at_checked(bytes)
            .ok_or(DecodeSummaryError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7F);
            // The tenth byte has room for one bit only.
            if shift == 63 && byte > 1 {
                return Err(DecodeSummaryError::Range);
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(DecodeSummaryError::Range)
    }

    fn varint_u32(&mut self) -> Result<u32> {
        u32::try_from(self.varint()?).map_err(|_| DecodeSummaryError::Range)
    }

    /// Reads the number of items that follow, each of at least `bytes_each` bytes.
    fn count(&mut self, bytes_each: usize) -> Result<usize> {
        let count = self.varint()?;
        let left = self.rest.len();
        match usize::try_from(count) {
            Ok(items) if items.saturating_mul(bytes_each) <= left => Ok(items),
            _ => Err(DecodeSummaryError::Count { count, left }),
        }
    }

    fn flag(&mut self) -> Result<bool> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeSummaryError::Range),
        }
    }

    fn lsn(&mut self, base: Lsn) -> Result<Lsn> {
        let distance = unzigzag(self.varint()?);
        Ok(Lsn(base.0.wrapping_add(distance.cast_unsigned())))
    }

    fn time(&mut self) -> Result<PgTimestamp> {
        Ok(PgTimestamp(unzigzag(self.varint()?)))
    }

    fn timeline(&mut self) -> Result<TimelineId> {
        TimelineId::new(self.varint_u32()?).ok_or(DecodeSummaryError::Range)
    }

    fn text(&mut self) -> Result<String> {
        let bytes = self.count(1)?;
        let text = std::str::from_utf8(self.take(bytes)?).map_err(|_| DecodeSummaryError::Utf8)?;
        Ok(text.to_owned())
    }

    fn transactions(&mut self, base: Lsn) -> Result<Vec<TransactionEnd>> {
        // Each of the three columns of numbers has at least one byte per transaction.
        let count = self.count(3)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let kinds = self.take(count.div_ceil(4))?;
        let mut transactions: Vec<TransactionEnd> = kinds
            .iter()
            .flat_map(|bits| [*bits, bits >> 2, bits >> 4, bits >> 6])
            .take(count)
            .map(|bits| TransactionEnd {
                lsn: base,
                xid: 0,
                time: PgTimestamp(0),
                kind: kind_of_bits(bits),
            })
            .collect();
        let shift = self.byte()?;
        if shift != 0 && shift != ALIGNED_SHIFT {
            return Err(DecodeSummaryError::Range);
        }
        let mut lsn = base.0;
        for transaction in &mut transactions {
            lsn = lsn.wrapping_add(self.varint()? << shift);
            transaction.lsn = Lsn(lsn);
        }
        let mut xid = 0_u32;
        for transaction in &mut transactions {
            let distance = i32::try_from(unzigzag(self.varint()?));
            let distance = distance.map_err(|_| DecodeSummaryError::Range)?;
            xid = xid.wrapping_add(distance.cast_unsigned());
            transaction.xid = xid;
        }
        let mut time = 0_i64;
        for transaction in &mut transactions {
            time = time.wrapping_add(unzigzag(self.varint()?));
            transaction.time = PgTimestamp(time);
        }
        Ok(transactions)
    }

    fn event(&mut self, lsn: Lsn) -> Result<WalEvent> {
        Ok(match self.byte()? {
            tag::BACKUP_END => WalEvent::BackupEnd {
                start_lsn: self.lsn(lsn)?,
            },
            tag::CHECKPOINT => WalEvent::Checkpoint {
                kind: if self.flag()? {
                    CheckpointKind::Online
                } else {
                    CheckpointKind::Shutdown
                },
                redo_lsn: self.lsn(lsn)?,
                timeline: self.timeline()?,
                time: self.time()?,
                next_xid: self.varint()?,
            },
            tag::DROPPED_RELATIONS => WalEvent::DroppedRelations {
                xid: self.varint_u32()?,
                relations: self.relations()?,
            },
            tag::END_OF_RECOVERY => WalEvent::EndOfRecovery {
                time: self.time()?,
                timeline: self.timeline()?,
                previous_timeline: self.timeline()?,
            },
            tag::FULL_PAGE_WRITES => WalEvent::FullPageWrites {
                enabled: self.flag()?,
            },
            tag::OVERWRITTEN_CONTRECORD => WalEvent::OverwrittenContrecord {
                overwritten_lsn: self.lsn(lsn)?,
            },
            tag::PREPARE => WalEvent::Prepare {
                xid: self.varint_u32()?,
                time: self.time()?,
                gid: self.text()?,
            },
            tag::RESTORE_POINT => WalEvent::RestorePoint {
                time: self.time()?,
                name: self.text()?,
            },
            tag::SWITCH => WalEvent::Switch,
            tag::TABLESPACE_CREATE => WalEvent::TablespaceCreate {
                oid: self.varint_u32()?,
                location: self.text()?,
            },
            tag::TABLESPACE_DROP => WalEvent::TablespaceDrop {
                oid: self.varint_u32()?,
            },
            tag::WAL_LEVEL => WalEvent::WalLevel {
                level: i32::try_from(unzigzag(self.varint()?))
                    .map_err(|_| DecodeSummaryError::Range)?,
            },
            tag => return Err(DecodeSummaryError::UnknownEvent { tag }),
        })
    }

    fn relations(&mut self) -> Result<Vec<RelationFile>> {
        let count = self.count(3)?;
        if count > DROPPED_RELATIONS_MAX {
            return Err(DecodeSummaryError::Range);
        }
        (0..count)
            .map(|_| {
                Ok(RelationFile {
                    tablespace: self.varint_u32()?,
                    database: self.varint_u32()?,
                    relation: self.varint_u32()?,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
