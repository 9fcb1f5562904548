//! `restore_command`: 0 delivered, 1 proved absent, 255 anything else. PostgreSQL ends recovery at
//! a 1 and may promote, so an unproved 1 loses data.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use repository::{Repository, config::RepositoryUrl};
use tempfile::TempDir;
use testbed::programs::{command, directory, ours, succeed};
use wal_format::{Branch, SegmentName, SystemIdentifier, TimelineId};

use crate::support::{Archived, long, said, servers, wait_until};

const SEGMENT_BYTES: usize = 1 << 20;

struct Scene {
    archived: Archived,
    root: TempDir,
}

impl Scene {
    fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let mut archived = Archived::start(&bin, "");
        archived.backup();
        archived.sql("CREATE TABLE load (n int, filler text)");
        archived.sql("INSERT INTO load SELECT n, repeat('x', 700) FROM generate_series(1, 6000) n");
        archived.finish();
        let root = directory().expect("a directory");
        Some(Self { archived, root })
    }

    fn repository(&self) -> PathBuf {
        self.archived.place.path().join("repository")
    }

    /// Returns the archived segments of timeline 1, complete ones and the open one.
    fn segments(&self) -> Vec<SegmentName> {
        let mut names: Vec<SegmentName> = Vec::new();
        let mut open = vec![self.repository()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                names.extend(name.trim_end_matches(".zst").parse::<SegmentName>());
                if entry.path().is_dir() {
                    open.push(entry.path());
                }
            }
        }
        names.sort();
        names.dedup();
        names
    }

    fn object(&self, name: SegmentName) -> PathBuf {
        let file = format!("{name}.zst");
        let mut open = vec![self.repository()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                if entry.file_name().to_string_lossy() == file {
                    return entry.path();
                }
                if entry.path().is_dir() {
                    open.push(entry.path());
                }
            }
        }
        panic!("{name} is not sealed");
    }

    fn destination(&self) -> PathBuf {
        self.root.path().join("RECOVERYXLOG")
    }

    fn fetch(&self, name: &str) -> Command {
        fetch(&self.repository(), name, &self.destination())
    }

    /// Returns the exit code. Checks that delivered bytes are all that is archived.
    fn code(&self, name: &str, arguments: &[&str]) -> Option<i32> {
        let _before = fs::remove_file(self.destination());
        let output = self.fetch(name).args(arguments).output().expect("it runs");
        let (_, error) = said(&output);
        let code = output.status.code();
        eprintln!("{code:?}  {name} {arguments:?}  {error}");
        let files = fs::read_dir(self.root.path())
            .expect("a directory")
            .flatten();
        let files = files
            .filter(|file| file.file_name() != "tidemark_ahead")
            .count();
        assert_eq!(
            files,
            usize::from(code == Some(0)),
            "{name}: files are left"
        );
        assert_eq!(error.is_empty(), code != Some(255), "{name}: {error}");
        code
    }

    /// As [`Self::code`] for a file that is delivered. Returns its content.
    fn content(&self, name: &str) -> Vec<u8> {
        assert_eq!(self.code(name, &[]), Some(0), "{name}");
        fs::read(self.destination()).expect("it was delivered")
    }

    fn of_server(&self, name: SegmentName) -> Vec<u8> {
        let path = self
            .archived
            .cluster
            .data()
            .join("pg_wal")
            .join(name.to_string());
        fs::read(path).expect("the server keeps its WAL")
    }
}

fn fetch(repository: &Path, name: &str, destination: &Path) -> Command {
    let mut fetch = command(&ours("pitr-restore").expect("it is built")).expect("a user");
    fetch.arg(format!("--repository=file://{}", repository.display()));
    fetch.args(["wal-fetch", name]).arg(destination);
    fetch
}

