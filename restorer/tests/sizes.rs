//! The plan names the sizes and the backup that it uses: space on each file system, the newest
//! backup only where it is, and an older one instead of one that `verify` found damaged.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use testbed::{
    programs::{directory, server_user},
    restored::Restored,
};

use crate::{
    scene::owned,
    support::{Archived, files_below, query, said, servers, wait_until},
};

/// A small file system of its own; `None` without the right to mount one.
pub(crate) struct Small(pub(crate) PathBuf);

impl Small {
    pub(crate) fn mount(path: &Path, mib: u32) -> Option<Self> {
        fs::create_dir(path).expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(path)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("SKIPPED: a small file system needs root");
            return None;
        }
        if let Some((user, group)) = server_user().expect("a user") {
            chown(path, Some(user), Some(group)).expect("chown");
        }
        Some(Self(path.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(&self.0).status());
    }
}

/// The exit code, the document and the error of a command with `--json`.
fn answer(command: &mut Command) -> (Option<i32>, Value, String) {
    let output = command.arg("--json").output().expect("it runs");
    let document = serde_json::from_slice(&output.stdout);
    let (text, error) = said(&output);
    let document = document.unwrap_or_else(|problem| panic!("{problem}: {text} {error}"));
    (output.status.code(), document, error)
}

fn used(root: &Path) -> u64 {
    let files = files_below(root).into_iter();
    files
        .map(|path| fs::symlink_metadata(path).expect("a file").blocks() * 512)
        .sum()
}

#[test]
fn too_little_space_on_any_file_system_refuses_before_the_copy() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let places = directory().expect("a directory");
    let tablespace = owned(&places.path().join("tablespace"));
    let mut archived = Archived::start(&bin, "");
    let location = tablespace.display();
    archived.sql(&format!("CREATE TABLESPACE there LOCATION '{location}'"));
    archived.sql(
        "CREATE TABLE elsewhere (filler text) TABLESPACE there; \
         INSERT INTO elsewhere SELECT repeat('x', 1000) FROM generate_series(1, 8000)",
    );
    archived.backup();
    archived.finish();
    let root = directory().expect("a directory");
    let data = root.path().join("data");
    let mapping = |new: &Path| format!("--tablespace-mapping={location}={}", new.display());
    let restore = |data: &Path, space: &Path| {
        let mut restore = archived.pitr_restore();
        restore.arg("--target-dir").arg(data).arg(mapping(space));
        restore
    };

    // Enough space, on one file system: the plan's sizes are those of the copy.
    let space = root.path().join("space");
    let (code, plan, error) = answer(restore(&data, &space).arg("--dry-run"));
    assert_eq!(code, Some(0), "{error}");
    let systems = plan["file_systems"].as_array().expect("file systems");
    let names = [data.display().to_string(), space.display().to_string()];
    assert_eq!(systems.len(), 1, "{plan}");
    assert_eq!(systems[0]["directories"], serde_json::json!(names));
    let number = |value: &Value| value.as_u64().expect("a number");
    let unpacked = number(&plan["unpacked_bytes"]);
    assert!(number(&systems[0]["needed_bytes"]) >= unpacked);
    assert!(number(&systems[0]["free_bytes"]) > unpacked);
    assert_eq!(
        number(&plan["fetch_bytes"]),
        number(&plan["backup_bytes"]) + number(&plan["wal_bytes"])
    );
    let basis = plan["estimate_basis"].as_str().expect("a basis");
    assert!(
        basis.contains("assumed") && basis.contains("MiB/s"),
        "{basis}"
    );
    let (code, _, error) = answer(&mut restore(&data, &space));
    assert_eq!(code, Some(0), "{error}");
    // The data directory's link to the tablespace is followed.
    let (found, in_space) = (used(&data), used(&space));
    assert!(
        found > unpacked * 9 / 10 && found < unpacked * 11 / 10,
        "{found} bytes instead of {unpacked}"
    );
    assert!(in_space > 8 << 20, "{in_space}");

    // Too little for the tablespace, then for the data directory.
    let Some(small) = Small::mount(&root.path().join("small"), 7) else {
        return;
    };
    let elsewhere = root.path().join("elsewhere");
    for (data, space) in [
        (elsewhere.join("data"), small.0.join("space")),
        (small.0.join("data"), elsewhere.join("space")),
    ] {
        let name = [&data, &space]
            .into_iter()
            .find(|path| path.starts_with(&small.0))
            .map(|path| path.display().to_string())
            .expect("a name");
        for flags in [&["--dry-run"][..], &[]] {
            let (code, document, error) = answer(restore(&data, &space).args(flags));
            assert_eq!(code, Some(3), "{error}");
            assert_eq!(document["error"]["kind"], "target_not_reachable");
            assert!(
                error.contains(&format!("file system of {name} has")) && error.contains("--force"),
                "{error}"
            );
        }
        assert!(!data.exists() && !space.exists(), "something was created");
        let forced = restore(&data, &space)
            .args(["--dry-run", "--force"])
            .output();
        let (shown, error) = said(&forced.expect("it runs"));
        let line = shown.lines().find(|line| line.contains(&name));
        let line = line.unwrap_or_else(|| panic!("{shown} {error}"));
        let free = line
            .split(", ")
            .nth(1)
            .and_then(|part| part.split(' ').next());
        let free: u64 = free.and_then(|free| free.parse().ok()).expect("a number");
        assert!(free > 6 << 20 && free <= 7 << 20, "{line}");
    }
    let (code, document, error) =
        answer(restore(&small.0.join("data"), &elsewhere.join("space")).arg("--force"));
    assert_eq!(code, Some(1), "{error}");
    let message = document["error"]["message"].as_str().expect("a message");
    assert!(message.contains("make room"), "{message}");
    // What an interrupted restore left is used again: it does not count as missing space.
    let (code, plan, error) = answer(
        restore(&small.0.join("data"), &elsewhere.join("space")).args(["--dry-run", "--force"]),
    );
    assert_eq!(code, Some(0), "{error}");
    let systems = plan["file_systems"].as_array().expect("file systems");
    let reused = number(&systems[0]["reused_bytes"]);
    assert!(reused > 4 << 20, "{plan}");
}

