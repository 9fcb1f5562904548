//! Where PostgreSQL's programs are: `$TIDEMARK_PG_DIR/NN/bin`, else what `benches/tools/install.sh` made, else Debian's.

use std::{env, path::PathBuf};

use anyhow::Context;

/// Majors that are looked for.
pub const MAJORS: [u16; 6] = [13, 14, 15, 16, 17, 18];

/// Every server that is installed: major version and directory of its programs, oldest first.
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

/// The programs of one major version.
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

/// As [`servers`], and says what is missing; under CI that is a failure and not a skipped test.
///
/// # Panics
/// Under CI, when a version that the installer unpacks is not there.
#[must_use]
pub fn servers_or_skip() -> Vec<(u16, PathBuf)> {
    let servers = servers();
    let missing: Vec<u16> = MAJORS
        .into_iter()
        .filter(|major| servers.iter().all(|(installed, _)| installed != major))
        .collect();
    // 13 comes from Debian's own packages: elsewhere it is not to be had.
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
