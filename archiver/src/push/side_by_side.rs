//! One segment on several processors: one thread reads it and checks its records, the others compress what was checked;
//! then all compress.
//!
//! For a push that works alone, where PostgreSQL waits. The daemon works on several segments at once instead.
//! Invariant: each byte is read once, so what is stored is what was checked; what is handed on was checked to its last
//! record.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use wal_format::{
    SealedHeader, SealedWriter, WalIndexer,
    sealed::{EncodedFrame, FRAME_BYTES, ProvedCompressor, SealedError},
};

use super::{Checked, NewSegment, Pusher, Running, WalFile};
use crate::error::{Error, Result};

/// More win little: the rest of a push is one after the other.
const THREADS_MAX: usize = 4;
/// Frames that wait for a compressor; beyond it the reader compresses too, which bounds the memory.
const WAITING_MAX: usize = 4;

/// Frames between the reader and the compressors.
struct Frames {
    header: SealedHeader,
    level: i32,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    checked: VecDeque<(u32, Vec<u8>)>,
    /// Buffers to be used again: what is taken anew is cleared by the kernel each time.
    free: Vec<Vec<u8>>,
    /// In the order in which they became ready.
    compressed: Vec<(u32, EncodedFrame)>,
    /// Nothing comes any more.
    ended: bool,
}

impl Pusher<'_> {
    /// Checks every record of a segment and compresses it; the object, and what it holds.
    pub(super) fn check_and_seal(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
    ) -> Result<(Checked, Vec<u8>)> {
        let frames = Frames {
            header: new.header,
            level: self.settings.compression_level,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let helpers = threads.min(THREADS_MAX).saturating_sub(1);
        let mut indexer = self.decoder(file, new, running)?;
        thread::scope(|scope| {
            let helping: Vec<_> = (0..helpers)
                .map(|_| scope.spawn(|| frames.compressor()?.work(&frames)))
                .collect();
            let checked = frames.fill(file, new, &mut indexer);
            // Of a segment that is refused nothing is compressed any more.
            frames.end(checked.is_err());
            let own = frames.compressor().and_then(|own| own.work(&frames));
            let all = helping.into_iter().map(|helper| {
                helper.join().unwrap_or_else(|_| {
                    Err(Error::ThreadStopped {
                        name: "compress",
                        reason: "it panicked".to_owned(),
                    })
                })
            });
            let compressed: Result<()> = all.chain([own]).collect();
            checked.and(compressed)
        })?;
        let checked = new.checked(file, indexer, running)?;
        let object = frames.sealed(&checked)?;
        Ok((checked, object))
    }
}

impl Frames {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self, source: SealedError) -> Error {
        Error::Sealed {
            object: self.header.key().to_string(),
            source,
        }
    }

    fn compressor(&self) -> Result<Compressor> {
        ProvedCompressor::new(self.level)
            .map(Compressor)
            .map_err(|source| self.broken(source))
    }

    /// Reads and checks the segment, frame by frame.
    fn fill(&self, file: &WalFile, new: NewSegment, indexer: &mut WalIndexer) -> Result<()> {
        let mut own = None;
        for number in 0.. {
            let offset = u64::from(number) * FRAME_BYTES as u64;
            let left = self.header.raw_bytes().saturating_sub(offset);
            if left == 0 {
                break;
            }
            let mut wal = self.lock().free.pop().unwrap_or_default();
            wal.resize(
                usize::try_from(left)
                    .unwrap_or(FRAME_BYTES)
                    .min(FRAME_BYTES),
                0,
            );
            file.read_at(&mut wal, offset)?;
            new.check(indexer, &wal)?;
            let mut state = self.lock();
            state.checked.push_back((number, wal));
            let own_turn = state.checked.len() > WAITING_MAX;
            drop(state);
            self.changed.notify_one();
            if own_turn {
                let mut compressor = match own.take() {
                    Some(compressor) => compressor,
                    None => self.compressor()?,
                };
                let first = self.lock().checked.pop_front();
                if let Some((number, wal)) = first {
                    compressor.compress(self, number, wal)?;
                }
                own = Some(compressor);
            }
        }
        Ok(())
    }

    fn end(&self, refused: bool) {
        let mut state = self.lock();
        state.ended = true;
        if refused {
            state.checked.clear();
        }
        drop(state);
        self.changed.notify_all();
    }

    fn sealed(self, checked: &Checked) -> Result<Vec<u8>> {
        let mut writer =
            SealedWriter::new(self.header, self.level).map_err(|source| self.broken(source))?;
        let mut state = self.lock();
        state.compressed.sort_by_key(|(number, _)| *number);
        // A missing one is noticed by the writer, which counts.
        for (_, frame) in &state.compressed {
            writer
                .push_frame(frame)
                .map_err(|source| self.broken(source))?;
        }
        writer
            .finish(&checked.summary, None)
            .map_err(|source| self.broken(source))
    }
}

struct Compressor(ProvedCompressor);

impl Compressor {
    /// Compresses what was checked until nothing comes any more.
    fn work(mut self, frames: &Frames) -> Result<()> {
        loop {
            let mut state = frames.lock();
            let (number, wal) = loop {
                if let Some(first) = state.checked.pop_front() {
                    break first;
                }
                if state.ended {
                    return Ok(());
                }
                state = frames
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            self.compress(frames, number, wal)?;
        }
    }

    fn compress(&mut self, frames: &Frames, number: u32, wal: Vec<u8>) -> Result<()> {
        let frame = self.0.compress(number, &wal);
        let frame = frame.map_err(|source| frames.broken(source))?;
        let mut state = frames.lock();
        state.free.push(wal);
        state.compressed.push((number, frame));
        Ok(())
    }
}
