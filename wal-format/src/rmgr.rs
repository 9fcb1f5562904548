//! What a restore has to know of a record: transactions' ends, checkpoints, restore points, switches.
//!
//! Layouts differ by version; only the fields that are used are read. The body may be cut (a commit can carry a million
//! invalidations): what is read lies at its front.

use crate::{
    CheckpointKind, Lsn, PgTimestamp, PgVersion, RelationFile, SegmentSummary, TimelineId,
    TransactionEnd, TransactionEndKind, WalEvent, summary::DROPPED_RELATIONS_MAX,
};

const XLOG: u8 = 0;
const XACT: u8 = 1;

const SWITCH: u8 = 0x40;

/// A record's header facts and body.
#[derive(Debug)]
pub(crate) struct RecordFacts<'a> {
    pub(crate) version: PgVersion,
    pub(crate) lsn: Lsn,
    pub(crate) xid: u32,
    pub(crate) info: u8,
    pub(crate) rmid: u8,
    pub(crate) body: &'a [u8],
    /// Whether `body` is all of it.
    pub(crate) whole: bool,
}

/// Whether the record's body has to be kept.
pub(crate) fn is_of_interest(rmid: u8, info: u8) -> bool {
    match rmid {
        XACT => matches!(info & 0x70, 0x00 | 0x10 | 0x20 | 0x30 | 0x40),
        // Everything but no-ops, OID allocation and page images.
        XLOG => !matches!(info & 0xF0, 0x20 | 0x30 | 0xA0 | 0xB0),
        _ => false,
    }
}

/// Whether the rest of the segment is unused.
pub(crate) fn is_switch(rmid: u8, info: u8) -> bool {
    rmid == XLOG && info & 0xF0 == SWITCH
}

/// Reads a record into the summary; `None` where it does not have its version's layout.
pub(crate) fn read(record: &RecordFacts<'_>, summary: &mut SegmentSummary) -> Option<()> {
    let mut body = Reader(main_data(record)?);
    match record.rmid {
        XACT => transaction(record, &mut body, summary),
        _ => xlog(record, &mut body, summary),
    }
}

/// Skips the header items of a record without block references; what follows is its main data.
fn main_data<'a>(record: &RecordFacts<'a>) -> Option<&'a [u8]> {
    let mut reader = Reader(record.body);
    loop {
        if reader.0.is_empty() && record.whole {
            return Some(&[]);
        }
        match reader.u8()? {
            255 => {
                reader.u8()?;
                return Some(reader.0);
            }
            254 => {
                reader.u32()?;
                return Some(reader.0);
            }
            253 => reader.skip(2)?,
            252 => reader.skip(4)?,
            // A block reference: no kind that is read here has one.
            _ => return Some(&[]),
        }
    }
}

fn transaction(
    record: &RecordFacts<'_>,
    body: &mut Reader<'_>,
    summary: &mut SegmentSummary,
) -> Option<()> {
    let kind = match record.info & 0x70 {
        0x00 => TransactionEndKind::Commit,
        0x20 => TransactionEndKind::Abort,
        0x30 => TransactionEndKind::CommitPrepared,
        0x40 => TransactionEndKind::AbortPrepared,
        _ => return prepare(record, body, summary),
    };
    let time = PgTimestamp(body.i64()?);
    let mut end = TransactionEnd {
        lsn: record.lsn,
        xid: record.xid,
        time,
        kind,
    };
    let mut relations = Vec::new();
    if record.info & 0x80 != 0 {
        let details = details(record, body, kind, &mut relations);
        match details {
            Some(prepared) => end.xid = prepared.unwrap_or(record.xid),
            None if record.whole => return None,
            None => {}
        }
    }
    if !relations.is_empty() {
        let (lsn, xid) = (record.lsn, end.xid);
        summary
            .events
            .push((lsn, WalEvent::DroppedRelations { xid, relations }));
    }
    summary.transactions.push(end);
    Some(())
}

