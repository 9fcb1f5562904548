//! `pitr-restore drill`: it passes on a good archive, fails with the reason on a bad one, and
//! leaves nothing behind.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::{
    cluster::{Cluster, connect},
    place::Place,
    programs::directory,
};

use crate::{
    sizes::Small,
    support::{Archived, SETTINGS, files_below, oldest_and_newest, said, servers, wait_until},
};

/// Checks that pass.
const GOOD: &str = "rto_target = '10min'\n\
    [[drill.check]]\nname = 'rows'\nquery = 'SELECT count(*) FROM done'\nexpect = { min = 3, max = 3 }\n\
    [[drill.check]]\nname = 'fresh'\nexpect = true\n\
    query = \"SELECT $target_time - max(at) < interval '1 hour' FROM done\"\n";

/// An archived cluster with three rows, the last of them after the backup.
pub(crate) struct Scene {
    pub(crate) archived: Archived,
    bin: PathBuf,
    pub(crate) base: tempfile::TempDir,
    /// An LSN at which a prepared transaction has locked `pg_authid`.
    locked: String,
}

impl Scene {
    pub(crate) fn make(bin: &Path, settings: &str) -> Self {
        let place = Place::with_settings(settings).expect("a place");
        let cluster = Cluster::start(bin, 1, SETTINGS).expect("a server");
        let mut archived = Archived::at(cluster, place);
        archived.sql(
            "CREATE TABLE done (at timestamptz DEFAULT clock_timestamp()); CREATE INDEX ON done (at)",
        );
        archived.sql("INSERT INTO done DEFAULT VALUES");
        archived.backup();
        archived.sql("INSERT INTO done DEFAULT VALUES");
        let mut client = connect(&archived.cluster.conninfo()).expect("a connection");
        client
            .batch_execute("BEGIN; LOCK TABLE pg_authid; PREPARE TRANSACTION 'locking'")
            .expect("it is prepared");
        let locked = client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]);
        let locked = locked.expect("a row").get(0);
        client
            .batch_execute("COMMIT PREPARED 'locking'")
            .expect("it is committed");
        archived.sql("INSERT INTO done DEFAULT VALUES");
        archived.finish();
        Self {
            archived,
            bin: bin.to_owned(),
            base: directory().expect("a directory"),
            locked,
        }
    }

    pub(crate) fn configure(&self, settings: &str) {
        let file = self.archived.place.path().join("tidemark.toml");
        fs::write(file, settings).expect("a configuration");
    }

    fn command(&self, bin: &Path, base: &Path) -> Command {
        let mut drill = self.archived.pitr_restore();
        drill.args(["drill", "--json", "--set=fsync=off", "--pg-bin"]);
        drill.arg(bin).arg("--scratch").arg(base);
        drill.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        drill.stdin(Stdio::null());
        drill
    }

    fn drill(&self, arguments: &[&str]) -> Answer {
        Answer::of(
            self.command(&self.bin, self.base.path())
                .args(arguments)
                .output(),
        )
    }

    /// Checks that nothing of a drill is left.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        let left = files_below(self.base.path());
        assert!(left.is_empty(), "{left:?}");
        let entries = fs::read_dir(self.base.path()).expect("a directory");
        assert_eq!(entries.count(), 0);
        assert_eq!(servers_below(self.base.path()), 0);
    }

    /// Returns the recorded drills.
    pub(crate) fn recorded(&self) -> Vec<Value> {
        let files = files_below(&self.archived.place.path().join("repository"));
        let drills = files
            .iter()
            .filter(|path| path.to_string_lossy().contains("/outcome/drill/"));
        drills
            .map(|path| serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON"))
            .collect()
    }
}

/// The number of processes whose working directory is below `root`.
pub(crate) fn servers_below(root: &Path) -> usize {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    processes
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(root))
        })
        .count()
}

struct Answer {
    code: Option<i32>,
    report: Value,
    errors: String,
}

impl Answer {
    fn of(output: std::io::Result<Output>) -> Self {
        let output = output.expect("it runs");
        let (report, errors) = said(&output);
        Self {
            code: output.status.code(),
            report: serde_json::from_str(&report).unwrap_or_default(),
            errors,
        }
    }

