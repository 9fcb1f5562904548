//! The maximum length of an object, by its name. A reader must be able to hold an object of that
//! length in memory.
//!
//! Invariant: a store that reads a whole object compares its length with this maximum before it
//! allocates memory.

use wal_format::backup::SLICE_BYTES_MAX;

use super::ENCRYPTED_SUFFIX;

const MIB: u64 = 1 << 20;
/// The maximum of a sealed segment: 1 GiB of WAL that does not compress, its summary and its
/// footer.
const SEGMENT_BYTES_MAX: u64 = 2200 * MIB;
/// The maximum of a manifest, for ten million files, and of the description of a backup of several
/// hundred terabytes.
const MANIFEST_BYTES_MAX: u64 = 2048 * MIB;
const BACKUP_INFO_BYTES_MAX: u64 = 1024 * MIB;
/// The maximum of every other JSON object and of a timeline's history.
const JSON_BYTES_MAX: u64 = 64 * MIB;

/// Returns the maximum length of the object `key`, in bytes.
pub(super) fn object_bytes_max(key: &str) -> u64 {
    let plain = key.strip_suffix(ENCRYPTED_SUFFIX).unwrap_or(key);
    let name = plain.rsplit('/').next().unwrap_or(plain);
    let bytes_max = if name.ends_with(".tar.zst") {
        SLICE_BYTES_MAX + MIB
    } else if name == "backup_manifest" {
        MANIFEST_BYTES_MAX
    } else if name == "backup.json" {
        BACKUP_INFO_BYTES_MAX
    } else if name.ends_with(".json") || name.ends_with(".history") {
        JSON_BYTES_MAX
    } else {
        SEGMENT_BYTES_MAX
    };
    // Encryption adds a header, and 16 bytes to each 64 KiB.
    bytes_max + bytes_max / 1024
}

/// Returns the message for an object that exceeds its maximum length.
pub(super) fn too_long(found: u64, bytes_max: u64) -> String {
    format!("it has {found} bytes; an object of this name has {bytes_max} at the most")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_object_has_its_bound() {
        let slice = "main/1/backup/20261121T101500Z-9f3c/base.000001.tar.zst";
        assert!(object_bytes_max(slice) < 66 * MIB);
        assert_eq!(
            object_bytes_max(slice),
            object_bytes_max(&format!("{slice}.enc"))
        );
        assert!(object_bytes_max("main/epoch/00000001.json") < 65 * MIB);
        assert!(object_bytes_max("main/1/history/00000002-01020304.history") < 65 * MIB);
        let segment = "main/1/wal/00000001/00000000/000000010000000000000001.zst";
        assert!(object_bytes_max(segment) > 1100 * MIB);
        assert!(object_bytes_max("main/1/backup/x/backup_manifest") >= 2048 * MIB);
    }
}
