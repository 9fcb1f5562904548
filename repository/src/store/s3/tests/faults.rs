//! Answers of a faulty store, and their consequences.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use jiff::Timestamp;

use crate::store::retry::RetryPolicy;

use super::{
    fault_server::{Answer, FaultServer, Request},
    *,
};

const PROBE: &str = "PUT /bucket/p/.tidemark-probe?";
const KEY: &str = "/bucket/p/a/key";

fn store(server: &FaultServer) -> Retrying<S3Store> {
    let quick = Duration::from_millis(1);
    let plain = S3Store::without_retries("bucket", "p", &settings(&server.endpoint()));
    Retrying::new(
        plain.expect("a store"),
        RetryPolicy::new(4, quick, quick, 100),
    )
}

/// A healthy store with conditional writes, except for the answers that `fault` gives. `fault`
/// receives the requests for our key and their number.
fn with_fault(
    fault: impl Fn(usize, &Request) -> Option<Answer> + Send + Sync + 'static,
) -> FaultServer {
    let asked = AtomicUsize::new(0);
    let objects: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::default();
    FaultServer::start(move |request| {
        if request.is(PROBE) {
            return Answer::error(412, "PreconditionFailed");
        }
        if request.line.contains("uploads") && request.is("GET") {
            return Answer::ok(b"<ListMultipartUploadsResult></ListMultipartUploadsResult>");
        }
        let told = fault(asked.fetch_add(1, Ordering::SeqCst), request);
        let path = request.line.split([' ', '?']).nth(1).unwrap_or_default();
        let mut objects = objects.lock().expect("no panic");
        let usual = match request.line.split(' ').next() {
            Some("PUT")
                if objects.contains_key(path) && request.header("if-none-match").is_some() =>
            {
                Answer::error(412, "PreconditionFailed")
            }
            Some("PUT") => {
                objects.insert(path.to_owned(), request.body.clone());
                Answer::status(200)
            }
            _ => match objects.get(path) {
                Some(body) => Answer::ok(body),
                None => Answer::error(404, "NoSuchKey"),
            },
        };
        told.unwrap_or(usual)
    })
}

#[test]
fn slow_down_is_obeyed_and_then_it_succeeds() {
    for (status, code) in [
        (503, "SlowDown"),
        (500, "InternalError"),
        (409, "ConditionalRequestConflict"),
        (429, "TooManyRequests"),
        (409, "OperationAborted"),
    ] {
        let told = Answer::error(status, code);
        let server = FaultServer::start({
            let asked = AtomicUsize::new(0);
            move |request| match request {
                request if request.is(PROBE) => Answer::error(412, "PreconditionFailed"),
                request if request.is("GET") => Answer::error(403, "AccessDenied"),
                _ if asked.fetch_add(1, Ordering::SeqCst) < 2 => told.clone(),
                _ => Answer::status(200),
            }
        });
        let outcome = store(&server).put_if_absent("a/key", b"body");
        assert_eq!(
            outcome.expect("the third succeeds"),
            PutOutcome::Created,
            "{code}"
        );
        assert_eq!(server.count(&format!("PUT {KEY}")), 3, "{code}");
    }
}

#[test]
fn a_put_carries_its_condition_and_its_checksum() {
    let server = with_fault(|_, _| None);
    store(&server)
        .put_if_absent("a/key", b"123456789")
        .expect("a put");
    let requests = server.requests();
    let put = requests
        .iter()
        .find(|request| request.is(&format!("PUT {KEY}")))
        .expect("a put");
    assert_eq!(put.header("if-none-match"), Some("*"));
    // 0xE3069283, the check value of CRC-32C.
    assert_eq!(put.header("x-amz-checksum-crc32c"), Some("4waSgw=="));
    assert_eq!(put.body, b"123456789", "as it is, not in signed chunks");
}

#[test]
fn a_put_whose_reply_was_lost_is_found_to_be_there() {
    let server = with_fault(|asked, _| (asked == 0).then_some(Answer::HangUp));
    let store = store(&server);
    let outcome = store.put_if_absent("a/key", b"body").expect("a put");
    assert_eq!(outcome, PutOutcome::AlreadyExists, "the caller compares");
    assert_eq!(store.get("a/key").expect("a get"), b"body"[..]);
}

