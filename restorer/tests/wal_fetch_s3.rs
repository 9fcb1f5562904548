//! `restore_command` with a bucket that refuses: a 403 instead of an object, a bucket that does not
//! exist, an overloaded store. None of these proves that WAL is absent, and PostgreSQL would
//! promote at a 1.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use testbed::programs::{command, directory, ours};

use crate::support::said;

/// Answers each request with the result of `answer` for its number.
fn store(
    answer: impl Fn(usize) -> (u16, &'static str) + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let mut reader = BufReader::new(&socket);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                line.clear();
            }
            let (status, code) = answer(count.fetch_add(1, Ordering::Relaxed));
            let body = format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>"
            );
            let text = format!(
                "HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            let _gone = (&socket).write_all(text.as_bytes());
        }
    });
    (address, asked)
}

/// Returns the exit code, the output, and the number of requests.
fn fetch(
    answer: impl Fn(usize) -> (u16, &'static str) + Send + 'static,
) -> (Option<i32>, String, usize) {
    let (address, asked) = store(answer);
    let root = directory().expect("a directory");
    let config = root.path().join("tidemark.toml");
    let text = format!(
        "repository = \"s3://bucket/prefix\"\ns3_endpoint = \"http://{address}\"\ns3_region = \"us-east-1\"\n\
         s3_access_key = \"AKIA\"\ns3_secret_key = \"secret\"\ns3_path_style = true\n"
    );
    fs::write(&config, text).expect("a file");
    let mut fetch = command(&ours("pitr-restore").expect("it is built")).expect("a user");
    fetch.arg("--config").arg(&config);
    fetch.args(["wal-fetch", "000000010000000000000003"]);
    let destination = root.path().join("RECOVERYXLOG");
    let output = fetch.arg(&destination).output().expect("it runs");
    assert!(!destination.exists());
    let (_, error) = said(&output);
    (output.status.code(), error, asked.load(Ordering::Relaxed))
}

#[test]
fn a_no_of_the_store_is_never_the_end_of_the_archive() {
    for (status, code) in [
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (404, "NoSuchBucket"),
    ] {
        let (exit, error, _) = fetch(move |_| (status, code));
        assert_eq!(exit, Some(255), "{code}: {error}");
        assert!(!error.is_empty(), "{code}");
    }
    // An overloaded store is retried, until it gives an answer that a retry does not resolve.
    let (exit, error, asked) = fetch(|number| match number {
        0..3 => (503, "SlowDown"),
        _ => (403, "AccessDenied"),
    });
    assert_eq!(exit, Some(255), "{error}");
    assert!(asked > 3, "{asked}");
}
