//! [`Repository`]: one cluster's objects in a store.
//!
//! Invariant: objects are written once and never changed. If an object of the same name exists, a
//! put succeeds when the bytes are equal and fails with [`Error::Conflict`] when they differ. All
//! objects of a cluster are stored below its system identifier, so another cluster under the same
//! name is refused before it writes.

use std::{ops::ControlFlow, ops::Range, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use wal_format::{
    ClusterName, ObjectKey, PgTimestamp, PgVersion, SegmentSize, SystemIdentifier, checked_json,
};

use crate::{
    Error, ObjectMeta, ObjectStore, PutOutcome, Result,
    config::{RepositoryPlace, RepositoryUrl},
    epochs::{Epoch, EpochCopy},
    known_archive::{KnownArchive, each_known},
    sound::is_sound,
    store::{
        EncryptedStore, LocalStore, MemberState, MirroredStore, ObservedStore, Observer, OpenPuts,
        Pin, PinnedStore, S3AsOf, S3Store, Witness,
    },
};

/// The version of the epoch file that this build writes.
pub(crate) const EPOCH_FORMAT_VERSION: u32 = 1;

/// The cluster that is archived under a name in the repository (`epoch/{n}.json`,
/// `epoch-copy/{n}.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    /// The format version, 1.
    pub format_version: u32,
    /// The cluster's name.
    pub cluster: ClusterName,
    /// The system identifier that `initdb` gave it.
    pub system_identifier: SystemIdentifier,
    /// PostgreSQL's major version.
    pub postgresql_major: PgVersion,
    /// The server's `wal_segment_size`.
    pub wal_segment_size: SegmentSize,
    /// The time when the cluster was first archived.
    pub created: PgTimestamp,
}

/// One cluster's objects in a store. A clone shares the store.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    cluster: ClusterName,
    /// The system identifier whose epoch is read; `None` for the newest epoch.
    system: Option<SystemIdentifier>,
    /// With several places: each of them as a repository, and the store with their queues.
    mirror: Option<Mirror>,
    /// This host's record of the archive; `None` for a reader, which accepts the place as it is.
    known: Option<Arc<KnownArchive>>,
}

#[derive(Clone, Debug)]
struct Mirror {
    places: Vec<Repository>,
    store: Arc<MirroredStore>,
}