    /// Returns the verdict and the answer of a check.
    #[track_caller]
    fn check(&self, name: &str) -> (&str, &str) {
        let checks = self.report["outcome"]["drill"]["checks"].as_array();
        let checks = checks.unwrap_or_else(|| panic!("{}{}", self.errors, self.report));
        let found = checks.iter().find(|check| check["name"] == name);
        let found = found.unwrap_or_else(|| panic!("no {name}: {checks:?}"));
        let text = |field: &str| found[field].as_str().unwrap_or_default();
        (text("verdict"), text("answer"))
    }

    #[track_caller]
    fn assert_failed(&self, code: i32, reason: &str) {
        assert_eq!(self.code, Some(code), "{}{:#}", self.errors, self.report);
        assert!(self.errors.contains(reason), "{}", self.errors);
        assert_eq!(self.report["outcome"]["passed"], false, "{reason}");
    }
}

#[test]
fn a_drill_passes_and_leaves_only_its_record() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let scene = Scene::make(&bin, GOOD);
        let reports = scene.base.path().join("reports");
        let report = format!("--report={}", reports.display());
        let first = scene.drill(&[&report, "--dump"]);
        assert_eq!(first.code, Some(0), "{}{:#}", first.errors, first.report);
        for check in [
            "stop, timeline and system identifier",
            "RTO",
            "data loss",
            "connection to postgres",
            "connection to template1",
            "pg_dump of postgres",
            "query rows",
            "query fresh",
            "pg_checksums",
        ] {
            assert_eq!(
                first.check(check).0,
                "passed",
                "{check}: {:#}",
                first.report
            );
        }
        let amcheck = first.check("pg_amcheck of postgres");
        let expected = if major >= 14 { "passed" } else { "skipped" };
        assert_eq!(amcheck.0, expected, "{}", amcheck.1);
        let outcome = &first.report["outcome"];
        assert_eq!(outcome["loss_seconds"], 0.0, "{outcome:#}");
        assert!(outcome["rto_seconds"].as_f64() > outcome["fetch_seconds"].as_f64());
        assert_eq!(scene.recorded(), std::slice::from_ref(outcome));
        let written = files_below(&reports);
        assert_eq!(written.len(), 2, "{written:?}");
        let text = fs::read_to_string(&written[1]).expect("Markdown");
        assert!(text.contains("| query rows | passed |"), "{text}");
        fs::remove_dir_all(&reports).expect("it goes");
        scene.assert_clean();
        // A random time between the backup and the last commit, which can be repeated. There may be
        // fewer rows.
        scene.configure("");
        let random = scene.drill(&["--target=random", "--seed=7", "--amcheck-limit=1kB"]);
        assert_eq!(random.code, Some(0), "{}{:#}", random.errors, random.report);
        assert_eq!(random.report["outcome"]["drill"]["seed"], 7);
        assert_eq!(random.report["previous"], *outcome);
        scene.assert_clean();
    }
}

