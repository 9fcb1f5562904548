//! [`LockedObjects`]: the objects that the repository does not allow to be deleted.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use wal_format::ObjectKey;

/// The number of keys that are remembered, about 1 MiB. Beyond it all are forgotten, and an object
/// whose deletion is tried again is counted again.
const KEYS_MAX: usize = 10_000;

/// Counts each object once, although its deletion is tried again and again.
#[derive(Debug, Default)]
pub(super) struct LockedObjects(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    keys: HashSet<ObjectKey>,
    count: u64,
}

impl LockedObjects {
    /// Counts an object. Returns true for the first one.
    pub(super) fn add(&self, key: &ObjectKey) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.keys.len() >= KEYS_MAX {
            known.keys.clear();
        }
        if !known.keys.insert(key.clone()) {
            return false;
        }
        known.count += 1;
        known.count == 1
    }

    /// Returns the number of objects since the start.
    pub(super) fn count(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).count
    }
}

#[cfg(test)]
mod tests {
    use crate::cluster_status::locked_objects::*;

    #[test]
    fn an_object_counts_once_however_often_it_is_tried() {
        let locked = LockedObjects::default();
        let key = |number| ObjectKey::Epoch(number);
        assert!(locked.add(&key(1)));
        assert!(!locked.add(&key(1)));
        assert!(!locked.add(&key(2)));
        assert_eq!(locked.count(), 2);
    }
}
