//! Mistakes of a person or a disk: each gives one line that says what, where and what to do, has
//! the contract's exit code, and overwrites nothing. A failed restore does not look complete.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;
use testbed::{
    programs::{command, directory, ours, server_user, succeed},
    restored::Restored,
};

use crate::support::{Archived, files_below, query, said, servers, wait_until};

const NOW: &str =
    "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')";

/// An archived cluster with a few sealed segments after its backup.
struct Scene {
    archived: Archived,
    bin: PathBuf,
    before_backup: String,
    behind: String,
}

impl Scene {
    fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let mut archived = Archived::start(&bin, "");
        archived.sql("CREATE TABLE load (n int, filler text)");
        let before_backup = archived.sql(NOW);
        archived.sql("INSERT INTO load VALUES (0, 'before the backup')");
        archived.backup();
        archived.sql("INSERT INTO load VALUES (1, 'behind the backup')");
        let behind = archived.sql(NOW);
        for _ in 0..7 {
            archived
                .sql("INSERT INTO load SELECT n, repeat('x', 700) FROM generate_series(1, 1200) n");
        }
        archived.sql("SELECT pg_create_restore_point('at the end')");
        archived.finish();
        Some(Self {
            archived,
            bin,
            before_backup,
            behind,
        })
    }

    /// Copies the repository, to damage it.
    fn copy(&self) -> Damaged {
        let root = directory().expect("a directory");
        let mut cp = command(Path::new("/bin/cp")).expect("cp");
        cp.arg("-r")
            .arg(self.archived.place.path().join("repository"));
        succeed(cp.arg(root.path())).expect("a copy");
        Damaged(root)
    }

    fn pitr_restore(&self, repository: &Path) -> Command {
        pitr_restore(repository, &self.bin)
    }
}

/// Returns `pitr-restore` for any repository, without a catalog.
fn pitr_restore(repository: &Path, bin: &Path) -> Command {
    let mut restore = command(&ours("pitr-restore").expect("it is built")).expect("a user");
    restore.arg(format!("--repository=file://{}", repository.display()));
    restore.arg("--catalog=/nonexistent/catalog");
    restore.arg("--pg-bin").arg(bin);
    restore.env("LD_LIBRARY_PATH", bin.join("../lib"));
    restore
}

struct Damaged(TempDir);

impl Damaged {
    fn repository(&self) -> PathBuf {
        self.0.path().join("repository")
    }

    /// Returns the objects whose path contains this text, in order.
    fn objects(&self, text: &str) -> Vec<PathBuf> {
        let mut found = files_below(&self.repository());
        found.retain(|path| path.to_string_lossy().contains(text));
        found
    }

    /// Returns a sealed segment in the middle of those after the backup.
    fn segment(&self) -> PathBuf {
        let segments = self.objects("/wal/");
        assert!(segments.len() >= 6, "{} segments only", segments.len());
        segments[segments.len() - 3].clone()
    }
}

fn flip(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = fs::read(path).expect("an object");
    let at = at(bytes.len());
    bytes[at] ^= 0x10;
    rewrite(path, &bytes);
}

fn rewrite(path: &Path, bytes: &[u8]) {
    // Objects are read-only files.
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("permissions");
    fs::write(path, bytes).expect("an object");
}

