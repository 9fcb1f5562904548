//! [`Progress`]: reports the progress of a recovery: replayed LSN, rate and remaining time, or what
//! it waits for.
//!
//! Invariant: at least one report every [`SILENCE_MAX`].

use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use wal_format::Lsn;

use super::log::Events;

/// The longest time without a report.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The progress of one recovery.
pub(super) struct Progress<'a> {
    tell: &'a dyn Fn(&str),
    bar: ProgressBar,
    from: Lsn,
    to: Option<Lsn>,
    began: Instant,
    reported: Instant,
    /// The replayed LSN of the last report.
    before: Option<Lsn>,
}

impl<'a> Progress<'a> {
    /// Creates the report of a recovery from the redo LSN `from` to the stop, if it is known. Shows
    /// a bar on a terminal.
    pub(super) fn new(
        from: Lsn,
        to: Option<Lsn>,
        terminal: bool,
        tell: &'a dyn Fn(&str),
        now: Instant,
    ) -> Self {
        let bar = match to {
            Some(to) if terminal => ProgressBar::new(to.0.saturating_sub(from.0)),
            _ => ProgressBar::hidden(),
        };
        let style = ProgressStyle::with_template(
            "replaying  {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} left, at {msg}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            tell,
            bar,
            from,
            to,
            began: now,
            reported: now,
            before: None,
        }
    }

    /// Reports if the last report is [`SILENCE_MAX`] old.
    pub(super) fn observe(&mut self, seen: &Events, now: Instant) {
        if let Some(replayed) = seen.replayed {
            self.bar
                .set_position(replayed.0.saturating_sub(self.from.0));
            self.bar.set_message(replayed.to_string());
        }
        if now.duration_since(self.reported) < SILENCE_MAX {
            return;
        }
        self.reported = now;
        let elapsed = now.duration_since(self.began);
        let moved = seen.replayed.is_some() && seen.replayed != self.before;
        self.before = seen.replayed;
        let said = match seen.replayed {
            Some(replayed) if moved => self.rate(replayed, elapsed),
            _ => format!(
                "waited {} s; PostgreSQL {}; its last message: {}",
                elapsed.as_secs(),
                waits_for(seen),
                seen.last.as_deref().unwrap_or("none yet")
            ),
        };
        self.bar.suspend(|| (self.tell)(&said));
    }

    fn rate(&self, replayed: Lsn, elapsed: Duration) -> String {
        let done = replayed.0.saturating_sub(self.from.0);
        let per_second = done
            .checked_div(elapsed.as_secs().max(1))
            .unwrap_or_default();
        let mut said = format!("replayed up to {replayed}");
        if let Some(to) = self.to {
            said.push_str(&format!(" of {to}"));
        }
        said.push_str(&format!(", {}/s", HumanBytes(per_second)));
        if let Some(to) = self.to
            && let Some(left) = to.0.saturating_sub(replayed.0).checked_div(per_second)
        {
            said.push_str(&format!(", about {left} s left"));
        }
        said
    }

    /// Removes the bar.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// Returns what PostgreSQL does or waits for, according to its log.
pub(super) fn waits_for(seen: &Events) -> String {
    if seen.complete {
        return "writes the checkpoint at the end of recovery".to_owned();
    }
    if seen.stopping.is_some() {
        return "has reached the target and ends the recovery".to_owned();
    }
    match (&seen.delivered, &seen.last) {
        (Some(name), _) => {
            format!("replays {name}, or waits for restore_command to deliver the segment after it")
        }
        (None, Some(_)) => {
            "waits for restore_command to deliver its first segment, or reads the data directory"
                .to_owned()
        }
        (None, None) => "has written nothing to its log".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn every_ten_seconds_it_says_how_far_it_is_or_what_it_waits_for() {
        let told = RefCell::new(Vec::new());
        let tell = |text: &str| told.borrow_mut().push(text.to_owned());
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let to = Some(Lsn(0x500_0000));
        let mut progress = Progress::new(Lsn(0x100_0000), to, false, &tell, began);
        let mut seen = Events::default();
        progress.observe(&seen, at(9));
        assert!(told.borrow().is_empty());
        progress.observe(&seen, at(10));
        progress.observe(&seen, at(15));
        seen.replayed = Some(Lsn(0x300_0000));
        seen.last = Some("restored log file".to_owned());
        progress.observe(&seen, at(20));
        seen.complete = true;
        progress.observe(&seen, at(30));
        let told = told.borrow();
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(
            told[0].starts_with("waited 10 s; PostgreSQL has written nothing"),
            "{told:?}"
        );
        assert_eq!(
            told[1],
            "replayed up to 0/3000000 of 0/5000000, 1.60 MiB/s, about 20 s left"
        );
        assert!(
            told[2].contains("writes the checkpoint at the end of recovery"),
            "{told:?}"
        );
    }
}
