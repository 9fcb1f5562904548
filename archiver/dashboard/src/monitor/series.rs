//! Time series ([`Series`]), kept across restarts in one file of fixed size.
//!
//! There are three rings: a bucket per second for 15 minutes, per minute for 24 hours, and per half
//! hour for 30 days. A bucket keeps the *maximum*, because a mean would hide a short outage. The
//! file only serves a chart. It is not fsynced, and a slot with a wrong checksum is a hole in the
//! chart.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use serde::Serialize;

/// The recorded metrics, in the order of a slot's values. Another metric needs a new file format.
pub const METRICS: [&str; 8] = [
    "rpo_remote",
    "rpo_local",
    "lag_bytes_remote",
    "received_bytes_per_second",
    "stored_bytes_per_second",
    "upload_queue_bytes",
    "spool_used_bytes",
    "slot_retained_bytes",
];

/// The values of all metrics at one time. An unknown value is NaN.
pub type Sample = [f32; METRICS.len()];

const MAGIC: &[u8; 8] = b"TIDSER01";
/// Seconds per bucket and number of buckets of each ring.
const RINGS: [(u64, usize); 3] = [(1, 900), (60, 1440), (1800, 1440)];
/// The size of a slot: second of the Unix epoch, values, CRC-32.
const SLOT_BYTES: usize = 8 + 4 * METRICS.len() + 4;
/// The maximum number of points in one answer.
pub const POINTS_MAX: usize = 2000;

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The start of the bucket, in seconds of the Unix epoch. 0 for an empty slot.
    second: u64,
    values: Sample,
}

/// A bucket of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The start of the bucket, in seconds of the Unix epoch.
    pub time: u64,
    /// The greatest value in the bucket. `null` if no value is known.
    pub max: Option<f32>,
}

/// The recorded numbers of one cluster.
#[derive(Debug)]
pub struct Series {
    rings: [Vec<Slot>; 3],
    file: Option<File>,
}

impl Series {
    /// Opens the file at `path`, or creates it. Without a file (for example on a full disk) the
    /// series is kept in memory.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let empty = Slot {
            second: 0,
            values: [f32::NAN; METRICS.len()],
        };
        let mut series = Self {
            rings: RINGS.map(|(_, slots)| vec![empty; slots]),
            file: None,
        };
        match series.read(path) {
            Ok(file) => series.file = Some(file),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "numbers over time are kept in memory only");
            }
        }
        series
    }

    fn read(&mut self, path: &Path) -> io::Result<File> {
        let slots: usize = RINGS.iter().map(|(_, slots)| slots).sum();
        let length = MAGIC.len() + slots * SLOT_BYTES;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut content = vec![0; length];
        let known = file.metadata()?.len() == length as u64;
        if known {
            file.read_exact_at(&mut content, 0)?;
        }
        if !known || !content.starts_with(MAGIC) {
            file.set_len(0)?;
            file.set_len(length as u64)?;
            file.write_all_at(MAGIC, 0)?;
            return Ok(file);
        }
        let slots = content[MAGIC.len()..].chunks_exact(SLOT_BYTES);
        for (slot, bytes) in self.rings.iter_mut().flatten().zip(slots) {
            if let Some(read) = decode(bytes) {
                *slot = read;
            }
        }
        Ok(file)
    }

    /// Adds a sample taken at `second` of the Unix epoch.
    pub fn add(&mut self, second: u64, sample: &Sample) {
        let mut before = 0;
        for (ring, (step, slots)) in self.rings.iter_mut().zip(RINGS) {
            let start = second - second % step;
            let at = place(start, step, slots);
            let slot = &mut ring[at];
            if slot.second == start {
                for (known, new) in slot.values.iter_mut().zip(sample) {
                    // `max` of a number and NaN is the number.
                    *known = known.max(*new);
                }
            } else {
                *slot = Slot {
                    second: start,
                    values: *sample,
                };
            }
            if let Some(file) = &self.file {
                let offset = MAGIC.len() + (before + at) * SLOT_BYTES;
                // An error is ignored: it costs one point of a chart, and the next second tries
                // again.
                drop(file.write_all_at(&encode(slot), offset as u64));
            }
            before += slots;
        }
    }

    /// Returns the mean of a metric's known values in the `seconds` before `now`. `None` if no
    /// value is known.
    #[must_use]
    pub fn mean(&self, metric: &str, now: u64, seconds: u64) -> Option<f64> {
        let points = usize::try_from(seconds).ok()?;
        let points = self.query(metric, now.saturating_sub(seconds), now, points)?;
        let known: Vec<f64> = points
            .iter()
            .filter_map(|point| point.max.map(f64::from))
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "at most a few thousand")]
        let count = known.len() as f64;
        (count > 0.0).then(|| known.iter().sum::<f64>() / count)
    }

    /// Returns the maxima of a metric from `from` up to `to`, in at most `points` buckets. `None`
    /// for an unknown metric.
    #[must_use]
    pub fn query(&self, metric: &str, from: u64, to: u64, points: usize) -> Option<Vec<Point>> {
        let column = METRICS.iter().position(|name| *name == metric)?;
        let points = u64::try_from(points.clamp(1, POINTS_MAX)).ok()?;
        let to = to.max(from + 1);
        let span = to - from;
        // Use the finest ring that reaches back far enough.
        let newest = self.newest().max(to);
        let reaches = |(step, slots): (u64, usize)| newest - from <= step * slots as u64;
        let ring = RINGS
            .iter()
            .position(|ring| reaches(*ring))
            .unwrap_or(RINGS.len() - 1);
        let (step, _) = RINGS[ring];
        let width = span.div_ceil(points).div_ceil(step) * step;
        let first = from - from % width;
        let count = usize::try_from((to - first).div_ceil(width))
            .ok()?
            .min(POINTS_MAX + 1);
        let mut buckets: Vec<Point> = (0..count)
            .map(|number| Point {
                time: first + number as u64 * width,
                max: None,
            })
            .collect();
        for slot in &self.rings[ring] {
            if slot.second < first || slot.second >= to {
                continue;
            }
            let value = slot.values[column];
            let at = usize::try_from((slot.second - first) / width).ok()?;
            if let Some(bucket) = buckets.get_mut(at)
                && !value.is_nan()
            {
                bucket.max = Some(bucket.max.map_or(value, |known| known.max(value)));
            }
        }
        Some(buckets)
    }

    /// Returns the greatest value of a metric in the last `seconds` before `now`. `None` if no
    /// value is known.
    #[must_use]
    pub fn greatest(&self, metric: &str, now: u64, seconds: u64) -> Option<f32> {
        let points = self.query(metric, now.saturating_sub(seconds), now + 1, 100)?;
        points
            .into_iter()
            .filter_map(|point| point.max)
            .reduce(f32::max)
    }

    fn newest(&self) -> u64 {
        let seconds = self.rings[0].iter().map(|slot| slot.second);
        seconds.max().unwrap_or_default()
    }
}

