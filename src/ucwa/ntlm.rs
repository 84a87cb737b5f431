//! The messages of NTLM for the Windows grant: what is sent first, and the answer to the server's challenge.
//!
//! Cryptography and layout are `ntlmclient`'s; this file decides what goes in. Only `NTLMv2` is spoken: the fields of
//! the older responses are zero, whatever a server asks for, since those can be turned back into the password. Nothing
//! here touches the network. Sources: MS-NLMP 2.2.1, 3.1.5 and 3.3.2; MS-NTHT.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use ntlmclient::{
    AuthenticateMessage, ChallengeMessage, Credentials, Flags, Message, NegotiateMessage, OsVersion,
    TargetInfoType,
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroize;

/// What is asked for: names in Unicode, the server's names, and `NTLMv2`. Only the connection is signed in, so that
/// neither signing nor sealing nor a key for them is wanted.
const WANTED: Flags = Flags::NEGOTIATE_UNICODE
    .union(Flags::REQUEST_TARGET)
    .union(Flags::NEGOTIATE_NTLM)
    .union(Flags::NEGOTIATE_ALWAYS_SIGN)
    .union(Flags::NEGOTIATE_NTLM2_KEY)
    .union(Flags::NEGOTIATE_128BIT);

/// Who asks, for the logs of domain controllers: a computer's name, of at most 15 characters.
const WORKSTATION: &str = "UCWA-RELAY";
/// Longest challenge that is read, in characters. Real ones have a few hundred; lengths within a message have 16 bits.
const LONGEST_CHALLENGE: usize = 16 * 1024;
/// Longest user name, in characters; Active Directory's end at 1,024.
const LONGEST_NAME: usize = 1024;
/// The seconds from 1601, where Windows' time begins, to 1970.
const WINDOWS_EPOCH_S: i64 = 11_644_473_600;

/// Why a challenge is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NtlmError {
    /// The server's message is none of NTLM's, or is not the challenge.
    #[error("with an NTLM challenge that can't be read")]
    Unreadable,
    /// The user name fits no message.
    #[error("the user name has more than {LONGEST_NAME} characters")]
    NameTooLong,
}

/// The first message (type 1), in base64. It names nobody.
pub(super) fn negotiate() -> Result<String, NtlmError> {
    let message = Message::Negotiate(NegotiateMessage {
        flags: WANTED,
        supplied_domain: String::new(),
        supplied_workstation: String::new(),
        os_version: OsVersion::default(),
    });
    encode(&message)
}

/// The answer (type 3) to a challenge (type 2), both in base64.
pub(super) fn authenticate(
    challenge: &str,
    username: &str,
    password: &SecretString,
) -> Result<String, NtlmError> {
    if username.chars().count() > LONGEST_NAME {
        return Err(NtlmError::NameTooLong);
    }
    let challenge = read_challenge(challenge)?;
    let mut target_information = Vec::new();
    for entry in &challenge.target_information {
        target_information.extend(entry.to_bytes());
    }
    let (domain, user) = split_username(username);
    let mut credentials = Credentials {
        username: user.to_owned(),
        password: password.expose_secret().to_owned(),
        domain: domain.to_owned(),
    };
    let response = ntlmclient::respond_challenge_ntlm_v2(
        challenge.challenge,
        &target_information,
        time_of(&challenge),
        &credentials,
    );
    credentials.password.zeroize();
    // Not the library's own conversion, which would fill in an LMv2 response and the session key.
    encode(&Message::Authenticate(AuthenticateMessage {
        lm_response: vec![0; 24],
        ntlm_response: response.ntlm_response,
        domain_name: credentials.domain,
        user_name: credentials.username,
        workstation_name: WORKSTATION.to_owned(),
        session_key: Vec::new(),
        flags: WANTED & challenge.flags,
        os_version: OsVersion::default(),
    }))
}

/// Domain and user of `DOMAIN\user`. A user principal name goes whole, with an empty domain, and so does a bare name.
fn split_username(username: &str) -> (&str, &str) {
    username.split_once('\\').unwrap_or(("", username))
}

fn read_challenge(text: &str) -> Result<ChallengeMessage, NtlmError> {
    if text.len() > LONGEST_CHALLENGE {
        return Err(NtlmError::Unreadable);
    }
    let bytes = STANDARD.decode(text).map_err(|_| NtlmError::Unreadable)?;
    match Message::try_from(bytes.as_slice()) {
        Ok(Message::Challenge(challenge)) if challenge.flags.contains(Flags::NEGOTIATE_UNICODE) => {
            Ok(challenge)
        }
        _ => Err(NtlmError::Unreadable),
    }
}

/// The server's time if it tells it, so that our clock does not matter; else ours. In tenths of microseconds.
fn time_of(challenge: &ChallengeMessage) -> i64 {
    challenge
        .target_information
        .iter()
        .find(|entry| entry.entry_type == TargetInfoType::Timestamp)
        .and_then(|entry| entry.data.as_slice().try_into().ok())
        .map_or_else(
            || (Timestamp::now().as_microsecond() + WINDOWS_EPOCH_S * 1_000_000) * 10,
            i64::from_le_bytes,
        )
}

