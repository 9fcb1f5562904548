//! Refuses a repository or a spool in a place where it must not be: in the data directory of a
//! server, one inside of the other, or as root in a directory of another user. Refuses clusters
//! that share a slot, and a cluster of which there is nothing.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use replication::ConnInfo;
use repository::{
    Repository,
    access::user_name,
    config::{ClusterSettings, Settings},
    durable,
};

use crate::error::{Error, Result};

/// Checks the directories of every cluster. Creates nothing.
///
/// # Errors
/// [`Error::Usage`] with the directory and the remedy.
pub(super) fn require_outside(settings: &Settings) -> Result<()> {
    for cluster in &settings.clusters {
        if let Some(problem) = inside_server(cluster).or_else(|| nested(cluster)) {
            return Err(Error::Usage { message: problem });
        }
    }
    match shared_slots(settings).into_iter().next() {
        Some((_, message)) => Err(Error::Usage { message }),
        None => Ok(()),
    }
}

/// Returns the clusters whose slot another cluster of the same server has too, with the problem.
/// Only one of them could stream. Servers are compared by their addresses.
pub(super) fn shared_slots(settings: &Settings) -> Vec<(&ClusterSettings, String)> {
    let mut shared = Vec::new();
    let server = |cluster: &ClusterSettings| ConnInfo::parse(&cluster.conninfo).ok();
    for (index, cluster) in settings.clusters.iter().enumerate() {
        let is_same = |other: &&ClusterSettings| {
            other.slot == cluster.slot
                && server(other)
                    .zip(server(cluster))
                    .is_some_and(|(other, own)| other.places() == own.places())
        };
        if let Some(other) = settings.clusters[..index].iter().find(is_same) {
            shared.push((cluster, shared_slot(other, cluster)));
        }
    }
    shared
}

/// Returns the problem of two clusters of one server with one slot.
pub(super) fn shared_slot(other: &ClusterSettings, cluster: &ClusterSettings) -> String {
    let (other, name, slot) = (&other.name, &cluster.name, &cluster.slot);
    format!(
        "clusters {other} and {name} stream from the same server with the same slot \"{slot}\", which serves one of them \
         only; leave out the key slot, or give each its own in [cluster.{other}] and [cluster.{name}]"
    )
}

/// Returns the problem of a spool or a catalog inside of a repository's folder, or of a repository
/// inside of them.
pub(super) fn nested(cluster: &ClusterSettings) -> Option<String> {
    let places = cluster.repository.each();
    let folders = places.iter().filter_map(|place| place.url.folder());
    for folder in folders {
        let local = [("spool", &*cluster.spool), ("catalog", &*cluster.catalog)];
        for (what, directory) in local {
            let (inner, outer) = (resolved(directory), resolved(folder));
            let relation = match (inner.starts_with(&outer), outer.starts_with(&inner)) {
                (true, true) => "is the same directory as",
                (true, false) => "is inside of",
                (false, true) => "contains",
                (false, false) => continue,
            };
            return Some(format!(
                "the {what} {} {relation} the repository {}: the files of the one would be taken for those of the other, and \
                 one lost disk would take both; name another directory as {what} or as repository",
                directory.display(),
                folder.display()
            ));
        }
    }
    None
}

/// Returns the path with its links followed, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let existing = path.ancestors().find_map(|above| {
        let resolved = above.canonicalize().ok()?;
        Some(resolved.join(path.strip_prefix(above).ok()?))
    });
    existing.unwrap_or(path)
}

/// Refuses to run as root in directories of another user, who could not use them afterwards: the
/// spool's files and the catalog would belong to root.
///
/// # Errors
/// [`Error::Usage`] with the owner and the remedy.
pub(super) fn refuse_root(settings: &Settings) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for cluster in &settings.clusters {
        let own = cluster.spool.join(cluster.name.as_str());
        let folder = cluster.repository.url.folder().map(Path::to_owned);
        for path in [own, cluster.spool.clone()].into_iter().chain(folder) {
            let owner = fs::metadata(&path).map_or(0, |found| found.uid());
            if owner != 0 {
                let name = user_name(owner);
                return Err(Error::Usage {
                    message: format!(
                        "{} belongs to user {name}, and root would leave files there that {name} cannot use: run the \
                         archiver as that user (`su -s /bin/sh {name} -c 'wal-archiver run'`)",
                        path.display()
                    ),
                });
            }
        }
    }
    Ok(())
}