#[test]
fn a_body_that_breaks_off_is_read_again_and_never_delivered() {
    let server = with_fault(|asked, request| {
        (request.is("GET") && asked < 3).then(|| Answer::Truncated(b"0123456789".to_vec(), 4))
    });
    let store = store(&server);
    store.put_if_absent("a/key", b"body").expect("a put");
    assert_eq!(store.get("a/key").expect("the third read"), b"body"[..]);
    let server = with_fault(|_, _| Some(Answer::Truncated(b"0123456789".to_vec(), 4)));
    let error = self::store(&server)
        .get("a/key")
        .expect_err("no whole body");
    assert!(error.is_transient() && !error.is_not_found(), "{error}");
}

#[test]
fn a_wrong_checksum_is_damage() {
    let sum = vec![("x-amz-checksum-crc32c", checksum(b"what was stored"))];
    let other = Answer::Http(200, sum.clone(), b"what came back".to_vec());
    let server = with_fault(move |_, _| Some(other.clone()));
    let error = store(&server).get("a/key").expect_err("other bytes");
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert_eq!(
        server.count(&format!("GET {KEY}")),
        2,
        "read twice, then told"
    );
    let asked = server.requests();
    assert_eq!(asked[0].header("x-amz-checksum-mode"), Some("ENABLED"));
    let right = Answer::Http(200, sum, b"what was stored".to_vec());
    let server = with_fault(move |_, _| Some(right.clone()));
    store(&server).get("a/key").expect("the right bytes");
}

#[test]
fn only_no_such_key_means_absent() {
    let absent = with_fault(|_, _| Some(Answer::error(404, "NoSuchKey")));
    let absent = store(&absent);
    assert!(absent.get("a/key").expect_err("absent").is_not_found());
    assert!(absent.head("a/key").expect("an answer").is_none());
    for (status, code, part) in [
        (403, "AccessDenied", "s3:GetObject and s3:ListBucket"),
        (403, "RequestTimeTooSkewed", "set this host's clock"),
        (400, "ExpiredToken", "renew the temporary credentials"),
        (404, "NoSuchBucket", "create the bucket"),
        (403, "SignatureDoesNotMatch", "the secret does not belong"),
        (403, "InvalidAccessKeyId", "does not know the access key"),
        (404, "", "HTTP 404"),
        (301, "PermanentRedirect", "correct s3_region"),
    ] {
        let server = with_fault(move |_, _| {
            Some(match code {
                "" => Answer::Http(404, Vec::new(), b"<html>a proxy's page</html>".to_vec()),
                code => Answer::error(status, code),
            })
        });
        let store = store(&server);
        let errors = [
            store.get("a/key").expect_err("an error"),
            store.get_range("a/key", 0..1).expect_err("an error"),
            store.head("a/key").expect_err("an error"),
        ];
        for error in &errors {
            assert!(!error.is_not_found(), "{status} {code}: {error}");
        }
        let said = errors[0].to_string();
        assert!(said.contains(part), "{said}");
        // The store's own words come once, at the end.
        assert_eq!(said.matches(&format!("HTTP {status}")).count(), 1, "{said}");
        // A refusal is not retried: three requests, and one more to find out the meaning of the 404
        // of a HEAD.
        let questions = server.requests().len();
        assert!(code.is_empty() || questions <= 4, "{code}: {questions}");
    }
}

