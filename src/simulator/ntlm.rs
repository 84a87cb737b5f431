//! The server's side of NTLM over HTTP: challenges, and the check of what is answered to them.
//!
//! NTLM signs a TCP connection in, not a request: [`Connection`] is what one connection has got to. The challenge is
//! valid on its connection and once; after it was answered rightly, every request on the connection is its account's,
//! with or without `Authorization`. Only version 2 is accepted, and a message integrity code where the client says
//! that there is one. Neither signing, sealing nor a key for them is granted. Written from MS-NLMP (2.2.1, 3.2.5 and
//! 3.3.2) and MS-NTHT.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use hyper::{HeaderMap, header};
use md4::{Digest as _, Md4};
use md5::Md5;

use super::{
    application::Account,
    server::{Exchange, Server},
    sign_in,
};

const SIGNATURE: &[u8; 8] = b"NTLMSSP\0";

const UNICODE: u32 = 0x0000_0001;
const OEM: u32 = 0x0000_0002;
const REQUEST_TARGET: u32 = 0x0000_0004;
const NTLM: u32 = 0x0000_0200;
const ALWAYS_SIGN: u32 = 0x0000_8000;
const TARGET_TYPE_DOMAIN: u32 = 0x0001_0000;
const EXTENDED_SESSION_SECURITY: u32 = 0x0008_0000;
const TARGET_INFO: u32 = 0x0080_0000;
const VERSION: u32 = 0x0200_0000;
const KEY_128: u32 = 0x2000_0000;
const KEY_56: u32 = 0x8000_0000;
/// What a client gets if it asks for it.
const GRANTED: u32 = NTLM | ALWAYS_SIGN | EXTENDED_SESSION_SECURITY | VERSION | KEY_128 | KEY_56;
/// Windows Server 2022 and the only revision of NTLMSSP: without a version, some clients leave out its place in their
/// answer.
const OS_VERSION: [u8; 8] = [10, 0, 0x7c, 0x4f, 0, 0, 0, 15];

/// Where the payload of a challenge begins, and where the integrity code of its answer lies.
const CHALLENGE_HEADER: u32 = 56;
const MIC: std::ops::Range<usize> = 72..88;
/// The seconds from 1601, where Windows' time begins, to 1970.
const WINDOWS_EPOCH: Duration = Duration::from_secs(11_644_473_600);

/// A message of NTLM, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MessageType {
    Negotiate,
    Challenge,
    Authenticate,
}

/// What one connection has got to.
#[derive(Default)]
pub(crate) struct Connection {
    state: Mutex<State>,
}

#[derive(Default)]
enum State {
    #[default]
    Unknown,
    Challenged(Challenge),
    SignedIn(Arc<Account>),
}

/// What was challenged, and with what.
struct Challenge {
    /// The message that asked for it.
    request: Vec<u8>,
    /// The message that it was.
    message: Vec<u8>,
    nonce: [u8; 8],
}

/// What a message on a connection leads to.
pub(crate) enum Step {
    SignedIn,
    /// Goes back under the scheme under which the client asked.
    Challenge {
        scheme: &'static str,
        token: String,
    },
    Refused,
}

impl Connection {
    /// Whom the connection is signed in as.
    pub(crate) fn account(&self) -> Option<Arc<Account>> {
        match &*self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::SignedIn(account) => Some(Arc::clone(account)),
            _ => None,
        }
    }

    /// Takes the message in `Authorization`. `schemes` are those that are offered.
    pub(crate) fn take(&self, server: &Server, headers: &HeaderMap, schemes: &[&'static str]) -> Step {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Whatever comes now, what was before is over.
        let before = std::mem::take(&mut *state);
        let Some((scheme, message)) = message_of(headers) else { return Step::Refused };
        let Some(scheme) = schemes.iter().find(|offered| offered.eq_ignore_ascii_case(scheme)) else {
            return Step::Refused;
        };
        match (type_of(&message), before) {
            (Some(MessageType::Negotiate), _) => {
                let nonce = server.dice.number().to_be_bytes();
                let Some(flags) = number_at(&message, 12) else { return Step::Refused };
                let answer = challenge(flags, nonce, &server.settings.domain);
                let token = STANDARD.encode(&answer);
                *state = State::Challenged(Challenge { request: message, message: answer, nonce });
                Step::Challenge { scheme, token }
            }
            (Some(MessageType::Authenticate), State::Challenged(challenge)) => {
                match accept(server, &challenge, &message) {
                    Some(account) => {
                        *state = State::SignedIn(account);
                        Step::SignedIn
                    }
                    None => Step::Refused,
                }
            }
            _ => Step::Refused,
        }
    }
}

