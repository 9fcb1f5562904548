//! Refusals: one JSON document with `--json`, the damaged object of an encrypted repository by its
//! name, and arguments that cannot work.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use testbed::{
    cluster::Cluster,
    encrypted_job::KEY,
    place::Place,
    programs::{directory, server_user, succeed},
    restored::Restored,
};

use crate::support::{Archived, SETTINGS, files_below, query, said, servers};

/// An encrypted archive with a backup and a few segments after it.
struct Scene {
    archived: Archived,
    bin: PathBuf,
}

impl Scene {
    fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let place = Place::new().expect("a place");
        let key = place.path().join("key");
        fs::write(&key, KEY).expect("a key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("permissions");
        if let Some((user, group)) = server_user().expect("a user") {
            std::os::unix::fs::chown(&key, Some(user), Some(group)).expect("chown");
        }
        configure(&place, &key.display().to_string());
        let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
        let mut archived = Archived::at(cluster, place);
        archived.sql("CREATE TABLE load (n int, filler text)");
        archived.backup();
        for _ in 0..5 {
            archived
                .sql("INSERT INTO load SELECT n, repeat('x', 700) FROM generate_series(1, 1200) n");
        }
        archived.finish();
        Some(Self { archived, bin })
    }

    /// The sealed segments, in order.
    fn segments(&self) -> Vec<PathBuf> {
        let mut found = files_below(&self.archived.place.path().join("repository"));
        found.retain(|path| path.to_string_lossy().contains("/wal/"));
        assert!(found.len() >= 4, "{} segments only", found.len());
        found
    }
}

fn configure(place: &Place, key: &str) {
    let line = format!("encryption_key_file = \"{key}\"\n");
    fs::write(place.path().join("tidemark.toml"), line).expect("a configuration");
}

/// Replaces an object by `change` of it; returns its bytes.
fn change(path: &Path, change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let before = fs::read(path).expect("an object");
    let mut bytes = before.clone();
    change(&mut bytes);
    rewrite(path, &bytes);
    before
}

fn rewrite(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("permissions");
    fs::write(path, bytes).expect("an object");
}

/// Checks the exit code, the one line on standard error, and the document on standard output.
fn assert_refused(command: &mut Command, code: i32, kind: &str, parts: &[&str]) {
    let output = command.arg("--json").output().expect("it runs");
    let (text, error) = said(&output);
    assert_eq!(output.status.code(), Some(code), "{text} {error}");
    assert!(error.len() < 1000, "it is long: {error}");
    let document: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|problem| panic!("{problem}: {text:?} {error}"));
    assert_eq!(document["error"]["code"], code);
    assert_eq!(document["error"]["kind"], kind);
    let message = document["error"]["message"].as_str().expect("a message");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

#[test]
fn each_refusal_is_one_json_document_and_names_the_damage_of_an_encrypted_repository() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let data = root.path().join("data");
    let restore = |arguments: &[&str]| {
        let mut restore = scene.archived.pitr_restore();
        restore.arg("--target-dir").arg(&data).args(arguments);
        restore
    };
    let plain = |arguments: &[&str]| {
        let mut plain = scene.archived.pitr_restore();
        plain.args(arguments);
        plain
    };
    // A usage error of each kind: a value, a flag, a command that refuses.
    let no_time = &mut restore(&["--target-time", "yesterday"]);
    assert_refused(no_time, 2, "usage", &["is not a time"]);
    let no_flag = &mut restore(&["--nonsense"]);
    assert_refused(no_flag, 2, "usage", &["--nonsense"]);
    let no_copy = &mut plain(&["release", "/nonexistent/copy"]);
    let output = no_copy.arg("--json").output().expect("it runs");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one document");
    assert_eq!(
        document["error"]["code"].as_i64(),
        output.status.code().map(i64::from)
    );
    // The flag may come before the command.
    for (arguments, code, kind) in [
        (
            ["--json", "locate", "--xid=4000000000"],
            3,
            "target_not_reachable",
        ),
        (["--json", "release", "/nonexistent/copy"], 2, "usage"),
    ] {
        assert_refused(&mut plain(&arguments), code, kind, &[]);
    }
    let listing = succeed(&mut plain(&["--json", "list"])).expect("a listing");
    serde_json::from_str::<serde_json::Value>(&listing).expect("one document");
    let beyond = ["--target-lsn", "FF/0"];
    for command in [&mut restore(&beyond), restore(&beyond).arg("--dry-run")] {
        assert_refused(command, 3, "target_not_reachable", &["beyond the archive"]);
    }
    let unknown = &mut plain(&["locate", "--xid", "4000000000"]);
    assert_refused(unknown, 3, "target_not_reachable", &["4000000000"]);
    let gone = "--repository=file:///nonexistent/repository";
    for command in ["--dry-run", "list"] {
        let mut away = Command::new(testbed::programs::ours("pitr-restore").expect("built"));
        assert_refused(
            away.args([gone, command]),
            5,
            "unreachable",
            &["there is no such folder"],
        );
    }

    // Damage of a segment in the middle.
    let segments = scene.segments();
    let segment = &segments[segments.len() - 2];
    let name = segment.file_name().expect("a name").to_string_lossy();
    let name = name.trim_end_matches(".enc");
    let parts = [name, "counts as missing", "--target-lsn"];
    let catalog = "--catalog=/nonexistent/catalog";
    let half = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let flip = |bytes: &mut Vec<u8>| {
        let at = bytes.len() / 2;
        bytes[at] ^= 0x10;
    };
    let changes: [&dyn Fn(&mut Vec<u8>); 2] = [&half, &flip];
    for damage in changes {
        let before = change(segment, damage);
        for flags in [&[catalog][..], &[catalog, "--dry-run"]] {
            assert_refused(&mut restore(flags), 4, "integrity", &parts);
        }
        rewrite(segment, &before);
    }
    // The catalog knows its end already: the recovery meets it.
    let before = change(segment, flip);
    let mut start = restore(&["--start", "--set", "fsync=off"]);
    start.arg("--pg-bin").arg(&scene.bin);
    start.env("LD_LIBRARY_PATH", scene.bin.join("../lib"));
    assert_refused(&mut start, 4, "integrity", &[name]);
    fs::remove_dir_all(&data).expect("it goes");
    rewrite(segment, &before);
    fs::remove_file(segment).expect("it goes");
    let missing = ["WAL is missing from"];
    assert_refused(
        &mut restore(&[catalog]),
        3,
        "target_not_reachable",
        &missing,
    );
    fs::write(segment, &before).expect("it is back");
    // Damage of the only backup's description.
    let mut found = files_below(&scene.archived.place.path().join("repository"));
    found.retain(|path| path.ends_with("backup.json.enc"));
    let before = change(&found[0], flip);
    let parts = ["backup.json", "counts as missing"];
    assert_refused(&mut restore(&[catalog]), 4, "integrity", &parts);
    rewrite(&found[0], &before);
    assert!(!data.exists(), "something was created");
}

