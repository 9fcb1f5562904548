//! [`Environment`]: the inputs of libpq other than the connection string: PG* variables, the home
//! directory, the user's name.

use std::{collections::BTreeMap, env, fs, path::PathBuf, process::Command};

/// A copy of these inputs, so that a test can supply its own.
#[derive(Clone, Debug, Default)]
pub(super) struct Environment {
    pub(super) variables: BTreeMap<String, String>,
    pub(super) user: Option<String>,
}

impl Environment {
    pub(super) fn of_process() -> Self {
        let variables = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("PG") || name == "HOME")
            .collect();
        Self {
            variables,
            user: None,
        }
    }

    /// Returns a variable that is set and not empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        let value = self.variables.get(name)?;
        (!value.is_empty()).then_some(value)
    }

    pub(super) fn home(&self) -> Option<PathBuf> {
        if let Some(home) = self.variable("HOME") {
            return Some(PathBuf::from(home));
        }
        let account = account(rustix::process::geteuid().as_raw())?;
        Some(PathBuf::from(account.home))
    }

    /// The path of one of libpq's files in the home directory.
    pub(super) fn in_home(&self, name: &str) -> Option<PathBuf> {
        Some(self.home()?.join(name))
    }

    /// The operating system's name of the effective user.
    pub(super) fn user(&self) -> Option<String> {
        if self.user.is_some() {
            return self.user.clone();
        }
        user_name(rustix::process::geteuid().as_raw())
    }
}

/// Returns a user's name. Users of a directory service are not in `/etc/passwd`; `id` knows them.
pub(crate) fn user_name(uid: u32) -> Option<String> {
    if let Some(account) = account(uid) {
        return Some(account.name);
    }
    let output = Command::new("id")
        .args(["-un", &uid.to_string()])
        .output()
        .ok()?;
    let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !name.is_empty()).then_some(name)
}

struct Account {
    name: String,
    home: String,
}

fn account(uid: u32) -> Option<Account> {
    fs::read_to_string("/etc/passwd")
        .ok()?
        .lines()
        .find_map(|line| account_of_line(line, uid))
}

fn account_of_line(line: &str, wanted: u32) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let uid: u32 = fields.nth(1)?.parse().ok()?;
    let home = fields.nth(2)?;
    (uid == wanted).then(|| Account {
        name: name.to_owned(),
        home: home.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_number() {
        let line = "postgres:x:105:113:PostgreSQL,,,:/var/lib/postgresql:/bin/bash";
        let account = account_of_line(line, 105).expect("it is there");
        assert_eq!(
            (account.name.as_str(), account.home.as_str()),
            ("postgres", "/var/lib/postgresql")
        );
        assert!(account_of_line(line, 113).is_none());
        assert_eq!(user_name(0).as_deref(), Some("root"));
    }
}
