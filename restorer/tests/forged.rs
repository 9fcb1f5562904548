//! Attacks by somebody who may write into the repository or into the target: paths that lead out,
//! sizes that no machine has, parts of other backups, links. Nothing is written
//! outside of the target, and `verify` names each.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::programs::{command, directory, ours, succeed};
use wal_format::checked_json;

use crate::support::{Archived, contents_below, files_below, said, servers};

/// A copy of a repository, to be changed.
struct Forged {
    root: TempDir,
    bin: PathBuf,
}

impl Forged {
    fn of(archived: &Archived, bin: &Path) -> Self {
        let root = directory().expect("a directory");
        let mut cp = command(Path::new("/bin/cp")).expect("cp");
        cp.arg("-r").arg(archived.place.path().join("repository"));
        succeed(cp.arg(root.path())).expect("a copy");
        Self {
            root,
            bin: bin.to_owned(),
        }
    }

    fn repository(&self) -> PathBuf {
        self.root.path().join("repository")
    }

    fn target(&self) -> PathBuf {
        self.root.path().join("data")
    }

    fn program(&self, name: &str) -> Command {
        let mut program = command(&ours(name).expect("it is built")).expect("a user");
        program.arg(format!(
            "--repository=file://{}",
            self.repository().display()
        ));
        program.arg("--catalog=/nonexistent/catalog");
        program.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        program
    }

    /// The objects of backups with this ending, in order.
    fn objects(&self, ending: &str) -> Vec<PathBuf> {
        let mut found = files_below(&self.repository());
        found.retain(|path| path.to_string_lossy().ends_with(ending));
        found
    }

    /// Changes the first `backup.json`, with a correct sum.
    fn change(&self, change: impl Fn(&mut Value)) {
        let path = &self.objects("backup.json")[0];
        let mut document: Value =
            serde_json::from_slice(&fs::read(path).expect("an object")).expect("JSON");
        document.as_object_mut().expect("an object").remove("crc32");
        change(&mut document);
        rewrite(path, &checked_json::to_vec(&document).expect("JSON"));
    }

    fn restore(&self, arguments: &[&str]) -> Output {
        let mut restore = self.program("pitr-restore");
        restore
            .arg("--target-dir")
            .arg(self.target())
            .args(arguments);
        restore.output().expect("it runs")
    }

    fn verify(&self) -> Output {
        self.program("wal-archiver")
            .arg("verify")
            .output()
            .expect("it runs")
    }

    /// That `verify` and a restore name it with exit code 4, and that nothing is written.
    fn refused(&self, case: &str, arguments: &[&str], parts: &[&str]) {
        let done = self.restore(arguments);
        let (_, error) = said(&done);
        assert_eq!(done.status.code(), Some(4), "{case}: {error}");
        for part in parts {
            assert!(error.contains(part), "{case}: no {part:?} in: {error}");
        }
        assert!(!self.target().exists(), "{case}: something was written");
        let done = self.verify();
        let (report, error) = said(&done);
        assert_eq!(done.status.code(), Some(4), "{case}: {report}\n{error}");
        for part in parts {
            assert!(report.contains(part), "{case}: no {part:?} in: {report}");
        }
        eprintln!("{case}: {error}");
    }
}

fn rewrite(path: &Path, bytes: &[u8]) {
    // Objects are read-only files.
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("permissions");
    fs::write(path, bytes).expect("an object");
}

fn exchange(one: &Path, other: &Path) {
    let (first, second) = (
        fs::read(one).expect("an object"),
        fs::read(other).expect("an object"),
    );
    rewrite(one, &second);
    rewrite(other, &first);
}

/// An archive with two backups of several slices, and their names in order.
fn archive() -> Option<(Archived, PathBuf, [String; 2])> {
    let (_, bin) = servers().pop()?;
    let mut archived = Archived::start(&bin, "");
    archived.sql(
        "CREATE TABLE load AS SELECT n, (SELECT string_agg(md5(n::text || i), '') FROM generate_series(1, 60) i) \
         FROM generate_series(1, 12000) n",
    );
    let first = archived.backup();
    archived.sql("INSERT INTO load VALUES (0, 'between')");
    let second = archived.backup();
    archived.sql("INSERT INTO load VALUES (0, 'last')");
    archived.finish();
    // Both may have been started in the same second, so that chance orders their names.
    let mut ids = [first, second];
    ids.sort();
    Some((archived, bin, ids))
}

