//! Listings that never end, and listings of which a part is missing.

use jiff::Timestamp;

use super::{
    fault_server::{Answer, FaultServer},
    *,
};
use crate::store::retry::RetryPolicy;

/// A listing with these elements, and one object.
fn listing(root: &str, more: &str) -> String {
    let object = "<Contents><Key>p/a</Key><Size>1</Size></Contents>\
                  <CommonPrefixes><Prefix>p/b/</Prefix></CommonPrefixes>";
    format!("<{root}>{more}{object}</{root}>")
}

/// The names that come from a listing and from a listing of folders, on a store that gives the same
/// answer to every request, and the number of requests.
fn ask(answer: &str) -> (Vec<Result<Vec<String>>>, usize) {
    let body = answer.to_owned();
    let server = FaultServer::start(move |_| Answer::ok(body.as_bytes()));
    let quick = Duration::from_millis(1);
    let store = S3Store::without_retries("bucket", "p", &settings(&server.endpoint()));
    let store = Retrying::new(
        store.expect("a store"),
        RetryPolicy::new(2, quick, quick, 100),
    );
    let outcomes = vec![list(&store), store.folders("")];
    (outcomes, server.count("GET "))
}

/// The same for a listing of versions.
fn ask_past(answer: &str) -> (Vec<Result<Vec<String>>>, usize) {
    let body = answer.to_owned();
    let server = FaultServer::start(move |_| Answer::ok(body.as_bytes()));
    let view = S3AsOf::open(
        "bucket",
        "p",
        &settings(&server.endpoint()),
        RequestMeter::default(),
        Patience::Short,
        Timestamp::now(),
    );
    let outcomes = vec![list(&view.expect("a view"))];
    (outcomes, server.count("GET "))
}

fn list(store: &dyn ObjectStore) -> Result<Vec<String>> {
    let mut named = Vec::new();
    let mut visit = |object: ObjectMeta| {
        named.push(object.key);
        ControlFlow::Continue(())
    };
    store.list("", &mut visit).map(|()| named)
}

#[test]
fn a_listing_ends_and_a_part_of_one_is_refused() {
    let again = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>\
                 <NextKeyMarker>k</NextKeyMarker>";
    let stops = "<IsTruncated>true</IsTruncated>";
    for (more, problem) in [
        (again, "repeats itself"),
        (stops, "stops before its end"),
        ("", "does not say whether it is complete"),
    ] {
        let answers = [
            ask(&listing("ListBucketResult", more)),
            ask_past(&listing("ListVersionsResult", more)),
        ];
        for (outcomes, requests) in answers {
            for outcome in outcomes {
                let error = outcome.expect_err(more).to_string();
                assert!(error.contains(problem), "{more}: {error}");
            }
            assert!(requests <= 20, "{requests} requests");
        }
    }
    let counted = "<KeyCount>3</KeyCount><IsTruncated>false</IsTruncated>";
    for outcome in ask(&listing("ListBucketResult", counted)).0 {
        let error = outcome.expect_err("one is missing").to_string();
        assert!(error.contains("fewer objects than it announces"), "{error}");
    }
    let whole = "<KeyCount>2</KeyCount><IsTruncated>false</IsTruncated>";
    let whole = listing("ListBucketResult", whole);
    let named = ask(&whole).0.remove(0).expect("it is whole");
    assert_eq!(named, ["a"]);
    // A document that was cut names everything or is refused.
    for length in 1..whole.len() {
        let outcomes = ask(&whole[..length]).0;
        for (outcome, expected) in outcomes.into_iter().zip([["a"], ["b"]]) {
            if let Ok(named) = outcome {
                assert_eq!(named, expected, "{}", &whole[..length]);
            }
        }
    }
}
