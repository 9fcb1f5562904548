//! [`Watched`]: a running program and its resource usage: wall time, processor time, peak memory.
//!
//! Read from `/proc` while it runs: a zombie still has its times, but no longer its memory.

use std::{
    fs,
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// `USER_HZ` on Linux: the unit of times in `/proc/PID/stat`.
const TICKS_PER_SECOND: f64 = 100.0;
const POLL: Duration = Duration::from_millis(5);

/// The resource usage of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// User and system time of all threads in seconds.
    pub cpu_seconds: f64,
    /// `VmHWM`: the peak resident memory in KiB.
    pub peak_kib: u64,
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Watched {
    child: Child,
    began: Instant,
    usage: Usage,
}

impl Watched {
    /// Watches a program from its start.
    #[must_use]
    pub fn new(child: Child) -> Self {
        Self {
            child,
            began: Instant::now(),
            usage: Usage::default(),
        }
    }

    /// Seconds since the program's start.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// The usage so far.
    #[must_use]
    pub fn usage(&mut self) -> Usage {
        let id = self.child.id();
        if let Some(ticks) = fs::read_to_string(format!("/proc/{id}/stat"))
            .ok()
            .as_deref()
            .and_then(cpu_ticks)
        {
            self.usage.cpu_seconds = ticks / TICKS_PER_SECOND;
        }
        if let Some(kib) = fs::read_to_string(format!("/proc/{id}/status"))
            .ok()
            .as_deref()
            .and_then(peak_kib)
        {
            self.usage.peak_kib = self.usage.peak_kib.max(kib);
        }
        self.usage
    }

    /// Waits until `done` returns true, and measures the program meanwhile.
    ///
    /// # Errors
    /// When the program ends first, or after `patience`.
    pub fn until(
        &mut self,
        patience: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<f64> {
        loop {
            if done()? {
                let seconds = self.seconds();
                let _read = self.usage();
                return Ok(seconds);
            }
            let _read = self.usage();
            if let Some(status) = self.child.try_wait()? {
                bail!("the program ended early: {status}");
            }
            if self.began.elapsed() > patience {
                bail!("the program did not get there in {patience:?}");
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until the program ends successfully.
    ///
    /// # Errors
    /// When it fails.
    pub fn end(mut self) -> Result<(f64, Usage)> {
        let stat = format!("/proc/{}/stat", self.child.id());
        loop {
            let _read = self.usage();
            let text = fs::read_to_string(&stat).context("the program's state")?;
            // A zombie still has its times.
            if state(&text) == Some('Z') {
                let seconds = self.seconds();
                let usage = self.usage();
                let status = self.child.wait()?;
                if !status.success() {
                    bail!("the program ended with {status}");
                }
                return Ok((seconds, usage));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Terminates it and waits.
    ///
    /// # Errors
    /// When it fails.
    pub fn terminate(self) -> Result<Usage> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        Ok(self.end()?.1)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _gone = self.child.kill();
            let _gone = self.child.wait();
        }
    }
}

/// Returns the fields after the program's name, which may contain spaces.
fn fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

fn state(stat: &str) -> Option<char> {
    fields(stat)?.next()?.chars().next()
}

/// `utime` + `stime`, the 14th and 15th field of `/proc/PID/stat` (`proc_pid_stat(5)`).
fn cpu_ticks(stat: &str) -> Option<f64> {
    let mut fields = fields(stat)?.skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(f64::from(user) + f64::from(system))
}

fn peak_kib(status: &str) -> Option<u64> {
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_works_is_seen_to_use_the_processor() {
        let child = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"])
            .spawn()
            .expect("a shell");
        let (_, usage) = Watched::new(child).end().expect("it succeeds");
        assert!(usage.cpu_seconds > 0.0, "{usage:?}");
        assert!(usage.peak_kib > 100, "{usage:?}");
    }

    #[test]
    fn a_name_with_blanks_does_not_shift_the_fields() {
        let stat = "7 (a b) c) R 1 7 7 0 -1 4194304 92 0 0 0 12 30 0 0 20";
        assert_eq!(cpu_ticks(stat), Some(42.0));
        assert_eq!(state(stat), Some('R'));
    }
}
