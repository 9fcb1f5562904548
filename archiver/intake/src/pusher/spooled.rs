//! Compares a pushed segment with the streamed one in the spool, which is durable and will be
//! uploaded.
//!
//! This is the usual case if a server both streams and pushes: PostgreSQL pushes a segment at the
//! moment at which the stream completes it. Decoding, compressing and storing it again would be
//! twice the work for the same bytes. Invariant: only a complete segment counts. Its file gets its
//! final name after it was fsynced.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use wal_format::{SealedHeader, SegmentName};

use super::{Pusher, WalFile, differs};
use crate::{
    error::{Error, Result},
    spool_files::{branch_directory, content_length},
};

/// The time for which a push waits for the end of a segment whose beginning is in the spool.
const PATIENCE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(2);
/// The size of a buffer. Two of them fit into a processor's second-level cache.
const COMPARE_BYTES: usize = 256 << 10;

impl Pusher<'_> {
    /// Returns true if the spool contains the whole segment with the same bytes.
    pub(super) fn is_spooled(
        &self,
        file: &WalFile,
        header: &SealedHeader,
        name: SegmentName,
    ) -> Result<bool> {
        let cluster = self.settings.spool.join(self.settings.name.as_str());
        let directory = branch_directory(&cluster, header.system_identifier, header.branch);
        let (complete, open) = (
            directory.join(name.to_string()),
            directory.join(format!("{name}.partial")),
        );
        let asked = Instant::now();
        let spooled = loop {
            match File::open(&complete) {
                Ok(spooled) => break spooled,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("read", complete)(error)),
            }
            if !is_nearly_whole(&open, header.raw_bytes()) || asked.elapsed() > PATIENCE {
                return Ok(false);
            }
            thread::sleep(POLL);
        };
        let length = spooled
            .metadata()
            .map_err(Error::io("stat", &complete))?
            .len();
        if length != header.raw_bytes() {
            return Ok(false);
        }
        let beside = Beside {
            file,
            spooled: &spooled,
            spooled_path: &complete,
        };
        // PostgreSQL waits, so compare both halves at the same time.
        let half = length / 2;
        let differing = thread::scope(|scope| {
            let second = scope.spawn(|| beside.first_difference(half, length));
            let first = beside.first_difference(0, half);
            let second = second.join().unwrap_or_else(|_| {
                Err(Error::ThreadStopped {
                    name: "compare",
                    reason: "it panicked".to_owned(),
                })
            });
            first.and_then(|first| Ok(first.or(second?)))
        })?;
        match differing {
            Some(index) => Err(differs(
                file,
                Error::Divergence {
                    branch: header.branch,
                    lsn: header.start_lsn.add(index),
                    from: "the pushed file",
                    ours: complete.display().to_string(),
                },
            )),
            None => Ok(true),
        }
    }
}

/// A pushed file and the same segment in the spool.
struct Beside<'a> {
    file: &'a WalFile,
    spooled: &'a File,
    spooled_path: &'a Path,
}

impl Beside<'_> {
    /// Returns the offset of the first byte in `[from, to)` in which they differ.
    fn first_difference(&self, from: u64, to: u64) -> Result<Option<u64>> {
        let (mut ours, mut theirs) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
        let mut offset = from;
        while offset < to {
            let count = usize::try_from(to - offset).unwrap_or(COMPARE_BYTES);
            let count = count.min(COMPARE_BYTES);
            let (ours, theirs) = (&mut ours[..count], &mut theirs[..count]);
            self.file.read_at(ours, offset)?;
            let read = self.spooled.read_exact_at(theirs, offset);
            read.map_err(Error::io("read", self.spooled_path))?;
            // Compare whole buffers first. The byte-by-byte search is slow and needed only if they
            // differ.
            if ours != theirs
                && let Some(index) = ours.iter().zip(&*theirs).position(|(new, old)| new != old)
            {
                return Ok(Some(offset + index as u64));
            }
            offset += count as u64;
        }
        Ok(None)
    }
}

/// Returns true if the stream has written more than 7/8 of the segment. Preallocated zeros do not
/// count.
fn is_nearly_whole(open: &Path, length: u64) -> bool {
    File::open(open)
        .and_then(|open| content_length(&open))
        .is_ok_and(|content| content > length / 8 * 7)
}