/// Which message of NTLM a request bears, if any.
pub(crate) fn message_type(exchange: &Exchange) -> Option<MessageType> {
    type_of(&message_of(&exchange.headers)?.1)
}

/// The account that a request's NTLM message names, rightly or not.
pub(crate) fn account_named_in(server: &Server, exchange: &Exchange) -> Option<Arc<Account>> {
    let answer = Answer::read(&message_of(&exchange.headers)?.1)?;
    sign_in::account_of(server, &answer.name())
}

fn message_of(headers: &HeaderMap) -> Option<(&str, Vec<u8>)> {
    let (scheme, text) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    Some((scheme, STANDARD.decode(text.trim()).ok()?))
}

fn type_of(message: &[u8]) -> Option<MessageType> {
    if !message.starts_with(SIGNATURE) {
        return None;
    }
    match number_at(message, 8)? {
        1 => Some(MessageType::Negotiate),
        2 => Some(MessageType::Challenge),
        3 => Some(MessageType::Authenticate),
        _ => None,
    }
}

/// A `CHALLENGE_MESSAGE` for a client that asked for `asked`.
fn challenge(asked: u32, nonce: [u8; 8], domain: &str) -> Vec<u8> {
    let encoding = if asked & UNICODE == 0 { OEM } else { UNICODE };
    let short_domain = domain.split('.').next().unwrap_or_default().to_uppercase();
    let target = if encoding == UNICODE { utf16(&short_domain) } else { short_domain.clone().into_bytes() };
    let mut pairs = Vec::new();
    let mut pair = |number: u16, value: &[u8]| {
        pairs.extend(number.to_le_bytes());
        pairs.extend(length_of(value).to_le_bytes());
        pairs.extend(value);
    };
    pair(2, &utf16(&short_domain));
    pair(1, &utf16("SIMULATOR"));
    pair(4, &utf16(domain));
    pair(3, &utf16(&format!("simulator.{domain}")));
    pair(7, &windows_time(SystemTime::now()).to_le_bytes());
    pair(0, &[]);
    let mut message = SIGNATURE.to_vec();
    message.extend(2_u32.to_le_bytes());
    let mut field = |value: &[u8], offset: u32| {
        message.extend(length_of(value).to_le_bytes());
        message.extend(length_of(value).to_le_bytes());
        message.extend(offset.to_le_bytes());
    };
    field(&target, CHALLENGE_HEADER);
    let flags = (asked & (GRANTED | REQUEST_TARGET)) | encoding | TARGET_TYPE_DOMAIN | TARGET_INFO;
    let pairs_offset = CHALLENGE_HEADER + u32::from(length_of(&target));
    message.extend(flags.to_le_bytes());
    message.extend(nonce);
    message.extend([0; 8]);
    let length = length_of(&pairs);
    message.extend(length.to_le_bytes());
    message.extend(length.to_le_bytes());
    message.extend(pairs_offset.to_le_bytes());
    message.extend(if asked & VERSION == 0 { [0; 8] } else { OS_VERSION });
    message.extend(target);
    message.extend(pairs);
    message
}

/// Every value here is a few names long.
fn length_of(value: &[u8]) -> u16 {
    u16::try_from(value.len()).unwrap_or(u16::MAX)
}

