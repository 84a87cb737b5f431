//! Values that several sections read in the same way.

use std::{fmt, path::Path, time::Duration};

use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, de};
use url::Url;

use super::error::Findings;

const DURATION_REMEDY: &str = "write a number with its unit, like \"30s\", \"5m\" or \"1h30m\"";

/// Reads `"30s"`, `"5m"`, `"1h30m"`.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    struct Text;
    impl de::Visitor<'_> for Text {
        type Value = Duration;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a duration like \"30s\", \"5m\" or \"1h30m\"")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            parse_duration(text).map_err(E::custom)
        }
    }
    deserializer.deserialize_any(Text)
}

/// `"30s"`, `"5m"`, `"1h30m"` as a duration.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let signed: SignedDuration =
        text.parse().map_err(|_| format!("is not a duration that can be read; {DURATION_REMEDY}"))?;
    Duration::try_from(signed).map_err(|_| format!("is negative; {DURATION_REMEDY}"))
}

/// A text, also where the environment gave something that looks like a number.
pub(super) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    struct Text;
    impl de::Visitor<'_> for Text {
        type Value = String;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a text")
        }

        fn visit_str<E>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }

        fn visit_u64<E>(self, number: u64) -> Result<String, E> {
            Ok(number.to_string())
        }

        fn visit_u128<E>(self, number: u128) -> Result<String, E> {
            Ok(number.to_string())
        }

        fn visit_i64<E>(self, number: i64) -> Result<String, E> {
            Ok(number.to_string())
        }
    }
    deserializer.deserialize_any(Text)
}

/// A list of texts, or one text with commas (for the environment).
pub(super) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "is not a list of texts")]
    enum List {
        Texts(Vec<String>),
        Commas(String),
    }
    Ok(match List::deserialize(deserializer)? {
        List::Texts(texts) => texts,
        List::Commas(text) => {
            text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
        }
    })
}

/// An http or https URL.
pub(super) fn optional_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    match Url::parse(&text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(Some(url)),
        _ => Err(de::Error::custom(
            "is not an address that can be used; write it whole, beginning with https://",
        )),
    }
}

/// A listening address with its port.
pub(super) fn socket_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<std::net::SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map_err(|_| de::Error::custom("is not an IP address with a port; write it like 127.0.0.1:8470"))
}

/// Objects to a duration outside of `range`, which `in_words` repeats for people.
pub(super) fn check_range(
    findings: &mut Findings,
    key: &str,
    value: Duration,
    range: std::ops::RangeInclusive<Duration>,
    in_words: &str,
) {
    findings.check(range.contains(&value), key, &format!("is out of range; it lies between {in_words}"));
}

/// Objects to a file that cannot be opened.
pub(super) fn check_readable(findings: &mut Findings, key: impl Into<String>, path: &Path) {
    if let Err(error) = std::fs::File::open(path) {
        findings.add(
            key,
            format!("{} cannot be read: {error}; correct the path or the file's permissions", path.display()),
        );
    }
}

/// Whether traffic to this host stays on this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_people_write_them() {
        for (text, seconds) in
            [("30s", 30), ("5m", 300), ("1h30m", 5400), ("1h 30m", 5400), ("2 minutes", 120)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for text in ["", "30", "soon", "-5s", "1 fortnight"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
