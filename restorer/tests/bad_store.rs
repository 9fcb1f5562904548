//! `restore_command` and a whole restore through a bucket that fails in every way: the right bytes
//! or 255, never 1, and never an incomplete file. PostgreSQL would take a 1 for the end of the
//! archive and open without the later commits.
//!
//! The bucket is real, and all faults occur between it and us (`testbed::bucket_proxy`).

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use testbed::{
    bucket_proxy::{BucketProxy, Fault, Verdict},
    cluster::Cluster,
    object_store::ObjectStoreServer,
    place::Place,
    programs::{command, directory, ours},
    restored::Restored,
};
use wal_format::{Lsn, SegmentName, SegmentNo, SegmentSize, TimelineId};

use crate::support::{SETTINGS, end_lsn, long, query, said, servers, wait_archived};

const ROWS: &str = "6000";

/// Transient errors of a store.
const PASSING: [Fault; 8] = [
    Fault::Refuse(503, "SlowDown"),
    Fault::Refuse(500, "InternalError"),
    Fault::Refuse(200, "InternalError"),
    Fault::Reset,
    Fault::AnswerLost,
    Fault::CutDown,
    Fault::FlipDown,
    Fault::Silence(Duration::from_millis(700)),
];

/// Errors that a retry does not resolve.
const REFUSALS: [Fault; 6] = [
    Fault::Refuse(403, "AccessDenied"),
    Fault::Refuse(403, "RequestTimeTooSkewed"),
    Fault::Refuse(400, "ExpiredToken"),
    Fault::Refuse(404, "NoSuchBucket"),
    // A proxy's page, or a store with another protocol.
    Fault::Refuse(404, "Not found"),
    Fault::FlipDown,
];

/// Persistent errors, which are retried until the time limit.
const LASTING: [Fault; 5] = [
    Fault::Refuse(503, "SlowDown"),
    Fault::Refuse(200, "InternalError"),
    Fault::Reset,
    Fault::CutDown,
    Fault::Silence(Duration::from_millis(700)),
];

const STORM: [Fault; 7] = [
    Fault::Refuse(503, "SlowDown"),
    Fault::Refuse(500, "InternalError"),
    Fault::Reset,
    Fault::AnswerLost,
    Fault::CutDown,
    Fault::Silence(Duration::from_millis(200)),
    Fault::Refuse(429, "TooManyRequests"),
];

/// An archive in a bucket, behind a proxy that injects faults.
struct Scene {
    bin: PathBuf,
    cluster: Cluster,
    place: Place,
    /// A sealed segment, the open one, and one that does not exist yet.
    names: [SegmentName; 3],
}

impl Scene {
    fn make() -> Option<Self> {
        let (_, bin) = servers().pop()?;
        let store = ObjectStoreServer::start_or_skip()?;
        let cluster = Cluster::start(&bin, 1, SETTINGS).expect("a server");
        let place = Place::in_bucket(store, "").expect("a place");
        let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
        let conninfo = cluster.conninfo();
        place.back_up(&conninfo, &[]).expect("a backup");
        let fill =
            "CREATE TABLE load AS SELECT n, repeat('x', 700) FROM generate_series(1, 6000) n";
        query(&conninfo, fill);
        let end = end_lsn(&conninfo);
        wait_archived(&conninfo, end);
        daemon.stop().expect("everything is in the bucket");
        let size = SegmentSize::new(1 << 20).expect("a size");
        let open = size.segment_of(end);
        let name = |number: SegmentNo| SegmentName::new(TimelineId::FIRST, number, size);
        let sealed = size.segment_of(Lsn(end.0 - (2 << 20)));
        let names = [sealed, open, open.next().next()].map(name);
        Some(Self {
            bin,
            cluster,
            place,
            names,
        })
    }

    fn proxy(&self) -> BucketProxy {
        let store = self.place.store().expect("a store");
        BucketProxy::start(store.address()).expect("a proxy")
    }

    /// The restoring host, which reaches the bucket only through `proxy`.
    fn behind(&self, proxy: &BucketProxy) -> Place {
        let there = self.place.beside("").expect("a place");
        let file = there.path().join("tidemark.toml");
        let text = fs::read_to_string(&file).expect("a configuration");
        let store = self.place.store().expect("a store");
        let text = text.replace(&store.endpoint(), &proxy.endpoint());
        fs::write(&file, text).expect("a configuration");
        there
    }

