//! Tablespaces that are created after the backup, or while it is taken: with parent and copy on one
//! host, the files of the running parent stay as they are, byte for byte.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use serde_json::Value;
use tempfile::TempDir;
use testbed::{
    programs::{command, directory, ours, server_user, succeed},
    restored::Restored,
    tools::servers_or_skip,
};
use wal_format::{FrameCompressor, SealedReader, WalEvent, sealed::seal};

use crate::support::{Archived, contents_below, query, said};

const SUMS: &str = "SELECT string_agg(n || ' ' || s, ', ') FROM (SELECT count(*) AS n, sum(hashtext(t::text)::bigint) AS s \
                    FROM older t UNION ALL SELECT count(*), sum(hashtext(t::text)::bigint) FROM short t UNION ALL SELECT count(*), \
                    sum(hashtext(t::text)::bigint) FROM long t) sums";

/// The directories of tablespaces, which belong to the servers' user.
struct Places(TempDir);

impl Places {
    fn new() -> Self {
        Self(directory().expect("a directory"))
    }

    fn own(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir(&path).expect("a place");
        if let Some((user, group)) = server_user().expect("the servers' user") {
            chown(&path, Some(user), Some(group)).expect("chown");
        }
        path
    }
}

/// The files that are not the same in both.
fn differing<'a>(
    before: &'a BTreeMap<PathBuf, Vec<u8>>,
    after: &'a BTreeMap<PathBuf, Vec<u8>>,
) -> Vec<&'a PathBuf> {
    let names = before.keys().chain(after.keys());
    names
        .filter(|name| before.get(*name) != after.get(*name))
        .collect()
}

fn map(old: &Path, new: &Path) -> String {
    format!("--tablespace-mapping={}={}", old.display(), new.display())
}

/// The first of the plan's replayed tablespaces in `location`.
fn planned<'a>(plan: &'a Value, location: &Path) -> &'a Value {
    let tablespaces = plan["tablespaces"].as_array().expect("tablespaces");
    let mut of_location = tablespaces
        .iter()
        .filter(|one| one["location"] == location.display().to_string());
    of_location.next().expect("it is in the plan")
}

#[test]
fn a_copy_never_touches_the_tablespaces_of_its_running_parent() {
    let servers = servers_or_skip();
    for (major, bin) in [servers.first(), servers.last()].into_iter().flatten() {
        eprintln!("PostgreSQL {major}");
        check_version(bin);
    }
}

