//! Message text as a data URI (RFC 2397, as UCWA servers and clients really write it).
//!
//! Servers percent-encode and write a space as `+`; some clients use base64, where `+` is a digit. Charsets are named
//! with and without quotes and in any spelling. Nothing that can be read is lost: bytes that are wrong for the charset
//! become U+FFFD and are reported.

use std::fmt::Write as _;

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

/// Padding may be missing.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);

/// What a data URI holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Lower case; `text/plain` where none was given.
    pub media_type: String,
    /// The text.
    pub text: String,
    /// Some bytes were wrong for the charset and are U+FFFD in the text.
    pub had_invalid_bytes: bool,
}

/// Why a text is not a data URI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DataUriError {
    /// It does not begin with `data:`.
    #[error("it does not begin with data:")]
    Scheme,
    /// Nothing divides the media type from the data.
    #[error("it has no comma before its data")]
    NoComma,
    /// It is marked base64 and is not.
    #[error("its base64 can't be decoded")]
    Base64,
}

/// Decodes `data:[mediatype][;param=value]*[;base64],payload`.
pub fn decode(uri: &str) -> Result<Decoded, DataUriError> {
    let uri = uri.trim();
    let rest = match uri.get(..5) {
        Some(scheme) if scheme.eq_ignore_ascii_case("data:") => &uri[5..],
        _ => return Err(DataUriError::Scheme),
    };
    let (head, payload) = rest.split_once(',').ok_or(DataUriError::NoComma)?;
    let mut parts = head.split(';').map(str::trim);
    let media_type = match parts.next() {
        Some(given) if !given.is_empty() => given.to_ascii_lowercase(),
        _ => "text/plain".to_owned(),
    };
    let mut base64 = false;
    let mut charset = None;
    for part in parts {
        match part.split_once('=') {
            None if part.eq_ignore_ascii_case("base64") => base64 = true,
            Some((name, value)) if name.trim().eq_ignore_ascii_case("charset") => {
                charset = Some(value.trim().trim_matches(['"', '\'']));
            }
            _ => {}
        }
    }
    let bytes = if base64 { decode_base64(payload)? } else { decode_percent(payload.as_bytes(), true) };
    let (text, had_invalid_bytes) = decode_charset(&bytes, charset);
    Ok(Decoded { media_type, text, had_invalid_bytes })
}

/// Encodes text as `text/plain` in UTF-8, with every byte escaped that is not an unreserved character (RFC 3986 2.3): it
/// reads the same with and without the rule that `+` is a space.
pub fn encode_plain(text: &str) -> String {
    let mut uri = String::with_capacity("data:text/plain;charset=utf-8,".len() + text.len() * 3);
    uri.push_str("data:text/plain;charset=utf-8,");
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => uri.push(char::from(byte)),
            _ => {
                // Writing to a String does not fail.
                let _ = write!(uri, "%{byte:02X}");
            }
        }
    }
    uri
}

/// One pass over the bytes, so that `%2b` gives `+`; a stray `%` stays.
fn decode_percent(bytes: &[u8], plus_is_space: bool) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(&byte) = bytes.get(index) {
        let escaped = bytes
            .get(index + 1..index + 3)
            .filter(|_| byte == b'%')
            .and_then(|digits| Some(hex_digit(digits[0])? * 16 + hex_digit(digits[1])?));
        if let Some(value) = escaped {
            decoded.push(value);
            index += 3;
        } else {
            decoded.push(if byte == b'+' && plus_is_space { b' ' } else { byte });
            index += 1;
        }
    }
    decoded
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn decode_base64(payload: &str) -> Result<Vec<u8>, DataUriError> {
    let digits: Vec<u8> = decode_percent(payload.as_bytes(), false)
        .into_iter()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| match byte {
            b'-' => b'+',
            b'_' => b'/',
            other => other,
        })
        .collect();
    STANDARD.decode(digits).map_err(|_| DataUriError::Base64)
}

