//! The daemon's side of `push`: a Unix socket beside the spool, and workers that are ahead of PostgreSQL.
//!
//! Invariant: "archived" is answered only for a file that was checked and stored as [`Pusher`] does it, whoever asked
//! first; a file counts as the same one only while device, inode, length and time of change are.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use intake::{Looked, Pusher, Running, WalFile};
use quick::{
    message::{Answer, receive_request, send_answer},
    push::socket_path,
};
use repository::{
    Repository,
    config::{Acknowledge, ClusterSettings},
};

use crate::{
    cluster_status::ClusterStatus,
    error::{Error, Result},
};

/// One compresses while the other checks.
const WORKERS: usize = 2;
/// Files that are remembered: those that were offered and some that were asked for twice.
const REMEMBERED_MAX: usize = 64;
/// PostgreSQL has one archiver; more than a few at once are somebody's script.
const CONNECTIONS_MAX: usize = 32;
/// Pause after a failed accept: without a file descriptor it would fail again at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// A client says what it wants at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The very content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    device: u64,
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl Content {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[derive(Debug)]
enum Progress {
    Waiting(WalFile),
    Working,
    Done,
    Failed(String),
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    content: Content,
    progress: Progress,
}

#[derive(Debug)]
struct Desk {
    settings: ClusterSettings,
    status: Arc<ClusterStatus>,
    /// In the order of work.
    entries: Mutex<VecDeque<Entry>>,
    changed: Condvar,
    /// Segments are decoded one after the other, each going on where the one before ended.
    running: Mutex<Option<Running>>,
    repository: Mutex<Option<Repository>>,
    connections: Mutex<usize>,
    stopping: AtomicBool,
}

/// Listens until it is dropped; what is under way then is finished, and its client hears nothing and works alone.
#[derive(Debug)]
pub struct PushServer {
    desk: Arc<Desk>,
    path: PathBuf,
}

impl Drop for PushServer {
    fn drop(&mut self) {
        {
            // Whoever looked at the flag before waits by now.
            let _entries = lock(&self.desk.entries);
            self.desk.stopping.store(true, Ordering::Release);
        }
        self.desk.changed.notify_all();
        // Wakes the thread that accepts.
        drop(UnixStream::connect(&self.path));
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the socket for pushes stays behind");
        }
    }
}

/// Listens.
///
/// # Errors
/// [`Error::Io`] when the socket cannot be made.
pub fn start(settings: &ClusterSettings, status: Arc<ClusterStatus>) -> Result<PushServer> {
    let path = socket_path(settings);
    fs::create_dir_all(&settings.spool).map_err(Error::io("create directory", &settings.spool))?;
    // A daemon that was killed leaves its socket. One that lives holds the spool's lock, and has said so by now.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &path)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(Error::io("listen on", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .map_err(Error::io("protect", &path))?;
    let desk = Arc::new(Desk {
        settings: settings.clone(),
        status,
        entries: Mutex::default(),
        changed: Condvar::new(),
        running: Mutex::default(),
        repository: Mutex::default(),
        connections: Mutex::new(0),
        stopping: AtomicBool::new(false),
    });
    let server = PushServer {
        desk: Arc::clone(&desk),
        path,
    };
    for _ in 0..WORKERS {
        let desk = Arc::clone(&desk);
        spawn(move || desk.work())?;
    }
    spawn(move || {
        for accepted in listener.incoming() {
            if desk.stopping.load(Ordering::Acquire) {
                return;
            }
            let socket = match accepted {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!(cluster = %desk.settings.name, %error, "accept a push");
                    thread::sleep(ACCEPT_RETRY);
                    continue;
                }
            };
            let serving = Arc::clone(&desk);
            if desk.admit()
                && let Err(error) = spawn(move || serving.serve(socket))
            {
                // The client gets no answer and pushes alone.
                *lock(&desk.connections) -= 1;
                tracing::warn!(cluster = %desk.settings.name, %error, "a push is not served");
            }
        }
    })?;
    Ok(server)
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name("push".to_owned()).spawn(work);
    thread.map(drop).map_err(Error::no_thread("push"))
}

impl Desk {
    fn admit(&self) -> bool {
        let mut connections = lock(&self.connections);
        let admitted = *connections < CONNECTIONS_MAX;
        *connections += usize::from(admitted);
        admitted
    }

    fn serve(&self, mut socket: UnixStream) {
        if let Err(error) = self.answer(&mut socket) {
            tracing::debug!(%error, "a push was not answered");
        }
        *lock(&self.connections) -= 1;
    }

    fn answer(&self, socket: &mut UnixStream) -> io::Result<()> {
        socket.set_read_timeout(Some(REQUEST_TIMEOUT))?;
        let (request, files) = receive_request(socket)?;
        let mut wanted = None;
        for (path, file) in request.paths.into_iter().zip(files) {
            let content = Content::of(&file)?;
            if wanted.is_none() {
                wanted = Some((path.clone(), content));
            }
            if let Ok(file) = WalFile::of(path.clone(), file) {
                self.take_in(path, content, file);
            }
        }
        let Some((path, content)) = wanted else {
            return Ok(());
        };
        match self.wait(&path, content) {
            Some(answer) => send_answer(socket, &answer),
            None => Ok(()),
        }
    }

