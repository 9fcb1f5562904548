//! `wal-archiver verify --repair`: a sound copy from another repository in the place of what is damaged or missing.
//!
//! Invariant: nothing is overwritten. A damaged object goes only when a sound copy of it is in hand, and what the store
//! does not let go stays and is named.

use std::collections::BTreeSet;

use bytes::Bytes;
use repository::{ClusterIdentity, ExpiredSet, Repository, config::ClusterSettings, is_sound};
use sha2::{Digest, Sha256};
use wal_format::{BackupInfo, ObjectKey};

use super::{output, verify::Findings};
use crate::error::Result;

/// What a backup consists of, with the SHA-256 of each part.
pub(super) fn parts(info: &BackupInfo) -> Vec<(ObjectKey, String)> {
    let slices = info
        .slices
        .iter()
        .map(|slice| (info.slice_key(slice), slice.sha256.clone()));
    let manifest = (info.manifest_key(), info.manifest_sha256.clone());
    slices.chain([manifest]).collect()
}

/// Per place, what is wrong with the data keys of its encrypted objects. With `mend` the sound copy of each is put in the
/// place of the broken one, and said.
pub(super) fn keys(settings: &ClusterSettings, mend: bool) -> Result<Vec<Vec<String>>> {
    let mut all = Vec::new();
    for place in settings.repository.each() {
        let Some(encrypted) = Repository::encrypted(&place, &settings.name)? else {
            all.push(Vec::new());
            continue;
        };
        let mut problems = Vec::new();
        for (name, sound) in encrypted.broken_keys(mend)? {
            if mend && sound {
                output::line(&format!(
                    "cluster {}: {name} in {place} was repaired from its copy",
                    settings.name
                ));
            }
            problems.push(match sound {
                true => format!("{name} is damaged or lost; its copy is sound"),
                false => format!("{name} is damaged or lost, and its copy too"),
            });
        }
        all.push(problems);
    }
    Ok(all)
}

/// The key in an error's words, with or without the cluster.
pub(super) fn key_of(place: &Repository, text: &str) -> Option<ObjectKey> {
    let root = format!("{}/", place.cluster());
    text.strip_prefix(&root).unwrap_or(text).parse().ok()
}

/// Per place what the others have and it has not. A tail whose segment it has is not missing.
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
                // Each place forgets old ones by itself, and has its own retention.
                ObjectKey::Expired(..) | ObjectKey::Outcome(..) => false,
                _ => true,
            })
            .collect()
    };
    Ok(names.iter().zip(&given_up).map(of).collect())
}

/// Mends what can be mended, and how much that was; a line for each attempt.
pub(super) fn repair(
    places: &[Repository],
    findings: &[Findings],
    say: &dyn Fn(&str),
) -> Result<usize> {
    let mut mended = 0;
    for (at, (place, findings)) in places.iter().zip(findings).enumerate() {
        let mut keys: Vec<&ObjectKey> = findings
            .problems
            .iter()
            .filter_map(|problem| problem.key.as_ref())
            .collect();
        // A backup appears with its description: that one last.
        keys.sort_by_key(|key| matches!(key, ObjectKey::BackupInfo(..)));
        keys.dedup();
        for key in keys {
            let others = places.iter().enumerate().filter(|(other, _)| *other != at);
            let mut copy = None;
            for (_, other) in others {
                if let Some(body) = sound_copy(other, key)? {
                    copy = Some((other.url(), body));
                    break;
                }
            }
            let url = place.url();
            say(&match copy {
                None => {
                    format!("{key} in {url} stays as it is: no other repository has a sound copy")
                }
                Some((from, body)) => match put(place, key, &body) {
                    Ok(()) => {
                        mended += 1;
                        format!("{key} in {url} was repaired from {from}")
                    }
                    Err(error) if error.is_object_locked() => format!(
                        "{error}; a sound copy is in {from}, and a restore with both repositories uses it"
                    ),
                    Err(error) => return Err(error.into()),
                },
            });
        }
    }
    Ok(mended)
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
            let info = read(&ObjectKey::BackupInfo(*system, id.clone()))?;
            let info = info.and_then(|info| BackupInfo::parse(&info).ok());
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

/// Puts a sound copy in the place of whatever is there, and reads it back.
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
