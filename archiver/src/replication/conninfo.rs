//! [`ConnInfo`]: where PostgreSQL is and who we are, in libpq's words.
//!
//! Keyword/value text or URI, then PG* environment variables, then the password file, then libpq's defaults.
//! Invariant: `Debug` never shows a password.

use std::{collections::BTreeMap, env, fmt, fs, path::PathBuf};

use super::{Error, Result};

/// A parsed connection text.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    values: BTreeMap<String, String>,
}

/// The environment variable behind each keyword.
const VARIABLES: [(&str, &str); 8] = [
    ("host", "PGHOST"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("dbname", "PGDATABASE"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("sslmode", "PGSSLMODE"),
    ("application_name", "PGAPPNAME"),
];

impl ConnInfo {
    /// Parses `host=… user=…` or `postgresql://…`.
    ///
    /// # Errors
    /// [`Error::ConnInfo`].
    pub fn parse(text: &str) -> Result<Self> {
        let uri = ["postgresql://", "postgres://"]
            .iter()
            .find_map(|scheme| text.strip_prefix(scheme));
        let mut values = match uri {
            Some(rest) => parse_uri(rest)?,
            None => parse_pairs(text)?,
        };
        for (keyword, variable) in VARIABLES {
            if let Ok(value) = env::var(variable)
                && !value.is_empty()
            {
                values.entry(keyword.to_owned()).or_insert(value);
            }
        }
        let info = Self { values };
        match info.value("sslmode").unwrap_or("prefer") {
            "disable" | "allow" | "prefer" => {}
            mode => {
                return Err(problem(format!(
                    "sslmode={mode} is not supported by this build; use a Unix socket or a tunnel with sslmode=disable"
                )));
            }
        }
        Ok(info)
    }

    /// A keyword's value.
    #[must_use]
    pub fn value(&self, keyword: &str) -> Option<&str> {
        self.values.get(keyword).map(String::as_str)
    }

    /// The server's host, or the directory of its Unix socket.
    #[must_use]
    pub fn host(&self) -> &str {
        self.value("hostaddr")
            .or_else(|| self.value("host"))
            .unwrap_or("/var/run/postgresql")
    }

    /// The port.
    ///
    /// # Errors
    /// [`Error::ConnInfo`].
    pub fn port(&self) -> Result<u16> {
        let text = self.value("port").unwrap_or("5432");
        text.parse()
            .map_err(|_| problem(format!("port \"{text}\" is no port number")))
    }

    /// The role: by default the operating system's user.
    #[must_use]
    pub fn user(&self) -> String {
        self.value("user")
            .map(str::to_owned)
            .or_else(|| env::var("USER").ok())
            .unwrap_or_else(|| "postgres".to_owned())
    }

    /// The database, for SQL.
    #[must_use]
    pub fn dbname(&self) -> &str {
        self.value("dbname").unwrap_or("postgres")
    }

    /// The name in `pg_stat_replication` and `synchronous_standby_names`.
    #[must_use]
    pub fn application_name(&self) -> &str {
        self.value("application_name").unwrap_or("tidemark")
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", self.host(), self.value("port").unwrap_or("5432"))
    }

    /// The password, given or from the password file.
    #[must_use]
    pub fn password(&self) -> Option<String> {
        if let Some(password) = self.value("password") {
            return Some(password.to_owned());
        }
        let file = self.value("passfile").map(PathBuf::from).or_else(|| {
            let home = env::var_os("HOME")?;
            Some(PathBuf::from(home).join(".pgpass"))
        })?;
        let content = fs::read_to_string(file).ok()?;
        let host = if self.host().starts_with('/') {
            "localhost"
        } else {
            self.host()
        };
        let (port, user) = (self.value("port").unwrap_or("5432"), self.user());
        content
            .lines()
            .find_map(|line| matching_password(line, [host, port, "replication", &user]))
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (keyword, value) in &self.values {
            let shown = if keyword.contains("password") {
                "…"
            } else {
                value
            };
            write!(f, "{separator}{keyword}={shown}")?;
            separator = " ";
        }
        Ok(())
    }
}

/// The password of a line of the password file that fits.
fn matching_password(line: &str, wanted: [&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == ':' && fields.len() < 5 {
            fields.push(String::new());
            continue;
        }
        let last = fields.last_mut()?;
        match character {
            '\\' => last.extend(characters.next()),
            other => last.push(other),
        }
    }
    let password = fields.get(4)?.clone();
    let fits = fields
        .iter()
        .zip(wanted)
        .all(|(field, wanted)| field == "*" || field == wanted);
    fits.then_some(password)
}

fn parse_pairs(text: &str) -> Result<BTreeMap<String, String>> {
    let mut values = BTreeMap::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (keyword, after) = rest
            .split_once('=')
            .ok_or_else(|| problem(format!("\"=\" is missing after \"{rest}\"")))?;
        let after = after.trim_start();
        let mut value = String::new();
        let mut characters = after.char_indices();
        let quoted = after.starts_with('\'');
        if quoted {
            characters.next();
        }
        let mut end = after.len();
        let mut closed = !quoted;
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                '\'' if quoted => {
                    end = at + 1;
                    closed = true;
                    break;
                }
                space if !quoted && space.is_whitespace() => {
                    end = at;
                    break;
                }
                other => value.push(other),
            }
        }
        if !closed {
            return Err(problem("a quote is not closed".to_owned()));
        }
        values.insert(keyword.trim().to_owned(), value);
        rest = after[end..].trim_start();
    }
    Ok(values)
}

