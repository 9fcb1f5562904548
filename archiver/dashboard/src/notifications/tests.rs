//! Tests each receiver with a local stub: the content received, the retries, and that secrets stay
//! secret.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use repository::config::{CommonArgs, NotifyTarget, Settings};
use status::alert::Alert;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use wal_format::PgTimestamp;

use super::*;

fn targets(toml: &str) -> Vec<NotifyTarget> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("repository = \"file:///r\"\n{toml}")).expect("written");
    let args = CommonArgs {
        config: Some(file.path().to_owned()),
        ..CommonArgs::default()
    };
    Settings::resolve(&args).expect("sound").notify
}

fn links() -> Links {
    Links {
        page: Some("https://t.example".to_owned()),
        runbook: Some("https://w.example/runbook".to_owned()),
        host: "db1".to_owned(),
    }
}

async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains(end) {
        let read = stream.read(&mut buffer).await.expect("bytes");
        if read == 0 {
            break;
        }
        text += &String::from_utf8_lossy(&buffer[..read]);
    }
    text
}

/// Answers each request with the next of `statuses`, and all further ones with the last.
async fn stub(statuses: &'static [u16]) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&seen);
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            let request = read_until(&mut stream, "}").await;
            into.lock().expect("no panic").push(request);
            let status = statuses[number.min(statuses.len() - 1)];
            number += 1;
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.expect("written");
        }
    });
    (port, seen)
}

#[tokio::test]
async fn slack_pagerduty_and_webhook_get_what_they_understand() {
    let (port, seen) = stub(&[200]).await;
    let toml = format!(
        "[notify.a]\ntype = \"webhook\"\nurl = \"http://127.0.0.1:{port}/hook?secret=s3cr3t\"\n\
         [notify.b]\ntype = \"slack\"\nurl = \"http://127.0.0.1:{port}/slack\"\n\
         [notify.c]\ntype = \"pagerduty\"\nurl = \"http://127.0.0.1:{port}/pd\"\nrouting_key = \"rk\"\n"
    );
    let targets = targets(&toml);
    let shown = format!("{targets:?}");
    assert!(
        !shown.contains("s3cr3t") && !shown.contains("rk\""),
        "{shown}"
    );
    let mut notification = Notification::test();
    notification.alert.name = "PitrStreamDown";
    notification.cluster = "main".to_owned();
    notification.system_identifier = Some("7432188851234567890".parse().expect("an identifier"));
    for target in &targets {
        send(target, &notification, &links())
            .await
            .expect("it is taken");
    }
    let since = notification.alert.since;
    notification.ended = Some(PgTimestamp(since.0 + 90_000_000));
    for target in &targets[1..] {
        send(target, &notification, &links())
            .await
            .expect("it is taken");
    }
    let seen = seen.lock().expect("no panic").clone();
    assert!(
        seen[0].starts_with("POST /hook?secret=s3cr3t HTTP/1.1"),
        "{}",
        seen[0]
    );
    assert!(seen[0].contains("\"status\":\"firing\""), "{}", seen[0]);
    assert!(
        seen[1].contains("{\"text\":\"*[WARNING] main PitrStreamDown: This is a test"),
        "{}",
        seen[1]
    );
    assert!(
        seen[2].contains("\"event_action\":\"trigger\""),
        "{}",
        seen[2]
    );
    assert!(
        seen[3].contains("[RESOLVED] main PitrStreamDown: The stream was down for 1 min 30 s."),
        "{}",
        seen[3]
    );
    assert!(
        seen[4].contains("\"event_action\":\"resolve\""),
        "{}",
        seen[4]
    );
    let key = "\"dedup_key\":\"tidemark/db1/7432188851234567890/main/PitrStreamDown\"";
    assert!(seen[2].contains(key) && seen[4].contains(key));
    for request in &seen {
        for link in [
            "https://t.example/clusters/main",
            "https://w.example/runbook#PitrStreamDown",
        ] {
            assert!(request.contains(link), "{link} is missing in {request}");
        }
    }
}

