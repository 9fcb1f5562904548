//! `pg_control`, `backup_label`, `tablespace_map` and `backup_manifest` of real servers, 13 to 18,
//! intact and damaged, and arbitrary bytes.
//!
//! `benches/testbed/tests/backup_files.rs` compares the same files with `pg_controldata`, and
//! creates the fixtures in the same way as those of `golden`.

use proptest::prelude::*;
use wal_format::{
    BackupLabel, BackupManifest, ControlFile, PgVersion, SegmentSize,
    control_file::{CONTROL_FILE_BYTES, ClusterState},
    tablespace_map,
};

use crate::golden::{read, read_plain};

#[test]
fn pg_control_of_every_version_parses() {
    for version in PgVersion::ALL {
        let bytes = read(&format!("pg{version}.pg_control.zst"));
        assert_eq!(bytes.len(), CONTROL_FILE_BYTES);
        let control = ControlFile::parse(&bytes).expect("it parses");
        assert_eq!(control.version, version);
        assert_eq!(control.state, ClusterState::InProduction);
        assert_eq!((control.block_bytes, control.wal_page_bytes), (8192, 8192));
        assert!(SegmentSize::new(u64::from(control.segment_bytes)).is_ok());
        assert_eq!((control.max_connections, control.wal_level), (37, 1));
        assert!(
            control.wal_log_hints && control.data_checksums && control.checkpoint.full_page_writes
        );
        assert!(control.checkpoint.redo_lsn <= control.checkpoint_lsn);
        assert_eq!(
            control.checkpoint.timeline,
            control.checkpoint.previous_timeline
        );
    }
}

#[test]
fn every_flipped_bit_of_pg_control_is_noticed_and_so_is_a_cut() {
    for version in PgVersion::ALL {
        let mut bytes = read(&format!("pg{version}.pg_control.zst"));
        let sum_ends = if version == PgVersion::V18 { 296 } else { 292 };
        for at in 0..sum_ends {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                assert!(
                    ControlFile::parse(&bytes).is_err(),
                    "bit {bit} of byte {at}"
                );
                bytes[at] ^= 1 << bit;
            }
            assert!(ControlFile::parse(&bytes[..at]).is_err(), "cut at {at}");
        }
        // The rest of the file is zeros without a meaning.
        assert!(bytes[sum_ends..].iter().all(|byte| *byte == 0));
        assert!(ControlFile::parse(&bytes[..sum_ends]).is_ok());
    }
}

#[test]
fn the_files_of_a_backup_of_every_version_parse_and_agree() {
    for version in PgVersion::ALL {
        let label = read_plain(&format!("pg{version}.backup_label"));
        let label = BackupLabel::parse(&label).expect("it parses");
        assert_eq!(label.label.as_deref(), Some("nightly: 'all'"));
        let map = read_plain(&format!("pg{version}.tablespace_map"));
        let map = tablespace_map::parse(version, &map).expect("it parses");
        assert_eq!(map.len(), 1);
        assert!(map[0].location.ends_with("with space and \\ in it"));
        let manifest = read(&format!("pg{version}.backup_manifest.zst"));
        let parsed = BackupManifest::parse(&manifest).expect("it parses");
        let control = read(&format!("pg{version}.pg_control.zst"));
        let control = ControlFile::parse(&control).expect("it parses");
        let named = (version >= PgVersion::V17).then_some(control.system_identifier);
        assert_eq!(parsed.system_identifier, named);
        assert_eq!(parsed.wal_ranges.len(), 1);
        assert_eq!(parsed.wal_ranges[0].start_lsn, label.start_lsn);
        assert!(parsed.wal_ranges[0].end_lsn > label.checkpoint_lsn);
        let in_tablespace = format!("pg_tblspc/{}/", map[0].oid);
        assert!(
            parsed
                .files
                .iter()
                .any(|file| file.path.starts_with(&in_tablespace))
        );
        // Flip one bit in every 61st byte before the last brace.
        let mut damaged = manifest.clone();
        for at in (0..manifest.len() - 3).step_by(61) {
            damaged[at] ^= 1 << (at % 8);
            assert!(
                BackupManifest::parse(&damaged).is_err(),
                "bit {} of byte {at}",
                at % 8
            );
            damaged[at] = manifest[at];
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        text in "(START WAL LOCATION|BACKUP FROM|CHECKPOINT LOCATION|[0-9A-F/(): \\\\]|file|\n){0,60}",
        version in prop::sample::select(PgVersion::ALL.to_vec()),
    ) {
        for bytes in [bytes.as_slice(), text.as_bytes()] {
            let _ = BackupLabel::parse(bytes);
            let _ = tablespace_map::parse(version, bytes);
            let _ = BackupManifest::parse(bytes);
            prop_assert!(ControlFile::parse(bytes).is_err());
        }
    }
}
