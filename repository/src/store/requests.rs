//! Counts the requests to a bucket as its operator counts them: each attempt, page and part is a
//! request.
//!
//! A [`RequestMeter`] belongs to a place in the configuration. Every store that is opened for this
//! place uses the same meter, so a new connection does not reset the counts. Folders cost nothing
//! and are not counted.

use std::{
    collections::VecDeque,
    fmt,
    ops::AddAssign,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

const MINUTE: Duration = Duration::from_secs(60);
/// The length of `last_hour`, in minutes.
const MINUTES: u64 = 60;

/// The kinds of requests, grouped by their price.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Deletes an object or aborts an upload.
    Delete,
    /// Reads an object or a part of one.
    Get,
    /// Reads an object's metadata.
    Head,
    /// Reads one page of a listing.
    List,
    /// Stores an object. The start, each part and the completion of a multipart upload also count.
    Put,
}

/// Numbers of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RequestCounts {
    /// Objects stored, and parts of large ones.
    pub put: u64,
    /// Objects and ranges read.
    pub get: u64,
    /// Metadata reads.
    pub head: u64,
    /// Pages of listings.
    pub list: u64,
    /// Objects deleted.
    pub delete: u64,
}

impl RequestCounts {
    fn count(&mut self, kind: RequestKind) {
        let count = match kind {
            RequestKind::Delete => &mut self.delete,
            RequestKind::Get => &mut self.get,
            RequestKind::Head => &mut self.head,
            RequestKind::List => &mut self.list,
            RequestKind::Put => &mut self.put,
        };
        *count += 1;
    }

    /// Returns the counts with their names.
    #[must_use]
    pub fn each(&self) -> [(&'static str, u64); 5] {
        [
            ("put", self.put),
            ("get", self.get),
            ("head", self.head),
            ("list", self.list),
            ("delete", self.delete),
        ]
    }
}

impl AddAssign for RequestCounts {
    fn add_assign(&mut self, other: Self) {
        self.put += other.put;
        self.get += other.get;
        self.head += other.head;
        self.list += other.list;
        self.delete += other.delete;
    }
}

impl fmt::Display for RequestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, count)) in self.each().into_iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{count} {name}")?;
        }
        Ok(())
    }
}

/// The requests to one place, or to several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RequestReport {
    /// Since the program started.
    pub total: RequestCounts,
    /// In the last hour, or since the start if that is more recent.
    pub last_hour: RequestCounts,
    /// Seconds since counting began.
    pub seconds: u64,
}

impl AddAssign for RequestReport {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.last_hour += other.last_hour;
        self.seconds = self.seconds.max(other.seconds);
    }
}

/// A counter of the requests to one place. Clones share the same numbers.
#[derive(Clone)]
pub struct RequestMeter {
    since: Instant,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    total: RequestCounts,
    /// The last hour by minutes since the start, oldest first. Minutes without a request have no
    /// entry.
    minutes: VecDeque<(u64, RequestCounts)>,
}

impl RequestMeter {
    /// Counts one request.
    pub fn count(&self, kind: RequestKind) {
        self.count_at(kind, self.since.elapsed());
    }

    fn count_at(&self, kind: RequestKind, after: Duration) {
        let minute = after.as_secs() / MINUTE.as_secs();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total.count(kind);
        if counts.minutes.back().is_none_or(|(last, _)| *last < minute) {
            counts.minutes.push_back((minute, RequestCounts::default()));
            if counts.minutes.len() as u64 > MINUTES {
                counts.minutes.pop_front();
            }
        }
        if let Some((_, last)) = counts.minutes.back_mut() {
            last.count(kind);
        }
    }

    /// Returns the current numbers.
    #[must_use]
    pub fn report(&self) -> RequestReport {
        self.report_at(self.since.elapsed())
    }

    fn report_at(&self, after: Duration) -> RequestReport {
        let now = after.as_secs() / MINUTE.as_secs();
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last_hour = RequestCounts::default();
        for (minute, counted) in &counts.minutes {
            if minute + MINUTES > now {
                last_hour += *counted;
            }
        }
        RequestReport {
            total: counts.total,
            last_hour,
            seconds: after.as_secs(),
        }
    }
}

impl Default for RequestMeter {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            counts: Arc::default(),
        }
    }
}

impl fmt::Debug for RequestMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.report().total)
    }
}

/// Counts do not affect whether two places are equal.
impl PartialEq for RequestMeter {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for RequestMeter {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_is_the_last_hour_and_the_total_is_everything() {
        let meter = RequestMeter::default();
        let at = Duration::from_secs;
        meter.count_at(RequestKind::Put, at(10));
        meter.count_at(RequestKind::Put, at(1800));
        let same = meter.clone();
        same.count_at(RequestKind::Get, at(3000));
        let report = meter.report_at(at(3000));
        assert_eq!(
            (report.last_hour, report.total),
            (report.total, report.total)
        );
        assert_eq!(report.total.put, 2);
        let later = meter.report_at(at(4000));
        assert_eq!((later.last_hour.put, later.last_hour.get), (1, 1));
        assert_eq!(later.total, report.total);
        let idle = meter.report_at(at(20_000));
        assert_eq!(idle.last_hour, RequestCounts::default());
        assert_eq!(
            idle.total.to_string(),
            "2 put, 1 get, 0 head, 0 list, 0 delete"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let meter = RequestMeter::default();
        for minute in 0..500 {
            meter.count_at(RequestKind::List, MINUTE * minute);
        }
        let report = meter.report_at(MINUTE * 499);
        assert_eq!((report.total.list, report.last_hour.list), (500, 60));
        assert_eq!(meter.counts.lock().expect("no panic").minutes.len(), 60);
    }
}
