//! `wal-archiver epoch begin --after-resetwal`: the operator confirms that `pg_resetwal` was run on
//! the server, so that its WAL does not continue the archived WAL.
//!
//! The WAL from the end of the archive to the segment of the server's last checkpoint is declared
//! lost. The next `run` continues after it and takes a base backup.
//! Invariant: nothing is declared while the server's WAL still continues the archive.

use std::sync::Arc;

use repository::{ClusterIdentity, Repository, config::ClusterSettings};
use status::loss::RESETWAL;
use wal_format::{Branch, DeclaredGap, Lsn, OutcomeKind, PgTimestamp, SegmentName, SegmentSize};

use super::{
    epoch::{server, start_pipeline},
    output, runtime,
};
use crate::{
    core::shutdown::Shutdown,
    error::{Error, Result},
    pipeline::{
        Pipeline,
        follow::Purpose,
        gap::{self, Closed},
        receive::StreamEnd,
    },
    primary::{Source, conninfo},
    spool::Spool,
    upkeep::outcomes,
};

pub(super) fn declare(settings: &ClusterSettings) -> Result<()> {
    let repository = Repository::open_known(settings)?;
    let Some(identity) = repository.identity()? else {
        return Err(usage(format!(
            "{} holds nothing of cluster {} yet: `wal-archiver run` begins its archive",
            settings.repository, settings.name
        )));
    };
    let began = jiff::Timestamp::now();
    // The lock is held to the end, so that no daemon starts meanwhile.
    let spool = Arc::new(Spool::open(&settings.spool, &settings.name)?);
    let gap = runtime()?.block_on(Box::pin(declare_gap(
        settings,
        &repository,
        &identity,
        &spool,
    )))?;
    let said = format!(
        "WAL {} to {} of timeline branch {} is declared lost, because pg_resetwal was run on the server",
        gap.from_lsn, gap.to_lsn, gap.branch
    );
    outcomes::record(settings, OutcomeKind::Epoch, began, Ok(&said));
    Ok(())
}

async fn declare_gap(
    settings: &ClusterSettings,
    repository: &Repository,
    identity: &ClusterIdentity,
    spool: &Arc<Spool>,
) -> Result<DeclaredGap> {
    server(settings, identity.system_identifier).await?;
    let problem = {
        let pipeline = start_pipeline(settings, identity, spool).await?;
        let streamed = Box::pin(stream(settings, &pipeline)).await;
        let streamed = streamed.map_err(|error| pipeline.first_cause(error));
        pipeline.stop().await?;
        match streamed {
            Ok(()) => {
                return Err(usage(format!(
                    "the server's WAL continues the archive of cluster {}: nothing was declared lost, start `wal-archiver run`",
                    settings.name
                )));
            }
            Err(error) if is_discontinuity(&error) => error,
            Err(error) => return Err(error),
        }
    };
    // The attempt may have ended the stages with its error, so new ones empty the spool.
    let pipeline = start_pipeline(settings, identity, spool).await?;
    let declared = Box::pin(declare_with(settings, repository, &pipeline)).await;
    let stopped = pipeline.stop().await;
    let gap = declared?;
    stopped?;
    output::line(&format!(
        "cluster {}: WAL {} to {} of timeline branch {} is declared lost, because pg_resetwal was run on the server",
        settings.name, gap.from_lsn, gap.to_lsn, gap.branch
    ));
    output::line(&format!("  the server    {problem}"));
    output::line(
        "  next          start `wal-archiver run`: it continues after this WAL and takes a base backup",
    );
    output::line("  the past      stays restorable as before");
    Ok(gap)
}

fn usage(message: String) -> Error {
    Error::Usage { message }
}

/// Streams what follows the archive up to the server's present, comparing the overlap as always.
/// WAL that only the server lacks is searched for as in a running archiver.
async fn stream(settings: &ClusterSettings, pipeline: &Pipeline) -> Result<()> {
    let conninfo = conninfo::of_cluster(settings)?;
    let (_request, mut shutdown) = Shutdown::new();
    // The second attempt begins without an overlap that the server has removed, the third after a
    // gap that another server filled.
    for _ in 0..3 {
        let (source, _) = Source::connect_to_stream(&conninfo, &settings.name).await?;
        let until = source.flush_lsn();
        let streamed = source.stream(pipeline, Purpose::Heal(until), |_| {}, &mut shutdown);
        match streamed.await {
            Ok(StreamEnd::NoOverlap) => {}
            Err(gap @ Error::Gap { .. }) => {
                let (source, _) = Source::connect(&conninfo, &settings.name).await?;
                let said = gap.to_string();
                match Box::pin(gap::close(source, pipeline, &said, &mut shutdown)).await? {
                    Closed::Healed => {}
                    Closed::NeedsOperator(_) => return Err(gap),
                    Closed::Lost(_) | Closed::Waiting(_) => {
                        return Err(usage(format!(
                            "{gap}. That is a gap as any other, and no sign of pg_resetwal: start `wal-archiver run`, which \
                             searches for this WAL on the servers of heal_from and standbys, and declares it lost after gap_grace"
                        )));
                    }
                }
            }
            ended => return ended.map(drop),
        }
    }
    Ok(())
}