fn place(start: u64, step: u64, slots: usize) -> usize {
    usize::try_from(start / step % slots as u64).unwrap_or_default()
}

fn encode(slot: &Slot) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[..8].copy_from_slice(&slot.second.to_le_bytes());
    for (number, value) in slot.values.iter().enumerate() {
        bytes[8 + number * 4..12 + number * 4].copy_from_slice(&value.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[..SLOT_BYTES - 4]);
    bytes[SLOT_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Slot> {
    let (content, sum) = bytes.split_last_chunk::<4>()?;
    let (second, numbers) = content.split_first_chunk::<8>()?;
    if crc32fast::hash(content) != u32::from_le_bytes(*sum) {
        return None;
    }
    let mut values = [f32::NAN; METRICS.len()];
    for (value, bytes) in values.iter_mut().zip(numbers.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
    Some(Slot {
        second: u64::from_le_bytes(*second),
        values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(value: f32) -> Sample {
        let mut sample = [f32::NAN; METRICS.len()];
        sample[0] = value;
        sample
    }

    #[test]
    fn a_bucket_keeps_the_maximum_and_unknown_stays_unknown() {
        let mut series = Series::open(Path::new("/nonexistent/series"));
        for second in 0..600 {
            let value = if second == 300 { 42.0 } else { 1.0 };
            series.add(1_000_000 + second, &sample(value));
        }
        let points = series
            .query("rpo_remote", 1_000_000, 1_000_600, 10)
            .expect("known");
        assert!(points.len() <= 11, "{points:?}");
        let peaks = points
            .iter()
            .filter(|point| point.max == Some(42.0))
            .count();
        assert_eq!(peaks, 1, "{points:?}");
        let other = series
            .query("rpo_local", 1_000_000, 1_000_600, 10)
            .expect("known");
        assert!(other.iter().all(|point| point.max.is_none()));
        assert!(series.query("nonsense", 0, 1, 1).is_none());
        // A query for a day uses the ring of minutes, which still has the peak.
        assert_eq!(series.greatest("rpo_remote", 1_000_600, 86_400), Some(42.0));
    }

    #[test]
    fn it_survives_a_restart_and_a_torn_slot() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("series");
        let mut series = Series::open(&path);
        series.add(5000, &sample(3.0));
        series.add(5001, &sample(4.0));
        drop(series);
        let length = std::fs::metadata(&path).expect("a file").len();
        let at = MAGIC.len() + place(5001, 1, 900) * SLOT_BYTES + 9;
        let file = OpenOptions::new().write(true).open(&path).expect("a file");
        file.write_all_at(&[0xff], at as u64).expect("it is torn");
        let series = Series::open(&path);
        let points = series.query("rpo_remote", 5000, 5002, 10).expect("known");
        assert_eq!(
            points.iter().map(|point| point.max).collect::<Vec<_>>(),
            [Some(3.0), None]
        );
        assert_eq!(std::fs::metadata(&path).expect("a file").len(), length);
    }
}
