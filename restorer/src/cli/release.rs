//! `pitr-restore release`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use clap::Args;
use repository::config::Settings;
use wal_format::PgVersion;

use super::output;
use crate::{
    Error, Result,
    execute::recovery,
    isolation::{
        self,
        parent::Doubt,
        release::{self, Asked, ParentState, Release},
    },
    start,
};

#[derive(Debug, Args)]
pub(super) struct ReleaseArgs {
    /// The data directory of the copy.
    directory: PathBuf,
    /// Change the settings. Without this option they are only shown.
    #[arg(long)]
    yes: bool,
    /// Release the copy even if the parent answers, or if it is not known whether it runs.
    #[arg(long)]
    force: bool,
    /// Directory of PostgreSQL's programs; `pg_isready` checks whether the parent answers.
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    pub(super) json: bool,
}

/// Releases the copy, or prints what that would change. `named` is the connection string of the
/// command line, which counts without a repository too.
pub(super) fn run(
    settings: Option<&Settings>,
    named: Option<&str>,
    args: &ReleaseArgs,
    json: bool,
) -> Result<()> {
    let directory = args.directory.as_path();
    if rustix::process::getuid().is_root() {
        return Err(Error::usage(format!(
            "the files of {} belong to PostgreSQL's user: run the command as that user",
            directory.display()
        )));
    }
    let described = release::describe(directory)?;
    let configured = settings
        .and_then(|settings| settings.cluster().ok())
        .map_or("", |cluster| cluster.conninfo.as_str());
    let conninfo = named.unwrap_or(configured);
    let program = |name| program(directory, args.pg_bin.as_deref(), name);
    let asked = Asked {
        conninfo,
        pg_isready: pg_isready(args.pg_bin.as_deref()),
    };
    let parent = if args.force {
        ParentState::Silent
    } else {
        release::parent_state(directory, &asked)?
    };
    if !json {
        show(&described);
    }
    match parent {
        ParentState::Answers(address) => return Err(Error::ParentAnswers { address }),
        ParentState::Unknown(doubt @ Doubt::NotAsked { .. }) if args.yes => {
            return Err(Error::usage(doubt.to_string()));
        }
        ParentState::Unknown(doubt) if args.yes => return Err(Error::ParentUnknown { doubt }),
        ParentState::Unknown(doubt) if !json => {
            output::line(&format!(
                "it is not known whether the parent still runs: {doubt}"
            ));
        }
        ParentState::Unknown(_) | ParentState::Silent => {}
    }
    let done = if args.yes {
        let done = release::release(directory)?;
        recovery::proved(directory)?;
        done
    } else {
        described
    };
    if json {
        return output::json(&serde_json::json!({"released": args.yes, "release": done}));
    }
    let shown = output::shell_word(directory);
    if !args.yes {
        output::line(&format!(
            "nothing was changed; do it with pitr-restore release {shown} --yes"
        ));
        return Ok(());
    }
    output::line("released");
    if done.recovery_pending {
        output::line(
            "recovery has not ended: run the command again afterwards if settings are left",
        );
    }
    if done.running {
        let pg_ctl = program("pg_ctl").unwrap_or_else(|| "pg_ctl".into());
        output::line(&format!(
            "the server takes the settings with a restart: {} -D {shown} restart",
            output::shell_word(&pg_ctl)
        ));
    }
    Ok(())
}

fn show(release: &Release) {
    for change in &release.changes {
        let value = |value: &Option<String>, none: &str| match value {
            Some(value) => format!("'{value}'"),
            None => none.to_owned(),
        };
        match &change.stays {
            Some(why) => output::line(&format!(
                "{} stays {}: {why}",
                change.name,
                value(&change.from, "a comment")
            )),
            // A rule of the access rules that the restore added.
            None if change.to.is_none() && change.name.contains(' ') => {
                output::line(&format!(
                    "{} {} is removed",
                    change.name,
                    value(&change.from, "a comment")
                ));
            }
            None => output::line(&format!(
                "{} = {} becomes {}",
                change.name,
                value(&change.from, "a comment"),
                value(&change.to, "PostgreSQL's default")
            )),
        }
    }
}

/// Returns a program of the copy's version.
fn program(directory: &Path, pg_bin: Option<&Path>, name: &str) -> Option<PathBuf> {
    let version = std::fs::read_to_string(directory.join("PG_VERSION")).ok()?;
    let major: u16 = version.trim().parse().ok()?;
    let version = PgVersion::ALL
        .into_iter()
        .find(|one| one.major() == major)?;
    let postgres = start::find_postgres(pg_bin, version).ok()?;
    start::sibling(&postgres, name)
}

/// Returns `pg_isready` of any version: it opens no session. The wrapper of this name in Debian's
/// PATH needs a cluster of its own.
fn pg_isready(pg_bin: Option<&Path>) -> Option<PathBuf> {
    const NAME: &str = "pg_isready";
    let directories: Vec<PathBuf> = match pg_bin {
        Some(directory) => vec![directory.to_owned()],
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let usual = PgVersion::ALL.into_iter().rev();
            let usual = usual.flat_map(|version| start::usual_directories(version.major()));
            usual.chain(std::env::split_paths(&path)).collect()
        }
    };
    directories.into_iter().find_map(|directory| {
        let program = std::fs::canonicalize(directory.join(NAME)).ok()?;
        let answer = Command::new(&program).arg("--version").output();
        let works = answer.is_ok_and(|answer| answer.status.success());
        (works && program.ends_with(NAME)).then_some(program)
    })
}

/// Removes the settings and claims that only the recovery needed, as PostgreSQL's
/// `recovery_end_command`.
pub(super) fn recovery_ended(directory: &Path) -> Result<()> {
    isolation::recovery_ended(directory)?;
    recovery::ended(directory);
    Ok(())
}
