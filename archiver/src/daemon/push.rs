//! The daemon's side of `push`: a Unix socket next to the spool, and workers that archive files
//! before PostgreSQL asks for them.
//!
//! Invariant: the answer "archived" is given only for a file that [`Pusher`] has checked and
//! stored, whichever client asked first. A file counts as the same one only if device, inode,
//! length and change time are the same.

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
    push::{SocketAddress, socket_path},
};
use repository::{
    Repository, access,
    config::{Acknowledge, ClusterSettings},
};
use status::cluster_status::ClusterStatus;

use crate::{
    error::{Error, Result},
    spool,
};

/// The number of workers: one compresses while the other checks.
const WORKERS: usize = 2;
/// The number of files remembered: those offered in advance, and some that were requested twice.
const REMEMBERED_MAX: usize = 64;
/// The maximum number of connections. PostgreSQL has one archiver process. More than a few
/// connections come from a script.
const CONNECTIONS_MAX: usize = 32;
/// The pause after a failed accept. Without a file descriptor it would fail again at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// The time for which a client may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The identity of a file's content.
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
    /// In the order in which they are processed.
    entries: Mutex<VecDeque<Entry>>,
    changed: Condvar,
    /// The decoder of the last segment. Segments are decoded one after the other, each continuing
    /// where the previous one ended.
    running: Mutex<Option<Running>>,
    repository: Mutex<Option<Repository>>,
    connections: Mutex<usize>,
    stopping: AtomicBool,
}

/// Serves pushes until it is dropped. Files in progress are then still finished. A client whose
/// file still waits receives no answer and archives the file itself.
#[derive(Debug)]
pub struct PushServer {
    desk: Arc<Desk>,
    path: PathBuf,
}

impl Drop for PushServer {
    fn drop(&mut self) {
        {
            // Every thread that has read the flag before waits by now, so the notification below
            // wakes it.
            let _entries = lock(&self.desk.entries);
            self.desk.stopping.store(true, Ordering::Release);
        }
        self.desk.changed.notify_all();
        // Wakes the thread that accepts connections.
        let address = SocketAddress::of(&self.desk.settings);
        drop(address.and_then(|address| UnixStream::connect(&address.path)));
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the socket for pushes stays behind");
        }
    }
}

/// Creates the socket and starts the threads.
///
/// # Errors
/// [`Error::Io`] if the socket cannot be created.
pub fn start(settings: &ClusterSettings, status: Arc<ClusterStatus>) -> Result<PushServer> {
    let path = socket_path(settings);
    spool::files::create_directory(&settings.spool)?;
    // A daemon that was killed leaves its socket. A running daemon would hold the spool's lock, and
    // this code would not be reached.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &path)(error));
        }
        _ => {}
    }
    let address = SocketAddress::of(settings).map_err(Error::io("listen on", &path))?;
    let listener = UnixListener::bind(&address.path).map_err(Error::io("listen on", &path))?;
    let mode = match access::is_shared(&settings.spool) {
        true => 0o660,
        false => 0o600,
    };
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
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
                // The client gets no answer and archives the file itself.
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

    /// Queues a file unless it is known. A file that failed before is tried again.
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

    /// Waits until a file was processed. Returns `None` when stopping.
    fn wait(&self, path: &PathBuf, content: Content) -> Option<Answer> {
        let mut entries = lock(&self.entries);
        loop {
            let entry = entries
                .iter()
                .find(|entry| entry.path == *path && entry.content == content);
            match entry.map(|entry| &entry.progress) {
                Some(Progress::Done) => {
                    // The file now matches. An earlier push of this name may have been a damaged
                    // copy from another directory than `pg_wal`.
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
                // The workers have ended, so the file is not processed any more.
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

    /// Waits for the first waiting file. Returns `None` when stopping.
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
        // WAL that is stored in an older copy would be missing in the right repository, and
        // PostgreSQL removes WAL that was pushed.
        if let Some(problem) = self.status.facts().repository_older {
            return Err(repository::Error::config(problem).into());
        }
        // Both workers do this concurrently. WAL that the stream has archived is only compared.
        let new = match self.with_pusher(|pusher| pusher.look(file))? {
            Looked::Archived => return Ok(()),
            Looked::New(new) => new,
        };
        // Segments are decoded one at a time, each continuing where the previous one ended.
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