    /// A file is to be archived, unless it is known. One that failed is tried again when it is asked for.
    fn take_in(&self, path: PathBuf, content: Content, file: WalFile) {
        let mut entries = lock(&self.entries);
        let known = entries
            .iter_mut()
            .find(|entry| entry.path == path && entry.content == content);
        match known {
            Some(entry) => {
                if matches!(entry.progress, Progress::Failed(_)) {
                    entry.progress = Progress::Waiting(file);
                }
            }
            None => entries.push_back(Entry {
                path,
                content,
                progress: Progress::Waiting(file),
            }),
        }
        while entries.len() > REMEMBERED_MAX {
            let ended =
                |entry: &Entry| matches!(entry.progress, Progress::Done | Progress::Failed(_));
            let Some(at) = entries.iter().position(ended) else {
                break;
            };
            entries.remove(at);
        }
        drop(entries);
        self.changed.notify_all();
    }

    /// Waits for the end of a file's work; `None` when stopping.
    fn wait(&self, path: &PathBuf, content: Content) -> Option<Answer> {
        let mut entries = lock(&self.entries);
        loop {
            let entry = entries
                .iter()
                .find(|entry| entry.path == *path && entry.content == content);
            match entry.map(|entry| &entry.progress) {
                Some(Progress::Done) => {
                    // A damaged copy may have been pushed from another place than `pg_wal`.
                    let name = path.file_name().unwrap_or_default();
                    self.status.note(|facts| {
                        facts.push_differs.remove(name);
                    });
                    return Some(Answer::Archived);
                }
                Some(Progress::Failed(problem)) => {
                    return Some(Answer::Failed {
                        problem: problem.clone(),
                    });
                }
                None => {
                    return Some(Answer::Failed {
                        problem: "was forgotten under load; PostgreSQL asks again".to_owned(),
                    });
                }
                // Nobody works on it any more.
                Some(Progress::Waiting(_)) if self.stopping.load(Ordering::Acquire) => return None,
                Some(_) => {}
            }
            entries = self
                .changed
                .wait(entries)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self) {
        loop {
            let Some((path, content, file)) = self.next() else {
                return;
            };
            let outcome = self.archive(&file);
            self.finish(&path, content, outcome);
        }
    }

    /// The first file that waits; blocks. `None` when stopping.
    fn next(&self) -> Option<(PathBuf, Content, WalFile)> {
        let mut entries = lock(&self.entries);
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            let waiting = entries
                .iter_mut()
                .find(|entry| matches!(entry.progress, Progress::Waiting(_)));
            if let Some(entry) = waiting
                && let Progress::Waiting(file) =
                    std::mem::replace(&mut entry.progress, Progress::Working)
            {
                return Some((entry.path.clone(), entry.content, file));
            }
            entries = self
                .changed
                .wait(entries)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn archive(&self, file: &WalFile) -> Result<()> {
        // Side by side: what the stream brought is only compared.
        let new = match self.with_pusher(|pusher| pusher.look(file))? {
            Looked::Archived => return Ok(()),
            Looked::New(new) => new,
        };
        // One after the other, each going on where the one before ended.
        let checked = {
            let mut running = lock(&self.running);
            self.with_pusher(|pusher| pusher.decode(file, new, &mut running))?
        };
        self.with_pusher(|pusher| pusher.store(file, &checked))
    }

    fn with_pusher<T>(&self, work: impl FnOnce(Pusher<'_>) -> intake::Result<T>) -> Result<T> {
        let repository = {
            let mut opened = lock(&self.repository);
            match &*opened {
                Some(repository) => repository.clone(),
                None => {
                    let repository = Repository::open_known(&self.settings)?;
                    opened.insert(repository).clone()
                }
            }
        };
        Ok(work(Pusher {
            settings: &self.settings,
            repository: &repository,
            spool_counts: self.settings.acknowledge == Acknowledge::Local,
        })?)
    }

    fn finish(&self, path: &PathBuf, content: Content, outcome: Result<()>) {
        let progress = match outcome {
            Ok(()) => Progress::Done,
            Err(error) => {
                let problem = match &error {
                    Error::Wal(
                        intake::Error::Refused { problem, .. }
                        | intake::Error::Differs { problem, .. },
                    ) => problem.clone(),
                    other => other.to_string(),
                };
                if matches!(error, Error::Wal(intake::Error::Differs { .. })) {
                    tracing::error!(cluster = %self.settings.name, file = %path.display(), "{problem}");
                    let reason = format!(
                        "a push of {} was refused: {problem}. If the file was a damaged copy, push the server's own file \
                         of this name: that ends this state",
                        path.display()
                    );
                    self.status.note(|facts| {
                        let name = path.file_name().unwrap_or_default();
                        facts.push_differs.insert(name.to_owned(), reason);
                    });
                }
                Progress::Failed(problem)
            }
        };
        let mut entries = lock(&self.entries);
        let entry = entries
            .iter_mut()
            .find(|entry| entry.path == *path && entry.content == content);
        if let Some(entry) = entry {
            entry.progress = progress;
        }
        drop(entries);
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