#[test]
fn a_drill_fails_with_the_reason() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let scene = Scene::make(
        &bin,
        "rto_target = '1ms'\n\
         [[drill.check]]\nname = 'wrong'\nquery = 'SELECT count(*) FROM done'\nexpect = 4\n\
         [[drill.check]]\nname = 'hangs'\nquery = 'SELECT pg_sleep(600)'\nexpect = 1\ntimeout = '100ms'\n\
         [[drill.check]]\nname = 'none'\nquery = 'SELECT 1 FROM done WHERE false'\nexpect = 'not empty'\n",
    );
    let answer = scene.drill(&[]);
    answer.assert_failed(1, "RTO: ");
    for (name, part) in [
        ("RTO", "the target is 0.0 s"),
        ("query wrong", "answered \"3\", expected is 4"),
        ("query hangs", "longer than its limit of 0.1 s"),
        ("query none", "answered no row, expected is a value"),
    ] {
        let (verdict, said) = answer.check(name);
        assert_eq!(verdict, "failed", "{name}");
        assert!(said.contains(part), "{name}: {said}");
    }
    scene.assert_clean();
    scene.configure("");

    // Every connection waits for a lock that a prepared transaction of the parent holds.
    let answer = scene.drill(&[
        "--check-timeout=1s",
        "--target-exclusive",
        "--target-lsn",
        &scene.locked,
    ]);
    answer.assert_failed(1, "'locking'");
    assert!(
        answer.errors.contains("COMMIT PREPARED"),
        "{}",
        answer.errors
    );
    scene.assert_clean();

    // A server that does not start. Its `postgres` answers only --version.
    let fake = directory().expect("a directory");
    let script = format!(
        "#!/bin/sh\ncase \"$1\" in --version) exec {} --version;; esac\necho 'FATAL:  no' >&2\nexit 1\n",
        bin.join("postgres").display()
    );
    executable(&fake.path().join("postgres"), &script);
    let answer = Answer::of(scene.command(fake.path(), scene.base.path()).output());
    answer.assert_failed(1, "PostgreSQL ended before recovery did");
    scene.assert_clean();

    // Too little space: both numbers, before the copy, and no result.
    let recorded = scene.recorded().len();
    if let Some(small) = Small::mount(&scene.base.path().join("small"), 7) {
        let answer = Answer::of(scene.command(&bin, &small.0).output());
        assert_eq!(answer.code, Some(3), "{}", answer.errors);
        assert!(
            answer.errors.contains(" bytes free, the restore needs "),
            "{}",
            answer.errors
        );
        assert_eq!(files_below(&small.0), Vec::<PathBuf>::new());
    }
    fs::remove_dir_all(scene.base.path().join("small")).ok();
    assert_eq!(scene.recorded().len(), recorded);

    // A segment that is missing between the backup and the newest commit.
    let files = files_below(&scene.archived.place.path().join("repository"));
    let (slices, wal): (Vec<&PathBuf>, Vec<&PathBuf>) = files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "zst"))
        .partition(|path| path.to_string_lossy().contains("/backup/"));
    let newest = wal.last().expect("WAL");
    let aside = scene.archived.place.path().join("aside");
    moved(newest, &aside);
    let answer = scene.drill(&[]);
    answer.assert_failed(3, "is not there");
    moved(&aside, newest);
    scene.assert_clean();

    // A flipped bit in the base backup.
    let slice = slices.first().expect("a slice");
    let mut content = fs::read(slice).expect("a slice");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(slice, content).expect("written");
    let answer = scene.drill(&[]);
    answer.assert_failed(4, "/backup/");
    scene.assert_clean();
    let last = scene.recorded().pop().expect("a record");
    assert_eq!(last["passed"], false);
    assert!(
        last["message"]
            .as_str()
            .is_some_and(|text| text.contains("/backup/")),
        "{last:#}"
    );
}

#[expect(clippy::disallowed_methods, reason = "a test's directory")]
fn moved(from: &Path, to: &Path) {
    fs::rename(from, to).expect("moved");
}

fn executable(path: &Path, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, script).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("executable");
}

/// A drill that waits in a query.
pub(crate) const HANGING: &str =
    "[[drill.check]]\nname = 'waits'\nquery = 'SELECT pg_sleep(600)'\nexpect = 1\ntimeout = '1h'\n";

#[test]
fn a_signal_and_a_kill_leave_nothing_behind() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let scene = Scene::make(&bin, HANGING);
    let begin = || -> Child {
        let mut drill = scene.command(&bin, scene.base.path());
        drill.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = drill.arg("--amcheck-limit=0").spawn().expect("it starts");
        wait_until("the copy is promoted", || {
            let log = files_below(scene.base.path());
            let log = log
                .iter()
                .find(|path| path.ends_with("tidemark_recovery.log"));
            let log = log.and_then(|log| fs::read_to_string(log).ok());
            log.is_some_and(|log| log.contains("ready to accept connections"))
        });
        child
    };
    let send = |child: &Child, signal| {
        kill_process(Pid::from_child(child), signal).expect("it runs");
    };
    let drill = begin();
    let second = scene.drill(&[]);
    assert_eq!(second.code, Some(2), "{}", second.errors);
    let reason = "another drill of this cluster is under way";
    assert!(second.errors.contains(reason), "{}", second.errors);
    send(&drill, Signal::TERM);
    let ended = Answer::of(drill.wait_with_output());
    assert_eq!(ended.code, Some(1), "{}", ended.errors);
    assert!(
        ended.errors.contains("the drill was stopped"),
        "{}",
        ended.errors
    );
    scene.assert_clean();

    let drill = begin();
    send(&drill, Signal::KILL);
    drill.wait_with_output().expect("it is dead");
    assert!(servers_below(scene.base.path()) > 0, "its server is left");
    scene.configure("");
    let next = scene.drill(&["--amcheck-limit=0"]);
    assert_eq!(next.code, Some(0), "{}", next.errors);
    assert!(
        next.errors.contains("a drill was killed here"),
        "{}",
        next.errors
    );
    scene.assert_clean();
    assert_eq!(scene.recorded().len(), 1, "a stopped drill is no result");
}
