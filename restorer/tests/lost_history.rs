//! A timeline whose history file is lost, in a bucket: no restore ends on the timeline before it,
//! and no fetch says that its WAL is absent. PostgreSQL would open there, without the commits of
//! the timeline.

use std::{fs, path::PathBuf, process::Command};

use testbed::{
    bucket_proxy::{BucketProxy, Fault, Verdict},
    cluster::Cluster,
    object_store::{BUCKET, ObjectStoreServer},
    place::Place,
    programs::{command, directory, ours, succeed},
    restored::Restored,
};

use crate::support::{SETTINGS, end_lsn, query, said, servers, wait_archived};

const ROWS: &str = "SELECT count(*) FROM load";

/// An archive of two timelines: 3600 rows are on the first one, all 9001 on the second.
struct Scene {
    bin: PathBuf,
    place: Place,
    /// The second timeline, on which the archive goes on.
    second: Restored,
}

impl Scene {
    fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let store = ObjectStoreServer::open_to_all_or_skip()?;
        let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
        let place = Place::in_bucket(store, "").expect("a place");
        let conninfo = cluster.conninfo();
        let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
        place.back_up(&conninfo, &[]).expect("a backup");
        let fill = "CREATE TABLE load AS SELECT n, repeat('x', 700) AS filler FROM generate_series(1, 3600) n";
        query(&conninfo, fill);
        wait_archived(&conninfo, end_lsn(&conninfo));
        daemon.stop().expect("everything is in the bucket");
        let promote = ["--target-action=promote"];
        let second = Restored::start(&place, &bin, &promote).expect("a second timeline");
        let conninfo = second.conninfo();
        let daemon = place.daemon_at(&conninfo, "127.0.0.1:0", " INFO streaming");
        let fill = "INSERT INTO load SELECT n, repeat('x', 700) FROM generate_series(3601, 9001) n";
        query(&conninfo, fill);
        wait_archived(&conninfo, end_lsn(&conninfo));
        daemon.expect("a daemon").stop().expect("it stops");
        Some(Self { bin, place, second })
    }

    fn store(&self) -> &ObjectStoreServer {
        self.place.store().expect("a store")
    }

    /// The keys in the bucket that contain a text.
    fn keys(&self, text: &str) -> Vec<String> {
        let keys = self.store().keys().expect("a listing").into_iter();
        keys.filter(|key| key.contains(text)).collect()
    }

    /// A host that reaches the bucket through `proxy` only.
    fn behind(&self, proxy: &BucketProxy) -> Place {
        let there = self.place.beside("").expect("a place");
        let file = there.path().join("tidemark.toml");
        let text = fs::read_to_string(&file).expect("a configuration");
        let text = text.replace(&self.store().endpoint(), &proxy.endpoint());
        fs::write(&file, text).expect("a configuration");
        there
    }

    /// A sealed segment of the second timeline.
    fn segment(&self) -> String {
        let keys = self.keys("/wal/00000002-");
        let middle = keys.get(keys.len() / 2).expect("a sealed segment");
        let name = middle.rsplit('/').next().expect("a name");
        name.trim_end_matches(".zst").to_owned()
    }
}

fn fetch(place: &Place, name: &str) -> Option<i32> {
    let root = directory().expect("a directory");
    let mut fetch: Command = command(&ours("pitr-restore").expect("built")).expect("a user");
    fetch
        .arg("--config")
        .arg(place.path().join("tidemark.toml"));
    let destination = root.path().join("RECOVERYXLOG");
    let output = fetch.args(["wal-fetch", name]).arg(&destination).output();
    let output = output.expect("it runs");
    eprintln!("{name}: {:?} {}", output.status.code(), said(&output).1);
    assert_eq!(destination.exists(), output.status.code() == Some(0));
    output.status.code()
}

fn run(place: &Place, program: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let mut program = place.program(program).expect("it is built");
    let output = program.args(arguments).output().expect("it runs");
    let (out, error) = said(&output);
    (output.status.code(), format!("{out}\n{error}"))
}

