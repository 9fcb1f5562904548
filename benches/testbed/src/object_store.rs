//! [`ObjectStoreServer`]: a temporary S3 store (SeaweedFS) on loopback. Dropping it stops and
//! removes the store.
//!
//! A real distributed store, strict about signatures and checksums, which a mock is not.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{
    ports::free_port,
    programs::{command, directory},
};

/// The access key of the tests' requests.
pub const ACCESS_KEY: &str = "tidemark-test";
/// The secret key.
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

/// The path of SeaweedFS's program, as `benches/tools/install.sh` installs it.
#[must_use]
pub fn weed() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = vec!["/var/cache/tidemark/seaweedfs/weed".into()];
    places.extend(
        env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark/seaweedfs/weed")),
    );
    places.into_iter().find(|path| path.is_file())
}

impl ObjectStoreServer {
    /// Starts a store, or reports that its program is missing. In CI a missing program is a
    /// failure, not a skipped test.
    ///
    /// # Panics
    /// In CI when the program is missing, and when it does not start.
    #[must_use]
    pub fn start_or_skip() -> Option<Self> {
        Self::start_for_or_skip(false)
    }

    /// The same, but unsigned requests may do everything, like the account's owner or an intruder.
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
    /// Its log when it does not become ready.
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
        let mut ports = [0; 8];
        for port in &mut ports {
            *port = free_port()?;
        }
        let [
            master,
            master_rpc,
            volume,
            volume_rpc,
            filer,
            filer_rpc,
            s3,
            s3_rpc,
        ] = ports;
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
        // It keeps settings in its home directory.
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

    /// Waits until its filer stores a file and the S3 side answers.
    fn wait(&mut self, filer: u16) -> Result<()> {
        let began = Instant::now();
        let is_ready = |port: u16| -> Result<bool> {
            // Buckets are the folders below /buckets. An earlier attempt may have created it.
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

    /// The address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Sends a signal, for example to stop or continue the store.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.process);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Sends an unsigned request, such as `PUT /bucket/key`, and returns the answer.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn unsigned(&self, request: &str, body: &str) -> Result<String> {
        let mut stream = ask(self.port, request, body.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Returns every key of the bucket, if unsigned requests may do everything.
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

    /// Returns an object's stored bytes, with an unsigned request.
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

    /// Overwrites an object, as an administrator's tool does.
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

    /// The directory of its data, which its operator can read.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The settings of `tidemark.toml` for this store.
    #[must_use]
    pub fn configuration(&self) -> String {
        Self::configuration_at(&self.endpoint())
    }

    /// The settings for a store that is reached at another address.
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

/// Sends one request and returns the first line of its answer.
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