#[test]
fn only_configured_addresses_are_linked() {
    let mut notification = Notification::test();
    let texts = |notification: &Notification, links: &Links| {
        [
            message::webhook(notification, links).to_string(),
            message::slack(notification, links).to_string(),
            message::pagerduty(notification, links, "key").to_string(),
            message::mail(notification, links).1,
        ]
    };
    let unknown = Links {
        page: None,
        runbook: None,
        host: "db1".to_owned(),
    };
    for text in texts(&notification, &unknown) {
        assert!(!text.contains("://") && !text.contains("Page"), "{text}");
    }
    // A test concerns neither a cluster nor a runbook that exist.
    for text in texts(&notification, &links()) {
        assert!(
            text.contains("https://t.example/")
                && text.contains("https://w.example/runbook")
                && !text.contains("/clusters/test")
                && !text.contains("runbook#"),
            "{text}"
        );
    }
    notification.alert.name = "PitrStreamDown";
    notification.cluster = "main".to_owned();
    for text in texts(&notification, &links()) {
        assert!(text.contains("https://t.example/clusters/main"), "{text}");
        assert!(text.contains("/runbook#PitrStreamDown"), "{text}");
    }
}

#[tokio::test]
async fn a_refusal_names_no_secret() {
    let (port, _) = stub(&[503]).await;
    let targets = targets(&format!(
        "[notify.a]\ntype = \"webhook\"\nurl = \"http://127.0.0.1:{port}/s3cr3t\"\n"
    ));
    let error = send(&targets[0], &Notification::test(), &links())
        .await
        .expect_err("503");
    assert!(error.to_string().contains("503"), "{error}");
    assert!(!error.to_string().contains("s3cr3t"), "{error}");
}

/// Waits at most a minute for a value.
async fn wait_for<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let began = std::time::Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the stub has seen `count` requests, and returns them.
async fn requests(seen: &Mutex<Vec<String>>, count: usize) -> Vec<String> {
    wait_for("requests", || {
        let requests = seen.lock().expect("no panic").clone();
        (requests.len() >= count).then_some(requests)
    })
    .await
}

#[tokio::test]
async fn a_receiver_that_was_away_gets_the_newest_state_and_a_restart_adds_nothing() {
    let (port, seen) = stub(&[503, 503, 200]).await;
    let toml = format!("[notify.a]\ntype = \"webhook\"\nurl = \"http://127.0.0.1:{port}/\"\n");
    let directory = tempfile::tempdir().expect("a directory");
    let name = "main".parse().expect("a name");
    let rule = status::alerts::rule("PitrGap").expect("an alert");
    let alert = Alert {
        name: rule.name,
        severity: rule.severity,
        runbook: rule.runbook,
        ..Notification::test().alert
    };
    let firing = std::slice::from_ref(&alert);
    let notifier = Notifier::start(targets(&toml), links());
    let mailbox = notifier.open(&name, directory.path());
    notifier.update(&mailbox, None, firing, |_| false);
    let found = requests(&seen, 3).await;
    assert!(found[2].contains("\"status\":\"firing\""), "{}", found[2]);
    // The next notifier reads the record after the delivery was written there.
    wait_for("the delivery is recorded", || {
        let record = Mailbox::open("main".parse().expect("a name"), directory.path());
        record.is_told("a", "PitrGap").then_some(())
    })
    .await;
    let notifier = Notifier::start(targets(&toml), links());
    let mailbox = notifier.open(&name, directory.path());
    assert_eq!(mailbox.standing(), firing);
    notifier.update(&mailbox, None, firing, |_| false);
    notifier.update(&mailbox, None, &[], |_| false);
    let found = requests(&seen, 4).await;
    assert!(found[3].contains("\"status\":\"resolved\""), "{}", found[3]);
}

#[tokio::test]
async fn a_heartbeat_is_sent_at_its_interval() {
    let (port, seen) = stub(&[200]).await;
    let toml = format!(
        "[notify.a]\ntype = \"heartbeat\"\nurl = \"http://127.0.0.1:{port}/ping\"\ninterval = \"1s\"\n"
    );
    let _notifier = Notifier::start(targets(&toml), links());
    for request in requests(&seen, 2).await {
        assert!(request.starts_with("POST /ping "), "{request}");
        assert!(request.contains("\"status\":\"alive\""), "{request}");
    }
}

