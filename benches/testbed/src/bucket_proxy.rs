//! [`BucketProxy`]: an HTTP proxy between our programs and an S3 store that injects faults.
//!
//! A request passes unchanged, including its signature, so the store behind the proxy can be a real
//! one.
//! Invariant: without a fault the bytes of both directions are unchanged.

use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

/// The maximum time without data from one side.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// A fault of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answers with S3's error document and this status; the store receives nothing. With 200 it is
    /// an error inside a success.
    Refuse(u16, &'static str),
    /// Answers with success; the store receives nothing.
    Lie,
    /// Closes the connection before anything is forwarded.
    Reset,
    /// Closes the connection after the store has processed the request.
    AnswerLost,
    /// Forwards half of the body, then closes the connection.
    CutUp,
    /// Returns half of the body, then closes the connection.
    CutDown,
    /// Flips one bit of the body on its way to the store.
    FlipUp,
    /// Flips one bit of the body on its way to us.
    FlipDown,
    /// Sends no answer for this long, then closes the connection.
    Silence(Duration),
    /// Sends the answer byte by byte with this pause.
    Trickle(Duration),
}

/// A request, for the script that decides about faults.
#[derive(Clone, Debug)]
pub struct Asked {
    /// For example `PUT /bucket/key?query`.
    pub line: String,
    /// Headers, with names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Asked {
    /// Returns true if the request line begins with this text.
    #[must_use]
    pub fn is(&self, beginning: &str) -> bool {
        self.line.starts_with(beginning)
    }

    /// Returns a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// The treatment of a request.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Forwards it unchanged.
    Pass,
    /// Forwards it without its signature, as a request by a user to whom the store permits
    /// everything.
    PassUnsigned,
    /// Injects a fault.
    Fail(Fault),
    /// Answers with 200 and this text, as another server would.
    Say(String),
    /// Forwards the request; removes the keys that contain this text from the answer to a listing.
    Hide(String),
}

type Script = dyn Fn(&Asked) -> Verdict + Send + Sync;

struct Shared {
    store: SocketAddr,
    script: Mutex<Arc<Script>>,
    met: AtomicUsize,
    stop: AtomicBool,
}

/// A running proxy. Dropping it stops new connections.
pub struct BucketProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl fmt::Debug for BucketProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketProxy({})", self.address)
    }
}

impl BucketProxy {
    /// Listens on a free port, in front of the store at `store`.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(store: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            store,
            script: Mutex::new(Arc::new(|_| Verdict::Pass)),
            met: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let of_listener = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of_listener.stop.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&of_listener);
                // Closed connections are part of some scripts.
                thread::spawn(move || serve(client, &shared).unwrap_or_default());
            }
        });
        Ok(Self { address, shared })
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets `script` decide about each request from now on.
    pub fn decide(&self, script: impl Fn(&Asked) -> Verdict + Send + Sync + 'static) {
        let mut current = self.script();
        self.shared.met.store(0, Ordering::SeqCst);
        *current = Arc::new(script);
    }

    /// From now on, injects `fault` into every request for which `concerns` is true.
    pub fn fail(&self, fault: Fault, concerns: impl Fn(&Asked) -> bool + Send + Sync + 'static) {
        self.decide(move |asked| {
            if concerns(asked) {
                Verdict::Fail(fault)
            } else {
                Verdict::Pass
            }
        });
    }

    /// From now on, injects `fault` into the first `count` requests for which `concerns` is true.
    pub fn fail_first(
        &self,
        count: usize,
        fault: Fault,
        concerns: impl Fn(&Asked) -> bool + Send + Sync + 'static,
    ) {
        let left = AtomicUsize::new(count);
        self.decide(move |asked| {
            let less = |left: usize| left.checked_sub(1);
            let take = || left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
            if concerns(asked) && take().is_ok() {
                Verdict::Fail(fault)
            } else {
                Verdict::Pass
            }
        });
    }

    /// From now on, injects one of `faults` into this percentage of requests.
    pub fn storm(&self, percent: u64, faults: &'static [Fault]) {
        let chance = RandomState::new();
        let number = AtomicUsize::new(0);
        self.decide(move |_| {
            let drawn = chance.hash_one(number.fetch_add(1, Ordering::SeqCst));
            let fault = usize::try_from(drawn >> 32).unwrap_or(0) % faults.len();
            if drawn % 100 < percent {
                Verdict::Fail(faults[fault])
            } else {
                Verdict::Pass
            }
        });
    }

    /// Forwards everything from now on.
    pub fn heal(&self) {
        self.decide(|_| Verdict::Pass);
    }

    /// The number of faults since the last change.
    #[must_use]
    pub fn met(&self) -> usize {
        self.shared.met.load(Ordering::SeqCst)
    }

    fn script(&self) -> std::sync::MutexGuard<'_, Arc<Script>> {
        let script = self.shared.script.lock();
        script.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for BucketProxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // The proxy's thread waits for a connection. It does not matter whether this one succeeds.
        let _last = TcpStream::connect(self.address);
    }
}

