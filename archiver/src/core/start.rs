//! Decides where a stream begins, from the content of the archive and the history that the server
//! reports. Pure.
//!
//! Invariant: if there is an archive, the stream begins at the archive's end, not at the WAL that
//! the server happens to have. Otherwise there could be an undetected gap between the two.

use bytes::Bytes;
use wal_format::{Branch, Lsn, SegmentSize};

use crate::error::{Error, Result};

/// One timeline on the server's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerBranch {
    /// The timeline and the digest of its history.
    pub branch: Branch,
    /// The timeline's history file. `None` for timeline 1.
    pub history: Option<Bytes>,
    /// The LSN at which the server left the timeline. [`Lsn::MAX`] for the current one.
    pub switch_lsn: Lsn,
}

/// The archived part of one branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The timeline and the digest of its history.
    pub branch: Branch,
    /// The end of the branch's durable WAL, in the spool or the repository.
    pub end_lsn: Lsn,
}

/// The decision about the next stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartPlan {
    /// The branch to stream.
    pub branch: ServerBranch,
    /// The LSN to request if nothing of that branch is archived: the start of a segment.
    pub start_lsn: Lsn,
}

/// The positions that the server reports.
#[derive(Clone, Debug)]
pub struct ServerState {
    /// The server's path of timelines, oldest first. Never empty.
    pub path: Vec<ServerBranch>,
    /// The end of the server's WAL.
    pub flush_lsn: Lsn,
    /// The LSN from which the server's slot retains WAL. `None` without a slot.
    pub slot_restart_lsn: Option<Lsn>,
}

/// Plans the start of a stream.
///
/// # Errors
/// [`Error::LostHistory`], [`Error::ServerBehind`].
pub fn plan_start(server: &ServerState, held: &[Held], size: SegmentSize) -> Result<StartPlan> {
    let segment_start = |lsn: Lsn| lsn.align_down(size.bytes());
    let newest = held
        .iter()
        .max_by_key(|held| (held.branch.timeline, held.end_lsn));
    let Some(newest) = newest else {
        let from = server.slot_restart_lsn.unwrap_or(server.flush_lsn);
        return Ok(StartPlan {
            branch: branch_at(server, from).clone(),
            start_lsn: segment_start(from),
        });
    };
    let current = current(server);
    let lost = || Error::LostHistory {
        server: current.branch.timeline,
        ours: newest.branch,
        durable_lsn: newest.end_lsn,
    };
    if current.branch.timeline < newest.branch.timeline {
        return Err(lost());
    }
    let held_of = |on: &ServerBranch| held.iter().find(|held| held.branch == on.branch);
    // The first branch with missing WAL. It is not always the newest: a host may have been lost
    // before the end of an older branch was uploaded.
    let mut ours = None;
    for (index, on) in server.path.iter().enumerate() {
        let Some(held) = held_of(on) else {
            let before = index
                .checked_sub(1)
                .and_then(|before| server.path.get(before));
            let begin = before.map_or(Lsn::ZERO, |before| segment_start(before.switch_lsn));
            // If the server left a branch in its first segment, the next branch's first segment
            // contains all of its WAL.
            if ours.is_some() && segment_start(on.switch_lsn) > begin {
                break;
            }
            continue;
        };
        ours = Some((index, on, held));
        if held.end_lsn < on.switch_lsn {
            break;
        }
    }
    let (index, on, ours) = ours.ok_or_else(lost)?;
    if on.branch == current.branch && server.flush_lsn < ours.end_lsn {
        return Err(Error::ServerBehind {
            timeline: on.branch.timeline,
            server_lsn: server.flush_lsn,
            durable_lsn: ours.end_lsn,
        });
    }
    if ours.end_lsn < on.switch_lsn {
        return Ok(StartPlan {
            branch: on.clone(),
            start_lsn: segment_start(ours.end_lsn),
        });
    }
    // All WAL of that timeline on the server's path is archived. The next one begins with the
    // segment of the switch.
    let next = server.path.get(index + 1).ok_or_else(lost)?;
    Ok(StartPlan {
        branch: next.clone(),
        start_lsn: segment_start(on.switch_lsn),
    })
}

fn current(server: &ServerState) -> &ServerBranch {
    server
        .path
        .last()
        .expect("BUG: a server is on some timeline")
}

fn branch_at(server: &ServerState, lsn: Lsn) -> &ServerBranch {
    server
        .path
        .iter()
        .find(|branch| lsn < branch.switch_lsn)
        .unwrap_or_else(|| current(server))
}

#[cfg(test)]
mod tests {
    use crate::core::start::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;
    const MIB: u64 = 1 << 20;

