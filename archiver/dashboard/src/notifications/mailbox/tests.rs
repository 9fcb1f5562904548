use repository::config::{CommonArgs, Settings};
use status::alert::Severity;

use super::*;

fn targets(more: &str) -> Vec<NotifyTarget> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = format!(
        "repository = \"file:///r\"\n[notify.a]\ntype = \"webhook\"\nurl = \"http://x/\"\n{more}"
    );
    std::fs::write(file.path(), text).expect("it is written");
    let args = CommonArgs {
        config: Some(file.path().to_owned()),
        ..CommonArgs::default()
    };
    Settings::resolve(&args).expect("it is valid").notify
}

fn alert(name: &str) -> Alert {
    let rule = alerts::rule(name).expect("an alert");
    Alert {
        name: rule.name,
        severity: rule.severity,
        summary: "it holds".to_owned(),
        runbook: rule.runbook,
        since: at(0),
    }
}

fn at(seconds: i64) -> PgTimestamp {
    PgTimestamp(845_000_000_000_000 + seconds * 1_000_000)
}

/// A mailbox, its targets and its directory.
struct World {
    directory: tempfile::TempDir,
    mailbox: Mailbox,
    targets: Vec<NotifyTarget>,
}

impl World {
    fn new(more: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        Self {
            mailbox: Self::open(directory.path()),
            targets: targets(more),
            directory,
        }
    }

    fn open(directory: &Path) -> Mailbox {
        Mailbox::open("main".parse().expect("a name"), directory)
    }

    /// Writes the state and opens it again, as a restart does.
    fn restart(&mut self) {
        self.mailbox.write();
        self.mailbox = Self::open(self.directory.path());
    }

    fn fires(&self, names: &[&str], second: i64) {
        self.fires_inhibited(names, &[], second);
    }

    fn fires_inhibited(&self, names: &[&str], inhibited: &[&str], second: i64) {
        let firing: Vec<Alert> = names.iter().map(|name| alert(name)).collect();
        let is_inhibited = |name: &str| inhibited.contains(&name);
        self.mailbox
            .reconcile(&self.targets, None, &firing, is_inhibited, at(second));
    }

    /// Delivers everything that is due for receiver `a`. Returns each alert, with `true` if the
    /// notification says that it fires.
    fn delivered(&self, second: i64) -> Vec<(&'static str, bool)> {
        let mut all = Vec::new();
        while let Some(due) = self.mailbox.due("a", at(second)) {
            self.mailbox.attempted("a", &due, true, at(second));
            all.push((due.notification.alert.name, due.notification.fires()));
        }
        all
    }
}

const DOWN: &str = "PitrStreamDown";
const GAP: &str = "PitrGap";
const OVERDUE: &str = "PitrBackupOverdue";

#[test]
fn a_standing_alert_is_not_repeated_after_a_restart_and_its_end_is_sent() {
    let mut world = World::new("");
    world.fires(&[DOWN], 1);
    assert_eq!(world.delivered(1), [(DOWN, true)]);
    world.restart();
    assert_eq!(world.mailbox.standing(), [alert(DOWN)]);
    world.fires(&[DOWN], 60);
    assert_eq!(world.delivered(60), []);
    world.restart();
    world.fires(&[], 61);
    assert_eq!(world.delivered(61), [(DOWN, false)]);
    world.restart();
    world.fires(&[], 62);
    assert_eq!(world.delivered(62), []);
}

#[test]
fn what_was_not_delivered_before_a_restart_is_delivered_after_it() {
    let mut world = World::new("");
    world.fires(&[DOWN], 1);
    let due = world.mailbox.due("a", at(1)).expect("it waits");
    world.mailbox.attempted("a", &due, false, at(2));
    world.restart();
    assert_eq!(world.delivered(3), [(DOWN, true)]);
}

