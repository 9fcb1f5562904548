//! Arbitrary bytes as each file of a base backup: `backup_label`, `tablespace_map`,
//! `backup_manifest`, `pg_control`, `backup.json` and a tar header.
//!
//! Input: the kind of file (1 byte) and its content. The CRC of `pg_control` is corrected.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wal_format::{
    BackupInfo, BackupLabel, BackupManifest, ControlFile, PgVersion, tablespace_map,
    tar::{BLOCK_BYTES, TarHeader},
};

fn leaves_its_directory(path: &str) -> bool {
    path.starts_with('/') || path.split('/').any(|part| part == "..")
}

fuzz_target!(|input: &[u8]| {
    let Some((which, content)) = input.split_first() else {
        return;
    };
    match which % 6 {
        0 => {
            if let Ok(label) = BackupLabel::parse(content) {
                assert!(content.starts_with(b"START WAL LOCATION") || content.contains(&b'\n'));
                assert_eq!(label.start_segment.to_string().len(), 24);
            }
        }
        1 => {
            for version in [PgVersion::V13, PgVersion::V18] {
                if let Ok(map) = tablespace_map::parse(version, content) {
                    assert!(map.iter().all(|tablespace| tablespace.oid > 0));
                    assert!(map.iter().all(|tablespace| !tablespace.location.is_empty()));
                }
            }
        }
        2 => {
            if let Ok(manifest) = BackupManifest::parse(content) {
                let mut files = manifest.files.iter();
                assert!(files.all(|file| !leaves_its_directory(&file.path)));
            }
        }
        3 => {
            let mut content = content.to_vec();
            let offset = if content.get(8..10) == Some(&[8, 7]) {
                292
            } else {
                288
            };
            if content.len() >= offset + 4 {
                let crc = crc32c::crc32c(&content[..offset]);
                content[offset..offset + 4].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = ControlFile::parse(&content);
        }
        4 => {
            if let Ok(backup) = BackupInfo::parse(content) {
                let json = backup.to_json().expect("what was read can be written");
                assert_eq!(BackupInfo::parse(&json).expect("and read again"), backup);
            }
        }
        _ => {
            if let Some(block) = content.first_chunk::<BLOCK_BYTES>()
                && let Ok(Some(header)) = TarHeader::parse(block)
            {
                assert!(!leaves_its_directory(&header.path), "{}", header.path);
            }
        }
    }
});