/// Flips a bit in the middle of an object.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("an object");
    let at = bytes.len() / 2;
    bytes[at] ^= 0x10;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("permissions");
    fs::write(path, bytes).expect("an object");
}

#[test]
fn a_backup_that_verify_found_damaged_gives_way_to_the_next_older_whole_one() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE words (word text)");
    let ids: Vec<String> = (0..4)
        .map(|number| {
            let id = archived.backup();
            archived.sql(&format!("INSERT INTO words VALUES ('word {number}')"));
            id
        })
        .collect();
    archived.finish();
    let plan = |flags: &[&str]| answer(archived.pitr_restore().arg("--dry-run").args(flags));
    let verify = || verify(&archived);
    let object = |id: &str, name: &str| {
        let mut found = files_below(&archived.place.path().join("repository"));
        found.retain(|path| path.to_string_lossy().contains(&format!("/{id}/{name}")));
        found.pop().expect("an object")
    };
    let (_, whole, _) = plan(&[]);
    assert_eq!(whole["backup"], *ids[3]);
    assert_eq!(whole["reason"], "the newest backup");
    let stop = archived.listing()["backups"][2]["stop_lsn"].clone();
    let stop = stop.as_str().expect("an LSN").to_owned();
    let (_, early, _) = plan(&["--target-lsn", &stop]);
    assert_eq!(early["backup"], *ids[2]);
    assert_eq!(
        early["reason"],
        "the newest backup that ends before the stop"
    );

    // The last by a bit in a slice, which only `verify` sees; the one before by a slice that is
    // gone.
    flip(&object(&ids[3], "base."));
    assert_eq!(verify(), Some(4));
    fs::remove_file(object(&ids[2], "base.")).expect("it goes");
    let (code, older, error) = plan(&[]);
    assert_eq!(code, Some(0), "{error}");
    assert_eq!(older["backup"], *ids[1]);
    let reason = older["reason"].as_str().expect("a reason");
    assert!(reason.contains("usable"), "{reason}");
    let passed_over = older["not_chosen"].as_array().expect("backups");
    assert_eq!(passed_over.len(), 2, "{older}");
    for (one, (id, part)) in passed_over.iter().zip([
        (&ids[3], "`wal-archiver verify` at"),
        (&ids[2], "is missing in"),
    ]) {
        assert_eq!(one["backup"], **id);
        let reason = one["reason"].as_str().expect("a reason");
        assert!(
            reason.contains(part) && reason.contains("base."),
            "{reason}"
        );
    }
    let shown = archived.pitr_restore().arg("--dry-run").output();
    let (shown, _) = said(&shown.expect("it runs"));
    assert!(
        shown.contains(&format!("not chosen    {}", ids[3])),
        "{shown}"
    );

    // Asked for by name, it is refused before the copy.
    let (code, _, error) = plan(&["--backup", &ids[3]]);
    assert_eq!(code, Some(4), "{error}");
    assert!(
        error.contains("base.") && error.contains("--force"),
        "{error}"
    );
    assert_eq!(plan(&["--backup", &ids[3], "--force"]).0, Some(0));

    // What is listed as usable is what a plan chooses.
    let listing = archived.listing();
    let listed = listing["backups"].as_array().expect("backups");
    let usable = |at: usize| (listed[at]["usable"] == true, listed[at]["damage"].is_null());
    assert_eq!((usable(1), usable(3)), ((true, true), (false, false)));
    let restored = Restored::start(&archived.place, &bin, &[] as &[&str]).expect("a restore");
    assert_eq!(restored.report["plan"]["backup"], *ids[1]);
    assert_eq!(
        query(&restored.conninfo(), "SELECT count(*) FROM words"),
        "4"
    );
    drop(restored);

    // The manifest of one, the description of the last.
    flip(&object(&ids[1], "backup_manifest"));
    let (_, oldest, error) = plan(&[]);
    assert_eq!(oldest["backup"], *ids[0], "{error}");
    flip(&object(&ids[0], "base."));
    assert_eq!(verify(), Some(4));
    let (code, refused, error) = plan(&[]);
    assert_eq!(code, Some(4), "{error}");
    assert_eq!(refused["error"]["kind"], "integrity");
    assert!(
        error.contains(&ids[3]) && error.contains("no other backup"),
        "{error}"
    );
}

