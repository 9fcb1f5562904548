//! Numbers as text for users, in the same form on the page and in `status`.

use wal_format::PgTimestamp;

/// The way to a restore drill. Every text that advises one uses this constant.
pub const DRILL_ADVICE: &str = "Run `pitr-restore drill`, and set `drill_schedule` to repeat it.";

/// Formats a duration in seconds, or `unknown`.
pub fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "unknown".to_owned(), duration)
}

/// Formats a duration: `0 s`, `0.4 s`, `12 s`, `3 min 20 s`, `5 h 1 min`, `2 d 4 h`.
pub fn duration(seconds: f64) -> String {
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

/// Formats a number of bytes, or `unknown`.
pub fn bytes(value: Option<u64>) -> String {
    #[expect(clippy::cast_precision_loss, reason = "it is printed with one digit")]
    let value = value.map(|value| value as f64);
    value.map_or_else(|| "unknown".to_owned(), amount)
}

/// Formats a number of bytes, or a rate without its `/s`.
pub fn amount(mut value: f64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    // A value that would be printed as 1024 is printed in the next unit.
    if value < 1023.5 {
        return format!("{value:.0} B");
    }
    value /= 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Formats the progress of a base backup: its phase, the bytes, the percentage if the size is
/// known, and the rate.
pub fn progress(
    phase: &str,
    streamed: Option<u64>,
    total: Option<u64>,
    bytes_per_second: Option<f64>,
) -> String {
    let mut text = phase.to_owned();
    if let Some(streamed) = streamed {
        text += &format!(": {}", bytes(Some(streamed)));
        if let Some(total) = total.filter(|total| *total > 0) {
            // The server estimates the size, and a backup can become greater.
            let percent = u128::from(streamed.min(total)) * 100 / u128::from(total);
            text += &format!(" of {} ({percent} %)", bytes(Some(total)));
        }
    }
    if let Some(rate) = bytes_per_second {
        text += &format!(", {}/s", amount(rate));
    }
    text
}

/// A text with more characters than this is displayed in full only once.
const LONG_CHARS: usize = 120;

/// Returns the first sentence of a text. If the sentence is longer than `LONG_CHARS`, it is cut
/// between two words.
pub fn brief(text: &str) -> String {
    let sentence = text.split_once(". ").map_or(text, |(first, _)| first);
    if sentence.chars().count() <= LONG_CHARS {
        return sentence.to_owned();
    }
    let cut: String = sentence.chars().take(LONG_CHARS).collect();
    let words = cut
        .rsplit_once(' ')
        .map_or(cut.as_str(), |(words, _)| words);
    format!("{words} …")
}

/// Replaces each long text that is already `displayed` in full with its first sentence.
pub fn shorten(text: &str, displayed: &[&str]) -> String {
    let whole = text.trim_end_matches('.');
    let is_long = |text: &str| brief(text) != text && text.chars().count() > LONG_CHARS;
    if is_long(whole) && displayed.iter().any(|one| one.contains(whole)) {
        return format!("{} (in full above)", brief(whole));
    }
    let mut longest: Vec<&str> = displayed
        .iter()
        .map(|one| one.trim_end_matches('.'))
        .collect();
    longest.sort_by_key(|one| std::cmp::Reverse(one.len()));
    let mut text = text.to_owned();
    for one in longest {
        if is_long(one) {
            text = text.replace(one, &format!("{} (in full above)", brief(one)));
        }
    }
    text
}

/// Returns a text without the operating system's error numbers, ` (os error 2)`.
pub fn without_errno(text: &str) -> String {
    const BEGIN: &str = " (os error ";
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let digits = after.find(|one: char| !one.is_ascii_digit());
        let end = digits.filter(|end| *end > 0 && after[*end..].starts_with(')'));
        plain.push_str(before);
        match end {
            Some(end) => rest = &after[end + 1..],
            None => {
                plain.push_str(BEGIN);
                rest = after;
            }
        }
    }
    plain + rest
}

/// Returns the seconds from `earlier` to `later`.
pub fn span(later: PgTimestamp, earlier: PgTimestamp) -> f64 {
    micros(later.micros_since(earlier))
}

/// Returns microseconds as seconds.
#[expect(
    clippy::cast_precision_loss,
    reason = "an age in seconds needs no more"
)]
pub fn micros(micros: i64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use crate::units::*;

    #[test]
    fn the_progress_of_a_backup_shows_what_is_known() {
        let mib = 1 << 20;
        let phase = "streaming database files";
        let text = progress(phase, Some(30 * mib), Some(120 * mib), Some(2_097_152.0));
        assert_eq!(
            text,
            "streaming database files: 30.0 MiB of 120.0 MiB (25 %), 2.0 MiB/s"
        );
        let text = progress(phase, Some(130 * mib), Some(120 * mib), None);
        assert_eq!(
            text,
            "streaming database files: 130.0 MiB of 120.0 MiB (100 %)"
        );
        let text = progress(phase, Some(mib), None, None);
        assert_eq!(text, "streaming database files: 1.0 MiB");
        assert_eq!(progress("initializing", None, None, None), "initializing");
    }

    #[test]
    fn a_long_text_is_displayed_in_full_once() {
        let long = format!("it is not mounted. {}", "Mount it. ".repeat(20));
        let alert = format!("The repository fails: {}.", long.trim_end_matches('.'));
        assert_eq!(
            shorten(&alert, &[&long, "it is not mounted"]),
            "The repository fails: it is not mounted (in full above)."
        );
        let reason = format!("losing the primary loses 7 s: {long}");
        assert_eq!(
            shorten(&long, &[&reason]),
            "it is not mounted (in full above)"
        );
        assert_eq!(shorten(&alert, &[]), alert);
        assert_eq!(
            shorten("the slot is lost", &["the slot is lost"]),
            "the slot is lost"
        );
        let words = "größer ".repeat(40);
        let short = brief(&words);
        assert!(short.ends_with("größer …") && short.chars().count() <= LONG_CHARS + 2);
    }

    #[test]
    fn error_numbers_are_removed_and_nothing_else() {
        let check = |text, expected| assert_eq!(without_errno(text), expected);
        check(
            "open: Not found (os error 2), gone",
            "open: Not found, gone",
        );
        check("(os error x) a (os error 13)", "(os error x) a");
        check("a (os error ) b (os error 1", "a (os error ) b (os error 1");
    }

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
}
