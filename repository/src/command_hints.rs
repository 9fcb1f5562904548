//! Hints for commands that exist in other backup tools or in our other program.

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};

/// The names of commands in pgBackRest, Barman, WAL-G or our other program, each group with its
/// hint.
const HINTS: [(&[&str], &str); 16] = [
    (
        &[
            "info",
            "list",
            "list-backup",
            "list-backups",
            "backup-list",
            "show-backup",
            "show-backups",
            "repo-ls",
            "window",
        ],
        "`pitr-restore list` lists backups and what can be restored; `wal-archiver status` shows each cluster",
    ),
    (
        &["restore", "recover", "backup-fetch", "pitr"],
        "`pitr-restore --target-dir DIR` restores; add --dry-run to see the plan first",
    ),
    (&["locate", "release"], "it is a command of `pitr-restore`"),
    (
        &["archive-push", "wal-push", "push"],
        "`wal-archiver push %p` is the archive_command",
    ),
    (
        &["archive-get", "get-wal", "wal-fetch", "wal-restore"],
        "`pitr-restore wal-fetch %f %p` is the restore_command",
    ),
    (
        &["delete", "delete-backup", "backup-delete"],
        "`wal-archiver backup delete ID` gives up one backup; `wal-archiver expire` applies retention",
    ),
    (
        &["expire", "expire-backup", "prune", "purge", "obsolete"],
        "`wal-archiver expire` applies retention; see what it would remove with --dry-run",
    ),
    (
        &["backup", "backup-push", "base-backup", "basebackup"],
        "`wal-archiver backup` takes a base backup",
    ),
    (
        &["check", "check-backup"],
        "`wal-archiver check` checks every precondition",
    ),
    (
        &["verify", "wal-verify", "validate", "verify-backup"],
        "`wal-archiver verify` checks every object and the continuity of the WAL",
    ),
    (
        &[
            "stanza-create",
            "init",
            "create",
            "repo-create",
            "server-create",
        ],
        "`wal-archiver run` creates the repository and the replication slot",
    ),
    (
        &[
            "run",
            "start",
            "cron",
            "receive-wal",
            "wal-receive",
            "daemon",
        ],
        "`wal-archiver run` is the daemon, which streams WAL",
    ),
    (
        &["stop"],
        "end the daemon with SIGTERM; it stores what is left first",
    ),
    (&["status"], "`wal-archiver status` shows each cluster"),
    (
        &[
            "import", "key", "lock", "epoch", "catalog", "config", "notify",
        ],
        "it is a command of `wal-archiver`",
    ),
    (&["version"], "use --version"),
];

/// Adds the hint for an unknown command to the error, if there is a hint. The hint replaces clap's
/// suggestion of a similar name, because that command does something else.
#[must_use]
pub fn with_command_hint(mut error: Error) -> Error {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return error;
    }
    let Some(ContextValue::String(command)) = error.get(ContextKind::InvalidSubcommand) else {
        return error;
    };
    let hint = HINTS
        .iter()
        .find_map(|(names, hint)| names.contains(&command.as_str()).then_some(*hint));
    if let Some(hint) = hint {
        let hint = ContextValue::StyledStrs(vec![hint.into()]);
        error.remove(ContextKind::SuggestedSubcommand);
        error.insert(ContextKind::Suggested, hint);
    }
    error
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    #[test]
    fn a_command_of_another_tool_gets_a_hint() {
        let refused = |name: &str| {
            let program = Command::new("wal-archiver")
                .subcommand(Command::new("expire"))
                .subcommand_required(true);
            let error = program.try_get_matches_from(["wal-archiver", name]);
            with_command_hint(error.expect_err("it is unknown")).to_string()
        };
        for (name, hint) in [
            ("info", "`pitr-restore list`"),
            ("restore", "`pitr-restore --target-dir DIR`"),
            ("list", "`pitr-restore list`"),
            ("expire-backup", "`wal-archiver expire` applies retention"),
        ] {
            let said = refused(name);
            assert!(
                said.contains(&format!("'{name}'")) && said.contains(hint),
                "{said}"
            );
            assert_eq!(said.matches("tip:").count(), 1, "{said}");
        }
        assert!(refused("expier").contains("similar"));
    }
}
