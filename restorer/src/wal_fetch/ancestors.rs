//! Copies of a delivered segment under the names of the timelines that end in it.
//!
//! A segment in which a timeline begins starts with the WAL of its parent, and recovery asks for
//! the newest timeline's file only. Until replay has passed the fork, PostgreSQL reads the state of
//! a prepared transaction by the parent's name (`XlogReadTwoPhaseData` in `twophase.c`,
//! `XLogReadDetermineTimeline` in `xlogutils.c`). The redo of the shutdown checkpoint that ends the
//! parent's timeline does so in a server with hot standby, and a restartpoint does so in every
//! server. Without the file the server ends with "requested WAL segment … has already been
//! removed". A server that was promoted itself has both files.
//!
//! Invariant: recovery never prefers such a copy, because it tries the newest timeline's name
//! first (`XLogFileReadAnyTLI` in `xlogrecovery.c`). A copy is marked as archived, so that no
//! server archives it. PostgreSQL removes it together with the segments of its age
//! (`RemoveOldXlogFiles`, which ignores timelines).

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use repository::durable;
use wal_format::{
    Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId, layout::history_file_name,
};

use crate::{Error, Result, execute::Access};

/// Returns the timelines of `history` that end within a segment, each with its end.
fn ending_in(
    history: &TimelineHistory,
    name: SegmentName,
    size: SegmentSize,
) -> Vec<(TimelineId, Lsn)> {
    let Some(number) = name.segment(size) else {
        return Vec::new();
    };
    let inside = number.start_lsn(size).add(1)..number.end_lsn(size);
    let spans = history.spans().into_iter();
    let ending = spans.filter(|span| inside.contains(&span.to));
    ending.map(|span| (span.timeline, span.to)).collect()
}

/// Places the WAL of the complete segment file `segment`, which is about to be delivered as `name`
/// to the server with this `pg_wal`, under the name of each timeline that ends in it. The server
/// has restored the history file of `name`'s timeline before it asks for a segment of it.
pub(super) fn place(pg_wal: &Path, name: SegmentName, segment: &Path) -> Result<()> {
    let path = pg_wal.join(history_file_name(name.timeline));
    let Ok(content) = fs::read(&path) else {
        return Ok(());
    };
    let Ok(history) = TimelineHistory::parse(name.timeline, &content) else {
        return Ok(());
    };
    let length = fs::metadata(segment).map_err(Error::io("read", segment))?;
    let Ok(size) = SegmentSize::new(length.len()) else {
        return Ok(());
    };
    for (timeline, end) in ending_in(&history, name, size) {
        let Some(number) = name.segment(size) else {
            continue;
        };
        let copy = pg_wal.join(SegmentName::new(timeline, number, size).to_string());
        let length = end.bytes_since(number.start_lsn(size));
        copy_start(segment, &copy, length, size)?;
    }
    Ok(())
}

/// Writes the first `length` bytes of `segment` and zeros to `copy`, unless it begins with these
/// bytes already.
fn copy_start(segment: &Path, copy: &Path, length: u64, size: SegmentSize) -> Result<()> {
    let start = |path: &Path| -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(length).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let mut wal = start(segment).map_err(Error::io("read", segment))?;
    if start(copy).is_ok_and(|held| held == wal) {
        return Ok(());
    }
    wal.resize(size.len(), 0);
    let (Some(pg_wal), Some(name)) = (copy.parent(), copy.file_name()) else {
        return Ok(());
    };
    let failed = || Error::io("write", copy);
    let mut status = name.to_owned();
    status.push(".done");
    let status = pg_wal.join("archive_status").join(status);
    fs::write(&status, b"").map_err(Error::io("write", &status))?;
    let mode = Access::of_directory(pg_wal).file_mode();
    let mut file = tempfile::Builder::new()
        .prefix(".tidemark-")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(pg_wal)
        .map_err(failed())?;
    file.write_all(&wal).map_err(failed())?;
    // After a crash of the host a file that exists is complete, or it would be kept as it is.
    file.as_file().sync_all().map_err(failed())?;
    file.persist(copy).map_err(|error| failed()(error.error))?;
    durable::sync_dir(pg_wal).map_err(Error::local)
}
