//! Buckets with versioning and Object Lock, on two servers: objects that an attacker deletes or
//! overwrites can still be read as of an earlier time, and locked objects remain.

use std::thread::sleep;

use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};

use testbed::moto::MotoServer;

use jiff::Timestamp;

use super::*;
use crate::store::{LockMode, testing::conformance};

/// Stores have times in whole seconds.
const TICK: Duration = Duration::from_millis(1200);

fn plain(endpoint: &str, bucket: &str) -> S3Store {
    S3Store::without_retries(bucket, "p", &settings(endpoint)).expect("a store")
}

fn create_bucket(store: &S3Store, locks: bool) {
    let create = store
        .client()
        .create_bucket()
        .bucket(&store.bucket)
        .object_lock_enabled_for_bucket(locks);
    store
        .request(RequestKind::Put, create.send())
        .expect("a bucket");
}

fn enable_versions(store: &S3Store) {
    let versions = VersioningConfiguration::builder()
        .status(BucketVersioningStatus::Enabled)
        .build();
    let enable = store
        .client()
        .put_bucket_versioning()
        .bucket(&store.bucket)
        .versioning_configuration(versions);
    store
        .request(RequestKind::Put, enable.send())
        .expect("versions");
}

fn keys(store: &dyn ObjectStore, prefix: &str) -> Vec<(String, u64)> {
    let mut keys = Vec::new();
    store
        .list(prefix, &mut |object| {
            keys.push((object.key, object.size));
            ControlFlow::Continue(())
        })
        .expect("it lists");
    keys
}

/// Objects are put, then deleted and overwritten by an authorised user. The view as of the time
/// between has the original objects.
fn the_past_is_undamaged(endpoint: &str, bucket: &str) {
    let store = plain(endpoint, bucket);
    create_bucket(&store, false);
    enable_versions(&store);
    let before = Timestamp::now();
    sleep(TICK);
    store.put_if_absent("a/early", b"tail").expect("a put");
    for (key, body) in [("a/deleted", b"one"), ("a/overwritten", b"two")] {
        let put = store.put_if_absent(key, body).expect("a put");
        assert_eq!(put, PutOutcome::Created);
    }
    // Deleted by its owner before the time of the view, so it stays deleted.
    store.delete("a/early").expect("a delete");
    sleep(TICK);
    let good = Timestamp::now();
    sleep(TICK);
    store.delete("a/deleted").expect("an attacker's delete");
    let overwrite = store.put_object(
        &store.place("a/overwritten"),
        Bytes::from_static(b"evil"),
        false,
    );
    overwrite.expect("an attacker's put");
    store.put_if_absent("a/later", b"new").expect("a put");
    assert!(store.get("a/deleted").expect_err("gone").is_not_found());
    assert_eq!(store.get("a/overwritten").expect("a get"), b"evil"[..]);

    let requests = RequestMeter::default();
    let view = |at| {
        S3AsOf::open(
            bucket,
            "p",
            &settings(endpoint),
            requests.clone(),
            Patience::Short,
            at,
        )
        .expect("a view")
    };
    let then = view(good);
    // Reads without a previous listing, as `wal-fetch` does.
    assert_eq!(then.get("a/overwritten").expect("a get"), b"two"[..]);
    let expected = [("a/deleted", 3), ("a/overwritten", 3)];
    let expected = expected.map(|(key, size)| (key.to_owned(), size));
    assert_eq!(keys(&then, "a/"), expected);
    let asked = requests.report().total;
    assert_eq!(then.get("a/deleted").expect("a get"), b"one"[..]);
    assert_eq!(
        then.get_range("a/deleted", 1..3).expect("a range"),
        b"ne"[..]
    );
    assert!(then.get_range("a/deleted", 1..9).is_err());
    assert_eq!(
        then.head("a/deleted").expect("a head").expect("there").size,
        3
    );
    let now_asked = requests.report().total;
    assert_eq!(now_asked.list, asked.list, "what was listed is known");
    for absent in ["a/later", "a/early", "a/never"] {
        assert!(then.get(absent).expect_err(absent).is_not_found());
        assert!(then.head(absent).expect("an answer").is_none(), "{absent}");
    }
    assert!(then.put_if_absent("a/x", b"x").is_err() && then.delete("a/deleted").is_err());
    assert_eq!(keys(&view(before), ""), []);
    let now = view(Timestamp::now());
    assert_eq!(now.get("a/overwritten").expect("a get"), b"evil"[..]);
    assert!(now.get("a/deleted").expect_err("gone").is_not_found());
}

/// A bucket with Object Lock accepts our puts, and a lock is only extended.
fn locks_hold(endpoint: &str, bucket: &str, objects: &[(&str, usize)]) {
    let store = plain(endpoint, bucket);
    create_bucket(&store, true);
    for (key, length) in objects {
        let put = store.put_if_absent(key, &vec![7; *length]).expect("a put");
        assert_eq!(put, PutOutcome::Created);
        let again = store.put_if_absent(key, b"other").expect("a put");
        assert_eq!(again, PutOutcome::AlreadyExists);
        let in_hours = |hours| Timestamp::now() + jiff::SignedDuration::from_hours(hours);
        let lock = |until| store.lock(key, LockSpan::until(until, LockMode::Governance));
        let long = in_hours(48);
        assert_eq!(lock(long).expect("a lock"), LockOutcome::Extended);
        let shorter = lock(in_hours(24)).expect("an answer");
        assert!(matches!(shorter, LockOutcome::AlreadyLonger(kept) if kept >= in_hours(47)));
        // A lock that is long enough stays unchanged.
        let span = LockSpan {
            at_least: in_hours(36),
            ..LockSpan::until(in_hours(72), LockMode::Governance)
        };
        let enough = store.lock(key, span).expect("an answer");
        assert!(matches!(enough, LockOutcome::AlreadyLonger(_)));
        assert_eq!(lock(in_hours(72)).expect("a lock"), LockOutcome::Extended);
        let full_key = store.place(key);
        let head = store.client().head_object().bucket(bucket).key(&full_key);
        let head = store
            .request(RequestKind::Head, head.send())
            .expect("a head");
        let until = head.object_lock_retain_until_date().expect("a date").secs();
        assert!(until > long.as_second(), "{until}");
        // The version itself cannot be removed, which is what a delete means in a versioned bucket.
        let version = head.version_id().expect("a version").to_owned();
        let delete = store.client().delete_object().bucket(bucket).key(&full_key);
        let delete = delete.version_id(version).send();
        let refused = store
            .request(RequestKind::Delete, delete)
            .expect_err("it is locked");
        assert!(refused.is_denied(), "{refused:?}");
    }
}

#[test]
fn versions_and_locks_on_seaweedfs() {
    let Some(server) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    the_past_is_undamaged(&server.endpoint(), "versioned");
    let large = ("a/large", multipart::PART_BYTES + 1);
    locks_hold(&server.endpoint(), "locked", &[("a/small", 5), large]);
}

#[test]
fn moto_keeps_every_promise_with_versions_and_locks() {
    let Some(moto) = MotoServer::start_or_skip() else {
        return;
    };
    let store = plain(moto.endpoint(), "conformance");
    create_bucket(&store, false);
    let store: Arc<dyn ObjectStore> = Arc::new(store);
    conformance(&store, 1);
    the_past_is_undamaged(moto.endpoint(), "versioned");
    // No large object: moto 5.2 answers the completion of an upload with an element that differs
    // from S3's, which the SDK refuses.
    locks_hold(moto.endpoint(), "locked", &[("a/small", 5)]);
}
