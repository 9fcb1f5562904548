//! Tests of `backup.json`: round trip, newer versions, and every contradiction that a reader must
//! refuse.

use super::*;
use crate::{BackupManifest, ManifestFile};

fn info() -> BackupInfo {
    let slice = |archive, number, continues| BackupSlice {
        archive,
        number,
        raw_bytes: 10,
        stored_bytes: 3,
        sha256: "ab".repeat(32),
        continues,
    };
    BackupInfo {
        format_version: BACKUP_FORMAT_VERSION,
        id: "20261121T101500Z-9f3c".parse().expect("a name"),
        label: "before the \"upgrade\"".to_owned(),
        kind: BackupKind::Full,
        system_identifier: SystemIdentifier(u64::MAX),
        postgresql_major: PgVersion::V17,
        server_version: "17.5".to_owned(),
        branch: Branch::FIRST,
        start_lsn: Lsn(0x200_0028),
        checkpoint_lsn: Lsn(0x200_0060),
        stop_lsn: Lsn(0x200_0120),
        started: PgTimestamp(0),
        finished: PgTimestamp(1),
        from_standby: false,
        tablespaces: vec![Tablespace {
            oid: 16_400,
            location: "/srv/fast disk".to_owned(),
        }],
        slices: vec![
            slice(BackupArchive::Tablespace(16_400), 1, None),
            slice(BackupArchive::Base, 1, None),
            slice(
                BackupArchive::Base,
                2,
                Some(ContinuedFile {
                    path: "base/5/16384".to_owned(),
                    offset: 512,
                    size: 8192,
                }),
            ),
        ],
        manifest_sha256: "cd".repeat(32),
        manifest_bytes: 100,
        backup_label_sha256: Some("ef".repeat(32)),
        tablespace_map_sha256: Some("01".repeat(32)),
        warnings: Vec::new(),
        raw_bytes: 30,
        stored_bytes: 9,
    }
}

#[test]
fn it_reads_what_it_writes() {
    let json = info().to_json().expect("it is sound");
    assert_eq!(BackupInfo::parse(&json).expect("it parses"), info());
    let text = String::from_utf8(json).expect("JSON is UTF-8");
    // As in FORMAT.md: numbers that JavaScript would round are text.
    assert!(
        text.contains("\"system_identifier\": \"18446744073709551615\""),
        "{text}"
    );
    assert!(text.contains("\"start_lsn\": \"0/2000028\""), "{text}");
    assert!(text.contains("\"archive\": \"base\""), "{text}");
    assert!(text.contains("\"tablespace\": 16400"), "{text}");
}

#[test]
fn a_newer_version_is_named_whatever_its_shape() {
    let error = BackupInfo::parse(b"{\"format_version\": 7, \"slices\": 3}").expect_err("newer");
    assert!(error.to_string().contains("format version 7"), "{error}");
    assert!(matches!(
        BackupInfo::parse(b"{}"),
        Err(BackupInfoError::Json(_))
    ));
}

fn continued(info: &mut BackupInfo) -> &mut ContinuedFile {
    info.slices[2].continues.as_mut().expect("it continues")
}

/// A `backup.json` of version 1 has neither checksum. That of the earliest builds has no checksum
/// of its own either.
#[test]
fn version_1_is_read_and_version_2_needs_its_sums() {
    let mut old = info();
    old.format_version = 1;
    old.backup_label_sha256 = None;
    old.tablespace_map_sha256 = None;
    let plain = serde_json::to_vec_pretty(&old).expect("JSON");
    assert_eq!(BackupInfo::parse(&plain).expect("it parses"), old);
    let summed = old.to_json().expect("it is sound");
    assert_eq!(BackupInfo::parse(&summed).expect("it parses"), old);
    let unsummed = serde_json::to_vec_pretty(&info()).expect("JSON");
    let error = BackupInfo::parse(&unsummed).expect_err("it has no sum");
    assert!(error.to_string().contains("end in its sum"), "{error}");
}

