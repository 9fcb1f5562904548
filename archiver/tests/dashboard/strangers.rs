//! Unknown clients and slow readers: the page, the metrics and the stream continue, in bounded
//! memory. A scrape is answered while both the store and PostgreSQL are stopped.

use std::{
    env, fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use testbed::object_store::ObjectStoreServer;

use super::{archived, body, state};
use crate::support::{
    Archiver, Place, Server, postgres_bin, run_command, succeed, wait_flushed, wait_until,
};

/// The number of idle connections.
const IDLE: usize = 10_000;
/// The memory that serving them may cost. The number of served connections is bounded, so it does
/// not grow with their number.
const MEMORY_KIB_MAX: u64 = 96 << 10;

/// Checks that WAL is still flushed over the same stream, and that the page and the metrics are
/// served.
fn assert_undisturbed(server: &Server, archiver: &Archiver, walsender: &str) {
    server.write_wal(10);
    wait_flushed(server, server.lsn());
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), walsender);
    assert!(
        archiver
            .get("/metrics")
            .contains("pitr_stream_connected{cluster=\"main\"} 1.0")
    );
    assert!(archiver.get("/").contains("Losing the primary"));
}

#[test]
fn ten_thousand_idle_connections_disturb_neither_the_page_nor_the_stream() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, all).expect("more files");
    let walsender = server.sql("SELECT pid FROM pg_stat_replication");
    let before = archiver.peak_memory_kib();
    let address = archiver.address();
    let mut idle = Vec::new();
    for number in 0..IDLE {
        let mut stream = TcpStream::connect(&address).expect("it listens");
        // Some clients send nothing, some half a request, some an invalid one.
        let said: &[u8] = match number % 4 {
            0 => b"",
            1 => b"GET /metr",
            2 => b"\x16\x03\x01\xff\xff\0\0garbage",
            _ => b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
        };
        drop(stream.write_all(said));
        idle.push(stream);
        if number % 2500 == 2499 {
            assert_undisturbed(&server, &archiver, &walsender);
        }
    }
    assert_eq!(idle.len(), IDLE);
    // The backup is noticed when the catalog is next read.
    wait_until("it is OK", || state(&archiver) == "ok");
    let after = archiver.peak_memory_kib();
    assert!(
        after < before + MEMORY_KIB_MAX,
        "{before} KiB became {after} KiB"
    );
    drop(idle);
    assert_eq!(archiver.terminate().code(), Some(0));
}

/// Random numbers that are the same for the same seed (`TIDEMARK_SEED`).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit.max(1) as u64).expect("small")
    }

    /// Returns a valid request with random changes.
    fn request(&mut self) -> Vec<u8> {
        const PATHS: [&str; 9] = [
            "/",
            "/metrics",
            "/api/v1/clusters/main/series?metric=rpo_remote&from=1&to=9&points=3",
            "/api/v1/clusters/main/locate?time=2026-11-21T10:00:00Z",
            "/api/v1/clusters/main/health?max_rpo=1s",
            "/api/v1/clusters/main/events?after=18446744073709551615",
            "/api/v1/events/stream",
            "/login",
            "/?at=%00%ff&range=24h",
        ];
        let path = PATHS[self.below(PATHS.len())];
        let method = ["GET", "HEAD", "POST", "PUT", "\0"][self.below(5)];
        let framing = [
            "",
            "Content-Length: 5\r\n",
            "Content-Length: -1\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Connection: upgrade\r\nUpgrade: h2c\r\n",
            "Expect: 100-continue\r\nContent-Length: 4000000000\r\n",
        ][self.below(7)];
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\ntoken=x")
                .into_bytes();
        for _ in 0..self.below(6) {
            let at = self.below(request.len());
            match self.below(5) {
                0 => request[at] ^= 1 << self.below(8),
                1 => request.truncate(at),
                2 => drop(request.splice(at..at, *b"\r\n")),
                3 => drop(request.splice(at..at, vec![b'A'; 1 << self.below(16)])),
                _ => request[at] = 0xff,
            }
            if request.is_empty() {
                request.push(b'G');
            }
        }
        request
    }
}

/// Returns the status code of an answer, or `None` if its status line is not valid. A change of a
/// request may turn its version into HTTP/1.0, and the answer then has that version.
fn status(head: &str) -> Option<u16> {
    let version = ["HTTP/1.1 ", "HTTP/1.0 "];
    let rest = version
        .iter()
        .find_map(|version| head.strip_prefix(version))?;
    let (code, reason) = rest.split_at_checked(3)?;
    let is_valid = code.bytes().all(|byte| byte.is_ascii_digit()) && reason.starts_with(' ');
    code.parse()
        .ok()
        .filter(|code| is_valid && (100..600).contains(code))
}