    fn branch(text: &str, switch_mib: Option<u64>) -> ServerBranch {
        ServerBranch {
            branch: text.parse().expect("a branch"),
            history: None,
            switch_lsn: switch_mib.map_or(Lsn::MAX, |mib| Lsn(mib * MIB)),
        }
    }

    fn held(text: &str, end_mib: u64) -> Held {
        Held {
            branch: text.parse().expect("a branch"),
            end_lsn: Lsn(end_mib * MIB),
        }
    }

    fn server(path: &[ServerBranch], flush_mib: u64) -> ServerState {
        ServerState {
            path: path.to_vec(),
            flush_lsn: Lsn(flush_mib * MIB),
            slot_restart_lsn: Some(Lsn(17 * MIB)),
        }
    }

    fn check(server: &ServerState, held: &[Held], branch: &str, start_mib: u64) -> StartPlan {
        let plan = plan_start(server, held, SIZE).expect("a plan");
        assert_eq!(plan.branch.branch.to_string(), branch);
        assert_eq!(plan.start_lsn, Lsn(start_mib * MIB));
        plan
    }

    #[test]
    fn an_empty_archive_begins_where_the_slot_keeps_wal() {
        check(
            &server(&[branch("00000001", None)], 100),
            &[],
            "00000001",
            16,
        );
        let promoted = [
            branch("00000001", Some(40)),
            branch("00000002-0a0b0c0d", None),
        ];
        check(&server(&promoted, 100), &[], "00000001", 16);
    }

    #[test]
    fn an_archive_is_continued_at_its_own_end_whatever_the_slot_says() {
        let server = server(&[branch("00000001", None)], 100);
        check(&server, &[held("00000001", 5)], "00000001", 0);
        check(&server, &[held("00000001", 50)], "00000001", 48);
    }

    #[test]
    fn behind_the_fork_the_old_timeline_is_followed_to_its_end_first() {
        let path = [
            branch("00000001", Some(40)),
            branch("00000003-0a0b0c0d", None),
        ];
        check(&server(&path, 100), &[held("00000001", 39)], "00000001", 32);
        check(
            &server(&path, 100),
            &[held("00000001", 40)],
            "00000003-0a0b0c0d",
            32,
        );
    }

    #[test]
    fn ahead_of_the_fork_the_new_timeline_is_followed() {
        let path = [
            branch("00000001", Some(40)),
            branch("00000002-0a0b0c0d", None),
        ];
        check(
            &server(&path, 41),
            &[held("00000001", 44)],
            "00000002-0a0b0c0d",
            32,
        );
    }

    #[test]
    fn a_hole_at_the_end_of_an_older_branch_is_streamed_before_the_newest_goes_on() {
        let path = [
            branch("00000001", Some(40)),
            branch("00000002-0a0b0c0d", None),
        ];
        let ours = [held("00000001", 39), held("00000002-0a0b0c0d", 60)];
        check(&server(&path, 100), &ours, "00000001", 32);
        // If the server left a branch in its first segment, the next branch's first segment
        // contains all of its WAL.
        let path = [
            branch("00000001", Some(40)),
            branch("00000002-0a0b0c0d", Some(41)),
            branch("00000003-0a0b0c0d", None),
        ];
        let ours = [held("00000001", 40), held("00000003-0a0b0c0d", 60)];
        check(&server(&path, 100), &ours, "00000003-0a0b0c0d", 48);
    }

    #[test]
    fn a_server_that_lost_wal_or_history_is_refused() {
        let first = server(&[branch("00000001", None)], 100);
        let behind = plan_start(&first, &[held("00000001", 101)], SIZE);
        assert!(
            matches!(behind, Err(Error::ServerBehind { .. })),
            "{behind:?}"
        );
        let ours = [held("00000001", 50), held("00000002-0a0b0c0d", 60)];
        let left_behind = plan_start(&first, &ours, SIZE);
        assert!(
            matches!(left_behind, Err(Error::LostHistory { .. })),
            "{left_behind:?}"
        );
        let stranger = server(&[branch("00000003-01010101", None)], 100);
        let lost = plan_start(&stranger, &ours, SIZE);
        assert!(matches!(lost, Err(Error::LostHistory { .. })), "{lost:?}");
    }

    #[test]
    fn a_second_timeline_of_the_same_number_gets_its_own_branch() {
        let path = [
            branch("00000001", Some(40)),
            branch("00000002-ffffffff", None),
        ];
        let ours = [held("00000001", 40), held("00000002-0a0b0c0d", 60)];
        check(&server(&path, 100), &ours, "00000002-ffffffff", 32);
    }
}
