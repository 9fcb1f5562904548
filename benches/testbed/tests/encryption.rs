//! An encrypted repository, end to end: what its operator can see, who can read it, and that
//! `FORMAT.md` suffices to read it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use testbed::{
    cluster::Cluster,
    encrypted_job::{KEY, MARKER, OTHER, PLAIN, ROWS, fill, key_setting, rows},
    place::Place,
    programs::command,
    restored::Restored,
    tools::servers_or_skip,
};

/// Writes a configuration of the place with other keys.
fn with_keys(place: &Place, keys_line: &str) -> PathBuf {
    let path = place.path().join("other.toml");
    let text = format!(
        "repository = \"file://{}/repository\"\nhttp = \"127.0.0.1:1\"\n{keys_line}\n",
        place.path().display()
    );
    fs::write(&path, text).expect("a configuration");
    path
}

fn run(place: &Place, config: &Path, arguments: &[&str]) -> Output {
    let mut program =
        command(&testbed::programs::ours("wal-archiver").expect("it is built")).expect("a user");
    program.arg("--config").arg(config);
    program.arg("--spool").arg(place.path().join("spool"));
    program.args(arguments).output().expect("it runs")
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// Checks that every object except the wrapped keys is encrypted.
fn nothing_is_readable(place: &Place) {
    let mut found = Vec::new();
    files(&place.path().join("repository"), &mut found);
    assert!(found.len() > 8, "{found:?}");
    for path in found {
        let name = path.display().to_string();
        let content = fs::read(&path).expect("an object");
        if name.contains("/.tidemark-tmp/") {
            // A killed program left it: an encrypted object, or a wrapped key.
            let is_plain = |plain: &&[u8]| contains(&content, plain);
            assert!(!PLAIN.iter().any(is_plain), "{name}");
            continue;
        }
        if name.contains("/main/keys") {
            assert!(!contains(&content, KEY.as_bytes()), "{name}");
            continue;
        }
        assert!(
            name.ends_with(".enc") && content.starts_with(b"TMCIPHER"),
            "{name}"
        );
        for plain in PLAIN.iter().chain(&[&b"\x28\xb5\x2f\xfd"[..]]) {
            // The four bytes of zstd's magic occur by chance at one of four billion positions.
            assert!(!contains(&content, plain), "{name} has {plain:?}");
        }
    }
}

#[test]
fn the_main_job_with_encryption() {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::with_settings(&key_setting(KEY)).expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    fill(&cluster, &place).expect("an archive");
    daemon.stop().expect("it stops");
    nothing_is_readable(&place);

    // A wrong key and a missing key are reported in one line, and nothing is changed.
    let before = {
        let mut found = Vec::new();
        files(&place.path().join("repository"), &mut found);
        found.len()
    };
    for (line, words) in [
        (key_setting(OTHER), "the configured key is"),
        (String::new(), "encryption_key_file"),
        (key_setting("12"), "is not a key"),
    ] {
        let config = with_keys(&place, &line);
        for arguments in [["verify"].as_slice(), &["catalog", "rebuild"], &["status"]] {
            let output = run(&place, &config, arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
            assert!(said.contains(words), "{said}");
            assert_eq!(said.trim().lines().count(), 1, "{said}");
        }
    }
    // A new key next to the old one: all data keys are wrapped again, and then the old key is no
    // longer needed.
    let both = with_keys(&place, &key_setting(&format!("{OTHER}\\\\n{KEY}")));
    let rewrapped = run(&place, &both, &["key", "rewrap"]);
    assert!(rewrapped.status.success(), "{rewrapped:?}");
    let new_only = with_keys(&place, &key_setting(OTHER));
    for arguments in [
        ["key", "check"].as_slice(),
        &["verify", "--deep"],
        &["catalog", "rebuild"],
    ] {
        let output = run(&place, &new_only, arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    let mut now = Vec::new();
    files(&place.path().join("repository"), &mut now);
    assert!(now.len() > before, "wrapped keys were added");

    let began = Instant::now();
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    let found = rows(&mut client).expect("a count");
    assert_eq!(found, ROWS, "PostgreSQL {major}");
    eprintln!(
        "PostgreSQL {major}: restored in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    a_stranger_reads_it(&place);
    stray_objects_block_nothing(&place, &new_only, &bin);
    assert!(began.elapsed() < Duration::from_secs(600));
}

/// The conversion is killed after each kind of change, and the archive is read after each.
#[test]
fn a_plain_archive_is_encrypted_while_it_is_used() {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::with_settings("").expect("a place");
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    fill(&cluster, &place).expect("an archive");
    // The archiver without the key stops archiving at the beginning of the conversion. Its end
    // stores every row before.
    daemon.stop().expect("it stops");
    let mut daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    let text = format!("{}\n", key_setting(KEY));
    fs::write(place.path().join("tidemark.toml"), text).expect("a configuration");
    let run = |crash: Option<&str>, program: &str, arguments: &[&str]| {
        let mut command = place.program(program).expect("it is built");
        if let Some(crash) = crash {
            command.env("TIDEMARK_CRASH_POINT", crash);
        }
        let output = command.args(arguments).output().expect("it runs");
        let said = [&*output.stdout, &*output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    let (code, said) = run(None, "wal-archiver", &["verify"]);
    assert!(
        code == Some(2) && said.contains("`wal-archiver key encrypt`"),
        "{said}"
    );
    let mut objects = Vec::new();
    files(&place.path().join("repository"), &mut objects);
    let sealed = objects
        .iter()
        .find(|path| path.display().to_string().contains("/wal/"));
    let sealed = sealed.expect("a sealed segment").file_stem();
    let segment = sealed
        .and_then(|name| name.to_str())
        .expect("a name")
        .to_owned();
    // The data key and its copy, the first record, the identity and its copy, and other objects.
    for (round, crash) in [
        "store-file-durable:kill:1",
        "store-file-durable:kill:2",
        "store-file-durable:kill:1",
        "store-file-durable:kill:2",
        "file-removed:kill:1",
        "store-file-durable:kill:2",
        "file-removed:kill:3",
    ]
    .into_iter()
    .enumerate()
    {
        let (code, said) = run(Some(crash), "wal-archiver", &["key", "encrypt"]);
        assert_eq!(code, None, "{round}: it is killed: {said}");
        if round < 3 {
            continue;
        }
        let (code, said) = run(None, "pitr-restore", &["list"]);
        assert!(code == Some(0) && said.contains(MARKER), "{round}: {said}");
        let fetched = place.path().join(format!("fetched-{round}"));
        let fetched = fetched.display().to_string();
        let fetch = ["wal-fetch", &segment, &fetched];
        let (code, said) = run(None, "pitr-restore", &fetch);
        assert_eq!(code, Some(0), "{round}: {said}");
        assert_eq!(fs::metadata(&fetched).expect("a segment").len(), 1 << 20);
    }
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    assert_eq!(
        rows(&mut client).expect("a count"),
        ROWS,
        "PostgreSQL {major}"
    );
    drop(restored);
    // The daemon without the key has stopped archiving, and says why.
    let write = "CREATE TABLE after_begin AS SELECT generate_series(1, 1000)";
    let mut server = cluster.connect().expect("a connection");
    server.batch_execute(write).expect("it writes");
    let stopped = daemon.wait_for(|log| log.contains("its objects are encrypted"));
    stopped.expect("the daemon notices it");
    drop(daemon.kill());
    let daemon = place
        .daemon(&cluster, "127.0.0.1:0")
        .expect("a daemon with the key");
    let (code, said) = run(None, "wal-archiver", &["key", "encrypt"]);
    assert!(
        code == Some(0) && said.contains("no plain one is left"),
        "{said}"
    );
    place.back_up(&cluster.conninfo(), &[]).expect("a backup");
    daemon.stop().expect("it stops");
    nothing_is_readable(&place);
    let (code, said) = run(None, "wal-archiver", &["verify", "--deep"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(None, "wal-archiver", &["key", "encrypt"]);
    assert!(
        code == Some(0) && said.contains("is encrypted already"),
        "{said}"
    );
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    let found = client.query_one("SELECT count(*) FROM after_begin", &[]);
    assert_eq!(found.expect("a count").get::<_, i64>(0), 1000);
}

/// Unencrypted objects in the encrypted repository are reported and block nothing. The loss of the
/// identity blocks nothing either.
fn stray_objects_block_nothing(place: &Place, config: &Path, bin: &Path) {
    let root = place.path().join("repository/main");
    let stray = |name: &str, content: &[u8]| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, content).expect("an object");
    };
    let of_another = br#"{"format_version": 1, "cluster": "main", "system_identifier": "8", "postgresql_major": 17,
        "wal_segment_size": 16777216, "created": "2026-11-21T10:00:00.000000Z"}"#;
    stray("junk", b"junk");
    stray("epoch/00000001.json", of_another);
    stray("epoch/00000009.json", of_another);
    stray(
        "keys/00112233445566778899aabbccddeeff/0011223344556677.json",
        b"junk",
    );
    for lost in [false, true] {
        if lost {
            for folder in ["epoch", "epoch-copy"] {
                let path = root.join(folder).join("00000001.json.enc");
                fs::remove_file(path).expect("it goes");
            }
        }
        let verify = run(place, config, &["verify"]);
        let said = String::from_utf8_lossy(&verify.stdout).into_owned();
        for name in [
            "main/junk",
            "main/epoch/00000001.json",
            "main/epoch/00000009.json",
        ] {
            assert!(
                said.contains(&format!("{name} is not an object of")),
                "{said}"
            );
        }
        let damaged: Vec<&str> = said
            .lines()
            .filter(|line| line.contains("--repair"))
            .collect();
        assert_eq!(damaged.len(), if lost { 2 } else { 0 }, "{said}");
        for arguments in [["catalog", "rebuild"].as_slice(), &["status"]] {
            let output = run(place, config, arguments);
            assert!(output.status.success(), "{arguments:?}: {output:?}");
        }
    }
    let restored = Restored::start::<&str>(place, bin, &[]).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    assert_eq!(rows(&mut client).expect("a count"), ROWS);
    run(place, config, &["verify", "--repair"]);
    assert!(root.join("epoch-copy/00000001.json.enc").exists());
}

/// Runs the program in `FORMAT.md` unchanged.
fn a_stranger_reads_it(place: &Place) {
    let has = Command::new("python3")
        .args(["-c", "import cryptography"])
        .output();
    if !has.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: python3 has no module cryptography");
        return;
    }
    let manual = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wal-format/FORMAT.md"),
    )
    .expect("FORMAT.md");
    let program = manual
        .split_once("```python\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .expect("a program in FORMAT.md")
        .0;
    let repository = place.path().join("repository");
    let mut found = Vec::new();
    files(&repository, &mut found);
    let mut read = 0;
    for path in found
        .iter()
        .filter(|path| path.extension().is_some_and(|end| end == "enc"))
    {
        let name = path.strip_prefix(&repository).expect("below it");
        let output = Command::new("python3")
            .args(["-c", program, KEY])
            .arg(name)
            .current_dir(&repository)
            .output()
            .expect("python3 runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", name.display());
        let plain = output.stdout;
        let expected: &[u8] = match name.to_string_lossy() {
            name if name.ends_with(".tar.zst.enc") => b"\x28\xb5\x2f\xfd",
            name if name.contains("/wal/") || name.contains("/tail/") => b"\x54\x2a\x4d\x18",
            _ => b"",
        };
        assert!(plain.starts_with(expected), "{}", name.display());
        read += 1;
    }
    assert!(read > 8, "{read}");
}
