//! The exit codes that both programs share; the table is in each program's `cli.rs`.

/// Why a program ends without success. The number is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitKind {
    /// It failed.
    Failed = 1,
    /// It was called or configured wrongly.
    Usage = 2,
    /// The recovery target cannot be reached.
    TargetNotReachable = 3,
    /// Something stored is damaged, missing or contradicts something else.
    Integrity = 4,
    /// PostgreSQL or the repository cannot be reached.
    Unreachable = 5,
}

impl ExitKind {
    /// The exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::TargetNotReachable => "target_not_reachable",
            Self::Integrity => "integrity",
            Self::Unreachable => "unreachable",
        }
    }

    /// The document that a command with `--json` prints instead of its answer.
    #[must_use]
    pub fn document(self, message: &str) -> serde_json::Value {
        serde_json::json!({
            "error": { "code": self.code(), "kind": self.name(), "message": message }
        })
    }
}