    /// Runs `wal-fetch` through `proxy`. Returns its exit code, its output, and the delivered
    /// bytes.
    fn fetch(&self, proxy: &BucketProxy, name: &str) -> (Option<i32>, String, Option<Vec<u8>>) {
        self.fetch_with(proxy, name, &[])
    }

    fn fetch_with(
        &self,
        proxy: &BucketProxy,
        name: &str,
        options: &[&str],
    ) -> (Option<i32>, String, Option<Vec<u8>>) {
        let root = directory().expect("a directory");
        let config = root.path().join("tidemark.toml");
        let reached = ObjectStoreServer::configuration_at(&proxy.endpoint());
        let text = format!("repository = \"s3://archive/main/job\"\n{reached}");
        fs::write(&config, text).expect("a file");
        let destination = root.path().join("000000010000000000000001.fetched");
        let mut fetch: Command = command(&ours("pitr-restore").expect("built")).expect("a user");
        fetch.arg("--config").arg(&config).args(options);
        fetch.args(["wal-fetch", name]);
        let output = fetch.arg(&destination).output().expect("it runs");
        let delivered = fs::read(&destination).ok();
        let files = fs::read_dir(root.path()).expect("a directory").count();
        assert_eq!(
            files,
            1 + usize::from(delivered.is_some()),
            "{name}: pieces are left"
        );
        (output.status.code(), said(&output).1, delivered)
    }

    /// Checks that the delivered bytes equal the server's, as far as they are archived.
    fn assert_equal(&self, name: SegmentName, delivered: &[u8]) {
        let path = self.cluster.data().join("pg_wal").join(name.to_string());
        let theirs = fs::read(path).expect("the server keeps its WAL");
        assert_eq!(delivered.len(), theirs.len(), "{name}");
        let end = delivered.iter().rposition(|byte| *byte != 0);
        let end = end.expect("some WAL");
        assert!(delivered[..=end] == theirs[..=end], "{name}");
    }
}

fn what_passes_is_waited_for(scene: &Scene) {
    let proxy = scene.proxy();
    for (round, fault) in PASSING.into_iter().enumerate() {
        // Data with a bit flipped in transit is read a second time. A bit that is flipped twice
        // counts as damage.
        let count = match fault {
            Fault::FlipDown => 1,
            _ if long() => 7,
            _ => 3,
        };
        for (at, name) in scene.names.into_iter().enumerate() {
            if !long() && at != round % 3 {
                continue;
            }
            proxy.fail_first(count, fault, |_| true);
            let (code, said, delivered) = scene.fetch(&proxy, &name.to_string());
            let met = proxy.met();
            eprintln!("{fault:?} {met} times, {name}: {code:?} {said}");
            assert!(met > 0, "{fault:?}");
            match (at, fault, code) {
                // A bit flipped in a listing: that is not an answer.
                (_, Fault::FlipDown, Some(255)) => assert!(delivered.is_none()),
                (2, _, code) => assert_eq!((code, delivered), (Some(1), None), "{fault:?}"),
                (_, _, code) => {
                    assert_eq!(code, Some(0), "{fault:?}: {said}");
                    scene.assert_equal(name, &delivered.expect("it was delivered"));
                }
            }
        }
    }
}

/// `wal-fetch` reads the system identifier from the store before it requests the file, as the
/// `restore_command` of a restore does.
fn the_first_question_is_asked_patiently_too(scene: &Scene) {
    let system = "SELECT system_identifier FROM pg_control_system()";
    let system = query(&scene.cluster.conninfo(), system);
    let proxy = scene.proxy();
    // More failures than a single request retries.
    proxy.fail_first(8, Fault::Refuse(503, "SlowDown"), |_| true);
    let name = scene.names[0];
    let options = ["--system", system.as_str()];
    let (code, said, delivered) = scene.fetch_with(&proxy, &name.to_string(), &options);
    assert_eq!((code, proxy.met()), (Some(0), 8), "{said}");
    scene.assert_equal(name, &delivered.expect("it was delivered"));
}