/// Returns true for an error of a stream whose WAL does not continue the archive.
fn is_discontinuity(error: &Error) -> bool {
    match error {
        Error::Gap { .. } | Error::ServerBehind { .. } => true,
        Error::Wal(error) => matches!(
            error,
            intake::Error::Decode { .. } | intake::Error::Divergence { .. }
        ),
        _ => false,
    }
}

/// Stores the WAL of the spool in the repository, then declares the gap after it.
async fn declare_with(
    settings: &ClusterSettings,
    repository: &Repository,
    pipeline: &Pipeline,
) -> Result<DeclaredGap> {
    pipeline.drain().await?;
    let archive = pipeline.archive();
    let conninfo = conninfo::of_cluster(settings)?;
    let (mut source, _) = Source::connect(&conninfo, &settings.name).await?;
    let flush_lsn = source.flush_lsn();
    let branch = source.current_branch(repository).await?;
    let held = pipeline.held().await?;
    let Some(held) = held.iter().find(|held| held.branch == branch) else {
        return Err(usage(format!(
            "the archive has no WAL of timeline branch {branch}, which the server is on: nothing was declared lost. \
             Start the server on the timeline that is archived"
        )));
    };
    let mut client = source.into_client();
    let Some(redo_lsn) = client.redo_lsn().await? else {
        return Err(usage(
            "the server does not show where its WAL begins: let the role connect to a database too (pg_hba.conf)"
                .to_owned(),
        ));
    };
    client.close().await;
    let size = archive.identity().segment_size;
    let to_lsn = lost_until(branch, held.end_lsn, redo_lsn, flush_lsn, size)?;
    let gap = DeclaredGap {
        branch,
        from_lsn: held.end_lsn,
        to_lsn,
        declared: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        last_commit: archive.last_commit(branch, held.end_lsn)?,
        reason: RESETWAL.to_owned(),
    };
    repository.put_gap(archive.identity().system_identifier, &gap)?;
    Ok(gap)
}

/// Returns the LSN at which the archive continues: the start of the segment that contains the
/// server's last checkpoint. The server's WAL before it has the LSNs of archived WAL or continues
/// nothing.
fn lost_until(
    branch: Branch,
    end_lsn: Lsn,
    redo_lsn: Lsn,
    flush_lsn: Lsn,
    size: SegmentSize,
) -> Result<Lsn> {
    let to_lsn = redo_lsn.align_down(size.bytes());
    if to_lsn > end_lsn {
        return Ok(to_lsn);
    }
    let problem = format!(
        "the server's WAL begins again at {redo_lsn}, but the archive reaches to {end_lsn} and the same LSNs cannot be \
         archived twice"
    );
    let open = size.segment_of(end_lsn);
    if size.segment_of(flush_lsn) >= open {
        return Err(usage(format!(
            "{problem}: run `SELECT pg_switch_wal()` and `CHECKPOINT` on the server, then this command again"
        )));
    }
    let name = SegmentName::new(branch.timeline, open.next(), size);
    Err(usage(format!(
        "{problem}: stop the server cleanly, run `pg_resetwal -l {name} DATADIR`, start it, then run this command again"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_continues_only_after_its_own_end() {
        const MIB: u64 = 1 << 20;
        let check = |end: u64, redo: u64, flush: u64| {
            let size = SegmentSize::new(MIB).expect("1 MiB");
            lost_until(Branch::FIRST, Lsn(end), Lsn(redo), Lsn(flush), size)
                .map_err(|error| error.to_string())
        };
        assert_eq!(
            check(8 * MIB + 77, 10 * MIB + 40, 10 * MIB + 200),
            Ok(Lsn(10 * MIB))
        );
        assert_eq!(
            check(9 * MIB, 10 * MIB + 40, 10 * MIB + 200),
            Ok(Lsn(10 * MIB))
        );
        // The same segment, or the segment that begins exactly at the end of the archive.
        for end in [9 * MIB + 77, 9 * MIB] {
            let refused = check(end, 9 * MIB + 40, 9 * MIB + 200).expect_err("the same LSNs");
            assert!(refused.contains("pg_switch_wal"), "{refused}");
        }
        let refused = check(8 * MIB + 77, 6 * MIB + 40, 7 * MIB).expect_err("behind");
        assert!(
            refused.contains("pg_resetwal -l 000000010000000000000009 DATADIR"),
            "{refused}"
        );
        let refused = check(9 * MIB, 6 * MIB + 40, 7 * MIB).expect_err("behind");
        assert!(
            refused.contains("pg_resetwal -l 00000001000000000000000A DATADIR"),
            "{refused}"
        );
    }
}
