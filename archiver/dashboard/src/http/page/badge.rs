//! The badge of a state.

use status::state::State;

/// Returns the shape and the word of a state, so that it is recognizable without colours.
pub(in crate::http) fn badge(state: State) -> (&'static str, &'static str) {
    match state {
        State::Ok => ("●", "OK"),
        State::Degraded => ("▲", "DEGRADED"),
        State::AtRisk => ("◆", "AT RISK"),
        State::Broken => ("✖", "BROKEN"),
        State::Unknown => ("?", "UNKNOWN"),
    }
}

pub(super) fn badge_html(state: State) -> String {
    let (shape, word) = badge(state);
    format!(
        "<span class=\"badge {}\"><span aria-hidden=\"true\">{shape}</span> {word}</span>",
        state.name()
    )
}