/// The slices that continue a file.
fn continuing(document: &mut Value) -> &mut Value {
    let slices = document["slices"].as_array_mut().expect("slices");
    let mut continuing = slices
        .iter_mut()
        .filter(|slice| slice["continues"].is_object());
    continuing.next().expect("a slice continues a file")
}

#[test]
fn a_forged_or_exchanged_part_of_a_backup_is_named_before_anything_is_written() {
    let Some((archived, bin, [first, second])) = archive() else {
        return;
    };
    let of_first = ["--backup", first.as_str()];
    let forged = || Forged::of(&archived, &bin);
    let outside = directory().expect("a directory");

    let sound = forged();
    let verified = sound.verify();
    assert!(verified.status.success(), "{}", said(&verified).0);
    // A reader that closes its end is no error (`| head`).
    let mut list = sound.program("pitr-restore");
    let mut list = list
        .arg("list")
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    drop(list.stdout.take());
    assert_eq!(list.wait().expect("it ends").code(), Some(0));

    let escape = outside.path().join("escape").display().to_string();
    for path in [escape.as_str(), "../escape", "base/../../escape"] {
        let one = forged();
        one.change(|document| continuing(document)["continues"]["path"] = json!(path));
        one.refused(path, &of_first, &["backup.json", "outside of its archive"]);
        // A description as the earlier version wrote it is no way around.
        one.change(|document| {
            document["format_version"] = json!(1);
            document
                .as_object_mut()
                .expect("an object")
                .remove("backup_label_sha256");
        });
        one.refused(path, &of_first, &["outside of its archive"]);
        assert!(!one.root.path().join("escape").exists());
    }
    let one = forged();
    one.change(|document| continuing(document)["continues"]["path"] = json!("base/1/999999999"));
    one.refused("a file of no manifest", &of_first, &["a slice continues"]);

    let one = forged();
    one.change(|document| {
        let more = 42_u64 << 30;
        let add = |value: &mut Value| *value = json!(value.as_u64().expect("a number") + more);
        add(&mut continuing(document)["raw_bytes"]);
        add(&mut document["raw_bytes"]);
    });
    one.refused(
        "42 GiB in a slice",
        &of_first,
        &["more bytes than any writer"],
    );
    let one = forged();
    let slice = &one.objects("base.000001.tar.zst")[0];
    fs::set_permissions(slice, fs::Permissions::from_mode(0o644)).expect("permissions");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(slice)
        .expect("it opens");
    file.set_len(42 << 30).expect("a sparse file");
    one.refused(
        "an object of 42 GiB",
        &of_first,
        &["base.000001.tar.zst", "45097156608 bytes"],
    );

    let one = forged();
    let slices = one.objects(".tar.zst");
    exchange(&slices[0], &slices[1]);
    one.refused("exchanged slices", &of_first, &["base.000001.tar.zst"]);
    let one = forged();
    let manifests = one.objects("backup_manifest");
    exchange(&manifests[0], &manifests[1]);
    one.refused("exchanged manifests", &of_first, &["backup_manifest"]);
    let one = forged();
    let descriptions = one.objects("backup.json");
    exchange(&descriptions[0], &descriptions[1]);
    one.refused("exchanged descriptions", &of_first, &[&second]);

    // A copy under another name, next to the original and in its place.
    let one = forged();
    let original = one.objects("backup.json")[0]
        .parent()
        .expect("a folder")
        .to_owned();
    let copied = "20200101T000000Z-0000";
    let mut cp = command(Path::new("/bin/cp")).expect("cp");
    cp.arg("-r")
        .arg(&original)
        .arg(original.with_file_name(copied));
    succeed(&mut cp).expect("a copy");
    one.refused("a copy", &["--backup", copied], &[copied, &first]);
    let done = one.restore(&["--dry-run"]);
    assert!(
        done.status.success(),
        "the other backups are as they were: {}",
        said(&done).1
    );
    // Of another cluster.
    let one = forged();
    one.change(|document| document["system_identifier"] = json!("7000000000000000001"));
    one.refused("another system", &of_first, &["7000000000000000001"]);
    // A label that is not the one of this backup.
    let one = forged();
    one.change(|document| document["backup_label_sha256"] = json!("0".repeat(64)));
    one.refused("another label", &of_first, &["backup_label"]);
    assert_eq!(fs::read_dir(outside.path()).expect("it lists").count(), 0);
}