fn check_version(bin: &Path) {
    let mut archived = Archived::start(bin, "");
    let places = Places::new();
    let older = places.own("older");
    let (short, long) = (places.own("short_name_of_the_parent"), places.own("l"));
    let gone = places.own("gone");
    let create = |name: &str, path: &Path| {
        archived.sql(&format!(
            "CREATE TABLESPACE {name} LOCATION '{}'",
            path.display()
        ));
    };
    let fill = |name: &str| {
        archived.sql(&format!(
            "CREATE TABLE {name} TABLESPACE {name} AS SELECT n, md5(n::text) FROM generate_series(1, 3000) n"
        ));
    };
    create("older", &older);
    fill("older");
    archived.backup();
    create("short", &short);
    let created = archived.sql("SELECT pg_current_wal_insert_lsn()");
    fill("short");
    create("long", &long);
    fill("long");
    create("gone", &gone);
    fill("gone");
    archived.sql("DROP TABLE gone");
    archived.sql("DROP TABLESPACE gone");
    archived.sql("SELECT pg_switch_wal()");
    archived.sql("INSERT INTO short VALUES (0, 'last'); INSERT INTO long VALUES (0, 'last')");
    archived.sql("CHECKPOINT");
    archived.finish();
    let sums = archived.sql(SUMS);
    let oid = |name: &str| {
        archived.sql(&format!(
            "SELECT oid FROM pg_tablespace WHERE spcname = '{name}'"
        ))
    };
    // The first reader of a row sets its hint bits: that is the parent's own change.
    archived.sql("CHECKPOINT");
    let before = contents_below(places.0.path());

    let target = directory().expect("a directory");
    let restore = |arguments: &[&str]| {
        let mut command =
            Restored::command(&archived.place, bin, target.path(), arguments).expect("it is built");
        command.output().expect("it runs")
    };
    let refused = |arguments: &[&str], code: i32, parts: &[&str]| {
        let done = restore(arguments);
        let (_, error) = said(&done);
        assert_eq!(done.status.code(), Some(code), "{error}");
        for part in parts {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
        assert!(!target.path().join("data").exists(), "{error}");
    };
    // Without a mapping the copy would link to the parent's directory.
    let one = map(&older, &target.path().join("older"));
    let parts = [
        short.to_str().expect("UTF-8"),
        &oid("short"),
        "at 0/",
        "--tablespace-mapping",
    ];
    refused(&[&one], 3, &parts);
    refused(&[&one, "--dry-run"], 3, &parts);
    // One refusal names every tablespace that needs a directory: the backup's own and the replay's.
    for arguments in [&[][..], &["--dry-run"][..]] {
        let all = [&older, &short, &long]
            .map(|old| format!("--tablespace-mapping {}=NEW", old.display()));
        refused(arguments, 3, &[all.join(" ").as_str()]);
    }
    // A directory in use is not better for having been named.
    refused(
        &[&one, &map(&short, &older)],
        3,
        &[
            "exists here and is not empty",
            "remove this one if an earlier restore left it",
        ],
    );
    refused(
        &[&one, &map(&short, Path::new("x"))],
        2,
        &["is not absolute"],
    );
    let inside = map(&short, &target.path().join("data/x"));
    let other = map(&long, &target.path().join("l"));
    refused(&[&one, &inside, &other], 2, &["give it another place"]);
    // Two tablespaces at the same time need two directories, also if only the replay makes them.
    let shared = target.path().join("shared");
    for pair in [
        [map(&short, &shared), map(&long, &shared)],
        [
            map(&long, &shared.join(".")),
            map(&short, &shared.join("x")),
        ],
    ] {
        let [first, second] = &pair;
        refused(&[&one, first, second], 2, &["give it another place"]);
        refused(
            &[&one, first, second, "--dry-run"],
            2,
            &["give it another place"],
        );
    }
    let on_older = map(&short, &target.path().join("older"));
    refused(
        &[&one, &on_older, "--dry-run"],
        2,
        &["give it another place"],
    );
    // Before the creation nothing is in the way.
    let at_backup = restore(&[&one, "--target-immediate", "--dry-run"]);
    assert!(at_backup.status.success(), "{}", said(&at_backup).1);
    old_segments_are_read(&archived, &one, &parts);
    let mut standby = archived.pitr_restore();
    let done = standby.args([&one, "--standby", "--dry-run"]).output();
    assert_eq!(done.expect("it runs").status.code(), Some(3));
    let segment = archived.sql(&format!("SELECT pg_walfile_name('{created}')"));
    let both = [
        (short.as_path(), oid("short")),
        (long.as_path(), oid("long")),
    ];
    a_server_without_a_plan_is_kept_out(&archived, &segment, &both);

    // One new directory fits into the record, the other is longer than the old one.
    let (new_short, new_long) = (
        target.path().join("s"),
        target.path().join("a_directory_with_a_much_longer_name"),
    );
    let (two, three) = (map(&short, &new_short), map(&long, &new_long));
    // In the segment in which recovery stops, a longer one is refused by name.
    let stop = format!("--target-lsn={created}");
    let too_long = target
        .path()
        .join("a_directory_with_a_much_longer_name_than_the_old_one");
    let parts = [
        "in the segment in which recovery stops",
        "bytes at the most",
        "choose a shorter path",
    ];
    refused(&[&one, &map(&short, &too_long), &stop], 2, &parts);

    let done = restore(&[&one, &two, &three, "--target-action=promote"]);
    let (report, error) = said(&done);
    assert!(done.status.success(), "{error}");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(planned(&report["plan"], &short)["passed_over"], false);
    assert_eq!(planned(&report["plan"], &long)["passed_over"], true);
    let dropped = &planned(&report["plan"], &gone)["dropped"];
    assert!(dropped.is_string(), "{dropped}");
    let restored = Restored::adopt(target, bin, report);
    let copy = restored.conninfo();
    assert_eq!(query(&copy, SUMS), sums);
    for (name, place) in [("short", &new_short), ("long", &new_long)] {
        let location = format!("SELECT pg_tablespace_location({})", oid(name));
        assert_eq!(query(&copy, &location), place.display().to_string());
    }

    // The copy destroys only its own files.
    for sql in [
        "TRUNCATE short",
        "DROP TABLE long",
        "DROP TABLESPACE long",
        "INSERT INTO older SELECT n, 'copy' FROM generate_series(1, 2000) n",
        "VACUUM FULL older",
        "CHECKPOINT",
    ] {
        query(&copy, sql);
    }
    restored.stop().expect("it stops");
    archived.sql("CHECKPOINT");
    let after = contents_below(places.0.path());
    assert!(before.len() > 3, "{} files", before.len());
    assert_eq!(differing(&before, &after), Vec::<&PathBuf>::new());
    assert_eq!(archived.sql(SUMS), sums);
}

/// Without a plan `wal-fetch` does not deliver what would link to a directory that is in use and
/// not the server's own.
fn a_server_without_a_plan_is_kept_out(
    archived: &Archived,
    segment: &str,
    tablespaces: &[(&Path, String)],
) {
    let data = directory().expect("a directory");
    for name in ["pg_wal", "pg_tblspc"] {
        fs::create_dir(data.path().join(name)).expect("a directory");
    }
    if let Some((user, group)) = server_user().expect("the servers' user") {
        chown(data.path().join("pg_wal"), Some(user), Some(group)).expect("chown");
    }
    let fetch = || {
        let mut fetch = archived.pitr_restore();
        fetch.args(["wal-fetch", segment, "pg_wal/RECOVERYXLOG"]);
        fetch.current_dir(data.path()).output().expect("it runs")
    };
    let refused = fetch();
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(255), "{error}");
    assert!(
        error.contains(&tablespaces[0].1) && error.contains("is not this server's"),
        "{error}"
    );
    assert!(!data.path().join("pg_wal/RECOVERYXLOG").exists());
    // The server that created it may recover.
    for (location, oid) in tablespaces {
        let link = data.path().join("pg_tblspc").join(oid);
        std::os::unix::fs::symlink(location, link).expect("a link");
    }
    let delivered = fetch();
    assert!(delivered.status.success(), "{}", said(&delivered).1);
}

