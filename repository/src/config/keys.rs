//! The table of the keys of the configuration file.
//!
//! The accepted keys, the words of errors about mistyped ones, `config example`, the packaged
//! example file and `config show` come from it. A test fails for a key that is here and not read.

use std::fmt::Write as _;

mod table;

pub use table::KEYS;

/// The table of the file in which a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The top of the file only.
    Top,
    /// `[cluster.NAME]`. At the top it is the default of every cluster.
    Cluster,
    /// An entry of `repositories`.
    Repository,
    /// `[[drill.check]]`.
    Check,
    /// `[notify.NAME]`.
    Notify,
}

/// The kind of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A text.
    Text,
    /// A path, a URL or a name.
    Path,
    /// A text with a number and its unit: ms, s, min, h or d.
    Duration,
    /// A number of bytes, or another whole number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A list of texts.
    Texts,
    /// A list of tables.
    Tables,
    /// A value of any kind.
    Any,
}

/// The keys that are described together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The server that is archived.
    Server,
    /// The places of the archived objects.
    Repositories,
    /// The access to a bucket.
    Bucket,
    /// The encryption of what is stored.
    Encryption,
    /// The WAL on this host.
    Spool,
    /// Scheduled base backups and restore drills.
    Schedules,
    /// The targets of the status.
    Objectives,
    /// Retention.
    Retention,
    /// When retention is applied.
    Expiry,
    /// Object Lock.
    Lock,
    /// The users who share folders.
    Access,
    /// Restore drills.
    Drill,
    /// The server from which standbys stream.
    Walsender,
    /// The HTTP server.
    Http,
    /// The receivers of alerts.
    Notify,
}

impl Group {
    /// The groups, in the order of the example file.
    pub const ALL: [Self; 15] = [
        Self::Http,
        Self::Notify,
        Self::Server,
        Self::Repositories,
        Self::Bucket,
        Self::Encryption,
        Self::Spool,
        Self::Schedules,
        Self::Objectives,
        Self::Retention,
        Self::Expiry,
        Self::Lock,
        Self::Access,
        Self::Drill,
        Self::Walsender,
    ];

    /// Returns the heading.
    #[must_use]
    pub const fn heading(self) -> &'static str {
        match self {
            Self::Server => "The server that is archived",
            Self::Repositories => "The places of the archived objects",
            Self::Bucket => {
                "The access to a bucket; without credentials here, the standard places of AWS programs are used"
            }
            Self::Encryption => "The encryption of what is stored: one of these",
            Self::Spool => "The WAL on this host, and when it is uploaded",
            Self::Schedules => "Base backups and restore drills by the daemon",
            Self::Objectives => "The targets and ages by which the status is judged",
            Self::Retention => "What is kept; without keep_window everything is kept",
            Self::Expiry => "When retention is applied",
            Self::Lock => "Object Lock of a bucket",
            Self::Access => "The group that shares the folder of the repository or the spool",
            Self::Drill => "Restore drills",
            Self::Walsender => "The server from which standbys stream the archive",
            Self::Http => "The page, the metrics and the API",
            Self::Notify => "The receivers of alerts; each has a table of its own",
        }
    }
}

/// A key of the configuration file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The keys that it belongs to.
    pub group: Group,
    /// The table in which it stands.
    pub place: Place,
    /// The kind of its value.
    pub kind: Kind,
    /// A valid value in TOML.
    pub example: &'static str,
    /// The value that holds without it, in TOML, or words about it.
    pub default: &'static str,
    /// Its meaning.
    pub summary: &'static str,
}

/// A key of a cluster.
const fn cluster(
    group: Group,
    name: &'static str,
    (kind, example): (Kind, &'static str),
    default: &'static str,
    summary: &'static str,
) -> Key {
    Key {
        name,
        group,
        place: Place::Cluster,
        kind,
        example,
        default,
        summary,
    }
}

/// A key that stands elsewhere.
const fn at(place: Place, key: Key) -> Key {
    Key { place, ..key }
}

/// Returns the names of the keys of a place.
pub(super) fn names(place: Place) -> Vec<&'static str> {
    let keys = KEYS.iter().filter(|key| key.place == place);
    keys.map(|key| key.name).collect()
}

/// Returns the names of the keys of a place that belong to a group.
pub(super) fn names_of(place: Place, group: Group) -> impl Iterator<Item = &'static str> {
    let keys = KEYS
        .iter()
        .filter(move |key| key.place == place && key.group == group);
    keys.map(|key| key.name)
}

/// Returns true for a key whose value is a text with a number and its unit.
pub(super) fn is_duration(name: &str) -> bool {
    KEYS.iter()
        .any(|key| key.name == name && key.kind == Kind::Duration)
}

/// The `default` of a key that has none.
const REQUIRED: &str = "it is required";
/// The length of a line of the example.
const COLUMNS_MAX: usize = 100;

