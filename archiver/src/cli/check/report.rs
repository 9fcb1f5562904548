//! The results of `wal-archiver check`: a line for each, or one JSON document.

use repository::ExitKind;
use serde_json::{Value, json};

use super::super::output;
use crate::error::{Error, Result};

/// The remedy of a failure whose message names none.
const REMEDY: &str = "; the message is the operating system's or the server's: correct what it names, then run \
                      `wal-archiver check` again";

/// Results, in the order of the checks.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// True if one JSON document is printed at the end instead of a line for each result.
    is_json: bool,
    /// The cluster that is checked. `None` for what concerns the host.
    cluster: Option<String>,
    results: Vec<Value>,
    /// The full text of each failed check.
    pub(super) failures: Vec<String>,
    /// The exit code of the first failure.
    worst: Option<ExitKind>,
}

impl Report {
    pub(super) fn new(is_json: bool) -> Self {
        Self {
            is_json,
            ..Self::default()
        }
    }

    /// Begins the checks of a cluster, or of the host.
    pub(super) fn begin(&mut self, cluster: Option<&str>) {
        self.cluster = cluster.map(str::to_owned);
        if !self.is_json {
            let title =
                cluster.map_or_else(|| "this host".to_owned(), |name| format!("cluster {name}"));
            output::line(&title);
        }
    }

    pub(super) fn ok(&mut self, what: &str, found: &str) {
        self.add("ok", what, found);
    }

    pub(super) fn note(&mut self, what: &str, found: &str) {
        self.add("note", what, found);
    }

    pub(super) fn fail(&mut self, what: &str, found: &str, kind: ExitKind) {
        self.add("FAIL", what, found);
        self.failures.push(found.to_owned());
        self.worst.get_or_insert(kind);
    }

    pub(super) fn fail_with(&mut self, what: &str, error: &Error) {
        let mut found = error.to_string();
        if lacks_remedy(error) {
            found.push_str(REMEDY);
        }
        self.fail(what, &found, error.exit_kind());
    }

    fn add(&mut self, result: &str, what: &str, found: &str) {
        if self.is_json {
            self.results.push(json!({
                "cluster": self.cluster,
                "check": what,
                "result": result.to_lowercase(),
                "message": found,
            }));
        } else {
            output::line(&format!("  {result:<4}  {what}: {found}"));
        }
    }

    /// Prints the JSON document, if one was requested.
    ///
    /// # Errors
    /// [`Error::Check`] if a check failed.
    pub(super) fn finish(self) -> Result<()> {
        let failed = self.failures.len();
        if self.is_json {
            output::json(&json!({
                "ok": failed == 0,
                "failed": failed,
                "exit_code": self.worst.map_or(0, |kind| kind as u8),
                "checks": self.results,
            }));
        }
        match self.worst {
            None => Ok(()),
            Some(kind) => Err(Error::Check { failed, kind }),
        }
    }
}

/// Returns true for an error whose message contains only what failed.
fn lacks_remedy(error: &Error) -> bool {
    let denied = |source: &std::io::Error| source.kind() == std::io::ErrorKind::PermissionDenied;
    match error {
        Error::Io { source, .. } => !denied(source),
        Error::Repository(repository::Error::Store { source, .. }) => {
            !denied(source) && source.kind() != std::io::ErrorKind::Unsupported
        }
        _ => false,
    }
}
