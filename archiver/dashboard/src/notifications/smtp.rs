//! The part of SMTP (RFC 5321) that one mail needs: EHLO, STARTTLS, AUTH PLAIN, MAIL, RCPT, DATA.
//!
//! Credentials are never sent without TLS. A server that does not offer a required STARTTLS is an
//! error.

use base64::{Engine, engine::general_purpose::STANDARD};
use repository::config::{NotifyTarget, SmtpTls};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{
    client::{Connection, encrypt, io},
    error::NotifyError,
};

/// The maximum length of a line in an answer, far above the RFC's 512.
const LINE_BYTES_MAX: u64 = 4096;
/// The maximum number of lines in an answer.
const LINES_MAX: usize = 100;

struct Session(BufReader<Box<dyn Connection>>);

pub(super) async fn send(
    target: &NotifyTarget,
    subject: &str,
    text: &str,
) -> Result<(), NotifyError> {
    let host = target
        .smtp
        .rsplit_once(':')
        .map_or(&*target.smtp, |(host, _)| host);
    let stream = TcpStream::connect(&*target.smtp)
        .await
        .map_err(io("connect"))?;
    let stream: Box<dyn Connection> = if target.tls == SmtpTls::Implicit {
        Box::new(encrypt(target, host, stream).await?)
    } else {
        Box::new(stream)
    };
    let mut session = Session(BufReader::new(stream));
    session.expect("the connection", "220").await?;
    let mut offers = session.greet().await?;
    if target.tls == SmtpTls::Starttls {
        session.ask("STARTTLS", "STARTTLS", "220").await?;
        if !session.0.buffer().is_empty() {
            // Data sent before TLS would be read as an answer inside of it.
            return Err(NotifyError::Refused {
                what: "STARTTLS",
                answer: "the server sent more than its answer".to_owned(),
            });
        }
        let stream = encrypt(target, host, session.0.into_inner()).await?;
        session = Session(BufReader::new(Box::new(stream)));
        offers = session.greet().await?;
    }
    if !target.user.is_empty() {
        if target.tls == SmtpTls::None {
            return Err(NotifyError::Settings(format!(
                "[notify.{}]: a password is not sent without TLS",
                target.name
            )));
        }
        if !offers
            .iter()
            .any(|line| line.to_ascii_uppercase().contains("PLAIN"))
        {
            return Err(NotifyError::Refused {
                what: "AUTH PLAIN",
                answer: "the server does not offer it".to_owned(),
            });
        }
        let secret = format!("\0{}\0{}", target.user, target.password.reveal());
        let line = format!("AUTH PLAIN {}", STANDARD.encode(secret));
        session.ask("the password", &line, "235").await?;
    }
    session
        .ask("the sender", &format!("MAIL FROM:<{}>", target.from), "250")
        .await?;
    for to in &target.to {
        session
            .ask("a receiver", &format!("RCPT TO:<{to}>"), "25")
            .await?;
    }
    session.ask("DATA", "DATA", "354").await?;
    session
        .ask("the mail", &letter(target, subject, text), "250")
        .await?;
    // The mail is delivered, so the way the connection ends no longer matters.
    drop(session.ask("QUIT", "QUIT", "221").await);
    Ok(())
}

impl Session {
    async fn greet(&mut self) -> Result<Vec<String>, NotifyError> {
        self.ask("EHLO", "EHLO tidemark", "250").await
    }

    async fn ask(
        &mut self,
        what: &'static str,
        line: &str,
        code: &str,
    ) -> Result<Vec<String>, NotifyError> {
        let line = format!("{line}\r\n");
        self.0.write_all(line.as_bytes()).await.map_err(io(what))?;
        self.0.flush().await.map_err(io(what))?;
        self.expect(what, code).await
    }

    /// Reads an answer. Each line begins with the code, and in the last one a space follows it.
    async fn expect(&mut self, what: &'static str, code: &str) -> Result<Vec<String>, NotifyError> {
        let mut lines: Vec<String> = Vec::new();
        loop {
            let mut line = String::new();
            let mut limited = (&mut self.0).take(LINE_BYTES_MAX);
            limited.read_line(&mut line).await.map_err(io(what))?;
            let line = line.trim_end().to_owned();
            let more = line.as_bytes().get(3) == Some(&b'-');
            let good = line.starts_with(code);
            if !good || lines.len() >= LINES_MAX {
                return Err(NotifyError::Refused { what, answer: line });
            }
            lines.push(line);
            if !more {
                return Ok(lines);
            }
        }
    }
}

/// Header and text with dots doubled (RFC 5321, 4.5.2), terminated by a line with one dot.
fn letter(target: &NotifyTarget, subject: &str, text: &str) -> String {
    // A header is ASCII. RFC 2047 encodes other text, in pieces that fit a line.
    let mut pieces: Vec<String> = vec![String::new()];
    for character in subject.chars().filter(|character| !character.is_control()) {
        if pieces.last().is_some_and(|piece| piece.len() > 40) {
            pieces.push(String::new());
        }
        if let Some(piece) = pieces.last_mut() {
            piece.push(character);
        }
    }
    let subject: Vec<String> = pieces
        .iter()
        .map(|piece| format!("=?utf-8?B?{}?=", STANDARD.encode(piece)))
        .collect();
    let now = jiff::Timestamp::now();
    let mut letter = format!(
        "From: <{}>\r\nTo: {}\r\nSubject: {}\r\nDate: {}\r\nMessage-ID: <{}.{}@tidemark>\r\nMIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\nAuto-Submitted: auto-generated\r\n\r\n",
        target.from,
        target
            .to
            .iter()
            .map(|to| format!("<{to}>"))
            .collect::<Vec<_>>()
            .join(", "),
        subject.join("\r\n "),
        jiff::fmt::rfc2822::to_string(&now.to_zoned(jiff::tz::TimeZone::UTC)).unwrap_or_default(),
        now.as_nanosecond(),
        std::process::id(),
    );
    for line in text.lines() {
        if line.starts_with('.') {
            letter.push('.');
        }
        letter.push_str(line);
        letter.push_str("\r\n");
    }
    letter.push('.');
    letter
}
