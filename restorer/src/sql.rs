//! Connections to a restored server and queries of it.

use std::{path::PathBuf, time::Duration};

use postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::{Result, start::Interrupt};

/// The time that a cancelled query gets beyond its limit.
const CANCEL_MAX: Duration = Duration::from_secs(5);
/// The number of characters of an answer that are kept.
const ANSWER_MAX: usize = 300;
/// `query_canceled`, which `statement_timeout` raises.
const CANCELED: &str = "57014";

/// The address of the restored server.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) sockets: PathBuf,
    pub(crate) port: u16,
    pub(crate) user: String,
    /// Settings of each session, which override those of the parent's roles and databases.
    pub(crate) options: String,
}

/// The reason why a query has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// SQLSTATE; `None` if the server did not answer.
    pub(crate) code: Option<String>,
    pub(crate) message: String,
}

impl Refused {
    /// Returns true if the time limit ended the query or the connection.
    pub(crate) fn is_timeout(&self) -> bool {
        self.code.as_deref() == Some(CANCELED)
    }
}

impl From<postgres::Error> for Refused {
    fn from(error: postgres::Error) -> Self {
        let message = match error.as_db_error() {
            Some(error) => format!("{}: {}", error.severity(), error.message()),
            None => error.to_string(),
        };
        Self {
            code: error.code().map(|code| code.code().to_owned()),
            message,
        }
    }
}

/// The first column of each row; `None` for NULL.
pub(crate) type Rows = Vec<Option<String>>;

impl Address {
    /// Runs SQL in a database. Returns the first column of each row.
    ///
    /// # Errors
    /// The outer error is [`crate::Error::Interrupted`]; the inner one is the server's.
    pub(crate) fn query(
        &self,
        database: &str,
        sql: &str,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> Result<std::result::Result<Rows, Refused>> {
        self.query_reporting(database, sql, limit, interrupt, &|| ())
    }

    /// Does the same, and calls `slow` once if there is no answer after
    /// [`SILENCE_MAX`](crate::start::SILENCE_MAX).
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub(crate) fn query_reporting(
        &self,
        database: &str,
        sql: &str,
        limit: Duration,
        interrupt: &Interrupt,
        slow: &dyn Fn(),
    ) -> Result<std::result::Result<Rows, Refused>> {
        let (address, database, sql) = (self.clone(), database.to_owned(), sql.to_owned());
        let timed_out = || Refused {
            code: Some(CANCELED.to_owned()),
            message: format!("it ran longer than its limit of {} s", limit.as_secs_f64()),
        };
        let ask = move || -> std::result::Result<Rows, Refused> {
            let mut client = address.connect(&database)?;
            // An error of the server takes longer to arrive than the limit, so round up.
            let millis = limit.as_millis().max(1);
            client.batch_execute(&format!("SET statement_timeout = {millis}"))?;
            let messages = client.simple_query(&sql)?;
            let rows = messages.into_iter().filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row.try_get(0).ok().flatten().map(shortened)),
                _ => None,
            });
            Ok(rows.collect())
        };
        // The limit of the session does not cover the connection, which may wait for a lock.
        Ok(match interrupt.within(limit + CANCEL_MAX, slow, ask)? {
            None => Err(timed_out()),
            Some(Err(refused)) if refused.is_timeout() => Err(timed_out()),
            Some(answer) => answer,
        })
    }

    fn connect(&self, database: &str) -> std::result::Result<Client, Refused> {
        let mut config = Config::new();
        config
            .host_path(&self.sockets)
            .port(self.port)
            .user(&self.user)
            .dbname(database)
            .options(&self.options)
            .application_name("pitr-restore")
            .connect_timeout(Duration::from_secs(30));
        Ok(config.connect(NoTls)?)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(ANSWER_MAX).collect()
}
