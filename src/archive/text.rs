//! Texts and times of the archive: compared in one way, written in one way. What makes a text storable is in
//! [`crate::ucwa::character`].

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use serde::Serializer;

pub use crate::ucwa::character::storable;

/// Whether two plain texts are the same message said twice: line ends and outer white space do not count, because the
/// server changes them on the way (protocol 12.4).
pub fn same_message(one: &str, other: &str) -> bool {
    normalised(one) == normalised(other)
}

fn normalised(text: &str) -> Cow<'_, str> {
    let trimmed = text.trim();
    if trimmed.contains("\r\n") { Cow::Owned(trimmed.replace("\r\n", "\n")) } else { Cow::Borrowed(trimmed) }
}

/// Nobody sent anything over UCWA before this; servers write year 1 for "unknown".
const EARLIEST: Timestamp = Timestamp::constant(946_684_800, 0);
/// A server's clock may be ahead of ours, within reason.
const LATEST: SignedDuration = SignedDuration::from_hours(24);

/// Whether a message that was received at a time can have been sent when the server says so.
pub fn is_plausible(sent_at: Timestamp, received_at: Timestamp) -> bool {
    sent_at >= EARLIEST && sent_at.duration_since(received_at) <= LATEST
}

/// An instant as the database keeps it: whole milliseconds.
pub fn to_milliseconds(instant: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(instant.as_millisecond()).unwrap_or(instant)
}

/// ISO 8601 in UTC with milliseconds and `Z`: sorts as text and reads well.
pub fn iso_milliseconds(instant: Timestamp) -> String {
    format!("{instant:.3}")
}

/// For JSON that programs read: as [`iso_milliseconds`].
pub fn serialize_time<S: Serializer>(instant: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&iso_milliseconds(*instant))
}

/// As [`serialize_time`], for what may be absent.
pub fn serialize_optional_time<S: Serializer>(
    instant: &Option<Timestamp>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match instant {
        Some(instant) => serialize_time(instant, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn how_the_server_hands_a_text_on_does_not_make_it_another(text in any::<String>()) {
            let lines = text.replace('\r', "");
            let handed_on = format!(" {}\r\n", lines.replace('\n', "\r\n"));
            prop_assert!(same_message(&lines, &handed_on));
        }
    }

    #[test]
    fn line_ends_and_outer_white_space_do_not_make_another_message() {
        assert!(same_message("Hi Tosh\r\n", "Hi Tosh"));
        assert!(same_message("a\r\nb", " a\nb "));
        assert!(!same_message("a b", "ab"));
    }

    #[test]
    fn instants_are_cut_to_milliseconds() {
        let precise: Timestamp = "2026-11-22T10:00:00.123456789Z".parse().unwrap();
        assert_eq!(to_milliseconds(precise).to_string(), "2026-11-22T10:00:00.123Z");
    }
}