#[test]
fn the_newest_state_wins_and_a_day_ends_the_retries() {
    let world = World::new("");
    world.fires(&[DOWN, GAP], 1);
    let sent = world.mailbox.due("a", at(1)).expect("it waits");
    assert_eq!(sent.notification.alert.name, GAP);
    // The alert ends while its first notification is being sent.
    world.fires(&[DOWN], 2);
    world.mailbox.attempted("a", &sent, true, at(2));
    assert_eq!(world.delivered(3), [(DOWN, true), (GAP, false)]);
    // The alert ends and fires again while the receiver is away. A receiver that was told that it
    // fires gets no new notification.
    world.fires(&[], 4);
    world.fires(&[DOWN], 5);
    assert_eq!(world.delivered(6), []);
    world.fires(&[], 7);
    let day = 86_400;
    let due = world.mailbox.due("a", at(7 + day)).expect("it waits a day");
    world.mailbox.attempted("a", &due, false, at(7 + day));
    assert_eq!(world.delivered(8 + day), []);
}

#[test]
fn a_refused_notification_does_not_hold_up_a_newer_one() {
    let world = World::new("");
    world.fires(&[DOWN], 1);
    let due = world.mailbox.due("a", at(1)).expect("it waits");
    world.mailbox.attempted("a", &due, false, at(1));
    world.fires(&[DOWN, GAP], 2);
    assert_eq!(world.delivered(2), [(GAP, true), (DOWN, true)]);
}

#[test]
fn severities_are_routed_and_reminders_are_sent() {
    let world = World::new("severity = [\"critical\"]\nremind_after = \"4h\"\n");
    world.fires(&[DOWN, OVERDUE], 0);
    assert_eq!(world.delivered(0), [(DOWN, true)]);
    world.fires(&[DOWN, OVERDUE], 4 * 3600 - 1);
    assert_eq!(world.delivered(4 * 3600 - 1), []);
    world.fires(&[DOWN, OVERDUE], 4 * 3600);
    let due = world.mailbox.due("a", at(4 * 3600)).expect("a reminder");
    assert!(due.notification.is_reminder);
    assert_eq!(world.delivered(4 * 3600), [(DOWN, true)]);
    world.fires(&[], 5 * 3600);
    assert_eq!(world.delivered(5 * 3600), [(DOWN, false)]);
    assert_eq!(alert(OVERDUE).severity, Severity::Warning);
}

#[test]
fn an_inhibited_alert_is_sent_when_its_cause_is_over() {
    let world = World::new("");
    let rpo = "PitrRpoOverTarget";
    world.fires_inhibited(&[DOWN, rpo], &[rpo], 0);
    assert_eq!(world.delivered(0), [(DOWN, true)]);
    world.fires(&[rpo], 1);
    let mut sent = world.delivered(1);
    sent.sort_unstable();
    assert_eq!(sent, [(rpo, true), (DOWN, false)]);
}

#[test]
fn a_damaged_record_is_replaced() {
    let mut world = World::new("");
    world.fires(&[DOWN], 1);
    world.mailbox.write();
    let path = world.directory.path().join("notifications.json");
    let mut content = std::fs::read(&path).expect("a record");
    content.truncate(content.len() / 2);
    std::fs::write(&path, content).expect("it is written");
    world.mailbox = World::open(world.directory.path());
    assert_eq!(world.mailbox.standing(), []);
    world.fires(&[DOWN], 2);
    assert_eq!(world.delivered(2), [(DOWN, true)]);
    world.restart();
    assert_eq!(world.mailbox.standing(), [alert(DOWN)]);
}

#[test]
fn the_earliest_window_of_an_archive_is_remembered() {
    let mut world = World::new("");
    assert_eq!(world.mailbox.earliest("one", None), None);
    assert_eq!(world.mailbox.earliest("one", Some(at(5))), Some(at(5)));
    world.restart();
    assert_eq!(world.mailbox.earliest("one", Some(at(9))), Some(at(5)));
    assert_eq!(world.mailbox.earliest("one", None), Some(at(5)));
    assert_eq!(world.mailbox.earliest("other", Some(at(7))), Some(at(7)));
}
