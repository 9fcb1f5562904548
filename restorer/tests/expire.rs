//! Retention on a real server: kept backups can be restored, expired moments are refused by name, a
//! second repository keeps longer, and a killed expiry continues. A daemon that expires by itself
//! streams on undisturbed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    thread::sleep,
    time::Duration,
};

use testbed::{
    cluster::Cluster, object_store::ObjectStoreServer, place::Place, programs::succeed,
    restored::Restored,
};

use crate::support::{
    Chance, SETTINGS, end_lsn, long, query, said, servers, wait_archived, wait_until,
};

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const WORDS: &str = "SELECT string_agg(word, ' ' ORDER BY word) FROM words";

fn write(cluster: &Cluster, word: &str) {
    let conninfo = cluster.conninfo();
    query(&conninfo, &format!("INSERT INTO words VALUES ('{word}')"));
    // Segments of 1 MiB, so that some of them are between any two backups.
    for _ in 0..3 {
        query(
            &conninfo,
            "SELECT pg_logical_emit_message(true, '', repeat('x', 100000)); SELECT pg_switch_wal()",
        );
    }
}

fn backup(place: &Place, cluster: &Cluster) -> String {
    let mut backup = place.program("wal-archiver").expect("built");
    backup.args(["--conninfo", &cluster.conninfo(), "backup", "--json"]);
    let document = succeed(&mut backup).expect("a backup");
    let document: serde_json::Value = serde_json::from_str(&document).expect("JSON");
    let backups = listing(place)["backups"].clone();
    let newest = backups.as_array().expect("backups").last().expect("one");
    for key in [
        "id",
        "branch",
        "start_lsn",
        "stop_lsn",
        "finished",
        "stored_bytes",
    ] {
        assert_eq!(document[key], newest[key], "{key}");
    }
    newest["id"].as_str().expect("an id").to_owned()
}

fn listing(place: &Place) -> serde_json::Value {
    let mut list = place.program("pitr-restore").expect("built");
    let said = succeed(list.args(["list", "--json"])).expect("a listing");
    serde_json::from_str(&said).expect("JSON")
}

fn ids(place: &Place) -> Vec<String> {
    let listing = listing(place);
    let backups = listing["backups"].as_array().expect("backups");
    let usable = backups.iter().filter(|one| one["usable"] == true);
    usable
        .map(|one| one["id"].as_str().expect("an id").to_owned())
        .collect()
}

fn configure(place: &Place, lines: &str) {
    let lines = lines.replace("{place}", &place.path().display().to_string());
    fs::write(place.path().join("tidemark.toml"), lines).expect("a configuration");
}

fn expire(place: &Place, arguments: &[&str]) -> Output {
    let mut expire = place.program("wal-archiver").expect("built");
    expire
        .arg("expire")
        .args(arguments)
        .output()
        .expect("it runs")
}

fn dry_run(place: &Place, arguments: &[&str]) -> (Option<i32>, String) {
    let mut restore = place.program("pitr-restore").expect("built");
    let output = restore.args(arguments).arg("--dry-run").output();
    let output = output.expect("it runs");
    (output.status.code(), said(&output).1)
}

