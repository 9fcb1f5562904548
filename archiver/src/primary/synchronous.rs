//! Determines from `synchronous_standby_names` and `synchronous_commit` whether commits wait for
//! the archiver, and whether that is intended.
//!
//! Two settings hang a cluster quietly: `*` makes every standby synchronous, an archiver too, and
//! `remote_apply` waits for something that an archiver never reports. A standby that is named and
//! not connected hangs it too. `check` and the daemon query the server and show the answer.

use replication::ReplicationClient;

/// The archiver's role under the server's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Commits do not wait for us.
    Asynchronous,
    /// Commits wait for us, as somebody wrote down.
    Named,
    /// Commits wait for us only because of `*`.
    Accidental,
}

/// Reads `synchronous_standby_names`: a list, `FIRST n (…)`, `ANY n (…)` or `n (…)`; names match
/// without regard to case (`SyncRepGetStandbyPriority` in `syncrep.c`).
#[must_use]
pub fn membership(standby_names: &str, application_name: &str) -> Membership {
    let list = match (standby_names.find('('), standby_names.rfind(')')) {
        (Some(open), Some(close)) if open < close && !standby_names[..open].contains('"') => {
            &standby_names[open + 1..close]
        }
        _ => standby_names,
    };
    let names = split(list);
    let named = names
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case(application_name));
    if named {
        Membership::Named
    } else if names.iter().any(|(name, quoted)| name == "*" && !quoted) {
        Membership::Accidental
    } else {
        Membership::Asynchronous
    }
}

/// A connected standby.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Its `application_name`.
    pub name: String,
    /// Its `sync_state`.
    pub state: String,
}

impl Connected {
    /// Returns true if commits wait for this standby, or for some of several like it.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        matches!(self.state.as_str(), "sync" | "quorum")
    }
}

/// Queries the connected standbys. Returns `None` if the role may not see their states, and for a
/// server in recovery, on which no commit waits.
pub async fn connected(
    client: &mut ReplicationClient,
) -> replication::Result<Option<Vec<Connected>>> {
    let rows = client
        .query(
            "SELECT application_name, sync_state FROM pg_catalog.pg_stat_replication \
             UNION ALL SELECT NULL, NULL WHERE pg_is_in_recovery()",
        )
        .await?;
    let standby = |row: Vec<Option<String>>| {
        let [name, state] = <[_; 2]>::try_from(row).ok()?;
        Some(Connected {
            name: name?,
            state: state?,
        })
    };
    Ok(rows.into_iter().map(standby).collect())
}

/// Synchronous standbys of a server: how many `synchronous_standby_names` demands, and how many are
/// connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standbys {
    /// The number of standbys that must have a commit before it returns.
    pub required: usize,
    /// The number of names in the list.
    pub named: usize,
    /// The number of connected standbys that commits wait for (`sync_state` is `sync` or `quorum`).
    pub connected: usize,
}

impl Standbys {
    /// Reads the number in front of a list in parentheses; without one, the first name counts.
    #[must_use]
    pub fn new(standby_names: &str, connected: usize) -> Self {
        let (named, required) = match standby_names.split_once('(') {
            Some((head, _)) if !head.contains('"') => {
                let number = head.split_whitespace().last();
                (standby_names, number.and_then(|word| word.parse().ok()))
            }
            _ if standby_names.trim().is_empty() => ("", Some(0)),
            _ => (standby_names, None),
        };
        Self {
            required: required.unwrap_or(1),
            named: split(named).len(),
            connected,
        }
    }

    /// Returns the warning that commits wait for a standby that is not connected.
    #[must_use]
    pub fn waiting(self) -> Option<&'static str> {
        (self.connected < self.required).then_some(
            "fewer synchronous standbys are connected than synchronous_standby_names demands, so commits wait: connect \
             the missing ones (sync_state in pg_stat_replication), or change synchronous_standby_names",
        )
    }
}

/// The names of a list, and whether each was quoted; `""` in quotes is one.
fn split(list: &str) -> Vec<(String, bool)> {
    let mut names = vec![(String::new(), false)];
    let mut quoted = false;
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        let Some((name, was_quoted)) = names.last_mut() else {
            break;
        };
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                name.push('"');
            }
            '"' => {
                quoted = !quoted;
                *was_quoted = true;
            }
            ',' if !quoted => names.push((String::new(), false)),
            space if space.is_whitespace() && !quoted => {}
            other => name.push(other),
        }
    }
    names
}

/// The danger of the settings, with the remedy; `None` if there is none. `remote_apply`
/// tells whether `synchronous_commit = remote_apply` is set for the server, a database or a role.
#[must_use]
pub fn danger(membership: &Membership, remote_apply: bool) -> Option<&'static str> {
    match (membership, remote_apply) {
        (Membership::Asynchronous, _) | (Membership::Named, false) => None,
        (Membership::Accidental, false) => Some(
            "synchronous_standby_names = '*' makes the archiver a synchronous standby by accident: commits stand still \
             while it is away. Name the standbys that are meant; add tidemark only for an RPO of 0",
        ),
        (_, true) => Some(
            "synchronous_commit = remote_apply waits until a standby has applied the WAL, which an archiver never does: \
             such commits never end while it is a synchronous standby. Use synchronous_commit = on, or leave the archiver \
             out of synchronous_standby_names",
        ),
    }
}

#[cfg(test)]
mod tests {
    use crate::primary::synchronous::*;

    #[test]
    fn commits_wait_while_fewer_standbys_are_connected_than_demanded() {
        for (names, required, named) in [
            ("", 0, 1),
            ("tidemark", 1, 1),
            ("one, two", 1, 2),
            ("2 (one, two)", 2, 2),
            ("FIRST 2 (one, two, three)", 2, 3),
            ("ANY 1 (one, tidemark)", 1, 2),
            ("\"a(1\"", 1, 1),
        ] {
            let standbys = Standbys::new(names, required);
            assert_eq!(
                (standbys.required, standbys.named),
                (required, named),
                "{names}"
            );
            assert_eq!(standbys.waiting(), None, "{names}");
            if let Some(fewer) = required.checked_sub(1) {
                assert!(Standbys::new(names, fewer).waiting().is_some(), "{names}");
            }
        }
    }

    #[test]
    fn membership_is_read_as_postgresql_reads_it() {
        let check =
            |names, expected| assert_eq!(membership(names, "tidemark"), expected, "{names}");
        check("", Membership::Asynchronous);
        check("standby1", Membership::Asynchronous);
        check("tidemark", Membership::Named);
        check("ANY 1 (standby1, Tidemark)", Membership::Named);
        check("FIRST 2 (standby1, *)", Membership::Accidental);
        check("2 (standby1, \"tidemark\")", Membership::Named);
        check("*", Membership::Accidental);
        check("tidemark, *", Membership::Named);
        check("\"*\"", Membership::Asynchronous);
        check("\"tide(mark\"", Membership::Asynchronous);
    }

    #[test]
    fn only_what_hangs_commits_is_a_danger() {
        assert_eq!(danger(&Membership::Asynchronous, true), None);
        assert_eq!(danger(&Membership::Named, false), None);
        for (membership, remote_apply) in [
            (Membership::Accidental, false),
            (Membership::Accidental, true),
            (Membership::Named, true),
        ] {
            assert!(danger(&membership, remote_apply).is_some());
        }
    }
}
