//! The decoder's records as lines of `pg_waldump`, and its printed lines, both reduced to the facts
//! that both contain.
//!
//! The golden files here use it, and so does `benches/testbed/tests/decoder.rs` with real servers.

use std::fmt::Write;

use wal_format::{
    Lsn, RecordHeader, RecordSink, SegmentSummary, WalDecoder, WalEvent, WalIdentity, WalIndexer,
    WalRecord, error::DecodeErrorKind, record::WINDOW_BYTES,
};

/// The facts about a record that `pg_waldump` prints and the decoder knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) lsn: Lsn,
    /// The line up to the description.
    pub(crate) facts: String,
    /// The end of a transaction: its kind, the xid of the prepared transaction if there is one, and
    /// its time.
    pub(crate) end: Option<String>,
    /// `, blkref …` once for each block.
    pub(crate) blocks: String,
}

impl Line {
    /// Parses a printed line. Returns `None` for any other text.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (facts, description) = text.split_once(", desc: ")?;
        let (facts, numbers) = facts.split_once(", lsn: ")?;
        let (lsn, previous) = numbers.split_once(", prev ")?;
        let (lsn, previous): (Lsn, Lsn) = (lsn.parse().ok()?, previous.parse().ok()?);
        let words: Vec<_> = facts
            .split([' ', ',', '/'])
            .filter(|w| !w.is_empty())
            .collect();
        let [
            "rmgr:",
            manager,
            "len",
            "(rec",
            "tot):",
            length,
            total,
            "tx:",
            xid,
        ] = words[..]
        else {
            return None;
        };
        let blocks = description.find(", blkref #");
        let (what, blocks) = description.split_at(blocks.unwrap_or(description.len()));
        Some(Self {
            lsn,
            facts: facts_of(manager, length, total, xid, previous),
            end: end_of(manager, what),
            blocks: blocks.trim_end().to_owned(),
        })
    }
}

fn facts_of(manager: &str, length: &str, total: &str, xid: &str, previous: Lsn) -> String {
    format!("{manager} {length}/{total} tx {xid} prev {previous}")
}

/// Returns the kind, the prepared transaction and the time, for example of
/// `COMMIT_PREPARED 740: 2026-11-21 08:00:00.123456 UTC; …`.
fn end_of(manager: &str, description: &str) -> Option<String> {
    if manager != "Transaction" {
        return None;
    }
    let (kind, rest) = description.split_once(' ')?;
    let rest = match kind {
        "COMMIT" | "ABORT" => rest.to_owned(),
        "COMMIT_PREPARED" | "ABORT_PREPARED" => {
            let (xid, time) = rest.split_once(": ")?;
            format!("of {xid} {time}")
        }
        "PREPARE" => {
            let (gid, time) = rest.strip_prefix("gid ")?.split_once(": ")?;
            format!("gid {gid} {time}")
        }
        _ => return None,
    };
    let (time, _) = rest.split_once(" UTC")?;
    Some(format!("{kind} {time}"))
}

/// Returns a line for every record of `pieces`, and their summary.
pub(crate) fn lines<'a>(
    identity: WalIdentity,
    start: Lsn,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<(Vec<Line>, SegmentSummary), wal_format::DecodeError> {
    let mut decoder = WalDecoder::new(identity, start, None);
    let mut indexer = WalIndexer::new(identity, start, None);
    let mut sink = Lines(Vec::new());
    for piece in pieces {
        decoder.push(piece, &mut sink)?;
        indexer.push(piece)?;
    }
    let summary = indexer.take_summary();
    let mut ends: Vec<_> = summary
        .transactions
        .iter()
        .map(|end| (end.lsn, end_text(end)))
        .collect();
    ends.extend(
        summary
            .events
            .iter()
            .filter_map(|(lsn, event)| match event {
                WalEvent::Prepare { time, gid, .. } => {
                    Some((*lsn, format!("PREPARE gid {gid} {}", clock(*time))))
                }
                _ => None,
            }),
    );
    for line in &mut sink.0 {
        // A record has at most one end, and there are few prepared transactions.
        if line.facts.starts_with("Transaction ") {
            let at =
                ends[..summary.transactions.len()].binary_search_by_key(&line.lsn, |end| end.0);
            let prepared = || {
                ends[summary.transactions.len()..]
                    .iter()
                    .find(|e| e.0 == line.lsn)
            };
            line.end = at
                .ok()
                .map(|at| &ends[at])
                .or_else(prepared)
                .map(|end| end.1.clone());
        }
    }
    Ok((sink.0, summary))
}

fn end_text(end: &wal_format::TransactionEnd) -> String {
    use wal_format::TransactionEndKind::{Abort, AbortPrepared, Commit, CommitPrepared};

    let (time, xid) = (clock(end.time), end.xid);
    match end.kind {
        Commit => format!("COMMIT {time}"),
        Abort => format!("ABORT {time}"),
        CommitPrepared => format!("COMMIT_PREPARED of {xid} {time}"),
        AbortPrepared => format!("ABORT_PREPARED of {xid} {time}"),
    }
}

/// Prints the time as `timestamptz_to_str` does.
fn clock(time: wal_format::PgTimestamp) -> String {
    time.to_string().replace('T', " ").replace('Z', "")
}

struct Lines(Vec<Line>);

impl RecordSink for Lines {
    fn window(&mut self, _: &RecordHeader) -> usize {
        WINDOW_BYTES
    }

    fn record(&mut self, record: &WalRecord<'_>) -> Result<(), DecodeErrorKind> {
        let header = &record.header;
        let manager = header.resource_manager;
        let manager = manager
            .name()
            .map_or(format!("custom{:03}", manager.0), str::to_owned);
        let mut images = 0;
        let mut blocks = String::new();
        for block in record.blocks() {
            let (id, number, relation) = (block.id, block.block, block.relation);
            let (tablespace, database, relation) =
                (relation.tablespace, relation.database, relation.relation);
            let _ = write!(
                blocks,
                ", blkref #{id}: rel {tablespace}/{database}/{relation}"
            );
            if block.fork != wal_format::record::Fork::MAIN {
                let _ = write!(blocks, " fork {}", block.fork);
            }
            let _ = write!(blocks, " blk {number}");
            if let Some(image) = block.image {
                images += u32::from(image.bytes);
                blocks += if image.apply {
                    " FPW"
                } else {
                    " FPW for WAL verification"
                };
            }
        }
        let length = (header.total - images).to_string();
        let (total, xid) = (header.total.to_string(), header.xid.to_string());
        self.0.push(Line {
            lsn: record.lsn,
            facts: facts_of(&manager, &length, &total, &xid, header.previous),
            end: None,
            blocks,
        });
        Ok(())
    }
}
