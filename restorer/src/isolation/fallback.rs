//! A second copy of the isolated settings, which `postgresql.conf` includes at its end. The first
//! one is in `postgresql.auto.conf`, where `ALTER SYSTEM RESET ALL` removes it.
//!
//! Invariant: it has the values from after the recovery, and those of `--set`. It is there as long
//! as the copy is isolated.

use std::{fs, io::ErrorKind, path::Path};

use repository::durable;

use super::{HEADING, Line, MAIN, lines::written, text, write_private};
use crate::{Error, Result};

/// The included file.
const FILE: &str = "tidemark_isolation.conf";
const INCLUDE: &str = "include_if_exists = 'tidemark_isolation.conf'";

/// Writes the file, and includes it. The caller makes both durable.
pub(super) fn write(directory: &Path, lines: &[Line], set: &[(String, String)]) -> Result<()> {
    let mut content = format!(
        "{HEADING}the copy is isolated, also after ALTER SYSTEM RESET ALL; `pitr-restore release` lifts it\n"
    );
    for line in lines {
        if let Some(value) = &line.after_recovery {
            content.push_str(&written(&line.name, value));
        }
    }
    let mut content = text::encode(&content);
    for (name, value) in set {
        content.extend_from_slice(written(name, value).as_bytes());
    }
    write_private(&directory.join(FILE), &content)?;
    let main = directory.join(MAIN);
    let mut content = match fs::read(&main) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::io("read", main)(error)),
    };
    // A copy of an isolated copy has the line, perhaps not at the end.
    content = without_include(&content);
    if !content.is_empty() && !content.ends_with(b"\n") {
        content.push(b'\n');
    }
    content.extend_from_slice(INCLUDE.as_bytes());
    content.push(b'\n');
    write_private(&main, &content)
}

/// Removes the file and the line that includes it. Can be repeated.
pub(super) fn remove(directory: &Path) -> Result<()> {
    let main = directory.join(MAIN);
    let content = fs::read(&main).map_err(Error::io("read", &main))?;
    let kept = without_include(&content);
    if kept.len() < content.len() {
        durable::replace(&main, &kept).map_err(Error::local)?;
    }
    let file = directory.join(FILE);
    match fs::symlink_metadata(&file) {
        Ok(_) => durable::remove(&file).map_err(Error::local),
        Err(_) => Ok(()),
    }
}

fn without_include(content: &[u8]) -> Vec<u8> {
    let lines = content.split_inclusive(|byte| *byte == b'\n');
    let kept = lines.filter(|line| line.trim_ascii_end() != INCLUDE.as_bytes());
    kept.flatten().copied().collect()
}
