//! The keys of one cluster in a store: data keys encrypt objects, key-encryption keys wrap data
//! keys.
//!
//! `keys/{data key}/{key-encryption key}.json` is a wrapped data key, and `keys-copy/…` is its
//! second copy. Re-wrapping adds such an object and changes nothing else.
//! Invariant: nothing is written or deleted while our keys cannot unwrap every data key of the
//! cluster. A user with the wrong key gets an error before any harm is done, and not on the day of
//! a restore.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::ControlFlow,
    sync::Arc,
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::conversion::{BEGUN, DONE, Marks};
use crate::{
    Error, ObjectStore, Result,
    encryption::{Key, KeyId, KeyRing},
};

const FORMAT_VERSION: u32 = 1;
/// The folders of wrapped keys below the cluster's root: one copy in each.
pub(super) const FOLDERS: [&str; 2] = ["keys", "keys-copy"];

/// The random name of a data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DataKeyId(pub(super) [u8; 16]);

impl fmt::Display for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A data key, from which the objects' own keys are derived.
#[derive(Clone)]
pub(super) struct DataKey {
    pub(super) id: DataKeyId,
    made: String,
    made_by: KeyId,
    key: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey({})", self.id)
    }
}

impl DataKey {
    /// Returns the key itself. Only the function that derives objects' keys from it calls this.
    pub(super) fn reveal(&self) -> &[u8] {
        &*self.key
    }

    #[cfg(test)]
    pub(super) fn of_test(id: [u8; 16], key: [u8; 32]) -> Self {
        Self {
            id: DataKeyId(id),
            made: String::new(),
            made_by: KeyId([0; 8]),
            key: Zeroizing::new(key),
        }
    }
}

/// The JSON object `keys/{data_key}/{wrapped_by}.json`.
#[derive(Debug, Serialize, Deserialize)]
struct WrappedKey {
    format_version: u32,
    data_key: String,
    made: String,
    made_by: String,
    wrapped_by: String,
    nonce: String,
    wrapped: String,
}

impl WrappedKey {
    /// The data that the wrapping authenticates.
    fn bound(&self) -> Aad<String> {
        Aad::from(format!(
            "tidemark data key v1\n{}\n{}\n{}\n{}",
            self.data_key, self.made, self.made_by, self.wrapped_by
        ))
    }
}

/// The known keys of a cluster.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    open: BTreeMap<DataKeyId, Arc<DataKey>>,
    /// Data keys that none of our keys can unwrap, with the keys that can.
    closed: BTreeMap<DataKeyId, Vec<String>>,
    /// Names of data keys of which no wrapped copy is intact, with the problem. Only objects under
    /// these keys are lost.
    broken: BTreeMap<DataKeyId, String>,
    wraps: BTreeSet<(DataKeyId, KeyId)>,
    /// The records of a conversion.
    pub(super) marks: Marks,
}

/// The location of a cluster's keys.
#[derive(Clone, Debug)]
pub(super) struct KeyStore {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) ring: Arc<KeyRing>,
    /// `{cluster}/`.
    pub(super) root: String,
}

impl Keys {
    pub(super) fn open(&self, id: DataKeyId) -> Option<Arc<DataKey>> {
        self.open.get(&id).cloned()
    }

    pub(super) fn is_closed(&self, id: DataKeyId) -> bool {
        self.closed.contains_key(&id)
    }

    pub(super) fn problem_of(&self, id: DataKeyId) -> Option<&str> {
        self.broken.get(&id).map(String::as_str)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.closed.is_empty()
    }

    /// Returns the newest data key that was created under a key-encryption key.
    pub(super) fn made_by(&self, key: KeyId) -> Option<Arc<DataKey>> {
        let made_by = self.open.values().filter(|data| data.made_by == key);
        made_by.max_by_key(|data| (&data.made, data.id)).cloned()
    }
}

impl KeyStore {
    /// Returns the data keys and the keys that wrap each of them. A name that exists only as the
    /// second copy counts.
    fn names(&self) -> Result<(BTreeMap<DataKeyId, BTreeSet<String>>, Marks)> {
        let mut names: BTreeMap<DataKeyId, BTreeSet<String>> = BTreeMap::new();
        let mut marks = Marks::default();
        // Lists both folders with one listing.
        let root = format!("{}keys", self.root);
        self.store.list(&root, &mut |object| {
            let below = object.key.strip_prefix(&self.root);
            marks.begun |= below == Some(BEGUN);
            marks.done_listed |= below == Some(DONE);
            let name = object.key.strip_prefix(&root);
            let name = name.and_then(|name| {
                name.strip_prefix("-copy/")
                    .or_else(|| name.strip_prefix('/'))
            });
            if let Some((id, by)) = name.and_then(parse_name) {
                names.entry(id).or_default().insert(by);
            }
            ControlFlow::Continue(())
        })?;
        Ok((names, marks))
    }

