//! Pictures of the page in a browser, at three widths and in both colour schemes, as artefacts of
//! the tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use tempfile::TempDir;

use super::browser::browser_modules;
use crate::support::{Archiver, wait_until};

/// Returns the directory of the pictures, below the target directory.
pub(crate) fn artefacts() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages");
    fs::create_dir_all(&directory).expect("a directory");
    directory
}

/// A browser that takes pictures and checks each page. It ends when dropped.
pub(crate) struct Camera {
    script: Child,
    steps: TempDir,
}

impl Camera {
    /// Starts the browser. `None` if none is installed.
    pub(crate) fn start() -> Option<Self> {
        let modules = browser_modules()?;
        let steps = tempfile::tempdir().expect("a directory");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = Command::new("node")
            .arg(here.join("tests/dashboard/states.mjs"))
            .arg(modules)
            .arg(artefacts())
            .arg(steps.path())
            .spawn()
            .expect("node runs");
        Some(Self { script, steps })
    }

    /// Takes the pictures of a page. Panics if the page has a problem.
    pub(crate) fn shoot(&mut self, name: &str, archiver: &Archiver, path: &str) {
        let name: String = name.split([' ', ',']).filter(|word| !word.is_empty()).fold(
            String::new(),
            |name, word| match name.is_empty() {
                true => word.to_owned(),
                false => format!("{name}-{word}"),
            },
        );
        let file = |end: &str| self.steps.path().join(format!("{name}.{end}"));
        let url = format!("http://{}{path}", archiver.address());
        fs::write(file("new"), url).expect("written");
        repository::durable::rename(&file("new"), &file("asked")).expect("renamed");
        let script = &mut self.script;
        wait_until(&format!("{name} is looked at"), || {
            let ended = script.try_wait().expect("a child");
            assert!(ended.is_none(), "states.mjs ended: {ended:?}");
            file("done").exists()
        });
        let problems = fs::read_to_string(file("done")).expect("an answer");
        fs::remove_file(file("done")).expect("it goes");
        assert!(problems.is_empty(), "{problems}");
    }
}

impl Drop for Camera {
    fn drop(&mut self) {
        drop(self.script.kill());
        drop(self.script.wait());
    }
}
