//! `wal-archiver verify`: proves from the repository alone that every object is intact and that no
//! WAL is missing.

use repository::{
    Loss, Repository,
    config::{ClusterSettings, RepositoryPlace, Settings},
};
use wal_format::{OutcomeKind, SystemIdentifier};

use super::{losses, output};
use crate::{
    error::{Error, Result},
    outcomes,
    verify::{self, Findings, repair},
};

/// The maximum number of problems in an outcome. The output contains all of them.
const DAMAGED_MAX: usize = 1000;
/// The maximum number of repair rounds. An identity, a backup's description and its parts need
/// three.
const REPAIRS_MAX: u32 = 4;

/// What the command is asked to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Decode every record.
    pub(super) deep: bool,
    /// Put sound copies in the place of damaged and missing objects.
    pub(super) repair: bool,
    /// Accept that what is missing is lost for good.
    pub(super) accept_loss: bool,
}

pub(super) fn verify(settings: &Settings, wanted: &Wanted) -> Result<()> {
    let Wanted { deep, repair, .. } = *wanted;
    let mut problems = 0;
    let mut unreachable = None;
    for cluster in &settings.clusters {
        let started = jiff::Timestamp::now();
        let say = |line: &str| output::line(&format!("cluster {}: {line}", cluster.name));
        let (located, places, error) = reachable(cluster, &say, &mut problems)?;
        unreachable = unreachable.or(error);
        if places.is_empty() {
            continue;
        }
        let lost = lost(cluster, wanted, &say)?;
        if repair {
            repair::repair_keys(&cluster.name, &located, &say)?;
        }
        let (system, mut findings) = verify::examine_all(&located, &places, deep)?;
        // Repeated, because the parts that a backup's description lists can be read only when the
        // description is intact.
        for _ in 0..REPAIRS_MAX {
            if !repair || repair::repair(&places, &findings, &say)? == 0 {
                break;
            }
            findings = verify::examine_all(&located, &places, deep)?.1;
        }
        if repair {
            for place in &places {
                place.remember(system)?;
            }
        }
        for findings in &findings {
            for line in findings.lines(deep) {
                say(&line);
            }
            problems += findings.problems.len();
        }
        for loss in &lost {
            say(&format!(
                "{loss} was archived and is not there any more: bring it back from a copy of the repository, or accept the loss \
                 with `wal-archiver verify --accept-loss`"
            ));
        }
        problems += lost.len();
        record(cluster, &places, system, &findings, started);
    }
    if problems == 0 {
        unreachable.map_or(Ok(()), |error| Err(error.into()))
    } else {
        Err(Error::Verify { problems })
    }
}

/// Returns what was archived and is missing: nothing if the loss is accepted now.
fn lost(cluster: &ClusterSettings, wanted: &Wanted, say: &dyn Fn(&str)) -> Result<Vec<Loss>> {
    let repository = Repository::open_known(cluster)?;
    let identity = match repository.identity() {
        Ok(Some(identity)) => identity,
        // The examination reports it.
        Ok(None) | Err(repository::Error::Damaged { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let missing = losses::of(cluster, &identity, &repository, wanted.accept_loss)?.losses;
    if !wanted.accept_loss {
        return Ok(missing);
    }
    losses::accept(cluster, &identity, &repository, &missing)?;
    if missing.is_empty() {
        say("nothing that was archived is missing, so no loss was accepted");
    }
    for loss in &missing {
        say(&format!("accepted as lost: {loss}"));
    }
    Ok(Vec::new())
}

/// Opens each place of a cluster. One that exists and does not hold the archive is a problem. If one of several cannot be reached, it is printed, the others
/// are examined, and its error is returned with them.
fn reachable(
    cluster: &ClusterSettings,
    say: &dyn Fn(&str),
    problems: &mut usize,
) -> Result<(
    Vec<RepositoryPlace>,
    Vec<Repository>,
    Option<repository::Error>,
)> {
    let (mut located, mut places, mut first) = (Vec::new(), Vec::new(), None);
    for place in cluster.repository.each() {
        let opened = Repository::open_known_place(cluster, &place)?;
        match opened.identity() {
            Err(error) if error.is_gone() && matches!(opened.lacks_place(), Ok(false)) => {
                say(&format!("{place} was not examined: {error}"));
                *problems += 1;
            }
            Err(error) if error.is_transient() => {
                say(&format!("{place} was not examined: {error}"));
                first.get_or_insert(error);
            }
            // The examination reports any other problem.
            _ => {
                located.push(place);
                places.push(opened);
            }
        }
    }
    match first {
        Some(error) if places.is_empty() && *problems == 0 => Err(error.into()),
        first => Ok((located, places, first)),
    }
}

/// Stores the verdict in each place, for the dashboard. A user without permission to write can
/// still verify.
fn record(
    settings: &ClusterSettings,
    places: &[Repository],
    system: SystemIdentifier,
    findings: &[Findings],
    started: jiff::Timestamp,
) {
    let problems: Vec<String> = findings
        .iter()
        .flat_map(|found| {
            let several = (places.len() > 1).then_some(&found.url);
            found.problems.iter().map(move |problem| match several {
                Some(url) => format!("{url}: {problem}"),
                None => problem.to_string(),
            })
        })
        .collect();
    let message = match problems.len() {
        0 => "no damage".to_owned(),
        count => format!("{count} problem(s)"),
    };
    let passed = problems.is_empty();
    let Some(mut outcome) = outcomes::ended(OutcomeKind::Verify, started, passed, &message) else {
        return;
    };
    outcome.damaged = problems.into_iter().take(DAMAGED_MAX).collect();
    for place in places {
        if let Err(error) = place.put_outcome(system, &outcome) {
            tracing::warn!(
                event = "verdict_not_recorded", %error,
                "the verdict is not recorded in the repository"
            );
        }
    }
    outcomes::tell_the_daemon(settings, &outcome.id);
}