    /// Returns the wrapped keys of which one copy is lost or damaged: the name, and the other
    /// copy's content if that is intact.
    pub(super) fn broken(&self) -> Result<Vec<(String, Option<Bytes>)>> {
        let mut broken = Vec::new();
        for (id, wrapped_by) in self.names()?.0 {
            for by in wrapped_by {
                let key = self.ring.keys().find(|key| key.id.to_string() == by);
                let names = [self.name(id, &by), self.copy(id, &by)];
                let mut sound = Vec::new();
                for name in &names {
                    sound.push(self.sound(name, id, key)?);
                }
                for (name, (own, other)) in names.into_iter().zip([(0, 1), (1, 0)]) {
                    if sound[own].is_none() {
                        broken.push((name, sound[other].clone()));
                    }
                }
            }
        }
        Ok(broken)
    }

    /// Returns a wrapped key's object if it is intact. If it is wrapped with a key that we do not
    /// have, fewer checks are possible.
    fn sound(&self, name: &str, id: DataKeyId, key: Option<&Key>) -> Result<Option<Bytes>> {
        let json = match self.store.get(name) {
            Ok(json) => json,
            Err(Error::NotFound { .. } | Error::Damaged { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let authentic = match key {
            Some(key) => self.unwrap_object(name, id, key).map(drop),
            None => serde_json::from_slice::<WrappedKey>(&json)
                .map(drop)
                .map_err(|error| self.damaged(name, &error.to_string())),
        };
        match authentic {
            Ok(()) => Ok(Some(json)),
            Err(Error::NotFound { .. } | Error::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the broken copy with the intact one and reads it back.
    pub(super) fn mend(&self, name: &str, sound: &Bytes) -> Result<()> {
        self.store.delete(name)?;
        self.store.put_proved(name, sound).map(drop)
    }

    /// The remedy when the data keys of existing objects are lost.
    pub(super) fn remedy(&self) -> String {
        format!(
            "bring the files below {root}keys/ or {root}keys-copy/ back from a copy of the repository. A daemon that has \
             archived since before the loss stores them again by itself: leave it running. Without them the objects cannot \
             be read; do not remove the objects",
            root = self.root
        )
    }

    /// Stores the wrappings of each data key again of which no wrapping is left, and each lost copy
    /// of a wrapping. Returns the names of the lost objects. Costs one listing while nothing is
    /// lost.
    ///
    /// A wrapping of which both copies are gone stays away while the data key has another one: an
    /// operator may have removed it with its key.
    pub(super) fn put_back(&self, keys: &Keys) -> Result<Vec<String>> {
        let mut listed = BTreeSet::new();
        self.store
            .list(&format!("{}keys", self.root), &mut |object| {
                listed.insert(object.key);
                ControlFlow::Continue(())
            })?;
        let mut lost = Vec::new();
        for (id, by) in &keys.wraps {
            let names = [
                self.copy(*id, &by.to_string()),
                self.name(*id, &by.to_string()),
            ];
            let missing = names.iter().filter(|name| !listed.contains(*name));
            let missing: Vec<&String> = missing.collect();
            let left = names.iter().find(|name| listed.contains(*name));
            let folders = FOLDERS.map(|folder| format!("{}{folder}/{id}/", self.root));
            let is_left = |name: &String| folders.iter().any(|folder| name.starts_with(folder));
            let key = self.ring.keys().find(|key| key.id == *by);
            match (left, keys.open(*id).zip(key)) {
                _ if missing.is_empty() => continue,
                (Some(left), _) => {
                    let json = self.store.get(left)?;
                    for name in &missing {
                        self.store.put_proved(name, &json)?;
                    }
                }
                (None, Some((data, key))) if !listed.iter().any(is_left) => {
                    self.wrap(&data, key)?;
                }
                (None, _) => continue,
            }
            lost.extend(missing.into_iter().cloned());
        }
        Ok(lost)
    }

    /// Reads every data key that our keys can unwrap: one listing, and one object for each.
    pub(super) fn load(&self) -> Result<Keys> {
        let (names, marks) = self.names()?;
        let mut keys = Keys {
            marks,
            ..Keys::default()
        };
        for (id, wrapped_by) in names {
            match self.open_any(id, &wrapped_by)? {
                Some(Ok(data)) => {
                    keys.open.insert(id, Arc::new(data));
                }
                Some(Err(problem)) => {
                    tracing::error!(
                        event = "data_key_lost",
                        data_key = %id,
                        problem,
                        "no copy of a wrapped data key is intact; objects under it cannot be read"
                    );
                    keys.broken.insert(id, problem);
                }
                None => {
                    keys.closed.insert(id, wrapped_by.iter().cloned().collect());
                }
            }
            let known = wrapped_by.iter().filter_map(|by| by.parse().ok());
            keys.wraps.extend(known.map(|by| (id, by)));
        }
        Ok(keys)
    }

    /// Unwraps a data key with any of our keys. `None` when it is wrapped for other keys only; a
    /// problem when no copy of it is intact.
    fn open_any(
        &self,
        id: DataKeyId,
        wrapped_by: &BTreeSet<String>,
    ) -> Result<Option<std::result::Result<DataKey, String>>> {
        let mut problem = None;
        for key in self.ring.keys() {
            if !wrapped_by.contains(&key.id.to_string()) {
                continue;
            }
            match self.unwrap(id, key) {
                Ok(data) => return Ok(Some(Ok(data))),
                Err(error @ (Error::Damaged { .. } | Error::NotFound { .. })) => {
                    problem = Some(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        if problem.is_none() && self.is_junk(id, wrapped_by)? {
            problem = Some("no object under its name is a wrapped key".to_owned());
        }
        Ok(problem.map(Err))
    }

    /// Returns whether no object that is named like a wrapping of this data key contains one, in
    /// either copy.
    fn is_junk(&self, id: DataKeyId, wrapped_by: &BTreeSet<String>) -> Result<bool> {
        for by in wrapped_by {
            for name in [self.name(id, by), self.copy(id, by)] {
                if self.sound(&name, id, None)?.is_some() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Returns whether the cluster has data keys: then its objects are encrypted.
    pub(super) fn has_data_keys(&self) -> Result<bool> {
        Ok(!self.load()?.is_empty())
    }

    /// Returns whether an object's name is that of a wrapped key.
    pub(super) fn is_wrapped_key(&self, name: &str) -> bool {
        let name = name.strip_prefix(&self.root);
        let parts = name.and_then(|name| name.split_once('/'));
        parts.is_some_and(|(folder, name)| FOLDERS.contains(&folder) && parse_name(name).is_some())
    }

    /// Returns an error that names the missing keys, unless every data key of the cluster can be
    /// unwrapped.
    pub(super) fn check(&self, keys: &Keys) -> Result<()> {
        if keys.closed.is_empty() {
            return Ok(());
        }
        let wanted: BTreeSet<&str> = keys.closed.values().flatten().map(String::as_str).collect();
        let wanted: Vec<&str> = wanted.into_iter().collect();
        let ours: Vec<String> = self.ring.keys().map(|key| key.id.to_string()).collect();
        Err(self.problem(format!(
            "objects are encrypted for key {}, and the configured key is {}: add that key as a further line of \
             encryption_key_file (or of what stands in its place); nothing was changed",
            wanted.join(" or "),
            ours.join(" and ")
        )))
    }

    pub(super) fn problem(&self, problem: String) -> Error {
        Error::Key {
            cluster: self.root.trim_end_matches('/').to_owned(),
            url: self.store.url(),
            problem,
        }
    }

    /// Creates a data key under the first of our keys and stores it before anything is encrypted
    /// with it.
    pub(super) fn make(&self) -> Result<DataKey> {
        let mut id = DataKeyId([0; 16]);
        let mut key = Zeroizing::new([0; 32]);
        self.random(&mut id.0)?;
        self.random(&mut key[..])?;
        let made_by = self.ring.first().id;
        let made = jiff::Timestamp::now().to_string();
        let data = DataKey {
            id,
            made,
            made_by,
            key,
        };
        self.wrap(&data, self.ring.first())?;
        tracing::info!(repository = %self.store.url(), data_key = %id, key = %made_by, "a data key was made");
        Ok(data)
    }

    /// Wraps every data key that we can unwrap with each of our keys, where that wrapping is
    /// missing. Returns the number of wrappings added.
    pub(super) fn rewrap(&self, keys: &Keys) -> Result<usize> {
        let mut wrapped = 0;
        for data in keys.open.values() {
            for key in self.ring.keys() {
                if !keys.wraps.contains(&(data.id, key.id)) {
                    self.wrap(data, key)?;
                    wrapped += 1;
                }
            }
        }
        Ok(wrapped)
    }

    pub(super) fn random(&self, bytes: &mut [u8]) -> Result<()> {
        rand::fill(bytes).map_err(|_| self.problem("the system gives no random bytes".to_owned()))
    }

    fn wrap(&self, data: &DataKey, key: &Key) -> Result<()> {
        let mut nonce = [0; NONCE_LEN];
        self.random(&mut nonce)?;
        let mut wrapped = WrappedKey {
            format_version: FORMAT_VERSION,
            data_key: data.id.to_string(),
            made: data.made.clone(),
            made_by: data.made_by.to_string(),
            wrapped_by: key.id.to_string(),
            nonce: hex::encode(nonce),
            wrapped: String::new(),
        };
        let mut bytes = Zeroizing::new(data.key.to_vec());
        let tag = cipher(key)
            .and_then(|cipher| {
                let nonce = Nonce::assume_unique_for_key(nonce);
                cipher
                    .seal_in_place_separate_tag(nonce, wrapped.bound(), bytes.as_mut_slice())
                    .ok()
            })
            .ok_or_else(|| self.problem("a data key could not be wrapped".to_owned()))?;
        wrapped.wrapped = hex::encode([bytes.as_slice(), tag.as_ref()].concat());
        let json = serde_json::to_vec_pretty(&wrapped)
            .map_err(|error| self.problem(format!("write a data key: {error}")))?;
        let by = key.id.to_string();
        // Both copies, the second copy first: without its data key an archive cannot be read.
        for name in [self.copy(data.id, &by), self.name(data.id, &by)] {
            self.store.put_proved(&name, &json)?;
        }
        let name = self.name(data.id, &by);
        // Reads the stored key back, because it must be readable for as long as the archive exists.
        if *self.unwrap(data.id, key)?.key == *data.key {
            Ok(())
        } else {
            Err(self.damaged(&name, "it is not the key that was stored"))
        }
    }

    fn unwrap(&self, id: DataKeyId, key: &Key) -> Result<DataKey> {
        let by = key.id.to_string();
        match self.unwrap_object(&self.name(id, &by), id, key) {
            Err(error @ (Error::Damaged { .. } | Error::NotFound { .. })) => {
                tracing::error!(%error, "a wrapped data key is damaged or lost; its copy is used");
                self.unwrap_object(&self.copy(id, &by), id, key)
                    .map_err(|_| error)
            }
            outcome => outcome,
        }
    }

    fn unwrap_object(&self, name: &str, id: DataKeyId, key: &Key) -> Result<DataKey> {
        let json = self.store.get(name)?;
        let wrapped: WrappedKey = serde_json::from_slice(&json)
            .map_err(|error| self.damaged(name, &error.to_string()))?;
        if wrapped.format_version != FORMAT_VERSION {
            return Err(self.damaged(name, "its format version is newer than this build"));
        }
        let named = wrapped.data_key == id.to_string() && wrapped.wrapped_by == key.id.to_string();
        let nonce: Option<[u8; NONCE_LEN]> = hex::decode(&wrapped.nonce)
            .ok()
            .and_then(|nonce| nonce.try_into().ok());
        let bytes = hex::decode(&wrapped.wrapped).ok().map(Zeroizing::new);
        let opened = (named.then_some(()).and(nonce).zip(bytes)).and_then(|(nonce, mut bytes)| {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let opened = cipher(key)?
                .open_in_place(nonce, wrapped.bound(), &mut bytes)
                .ok()?;
            let key: [u8; 32] = (&*opened).try_into().ok()?;
            Some(Zeroizing::new(key))
        });
        let made_by = wrapped.made_by.parse().ok();
        match opened.zip(made_by) {
            Some((key, made_by)) => Ok(DataKey {
                id,
                made: wrapped.made,
                made_by,
                key,
            }),
            None => Err(self.damaged(name, "the data key in it is not authentic")),
        }
    }

    fn copy(&self, id: DataKeyId, by: &str) -> String {
        format!("{}keys-copy/{id}/{by}.json", self.root)
    }

    fn name(&self, id: DataKeyId, by: &str) -> String {
        format!("{}keys/{id}/{by}.json", self.root)
    }

    fn damaged(&self, name: &str, problem: &str) -> Error {
        Error::Damaged {
            key: name.to_owned(),
            url: self.store.url(),
            problem: problem.to_owned(),
        }
    }
}

fn cipher(key: &Key) -> Option<LessSafeKey> {
    let key = UnboundKey::new(&AES_256_GCM, key.reveal()).ok()?;
    Some(LessSafeKey::new(key))
}

fn parse_name(name: &str) -> Option<(DataKeyId, String)> {
    let (id, file) = name.split_once('/')?;
    let id: [u8; 16] = hex::decode(id).ok()?.try_into().ok()?;
    let by = file.strip_suffix(".json")?;
    let key: KeyId = by.parse().ok()?;
    // Accept only the exact spelling: we would not find an object with another spelling under the
    // name that we compute.
    (key.to_string() == by).then(|| (DataKeyId(id), by.to_owned()))
}
