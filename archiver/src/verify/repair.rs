//! `wal-archiver verify --repair`: an intact copy in the place of what is damaged or missing: from
//! another repository, from the second copy that small objects have, or built again from what the
//! archive proves.
//!
//! Invariant: nothing is overwritten. A damaged object goes only when an intact copy of it is in
//! hand, and an object that the store does not let go stays and is named.

use std::collections::BTreeSet;

use bytes::Bytes;
use repository::{ClusterIdentity, ExpiredSet, Repository, config::RepositoryPlace, is_sound};
use sha2::{Digest, Sha256};
use wal_format::{BackupInfo, ClusterName, ObjectKey, checked_json};

use super::Findings;
use crate::error::{Error, Result};

/// The parts of a backup, each with its SHA-256.
pub(super) fn parts(info: &BackupInfo) -> Vec<(ObjectKey, String)> {
    let slices = info
        .slices
        .iter()
        .map(|slice| (info.slice_key(slice), slice.sha256.clone()));
    let manifest = (info.manifest_key(), info.manifest_sha256.clone());
    slices.chain([manifest]).collect()
}

/// The data keys and the plain objects of an encrypted place; empty for another one.
#[derive(Debug, Default)]
pub(super) struct EncryptedState {
    /// Problems of wrapped data keys.
    pub(super) broken: Vec<String>,
    /// Objects that are not encrypted.
    pub(super) plain: Vec<String>,
}

/// Per place, what is wrong with the data keys of its encrypted objects, and what is not encrypted
/// there.
pub(super) fn keys(
    cluster: &ClusterName,
    places: &[RepositoryPlace],
) -> Result<Vec<EncryptedState>> {
    let mut all = Vec::new();
    for place in places {
        let mut state = EncryptedState::default();
        if let Some(encrypted) = Repository::encrypted(place, cluster)? {
            for (name, sound) in encrypted.broken_keys(false)? {
                state.broken.push(match sound {
                    true => format!("{name} is damaged or lost; its copy is intact"),
                    false => format!("{name} is damaged or lost, and its copy too"),
                });
            }
            state.plain = encrypted.plain_objects()?;
        }
        all.push(state);
    }
    Ok(all)
}

/// Puts the intact copy of each wrapped data key in the place of a broken one.
pub(crate) fn repair_keys(
    cluster: &ClusterName,
    places: &[RepositoryPlace],
    say: &dyn Fn(&str),
) -> Result<()> {
    for place in places {
        if let Some(encrypted) = Repository::encrypted(place, cluster)? {
            for (name, sound) in encrypted.broken_keys(true)? {
                if sound {
                    say(&format!("{name} in {place} was repaired from its copy"));
                }
            }
        }
    }
    Ok(())
}

/// The key in an error's words, with or without the cluster.
pub(super) fn key_of(place: &Repository, text: &str) -> Option<ObjectKey> {
    let root = format!("{}/", place.cluster());
    text.strip_prefix(&root).unwrap_or(text).parse().ok()
}

/// Per place, the objects that another one has and it lacks. A tail whose segment it has is not
/// missing.
pub(super) fn missing(
    places: &[Repository],
    identity: &ClusterIdentity,
) -> Result<Vec<Vec<ObjectKey>>> {
    let mut names: Vec<BTreeSet<String>> = Vec::new();
    let mut given_up = Vec::new();
    for place in places {
        given_up.push(place.expired(identity.system_identifier)?);
        let listed = place.list("")?;
        names.push(listed.into_iter().map(|(key, _)| key.to_string()).collect());
    }
    let all: BTreeSet<&String> = names.iter().flatten().collect();
    let of = |(have, given_up): (&BTreeSet<String>, &ExpiredSet)| {
        let lacking = all.iter().filter(|name| !have.contains(**name));
        lacking
            .filter_map(|name| name.parse().ok())
            .filter(|key| !given_up.hides(key, identity.wal_segment_size))
            .filter(|key| match key {
                ObjectKey::Tail(system, branch, name, _, _) => {
                    !have.contains(&ObjectKey::Segment(*system, *branch, *name).to_string())
                }
                // Each place removes old ones on its own, and has its own retention.
                ObjectKey::Expired(..) | ObjectKey::Outcome(..) => false,
                _ => true,
            })
            .collect()
    };
    Ok(names.iter().zip(&given_up).map(of).collect())
}

