//! The only module that writes to standard output. A closed pipe (`| head`) is not an error.
//!
//! Invariant: text from outside, such as a label, cannot control the terminal. On standard output
//! it cannot end its line either.

use std::io::{self, Write};

use repository::printable;
use wal_format::ExpiredWindow;

use crate::upkeep::expire;

/// Writes a line to standard output.
pub(super) fn line(text: &str) {
    drop(writeln!(io::stdout(), "{}", printable(text)));
}

/// Describes a window that vanishes. `lost` follows its times and ends with a blank, or is empty.
pub(super) fn window(window: &ExpiredWindow, lost: &str) -> String {
    format!(
        "every moment from {} to {} {lost}(WAL {} to {} of timeline {})",
        expire::time(window.from),
        expire::time(window.to),
        window.from_lsn,
        window.to_lsn,
        window.branch
    )
}

/// Writes an error as a line to standard error.
pub(super) fn error_line(text: &str) {
    let lines: Vec<_> = text.split('\n').map(printable).collect();
    drop(writeln!(io::stderr(), "wal-archiver: {}", lines.join("\n")));
}

/// Writes a JSON document to standard output.
pub(super) fn json<T: serde::Serialize>(document: &T) {
    match serde_json::to_string_pretty(document) {
        Ok(text) => drop(writeln!(io::stdout(), "{text}")),
        Err(error) => error_line(&format!("write JSON: {error}")),
    }
}

/// Formats a number of bytes for users.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = count;
    let mut rest = 0;
    while scaled >= 1024 && unit + 1 < UNITS.len() {
        rest = scaled % 1024;
        scaled /= 1024;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{scaled}.{} {}", rest * 10 / 1024, UNITS[unit])
    }
}