#[test]
fn one_is_only_for_what_is_proved_absent() {
    let Some(scene) = Scene::make() else { return };
    let segments = scene.segments();
    let (open, sealed) = segments.split_last().expect("segments");
    assert!(sealed.len() > 4, "{segments:?}");
    let middle = sealed[sealed.len() / 2];

    assert!(
        scene.content(&middle.to_string()) == scene.of_server(middle),
        "{middle}"
    );
    // The open segment: its archived part, then zeros. The server has written no more than that.
    let last = scene.content(&open.to_string());
    assert_eq!(last.len(), SEGMENT_BYTES);
    let theirs = scene.of_server(*open);
    let end = last.iter().rposition(|byte| *byte != 0).expect("some WAL");
    assert!(end > 8192 && end + 1 < SEGMENT_BYTES, "{end}");
    assert!(last[..=end] == theirs[..=end], "{open}");

    let next = beyond(*open);
    for (name, code) in [
        (next.as_str(), 1),
        ("000000090000000000000003", 1),
        ("00000002.history", 1),
        ("00000001.history", 1),
        ("000000010000000000000003.partial", 1),
        ("000000010000000000000003.00000028.backup", 1),
        ("nonsense", 255),
        ("../../etc/passwd", 255),
        ("00000001000000000000000", 255),
    ] {
        assert_eq!(scene.code(name, &[]), Some(code), "{name}");
    }
    histories(&scene);
    with_a_plan(&scene, middle, &next);
    wrong_calls_are_no_answer(&scene, middle);
    a_missing_repository_is_no_answer(&scene, middle);
    damage_is_no_answer(&scene, middle);
    a_repository_that_is_away_is_waited_for(&scene, sealed[0]);
    a_denied_permission_is_not_waited_for(&scene, sealed[0]);
}

/// Returns the name of the segment after the next.
fn beyond(name: SegmentName) -> String {
    let text = name.to_string();
    let number = u32::from_str_radix(&text[16..], 16).expect("hexadecimal");
    format!("{}{:08X}", &text[..16], number + 2)
}

fn histories(scene: &Scene) {
    let url: RepositoryUrl = format!("file://{}", scene.repository().display())
        .parse()
        .expect("a URL");
    let repository =
        Repository::open(&url.into(), &"main".parse().expect("a name")).expect("it opens");
    let system: SystemIdentifier = repository
        .identity()
        .expect("it is readable")
        .expect("it is claimed")
        .system_identifier;
    let timeline = |number| TimelineId::new(number).expect("a timeline");
    let put = |number, content: &[u8]| {
        let branch = Branch::of_history(timeline(number), content);
        repository
            .put_history(system, branch, content)
            .expect("stored");
        branch
    };
    let second = b"1\t0/300000\tno recovery target specified\n";
    put(2, second);
    own(&scene.repository());
    assert_eq!(scene.content("00000002.history"), second);
    assert_eq!(scene.code("00000003.history", &[]), Some(1));
    // If one copy is lost, the other one is delivered.
    let copies = find(&scene.repository(), "history");
    let first = copies
        .iter()
        .find(|path| path.extension().is_some())
        .expect("a copy");
    fs::remove_file(first).expect("it goes");
    assert_eq!(scene.content("00000002.history"), second);
    // Two histories with one number: without a plan it is unknown which is meant.
    put(2, b"1\t0/400000\tno recovery target specified\n");
    own(&scene.repository());
    assert_eq!(scene.code("00000002.history", &[]), Some(255));
    assert_eq!(scene.code("000000020000000000000003", &[]), Some(255));
}

fn with_a_plan(scene: &Scene, middle: SegmentName, next: &str) {
    let mut restore = scene.archived.pitr_restore();
    let plan = succeed(restore.args(["--target-timeline=1", "--dry-run", "--json"]));
    let places = directory().expect("a directory");
    let file = places.path().join("plan.json");
    fs::write(&file, plan.expect("a plan")).expect("a file");
    let plan = format!("--plan={}", file.display());
    assert_eq!(scene.code(&middle.to_string(), &[&plan]), Some(0));
    // After its end nothing exists, nor on a timeline that is not archived.
    for name in [next, "00000003.history", "000000030000000000000003"] {
        assert_eq!(scene.code(name, &[&plan]), Some(1), "{name}");
    }
    // The number of a timeline that the plan does not use is taken, by two histories here.
    assert_eq!(scene.code("00000002.history", &[&plan]), Some(0));
    assert_eq!(scene.code("000000020000000000000003", &[&plan]), Some(255));
    let object = scene.object(middle);
    let aside = object.with_extension("aside");
    fs::copy(&object, &aside).expect("a copy");
    fs::remove_file(&object).expect("it goes");
    assert_eq!(
        scene.code(&middle.to_string(), &[&plan]),
        Some(255),
        "the plan needs it"
    );
    assert_eq!(
        scene.code(&middle.to_string(), &[]),
        Some(255),
        "it is a gap"
    );
    fs::copy(&aside, &object).expect("back");
    fs::remove_file(&aside).expect("it goes");
    own(&scene.repository());
    fs::write(&file, "{").expect("a file");
    assert_eq!(scene.code(&middle.to_string(), &[&plan]), Some(255));
    assert_eq!(
        scene.code(&middle.to_string(), &["--plan=/nonexistent"]),
        Some(255)
    );
}

