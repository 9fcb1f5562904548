//! Tests of the store on a real server, and on one that fails as scripted.
//!
//! SeaweedFS gives the answers of a healthy server. `faults` contains the answers of a faulty one.

use std::sync::Arc;

use testbed::object_store::{ACCESS_KEY, BUCKET, ObjectStoreServer, SECRET_KEY};

use super::*;
use crate::{config::S3Credentials, store::testing::conformance};

mod fault_server;
mod faults;
mod listings;
mod tls;
mod worm;

fn settings(endpoint: &str) -> S3Settings {
    S3Settings {
        endpoint: Some(endpoint.to_owned()),
        region: Some("us-east-1".to_owned()),
        path_style: true,
        credentials: S3Credentials::Keys {
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned().into(),
            session_token: None,
        },
        ..S3Settings::default()
    }
}

fn open(server: &ObjectStoreServer, prefix: &str) -> Retrying<S3Store> {
    S3Store::open(
        BUCKET,
        prefix,
        &settings(&server.endpoint()),
        RequestMeter::default(),
        Patience::Short,
    )
    .expect("a store")
}

/// One server for all of these tests, since it takes seconds to start.
#[test]
fn a_real_store_keeps_every_promise() {
    let Some(server) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let store: Arc<dyn ObjectStore> = Arc::new(open(&server, "some/prefix"));
    conformance(&store, 3);
    let plain = S3Settings {
        checksums: false,
        ..settings(&server.endpoint())
    };
    let store: Arc<dyn ObjectStore> = Arc::new(
        S3Store::open(
            BUCKET,
            "no/checksums",
            &plain,
            RequestMeter::default(),
            Patience::Short,
        )
        .expect("a store"),
    );
    conformance(&store, 1);
    pages(&server);
    large_objects(&server);
    refusals(&server);
    any_thread(&server);
}

fn pages(server: &ObjectStoreServer) {
    let store = open(server, "pages");
    let writers: Vec<_> = (0..8).collect();
    thread_each(&writers, |writer| {
        for number in (*writer..1250).step_by(8) {
            let key = format!("many/{number:05}");
            store.put_if_absent(&key, b"x").expect("a put");
        }
    });
    let mut keys = Vec::new();
    store
        .list("many/", &mut |object| {
            keys.push(object.key);
            ControlFlow::Continue(())
        })
        .expect("it lists");
    let expected: Vec<String> = (0..1250)
        .map(|number| format!("many/{number:05}"))
        .collect();
    assert_eq!(keys, expected, "more than one page, in order");
}

fn large_objects(server: &ObjectStoreServer) {
    let store = open(server, "large");
    let body: Vec<u8> = (0..multipart::PART_BYTES * 2 + 12_345)
        .map(|at| u8::try_from(at % 251).expect("a byte"))
        .collect();
    let put = |body: &[u8]| store.put_if_absent("a/large", body).expect("a put");
    assert_eq!(put(&body), PutOutcome::Created);
    assert_eq!(store.get("a/large").expect("a get"), body);
    let other = vec![7; body.len()];
    assert_eq!(put(&other), PutOutcome::AlreadyExists);
    assert_eq!(store.get("a/large").expect("a get"), body, "untouched");
    let (from, to) = (multipart::PART_BYTES - 16, multipart::PART_BYTES + 84);
    let range = store.get_range("a/large", from as u64..to as u64);
    assert_eq!(range.expect("a range"), body[from..to]);

    // This skips the preceding check, so the completion itself is refused. (There is no race in
    // this test: SeaweedFS 4.48 has been seen to complete two uploads of the same name at the same
    // instant, which never happened with its small puts.)
    let plain =
        S3Store::without_retries(BUCKET, "large", &settings(&server.endpoint())).expect("a store");
    assert!(plain.honours_conditions_on_parts().expect("an answer"));
    for (writer, expected) in [(1, PutOutcome::Created), (2, PutOutcome::AlreadyExists)] {
        let body = Bytes::from(vec![writer; multipart::PART_BYTES + 1]);
        let outcome = plain.put_parts("second", "large/second", &body, true);
        assert_eq!(outcome.expect("a put"), expected);
    }
    let body = plain.get("second").expect("a get");
    assert!(body.iter().all(|byte| *byte == 1), "untouched");
    let uploads = plain.client().list_multipart_uploads().bucket(BUCKET);
    let left = plain
        .request(RequestKind::List, uploads.send())
        .expect("a list");
    assert!(left.uploads().is_empty(), "the loser's parts are gone");
}

fn refusals(server: &ObjectStoreServer) {
    let missing = S3Store::open(
        "no-such-bucket",
        "",
        &settings(&server.endpoint()),
        RequestMeter::default(),
        Patience::Short,
    );
    let missing = missing.expect("a store");
    for error in [
        missing.get("a/b").expect_err("no bucket"),
        missing.head("a/b").expect_err("no bucket"),
    ] {
        assert!(!error.is_not_found() && !error.is_transient(), "{error}");
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    }
    let stranger = S3Settings {
        credentials: S3Credentials::Keys {
            access_key: ACCESS_KEY.to_owned(),
            secret_key: "wrong".to_owned().into(),
            session_token: None,
        },
        ..settings(&server.endpoint())
    };
    let stranger = S3Store::open(
        BUCKET,
        "",
        &stranger,
        RequestMeter::default(),
        Patience::Short,
    )
    .expect("a store");
    let error = stranger.get("a/b").expect_err("a wrong secret");
    assert!(!error.is_not_found(), "{error}");
    assert!(
        error.to_string().contains("check the access key"),
        "{error}"
    );
}

/// The store blocks, and its caller may be on any thread.
fn any_thread(server: &ObjectStoreServer) {
    let store = Arc::new(open(server, "threads"));
    let runtime = Runtime::new().expect("a runtime");
    let inner = Arc::clone(&store);
    runtime.block_on(async move {
        let one = Arc::clone(&inner);
        let put = tokio::task::spawn_blocking(move || one.put_if_absent("blocking", b"1"));
        put.await.expect("no panic").expect("a put");
        // Not recommended, but it must not panic.
        inner.put_if_absent("async", b"1").expect("a put");
        drop(inner);
    });
    assert_eq!(store.get("blocking").expect("a get"), b"1"[..]);
}

fn thread_each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = items
            .iter()
            .map(|item| scope.spawn(|| work(item)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    })
}
