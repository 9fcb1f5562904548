//! The RPO: the age of the oldest WAL that the primary has flushed and that we do not hold yet.
//!
//! Pure: callers pass what was seen and when, by a monotonic clock of this process, so that no
//! clock skew between the primary and this host affects the RPO. [`tiers`] compares the primary's
//! flush LSN with what is durable along one path of timelines.
//! Invariant: the RPO is never less than what is known. Where samples have to be merged to bound
//! memory, the older time wins. An LSN of one timeline is never compared with an LSN of another.

use std::{collections::VecDeque, time::Duration};

use wal_format::{Lsn, TimelineId};

pub mod tiers;

/// The number of the primary's positions that one tier remembers. At one sample per second and one
/// per message of the stream, this covers minutes exactly. Beyond that, neighbours are merged,
/// which can only make the age greater. The samples of held WAL are bounded in the same way.
const SAMPLES_MAX: usize = 1024;

/// Times and flush LSNs of the primary. Both grow.
type Samples = VecDeque<(Duration, Lsn)>;

/// The time after the last contact with the primary for which its position counts as known. The SQL
/// poll runs once a second.
const CONTACT_FRESH: Duration = Duration::from_secs(5);

/// The distance of one tier from the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// The age of the oldest flushed WAL that the tier does not hold. Zero if it holds everything.
    /// While the primary cannot be seen, it counts up from the last proof. `None` if nothing was
    /// ever proved.
    pub rpo: Option<Duration>,
    /// The part of `rpo` that is known: the age of WAL that was seen and that the tier does not
    /// hold. While the primary cannot be seen, it stops at the last contact, unless that WAL is on
    /// this host and waits for the repository.
    pub proved: Option<Duration>,
    /// The bytes between the end of the tier and the primary's flush LSN. `None` while the primary
    /// cannot be seen, or is on a timeline whose history is not known yet.
    pub lag_bytes: Option<u64>,
    /// True if the primary was seen recently. If not, `rpo` is an upper bound from the last proof,
    /// not a measurement.
    pub source_known: bool,
}

/// The estimator of one tier, on one path of timelines.
#[derive(Debug, Default)]
pub struct RpoEstimator {
    /// The samples after `durable`.
    uncovered: Samples,
    /// The samples before them. Their WAL is held, until the repository loses a part of it.
    covered: Samples,
    /// The time at which the primary was last seen, and the greatest flush LSN seen on the path.
    source: Option<(Duration, Lsn)>,
    /// True if the primary was not seen since it took another path.
    unseen_on_path: bool,
    /// The end of the WAL that the tier holds. `None` if no WAL of the path is known to be held.
    durable: Option<Lsn>,
    /// The last time, before the primary was seen, at which the tier was known to hold everything.
    caught_up: Option<Duration>,
    /// Set while the primary is on a timeline whose history is not known yet: the time since which,
    /// the newest such timeline, and its flush LSN.
    elsewhere: Option<(Duration, TimelineId, Lsn)>,
    /// The number of bytes on this host that the tier does not hold yet.
    queued: u64,
    /// The part of `queued` that is on timelines which the primary has left, and the time since
    /// which it waits.
    orphaned: u64,
    orphaned_since: Option<Duration>,
}

impl RpoEstimator {
    /// Records that an earlier run knew everything flushed at `when` to be held.
    pub fn was_caught_up(&mut self, when: Duration) {
        self.caught_up = self.caught_up.max(Some(when));
    }

    /// Records the primary's flush LSN, seen at `now` by the stream or by the SQL poll. A position
    /// before an earlier one (from an answer that arrived late) still proves contact.
    pub fn source_seen(&mut self, now: Duration, flush_lsn: Lsn) {
        // WAL found at the first contact may be as old as the last proof of an earlier run.
        let since = match self.source {
            None => self.caught_up.unwrap_or(now).min(now),
            Some(_) => now,
        };
        let greatest = self
            .source
            .map_or(flush_lsn, |(_, seen)| seen.max(flush_lsn));
        self.source = Some((now, greatest));
        self.unseen_on_path = false;
        self.expect(since, flush_lsn);
    }