/// A prefetched file has the same content. A file that no living process vouches for is not used.
#[test]
fn segments_are_fetched_ahead_by_the_plan() {
    let Some(scene) = Scene::make() else { return };
    let segments = scene.segments();
    let mut restore = scene.archived.pitr_restore();
    let plan = succeed(restore.args(["--target-timeline=1", "--dry-run", "--json"]));
    let places = directory().expect("a directory");
    let file = places.path().join("plan.json");
    fs::write(&file, plan.expect("a plan")).expect("a file");
    let plan = format!("--plan={}", file.display());
    let ahead = |name: &SegmentName| find(scene.root.path(), &format!("/{name}"));
    let deliver = |name: &SegmentName| {
        assert_eq!(scene.code(&name.to_string(), &[&plan]), Some(0), "{name}");
        let delivered = fs::read(scene.destination()).expect("it was delivered");
        let theirs = scene.of_server(*name);
        // The server may have written more into the open segment.
        let end = delivered.iter().rposition(|byte| *byte != 0).expect("WAL");
        assert!(delivered[..=end] == theirs[..=end], "{name}");
    };
    assert!(segments.len() >= 7, "{segments:?}");
    let sealed = &segments[segments.len() - 7..];
    deliver(&sealed[0]);
    wait_until("the next is fetched ahead", || {
        ahead(&sealed[1])
            .iter()
            .any(|path| path.extension().is_none())
    });
    deliver(&sealed[1]);
    assert_eq!(ahead(&sealed[1]), Vec::<PathBuf>::new(), "it was copied");
    deliver(&sealed[2]);

    // When killed, it leaves files that no living process vouches for.
    let process = find_process("wal-ahead", &file);
    let kill = Command::new("kill").args(["-9", &process]).status();
    assert!(kill.expect("it runs").success());
    let folder = find(scene.root.path(), "/lock").pop().expect("a folder");
    wait_until("it is gone", || {
        !Path::new("/proc").join(&process).join("exe").exists()
    });
    fs::write(
        folder.with_file_name(sealed[3].to_string()),
        "from before a crash",
    )
    .expect("a file");
    deliver(&sealed[3]);
    // Another process took its place, and another plan's process is not asked.
    deliver(&sealed[4]);
    fs::write(&file, fs::read_to_string(&file).expect("a plan") + "\n").expect("a file");
    deliver(&sealed[5]);
    deliver(&sealed[6]);
}

fn find_process(word: &str, plan: &Path) -> String {
    let plan = plan.display().to_string();
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains(word) && line.contains(&plan) {
            return entry.file_name().to_string_lossy().into_owned();
        }
    }
    panic!("no process {word} runs");
}

fn wrong_calls_are_no_answer(scene: &Scene, middle: SegmentName) {
    let name = middle.to_string();
    // PostgreSQL takes every code up to 125 for the end of the archive.
    for arguments in [
        &["--unknown-flag"][..],
        &["one too many"],
        &["--cluster=other"],
        &["--cluster=../escape"],
        &["--config=/nonexistent.toml"],
    ] {
        assert_eq!(scene.code(&name, arguments), Some(255), "{arguments:?}");
    }
    let mut bare = command(&ours("pitr-restore").expect("built")).expect("a user");
    let bare = bare.arg("wal-fetch").output().expect("it runs");
    assert_eq!(bare.status.code(), Some(255));
    let nowhere = scene.root.path().join("missing/RECOVERYXLOG");
    let output = fetch(&scene.repository(), &name, &nowhere)
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(255));
}