/// The account that an `AUTHENTICATE_MESSAGE` proves to know the password of.
fn accept(server: &Server, challenge: &Challenge, message: &[u8]) -> Option<Arc<Account>> {
    let answer = Answer::read(message)?;
    let account = sign_in::account_of(server, &answer.name())?;
    let key = response_key(&account.password, &answer.user, &answer.domain);
    let session_key = check(&key, challenge.nonce, &answer.response)?;
    if has_integrity_code(&answer.response) {
        let mut unsigned = message.to_vec();
        let code = message.get(MIC)?;
        unsigned[MIC].fill(0);
        let all = [&challenge.request, &challenge.message, &unsigned];
        mac(&session_key, &all.map(Vec::as_slice)).verify_slice(code).ok()?;
    }
    Some(account)
}

/// What an `AUTHENTICATE_MESSAGE` says.
struct Answer {
    response: Vec<u8>,
    domain: String,
    user: String,
}

impl Answer {
    fn read(message: &[u8]) -> Option<Self> {
        if type_of(message)? != MessageType::Authenticate {
            return None;
        }
        let unicode = number_at(message, 60)? & UNICODE != 0;
        let text = |at: usize| {
            let bytes = field_at(message, at)?;
            if !unicode {
                return Some(String::from_utf8_lossy(bytes).into_owned());
            }
            let units: Vec<u16> =
                bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
            String::from_utf16(&units).ok()
        };
        Some(Self { response: field_at(message, 20)?.to_vec(), domain: text(28)?, user: text(36)? })
    }

    /// The name in the spelling of the password grant.
    fn name(&self) -> String {
        let mut name = String::new();
        if !self.domain.is_empty() && !self.user.contains('@') {
            let _ = write!(name, "{}\\", self.domain);
        }
        name.push_str(&self.user);
        name
    }
}

fn number_at(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(message.get(at..at + 4)?.try_into().ok()?))
}