fn words(place: &Place, bin: &Path, arguments: &[&str]) -> String {
    let restored = Restored::start(place, bin, arguments).expect("a restore");
    query(&restored.conninfo(), WORDS)
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn what_is_kept_is_restored_and_what_went_is_refused_by_name() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut chance = Chance::new();
    let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
    let both = "repositories = [{ url = 'file://{place}/second', keep_everything = true }]\n";
    let place = Place::with_settings(both).expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    query(&cluster.conninfo(), "CREATE TABLE words (word text)");
    write(&cluster, "a");
    let first = backup(&place, &cluster);
    write(&cluster, "b");
    let second = backup(&place, &cluster);
    write(&cluster, "c");
    sleep(Duration::from_millis(50));
    let moment = wal_format::PgTimestamp::from_jiff(jiff::Timestamp::now()).to_string();
    sleep(Duration::from_millis(50));
    write(&cluster, "d");
    let third = backup(&place, &cluster);
    write(&cluster, "e");
    wait_archived(&cluster.conninfo(), end_lsn(&cluster.conninfo()));
    wait_until("the second repository has it", || {
        let count = |name: &str| files(&place.path().join(name).join("main")).len();
        count("repository") == count("second")
    });
    // The window ends after the third backup.
    sleep(Duration::from_secs(2));
    let keep = format!(
        "keep_window = '1s'\nkeep_backups_min = 1\nkeep_backups = ['{first}']\nexpire_grace = '1ms'\n"
    );
    configure(&place, &format!("{keep}{both}"));
    let repository = place.path().join("repository");
    let before = files(&repository);

    let output = expire(&place, &["--dry-run", "--json"]);
    assert!(output.status.success(), "{:?}", said(&output));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let [here, there] = document[0]["repositories"]
        .as_array()
        .expect("two")
        .as_slice()
    else {
        panic!("two repositories: {document}");
    };
    assert_eq!(here["removed"][0]["id"], second.as_str(), "{document}");
    assert_eq!(
        here["removed"].as_array().map(Vec::len),
        Some(1),
        "{document}"
    );
    assert_eq!(here["kept"].as_array().map(Vec::len), Some(2), "{document}");
    assert!(
        !here["vanishing"].as_array().expect("windows").is_empty(),
        "{document}"
    );
    assert!(
        there["policy"].is_null() && there["swept"]["objects"] == 0,
        "{document}"
    );
    // PostgreSQL may have written WAL meanwhile.
    let is_lasting = |path: &&PathBuf| !path.to_string_lossy().contains("/tail/");
    let lost = before.iter().filter(is_lasting).find(|path| !path.exists());
    assert_eq!(lost, None, "a dry run changes nothing");
    let marked = files(&repository);
    let mut marked = marked.iter().map(|path| path.to_string_lossy());
    assert!(!marked.any(|path| path.contains("/expired/")), "nor marks");

    // Killed repeatedly at random moments.
    for _ in 0..if long() { 40 } else { 6 } {
        let mut killed = place.program("wal-archiver").expect("built");
        let mut killed = killed.arg("expire").spawn().expect("it starts");
        sleep(Duration::from_millis(chance.below(120) as u64 + 5));
        drop(killed.kill());
        killed.wait().expect("it ended");
        assert!(
            ids(&place).contains(&third),
            "what stays is whole at every moment"
        );
    }
    let output = expire(&place, &[]);
    let (told, problem) = said(&output);
    assert!(output.status.success(), "{told}\n{problem}");
    assert!(
        told.contains("pinned") && told.contains("kept forever"),
        "{told}"
    );

    // With both repositories nothing is lost: the second keeps everything.
    assert_eq!(ids(&place), [first.as_str(), &second, &third]);
    assert_eq!(words(&place, &bin, &["--target-time", &moment]), "a b c");
    let mut verify = place.program("wal-archiver").expect("built");
    succeed(verify.arg("verify")).expect("each is as it should be, by its own retention");

    // Only the first repository.
    configure(&place, &keep);
    assert!(
        files(&repository).len() + 5 < before.len(),
        "objects are gone"
    );
    assert_eq!(ids(&place), [first.as_str(), &third]);
    let listed = listing(&place);
    assert_eq!(listed["gaps"].as_array().map(Vec::len), Some(0), "{listed}");
    assert!(
        !listed["expired"].as_array().expect("windows").is_empty(),
        "{listed}"
    );
    assert_eq!(
        words(&place, &bin, &["--backup", &first, "--target-immediate"]),
        "a"
    );
    assert_eq!(words(&place, &bin, &[]), "a b c d e");
    for arguments in [["--target-time", &moment], ["--backup", &second]] {
        let (code, problem) = dry_run(&place, &arguments);
        assert_eq!(code, Some(3), "{arguments:?}: {problem}");
        assert!(problem.contains("expired"), "{arguments:?}: {problem}");
    }
    let mut verify = place.program("wal-archiver").expect("built");
    let told = succeed(verify.args(["verify", "--deep"])).expect("nothing is missing");
    assert!(told.contains("no gap, no damage"), "{told}");
    let output = expire(&place, &[]);
    let (told, _) = said(&output);
    assert!(
        output.status.success() && told.contains("nothing expires"),
        "{told}"
    );
    is_undone_within_the_grace(&place, &bin, (&first, &third));
    let pinned = keep.replace("'1ms'", "'1d'");
    is_deleted_by_name(&place, &pinned, (&first, &third));
    daemon.stop().expect("it stops");
}

/// A policy that does not keep the first backup. Its expiry can be undone for a day.
const UNPINNED: &str = "keep_window = '1s'\nkeep_backups_min = 1\nexpire_grace = '1d'\n";

fn run(place: &Place, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut program = place.program("wal-archiver").expect("built");
    let output = program.args(arguments).output().expect("it runs");
    let (told, problem) = said(&output);
    (output.status.code(), told, problem)
}

fn is_undone_within_the_grace(place: &Place, bin: &Path, (first, third): (&str, &str)) {
    configure(place, UNPINNED);
    let (code, told, problem) = run(place, &["expire"]);
    assert_eq!(code, Some(0), "{told}\n{problem}");
    assert_eq!(ids(place), [third]);
    let (code, told, problem) = run(place, &["expire", "--undo"]);
    assert_eq!(code, Some(0), "{told}\n{problem}");
    assert!(told.contains(first) && !told.contains(third), "{told}");
    assert_eq!(ids(place), [first, third]);
    assert_eq!(
        words(place, bin, &["--backup", first, "--target-immediate"]),
        "a"
    );
    let (code, told, problem) = run(place, &["expire", "--undo"]);
    assert_eq!(code, Some(1), "{told}");
    assert!(problem.contains("nothing was undone"), "{problem}");
}

