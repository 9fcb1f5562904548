//! Parses the two forms of a connection string as libpq does (`conninfo_parse`,
//! `conninfo_uri_parse_options`).
//!
//! Invariant: an error names keywords and positions, never text that may be a value, because it may
//! be a password.

use std::collections::BTreeMap;

use super::{
    super::{Error, Result},
    keyword::Keyword,
};

/// Values by keyword. An empty value was given and stands for the default.
pub(super) type Values = BTreeMap<&'static str, String>;

/// Parses `host=… user=…` or `postgresql://…`.
pub(super) fn parse(text: &str) -> Result<Values> {
    let uri = ["postgresql://", "postgres://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    match uri {
        Some(rest) => parse_uri(rest),
        None => parse_pairs(text),
    }
}

fn put(values: &mut Values, name: &str, value: String, origin: &str) -> Result<()> {
    let keyword = Keyword::find(name)
        .ok_or_else(|| problem(format!("{origin}: {}", Keyword::advice(name))))?;
    keyword.check(&value, origin)?;
    values.insert(keyword.name, value);
    Ok(())
}

fn parse_pairs(text: &str) -> Result<Values> {
    let mut values = Values::new();
    let mut rest = text.trim_start();
    let mut number = 0;
    let mut before = String::new();
    while !rest.is_empty() {
        number += 1;
        let origin = format!("setting {number}{before}");
        let (name, after) = rest.split_once('=').ok_or_else(|| {
            problem(format!(
                "{origin}: \"=\" is missing; quote a value that holds spaces, as in password='a b'"
            ))
        })?;
        let name = name.trim_end();
        if name.contains(char::is_whitespace) {
            return Err(problem(format!(
                "{origin}: \"=\" is missing; quote a value that holds spaces, as in password='a b'"
            )));
        }
        let (value, end) = pair_value(after.trim_start(), &origin)?;
        put(&mut values, name, value, &origin)?;
        before = format!(", after \"{name}\"");
        rest = end.trim_start();
    }
    Ok(values)
}

/// Returns the value at the start of the text, and the rest.
fn pair_value<'a>(text: &'a str, origin: &str) -> Result<(String, &'a str)> {
    let mut value = String::new();
    let quoted = text.starts_with('\'');
    let mut characters = text.char_indices();
    if quoted {
        characters.next();
    }
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, text.get(at + 1..).unwrap_or_default())),
            space if !quoted && space.is_ascii_whitespace() => {
                return Ok((value, text.get(at..).unwrap_or_default()));
            }
            other => value.push(other),
        }
    }
    if quoted {
        return Err(problem(format!("{origin}: a quote is not closed")));
    }
    Ok((value, ""))
}

fn parse_uri(rest: &str) -> Result<Values> {
    let mut values = Values::new();
    let mut set = |name: &'static str, text: &str| -> Result<()> {
        if !text.is_empty() {
            let value = decoded(text, &format!("the URI's {name}"))?;
            put(&mut values, name, value, "URI")?;
        }
        Ok(())
    };
    // The first "@" before the path ends the credentials. A password may contain ":" and "?"
    // unescaped.
    let path_from = rest.find('/').unwrap_or(rest.len());
    let (login, place) = match rest.find('@') {
        Some(at) if at < path_from => rest.split_at(at),
        _ => ("", rest),
    };
    let mut place = place.strip_prefix('@').unwrap_or(place);
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    set("user", user)?;
    set("password", password)?;
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    loop {
        let host;
        if let Some(v6) = place.strip_prefix('[') {
            let (address, after) = v6
                .split_once(']')
                .filter(|(address, _)| !address.is_empty())
                .ok_or_else(|| problem("URI: an IPv6 address needs \"[\" and \"]\"".to_owned()))?;
            if !after.is_empty() && !after.starts_with([':', '/', '?', ',']) {
                return Err(problem(
                    "URI: only a port, a path or another host may follow an IPv6 address"
                        .to_owned(),
                ));
            }
            (host, place) = (address, after);
        } else {
            (host, place) = split_before(place, &[':', '/', '?', ',']);
        }
        hosts.push(host);
        let mut port = "";
        if let Some(after) = place.strip_prefix(':') {
            (port, place) = split_before(after, &['/', '?', ',']);
        }
        ports.push(port);
        match place.strip_prefix(',') {
            Some(after) => place = after,
            None => break,
        }
    }
    set("host", &hosts.join(","))?;
    if ports.iter().any(|port| !port.is_empty()) {
        set("port", &ports.join(","))?;
    }
    if let Some(after) = place.strip_prefix('/') {
        let (dbname, after) = split_before(after, &['?']);
        set("dbname", dbname)?;
        place = after;
    }
    if let Some(query) = place.strip_prefix('?') {
        parse_query(query, &mut values)?;
    }
    Ok(values)
}

fn parse_query(query: &str, values: &mut Values) -> Result<()> {
    let mut rest = query;
    let mut number = 0;
    while !rest.is_empty() {
        number += 1;
        let origin = format!("URI parameter {number}");
        let pair;
        (pair, rest) = rest.split_once('&').unwrap_or((rest, ""));
        let (name, text) = pair
            .split_once('=')
            .ok_or_else(|| problem(format!("{origin}: \"=\" is missing")))?;
        if text.contains('=') {
            return Err(problem(format!(
                "{origin}: there is a second \"=\"; write it as %3D"
            )));
        }
        let (name, value) = (decoded(name, &origin)?, decoded(text, &origin)?);
        // JDBC's form.
        if name == "ssl" && value == "true" {
            values.insert("sslmode", "require".to_owned());
        } else {
            put(values, &name, value, &origin)?;
        }
    }
    Ok(())
}

fn split_before<'a>(text: &'a str, ends: &[char]) -> (&'a str, &'a str) {
    text.split_at(text.find(ends).unwrap_or(text.len()))
}

fn decoded(text: &str, origin: &str) -> Result<String> {
    let wrong = || {
        problem(format!(
            "{origin} has an invalid %XX; a percent sign itself is %25"
        ))
    };
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
        let mut one = [0];
        hex::decode_to_slice(digits, &mut one).map_err(|_| wrong())?;
        if one == [0] {
            return Err(problem(format!("{origin} holds %00, which is forbidden")));
        }
        bytes.extend(one);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// Returns the error of a connection string.
pub(super) fn problem(problem: String) -> Error {
    Error::ConnInfo { problem }
}