#[test]
fn arguments_that_cannot_work_are_refused_before_the_copy() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let data = root.path().join("data");
    let restore = |arguments: &[&str]| {
        let mut restore = scene.archived.pitr_restore();
        restore.arg("--target-dir").arg(&data).args(arguments);
        restore
    };
    for set in [
        "work_mem=4MB\narchive_command='touch /tmp/never'",
        "work_mem=4MB\n",
        "work_mem\narchive_mode=on",
        "work mem=4MB",
    ] {
        for flags in [&["--set", set][..], &["--set", set, "--dry-run"]] {
            assert_refused(&mut restore(flags), 2, "usage", &["--set work"]);
        }
    }
    // The error shows the message of a server program that does not start, and the reason for one
    // that does not exist.
    let broken = root.path().join("bin");
    fs::create_dir(&broken).expect("a directory");
    let program = broken.join("postgres");
    fs::write(&program, "#!/bin/sh\necho 'no libldap' >&2\nexit 127\n").expect("a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("permissions");
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).expect("permissions");
    for (directory, reason) in [
        (broken, "does not start: no libldap"),
        (root.path().join("none"), "none/postgres: No such file"),
    ] {
        let mut start = restore(&["--start", "--pg-bin"]);
        let parts = [reason, "name its directory with --pg-bin"];
        assert_refused(start.arg(directory), 2, "usage", &parts);
    }
    let long = "a".repeat(100_000);
    for flag in [
        "--set",
        "--target-name",
        "--target-time",
        "--target-timeline",
        "--backup",
        "--time-zone",
        "--tablespace-mapping",
        "--pg-bin",
        "--conninfo",
    ] {
        let parts = [flag, "has 1000", "bytes; 16384 are the most"];
        let value = format!("a={long}");
        assert_refused(&mut restore(&[flag, &value]), 2, "usage", &parts);
        let joined = format!("{flag}=a={long}");
        assert_refused(&mut restore(&[&joined]), 2, "usage", &parts);
    }
    let mut fetch = scene.archived.pitr_restore();
    let fetched = fetch.args(["wal-fetch", &long]).arg(&data).output();
    assert_eq!(fetched.expect("it runs").status.code(), Some(255));
    assert!(!data.exists(), "something was created");

    // A key that only this directory has.
    let place = &scene.archived.place;
    configure(place, "key");
    for flags in [&[][..], &["--dry-run"]] {
        let mut relative = restore(flags);
        relative.current_dir(place.path());
        let parts = ["encryption_key_file = \"key\"", "not an absolute path"];
        assert_refused(&mut relative, 2, "usage", &parts);
    }
    assert!(!data.exists(), "something was created");
    configure(place, &place.path().join("key").display().to_string());
    let restored = Restored::start(place, &scene.bin, &[] as &[&str]).expect("a restore");
    let rows = query(&restored.conninfo(), "SELECT count(*) FROM load");
    assert_eq!(rows, "6000");
}
