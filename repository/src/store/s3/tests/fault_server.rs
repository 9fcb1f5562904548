//! [`FaultServer`]: answers S3 requests from a script and records the requests.
//!
//! One connection per request and no keep-alive: a test defines every byte that is sent.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A request as received.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// For example `PUT /bucket/key?query`.
    pub(super) line: String,
    /// Headers, with names in lower case.
    pub(super) headers: Vec<(String, String)>,
    /// The body.
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(super) fn is(&self, beginning: &str) -> bool {
        self.line.starts_with(beginning)
    }
}

/// A scripted answer.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// Status, headers and body, with the body's length.
    Http(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// As `Http`, but the connection is closed after this number of bytes of the body.
    Truncated(Vec<u8>, usize),
    /// As `Http`, but byte by byte with this interval.
    Trickled(Vec<u8>, Duration),
    /// The connection is closed without an answer.
    HangUp,
}

impl Answer {
    pub(super) fn status(status: u16) -> Self {
        Self::Http(status, Vec::new(), Vec::new())
    }

    pub(super) fn ok(body: &[u8]) -> Self {
        Self::Http(200, Vec::new(), body.to_vec())
    }

    /// S3's own error document.
    pub(super) fn error(status: u16, code: &str) -> Self {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>as told</Message></Error>"
        );
        Self::Http(status, Vec::new(), body.into_bytes())
    }
}

type Script = dyn Fn(&Request) -> Answer + Send + Sync;

/// The server. It ends with the test's process.
pub(super) struct FaultServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    is_tls: bool,
}

impl FaultServer {
    pub(super) fn start(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_with(None, script)
    }

    /// Starts the same server with TLS.
    pub(super) fn start_with(
        tls: Option<Arc<ServerConfig>>,
        script: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let is_tls = tls.is_some();
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (script, seen) = (Arc::new(script), Arc::clone(&requests));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let script: Arc<Script> = script.clone();
                let (seen, tls) = (Arc::clone(&seen), tls.clone());
                thread::spawn(move || {
                    // A client that disconnects is part of some scripts.
                    let _gone = match tls {
                        None => serve(stream, &*script, &seen),
                        Some(tls) => {
                            let connection = ServerConnection::new(tls).expect("a connection");
                            serve(StreamOwned::new(connection, stream), &*script, &seen)
                        }
                    };
                });
            }
        });
        Self {
            address,
            requests,
            is_tls,
        }
    }

    pub(super) fn endpoint(&self) -> String {
        let scheme = if self.is_tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The requests received so far.
    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panic").clone()
    }

    /// The number of requests that begin with this text.
    pub(super) fn count(&self, beginning: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.is(beginning))
            .count()
    }
}

fn serve(
    stream: impl Read + Write,
    script: &Script,
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut request = Request {
        line: first.trim_end().trim_end_matches(" HTTP/1.1").to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = request
        .header("content-length")
        .and_then(|length| length.parse().ok());
    if request.header("expect").is_some() {
        reader
            .get_mut()
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    request.body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut request.body)?;
    seen.lock().expect("no panic").push(request.clone());
    let is_head = request.is("HEAD");
    let mut stream = reader.into_inner();
    match script(&request) {
        Answer::HangUp => Ok(()),
        Answer::Truncated(body, sent) => {
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            )?;
            stream.write_all(&body[..sent])
        }
        Answer::Trickled(body, pause) => {
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            )?;
            body.chunks(1).try_for_each(|byte| {
                thread::sleep(pause);
                stream.write_all(byte)
            })
        }
        Answer::Http(status, headers, body) => {
            write!(stream, "HTTP/1.1 {status} As Told\r\nConnection: close\r\n")?;
            // Adds the ETag with which every store answers a successful put. An error in place of
            // that answer has a body.
            if request.is("PUT") && status == 200 && body.is_empty() && headers.is_empty() {
                stream.write_all(b"ETag: \"1\"\r\n")?;
            }
            for (name, value) in headers {
                write!(stream, "{name}: {value}\r\n")?;
            }
            if status != 204 {
                write!(stream, "Content-Length: {}\r\n", body.len())?;
            }
            stream.write_all(b"\r\n")?;
            if is_head {
                return Ok(());
            }
            stream.write_all(&body)
        }
    }
}
