//! Extends the retention locks of what a cluster still needs, in a bucket with Object Lock.
//!
//! It works on the objects as they are stored, so that the wrapped keys of an encrypted cluster are
//! locked with what they open.

use std::{
    collections::{BTreeSet, HashMap},
    ops::ControlFlow,
};

use jiff::Timestamp;
use wal_format::{ClusterName, ObjectKey};

use crate::{
    Result,
    config::RepositoryPlace,
    repository::open_store,
    store::{ENCRYPTED_SUFFIX, LockOutcome, LockSpan},
};

/// The result of one run over the objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockReport {
    /// Objects whose lock lasts longer now.
    pub extended: usize,
    /// Objects that were locked for longer already.
    pub already: usize,
    /// Objects that are not needed: their locks end when they end.
    pub left: usize,
}

/// Locks that were seen: an object whose lock lasts long enough is not asked about again.
#[derive(Clone, Debug, Default)]
pub struct KnownLocks(HashMap<(String, String), Timestamp>);

/// Locks what of `cluster` is needed at `place`; with `dry_run` only counts it, as extended.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for a folder, [`Error::S3`](crate::Error::S3).
pub fn extend_locks(
    place: &RepositoryPlace,
    cluster: &ClusterName,
    span: LockSpan,
    needed: &dyn Fn(&ObjectKey) -> bool,
    known: &mut KnownLocks,
    dry_run: bool,
) -> Result<LockReport> {
    let store = open_store(place)?;
    let root = format!("{cluster}/");
    let mut keys = BTreeSet::new();
    store.list(&root, &mut |object| {
        keys.insert(object.key);
        ControlFlow::Continue(())
    })?;
    let mut report = LockReport::default();
    for key in &keys {
        if has_encrypted_form(key, &keys) {
            report.left += 1;
            continue;
        }
        let name = key.strip_prefix(&root).unwrap_or(key);
        let name = name.strip_suffix(ENCRYPTED_SUFFIX).unwrap_or(name);
        // Keys that are not part of the layout are the wrapped keys: they are always needed.
        let wanted = name.parse::<ObjectKey>().map_or(true, |key| needed(&key));
        let place = (store.url(), key.clone());
        if !wanted {
            report.left += 1;
        } else if known
            .0
            .get(&place)
            .is_some_and(|kept| *kept >= span.at_least)
        {
            report.already += 1;
        } else if dry_run {
            report.extended += 1;
        } else {
            let kept = match store.lock(&place.1, span)? {
                LockOutcome::Extended => {
                    report.extended += 1;
                    span.until
                }
                LockOutcome::AlreadyLonger(kept) => {
                    report.already += 1;
                    kept
                }
            };
            known.0.insert(place, kept);
        }
    }
    Ok(report)
}

/// Returns true for a plain object that a conversion has encrypted and could not remove because of
/// its lock: with a longer lock the conversion would never end.
fn has_encrypted_form(key: &str, keys: &BTreeSet<String>) -> bool {
    keys.contains(&format!("{key}{ENCRYPTED_SUFFIX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_object_is_superseded_by_its_encrypted_form_only() {
        let keys = ["main/a", "main/a.enc", "main/b", "main/c.enc"];
        let keys: BTreeSet<String> = keys.map(str::to_owned).into();
        let superseded: Vec<&String> = keys
            .iter()
            .filter(|key| has_encrypted_form(key, &keys))
            .collect();
        assert_eq!(superseded, ["main/a"]);
    }
}
