//! `auto-compaction-mode` and `auto-compaction-retention`, in etcd's words.

use conclave_core::replica::Retention;

use crate::options::OptionsError;

/// What `auto-compaction-retention` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompactionMode {
    /// Time: `90m`, `1h30m`, `500ms`; a bare number is hours.
    #[default]
    Periodic,
    /// Revisions.
    Revision,
}

const HOUR_MS: u64 = 60 * 60 * 1_000;

/// Of the quota, this part at most is history, unless an operator has a rule of their
/// own: nobody is refused for the sake of what could be compacted.
const QUOTA_PART: u64 = 4;

/// What the two flags mean: `None` for 0, with which history is kept for ever;
/// without a retention, [`Retention::default`], and less where the quota is small. An
/// operator's own rule is not cut short by the bytes of history; only the quota bounds
/// those.
pub(crate) fn retention(
    mode: CompactionMode,
    text: Option<&str>,
    quota_bytes: u64,
) -> Result<Option<Retention>, OptionsError> {
    let Some(text) = text else {
        let kept = Retention::default();
        let bytes = kept.bytes.min(quota_bytes / QUOTA_PART);
        return Ok(Some(Retention { bytes, ..kept }));
    };
    let amount = match mode {
        CompactionMode::Periodic => milliseconds(text),
        CompactionMode::Revision => text.parse().ok(),
    };
    let amount = amount.ok_or_else(|| OptionsError::CompactionRetention {
        text: text.to_owned(),
    })?;
    let (revisions, ms) = match mode {
        CompactionMode::Periodic => (0, amount),
        CompactionMode::Revision => (amount, 0),
    };
    let bytes = u64::MAX;
    Ok((amount > 0).then_some(Retention {
        revisions,
        ms,
        bytes,
    }))
}

/// A duration of whole numbers and units.
fn milliseconds(text: &str) -> Option<u64> {
    if let Ok(hours) = text.parse::<u64>() {
        return hours.checked_mul(HOUR_MS);
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, behind) = rest.split_at(digits);
        let unit_end = behind
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(behind.len());
        let (unit, behind) = behind.split_at(unit_end);
        let ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60 * 1_000,
            "h" => HOUR_MS,
            _ => return None,
        };
        total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(ms)?)?;
        rest = behind;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use conclave_core::limits;

    use super::*;

    #[test]
    fn durations_as_etcd_takes_them() {
        let good = [
            ("0", 0),
            ("2", 2 * HOUR_MS),
            ("90m", 90 * 60_000),
            ("1h30m5s", 5_405_000),
            ("500ms", 500),
        ];
        for (text, ms) in good {
            assert_eq!(milliseconds(text), Some(ms), "{text}");
        }
        let long = "99999999999999999999h";
        for bad in ["", "h", "-1h", "1.5h", "1d", "1h30", "1 h", long] {
            assert_eq!(milliseconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn flags_become_a_rule() {
        let by = |mode, text| {
            let kept = retention(mode, text, u64::MAX);
            kept.map(|kept| kept.map(|r| (r.revisions, r.ms)))
        };
        let (periodic, revision) = (CompactionMode::Periodic, CompactionMode::Revision);
        assert_eq!(by(periodic, None), Ok(Some((1_000_000, 600_000))));
        assert_eq!(by(periodic, Some("1s")), Ok(Some((0, 1_000))));
        assert_eq!(by(revision, Some("10")), Ok(Some((10, 0))));
        assert_eq!(by(periodic, Some("0")), Ok(None));
        assert_eq!(by(revision, Some("0")), Ok(None));
        assert!(by(revision, Some("1h")).is_err());
    }

    #[test]
    fn history_leaves_most_of_the_quota_to_what_is_there() {
        let bytes = |text, quota| {
            let kept = retention(CompactionMode::Periodic, text, quota).unwrap();
            kept.unwrap().bytes
        };
        assert_eq!(bytes(None, limits::QUOTA_BYTES_DEFAULT), 512 << 20);
        assert_eq!(bytes(None, 256 << 20), 64 << 20);
        assert_eq!(bytes(Some("1h"), 256 << 20), u64::MAX);
    }
}
