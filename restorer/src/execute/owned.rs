//! [`Owned`]: the directories that already belong to the target of a restore.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::{
    claims::{self, Owner},
    place::{real, unfinished},
    recovery,
};
use crate::Result;

/// The directories that a restore may use although they contain files.
#[derive(Debug, Default)]
pub(crate) struct Owned {
    /// The tablespace links of an existing data directory, for `--delta`: OID and directory.
    linked: BTreeMap<u32, PathBuf>,
    /// The tablespace links of a restore that was interrupted.
    begun: BTreeMap<u32, PathBuf>,
    /// The linked directories that the operator named. If the server of this data directory has
    /// run, all linked directories.
    trusted: Vec<PathBuf>,
    /// The token of the restore that was interrupted or, with `--delta`, of the restore that wrote
    /// the data directory.
    token: Option<String>,
}

impl Owned {
    /// Determines these directories for the data directory `directory`, which may not exist.
    pub(crate) fn of(
        directory: &Path,
        delta: bool,
        mapping: &BTreeMap<PathBuf, PathBuf>,
    ) -> Result<Self> {
        let mut owned = Self::default();
        let marker = unfinished(directory)?;
        // A `--delta` restore that was interrupted before it claimed its directories has changed
        // nothing yet.
        if delta && marker.as_ref().is_none_or(|marker| marker.delta) {
            owned.linked = linked(directory);
            let used = was_used_by(directory);
            let named = |path: &&PathBuf| used || mapping.values().any(|new| new == *path);
            owned.trusted = owned.linked.values().filter(named).cloned().collect();
        }
        let owner = match marker {
            Some(marker) => marker.claim,
            None => plan_owner(directory).filter(|_| delta || recovery::was_interrupted(directory)),
        };
        let owner = owner.filter(|owner| is_at(owner, directory));
        owned.token = owner.map(|owner| owner.token);
        if owned.token.is_some() {
            owned.begun = linked(directory);
        }
        Ok(owned)
    }

    /// Returns true if `path` is the directory of this tablespace and belongs to no other server.
    pub(crate) fn has(&self, oid: u32, path: &Path) -> bool {
        let is_claimed = |token: &String| {
            // The replay of its creation has filled the directory and made the link.
            let is_replayed = self.begun.get(&oid).is_some_and(|linked| linked == path)
                && claims::is_of_token(path, token);
            is_replayed || claims::is_of(path, token)
        };
        (self.links_to(oid, path) && self.trusted.iter().any(|trusted| trusted == path))
            || self.token.as_ref().is_some_and(is_claimed)
    }

    /// Returns true if the data directory has a tablespace link with this OID to `path`.
    pub(super) fn links_to(&self, oid: u32, path: &Path) -> bool {
        self.linked.get(&oid).is_some_and(|linked| linked == path)
    }
}

/// Returns true if a server has run with this data directory, or if a restore has written it. The
/// directories to which its links lead then belong to it. A copy of a data directory (`cp -a`) has
/// the same links, but its files name the original directory.
pub(super) fn was_used_by(directory: &Path) -> bool {
    if plan_owner(directory).is_some_and(|owner| is_at(&owner, directory)) {
        return true;
    }
    // `postmaster.opts` contains the arguments of the last start, each in double quotes
    // (`CreateOptsFile` in `postmaster.c`).
    let Ok(options) = fs::read_to_string(directory.join("postmaster.opts")) else {
        return false;
    };
    options
        .split_once("\"-D\" \"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .is_some_and(|(path, _)| {
            Path::new(path).is_absolute() && real(Path::new(path)) == real(directory)
        })
}

/// Returns the owner that a complete restore recorded in its data directory. A copy of that
/// directory names the same owner.
pub(super) fn plan_owner(directory: &Path) -> Option<Owner> {
    claims::plan_in(directory).and_then(|plan| plan.claim)
}

pub(super) fn is_at(owner: &Owner, directory: &Path) -> bool {
    real(&owner.directory) == real(directory)
}

/// Returns the tablespaces of an existing data directory: OID and directory.
pub(super) fn linked(directory: &Path) -> BTreeMap<u32, PathBuf> {
    let links = fs::read_dir(directory.join("pg_tblspc"));
    let links = links.into_iter().flatten().flatten();
    links
        .filter_map(|link| {
            let oid = link.file_name().to_str()?.parse().ok()?;
            Some((oid, fs::read_link(link.path()).ok()?))
        })
        .collect()
}