#[test]
fn a_store_that_ignores_conditions_is_found_out_and_still_never_overwritten() {
    let objects: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::default();
    let server = FaultServer::start(move |request| {
        let path = request.line.split([' ', '?']).nth(1).unwrap_or_default();
        let mut objects = objects.lock().expect("no panic");
        if request.is("PUT") {
            objects.insert(path.to_owned(), request.body.clone());
            return Answer::status(200);
        }
        match objects.get(path) {
            Some(body) => Answer::ok(body),
            None => Answer::error(404, "NoSuchKey"),
        }
    });
    let store = store(&server);
    let put = |body: &[u8]| store.put_if_absent("a/key", body).expect("a put");
    assert_eq!(put(b"first"), PutOutcome::Created);
    assert_eq!(server.count(PROBE), 2, "found out by putting it twice");
    assert_eq!(put(b"other"), PutOutcome::AlreadyExists);
    assert_eq!(store.get("a/key").expect("a get"), b"first"[..]);
    assert_eq!(server.count(&format!("PUT {KEY}")), 1);
    assert_eq!(server.count(PROBE), 2, "found out once");
}

#[test]
fn a_range_that_is_not_the_one_asked_for_is_refused() {
    let range = |range: &str, body: &[u8]| {
        let headers = vec![("Content-Range", range.to_owned())];
        Answer::Http(206, headers, body.to_vec())
    };
    for (answer, sound) in [
        (range("bytes 2-5/10", b"2345"), true),
        (range("bytes 0-3/10", b"0123"), false),
        (range("bytes 2-4/5", b"234"), false),
        // The store ignored the range.
        (Answer::ok(b"0123456789"), false),
        (Answer::error(416, "InvalidRange"), false),
    ] {
        let told = answer.clone();
        let server = with_fault(move |_, _| Some(told.clone()));
        let outcome = store(&server).get_range("a/key", 2..6);
        assert_eq!(outcome.is_ok(), sound, "{answer:?}: {outcome:?}");
        assert_eq!(server.requests()[0].header("range"), Some("bytes=2-5"));
    }
}

/// A multipart upload whose completion is answered with 200 and an error.
#[test]
fn an_error_inside_of_a_200_is_the_error_it_is() {
    let server = FaultServer::start(|request| {
        let created = b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>";
        let is_probe = request.line.contains(".tidemark-probe");
        match request.line.split(' ').next() {
            Some("POST") if request.line.contains("uploads") => Answer::ok(created),
            Some("POST") if is_probe => Answer::error(412, "PreconditionFailed"),
            Some("POST") => Answer::error(200, "InternalError"),
            Some("PUT") if is_probe && !request.line.contains("uploadId") => {
                Answer::error(412, "PreconditionFailed")
            }
            Some("PUT") => Answer::Http(200, vec![("ETag", "\"1\"".to_owned())], Vec::new()),
            Some("DELETE") => Answer::status(204),
            Some("GET") if request.line.contains("uploads") => {
                Answer::ok(b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            }
            _ => Answer::error(404, "NoSuchKey"),
        }
    });
    let body = vec![1; multipart::PART_BYTES + 1];
    let error = store(&server)
        .put_if_absent("a/key", &body)
        .expect_err("it was not completed");
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains("InternalError"), "{error}");
    let completed = format!("POST {KEY}?uploadId=7");
    assert_eq!(server.count(&completed), 4, "every attempt");
    let aborted = server.count(&format!("DELETE {KEY}"));
    assert_eq!(aborted, 4, "no attempt leaves its parts");
}

