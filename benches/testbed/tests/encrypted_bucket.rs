//! An encrypted repository in a bucket: the archiver's host is lost. A user with the key can
//! restore everything from the bucket alone, and the operator of the store can read nothing.

use std::{fs, path::Path};

use testbed::{
    cluster::Cluster,
    encrypted_job::{KEY, OTHER, PLAIN, ROWS, fill, key_setting, rows},
    object_store::ObjectStoreServer,
    place::Place,
    programs::succeed,
    restored::Restored,
    tools::servers_or_skip,
};

/// Returns the number of occurrences of a text in the files below a folder.
fn count(folder: &Path, text: &[u8]) -> usize {
    let mut found = 0;
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found += count(&path, text);
        } else {
            let content = fs::read(&path).unwrap_or_default();
            found += content
                .windows(text.len())
                .filter(|window| *window == text)
                .count();
        }
    }
    found
}

fn write_keys(place: &Place, from: &str, to: &str) {
    let file = place.path().join("tidemark.toml");
    let text = fs::read_to_string(&file).expect("a configuration");
    fs::write(file, text.replace(from, to)).expect("a configuration");
}

#[test]
fn the_bucket_alone_gives_everything_back_and_tells_nothing() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let settings = format!(
        "http = \"127.0.0.1:1\"\nacknowledge = \"remote\"\n{}",
        key_setting(KEY)
    );
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::in_bucket(store, &settings).expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    fill(&cluster, &place).expect("an archive");
    // The host is lost, with all its files.
    daemon.kill().expect("it dies");
    drop(cluster);
    fs::remove_dir_all(place.path().join("spool")).expect("a spool");

    let root = place.store().expect("a store").directory();
    assert!(
        count(root, b"TMCIPHER") > 8,
        "this is where the objects lie"
    );
    for plain in PLAIN.into_iter().chain([KEY.as_bytes()]) {
        let shown = String::from_utf8_lossy(plain).into_owned();
        assert_eq!(count(root, plain), 0, "{shown} can be read in the bucket");
    }

    write_keys(&place, KEY, OTHER);
    for arguments in [["verify"].as_slice(), &["catalog", "rebuild"], &["status"]] {
        let mut program = place.program("wal-archiver").expect("it is built");
        let output = program.args(arguments).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains("the configured key is"), "{said}");
    }
    write_keys(&place, OTHER, KEY);

    // The plan reads summaries by ranges, and the recovery fetches segments and tails.
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    assert_eq!(rows(&mut client).expect("a count"), ROWS);
    let mut verify = place.program("wal-archiver").expect("it is built");
    succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
}
