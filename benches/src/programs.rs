//! Our own programs and PostgreSQL's, run as an ordinary user: PostgreSQL refuses root, and CI is root.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// The user that servers run as, where we are root.
const USER: &str = "tidemark";

/// User and group to drop to; `None` where we are an ordinary user already.
///
/// # Errors
/// When the user can not be created.
pub fn server_user() -> Result<Option<(u32, u32)>> {
    static FOUND: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let found = if rustix::process::getuid().is_root() {
        if id("-u").is_none() {
            let created = Command::new("useradd")
                .args(["--system", "--no-create-home", USER])
                .output();
            let created = created.context("run useradd")?;
            // Another test process may have been faster.
            if id("-u").is_none() {
                bail!(
                    "create the user {USER}: {}",
                    String::from_utf8_lossy(&created.stderr)
                );
            }
        }
        id("-u").zip(id("-g"))
    } else {
        None
    };
    Ok(*FOUND.get_or_init(|| found))
}

fn id(what: &str) -> Option<u32> {
    let output = Command::new("id").args([what, USER]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// A command that runs as the servers' user.
///
/// # Errors
/// When the user can not be created.
pub fn command(program: &Path) -> Result<Command> {
    use std::os::unix::process::CommandExt;

    let mut command = Command::new(program);
    if let Some((user, group)) = server_user()? {
        command.uid(user).gid(group);
        command.env("HOME", "/nonexistent");
    }
    // What the caller's environment says about servers is not meant for ours.
    for name in [
        "PGHOST",
        "PGPORT",
        "PGUSER",
        "PGDATABASE",
        "PGPASSWORD",
        "PGSERVICE",
        "TIDEMARK_CONFIG",
    ] {
        command.env_remove(name);
    }
    command.current_dir("/tmp");
    Ok(command)
}

/// A new directory that belongs to the servers' user; gone when dropped.
///
/// # Errors
/// When it can not be made.
pub fn directory() -> Result<TempDir> {
    let directory = tempfile::Builder::new()
        .prefix("tidemark-")
        .tempdir_in("/tmp")?;
    if let Some((user, group)) = server_user()? {
        chown(directory.path(), Some(user), Some(group))?;
    }
    Ok(directory)
}

/// A program that was built beside this one, where the servers' user can run it.
///
/// # Errors
/// When it was not built: `cargo build --release --workspace` builds it.
pub fn ours(name: &str) -> Result<PathBuf> {
    static COPIES: OnceLock<TempDir> = OnceLock::new();
    let this = std::env::current_exe()?;
    let built = this
        .ancestors()
        .skip(1)
        .take(3)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built; run `cargo build --release --workspace`"))?;
    if server_user()?.is_none() {
        return Ok(built);
    }
    // The build may lie in root's home, which others can not enter.
    let directory = match COPIES.get() {
        Some(directory) => directory,
        None => {
            let fresh = tempfile::Builder::new()
                .prefix("tidemark-bin-")
                .tempdir_in("/tmp")?;
            fs::set_permissions(fresh.path(), fs::Permissions::from_mode(0o755))?;
            COPIES.get_or_init(|| fresh)
        }
    };
    let copy = directory.path().join(name);
    if !copy.exists() {
        let fresh = directory
            .path()
            .join(format!("{name}.{:?}", std::thread::current().id()));
        fs::copy(&built, &fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
        match fs::hard_link(&fresh, &copy) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
    }
    Ok(copy)
}

/// Standard output of a command that must succeed.
///
/// # Errors
/// With both outputs when it does not.
pub fn succeed(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, both(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    format!("{}\n{}", text(&output.stdout), text(&output.stderr))
}