/// Checks the exit code and that one line contains each of `parts`.
fn assert_says(output: &Output, code: i32, parts: &[&str]) {
    let (_, error) = said(output);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert_eq!(error.lines().count(), 1, "more than one line:\n{error}");
    assert!(error.starts_with("pitr-restore: "), "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    eprintln!("{code}  {error}");
}

#[test]
fn what_is_asked_wrongly_is_refused_in_one_line_before_anything_is_touched() {
    let Some(scene) = Scene::make() else { return };
    let repository = scene.archived.place.path().join("repository");
    let root = directory().expect("a directory");
    let target = root.path().join("data");
    let occupied = root.path().join("occupied");
    fs::create_dir(&occupied).expect("a directory");
    fs::write(occupied.join("precious"), "somebody's").expect("a file");
    let closed = root.path().join("closed");
    fs::create_dir(&closed).expect("a directory");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).expect("permissions");
    let file = root.path().join("file");
    fs::write(&file, "").expect("a file");
    let (past, zoneless) = (format!("{}+00", scene.before_backup), scene.behind.clone());
    let text = |path: &Path| path.display().to_string();
    let (occupied_text, closed_text) = (text(&occupied), text(&closed.join("data")));
    let in_file = text(&file.join("data"));
    // Through a link, and with parts that do not exist.
    std::os::unix::fs::symlink(&repository, root.path().join("link")).expect("a link");
    let in_archive = text(&root.path().join("link/main/new/../copy"));
    let server = scene.archived.cluster.data();
    let in_server = text(&server.join("base/copy"));
    let to = text(&target);
    let cases: &[(&[&str], i32, &[&str])] = &[
        (
            &["--target-dir", &occupied_text],
            2,
            &[&occupied_text, "is not empty", "give an empty"],
        ),
        (
            &["--target-dir", &closed_text],
            1,
            &["ermission denied", &closed_text, "give another directory"],
        ),
        (
            &["--target-dir", &in_file],
            1,
            &["ot a directory", &in_file, "give another directory"],
        ),
        (
            &["--dry-run", "--target-dir", &in_archive],
            2,
            &["is inside of the archive", &text(&repository)],
        ),
        (
            &["--dry-run", "--target-dir", &in_server],
            2,
            &["is inside of the data directory", &text(&server)],
        ),
        (&[], 2, &["--target-dir", "--dry-run"]),
        (
            &["--target-dir", &to, "--target-time", &zoneless],
            2,
            &["has no offset", "+00", "--time-zone"],
        ),
        (
            &["--target-dir", &to, "--target-time", "yesterday"],
            2,
            &["is not a time", "+00"],
        ),
        (
            &["--target-dir", &to, "--target-time", "2020-02-30 00:00:00Z"],
            2,
            &["is not a time"],
        ),
        (
            &["--target-dir", &to, "--target-time", &past],
            3,
            &["no base backup ends before", "--target-immediate"],
        ),
        (
            &["--target-dir", &to, "--target-time", "1999-01-01 00:00:00Z"],
            3,
            &["no base backup ends before"],
        ),
        (
            &["--target-dir", &to, "--target-time", "2199-01-01 00:00:00Z"],
            3,
            &["beyond the archive", "proved up to", "without a target"],
        ),
        (
            &["--target-dir", &to, "--target-lsn", "FF/0"],
            3,
            &["FF/0", "beyond the archive"],
        ),
        (
            &["--target-dir", &to, "--target-lsn", "0/10"],
            3,
            &["no base backup ends before"],
        ),
        (
            &["--target-dir", &to, "--target-name", "never made"],
            3,
            &["restore point \"never made\"", "pitr-restore list"],
        ),
        (
            &["--target-dir", &to, "--target-xid", "4000000000"],
            3,
            &["transaction 4000000000", "pitr-restore list"],
        ),
        (
            &["--target-dir", &to, "--target-timeline", "7"],
            3,
            &["timeline 7 is not archived", "00000001"],
        ),
        (
            &["--target-dir", &to, "--target-exclusive"],
            2,
            &["--target-exclusive goes with"],
        ),
        (
            &["--target-dir", &to, "--backup", "20200101T000000Z-0000"],
            2,
            &["is not archived", "pitr-restore list"],
        ),
        (
            &["--target-dir", &to, "--cluster", "other"],
            2,
            &["holds nothing of cluster other", "--cluster"],
        ),
        (
            &["--target-dir", &to, "--tablespace-mapping", "/a=/b"],
            2,
            &["has no tablespace at /a"],
        ),
    ];
    if let Some((user, group)) = server_user().expect("a user") {
        for path in [&occupied, &closed] {
            std::os::unix::fs::chown(path, Some(user), Some(group)).expect("chown");
        }
    }
    for (arguments, code, parts) in cases {
        let output = scene.pitr_restore(&repository).args(*arguments).output();
        assert_says(&output.expect("it runs"), *code, parts);
        assert!(!target.exists(), "{arguments:?} made the target directory");
    }
    assert_eq!(
        fs::read(occupied.join("precious")).expect("it is there"),
        b"somebody's"
    );

    let mut servers = testbed::tools::servers().into_iter();
    if let Some((_, bin)) = servers.find(|(_, bin)| *bin != scene.bin) {
        let mut wrong = pitr_restore(&repository, &bin);
        let output = wrong.args(["--target-dir", &to, "--start"]).output();
        let parts = [
            "no server program of it was found (",
            "postgres (PostgreSQL)",
            "--pg-bin",
        ];
        assert_says(&output.expect("it runs"), 2, &parts);
    }
    let gone = root.path().join("no such repository");
    let output = scene.pitr_restore(&gone).arg("--dry-run").output();
    assert_says(
        &output.expect("it runs"),
        5,
        &["no such repository", "there is no such folder", "mounted"],
    );
    assert!(!gone.exists(), "reading made a repository");
    if server_user().expect("a user").is_some() {
        let mut root_run = Command::new(ours("pitr-restore").expect("built"));
        root_run.arg(format!("--repository=file://{}", repository.display()));
        let output = root_run.args(["--target-dir", &to]).output();
        assert_says(
            &output.expect("it runs"),
            2,
            &["does not run as root", "--owner"],
        );
    }
    assert!(!target.exists());
}

