//! [`Mix`]: clients that commit, abort, use subtransactions and prepare transactions as fast as
//! possible, so that commits race for their place in the WAL.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context, Result};
use postgres::Client;

use crate::cluster::connect;

/// A client's record of a transaction that it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The number written into table `done`.
    pub xid: u32,
    /// True if PostgreSQL acknowledged its commit. False if it was rolled back or left prepared.
    pub committed: bool,
}

/// Running clients.
#[derive(Debug)]
pub struct Mix {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<Vec<Begun>>>>,
}

impl Mix {
    /// Creates table `done` and starts clients. The server needs `max_prepared_transactions` of
    /// twice their number.
    ///
    /// # Errors
    /// The server's message.
    pub fn start(conninfo: &str, clients: u32) -> Result<Self> {
        connect(conninfo)?
            .batch_execute("CREATE TABLE IF NOT EXISTS done (xid bigint, part int)")?;
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |client| {
            let (stop, conninfo) = (Arc::clone(&stop), conninfo.to_owned());
            std::thread::spawn(move || run(&conninfo, client, &stop))
        };
        let clients = (1..=clients).map(spawn).collect();
        Ok(Self { stop, clients })
    }

    /// Stops the clients and returns their records.
    ///
    /// # Errors
    /// The first failure.
    pub fn finish(self) -> Result<Vec<Begun>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for client in self.clients {
            all.extend(client.join().ok().context("a client panicked")??);
        }
        Ok(all)
    }
}

fn run(conninfo: &str, client: u32, stop: &AtomicBool) -> Result<Vec<Begun>> {
    let mut connection = connect(conninfo)?;
    let mut begun = Vec::new();
    for turn in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        begun.push(transaction(&mut connection, client, turn)?);
    }
    Ok(begun)
}

fn transaction(connection: &mut Client, client: u32, turn: u32) -> Result<Begun> {
    connection.batch_execute("BEGIN")?;
    let insert = "INSERT INTO done VALUES (pg_current_xact_id()::text::bigint, 0) RETURNING xid";
    let xid: i64 = connection.query_one(insert, &[])?.get(0);
    let xid = u32::try_from(xid).context("the first epoch of transaction numbers")?;
    let gid = format!("client {client} turn {turn}");
    let (end, committed) = match turn % 16 {
        3 => {
            connection.batch_execute(
                "SAVEPOINT a; INSERT INTO done VALUES (pg_current_xact_id()::text::bigint, 1); \
                 ROLLBACK TO a; INSERT INTO done VALUES (pg_current_xact_id()::text::bigint, 2)",
            )?;
            ("COMMIT".to_owned(), true)
        }
        6 => ("ROLLBACK".to_owned(), false),
        // One for each client stays in doubt permanently. All others are ended immediately
        // afterwards.
        9 if turn == 25 => (format!("PREPARE TRANSACTION '{gid}'"), false),
        9 => {
            connection.batch_execute(&format!("PREPARE TRANSACTION '{gid}'"))?;
            (format!("COMMIT PREPARED '{gid}'"), true)
        }
        12 => {
            connection.batch_execute(&format!("PREPARE TRANSACTION '{gid}'"))?;
            (format!("ROLLBACK PREPARED '{gid}'"), false)
        }
        _ => ("COMMIT".to_owned(), true),
    };
    connection.batch_execute(&end)?;
    Ok(Begun { xid, committed })
}