#[test]
fn an_invalid_receiver_is_refused_with_the_remedy() {
    let check = |more: &str, expected: &str| {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = format!(
            "repository = \"file:///r\"\n[notify.a]\ntype = \"webhook\"\nurl = \"http://x/\"\n{more}"
        );
        std::fs::write(file.path(), text).expect("written");
        let args = CommonArgs {
            config: Some(file.path().to_owned()),
            ..CommonArgs::default()
        };
        let error = Settings::resolve(&args).expect_err(more).to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("severity = [\"critcal\"]", "write [\"critical\"]");
    check("remind_after = \"500ms\"", "shorter than");
    check("daily_summary = \"07:00\"", "type = \"email\" only");
    check("interval = \"1min\"", "type = \"heartbeat\" only");
    check("remind_afer = \"1h\"", "did you mean \"remind_after\"");
}

/// Starts a mail server that takes one mail. Returns its port and what it was told.
async fn mail_stub() -> (u16, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        let mut said = String::new();
        for (answer, end) in [
            ("220 hello\r\n", "\r\n"),
            ("250-stub\r\n250 SIZE\r\n", "\r\n"),
            ("250 ok\r\n", "\r\n"),
            ("250 ok\r\n", "\r\n"),
            ("354 go on\r\n", "\r\n.\r\n"),
            ("250 taken\r\n", "\r\n"),
        ] {
            stream.write_all(answer.as_bytes()).await.expect("written");
            said += &read_until(&mut stream, end).await;
        }
        said
    });
    (port, server)
}

#[tokio::test]
async fn the_daily_summary_is_mailed_when_its_time_has_passed() {
    let (port, server) = mail_stub().await;
    let toml = format!(
        "[notify.m]\ntype = \"email\"\nsmtp = \"127.0.0.1:{port}\"\ntls = \"none\"\nfrom = \"a@x\"\n\
         to = [\"b@y\"]\ndaily_summary = \"07:00\"\n"
    );
    let notifier = Notifier::start(targets(&toml), links());
    let seven = 20_000 * 86_400 + 7 * 3600;
    let summaries = std::cell::Cell::new(0);
    for second in [seven - 3600, seven - 1, seven, seven + 1, seven + 3600] {
        notifier.finished_round(second, || {
            summaries.set(summaries.get() + 1);
            Vec::new()
        });
    }
    assert_eq!(summaries.get(), 1);
    let said = server.await.expect("it is mailed");
    assert!(said.contains("RCPT TO:<b@y>\r\n"), "{said}");
}

#[tokio::test]
async fn a_mail_arrives_whole() {
    let (port, server) = mail_stub().await;
    let toml = |user: &str| {
        format!(
            "[notify.m]\ntype = \"email\"\nsmtp = \"127.0.0.1:{port}\"\ntls = \"none\"\nfrom = \"a@x\"\nto = [\"b@y\"]\n{user}"
        )
    };
    let mut notification = Notification::test();
    notification.alert.summary = "first line\n.second line".to_owned();
    send(&targets(&toml(""))[0], &notification, &links())
        .await
        .expect("it is taken");
    let said = server.await.expect("it ends");
    for part in [
        "EHLO ",
        "MAIL FROM:<a@x>\r\n",
        "RCPT TO:<b@y>\r\n",
        "Subject: =?utf-8?B?",
        "\r\n..second line\r\n",
    ] {
        assert!(said.contains(part), "{part:?} is missing in\n{said}");
    }
}

#[tokio::test]
async fn a_password_is_not_sent_in_clear() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        stream.write_all(b"220 hello\r\n").await.expect("written");
        read_until(&mut stream, "\r\n").await;
        stream
            .write_all(b"250 AUTH PLAIN\r\n")
            .await
            .expect("written");
        read_until(&mut stream, "never").await;
    });
    let targets = targets(&format!(
        "[notify.m]\ntype = \"email\"\nsmtp = \"127.0.0.1:{port}\"\ntls = \"none\"\nfrom = \"a@x\"\nto = [\"b@y\"]\n\
         user = \"u\"\npassword = \"s3cr3t\"\n"
    ));
    let error = send(&targets[0], &Notification::test(), &links())
        .await
        .expect_err("no TLS");
    assert!(error.to_string().contains("without TLS"), "{error}");
}
