//! [`Stall`]: distinguishes a recovery that makes no progress from a slow one.
//!
//! Invariant: a recovery that writes to its log or uses a processor is never given up.

use std::{
    fs,
    time::{Duration, Instant},
};

/// The unit of processor time in `/proc`: always 100 ticks per second for programs (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;
/// The share of one processor that counts as progress, in percent. Even an idle server wakes up
/// occasionally.
const BUSY_PERCENT: u32 = 1;

/// The state since the last progress.
#[derive(Debug)]
pub(super) struct Stall {
    limit: Duration,
    since: Instant,
    log_bytes: u64,
    processor: Option<Duration>,
}

impl Stall {
    pub(super) fn new(limit: Duration, processor: Option<Duration>, now: Instant) -> Self {
        Self {
            limit,
            since: now,
            log_bytes: 0,
            processor,
        }
    }

    /// Returns the time without progress once it reaches the limit. `processor` is only called
    /// then. It returns the processor time that the server has used, or `None` if that is unknown.
    pub(super) fn observe(
        &mut self,
        log_bytes: u64,
        processor: impl FnOnce() -> Option<Duration>,
        now: Instant,
    ) -> Option<Duration> {
        let passed = now.duration_since(self.since);
        let wrote = log_bytes != self.log_bytes;
        if !wrote && passed < self.limit {
            return None;
        }
        let used = processor();
        let busy = match (used, self.processor) {
            (Some(used), Some(before)) => {
                used.saturating_sub(before) * 100 >= passed * BUSY_PERCENT
            }
            _ => true,
        };
        if !wrote && !busy {
            return Some(passed);
        }
        (self.log_bytes, self.since, self.processor) = (log_bytes, now, used);
        None
    }
}

/// Returns the processor time of a process and of all its descendants, including those that have
/// ended.
pub(super) fn processor_time(pid: u32) -> Option<Duration> {
    let own = of_process(pid)?;
    // A process that has ended meanwhile is counted in its parent.
    let others = descendants(pid).into_iter().filter_map(of_process);
    let ticks = others.fold(own, u64::saturating_add);
    Some(Duration::from_millis(
        ticks.saturating_mul(1000 / TICKS_PER_SECOND),
    ))
}

/// Returns the children of a process, their children, and so on.
pub(super) fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    while let Some(parent) = open.pop() {
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let children = children.unwrap_or_default();
        let children: Vec<u32> = children
            .split_whitespace()
            .filter_map(|child| child.parse().ok())
            .collect();
        found.extend(&children);
        open.extend(children);
    }
    found
}

/// The ticks of a process: `utime`, `stime`, `cutime` and `cstime` of `proc_pid_stat(5)`.
fn of_process(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain blanks and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let times = fields.split_whitespace().skip(11).take(4);
    times.map(|ticks| ticks.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_silence_without_work_is_a_stall() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let used = |millis| move || Some(Duration::from_millis(millis));
        let mut stall = Stall::new(Duration::from_secs(100), Some(Duration::ZERO), began);
        assert_eq!(stall.observe(10, used(0), at(90)), None, "it wrote");
        assert_eq!(stall.observe(10, used(0), at(189)), None, "99 s of silence");
        assert_eq!(stall.observe(10, used(1000), at(190)), None, "1 % of 100 s");
        assert_eq!(stall.observe(10, || None, at(300)), None, "unknown");
        assert_eq!(stall.observe(11, used(0), at(310)), None, "it wrote");
        let silence = Some(Duration::from_secs(100));
        assert_eq!(stall.observe(11, used(900), at(410)), silence);
    }

    #[test]
    fn the_time_of_this_process_grows() {
        let Some(before) = processor_time(std::process::id()) else {
            return;
        };
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        assert!(processor_time(std::process::id()) > Some(before));
    }
}
