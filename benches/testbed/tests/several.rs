//! Two repositories of one cluster: a flipped bit in an object of any kind is read from the other
//! repository, found, and repaired. Each of the two is sufficient alone.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
};

use testbed::{
    cluster::Cluster,
    object_store::{BUCKET, ObjectStoreServer},
    place::Place,
    ports::free_address,
    programs::{directory, succeed},
    restored::Restored,
    tools::servers_or_skip,
};
use wal_format::{Branch, DeclaredGap, FailoverLoss, Lsn, PgTimestamp, SegmentName, checked_json};

const ROWS: i64 = 50_010;
const NEAR: &str = "main/job";
const FAR: &str = "far";

/// One of the two repositories, from the view of its operator, who can change every object.
enum Shelf<'a> {
    Folder(PathBuf),
    /// The objects of a bucket below a prefix.
    Bucket(&'a ObjectStoreServer, &'static str),
}

impl Shelf<'_> {
    /// Returns the names of all objects in the repository.
    fn names(&self) -> Vec<String> {
        let mut names = match self {
            Self::Folder(root) => files(root),
            Self::Bucket(store, prefix) => {
                let keys = store.keys().expect("a listing").into_iter();
                keys.filter_map(|key| Some(key.strip_prefix(prefix)?.strip_prefix('/')?.to_owned()))
                    .collect()
            }
        };
        // Leave out other files: the probe of a bucket, and files that are being written.
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }

    fn get(&self, name: &str) -> Vec<u8> {
        match self {
            Self::Folder(root) => fs::read(root.join(name)).expect("an object"),
            Self::Bucket(store, prefix) => {
                let object = store.object(&format!("{prefix}/{name}"));
                object.expect("an object")
            }
        }
    }

    /// Writes an object, and replaces an existing one.
    fn put(&self, name: &str, body: &[u8]) {
        match self {
            Self::Folder(root) => {
                let path = root.join(name);
                // Keep the owner, who is not the user of the test.
                let mut folder = path.parent().expect("a folder");
                fs::create_dir_all(folder).expect("a folder");
                let owner = fs::metadata(root).expect("the repository");
                // The archiver's files are read-only, so remove the old file first.
                drop(fs::remove_file(&path));
                fs::write(&path, body).expect("a file");
                drop(chown(&path, Some(owner.uid()), Some(owner.gid())));
                while folder != root {
                    drop(chown(folder, Some(owner.uid()), Some(owner.gid())));
                    folder = folder.parent().expect("a folder");
                }
            }
            Self::Bucket(store, prefix) => {
                let put = store.overwrite(&format!("{prefix}/{name}"), body);
                put.expect("an administrator may");
            }
        }
    }

    fn remove(&self, name: &str) {
        match self {
            Self::Folder(root) => fs::remove_file(root.join(name)).expect("it goes"),
            Self::Bucket(store, prefix) => {
                let delete = format!("DELETE /{BUCKET}/{prefix}/{name}");
                let answer = store.unsigned(&delete, "").expect("an answer");
                assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
            }
        }
    }

    fn flip(&self, name: &str, at: usize) -> Vec<u8> {
        let sound = self.get(name);
        let mut damaged = sound.clone();
        damaged[at] ^= 0x01;
        self.put(name, &damaged);
        sound
    }
}

fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root).expect("below it").display();
                found.push(name.to_string());
            }
        }
    }
    found
}

/// The position of the flipped bit in an object.
#[derive(Clone, Copy, Debug)]
enum At {
    Begin,
    Middle,
    End,
    /// In a digit of JSON, which remains a digit: only a checksum detects it.
    Digit,
}

/// Every kind of object, as a part of its name, and the position of the flip. Segments are damaged
/// in the header, in the frames, and in the footer with the summary.
const KINDS: [(&str, At); 14] = [
    ("/epoch/", At::Digit),
    ("/epoch-copy/", At::Digit),
    ("/history/", At::Middle),
    ("/history-copy/", At::Middle),
    ("/wal/", At::Begin),
    ("/wal/", At::Middle),
    ("/wal/", At::End),
    ("/tail/", At::Middle),
    ("/base.000001.tar.zst", At::Middle),
    ("/backup_manifest", At::Middle),
    ("/backup.json", At::Digit),
    ("/gap/", At::Digit),
    ("/failover/", At::Digit),
    ("/keys/", At::Middle),
];