fn is_deleted_by_name(place: &Place, pinned: &str, (first, third): (&str, &str)) {
    let (code, told, problem) = run(place, &["backup", "delete", third]);
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.contains("the retention policy keeps it (newest") && problem.contains("--force"),
        "{told}\n{problem}"
    );
    assert!(told.contains("can no longer be restored without"), "{told}");
    // The policy no longer keeps the first backup.
    let (code, told, problem) = run(place, &["backup", "delete", first]);
    assert_eq!(code, Some(0), "{told}\n{problem}");
    assert_eq!(ids(place), [third]);
    assert_eq!(run(place, &["expire", "--undo"]).0, Some(0));
    assert_eq!(ids(place), [first, third]);

    // A damaged backup can be deleted, and `verify` then finds no damage.
    configure(place, pinned);
    let (code, _, problem) = run(place, &["backup", "delete", first]);
    assert_eq!(code, Some(1), "{problem}");
    let slice = files(&place.path().join("repository"))
        .into_iter()
        .find(|path| {
            let path = path.to_string_lossy();
            path.contains(first) && path.contains("base.000001")
        });
    let slice = slice.expect("a slice");
    let mut object = fs::read(&slice).expect("an object");
    object[100] ^= 1;
    fs::write(&slice, object).expect("it is written");
    for (id, code, passed) in [(first, 4, false), (third, 0, true)] {
        let (found, told, problem) = run(place, &["verify", "--backup", id, "--json"]);
        assert_eq!(found, Some(code), "{told}\n{problem}");
        let document: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!(document[0]["passed"], passed, "{document:#}");
        let place = &document[0]["repositories"][0];
        let problems = place["problems"].as_array().expect("a list");
        let named = problems.iter().filter_map(|one| one["object"].as_str());
        assert_eq!(
            named.filter(|one| one.contains(id)).count(),
            usize::from(!passed)
        );
        assert!(place["objects"].as_u64() > Some(3), "{document:#}");
    }
    let (code, told, _) = run(place, &["verify", "--json"]);
    assert_eq!(code, Some(4), "{told}");
    let (code, told, problem) = run(place, &["backup", "delete", first]);
    assert_eq!(code, Some(0), "{told}\n{problem}");
    assert!(told.contains("no moment is lost"), "{told}");
    let (code, told, problem) = run(place, &["verify"]);
    assert_eq!(code, Some(0), "{told}\n{problem}");
    // No backup has this name any more.
    let (code, _, problem) = run(place, &["backup", "delete", first]);
    assert_eq!(code, Some(2), "{problem}");
    // Without a retention policy `expire` ends with an error that says so.
    configure(place, "");
    let (code, _, problem) = run(place, &["expire"]);
    assert_eq!(code, Some(2), "{problem}");
    assert!(problem.contains("keep_window"), "{problem}");
}

#[test]
fn a_daemon_that_expires_goes_on_as_if_nothing_had_been_there() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let settings = format!(
        "keep_window = '1s'\nkeep_backups_min = 1\nexpire_grace = '1ms'\nexpire_interval = '1s'\n\
         encryption_key_command = \"printf {KEY}\""
    );
    let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
    let place = Place::in_bucket(store, &settings).expect("a place");
    let mut daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    query(&cluster.conninfo(), "CREATE TABLE words (word text)");
    write(&cluster, "a");
    let first = backup(&place, &cluster);
    write(&cluster, "b");
    let second = backup(&place, &cluster);
    write(&cluster, "c");
    wait_until("the first one expires", || ids(&place) == [second.as_str()]);
    daemon
        .wait_for(|log| log.contains("retention was applied"))
        .expect("it says so");
    // It is killed, and another one continues with the rest.
    daemon.kill().expect("it dies");
    let mut daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    write(&cluster, "d");
    let third = backup(&place, &cluster);
    write(&cluster, "e");
    wait_until("the second one expires", || ids(&place) == [third.as_str()]);
    let (code, problem) = dry_run(&place, &["--backup", &first]);
    assert_eq!(code, Some(3), "{problem}");
    wait_archived(&cluster.conninfo(), end_lsn(&cluster.conninfo()));
    daemon.kill().expect("it dies");
    daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
    write(&cluster, "f");
    wait_archived(&cluster.conninfo(), end_lsn(&cluster.conninfo()));
    daemon
        .wait_for(|log| !log.contains("is missing") && !log.contains("declared lost"))
        .expect("no gap");
    daemon.stop().expect("it stops");
    assert_eq!(words(&place, &bin, &[]), "a b c d e f");
    let mut verify = place.program("wal-archiver").expect("built");
    let told = succeed(verify.arg("verify")).expect("nothing is missing");
    assert!(told.contains("no gap, no damage"), "{told}");
}