#[test]
fn a_copy_under_another_name_is_refused() {
    let json = info().to_json().expect("it is sound");
    BackupInfo::parse_of(&info().key(), &json).expect("it is its own");
    let mut other = info();
    other.id = "20261121T101500Z-0000".parse().expect("a name");
    let mut stranger = info();
    stranger.system_identifier = SystemIdentifier(7);
    for key in [other.key(), stranger.key()] {
        let error = BackupInfo::parse_of(&key, &json).expect_err("it is another's");
        assert!(
            matches!(error, BackupInfoError::Elsewhere { .. }),
            "{error}"
        );
    }
}

#[test]
fn contradictions_are_refused_on_both_sides() {
    type Spoil = fn(&mut BackupInfo);
    let spoils: [(&str, Spoil); 18] = [
        ("order", |info| info.stop_lsn = Lsn(1)),
        ("digits", |info| info.manifest_sha256 = "CD".repeat(32)),
        ("digits", |info| info.slices[1].sha256.truncate(63)),
        ("totals", |info| info.raw_bytes = 31),
        ("totals", |info| info.stored_bytes = 8),
        ("twice", |info| {
            info.tablespaces.push(info.tablespaces[0].clone());
        }),
        ("not listed", |info| {
            info.slices[0].archive = BackupArchive::Tablespace(7);
        }),
        ("not together", |info| info.slices.swap(0, 1)),
        ("numbered", |info| info.slices[2].number = 3),
        ("cannot", |info| continued(info).offset = 513),
        ("outside of its archive", |info| {
            continued(info).path = "/etc/cron.d/x".to_owned();
        }),
        ("outside of its archive", |info| {
            continued(info).path = "base/../../x".to_owned();
        }),
        ("more bytes than", |info| {
            info.slices[1].raw_bytes += 42 << 30;
            info.raw_bytes += 42 << 30;
        }),
        ("more bytes than", |info| {
            info.slices[1].stored_bytes += 42 << 30;
            info.stored_bytes += 42 << 30;
        }),
        ("location", |info| {
            info.tablespaces[0].location = "/srv/../etc".to_owned();
        }),
        ("location", |info| {
            info.tablespaces[0].location = "pg_tblspc/1".to_owned();
        }),
        ("backup_label is missing", |info| {
            info.backup_label_sha256 = None;
        }),
        ("no slice", |info| {
            let gone = info.slices.remove(0);
            info.raw_bytes -= gone.raw_bytes;
            info.stored_bytes -= gone.stored_bytes;
        }),
    ];
    for (word, spoil) in spoils {
        let mut info = info();
        spoil(&mut info);
        let error = info.to_json().expect_err(word);
        assert!(
            error.to_string().contains(word),
            "{error} does not say {word}"
        );
        let json = serde_json::to_vec(&info).expect("it serializes");
        assert!(BackupInfo::parse(&json).is_err(), "{word} was read");
    }
}

#[test]
fn a_manifest_of_another_length_or_system_is_refused() {
    let info = info();
    let mut manifest = BackupManifest {
        system_identifier: Some(info.system_identifier),
        files: Vec::new(),
        wal_ranges: Vec::new(),
    };
    let continued = info.slices.iter().filter_map(|slice| {
        let file = slice.continues.as_ref()?;
        Some(ManifestFile {
            path: slice.manifest_name(&file.path),
            size: file.size,
            checksum: None,
        })
    });
    manifest.files.extend(continued);
    assert_eq!(info.check_manifest(&manifest, info.manifest_bytes), Ok(()));
    let longer = info.check_manifest(&manifest, info.manifest_bytes + 1);
    assert_eq!(longer, Err("it has 101 bytes instead of 100".to_owned()));
    manifest.system_identifier = Some(SystemIdentifier(7));
    let other = info.check_manifest(&manifest, info.manifest_bytes);
    assert!(other.is_err_and(|problem| problem.contains("it is of system 7")));
}
