//! The audit trail on a real server: every action leaves exactly one record, and `wal-archiver
//! audit` shows it.

use std::{collections::BTreeMap, fs, path::Path, process::Output};

use serde_json::Value;
use testbed::{
    cluster::Cluster,
    place::Place,
    programs::{directory, server_user, succeed},
};

use crate::support::{
    SETTINGS, end_lsn, files_below, query, said, servers, wait_archived, wait_until,
};

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

struct Scene {
    cluster: Cluster,
    place: Place,
}

impl Scene {
    fn configure(&self, settings: &str) {
        let file = self.place.path().join("tidemark.toml");
        fs::write(file, settings).expect("a configuration");
    }

    fn run(&self, conninfo: &str, arguments: &[&str]) -> Output {
        let mut program = self.place.program("wal-archiver").expect("built");
        let program = program.args(["--conninfo", conninfo]).args(arguments);
        program.output().expect("it runs")
    }

    #[track_caller]
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(&self.cluster.conninfo(), arguments);
        let (told, problem) = said(&output);
        assert!(output.status.success(), "{arguments:?}: {told}\n{problem}");
        told
    }

    fn records(&self, arguments: &[&str]) -> Vec<Value> {
        let told = self.done(&[&["audit", "--json"], arguments].concat());
        let mut document: Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!(document[0]["unreadable"], serde_json::json!([]));
        match document[0]["records"].take() {
            Value::Array(records) => records,
            other => panic!("{other}"),
        }
    }

    /// Checks the number of the records of each kind.
    #[track_caller]
    fn assert_counts(&self, expected: &[(&str, usize)]) {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let records = self.records(&[]);
        for record in &records {
            let kind = record["kind"].as_str().expect("a kind");
            *counts.entry(kind.to_owned()).or_default() += 1;
        }
        let expected = expected
            .iter()
            .map(|(kind, count)| ((*kind).to_owned(), *count));
        assert_eq!(counts, expected.collect(), "{records:#?}");
    }

    fn restore(&self, target: &Path) -> Output {
        let mut restore = self.place.program("pitr-restore").expect("built");
        restore
            .args(["--target-immediate", "--target-dir"])
            .arg(target);
        restore.output().expect("it runs")
    }
}

