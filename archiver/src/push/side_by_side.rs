//! One segment on several processors: while one thread checks its records, another compresses; then both compress.
//!
//! For a push that works alone, where PostgreSQL waits. The daemon works on several segments at once instead.
//! Invariant: what is handed on was checked to its last record.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use wal_format::{
    FrameCompressor, SealedHeader, SealedWriter,
    sealed::{EncodedFrame, FRAME_BYTES, SealedError},
};

use super::{Checked, NewSegment, Pusher, Running, WalFile};
use crate::error::{Error, Result};

/// More win little: the rest of a push is one after the other.
const THREADS_MAX: usize = 4;

/// Frames of a segment, taken one by one by whoever is free.
struct Frames<'a> {
    file: &'a WalFile,
    header: SealedHeader,
    level: i32,
    next: AtomicUsize,
    done: Mutex<Vec<Option<EncodedFrame>>>,
}

impl Pusher<'_> {
    /// Checks every record of a segment and compresses it; the object, and what it holds.
    pub(super) fn check_and_seal(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
    ) -> Result<(Checked, Vec<u8>)> {
        let header = new.header;
        let count = header.raw_bytes().div_ceil(FRAME_BYTES as u64);
        let count = usize::try_from(count).unwrap_or_default();
        let frames = Frames {
            file,
            header,
            level: self.settings.compression_level,
            next: AtomicUsize::new(0),
            done: Mutex::new(vec![None; count]),
        };
        let helpers = thread::available_parallelism().map_or(1, usize::from);
        let helpers = helpers.min(THREADS_MAX).min(count).saturating_sub(1);
        let checked = thread::scope(|scope| {
            let helping: Vec<_> = (0..helpers)
                .map(|_| scope.spawn(|| frames.compress()))
                .collect();
            let checked = self.decode(file, new, running);
            if checked.is_err() {
                // Nothing of it will be stored.
                frames.next.store(count, Ordering::Relaxed);
            }
            let own = frames.compress();
            let all = helping.into_iter().map(|helper| {
                helper.join().unwrap_or_else(|_| {
                    Err(Error::ThreadStopped {
                        name: "compress",
                        reason: "it panicked".to_owned(),
                    })
                })
            });
            let compressed: Result<()> = all.chain([own]).collect();
            let checked = checked?;
            compressed.map(|()| checked)
        })?;
        let broken = broken(&header);
        let mut writer = SealedWriter::new(header, frames.level).map_err(&broken)?;
        let done = frames.done.into_inner();
        // A missing one is noticed by the writer, which counts.
        for frame in done
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .flatten()
        {
            writer.push_frame(frame).map_err(&broken)?;
        }
        let object = writer.finish(&checked.summary, None).map_err(&broken)?;
        Ok((checked, object))
    }
}

impl Frames<'_> {
    fn compress(&self) -> Result<()> {
        let broken = broken(&self.header);
        let mut compressor = FrameCompressor::new(self.level).map_err(&broken)?;
        let mut wal = vec![0; FRAME_BYTES];
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let offset = number as u64 * FRAME_BYTES as u64;
            let left = self.header.raw_bytes().saturating_sub(offset);
            if left == 0 {
                return Ok(());
            }
            let length = usize::try_from(left).unwrap_or(FRAME_BYTES);
            let wal = &mut wal[..length.min(FRAME_BYTES)];
            self.file.read_at(wal, offset)?;
            let frame = compressor.compress(wal).map_err(&broken)?;
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = done.get_mut(number) {
                *place = Some(frame);
            }
        }
    }
}

fn broken(header: &SealedHeader) -> impl Fn(SealedError) -> Error + use<> {
    let object = header.key().to_string();
    move |source| Error::Sealed {
        object: object.clone(),
        source,
    }
}
