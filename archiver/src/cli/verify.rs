//! `wal-archiver verify`: proves from the repository alone that every object is whole and that no WAL is missing.
//!
//! Invariant: it reads the objects, never the catalog: a cache can not vouch for what it was made of.

use std::collections::BTreeMap;

use repository::{Catalog, ClusterIdentity, Repository, WalRange, config::Settings};
use sha2::{Digest, Sha256};
use wal_format::{
    BackupId, BackupInfo, Branch, DeclaredGap, Lsn, OUTCOME_FORMAT_VERSION, ObjectKey, Outcome,
    OutcomeKind, PgTimestamp, SealedReader, SegmentSize, TimelineHistory, WalIdentity, WalIndexer,
};

use super::output;
use crate::error::{Error, Result};

/// Problems that an outcome names; the output has them all.
const DAMAGED_MAX: usize = 1000;

pub(super) fn verify(settings: &Settings, deep: bool) -> Result<()> {
    let mut problems = 0;
    for cluster in &settings.clusters {
        let started = jiff::Timestamp::now();
        let repository = Repository::open(&cluster.repository, &cluster.name)?;
        let identity = repository.identity()?.ok_or_else(|| Error::Usage {
            message: format!(
                "the repository {} holds nothing of cluster {}; check --repository and --cluster",
                cluster.repository, cluster.name
            ),
        })?;
        let gaps = repository.gaps(identity.system_identifier)?;
        let mut verifier = Verifier {
            repository,
            wal: WalIdentity {
                version: identity.postgresql_major,
                system_identifier: identity.system_identifier,
                segment_size: identity.wal_segment_size,
            },
            deep,
            indexers: BTreeMap::new(),
            problems: Vec::new(),
            losses: Vec::new(),
            gaps,
        };
        let objects = verifier.objects()?;
        verifier.continuity()?;
        for problem in &verifier.problems {
            output::line(&format!("cluster {}: {problem}", cluster.name));
        }
        for loss in &verifier.losses {
            output::line(&format!("cluster {}: {loss}", cluster.name));
        }
        if verifier.problems.is_empty() {
            let other = if verifier.losses.is_empty() {
                ""
            } else {
                "other "
            };
            let depth = if deep { "every record" } else { "every frame" };
            output::line(&format!(
                "cluster {}: {objects} objects checked, {depth}; no {other}gap, no damage",
                cluster.name
            ));
        }
        record(&verifier, &identity, started);
        problems += verifier.problems.len();
    }
    if problems == 0 {
        Ok(())
    } else {
        Err(Error::Verify { problems })
    }
}

/// Leaves the verdict in the repository, for the dashboard. Who may only read can still verify.
fn record(verifier: &Verifier, identity: &ClusterIdentity, started: jiff::Timestamp) {
    let chance = started.subsec_nanosecond().unsigned_abs() & 0xffff;
    let id = format!("{}-{chance:04x}", started.strftime("%Y%m%dT%H%M%SZ"));
    let Ok(id) = id.parse::<BackupId>() else {
        return;
    };
    let problems = &verifier.problems;
    let outcome = Outcome {
        format_version: OUTCOME_FORMAT_VERSION,
        kind: OutcomeKind::Verify,
        id,
        started: PgTimestamp::from_jiff(started),
        finished: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        passed: problems.is_empty(),
        message: match problems.len() {
            0 => "no damage".to_owned(),
            count => format!("{count} problem(s)"),
        },
        backup: None,
        rto_seconds: None,
        fetched_bytes: None,
        fetch_seconds: None,
        replayed_bytes: None,
        replay_seconds: None,
        loss_seconds: None,
        damaged: problems.iter().take(DAMAGED_MAX).cloned().collect(),
    };
    let stored = verifier
        .repository
        .put_outcome(identity.system_identifier, &outcome);
    if let Err(error) = stored {
        tracing::warn!(%error, "the verdict is not recorded in the repository");
    }
}

struct Verifier {
    repository: Repository,
    wal: WalIdentity,
    deep: bool,
    /// Per branch, the decoder behind the last sealed segment.
    indexers: BTreeMap<Branch, WalIndexer>,
    problems: Vec<String>,
    /// What was declared lost, with a backup behind it: known, and mended as far as it can be.
    losses: Vec<String>,
    gaps: Vec<DeclaredGap>,
}

