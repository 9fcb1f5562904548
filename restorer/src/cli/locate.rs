//! `pitr-restore locate`: its options and its output.

use clap::{ArgGroup, Args};
use jiff::{SignedDuration, SpanRelativeTo, Timestamp};

use super::output;
use crate::{
    Error, Result,
    inventory::Archive,
    list::RestorePoint,
    locate::{Located, LocatedTransaction, NEIGHBOURS, Question, Relation, locate},
    target::{parse_time, parse_xid},
};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("question").required(true).args(["around", "xid", "dropped"])))]
pub(super) struct LocateArgs {
    /// Find transactions near this time.
    #[arg(long, value_name = "TIME")]
    around: Option<String>,
    /// The distance before and after the time.
    #[arg(long, value_name = "SPAN", default_value = "5 minutes")]
    within: String,
    /// Find the end of this transaction and what it changed. XID is a number, also in hexadecimal
    /// or with its epoch.
    #[arg(long, value_name = "XID", value_parser = parse_xid)]
    xid: Option<u64>,
    /// Find when this relation was dropped, truncated or rewritten: its name, or the number of its
    /// file.
    #[arg(long, value_name = "NAME")]
    dropped: Option<String>,
    /// Search this timeline and its ancestors. Default: the newest.
    #[arg(long, value_name = "TIMELINE")]
    target_timeline: Option<String>,
    /// List up to N commits on each side of the time, besides drops and large deletes. Text and
    /// JSON (`omitted`) say how many more there are.
    #[arg(long, value_name = "N", default_value_t = NEIGHBOURS)]
    limit: usize,
    /// Zone of a time without an offset, for example Europe/Berlin.
    #[arg(long, value_name = "ZONE")]
    time_zone: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    pub(super) json: bool,
}

impl LocateArgs {
    fn question(&self) -> Result<Question> {
        if let Some(xid) = self.xid {
            return Ok(Question::Xid(xid));
        }
        if let Some(name) = &self.dropped {
            return Ok(Question::Dropped(name.clone()));
        }
        let around = self.around.as_deref().unwrap_or_default();
        let within = self
            .within
            .parse::<jiff::Span>()
            .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
            .map(SignedDuration::abs)
            .map_err(|_| {
                let within = &self.within;
                Error::usage(format!(
                    "--within \"{within}\" is no span of time; write it as '10 minutes'"
                ))
            })?;
        Ok(Question::Around {
            time: parse_time(around, self.time_zone.as_deref(), Timestamp::now())?,
            within: i64::try_from(within.as_micros()).unwrap_or(i64::MAX),
        })
    }
}

pub(super) fn run(archive: &Archive, args: &LocateArgs, json: bool) -> Result<()> {
    let timeline = args.target_timeline.clone();
    let located = locate(archive, &args.question()?, timeline, args.limit)?;
    if json {
        return output::json(&located);
    }
    print(&located);
    Ok(())
}

fn print(located: &Located) {
    output::line(&format!("timelines {}", located.timelines));
    let mut points = located.restore_points.iter().peekable();
    for one in &located.transactions {
        while let Some(point) = points.next_if(|point| point.lsn < one.lsn) {
            restore_point(point);
        }
        transaction(one);
    }
    points.for_each(restore_point);
    let omitted = &located.omitted;
    let more: Vec<String> = [(omitted.earlier, "earlier"), (omitted.later, "later")]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, side)| format!("{count} {side}"))
        .collect();
    if !more.is_empty() {
        let (count, more) = (omitted.earlier + omitted.later, more.join(" and "));
        let are = if count == 1 {
            "transaction is"
        } else {
            "transactions are"
        };
        output::line(&format!(
            "{more} {are} not listed; list more with --limit N"
        ));
    }
    for note in &located.notes {
        output::line(&format!("note: {note}"));
    }
}

fn restore_point(point: &RestorePoint) {
    let (time, lsn, name) = (point.time, point.lsn, &point.name);
    output::line(&format!(
        "{time}  restore point \"{name}\" at {lsn}: --target-name '{name}' --at-lsn {lsn}"
    ));
}

fn transaction(one: &LocatedTransaction) {
    let kind = if one.kind.is_commit() {
        "commit"
    } else {
        "abort"
    };
    output::line(&format!(
        "{}  {kind} of transaction {} at {}",
        one.time, one.xid, one.lsn
    ));
    for relation in &one.removed {
        output::line(&format!(
            "    dropped, truncated or rewritten: {}",
            called(relation)
        ));
    }
    for rows in &one.rows {
        let counts = rows.counts;
        output::line(&format!(
            "    {} rows deleted, {} updated, {} inserted: {}",
            counts.deleted,
            counts.updated,
            counts.inserted,
            called(&rows.relation)
        ));
    }
    output::line(&match &one.just_before {
        Some(flags) => format!("    just before: {flags}"),
        None => "    not restorable: no backup reaches it".to_owned(),
    });
}

fn called(relation: &Relation) -> String {
    let file = relation.file;
    let database = relation.database.as_ref().map_or_else(
        || format!("database {}", file.database),
        |name| format!("database {name}"),
    );
    match &relation.name {
        Some(name) => format!("{name} in {database}"),
        None => format!("file {} in {database}", file.relation),
    }
}