/// Repairs what can be repaired, and says a line for each attempt. Returns how many objects were
/// put.
pub(crate) fn repair(
    places: &[Repository],
    findings: &[Findings],
    say: &dyn Fn(&str),
) -> Result<usize> {
    let mut repaired = 0;
    for (at, (place, findings)) in places.iter().zip(findings).enumerate() {
        let mut keys: Vec<&ObjectKey> = findings
            .problems
            .iter()
            .filter_map(|problem| problem.key.as_ref())
            .collect();
        // Of a history file that is lost only one copy is named.
        let twins: Vec<ObjectKey> = keys.iter().filter_map(|key| twin(key)).collect();
        let is_lost = |twin: &&ObjectKey| matches!(twin, ObjectKey::HistoryCopy(..));
        keys.extend(twins.iter().filter(is_lost));
        // A backup appears with its description: that one last.
        keys.sort_by_key(|key| (matches!(key, ObjectKey::BackupInfo(..)), (*key).clone()));
        keys.dedup();
        for key in keys {
            let url = place.url();
            let copy = intact_copy(places, at, key)?;
            say(&match copy {
                None => format!("{key} in {url} stays as it is: there is no intact copy of it"),
                Some((_, body)) if holds(place, key, &body)? => continue,
                Some((from, body)) => match put(place, key, &body) {
                    Ok(()) => {
                        repaired += 1;
                        format!("{key} in {url} was repaired from {from}")
                    }
                    Err(error) if error.is_object_locked() => format!(
                        "{error}; an intact copy is in {from}, and a restore with both repositories uses it"
                    ),
                    Err(error) => return Err(error.into()),
                },
            });
        }
    }
    Ok(repaired)
}

/// The other copy of an object that is stored twice.
fn twin(key: &ObjectKey) -> Option<ObjectKey> {
    match key {
        ObjectKey::Epoch(number) => Some(ObjectKey::EpochCopy(*number)),
        ObjectKey::EpochCopy(number) => Some(ObjectKey::Epoch(*number)),
        ObjectKey::History(system, branch) => Some(ObjectKey::HistoryCopy(*system, *branch)),
        ObjectKey::HistoryCopy(system, branch) => Some(ObjectKey::History(*system, *branch)),
        _ => None,
    }
}

/// An intact copy of an object of the place at index `at`, and its source in words.
fn intact_copy(
    places: &[Repository],
    at: usize,
    key: &ObjectKey,
) -> Result<Option<(String, Bytes)>> {
    let place = &places[at];
    if let Some(twin) = twin(key)
        && let Some(body) = sound_copy(place, &twin)?
    {
        return Ok(Some((twin.to_string(), body)));
    }
    for (_, other) in places.iter().enumerate().filter(|(other, _)| *other != at) {
        for key in [Some(key.clone()), twin(key)].into_iter().flatten() {
            if let Some(body) = sound_copy(other, &key)? {
                return Ok(Some((other.url(), body)));
            }
        }
    }
    match key {
        ObjectKey::Epoch(number) | ObjectKey::EpochCopy(number) => {
            let epochs = place.read_epochs()?.known.into_iter();
            let mut derived = epochs.filter(|epoch| epoch.number == *number && epoch.is_derived());
            let Some(epoch) = derived.next() else {
                return Ok(None);
            };
            let body = checked_json::to_vec(&epoch.identity).map_err(|error| Error::Usage {
                message: format!("write {key}: {error}"),
            })?;
            Ok(Some(("what sealed objects say".to_owned(), body.into())))
        }
        ObjectKey::History(system, branch) | ObjectKey::HistoryCopy(system, branch) => {
            let rebuilt = place.rebuilt_history(*system, *branch)?;
            Ok(rebuilt.map(|(body, from)| (from, body)))
        }
        _ => Ok(None),
    }
}

/// Returns whether the place has exactly these bytes already.
fn holds(place: &Repository, key: &ObjectKey, body: &Bytes) -> Result<bool> {
    match place.get(key) {
        Ok(found) => Ok(found == *body),
        Err(repository::Error::Damaged { .. } | repository::Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// An object of a place, if it is proved to be what was stored.
fn sound_copy(place: &Repository, key: &ObjectKey) -> Result<Option<Bytes>> {
    let read = |key: &ObjectKey| match place.get(key) {
        Ok(body) => Ok(Some(body)),
        Err(repository::Error::Damaged { .. } | repository::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    };
    let Some(body) = read(key)? else {
        return Ok(None);
    };
    let sound = match key {
        ObjectKey::BackupSlice(system, id, ..) | ObjectKey::BackupManifest(system, id) => {
            let info_key = ObjectKey::BackupInfo(*system, id.clone());
            let info = read(&info_key)?;
            let info = info.and_then(|info| BackupInfo::parse_of(&info_key, &info).ok());
            let recorded = info.and_then(|info| {
                let mut parts = parts(&info).into_iter();
                parts.find(|(part, _)| part == key).map(|part| part.1)
            });
            recorded == Some(hex::encode(Sha256::digest(&body)))
        }
        _ => is_sound(key, &body),
    };
    Ok(sound.then_some(body))
}

/// Puts an intact copy in the place of whatever is there, and reads it back.
fn put(place: &Repository, key: &ObjectKey, body: &Bytes) -> repository::Result<()> {
    match place.put(key, body) {
        Err(repository::Error::Conflict { .. } | repository::Error::Damaged { .. }) => {
            place.delete(key)?;
            place.put(key, body)?;
        }
        outcome => {
            outcome?;
        }
    }
    if place.get(key)? == *body {
        return Ok(());
    }
    Err(repository::Error::Damaged {
        key: key.to_string(),
        url: place.url(),
        problem: "what was put there is not what is there".to_owned(),
    })
}