/// Returns a configuration file with every key, each with its meaning and its default. All keys but
/// `repository` are comments.
#[must_use]
pub fn example() -> String {
    let mut text = String::from(
        "# Tidemark's configuration: every key. Only `repository` is required.\n\
         # Programs read the first of --config FILE, $TIDEMARK_CONFIG, ./tidemark.toml and\n\
         # /etc/tidemark/tidemark.toml. Flags override the file. `wal-archiver config check`\n\
         # validates it, `config show` prints what holds. Durations: 500ms, 1s, 5min, 1h, 7d.\n\
         # Keys of a cluster may stand at the top, where they apply to every cluster.\n",
    );
    let is_top = |key: &&Key| matches!(key.place, Place::Top | Place::Cluster);
    for group in Group::ALL {
        let keys = KEYS.iter().filter(|key| key.group == group);
        if keys.clone().any(|key| is_top(&key)) {
            heading(&mut text, group.heading());
        }
        for key in keys.filter(is_top) {
            entry(&mut text, key);
        }
    }
    // A table ends the keys of the top.
    heading(&mut text, "A check of a drill; repeat the table for each");
    table(&mut text, "[[drill.check]]", Place::Check);
    heading(&mut text, Group::Notify.heading());
    table(&mut text, "[notify.team]", Place::Notify);
    heading(
        &mut text,
        "A cluster; without such a table there is one with the name main",
    );
    text.push_str("# [cluster.main]\n# conninfo = \"host=db1 user=replicator\"\n");
    text
}

fn heading(text: &mut String, heading: &str) {
    write!(text, "\n# ---- {heading} ----\n").expect("BUG: a text takes everything");
}

fn table(text: &mut String, header: &str, place: Place) {
    writeln!(text, "# {header}").expect("BUG: a text takes everything");
    for key in KEYS.iter().filter(|key| key.place == place) {
        entry(text, key);
    }
}

fn entry(text: &mut String, key: &Key) {
    let mut line = String::from("#");
    let words = if key.default == REQUIRED {
        format!("{} It is required.", key.summary)
    } else {
        format!("{} Default: {}.", key.summary, key.default)
    };
    for word in words.split(' ') {
        if line.len() + 1 + word.len() > COLUMNS_MAX {
            text.push_str(&line);
            text.push_str("\n#");
            line.clear();
        }
        line.push(' ');
        line.push_str(word);
    }
    let comment = if key.name == "repository" { "" } else { "# " };
    write!(text, "{line}\n{comment}{} = {}\n", key.name, key.example)
        .expect("BUG: a text takes everything");
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;
    use crate::config::{file::ConfigFile, parse_duration};

    fn parses(text: &str) -> Result<(), String> {
        let parsed = ConfigFile::parse(text).and_then(|file| {
            let args = crate::config::CommonArgs::default();
            crate::config::Settings::from_file(&args, &file)
        });
        parsed.map(drop).map_err(|error| error.to_string())
    }

    /// Returns a file with one key.
    fn only(key: &Key, value: &str) -> String {
        let (name, repository) = (key.name, "repository = 'file:///r'\n");
        match key.place {
            Place::Top => format!("{repository}{name} = {value}"),
            Place::Cluster if name == "repository" => format!("repository = {value}"),
            Place::Cluster => format!("{repository}[cluster.a]\n{name} = {value}"),
            Place::Repository => format!("{repository}repositories = [{{ {name} = {value} }}]"),
            Place::Check | Place::Notify => {
                let (table, others) = match key.place {
                    Place::Check => ("[[drill.check]]", "name = 'n'\nquery = 'q'\nexpect = 1\n"),
                    _ => ("[notify.a]", "type = 'webhook'\nurl = 'https://h/'\n"),
                };
                let others = others
                    .lines()
                    .filter(|line| !line.starts_with(&format!("{name} ")));
                let others: String = others.map(|line| format!("{line}\n")).collect();
                format!("{repository}{table}\n{others}{name} = {value}")
            }
        }
    }

    /// A key of the table that no code reads would be accepted with every value.
    #[test]
    fn every_key_is_read() {
        for key in KEYS {
            let wrong = match key.kind {
                Kind::Text | Kind::Path | Kind::Duration | Kind::Texts | Kind::Tables => "1",
                Kind::Number | Kind::Boolean => "\"x\"",
                // Every kind of value is accepted but this.
                Kind::Any => "[1]",
            };
            let refused = parses(&only(key, wrong));
            assert!(refused.is_err(), "{} = {wrong} is accepted", key.name);
        }
    }

    #[test]
    fn every_example_has_the_right_kind() {
        for key in KEYS {
            let text = only(key, key.example);
            // Files that are named do not exist here, and some keys need another one.
            if let Err(error) = parses(&text) {
                let is_expected = [
                    "together",
                    "No such file",
                    "set repository_group",
                    "set spool_group",
                ]
                .iter()
                .any(|part| error.contains(part))
                    || [
                        "keep_daily",
                        "keep_weekly",
                        "keep_monthly",
                        "keep_backups_min",
                    ]
                    .contains(&key.name)
                    || key.place == Place::Notify;
                assert!(is_expected, "{}: {error}", key.name);
                assert!(!error.contains("invalid type"), "{}: {error}", key.name);
            }
            if key.kind == Kind::Duration {
                let value = key.example.trim_matches('"');
                parse_duration(key.name, value).expect("a duration");
            }
        }
    }

    #[test]
    fn a_name_stands_once_in_its_place() {
        let mut seen = BTreeSet::new();
        for key in KEYS {
            assert!(
                seen.insert((format!("{:?}", key.place), key.name)),
                "{}",
                key.name
            );
            assert!(key.summary.ends_with('.'), "{}: {}", key.name, key.summary);
            assert!(!key.default.ends_with('.'), "{}: {}", key.name, key.default);
        }
    }

    /// `wal-archiver config example > packaging/tidemark.toml` makes the file.
    #[test]
    fn the_packaged_example_has_every_key() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/tidemark.toml");
        let packaged = std::fs::read_to_string(file).expect("the file");
        assert_eq!(packaged, example());
        parses(&packaged).expect("it is valid as it is");
        for line in packaged.lines() {
            assert!(line.len() <= 2 * COLUMNS_MAX, "{line}");
        }
    }
}