/// Returns an object of each kind, no object twice, and the byte to damage.
fn targets(shelf: &Shelf<'_>, encrypted: bool) -> Vec<(String, usize)> {
    let mut names = shelf.names();
    // No restore needs the records of actions, and none is repaired.
    names.retain(|name| !name.contains("/outcome/"));
    let mut targets: Vec<(String, usize)> = Vec::new();
    for (kind, at) in KINDS {
        let is_new =
            |name: &&String| name.contains(kind) && targets.iter().all(|(known, _)| known != *name);
        let Some(name) = names.iter().find(is_new) else {
            // Only unencrypted objects are written by the test itself, and only encrypted
            // repositories have keys.
            let by_hand = ["/gap/", "/failover/"].contains(&kind);
            let none = (by_hand && encrypted) || (kind == "/keys/" && !encrypted);
            assert!(none, "no {kind} in {names:#?}");
            continue;
        };
        let object = shelf.get(name);
        let length = object.len();
        let byte = match at {
            At::Digit if !encrypted => {
                let sum = object.iter().rposition(|byte| *byte == b':');
                let before = &object[..sum.expect("a sum") - 10];
                let digit = before.iter().rposition(u8::is_ascii_digit);
                digit.expect("a digit")
            }
            At::Begin => 20,
            At::Middle | At::Digit => length / 2,
            At::End => length - 40,
        };
        targets.push((name.clone(), byte));
    }
    targets
}

