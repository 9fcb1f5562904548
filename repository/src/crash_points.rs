//! [`CrashPoint`]: named places between two system calls, at which a test ends the process or makes
//! an operation fail.
//!
//! The environment variable [`VARIABLE`] arms one point: `NAME[:ACTION][:NTH]`. `kill` (the
//! default) sends SIGKILL to this process; `eio`, `enospc` and `emfile` make the point return that
//! error once. `NTH` counts how often the point is reached before that; the default is 1.
//! Invariant: while nothing is armed, a point loads one value and changes nothing.

use std::{
    env, io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Signal, getpid, kill_process},
};

/// The environment variable that arms a point.
pub const VARIABLE: &str = "TIDEMARK_CRASH_POINT";

macro_rules! crash_points {
    ($($(#[$documentation:meta])* $point:ident = $name:literal,)*) => {
        /// A place between two system calls.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum CrashPoint {
            $($(#[$documentation])* $point,)*
        }

        impl CrashPoint {
            /// Every point, in the order in which WAL meets them.
            pub const ALL: &'static [Self] = &[$(Self::$point,)*];

            /// The name that [`VARIABLE`] takes.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

crash_points! {
    /// A directory of the spool exists; its name is not durable.
    SpoolDirectoryCreated = "spool-directory-created",
    /// A directory of the repository or the catalog exists; its name is not durable.
    DirectoryCreated = "directory-created",
    /// A small file of the spool (history, position) is replaced: the new file exists and is empty.
    RecordCreated = "record-created",
    /// The new file has its content, which is not durable.
    RecordWritten = "record-written",
    /// The new file is durable and not renamed.
    RecordSynced = "record-synced",
    /// The new file has the record's name, which is not durable.
    RecordRenamed = "record-renamed",
    /// A copy of a spooled segment is made: the new file exists and is empty.
    CopyCreated = "copy-created",
    /// The copy has its content, which is not durable.
    CopyWritten = "copy-written",
    /// The copy is durable and not renamed.
    CopySynced = "copy-synced",
    /// The copy has the segment's name, which is not durable.
    CopyRenamed = "copy-renamed",
    /// An open segment's file exists; its name is not durable.
    SegmentCreated = "segment-created",
    /// The file's name is durable; no byte was written.
    SegmentNamed = "segment-named",
    /// WAL was written; it is not durable.
    SegmentWritten = "segment-written",
    /// WAL is durable and not reported.
    SegmentSynced = "segment-synced",
    /// A whole segment is durable and not renamed.
    SegmentCompleted = "segment-completed",
    /// A whole segment has its final name, which is not durable.
    SegmentRenamed = "segment-renamed",
    /// A whole segment has its final name durably and was not handed to the sealing threads.
    SegmentFinished = "segment-finished",
    /// A status is about to be sent to PostgreSQL.
    AcknowledgementDue = "acknowledgement-due",
    /// A status was sent to PostgreSQL.
    AcknowledgementSent = "acknowledgement-sent",
    /// The tail thread has a tail.
    TailCut = "tail-cut",
    /// The tail's object is made.
    TailPacked = "tail-packed",
    /// The tail is stored and was read back; the catalog does not have it.
    TailStored = "tail-stored",
    /// The catalog has the tail.
    TailCataloged = "tail-cataloged",
    /// The tail is noted for the sealed segment that will replace it.
    TailNoted = "tail-noted",
    /// A sealing thread has a segment.
    SealBegun = "seal-begun",
    /// The sealed object is made.
    SealPacked = "seal-packed",
    /// The sealed segment is stored and was read back; the catalog does not have it.
    SealStored = "seal-stored",
    /// The catalog has the sealed segment; its tails are still stored.
    SealCataloged = "seal-cataloged",
    /// A superfluous tail was removed from the repository; the catalog still has it.
    TailRemoved = "tail-removed",
    /// The segment's tails are gone; its file is still in the spool.
    SealNoted = "seal-noted",
    /// A sealed segment's file is about to leave the spool.
    SpoolRemovalDue = "spool-removal-due",
    /// The position is recorded; the last segment's file is still in the spool.
    SpoolPositionRecorded = "spool-position-recorded",
    /// A sealed segment's file was removed from the spool.
    SpoolFileRemoved = "spool-file-removed",
    /// A folder's put: the temporary file exists and is empty.
    StoreFileCreated = "store-file-created",
    /// The temporary file has its content, which is not durable.
    StoreFileWritten = "store-file-written",
    /// The temporary file is durable and has no name.
    StoreFileSynced = "store-file-synced",
    /// The object has its name, which is not durable.
    StoreFileLinked = "store-file-linked",
    /// The object is durable; the put has not returned.
    StoreFileDurable = "store-file-durable",
    /// An object is about to be read back.
    StoreReadBack = "store-read-back",
    /// A file was removed; that is not durable.
    FileRemoved = "file-removed",
}

/// The effect of an armed point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Fail(Errno),
}

#[derive(Debug)]
struct Armed {
    point: CrashPoint,
    action: Action,
    /// Number of times that the point is still reached until the action; 0 after it.
    left: AtomicU64,
}

impl CrashPoint {
    /// Ends the process or fails, if this point is armed.
    ///
    /// # Errors
    /// The armed error, once.
    #[inline]
    pub fn reach(self) -> io::Result<()> {
        match armed() {
            Some(armed) if armed.point == self => armed.reach(),
            _ => Ok(()),
        }
    }
}

impl Armed {
    /// Reads `NAME[:ACTION][:NTH]`; `None` when it is not written so.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let name = parts.next()?;
        let point = *CrashPoint::ALL.iter().find(|point| point.name() == name)?;
        let (mut action, mut nth) = (Action::Kill, 1);
        for part in parts {
            match part {
                "kill" => action = Action::Kill,
                "eio" => action = Action::Fail(Errno::IO),
                "enospc" => action = Action::Fail(Errno::NOSPC),
                "emfile" => action = Action::Fail(Errno::MFILE),
                number => nth = number.parse().ok()?,
            }
        }
        Some(Self {
            point,
            action,
            left: AtomicU64::new(nth),
        })
    }

    fn reach(&self) -> io::Result<()> {
        let left = self
            .left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                left.checked_sub(1)
            });
        if left != Ok(1) {
            return Ok(());
        }
        match self.action {
            Action::Fail(error) => {
                let error = io::Error::from(error);
                tracing::warn!(event = "crash_point", point = self.point.name(), %error, "an armed point fails");
                Err(error)
            }
            Action::Kill => {
                // Delivered before any other instruction of this process matters; nothing after
                // this line may run.
                let _sent = kill_process(getpid(), Signal::KILL);
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let text = env::var(VARIABLE).ok()?;
        let armed = Armed::parse(&text);
        if armed.is_none() {
            tracing::warn!("{VARIABLE}={text} names no crash point; it is ignored");
        }
        armed
    });
    armed.as_ref()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn an_armed_point_fails_once_at_the_nth_time() {
        let armed = Armed::parse("store-file-linked:enospc:2").expect("it is written right");
        assert_eq!(armed.point, CrashPoint::StoreFileLinked);
        armed.reach().expect("the first time");
        let error = armed.reach().expect_err("the second time");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        armed.reach().expect("the third time");
        let kill = Armed::parse("tail-cut").expect("a name alone");
        assert_eq!(kill.action, Action::Kill);
        for wrong in ["", "tail", "tail-cut:often", "tail-cut:eio:x"] {
            assert!(Armed::parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn names_are_unique() {
        let names: BTreeSet<&str> = CrashPoint::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), CrashPoint::ALL.len());
    }
}
