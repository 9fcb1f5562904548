//! Reads single files of a backup into memory without restoring it.

use std::collections::{BTreeMap, BTreeSet};

use repository::Repository;
use wal_format::{BackupInfo, BackupManifest, SlicePart};

use super::{delta::Kept, extract};
use crate::Result;

/// Returns the content of the `wanted` files that the backup has, by their names in its manifest.
/// Fetches only slices that may contain them.
pub(crate) fn files(
    repository: &Repository,
    backup: &BackupInfo,
    manifest: &BackupManifest,
    wanted: &BTreeSet<String>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let needed = Kept::all_but(manifest, wanted).needs(backup, manifest);
    for (slice, _) in backup
        .slices
        .iter()
        .zip(needed)
        .filter(|(_, needed)| *needed)
    {
        let raw = extract::fetch(repository, backup, slice)?;
        extract::for_each_part(backup, slice, &raw, &mut |part| {
            if let SlicePart::File { path, content, .. } = part {
                let name = slice.manifest_name(&path);
                // The parts of a file come in ascending order.
                if wanted.contains(&name) {
                    found.entry(name).or_default().extend_from_slice(content);
                }
            }
            Ok(())
        })?;
    }
    Ok(found)
}