fn parse_uri(rest: &str) -> Result<BTreeMap<String, String>> {
    let mut values = BTreeMap::new();
    let mut put = |keyword: &str, text: &str| -> Result<()> {
        if !text.is_empty() {
            values.insert(keyword.to_owned(), percent_decoded(text)?);
        }
        Ok(())
    };
    let (body, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = body.split_once('/').unwrap_or((body, ""));
    let (login, place) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (host, port) = match place.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').unwrap_or((v6, ""));
            (host, after.trim_start_matches(':'))
        }
        None => place.split_once(':').unwrap_or((place, "")),
    };
    for (keyword, text) in [
        ("user", user),
        ("password", password),
        ("host", host),
        ("port", port),
        ("dbname", dbname),
    ] {
        put(keyword, text)?;
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (keyword, text) = pair
            .split_once('=')
            .ok_or_else(|| problem(format!("\"=\" is missing in \"{pair}\"")))?;
        put(keyword, text)?;
    }
    Ok(values)
}

fn percent_decoded(text: &str) -> Result<String> {
    let wrong = || problem(format!("\"{text}\" has an invalid %XX"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [
            rest.next().ok_or_else(wrong)?,
            rest.next().ok_or_else(wrong)?,
        ];
        let mut decoded = [0];
        hex::decode_to_slice(digits, &mut decoded).map_err(|_| wrong())?;
        bytes.extend(decoded);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

fn problem(problem: String) -> Error {
    Error::ConnInfo { problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, keyword: &str, value: &str) {
        let info = ConnInfo::parse(text).expect("it parses");
        assert_eq!(info.value(keyword), Some(value), "{text}");
    }

    #[test]
    fn both_forms_of_libpq_parse() {
        check("host=a port=1", "port", "1");
        check(r"user='it\'s' host = b", "user", "it's");
        check(r"user='it\'s' host = b", "host", "b");
        check(
            "postgresql://u:p%40@h:5/db?sslmode=disable",
            "password",
            "p@",
        );
        check("postgres://h/db", "dbname", "db");
        check("postgresql://[::1]:9/", "host", "::1");
        for bad in [
            "host",
            "host='a",
            "postgresql://h/?x",
            "host=a sslmode=verify-full",
        ] {
            assert!(ConnInfo::parse(bad).is_err(), "{bad:?} must not parse");
        }
    }

    #[test]
    fn debug_never_shows_the_password() {
        let info = ConnInfo::parse("host=h password=secret").expect("it parses");
        assert!(!format!("{info:?}").contains("secret"));
    }

    #[test]
    fn the_password_file_matches_like_libpq() {
        let wanted = ["localhost", "5432", "replication", "me"];
        let check = |line, password: Option<&str>| {
            assert_eq!(
                matching_password(line, wanted).as_deref(),
                password,
                "{line}"
            );
        };
        check("localhost:5432:replication:me:pw", Some("pw"));
        check(r"*:*:*:me:p\:w:x", Some("p:w:x"));
        check("other:*:*:me:pw", None);
        check("#*:*:*:*:pw", None);
    }
}
