//! After a failover: every restore point is listed once, and a backup whose last WAL is held only
//! as the copy with which the new timeline begins is usable for `list`, for `expire` and for a
//! restore. A history file with other bytes is refused.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::Value;
use testbed::{
    cluster::Cluster,
    place::Place,
    programs::{directory, succeed},
    restored::Restored,
};

use crate::support::{
    SETTINGS, contents_below, end_lsn, files_below, query, said, servers, wait_archived, wait_until,
};

const WORDS: &str = "SELECT string_agg(word, ' ' ORDER BY word) FROM words";
const KEEP: &str = "keep_window = '1s'\nkeep_backups_min = 1\nexpire_grace = '1ms'\n";

/// A primary with a standby; a backup of the standby, which ends within a segment; then the standby
/// is promoted and followed.
struct Scene {
    standby: Cluster,
    place: Place,
    /// The segment of the switch, without its timeline.
    segment: String,
}

impl Scene {
    fn make(bin: &Path) -> Self {
        let primary = Cluster::start(bin, 1, SETTINGS).expect("a primary");
        let standby = Cluster::standby_of(&primary, "").expect("a standby");
        let place = Place::with_settings(KEEP).expect("a place");
        let daemon = place.daemon(&primary, "127.0.0.1:0").expect("an archiver");
        let conninfo = primary.conninfo();
        query(&conninfo, "CREATE TABLE words (word text)");
        query(&conninfo, "CHECKPOINT");
        reach(&primary, &standby);
        let mut backup = place.program("wal-archiver").expect("built");
        succeed(backup.args(["--conninfo", &standby.conninfo(), "backup"])).expect("a backup");
        query(&conninfo, "INSERT INTO words VALUES ('a')");
        query(&conninfo, "SELECT pg_create_restore_point('shared')");
        reach(&primary, &standby);
        wait_archived(&conninfo, end_lsn(&conninfo));
        daemon.stop().expect("the archiver stops");
        let segment = query(
            &conninfo,
            "SELECT pg_walfile_name(pg_current_wal_flush_lsn())",
        );
        primary.crash().expect("the primary dies");
        standby.promote().expect("a promotion");
        let daemon = place.daemon(&standby, "127.0.0.1:0").expect("it goes on");
        let conninfo = standby.conninfo();
        query(&conninfo, "INSERT INTO words VALUES ('b')");
        query(&conninfo, "SELECT pg_create_restore_point('after')");
        query(&conninfo, "SELECT pg_switch_wal()");
        wait_archived(&conninfo, end_lsn(&conninfo));
        daemon.stop().expect("the archiver stops");
        Self {
            standby,
            place,
            segment: segment[8..].to_owned(),
        }
    }

    fn listing(&self) -> Value {
        let mut list = self.place.program("pitr-restore").expect("built");
        let said = succeed(list.args(["list", "--json"])).expect("a listing");
        serde_json::from_str(&said).expect("JSON")
    }

    fn push(&self, file: &Path) -> (Option<i32>, String) {
        let mut push = self.place.program("wal-archiver").expect("built");
        let output = push.arg("push").arg(file).output().expect("it runs");
        (output.status.code(), said(&output).1)
    }
}

/// Waits until the standby has replayed everything of the primary.
fn reach(primary: &Cluster, standby: &Cluster) {
    let end = end_lsn(&primary.conninfo());
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
    wait_until("the standby has everything", || {
        query(&standby.conninfo(), &replayed) == "t"
    });
}

