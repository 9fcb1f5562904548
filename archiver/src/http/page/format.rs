//! Numbers and times as people read them, and the one escape.

use wal_format::PgTimestamp;

/// Makes a text safe inside of HTML's text and attributes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Escapes, and sets what stands in backquotes as code.
pub(super) fn code(text: &str) -> String {
    let parts = escape(text);
    let mut html = String::new();
    for (number, part) in parts.split('`').enumerate() {
        if number % 2 == 1 {
            html += &format!("<code>{part}</code>");
        } else {
            html += part;
        }
    }
    html
}

pub(super) fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "unknown".to_owned(), duration)
}

/// `0 s`, `0.4 s`, `12 s`, `3 min 20 s`, `5 h 1 min`, `2 d 4 h`.
pub(super) fn duration(seconds: f64) -> String {
    if seconds <= 0.0 {
        return "0 s".to_owned();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and saturating is fine for a length of time"
    )]
    let whole = seconds.round() as u64;
    let pair = |major: u64, unit: &str, minor: u64, small: &str| {
        if minor == 0 {
            format!("{major} {unit}")
        } else {
            format!("{major} {unit} {minor} {small}")
        }
    };
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => pair(whole / 60, "min", whole % 60, "s"),
        3600..86_400 => pair(whole / 3600, "h", whole % 3600 / 60, "min"),
        _ => pair(whole / 86_400, "d", whole % 86_400 / 3600, "h"),
    }
}

pub(super) fn bytes(value: Option<u64>) -> String {
    #[expect(clippy::cast_precision_loss, reason = "it is printed with one digit")]
    let value = value.map(|value| value as f64);
    value.map_or_else(|| "unknown".to_owned(), amount)
}

/// An amount of bytes, or a rate without its `/s`.
pub(super) fn amount(mut value: f64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if value < 1024.0 {
        return format!("{value:.0} B");
    }
    value /= 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A time element: UTC to the second; the script adds local time on hover.
pub(super) fn instant(time: PgTimestamp) -> String {
    let text = time.to_jiff().map_or_else(
        || "unknown".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
    );
    format!("<time datetime=\"{time}\">{text}</time>")
}

/// Seconds from `earlier` to `later`.
pub(super) fn span(later: PgTimestamp, earlier: PgTimestamp) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a span to be read")]
    let seconds = later.micros_since(earlier) as f64 / 1e6;
    seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_amounts_are_short_and_have_units() {
        for (value, text) in [
            (0.0, "0 s"),
            (0.42, "0.4 s"),
            (12.3, "12 s"),
            (200.0, "3 min 20 s"),
            (3600.0, "1 h"),
            (187_200.0, "2 d 4 h"),
        ] {
            assert_eq!(duration(value), text);
        }
        assert_eq!(bytes(Some(1023)), "1023 B");
        assert_eq!(bytes(Some(3 << 20)), "3.0 MiB");
        assert_eq!(bytes(None), "unknown");
    }

    #[test]
    fn code_is_set_and_nothing_gets_through() {
        assert_eq!(
            code("run `a <b>` & go"),
            "run <code>a &lt;b&gt;</code> &amp; go"
        );
    }
}