fn decode_charset(bytes: &[u8], charset: Option<&str>) -> (String, bool) {
    let encoding = match charset {
        None | Some("") => encoding_rs::UTF_8,
        // The label table maps us-ascii to windows-1252; UCWA's senders that say so write UTF-8.
        Some(label) if ["utf8", "us-ascii", "ascii"].contains(&label.to_ascii_lowercase().as_str()) => {
            encoding_rs::UTF_8
        }
        Some(label) => encoding_rs::Encoding::for_label(label.as_bytes()).unwrap_or(encoding_rs::UTF_8),
    };
    let (text, had_invalid_bytes) = encoding.decode_without_bom_handling(bytes);
    (text.into_owned(), had_invalid_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_servers_and_clients_write_is_read() {
        for (uri, text) in [
            ("data:text/plain,Hello+World", "Hello World"),
            ("data:text/plain;charset=utf-8,Hi+Tosh%0d%0a", "Hi Tosh\r\n"),
            ("data:text/plain;charset=utf8,1%2b1+%3d+2", "1+1 = 2"),
            ("data:text/plain;base64,YSti", "a+b"),
            ("data:text/plain;charset=utf-8;base64,8J+YgA==", "\u{1F600}"),
            ("data:text/plain;charset=utf-8;base64,8J+YgA", "\u{1F600}"),
            ("data:text/plain;charset=utf-8;base64,8J-YgA", "\u{1F600}"),
            ("data:text/plain;base64,YSt%69", "a+b"),
            ("data:text/plain;base64;charset=utf-8, YS ti\r\n", "a+b"),
            ("data:text/plain;charset=utf-8,a,b", "a,b"),
            ("data:,A%20brief%20note", "A brief note"),
            ("data:text/plain;charset=utf-8,100%", "100%"),
            ("data:text/plain;charset=utf-8,100%2", "100%2"),
            ("data:text/plain;charset=utf-8,%zz%25zz", "%zz%zz"),
            ("data:text/plain;charset=iso-8859-1,caf%e9", "café"),
            ("data:text/plain;charset=us-ascii,caf%c3%a9", "café"),
            ("data:text/plain;charset=no-such-thing,caf%c3%a9", "café"),
            ("DATA:text/plain;CHARSET=\"UTF-8\",x", "x"),
            ("data:text/plain,", ""),
            ("data:text/plain;charset=utf-16le,h%00i%00", "hi"),
        ] {
            let decoded = decode(uri).unwrap();
            assert_eq!((decoded.text.as_str(), decoded.had_invalid_bytes), (text, false), "{uri}");
        }
        let html =
            decode("data:text/html;charset=utf-8,%3cspan+style%3d%22x%22%3eHello!%3c%2fspan%3e").unwrap();
        assert_eq!(
            (html.media_type.as_str(), html.text.as_str()),
            ("text/html", "<span style=\"x\">Hello!</span>")
        );
    }

    #[test]
    fn a_message_with_wrong_bytes_is_kept() {
        let decoded = decode("data:text/plain;charset=utf-8,caf%e9+ol%e9").unwrap();
        assert_eq!(decoded.text, "caf\u{fffd} ol\u{fffd}");
        assert!(decoded.had_invalid_bytes);
    }

    #[test]
    fn what_is_no_data_uri_is_refused() {
        for (uri, error) in [
            ("", DataUriError::Scheme),
            ("http://x/,y", DataUriError::Scheme),
            ("dat", DataUriError::Scheme),
            ("data", DataUriError::Scheme),
            ("daté:,x", DataUriError::Scheme),
            ("data:text/plain;charset=utf-8", DataUriError::NoComma),
            ("data:text/plain;base64,@@@@", DataUriError::Base64),
        ] {
            assert_eq!(decode(uri).unwrap_err(), error, "{uri}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_to_the_same_text(text in any::<String>()) {
            let decoded = decode(&encode_plain(&text)).unwrap();
            prop_assert_eq!(decoded, Decoded { media_type: "text/plain".into(), text, had_invalid_bytes: false });
        }

        #[test]
        fn base64_of_any_text_is_decoded_to_it(text in any::<String>()) {
            let uri = format!("data:text/plain;charset=utf-8;base64,{}", STANDARD.encode(&text));
            prop_assert_eq!(decode(&uri).unwrap().text, text);
        }

        #[test]
        fn every_charset_that_can_hold_a_text_is_decoded_to_it(text in any::<String>(), base64 in any::<bool>()) {
            let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
            let latin: String = text.chars().filter(|c| ('\u{20}'..'\u{7f}').contains(c) || ('\u{a0}'..='\u{ff}').contains(c)).collect();
            let latin_bytes = encoding_rs::WINDOWS_1252.encode(&latin).0.into_owned();
            for (charset, bytes, expected) in [
                ("UTF-16LE", little, &text),
                ("utf-16be", big, &text),
                ("iso-8859-1", latin_bytes, &latin),
                ("utf-8", text.clone().into_bytes(), &text),
            ] {
                let payload = if base64 {
                    format!(";base64,{}", STANDARD.encode(bytes))
                } else {
                    bytes.iter().fold(",".to_owned(), |uri, byte| format!("{uri}%{byte:02x}"))
                };
                let decoded = decode(&format!("data:text/plain;charset={charset}{payload}")).unwrap();
                prop_assert_eq!((&decoded.text, decoded.had_invalid_bytes), (expected, false));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), charset in "[a-zA-Z0-9-]{0,12}") {
            let escaped = bytes.iter().fold(String::new(), |uri, byte| format!("{uri}%{byte:02x}"));
            let uri = format!("data:text/html;charset={charset},{escaped}");
            prop_assert!(decode(&uri).is_ok());
            let _ = decode(&format!("data:{}", String::from_utf8_lossy(&bytes)));
        }

        #[test]
        fn nothing_makes_it_panic(uri in "(data:)?\\PC{0,80}") {
            let _ = decode(&uri);
        }
    }
}