fn verify(place: &Place, arguments: &[&str]) -> (Option<i32>, String) {
    let mut verify = place.program("wal-archiver").expect("it is built");
    let output = verify.arg("verify").args(arguments).output();
    let output = output.expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn rows(place: &Place, bin: &Path) -> i64 {
    let restored = Restored::start::<&str>(place, bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    let row = client.query_one("SELECT count(*) FROM t", &[]);
    row.expect("a count").get(0)
}

/// Checks that `restore_command` delivers every sealed segment with the server's own bytes.
fn assert_fetched(place: &Place, cluster: &Cluster, shelf: &Shelf<'_>) {
    let root = directory().expect("a directory");
    let mut fetched = 0;
    for name in shelf.names().iter().filter(|name| name.contains("/wal/")) {
        let file = name.rsplit('/').next().expect("a name");
        let segment: SegmentName = file[..24].parse().expect("a segment");
        let destination = root.path().join("fetched");
        let mut fetch = place.program("pitr-restore").expect("it is built");
        fetch.args(["wal-fetch", &segment.to_string()]);
        succeed(fetch.arg(&destination)).expect("it is delivered");
        let theirs = cluster.data().join("pg_wal").join(segment.to_string());
        let theirs = fs::read(theirs).expect("the server keeps it");
        let delivered = fs::read(&destination).expect("a file");
        assert!(delivered == theirs, "{segment}");
        fetched += 1;
    }
    assert!(fetched > 3, "{fetched}");
}

/// Creates an archive in both places with a backup and, after a promotion, two timelines.
fn archive(cluster: &Cluster, place: &Place) {
    let daemon = place.daemon(cluster, "127.0.0.1:0").expect("a daemon");
    // A commit that returned is in the spool, and stopping the daemon uploads it.
    cluster.wait_for_standbys("tidemark").expect("a setting");
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("CREATE TABLE t AS SELECT n FROM generate_series(1, 20000) n")
        .expect("a table");
    let backup = place.back_up(&cluster.conninfo(), &[]);
    backup.expect("a backup");
    client
        .batch_execute("INSERT INTO t SELECT n FROM generate_series(1, 30000) n")
        .expect("rows");
    drop(client);
    daemon.stop().expect("it stops");
    let mut programs = cluster.program("pg_ctl").expect("it is there");
    let data = cluster.data();
    let standby = data.join("standby.signal");
    cluster.crash().expect("it dies");
    fs::write(&standby, "").expect("a signal file");
    let owner = fs::metadata(&data).expect("the data directory");
    drop(chown(&standby, Some(owner.uid()), Some(owner.gid())));
    cluster.start_again().expect("it starts");
    succeed(programs.args(["promote", "-w", "-D"]).arg(&data)).expect("it is promoted");
    let daemon = place.daemon(cluster, "127.0.0.1:0").expect("a daemon");
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("INSERT INTO t SELECT n FROM generate_series(1, 10) n")
        .expect("rows");
    drop(client);
    daemon.stop().expect("it stops");
}

/// Declares a lost range before all others and a failover without losses, so that objects of these
/// kinds exist.
fn declare_losses(shelves: [&Shelf<'_>; 2]) {
    let names = shelves[0].names();
    let epoch = names.iter().find(|name| name.contains("/epoch/"));
    let epoch = shelves[0].get(epoch.expect("an epoch"));
    let epoch: serde_json::Value = serde_json::from_slice(&epoch).expect("JSON");
    let system = serde_json::from_value(epoch["system_identifier"].clone());
    let gap = DeclaredGap {
        branch: Branch::FIRST,
        from_lsn: Lsn(0),
        to_lsn: Lsn(1 << 20),
        declared: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        last_commit: None,
        reason: "a test".to_owned(),
    };
    let system = system.expect("a number");
    let branches = (Branch::FIRST, Branch::FIRST);
    let lost = FailoverLoss::new(branches, (Lsn(1 << 20), Lsn(1 << 20)), gap.declared, vec![]);
    for shelf in shelves {
        let json = checked_json::to_vec(&gap).expect("JSON");
        shelf.put(&format!("main/{}", gap.key(system)), &json);
        let json = checked_json::to_vec(&lost).expect("JSON");
        shelf.put(&format!("main/{}", lost.key(system)), &json);
    }
}

/// Tests two repositories, each in a folder or in a bucket, with or without keys.
fn two_repositories(near_in_bucket: bool, far_in_bucket: bool, encryption: &str) {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::open_to_all_or_skip() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "wal_keep_size = 1GB").expect("a server");
    let elsewhere = directory().expect("a directory");
    let far = if far_in_bucket {
        let keys = store.configuration().trim().replace('\n', ", ");
        format!("{{ url = 's3://{BUCKET}/{FAR}', {keys} }}")
    } else {
        format!("{{ url = 'file://{}/far' }}", elsewhere.path().display())
    };
    let settings = format!("repositories = [{far}]\n{encryption}");
    let mut kept = None;
    let place = if near_in_bucket {
        Place::in_bucket(store, &settings)
    } else {
        kept = Some(store);
        Place::with_settings(&settings)
    };
    let place = place.expect("a place");
    archive(&cluster, &place);

    let store = kept.as_ref().or_else(|| place.store()).expect("a store");
    let near = if near_in_bucket {
        Shelf::Bucket(store, NEAR)
    } else {
        Shelf::Folder(place.path().join("repository"))
    };
    let far = if far_in_bucket {
        Shelf::Bucket(store, FAR)
    } else {
        Shelf::Folder(elsewhere.path().join("far"))
    };
    if encryption.is_empty() {
        declare_losses([&near, &far]);
    }
    let names = |shelf: &Shelf<'_>| -> Vec<String> {
        let names = shelf.names().into_iter();
        names.filter(|name| !name.contains("/keys")).collect()
    };
    assert_eq!(names(&near), names(&far), "PostgreSQL {major}");
    let (code, said) = verify(&place, &["--deep"]);
    assert_eq!(code, Some(0), "{said}");

    let mut sound = Vec::new();
    let targets = targets(&near, !encryption.is_empty());
    for (name, byte) in &targets {
        sound.push((name, near.flip(name, *byte)));
        let (code, said) = verify(&place, &[]);
        assert_eq!(code, Some(4), "{name} at {byte}: {said}");
        let object = name.trim_start_matches("main/").trim_end_matches(".enc");
        assert!(said.contains(object), "{name} at {byte}: {said}");
    }
    assert_eq!(rows(&place, &bin), ROWS, "from the other repository");
    assert_fetched(&place, &cluster, &far);
    let missing = near
        .names()
        .into_iter()
        .rfind(|name| name.contains("/wal/"));
    let missing = missing.expect("a segment");
    sound.push((&missing, near.get(&missing)));
    near.remove(&missing);
    let (code, said) = verify(&place, &["--repair"]);
    assert_eq!(code, Some(0), "{said}");
    let repaired = said.matches("was repaired from").count();
    assert!(repaired > targets.len(), "{said}");
    if encryption.is_empty() {
        for (name, sound) in sound {
            assert!(near.get(name) == sound, "{name}");
        }
    }
    // A segment that is damaged in both places stays and is reported.
    let segment = targets.iter().find(|(name, _)| name.contains("/wal/"));
    let (segment, byte) = segment.expect("a segment");
    let kept = [near.flip(segment, *byte), far.flip(segment, *byte)];
    let (code, said) = verify(&place, &["--repair"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("there is no intact copy of it"), "{said}");
    near.put(segment, &kept[0]);
    far.put(segment, &kept[1]);

    for name in near.names() {
        near.remove(&name);
    }
    let (code, said) = verify(&place, &[]);
    assert_eq!(code, Some(4), "{said}");
    let parts = ["was not examined", "no gap, no damage"];
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    assert_eq!(rows(&place, &bin), ROWS, "from the far one alone");
}

fn key() -> String {
    let key = "ab".repeat(32);
    format!("encryption_key_command = \"printf '{key}'\"")
}

#[test]
fn any_damage_in_a_bucket_heals_from_a_folder() {
    two_repositories(true, false, "");
}

#[test]
fn any_damage_in_an_encrypted_folder_heals_from_a_bucket() {
    two_repositories(false, true, &key());
}

#[test]
#[ignore = "long: make test-long"]
fn any_damage_heals_between_any_two_places() {
    two_repositories(false, false, "");
    two_repositories(true, true, "");
    two_repositories(true, true, &key());
    two_repositories(false, true, "");
    two_repositories(true, false, &key());
}

/// A second repository that cannot be reached delays nothing, and is reported with its lag.
#[test]
fn a_repository_that_is_away_is_told_with_its_lag() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let address = free_address().expect("an address");
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::with_settings(&format!(
        "http = '{address}'\nrepositories = [{{ url = 's3://away/x', s3_endpoint = 'http://127.0.0.1:1', \
         s3_access_key = 'k', s3_secret_key = 's' }}]"
    ))
    .expect("a place");
    let daemon = place.daemon(&cluster, &address).expect("a daemon");
    let mut client = cluster.connect().expect("a connection");
    let fill = "CREATE TABLE t AS SELECT n FROM generate_series(1, 20000) n";
    client.batch_execute(fill).expect("a table");
    drop(client);
    let mut report = serde_json::Value::Null;
    for _ in 0..150 {
        let mut status = place.program("wal-archiver").expect("it is built");
        let said = succeed(status.args(["status", "--json"])).expect("a status");
        report = serde_json::from_str(&said).expect("JSON");
        let places = &report[0]["repositories"];
        if places[1]["error"].is_string() && report[0]["durable"]["remote"]["lag_bytes"] == 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    let places = &report[0]["repositories"];
    assert!(places[0]["error"].is_null(), "{report}");
    let away = &places[1];
    assert!(
        away["error"].is_string() && away["behind"] == true,
        "{report}"
    );
    assert!(away["lag_seconds"].as_f64() > Some(0.0), "{report}");
    assert_eq!(report[0]["durable"]["remote"]["lag_bytes"], 0, "{report}");
    let mut status = place.program("wal-archiver").expect("it is built");
    let said = succeed(status.arg("status")).expect("a status");
    assert!(said.contains("s3://away/x: away"), "{said}");
    drop(daemon);
}
