//! `wal-archiver verify`: proves from the repository alone that every object is whole and that no WAL is missing.
//!
//! Invariant: it reads the objects, never the catalog: a cache can not vouch for what it was made of.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use catalog::Catalog;
use repository::{
    ClusterIdentity, Repository, WalRange,
    config::{ClusterSettings, Settings},
};
use sha2::{Digest, Sha256};
use wal_format::{
    BackupId, BackupInfo, Branch, ClusterName, DeclaredGap, FailoverLoss, Lsn, ObjectKey,
    OutcomeKind, SealedReader, SegmentSize, SystemIdentifier, TimelineHistory, WalIdentity,
    WalIndexer, checked_json,
};

use super::{output, repair};
use crate::{
    error::{Error, Result},
    outcomes,
};

/// Problems that an outcome names; the output has them all.
const DAMAGED_MAX: usize = 1000;
/// Rounds of a repair: an identity, a description and its parts are three.
const REPAIRS_MAX: u32 = 4;

pub(super) fn verify(settings: &Settings, deep: bool, repair: bool) -> Result<()> {
    let mut problems = 0;
    for cluster in &settings.clusters {
        let started = jiff::Timestamp::now();
        let places = cluster
            .repository
            .each()
            .iter()
            .map(|place| Repository::open(place, &cluster.name))
            .collect::<repository::Result<Vec<_>>>()?;
        if repair {
            repair::keys(cluster, true)?;
        }
        let (system, mut findings) = examine_all(cluster, &places, deep)?;
        // Again, because what a damaged description of a backup lists is seen only when it is sound.
        for _ in 0..REPAIRS_MAX {
            if !repair {
                break;
            }
            let mended = repair::repair(&places, &findings, &|line| {
                output::line(&format!("cluster {}: {line}", cluster.name));
            })?;
            if mended == 0 {
                break;
            }
            findings = examine_all(cluster, &places, deep)?.1;
        }
        for findings in &findings {
            findings.print(&cluster.name, deep);
            problems += findings.problems.len();
        }
        record(cluster, &places, system, &findings, started);
    }
    if problems == 0 {
        Ok(())
    } else {
        Err(Error::Verify { problems })
    }
}

/// Leaves the verdict in each place, for the dashboard. Who may only read can still verify.
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
            tracing::warn!(%error, "the verdict is not recorded in the repository");
        }
    }
    outcomes::tell_the_daemon(settings, &outcome.id);
}

/// What is wrong, with the object that it is about, if it is about one.
#[derive(Debug)]
pub(super) struct Problem {
    /// The object.
    pub(super) key: Option<ObjectKey>,
    what: String,
}