/// Serves one request. The answer closes the connection, so both sides open one per request.
fn serve(client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_read_timeout(Some(SILENCE_MAX))?;
    let mut reader = BufReader::new(client);
    let mut asked = read_head(&mut reader)?;
    let script = shared.script.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Arc::clone(&script);
    if asked.header("expect").is_some() {
        reader
            .get_mut()
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let length = asked
        .header("content-length")
        .and_then(|length| length.parse().ok());
    asked.body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut asked.body)?;
    let mut client = reader.into_inner();
    match script(&asked) {
        Verdict::Pass => client.write_all(&forward(shared.store, &asked)?),
        Verdict::PassUnsigned => {
            let named = |name: &str| name == "authorization" || name.starts_with("x-amz-security");
            asked.headers.retain(|(name, _)| !named(name));
            client.write_all(&forward(shared.store, &asked)?)
        }
        Verdict::Hide(text) => {
            let listing = forward(shared.store, &asked)?;
            client.write_all(&without(&listing, &text)?)
        }
        Verdict::Say(words) => client.write_all(&answer(200, "text/xml", &words)),
        Verdict::Fail(fault) => {
            shared.met.fetch_add(1, Ordering::SeqCst);
            fail(client, shared.store, &mut asked, fault)
        }
    }
}

fn read_head(reader: &mut impl BufRead) -> io::Result<Asked> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut asked = Asked {
        line: first.trim_end().trim_end_matches(" HTTP/1.1").to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            return Ok(asked);
        };
        let named = (name.to_ascii_lowercase(), value.trim().to_owned());
        asked.headers.push(named);
    }
}

fn answer(status: u16, kind: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} As told\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

fn send(store: SocketAddr, asked: &Asked, body: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(store)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    let mut head = format!("{} HTTP/1.1\r\n", asked.line);
    for (name, value) in &asked.headers {
        if name != "connection" && name != "expect" {
            head += &format!("{name}: {value}\r\n");
        }
    }
    head += "Connection: close\r\n\r\n";
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    Ok(stream)
}

/// Returns the store's complete answer.
fn forward(store: SocketAddr, asked: &Asked) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    send(store, asked, &asked.body)?.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Returns the offset of an answer's body.
fn body_of(answer: &[u8]) -> usize {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    end.map_or(answer.len(), |end| end + 4)
}

/// Returns a listing without the objects and folders whose names contain `text`; other answers
/// unchanged.
fn without(answer: &[u8], text: &str) -> io::Result<Vec<u8>> {
    let body = body_of(answer);
    let head = String::from_utf8_lossy(&answer[..body]).to_ascii_lowercase();
    let mut body = answer[body..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = dechunked(&body)?;
    }
    let mut listing = String::from_utf8_lossy(&body).into_owned();
    if !listing.contains("<ListBucketResult") {
        return Ok(answer.to_vec());
    }
    for element in ["Contents", "CommonPrefixes"] {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let mut kept = String::new();
        let mut rest = listing.as_str();
        while let Some(begin) = rest.find(&open) {
            let end = rest[begin..]
                .find(&close)
                .map_or(rest.len(), |end| begin + end + close.len());
            kept.push_str(&rest[..begin]);
            if !rest[begin..end].contains(text) {
                kept.push_str(&rest[begin..end]);
            }
            rest = &rest[end..];
        }
        kept.push_str(rest);
        listing = kept;
    }
    // A store that hides an object does not count it either, so remove the count.
    if let (Some(begin), Some(end)) = (listing.find("<KeyCount>"), listing.find("</KeyCount>")) {
        listing.replace_range(begin..end + "</KeyCount>".len(), "");
    }
    Ok(self::answer(200, "application/xml", &listing))
}

/// Decodes a body in chunked transfer encoding.
fn dechunked(mut body: &[u8]) -> io::Result<Vec<u8>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a malformed chunk");
    let mut whole = Vec::new();
    loop {
        let line = body
            .windows(2)
            .position(|two| two == b"\r\n")
            .ok_or_else(malformed)?;
        let length = String::from_utf8_lossy(&body[..line]);
        let length = usize::from_str_radix(length.trim(), 16).map_err(|_| malformed())?;
        let chunk = body
            .get(line + 2..line + 2 + length)
            .ok_or_else(malformed)?;
        if length == 0 {
            return Ok(whole);
        }
        whole.extend_from_slice(chunk);
        body = body.get(line + 4 + length..).ok_or_else(malformed)?;
    }
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x10;
    }
}

fn fail(
    mut client: TcpStream,
    store: SocketAddr,
    asked: &mut Asked,
    fault: Fault,
) -> io::Result<()> {
    match fault {
        Fault::Refuse(status, code) => {
            let words = format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>as told</Message></Error>"
            );
            let words = if asked.is("HEAD") { "" } else { &words };
            client.write_all(&answer(status, "application/xml", words))
        }
        Fault::Lie => {
            let done =
                "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            client.write_all(done.as_bytes())
        }
        Fault::Reset => client.shutdown(Shutdown::Both),
        Fault::AnswerLost => {
            forward(store, asked)?;
            client.shutdown(Shutdown::Both)
        }
        Fault::CutUp => {
            // The store sees the announced body end early.
            let stream = send(store, asked, &asked.body[..asked.body.len() / 2])?;
            stream.shutdown(Shutdown::Both)?;
            client.shutdown(Shutdown::Both)
        }
        Fault::CutDown => {
            let answer = forward(store, asked)?;
            let body = body_of(&answer);
            client.write_all(&answer[..body + (answer.len() - body) / 2])
        }
        Fault::FlipUp => {
            flip(&mut asked.body);
            client.write_all(&forward(store, asked)?)
        }
        Fault::FlipDown => {
            let mut answer = forward(store, asked)?;
            let body = body_of(&answer);
            flip(&mut answer[body..]);
            client.write_all(&answer)
        }
        Fault::Silence(pause) => {
            thread::sleep(pause);
            client.shutdown(Shutdown::Both)
        }
        Fault::Trickle(pause) => {
            for byte in forward(store, asked)?.chunks(1) {
                client.write_all(byte)?;
                thread::sleep(pause);
            }
            Ok(())
        }
    }
}
