//! The whole program beside a quick one: `NAME-full` in the same directory.

use std::{
    env, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

/// What the name of a whole program ends with.
const SUFFIX: &str = "-full";

/// Becomes the whole program, told the same, with `environment` where it says nothing else; returns only when that failed,
/// with the remedy.
#[must_use]
pub fn become_whole(environment: &[(&str, &str)]) -> String {
    let this = match env::current_exe() {
        Ok(this) => this,
        Err(error) => return format!("this program's own path can not be found: {error}"),
    };
    let whole = beside(&this);
    let error = replaced_by(&whole, environment);
    format!(
        "{} can not be run: {error}; install both programs into one directory",
        whole.display()
    )
}

/// Starts this program anew, told the same, with `environment` where it says nothing else; returns when all of that is set, or
/// when it fails.
pub fn start_with(environment: &[(&str, &str)]) {
    if environment
        .iter()
        .all(|(name, _)| env::var_os(name).is_some())
    {
        return;
    }
    if let Ok(this) = env::current_exe() {
        let error = replaced_by(&this, environment);
        tracing::debug!(%error, "this program goes on as it was started");
    }
}

fn replaced_by(program: &Path, environment: &[(&str, &str)]) -> io::Error {
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    for (name, value) in environment {
        if env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    command.args(arguments).exec()
}

/// The program as people and PostgreSQL call it, for who runs as the whole one.
///
/// # Errors
/// When the system does not tell which program this is.
pub fn called() -> io::Result<PathBuf> {
    let this = env::current_exe()?;
    let name = this.file_name().and_then(|name| name.to_str());
    let quick = name.and_then(|name| name.strip_suffix(SUFFIX));
    Ok(match quick.map(|name| this.with_file_name(name)) {
        Some(quick) if quick.is_file() => quick,
        _ => this,
    })
}

fn beside(quick: &Path) -> PathBuf {
    let mut name = quick.file_name().unwrap_or_default().to_owned();
    name.push(SUFFIX);
    quick.with_file_name(name)
}
