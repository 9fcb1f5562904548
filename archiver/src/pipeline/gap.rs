//! What happens when the server no longer has WAL that the archive needs: asked for elsewhere, or declared lost.
//!
//! look again (somebody may have pushed it) -> heal from other servers -> declare lost -> the stream goes on behind it.
//! Invariant: a range is declared lost only when everything before it is in the repository, so that the declaration names
//! exactly what is missing. The light stays red until a base backup that begins behind the range is listed.

use std::sync::Arc;

use wal_format::{Branch, DeclaredGap, Lsn, PgTimestamp, SegmentSize};

use super::{
    Pipeline, blocking,
    session::{Purpose, Source},
    start::{Held, ServerBranch, ServerState, plan_start},
};
use crate::{error::Result, replication::ConnInfo, shutdown::Shutdown};

/// How a gap was closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The WAL is here by now.
    Healed,
    /// Nobody has it: the ranges that were declared lost.
    Lost(Vec<DeclaredGap>),
    /// Not yet: it is tried again.
    Waiting(&'static str),
}

/// Tries to close the gap at which the stream of `source` can not begin; `said` is what the server said.
///
/// # Errors
/// Those of the connection, the repository and the spool.
pub async fn close(
    mut source: Source,
    pipeline: &Pipeline,
    said: &str,
    shutdown: &mut Shutdown,
) -> Result<Closed> {
    let archive = pipeline.archive();
    let size = archive.identity().segment_size;
    let before = pipeline.held().await?;
    {
        let archive = Arc::clone(archive);
        blocking(move || Ok(archive.catalog().refresh(archive.repository())?)).await?;
    }
    let held = pipeline.held().await?;
    if held != before {
        return Ok(Closed::Healed);
    }
    let goes_on = source
        .slot(&archive.settings().slot, archive.settings().name.as_str())
        .await?;
    let server = ServerState {
        path: source.path(pipeline).await?,
        flush_lsn: source.flush_lsn(),
        slot_restart_lsn: goes_on,
    };
    let plan = plan_start(&server, &held, size)?;
    let branch = plan.branch.branch;
    let end_of = |branch: Branch| held.iter().find(|held| held.branch == branch);
    let from = end_of(branch).map_or(plan.start_lsn, |held| held.end_lsn);
    let Some(goes_on) = goes_on else {
        return Ok(Closed::Waiting("the server has no position for the slot"));
    };
    let lost = plan_loss(&server.path, branch, from, goes_on, &held, size);
    if lost.is_empty() {
        return Ok(Closed::Waiting("the server has no WAL behind it either"));
    }
    for conninfo in &archive.settings().heal_from {
        if heal(conninfo, pipeline, goes_on, shutdown).await {
            return Ok(Closed::Healed);
        }
    }
    let positions = archive.status().progress().positions();
    if !positions.is_stored() {
        return Ok(Closed::Waiting(
            "what came before it is not in the repository yet",
        ));
    }
    let declared = PgTimestamp::from_jiff(jiff::Timestamp::now());
    let mut gaps = Vec::new();
    for range in lost {
        let archive = Arc::clone(archive);
        let reason = said.to_owned();
        gaps.push(
            blocking(move || {
                let last_commit = archive.last_commit(range.branch, range.from_lsn)?;
                let gap = DeclaredGap {
                    branch: range.branch,
                    from_lsn: range.from_lsn,
                    to_lsn: range.to_lsn,
                    declared,
                    last_commit,
                    reason,
                };
                let system = archive.identity().system_identifier;
                archive.repository().put_gap(system, &gap)?;
                Ok(gap)
            })
            .await?,
        );
    }
    Ok(Closed::Lost(gaps))
}

