//! [`ObjectStoreServer`]: a throwaway S3 store (SeaweedFS) on loopback; stopped and removed when dropped.
//!
//! A real one, distributed and strict about signatures and checksums: what a mock forgives, a customer's store does not.

use std::{
    env,
    fs::{self, File},
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::programs::{command, directory};

/// Who signs the tests' requests.
pub const ACCESS_KEY: &str = "tidemark-test";
/// With what.
pub const SECRET_KEY: &str = "tidemark-test-secret";
/// The bucket that exists from the start.
pub const BUCKET: &str = "archive";
const PATIENCE: Duration = Duration::from_secs(60);

/// A running store.
#[derive(Debug)]
pub struct ObjectStoreServer {
    directory: TempDir,
    process: Child,
    port: u16,
}

/// Where SeaweedFS's program is, as `benches/tools/install.sh` leaves it.
#[must_use]
pub fn weed() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = vec!["/var/cache/tidemark/seaweedfs/weed".into()];
    places.extend(
        env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark/seaweedfs/weed")),
    );
    places.into_iter().find(|path| path.is_file())
}

impl ObjectStoreServer {
    /// Starts a store, or says that its program is missing; under CI that is a failure and not a skipped test.
    ///
    /// # Panics
    /// Under CI, when the program is missing; when it does not start.
    #[must_use]
    pub fn start_or_skip() -> Option<Self> {
        Self::start_for_or_skip(false)
    }

    /// The same where whoever does not sign may do everything: the owner of the account, or an intruder.
    ///
    /// # Panics
    /// As [`ObjectStoreServer::start_or_skip`].
    #[must_use]
    pub fn open_to_all_or_skip() -> Option<Self> {
        Self::start_for_or_skip(true)
    }

    fn start_for_or_skip(open_to_all: bool) -> Option<Self> {
        if weed().is_none() {
            assert!(
                env::var_os("CI").is_none(),
                "SeaweedFS is not installed; run `make install-tools`"
            );
            eprintln!("SKIPPED: SeaweedFS is not installed; run `make install-tools`");
            return None;
        }
        Some(Self::start_for(open_to_all).expect("SeaweedFS starts"))
    }

    /// Starts a store with one empty bucket.
    ///
    /// # Errors
    /// With its log when it does not become ready.
    pub fn start() -> Result<Self> {
        Self::start_for(false)
    }