/// The same error as the answer to a small put, and a proxy's page. Neither may count as success.
#[test]
fn an_error_in_the_answer_to_a_put_is_no_success() {
    for (answer, words) in [
        (Answer::error(200, "InternalError"), "InternalError"),
        (Answer::ok(b"<html>welcome</html>"), "ETag"),
    ] {
        let told = answer.clone();
        let server = with_fault(move |asked, request| {
            (request.is("PUT") && asked < 1).then(|| told.clone())
        });
        let outcome = store(&server).put_if_absent("a/key", b"body");
        // The script stores objects immediately.
        assert_eq!(outcome.expect("the second"), PutOutcome::AlreadyExists);
        let server = with_fault(move |_, request| request.is("PUT").then(|| answer.clone()));
        // The condition of the retry finds out whether the object was stored after all.
        let outcome = store(&server).put_if_absent("a/key", b"body");
        let error = outcome.expect_err("it was never said to be stored");
        assert!(error.is_transient(), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(server.count(&format!("PUT {KEY}")), 4, "every attempt");
    }
}

/// Bytes that change in transit are sent again.
#[test]
fn a_put_whose_bytes_were_changed_on_their_way_is_sent_again() {
    for code in ["BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"] {
        let server = FaultServer::start({
            let asked = AtomicUsize::new(0);
            move |request| match request {
                request if request.is(PROBE) => Answer::error(412, "PreconditionFailed"),
                request if request.is("GET") => Answer::error(403, "AccessDenied"),
                _ if asked.fetch_add(1, Ordering::SeqCst) < 2 => Answer::error(400, code),
                _ => Answer::status(200),
            }
        });
        let outcome = store(&server).put_if_absent("a/key", b"body");
        assert_eq!(outcome.expect("the third"), PutOutcome::Created, "{code}");
    }
}

/// An occasional byte is not progress: neither a thread nor a recovery waits forever.
#[test]
fn a_body_that_trickles_is_given_up_and_read_again() {
    let server = with_fault(|asked, request| {
        let trickle = request.is("GET") && asked < 3;
        trickle.then(|| Answer::Trickled(vec![b'x'; 1000], Duration::from_millis(50)))
    });
    let mut plain =
        S3Store::without_retries("bucket", "p", &settings(&server.endpoint())).expect("a store");
    plain.standstill_max = Duration::from_millis(400);
    plain.put_if_absent("a/key", b"body").expect("a put");
    let error = plain.get("a/key").expect_err("it trickles");
    assert!(
        error.is_transient() && error.to_string().contains("stood still"),
        "{error}"
    );
    let quick = Duration::from_millis(1);
    let store = Retrying::new(plain, RetryPolicy::new(4, quick, quick, 100));
    assert_eq!(store.get("a/key").expect("the third"), b"body"[..]);
}

#[test]
fn uploads_that_a_crash_left_are_aborted_when_they_are_old() {
    let now = Timestamp::now();
    let old = now - jiff::SignedDuration::from_hours(30);
    let young = now - jiff::SignedDuration::from_hours(2);
    let server = FaultServer::start(move |request| {
        match request {
        request if request.is("PUT") => Answer::error(412, "PreconditionFailed"),
        request if request.is("GET") => Answer::ok(
            format!(
                "<ListMultipartUploadsResult>\
                 <Upload><Key>p/old</Key><UploadId>1</UploadId><Initiated>{old:.3}</Initiated></Upload>\
                 <Upload><Key>p/young</Key><UploadId>2</UploadId><Initiated>{young:.3}</Initiated></Upload>\
                 </ListMultipartUploadsResult>"
            )
            .as_bytes(),
        ),
        _ => Answer::status(204),
    }
    });
    store(&server).ready_to_write().expect("it is ready");
    assert_eq!(server.count("DELETE /bucket/p/old?"), 1);
    assert_eq!(server.count("DELETE /bucket/p/young?"), 0);
    let list = server.requests().into_iter().find(|one| one.is("GET"));
    assert!(list.expect("a list").line.contains("prefix=p%2F"));
}

/// A running writer makes no listings: with a million objects every tail would be slow and
/// expensive.
#[test]
fn puts_and_gets_make_one_request_each() {
    let server = with_fault(|_, _| None);
    let store = store(&server);
    store.ready_to_write().expect("it is ready");
    let before = server.requests().len();
    for number in 0..10 {
        let key = format!("a/{number}");
        store.put_if_absent(&key, b"x").expect("a put");
        store.get(&key).expect("a get");
    }
    assert_eq!(server.requests().len() - before, 20);
}

/// In a bucket whose policy forbids deletes the object stays, and that is not a failure.
#[test]
fn a_denied_delete_is_a_lock() {
    for code in ["AccessDenied", "ObjectLocked"] {
        let server =
            with_fault(move |_, request| request.is("DELETE").then(|| Answer::error(403, code)));
        let error = store(&server).delete("a/key").expect_err("it stays");
        assert!(error.is_object_locked() && !error.is_transient(), "{error}");
        assert_eq!(server.count("DELETE"), 1, "asked once");
    }
    let busy =
        with_fault(|_, request| request.is("DELETE").then(|| Answer::error(503, "SlowDown")));
    let error = store(&busy).delete("a/key").expect_err("not now");
    assert!(!error.is_object_locked() && error.is_transient(), "{error}");
}

/// In a bucket whose policy forbids overwrites, a taken name may be refused before its condition is
/// evaluated.
#[test]
fn a_denied_overwrite_means_that_the_name_is_taken() {
    let objects: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::default();
    let server = FaultServer::start(move |request| {
        let path = request.line.split([' ', '?']).nth(1).unwrap_or_default();
        let mut objects = objects.lock().expect("no panic");
        match (request.line.split(' ').next(), objects.get(path)) {
            (Some("PUT"), Some(_)) => Answer::error(403, "AccessDenied"),
            (Some("PUT"), None) if path.contains("forbidden") => Answer::error(403, "AccessDenied"),
            (Some("PUT"), None) => {
                objects.insert(path.to_owned(), request.body.clone());
                Answer::status(200)
            }
            (_, Some(body)) => Answer::ok(body),
            (_, None) => Answer::error(404, "NoSuchKey"),
        }
    });
    let store = store(&server);
    let put = |key: &str, body: &[u8]| store.put_if_absent(key, body);
    assert_eq!(put("a/key", b"first").expect("a put"), PutOutcome::Created);
    assert_eq!(
        put("a/key", b"other").expect("an answer"),
        PutOutcome::AlreadyExists
    );
    assert_eq!(store.get("a/key").expect("a get"), b"first"[..]);
    // If the object does not exist, a refusal is a real one.
    let error = put("a/forbidden", b"x").expect_err("no permission");
    assert!(error.to_string().contains("s3:PutObject"), "{error}");
}

/// The store answers that it stored the object, and has lost it or has another one.
#[test]
fn what_was_put_is_proved_by_reading_it() {
    for lies in [None, Some(b"what nobody put".to_vec())] {
        let told = lies.clone();
        let server = with_fault(move |_, request| match &told {
            _ if request.is("PUT") => Some(Answer::status(200)),
            None => Some(Answer::error(404, "NoSuchKey")),
            Some(body) => Some(Answer::ok(body)),
        });
        let store = store(&server);
        store.put_if_absent("a/key", b"body").expect("it says so");
        match store.get("a/key") {
            Ok(body) => assert_ne!(body, b"body"[..], "the archiver compares and puts it again"),
            Err(error) => assert!(error.is_not_found() && lies.is_none(), "{error}"),
        }
    }
}

/// The same for objects that are not read back: a verified put asks for the checksum that the store
/// has.
#[test]
fn a_proved_put_believes_only_the_store_s_own_checksum() {
    let sum = |body: &[u8]| {
        let headers = vec![("x-amz-checksum-crc32c", checksum(body))];
        Answer::Http(200, headers, body.to_vec())
    };
    // Cases: stored and lost; other bytes of another length; other bytes of the same length; a
    // store without checksums that has other bytes.
    for lie in [
        Answer::error(404, "NoSuchKey"),
        sum(b"what nobody put"),
        sum(b"bodY"),
        Answer::ok(b"bodY"),
    ] {
        let told = lie.clone();
        let server = FaultServer::start({
            let (puts, checksum) = (AtomicUsize::new(0), sum(b"body"));
            move |request| match request {
                request if request.is(PROBE) => Answer::error(412, "PreconditionFailed"),
                request if request.is("PUT") => {
                    puts.fetch_add(1, Ordering::SeqCst);
                    Answer::status(200)
                }
                request if request.is("DELETE") => Answer::status(204),
                _ if puts.load(Ordering::SeqCst) < 3 => told.clone(),
                _ => checksum.clone(),
            }
        });
        let store = store(&server);
        let outcome = store.put_proved("a/key", b"body");
        assert_eq!(outcome.expect("the third"), PutOutcome::Created, "{lie:?}");
        assert_eq!(server.count(&format!("PUT {KEY}")), 3, "{lie:?}");
        let withdrawn = usize::from(!matches!(lie, Answer::Http(404, ..))) * 2;
        assert_eq!(server.count(&format!("DELETE {KEY}")), withdrawn, "{lie:?}");
        let heads = server.requests().into_iter().filter(|one| one.is("HEAD"));
        for head in heads {
            assert_eq!(head.header("x-amz-checksum-mode"), Some("ENABLED"));
        }
    }
}

/// A credentials file that is replaced while the program runs: something else renews the temporary
/// credentials.
#[test]
fn credentials_that_were_exchanged_are_read_again() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("credentials");
    let write = |key: &str| {
        let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n");
        std::fs::write(&file, text).expect("a file");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, private).expect("chmod");
    };
    write("AKIAOLD");
    let server = FaultServer::start(|request| {
        let signed = request.header("authorization").unwrap_or_default();
        match request {
            _ if signed.contains("AKIAOLD") => Answer::error(400, "ExpiredToken"),
            _ if !signed.contains("AKIANEW") => Answer::error(403, "InvalidAccessKeyId"),
            request if request.is(PROBE) => Answer::error(412, "PreconditionFailed"),
            _ => Answer::ok(b"body"),
        }
    });
    let from_file = S3Settings {
        credentials: S3Credentials::File(file.clone()),
        ..settings(&server.endpoint())
    };
    let quick = Duration::from_millis(1);
    let plain = S3Store::without_retries("bucket", "p", &from_file).expect("a store");
    let store = Retrying::new(plain, RetryPolicy::new(4, quick, quick, 100));
    let error = store.get("a/key").expect_err("they ran out");
    assert!(
        !error.is_not_found() && error.to_string().contains("renew"),
        "{error}"
    );
    write("AKIANEW");
    // Not with every request, so that the source of the credentials is not overloaded.
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(store.get("a/key").expect("the new ones"), b"body"[..]);
}

