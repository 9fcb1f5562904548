//! Handles WAL that the archive needs and the server no longer has: it is fetched from elsewhere,
//! or declared lost.
//!
//! detected -> check again (it may have been pushed) -> heal from other servers by streaming ->
//! heal from files in `pg_wal` -> wait until `gap_grace` is over -> declare lost -> the stream
//! continues after the range.
//! Invariant: a range is declared lost only when everything before it is in the repository, so that
//! the declaration names exactly what is missing. The state stays red until a base backup that
//! begins after the range is listed.

mod files;

use std::sync::Arc;

use replication::ConnInfo;
use status::gap::{GapState, OpenGap};
use wal_format::{Branch, DeclaredGap, Lsn, PgTimestamp, SegmentSize};

use super::{Pipeline, follow::Purpose, receive::StreamEnd};
use crate::{
    blocking::blocking,
    core::{
        shutdown::Shutdown,
        start::{Held, ServerBranch, ServerState, plan_start},
    },
    error::Result,
    primary::Source,
};

/// The result of an attempt to close a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// All or some of the WAL has arrived.
    Healed,
    /// No source has the WAL. Contains the ranges that were declared lost.
    Lost(Vec<DeclaredGap>),
    /// The gap is still open, and the attempt is repeated.
    Waiting(&'static str),
    /// As [`Closed::Waiting`], but probably only the operator can close the gap.
    NeedsOperator(&'static str),
}

/// Tries to close the gap at which the stream of `source` cannot begin. `said` is the server's
/// message.
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
    let settings = archive.settings();
    let size = archive.identity().segment_size;
    let before = pipeline.held().await?;
    refresh(pipeline).await?;
    let held = pipeline.held().await?;
    if held != before {
        return Ok(Closed::Healed);
    }
    let goes_on = source.slot(&settings.slot, settings.name.as_str()).await?;
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
        return Ok(Closed::NeedsOperator(
            "the server does not have the WAL that our slot retains; if pg_resetwal was run on it, stop the archiver and run \
             `wal-archiver epoch begin --after-resetwal`",
        ));
    }
    let declared_after = found(pipeline, branch, from, goes_on);
    let places = settings.heal_from.iter().chain(&settings.standbys);
    let mut others = Vec::new();
    for place in places {
        others.push(ConnInfo::parse(place)?);
    }
    for other in &others {
        if heal(other, pipeline, goes_on, shutdown).await {
            return Ok(Closed::Healed);
        }
    }
    let mut missing = still_missing(pipeline, lost).await?;
    // The server itself may have the WAL after a missing segment.
    for place in std::iter::once(source.conninfo()).chain(&others) {
        asking(pipeline, &format!("pg_wal of {}", place.places()));
        match files::fetch(place, pipeline, &server.path, &missing).await {
            Ok(0) => continue,
            Ok(_) => {}
            Err(error) if error.is_broken() => return Err(error),
            Err(error) => {
                tracing::info!(cluster = %settings.name, server = place.places(), %error, "files of pg_wal cannot be read over SQL; that needs the roles pg_monitor and pg_read_server_files");
                continue;
            }
        }
        refresh(pipeline).await?;
        if pipeline.held().await? != held {
            return Ok(Closed::Healed);
        }
        missing = still_missing(pipeline, missing).await?;
    }
    state(pipeline, GapState::Waiting, None);
    if PgTimestamp::from_jiff(jiff::Timestamp::now()) < declared_after {
        return Ok(Closed::Waiting(
            "nobody who was asked has the missing WAL; all are asked again until gap_grace is over",
        ));
    }
    let positions = archive.progress().positions();
    if !positions.is_stored() {
        return Ok(Closed::Waiting(
            "what came before it is not in the repository yet",
        ));
    }
    let declared = PgTimestamp::from_jiff(jiff::Timestamp::now());
    let mut gaps = Vec::new();
    for range in missing {
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
                archive.check_before_put()?;
                archive.repository().put_gap(system, &gap)?;
                Ok(gap)
            })
            .await?,
        );
    }
    Ok(Closed::Lost(gaps))
}

/// Updates the catalog to match the repository.
async fn refresh(pipeline: &Pipeline) -> Result<()> {
    let archive = Arc::clone(pipeline.archive());
    blocking(move || {
        archive.refresh()?;
        Ok(())
    })
    .await
}

