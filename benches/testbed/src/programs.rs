//! Runs our own programs and PostgreSQL's as an ordinary user, because PostgreSQL refuses root, and
//! CI is root.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// The user of servers when the tests run as root.
const USER: &str = "tidemark";
/// The directory with copies of our programs that this user can execute.
const COPIES: &str = "/var/cache/tidemark/programs";
/// The age at which copies are removed: no test takes longer.
const KEEP_COPIES: Duration = Duration::from_secs(3600);

/// Returns user and group to drop to, or `None` if this is an ordinary user already.
///
/// # Errors
/// When the user cannot be created.
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
            // Another test process may have created it meanwhile.
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

/// Returns a command that runs as the servers' user.
///
/// # Errors
/// When the user cannot be created.
pub fn command(program: &Path) -> Result<Command> {
    use std::os::unix::process::CommandExt;

    let mut command = Command::new(program);
    if let Some((user, group)) = server_user()? {
        command.uid(user).gid(group);
        command.env("HOME", "/nonexistent");
    }
    // The caller's environment about servers does not concern ours.
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

/// Creates a directory that belongs to the servers' user and is removed when dropped.
///
/// # Errors
/// When it cannot be created.
pub fn directory() -> Result<TempDir> {
    let directory = tempfile::Builder::new()
        .prefix("tidemark-")
        .tempdir_in("/tmp")?;
    if let Some((user, group)) = server_user()? {
        chown(directory.path(), Some(user), Some(group))?;
    }
    Ok(directory)
}

/// Returns one of our built programs, at a path where the servers' user can execute it.
///
/// # Errors
/// When it was not built: `cargo build --release --workspace` builds it.
pub fn ours(name: &str) -> Result<PathBuf> {
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
    // The build may be in root's home directory, which other users cannot enter. The small binary
    // needs the full one in its directory.
    let whole = format!("{name}-full");
    let mut parts = vec![(name, built.clone())];
    if built.with_file_name(&whole).is_file() {
        parts.push((&whole, built.with_file_name(&whole)));
    }
    let mut stamp = name.to_owned();
    for (_, part) in &parts {
        let metadata = fs::metadata(part)?;
        let made = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
        stamp.push_str(&format!("-{}-{made}", metadata.len()));
    }
    let directory = Path::new(COPIES);
    fs::create_dir_all(directory)?;
    let copies = directory.join(stamp);
    if !copies.exists() {
        forget_old(directory)?;
        let fresh = TempDir::new_in(directory)?;
        for (name, part) in &parts {
            fs::copy(part, fresh.path().join(name))?;
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(fresh.path().join(name), mode)?;
        }
        fs::set_permissions(fresh.path(), fs::Permissions::from_mode(0o755))?;
        put_in_place(fresh, &copies)?;
    }
    Ok(copies.join(name))
}

/// If another test process does the same, the first one wins.
#[expect(
    clippy::disallowed_methods,
    reason = "a copy need not survive the host"
)]
fn put_in_place(fresh: TempDir, copies: &Path) -> Result<()> {
    match fs::rename(fresh.path(), copies) {
        Ok(()) => drop(fresh.keep()),
        Err(_) if copies.exists() => {}
        Err(error) => return Err(error).context("put copies of our programs in place"),
    }
    Ok(())
}

/// Removes old copies, which no process runs any more.
fn forget_old(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        let age = entry.metadata().and_then(|metadata| metadata.modified());
        if age.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > KEEP_COPIES)) {
            // Another process may have removed it first.
            let _gone = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Returns the standard output of a command that must succeed.
///
/// # Errors
/// Both outputs when it does not.
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