#[test]
fn what_a_failover_shares_is_listed_once_and_leads_on() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let scene = Scene::make(&bin);
    let listing = scene.listing();
    let points = listing["restore_points"].as_array().expect("a list");
    let points: Vec<(&str, &str)> = points
        .iter()
        .map(|point| {
            let text = |name: &str| point[name].as_str().expect("text");
            (text("name"), &text("branch")[..8])
        })
        .collect();
    assert_eq!(points, [("shared", "00000001"), ("after", "00000002")]);
    let windows = listing["windows"].as_array().expect("a list");
    assert_eq!(windows.len(), 2, "{listing:#}");
    assert!(windows.iter().all(|window| window["restorable"] == true));

    // The old timeline's last segment is lost.
    let objects = files_below(scene.place.path()).into_iter();
    let lost: Vec<_> = objects
        .filter(|path| {
            let name = format!("00000001{}", scene.segment);
            path.to_string_lossy().contains(&format!("/{name}"))
                && path.to_string_lossy().contains("/repository/")
        })
        .collect();
    let damaged = lost.last().expect("an object of the segment");
    the_copy_is_delivered_instead(&scene, damaged);
    for path in lost {
        fs::remove_file(path).expect("it goes");
    }
    let backup = &scene.listing()["backups"][0];
    let stop: wal_format::Lsn = backup["stop_lsn"]
        .as_str()
        .and_then(|lsn| lsn.parse().ok())
        .expect("an LSN");
    let of_stop = format!("{:08X}{:08X}", stop.0 >> 32, (stop.0 & 0xFFFF_FFFF) >> 20);
    assert_eq!(of_stop, scene.segment, "the backup ends in it: {backup:#}");
    assert_eq!(backup["usable"], true, "{backup:#}");
    let mut expire = scene.place.program("wal-archiver").expect("built");
    let output = expire.arg("expire").output().expect("it runs");
    assert!(output.status.success(), "{:?}", said(&output));
    let restored = Restored::start::<&str>(&scene.place, &bin, &[]).expect("a restore");
    assert_eq!(query(&restored.conninfo(), WORDS), "a b");
}

/// A recovery that stops before the switch requests the segment of the old timeline, which is
/// damaged.
fn the_copy_is_delivered_instead(scene: &Scene, damaged: &Path) {
    let mut bytes = fs::read(damaged).expect("an object");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::set_permissions(damaged, fs::Permissions::from_mode(0o644)).expect("permissions");
    fs::write(damaged, bytes).expect("an object");
    let here = directory().expect("a directory");
    let (plan, wal) = (here.path().join("plan"), here.path().join("wal"));
    let mut planned = scene.place.program("pitr-restore").expect("built");
    planned.args(["--dry-run", "--json", "--target-name=shared"]);
    fs::write(&plan, succeed(&mut planned).expect("a plan")).expect("written");
    let fetch = |segment: &str| {
        let mut fetch = scene.place.program("pitr-restore").expect("built");
        let name = format!("{segment}{}", scene.segment);
        fetch.args(["wal-fetch", &name]).arg(&wal);
        fetch.arg("--plan").arg(&plan).output().expect("it runs")
    };
    let done = fetch("00000001");
    assert!(done.status.success(), "{:?}", said(&done));
    let delivered = fs::read(&wal).expect("the WAL");
    let copied = fs::read(
        scene
            .standby
            .data()
            .join("pg_wal")
            .join(format!("00000002{}", scene.segment)),
    );
    let copied = copied.expect("the copy");
    assert_eq!(delivered.len(), copied.len());
    let same = delivered.iter().zip(&copied).take_while(|(a, b)| a == b);
    let records = delivered.iter().rposition(|byte| *byte != 0);
    assert!(records.is_some_and(|last| last > 0 && last < same.count()));
}

#[test]
fn another_history_of_a_timeline_is_refused() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let scene = Scene::make(&bin);
    let repository = scene.place.path().join("repository");
    let before = contents_below(&repository);
    let wal = scene.standby.data().join("pg_wal");
    let name = "00000002.history";
    let (code, error) = scene.push(&wal.join(name));
    assert_eq!(code, Some(0), "{error}");

    let elsewhere = directory().expect("a directory");
    let other = elsewhere.path().join(name);
    fs::write(&other, "1\t0/1000000\tno recovery target specified\n").expect("a file");
    // WAL of that other timeline has the names of the first one's, too.
    let segment = format!("00000002{}", scene.segment);
    let copied = elsewhere.path().join(&segment);
    let wal = fs::read(wal.join(&segment)).expect("a segment");
    fs::write(&copied, wal).expect("a copy");
    for file in [&other, &copied] {
        let (code, error) = scene.push(file);
        assert_eq!(code, Some(1), "{error}");
        assert!(
            error.contains("another server took the same number"),
            "{error}"
        );
        assert!(error.contains("--cluster"), "{error}");
    }
    assert!(
        contents_below(&repository) == before,
        "something was stored"
    );
    let mut restore = scene.place.program("pitr-restore").expect("built");
    succeed(restore.arg("--dry-run")).expect("there is one newest timeline");
}
