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

/// The outcomes of a listing, a listing of folders and a listing of versions, on a store that gives
/// the same answer to every request, and the number of requests.
fn ask(answer: &str) -> (Vec<Result<()>>, usize) {
    let body = answer.to_owned();
    let server = FaultServer::start(move |_| Answer::ok(body.as_bytes()));
    let settings = settings(&server.endpoint());
    let quick = Duration::from_millis(1);
    let plain = S3Store::without_retries("bucket", "p", &settings).expect("a store");
    let plain = Retrying::new(plain, RetryPolicy::new(2, quick, quick, 100));
    let past = S3AsOf::open(
        "bucket",
        "p",
        &settings,
        RequestMeter::default(),
        Patience::Short,
        Timestamp::now(),
    );
    let past = past.expect("a view");
    let mut ignored = |_| ControlFlow::Continue(());
    let outcomes = vec![
        plain.list("", &mut ignored),
        plain.folders("").map(drop),
        past.list("", &mut ignored),
    ];
    (outcomes, server.count("GET "))
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
        for root in ["ListBucketResult", "ListVersionsResult"] {
            let (outcomes, requests) = ask(&listing(root, more));
            let expected = match root {
                "ListBucketResult" => &outcomes[..2],
                _ => &outcomes[2..],
            };
            for outcome in expected {
                let error = outcome.as_ref().expect_err(more).to_string();
                assert!(error.contains(problem), "{root} {more}: {error}");
            }
            assert!(requests <= 12, "{requests} requests");
        }
    }
    let counted = "<IsTruncated>false</IsTruncated><KeyCount>3</KeyCount>";
    for outcome in &ask(&listing("ListBucketResult", counted)).0[..2] {
        let error = outcome.as_ref().expect_err("one is missing").to_string();
        assert!(error.contains("fewer objects than it announces"), "{error}");
    }
    let whole = "<IsTruncated>false</IsTruncated><KeyCount>2</KeyCount>";
    for outcome in &ask(&listing("ListBucketResult", whole)).0[..2] {
        outcome.as_ref().expect("it is whole");
    }
    // A document that was cut is no listing.
    let cut = listing("ListBucketResult", whole);
    for length in 1..cut.len() {
        for outcome in &ask(&cut[..length]).0[..2] {
            outcome.as_ref().expect_err(&cut[..length]);
        }
    }
}