#[test]
fn malformed_requests_disturb_neither_the_page_nor_the_stream() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let seed = env::var("TIDEMARK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed: u64 =
        seed.unwrap_or_else(|| jiff::Timestamp::now().as_microsecond().unsigned_abs() | 1);
    eprintln!("TIDEMARK_SEED={seed} says the same again");
    let mut chance = Chance(seed);
    let rounds = if testbed::is_long() { 20_000 } else { 2000 };
    let walsender = server.sql("SELECT pid FROM pg_stat_replication");
    let (before, address) = (archiver.peak_memory_kib(), archiver.address());
    let mut answered = 0;
    for round in 0..rounds {
        let mut stream = TcpStream::connect(&address).expect("it listens");
        drop(stream.write_all(&chance.request()));
        drop(stream.shutdown(Shutdown::Write));
        stream
            .set_read_timeout(Some(Duration::from_millis(400)))
            .expect("a limit");
        let mut head = [0; 64];
        // A wrong password is answered after a pause, and a stream never ends, so neither is
        // awaited.
        let read = if round % 4 == 0 {
            stream.read(&mut head).unwrap_or(0)
        } else {
            0
        };
        if read > 12 {
            answered += 1;
            let head = String::from_utf8_lossy(&head[..read]).into_owned();
            let status = status(&head);
            assert!(status.is_some_and(|status| status != 500), "{head}");
        }
        if round % 500 == 499 {
            assert_undisturbed(&server, &archiver, &walsender);
        }
    }
    assert!(
        answered > rounds / 40,
        "requests reach the routes: {answered} of {rounds}"
    );
    let after = archiver.peak_memory_kib();
    assert!(
        after < before + MEMORY_KIB_MAX,
        "{before} KiB became {after} KiB"
    );
    let log = archiver.log();
    assert!(!log.contains("panicked"), "{log}");
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn readers_that_read_nothing_are_cut_and_cost_bounded_memory() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let walsender = server.sql("SELECT pid FROM pg_stat_replication");
    let (before, address) = (archiver.peak_memory_kib(), archiver.address());
    // Requests the page repeatedly without reading, until the socket is full in both directions.
    let mut greedy = TcpStream::connect(&address).expect("it listens");
    greedy
        .set_write_timeout(Some(Duration::from_millis(500)))
        .expect("a limit");
    let mut asked = 0;
    while greedy
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .is_ok()
    {
        asked += 1;
        assert!(asked < 5_000_000, "requests are taken without end");
    }
    // Live streams that nobody reads: more than the permitted number.
    let live: Vec<TcpStream> = (0..80)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).expect("it listens");
            let request = b"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";
            stream.write_all(request).expect("a request");
            stream
        })
        .collect();
    // A request header that arrives byte by byte is not awaited.
    let mut slow = TcpStream::connect(&address).expect("it listens");
    slow.set_read_timeout(Some(Duration::from_millis(500)))
        .expect("a limit");
    let mut bytes = b"GET /metrics HTTP/1.1\r\nX-Slow: "
        .iter()
        .chain(std::iter::repeat(&b'x'));
    wait_until("the slow head is cut off", || {
        let byte = *bytes.next().expect("without end");
        let written = slow.write_all(&[byte]);
        let mut answer = [0; 1];
        match slow.read_exact(&mut answer) {
            Ok(()) => true,
            Err(error) => written.is_err() || error.kind() == std::io::ErrorKind::UnexpectedEof,
        }
    });
    assert_undisturbed(&server, &archiver, &walsender);
    let after = archiver.peak_memory_kib();
    assert!(
        after < before + MEMORY_KIB_MAX,
        "{before} KiB became {after} KiB"
    );
    drop((greedy, live));
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn a_scrape_touches_neither_the_store_nor_postgresql() {
    let Some(bin) = postgres_bin() else { return };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let command = place.command_in_bucket(&store, server.conninfo());
    let archiver = run_command(command(), place.repository().parent().expect("a directory"));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    succeed(
        "backup",
        &command().arg("backup").output().expect("it runs"),
    );
    wait_until("it is OK", || state(&archiver) == "ok");

    // Any request to one of them now waits until they continue.
    let pids = server.sql("SELECT string_agg(pid::text, ' ') FROM pg_stat_activity");
    let postmaster = fs::read_to_string(server.data().join("postmaster.pid")).expect("a file");
    let postmaster = postmaster.lines().next().expect("its pid").to_owned();
    let tell = |signal| {
        for pid in pids.split(' ').chain([postmaster.as_str()]) {
            let pid = pid.parse().ok().and_then(Pid::from_raw).expect("a pid");
            // The process that answered the question has ended.
            let _gone = kill_process(pid, signal);
        }
        store.signal(signal).expect("a signal");
    };
    tell(Signal::STOP);
    for path in [
        "/metrics",
        "/",
        "/api/v1/clusters",
        "/api/v1/clusters/main",
        "/api/v1/clusters/main/window",
        "/api/v1/clusters/main/backups",
        "/api/v1/clusters/main/drills",
        "/api/v1/clusters/main/events",
        "/api/v1/clusters/main/series",
        "/healthz",
        "/readyz",
        "/api/v1/openapi.json",
    ] {
        // `get` waits for the whole answer, so the archiver itself must have produced it.
        assert!(!body(&archiver.get(path)).is_empty(), "{path}");
    }
    wait_until("it says that it sees neither", || {
        let metrics = body(&archiver.get("/metrics"));
        let remote = "pitr_rpo_seconds{cluster=\"main\",tier=\"remote\"} ";
        let rpo = metrics.lines().find_map(|line| line.strip_prefix(remote));
        rpo.and_then(|rpo| rpo.parse::<f64>().ok())
            .expect("a number")
            > 6.0
    });
    tell(Signal::CONT);
    wait_until("it is OK again", || state(&archiver) == "ok");
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn the_stream_of_events_is_live() {
    let Some((server, _place, archiver)) = archived() else {
        return;
    };
    let mut stream = TcpStream::connect(archiver.address()).expect("it listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a limit");
    stream
        .write_all(b"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .expect("a request");
    server.write_wal(10);
    let mut text = String::new();
    let mut buffer = [0; 8192];
    while text
        .matches("event: status\ndata: {\"schema\":\"v1\",\"cluster\":\"main\"")
        .count()
        < 3
    {
        let read = stream.read(&mut buffer).expect("messages come");
        assert!(read > 0, "it ended: {text}");
        text += &String::from_utf8_lossy(&buffer[..read]);
    }
    assert!(text.contains("content-type: text/event-stream"), "{text}");
}