impl Mirror {
    /// Copies the epochs of the other places to each place that has none, before the claim writes
    /// an epoch there.
    fn share_epochs(&self) -> Result<()> {
        for place in &self.places {
            match place.list("epoch") {
                Ok(epochs) if epochs.is_empty() => {}
                Err(error) if !error.is_transient() => return Err(error),
                _ => continue,
            }
            for other in &self.places {
                let epochs = match other.list("epoch") {
                    Err(error) if error.is_transient() => continue,
                    epochs => epochs?,
                };
                place.store.create_place()?;
                for (key, _) in epochs {
                    match other.get(&key) {
                        Ok(body) if is_sound(&key, &body) => {
                            place.put(&key, &body)?;
                        }
                        // The object is damaged: copy the epoch's second copy instead.
                        Ok(_) | Err(Error::Damaged { .. } | Error::NotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }
}

impl Repository {
    /// Opens the store at `place` for `cluster`. Sends no request to a bucket yet.
    ///
    /// # Errors
    /// [`Error::Store`] when a folder cannot be opened or created, [`Error::Config`] when the
    /// settings of a bucket or the keys cannot be used.
    pub fn open(place: &RepositoryPlace, cluster: &ClusterName) -> Result<Self> {
        if !place.others.is_empty() {
            return Self::open_all(place, cluster);
        }
        if let Some(encrypted) = Self::encrypted(place, cluster)? {
            return Ok(Self::with_store(Arc::new(encrypted), cluster.clone()));
        }
        Ok(Self::with_store(open_store(place)?, cluster.clone()))
    }

    /// Opens a repository that is one folder without keys; returns `None` for any other place. A
    /// program that calls only this function does not link the client of a bucket, which starts
    /// slowly.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_plain_folder(
        place: &RepositoryPlace,
        cluster: &ClusterName,
    ) -> Result<Option<Self>> {
        let plain = place.others.is_empty() && place.encryption.is_none();
        let Some(folder) = place.url.folder().filter(|_| plain) else {
            return Ok(None);
        };
        let store = Arc::new(LocalStore::at(folder).shared_with(place.access.clone()));
        Ok(Some(Self::with_store(store, cluster.clone())))
    }

    /// Opens several places as one repository. Skips a folder that cannot be opened, as long as
    /// another place can be opened.
    fn open_all(place: &RepositoryPlace, cluster: &ClusterName) -> Result<Self> {
        let mut places = Vec::new();
        let mut failed = None;
        for one in place.each() {
            match Self::open(&one, cluster) {
                Ok(opened) => places.push(opened),
                Err(error @ Error::Store { .. }) => {
                    tracing::warn!(%error, "a repository is passed over until the next start");
                    failed = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if let (true, Some(error)) = (places.is_empty(), failed) {
            return Err(error);
        }
        let stores = places.iter().map(|one| Arc::clone(&one.store)).collect();
        let store = Arc::new(MirroredStore::new(
            stores,
            cluster.as_str(),
            place.required,
        )?);
        Ok(Self {
            store: Arc::clone(&store) as Arc<dyn ObjectStore>,
            cluster: cluster.clone(),
            system: None,
            mirror: Some(Mirror { places, store }),
            known: None,
        })
    }

    /// Pins the repository to this host's record of the archive.
    pub(crate) fn remembering(mut self, known: &KnownArchive) -> Self {
        if let Some(mirror) = &mut self.mirror {
            mirror.places = each_known(std::mem::take(&mut mirror.places), known);
        }
        self.with_known(&Arc::new(known.clone()))
    }

    pub(crate) fn with_known(self, known: &Arc<KnownArchive>) -> Self {
        match known.pin(&self.url()) {
            Some(pin) => self.store.pin(pin),
            None => self.store.expect_new(),
        }
        Self {
            known: Some(Arc::clone(known)),
            ..self
        }
    }

    pub(crate) fn known(&self) -> Option<&KnownArchive> {
        self.known.as_deref()
    }

    pub(crate) fn pin(&self, pin: Pin) {
        self.store.pin(pin);
    }

    pub(crate) fn witness(&self, key: &ObjectKey) -> Result<Option<Witness>> {
        self.store.witness(&self.path(key))
    }

    /// Checks now that this is still the repository that was opened. Objects that were put before
    /// this succeeds are in it: code that removes the last other copy of an object calls this
    /// first.
    ///
    /// # Errors
    /// [`Error::Gone`] when it is another place; [`Error::Store`], [`Error::S3`] when that cannot
    /// be known.
    pub fn confirm(&self) -> Result<()> {
        self.store.confirm()
    }

    /// Like [`Repository::confirm`], but only where the check costs no request. Other stores
    /// succeed without a check.
    ///
    /// # Errors
    /// As [`Repository::confirm`].
    pub fn confirm_free(&self) -> Result<()> {
        self.store.confirm_free()
    }

    /// Stores the wrapped keys of an encrypted repository again, if they were lost since they were
    /// read. Returns the names of those that were lost.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn put_back_keys(&self) -> Result<Vec<String>> {
        self.store.put_back_keys()
    }

    /// Synchronizes each of several places with the others from now on.
    pub fn keep_in_step(&self) {
        if let Some(mirror) = &self.mirror {
            mirror.store.keep_in_step();
        }
    }

    /// Returns the state of each of several places; empty for a single place.
    #[must_use]
    pub fn places(&self) -> Vec<MemberState> {
        let mirror = self.mirror.as_ref();
        mirror.map_or_else(Vec::new, |mirror| mirror.store.states())
    }

    /// Returns each of several places as a repository; a single place returns itself.
    pub(crate) fn each_place(&self) -> Vec<Self> {
        let alone = |place: &Self| Self {
            system: self.system,
            ..place.clone()
        };
        match &self.mirror {
            Some(mirror) => mirror.places.iter().map(alone).collect(),
            None => vec![self.clone()],
        }
    }

    /// Asks each of several places for an object that was stored. A place that lacks it is shown as
    /// behind and is filled from the others. A single place is not asked.
    pub fn check_each_place(&self, key: &ObjectKey) {
        if let Some(mirror) = &self.mirror {
            mirror.store.check_each(&self.path(key));
        }
    }

    /// Returns true if some of several places are reachable and others are not.
    #[must_use]
    pub fn is_partly_away(&self) -> bool {
        let places = self.places();
        let away = places.iter().filter(|place| place.error.is_some()).count();
        (1..places.len()).contains(&away)
    }

    /// Returns true if only such places of several answer that are known to lack objects: none of
    /// them proves that WAL is stored without a gap.
    #[must_use]
    pub fn only_lags(&self) -> bool {
        let mirror = self.mirror.as_ref();
        mirror.is_some_and(|mirror| mirror.store.only_lags())
    }

    /// Returns the store at `place` with its keys; `None` when no encryption is configured there.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn encrypted(
        place: &RepositoryPlace,
        cluster: &ClusterName,
    ) -> Result<Option<EncryptedStore>> {
        let Some(source) = &place.encryption else {
            return Ok(None);
        };
        let keys = Arc::new(source.load()?);
        let store = open_store(place)?;
        Ok(Some(EncryptedStore::new(store, cluster.as_str(), keys)))
    }

    /// Creates the repository of `cluster` in any store.
    #[must_use]
    pub fn with_store(store: Arc<dyn ObjectStore>, cluster: ClusterName) -> Self {
        Self {
            store,
            cluster,
            system: None,
            mirror: None,
            known: None,
        }
    }

    /// Reports each request of the repository to `observer`.
    #[must_use]
    pub fn observed(self, observer: Observer, puts: Arc<OpenPuts>) -> Self {
        let store = Arc::new(ObservedStore::new(self.store, observer, puts));
        Self { store, ..self }
    }

    /// Returns the name of the cluster.
    #[must_use]
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        &*self.store
    }

    pub(crate) fn system(&self) -> Option<SystemIdentifier> {
        self.system
    }

    pub(crate) fn with_system(&self, system: SystemIdentifier) -> Self {
        Self {
            system: Some(system),
            ..self.clone()
        }
    }

    /// Returns the location of the repository, for messages.
    #[must_use]
    pub fn url(&self) -> String {
        self.store.url()
    }

    /// Checks whether writing would work, as far as that can be known without writing an object.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`], which say what is missing.
    pub fn ready_to_write(&self) -> Result<()> {
        self.store.ready_to_write()
    }

    fn path(&self, key: &ObjectKey) -> String {
        format!("{}/{key}", self.cluster)
    }

    /// Returns true if the repository consists of several places.
    pub(crate) fn is_mirrored(&self) -> bool {
        self.mirror.is_some()
    }

    /// Returns true if nothing can be stored here yet: the place has to be created first.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn lacks_place(&self) -> Result<bool> {
        Ok(self.known.is_some() && !self.store.exists()?)
    }

    /// Writes an epoch's file unless it exists.
    pub(crate) fn create(&self, key: &ObjectKey, epoch: &ClusterIdentity) -> Result<PutOutcome> {
        let body =
            checked_json::to_vec(epoch).map_err(|error| self.damaged(key, error.to_string()))?;
        self.store.put_proved(&self.path(key), &body)
    }

    /// Claims the cluster's name for `found`, or checks that `found` is the cluster that has the
    /// name. Two concurrent claims agree on the first.
    ///
    /// # Errors
    /// [`Error::SystemIdentifierMismatch`] and other errors for a different cluster.
    pub fn claim(&self, found: &ClusterIdentity) -> Result<ClusterIdentity> {
        let Some(mirror) = &self.mirror else {
            return self.claim_one(found);
        };
        // Refuses if all places are empty and this host had an archive.
        match self.identity() {
            // A place that is unreachable may contain the identity. Then only a host that never had
            // an archive may begin one.
            Err(error) if error.is_transient() => self.must_be_new()?,
            found => drop(found?),
        }
        mirror.places.iter().try_for_each(Self::ready_to_remember)?;
        mirror.share_epochs()?;
        // Claim each place, because another cluster may own one of them.
        let mut outcome = None;
        for place in &mirror.places {
            match (place.claim_one(found), &outcome) {
                (Ok(known), _) => outcome = Some(Ok(known)),
                (Err(error), None | Some(Err(_))) if error.is_transient() => {
                    outcome = Some(Err(error));
                }
                (Err(error), Some(Ok(_))) if error.is_transient() => {}
                (Err(error), _) => return Err(error),
            }
        }
        outcome.unwrap_or_else(|| self.claim_one(found))
    }

    fn claim_one(&self, found: &ClusterIdentity) -> Result<ClusterIdentity> {
        if !self.store.exists()? {
            self.must_be_new()?;
            self.ready_to_remember()?;
            self.store.create_place()?;
        }
        let epoch = match self.newest_epoch()? {
            Some(epoch) => epoch,
            None => {
                self.must_be_new()?;
                self.ready_to_remember()?;
                // The first copy decides between two concurrent claims. The loser does not write
                // the second copy, because it would contain the loser's time of creation.
                if self.create(&ObjectKey::Epoch(1), found)? == PutOutcome::Created
                    && let Err(error) = self.create(&ObjectKey::EpochCopy(1), found)
                {
                    tracing::debug!(%error, "the second copy of the identity is written later");
                }
                // Read once more: a claim with encryption and one without write different names and
                // do not conflict.
                self.newest_epoch()?.unwrap_or_else(|| Epoch {
                    number: 1,
                    identity: found.clone(),
                    copies: [EpochCopy::Intact, EpochCopy::Missing],
                })
            }
        };
        let known = epoch.identity.clone();
        let (cluster, url) = (self.cluster.clone(), self.url());
        if known.system_identifier != found.system_identifier {
            let (expected, found) = (known.system_identifier, found.system_identifier);
            return Err(Error::SystemIdentifierMismatch {
                cluster,
                url,
                expected,
                found,
            });
        }
        if known.postgresql_major != found.postgresql_major {
            let (expected, found) = (known.postgresql_major, found.postgresql_major);
            return Err(Error::MajorVersionMismatch {
                cluster,
                url,
                expected,
                found,
            });
        }
        if known.wal_segment_size != found.wal_segment_size {
            let expected = known.wal_segment_size.bytes();
            let found = found.wal_segment_size.bytes();
            return Err(Error::SegmentSizeMismatch {
                cluster,
                url,
                expected,
                found,
            });
        }
        self.ready_to_remember()?;
        self.heal_epoch(&epoch);
        self.remember(known.system_identifier)?;
        Ok(known)
    }

    /// Stores an object. It is durable, and proved to be stored, when the function returns. Storing
    /// the same bytes again gives [`PutOutcome::AlreadyExists`].
    ///
    /// # Errors
    /// [`Error::Conflict`] when an object of this name has other bytes; nothing is overwritten.
    pub fn put(&self, key: &ObjectKey, body: &[u8]) -> Result<PutOutcome> {
        let outcome = self.store.put_proved(&self.path(key), body)?;
        self.same(key, body, outcome)
    }

    /// Like [`Repository::put`], for a caller that reads the object back itself: an acknowledgement
    /// from the store is not proof.
    ///
    /// # Errors
    /// As [`Repository::put`].
    pub fn put_unproved(&self, key: &ObjectKey, body: &[u8]) -> Result<PutOutcome> {
        let outcome = self.store.put_if_absent(&self.path(key), body)?;
        self.same(key, body, outcome)
    }

    fn same(&self, key: &ObjectKey, body: &[u8], outcome: PutOutcome) -> Result<PutOutcome> {
        if outcome == PutOutcome::AlreadyExists && self.get(key)? != body {
            return Err(Error::Conflict {
                key: key.clone(),
                url: self.url(),
            });
        }
        Ok(outcome)
    }

    /// Reads a whole object. With several places, reads it from the first one with an intact copy.
    /// If no copy is intact, returns the bytes of a damaged one.
    ///
    /// # Errors
    /// [`Error::NotFound`] when proved absent, [`Error::Store`].
    pub fn get(&self, key: &ObjectKey) -> Result<Bytes> {
        if self.mirror.is_none() {
            return self.in_cluster(self.store.get(&self.path(key)));
        }
        self.get_sound(key, &|body| is_sound(key, body))
    }

    /// Reads an object back and returns true if it equals `body`. With several places, reads the
    /// first intact copy.
    ///
    /// # Errors
    /// As [`Repository::get`].
    pub fn holds(&self, key: &ObjectKey, body: &[u8]) -> Result<bool> {
        if self.mirror.is_none() {
            return self.store.holds(&self.path(key), body);
        }
        Ok(self.get(key)? == body)
    }

    /// Reads a whole object. With several places, reads it from the first one with a copy that
    /// `sound` accepts. If there is none, returns the bytes of a damaged one.
    ///
    /// # Errors
    /// As [`Repository::get`].
    pub fn get_sound(&self, key: &ObjectKey, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.in_cluster(self.store.get_sound(&self.path(key), sound))
    }

    /// Reads a range of an object.
    ///
    /// # Errors
    /// As [`Repository::get`].
    pub fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes> {
        self.in_cluster(self.store.get_range(&self.path(key), range))
    }

    /// Replaces the name in an error about a damaged object by its name in the cluster, which
    /// [`ObjectKey`] parses. A store that detects the damage itself knows only the name in the
    /// store.
    fn in_cluster<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| match error {
            Error::Damaged { key, url, problem } => {
                let root = format!("{}/", self.cluster);
                let key = key.strip_prefix(&root).map_or(key.clone(), str::to_owned);
                Error::Damaged { key, url, problem }
            }
            error => error,
        })
    }

    /// Returns the object's metadata, or `None` when the object is proved absent.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn head(&self, key: &ObjectKey) -> Result<Option<ObjectMeta>> {
        self.store.head(&self.path(key))
    }