#[test]
fn every_action_leaves_exactly_one_record() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
    let keep = "keep_window = '1ms'\nkeep_backups_min = 1\nexpire_grace = '1d'\n";
    let place = Place::with_settings("").expect("a place");
    let mut daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    let scene = Scene { cluster, place };
    let address = daemon.address().expect("a log").expect("an address");
    let check = ["switchover-check", "--json", &format!("--http={address}")];
    let output = scene.run(&scene.cluster.conninfo(), &check);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output).1);
    let verdict: Value = serde_json::from_str(&said(&output).0).expect("JSON");
    assert_eq!(verdict[0]["safe"], false, "{verdict:#}");
    let conditions = verdict[0]["conditions"].as_array().expect("conditions");
    let backup = conditions.iter().find(|one| one["name"] == "backup");
    assert!(backup.is_some_and(|one| one["holds"] != true && one["remedy"].is_string()));
    scene.done(&["backup", "--label", "one"]);
    let backup = scene.records(&["--kind", "backup"])[0]["backup"].clone();
    let first = backup.as_str().expect("a backup");
    // The base backup of a server that is not there fails.
    let failed = scene.run("host=/nowhere user=postgres", &["backup"]);
    assert_eq!(failed.status.code(), Some(5), "{}", said(&failed).1);
    scene.done(&["backup", "keep", first, "--reason", "the \u{1b}[31maudit"]);
    scene.done(&["backup", "release", first]);
    scene.done(&["backup", "annotate", first, "the first"]);
    scene.done(&["verify"]);
    scene.assert_counts(&[("backup", 2), ("note", 3), ("verify", 1)]);

    let reloads = |count| {
        wait_until("the reload is recorded", || {
            scene.records(&["--kind", "reload"]).len() == count
        });
    };
    daemon.reload().expect("it runs");
    reloads(1);
    scene.configure("rpo_targets = '1s'");
    daemon.reload().expect("it runs");
    daemon
        .wait_for(|log| log.contains("not valid"))
        .expect("a refusal");
    scene.configure(keep);
    reloads(2);
    let refused = &scene.records(&["--kind", "reload"])[1];
    assert_eq!(refused["passed"], false, "{refused:#}");
    assert!(
        refused["message"].to_string().contains("rpo_target"),
        "{refused:#}"
    );

    // A restore is recorded, one that was refused is not, and without a writable repository the
    // record is next to the target.
    let targets = directory().expect("a directory");
    let target = targets.path().join("data");
    let (_, problem) = said(&scene.restore(&target));
    assert!(!problem.contains("record"), "{problem}");
    assert_eq!(scene.restore(&target).status.code(), Some(2));
    let restores = scene.records(&["--kind", "restore"]);
    let [restore] = restores.as_slice() else {
        panic!("{restores:#?}");
    };
    let details = &restore["restore"];
    assert_eq!(restore["backup"], first);
    assert_eq!(details["target"], "consistency of the backup");
    assert_eq!(details["directory"], target.display().to_string());
    assert_eq!(details["exit_code"], 0);
    assert_eq!(restore["actor"]["program"], "pitr-restore");
    let temporary = scene.place.path().join("repository/.tidemark-tmp");
    drop(fs::remove_dir_all(&temporary));
    fs::write(&temporary, "a file is no folder").expect("in its place");
    let output = scene.restore(&targets.path().join("other"));
    let (_, problem) = said(&output);
    assert!(output.status.success(), "{problem}");
    let mut local = files_below(targets.path());
    local.retain(|path| path.parent() == Some(targets.path()));
    let [local] = local.as_slice() else {
        panic!("{local:?}: {problem}");
    };
    assert!(problem.contains(&local.display().to_string()), "{problem}");
    let local: Value = serde_json::from_slice(&fs::read(local).expect("a file")).expect("JSON");
    assert_eq!(local["kind"], "restore");
    fs::remove_file(&temporary).expect("the file goes");

    query(&scene.cluster.conninfo(), "SELECT pg_switch_wal()");
    scene.done(&["backup", "--label", "two"]);
    scene.done(&["expire"]);
    scene.done(&["expire", "--undo"]);
    scene.done(&["backup", "delete", first]);
    wait_archived(
        &scene.cluster.conninfo(),
        end_lsn(&scene.cluster.conninfo()),
    );
    daemon.stop().expect("it stops");
    let unasked = ["switchover-check", "--wait", "1ms", "--http=127.0.0.1:1"];
    let output = scene.run(&scene.cluster.conninfo(), &unasked);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output).1);
    assert!(
        said(&output)
            .0
            .contains("unknown  WAL: the daemon does not answer")
    );
    let mut nobody = Place::new()
        .expect("a place")
        .program("wal-archiver")
        .expect("built");
    let nobody = nobody
        .args(["--conninfo=host=/nowhere"])
        .args(unasked)
        .output();
    assert_eq!(nobody.expect("it runs").status.code(), Some(5));
    scene.done(&["remove", "--dry-run"]);
    scene.done(&["remove"]);
    let encrypted = format!("{keep}encryption_key_command = \"printf {KEY}\"\n");
    scene.configure(&encrypted);
    scene.done(&["key", "encrypt"]);
    scene.done(&["key", "encrypt"]);
    scene.assert_counts(&[
        ("backup", 3),
        ("delete", 1),
        ("expire", 2),
        ("key", 1),
        ("note", 3),
        ("reload", 2),
        ("remove", 1),
        ("restore", 1),
        ("verify", 1),
    ]);
    is_shown(&scene);
}

/// Checks the forms of the output, and that a damaged record is named.
fn is_shown(scene: &Scene) {
    let (user, _) = server_user().expect("a user").unwrap_or_default();
    let name = repository::access::user_name(user);
    for record in scene.records(&[]) {
        assert_eq!(record["actor"]["user"], name.as_str(), "{record:#}");
        assert!(
            record["actor"]["host"]
                .as_str()
                .is_some_and(|host| !host.is_empty())
        );
        assert_eq!(record["actor"]["version"], env!("CARGO_PKG_VERSION"));
    }
    assert_eq!(
        scene.records(&["--since", "0 seconds ago"]),
        Vec::<Value>::new()
    );
    assert_eq!(
        scene.records(&["--since", "1 hour ago"]),
        scene.records(&[])
    );
    let table = scene.done(&["audit", "--kind", "note"]);
    assert!(table.contains("the \\u{1b}[31maudit"), "{table}");
    let csv = scene.done(&["audit", "--csv"]);
    assert_eq!(csv.lines().count(), 1 + scene.records(&[]).len(), "{csv}");
    for (arguments, reason) in [
        (["--kind", "backups"], "backup, delete, drill"),
        (["--since", "yesterday"], "--since"),
    ] {
        let output = scene.run("", &[&["audit"], arguments.as_slice()].concat());
        let (_, problem) = said(&output);
        assert_eq!(output.status.code(), Some(2), "{problem}");
        assert!(problem.contains(reason), "{problem}");
    }
    let mut files = files_below(&scene.place.path().join("repository"));
    files.retain(|path| path.to_string_lossy().contains("/outcome/remove/"));
    let record = files.pop().expect("a record");
    fs::write(&record, "{").expect("it is damaged");
    let output = scene.run("", &["audit", "--json"]);
    let (told, problem) = said(&output);
    assert_eq!(output.status.code(), Some(4), "{told}\n{problem}");
    assert!(problem.contains("/outcome/remove/"), "{problem}");
    let document: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(document[0]["records"].as_array().map(Vec::len), Some(14));
    let mut list = scene.place.program("pitr-restore").expect("built");
    succeed(list.arg("list")).expect("a damaged record prevents no restore");
}
