//! Derives the state of a cluster from its facts and its alerts. Pure.

use serde::Serialize;

use crate::{
    alert::{Alert, Severity},
    state::State,
};

/// The facts that decide the state.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// An error that only an operator can repair, for example a gap.
    pub broken: Option<&'a str>,
    /// The last error of the stream or the repository that is being retried.
    pub failing: Option<&'a str>,
    /// True if the primary was seen recently.
    pub source_known: bool,
    /// False if the primary is not queried, because the repository does not answer.
    pub source_asked: bool,
    /// True if a stream is up.
    pub stream_connected: bool,
    /// The lag of the repository in seconds. It is an upper bound while the primary is not seen.
    pub remote_rpo_seconds: Option<f64>,
    /// The part of that lag that is proved ([`Exposure::proved`](crate::rpo::Exposure::proved)).
    pub proved_rpo_seconds: Option<f64>,
    /// The target, in seconds.
    pub rpo_target_seconds: f64,
    /// A setting of the server that makes commits wait for us.
    pub danger: Option<&'a str>,
    /// A standby on which our slot is not maintained.
    pub standby: Option<&'a str>,
    /// True if a base backup is listed. `None` before the catalog was read.
    pub has_backup: Option<bool>,
    /// The reason why no base backup leads to the server's present.
    pub unreached: Option<&'a str>,
    /// The reason why it is not known what the newest verification or drill found.
    pub unread: Option<&'a str>,
    /// The column `wal_status` of the slot.
    pub slot_wal_status: Option<&'a str>,
    /// A defect of the archive found by a drill or a verification.
    pub not_restorable: Option<&'a str>,
}

/// The dependencies of a cause, for callers with limits of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CauseKind {
    /// The RPO is greater than its target.
    Rpo,
    /// The primary is not seen, so the RPO is only an upper bound.
    Unseen,
    /// There is no base backup.
    NoBackup,
    /// Anything else.
    Other,
}

/// A fact because of which the state is not `ok`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// The state that this fact alone requires.
    pub state: State,
    /// The fact as a sentence.
    pub reason: String,
    /// The dependency of the cause.
    #[serde(skip)]
    pub kind: CauseKind,
}

impl Cause {
    fn new(state: State, reason: impl Into<String>) -> Self {
        Self {
            state,
            reason: reason.into(),
            kind: CauseKind::Other,
        }
    }
}

/// The reason for the state `ok`.
pub const WELL: &str = "streaming; the repository is within its target";

/// Returns every cause for a state that is not `ok`, the worst first: broken, at risk, unknown,
/// degraded. Without a cause the state is `ok`.
#[must_use]
pub fn causes(facts: Facts<'_>) -> Vec<Cause> {
    let because = facts
        .failing
        .map(|error| format!(": {error}"))
        .unwrap_or_default();
    let mut causes = Vec::new();
    let is_lost = facts.slot_wal_status == Some("lost");
    let lost = is_lost.then_some("the replication slot is lost: PostgreSQL removed WAL");
    let broken = [facts.broken, lost, facts.not_restorable, facts.unreached];
    causes.extend(
        broken
            .into_iter()
            .flatten()
            .map(|reason| Cause::new(State::Broken, reason)),
    );
    if facts.has_backup == Some(false) {
        let reason = "there is no base backup, so losing the primary now loses everything: run \
                      `wal-archiver backup`";
        causes.push(Cause {
            kind: CauseKind::NoBackup,
            ..Cause::new(State::AtRisk, reason)
        });
    }
    let target = facts.rpo_target_seconds;
    if facts.proved_rpo_seconds.is_some_and(|rpo| rpo > target) {
        let bound = if facts.source_known { "" } else { "up to " };
        let rpo = facts.remote_rpo_seconds.unwrap_or_default();
        let reason = format!(
            "losing the primary now loses {bound}{rpo:.1} s, the target is {target:.1} s{because}"
        );
        causes.push(Cause {
            kind: CauseKind::Rpo,
            ..Cause::new(State::AtRisk, reason)
        });
    }
    let is_unseen = !facts.source_known || facts.remote_rpo_seconds.is_none();
    if is_unseen {
        let what = match facts.source_asked {
            true => "the primary cannot be seen",
            false => "the repository does not answer, so the primary is not asked",
        };
        causes.push(Cause {
            kind: CauseKind::Unseen,
            ..Cause::new(State::Unknown, format!("{what}{because}"))
        });
    }
    if facts.has_backup.is_none() {
        causes.push(Cause::new(
            State::Unknown,
            format!("what can be restored is not known yet{because}"),
        ));
    }
    causes.extend(
        facts
            .unread
            .map(|reason| Cause::new(State::Unknown, reason)),
    );
    // The cause of an unseen primary contains the errors of the stream.
    if !facts.stream_connected && !is_unseen {
        let reason = format!("the stream is down{because}");
        causes.push(Cause::new(State::Degraded, reason));
    } else if let Some(error) = facts.failing.filter(|_| !is_unseen) {
        causes.push(Cause::new(State::Degraded, error));
    }
    let near = facts.slot_wal_status == Some("unreserved");
    let near = near.then_some("the replication slot is about to be lost");
    let missing = [near, facts.danger, facts.standby];
    causes.extend(
        missing
            .into_iter()
            .flatten()
            .map(|reason| Cause::new(State::Degraded, reason)),
    );
    causes
}