/// What a field descriptor (length, room, offset) points to.
fn field_at(message: &[u8], at: usize) -> Option<&[u8]> {
    let length = usize::from(u16::from_le_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let offset = usize::try_from(number_at(message, at + 4)?).ok()?;
    message.get(offset..offset.checked_add(length)?)
}

/// `NTOWFv2`.
fn response_key(password: &str, user: &str, domain: &str) -> [u8; 16] {
    // Windows turns single characters into single characters.
    let upper: String = user
        .chars()
        .map(|c| {
            let mut upper = c.to_uppercase();
            upper.next().filter(|_| upper.next().is_none()).unwrap_or(c)
        })
        .collect();
    let hash: [u8; 16] = Md4::digest(utf16(password)).into();
    mac(&hash, &[&utf16(&upper), &utf16(domain)]).finalize().into_bytes().into()
}

/// Checks an `NTLMv2_RESPONSE` to `nonce`; gives the session key.
fn check(key: &[u8; 16], nonce: [u8; 8], response: &[u8]) -> Option<[u8; 16]> {
    // An answer of version 1 has 24 bytes.
    let (proof, temp) = response.split_at_checked(16)?;
    if temp.len() < 28 || !temp.starts_with(&[1, 1]) {
        return None;
    }
    mac(key, &[&nonce, temp]).verify_slice(proof).ok()?;
    Some(mac(key, &[proof]).finalize().into_bytes().into())
}

/// Whether the pairs in a response have the flag for a message integrity code.
fn has_integrity_code(response: &[u8]) -> bool {
    let mut pairs = response.get(44..).unwrap_or_default();
    while let Some((head, rest)) = pairs.split_at_checked(4) {
        let length = usize::from(u16::from_le_bytes([head[2], head[3]]));
        let Some((value, rest)) = rest.split_at_checked(length) else { return false };
        match u16::from_le_bytes([head[0], head[1]]) {
            0 => return false,
            6 => return value.first().is_some_and(|flags| flags & 2 != 0),
            _ => pairs = rest,
        }
    }
    false
}

fn mac(key: &[u8; 16], parts: &[&[u8]]) -> Hmac<Md5> {
    let mut mac = Hmac::<Md5>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// In tenths of microseconds since 1601.
fn windows_time(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default() + WINDOWS_EPOCH;
    u64::try_from(since.as_nanos() / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: [u8; 8] = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef];

    /// The `temp` of MS-NLMP 4.2.4.1.3: time 0, client challenge `aa` eight times, domain and server.
    fn published_temp() -> Vec<u8> {
        hex::decode(
            "01010000000000000000000000000000aaaaaaaaaaaaaaaa0000000002000c0044006f006d00610069006e0001000c00530065\
             00720076006500720000000000000000\
             00",
        )
        .unwrap()
    }

    #[test]
    fn the_published_values_of_version_2_are_met() {
        let key = response_key("Password", "User", "Domain");
        assert_eq!(hex::encode(key), "0c868a403bfd7a93a3001ef22ef02e3f");
        let proof = hex::decode("68cd0ab851e51c96aabc927bebef6a1c").unwrap();
        let response = [proof, published_temp()].concat();
        let session_key = check(&key, NONCE, &response).unwrap();
        assert_eq!(hex::encode(session_key), "8de40ccadbc14a82f15cb0ad0de95ca3");
        assert!(!has_integrity_code(&response));
    }

    #[test]
    fn anything_else_is_refused() {
        let key = response_key("Password", "User", "Domain");
        let proof = hex::decode("68cd0ab851e51c96aabc927bebef6a1c").unwrap();
        let response = [proof.clone(), published_temp()].concat();
        for at in [0, 15, 16, 17, 24, 32, response.len() - 1] {
            let mut spoilt = response.clone();
            spoilt[at] ^= 1;
            assert_eq!(check(&key, NONCE, &spoilt), None, "byte {at}");
        }
        assert_eq!(check(&key, [0; 8], &response), None, "another challenge");
        for (password, user, domain) in
            [("password", "User", "Domain"), ("Password", "Users", "Domain"), ("Password", "User", "")]
        {
            assert_eq!(check(&response_key(password, user, domain), NONCE, &response), None);
        }
        assert!(check(&response_key("Password", "USER", "Domain"), NONCE, &response).is_some());
        // The published response of version 1, with and without session security.
        for response in [
            "67c43011f30298a2ad35ece64f16331c44bdbed927841f94",
            "7537f803ae367128ca458204bde7caf81e97ed2683267232",
        ] {
            assert_eq!(check(&key, NONCE, &hex::decode(response).unwrap()), None);
        }
        assert_eq!(check(&key, NONCE, &proof), None);
    }

    #[test]
    fn the_flag_for_an_integrity_code_is_found_among_the_pairs() {
        let with = |pairs: &[u8]| has_integrity_code(&[&[0; 44], pairs].concat());
        assert!(with(&[1, 0, 2, 0, 65, 0, 6, 0, 4, 0, 2, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!with(&[1, 0, 2, 0, 65, 0, 6, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!with(&[0, 0, 0, 0, 6, 0, 4, 0, 2, 0, 0, 0]), "the list has ended");
        assert!(!with(&[1, 0, 200, 0, 65]));
        assert!(!has_integrity_code(&[]));
    }

    #[test]
    fn a_challenge_says_who_the_server_is_and_grants_what_was_asked() {
        let message = challenge(0xffff_ffff, NONCE, "contoso.example");
        assert_eq!(type_of(&message), Some(MessageType::Challenge));
        assert_eq!(field_at(&message, 12).unwrap(), utf16("CONTOSO"));
        assert_eq!(message[24..32], NONCE);
        let flags = number_at(&message, 20).unwrap();
        assert_eq!(flags & OEM, 0, "Unicode goes first");
        assert_eq!(flags & 0x4000_0030, 0, "no key, no signing, no sealing");
        let pairs = field_at(&message, 40).unwrap();
        assert!(pairs.ends_with(&[0, 0, 0, 0]));
        assert!(pairs.windows(30).any(|window| window == utf16("contoso.example")));
        let oem = challenge(OEM | NTLM, NONCE, "contoso.example");
        assert_eq!(field_at(&oem, 12).unwrap(), b"CONTOSO");
    }

    #[test]
    fn descriptors_that_point_outside_are_refused() {
        for message in ["", "NTLMSSP\0", "NTLMSSP\0\u{3}\0\0\0"] {
            assert!(Answer::read(message.as_bytes()).is_none());
        }
        let mut message = [SIGNATURE.as_slice(), &[3, 0, 0, 0], &[0; 52]].concat();
        assert!(Answer::read(&message).is_some());
        message[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Answer::read(&message).is_none());
    }
}