    /// Records the flush LSN of a primary on a timeline whose history is not known yet, so that
    /// none of its WAL can be held.
    pub fn source_elsewhere(&mut self, now: Duration, timeline: TimelineId, flush_lsn: Lsn) {
        self.elsewhere = Some(match self.elsewhere {
            Some((since, known, lsn)) if known == timeline => (since, timeline, lsn.max(flush_lsn)),
            Some((since, ..)) => (since, timeline, flush_lsn),
            None => (now, timeline, flush_lsn),
        });
        let seen = self.source.map_or(Lsn::ZERO, |(_, seen)| seen);
        self.source = Some((now, seen));
    }

    /// Records WAL on this host, which the primary must have flushed. It does not prove contact.
    pub fn flushed_here(&mut self, now: Duration, flushed: Lsn) {
        let since = match self.source {
            None => self.caught_up.unwrap_or(now).min(now),
            Some(_) => now,
        };
        self.expect(since, flushed);
    }

    /// Adds a sample. The samples keep the time at which an LSN was first seen.
    fn expect(&mut self, mut since: Duration, lsn: Lsn) {
        let last = |samples: &Samples| samples.back().map(|(_, lsn)| *lsn);
        if last(&self.uncovered) >= Some(lsn) {
            return;
        }
        let is_held = self.durable >= Some(lsn);
        if is_held && last(&self.covered) >= Some(lsn) {
            return;
        }
        if !is_held && self.uncovered.is_empty() {
            // Without a known end, an LSN may be seen again that was held before.
            while let Some((when, _)) = self.covered.pop_back_if(|(_, known)| *known >= lsn) {
                since = since.min(when);
            }
        }
        // A position may have an older time than the ones before it. Their age then counts from
        // that time.
        let later = self.covered.iter_mut().chain(&mut self.uncovered).rev();
        for (when, _) in later.take_while(|(when, _)| *when > since) {
            *when = since;
        }
        let samples = match is_held {
            true => &mut self.covered,
            false => &mut self.uncovered,
        };
        samples.push_back((since, lsn));
        self.bound();
    }

    /// Records that the tier holds everything on the path before `durable`. May decrease when the
    /// path changes, or when the tier has lost WAL: the age then counts from the time at which the
    /// lost WAL was first seen.
    pub fn held(&mut self, durable: Lsn) {
        self.durable = Some(durable);
        while let Some(lost) = self.covered.pop_back_if(|(_, lsn)| *lsn > durable) {
            self.uncovered.push_front(lost);
        }
        while let Some(held) = self.uncovered.pop_front_if(|(_, lsn)| *lsn <= durable) {
            self.covered.push_back(held);
        }
        self.bound();
    }

    /// Records that no WAL of the path is known to be held.
    pub fn nothing_held(&mut self) {
        self.durable = None;
    }

    /// Records that the primary took another path, which left the known one at `fork`: WAL after
    /// `fork` is not the primary's any more. `end_of` returns the LSN at which the new path leaves
    /// a timeline. It returns `None` if the path does not contain the timeline.
    pub fn forked(&mut self, fork: Lsn, end_of: impl Fn(TimelineId) -> Option<Lsn>) {
        let since = self.uncovered.iter().find(|(_, lsn)| *lsn > fork);
        let since = since.map(|(since, _)| *since);
        self.uncovered.retain(|(_, lsn)| *lsn <= fork);
        // The first sample after the fork also covers WAL before it.
        if let Some(after) = self.covered.iter_mut().find(|(_, lsn)| *lsn > fork) {
            after.1 = fork;
        }
        self.covered.retain(|(_, lsn)| *lsn <= fork);
        if let Some(since) = since {
            let known = self.orphaned_since.unwrap_or(since);
            self.orphaned_since = Some(known.min(since));
            if self.uncovered.back().is_none_or(|(_, lsn)| *lsn < fork) {
                self.expect(since, fork);
            }
        }
        self.durable = self.durable.map(|durable| durable.min(fork));
        if let Some((_, seen)) = &mut self.source {
            *seen = (*seen).min(fork);
        }
        // Earlier positions do not count on the new path, unless they were seen on it.
        self.unseen_on_path = self.elsewhere.is_none();
        if let Some((since, timeline, lsn)) = self.elsewhere
            && let Some(end) = end_of(timeline)
        {
            self.elsewhere = None;
            self.expect(since, lsn.min(end));
            if let Some((_, seen)) = &mut self.source {
                *seen = (*seen).max(lsn.min(end));
            }
        }
    }

