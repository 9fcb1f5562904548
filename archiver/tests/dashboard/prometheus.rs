//! A real Prometheus that scrapes an archiver every second and evaluates the shipped rules with an
//! empty `for:`. It is removed when dropped.

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;
use testbed::ports::free_address;

use crate::support::wait_until;

pub(super) struct Prometheus {
    child: Child,
    address: String,
    _directory: TempDir,
}

impl Prometheus {
    /// Starts Prometheus, or prints that it is not installed.
    pub(super) fn start(archiver: &str) -> Option<Self> {
        if Command::new("prometheus")
            .arg("--version")
            .output()
            .is_err()
        {
            assert!(
                env::var_os("CI").is_none(),
                "Prometheus is not installed; run `make install-tools`"
            );
            eprintln!("SKIPPED: Prometheus is not installed; run `make install-tools`");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let rules = fs::read_to_string(here.join("../monitoring/tidemark.rules.yml"));
        let rules: String = rules
            .expect("the rules")
            .lines()
            .map(|line| match line.trim_start().strip_prefix("for: ") {
                Some(_) => "        for: 0s\n".to_owned(),
                None => format!("{line}\n"),
            })
            .collect();
        fs::write(directory.path().join("rules.yml"), rules).expect("rules");
        let configuration = directory.path().join("prometheus.yml");
        fs::write(
            &configuration,
            format!(
                "global: {{ scrape_interval: 1s, evaluation_interval: 1s, scrape_timeout: 1s }}\n\
                 rule_files: [ rules.yml ]\n\
                 scrape_configs: [ {{ job_name: tidemark, static_configs: [ {{ targets: [ '{archiver}' ] }} ] }} ]\n"
            ),
        )
        .expect("a configuration");
        let address = free_address().expect("a free port");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", configuration.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log")).expect("a log"))
            .spawn()
            .expect("Prometheus runs");
        let prometheus = Self {
            child,
            address,
            _directory: directory,
        };
        wait_until("Prometheus answers", || {
            prometheus.ask("/api/v1/alerts").is_some()
        });
        Some(prometheus)
    }

    fn ask(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// The names of the firing alerts.
    pub(super) fn firing(&self) -> Vec<String> {
        let answer = self.ask("/api/v1/alerts").expect("Prometheus answers");
        let alerts = answer["data"]["alerts"].as_array().expect("a list");
        alerts
            .iter()
            .filter(|alert| alert["state"] == "firing")
            .filter_map(|alert| alert["labels"]["alertname"].as_str())
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
