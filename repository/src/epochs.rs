//! Epochs: the successive system identifiers of a cluster's name (`epoch/{n}.json`, and a second
//! copy in `epoch-copy/`).
//!
//! `pg_upgrade` and `initdb` give a server a new system identifier. WAL of the new system is
//! archived under the name only after the operator has begun a new epoch. From then on the newest
//! epoch is archived. Every older epoch stays listed and restorable, since its objects are stored
//! below its own system identifier. An epoch of which no copy is intact is derived from the sealed
//! objects of its system identifier (`derive.rs`). Invariant: an epoch is never changed or removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

use wal_format::{ObjectKey, SystemIdentifier};

use crate::{
    ClusterIdentity, Error, PutOutcome, Repository, Result, repository::EPOCH_FORMAT_VERSION,
    store::ENCRYPTED_SUFFIX,
};

mod derive;
#[cfg(test)]
mod tests;

/// The system identifiers of a cluster's name, as they are stored and as its objects prove them.
#[derive(Clone, Debug, Default)]
pub struct Epochs {
    /// The epochs, oldest first. The last one is archived now.
    pub known: Vec<Epoch>,
    /// System identifiers with sealed WAL that no epoch names, when epochs newer than the known
    /// ones may be lost. Only an operator can decide whether they belong to this cluster.
    pub unnamed: Vec<ClusterIdentity>,
    /// Numbers of older epochs of which no copy is intact and which cannot be derived from a sealed
    /// object.
    pub lost: Vec<u32>,
}

/// One system identifier's period under a cluster's name.
#[derive(Clone, Debug)]
pub struct Epoch {
    /// The number: 1 for the first epoch, ascending with time.
    pub number: u32,
    /// The identity of the cluster during the epoch.
    pub identity: ClusterIdentity,
    /// The state of the two copies of its file: `epoch/`, then `epoch-copy/`.
    pub copies: [EpochCopy; 2],
}

/// The state of one copy of an epoch's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EpochCopy {
    /// The copy can be read.
    Intact,
    /// No such object exists.
    Missing,
    /// The object exists and cannot be read, for this reason.
    Damaged(String),
}

impl Epoch {
    /// Returns the keys of the two copies of epoch `number`.
    #[must_use]
    pub fn keys(number: u32) -> [ObjectKey; 2] {
        [ObjectKey::Epoch(number), ObjectKey::EpochCopy(number)]
    }

    /// Returns whether no copy of the file is intact, so that `identity` is derived from sealed
    /// objects.
    #[must_use]
    pub fn is_derived(&self) -> bool {
        !self.copies.contains(&EpochCopy::Intact)
    }
}

/// The epochs that a listing of the repository names.
#[derive(Debug, Default)]
struct Listed {
    /// The copies that are listed, by number: `epoch/`, then `epoch-copy/`.
    numbers: BTreeMap<u32, [bool; 2]>,
    /// True if an encrypted epoch is listed, which a repository without keys cannot read.
    encrypted: bool,
}

impl Repository {
    /// Returns the cluster's identity in its newest epoch; `None` when nothing was ever archived
    /// under this name.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`]; [`Error::Key`] when the cluster is encrypted and no key is
    /// configured; [`Error::Damaged`] when no copy of the newest epoch's file is intact and it
    /// cannot be derived from a sealed object.
    pub fn identity(&self) -> Result<Option<ClusterIdentity>> {
        if self.system().is_none() && self.lacks_place()? {
            // This is a first start. The claim of the name creates the place.
            return self.must_be_new().map(|()| None);
        }
        match self.newest_epoch()? {
            Some(epoch) => Ok(Some(epoch.identity)),
            None if self.system().is_some() => Ok(None),
            None => self.must_be_new().map(|()| None),
        }
    }

    /// Like [`Repository::identity`], for a reader that restores. Also refuses when there is sealed
    /// WAL of a system identifier that no epoch names, since that may be the newest.
    ///
    /// # Errors
    /// As [`Repository::identity`]; [`Error::Damaged`] that names the system identifier.
    pub fn identity_to_restore(&self) -> Result<Option<ClusterIdentity>> {
        let mut epochs = self.read_epochs()?;
        if !epochs.unnamed.is_empty() {
            // Read again, because an epoch that began between the two listings gives the same
            // result.
            epochs = self.read_epochs()?;
        }
        if let (Some(unnamed), None) = (epochs.unnamed.first(), self.system()) {
            return Err(self.unnamed(unnamed.system_identifier, epochs.known.len()));
        }
        Ok(epochs.known.pop().map(|epoch| epoch.identity))
    }

