//! The fast path of `wal-fetch`: delivers a prefetched segment without parsing the whole command
//! line.
//!
//! Invariant: it either delivers the segment or changes nothing and leaves the request to the full
//! program. It does not handle any flag or number of arguments that it does not know.

use std::{env, ffi::OsString, fs, path::Path};

use crate::ahead::Ahead;

/// The flags that may be present, each with a value.
const FLAGS: [&str; 8] = [
    "--catalog",
    "--cluster",
    "--config",
    "--conninfo",
    "--plan",
    "--repository",
    "--spool",
    "--system",
];

/// Delivers the requested segment if it was prefetched. Returns whether it did.
#[must_use]
pub fn delivered() -> bool {
    try_deliver(env::args_os().skip(1)).unwrap_or(false)
}

fn try_deliver(arguments: impl Iterator<Item = OsString>) -> Option<bool> {
    let (asked, plan) = parse(arguments)?;
    let [command, name, destination] = asked.as_slice() else {
        return None;
    };
    if command != "wal-fetch" {
        return None;
    }
    let (name, destination) = (name.to_str()?, Path::new(destination));
    let ahead = match plan {
        Some(plan) => Ahead::of_plan(&fs::read(plan).ok()?, destination),
        None => Ahead::of_arguments(name, destination),
    };
    Some(ahead?.take(name, destination))
}

/// Splits the command line into positional arguments and the plan. Returns `None` if it contains
/// anything else.
fn parse(
    mut arguments: impl Iterator<Item = OsString>,
) -> Option<(Vec<OsString>, Option<OsString>)> {
    let mut asked = Vec::new();
    let mut plan = None;
    while let Some(argument) = arguments.next() {
        let text = argument.to_str()?;
        if !text.starts_with('-') {
            asked.push(argument);
            continue;
        }
        let (flag, value) = match text.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), OsString::from(value)),
            None => (text.to_owned(), arguments.next()?),
        };
        if !FLAGS.contains(&flag.as_str()) {
            return None;
        }
        if flag == "--plan" {
            plan = Some(value);
        }
    }
    Some((asked, plan))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = OsString> {
        text.split(' ').map(OsString::from)
    }

    #[test]
    fn it_knows_what_it_was_told_or_keeps_out() {
        let (asked, plan) = parse(words("--repository=x wal-fetch --plan p N D --system 7"))
            .expect("nothing is unknown");
        assert_eq!(asked, ["wal-fetch", "N", "D"]);
        assert_eq!(plan, Some("p".into()));
        for unknown in [
            "wal-fetch N D --help",
            "wal-fetch N D --plan",
            "-x wal-fetch N D",
        ] {
            assert_eq!(parse(words(unknown)), None, "{unknown}");
        }
        assert_eq!(try_deliver(words("wal-fetch N")), None);
        assert_eq!(try_deliver(words("list N D")), None);
    }
}