/// A connection breaks in the middle of an upload. The part is sent again, and no upload remains.
#[test]
fn a_part_whose_connection_died_is_sent_again() {
    let hung_up = AtomicUsize::new(0);
    let stored: Mutex<BTreeMap<String, usize>> = Mutex::default();
    let server = FaultServer::start(move |request| {
        let created = b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>";
        let is_probe = request.line.contains(".tidemark-probe");
        let mut stored = stored.lock().expect("no panic");
        match request.line.split(' ').next() {
            Some("POST") if request.line.contains("uploads") => Answer::ok(created),
            Some("POST") if is_probe => Answer::error(412, "PreconditionFailed"),
            Some("POST") => {
                let length = stored.values().sum();
                stored.insert("whole".to_owned(), length);
                Answer::ok(b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>")
            }
            Some("PUT") if is_probe && !request.line.contains("uploadId") => {
                Answer::error(412, "PreconditionFailed")
            }
            Some("PUT")
                if request.line.contains("partNumber=2")
                    && hung_up.fetch_add(1, Ordering::SeqCst) < 2 =>
            {
                Answer::HangUp
            }
            Some("PUT") => {
                if !is_probe {
                    stored.insert(request.line.clone(), request.body.len());
                }
                Answer::Http(200, vec![("ETag", "\"1\"".to_owned())], Vec::new())
            }
            Some("DELETE") => Answer::status(204),
            Some("HEAD") if stored.contains_key("whole") => {
                Answer::Http(200, Vec::new(), vec![0; stored["whole"]])
            }
            Some("GET") if request.line.contains("uploads") => {
                Answer::ok(b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            }
            _ => Answer::error(404, "NoSuchKey"),
        }
    });
    let body = vec![1; multipart::PART_BYTES + 1];
    let put = store(&server).put_if_absent("a/key", &body).expect("a put");
    assert_eq!(put, PutOutcome::Created);
    assert_eq!(
        server.count(&format!("PUT {KEY}?partNumber=2"))
            + server.count(&format!("PUT {KEY}?x-id=UploadPart&partNumber=2")),
        3
    );
    assert_eq!(
        server.count(&format!("DELETE {KEY}")),
        0,
        "nothing is aborted"
    );
}