    /// Returns the objects below a prefix of the cluster, in ascending order, with their lengths.
    /// Skips names that are not keys of ours.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn list(&self, prefix: &str) -> Result<Vec<(ObjectKey, u64)>> {
        let root = format!("{}/", self.cluster);
        let mut found = Vec::new();
        self.store.list(&format!("{root}{prefix}"), &mut |object| {
            if let Some(key) = object
                .key
                .strip_prefix(&root)
                .and_then(|key| key.parse().ok())
            {
                found.push((key, object.size));
            }
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    /// Returns the names below the cluster that are not keys of ours.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn foreign_names(&self) -> Result<Vec<String>> {
        let root = format!("{}/", self.cluster);
        let mut names = Vec::new();
        self.store.list(&root, &mut |object| {
            let key = object.key.strip_prefix(&root).unwrap_or_default();
            if key.parse::<ObjectKey>().is_err() {
                names.push(object.key);
            }
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }

    /// Like [`Repository::list`], but calls `visit` for each object, so the objects are not
    /// collected in memory here.
    ///
    /// # Errors
    /// [`Error::Store`]; the first error of `visit`, which ends the listing.
    pub fn visit(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectKey, u64) -> Result<()>,
    ) -> Result<()> {
        let root = format!("{}/", self.cluster);
        let mut failed = Ok(());
        self.store.list(&format!("{root}{prefix}"), &mut |object| {
            let key = object.key.strip_prefix(&root);
            if let Some(key) = key.and_then(|key| key.parse().ok()) {
                failed = visit(key, object.size);
            }
            if failed.is_err() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        failed
    }

    /// Removes an object.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.store.delete(&self.path(key))
    }

    pub(crate) fn damaged(&self, key: &ObjectKey, problem: String) -> Error {
        Error::Damaged {
            key: key.to_string(),
            url: self.url(),
            problem,
        }
    }
}

/// Opens the store at a place, without decryption.
pub(crate) fn open_store(place: &RepositoryPlace) -> Result<Arc<dyn ObjectStore>> {
    Ok(match &place.url {
        RepositoryUrl::Folder(folder) => {
            Arc::new(LocalStore::at(folder).shared_with(place.access.clone()))
        }
        RepositoryUrl::S3 { bucket, prefix } if place.as_of.is_some() => {
            let at = place.as_of.unwrap_or_default();
            let requests = place.requests.clone();
            let patience = place.patience;
            let view = S3AsOf::open(bucket, prefix, &place.s3, requests, patience, at)?;
            Arc::new(view)
        }
        RepositoryUrl::S3 { bucket, prefix } => Arc::new(PinnedStore::new(S3Store::open(
            bucket,
            prefix,
            &place.s3,
            place.requests.clone(),
            place.patience,
        )?)),
    })
}