    /// The greatest flush LSN of the primary that was seen on the path.
    #[must_use]
    pub fn source_lsn(&self) -> Option<Lsn> {
        let elsewhere = self.elsewhere.map(|(.., lsn)| lsn);
        elsewhere.or(self.source.map(|(_, lsn)| lsn))
    }

    /// Records that `queued` bytes on this host wait for the tier, `orphaned` of them on timelines
    /// that the primary has left.
    pub fn waits(&mut self, now: Duration, queued: u64, orphaned: u64) {
        (self.queued, self.orphaned) = (queued, orphaned);
        if orphaned == 0 {
            self.orphaned_since = None;
        } else {
            let since = self.caught_up.unwrap_or(now).min(now);
            self.orphaned_since.get_or_insert(since);
        }
    }

    /// Returns the tier's distance from the primary at `now`.
    #[must_use]
    pub fn exposure(&self, now: Duration) -> Exposure {
        let oldest = self.uncovered.front().map(|(since, _)| *since);
        let elsewhere = self.elsewhere.map(|(since, ..)| since);
        let orphans = self.orphaned_since.filter(|_| self.orphaned > 0);
        let behind = [oldest, elsewhere, orphans].into_iter().flatten().min();
        let age = |since: Duration| now.saturating_sub(since);
        let Some((last_contact, flush_lsn)) = self.source else {
            let since = behind.into_iter().chain(self.caught_up).min();
            return Exposure {
                rpo: since.map(age),
                proved: behind.filter(|_| self.queued > 0).map(age),
                lag_bytes: None,
                source_known: false,
            };
        };
        let unseen_for = age(last_contact);
        let source_known = unseen_for <= CONTACT_FRESH && !self.unseen_on_path;
        let rpo = match behind {
            Some(since) => age(since),
            None if source_known => Duration::ZERO,
            // It is unknown what the primary has flushed since, so the age grows.
            None => unseen_for,
        };
        let is_counted = source_known || self.queued > 0;
        let until = if is_counted { now } else { last_contact };
        let lag = self.durable.filter(|_| self.elsewhere.is_none());
        let lag = lag.map(|durable| {
            let newest = self.uncovered.back().map_or(flush_lsn, |(_, lsn)| *lsn);
            let on_path = newest.max(flush_lsn).bytes_since(durable);
            on_path.saturating_add(self.orphaned).max(self.queued)
        });
        Exposure {
            rpo: Some(rpo),
            proved: behind.map(|since| until.saturating_sub(since)),
            lag_bytes: lag.filter(|_| source_known),
            source_known,
        }
    }

    /// Merges samples where there are too many.
    fn bound(&mut self) {
        for samples in [&mut self.uncovered, &mut self.covered] {
            if samples.len() > SAMPLES_MAX {
                merge_neighbours(samples);
            }
        }
    }
}

/// Halves the samples: each pair becomes the older time with the later position.
fn merge_neighbours(samples: &mut Samples) {
    let all: Vec<_> = samples.drain(..).collect();
    samples.extend(all.chunks(2).filter_map(|pair| {
        let (first, last) = (pair.first()?, pair.last()?);
        Some((first.0, last.1))
    }));
}

#[cfg(test)]
mod tests;
