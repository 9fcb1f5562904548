//! Reads missing WAL out of a server's `pg_wal` over SQL with `pg_read_binary_file`. This finds
//! segments that the server still stores although no stream delivers them, because an earlier
//! segment is missing or the slot begins later.
//!
//! Invariant: a file is trusted by checking every page, not by its name, because a recycled file
//! has a future name and old content. A file that passes is archived like a pushed file: every
//! record is decoded, the WAL is compared with the archived WAL and never replaces it.

use std::{fs, path::Path, sync::Arc};

use intake::{Pusher, Running, WalFile};
use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use wal_format::{SegmentName, WalIdentity, layout::history_file_name, page::PageHeader};

use super::LostRange;
use crate::{
    blocking::blocking,
    core::start::ServerBranch,
    error::{Error, Result},
    pipeline::{Pipeline, archive::Archive},
};

/// The number of bytes of a file in one answer. As text it is twice that.
const CHUNK_BYTES: u64 = 1 << 20;
/// `XLOG_BLCKSZ`.
const PAGE_BYTES: usize = 8192;

/// Fetches the missing segments that a server still has as files. Returns the number of segments
/// archived.
pub(super) async fn fetch(
    conninfo: &ConnInfo,
    pipeline: &Pipeline,
    path: &[ServerBranch],
    lost: &[LostRange],
) -> Result<usize> {
    let archive = pipeline.archive();
    let size = archive.identity().segment_size;
    let mut sql = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
    let rows = sql
        .query("SELECT name FROM pg_catalog.pg_ls_waldir()")
        .await?;
    let present: Vec<SegmentName> = rows
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|name| name.parse().ok())
        .collect();
    let mut stored = 0;
    for range in lost {
        let mut running = None;
        let mut segment = size.segment_of(range.from_lsn);
        while segment.start_lsn(size) < range.to_lsn {
            let name = SegmentName::new(range.branch.timeline, segment, size);
            segment = segment.next();
            if !present.contains(&name) {
                running = None;
                continue;
            }
            let Some(wal) = read(&mut sql, name, size.bytes()).await? else {
                continue;
            };
            if let Err(problem) = check(&wal, name, archive.identity()) {
                tracing::info!(cluster = %archive.settings().name, file = %name, problem, "a file of pg_wal is not what its name says");
                running = None;
                continue;
            }
            let history = path
                .iter()
                .find(|on| on.branch == range.branch)
                .and_then(|on| on.history.clone());
            let archive = Arc::clone(archive);
            let decoded = running.take();
            running =
                blocking(move || keep(&archive, name, &wal, history.as_deref(), decoded)).await?;
            stored += 1;
        }
    }
    sql.close().await;
    Ok(stored)
}

/// Reads a whole file. Returns `None` if it has another length or was removed meanwhile.
async fn read(
    sql: &mut ReplicationClient,
    name: SegmentName,
    bytes: u64,
) -> Result<Option<Vec<u8>>> {
    let mut wal = Vec::new();
    let mut offset = 0;
    while offset < bytes {
        let query = format!(
            "SELECT pg_catalog.encode(pg_catalog.pg_read_binary_file('pg_wal/{name}', {offset}, {CHUNK_BYTES}, true), 'hex')"
        );
        let rows = sql.query(&query).await?;
        let Some(hex) = rows.into_iter().flatten().flatten().next() else {
            return Ok(None);
        };
        let Some(chunk) = hex::decode(hex).ok().filter(|chunk| !chunk.is_empty()) else {
            return Ok(None);
        };
        wal.extend(chunk);
        offset = wal.len() as u64;
    }
    Ok((offset == bytes).then_some(wal))
}

/// Checks that every page is the one that belongs at its position.
fn check(wal: &[u8], name: SegmentName, identity: &WalIdentity) -> std::result::Result<(), String> {
    let size = identity.segment_size;
    let segment = name.segment(size).ok_or("its number is out of range")?;
    let mut address = segment.start_lsn(size);
    for page in wal.chunks(PAGE_BYTES) {
        let header = page
            .get(..PageHeader::bytes_at(address, size))
            .and_then(PageHeader::parse)
            .ok_or("it ends within a page")?;
        header
            .check(identity, address)
            .map_err(|error| error.to_string())?;
        if header.timeline > name.timeline.get() {
            return Err(format!(
                "its page at {address} is of timeline {}",
                header.timeline
            ));
        }
        address = address.add(page.len() as u64);
    }
    Ok(())
}

/// Archives a fetched file like a pushed one and compares it with its archived tails.
fn keep(
    archive: &Archive,
    name: SegmentName,
    wal: &[u8],
    history: Option<&[u8]>,
    mut running: Option<Running>,
) -> Result<Option<Running>> {
    let directory = tempfile::Builder::new()
        .prefix("fetched-")
        .tempdir_in(archive.spool_directory())
        .map_err(Error::io(
            "create a directory in",
            archive.spool_directory(),
        ))?;
    let write =
        |path: &Path, content: &[u8]| fs::write(path, content).map_err(Error::io("write", path));
    let path = directory.path().join(name.to_string());
    write(&path, wal)?;
    let mut branch = wal_format::Branch::FIRST;
    if let Some(history) = history {
        write(
            &directory.path().join(history_file_name(name.timeline)),
            history,
        )?;
        branch = wal_format::Branch::of_history(name.timeline, history);
    }
    let size = archive.identity().segment_size;
    if let Some(segment) = name.segment(size) {
        let ours = archive.read_tails(branch, segment)?;
        if let Some(index) = ours.iter().zip(wal).position(|(ours, new)| ours != new) {
            return Err(Error::Wal(intake::Error::Divergence {
                branch,
                lsn: segment.start_lsn(size).add(index as u64),
                from: "a file of another server's pg_wal",
                ours: format!("tails in {}", archive.repository().url()),
            }));
        }
    }
    let pusher = Pusher {
        spool_counts: false,
        settings: archive.settings(),
        repository: archive.repository(),
    };
    pusher.push(&WalFile::open(&path)?, &mut running)?;
    tracing::info!(cluster = %archive.settings().name, file = %name, "missing WAL was read out of pg_wal");
    Ok(running)
}
