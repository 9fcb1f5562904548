//! The page with the runbooks of all alerts, to which notifications link.

use maud::html;
use status::alerts::RULES;

use super::{
    document::{Refresh, document},
    format::code,
};

pub(in crate::http) fn runbook(guarded: bool) -> String {
    let body = html! {
        h1 { "Alerts and what to do" }
        @for rule in RULES {
            @let title = format!("{}-title", rule.name);
            section class="card" id=(rule.name) aria-labelledby=(title) {
                h2 id=(title) { (rule.name) }
                p {
                    (rule.severity.name()) ": " (code(rule.condition))
                    @if rule.patience_seconds > 0 { " for " (rule.patience_seconds) " s" }
                    "."
                }
                p { (code(rule.runbook)) }
            }
        }
    };
    let title = "Alerts and what to do · Tidemark";
    document(title, None, &body, guarded, Refresh::Never)
}