impl Problem {
    fn general(what: String) -> Self {
        Self { key: None, what }
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

/// What was found in one place.
#[derive(Debug)]
pub(super) struct Findings {
    url: String,
    objects: usize,
    /// What is damaged or missing.
    pub(super) problems: Vec<Problem>,
    losses: Vec<String>,
}

impl Findings {
    fn print(&self, cluster: &ClusterName, deep: bool) {
        let place = &self.url;
        for problem in &self.problems {
            output::line(&format!("cluster {cluster}: {place}: {problem}"));
        }
        for loss in &self.losses {
            output::line(&format!("cluster {cluster}: {place}: {loss}"));
        }
        if self.problems.is_empty() {
            let other = if self.losses.is_empty() { "" } else { "other " };
            let depth = if deep { "every record" } else { "every frame" };
            output::line(&format!(
                "cluster {cluster}: {place}: {} objects checked, {depth}; no {other}gap, no damage",
                self.objects
            ));
        }
    }
}

/// Every place alone; then what one has and another lacks. The cluster's system identifier with it.
fn examine_all(
    settings: &ClusterSettings,
    places: &[Repository],
    deep: bool,
) -> Result<(SystemIdentifier, Vec<Findings>)> {
    let mut identity = None;
    for place in places {
        match place.identity() {
            Ok(Some(known)) => {
                identity.get_or_insert(known);
            }
            // Damage is said below, where it is known whose place it is.
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
    for (findings, broken) in all.iter_mut().zip(repair::keys(settings, false)?) {
        let broken = broken.into_iter().map(Problem::general);
        findings.problems.extend(broken);
    }
    if places.len() > 1 {
        for (findings, missing) in all.iter_mut().zip(repair::missing(places, &identity)?) {
            for key in missing {
                if !findings
                    .problems
                    .iter()
                    .any(|known| known.key.as_ref() == Some(&key))
                {
                    findings.problems.push(Problem {
                        key: Some(key),
                        what: "it is in another repository, but not in this one".to_owned(),
                    });
                }
            }
        }
    }
    Ok((identity.system_identifier, all))
}

fn examine(place: &Repository, identity: &ClusterIdentity, deep: bool) -> Result<Findings> {
    let mut problems = Vec::new();
    match place.identity() {
        Ok(Some(known)) if known.system_identifier != identity.system_identifier => {
            return Err(Error::Usage {
                message: format!(
                    "{} holds system identifier {}, another repository of the cluster {}",
                    place.url(),
                    known.system_identifier,
                    identity.system_identifier
                ),
            });
        }
        Ok(_) => {}
        Err(repository::Error::Damaged { key, problem, .. }) => problems.push(Problem {
            key: repair::key_of(place, &key),
            what: problem,
        }),
        Err(error) => return Err(error.into()),
    }
    let mut verifier = Verifier {
        repository: place.clone(),
        identity: identity.clone(),
        wal: WalIdentity {
            version: identity.postgresql_major,
            system_identifier: identity.system_identifier,
            segment_size: identity.wal_segment_size,
        },
        deep,
        indexers: BTreeMap::new(),
        problems,
        losses: Vec::new(),
        gaps: Vec::new(),
    };
    let objects = verifier.objects()?;
    verifier.continuity()?;
    Ok(Findings {
        url: place.url(),
        objects,
        problems: verifier.problems,
        losses: verifier.losses,
    })
}

struct Verifier {
    repository: Repository,
    identity: ClusterIdentity,
    wal: WalIdentity,
    deep: bool,
    /// Per branch, the decoder behind the last sealed segment.
    indexers: BTreeMap<Branch, WalIndexer>,
    problems: Vec<Problem>,
    /// What was declared lost, with a backup behind it: known, and mended as far as it can be.
    losses: Vec<String>,
    gaps: Vec<DeclaredGap>,
}

impl Verifier {
    /// Reads every object whole; how many there are.
    fn objects(&mut self) -> Result<usize> {
        let system = self.wal.system_identifier;
        let mut objects = self.repository.list(&format!("{system}/"))?;
        // Verdicts of earlier verifications are not what is verified, nor what waits for its removal.
        let expired = self.repository.expired(system)?;
        objects.retain(|(key, _)| {
            !matches!(key, ObjectKey::Outcome(..)) && !expired.hides(key, self.wal.segment_size)
        });
        for (key, _) in &objects {
            match key {
                ObjectKey::Segment(..) | ObjectKey::Tail(..) => self.wal_object(key)?,
                ObjectKey::BackupInfo(_, id) => self.backup(id)?,
                ObjectKey::History(_, branch) => self.history(*branch, key)?,
                ObjectKey::HistoryCopy(_, branch) => {
                    let first = ObjectKey::History(system, *branch);
                    if self.repository.head(&first)?.is_none() {
                        self.problem(&first, "the first of its two copies is missing");
                    }
                }
                ObjectKey::Gap(..) => {
                    if let Some(content) = self.read(key)? {
                        match checked_json::from_slice(&content) {
                            Ok(gap) => self.gaps.push(gap),
                            Err(error) => self.problem(key, &error.to_string()),
                        }
                    }
                }
                ObjectKey::FailoverLoss(..) => {
                    if let Some(content) = self.read(key)?
                        && let Err(error) = checked_json::from_slice::<FailoverLoss>(&content)
                    {
                        self.problem(key, &error.to_string());
                    }
                }
                ObjectKey::Expired(..) => {
                    if let Some(content) = self.read(key)?
                        && let Err(error) =
                            checked_json::from_slice::<wal_format::Expired>(&content)
                    {
                        self.problem(key, &error.to_string());
                    }
                }
                // Checked with their backup; the identity before anything.
                ObjectKey::BackupSlice(..)
                | ObjectKey::BackupManifest(..)
                | ObjectKey::Outcome(..)
                | ObjectKey::Epoch(_) => {}
            }
        }
        Ok(objects.len())
    }

    fn problem(&mut self, key: &ObjectKey, what: &str) {
        self.problems.push(Problem {
            key: Some(key.clone()),
            what: what.to_owned(),
        });
    }

    fn general(&mut self, what: String) {
        self.problems.push(Problem::general(what));
    }

    /// An object, unless the store itself sees its damage, or it was replaced.
    fn read(&mut self, key: &ObjectKey) -> Result<Option<Bytes>> {
        match self.repository.get(key) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(repository::Error::Damaged { problem, .. }) => {
                self.problem(key, &problem);
                Ok(None)
            }
            // Replaced since it was listed.
            Err(error)
                if error.is_not_found()
                    && matches!(key, ObjectKey::Tail(..) | ObjectKey::Expired(..)) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn wal_object(&mut self, key: &ObjectKey) -> Result<()> {
        if let Some(object) = self.read(key)?
            && let Some(problem) = self.wal_problem(key, &object)
        {
            self.problem(key, &problem);
        }
        Ok(())
    }

    fn wal_problem(&mut self, key: &ObjectKey, object: &[u8]) -> Option<String> {
        let mut wal = Vec::new();
        let reader = match SealedReader::open(object) {
            Ok(reader) => reader,
            Err(error) => return Some(error.to_string()),
        };
        if let Err(error) = reader.read_all(&mut wal) {
            return Some(error.to_string());
        }
        let header = reader.header();
        if header.key() != *key {
            return Some(format!("it holds {}", header.key()));
        }
        if !self.deep {
            return None;
        }
        let whole = header.is_whole_segment();
        let mut indexer = match self.indexers.remove(&header.branch) {
            Some(indexer) if whole && indexer.position() == header.start_lsn => indexer,
            // A tail in the middle of a page can not be decoded alone; its frames were checked.
            _ if !whole && header.start_lsn.page_offset() != 0 => return None,
            _ => WalIndexer::new(self.wal, header.start_lsn, None),
        };
        if let Err(error) = indexer.push(&wal) {
            return Some(error.to_string());
        }
        let decoded = indexer.take_summary();
        let stored = reader.summary();
        let missing = decoded
            .transactions
            .iter()
            .find(|transaction| !stored.transactions.contains(transaction));
        if whole {
            self.indexers.insert(header.branch, indexer);
        }
        missing.map(|transaction| {
            format!(
                "its summary lacks the transaction end at {}",
                transaction.lsn
            )
        })
    }

    fn history(&mut self, branch: Branch, key: &ObjectKey) -> Result<()> {
        let copy = ObjectKey::HistoryCopy(self.wal.system_identifier, branch);
        for key in [key, &copy] {
            if *key == copy && self.repository.head(key)?.is_none() {
                self.problem(key, "the second of its two copies is missing");
            } else if let Some(content) = self.read(key)? {
                if Branch::of_history(branch.timeline, &content) != branch {
                    self.problem(key, "its content is not what its name says");
                } else if let Err(error) = TimelineHistory::parse(branch.timeline, &content) {
                    self.problem(key, &error.to_string());
                }
            }
        }
        Ok(())
    }

    fn backup(&mut self, id: &BackupId) -> Result<()> {
        let system = self.wal.system_identifier;
        let key = ObjectKey::BackupInfo(system, id.clone());
        let Some(content) = self.read(&key)? else {
            return Ok(());
        };
        let info = match BackupInfo::parse(&content) {
            Ok(info) => info,
            Err(error) => {
                self.problem(&key, &format!("it can not be read: {error}"));
                return Ok(());
            }
        };
        for (key, sha256) in repair::parts(&info) {
            if self.repository.head(&key)?.is_none() {
                self.problem(&key, "it is missing");
                continue;
            }
            let Some(body) = self.read(&key)? else {
                continue;
            };
            let found = hex::encode(Sha256::digest(body));
            if found != sha256 {
                self.problem(
                    &key,
                    &format!("it is damaged: SHA-256 {found}, recorded {sha256}"),
                );
            }
        }
        Ok(())
    }

    /// From the oldest backup on, every byte of WAL has to be there.
    fn continuity(&mut self) -> Result<()> {
        // The identity may be what is damaged here.
        let folder = tempfile::tempdir().map_err(Error::io("create", "a temporary directory"))?;
        let catalog = Catalog::open(folder.path(), &self.identity)?;
        match catalog.refresh(&self.repository) {
            // A timeline whose history is lost in both its copies: what continues what is not known.
            Err(repository::Error::Damaged { key, problem, .. }) => {
                self.general(format!(
                    "continuity is not known while {key} is damaged: {problem}"
                ));
                return Ok(());
            }
            outcome => outcome?,
        };
        let backups = catalog.backups()?;
        let expired = catalog.expired()?;
        let size = self.wal.segment_size;
        for (branch, history, _) in catalog.branches()? {
            let ranges = catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?;
            let oldest = backups
                .iter()
                .filter(|backup| backup.branch == branch)
                .map(|backup| backup.start_lsn)
                .min();
            let from = oldest
                .map(|lsn| lsn.align_down(size.bytes()))
                .or_else(|| ranges.first().map(|range| range.start_lsn));
            let Some(from) = from else { continue };
            let missing = gaps(&ranges, from);
            for backup in backups.iter().filter(|backup| backup.branch == branch) {
                let end = catalog.contiguous_end(branch, backup.start_lsn)?;
                if end < backup.stop_lsn {
                    self.general(format!(
                        "backup {} can not be restored: WAL {end} to {} of timeline branch {branch} is missing",
                        backup.id, backup.stop_lsn
                    ));
                }
            }
            // What is no longer kept is not missing.
            let missing = missing
                .into_iter()
                .flat_map(|(start, end)| expired.not_expired(branch, start, end));
            for (start, end) in missing {
                self.missing(branch, start, end, &backups);
            }
            self.fork(&catalog, history.as_ref(), &backups, size)?;
        }
        Ok(())
    }

    /// A gap: a problem, unless it was declared lost and a backup was taken behind it.
    fn missing(&mut self, branch: Branch, start: Lsn, end: Lsn, backups: &[BackupInfo]) {
        let declared = self
            .gaps
            .iter()
            .find(|gap| gap.branch == branch && gap.from_lsn <= start && end <= gap.to_lsn);
        let behind = backups
            .iter()
            .any(|backup| backup.branch == branch && backup.start_lsn >= end);
        match declared {
            Some(gap) if behind => self.losses.push(format!(
                "WAL {start} to {end} of timeline branch {branch} was declared lost {}; a later backup makes the archive \
                 whole again behind it",
                gap.declared
            )),
            _ => self.general(format!(
                "WAL {start} to {end} of timeline branch {branch} is missing"
            )),
        }
    }

    /// A branch continues its parent: the parent's WAL has to reach the segment in which the branch begins.
    fn fork(
        &mut self,
        catalog: &Catalog,
        history: Option<&TimelineHistory>,
        backups: &[BackupInfo],
        size: SegmentSize,
    ) -> Result<()> {
        let Some(parent) = history.and_then(TimelineHistory::parent) else {
            return Ok(());
        };
        let expired = catalog.expired()?;
        for backup in backups {
            let on_parent =
                backup.branch.timeline == parent.timeline && backup.start_lsn < parent.to;
            if !on_parent {
                continue;
            }
            let end = catalog.contiguous_end(backup.branch, backup.start_lsn)?;
            let needed = parent.to.align_down(size.bytes());
            let kept = expired.not_expired(backup.branch, end, needed);
            if end < needed && kept == [(end, needed)] {
                self.general(format!(
                    "WAL {end} to {needed} of timeline branch {} is missing: backup {} can not be followed past it",
                    backup.branch, backup.id
                ));
            }
        }
        Ok(())
    }
}

/// What is missing between ordered ranges, from `from` on.
fn gaps(ranges: &[WalRange], from: Lsn) -> Vec<(Lsn, Lsn)> {
    let mut end = from;
    let mut missing = Vec::new();
    for range in ranges.iter().filter(|range| range.end_lsn > from) {
        if range.start_lsn > end {
            missing.push((end, range.start_lsn));
        }
        end = end.max(range.end_lsn);
    }
    missing
}
