//! Times as people type them: `2026-03-01`, `2026-03-01T12:00Z`, `2h`, `yesterday`. Without an offset it is UTC.

use jiff::{SpanRelativeTo, Timestamp, ToSpan, civil, tz::TimeZone};

/// A time as a person typed it just now.
pub(crate) fn parse(text: &str) -> Result<Timestamp, String> {
    parse_at(text, Timestamp::now())
}

pub(super) fn parse_at(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let text = text.trim();
    let midnight = |date: civil::Date| date.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    let today = TimeZone::UTC.to_datetime(now).date();
    let time = match text {
        "now" => Some(now),
        "today" => midnight(today),
        "yesterday" => today.checked_sub(1.day()).ok().and_then(midnight),
        _ => None,
    };
    time.or_else(|| text.parse().ok())
        .or_else(|| {
            text.parse::<civil::DateTime>().ok()?.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
        })
        .or_else(|| before(now, text))
        .ok_or_else(|| {
            "write a date (2026-03-01), a time (2026-03-01T12:00Z), how long ago (2h, 3d), today or yesterday"
                .into()
        })
}

/// So long before `now`.
fn before(now: Timestamp, text: &str) -> Option<Timestamp> {
    let span: jiff::Span = text.parse().ok()?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?;
    (!duration.is_negative()).then(|| now.checked_sub(duration).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_times_in_many_ways() {
        let now: Timestamp = "2026-03-02T10:30:00Z".parse().unwrap();
        for (text, expected) in [
            ("2026-03-01", "2026-03-01T00:00:00Z"),
            ("2026-03-01T12:00Z", "2026-03-01T12:00:00Z"),
            ("2026-03-01T12:00:05+02:00", "2026-03-01T10:00:05Z"),
            ("2026-03-01 12:00", "2026-03-01T12:00:00Z"),
            ("2h", "2026-03-02T08:30:00Z"),
            ("1h30m", "2026-03-02T09:00:00Z"),
            ("3d", "2026-02-27T10:30:00Z"),
            ("1w", "2026-02-23T10:30:00Z"),
            ("now", "2026-03-02T10:30:00Z"),
            ("today", "2026-03-02T00:00:00Z"),
            ("yesterday", "2026-03-01T00:00:00Z"),
        ] {
            assert_eq!(parse_at(text, now), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in ["", "soon", "-2h", "2026-13-01", "12"] {
            assert!(parse_at(text, now).is_err(), "{text}");
        }
    }
}
