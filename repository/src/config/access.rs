//! The users who share a repository in a folder, or a spool: `repository_group`,
//! `repository_mode`, `spool_group` and `spool_mode`.

use serde::Deserialize;

use crate::{Error, Result, access::FolderAccess};

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct AccessTable {
    repository_group: Option<String>,
    repository_mode: Option<String>,
    spool_group: Option<String>,
    spool_mode: Option<String>,
}

impl AccessTable {
    /// Returns the access to the repository's folders and to the spool.
    pub(super) fn resolve(&self, defaults: &Self) -> Result<[Option<FolderAccess>; 2]> {
        let either = |own: &Option<String>, default: &Option<String>| {
            own.as_ref().or(default.as_ref()).cloned()
        };
        Ok([
            resolve(
                "repository",
                either(&self.repository_group, &defaults.repository_group),
                either(&self.repository_mode, &defaults.repository_mode).as_deref(),
            )?,
            resolve(
                "spool",
                either(&self.spool_group, &defaults.spool_group),
                either(&self.spool_mode, &defaults.spool_mode).as_deref(),
            )?,
        ])
    }
}

fn resolve(key: &str, group: Option<String>, mode: Option<&str>) -> Result<Option<FolderAccess>> {
    let Some(group) = group else {
        return match mode {
            None => Ok(None),
            Some(_) => Err(Error::config(format!(
                "{key}_mode says what the group {key}_group may do; set {key}_group too"
            ))),
        };
    };
    let may_write = match mode {
        None | Some("0770" | "770") => true,
        Some("0750" | "750") => false,
        Some(other) => {
            return Err(Error::config(format!(
                "{key}_mode = \"{other}\" is not an access of a group; write \"0770\" (the group reads and writes) or \
                 \"0750\" (the group reads)"
            )));
        }
    };
    Ok(Some(FolderAccess { group, may_write }))
}