#[test]
fn what_is_damaged_is_named_and_never_restored() {
    let Some(scene) = Scene::make() else { return };
    let refused = |damaged: &Damaged, arguments: &[&str], code: i32, parts: &[&str]| {
        let output = scene
            .pitr_restore(&damaged.repository())
            .arg("--target-dir")
            .arg(damaged.0.path().join("data"))
            .args(arguments)
            .output();
        assert_says(&output.expect("it runs"), code, parts);
        let data = damaged.0.path().join("data");
        assert!(
            !data.exists() || data.join("RESTORE_INCOMPLETE").exists(),
            "it looks done"
        );
        assert!(
            !data.join("global/pg_control").exists(),
            "it could be started"
        );
    };
    let name = |path: &Path| {
        path.file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
    };

    let damaged = scene.copy();
    let segment = damaged.segment();
    let bytes = fs::read(&segment).expect("an object");
    rewrite(&segment, &bytes[..bytes.len() / 2]);
    refused(&damaged, &[], 4, &[&name(&segment), "counts as missing"]);
    // Targets before it can be reached.
    let before = format!("--target-time={}+00", scene.behind);
    let mut restore = scene.pitr_restore(&damaged.repository());
    succeed(restore.args(["--dry-run", &before])).expect("the damage lies behind the target");
    let listed = succeed(scene.pitr_restore(&damaged.repository()).arg("list")).expect("a listing");
    assert!(
        listed.contains("DAMAGED") && listed.contains(&name(&segment)),
        "{listed}"
    );

    let damaged = scene.copy();
    let segment = damaged.segment();
    fs::remove_file(&segment).expect("it goes");
    refused(&damaged, &[], 3, &["WAL is missing from", "--target-lsn"]);
    refused(
        &damaged,
        &["--target-name=at the end"],
        3,
        &["WAL is missing from"],
    );
    // The suggested remedies work.
    let latest = scene
        .pitr_restore(&damaged.repository())
        .arg("--dry-run")
        .output();
    let (_, error) = said(&latest.expect("it runs"));
    let (_, nearest) = error
        .split_once("--target-lsn ")
        .expect("the nearest target");
    let root = directory().expect("a directory");
    let socket = format!("unix_socket_directories={}", root.path().display());
    let mut restore = scene.pitr_restore(&damaged.repository());
    restore.arg("--target-dir").arg(root.path().join("data"));
    restore.args(["--start", "--set", &socket, "--target-lsn", nearest]);
    succeed(&mut restore).expect("the nearest target is reachable");
    drop(Restored::adopt(root, &scene.bin, serde_json::Value::Null));
    let early = format!("--target-time={}+00", scene.before_backup);
    let early = scene
        .pitr_restore(&damaged.repository())
        .args(["--dry-run", &early])
        .output();
    let (_, error) = said(&early.expect("it runs"));
    let (_, flags) = error.split_once("), ").expect("the earliest state");
    let mut restore = scene.pitr_restore(&damaged.repository());
    succeed(restore.arg("--dry-run").args(flags.split(' '))).expect("it is reachable");

    let damaged = scene.copy();
    let slice = &damaged.objects(".tar.zst")[0];
    flip(slice, |length| length / 2);
    refused(
        &damaged,
        &[],
        4,
        &[&name(slice), "SHA-256", "nothing of it was used"],
    );
    let damaged = scene.copy();
    let slice = &damaged.objects(".tar.zst")[0];
    fs::remove_file(slice).expect("it goes");
    refused(&damaged, &[], 4, &[&name(slice), "it is missing in"]);
    let damaged = scene.copy();
    flip(&damaged.objects("backup_manifest")[0], |length| length / 2);
    refused(&damaged, &[], 4, &["backup_manifest", "SHA-256"]);
    let damaged = scene.copy();
    rewrite(
        &damaged.objects("backup.json")[0],
        b"{\"format_version\": 1}",
    );
    refused(&damaged, &[], 4, &["backup.json", "counts as missing"]);
    // One damaged copy of the identity is named and harms nothing. With the old checksum it is a
    // damaged object too.
    let damaged = scene.copy();
    let copies = damaged.objects("/epoch");
    assert_eq!(copies.len(), 2, "{copies:?}");
    let text = fs::read_to_string(&copies[0]).expect("an epoch");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let system = document["system_identifier"]
        .as_str()
        .expect("an identifier");
    let foreign = text.replace(system, "7000000000000000001");
    for content in ["{}", &foreign] {
        rewrite(&copies[0], content.as_bytes());
        let mut plan = scene.pitr_restore(&damaged.repository());
        let output = plan.arg("--dry-run").output().expect("it runs");
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(0), "{error}");
        assert!(error.contains("epoch_copy_damaged"), "{error}");
    }
    // An archive of another cluster under the same name: its objects do not belong to this one.
    // Without a checksum the identity is an object of an earlier build.
    let (body, _) = foreign.rsplit_once(',').expect("a sum");
    for copy in &copies {
        rewrite(copy, format!("{body}\n}}").as_bytes());
    }
    refused(&damaged, &[], 4, &[system, "--system"]);
}

