//! [`FaultProxy`]: a TCP listener in front of a server's Unix socket that delays, throttles, cuts
//! or swallows data.
//!
//! A swallowed connection stays open on both sides without any notice, as when a cable is pulled;
//! even a closed connection is not passed on.

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

/// The interval at which changed faults are noticed.
const LOOK: Duration = Duration::from_millis(20);

/// The faults of data in transit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The delay of each piece.
    pub delay: Duration,
    /// Bytes per second, in each direction.
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

/// A running proxy. Its connections end with it.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl FaultProxy {
    /// Listens on a free port, in front of the server's socket.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(socket: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let (of_listener, socket) = (Arc::clone(&shared), socket.to_owned());
        thread::spawn(move || accept(&listener, &socket, &of_listener));
        Ok(Self { address, shared })
    }

    /// Returns the connection string through the proxy.
    #[must_use]
    pub fn conninfo(&self) -> String {
        format!(
            "host=127.0.0.1 port={} user=postgres sslmode=disable",
            self.address.port()
        )
    }

    /// Sets the faults of all connections from now on.
    pub fn set(&self, faults: Faults) {
        *self
            .shared
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Swallows all data on the connections that are open now, in one direction or both. Later
    /// connections work.
    pub fn swallow(&self, from_server: bool, to_server: bool) {
        let next = self.shared.next.load(Ordering::SeqCst);
        for (at, wanted) in [from_server, to_server].into_iter().enumerate() {
            if wanted {
                self.shared.swallowed[at].store(next, Ordering::SeqCst);
            }
        }
    }

    /// Closes the connections that are open now, on both sides.
    pub fn cut(&self) {
        let next = self.shared.next.load(Ordering::SeqCst);
        self.shared.cut.store(next, Ordering::SeqCst);
    }

    /// The number of connections so far.
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
        // If the server is down, the client sees a closed connection.
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
        // The other side may have closed it already.
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
            // Data is not even read, so the sender's buffers fill, and an end is not passed on.
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
    // If one direction is swallowed, the connection stays half open. Otherwise both sides see the
    // end.
    let swallowed = |at: usize| number < shared.swallowed[at].load(Ordering::SeqCst);
    let stays = (swallowed(0) || swallowed(1))
        && number >= shared.cut.load(Ordering::SeqCst)
        && !shared.stop.load(Ordering::SeqCst);
    if !stays {
        from.close();
        to.close();
    } else {
        // Held open until the proxy ends, so that neither side notices.
        while !shared.stop.load(Ordering::SeqCst) && number >= shared.cut.load(Ordering::SeqCst) {
            thread::sleep(LOOK);
        }
        from.close();
        to.close();
    }
}
