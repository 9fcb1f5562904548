//! The checks of `wal-archiver verify`, place by place: the cluster's identity (`identity.rs`),
//! every object (`objects.rs`), and the WAL along every timeline (`continuity.rs`); and what
//! `verify --repair` puts right (`repair.rs`).
//!
//! Invariant: it reads the objects, never the catalog: a cache cannot vouch for what it was made
//! of.

use std::{collections::BTreeMap, fmt};

use repository::{ClusterIdentity, Repository, config::RepositoryPlace};
use wal_format::{
    BackupId, Branch, ClusterName, DeclaredGap, ObjectKey, SystemIdentifier, WalIdentity,
    WalIndexer,
};

use crate::error::{Error, Result};

mod backup;
pub(crate) mod clusters;
mod continuity;
mod identity;
pub(crate) mod losses;
mod objects;
mod one_backup;
pub(crate) mod repair;

/// Names of objects that are not ours, which the output lists; all are counted.
const FOREIGN_LISTED: usize = 20;

/// Something damaged or missing, with its object where there is one.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) key: Option<ObjectKey>,
    what: String,
}

impl Problem {
    fn general(what: String) -> Self {
        Self { key: None, what }
    }

    fn of(key: &ObjectKey, what: impl Into<String>) -> Self {
        Self {
            key: Some(key.clone()),
            what: what.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "{key}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// The state of one place.
#[derive(Debug)]
pub(crate) struct Findings {
    pub(crate) url: String,
    objects: usize,
    pub(crate) problems: Vec<Problem>,
    losses: Vec<String>,
    /// Backups with objects and without a description.
    undescribed: Vec<BackupId>,
    /// Results of backups, drills and verifications that cannot be read or parsed, with the reason
    /// and the remedy. No restore needs them.
    unreadable: Vec<String>,
    /// Objects that are not ours: nothing of them is read, and nothing is missing because of them.
    foreign: Vec<String>,
}

impl Findings {
    /// Returns the findings as a JSON document.
    pub(crate) fn document(&self) -> serde_json::Value {
        let problem = |problem: &Problem| {
            serde_json::json!({
                "object": problem.key.as_ref().map(ToString::to_string),
                "problem": problem.what,
            })
        };
        serde_json::json!({
            "repository": self.url,
            "objects": self.objects,
            "problems": self.problems.iter().map(problem).collect::<Vec<_>>(),
            "losses": self.losses,
            "backups_without_description": self.undescribed,
            "unreadable_results": self.unreadable,
            "foreign_objects": self.foreign,
        })
    }

    /// The lines for a person.
    pub(crate) fn lines(&self, deep: bool) -> Vec<String> {
        let place = &self.url;
        let problems = self
            .problems
            .iter()
            .map(|problem| format!("{place}: {problem}"));
        let losses = self.losses.iter().map(|loss| format!("{place}: {loss}"));
        let mut lines: Vec<String> = problems.chain(losses).collect();
        for id in &self.undescribed {
            lines.push(format!(
                "{place}: backup {id} has no backup.json, so it is ignored: it is being taken now, was interrupted, or its \
                 description is lost"
            ));
        }
        for result in &self.unreadable {
            lines.push(format!("{place}: {result}"));
        }
        for name in self.foreign.iter().take(FOREIGN_LISTED) {
            lines.push(format!(
                "{place}: {name} is not an object of this cluster's archive; it is ignored"
            ));
        }
        if let Some(more) = self.foreign.len().checked_sub(FOREIGN_LISTED)
            && more > 0
        {
            lines.push(format!("{place}: {more} more such objects are ignored"));
        }
        if self.problems.is_empty() {
            let other = if self.losses.is_empty() { "" } else { "other " };
            let depth = if deep { "every record" } else { "every frame" };
            lines.push(format!(
                "{place}: {} objects checked, {depth}; no {other}gap, no damage",
                self.objects
            ));
        }
        lines
    }
}

/// Checks every place alone, then for what one has and another lacks. Returns the cluster's system
/// identifier too.
pub(crate) fn examine_all(
    located: &[RepositoryPlace],
    places: &[Repository],
    deep: bool,
) -> Result<(SystemIdentifier, Vec<Findings>)> {
    let mut identity = None;
    for place in places {
        match place.identity() {
            Ok(Some(known)) => {
                identity.get_or_insert(known);
            }
            // Reported below, where another place says whose objects these are.
            Ok(None) | Err(repository::Error::Damaged { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let Some(identity) = identity else {
        if let [place] = places {
            place.identity()?;
        }
        let urls: Vec<String> = places.iter().map(Repository::url).collect();
        let cluster = places.first().map(Repository::cluster);
        return Err(Error::Usage {
            message: format!(
                "the repository {} holds nothing of cluster {}; check --repository and --cluster",
                urls.join(" and "),
                cluster.map_or("", ClusterName::as_str)
            ),
        });
    };
    let mut all = Vec::new();
    for place in places {
        all.push(examine(place, &identity, deep)?);
    }
    let states = match places.first() {
        Some(place) => repair::keys(place.cluster(), located)?,
        None => Vec::new(),
    };
    for (findings, state) in all.iter_mut().zip(states) {
        findings
            .problems
            .extend(state.broken.into_iter().map(Problem::general));
        findings.foreign.extend(state.plain);
    }
    if places.len() > 1 {
        for (findings, missing) in all.iter_mut().zip(repair::missing(places, &identity)?) {
            for key in missing {
                let is_known = |known: &Problem| known.key.as_ref() == Some(&key);
                if !findings.problems.iter().any(is_known) {
                    let what = "it is in another repository, but not in this one";
                    findings.problems.push(Problem::of(&key, what));
                }
            }
        }
    }
    Ok((identity.system_identifier, all))
}

/// Checks one backup and the WAL that makes it consistent in every place that holds the backup.
pub(crate) fn examine_backup(
    places: &[Repository],
    id: &BackupId,
    deep: bool,
) -> Result<(SystemIdentifier, Vec<Findings>)> {
    let mut all = Vec::new();
    let mut system = None;
    for place in places {
        let Some(identity) = place.identity()? else {
            continue;
        };
        if let Some(findings) = Verifier::new(place, &identity, deep).only_backup(id)? {
            system.get_or_insert(identity.system_identifier);
            all.push(findings);
        }
    }
    let urls: Vec<String> = places.iter().map(Repository::url).collect();
    let system = system.ok_or_else(|| Error::Usage {
        message: format!(
            "{} has no backup {id}; `pitr-restore list` lists the backups",
            urls.join(" and ")
        ),
    })?;
    Ok((system, all))
}

fn examine(place: &Repository, identity: &ClusterIdentity, deep: bool) -> Result<Findings> {
    let mut verifier = Verifier::new(place, identity, deep);
    verifier.problems = identity::problems(place, identity)?;
    let objects = verifier.objects()?;
    verifier.continuity()?;
    Ok(Findings {
        url: place.url(),
        objects,
        problems: verifier.problems,
        losses: verifier.losses,
        undescribed: verifier.undescribed,
        unreadable: verifier.unreadable,
        foreign: place.foreign_names()?,
    })
}

struct Verifier {
    repository: Repository,
    identity: ClusterIdentity,
    wal: WalIdentity,
    deep: bool,
    /// Per branch, the decoder after the last sealed segment.
    indexers: BTreeMap<Branch, WalIndexer>,
    problems: Vec<Problem>,
    /// Ranges that were declared lost, with a backup after them: known, and repaired as far as they
    /// can be.
    losses: Vec<String>,
    gaps: Vec<DeclaredGap>,
    undescribed: Vec<BackupId>,
    unreadable: Vec<String>,
}

impl Verifier {
    fn new(place: &Repository, identity: &ClusterIdentity, deep: bool) -> Self {
        Self {
            repository: place.clone(),
            identity: identity.clone(),
            wal: WalIdentity {
                version: identity.postgresql_major,
                system_identifier: identity.system_identifier,
                segment_size: identity.wal_segment_size,
            },
            deep,
            indexers: BTreeMap::new(),
            problems: Vec::new(),
            losses: Vec::new(),
            gaps: Vec::new(),
            undescribed: Vec::new(),
            unreadable: Vec::new(),
        }
    }

    fn problem(&mut self, key: &ObjectKey, what: &str) {
        self.problems.push(Problem::of(key, what));
    }

    fn general(&mut self, what: String) {
        self.problems.push(Problem::general(what));
    }
}
