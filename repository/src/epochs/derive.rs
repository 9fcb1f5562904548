//! The identity of a cluster from its sealed objects, when no copy of its epoch's file is intact:
//! each object's footer has the system identifier, the major version and the segment size; the name
//! is that of the folder.
//!
//! Invariant: only an object that proves itself (the sums of its footer, and its own key in it) is
//! believed.

use std::{collections::BTreeSet, ops::ControlFlow};

use wal_format::{ObjectKey, PgTimestamp, SystemIdentifier, sealed::SealedFooter};

use crate::{
    ClusterIdentity, Error, Repository, Result, repository::EPOCH_FORMAT_VERSION,
    store::ENCRYPTED_SUFFIX,
};

/// Objects of one system identifier that are read until one is intact: more than a damaged segment
/// or two, and few enough for a command that somebody waits for.
const ATTEMPTS_MAX: usize = 64;

impl Repository {
    /// The names of folders below a prefix of the cluster.
    pub(crate) fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        self.store()
            .folders(&format!("{}/{prefix}", self.cluster()))
    }

    /// The identities of the system identifiers among `folders` that are not `named`, ascending.
    pub(super) fn derived_identities(
        &self,
        folders: &[String],
        named: &BTreeSet<SystemIdentifier>,
    ) -> Result<Vec<ClusterIdentity>> {
        let systems: BTreeSet<SystemIdentifier> = folders
            .iter()
            .filter_map(|name| {
                let system: SystemIdentifier = name.parse().ok()?;
                (system.to_string() == *name && !named.contains(&system)).then_some(system)
            })
            .collect();
        let mut identities = Vec::new();
        for system in systems {
            identities.extend(self.derived_identity(system, &["wal", "tail"])?);
        }
        Ok(identities)
    }

    /// Returns true if a sealed segment of a system identifier is intact here. Segments are put
    /// only where the archive was recognised a moment before, which a tail does not prove.
    pub(crate) fn holds_segment_of(&self, system: SystemIdentifier) -> Result<bool> {
        Ok(self.derived_identity(system, &["wal"])?.is_some())
    }

    /// The identity that the first intact sealed object of a system identifier proves.
    fn derived_identity(
        &self,
        system: SystemIdentifier,
        kinds: &[&str],
    ) -> Result<Option<ClusterIdentity>> {
        let mut attempts = 0;
        // `wal/{branch}/{log}/` and `tail/{branch}/{segment}/`: never a listing of the whole
        // archive.
        for kind in kinds {
            for branch in self.folders(&format!("{system}/{kind}/"))? {
                for part in self.folders(&format!("{system}/{kind}/{branch}/"))? {
                    let prefix = format!("{system}/{kind}/{branch}/{part}/");
                    for (key, size) in self.list_sealed(&prefix)? {
                        attempts += 1;
                        if attempts > ATTEMPTS_MAX {
                            return Ok(None);
                        }
                        match self.footer(&key, size) {
                            Ok(footer) if footer.header().key() == key => {
                                return Ok(Some(self.identity_of(&footer)));
                            }
                            Ok(_) | Err(Error::Damaged { .. } | Error::NotFound { .. }) => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// The objects below a prefix; refused when they are encrypted and no key is configured.
    fn list_sealed(&self, prefix: &str) -> Result<Vec<(ObjectKey, u64)>> {
        let root = format!("{}/", self.cluster());
        let (mut found, mut encrypted) = (Vec::new(), false);
        self.store()
            .list(&format!("{root}{prefix}"), &mut |object| {
                encrypted |= object.key.ends_with(ENCRYPTED_SUFFIX);
                let key = object.key.strip_prefix(&root);
                if let Some(key) = key.and_then(|key| key.parse().ok()) {
                    found.push((key, object.size));
                }
                ControlFlow::Continue(())
            })?;
        if encrypted && found.is_empty() {
            return Err(self.encrypted_without_key());
        }
        Ok(found)
    }

    fn identity_of(&self, footer: &SealedFooter) -> ClusterIdentity {
        let header = footer.header();
        let system = header.system_identifier;
        let first_commit = footer.summary().time_range().map(|(first, _)| first);
        // The upper half of a system identifier is the second in which initdb ran.
        let initdb =
            PgTimestamp::from_unix_seconds(i64::from(u32::try_from(system.0 >> 32).unwrap_or(0)));
        ClusterIdentity {
            format_version: EPOCH_FORMAT_VERSION,
            cluster: self.cluster().clone(),
            system_identifier: system,
            postgresql_major: header.version,
            wal_segment_size: header.segment_size,
            created: first_commit.or(footer.proven()).unwrap_or(initdb),
        }
    }
}