    /// Returns the error for a system identifier that no epoch names.
    pub(crate) fn unnamed(&self, system: SystemIdentifier, known: usize) -> Error {
        let lost = ObjectKey::Epoch(u32::try_from(known).unwrap_or(0).saturating_add(1));
        let problem = format!(
            "it is missing in both copies, or {system}/ is another cluster's: sealed WAL of system identifier {system} is \
             there, and no epoch names it. Choose with --system; if it is this cluster's, `wal-archiver epoch begin \
             --system-identifier {system}` with its server running writes the epoch again"
        );
        self.damaged(&lost, problem)
    }

    /// Returns the newest epoch. Costs one listing, and one read while one of its copies is intact.
    pub(crate) fn newest_epoch(&self) -> Result<Option<Epoch>> {
        let listed = self.listed_epochs()?;
        if let Some(system) = self.system() {
            for (number, copies) in listed.numbers.iter().rev() {
                if let Some(epoch) = self.stored_epoch(*number, *copies)?
                    && epoch.identity.system_identifier == system
                {
                    return Ok(Some(epoch));
                }
            }
        } else if let Some((number, copies)) = listed.numbers.last_key_value()
            && let Some(epoch) = self.stored_epoch(*number, *copies)?
        {
            self.refuse_encrypted(&listed, true)?;
            return Ok(Some(epoch));
        }
        Ok(self.complete_epochs(&listed)?.known.pop())
    }

    /// Returns every epoch with its number, oldest first. A repository made with
    /// [`Repository::of_system`] returns only its own epoch.
    ///
    /// # Errors
    /// As [`Repository::identity`].
    pub fn epochs(&self) -> Result<Vec<(u32, ClusterIdentity)>> {
        let epochs = self.read_epochs()?.known.into_iter();
        Ok(epochs.map(|epoch| (epoch.number, epoch.identity)).collect())
    }

    /// Returns every epoch with the state of its copies, and the system identifiers that no epoch
    /// names.
    ///
    /// # Errors
    /// As [`Repository::identity`].
    pub fn read_epochs(&self) -> Result<Epochs> {
        self.complete_epochs(&self.listed_epochs()?)
    }