fn encode(message: &Message) -> Result<String, NtlmError> {
    // Everything is written in Unicode, for which the library knows no failure.
    message.to_bytes().map(|bytes| STANDARD.encode(bytes)).map_err(|_| NtlmError::Unreadable)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The challenge of MS-NLMP 4.2.4.3.
    const PUBLISHED: &str = "4e544c4d53535000020000000c000c003800000033828ae20123456789abcdef0000000000000000240024\
        0044000000060070170000000f53006500720076006500720002000c0044006f006d00610069006e0001000c005300650072007600\
        6500720000000000";

    fn published() -> Vec<u8> {
        hex::decode(PUBLISHED).unwrap()
    }

    fn answer(challenge: &[u8], username: &str) -> AuthenticateMessage {
        let password = SecretString::from("Password");
        let text = authenticate(&STANDARD.encode(challenge), username, &password).unwrap();
        let bytes = STANDARD.decode(text).unwrap();
        let text = String::from_utf8_lossy(&bytes).replace('\0', "");
        assert!(!text.contains("Password"), "the password must not be in the message");
        // Fields by hand: the library's reader takes no empty field at the end.
        let field = |at: usize| {
            let number = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
            bytes[number(at + 4)..number(at + 4) + number(at)].to_vec()
        };
        let name = |at: usize| {
            let units: Vec<u16> =
                field(at).chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
            String::from_utf16(&units).unwrap()
        };
        AuthenticateMessage {
            lm_response: field(12),
            ntlm_response: field(20),
            domain_name: name(28),
            user_name: name(36),
            workstation_name: name(44),
            session_key: field(52),
            flags: Flags::from_bits_retain(u32::from_le_bytes(bytes[60..64].try_into().unwrap())),
            os_version: OsVersion::default(),
        }
    }

    #[test]
    fn names_are_split_as_windows_does() {
        for (username, domain, user) in [
            ("CONTOSO\\alice", "CONTOSO", "alice"),
            ("contoso.test\\alice", "contoso.test", "alice"),
            ("alice@contoso.test", "", "alice@contoso.test"),
            ("alice", "", "alice"),
        ] {
            assert_eq!(split_username(username), (domain, user));
            let message = answer(&published(), username);
            assert_eq!((message.domain_name.as_str(), message.user_name.as_str()), (domain, user));
            assert_eq!(message.workstation_name, WORKSTATION);
        }
    }

    #[test]
    fn only_the_newest_response_is_given_and_no_key() {
        let message = answer(&published(), "Domain\\User");
        assert_eq!(message.lm_response, [0; 24]);
        assert!(message.ntlm_response.len() > 24, "24 bytes would be NTLMv1");
        assert_eq!(message.ntlm_response[16..18], [1, 1]);
        assert!(message.session_key.is_empty());
        assert!(WANTED.contains(message.flags));
        let downgraded = {
            let mut bytes = published();
            // The server takes neither `NTLMv2` session security nor target information.
            bytes[22] &= !0x88;
            bytes
        };
        assert_eq!(answer(&downgraded, "User").lm_response, [0; 24]);
        assert!(answer(&downgraded, "User").ntlm_response.len() > 24);
    }

    #[test]
    fn the_servers_time_is_used_if_it_tells_it() {
        let time = 0x01d0_1234_5678_9abc_i64;
        let mut bytes = published();
        let end = bytes.len() - 4;
        let mut entry = vec![7, 0, 8, 0];
        entry.extend(time.to_le_bytes());
        bytes.splice(end..end, entry);
        bytes[40] += 12;
        bytes[42] += 12;
        let sent = |bytes: &[u8]| {
            i64::from_le_bytes(answer(bytes, "User").ntlm_response[24..32].try_into().unwrap())
        };
        assert_eq!(sent(&bytes), time);
        let now = (Timestamp::now().as_second() + WINDOWS_EPOCH_S) * 10_000_000;
        assert!((sent(&published()) - now).abs() < 3600 * 10_000_000, "our own time without");
    }

    #[test]
    fn what_is_no_challenge_is_refused() {
        let password = SecretString::from("x");
        let first = negotiate().unwrap();
        let oem = {
            let mut bytes = published();
            bytes[20] &= !1;
            STANDARD.encode(bytes)
        };
        let long = {
            let mut bytes = published();
            bytes.resize(60_000, 0);
            bytes[40..44].copy_from_slice(&[0, 0xea, 0, 0xea]);
            STANDARD.encode(bytes)
        };
        for text in ["", "!", "TlRMTVNTUAACAAAA", "oYG2MIGzoAMKAQE=", &first, &oem, &long] {
            let refused = authenticate(text, "User", &password);
            assert_eq!(refused, Err(NtlmError::Unreadable), "{}", text.chars().take(40).collect::<String>());
        }
        let refused = authenticate(&STANDARD.encode(published()), &"x".repeat(1025), &password);
        assert_eq!(refused, Err(NtlmError::NameTooLong));
    }

    proptest! {
        #[test]
        fn no_challenge_makes_it_panic(
            changes in prop::collection::vec((0..104_usize, any::<u8>()), 0..12),
            length in 0..=120_usize,
        ) {
            let mut bytes = published();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.resize(length, 0xff);
            let _ = authenticate(&STANDARD.encode(bytes), "User", &SecretString::from("x"));
        }
    }
}