    fn start_for(open_to_all: bool) -> Result<Self> {
        let program = weed().context("SeaweedFS is not installed; run `make install-tools`")?;
        let directory = directory()?;
        let root = directory.path().display().to_string();
        let identities = directory.path().join("s3.json");
        fs::write(
            &identities,
            format!(
                r#"{{"identities":[{{"name":"tidemark",
                "credentials":[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}}],
                "actions":["Admin","Read","Write","List","Tagging"]}}{}]}}"#,
                if open_to_all {
                    r#",{"name":"anonymous","actions":["Admin","Read","Write","List"]}"#
                } else {
                    ""
                }
            ),
        )?;
        let [
            master,
            master_rpc,
            volume,
            volume_rpc,
            filer,
            filer_rpc,
            s3,
            s3_rpc,
        ] = free_ports()?;
        let log = File::create(directory.path().join("seaweedfs.log"))?;
        let mut server = command(&program)?;
        server.arg("-logtostderr=true").arg("server");
        server.args([
            format!("-dir={root}"),
            "-ip=127.0.0.1".to_owned(),
            "-ip.bind=127.0.0.1".to_owned(),
            "-s3".to_owned(),
            format!("-s3.config={}", identities.display()),
            format!("-master.port={master}"),
            format!("-master.port.grpc={master_rpc}"),
            format!("-volume.port={volume}"),
            format!("-volume.port.grpc={volume_rpc}"),
            format!("-filer.port={filer}"),
            format!("-filer.port.grpc={filer_rpc}"),
            format!("-s3.port={s3}"),
            format!("-s3.port.grpc={s3_rpc}"),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            "-s3.iam=false".to_owned(),
            "-master.volumeSizeLimitMB=256".to_owned(),
            "-volume.max=100".to_owned(),
            "-master.telemetry=false".to_owned(),
        ]);
        // It keeps settings in its home.
        server.env("HOME", directory.path());
        server
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let process = server.spawn().context("run SeaweedFS")?;
        let mut started = Self {
            directory,
            process,
            port: s3,
        };
        started.wait(filer)?;
        Ok(started)
    }

    /// It is ready when its filer stores a file and the S3 side answers.
    fn wait(&mut self, filer: u16) -> Result<()> {
        let began = Instant::now();
        let is_ready = |port: u16| -> Result<bool> {
            // Buckets are the folders below /buckets; it may be there from the last look.
            let bucket = http(filer, &format!("POST /buckets/{BUCKET}/"), "")?;
            Ok(http(filer, "PUT /ready", "x")?.contains(" 20")
                && [" 201 ", " 409 "].iter().any(|made| bucket.contains(made))
                && !http(port, "GET /", "")?.is_empty())
        };
        loop {
            if is_ready(self.port).unwrap_or(false) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE || self.process.try_wait()?.is_some() {
                bail!(
                    "SeaweedFS did not become ready; its log:\n{}",
                    fs::read_to_string(self.directory.path().join("seaweedfs.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where it answers.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Stops it as it stands, or lets it go on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.process);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Makes a request without a signature, as `PUT /bucket/key`; its answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn unsigned(&self, request: &str, body: &str) -> Result<String> {
        let mut stream = ask(self.port, request, body.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Every key of the bucket, where whoever does not sign may do everything.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn keys(&self) -> Result<Vec<String>> {
        let mut keys: Vec<String> = Vec::new();
        loop {
            let after = keys.last().map_or("", String::as_str).to_owned();
            let listed = self.unsigned(
                &format!("GET /{BUCKET}?list-type=2&start-after={after}"),
                "",
            )?;
            let parts = listed.split("<Key>").skip(1);
            let found = parts.filter_map(|part| part.split_once("</Key>"));
            let before = keys.len();
            keys.extend(found.map(|(key, _)| key.to_owned()));
            if keys.len() == before || !listed.contains("<IsTruncated>true") {
                keys.sort();
                return Ok(keys);
            }
        }
    }

    /// An object as it lies there, without a signature.
    ///
    /// # Errors
    /// When there is none.
    pub fn object(&self, key: &str) -> Result<Vec<u8>> {
        let mut stream = ask(self.port, &format!("GET /{BUCKET}/{key}"), b"")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let head = head.context("no answer")? + 4;
        if !answer.starts_with(b"HTTP/1.1 200") {
            bail!("GET {key}: {}", String::from_utf8_lossy(&answer));
        }
        Ok(answer.split_off(head))
    }

    /// Puts an object over whatever is there, as an administrator's tool does.
    ///
    /// # Errors
    /// When it is refused.
    pub fn overwrite(&self, key: &str, body: &[u8]) -> Result<()> {
        let mut line = String::new();
        let stream = ask(self.port, &format!("PUT /{BUCKET}/{key}"), body)?;
        BufReader::new(stream).read_line(&mut line)?;
        if line.contains(" 200") {
            return Ok(());
        }
        bail!("PUT {key}: {line}");
    }

    /// Where it keeps everything: what whoever runs it can read.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The settings of `tidemark.toml` that reach it.
    #[must_use]
    pub fn configuration(&self) -> String {
        Self::configuration_at(&self.endpoint())
    }

    /// The same for one that is reached through something else.
    #[must_use]
    pub fn configuration_at(endpoint: &str) -> String {
        format!(
            "s3_endpoint = \"{endpoint}\"\ns3_access_key = \"{ACCESS_KEY}\"\ns3_secret_key = \"{SECRET_KEY}\"\n"
        )
    }
}

impl Drop for ObjectStoreServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Ports that nothing listens on now, below those that the system gives to whoever asks for any: another test must not be
/// given one of them before the store has taken it.
fn free_ports() -> Result<[u16; 8]> {
    let mut listeners = Vec::new();
    let mut ports = [0; 8];
    let mut next = 20_000 + u16::try_from(RandomState::new().hash_one(0) % 10_000)?;
    for port in &mut ports {
        let listener = loop {
            next += 1;
            match TcpListener::bind(("127.0.0.1", next)) {
                Ok(listener) => break listener,
                Err(_) if next < 32_000 => {}
                Err(error) => return Err(error.into()),
            }
        };
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// One request, and the first line of its answer.
fn http(port: u16, request: &str, body: &str) -> Result<String> {
    let mut line = String::new();
    BufReader::new(ask(port, request, body.as_bytes())?).read_line(&mut line)?;
    Ok(line)
}

fn ask(port: u16, request: &str, body: &[u8]) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let length = body.len();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body)?;
    Ok(stream)
}
