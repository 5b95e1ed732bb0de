//! Durations as people write them: `500ms`, `10s`, `2m`, `1h`, `1.5s`; a bare
//! number is seconds.

use std::time::Duration;

/// Parses a duration.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let seconds_a_unit = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit `{unit}`; use ms, s, m or h")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "expected a number such as 10s".to_owned())?;
    Duration::try_from_secs_f64(number * seconds_a_unit).map_err(|error| error.to_string())
}

/// As short as it stays readable.
pub(crate) fn show(ms: u64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        0..60 => format!("{}.{}s", seconds, ms % 1_000 / 100),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        let good = [
            ("10", 10_000),
            ("10s", 10_000),
            ("500ms", 500),
            ("300ms", 300),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("1.5s", 1_500),
            ("0", 0),
            (".5", 500),
        ];
        for (text, ms) in good {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in [
            "",
            "s",
            "-1s",
            "10 s",
            "1d",
            "1.2.3s",
            "1e3",
            "inf",
            "ms10",
            "9".repeat(400).as_str(),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_are_shown_in_two_units_at_most() {
        assert_eq!(show(1_250), "1.2s");
        assert_eq!(show(61_000), "1m01s");
        assert_eq!(show(7_260_000), "2h01m");
        assert_eq!(show(90_000_000), "1d01h");
    }
}
