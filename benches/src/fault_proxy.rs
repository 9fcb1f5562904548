//! [`FaultProxy`]: a TCP listener before a server's Unix socket, which delays, throttles, cuts or swallows what passes.
//!
//! A connection that is swallowed stays open on both sides and nobody is told anything, as when a cable is pulled: not even
//! that the other side has hung up.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

/// How soon a change of the faults is noticed.
const LOOK: Duration = Duration::from_millis(20);

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Each piece is held back for so long.
    pub delay: Duration,
    /// Bytes a second, in each direction.
    pub throttle: Option<u64>,
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<Faults>,
    /// Connections with a smaller number are swallowed: from the server, to the server.
    swallowed: [AtomicU64; 2],
    /// Connections with a smaller number are cut.
    cut: AtomicU64,
    next: AtomicU64,
    stop: AtomicBool,
}

/// A running proxy; its connections end with it.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl FaultProxy {
    /// Listens on a port of its own, before the server's socket.
    ///
    /// # Errors
    /// When no port is to be had.
    pub fn start(socket: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let (of_listener, socket) = (Arc::clone(&shared), socket.to_owned());
        thread::spawn(move || accept(&listener, &socket, &of_listener));
        Ok(Self { address, shared })
    }

    /// How a client reaches the server through it.
    #[must_use]
    pub fn conninfo(&self) -> String {
        format!(
            "host=127.0.0.1 port={} user=postgres sslmode=disable",
            self.address.port()
        )
    }

    /// Faults from now on, of all connections.
    pub fn set(&self, faults: Faults) {
        *self
            .shared
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Swallows everything on the connections that are open now, in one direction or both. Later ones are well.
    pub fn swallow(&self, from_server: bool, to_server: bool) {
        let next = self.shared.next.load(Ordering::SeqCst);
        for (at, wanted) in [from_server, to_server].into_iter().enumerate() {
            if wanted {
                self.shared.swallowed[at].store(next, Ordering::SeqCst);
            }
        }
    }

    /// Ends the connections that are open now, on both sides.
    pub fn cut(&self) {
        let next = self.shared.next.load(Ordering::SeqCst);
        self.shared.cut.store(next, Ordering::SeqCst);
    }

    /// How many connections were made.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.next.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

fn accept(listener: &TcpListener, socket: &PathBuf, shared: &Arc<Shared>) {
    while !shared.stop.load(Ordering::SeqCst) {
        let Ok((client, _)) = listener.accept() else {
            thread::sleep(LOOK);
            continue;
        };
        // A server that is down: the client sees a closed connection.
        let Ok(server) = UnixStream::connect(socket) else {
            continue;
        };
        let number = shared.next.fetch_add(1, Ordering::SeqCst);
        let ready = client
            .set_nonblocking(false)
            .and_then(|()| client.set_nodelay(true))
            .and_then(|()| client.set_read_timeout(Some(LOOK)))
            .and_then(|()| server.set_read_timeout(Some(LOOK)));
        let clones = ready.and_then(|()| Ok((client.try_clone()?, server.try_clone()?)));
        let Ok((client_too, server_too)) = clones else {
            continue;
        };
        for (at, from, to) in [
            (0, End::Server(server), End::Client(client)),
            (1, End::Client(client_too), End::Server(server_too)),
        ] {
            let shared = Arc::clone(shared);
            thread::spawn(move || pump(at, number, from, to, &shared));
        }
    }
}

enum End {
    Client(TcpStream),
    Server(UnixStream),
}

impl End {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Client(stream) => stream.read(bytes),
            Self::Server(stream) => stream.read(bytes),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Client(stream) => stream.write_all(bytes),
            Self::Server(stream) => stream.write_all(bytes),
        }
    }

    fn close(&self) {
        // Closed by the other side already, perhaps.
        let _closed = match self {
            Self::Client(stream) => stream.shutdown(Shutdown::Both),
            Self::Server(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

fn pump(at: usize, number: u64, mut from: End, mut to: End, shared: &Shared) {
    let mut bytes = vec![0; 32 << 10];
    loop {
        if shared.stop.load(Ordering::SeqCst) || number < shared.cut.load(Ordering::SeqCst) {
            break;
        }
        if number < shared.swallowed[at].load(Ordering::SeqCst) {
            // Not even read: the sender's buffers fill, and an end is not passed on.
            thread::sleep(LOOK);
            continue;
        }
        let count = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                continue;
            }
            Err(_) => break,
        };
        let faults = *shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let slowed = faults.throttle.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(count as f64 / rate as f64)
        });
        thread::sleep(faults.delay + slowed);
        if number < shared.swallowed[at].load(Ordering::SeqCst) {
            continue;
        }
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // One direction that is swallowed stays half open; otherwise both sides are told.
    let swallowed = |at: usize| number < shared.swallowed[at].load(Ordering::SeqCst);
    let stays = (swallowed(0) || swallowed(1))
        && number >= shared.cut.load(Ordering::SeqCst)
        && !shared.stop.load(Ordering::SeqCst);
    if !stays {
        from.close();
        to.close();
    } else {
        // Held open until the proxy ends, so that nobody is told.
        while !shared.stop.load(Ordering::SeqCst) && number >= shared.cut.load(Ordering::SeqCst) {
            thread::sleep(LOOK);
        }
        from.close();
        to.close();
    }
}
