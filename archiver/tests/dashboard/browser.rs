//! The page in a real browser: tiles, strip, picker, live update, staleness, dark mode, phone
//! width, keyboard, accessibility.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use wal_format::OutcomeKind;

use super::{archived, camera::artefacts, outcome, record, tls::certificate};
use crate::{
    certificates::private_file,
    present::status,
    support::{Place, succeed, wait_until},
};

/// The directory of the page test's modules, which `benches/tools/install.sh` installs.
pub(super) fn browser_modules() -> Option<PathBuf> {
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/tidemark"));
    let roots = [Some(PathBuf::from("/var/cache/tidemark")), home];
    let modules = roots
        .into_iter()
        .flatten()
        .map(|root| root.join("browser"))
        .find(|root| root.join("node_modules/playwright-core").exists());
    let chromium = [
        "/usr/bin/chromium",
        "/usr/bin/chromium-browser",
        "/usr/bin/google-chrome",
    ];
    let found = modules.filter(|_| chromium.iter().any(|path| Path::new(path).exists()));
    if found.is_none() {
        assert!(
            env::var_os("CI").is_none(),
            "no browser is installed; run `make install-tools`"
        );
        eprintln!("SKIPPED: no browser is installed; run `make install-tools`");
    }
    found
}

#[test]
fn the_page_works_in_a_browser() {
    let Some(modules) = browser_modules() else {
        return;
    };
    let Some((server, place, archiver)) = archived() else {
        return;
    };
    record(&place, &outcome(OutcomeKind::Drill, true));
    // The picker moves by whole seconds, so a commit has to be some seconds before the end of the
    // strip.
    std::thread::sleep(Duration::from_secs(4));
    server.write_wal(50);
    let address = archiver.address();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let steps = tempfile::tempdir().expect("a directory");
    let mut script = Command::new("node")
        .arg(here.join("tests/dashboard/page.mjs"))
        .arg(&modules)
        .arg(format!("http://{address}/"))
        .arg(artefacts())
        .arg(steps.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("node runs");
    let mut archiver = Some(archiver);
    let mut backup = None;
    wait_until("the browser is done", || {
        let asked = |name: &str| {
            let file = |end: &str| steps.path().join(format!("{name}.{end}"));
            (file("asked").exists() && !file("done").exists()).then(|| file("done"))
        };
        if let Some(done) = asked("write") {
            server.write_wal(50);
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("backup") {
            backup = Some(server.slow_backup());
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("backup-end") {
            let told = status(archiver.as_ref().expect("it runs"), &place, &[]);
            assert!(told.contains("streaming database files: "), "{told}");
            assert!(told.contains(" %), "), "{told}");
            drop(backup.take());
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("remove") {
            let names = fs::read_to_string(place.spool().join("main/relations.json"));
            assert!(names.is_ok_and(|names| names.contains("public.orders")));
            server.sql("TRUNCATE drafts");
            // Created and dropped at once, its name cannot be known.
            server.sql("CREATE TABLE brief AS SELECT 1 AS one; DROP TABLE brief");
            server.sql("DROP TABLE orders");
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("stop") {
            archiver.take().expect("it runs").kill();
            fs::write(done, "").expect("written");
        }
        if let Some(done) = asked("start") {
            let again = place.command(&server.conninfo());
            archiver = Some(place.run_at(again, &address));
            fs::write(done, "").expect("written");
        }
        script.try_wait().expect("a child").is_some()
    });
    succeed("page.mjs", &script.wait_with_output().expect("it ended"));
}

/// Logs in and out with the form, over HTTP and HTTPS, under each name of this host. No PostgreSQL
/// is needed: the page is served while the server is away.
#[test]
fn a_person_logs_in_and_out_in_a_browser() {
    const TOKEN: &str = "a-token-that-is-long-enough";
    let Some(modules) = browser_modules() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    private_file(&path("token"), TOKEN);
    certificate(directory.path(), "90");
    let guarded = format!("http_token_file = '{}'\n", path("token").display());
    let with_tls = format!(
        "{guarded}http_tls_certificate = '{}'\nhttp_tls_key = '{}'\n",
        path("http.crt").display(),
        path("http.key").display()
    );
    let (mut running, mut urls) = (Vec::new(), Vec::new());
    for (scheme, text) in [("http", guarded), ("https", with_tls)] {
        let place = Place::new();
        let configuration = path(&format!("{scheme}.toml"));
        fs::write(&configuration, text).expect("a configuration");
        let mut command = place.command("host=127.0.0.1 port=1 user=nobody");
        command.arg("--config").arg(&configuration);
        let archiver = place.run_with(command);
        archiver.wait_for_log("serving HTTP");
        let address = archiver.address();
        let (_, port) = address.split_once(':').expect("a port");
        urls.push(format!("{scheme}://127.0.0.1:{port}/"));
        urls.push(format!("{scheme}://localhost:{port}/"));
        // Dropped in this order: the archiver before its directory.
        running.push((archiver, place));
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("node")
        .arg(here.join("tests/dashboard/login.mjs"))
        .arg(&modules)
        .arg(TOKEN)
        .args(&urls)
        .output();
    succeed("login.mjs", &output.expect("node runs"));
}
