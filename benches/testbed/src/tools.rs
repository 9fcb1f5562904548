//! Finds PostgreSQL's programs: `$TIDEMARK_PG_DIR/NN/bin`, else those that
//! `benches/tools/install.sh` installed, else Debian's.

use std::{env, path::PathBuf};

use anyhow::Context;

/// The major versions to look for.
pub const MAJORS: [u16; 6] = [13, 14, 15, 16, 17, 18];

/// Returns every installed server: major version and program directory, oldest first.
#[must_use]
pub fn servers() -> Vec<(u16, PathBuf)> {
    let mut roots: Vec<PathBuf> = Vec::new();
    roots.extend(env::var_os("TIDEMARK_PG_DIR").map(PathBuf::from));
    roots.push("/var/cache/tidemark/postgresql".into());
    roots.extend(
        env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark/postgresql")),
    );
    roots.push("/usr/lib/postgresql".into());
    let find = |major: u16| {
        let places = roots
            .iter()
            .map(|root| root.join(major.to_string()).join("bin"));
        places
            .into_iter()
            .find(|bin| bin.join("initdb").exists())
            .map(|bin| (major, bin))
    };
    MAJORS.into_iter().filter_map(find).collect()
}

/// Returns the program directory of one major version.
///
/// # Errors
/// When it is not installed.
pub fn server(major: u16) -> anyhow::Result<PathBuf> {
    let found = servers().into_iter().find(|(known, _)| *known == major);
    let (_, bin) = found.with_context(|| {
        format!("PostgreSQL {major} is not installed; run `make install-tools`")
    })?;
    Ok(bin)
}

/// As [`servers`], and reports missing versions. In CI a missing version is a failure, not a
/// skipped test.
///
/// # Panics
/// In CI when a version that the installer unpacks is missing.
#[must_use]
pub fn servers_or_skip() -> Vec<(u16, PathBuf)> {
    let servers = servers();
    let missing: Vec<u16> = MAJORS
        .into_iter()
        .filter(|major| servers.iter().all(|(installed, _)| installed != major))
        .collect();
    // Version 13 comes from Debian's packages and is not available elsewhere.
    let needed = missing.iter().any(|major| *major > 13);
    assert!(
        !needed || env::var_os("CI").is_none(),
        "PostgreSQL {missing:?} is not installed; run `make install-tools`"
    );
    if !missing.is_empty() {
        eprintln!("SKIPPED: PostgreSQL {missing:?} is not installed; run `make install-tools`");
    }
    servers
}