#[test]
fn a_flipped_bit_in_wal_ends_the_recovery_with_its_name() {
    let Some(scene) = Scene::make() else { return };
    let damaged = scene.copy();
    let segment = damaged.segment();
    // In a frame, so that header and footer are intact and the plan cannot detect it.
    flip(&segment, |length| length / 3);
    let root = directory().expect("a directory");
    let socket = format!("unix_socket_directories={}", root.path().display());
    let mut restore = scene.pitr_restore(&damaged.repository());
    restore.arg("--target-dir").arg(root.path().join("data"));
    restore.args(["--start", "--set", &socket, "--set", "fsync=off"]);
    let output = restore.output().expect("it runs");
    let name = segment
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert_says(&output, 4, &[&name, "nothing of it was used"]);
    assert!(
        !root.path().join("data/postmaster.pid").exists(),
        "the server is left running"
    );
    let promoted = fs::read_to_string(root.path().join("data/tidemark_recovery.log"));
    assert!(
        !promoted
            .expect("a log")
            .contains("archive recovery complete"),
        "it was promoted"
    );

    // When the object is intact again, the same directory recovers to the end.
    let sound = scene.copy();
    let good = fs::read(sound.segment()).expect("an object");
    rewrite(&segment, &good);
    let data = root.path().join("data");
    let mut pg_ctl = command(&scene.bin.join("pg_ctl")).expect("pg_ctl");
    pg_ctl.env("LD_LIBRARY_PATH", scene.bin.join("../lib"));
    pg_ctl
        .arg("-D")
        .arg(&data)
        .arg("-l")
        .arg(root.path().join("log"))
        .args(["-w", "start"]);
    let status = pg_ctl.stdout(std::process::Stdio::null()).status();
    assert!(status.expect("it runs").success());
    let restored = Restored::adopt(root, &scene.bin, serde_json::Value::Null);
    wait_until("it is promoted", || {
        query(&restored.conninfo(), "SELECT pg_is_in_recovery()") == "f"
    });
    assert_eq!(
        query(&restored.conninfo(), "SELECT count(*) FROM load"),
        "8402"
    );
}