/// Records the gap once. Returns the earliest time at which it is declared lost. A restart of the
/// archiver restarts that period.
fn found(pipeline: &Pipeline, branch: Branch, from_lsn: Lsn, to_lsn: Lsn) -> PgTimestamp {
    let settings = pipeline.archive().settings();
    let now = jiff::Timestamp::now();
    let mut declared_after = PgTimestamp::from_jiff(now + settings.gap_grace);
    let mut is_new = false;
    pipeline.archive().status().note(|facts| {
        let known = facts.gap.take();
        let known = known.filter(|gap| gap.branch == branch && gap.from_lsn == from_lsn);
        is_new = known.is_none();
        let gap = known.unwrap_or(OpenGap {
            state: GapState::Detected,
            branch,
            from_lsn,
            to_lsn,
            detected: PgTimestamp::from_jiff(now),
            declared_after,
            source: None,
        });
        declared_after = gap.declared_after;
        facts.gap = Some(OpenGap { to_lsn, ..gap });
    });
    if is_new {
        tracing::error!(cluster = %settings.name, %branch, from = %from_lsn, to = %to_lsn, grace = ?settings.gap_grace, "a gap is detected");
    }
    declared_after
}

fn state(pipeline: &Pipeline, state: GapState, source: Option<String>) {
    pipeline.archive().status().note(|facts| {
        if let Some(gap) = &mut facts.gap {
            gap.state = state;
            gap.source = source;
        }
    });
}

fn asking(pipeline: &Pipeline, source: &str) {
    state(pipeline, GapState::Healing, Some(source.to_owned()));
}

/// Returns the parts of the ranges that the archive still lacks.
async fn still_missing(pipeline: &Pipeline, ranges: Vec<LostRange>) -> Result<Vec<LostRange>> {
    let archive = Arc::clone(pipeline.archive());
    blocking(move || {
        let mut missing = Vec::new();
        for range in ranges {
            let held = archive
                .catalog()
                .ranges(range.branch, range.from_lsn, range.to_lsn)?;
            let held = held.iter().map(|held| (held.start_lsn, held.end_lsn));
            missing.extend(range.without(held));
        }
        Ok(missing)
    })
    .await
}

/// Streams the missing WAL from another server, as far as that server has it. Returns whether any
/// WAL arrived.
async fn heal(
    conninfo: &ConnInfo,
    pipeline: &Pipeline,
    until: Lsn,
    shutdown: &mut Shutdown,
) -> bool {
    let settings = pipeline.archive().settings();
    asking(pipeline, &conninfo.places());
    let attempt = async {
        let (source, _) = Source::connect_to_stream(conninfo, &settings.name).await?;
        let ours = pipeline.archive().identity().system_identifier;
        if source.identity().system_identifier != ours {
            tracing::warn!(cluster = %settings.name, server = conninfo.places(), "a server that could heal is another cluster");
            return Ok(false);
        }
        tracing::info!(cluster = %settings.name, server = ?conninfo, %until, "asking another server for the missing WAL");
        let before = pipeline.archive().progress().positions().flushed();
        let end = source
            .stream(pipeline, Purpose::Heal(until), |_| {}, shutdown)
            .await?;
        if end == StreamEnd::NoOverlap {
            let (source, _) = Source::connect_to_stream(conninfo, &settings.name).await?;
            source
                .stream(pipeline, Purpose::Heal(until), |_| {}, shutdown)
                .await?;
        }
        let now = pipeline.archive().progress().positions().flushed();
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

/// A range that no source has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostRange {
    pub(crate) branch: Branch,
    pub(crate) from_lsn: Lsn,
    pub(crate) to_lsn: Lsn,
}

impl LostRange {
    /// Returns what remains of the range without `held`, whose ranges are in the order of their
    /// starts.
    fn without(self, held: impl Iterator<Item = (Lsn, Lsn)>) -> Vec<Self> {
        let mut left = Vec::new();
        let mut at = self.from_lsn;
        for (start, end) in held {
            if start > at {
                left.push(Self {
                    from_lsn: at,
                    to_lsn: start.min(self.to_lsn),
                    ..self
                });
            }
            at = at.max(end);
        }
        if at < self.to_lsn {
            left.push(Self {
                from_lsn: at,
                ..self
            });
        }
        left
    }
}

/// Returns what is missing between the end of the archive on one of the server's branches and the
/// segment where the server's WAL continues, branch by branch.
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
        // The next branch begins with the segment in which the server left this one. Some of that
        // segment may be held.
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
    fn what_was_healed_in_the_middle_is_not_lost() {
        let range = LostRange {
            branch: Branch::FIRST,
            from_lsn: Lsn(10),
            to_lsn: Lsn(50),
        };
        let check = |held: &[(u64, u64)], expected: &[(u64, u64)]| {
            let held = held.iter().map(|(from, to)| (Lsn(*from), Lsn(*to)));
            let left: Vec<(u64, u64)> = range
                .without(held)
                .iter()
                .map(|left| (left.from_lsn.0, left.to_lsn.0))
                .collect();
            assert_eq!(left, expected);
        };
        check(&[], &[(10, 50)]);
        check(&[(20, 30)], &[(10, 20), (30, 50)]);
        check(&[(0, 20), (15, 30), (40, 60)], &[(30, 40)]);
        check(&[(0, 60)], &[]);
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
