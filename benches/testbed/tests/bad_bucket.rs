//! The running archiver on a bucket with every kind of fault. At every moment, the WAL that the
//! archiver reported to PostgreSQL as flushed is in the bucket. WAL continues to be written to the
//! spool, the light shows the problem, and everything recovers without intervention.
//!
//! The tests use `acknowledge = "remote"`, so that the return of a commit is a statement about the
//! bucket. With `TIDEMARK_LONG=1` every fault is tested alone; otherwise only the faults with wrong
//! answers, and a storm of all.

use std::{
    fs,
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use serde_json::Value;
use testbed::{
    bucket_proxy::{Asked, BucketProxy, Fault},
    cluster::{Cluster, connect},
    object_store::{BUCKET, ObjectStoreServer},
    place::{Daemon, Place},
    ports::free_address,
    programs::succeed,
    restored::Restored,
    tools::servers_or_skip,
};
use wal_format::Lsn;

const PATIENCE: Duration = Duration::from_secs(90);
/// The minimum duration of a fault.
const LASTS: Duration = Duration::from_secs(2);

/// A fault, the requests that it affects, and a part of the error message that users see.
#[derive(Clone, Copy)]
struct Case {
    fault: Fault,
    concerns: fn(&Asked) -> bool,
    words: &'static str,
    /// True if the case is also run without `TIDEMARK_LONG`.
    short: bool,
}

fn of_wal(asked: &Asked) -> bool {
    asked.line.contains("/wal/") || asked.line.contains("/tail/")
}

fn all(_: &Asked) -> bool {
    true
}

fn puts(asked: &Asked) -> bool {
    asked.is("PUT") && of_wal(asked)
}

fn reads(asked: &Asked) -> bool {
    asked.is("GET") && of_wal(asked)
}

const fn case(fault: Fault, concerns: fn(&Asked) -> bool, words: &'static str) -> Case {
    Case {
        fault,
        concerns,
        words,
        short: false,
    }
}

const fn short(case: Case) -> Case {
    Case {
        short: true,
        ..case
    }
}

const PIECE: Duration = Duration::from_millis(30);

/// The cases, by the numbers of the failure catalogue.
const CASES: [Case; 19] = [
    // 35: the store is busy, with each of its error codes.
    case(Fault::Refuse(503, "SlowDown"), all, "SlowDown"),
    case(Fault::Refuse(500, "InternalError"), all, "InternalError"),
    case(
        Fault::Refuse(409, "OperationAborted"),
        puts,
        "OperationAborted",
    ),
    // 36: an error inside a successful answer.
    short(case(
        Fault::Refuse(200, "InternalError"),
        puts,
        "InternalError",
    )),
    // 37: connections that break, at either end.
    case(Fault::Reset, all, "s3://"),
    case(Fault::AnswerLost, puts, "s3://"),
    case(Fault::CutUp, puts, "s3://"),
    case(Fault::CutDown, reads, "body"),
    case(Fault::Silence(Duration::from_secs(1)), all, "s3://"),
    case(Fault::Trickle(PIECE), reads, ""),
    // 38: an object that was acknowledged and lost; other bytes than were sent or stored.
    short(case(Fault::Lie, puts, "is not in")),
    case(Fault::FlipUp, puts, "HTTP 4"),
    short(case(Fault::FlipDown, reads, "damaged")),
    // 39: credentials and clocks.
    case(Fault::Refuse(400, "ExpiredToken"), all, "renew"),
    case(Fault::Refuse(403, "RequestTimeTooSkewed"), all, "clock"),
    case(Fault::Refuse(403, "InvalidAccessKeyId"), all, "access key"),
    // 40: a refusal does not mean "absent".
    short(case(
        Fault::Refuse(403, "AccessDenied"),
        reads,
        "s3:GetObject",
    )),
    case(Fault::Refuse(403, "AccessDenied"), puts, "s3:PutObject"),
    case(Fault::Refuse(404, "NoSuchBucket"), all, "create the bucket"),
];

const STORM: [Fault; 12] = [
    Fault::Refuse(503, "SlowDown"),
    Fault::Refuse(500, "InternalError"),
    Fault::Refuse(200, "InternalError"),
    Fault::Refuse(403, "AccessDenied"),
    Fault::Lie,
    Fault::Reset,
    Fault::AnswerLost,
    Fault::CutUp,
    Fault::CutDown,
    Fault::FlipUp,
    Fault::FlipDown,
    Fault::Silence(Duration::from_millis(300)),
];

struct Scene {
    cluster: Cluster,
    bin: std::path::PathBuf,
    place: Place,
    /// The same bucket without the proxy.
    direct: Place,
    proxy: BucketProxy,
    daemon: Daemon,
    rows: i64,
}

impl Scene {
    fn make(segment_mib: u32) -> Option<Self> {
        let (_, bin) = servers_or_skip().pop()?;
        let store = ObjectStoreServer::open_to_all_or_skip()?;
        let proxy = BucketProxy::start(store.address()).expect("a proxy");
        let (there, through) = (store.endpoint(), proxy.endpoint());
        let address = free_address().expect("an address");
        let settings = format!(
            "{}acknowledge = \"remote\"\nhttp = \"{address}\"\n",
            ObjectStoreServer::configuration_at(&through)
        );
        let place = Place::in_bucket_behind(store, &settings).expect("a place");
        let direct = place.beside("").expect("a place");
        let file = direct.path().join("tidemark.toml");
        let text = fs::read_to_string(&file).expect("a configuration");
        fs::write(&file, text.replace(&through, &there)).expect("a configuration");
        let cluster = Cluster::start(&bin, segment_mib, "autovacuum = off").expect("a server");
        let daemon = place.daemon(&cluster, &address).expect("a daemon");
        let mut client = cluster.connect().expect("a connection");
        let backup = place.back_up(&cluster.conninfo(), &[]);
        backup.expect("a backup");
        let table = "CREATE TABLE t (n int, filler text)";
        client.batch_execute(table).expect("a table");
        cluster.wait_for_standbys("tidemark").expect("a setting");
        Some(Self {
            cluster,
            bin,
            place,
            direct,
            proxy,
            daemon,
            rows: 0,
        })
    }

    /// Begins a transaction of one and a half segments. Its commit returns when the bucket has it.
    fn commit(&mut self) -> JoinHandle<()> {
        let conninfo = self.cluster.conninfo();
        self.rows += 1500;
        thread::spawn(move || {
            let mut client = connect(&conninfo).expect("a connection");
            let fill =
                "INSERT INTO t SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, 1500) n";
            client.batch_execute(fill).expect("a commit");
        })
    }

    fn status(&self) -> Value {
        let mut status = self.place.program("wal-archiver").expect("it is built");
        // With a light other than green the exit code is not 0, which is not a failure of the test.
        let output = status.args(["status", "--json"]).output();
        let said = output.expect("it runs").stdout;
        let reports: Value = serde_json::from_slice(&said).expect("JSON");
        reports[0].clone()
    }

    fn wait(&self, what: &str, done: impl Fn(&Value) -> bool) {
        let began = Instant::now();
        loop {
            let report = self.status();
            if done(&report) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{what}: {report:#}");
            sleep(Duration::from_millis(100));
        }
    }

    /// Returns the server's flush LSN, and the write LSN and the flush LSN that the archiver
    /// reported.
    fn told(&self) -> (Lsn, Lsn, Lsn) {
        let mut client = self.cluster.connect().expect("a connection");
        let query = "SELECT pg_current_wal_flush_lsn()::text, write_lsn::text, flush_lsn::text \
                     FROM pg_stat_replication WHERE application_name LIKE 'tidemark%'";
        let row = client.query_one(query, &[]).expect("the stream is up");
        let lsn = |at: usize| row.get::<_, String>(at).parse().expect("an LSN");
        (lsn(0), lsn(1), lsn(2))
    }

    /// Checks that the reported flush LSN is true: a program that bypasses the proxy finds the WAL
    /// up to it in the bucket without a gap. Segments are uploaded concurrently, so after the
    /// acknowledged LSN a segment may be stored before its predecessor.
    fn assert_true(&self) -> Value {
        let (_, _, told) = self.told();
        let mut list = self.direct.program("pitr-restore").expect("it is built");
        let said = succeed(list.args(["list", "--json"])).expect("a listing");
        let listing: Value = serde_json::from_str(&said).expect("JSON");
        let end = listing["windows"][0]["end_lsn"].as_str().expect("WAL");
        let end: Lsn = end.parse().expect("an LSN");
        assert!(
            end >= told,
            "{told} was acknowledged, the bucket ends at {end}: {listing}"
        );
        assert_eq!(listing["damaged"], Value::Array(Vec::new()), "{listing}");
        listing
    }

    fn assert_streams(&self) {
        let began = Instant::now();
        loop {
            let (current, written, _) = self.told();
            if written >= current {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{current}, but {written}");
            sleep(Duration::from_millis(50));
        }
    }

    fn assert_well(&self, what: &str) {
        self.wait(&format!("well again after {what}"), |report| {
            report["state"] == "ok"
                && report["repository_error"].is_null()
                && report["durable"]["remote"]["lag_bytes"] == 0
        });
        let listing = self.assert_true();
        assert_eq!(listing["gaps"], Value::Array(Vec::new()), "{listing}");
    }

    fn meet(&mut self, case: &Case) {
        let Case {
            fault,
            concerns,
            words,
            ..
        } = case;
        let name = format!("{fault:?} {words}");
        let began = Instant::now();
        self.proxy.fail(*fault, *concerns);
        let commit = self.commit();
        // A read that trickles is slow, but succeeds.
        if !words.is_empty() {
            self.wait(&name, |report| {
                let error = report["repository_error"].as_str().unwrap_or_default();
                error.contains(words) && report["state"] != "ok"
            });
            sleep(LASTS.saturating_sub(began.elapsed()));
            assert!(
                !commit.is_finished(),
                "{name}: acknowledged without the bucket"
            );
        }
        self.assert_streams();
        self.assert_true();
        assert!(self.proxy.met() > 0, "{name}: nothing went wrong");
        let met = self.proxy.met();
        self.proxy.heal();
        commit.join().expect("a commit");
        self.assert_well(&name);
        eprintln!("{name}: met {met} times, well after {:?}", began.elapsed());
    }

    /// Injects all faults at random. Everything that is stored nevertheless is correct.
    fn weather_a_storm(&mut self, lasts: Duration) {
        let began = Instant::now();
        self.proxy.storm(40, &STORM);
        let mut commits = Vec::new();
        while began.elapsed() < lasts {
            commits.push(self.commit());
            self.assert_true();
            sleep(Duration::from_millis(700));
        }
        let met = self.proxy.met();
        self.proxy.heal();
        for commit in commits {
            commit.join().expect("a commit");
        }
        self.assert_well("the storm");
        eprintln!("a storm of {met} faults, well after {:?}", began.elapsed());
    }

    /// Tests objects that are not read back at once: a backup is complete, or it does not exist.
    fn back_up(&self, faults: &[(Fault, &'static str)]) {
        for (fault, part) in faults {
            let part = *part;
            let concerns = move |asked: &Asked| asked.is("PUT") && asked.line.contains(part);
            self.proxy.fail_first(2, *fault, concerns);
            let backup = self.place.back_up(&self.cluster.conninfo(), &[]);
            backup.expect("a backup");
            assert_eq!(self.proxy.met(), 2, "{fault:?} of {part}");
        }
        self.proxy.heal();
    }

    fn finish(self) {
        self.cluster.stop().expect("it stops");
        self.daemon.stop().expect("everything is in the bucket");
        let log = fs::read_to_string(self.place.path().join("archiver.log")).expect("a log");
        assert!(!log.contains("divergence"), "{log}");
        let mut verify = self.direct.program("wal-archiver").expect("it is built");
        let said = succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
        assert!(said.contains("no gap, no damage"), "{said}");
        let restored = Restored::start::<&str>(&self.direct, &self.bin, &[]).expect("a restore");
        let mut client = restored.connect().expect("a connection");
        let row = client.query_one("SELECT count(*) FROM t", &[]);
        assert_eq!(row.expect("a count").get::<_, i64>(0), self.rows);
    }
}

#[test]
fn nothing_that_a_bucket_does_wrong_is_taken_for_a_success() {
    let Some(mut scene) = Scene::make(1) else {
        return;
    };
    let long = testbed::is_long();
    for case in CASES.iter().filter(|case| long || case.short) {
        scene.meet(case);
    }
    scene.weather_a_storm(Duration::from_secs(if long { 60 } else { 4 }));
    let faults = [
        (Fault::Lie, "/base."),
        (Fault::Lie, "backup.json"),
        (Fault::Lie, "backup_manifest"),
        (Fault::FlipUp, "/base."),
        (Fault::CutUp, "/base."),
        (Fault::Refuse(200, "InternalError"), "/base."),
    ];
    scene.back_up(if long { &faults } else { &faults[..2] });
    scene.finish();
}

/// Scenarios 36 and 37 with a segment that is uploaded in parts.
#[test]
fn an_upload_in_parts_is_whole_or_none_and_leaves_nothing() {
    let Some(mut scene) = Scene::make(64) else {
        return;
    };
    let long = testbed::is_long();
    let faults = [
        (Fault::Refuse(200, "InternalError"), "POST", "uploadId="),
        (Fault::CutUp, "PUT", "partNumber="),
        (Fault::AnswerLost, "POST", "uploadId="),
        (Fault::FlipUp, "PUT", "partNumber="),
        (Fault::Reset, "PUT", "partNumber="),
        (Fault::Lie, "POST", "uploadId="),
    ];
    for (fault, beginning, part) in &faults[..if long { 6 } else { 1 }] {
        let began = Instant::now();
        // Only whole segments are large enough, so pieces of the open segment are not affected.
        let (beginning, part) = (*beginning, *part);
        let concerns = move |asked: &Asked| asked.is(beginning) && asked.line.contains(part);
        scene.proxy.fail_first(2, *fault, concerns);
        let mut client = scene.cluster.connect().expect("a connection");
        for fill in [
            "SET synchronous_commit = local",
            "DROP TABLE IF EXISTS noise",
            "CREATE TABLE noise AS SELECT string_agg(md5(random()::text || i), '') \
             FROM generate_series(1, 2200000) i GROUP BY i % 10000",
            "SELECT pg_switch_wal()",
        ] {
            client.batch_execute(fill).expect("WAL");
        }
        drop(client);
        scene.commit().join().expect("a commit");
        scene.wait(&format!("{fault:?} of {part}"), |report| {
            // If the answer to a completion is lost, the upload is not completed again, because the
            // object exists.
            scene.proxy.met() > 0 && report["durable"]["remote"]["lag_bytes"] == 0
        });
        scene.proxy.heal();
        scene.assert_well(part);
        eprintln!("{fault:?} of {beginning} {part}: {:?}", began.elapsed());
    }
    let store = scene.place.store().expect("a store");
    let uploads = store.unsigned(&format!("GET /{BUCKET}?uploads"), "");
    let uploads = uploads.expect("a listing");
    assert!(uploads.contains("ListMultipartUploadsResult"), "{uploads}");
    assert!(!uploads.contains("/wal/"), "parts are left: {uploads}");
    scene.finish();
}
