//! Refuses to restore into an archive, or into the data directory of another server: the copy would
//! lie among files that the archiver, retention and base backups take for their own.

use std::path::{Component, Path, PathBuf};

use repository::config::ClusterSettings;

use crate::{Error, Result, execute::CONTROL, tablespaces::Directories};

/// Refuses a target or a mapped directory that is inside of a repository of the cluster, of its
/// spool, or of a data directory.
///
/// # Errors
/// [`Error::Usage`] names both directories.
pub(super) fn refuse(cluster: &ClusterSettings, directories: &Directories<'_>) -> Result<()> {
    let mapped = directories.mapping.values().map(PathBuf::as_path);
    for directory in directories.target.into_iter().chain(mapped) {
        let place = real(directory);
        let mut above = place.ancestors().skip(1);
        let of_server =
            above.find(|one| one.join("PG_VERSION").is_file() && one.join(CONTROL).is_file());
        let places = cluster.repository.each();
        let folders = places.iter().filter_map(|place| place.url.folder());
        let archives = folders.chain([cluster.spool.as_path()]).map(real);
        let mut archives = archives.filter(|archive| place.starts_with(archive));
        let (what, outer) = match (archives.next(), of_server) {
            (Some(archive), _) => ("the archive", archive),
            (None, Some(server)) => ("the data directory", server.to_owned()),
            (None, None) => continue,
        };
        return Err(Error::usage(format!(
            "{} is inside of {what} {}: name a directory outside of it",
            directory.display(),
            outer.display()
        )));
    }
    Ok(())
}

/// Returns a path without links and `..`, also if its last parts do not exist yet.
fn real(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut existing = path;
    loop {
        if let Ok(real) = existing.canonicalize() {
            return missing
                .into_iter()
                .rev()
                .fold(real, |path, part| match part {
                    Component::ParentDir => path.parent().map(Path::to_owned).unwrap_or(path),
                    part => path.join(part),
                });
        }
        let (Some(parent), Some(part)) = (existing.parent(), existing.components().next_back())
        else {
            return path.to_owned();
        };
        missing.push(part);
        existing = parent;
    }
}
