//! Checks that every command exists that errors, logs, the page, alerts and documents recommend.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use testbed::programs::ours;

/// Directories and files with texts for users, relative to the root of the workspace.
const TEXTS: [&str; 7] = [
    "archiver/src",
    "archiver/intake/src",
    "monitoring",
    "packaging",
    "README.md",
    "repository",
    "restorer/src",
];

fn root() -> PathBuf {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_root.parent().expect("a workspace").to_owned()
}

fn collect(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder").flatten() {
            collect(&entry.path(), found);
        }
    } else {
        let known = ["rs", "yml", "md", "json", "service", "html", "js", "toml"];
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| known.contains(&ending)) {
            found.push(path.to_owned());
        }
    }
}

/// Returns the help of a command. `None` if there is no such command.
fn help(program: &str, words: &[&str]) -> Option<String> {
    let program = ours(program).expect("it is built");
    let output = Command::new(program).args(words).arg("--help").output();
    let output = output.expect("it runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    output.status.success().then_some(text)
}

/// Returns the problem of a command line, if it has one.
fn problem(program: &str, line: &str) -> Option<String> {
    let is_word = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    let words = line.split_whitespace().take_while(is_word);
    let words: Vec<&str> = words.take_while(|word| !word.starts_with('-')).collect();
    let Some(mut text) = help(program, &words[..words.len().min(1)]) else {
        return Some(format!("there is no `{program} {}`", words[0]));
    };
    if text.contains("\nCommands:\n") && words.len() > 1 {
        match help(program, &words[..2]) {
            Some(help) => text = help,
            None => return Some(format!("there is no `{program} {} {}`", words[0], words[1])),
        }
    }
    let end = |c: char| !(c.is_ascii_lowercase() || c == '-');
    let mut flags = line
        .split_whitespace()
        .filter(|word| word.starts_with("--"));
    let unknown = flags.find(|flag| {
        let flag = flag.split(end).next().unwrap_or_default();
        !text.split(end).any(|known| known == flag)
    });
    unknown.map(|flag| format!("`{program} {}` has no {flag}", words.join(" ")))
}

#[test]
fn every_command_that_is_advised_exists() {
    let mut files = Vec::new();
    for text in TEXTS {
        collect(&root().join(text), &mut files);
    }
    let mut advised: BTreeMap<(&str, String), PathBuf> = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("UTF-8");
        // The rest lists commands that the product does not have.
        let text = text.split("## Not implemented").next();
        let text = text.expect("a beginning").replace("\\\n", " ");
        for program in ["wal-archiver", "pitr-restore"] {
            for (opening, closing) in [("`", '`'), ("<code>", '<')] {
                for advice in text.split(&format!("{opening}{program} ")).skip(1) {
                    let line = advice.split([closing, '{', '\n']).next();
                    let line = line.expect("a beginning").trim().to_owned();
                    advised.entry((program, line)).or_insert(file.clone());
                }
            }
        }
    }
    assert!(advised.len() > 25, "{advised:?}");
    let mut problems = Vec::new();
    for ((program, line), file) in advised {
        if let Some(problem) = problem(program, &line) {
            problems.push(format!("{}: {problem}", file.display()));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}