/// Creates the spool of a cluster if it is missing and a group shares it.
///
/// # Errors
/// [`Error::Repository`].
pub(super) fn prepare_spool(cluster: &ClusterSettings) -> Result<()> {
    if let Some(access) = &cluster.spool_access
        && !cluster.spool.exists()
    {
        durable::create_dir_all(&cluster.spool)?;
        access.apply(&cluster.spool)?;
    }
    Ok(())
}

/// Returns the error for a repository that holds nothing of a cluster.
pub(super) fn unknown(cluster: &ClusterSettings, place: &str) -> Error {
    let name = &cluster.name;
    Error::Usage {
        message: format!(
            "{place} holds nothing of cluster {name}: check --cluster and --repository, or start `wal-archiver run`, which \
             begins the archive"
        ),
    }
}

/// Checks that the repository holds something of a cluster.
///
/// # Errors
/// [`Error::Usage`] if it does not.
pub(super) fn require_known(cluster: &ClusterSettings) -> Result<()> {
    match Repository::open_known(cluster).and_then(|repository| repository.identity()) {
        Ok(None) => Err(unknown(cluster, &cluster.repository.to_string())),
        // The command itself reports a repository that cannot be read.
        Ok(Some(_)) | Err(_) => Ok(()),
    }
}

/// Returns the problem of the first directory of a cluster that lies in a server's directories.
///
/// A base backup would contain it, and what happens to the server would happen to its archive too.
pub(super) fn inside_server(cluster: &ClusterSettings) -> Option<String> {
    let places = cluster.repository.each();
    let folders = places.iter().filter_map(|place| place.url.folder());
    let named = folders
        .map(|folder| ("repository", folder))
        .chain([("spool", &*cluster.spool), ("catalog", &*cluster.catalog)]);
    for (what, path) in named {
        if let Some(server) = server_directory_above(path) {
            return Some(format!(
                "the {what} {} is inside {}, a directory of a PostgreSQL server: a base backup would contain it, and a loss \
                 of the server's disk would take the archive with it; name a directory outside as {what}, on another disk",
                path.display(),
                server.display()
            ));
        }
    }
    None
}

/// Returns the data directory, `pg_wal` or tablespace in which `path` is or would be created.
fn server_directory_above(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    // A link may lead into the data directory, and so may the part that does not exist yet.
    let existing = path.ancestors().find(|path| path.exists())?;
    let existing = existing.canonicalize().ok()?;
    let found = existing
        .ancestors()
        .find(|above| is_server_directory(above));
    found.map(Path::to_owned)
}

/// Returns true for a data directory, for a `pg_wal` that is stored elsewhere, and for the
/// directory of a server in a tablespace (`PG_17_202406281`).
fn is_server_directory(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let version = name.and_then(|name| name.strip_prefix("PG_"));
    let tablespace = version.and_then(|version| version.split_once('_'));
    path.join("PG_VERSION").is_file() && path.join("global").is_dir()
        || path.join("archive_status").is_dir()
        || tablespace.is_some_and(|(major, catalog)| {
            let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            digits(major) && catalog.len() == 9 && digits(catalog)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_a_server_are_recognised_through_links() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().canonicalize().expect("a path");
        let data = root.join("data");
        for part in [
            "data/global",
            "outside",
            "wal/archive_status",
            "PG_17_202406281/5",
        ] {
            fs::create_dir_all(root.join(part)).expect("a directory");
        }
        fs::write(data.join("PG_VERSION"), "17\n").expect("a file");
        std::os::unix::fs::symlink(&data, root.join("outside/link")).expect("a link");
        for (path, expected) in [
            ("data", Some("data")),
            ("data/backup/deep", Some("data")),
            ("outside/link/backup", Some("data")),
            ("wal/spool", Some("wal")),
            ("PG_17_202406281/5/spool", Some("PG_17_202406281")),
            ("outside", None),
            ("database", None),
            ("PG_17_mine/spool", None),
        ] {
            let found = server_directory_above(&root.join(path));
            assert_eq!(found, expected.map(|name| root.join(name)), "{path}");
        }
    }
}
