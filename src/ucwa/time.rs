//! The two forms in which UCWA writes times: ISO 8601 with up to seven decimals (XML), `/Date(ms)/` (JSON).

use jiff::{SignedDuration, Timestamp};

/// Reads either form. The result is cut to whole milliseconds, in which the archive stores times.
///
/// # Errors
/// A sentence that quotes the text.
pub fn parse(text: &str) -> Result<Timestamp, InvalidTime> {
    let trimmed = text.trim();
    let parsed = match trimmed.strip_prefix("/Date(").and_then(|rest| rest.strip_suffix(")/")) {
        Some(milliseconds) => {
            // An offset may follow (`/Date(0+0200)/`); the number is UTC all the same.
            let end = milliseconds
                .char_indices()
                .skip(1)
                .find(|(_, c)| matches!(c, '+' | '-'))
                .map_or(milliseconds.len(), |(index, _)| index);
            milliseconds[..end].parse::<i64>().ok().and_then(|ms| Timestamp::from_millisecond(ms).ok())
        }
        None => trimmed.parse::<Timestamp>().ok().or_else(|| {
            // Without `Z` or an offset the server means UTC.
            let civil: jiff::civil::DateTime = trimmed.parse().ok()?;
            civil.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
        }),
    };
    parsed.map(to_milliseconds).ok_or_else(|| InvalidTime(trimmed.chars().take(60).collect()))
}

/// Cuts a time to whole milliseconds.
pub fn to_milliseconds(timestamp: Timestamp) -> Timestamp {
    let nanoseconds = timestamp.as_nanosecond().rem_euclid(1_000_000);
    timestamp
        .checked_sub(SignedDuration::from_nanos(i64::try_from(nanoseconds).unwrap_or(0)))
        .unwrap_or(timestamp)
}

/// A text that is no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time; UCWA writes times like 2014-06-02T21:00:13.135Z")]
pub struct InvalidTime(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_to_the_millisecond() {
        for (text, read) in [
            ("2014-06-02T21:00:13.1350704Z", "2014-06-02T21:00:13.135Z"),
            ("2014-06-02T23:00:14.1359999+02:00", "2014-06-02T21:00:14.135Z"),
            ("2013-11-07T00:41:10Z", "2013-11-07T00:41:10Z"),
            ("2013-11-07T00:41:10.271", "2013-11-07T00:41:10.271Z"),
            ("/Date(1383784870271)/", "2013-11-07T00:41:10.271Z"),
            ("/Date(-1)/", "1969-12-31T23:59:59.999Z"),
            ("/Date(0+0200)/", "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), read, "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "yesterday", "/Date(x)/", "/Date()/", "2014-13-01T00:00:00Z"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
