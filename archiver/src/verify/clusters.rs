//! Verifies the archives of all clusters, and records the verdicts.

use std::cell::RefCell;

use repository::{
    Loss, LossRecord, Repository,
    config::{ClusterSettings, RepositoryPlace, Settings},
};
use serde::Serialize;
use serde_json::Value;
use status::outcomes::ended;
use wal_format::{BackupId, ClusterName, OutcomeKind, SystemIdentifier};

use super::losses;
use crate::{
    error::{Error, Result},
    upkeep::outcomes,
    verify::{self, Findings, repair},
};

/// The maximum number of problems in an outcome. The output contains all of them.
const DAMAGED_MAX: usize = 1000;
/// The maximum number of repair rounds. An identity, a backup's description and its parts need
/// three.
const REPAIRS_MAX: u32 = 4;

/// The extent of a verification.
pub(crate) struct VerifyOptions {
    /// Decodes every record.
    pub(crate) deep: bool,
    /// Replaces damaged objects by intact copies.
    pub(crate) repair: bool,
    /// Accepts that missing objects are lost for good.
    pub(crate) accept_loss: bool,
    /// The only backup to check.
    pub(crate) backup: Option<BackupId>,
    /// Prints one JSON document.
    pub(crate) json: bool,
}

/// The result for one cluster, in JSON.
#[derive(Serialize)]
pub(crate) struct Document<'a> {
    cluster: &'a ClusterName,
    /// `None` when no repository was examined.
    system_identifier: Option<SystemIdentifier>,
    backup: &'a Option<BackupId>,
    deep: bool,
    passed: bool,
    repositories: Vec<Value>,
    /// The losses: what was archived and is missing in the repository.
    lost: Vec<String>,
    /// Messages about repositories that were not examined, repairs, and accepted losses.
    messages: Vec<String>,
}

/// Verifies the archives of all clusters. Without `--json`, passes each line to `print`; with it,
/// adds a document for each cluster.
///
/// # Errors
/// [`Error::Verify`] if something is damaged or missing; the error of a place that cannot be
/// examined.
pub(crate) fn verify_all<'a>(
    settings: &'a Settings,
    options: &'a VerifyOptions,
    print: &dyn Fn(&str),
    documents: &mut Vec<Document<'a>>,
) -> Result<()> {
    let VerifyOptions {
        deep, repair, json, ..
    } = *options;
    let mut problems = 0;
    let mut unreachable = None;
    for cluster in &settings.clusters {
        let started = jiff::Timestamp::now();
        let messages = RefCell::new(Vec::new());
        let say = |line: &str| match json {
            true => messages.borrow_mut().push(line.to_owned()),
            false => print(&format!("cluster {}: {line}", cluster.name)),
        };
        let document = Document {
            cluster: &cluster.name,
            system_identifier: None,
            backup: &options.backup,
            deep,
            passed: false,
            repositories: Vec::new(),
            lost: Vec::new(),
            messages: Vec::new(),
        };
        let (located, places, error) = reachable(cluster, &say, &mut problems)?;
        unreachable = unreachable.or(error);
        if places.is_empty() {
            documents.push(Document {
                messages: messages.into_inner(),
                ..document
            });
            continue;
        }
        let (lost, (system, findings)) = match &options.backup {
            Some(id) => (Vec::new(), verify::examine_backup(&places, id, deep)?),
            None => {
                let lost = lost(cluster, options.accept_loss, &say)?;
                let examined = examine(cluster, (&located, &places), (deep, repair), &say)?;
                (lost, examined)
            }
        };
        let found = findings.iter().map(|one| one.problems.len());
        let unreadable = LossRecord::of(cluster).problem();
        let unreadable = unreadable.filter(|_| options.backup.is_none());
        if let Some(problem) = &unreadable {
            say(problem);
        }
        let found = found.sum::<usize>() + lost.len() + usize::from(unreadable.is_some());
        problems += found;
        if json {
            documents.push(Document {
                system_identifier: Some(system),
                passed: found == 0,
                repositories: findings.iter().map(Findings::document).collect(),
                lost: lost.iter().map(ToString::to_string).collect(),
                messages: messages.into_inner(),
                ..document
            });
        } else {
            for line in findings.iter().flat_map(|findings| findings.lines(deep)) {
                say(&line);
            }
            for loss in &lost {
                say(&format!(
                    "{loss} was archived and is not there any more: bring it back from a copy of the repository, or accept \
                     the loss with `wal-archiver verify --accept-loss`"
                ));
            }
        }
        // The check of one backup does not cover the rest of the archive, so it is not recorded as
        // a verification.
        // After a loss was accepted, the base backup that follows changes the verdict.
        if options.backup.is_none() && !options.accept_loss {
            record(cluster, &places, system, &findings, started);
        }
    }
    if problems == 0 {
        unreachable.map_or(Ok(()), |error| Err(error.into()))
    } else {
        Err(Error::Verify { problems })
    }
}

/// Examines all objects. With `repair`, first repairs the encryption keys, then repairs damaged
/// objects and examines all objects again.
fn examine(
    cluster: &ClusterSettings,
    (located, places): (&[RepositoryPlace], &[Repository]),
    (deep, repair): (bool, bool),
    say: &dyn Fn(&str),
) -> Result<(SystemIdentifier, Vec<Findings>)> {
    if repair {
        repair::repair_keys(&cluster.name, located, say)?;
    }
    let (system, mut findings) = verify::examine_all(located, places, deep)?;
    // Repeated, because the parts that a backup's description lists can be read only when the
    // description is intact.
    for _ in 0..REPAIRS_MAX {
        if !repair || repair::repair(places, &findings, say)? == 0 {
            break;
        }
        findings = verify::examine_all(located, places, deep)?.1;
    }
    if repair {
        for place in places {
            place.remember(system)?;
        }
    }
    Ok((system, findings))
}

/// Returns what was archived and is missing. With `accept_loss`, accepts these losses and returns
/// none.
fn lost(cluster: &ClusterSettings, accept_loss: bool, say: &dyn Fn(&str)) -> Result<Vec<Loss>> {
    let repository = Repository::open_known(cluster)?;
    let identity = match repository.identity() {
        Ok(Some(identity)) => identity,
        // The examination reports a missing or damaged identity.
        Ok(None) | Err(repository::Error::Damaged { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let missing = losses::of(cluster, &identity, &repository, accept_loss)?.losses;
    if !accept_loss {
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

/// Opens each place of a cluster. A place that exists and does not hold the archive is a problem.
/// If one of several places cannot be reached, prints this, opens the others, and returns the error
/// with them.
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
    let Some(mut outcome) = ended(OutcomeKind::Verify, started, passed, &message) else {
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