/// What `xinfo` announces, in its order (`ParseCommitRecord`); the prepared transaction, if it ends one.
fn details(
    record: &RecordFacts<'_>,
    body: &mut Reader<'_>,
    kind: TransactionEndKind,
    relations: &mut Vec<RelationFile>,
) -> Option<Option<u32>> {
    let xinfo = body.u32()?;
    if xinfo & 1 != 0 {
        body.skip(8)?;
    }
    if xinfo & 2 != 0 {
        let count = body.count()?;
        body.skip(count.checked_mul(4)?)?;
    }
    if xinfo & 4 != 0 {
        let count = body.count()?;
        for number in 0..count {
            let file = RelationFile {
                tablespace: body.u32()?,
                database: body.u32()?,
                relation: body.u32()?,
            };
            if number < DROPPED_RELATIONS_MAX {
                relations.push(file);
            }
        }
    }
    if xinfo & 0x100 != 0 {
        let item = if record.version >= PgVersion::V18 {
            16
        } else {
            12
        };
        let count = body.count()?;
        body.skip(count.checked_mul(item)?)?;
    }
    if xinfo & 8 != 0 && kind.is_commit() {
        let count = body.count()?;
        body.skip(count.checked_mul(16)?)?;
    }
    if xinfo & 0x10 != 0 {
        return Some(Some(body.u32()?));
    }
    Some(None)
}

fn prepare(
    record: &RecordFacts<'_>,
    body: &mut Reader<'_>,
    summary: &mut SegmentSummary,
) -> Option<()> {
    // `xl_xact_prepare`: 15 added two counts of dropped statistics before the length of the name.
    let (length_at, name_at) = if record.version >= PgVersion::V15 {
        (54, 72)
    } else {
        (46, 64)
    };
    let mut field = Reader(body.0.get(8..)?);
    let xid = field.u32()?;
    let mut field = Reader(body.0.get(16..)?);
    let time = PgTimestamp(field.i64()?);
    let mut field = Reader(body.0.get(length_at..)?);
    let length = usize::from(field.u16()?);
    let name = body.0.get(name_at..)?.get(..length)?;
    summary.events.push((
        record.lsn,
        WalEvent::Prepare {
            xid,
            time,
            gid: text(name),
        },
    ));
    Some(())
}

fn xlog(
    record: &RecordFacts<'_>,
    body: &mut Reader<'_>,
    summary: &mut SegmentSummary,
) -> Option<()> {
    let tracks_wal_level = record.version >= PgVersion::V17;
    let mut add = |event| summary.events.push((record.lsn, event));
    match record.info & 0xF0 {
        kind @ (0x00 | 0x10) => {
            let kind = if kind == 0 {
                CheckpointKind::Shutdown
            } else {
                CheckpointKind::Online
            };
            let whole = body.0;
            let at = |offset: usize| whole.get(offset..).map(Reader);
            let redo_lsn = Lsn(at(0)?.u64()?);
            let timeline = TimelineId::new(at(8)?.u32()?)?;
            let full_page_writes = at(16)?.u8()? != 0;
            let next_xid = at(24)?.u64()?;
            let time = PgTimestamp::from_unix_seconds(at(64)?.i64()?);
            add(WalEvent::Checkpoint {
                kind,
                redo_lsn,
                timeline,
                time,
                next_xid,
            });
            if !full_page_writes {
                add(WalEvent::FullPageWrites { enabled: false });
            }
            if tracks_wal_level {
                let level = at(20)?.i32()?;
                add(WalEvent::WalLevel { level });
            }
        }
        SWITCH => add(WalEvent::Switch),
        0x50 => add(WalEvent::BackupEnd {
            start_lsn: Lsn(body.u64()?),
        }),
        0x60 => {
            body.skip(20)?;
            let level = body.i32()?;
            add(WalEvent::WalLevel { level });
        }
        0x70 => {
            let time = PgTimestamp(body.i64()?);
            let name = text(body.0);
            add(WalEvent::RestorePoint { time, name });
        }
        0x80 => add(WalEvent::FullPageWrites {
            enabled: body.u8()? != 0,
        }),
        0x90 => {
            let time = PgTimestamp(body.i64()?);
            let timeline = TimelineId::new(body.u32()?)?;
            let previous_timeline = TimelineId::new(body.u32()?)?;
            add(WalEvent::EndOfRecovery {
                time,
                timeline,
                previous_timeline,
            });
            if tracks_wal_level {
                let level = body.i32()?;
                add(WalEvent::WalLevel { level });
            }
        }
        0xD0 => add(WalEvent::OverwrittenContrecord {
            overwritten_lsn: Lsn(body.u64()?),
        }),
        _ => {}
    }
    Some(())
}

/// A C string.
fn text(bytes: &[u8]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// Little-endian fields from the front.
#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*now)
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    fn count(&mut self) -> Option<usize> {
        self.i32().and_then(|count| usize::try_from(count).ok())
    }
}
