//! `pg_amcheck`: the structure of tables and B-tree indexes, of a whole database or of a random
//! part of it.

use std::time::Instant;

use repository::ExitKind;

use super::{
    Course, Drill,
    checks::{Answer, Database, answer_of, failed, skipped},
    children,
    server::{QUERY_MAX, Server},
};
use crate::Result;

/// The maximum number of relations of a sample: each is an argument of the program.
const SAMPLE_MAX: usize = 200;

/// Checks each database, up to the limit of bytes in each.
///
/// # Errors
/// [`crate::Error::Interrupted`], and errors of starting the program.
pub(super) fn run(
    drill: &Drill<'_>,
    server: &Server,
    databases: &[Database],
    course: &mut Course,
) -> Result<()> {
    for database in databases {
        let began = Instant::now();
        let answer = one(drill, server, database)?;
        let name = format!("pg_amcheck of {}", database.name);
        course.check(&name, began, answer, ExitKind::Integrity);
    }
    Ok(())
}

fn one(drill: &Drill<'_>, server: &Server, database: &Database) -> Result<Answer> {
    let Some(mut command) = server.program("pg_amcheck") else {
        return Ok(skipped(
            "pg_amcheck is not installed with the server; PostgreSQL 14 and later have it",
        ));
    };
    let ask = |sql: &str| {
        server
            .address
            .query(&database.name, sql, QUERY_MAX, drill.interrupt)
    };
    let available =
        "SELECT count(*) FROM pg_catalog.pg_available_extensions WHERE name = 'amcheck'";
    match ask(available)? {
        Err(refused) => return Ok(failed(refused.message)),
        Ok(rows) if rows.first().and_then(Option::as_deref) == Some("0") => {
            return Ok(skipped(
                "the extension amcheck is not installed with the server (PostgreSQL's contrib package)",
            ));
        }
        Ok(_) => {}
    }
    let limit_bytes = drill.options.amcheck_limit_bytes;
    command
        .env("PGDATABASE", &database.name)
        .args(["--no-password", "--install-missing"]);
    let mut success = "no damage in tables and B-tree indexes".to_owned();
    if database.bytes > limit_bytes {
        // Random relations whose sizes add up to the limit, at least one.
        let sql = format!(
            "SELECT format('%I.%I', nspname, relname) FROM (SELECT nspname, relname, \
             sum(pg_table_size(c.oid)) OVER (ORDER BY number) - pg_table_size(c.oid) AS before FROM \
             (SELECT oid, relname, relnamespace, row_number() OVER (ORDER BY random()) AS number \
             FROM pg_catalog.pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p') c \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace) AS sized \
             WHERE before < {limit_bytes} LIMIT {SAMPLE_MAX}"
        );
        let relations = match ask(&sql)? {
            Ok(rows) => rows,
            Err(refused) => return Ok(failed(refused.message)),
        };
        for relation in relations.iter().flatten() {
            command.arg(format!("--table={relation}"));
        }
        success = format!(
            "no damage in a random sample of {} tables and their indexes, of {} bytes (--amcheck-limit {limit_bytes})",
            relations.len(),
            database.bytes
        );
    }
    let limit = drill.options.check_timeout;
    let ended = children::run(&mut command, limit, drill.interrupt)?;
    Ok(answer_of(&ended, limit, &success))
}
