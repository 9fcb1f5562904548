//! Synchronizes one place with the others: copies the objects that it lacks and removes the tails
//! that were replaced.
//!
//! Objects are written once, so comparing names is enough. A backup's `backup.json` is copied last,
//! and a tail is removed only when the segment that replaced it is in the place. So the place is
//! never a worse archive than before.

use std::{collections::BTreeMap, ops::ControlFlow, sync::Arc};

use wal_format::{Expired, ObjectKey, SegmentSize, SystemIdentifier, checked_json};

use crate::{ClusterIdentity, Error, ExpiredSet, ObjectStore, Result};

/// The result of a synchronization.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StepReport {
    pub(super) copied: usize,
    pub(super) removed: usize,
    /// The number of other places that could not be listed.
    pub(super) unlisted: usize,
    /// The number of objects that the place lacks and that could not be read elsewhere.
    pub(super) unread: usize,
    /// True if the comparison was stopped.
    pub(super) stopped: bool,
}

impl StepReport {
    /// Returns true if the place now has everything that the others have.
    pub(super) fn is_complete(&self) -> bool {
        self.unlisted == 0 && self.unread == 0 && !self.stopped
    }
}

fn names(store: &dyn ObjectStore, root: &str) -> Result<BTreeMap<String, Option<ObjectKey>>> {
    let mut names = BTreeMap::new();
    store.list(root, &mut |object| {
        let key = object.key.strip_prefix(root);
        if let Some(key) = key.and_then(|key| key.parse().ok()) {
            names.insert(object.key, Some(key));
        }
        ControlFlow::Continue(())
    })?;
    Ok(names)
}

/// Returns the name of the segment that replaces a tail; `None` for other objects.
fn replaced_by(key: &ObjectKey, root: &str) -> Option<String> {
    match key {
        ObjectKey::Tail(system, branch, name, _, _) => {
            let segment = ObjectKey::Segment(*system, *branch, *name);
            Some(format!("{root}{segment}"))
        }
        _ => None,
    }
}

/// Returns the position of an object in the order of copying.
fn rank(key: &ObjectKey) -> u8 {
    match key {
        ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_) => 0,
        ObjectKey::History(..) | ObjectKey::HistoryCopy(..) => 1,
        ObjectKey::BackupInfo(..) => 3,
        _ => 2,
    }
}

/// The objects that expired in a place, by system identifier. They are not copied there again.
struct GivenUp(Vec<(String, ExpiredSet, SegmentSize)>);

impl GivenUp {
    fn of(
        store: &dyn ObjectStore,
        root: &str,
        here: &BTreeMap<String, Option<ObjectKey>>,
        there: &[(&Arc<dyn ObjectStore>, BTreeMap<String, Option<ObjectKey>>)],
    ) -> Result<Self> {
        let mut records: BTreeMap<SystemIdentifier, Vec<Expired>> = BTreeMap::new();
        let mut sizes = BTreeMap::new();
        let any = here
            .values()
            .any(|key| matches!(key, Some(ObjectKey::Expired(..))));
        for (name, key) in here.iter().filter(|_| any) {
            match key {
                Some(ObjectKey::Expired(system, _)) => match store.get(name) {
                    Ok(body) => {
                        let record = serde_json::from_slice(&body).ok();
                        records.entry(*system).or_default().extend(record);
                    }
                    // The record was merged with others after it was listed. The places are
                    // compared again soon.
                    Err(error) if error.is_not_found() => {}
                    Err(error) => return Err(error),
                },
                Some(ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_)) => {
                    sizes.extend(size_of_epoch(store, name)?);
                }
                _ => {}
            }
        }
        // The place may have lost its own epochs. Then take the segment size from the others, so
        // that expired objects are not copied back from them.
        if records.keys().any(|system| !sizes.contains_key(system)) {
            for (other, names) in there {
                for (name, key) in names {
                    if matches!(key, Some(ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_))) {
                        sizes.extend(size_of_epoch(&***other, name)?);
                    }
                }
            }
        }
        let known = records.into_iter().filter_map(|(system, records)| {
            let size = sizes.get(&system)?;
            Some((format!("{root}{system}/"), records.into(), *size))
        });
        Ok(Self(known.collect()))
    }

    fn has(&self, name: &str, key: &ObjectKey) -> bool {
        let mut of_system = self
            .0
            .iter()
            .filter(|(prefix, ..)| name.starts_with(prefix));
        of_system.any(|(_, expired, size)| expired.hides(key, *size))
    }
}

/// Returns the system identifier and segment size of an epoch's file; `None` when the file is
/// damaged or absent.
fn size_of_epoch(
    store: &dyn ObjectStore,
    name: &str,
) -> Result<Option<(SystemIdentifier, SegmentSize)>> {
    let body = match store.get(name) {
        Ok(body) => body,
        Err(Error::Damaged { .. } | Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let epoch = checked_json::from_slice::<ClusterIdentity>(&body).ok();
    Ok(epoch.map(|epoch| (epoch.system_identifier, epoch.wal_segment_size)))
}

/// Copies to `store` the objects that `others` have and it lacks. Stops early when `stop` returns
/// true.
pub(super) fn catch_up(
    store: &dyn ObjectStore,
    others: &[Arc<dyn ObjectStore>],
    root: &str,
    stop: &dyn Fn() -> bool,
) -> Result<StepReport> {
    let mut here = names(store, root)?;
    let mut report = StepReport::default();
    let mut there = Vec::new();
    for other in others {
        match names(&**other, root) {
            Ok(names) => there.push((other, names)),
            Err(error) => {
                tracing::debug!(repository = %other.url(), %error, "a place cannot be listed and is not compared");
                report.unlisted += 1;
            }
        }
    }
    let given_up = GivenUp::of(store, root, &here, &there)?;
    for (other, names) in &there {
        let mut missing: Vec<(&String, &ObjectKey)> = names
            .iter()
            .filter_map(|(name, key)| Some((name, key.as_ref()?)))
            .filter(|(name, key)| {
                let replaced = replaced_by(key, root).is_some_and(|by| here.contains_key(&by));
                // Records of expiry belong to one place: its retention may be shorter than
                // another's.
                let own = matches!(key, ObjectKey::Expired(..));
                !here.contains_key(*name) && !replaced && !own && !given_up.has(name, key)
            })
            .collect();
        missing.sort_by_key(|(name, key)| (rank(key), (*name).clone()));
        for (name, key) in missing {
            if stop() {
                report.stopped = true;
                return Ok(report);
            }
            match other.get(name) {
                Ok(body) => {
                    store.put_if_absent(name, &body)?;
                    here.insert(name.clone(), Some(key.clone()));
                    report.copied += 1;
                }
                // The object was replaced after it was listed.
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    tracing::warn!(%error, "an object cannot be copied");
                    report.unread += 1;
                }
            }
        }
    }
    let replaced: Vec<String> = here
        .iter()
        .filter(|(_, key)| {
            let by = key.as_ref().and_then(|key| replaced_by(key, root));
            by.is_some_and(|by| here.contains_key(&by))
        })
        .map(|(name, _)| name.clone())
        .collect();
    for name in replaced {
        match store.delete(&name) {
            Ok(()) => report.removed += 1,
            Err(error) if error.is_object_locked() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}