/// Adds the causes of the alerts that fire, so that the state, the alerts and every view agree: a
/// critical alert means at risk or worse, and a warning degraded or worse.
///
/// While the state is unknown, alerts about what cannot be seen do not make it known.
pub fn raise(causes: &mut Vec<Cause>, alerts: &[Alert]) {
    let of = |causes: &[Cause]| causes.first().map_or(State::Ok, |cause| cause.state);
    for alert in alerts {
        let state = match alert.severity {
            Severity::Critical => State::AtRisk,
            Severity::Warning => State::Degraded,
        };
        let lacks_backup = causes.iter().any(|cause| cause.kind == CauseKind::NoBackup);
        let is_known = match of(causes) {
            // The facts of these are causes already.
            _ if matches!(alert.name, "PitrRpoOverTarget" | "PitrBroken") => true,
            _ if alert.name == "PitrBackupOverdue" && lacks_backup => true,
            State::Unknown => {
                matches!(alert.name, "PitrStreamDown" | "PitrRepositoryFailing")
            }
            _ => false,
        };
        if is_known {
            continue;
        }
        let reason = alert.summary.trim_end_matches('.').to_owned();
        // An alert may say the same as a cause, and require a worse state.
        let same = |cause: &Cause| cause.reason.eq_ignore_ascii_case(&reason);
        if let Some(at) = causes.iter().position(same) {
            if causes[at].state.rank() <= state.rank() {
                continue;
            }
            causes.remove(at);
        }
        causes.push(Cause::new(state, reason));
    }
    causes.sort_by_key(|cause| cause.state.rank());
}

#[cfg(test)]
mod tests {
    use crate::light::*;

    /// Returns the state and its reason.
    fn judge(facts: Facts<'_>) -> (State, String) {
        let first = causes(facts).into_iter().next();
        first.map_or((State::Ok, WELL.to_owned()), |first| {
            (first.state, first.reason)
        })
    }