/// A repository that is not there gives no answer, and is waited for: the long tier waits until
/// the end.
fn a_missing_repository_is_no_answer(scene: &Scene, name: SegmentName) {
    let gone = scene.root.path().join("no repository");
    let mut child = fetch(&gone, &name.to_string(), &scene.destination())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut error = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    error.read_line(&mut line).expect("a warning");
    assert!(line.contains("is tried again"), "{line}");
    if long() {
        assert_eq!(child.wait().expect("it ends").code(), Some(255));
    } else {
        assert!(child.try_wait().expect("a child").is_none(), "it gave up");
        child.kill().expect("it runs");
        child.wait().expect("it ends");
    }
    assert!(!gone.exists(), "reading made a repository");
}

fn damage_is_no_answer(scene: &Scene, middle: SegmentName) {
    let object = scene.object(middle);
    let sound = fs::read(&object).expect("an object");
    fs::set_permissions(&object, fs::Permissions::from_mode(0o644)).expect("permissions");
    let mut flipped = sound.clone();
    flipped[sound.len() / 3] ^= 1;
    for (what, bytes) in [
        ("flipped", &flipped[..]),
        ("cut off", &sound[..sound.len() / 2]),
        ("empty", &[]),
    ] {
        fs::write(&object, bytes).expect("an object");
        assert_eq!(scene.code(&middle.to_string(), &[]), Some(255), "{what}");
    }
    // Another segment's object under this one's name.
    let other = scene.segments()[0];
    fs::write(&object, fs::read(scene.object(other)).expect("an object")).expect("an object");
    assert_eq!(
        scene.code(&middle.to_string(), &[]),
        Some(255),
        "another segment"
    );
    fs::write(&object, &sound).expect("an object");
    assert_eq!(scene.code(&middle.to_string(), &[]), Some(0));
}

/// A repository that comes back within the retries.
fn a_repository_that_is_away_is_waited_for(scene: &Scene, name: SegmentName) {
    let here = scene.repository();
    let aside = here.with_extension("aside");
    let _before = fs::remove_file(scene.destination());
    repository::durable::rename(&here, &aside).expect("it goes");
    let mut child = scene.fetch(&name.to_string());
    let mut child = child.stderr(Stdio::piped()).spawn().expect("it runs");
    let mut error = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut line = String::new();
    error.read_line(&mut line).expect("a warning");
    assert!(line.contains("is tried again"), "{line}");
    repository::durable::rename(&aside, &here).expect("it is back");
    assert_eq!(child.wait().expect("a child").code(), Some(0));
    let delivered = fs::read(scene.destination()).expect("it was delivered");
    assert!(delivered == scene.of_server(name));
}

/// Only an operator can change a permission, so PostgreSQL gets its answer at once.
fn a_denied_permission_is_not_waited_for(scene: &Scene, name: SegmentName) {
    let object = scene.object(name);
    let folder = object.parent().expect("a folder");
    fs::set_permissions(folder, fs::Permissions::from_mode(0o000)).expect("permissions");
    let mut child = scene.fetch(&name.to_string());
    let output = child.output().expect("it runs");
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("permissions");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(255), "{said}");
    let remedy = format!("run `chmod u+rwX {}`", folder.display());
    assert!(
        !said.contains("is tried again") && said.contains(&remedy),
        "{said}"
    );
}

fn find(root: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(find(&path, text));
        } else if path.to_string_lossy().contains(text) {
            found.push(path);
        }
    }
    found
}

/// Gives files that the test wrote to the servers' user.
fn own(path: &Path) {
    if let Some((user, group)) = testbed::programs::server_user().expect("a user") {
        let mut chown = Command::new("chown");
        let status = chown
            .arg("-R")
            .arg(format!("{user}:{group}"))
            .arg(path)
            .status();
        assert!(status.expect("chown").success());
    }
}