fn what_lasts_is_never_the_end(scene: &Scene) {
    let proxy = scene.proxy();
    for (round, fault) in REFUSALS.into_iter().enumerate() {
        for (at, name) in scene.names.into_iter().enumerate() {
            if !long() && at != round % 3 {
                continue;
            }
            proxy.fail(fault, |_| true);
            let (code, said, delivered) = scene.fetch(&proxy, &name.to_string());
            eprintln!("{fault:?}, {name}: {code:?} {said}");
            assert_eq!((code, delivered), (Some(255), None), "{fault:?}: {said}");
            assert!(!said.is_empty());
        }
        // Only the object fails, everything else works.
        proxy.fail(fault, |asked| asked.line.contains("/wal/"));
        let (code, said, delivered) = scene.fetch(&proxy, &scene.names[0].to_string());
        assert_eq!((code, delivered), (Some(255), None), "{fault:?}: {said}");
    }
}

/// The retries are bounded: minutes, not forever. All faults run concurrently, because each takes
/// the whole time limit.
fn patience_ends(scene: &Scene) {
    thread::scope(|scope| {
        for fault in LASTING {
            for name in [scene.names[0], scene.names[2]] {
                scope.spawn(move || {
                    let proxy = scene.proxy();
                    proxy.fail(fault, |_| true);
                    let began = Instant::now();
                    let (code, said, delivered) = scene.fetch(&proxy, &name.to_string());
                    let (took, met) = (began.elapsed(), proxy.met());
                    eprintln!("{fault:?}, {name}: {code:?} after {took:?}, {met} times");
                    assert_eq!((code, delivered), (Some(255), None), "{fault:?}: {said}");
                    assert!(took > Duration::from_secs(120), "{took:?}");
                    assert!(took < Duration::from_secs(400), "{took:?}");
                });
            }
        }
    });
}

/// A whole restore while nearly half of all requests fail: it stops where planned, with every row.
fn a_restore_weathers_a_storm(scene: &Scene) {
    let proxy = scene.proxy();
    proxy.storm(40, &STORM);
    let there = scene.behind(&proxy);
    let restored = Restored::start::<&str>(&there, &scene.bin, &["--target-action=promote"]);
    let restored = restored.expect("a restore");
    eprintln!("restored in spite of {} faults", proxy.met());
    assert!(proxy.met() > 10, "{}", proxy.met());
    assert_eq!(
        query(&restored.conninfo(), "SELECT count(*) FROM load"),
        ROWS
    );
}

/// If its first WAL is lost there is no restore, instead of one that "succeeds" with the backup
/// alone.
fn without_its_first_wal_nothing_is_restored(scene: &Scene) {
    let proxy = scene.proxy();
    let lost = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&lost);
    // Listed but not readable: a store that lost an object which it lists.
    proxy.decide(move |asked| {
        if asked.is("GET") && asked.line.contains("/wal/") {
            seen.fetch_add(1, Ordering::SeqCst);
            return Verdict::Fail(Fault::Refuse(404, "NoSuchKey"));
        }
        Verdict::Pass
    });
    let there = scene.behind(&proxy);
    let root = directory().expect("a directory");
    let mut restore =
        Restored::command::<&str>(&there, &scene.bin, root.path(), &[]).expect("it is built");
    let output = restore.output().expect("it runs");
    let (_, error) = said(&output);
    eprintln!("{:?}: {error}", output.status.code());
    assert!(!output.status.success(), "a success without any WAL");
    assert!(lost.load(Ordering::SeqCst) > 0, "nothing was asked for");
    let running = root.path().join("data/postmaster.pid");
    assert!(!running.exists(), "a server runs");
}

#[test]
fn whatever_a_bucket_does_wrong_a_recovery_never_ends_early() {
    let Some(scene) = Scene::make() else { return };
    what_passes_is_waited_for(&scene);
    the_first_question_is_asked_patiently_too(&scene);
    what_lasts_is_never_the_end(&scene);
    a_restore_weathers_a_storm(&scene);
    without_its_first_wal_nothing_is_restored(&scene);
    if long() {
        patience_ends(&scene);
    }
}