/// Everything that would follow the second timeline says which file is lost, and does nothing.
fn assert_refused(scene: &Scene, place: &Place, what: &str) {
    let (code, said) = run(place, "wal-archiver", &["verify", "--deep"]);
    assert_eq!(code, Some(4), "{what}: {said}");
    let named = said.contains("/history/00000002-") && said.contains("--repair");
    assert!(named && said.contains("timeline 2"), "{what}: {said}");
    for target in [
        ["--dry-run"].as_slice(),
        &["--dry-run", "--target-timeline=2"],
    ] {
        let (code, said) = run(place, "pitr-restore", target);
        assert_eq!(code, Some(4), "{what} {target:?}: {said}");
        assert!(said.contains("/history/00000002-"), "{what}: {said}");
    }
    let root = directory().expect("a directory");
    let target = root.path().join("data");
    let to = format!("--target-dir={}", target.display());
    let (code, said) = run(place, "pitr-restore", &[&to]);
    assert_eq!(code, Some(4), "{what}: {said}");
    assert!(!target.exists(), "{what}: nothing is copied");
    assert_eq!(fetch(place, &scene.segment()), Some(255), "{what}");
    assert_eq!(fetch(place, "00000002.history"), Some(255), "{what}");
    // Everything that does not need it continues.
    assert_eq!(fetch(place, "00000003.history"), Some(1), "{what}");
    let first = ["--dry-run", "--target-timeline=1"];
    let (code, said) = run(place, "pitr-restore", &first);
    assert_eq!(code, Some(0), "{what}: {said}");
    // A promotion would ask for the lost file to choose its timeline.
    let promoted = [
        "--dry-run",
        "--start",
        "--target-dir=/absent",
        "--target-timeline=1",
    ];
    let (code, said) = run(place, "pitr-restore", &promoted);
    assert_eq!(code, Some(4), "{what}: {said}");
    let named = said.contains("/history/00000002-") && said.contains("--target-action pause");
    assert!(named && said.contains("--repair"), "{what}: {said}");
}

#[test]
fn without_its_history_file_no_restore_ends_before_the_newest_timeline() {
    let Some(scene) = Scene::make() else { return };
    let proxy = BucketProxy::start(scene.store().address()).expect("a proxy");
    let place = scene.behind(&proxy);
    let (code, said) = run(&place, "wal-archiver", &["verify", "--deep"]);
    assert_eq!(code, Some(0), "{said}");

    proxy.decide(|_| Verdict::Hide("/history".to_owned()));
    assert_refused(&scene, &place, "hidden from listings");
    proxy.fail(Fault::Refuse(404, "NoSuchKey"), |asked| {
        asked.is("GET") && asked.line.contains("/history") && asked.line.contains(".history")
    });
    assert_refused(&scene, &place, "listed and absent");
    proxy.heal();

    let copies = scene.keys(".history");
    assert_eq!(copies.len(), 2, "{copies:?}");
    let content = scene.store().object(&copies[0]).expect("a history file");
    for key in &copies {
        let delete = format!("DELETE /{BUCKET}/{key}");
        let answer = scene.store().unsigned(&delete, "").expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
    }
    assert_refused(&scene, &place, "gone");

    // The archive knows enough to build it again.
    let (code, said) = run(&place, "wal-archiver", &["verify", "--repair"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("was repaired from"), "{said}");
    assert_eq!(scene.keys(".history"), copies);
    for key in &copies {
        assert_eq!(scene.store().object(key).expect("a copy"), content);
    }
    let mut verify = place.program("wal-archiver").expect("built");
    succeed(verify.args(["verify", "--deep"])).expect("nothing is missing");
    let restored = Restored::start::<&str>(&scene.place, &scene.bin, &[]).expect("the newest");
    assert_eq!(query(&restored.conninfo(), ROWS), "9001");
    assert_eq!(query(&scene.second.conninfo(), ROWS), "9001");
}
