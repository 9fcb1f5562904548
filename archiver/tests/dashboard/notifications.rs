//! Tests the notifications of a real archiver: a restart neither repeats an alert that still fires
//! nor forgets its end.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::Value;
use wal_format::OutcomeKind;

use super::{outcome, record};
use crate::{
    certificates::private_file,
    support::{Place, Server, postgres_bin, wait_until},
};

/// A receiver of webhooks.
pub(super) struct Receiver {
    pub(super) port: u16,
    seen: Arc<Mutex<Vec<Value>>>,
}

impl Receiver {
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let document = take(stream.expect("a connection"));
                into.lock().expect("no panic").push(document);
            }
        });
        Self { port, seen }
    }

    /// Returns the notifications about an alert with this status.
    pub(super) fn about(&self, alert: &str, status: &str) -> Vec<Value> {
        let seen = self.seen.lock().expect("no panic");
        let about = seen
            .iter()
            .filter(|document| document["alert"] == alert && document["status"] == status);
        about.cloned().collect()
    }
}

/// Reads a request and accepts it.
fn take(stream: TcpStream) -> Value {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
    reader.get_mut().write_all(answer).expect("an answer");
    serde_json::from_slice(&body).expect("JSON")
}

#[test]
fn a_restart_neither_repeats_an_alert_nor_forgets_its_end() {
    const OVERDUE: &str = "PitrDrillOverdue";
    const TOKEN: &str = "a-token-that-is-long-enough";
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let receiver = Receiver::start();
    let configuration = place.spool().with_extension("toml");
    let token = configuration.with_extension("token");
    private_file(&token, TOKEN);
    let text = format!(
        "http_operate_token_file = '{}'\ndrill_max_age = '30d'\nhttp_public_url = 'https://t.example/'\n[notify.a]\ntype = 'webhook'\nurl = 'http://127.0.0.1:{}/'\n",
        token.display(),
        receiver.port
    );
    fs::write(&configuration, text).expect("a configuration");
    let command = || {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    let archiver = place.run_with(command());
    wait_until("the missing drill is reported", || {
        !receiver.about(OVERDUE, "firing").is_empty()
    });
    let told = &receiver.about(OVERDUE, "firing")[0];
    assert_eq!(told["url"], "https://t.example/clusters/main");
    assert_eq!(
        told["runbook_url"],
        "https://t.example/runbook#PitrDrillOverdue"
    );
    let key = told["key"].as_str().expect("a key").to_owned();
    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    assert!(key.contains(&system), "{key}");
    let told = place.spool().join("main/history/notifications.json");
    wait_until("the delivery is recorded", || {
        let content = fs::read(&told).unwrap_or_default();
        let content: Value = serde_json::from_slice(&content).unwrap_or_default();
        content["receivers"]["a"][OVERDUE]["told"].is_string()
    });
    // A request whose `Host` is another site's name is refused: that site may have made its name
    // resolve to this host.
    let mut stream = TcpStream::connect(archiver.address()).expect("it listens");
    let request = b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    stream.write_all(request).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    // A test notification is followed by its end, so that no incident stays open.
    let mut stream = TcpStream::connect(archiver.address()).expect("it listens");
    let request = format!(
        "POST /api/v1/notify/test HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    wait_until("the test's end is sent", || {
        !receiver.about("PitrTest", "resolved").is_empty()
    });
    let (begun, ended) = (
        receiver.about("PitrTest", "firing"),
        receiver.about("PitrTest", "resolved"),
    );
    assert_eq!(begun[0]["key"], ended[0]["key"]);
    archiver.kill();

    record(&place, &outcome(OutcomeKind::Drill, true));
    let archiver = place.run_with(command());
    wait_until("its end is reported", || {
        !receiver.about(OVERDUE, "resolved").is_empty()
    });
    let ended = &receiver.about(OVERDUE, "resolved")[0];
    assert_eq!(ended["key"], key.as_str());
    let summary = ended["summary"].as_str().expect("a sentence");
    assert!(
        summary.starts_with("The restore drill was overdue for "),
        "{summary}"
    );
    assert_eq!(receiver.about(OVERDUE, "firing").len(), 1);
    assert_eq!(archiver.terminate().code(), Some(0));
}
