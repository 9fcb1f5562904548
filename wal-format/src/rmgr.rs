//! The records that matter for a restore: ends of transactions, checkpoints, restore points,
//! switches.
//!
//! Layouts differ by version, and only the fields that are used are read. The record of a
//! transaction's end is read as a whole: the number of a prepared transaction comes after the lists
//! of its subtransactions, files and invalidations, which can be of any length. Of other records
//! the body may be truncated; the fields that are read are at its front.

use crate::{
    CheckpointKind, Lsn, PgTimestamp, PgVersion, RelationFile, SegmentSummary, TimelineId,
    TransactionEnd, TransactionEndKind, WalEvent,
    fields::Fields,
    record::{RecordHeader, ResourceManager, WINDOW_BYTES, WalRecord},
    summary::DROPPED_RELATIONS_MAX,
};

const SWITCH: u8 = 0x40;
const OVERWRITE_CONTRECORD: u8 = 0xD0;
/// `XLOG_TBLSPC_CREATE` and `XLOG_TBLSPC_DROP` (`tablespace.h`), the same from 13 to 18.
const TABLESPACE_CREATE: u8 = 0x00;
const TABLESPACE_DROP: u8 = 0x10;

/// Returns true if the record's body has to be kept.
pub(crate) fn is_of_interest(header: &RecordHeader) -> bool {
    match header.resource_manager {
        ResourceManager::TRANSACTION => {
            matches!(header.info & 0x70, 0x00 | 0x10 | 0x20 | 0x30 | 0x40)
        }
        // Everything except no-ops, OID allocation and page images.
        ResourceManager::XLOG => !matches!(header.info & 0xF0, 0x20 | 0x30 | 0xA0 | 0xB0),
        ResourceManager::TABLESPACE => {
            matches!(header.info & 0xF0, TABLESPACE_CREATE | TABLESPACE_DROP)
        }
        _ => false,
    }
}

/// Returns the number of bytes of the body that [`read`] needs.
pub(crate) fn window(header: &RecordHeader) -> usize {
    if !is_of_interest(header) {
        0
    } else if ended(header).is_some() {
        header.body_bytes()
    } else {
        WINDOW_BYTES
    }
}

/// Returns how the transaction ended, or `None` if the record is not a transaction's end.
fn ended(header: &RecordHeader) -> Option<TransactionEndKind> {
    if header.resource_manager != ResourceManager::TRANSACTION {
        return None;
    }
    match header.info & 0x70 {
        0x00 => Some(TransactionEndKind::Commit),
        0x20 => Some(TransactionEndKind::Abort),
        0x30 => Some(TransactionEndKind::CommitPrepared),
        0x40 => Some(TransactionEndKind::AbortPrepared),
        _ => None,
    }
}

/// Returns true if the rest of the segment is unused after this record.
pub(crate) fn is_switch(header: &RecordHeader) -> bool {
    header.resource_manager == ResourceManager::XLOG && header.info & 0xF0 == SWITCH
}

/// Returns the start of the record that an `XLOG_OVERWRITE_CONTRECORD` voids.
pub(crate) fn overwritten_lsn(record: &WalRecord<'_>) -> Option<Lsn> {
    let header = &record.header;
    if header.resource_manager != ResourceManager::XLOG
        || header.info & 0xF0 != OVERWRITE_CONTRECORD
    {
        return None;
    }
    Fields(record.main_data()).u64().map(Lsn)
}

/// Adds a record to the summary. Returns `None` if it does not have the layout of its version.
pub(crate) fn read(record: &WalRecord<'_>, summary: &mut SegmentSummary) -> Option<()> {
    let mut body = Fields(record.main_data());
    match record.header.resource_manager {
        ResourceManager::TRANSACTION if ended(&record.header).is_none() => {
            prepare(record, &mut body, summary)
        }
        ResourceManager::TRANSACTION => {
            let (end, relations) = transaction_end(record, &mut |_| {})?;
            if !relations.is_empty() {
                let (lsn, xid) = (end.lsn, end.xid);
                let event = WalEvent::DroppedRelations { xid, relations };
                summary.events.push((lsn, event));
            }
            summary.transactions.push(end);
            Some(())
        }
        ResourceManager::TABLESPACE => tablespace(record, &mut body, summary),
        _ => xlog(record, &mut body, summary),
    }
}

