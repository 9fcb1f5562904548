//! [`Intervals`]: sets of WAL as half-open ranges. Their number does not grow with the amount of
//! WAL.

use serde::{Deserialize, Serialize};
use wal_format::Lsn;

/// Disjoint ranges in ascending order. Adjacent ranges are merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intervals(Vec<(Lsn, Lsn)>);

impl Intervals {
    /// Adds `[from, to)`.
    pub fn add(&mut self, from: Lsn, to: Lsn) {
        if from >= to {
            return;
        }
        let first = self.0.partition_point(|range| range.1 < from);
        let behind = self.0.partition_point(|range| range.0 <= to);
        let (mut from, mut to) = (from, to);
        if let Some(touched) = self.0.get(first..behind)
            && let (Some(one), Some(last)) = (touched.first(), touched.last())
        {
            from = from.min(one.0);
            to = to.max(last.1);
        }
        self.0.splice(first..behind.max(first), [(from, to)]);
    }

    /// Returns the parts of `[from, to)` that are not in the set.
    #[must_use]
    pub fn missing_in(&self, from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
        let mut missing = Vec::new();
        let mut at = from;
        for (start, end) in &self.0 {
            if *end <= at {
                continue;
            }
            if *start >= to {
                break;
            }
            if *start > at {
                missing.push((at, *start));
            }
            at = at.max(*end);
        }
        if at < to {
            missing.push((at, to));
        }
        missing
    }

    /// Returns true if all of `[from, to)` is in the set.
    #[must_use]
    pub fn covers(&self, from: Lsn, to: Lsn) -> bool {
        self.missing_in(from, to).is_empty()
    }

    /// Returns the end of the range that contains or begins at `lsn`, or `lsn` itself if there is
    /// none.
    #[must_use]
    pub fn end_from(&self, lsn: Lsn) -> Lsn {
        let holds = |range: &&(Lsn, Lsn)| range.0 <= lsn && lsn < range.1;
        self.0.iter().find(holds).map_or(lsn, |range| range.1)
    }

    /// Returns the set without the ranges of `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        for (from, to) in &self.0 {
            for (from, to) in other.missing_in(*from, *to) {
                rest.add(from, to);
            }
        }
        rest
    }

    /// Returns the intersection.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.without(&self.without(other))
    }

    /// Iterates over the ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (Lsn, Lsn)> + '_ {
        self.0.iter().copied()
    }

    /// Returns true if the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(Lsn, Lsn)> for Intervals {
    fn from_iter<T: IntoIterator<Item = (Lsn, Lsn)>>(ranges: T) -> Self {
        let mut all = Self::default();
        for (from, to) in ranges {
            all.add(from, to);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(ranges: &[(u64, u64)]) -> Intervals {
        ranges.iter().map(|(a, b)| (Lsn(*a), Lsn(*b))).collect()
    }

    fn has(set: &Intervals, at: u64) -> bool {
        set.iter().any(|(from, to)| (from..to).contains(&Lsn(at)))
    }

    proptest! {
        #[test]
        fn they_are_the_sets_they_stand_for(
            one in prop::collection::vec((0..40_u64, 0..40_u64), 0..8),
            other in prop::collection::vec((0..40_u64, 0..40_u64), 0..8),
        ) {
            let (a, b) = (of(&one), of(&other));
            let raw = |ranges: &[(u64, u64)], at| ranges.iter().any(|(from, to)| (*from..*to).contains(&at));
            for at in 0..40 {
                prop_assert_eq!(has(&a, at), raw(&one, at));
                prop_assert_eq!(has(&a.without(&b), at), raw(&one, at) && !raw(&other, at));
                prop_assert_eq!(has(&a.and(&b), at), raw(&one, at) && raw(&other, at));
                prop_assert_eq!(a.covers(Lsn(at), Lsn(at + 1)), raw(&one, at));
            }
            let ordered: Vec<_> = a.iter().collect();
            prop_assert!(ordered.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}