/// Segments of the format version before say nothing of tablespaces: the plan reads their WAL.
fn old_segments_are_read(archived: &Archived, mapping: &str, parts: &[&str]) {
    let copy = directory().expect("a directory");
    let mut cp = command(Path::new("/bin/cp")).expect("cp");
    cp.arg("-r").arg(archived.place.path().join("repository"));
    succeed(cp.arg(copy.path())).expect("a copy");
    let repository = copy.path().join("repository");
    let mut converted = 0;
    for (path, object) in contents_below(&repository) {
        let text = path.to_string_lossy();
        if text.contains("/wal/") || text.contains("/tail/") {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("permissions");
            fs::write(&path, as_version_1(&object)).expect("an object");
            converted += 1;
        }
    }
    assert!(converted > 2, "{converted} objects");
    let mut restore = command(&ours("pitr-restore").expect("it is built")).expect("a user");
    restore.arg(format!("--repository=file://{}", repository.display()));
    restore.args(["--catalog=/nonexistent/catalog", mapping, "--dry-run"]);
    let done = restore.output().expect("it runs");
    let (_, error) = said(&done);
    assert_eq!(done.status.code(), Some(3), "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

/// The same WAL as an object of format version 1, whose summary has no tablespaces.
fn as_version_1(object: &[u8]) -> Vec<u8> {
    let reader = SealedReader::open(object).expect("a sound object");
    let mut wal = Vec::new();
    reader.read_all(&mut wal).expect("its WAL");
    let mut summary = reader.summary().clone();
    summary.events.retain(|(_, event)| {
        !matches!(
            event,
            WalEvent::TablespaceCreate { .. } | WalEvent::TablespaceDrop { .. }
        )
    });
    let mut compressor = FrameCompressor::new(1).expect("a compressor");
    let header = *reader.header();
    let mut object =
        seal(&mut compressor, header, &wal, &summary, reader.proven()).expect("it is sealed");
    let length = object.len();
    let footer_bytes: [u8; 4] = object[length - 24..length - 20]
        .try_into()
        .expect("4 bytes");
    let footer = length - u32::from_le_bytes(footer_bytes) as usize;
    for header in [0, footer + 16] {
        object[header + 16..header + 18].copy_from_slice(&1_u16.to_le_bytes());
        let sum = crc32fast::hash(&object[header..header + 64]);
        object[header + 64..header + 68].copy_from_slice(&sum.to_le_bytes());
    }
    object[length - 16..length - 14].copy_from_slice(&1_u16.to_le_bytes());
    let sum = crc32fast::hash(&object[footer..length - 12]);
    object[length - 12..length - 8].copy_from_slice(&sum.to_le_bytes());
    let old = SealedReader::open(&object).expect("version 1 is read");
    assert_eq!(old.footer().format_version(), 1);
    object
}

/// A tablespace that is created between the redo position of a backup and its end is in the backup
/// and in the WAL behind it: its replay must not link to the directory that it had on the parent.
#[test]
fn a_tablespace_that_is_created_while_the_backup_begins_stays_where_it_is_mapped() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    // Dirty pages make the checkpoint of the backup last.
    let mut archived = Archived::start(&bin, "shared_buffers = 256MB\n");
    let places = Places::new();
    let locations: Vec<PathBuf> = (0..400).map(|n| places.own(&format!("place{n}"))).collect();
    archived.sql(
        "CREATE TABLE load AS SELECT n, repeat('x', 500) AS x FROM generate_series(1, 100000) n",
    );
    let done = AtomicBool::new(false);
    let created = thread::scope(|scope| {
        let creator = scope.spawn(|| {
            let mut client =
                testbed::cluster::connect(&archived.cluster.conninfo()).expect("a client");
            let mut created = 0;
            for (number, path) in locations.iter().enumerate() {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let sql = format!("CREATE TABLESPACE t{number} LOCATION '{}'", path.display());
                client.batch_execute(&sql).expect("a tablespace");
                client
                    .batch_execute(&format!(
                        "CREATE TABLE t{number} TABLESPACE t{number} AS SELECT {number} AS n"
                    ))
                    .expect("a table");
                created += 1;
            }
            created
        });
        archived.backup();
        done.store(true, Ordering::Relaxed);
        creator.join().expect("it ends")
    });
    archived.sql("SELECT pg_switch_wal()");
    archived.sql("INSERT INTO load VALUES (0, 'last')");
    archived.sql("CHECKPOINT");
    archived.finish();
    let before = contents_below(places.0.path());

    let target = directory().expect("a directory");
    let mut mapping: Vec<String> = Vec::new();
    for (number, path) in locations.iter().take(created).enumerate() {
        // Every second one is longer than the old one.
        let new = if number % 2 == 0 {
            target.path().join(format!("p{number}"))
        } else {
            target
                .path()
                .join(format!("a_much_longer_name_than_it_had{number}"))
        };
        mapping.push(map(path, &new));
    }
    let mut command =
        Restored::command(&archived.place, &bin, target.path(), &mapping).expect("it is built");
    let output = command.output().expect("it runs");
    let (report, error) = said(&output);
    assert!(output.status.success(), "{error}");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let restored = Restored::adopt(target, &bin, report);
    // Those of the backup have a file in it; the manifest says which.
    let replayed = restored.report["plan"]["tablespaces"]
        .as_array()
        .expect("a list")
        .clone();
    let objects = contents_below(&archived.place.path().join("repository"));
    let mut manifests = objects
        .iter()
        .filter(|(path, _)| path.ends_with("backup_manifest"));
    let (_, manifest) = manifests.next().expect("a manifest");
    let manifest = String::from_utf8_lossy(manifest);
    let both = replayed
        .iter()
        .filter(|one| manifest.contains(&format!("\"pg_tblspc/{}/", one["oid"])))
        .count();
    eprintln!(
        "{created} created, {} replayed, {both} of them in the backup",
        replayed.len()
    );
    assert!(
        both > 0,
        "none was created between redo and the backup's begin"
    );
    let parent = places.0.path().display().to_string();
    let elsewhere = format!(
        "SELECT count(*) FROM pg_tablespace WHERE pg_tablespace_location(oid) LIKE '{parent}%'"
    );
    assert_eq!(query(&restored.conninfo(), &elsewhere), "0");
    for number in 0..created {
        let sql = format!("SELECT n FROM t{number}");
        assert_eq!(query(&restored.conninfo(), &sql), number.to_string());
        query(&restored.conninfo(), &format!("DROP TABLE t{number}"));
    }
    query(&restored.conninfo(), "CHECKPOINT");
    restored.stop().expect("it stops");
    archived.sql("CHECKPOINT");
    let after = contents_below(places.0.path());
    assert_eq!(differing(&before, &after), Vec::<&PathBuf>::new());
}
