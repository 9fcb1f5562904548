//! The service file: sections of settings, selected by `service=` or PGSERVICE.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    super::Result,
    environment::Environment,
    keyword::Keyword,
    parse::{Values, problem},
};

/// The directories that Debian's and PostgreSQL's own builds search if PGSYSCONFDIR is not set.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/etc/postgresql-common", "/usr/local/pgsql/etc"];

/// Returns the settings of a service.
pub(super) fn lookup(service: &str, environment: &Environment) -> Result<Values> {
    let named = environment.variable("PGSERVICEFILE").map(PathBuf::from);
    let must_exist = named.is_some();
    let own = named.or_else(|| environment.in_home(".pg_service.conf"));
    let system: Vec<PathBuf> = match environment.variable("PGSYSCONFDIR") {
        Some(directory) => vec![PathBuf::from(directory)],
        None => SYSTEM_DIRECTORIES.iter().map(PathBuf::from).collect(),
    };
    let mut looked = Vec::new();
    let files = own.into_iter().map(|path| (path, must_exist)).chain(
        system
            .iter()
            .map(|directory| (directory.join("pg_service.conf"), false)),
    );
    for (path, must_exist) in files {
        match fs::read_to_string(&path) {
            Ok(content) => {
                if let Some(values) = section(&content, service, &path)? {
                    return Ok(values);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {}
            Err(error) => return Err(problem(format!("service file {}: {error}", path.display()))),
        }
        looked.push(path.display().to_string());
    }
    Err(problem(format!(
        "service {service:?} is not defined; looked for a section of that name in {}",
        looked.join(", ")
    )))
}

/// Returns the settings of a section, if it exists. The first value of a keyword applies.
fn section(content: &str, service: &str, path: &Path) -> Result<Option<Values>> {
    let mut found: Option<Values> = None;
    for (index, line) in content.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            if name.strip_suffix(']') == Some(service) {
                found = Some(Values::new());
            }
            continue;
        }
        let Some(values) = &mut found else { continue };
        let origin = format!("{}, line {}", path.display(), index + 1);
        if line.starts_with("ldap") {
            return Err(problem(format!(
                "{origin}: a service in LDAP is not supported; write it out"
            )));
        }
        let (name, value) = line
            .split_once('=')
            .ok_or_else(|| problem(format!("{origin}: \"=\" is missing")))?;
        if name == "service" {
            return Err(problem(format!(
                "{origin}: a service cannot name another one"
            )));
        }
        let keyword = Keyword::find(name)
            .ok_or_else(|| problem(format!("{origin}: {}", Keyword::advice(name))))?;
        keyword.check(value, &origin)?;
        values
            .entry(keyword.name)
            .or_insert_with(|| value.to_owned());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &Path)]) -> Environment {
        Environment {
            variables: variables
                .iter()
                .map(|(name, path)| ((*name).to_owned(), path.display().to_string()))
                .collect(),
            user: None,
        }
    }

    #[test]
    fn a_section_is_found_where_libpq_looks() {
        let home = tempfile::tempdir().expect("a directory");
        let system = tempfile::tempdir().expect("a directory");
        let write = |directory: &Path, name: &str, text: &str| {
            fs::write(directory.join(name), text).expect("a file");
        };
        write(
            home.path(),
            ".pg_service.conf",
            "# ours\n[a]\nhost=ha\nport=1\nhost=no\n[b]\nhost = x\n",
        );
        write(
            system.path(),
            "pg_service.conf",
            "[c]\nhost=hc\n[a]\nhost=never\n",
        );
        let both = environment(&[("HOME", home.path()), ("PGSYSCONFDIR", system.path())]);
        let host = |service: &str, environment: &Environment| {
            lookup(service, environment).map(|values| values["host"].clone())
        };
        assert_eq!(host("a", &both).expect("in the home directory"), "ha");
        assert_eq!(host("c", &both).expect("in the system's"), "hc");
        let error = host("d", &both).expect_err("it is nowhere").to_string();
        assert!(
            error.contains("\"d\"") && error.contains("pg_service.conf"),
            "{error}"
        );
        let error = host("b", &both).expect_err("a blank before =").to_string();
        assert!(
            error.contains("line 7") && error.contains("did you mean \"host\""),
            "{error}"
        );
        let named = environment(&[("PGSERVICEFILE", &system.path().join("pg_service.conf"))]);
        assert_eq!(host("a", &named).expect("in the named file"), "never");
        let missing = environment(&[("PGSERVICEFILE", &home.path().join("none"))]);
        assert!(host("a", &missing).is_err());
    }

    #[test]
    fn a_wrong_line_is_told_without_its_value() {
        let check = |line: &str, expected: &str| {
            let text = format!("[s]\n{line}\n");
            let error = section(&text, "s", Path::new("f"))
                .expect_err(line)
                .to_string();
            assert!(
                error.contains(expected) && !error.contains("S3CRET"),
                "{error}"
            );
        };
        check("S3CRET", "\"=\" is missing");
        check("service=S3CRET", "another one");
        check("S3CRET=1", "unknown keyword");
        check("passwort=S3CRET", "did you mean \"password\"");
        check("ldap://S3CRET", "LDAP");
    }
}
