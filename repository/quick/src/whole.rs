//! Executes the full program, `NAME-full` in the same directory.

use std::{
    env, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

/// The suffix of the full program's name.
const SUFFIX: &str = "-full";

/// Replaces this process with the full program, with the same arguments, and with `environment`
/// where a variable is not set. Returns only if that failed, with an error message that names the
/// remedy.
#[must_use]
pub fn become_whole(environment: &[(&str, &str)]) -> String {
    let this = match env::current_exe() {
        Ok(this) => this,
        Err(error) => return format!("this program's own path cannot be found: {error}"),
    };
    let whole = beside(&this);
    let error = replaced_by(&whole, environment);
    format!(
        "{} cannot be run: {error}; install both programs into one directory",
        whole.display()
    )
}

/// Executes this program again with the same arguments, and with `environment` where a variable is
/// not set. Returns if all variables are set already, or if it fails.
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

/// Returns the path by which people and PostgreSQL call this program: the small one, if this
/// process is the full one.
///
/// # Errors
/// When the operating system cannot report this program's path.
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
