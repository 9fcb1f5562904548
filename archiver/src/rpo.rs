//! The RPO number: the age of the oldest WAL that the primary has flushed and that we do not hold yet.
//!
//! Pure: callers say what was seen and when, by a monotonic clock of this process, so that no clock
//! skew between the primary and this host enters the number. [`Tiers`] compares the primary's flush
//! LSN with what is durable along one path of timelines.
//! Invariant: the number is never less than what is known. Where samples have to be merged to bound
//! memory, the older time wins. An LSN of one timeline is never compared with one of another.

use std::{collections::VecDeque, time::Duration};

use wal_format::{Lsn, TimelineId};

mod tiers;

pub use tiers::{Seen, Tiers};

/// Positions of the primary that one tier remembers. At one sample per second and one per message
/// of the stream this covers minutes exactly. Beyond that, neighbours are merged, which can only
/// make the age greater.
const SAMPLES_MAX: usize = 1024;

/// Time after the last contact with the primary for which its position counts as known. The SQL
/// poll runs once a second.
const CONTACT_FRESH: Duration = Duration::from_secs(5);

/// The distance of one tier from the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// The age of the oldest flushed WAL that the tier does not hold; zero when it holds everything.
    /// While the primary cannot be seen it counts up from the last proof. `None` when nothing was
    /// ever proved.
    pub rpo: Option<Duration>,
    /// The part of `rpo` that is known: the age of WAL that was seen and that the tier does not
    /// hold. While the primary cannot be seen it ends with the last contact, unless that WAL is on
    /// this host and waits for the repository.
    pub proved: Option<Duration>,
    /// Bytes between what the tier holds and the primary's flush LSN. `None` while the primary
    /// cannot be seen, or is on a timeline whose history is not known yet.
    pub lag_bytes: Option<u64>,
    /// True if the primary was seen recently: where it was not, `rpo` is a bound from the last
    /// proof, not a reading.
    pub source_known: bool,
}

/// The estimator of one tier, on one path of timelines.
#[derive(Debug, Default)]
pub struct RpoEstimator {
    /// `(when, flush LSN)` of the primary, both growing, all beyond `durable`.
    uncovered: VecDeque<(Duration, Lsn)>,
    /// When the primary was last seen, and the greatest flush LSN that was seen on the path.
    source: Option<(Duration, Lsn)>,
    /// True if the primary was not seen yet since it took another path.
    unseen_on_path: bool,
    /// The end of what the tier holds; `None` when nothing of the path is known to be held.
    durable: Option<Lsn>,
    /// When the tier was last known to hold everything, before the primary was seen.
    caught_up: Option<Duration>,
    /// Since when the primary is seen on a timeline whose history is not known yet; the newest one
    /// and its flush LSN.
    elsewhere: Option<(Duration, TimelineId, Lsn)>,
    /// Bytes on this host that the tier does not hold yet.
    queued: u64,
    /// The part of them on timelines that the primary has left, and since when it waits.
    orphaned: u64,
    orphaned_since: Option<Duration>,
}

impl RpoEstimator {
    /// Everything that was flushed at `when` was held, as an earlier run of this process knew.
    pub fn was_caught_up(&mut self, when: Duration) {
        self.caught_up = self.caught_up.max(Some(when));
    }

    /// Takes the primary's flush LSN, seen at `now` by the stream or by the SQL poll. A position
    /// behind an earlier one (an answer that arrived late) still proves contact.
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

    /// Takes the flush LSN of a primary that has gone on to a timeline whose history is not known
    /// yet: nothing of it can be held.
    pub fn source_elsewhere(&mut self, now: Duration, timeline: TimelineId, flush_lsn: Lsn) {
        self.elsewhere = Some(match self.elsewhere {
            Some((since, known, lsn)) if known == timeline => (since, timeline, lsn.max(flush_lsn)),
            Some((since, ..)) => (since, timeline, flush_lsn),
            None => (now, timeline, flush_lsn),
        });
        let seen = self.source.map_or(Lsn::ZERO, |(_, seen)| seen);
        self.source = Some((now, seen));
    }

    /// Takes WAL that is on this host, which the primary must have flushed. Proves no contact.
    pub fn flushed_here(&mut self, now: Duration, flushed: Lsn) {
        let since = match self.source {
            None => self.caught_up.unwrap_or(now).min(now),
            Some(_) => now,
        };
        self.expect(since, flushed);
    }

    fn expect(&mut self, since: Duration, lsn: Lsn) {
        let held = self.durable.unwrap_or_default();
        let newest = self.uncovered.back().map_or(held, |(_, lsn)| *lsn);
        if lsn <= newest {
            return;
        }
        if self.uncovered.len() >= SAMPLES_MAX {
            self.merge_neighbours();
        }
        // A position may come with an older time than the ones before it, which then count from it.
        let later = self.uncovered.iter_mut().rev();
        for (when, _) in later.take_while(|(when, _)| *when > since) {
            *when = since;
        }
        self.uncovered.push_back((since, lsn));
    }

    /// Everything on the path before `durable` is held by the tier. May go back when the path
    /// changes.
    pub fn held(&mut self, durable: Lsn) {
        self.durable = Some(durable);
        while self
            .uncovered
            .front()
            .is_some_and(|(_, lsn)| *lsn <= durable)
        {
            self.uncovered.pop_front();
        }
    }

    /// Nothing of the path is known to be held.
    pub fn nothing_held(&mut self) {
        self.durable = None;
    }

    /// The primary took another path, which left the known one at `fork`: WAL beyond is not the
    /// primary's any more. `end_of` says where the path leaves a timeline, if it crosses it.
    pub fn forked(&mut self, fork: Lsn, end_of: impl Fn(TimelineId) -> Option<Lsn>) {
        let since = self.uncovered.iter().find(|(_, lsn)| *lsn > fork);
        let since = since.map(|(since, _)| *since);
        self.uncovered.retain(|(_, lsn)| *lsn <= fork);
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
        // Earlier positions do not count on the new path, unless they were seen there.
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

    /// `queued` bytes on this host wait for the tier, `orphaned` of them on timelines that the
    /// primary has left.
    pub fn waits(&mut self, now: Duration, queued: u64, orphaned: u64) {
        (self.queued, self.orphaned) = (queued, orphaned);
        if orphaned == 0 {
            self.orphaned_since = None;
        } else {
            let since = self.caught_up.unwrap_or(now).min(now);
            self.orphaned_since.get_or_insert(since);
        }
    }

    /// The tier's distance from the primary at `now`.
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
            // Nothing is known of what the primary flushed since: the honest number grows.
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

    /// Halves the samples: each pair becomes the older time with the later position.
    fn merge_neighbours(&mut self) {
        let samples: Vec<_> = self.uncovered.drain(..).collect();
        self.uncovered.extend(samples.chunks(2).filter_map(|pair| {
            let (first, last) = (pair.first()?, pair.last()?);
            Some((first.0, last.1))
        }));
    }
}

#[cfg(test)]
mod tests;
