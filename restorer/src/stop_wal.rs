//! Proof before the copy that the WAL at the stop can be delivered, and the end of that WAL.
//!
//! A plan is based on the names and summaries of objects, so WAL at the stop may be damaged without
//! a verdict of `wal-archiver verify`. Recovery needs the record at the stop and nothing after it.
//! PostgreSQL 15 and later also ask for the WAL after it (`xlogprefetcher.c`), which may be damaged
//! or missing.

use std::io::{self, Write};

use wal_format::{
    DecodeErrorKind, Lsn, RecordHeader, RecordSink, SegmentName, SegmentNo, WalDecoder, WalRecord,
};

use crate::{
    Error, RestorePlan, Result, Stop,
    inventory::{Archive, Inventory},
    wal_fetch::{self, Asked},
};

/// Reads the WAL from the start of the stop's segment to the end of the record at the stop, as
/// `wal-fetch` will deliver it. Sets `wal_end_lsn` to that end.
///
/// # Errors
/// [`Error::Damaged`] names the object without which recovery cannot stop as planned. Errors of the
/// store.
pub(crate) fn prove(archive: &Archive, plan: &mut RestorePlan) -> Result<()> {
    let lsn = match plan.stop {
        Stop::Before { lsn } | Stop::After { lsn } => lsn,
        Stop::Consistent => return Ok(()),
    };
    let needed = |error| match error {
        Error::Damaged { object, problem } => Error::Damaged {
            object,
            problem: format!(
                "{problem}; recovery needs it to stop {}. Choose an earlier target, or run \
                 `wal-archiver verify`, after which a plan names the nearest one",
                plan.stop
            ),
        },
        error => error,
    };
    // How far the record reaches is not known yet: accept damage anywhere after its start.
    let mut lenient = plan.clone();
    lenient.wal_end_lsn = lsn.add(1);
    match record_end(archive, &lenient, lsn).map_err(needed)? {
        Some(end) => plan.wal_end_lsn = end,
        // The record itself is damaged, or it was never complete in the archive.
        None => drop(record_end(archive, plan, lsn).map_err(needed)?),
    }
    Ok(())
}

/// Returns the end of the record that starts at `lsn`; `None` if it is not complete.
fn record_end(archive: &Archive, plan: &RestorePlan, lsn: Lsn) -> Result<Option<Lsn>> {
    let size = archive.identity().wal_segment_size;
    let mut number = size.segment_of(lsn);
    let mut wal = Decoding {
        decoder: WalDecoder::new(archive.wal_identity(), number.start_lsn(size), None),
        seen: Seen { lsn, end: None },
        is_open: true,
    };
    while wal.is_open && deliver(archive, plan, number, &mut wal)? {
        wal.is_open &= wal.decoder.open_record_lsn() == Some(lsn);
        number = number.next();
    }
    Ok(wal.seen.end)
}

/// Writes the segment that recovery reads: of the newest timeline of the path that has it
/// (`XLogFileReadAnyTLI` in `xlogrecovery.c`). Returns false if there is none.
fn deliver(
    archive: &Archive,
    plan: &RestorePlan,
    number: SegmentNo,
    out: &mut dyn Write,
) -> Result<bool> {
    let identity = archive.identity();
    let size = identity.wal_segment_size;
    let asked = Asked::by(plan);
    for part in plan.path.iter().rev() {
        if part.from >= number.end_lsn(size) {
            continue;
        }
        let name = SegmentName::new(part.branch.timeline, number, size);
        if wal_fetch::segment(&archive.repository, identity, asked, name, out)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Decodes the WAL that is written to it, until the record was found or cannot be complete.
struct Decoding {
    decoder: WalDecoder,
    seen: Seen,
    /// True while the record may still be found.
    is_open: bool,
}

impl Write for Decoding {
    fn write(&mut self, wal: &[u8]) -> io::Result<usize> {
        if self.is_open {
            let is_valid = self.decoder.push(wal, &mut self.seen).is_ok();
            self.is_open = is_valid && self.seen.end.is_none();
        }
        Ok(wal.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Seen {
    lsn: Lsn,
    /// The end of the record at `lsn`.
    end: Option<Lsn>,
}

impl RecordSink for Seen {
    fn window(&mut self, _: &RecordHeader) -> usize {
        0
    }

    fn record(&mut self, record: &WalRecord<'_>) -> std::result::Result<(), DecodeErrorKind> {
        if record.lsn == self.lsn {
            self.end = Some(record.end_lsn);
        }
        Ok(())
    }
}