#[test]
fn a_link_in_an_existing_target_leads_nowhere() {
    let Some((archived, bin, _)) = archive() else {
        return;
    };
    let one = Forged::of(&archived, &bin);
    let restored = one.restore(&[]);
    assert!(restored.status.success(), "{}", said(&restored).1);
    let data = one.target();
    let outside = one.root.path().join("outside");
    let owned = |action: &dyn Fn()| {
        action();
        let mut chown = Command::new("/bin/chown");
        chown.arg("-R").arg("--no-dereference");
        chown
            .arg(format!("--reference={}", data.display()))
            .arg(one.root.path());
        assert!(chown.status().expect("it runs").success());
    };
    owned(&|| {
        fs::create_dir(&outside).expect("a directory");
        for name in ["base/1", "pg_xact"] {
            let there = outside.join(name.replace('/', "_"));
            move_to(&data.join(name), &there);
            symlink(&there, data.join(name)).expect("a link");
        }
        // One that only the backup has, and a file that has a second name outside.
        fs::write(outside.join("precious"), "theirs").expect("a file");
        symlink(outside.join("precious"), data.join("PG_VERSION.new")).expect("a link");
        fs::remove_file(data.join("pg_hba.conf")).expect("it goes");
        symlink(outside.join("precious"), data.join("pg_hba.conf")).expect("a link");
        symlink(
            outside.join("precious"),
            data.join("RESTORE_INCOMPLETE.new"),
        )
        .expect("a link");
        symlink(outside.join("precious"), data.join("base/5/999")).expect("a link");
        fs::hard_link(data.join("global/1262"), outside.join("linked")).expect("a second name");
    });
    let before = contents_below(&outside);
    assert!(before.len() > 100, "{} files", before.len());
    let done = one.restore(&["--delta"]);
    assert!(done.status.success(), "{}", said(&done).1);
    assert!(
        before == contents_below(&outside),
        "files outside of the target were changed"
    );
    for name in ["base/1", "pg_xact"] {
        assert!(
            !data.join(name).is_symlink() && data.join(name).is_dir(),
            "{name}"
        );
    }
    let own = fs::metadata(data.join("global/1262")).expect("it is there");
    assert_eq!(
        own.nlink(),
        1,
        "the server would write into the other name too"
    );

    // The directory of pg_control itself, and of the WAL with somebody's file in it.
    let there = outside.join("global");
    owned(&|| {
        move_to(&data.join("global"), &there);
        symlink(&there, data.join("global")).expect("a link");
    });
    let before = contents_below(&outside);
    let refused = |parts: &[&str]| {
        let done = one.restore(&["--delta"]);
        let (_, error) = said(&done);
        assert_eq!(done.status.code(), Some(2), "{error}");
        for part in parts {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
        assert!(
            before == contents_below(&outside),
            "files outside of the target were changed"
        );
    };
    refused(&["global", "symbolic link"]);
    owned(&|| {
        fs::remove_file(data.join("global")).expect("the link goes");
        let mut cp = Command::new("/bin/cp");
        assert!(
            cp.arg("-r")
                .arg(&there)
                .arg(&data)
                .status()
                .expect("cp")
                .success()
        );
        fs::remove_dir_all(data.join("pg_wal")).expect("it goes");
        symlink(&outside, data.join("pg_wal")).expect("a link");
    });
    refused(&["pg_wal", "which is not WAL"]);
}

fn move_to(from: &Path, to: &Path) {
    let mut mv = Command::new("/bin/mv");
    assert!(mv.arg(from).arg(to).status().expect("mv").success());
}
