//! The tiles with the numbers of a cluster. Each has at most two notes, and a neutral colour while
//! its number is unknown.

use std::fmt::Write as _;

use status::report::ClusterReport;

use super::{
    format::{bytes, duration, instant, seconds, span},
    view::View,
};

/// The colour of a tile.
#[derive(Clone, Copy)]
enum Tone {
    Plain,
    Bad,
    Unknown,
}

struct Tile {
    id: &'static str,
    term: &'static str,
    /// The value and the notes are HTML, already escaped where needed.
    value: String,
    notes: Vec<String>,
    tone: Tone,
}

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let report = view.report;
    out.push_str("<dl class=\"tiles\" id=\"tiles\" data-live>");
    for tile in [
        rpo(report),
        rto(report),
        window(report),
        lag(report),
        drill(report),
    ] {
        let tone = match tile.tone {
            Tone::Plain => "",
            Tone::Bad => " bad",
            Tone::Unknown => " unknown",
        };
        let notes = tile.notes.iter().map(|note| format!("<span>{note}</span>"));
        let _ = write!(
            out,
            "<div class=\"tile{tone}\" id=\"tile-{}\"><dt>{}</dt><dd><b class=\"value\">{}</b>\
             <span class=\"notes\">{}</span></dd></div>",
            tile.id,
            tile.term,
            tile.value,
            notes.collect::<String>()
        );
    }
    out.push_str("</dl>");
}

fn rpo(report: &ClusterReport) -> Tile {
    let rpo = report.durable.remote.rpo_seconds;
    Tile {
        id: "rpo",
        term: "RPO now",
        value: seconds(rpo),
        notes: vec![
            format!("target {}", duration(report.rpo_target_seconds)),
            format!("greatest in 24 h {}", seconds(report.rpo_max_24h_seconds)),
        ],
        tone: match rpo {
            None => Tone::Unknown,
            Some(rpo) if rpo > report.rpo_target_seconds => Tone::Bad,
            Some(_) => Tone::Plain,
        },
    }
}

fn rto(report: &ClusterReport) -> Tile {
    let rto = &report.rto;
    let (value, tone) = match (rto.estimate_seconds, rto.target_seconds) {
        (None, _) => ("not measured".to_owned(), Tone::Unknown),
        (Some(estimate), target) => (
            format!("{} <small>estimate</small>", duration(estimate)),
            match target {
                Some(target) if estimate > target => Tone::Bad,
                _ => Tone::Plain,
            },
        ),
    };
    let measured = match rto.measured_seconds {
        Some(measured) => format!("measured by the last drill {}", duration(measured)),
        None => "no drill has run yet".to_owned(),
    };
    let target = match rto.target_seconds {
        Some(target) => format!("target {}", duration(target)),
        None => "no target is set (<code>rto_target</code>)".to_owned(),
    };
    Tile {
        id: "rto",
        term: "RTO now",
        value,
        notes: vec![target, measured],
        tone,
    }
}

fn window(report: &ClusterReport) -> Tile {
    let tile = |value: &str, notes: Vec<String>, tone| Tile {
        id: "window",
        term: "Restorable",
        value: value.to_owned(),
        notes,
        tone,
    };
    let window = &report.window;
    let bad = window.refusal.is_some() || window.gaps.is_some_and(|gaps| gaps > 0);
    let tone = if bad { Tone::Bad } else { Tone::Plain };
    match (window.earliest, window.latest) {
        (Some(earliest), Some(latest)) => {
            let gaps = match window.gaps {
                Some(0) => "no gap".to_owned(),
                Some(1) => "1 gap".to_owned(),
                Some(gaps) => format!("{gaps} gaps"),
                None => "gaps unknown".to_owned(),
            };
            let notes = vec![
                format!("from {}", instant(earliest)),
                format!("to {}, {gaps}", instant(latest)),
            ];
            tile(&duration(span(latest, earliest)), notes, tone)
        }
        (Some(_), None) => {
            let note = "for the first commit after the backup".to_owned();
            tile("waiting", vec![note], Tone::Unknown)
        }
        _ if report.last_backup.is_some() && window.refusal.is_some() => {
            let note = "the reason is above".to_owned();
            tile("nothing", vec![note], Tone::Bad)
        }
        _ if report.last_backup.is_some() || !report.looked => {
            tile("unknown", vec!["not known yet".to_owned()], Tone::Unknown)
        }
        _ => {
            let note = "run <code>wal-archiver backup</code>".to_owned();
            tile("none yet", vec![note], Tone::Bad)
        }
    }
}

fn lag(report: &ClusterReport) -> Tile {
    let (local, remote) = (&report.durable.local, &report.durable.remote);
    Tile {
        id: "lag",
        term: "Lag",
        value: bytes(remote.lag_bytes),
        notes: vec![
            format!("this host {}", bytes(local.lag_bytes)),
            format!("queue {}", bytes(Some(report.counters.upload_queue_bytes))),
        ],
        tone: match remote.lag_bytes {
            None => Tone::Unknown,
            Some(_) => Tone::Plain,
        },
    }
}

fn drill(report: &ClusterReport) -> Tile {
    let (value, notes, tone) = match &report.last_drill {
        None => (
            "none yet",
            vec!["no restore is proved".to_owned()],
            Tone::Unknown,
        ),
        Some(drill) => {
            let (value, tone) = match drill.passed {
                true => ("✓ passed", Tone::Plain),
                false => ("✖ failed", Tone::Bad),
            };
            let ago = seconds(Some(span(report.as_of, drill.finished)));
            let notes = vec![
                format!("{ago} ago"),
                format!("lost {}", seconds(drill.loss_seconds)),
            ];
            (value, notes, tone)
        }
    };
    Tile {
        id: "drill",
        term: "Last drill",
        value: value.to_owned(),
        notes,
        tone,
    }
}