/// Streams the missing WAL from another server, as far as it has it; whether anything came.
async fn heal(conninfo: &str, pipeline: &Pipeline, until: Lsn, shutdown: &mut Shutdown) -> bool {
    let settings = pipeline.archive().settings();
    let attempt = async {
        let conninfo = ConnInfo::parse(conninfo)?;
        let (source, _) = Source::connect_to_stream(&conninfo, &settings.name).await?;
        let ours = pipeline.archive().identity().system_identifier;
        if source.identity().system_identifier != ours {
            tracing::warn!(cluster = %settings.name, "a server in heal_from is another cluster");
            return Ok(false);
        }
        tracing::info!(cluster = %settings.name, server = ?conninfo, %until, "asking another server for the missing WAL");
        let before = pipeline.archive().status().progress().positions().flushed();
        source
            .stream(pipeline, Purpose::Heal(until), shutdown)
            .await?;
        let now = pipeline.archive().status().progress().positions().flushed();
        Ok::<bool, crate::error::Error>(now > before)
    };
    match attempt.await {
        Ok(healed) => healed,
        Err(error) => {
            tracing::warn!(cluster = %settings.name, %error, "another server could not give the missing WAL");
            false
        }
    }
}

/// A range that nobody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostRange {
    pub(crate) branch: Branch,
    pub(crate) from_lsn: Lsn,
    pub(crate) to_lsn: Lsn,
}

/// What is missing between the end of the archive on one of the server's branches and the segment where the server's WAL
/// goes on, branch by branch.
pub(crate) fn plan_loss(
    path: &[ServerBranch],
    branch: Branch,
    from: Lsn,
    goes_on: Lsn,
    held: &[Held],
    size: SegmentSize,
) -> Vec<LostRange> {
    let goes_on = goes_on.align_down(size.bytes());
    let mut lost = Vec::new();
    let mut at = from;
    let mut rest = path.iter().skip_while(|on| on.branch != branch).peekable();
    while let Some(on) = rest.next() {
        let to_lsn = on.switch_lsn.min(goes_on);
        if at < to_lsn {
            lost.push(LostRange {
                branch: on.branch,
                from_lsn: at,
                to_lsn,
            });
        }
        if goes_on < on.switch_lsn {
            break;
        }
        // The next branch begins with the segment in which it left this one; perhaps some of it is here.
        at = on.switch_lsn.align_down(size.bytes());
        let next = rest.peek().map(|next| next.branch);
        if let Some(known) = held.iter().find(|held| Some(held.branch) == next) {
            at = at.max(known.end_lsn);
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn branch(text: &str, switch: Option<u64>) -> ServerBranch {
        ServerBranch {
            branch: text.parse().expect("a branch"),
            history: None,
            switch_lsn: switch.map_or(Lsn::MAX, |mib| Lsn(mib * MIB)),
        }
    }

    fn check(path: &[ServerBranch], from: u64, goes_on: u64, expected: &[(&str, u64, u64)]) {
        let first = path[0].branch;
        let lost = plan_loss(
            path,
            first,
            Lsn(from * MIB),
            Lsn(goes_on * MIB),
            &[],
            SegmentSize::DEFAULT,
        );
        let lost: Vec<(String, u64, u64)> = lost
            .iter()
            .map(|range| {
                let mib = |lsn: Lsn| lsn.0 / MIB;
                (
                    range.branch.to_string(),
                    mib(range.from_lsn),
                    mib(range.to_lsn),
                )
            })
            .collect();
        let expected: Vec<(String, u64, u64)> = expected
            .iter()
            .map(|(branch, from, to)| ((*branch).to_owned(), *from, *to))
            .collect();
        assert_eq!(lost, expected);
    }

    #[test]
    fn a_loss_ends_where_the_segment_of_the_slot_begins() {
        let path = [branch("00000001", None)];
        check(&path, 20, 100, &[("00000001", 20, 96)]);
        check(&path, 97, 100, &[]);
    }

    #[test]
    fn a_loss_over_a_promotion_is_named_on_both_branches() {
        let path = [
            branch("00000001", Some(40)),
            branch("00000002-0a0b0c0d", None),
        ];
        check(
            &path,
            20,
            100,
            &[("00000001", 20, 40), ("00000002-0a0b0c0d", 32, 96)],
        );
        check(&path, 20, 33, &[("00000001", 20, 32)]);
    }
}
