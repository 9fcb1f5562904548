//! Processes one segment on several processors: one thread reads it and checks its records while
//! the others compress. Then all threads compress.
//!
//! This is for a push without a daemon, for which PostgreSQL waits. The daemon processes several
//! segments at once instead. Invariant: each byte is read once, so the stored bytes are the checked
//! bytes, and the object is completed only after the last record was checked.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use wal_format::{
    SealedHeader, SealedWriter, WalIndexer,
    sealed::{EncodedFrame, FRAME_BYTES, ProvedCompressor},
};

use super::{Checked, NewSegment, Pusher, Running, WalFile, prime::damaged};
use crate::error::{Error, Result};

/// The maximum number of threads. More gain little, because the rest of a push is sequential.
const THREADS_MAX: usize = 4;
/// The maximum number of frames that wait for a compressor. Beyond it the reading thread compresses
/// too. It is small, because newly allocated memory doubles the cost of reading into it.
const WAITING_MAX: usize = 1;
/// The number of frames that are read before the decoder is created, which requests the previous
/// segment.
const EARLY: u32 = 2;

/// Frames between the reader and the compressors.
struct Frames {
    header: SealedHeader,
    level: i32,
    state: Mutex<State>,
    changed: Condvar,
    object: Mutex<Object>,
}

/// The object in progress.
struct Object {
    writer: SealedWriter,
    /// The number of the frame to be appended next.
    next: u32,
    /// Frames that were completed before a preceding frame.
    early: Vec<(u32, EncodedFrame)>,
}

#[derive(Default)]
struct State {
    read: VecDeque<(u32, Arc<Vec<u8>>)>,
    /// Buffers for reuse. The kernel would clear newly allocated memory each time.
    free: Vec<Vec<u8>>,
    /// True after the last frame was read.
    ended: bool,
}

impl Pusher<'_> {
    /// Checks every record of a segment and compresses it. Returns its header and summary, and the
    /// object.
    pub(super) fn check_and_seal(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
    ) -> Result<(Checked, Vec<u8>)> {
        let frames = Frames::new(new.header, self.settings.compression_level)?;
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let helpers = threads.min(THREADS_MAX).saturating_sub(1);
        let indexer = thread::scope(|scope| {
            let helping: Vec<_> = (0..helpers)
                .map(|_| scope.spawn(|| frames.compressor()?.work(&frames)))
                .collect();
            let mut own = None;
            let checked = self.check_beside(file, new, running, &frames, &mut own);
            // If the segment is refused, the frames that still wait are not compressed.
            frames.end(checked.is_err());
            let own = own
                .map_or_else(|| frames.compressor(), Ok)
                .and_then(|own| own.work(&frames));
            let all = helping.into_iter().map(|helper| {
                helper.join().unwrap_or_else(|_| {
                    Err(Error::ThreadStopped {
                        name: "compress",
                        reason: "it panicked".to_owned(),
                    })
                })
            });
            let compressed: Result<()> = all.chain([own]).collect();
            let indexer = checked?;
            compressed.and(Ok(indexer))
        })?;
        let checked = new.checked(file, indexer, running)?;
        let object = frames.sealed(&checked)?;
        Ok((checked, object))
    }

    /// Reads and checks the segment frame by frame, and offers each frame to the compressors as
    /// soon as it was read. `own` is the compressor of this thread, once it has needed one.
    fn check_beside(
        &self,
        file: &WalFile,
        new: NewSegment,
        running: &mut Option<Running>,
        frames: &Frames,
        own: &mut Option<Compressor>,
    ) -> Result<WalIndexer> {
        let mut early = VecDeque::new();
        for number in 0..EARLY.min(frames.count()) {
            early.push_back(frames.read(file, number)?);
        }
        let mut indexer = self.decoder(file, new, running)?;
        for number in 0..frames.count() {
            let wal = match early.pop_front() {
                Some(wal) => wal,
                None => frames.read(file, number)?,
            };
            new.check(&mut indexer, &wal)?;
            frames.release(wal);
            while let Some((number, wal)) = frames.surplus() {
                let mut compressor = match own.take() {
                    Some(compressor) => compressor,
                    None => frames.compressor()?,
                };
                compressor.compress(frames, number, wal)?;
                *own = Some(compressor);
            }
        }
        Ok(indexer)
    }
}

