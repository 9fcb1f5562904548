//! [`Ledger`]: bank clients that transfer money and remember acknowledged transfers outside of
//! PostgreSQL.
//!
//! Every transfer moves an amount between two accounts and inserts a row with the client's own
//! sequence number. The sum of all accounts is always 0. A client sends its next transfer only
//! after the last one was acknowledged.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use postgres::Client;

use crate::cluster::connect;

/// The number of accounts, low enough that transfers conflict.
const ACCOUNTS: i32 = 100;

/// A transfer whose commit PostgreSQL acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Acknowledged {
    /// The client.
    pub client: i32,
    /// Its sequence number.
    pub seq: i32,
    /// The time before it was sent.
    pub sent: Timestamp,
    /// The time after the acknowledgement.
    pub acknowledged: Timestamp,
}

/// Running clients.
#[derive(Debug)]
pub struct Ledger {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<Vec<Acknowledged>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Ledger {
    /// Creates the tables and starts the clients.
    ///
    /// # Errors
    /// The server's message.
    pub fn start(conninfo: &str, clients: i32) -> Result<Self> {
        connect(conninfo)?.batch_execute(&format!(
            "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
             INSERT INTO account SELECT id, 0 FROM generate_series(1, {ACCOUNTS}) id;
             CREATE TABLE transfer (client int, seq int, amount bigint, PRIMARY KEY (client, seq));"
        ))?;
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(Mutex::default());
        let spawn = |client: i32| {
            let (stop, conninfo) = (Arc::clone(&stop), conninfo.to_owned());
            let all = Arc::clone(&acknowledged);
            std::thread::spawn(move || run(&conninfo, client, &stop, &all))
        };
        let clients = (1..=clients).map(spawn).collect();
        Ok(Self {
            stop,
            acknowledged,
            clients,
        })
    }

    /// Returns the transfers acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> Vec<Acknowledged> {
        self.acknowledged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops the clients, unless the server has ended them, and returns the acknowledged transfers.
    ///
    /// # Errors
    /// When a client failed for a reason other than its connection.
    pub fn finish(self) -> Result<Vec<Acknowledged>> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client
                .join()
                .ok()
                .context("a client of the ledger panicked")?;
        }
        let mut all = self
            .acknowledged
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut all))
    }
}

fn run(conninfo: &str, client: i32, stop: &AtomicBool, all: &Mutex<Vec<Acknowledged>>) {
    let Ok(mut connection) = connect(conninfo) else {
        return;
    };
    for seq in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let sent = Timestamp::now();
        // An error means that the server died. Unacknowledged transfers are not counted.
        if transfer(&mut connection, client, seq).is_err() {
            break;
        }
        let one = Acknowledged {
            client,
            seq,
            sent,
            acknowledged: Timestamp::now(),
        };
        all.lock().unwrap_or_else(PoisonError::into_inner).push(one);
    }
}

fn transfer(connection: &mut Client, client: i32, seq: i32) -> Result<()> {
    let amount = i64::from(seq % 97 + 1);
    let (from, to) = (
        (client * 7 + seq) % ACCOUNTS + 1,
        (client * 13 + seq * 3) % ACCOUNTS + 1,
    );
    // Always in the same order, so that clients never deadlock.
    let (first, second, amount_first) = if from < to {
        (from, to, -amount)
    } else {
        (to, from, amount)
    };
    let mut transaction = connection.transaction()?;
    if first != second {
        let update = "UPDATE account SET balance = balance + $2 WHERE id = $1";
        transaction.execute(update, &[&first, &amount_first])?;
        transaction.execute(update, &[&second, &(-amount_first)])?;
    }
    let insert = "INSERT INTO transfer VALUES ($1, $2, $3)";
    transaction.execute(insert, &[&client, &seq, &amount])?;
    transaction.commit()?;
    Ok(())
}

/// The content of a restored database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Transfers in the database.
    pub present: usize,
    /// Acknowledged transfers.
    pub acknowledged: usize,
}

/// Checks a restore: no transfer acknowledged before `until` is missing, none sent after it exists,
/// the sum is 0, and no client has a hole. `until = None` means the time of the disaster.
///
/// # Errors
/// The first transfer that violates this.
pub fn prove(
    restored: &mut Client,
    acknowledged: &[Acknowledged],
    until: Option<Timestamp>,
) -> Result<Verdict> {
    let sum: i64 = restored
        .query_one("SELECT sum(balance)::bigint FROM account", &[])?
        .get(0);
    ensure!(sum == 0, "the accounts add up to {sum} instead of 0");
    let rows = restored.query("SELECT client, seq FROM transfer ORDER BY client, seq", &[])?;
    let mut present = HashSet::new();
    let mut expected = (0, 1);
    for row in &rows {
        let (client, seq): (i32, i32) = (row.get(0), row.get(1));
        expected = if client == expected.0 {
            (client, expected.1)
        } else {
            (client, 1)
        };
        ensure!(
            seq == expected.1,
            "client {client} has transfer {seq} but not {}",
            expected.1
        );
        expected.1 += 1;
        present.insert((client, seq));
    }
    for one in acknowledged {
        let held = present.contains(&(one.client, one.seq));
        let wanted = until.is_none_or(|until| one.acknowledged <= until);
        if wanted && !held {
            bail!(
                "MISSING: transfer {} of client {}, acknowledged {}",
                one.seq,
                one.client,
                one.acknowledged
            );
        }
        if until.is_some_and(|until| one.sent > until) && held {
            bail!(
                "TOO LATE: transfer {} of client {}, sent {}",
                one.seq,
                one.client,
                one.sent
            );
        }
    }
    let before = |one: &&Acknowledged| until.is_none_or(|until| one.acknowledged <= until);
    Ok(Verdict {
        present: present.len(),
        acknowledged: acknowledged.iter().filter(before).count(),
    })
}

/// The loss in a restore.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Missing acknowledged transfers.
    pub transfers: usize,
    /// Seconds from the newest acknowledged transfer that exists to the newest acknowledged one.
    pub seconds: f64,
}

/// Measures how many acknowledged transfers a restore lost. It must end at a single point in time,
/// with a sum of 0.
///
/// # Errors
/// When a transfer is missing that is older than an existing one.
pub fn measure(restored: &mut Client, acknowledged: &[Acknowledged]) -> Result<Loss> {
    let rows = restored.query("SELECT client, seq FROM transfer", &[])?;
    let present: HashSet<(i32, i32)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let is_present = |one: &&Acknowledged| present.contains(&(one.client, one.seq));
    let kept: Vec<Acknowledged> = acknowledged.iter().filter(is_present).copied().collect();
    // Checks holes and the sum among the existing transfers.
    prove(restored, &kept, None)?;
    let newest = |some: &[Acknowledged]| some.iter().map(|one| one.acknowledged).max();
    let seconds = match (newest(acknowledged), newest(&kept)) {
        (Some(lost), Some(kept)) => lost.duration_since(kept).as_secs_f64(),
        _ => bail!("nothing that was acknowledged is there"),
    };
    Ok(Loss {
        transfers: acknowledged.len() - kept.len(),
        seconds,
    })
}