    const GOOD: Facts<'static> = Facts {
        broken: None,
        failing: None,
        source_known: true,
        source_asked: true,
        stream_connected: true,
        remote_rpo_seconds: Some(0.4),
        proved_rpo_seconds: Some(0.4),
        rpo_target_seconds: 5.0,
        danger: None,
        standby: None,
        has_backup: Some(true),
        unreached: None,
        unread: None,
        slot_wal_status: Some("reserved"),
        not_restorable: None,
    };

    #[test]
    fn the_worst_fact_decides_the_light() {
        let check = |facts, expected| assert_eq!(judge(facts).0, expected, "{facts:?}");
        check(GOOD, State::Ok);
        check(
            Facts {
                has_backup: Some(false),
                ..GOOD
            },
            State::AtRisk,
        );
        check(
            Facts {
                has_backup: None,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                unreached: Some("no base backup leads there"),
                has_backup: None,
                source_known: false,
                ..GOOD
            },
            State::Broken,
        );
        // An outcome that cannot be read hides no known damage.
        let unread = Facts {
            unread: Some("the result of the newest verify cannot be read"),
            ..GOOD
        };
        check(unread, State::Unknown);
        check(
            Facts {
                not_restorable: Some("a damaged object"),
                ..unread
            },
            State::Broken,
        );
        check(
            Facts {
                slot_wal_status: Some("unreserved"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                danger: Some("remote_apply"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                standby: Some("its slot is gone"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                failing: Some("store down"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                stream_connected: false,
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                source_known: false,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                remote_rpo_seconds: None,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                remote_rpo_seconds: Some(5.1),
                proved_rpo_seconds: Some(5.1),
                ..GOOD
            },
            State::AtRisk,
        );
        // The lag counts up from the last proof, and no WAL is known to be missing.
        let dead = Facts {
            remote_rpo_seconds: Some(60.0),
            source_known: false,
            ..GOOD
        };
        check(dead, State::Unknown);
        check(
            Facts {
                proved_rpo_seconds: Some(60.0),
                ..dead
            },
            State::AtRisk,
        );
        check(
            Facts {
                slot_wal_status: Some("lost"),
                ..dead
            },
            State::Broken,
        );
        check(
            Facts {
                broken: Some("gap"),
                ..dead
            },
            State::Broken,
        );
    }

    #[test]
    fn a_repository_that_is_away_is_not_taken_for_the_primary() {
        let (state, reason) = judge(Facts {
            source_known: false,
            source_asked: false,
            stream_connected: false,
            failing: Some("no route to the bucket"),
            ..GOOD
        });
        assert_eq!(state, State::Unknown);
        assert_eq!(
            reason,
            "the repository does not answer, so the primary is not asked: no route to the bucket"
        );
    }

    #[test]
    fn the_reason_names_what_is_being_retried() {
        let (_, reason) = judge(Facts {
            stream_connected: false,
            failing: Some("refused"),
            ..GOOD
        });
        assert_eq!(reason, "the stream is down: refused");
    }

    #[test]
    fn every_cause_is_named_and_the_worst_first() {
        let found = causes(Facts {
            has_backup: Some(false),
            proved_rpo_seconds: Some(9.0),
            remote_rpo_seconds: Some(9.0),
            slot_wal_status: Some("lost"),
            danger: Some("remote_apply"),
            ..GOOD
        });
        let states: Vec<State> = found.iter().map(|cause| cause.state).collect();
        let expected = [State::Broken, State::AtRisk, State::AtRisk, State::Degraded];
        assert_eq!(states, expected, "{found:?}");
        assert_eq!(found[2].kind, CauseKind::Rpo);
    }

    #[test]
    fn the_state_is_never_better_than_an_alert() {
        let alert = |name, severity, summary: &str| Alert {
            name,
            severity,
            summary: summary.to_owned(),
            runbook: "",
            since: wal_format::PgTimestamp(0),
        };
        let check = |facts, alerts: &[Alert], expected| {
            let mut found = causes(facts);
            raise(&mut found, alerts);
            let state = found.first().map_or(State::Ok, |cause| cause.state);
            assert_eq!(state, expected, "{found:?}");
        };
        let warning = alert("PitrRepositoryAway", Severity::Warning, "It is away.");
        let critical = alert(
            "PitrStreamDown",
            Severity::Critical,
            "The stream is down: x.",
        );
        check(GOOD, &[], State::Ok);
        check(GOOD, std::slice::from_ref(&warning), State::Degraded);
        let down = Facts {
            stream_connected: false,
            failing: Some("x"),
            ..GOOD
        };
        check(down, &[], State::Degraded);
        check(down, std::slice::from_ref(&critical), State::AtRisk);
        let unseen = Facts {
            source_known: false,
            ..down
        };
        check(unseen, &[critical, warning], State::Unknown);
    }
}