    /// Lists both copies of every epoch in one request.
    fn listed_epochs(&self) -> Result<Listed> {
        let root = format!("{}/", self.cluster());
        let mut listed = Listed::default();
        self.store().list(&format!("{root}epoch"), &mut |object| {
            let name = object.key.strip_prefix(&root).unwrap_or_default();
            match name.parse() {
                Ok(ObjectKey::Epoch(number)) => {
                    listed.numbers.entry(number).or_default()[0] = true;
                }
                Ok(ObjectKey::EpochCopy(number)) => {
                    listed.numbers.entry(number).or_default()[1] = true;
                }
                _ => {
                    let plain = name.strip_suffix(ENCRYPTED_SUFFIX).map(str::parse);
                    listed.encrypted |= matches!(
                        plain,
                        Some(Ok(ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_)))
                    );
                }
            }
            ControlFlow::Continue(())
        })?;
        Ok(listed)
    }

    /// Refuses an encrypted cluster, so that a repository without keys does not treat it as empty
    /// or unencrypted. If an unencrypted epoch is intact, only data keys prove the encryption:
    /// without data keys an encrypted object cannot be read by anybody.
    fn refuse_encrypted(&self, listed: &Listed, has_plain: bool) -> Result<()> {
        if listed.encrypted && (!has_plain || has_data_keys(&self.folders("")?)) {
            return Err(self.encrypted_without_key());
        }
        Ok(())
    }

    pub(super) fn encrypted_without_key(&self) -> Error {
        Error::Key {
            cluster: self.cluster().to_string(),
            url: self.url(),
            problem: "its objects are encrypted; name their key in encryption_key_file, encryption_key_env or \
                      encryption_key_command"
                .to_owned(),
        }
    }

    /// Reads the copies of one epoch. `None` when neither is intact.
    fn stored_epoch(&self, number: u32, listed: [bool; 2]) -> Result<Option<Epoch>> {
        let (mut identity, mut newer) = (None, None);
        let mut copies = [EpochCopy::Missing, EpochCopy::Missing];
        let keys = Epoch::keys(number);
        for ((key, copy), listed) in keys.iter().zip(&mut copies).zip(listed) {
            if !listed {
                continue;
            }
            // Read the second copy only if the first one is not intact.
            if identity.is_some() {
                *copy = EpochCopy::Intact;
                continue;
            }
            match self.record::<ClusterIdentity>(key) {
                Ok(found) if found.format_version == EPOCH_FORMAT_VERSION => {
                    identity = Some(found);
                    *copy = EpochCopy::Intact;
                }
                Ok(found) => {
                    let version = found.format_version;
                    let problem = format!(
                        "format version {version} is newer than this build; use a newer Tidemark"
                    );
                    newer = Some(self.damaged(key, problem));
                }
                Err(Error::Damaged { problem, .. }) => {
                    tracing::error!(
                        event = "epoch_copy_damaged", %key, repository = %self.url(), problem,
                        "a copy of the cluster's identity is damaged; run `wal-archiver verify --repair`"
                    );
                    *copy = EpochCopy::Damaged(problem);
                }
                // The listing names an object that the store does not return.
                Err(Error::NotFound { .. }) => {
                    *copy = EpochCopy::Damaged(
                        "it is listed, and the store does not have it".to_owned(),
                    );
                }
                Err(error) => return Err(error),
            }
        }
        match (identity, newer) {
            (Some(identity), _) => Ok(Some(Epoch {
                number,
                identity,
                copies,
            })),
            (None, Some(newer)) => Err(newer),
            (None, None) => Ok(None),
        }
    }

    /// Reads the listed epochs. Derives the lost ones from the sealed objects of system identifiers
    /// that no epoch names.
    fn complete_epochs(&self, listed: &Listed) -> Result<Epochs> {
        let mut known = BTreeMap::new();
        let mut lost = BTreeSet::new();
        for (number, copies) in &listed.numbers {
            match self.stored_epoch(*number, *copies)? {
                Some(epoch) => {
                    known.insert(*number, epoch);
                }
                None => {
                    lost.insert(*number);
                }
            }
        }
        self.refuse_encrypted(listed, !known.is_empty())?;
        let folders = self.folders("")?;
        if listed.numbers.is_empty() {
            if has_data_keys(&folders) {
                return Err(self.encrypted_without_key());
            }
            // A listing may omit an object that exists, so read the first epoch by its name.
            let hidden = match self.stored_epoch(1, [true, true]) {
                // One of several places is unreachable; the listing left it out, too.
                Err(error) if error.is_transient() && self.is_mirrored() => None,
                hidden => hidden?,
            };
            if let Some(hidden) = hidden {
                known.insert(1, hidden);
            }
        }
        let named: BTreeSet<SystemIdentifier> = known
            .values()
            .map(|epoch| epoch.identity.system_identifier)
            .collect();
        let newest_stored = known.keys().next_back().copied();
        let mut unnamed = Vec::new();
        // System identifiers ascend with time: their upper half contains the second in which
        // `initdb` ran.
        for identity in self.derived_identities(&folders, &named)? {
            let number = (1..)
                .find(|number| !known.contains_key(number))
                .unwrap_or(0);
            let fits = newest_stored.is_none_or(|newest| number < newest) || lost.contains(&number);
            if !fits {
                unnamed.push(identity);
                continue;
            }
            lost.remove(&number);
            tracing::warn!(
                event = "identity_derived",
                cluster = %self.cluster(),
                repository = %self.url(),
                system_identifier = %identity.system_identifier,
                "no copy of epoch {number} is intact; the identity is derived from sealed objects: run \
                 `wal-archiver verify --repair`"
            );
            let copies = self.lost_copies(number, listed);
            known.insert(
                number,
                Epoch {
                    number,
                    identity,
                    copies,
                },
            );
        }
        let is_newest = |number: &&u32| match newest_stored {
            Some(newest) => newest < **number,
            None => known.is_empty(),
        };
        // A damaged newest epoch leaves the chosen system identifier as it is.
        let is_chosen = |epoch: &Epoch| self.system() == Some(epoch.identity.system_identifier);
        let is_found = known.values().any(is_chosen);
        if let Some(number) = lost.last().filter(is_newest)
            && !is_found
        {
            let reason = self.reason_of(*number, listed);
            let is_named = |system: &SystemIdentifier| {
                known
                    .values()
                    .any(|epoch| epoch.identity.system_identifier == *system)
            };
            let systems = folders.iter().filter_map(|name| name.parse().ok());
            let mut unnamed = systems.filter(|system| !is_named(system));
            let remedy = match (unnamed.next(), known.values().next_back()) {
                (Some(system), _) => format!("Remove nothing, because objects of system identifier {system} are archived"),
                (None, Some(epoch)) => format!(
                    "Nothing was archived in this epoch: remove both, and epoch {} is the newest one again. Until then, \
                     restore with --system {}",
                    epoch.number, epoch.identity.system_identifier
                ),
                (None, None) => {
                    "Nothing is archived under this name: remove both, and the next start writes them again".to_owned()
                }
            };
            let problem = format!(
                "neither it nor its copy in epoch-copy/ is intact, and no sealed object contains the identity: {reason}. \
                 {remedy}"
            );
            return Err(self.damaged(&ObjectKey::Epoch(*number), problem));
        }
        let mut known: Vec<Epoch> = known.into_values().collect();
        if let Some(system) = self.system() {
            known.retain(|epoch| epoch.identity.system_identifier == system);
            for identity in unnamed.iter().filter(|one| one.system_identifier == system) {
                known.push(Epoch {
                    number: 0,
                    identity: identity.clone(),
                    copies: [EpochCopy::Missing, EpochCopy::Missing],
                });
            }
        }
        Ok(Epochs {
            known,
            unnamed,
            lost: lost.into_iter().collect(),
        })
    }

    /// Returns the reason why an epoch's first listed copy cannot be read.
    fn reason_of(&self, number: u32, listed: &Listed) -> String {
        let listed = listed.numbers.get(&number).copied().unwrap_or_default();
        let keys = Epoch::keys(number);
        let first = keys.iter().zip(listed).find(|(_, listed)| *listed);
        let problem = first.map(|(key, _)| self.record::<ClusterIdentity>(key));
        match problem {
            Some(Err(Error::Damaged { problem, .. })) => problem,
            Some(Err(error)) => error.to_string(),
            Some(Ok(_)) | None => "it cannot be read".to_owned(),
        }
    }

    fn lost_copies(&self, number: u32, listed: &Listed) -> [EpochCopy; 2] {
        let listed = listed.numbers.get(&number).copied().unwrap_or_default();
        listed.map(|listed| match listed {
            true => EpochCopy::Damaged("it cannot be read".to_owned()),
            false => EpochCopy::Missing,
        })
    }

    /// Returns the same repository as it was while its cluster had this system identifier.
    ///
    /// # Errors
    /// [`Error::Config`], which lists the system identifiers of the cluster, when this is not one
    /// of them.
    pub fn of_system(&self, system: SystemIdentifier) -> Result<Self> {
        let chosen = self.with_system(system);
        if chosen.newest_epoch()?.is_some() {
            return Ok(chosen);
        }
        let epochs = self.read_epochs()?;
        let known = epochs.known.iter().map(|epoch| &epoch.identity);
        let known: Vec<String> = known
            .chain(&epochs.unnamed)
            .map(|identity| identity.system_identifier.to_string())
            .collect();
        Err(Error::config(format!(
            "{} holds nothing of system identifier {system} under cluster {}; it has {}",
            self.url(),
            self.cluster(),
            known.join(", ")
        )))
    }

    /// Writes the missing copies of an epoch's file. A damaged copy is left to `verify --repair`. A
    /// failure is only logged: a store that refuses writes can still be read.
    pub(crate) fn heal_epoch(&self, epoch: &Epoch) {
        for (key, copy) in Epoch::keys(epoch.number).iter().zip(&epoch.copies) {
            if *copy != EpochCopy::Missing {
                continue;
            }
            match self.create(key, &epoch.identity) {
                Ok(PutOutcome::Created) => {
                    tracing::info!(
                        event = "epoch_copy_written", %key, repository = %self.url(),
                        "a copy of the cluster's identity was missing and is written"
                    );
                }
                Ok(PutOutcome::AlreadyExists) => {}
                Err(error) => {
                    tracing::warn!(
                        event = "epoch_copy_missing", %key, %error,
                        "a copy of the cluster's identity is missing and cannot be written"
                    );
                }
            }
        }
    }

    /// Begins a new epoch: from now on the cluster's name belongs to `found`. `last` is the
    /// identity that had the name until now. Two processes that begin the same epoch at once agree.
    ///
    /// # Errors
    /// [`Error::SystemIdentifierMismatch`] when another epoch was begun meanwhile.
    pub fn begin_epoch(&self, last: &ClusterIdentity, found: &ClusterIdentity) -> Result<u32> {
        let newest = self.read_epochs()?.known.pop();
        let number = match newest {
            Some(newest) if newest.identity == *last => newest.number.saturating_add(1),
            Some(newest) if newest.identity.system_identifier == found.system_identifier => {
                return Ok(newest.number);
            }
            newest => return Err(self.overtaken(last, newest.map(|newest| newest.identity))),
        };
        // The first copy decides between two processes that begin an epoch at once.
        self.create(&ObjectKey::Epoch(number), found)?;
        let begun = self.stored_epoch(number, [true, false])?;
        match begun {
            Some(begun) if begun.identity.system_identifier == found.system_identifier => {
                self.heal_epoch(&begun);
                Ok(number)
            }
            other => Err(self.overtaken(found, other.map(|other| other.identity))),
        }
    }

    fn overtaken(&self, wanted: &ClusterIdentity, found: Option<ClusterIdentity>) -> Error {
        Error::SystemIdentifierMismatch {
            cluster: self.cluster().clone(),
            url: self.url(),
            expected: found.map_or(wanted.system_identifier, |found| found.system_identifier),
            found: wanted.system_identifier,
        }
    }
}

/// Returns whether one of these folders of a cluster contains data keys, which only an encrypted
/// cluster has.
fn has_data_keys(folders: &[String]) -> bool {
    folders
        .iter()
        .any(|name| name == "keys" || name == "keys-copy")
}