impl Verifier {
    /// Reads every object whole; how many there are.
    fn objects(&mut self) -> Result<usize> {
        let system = self.wal.system_identifier;
        let mut objects = self.repository.list(&format!("{system}/"))?;
        // Verdicts of earlier verifications are not what is verified.
        objects.retain(|(key, _)| !matches!(key, ObjectKey::Outcome(..)));
        for (key, _) in &objects {
            let verdict = match key {
                ObjectKey::Segment(..) | ObjectKey::Tail(..) => self.wal_object(key)?,
                ObjectKey::BackupInfo(_, id) => self.backup(id)?,
                ObjectKey::History(_, branch) => self.history(*branch, key)?,
                // The second copy is compared with the first, slices and manifests with their backup; declared losses
                // were read at the start.
                ObjectKey::HistoryCopy(..)
                | ObjectKey::BackupSlice(..)
                | ObjectKey::BackupManifest(..)
                | ObjectKey::Gap(..)
                | ObjectKey::Outcome(..)
                | ObjectKey::Epoch(_) => None,
            };
            self.problems
                .extend(verdict.map(|problem| format!("{key}: {problem}")));
        }
        Ok(objects.len())
    }

    fn wal_object(&mut self, key: &ObjectKey) -> Result<Option<String>> {
        let object = self.repository.get(key)?;
        let mut wal = Vec::new();
        let reader = match SealedReader::open(&object) {
            Ok(reader) => reader,
            Err(error) => return Ok(Some(error.to_string())),
        };
        if let Err(error) = reader.read_all(&mut wal) {
            return Ok(Some(error.to_string()));
        }
        let header = reader.header();
        if header.key() != *key {
            return Ok(Some(format!("it holds {}", header.key())));
        }
        if !self.deep {
            return Ok(None);
        }
        let whole = header.is_whole_segment();
        let mut indexer = match self.indexers.remove(&header.branch) {
            Some(indexer) if whole && indexer.position() == header.start_lsn => indexer,
            // A tail in the middle of a page can not be decoded alone; its frames were checked.
            _ if !whole && header.start_lsn.page_offset() != 0 => return Ok(None),
            _ => WalIndexer::new(self.wal, header.start_lsn, None),
        };
        if let Err(error) = indexer.push(&wal) {
            return Ok(Some(error.to_string()));
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
        Ok(missing.map(|transaction| {
            format!(
                "its summary lacks the transaction end at {}",
                transaction.lsn
            )
        }))
    }

    fn history(&self, branch: Branch, key: &ObjectKey) -> Result<Option<String>> {
        let system = self.wal.system_identifier;
        let content = self.repository.get(key)?;
        let copy = ObjectKey::HistoryCopy(system, branch);
        if Branch::of_history(branch.timeline, &content) != branch {
            return Ok(Some("its content is not what its name says".to_owned()));
        }
        if let Err(error) = TimelineHistory::parse(branch.timeline, &content) {
            return Ok(Some(error.to_string()));
        }
        match self.repository.head(&copy)? {
            None => Ok(Some("its second copy is missing".to_owned())),
            Some(_) if self.repository.get(&copy)? != content => {
                Ok(Some("its second copy differs".to_owned()))
            }
            Some(_) => Ok(None),
        }
    }

    fn backup(&self, id: &BackupId) -> Result<Option<String>> {
        let system = self.wal.system_identifier;
        let content = self
            .repository
            .get(&ObjectKey::BackupInfo(system, id.clone()))?;
        let info: BackupInfo = match serde_json::from_slice(&content) {
            Ok(info) => info,
            Err(error) => return Ok(Some(format!("it can not be read: {error}"))),
        };
        let slices = info.slices.iter().map(|slice| {
            let key = ObjectKey::BackupSlice(system, id.clone(), slice.archive, slice.number);
            (key, &slice.sha256)
        });
        let manifest = ObjectKey::BackupManifest(system, id.clone());
        for (key, sha256) in slices.chain([(manifest, &info.manifest_sha256)]) {
            if self.repository.head(&key)?.is_none() {
                return Ok(Some(format!("{key} is missing")));
            }
            let found = hex::encode(Sha256::digest(self.repository.get(&key)?));
            if found != *sha256 {
                return Ok(Some(format!(
                    "{key} is damaged: SHA-256 {found}, recorded {sha256}"
                )));
            }
        }
        Ok(None)
    }

    /// From the oldest backup on, every byte of WAL has to be there.
    fn continuity(&mut self) -> Result<()> {
        let catalog = Catalog::open_for_restore(None, &self.repository)?;
        let backups = catalog.backups()?;
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
                    self.problems.push(format!(
                        "backup {} can not be restored: WAL {end} to {} of timeline branch {branch} is missing",
                        backup.id, backup.stop_lsn
                    ));
                }
            }
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
            _ => self.problems.push(format!(
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
        let Some(parent) = history.and_then(|history| history.ancestors.last()) else {
            return Ok(());
        };
        for backup in backups {
            let on_parent =
                backup.branch.timeline == parent.timeline && backup.start_lsn < parent.switch_lsn;
            if !on_parent {
                continue;
            }
            let end = catalog.contiguous_end(backup.branch, backup.start_lsn)?;
            let needed = parent.switch_lsn.align_down(size.bytes());
            if end < needed {
                self.problems.push(format!(
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
