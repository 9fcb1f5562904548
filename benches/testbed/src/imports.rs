//! Checks that no files of a crate import each other in a circle.
//!
//! An import is a `use` of `crate::`, `super::` or `self::`, or of a child module. A circle means
//! that none of its files can be read, tested or moved without the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// The directories of the crates. Those of `benches` are programs without shared modules.
const MEMBERS: [&str; 11] = [
    "archiver",
    "archiver/dashboard",
    "archiver/intake",
    "archiver/replication",
    "archiver/status",
    "benches/testbed",
    "repository",
    "repository/catalog",
    "repository/quick",
    "restorer",
    "wal-format",
];

/// The modules that still import each other, by crate. The list may only become shorter.
const KNOWN: [(&str, &str); 2] = [
    (
        "repository",
        "config config/cluster config/drill config/file config/http config/keys \
         config/keys/table config/lock config/notify config/repositories config/retention \
         config/url config/walsender encryption epochs expire expire/holding expire/marked \
         expire/plan expire/reach expire/sweep expire/undo known_archive losses losses/record \
         repository store store/bounds store/encrypted store/encrypted/conversion \
         store/encrypted/keys store/encrypted/object store/local store/local/entered \
         store/mirrored store/mirrored/member store/observed store/pinned store/plain \
         store/retry store/s3 store/s3/as_of store/s3/client store/s3/listing store/s3/probe",
    ),
    (
        "restorer",
        "cli cli/opening cli/restore drill drill/amcheck drill/checks drill/server execute \
         execute/bound execute/claims execute/delta execute/extract execute/files \
         execute/manifest execute/owned execute/place execute/recovery execute/settings \
         inventory isolation isolation/configuration isolation/imports isolation/lines list \
         locate locate/changes locate/names locate/read look_ahead plan plan/choice \
         plan/in_doubt plan/left_out plan/lost plan/minimal plan/path plan/refusal plan/stop \
         space start start/interrupt tablespaces unfinished wal_fetch wal_fetch/objects",
    ),
];

/// A module: its path below the crate's root. The root itself is empty.
type Module = Vec<String>;

/// Adds the modules below `directory`, with their text before the tests.
fn read(directory: &Path, above: &[String], modules: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().and_then(|name| name.to_str());
        let name = name.expect("a name").to_owned();
        let module = [above, std::slice::from_ref(&name)].concat();
        if path.is_dir() {
            read(&path, &module, modules);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a file");
            let code = text.split("#[cfg(test)]\nmod tests {").next();
            modules.insert(module, code.unwrap_or_default().to_owned());
        }
    }
}

/// Returns the paths of a `use` tree such as `a::{b, c::{d, e}}`.
fn paths(tree: &str) -> Vec<String> {
    let (before, inside) = match tree.split_once('{') {
        Some((before, inside)) => (before.trim(), inside.strip_suffix('}').unwrap_or(inside)),
        None => return vec![tree.split(" as ").next().unwrap_or(tree).trim().to_owned()],
    };
    let (mut depth, mut part) = (0, String::new());
    let mut found = Vec::new();
    for letter in inside.chars().chain([',']) {
        depth += i32::from(letter == '{') - i32::from(letter == '}');
        if letter == ',' && depth == 0 {
            let inner = std::mem::take(&mut part);
            let inner = paths(inner.trim())
                .into_iter()
                .filter(|one| !one.is_empty());
            found.extend(inner.map(|one| format!("{before}{one}")));
        } else {
            part.push(letter);
        }
    }
    found
}

/// Returns the module that a path names in `module`, if it is one of the crate's.
fn target(path: &str, module: &Module, modules: &BTreeMap<Module, String>) -> Option<Module> {
    let mut at = module.clone();
    let mut words = path.split("::").map(str::trim).peekable();
    match words.peek()? {
        &"crate" => at.clear(),
        &"self" | &"super" => {}
        first => {
            let child = [module.as_slice(), &[(*first).to_owned()]].concat();
            modules.get(&child)?;
        }
    }
    while words
        .next_if(|word| matches!(*word, "crate" | "self"))
        .is_some()
    {}
    while words.next_if_eq(&"super").is_some() {
        at.pop();
    }
    for word in words {
        at.push(word.to_owned());
        if !modules.contains_key(&at) {
            at.pop();
            break;
        }
    }
    (at != *module && !at.is_empty()).then_some(at)
}

fn imports(module: &Module, modules: &BTreeMap<Module, String>) -> BTreeSet<Module> {
    let code = modules[module].lines().map(str::trim);
    let code: Vec<&str> = code.filter(|line| !line.starts_with("//")).collect();
    let code = code.join(" ");
    let mut found = BTreeSet::new();
    for statement in code.split(';') {
        let Some((_, tree)) = statement.rsplit_once("use ") else {
            continue;
        };
        let paths = paths(tree.trim());
        found.extend(
            paths
                .iter()
                .filter_map(|path| target(path, module, modules)),
        );
    }
    found
}

/// Returns the modules that `module` imports, directly or not.
fn reached(module: &Module, edges: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeSet<Module> {
    let (mut seen, mut next) = (BTreeSet::new(), vec![module]);
    while let Some(module) = next.pop() {
        for imported in edges.get(module).into_iter().flatten() {
            if seen.insert(imported.clone()) {
                next.push(imported);
            }
        }
    }
    seen
}

/// Returns the modules that are part of a circle, in alphabetical order.
fn circles(edges: &BTreeMap<Module, BTreeSet<Module>>) -> Vec<String> {
    let modules = edges.keys();
    let in_circle = modules.filter(|one| reached(one, edges).contains(*one));
    in_circle.map(|one| one.join("/")).collect()
}

#[test]
fn no_files_import_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut found = BTreeMap::new();
    for member in MEMBERS {
        let mut modules = BTreeMap::new();
        read(&root.join(member).join("src"), &[], &mut modules);
        modules.retain(|module, _| {
            !module
                .iter()
                .any(|one| one == "tests" || one == "simulation")
        });
        let edges: BTreeMap<Module, BTreeSet<Module>> = modules
            .keys()
            .map(|module| (module.clone(), imports(module, &modules)))
            .collect();
        assert!(
            edges.values().any(|of| !of.is_empty()),
            "{member}: no imports are found"
        );
        found.insert(member, circles(&edges).join(" "));
    }
    found.retain(|_, modules| !modules.is_empty());
    let known: BTreeMap<&str, String> = KNOWN
        .iter()
        .map(|(member, modules)| {
            (
                *member,
                modules.split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect();
    assert_eq!(found, known, "these modules import each other");
}
