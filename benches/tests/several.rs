//! Two repositories of one cluster: a flip in any kind of object is read over, found, and repaired from the other; and
//! either of them alone is enough.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use benches::{
    cluster::Cluster, main_job::Place, programs::succeed, restored::Restored,
    tools::servers_or_skip,
};

fn files(root: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root).expect("below it").display();
                found.insert(name.to_string(), path);
            }
        }
    }
    found
}

/// One object of each kind, by what its name has.
fn kinds(root: &Path) -> Vec<PathBuf> {
    let files = files(root);
    let kinds = [
        "/epoch/",
        "/history/",
        "/history-copy/",
        "/wal/",
        "/tail/",
        "/base.000001.tar.zst",
        "/backup_manifest",
        "/backup.json",
    ];
    let found: Vec<PathBuf> = kinds
        .iter()
        .filter_map(|kind| {
            let of_kind = files.iter().find(|(name, _)| name.contains(kind));
            of_kind.map(|(_, path)| path.clone())
        })
        .collect();
    assert!(found.len() >= 7, "{files:?}");
    found
}

fn flip(path: &Path) -> Vec<u8> {
    let sound = fs::read(path).expect("an object");
    let mut damaged = sound.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    replace(path, &damaged);
    sound
}

fn replace(path: &Path, content: &[u8]) {
    fs::remove_file(path).expect("it can be removed");
    fs::write(path, content).expect("a file");
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

fn two_repositories(encryption: &str) {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let settings = format!("repositories = [{{ url = 'file://{{place}}/offsite' }}]\n{encryption}");
    let place = Place::with_settings(&settings).expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    let mut client = cluster.connect().expect("a connection");
    // A commit that returned is in the spool, and a stop sends it on.
    for setting in [
        "ALTER SYSTEM SET synchronous_standby_names = 'tidemark'",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(setting).expect("a setting");
    }
    drop(client);
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("CREATE TABLE t AS SELECT n FROM generate_series(1, 20000) n")
        .expect("a table");
    let mut backup = place.program("wal-archiver").expect("it is built");
    backup.args(["--conninfo", &cluster.conninfo(), "backup"]);
    succeed(&mut backup).expect("a backup");
    client
        .batch_execute("INSERT INTO t SELECT n FROM generate_series(1, 30000) n")
        .expect("rows");
    drop(client);
    daemon.stop().expect("it stops");
    // A history as a promotion leaves it, so that this kind is there too.
    let mut programs = cluster.program("pg_ctl").expect("it is there");
    let data = cluster.data();
    let standby = data.join("standby.signal");
    cluster.crash().expect("it dies");
    fs::write(&standby, "").expect("a signal file");
    let owner = fs::metadata(&data).expect("the data directory");
    drop(std::os::unix::fs::chown(
        &standby,
        Some(std::os::unix::fs::MetadataExt::uid(&owner)),
        Some(std::os::unix::fs::MetadataExt::gid(&owner)),
    ));
    cluster.start_again().expect("it starts");
    succeed(programs.args(["promote", "-w", "-D"]).arg(&data)).expect("it is promoted");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("INSERT INTO t SELECT n FROM generate_series(1, 10) n")
        .expect("rows");
    drop(client);
    daemon.stop().expect("it stops");

    let (near, far) = (
        place.path().join("repository"),
        place.path().join("offsite"),
    );
    let names = |root: &Path| -> Vec<String> {
        let names = files(root).into_keys();
        names.filter(|name| !name.contains("/keys")).collect()
    };
    assert_eq!(names(&near), names(&far), "PostgreSQL {major}");
    let (code, said) = verify(&place, &["--deep"]);
    assert_eq!(code, Some(0), "{said}");

    let mut sound = Vec::new();
    for path in kinds(&near) {
        sound.push((path.clone(), flip(&path)));
        let (code, said) = verify(&place, &[]);
        assert_eq!(code, Some(4), "{}: {said}", path.display());
    }
    assert_eq!(rows(&place, &bin), 50_010, "from the other repository");
    let missing = files(&near)
        .into_iter()
        .rfind(|(name, _)| name.contains("/wal/"))
        .expect("a segment")
        .1;
    sound.push((missing.clone(), fs::read(&missing).expect("an object")));
    fs::remove_file(&missing).expect("it can be removed");
    let (code, said) = verify(&place, &["--repair"]);
    assert_eq!(code, Some(0), "{said}");
    let repaired = said.matches("was repaired from").count();
    assert!(repaired >= kinds(&near).len(), "{said}");
    if encryption.is_empty() {
        for (path, sound) in sound {
            assert_eq!(fs::read(&path).expect("an object"), sound, "{path:?}");
        }
    }
    // Damaged in both places it stays, and is named.
    let segment = &kinds(&near)[3];
    let other = far.join(segment.strip_prefix(&near).expect("below it"));
    let kept = [flip(segment), flip(&other)];
    let (code, said) = verify(&place, &["--repair"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(
        said.contains("no other repository has a sound copy"),
        "{said}"
    );
    replace(segment, &kept[0]);
    replace(&other, &kept[1]);

    fs::remove_dir_all(&near).expect("the near one burns");
    assert_eq!(rows(&place, &bin), 50_010, "from the far one alone");
}

#[test]
fn any_damage_heals_from_the_second_repository() {
    two_repositories("");
}

#[test]
fn any_damage_heals_between_encrypted_repositories() {
    two_repositories(&format!(
        "encryption_key_command = \"printf '{}'\"",
        "ab".repeat(32)
    ));
}

/// A second repository that nobody reaches holds up nothing, and is shown as what it is.
#[test]
fn a_repository_that_is_away_is_told_with_its_lag() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address").to_string();
    drop(free);
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
