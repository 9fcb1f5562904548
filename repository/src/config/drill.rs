//! Restore drills: the `drill_*` keys of a cluster, and the checks `[[drill.check]]`.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    keys::{self, Place},
    parse_duration,
};
use crate::{Error, Result};

/// Default of `timeout`: a query that takes longer is a surprise after a disaster, too.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// Default of `database`: it exists unless a user has dropped it.
const DATABASE_DEFAULT: &str = "postgres";
/// The value of `expect` that only demands a row with a value.
const NOT_EMPTY: &str = "not empty";

/// The settings of restore drills.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DrillSettings {
    /// The directory below which a drill restores. Default: the system's directory for temporary
    /// files.
    pub scratch: Option<PathBuf>,
    /// The role with which a drill connects to the restored server. Default: the first that exists
    /// of `postgres`, the operating system's user and the user of `conninfo`.
    pub user: Option<String>,
    /// The checks on the restored server.
    pub checks: Vec<SqlCheck>,
}

/// A query on the restored server, and its expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct SqlCheck {
    /// The name in reports.
    pub name: String,
    /// The database. Default: `postgres`.
    pub database: String,
    /// The role. Default: that of the drill.
    pub user: Option<String>,
    /// The query. `$target_time` in it is the target's time.
    pub query: String,
    /// The expected answer.
    pub expect: Expect,
    /// The time limit. Default: 1 minute.
    pub timeout: Duration,
}

/// The expected answer of a check: the first column of the first row.
#[derive(Clone, Debug, PartialEq)]
pub enum Expect {
    /// At least one row, whose first column is neither NULL nor empty.
    NotEmpty,
    /// This text.
    Text(String),
    /// This number.
    Number(f64),
    /// True or false.
    Truth(bool),
    /// A number in this range, both ends included.
    Range {
        /// The lower end.
        min: Option<f64>,
        /// The upper end.
        max: Option<f64>,
    },
}

impl Expect {
    /// Returns true if `answer` is the expected one. `None` stands for no row and for NULL.
    #[must_use]
    pub fn accepts(&self, answer: Option<&str>) -> bool {
        let Some(answer) = answer else {
            return false;
        };
        let number = || answer.trim().parse::<f64>().ok();
        match self {
            Self::NotEmpty => !answer.is_empty(),
            Self::Text(text) => answer == text,
            Self::Number(expected) => number() == Some(*expected),
            Self::Truth(expected) => {
                answer == if *expected { "t" } else { "f" } || answer == expected.to_string()
            }
            Self::Range { min, max } => number().is_some_and(|number| {
                min.is_none_or(|min| min <= number) && max.is_none_or(|max| number <= max)
            }),
        }
    }
}

impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotEmpty => f.write_str("a value"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Number(number) => write!(f, "{number}"),
            Self::Truth(truth) => write!(f, "{truth}"),
            Self::Range { min, max } => match (min, max) {
                (Some(min), Some(max)) => write!(f, "{min} to {max}"),
                (Some(min), None) => write!(f, "at least {min}"),
                (None, Some(max)) => write!(f, "at most {max}"),
                (None, None) => f.write_str("a number"),
            },
        }
    }
}

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct DrillTable {
    drill: Option<toml::Table>,
    drill_scratch: Option<PathBuf>,
    drill_user: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct CheckTable {
    name: String,
    database: Option<String>,
    user: Option<String>,
    query: String,
    expect: toml::Value,
    timeout: Option<String>,
}

impl DrillTable {
    /// Returns the settings: this table's, and those of `defaults` where this table has none.
    pub(super) fn resolve(&self, defaults: &Self) -> Result<DrillSettings> {
        let scratch = self
            .drill_scratch
            .clone()
            .or_else(|| defaults.drill_scratch.clone());
        if let Some(scratch) = scratch.as_ref().filter(|scratch| scratch.is_relative()) {
            return Err(Error::config(format!(
                "drill_scratch = \"{}\" is not an absolute path",
                scratch.display()
            )));
        }
        let table = self.drill.as_ref().or(defaults.drill.as_ref());
        Ok(DrillSettings {
            scratch,
            user: self
                .drill_user
                .clone()
                .or_else(|| defaults.drill_user.clone()),
            checks: table.map(checks).transpose()?.unwrap_or_default(),
        })
    }
}

/// Reads the checks from the table `drill`.
fn checks(table: &toml::Table) -> Result<Vec<SqlCheck>> {
    if let Some(key) = table.keys().find(|key| *key != "check") {
        return Err(super::file::unknown(key, " in [drill]", &["check"]));
    }
    let entries = match table.get("check") {
        None => return Ok(Vec::new()),
        Some(toml::Value::Array(entries)) => entries,
        Some(_) => {
            return Err(Error::config(
                "\"drill.check\" is a list of tables: write [[drill.check]] above each check",
            ));
        }
    };
    let mut checks: Vec<SqlCheck> = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let check = check(number, entry)?;
        if checks.iter().any(|other| other.name == check.name) {
            return Err(Error::config(format!(
                "two drill checks have the name \"{}\"; give each its own, because a report names it",
                check.name
            )));
        }
        checks.push(check);
    }
    Ok(checks)
}

