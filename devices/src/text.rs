//! What people write and read: sizes (`512M`), durations (`90s`), what they probably meant, and why something failed.

use std::error::Error;
use std::fmt::{self, Display};
use std::time::Duration;

/// Parses a size in bytes: a number with an optional suffix K, M, G or T (powers of 1024).
///
/// # Errors
/// A message that says what to write.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write a number with K, M, G or T, for example 512M");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..].to_ascii_lowercase()[..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"))
}

/// Parses a duration: a number of seconds, or with a suffix ms, s, m, h or d.
///
/// # Errors
/// A message that says what to write.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write a number with ms, s, m, h or d, for example 90s");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(wrong()),
    };
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

/// A size in bytes, printed as `4.6 KiB`.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let text = match units.into_iter().find(|(_, shift)| self.0 >> shift > 0) {
            None => format!("{} B", self.0),
            Some((unit, shift)) if self.0.trailing_zeros() >= shift => format!("{} {unit}", self.0 >> shift),
            Some((unit, shift)) => format!("{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
        };
        f.pad(&text)
    }
}

/// A size in bytes, printed as [`parse_size`] reads it: `2M`, or a number where no suffix fits.
pub fn exact_size(bytes: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    match units.into_iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift) {
        Some((suffix, shift)) => format!("{}{suffix}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A duration, printed as [`parse_duration`] reads it: `90s`, or `1500ms`.
pub fn exact_duration(duration: Duration) -> String {
    match duration.subsec_nanos() {
        0 => format!("{}s", duration.as_secs()),
        nanos if nanos % 1_000_000 == 0 => format!("{}ms", duration.as_millis()),
        nanos => format!("{}.{nanos:09}s", duration.as_secs()),
    }
}

/// The line and the column, both from 1 and the column in characters, of a byte offset in `text`.
pub fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    (line, String::from_utf8_lossy(&before[start..]).chars().count() + 1)
}

/// The one of `known` that `given` is probably meant to be, if one is near.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(given, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 2)
        .map(|(_, candidate)| candidate)
}

/// Says what was not understood, and what was probably meant.
pub fn unknown(what: &str, given: &str, known: &[&str]) -> String {
    match nearest(given, known.iter().copied()) {
        Some(candidate) => format!("unknown {what} `{given}`; did you mean `{candidate}`?"),
        None => format!("unknown {what} `{given}`; known are {}", known.join(", ")),
    }
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error says what its source says.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// A line for each mistake in a file, beginning with the file's name: NAME:MISTAKE.
pub fn listed(name: impl Display, mistakes: &[impl Display]) -> String {
    let lines: Vec<_> = mistakes.iter().map(|mistake| format!("{name}:{mistake}")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("32K", 32 << 10), ("512M", 512 << 20), ("6GiB", 6 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "M", "-1", "1.5G", "12X", "999999999T", "١M"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        let parsed =
            ["60", "90s", "250ms", "2m", "1h", "2d"].map(|text| parse_duration(text).unwrap().as_millis());
        assert_eq!(parsed, [60_000, 90_000, 250, 120_000, 3_600_000, 172_800_000]);
        assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["", "s", "-1s", "1w", "1.5.2"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_for_people_and_for_the_parser() {
        for (bytes, people, exact) in [
            (0, "0 B", "0"),
            (1023, "1023 B", "1023"),
            (4698, "4.6 KiB", "4698"),
            (32 << 10, "32 KiB", "32K"),
            (3 << 19, "1.5 MiB", "1536K"),
            (2 << 20, "2 MiB", "2M"),
            (5 << 40, "5 TiB", "5T"),
        ] {
            assert_eq!((&*Bytes(bytes).to_string(), &*exact_size(bytes)), (people, exact));
            assert_eq!(parse_size(exact), Ok(bytes));
        }
        assert_eq!(format!("{:>8}|{:<8}|", Bytes(1), Bytes(1)), "     1 B|1 B     |");
    }

    #[test]
    fn durations_are_printed_for_the_parser() {
        for (duration, text) in [
            (Duration::ZERO, "0s"),
            (Duration::from_secs(90), "90s"),
            (Duration::from_millis(1500), "1500ms"),
            (Duration::from_micros(2_000_500), "2.000500000s"),
        ] {
            assert_eq!(exact_duration(duration), text);
            assert_eq!(parse_duration(text), Ok(duration));
        }
    }

    #[test]
    fn positions_count_lines_and_characters() {
        let text = "a\nöb\n";
        let positions = [0, 1, 2, 4, 5, 6, 99].map(|offset| position(text, offset));
        assert_eq!(positions, [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (3, 1)]);
    }

    #[test]
    fn what_was_meant_is_suggested_when_it_is_near() {
        assert_eq!(nearest("siez", ["size", "path"]), Some("size"));
        assert_eq!(nearest("whatever", ["size", "path"]), None);
        assert_eq!(unknown("key", "pth", &["size", "path"]), "unknown key `pth`; did you mean `path`?");
        assert_eq!(unknown("key", "zzz", &["size", "path"]), "unknown key `zzz`; known are size, path");
    }
}
