//! Where PostgreSQL's programs are: `$TIDEMARK_PG_DIR/NN/bin`, else what `benches/tools/install.sh` made, else Debian's.

use std::{env, path::PathBuf};

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

/// As [`servers`]; under CI an empty answer is a failure and not a skipped test.
///
/// # Panics
/// Under CI, when no server is installed.
#[must_use]
pub fn servers_or_skip() -> Vec<(u16, PathBuf)> {
    let servers = servers();
    assert!(
        !servers.is_empty() || env::var_os("CI").is_none(),
        "no PostgreSQL server is installed; run `make install-tools`"
    );
    servers
}
