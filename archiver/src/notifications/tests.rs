//! Tests each receiver with a local stub: the content received, the retries, and that secrets stay
//! secret.

use std::sync::{Arc, Mutex};

use repository::config::{CommonArgs, Settings};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

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
    for target in &targets {
        send(target, &notification).await.expect("it is taken");
    }
    notification.fires = false;
    send(&targets[2], &notification).await.expect("it is taken");
    let seen = seen.lock().expect("no panic").clone();
    assert!(
        seen[0].starts_with("POST /hook?secret=s3cr3t HTTP/1.1"),
        "{}",
        seen[0]
    );
    assert!(seen[0].contains("\"status\":\"firing\""), "{}", seen[0]);
    assert!(
        seen[1].contains("{\"text\":\"*[WARNING] test PitrTest"),
        "{}",
        seen[1]
    );
    assert!(
        seen[2].contains("\"event_action\":\"trigger\""),
        "{}",
        seen[2]
    );
    assert!(
        seen[3].contains("\"event_action\":\"resolve\""),
        "{}",
        seen[3]
    );
    let key = "\"dedup_key\":\"tidemark/test/PitrTest\"";
    assert!(seen[2].contains(key) && seen[3].contains(key));
}

#[tokio::test]
async fn a_refusal_is_tried_again_and_names_no_secret() {
    let (port, seen) = stub(&[503, 200]).await;
    let targets = targets(&format!(
        "[notify.a]\ntype = \"webhook\"\nurl = \"http://127.0.0.1:{port}/s3cr3t\"\n"
    ));
    let error = send(&targets[0], &Notification::test())
        .await
        .expect_err("503");
    assert!(error.to_string().contains("503"), "{error}");
    assert!(!error.to_string().contains("s3cr3t"), "{error}");
    let (sender, receiver) = mpsc::channel(4);
    sender.send(Notification::test()).await.expect("room");
    drop(sender);
    deliver(targets, receiver).await;
    let waited = std::time::Instant::now();
    while seen.lock().expect("no panic").len() < 2 && waited.elapsed() < Duration::from_secs(30) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(seen.lock().expect("no panic").len(), 2);
}

#[tokio::test]
async fn a_mail_arrives_whole() {
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
    let toml = |user: &str| {
        format!(
            "[notify.m]\ntype = \"email\"\nsmtp = \"127.0.0.1:{port}\"\ntls = \"none\"\nfrom = \"a@x\"\nto = [\"b@y\"]\n{user}"
        )
    };
    let mut notification = Notification::test();
    notification.alert.summary = "first line\n.second line".to_owned();
    send(&targets(&toml(""))[0], &notification)
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
    let error = send(&targets[0], &Notification::test())
        .await
        .expect_err("no TLS");
    assert!(error.to_string().contains("without TLS"), "{error}");
}
