//! An encrypted repository in a bucket: the archiver's host is lost, and the bucket alone gives everything back to who has
//! the key, and nothing to who runs the store.

use std::{fs, path::Path};

use benches::{
    cluster::Cluster, main_job::Place, object_store::ObjectStoreServer, programs::succeed,
    restored::Restored, tools::servers_or_skip,
};

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const OTHER: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
/// In the table, its name, and the label of the backup.
const MARKER: &str = "swordfish_4711";

/// Where a text lies in the files below a folder: how often.
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
        "http = \"127.0.0.1:1\"\nacknowledge = \"remote\"\nencryption_key_command = \"printf {KEY}\""
    );
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::in_bucket(store, &settings).expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    let mut client = cluster.connect().expect("a connection");
    for setting in [
        "ALTER SYSTEM SET synchronous_standby_names = 'tidemark'",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(setting).expect("a setting");
    }
    drop(client);
    let mut client = cluster.connect().expect("a connection");
    let fill = format!(
        "CREATE TABLE {MARKER} AS SELECT '{MARKER}' || n AS t FROM generate_series(1, 20000) n"
    );
    client.batch_execute(&fill).expect("a table");
    let conninfo = cluster.conninfo();
    let mut backup = place.program("wal-archiver").expect("it is built");
    backup.args(["--conninfo", &conninfo, "backup", "--label", MARKER]);
    succeed(&mut backup).expect("a backup");
    let more = format!("INSERT INTO {MARKER} SELECT 'later' FROM generate_series(1, 30000)");
    client.batch_execute(&more).expect("rows");
    drop(client);
    // The host is lost, with all that it has.
    daemon.kill().expect("it dies");
    drop(cluster);
    fs::remove_dir_all(place.path().join("spool")).expect("a spool");

    let root = place.store().expect("a store").directory();
    assert!(
        count(root, b"TMCIPHER") > 8,
        "this is where the objects lie"
    );
    for plain in [
        KEY.as_bytes(),
        MARKER.as_bytes(),
        b"system_identifier",
        b"backup_label",
        b"TIDEMARK",
        b"TMSUMMRY",
    ] {
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

    // Its plan reads summaries by ranges, its recovery fetches segments and tails.
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let rows: i64 = restored
        .connect()
        .expect("a connection")
        .query_one(&format!("SELECT count(*) FROM {MARKER}"), &[])
        .expect("a count")
        .get(0);
    assert_eq!(rows, 50_000);
    let mut verify = place.program("wal-archiver").expect("it is built");
    succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
}