impl Frames {
    fn new(header: SealedHeader, level: i32) -> Result<Self> {
        let mut writer = SealedWriter::new(header, level).map_err(damaged(&header.key()))?;
        // This reserves address space only. The kernel provides memory when it is written.
        writer.reserve(usize::try_from(header.raw_bytes()).unwrap_or_default());
        Ok(Self {
            header,
            level,
            state: Mutex::default(),
            changed: Condvar::new(),
            object: Mutex::new(Object {
                writer,
                next: 0,
                early: Vec::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compressor(&self) -> Result<Compressor> {
        ProvedCompressor::new(self.level)
            .map(Compressor)
            .map_err(damaged(&self.header.key()))
    }

    fn count(&self) -> u32 {
        let count = self.header.raw_bytes().div_ceil(FRAME_BYTES as u64);
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Reads a frame and offers it to the compressors.
    fn read(&self, file: &WalFile, number: u32) -> Result<Arc<Vec<u8>>> {
        let offset = u64::from(number) * FRAME_BYTES as u64;
        let left = self.header.raw_bytes().saturating_sub(offset);
        let bytes = usize::try_from(left).unwrap_or(FRAME_BYTES);
        let mut wal = self.lock().free.pop().unwrap_or_default();
        wal.resize(bytes.min(FRAME_BYTES), 0);
        file.read_at(&mut wal, offset)?;
        let wal = Arc::new(wal);
        self.lock().read.push_back((number, Arc::clone(&wal)));
        self.changed.notify_one();
        Ok(wal)
    }

    /// Returns the first waiting frame if more frames wait than may.
    fn surplus(&self) -> Option<(u32, Arc<Vec<u8>>)> {
        let mut state = self.lock();
        let many = state.read.len() > WAITING_MAX;
        many.then(|| state.read.pop_front()).flatten()
    }

    /// Makes a frame's memory available again when it was both checked and compressed.
    fn release(&self, wal: Arc<Vec<u8>>) {
        if let Some(wal) = Arc::into_inner(wal) {
            self.lock().free.push(wal);
        }
    }

    fn end(&self, refused: bool) {
        let mut state = self.lock();
        state.ended = true;
        if refused {
            state.read.clear();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Appends a frame to the object, as soon as all preceding frames are appended.
    fn append(&self, number: u32, frame: EncodedFrame) -> Result<()> {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let Object {
            writer,
            next,
            early,
        } = &mut *object;
        early.push((number, frame));
        while let Some(at) = early.iter().position(|(number, _)| number == next) {
            let (_, frame) = early.swap_remove(at);
            writer
                .push_frame(&frame)
                .map_err(damaged(&self.header.key()))?;
            *next += 1;
        }
        Ok(())
    }

    fn sealed(self, checked: &Checked) -> Result<Vec<u8>> {
        let key = self.header.key();
        let object = self
            .object
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        // The writer counts the bytes, so it detects a missing frame.
        object
            .writer
            .finish(&checked.summary, None)
            .map_err(damaged(&key))
    }
}

struct Compressor(ProvedCompressor);

impl Compressor {
    /// Compresses frames until the last one was read.
    fn work(mut self, frames: &Frames) -> Result<()> {
        loop {
            let mut state = frames.lock();
            let (number, wal) = loop {
                if let Some(first) = state.read.pop_front() {
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

    fn compress(&mut self, frames: &Frames, number: u32, wal: Arc<Vec<u8>>) -> Result<()> {
        let frame = self.0.compress(number, &wal);
        frames.release(wal);
        let frame = frame.map_err(damaged(&frames.header.key()))?;
        frames.append(number, frame)
    }
}