/// Returns the exit code of `wal-archiver verify`.
fn verify(archived: &Archived) -> Option<i32> {
    let mut verify = archived.place.program("wal-archiver").expect("built");
    let output = verify.arg("verify").output().expect("it runs");
    output.status.code()
}

/// Damages a segment so that only `verify` notices it. No plan leads over the segment until its
/// original content is back.
#[test]
fn wal_that_verify_found_damaged_is_missing_until_it_is_replaced() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE words (word text)");
    let first = archived.backup();
    let mut written = Vec::new();
    for number in 0..4 {
        let insert = format!("INSERT INTO words VALUES ('{number}') RETURNING xmin::text");
        let xid = archived.sql(&insert);
        let name = archived.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
        written.push((format!("--target-xid={xid}"), name));
        if number == 2 {
            archived.backup();
        }
        if number < 3 {
            archived.sql("SELECT pg_switch_wal()");
        }
    }
    archived.finish();
    let plan = |flags: &[&str]| answer(archived.pitr_restore().arg("--dry-run").args(flags));
    // Returns the sealed segment, or the last tail of the open segment.
    let object = |name: &str| {
        let mut found = files_below(&archived.place.path().join("repository"));
        found.retain(|path| path.to_string_lossy().contains(name));
        found.pop().expect("an object")
    };
    let damage = |name: &str| {
        let path = object(name);
        let bytes = fs::read(&path).expect("an object");
        flip(&path);
        assert_eq!(verify(&archived), Some(4));
        (path, bytes)
    };
    let refused = |flags: &[&str], name: &str| {
        let (code, _, error) = plan(flags);
        assert_eq!(code, Some(4), "{error}");
        for part in [name, "and the WAL from 0/", "nearest reachable target is"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    let [(before, _), (inside, name), (behind, _), (latest, last)] = written.as_slice() else {
        panic!("four rows");
    };
    // Damage in the middle: targets before the segment, and after the next backup, are reached.
    let (path, bytes) = damage(name);
    for target in [inside, behind] {
        refused(&[target], name);
    }
    for target in [before, latest] {
        assert_eq!(plan(&[target]).0, Some(0), "{target}");
    }
    // The target that the refusal offers is reached: PostgreSQL prefetches the damaged segment, and
    // does not need it.
    let (_, _, error) = plan(&[inside]);
    let (_, offered) = error
        .split_once("nearest reachable target is ")
        .expect("it");
    let offered: Vec<&str> = offered.split_whitespace().take(2).collect();
    assert_eq!(offered[0], "--target-lsn", "{error}");
    let lsn = offered[1].trim_end_matches(|letter: char| !letter.is_ascii_hexdigit());
    let arguments = [offered[0], lsn];
    let restored = Restored::start(&archived.place, &bin, &arguments).expect("it is reached");
    let mut client = restored.connect().expect("a connection");
    let rows = client.query_one("SELECT string_agg(word, '') FROM words", &[]);
    assert_eq!(rows.expect("rows").get::<_, &str>(0), "0");
    drop((client, restored));
    let listing = archived.listing();
    let damaged = listing["damaged"][0]["object"].as_str().expect("an object");
    assert!(damaged.contains(name), "{damaged}");
    assert_eq!(
        listing["gaps"].as_array().map(Vec::len),
        Some(1),
        "{listing:#}"
    );
    assert_eq!(archived.plan_shown_times(), 4, "{listing:#}");
    // The result of the verification stays, but the object is intact again.
    fs::write(&path, bytes).expect("it is replaced");
    assert_eq!(plan(&[inside]).0, Some(0));
    assert_eq!(
        archived.listing()["damaged"].as_array().map(Vec::len),
        Some(0)
    );
    let (_, planned, _) = plan(&[inside]);
    assert_eq!(planned["backup"], *first);

    // Damage in the WAL that the newest backup itself needs: the older one names the nearest
    // target.
    let start = listing["backups"][1]["start_lsn"].as_str();
    let start = start.expect("an LSN");
    let needed = archived.sql(&format!("SELECT pg_walfile_name('{start}')"));
    let (path, bytes) = damage(&needed);
    for target in [&[][..], &[latest.as_str()]] {
        refused(target, &needed);
    }
    fs::write(&path, bytes).expect("it is replaced");

    // Damage at the end: a plan for the newest state does not silently lead to an older state.
    let (path, bytes) = damage(last);
    refused(&[], last);
    assert_eq!(plan(&[before]).0, Some(0));
    fs::write(&path, bytes).expect("it is replaced");
    assert_eq!(plan(&[]).0, Some(0));
}

#[test]
fn the_archiver_replaces_the_only_backup_when_verify_found_it_damaged() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let archived = Archived::start(&bin, "");
    let first = archived.backup();
    let mut slices = files_below(&archived.place.path().join("repository"));
    slices.retain(|path| path.to_string_lossy().contains("/base."));
    flip(slices.last().expect("a slice"));
    let mut verify = archived.place.program("wal-archiver").expect("built");
    let verdict = verify.arg("verify").output().expect("it runs");
    assert_eq!(verdict.status.code(), Some(4), "{:?}", said(&verdict));
    wait_until("the archiver took another backup", || {
        archived.listing()["backups"]
            .as_array()
            .is_some_and(|backups| {
                backups
                    .iter()
                    .any(|one| one["id"] != *first && one["usable"] == true)
            })
    });
    let (code, plan, error) = answer(archived.pitr_restore().arg("--dry-run"));
    assert_eq!(code, Some(0), "{error}");
    assert_ne!(plan["backup"], *first);
    assert_eq!(plan["reason"], "the newest backup");
}
