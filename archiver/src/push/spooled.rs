//! A pushed segment beside the one that the stream brought: compared with the spool's file, which is durable and on its way.
//!
//! The usual case where a server both streams and pushes: PostgreSQL pushes a segment at the instant at which the stream
//! completes it. Decoding, compressing and storing it once more would be twice the work for the same bytes.
//! Invariant: only a complete segment counts; its file is renamed when it was fsynced.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use wal_format::{SealedHeader, SegmentName};

use super::{Pusher, READ_BYTES, WalFile, differs};
use crate::{
    error::{Error, Result},
    spool::branch_directory,
};

/// How long the end of a segment may be on its way when its beginning is here.
const PATIENCE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(2);

impl Pusher<'_> {
    /// Whether the spool holds the whole segment, with the same bytes.
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
        let mut theirs = vec![0; READ_BYTES];
        let mut offset = 0;
        file.pieces(length, |ours| {
            let theirs = theirs.get_mut(..ours.len()).unwrap_or_default();
            let read = spooled.read_exact_at(theirs, offset);
            read.map_err(Error::io("read", &complete))?;
            // The whole first: looking for the place byte by byte is for the day when they differ.
            if ours != theirs
                && let Some(index) = ours.iter().zip(&*theirs).position(|(new, old)| new != old)
            {
                let divergence = Error::Divergence {
                    branch: header.branch,
                    lsn: header.start_lsn.add(offset + index as u64),
                    from: "the pushed file",
                    ours: complete.display().to_string(),
                };
                return Err(differs(file, divergence));
            }
            offset += ours.len() as u64;
            Ok(())
        })?;
        Ok(true)
    }
}

/// Whether the stream has the segment but for its last moments.
fn is_nearly_whole(open: &Path, length: u64) -> bool {
    fs::metadata(open).is_ok_and(|metadata| metadata.len() > length / 8 * 7)
}
