//! The page with the runbooks of all alerts, to which notifications link.

use std::fmt::Write as _;

use status::alerts::RULES;

use super::{
    document::{Refresh, document},
    format::{code, escape},
};

pub(in crate::http) fn runbook(guarded: bool) -> String {
    let mut body = String::from("<h1>Alerts and what to do</h1>");
    for rule in RULES {
        let patience = match rule.patience_seconds {
            0 => String::new(),
            seconds => format!(" for {seconds} s"),
        };
        let _ = write!(
            body,
            "<section class=\"card\" id=\"{name}\" aria-labelledby=\"{name}-title\">\
             <h2 id=\"{name}-title\">{name}</h2><p>{severity}: {condition}{patience}.</p><p>{text}</p>\
             </section>",
            name = escape(rule.name),
            severity = rule.severity.name(),
            condition = code(rule.condition),
            text = code(rule.runbook),
        );
    }
    document(
        "Alerts and what to do · Tidemark",
        "",
        &body,
        guarded,
        Refresh::Never,
    )
}
