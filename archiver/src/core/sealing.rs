//! Decides which segment is sealed next, and which files of the spool are no longer needed.
//!
//! Invariant: a file is removed only when its segment is in the repository and no unsealed segment
//! needs it to find the start of a record.

use std::collections::{BTreeMap, BTreeSet};

use wal_format::{Branch, SegmentNo};

/// A segment of a branch.
pub type Place = (Branch, SegmentNo);

/// The complete segments of the spool.
#[derive(Clone, Debug, Default)]
pub struct Sealing {
    waiting: BTreeSet<Place>,
    under_way: BTreeSet<Place>,
    /// Sealed segments whose files are still in the spool, and the segment in which the record
    /// begins that is incomplete at their end.
    retained: BTreeMap<Place, Option<SegmentNo>>,
}

impl Sealing {
    /// Adds a complete, durable segment. A known one is not added twice.
    pub fn push(&mut self, place: Place) {
        if !self.retained.contains_key(&place) && !self.under_way.contains(&place) {
            self.waiting.insert(place);
        }
    }

    /// Returns the oldest waiting segment, to be sealed now.
    pub fn take(&mut self) -> Option<Place> {
        let place = self.waiting.pop_first()?;
        self.under_way.insert(place);
        Some(place)
    }

    /// Returns a segment whose sealing failed to the queue.
    pub fn give_back(&mut self, place: Place) {
        self.under_way.remove(&place);
        self.waiting.insert(place);
    }

    /// Records that a segment is stored. Returns the files of its branch that are no longer needed.
    /// A file is returned again until [`Sealing::removed`] reports that it is gone.
    pub fn sealed(&mut self, place: Place, open_record_in: Option<SegmentNo>) -> Vec<Place> {
        self.under_way.remove(&place);
        self.retained.insert(place, open_record_in);
        self.removable(place.0)
    }

    /// Records that a segment's file has left the spool.
    pub fn removed(&mut self, place: Place) {
        self.retained.remove(&place);
    }

    /// The number of segments that wait or are being sealed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len() + self.under_way.len()
    }

    /// Returns true if no segment waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the sealed segments of a branch before the one in which the record begins that the
    /// first unsealed segment continues.
    fn removable(&self, branch: Branch) -> Vec<Place> {
        let of_branch = |place: &&Place| place.0 == branch;
        let waiting = self.waiting.iter().find(of_branch);
        let under_way = self.under_way.iter().find(of_branch);
        let after_last = self
            .retained
            .keys()
            .rfind(of_branch)
            .map(|last| (branch, last.1.next()));
        let first_unsealed = [waiting.copied(), under_way.copied(), after_last]
            .into_iter()
            .flatten()
            .min();
        let Some((_, first_unsealed)) = first_unsealed else {
            return Vec::new();
        };
        let open = first_unsealed
            .previous()
            .and_then(|last| self.retained.get(&(branch, last)))
            .copied()
            .flatten();
        let needed = open.unwrap_or(first_unsealed).min(first_unsealed);
        self.retained
            .keys()
            .filter(|place| place.0 == branch && place.1 < needed)
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stays_while_an_unsealed_segment_continues_its_record() {
        let place = |number| (Branch::FIRST, SegmentNo(number));
        let mut sealing = Sealing::default();
        for number in 1..=4 {
            sealing.push(place(number));
            sealing.push(place(number));
        }
        assert_eq!(sealing.len(), 4);
        let begun: Vec<_> = (0..3).filter_map(|_| sealing.take()).collect();
        assert_eq!(begun, [place(1), place(2), place(3)]);
        // The record that is incomplete at the end of 2 began in 1.
        assert_eq!(sealing.sealed(place(2), Some(SegmentNo(1))), []);
        assert_eq!(sealing.sealed(place(1), Some(SegmentNo(1))), []);
        sealing.give_back(place(3));
        assert_eq!(sealing.take(), Some(place(3)));
        assert_eq!(
            sealing.sealed(place(3), None),
            [place(1), place(2), place(3)]
        );
        assert_eq!(sealing.len(), 1);
        // The removal of 2 failed.
        sealing.removed(place(1));
        sealing.removed(place(3));
        assert_eq!(sealing.take(), Some(place(4)));
        assert_eq!(sealing.sealed(place(4), None), [place(2), place(4)]);
    }
}