fn check(number: usize, entry: &toml::Value) -> Result<SqlCheck> {
    let place = format!(" in [[drill.check]] number {number}");
    let known = keys::names(Place::Check);
    for key in entry.as_table().into_iter().flat_map(toml::Table::keys) {
        if !known.contains(&key.as_str()) {
            return Err(super::file::unknown(key, &place, &known));
        }
    }
    let table: CheckTable = entry
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| Error::config(format!("{}{place}", error.message())))?;
    if table.name.trim().is_empty() || table.query.trim().is_empty() {
        return Err(Error::config(format!("name or query is empty{place}")));
    }
    let timeout = match &table.timeout {
        Some(text) => parse_duration("timeout", text)
            .map_err(|error| Error::config(format!("{error}{place}")))?,
        None => TIMEOUT_DEFAULT,
    };
    Ok(SqlCheck {
        expect: expect(&table.expect, &place)?,
        name: table.name,
        database: table
            .database
            .unwrap_or_else(|| DATABASE_DEFAULT.to_owned()),
        user: table.user,
        query: table.query,
        timeout,
    })
}

fn expect(value: &toml::Value, place: &str) -> Result<Expect> {
    let number = |value: &toml::Value| match value {
        toml::Value::Integer(number) => Some(*number as f64),
        toml::Value::Float(number) => Some(*number),
        _ => None,
    };
    let refused = || {
        Error::config(format!(
            "expect{place} is none of: \"not empty\", a text, a number, true or false, {{ min = 1, max = 5 }} with one end \
             or both"
        ))
    };
    match value {
        toml::Value::String(text) if text == NOT_EMPTY => Ok(Expect::NotEmpty),
        toml::Value::String(text) => Ok(Expect::Text(text.clone())),
        toml::Value::Boolean(truth) => Ok(Expect::Truth(*truth)),
        toml::Value::Table(range) => {
            if range.is_empty() || range.keys().any(|key| key != "min" && key != "max") {
                return Err(refused());
            }
            let end = |key: &str| {
                range
                    .get(key)
                    .map(|value| number(value).ok_or_else(refused))
            };
            let (min, max) = (end("min").transpose()?, end("max").transpose()?);
            if let (Some(min), Some(max)) = (min, max)
                && min > max
            {
                return Err(Error::config(format!(
                    "expect{place}: min = {min} is more than max = {max}"
                )));
            }
            Ok(Expect::Range { min, max })
        }
        value => number(value).map(Expect::Number).ok_or_else(refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CommonArgs, Settings, file::ConfigFile};

    fn drill(text: &str) -> Result<DrillSettings> {
        let text = format!("repository = 'file:///r'\n{text}");
        let file = ConfigFile::parse(&text)?;
        let settings = Settings::from_file(&CommonArgs::default(), &file)?;
        Ok(settings.cluster()?.drill.clone())
    }

    #[test]
    fn a_check_has_a_name_a_query_and_an_expected_answer() {
        let head = "[[drill.check]]\nname = 'a'\nquery = 'SELECT 1'\n";
        for (expect, accepted, refused) in [
            ("'not empty'", vec!["0", "x"], vec!["", "\0none"]),
            ("'x'", vec!["x"], vec!["X", "\0none"]),
            ("5", vec!["5", "5.0", " 5 "], vec!["6", "x", "\0none"]),
            ("true", vec!["t", "true"], vec!["f", "1", "\0none"]),
            ("{ min = 1 }", vec!["1", "7e3"], vec!["0.9", "x"]),
            ("{ min = -1, max = 2.5 }", vec!["-1", "2.5"], vec!["2.6"]),
        ] {
            let settings = drill(&format!("{head}expect = {expect}")).expect(expect);
            let check = &settings.checks[0];
            assert_eq!(
                (check.database.as_str(), check.timeout.as_secs()),
                ("postgres", 60)
            );
            let answer = |text: &'static str| Some(text).filter(|text| *text != "\0none");
            for text in accepted {
                assert!(check.expect.accepts(answer(text)), "{expect}: {text}");
            }
            for text in refused {
                assert!(!check.expect.accepts(answer(text)), "{expect}: {text}");
            }
        }
    }

    #[test]
    fn a_mistyped_check_is_refused_with_its_place() {
        let check = "[[drill.check]]\nname = 'a'\nquery = 'SELECT 1'\nexpect = 1\n";
        for (text, part) in [
            (check.replace("expect = 1", ""), "expect"),
            (check.replace("= 1\n", "= [1]\n"), "none of: \"not empty\""),
            (
                check.replace("= 1\n", "= { min = 3, max = 2 }\n"),
                "min = 3",
            ),
            (check.replace("= 1\n", "= { least = 3 }\n"), "none of"),
            (check.replace("query", "qurey"), "did you mean \"query\""),
            (format!("{check}timeout = '5'\n"), "not a duration"),
            (format!("{check}{check}"), "two drill checks"),
            ("[drill]\nchecks = 1".to_owned(), "did you mean \"check\""),
            ("[drill]\ncheck = 1".to_owned(), "[[drill.check]]"),
            ("drill_scratch = 'x'".to_owned(), "not an absolute path"),
            (
                "drill_scrach = '/x'".to_owned(),
                "did you mean \"drill_scratch\"",
            ),
        ] {
            let error = drill(&text).expect_err(&text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_cluster_overrides_the_checks_of_all() {
        let settings = drill(
            "drill_user = 'dba'\n[[drill.check]]\nname = 'all'\nquery = 'SELECT 1'\nexpect = 1\n\
             [[cluster.main.drill.check]]\nname = 'own'\nquery = 'SELECT 2'\nexpect = 2\n",
        );
        let settings = settings.expect("valid");
        assert_eq!(settings.user.as_deref(), Some("dba"));
        assert_eq!(settings.checks.len(), 1);
        assert_eq!(settings.checks[0].name, "own");
    }
}