/// Reads the end of a transaction and the first [`DROPPED_RELATIONS_MAX`] files that it removes.
/// `subtransaction` receives each of its subtransactions. Returns `None` if the record is not a
/// transaction's end, is incomplete, or does not have the layout of its version.
pub fn transaction_end(
    record: &WalRecord<'_>,
    subtransaction: &mut dyn FnMut(u32),
) -> Option<(TransactionEnd, Vec<RelationFile>)> {
    const HAS_INFO: u8 = 0x80;
    let kind = ended(&record.header)?;
    let mut body = Fields(record.main_data());
    let time = PgTimestamp(body.i64()?);
    let mut end = TransactionEnd {
        lsn: record.lsn,
        xid: record.header.xid,
        time,
        kind,
    };
    let mut relations = Vec::new();
    if record.header.info & HAS_INFO != 0 {
        let prepared = details(record, &mut body, kind, subtransaction, &mut relations)?;
        end.xid = prepared.unwrap_or(end.xid);
    }
    Some((end, relations))
}

/// Reads the parts that `xinfo` announces, in order (`ParseCommitRecord`). Returns the prepared
/// transaction, if the record ends one.
fn details(
    record: &WalRecord<'_>,
    body: &mut Fields<'_>,
    kind: TransactionEndKind,
    subtransaction: &mut dyn FnMut(u32),
    relations: &mut Vec<RelationFile>,
) -> Option<Option<u32>> {
    let xinfo = body.u32()?;
    if xinfo & 1 != 0 {
        body.skip(8)?;
    }
    if xinfo & 2 != 0 {
        for _ in 0..body.count()? {
            subtransaction(body.u32()?);
        }
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
    record: &WalRecord<'_>,
    body: &mut Fields<'_>,
    summary: &mut SegmentSummary,
) -> Option<()> {
    // `xl_xact_prepare`: version 15 added two counts of dropped statistics before the length of the
    // name.
    let (length_at, name_at) = if record.version >= PgVersion::V15 {
        (54, 72)
    } else {
        (46, 64)
    };
    let mut field = body.at(8)?;
    let xid = field.u32()?;
    let mut field = body.at(16)?;
    let time = PgTimestamp(field.i64()?);
    let mut field = body.at(length_at)?;
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

fn xlog(record: &WalRecord<'_>, body: &mut Fields<'_>, summary: &mut SegmentSummary) -> Option<()> {
    let tracks_wal_level = record.version >= PgVersion::V17;
    let mut add = |event| summary.events.push((record.lsn, event));
    match record.header.info & 0xF0 {
        kind @ (0x00 | 0x10) => {
            let kind = if kind == 0 {
                CheckpointKind::Shutdown
            } else {
                CheckpointKind::Online
            };
            let at = |offset| body.at(offset);
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
        OVERWRITE_CONTRECORD => add(WalEvent::OverwrittenContrecord {
            overwritten_lsn: Lsn(body.u64()?),
        }),
        _ => {}
    }
    Some(())
}

/// Reads `xl_tblspc_create_rec` and `xl_tblspc_drop_rec` (`tablespace.h`).
fn tablespace(
    record: &WalRecord<'_>,
    body: &mut Fields<'_>,
    summary: &mut SegmentSummary,
) -> Option<()> {
    let oid = body.u32()?;
    let event = match record.header.info & 0xF0 {
        TABLESPACE_CREATE => WalEvent::TablespaceCreate {
            oid,
            location: text(body.0),
        },
        _ => WalEvent::TablespaceDrop { oid },
    };
    summary.events.push((record.lsn, event));
    Some(())
}

/// Reads a C string.
fn text(bytes: &[u8]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}
