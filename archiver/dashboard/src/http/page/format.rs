//! Numbers, times and sentences as users read them.

use maud::{Markup, html};
use wal_format::PgTimestamp;

pub(super) use status::units::{amount, bytes, duration, seconds, span, without_errno};

/// Marks the parts of a text in backquotes as code.
pub(super) fn code(text: &str) -> Markup {
    html! {
        @for (number, part) in text.split('`').enumerate() {
            @if number % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// Renders a sentence without error numbers, and the whole text to unfold if it had one.
pub(super) fn details(text: &str) -> Markup {
    let plain = without_errno(text);
    html! {
        (code(&plain))
        @if plain != text {
            " " details class="raw" { summary { "Details" } (code(text)) }
        }
    }
}

/// Renders a time element: UTC to the second. The script adds the local time on hover.
pub(super) fn instant(time: PgTimestamp) -> Markup {
    element(time, "%Y-%m-%d %H:%M:%SZ")
}

fn element(time: PgTimestamp, pattern: &str) -> Markup {
    html! { time datetime=(time) { (text(time, pattern)) } }
}

/// Returns the UTC day of a time.
pub(super) fn day(time: PgTimestamp) -> String {
    text(time, "%A, %Y-%m-%d")
}

/// Renders a time element with the UTC time of day only.
pub(super) fn time_of_day(time: PgTimestamp) -> Markup {
    element(time, "%H:%M:%SZ")
}

/// Formats a time in UTC by a pattern of `strftime`.
pub(super) fn text(time: PgTimestamp, pattern: &str) -> String {
    time.to_jiff().map_or_else(
        || "unknown".to_owned(),
        |time| time.strftime(pattern).to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_are_under_details() {
        assert_eq!(details("it is away.").0, "it is away.");
        let html = details("open <a>: Not found (os error 2).").0;
        assert!(
            html.starts_with("open &lt;a&gt;: Not found. <details"),
            "{html}"
        );
        assert!(html.contains("Not found (os error 2).</details>"), "{html}");
    }

    #[test]
    fn code_is_set_and_nothing_gets_through() {
        assert_eq!(
            code("run `a <b>` & go").0,
            "run <code>a &lt;b&gt;</code> &amp; go"
        );
    }
}
