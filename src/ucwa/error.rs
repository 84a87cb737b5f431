//! What can go wrong between the relay and a UCWA server, and what the owner of a failed request does next.
//!
//! Callers match on [`UcwaError`] and [`UcwaError::action`]; nobody reads sentences. The sentences are for operators
//! and hold no token, no password and no query string. Decisions are made by HTTP status and `ErrorSubcode`, never by
//! the message, and by the status alone where the answer is not UCWA's (HTML of IIS or of a proxy). Sources:
//! `GenericSynchronousErrors`, `ErrorSubcode`, `ApplicationDashboard` of the UCWA documentation.

use std::{fmt, sync::Arc, time::Duration};

use super::{model::Reason, xml::ParseError};

/// `X-Ms-diagnostics` of a refused OAuth token.
pub(super) const TOKEN_INVALID: u32 = 28055;
/// `X-Ms-diagnostics` of a web ticket of another pool.
pub(super) const WEB_TICKET_INVALID: u32 = 28032;
/// What a 429 without `Retry-After` asks for.
const THROTTLED: Duration = Duration::from_secs(30);

/// A failed request or sign-in.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UcwaError {
    /// No HTTP answer, or one that broke off.
    #[error("no answer from {resource} at {host}{}", if *sent { "" } else { " (the request was not sent)" })]
    Network {
        /// UCWA resource, or what stands for it.
        resource: &'static str,
        /// Host and port.
        host: String,
        /// The request may have been executed.
        sent: bool,
        /// Without its address, which may hold a query.
        #[source]
        source: Arc<reqwest::Error>,
    },
    /// No HTTP answer in time.
    #[error("{resource} at {host} did not answer in time")]
    Timeout {
        /// UCWA resource.
        resource: &'static str,
        /// Host and port.
        host: String,
        /// The request may have been executed.
        sent: bool,
    },
    /// The TLS handshake failed; the source names the certificate's names where they do not fit. Nothing was sent.
    #[error(
        "no secure connection to {resource} at {host}: check the server's certificate, or name its authority in \
         server.ca_file"
    )]
    Tls {
        /// UCWA resource.
        resource: &'static str,
        /// Host and port.
        host: String,
        /// What TLS says.
        #[source]
        source: Arc<reqwest::Error>,
    },
    /// An HTTP status that is no success.
    #[error("{resource} answered {status}{}", Detail { status: *status, reason: reason.as_deref() })]
    Status {
        /// UCWA resource.
        resource: &'static str,
        /// HTTP status.
        status: u16,
        /// The body, if it was UCWA's. `None` for HTML and for nothing.
        reason: Option<Box<Reason>>,
        /// The header `Retry-After`, 1 s to 15 min.
        retry_after: Option<Duration>,
        /// The answer carried an `MsRtcOAuth` challenge: the token is not (or no longer) valid there.
        challenge: bool,
        /// Number in `X-Ms-diagnostics`.
        diagnostics: Option<u32>,
    },
    /// A success whose body is not UCWA's: a proxy or a sign-in page answered.
    #[error(
        "{resource} answered with {content_type} instead of UCWA: something between the relay and the server answers \
         in its place"
    )]
    NotUcwa {
        /// UCWA resource.
        resource: &'static str,
        /// Media type of the answer.
        content_type: String,
    },
    /// A success whose body is UCWA's but cannot be read.
    #[error("{resource} sent a document that can't be read")]
    Malformed {
        /// UCWA resource.
        resource: &'static str,
        /// What is wrong with it.
        #[source]
        source: Arc<ParseError>,
    },
    /// The document was read but lacks what the next step needs.
    #[error("{resource} lacks {what}")]
    Incomplete {
        /// UCWA resource.
        resource: &'static str,
        /// A link or a header.
        what: &'static str,
    },
    /// The answer is larger than this client reads.
    #[error("the answer of {resource} is larger than {limit} bytes")]
    TooLarge {
        /// UCWA resource.
        resource: &'static str,
        /// In bytes.
        limit: usize,
    },
    /// An address leads to an origin that is not trusted; nothing was sent there.
    #[error("{lead} leads to {host}, which is not trusted{advice}")]
    Untrusted {
        /// What led there.
        lead: &'static str,
        /// Host and port.
        host: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// An address is not https. Nothing was sent there.
    #[error("{url} is not https: plain http is only for loopback addresses, and only with server.allow_http")]
    Insecure {
        /// Scheme, host and port.
        url: String,
    },
    /// A link's address can't be read. Nothing was sent.
    #[error("a link of the server can't be followed: {problem}")]
    BadLink {
        /// Why.
        problem: String,
    },
    /// The token service refused user name and password. It is not asked again with them.
    #[error(
        "{host} refused the user name or the password; set the right password, the relay does not try again"
    )]
    CredentialsRefused {
        /// The token service's host and port.
        host: String,
    },
    /// The client's permit says no. Nothing was sent.
    #[error("{resource} was not asked: the account is not this node's any more")]
    NotPermitted {
        /// UCWA resource.
        resource: &'static str,
    },
    /// The server wants a person to sign in in a browser.
    #[error(
        "the server wants a sign-in in a browser at {address}, which a service can't do; allow passwords there"
    )]
    PassiveSignInWanted {
        /// Address of the sign-in page, without its query.
        address: String,
    },
    /// The server does not take the grant that the account uses.
    #[error(
        "the server offers {offered}, the account is configured for {configured}: set its auth to what the server \
         offers, or allow it there"
    )]
    GrantNotOffered {
        /// Grants the server takes.
        offered: String,
        /// The account's way to sign in, and its grant.
        configured: &'static str,
    },
    /// The token service takes the Windows grant, but not by NTLM. No proof of the password was sent.
    #[error(
        "the token service {host} takes the Windows grant by {offered}, not by NTLM: allow NTLM there, or set the \
         account's auth to password"
    )]
    NtlmNotOffered {
        /// Host and port.
        host: String,
        /// What it takes.
        offered: String,
    },
    /// The token service could not or would not issue a token. The request for which it was wanted was not sent, or
    /// not executed.
    #[error("the token service {host} answered {status}{}{}", if error.is_empty() { "" } else { " " }, error)]
    TokenService {
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
        /// `error` of the answer, or what is wrong with it; may be empty.
        error: String,
        /// The header `Retry-After`, 1 s to 15 min.
        retry_after: Option<Duration>,
    },
    /// A token is wanted, but the answer does not say where to get one.
    #[error("{resource} at {host} answered {status} without saying where tokens are issued")]
    NoChallenge {
        /// UCWA resource.
        resource: &'static str,
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
    },
    /// The pool takes no token of the first host and names no token service of its own.
    #[error(
        "the pool {pool} neither accepts the token that {first} issued nor says where to get another; check the web \
         services of both"
    )]
    SecondTokenRefused {
        /// Where the account signed in.
        first: String,
        /// Where its applications are.
        pool: String,
    },
    /// No discovery address led to the account.
    #[error("autodiscovery failed: {}", Attempts(attempts))]
    DiscoveryFailed {
        /// Host and what happened there, in order.
        attempts: Vec<(String, String)>,
        /// Only an operator can mend it.
        attention: bool,
    },
    /// The client can't be set up from its configuration.
    #[error("{problem}")]
    Setup {
        /// What is wrong, naming the setting.
        problem: String,
    },
}

/// What the owner of a failed request does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The same request again after a back-off. For sends: the outcome is unknown, settle it by the events.
    RepeatAsIs,
    /// The same request again, not before [`UcwaError::retry_after`].
    Wait,
    /// Renew the token and repeat. This client did so once already when it returns such an error.
    RenewToken,
    /// Create the application again.
    RecreateApplication,
    /// Begin at discovery again.
    Rediscover,
    /// Only this operation failed; the account goes on.
    FailThisOperation,
    /// An operator has to look at the account.
    StopAccount,
    /// The same request without the feature of a newer revision.
    WithoutNewerFeature,
    /// It exists already: go on with that.
    UseExisting,
    /// Make the account available (resource `makeMeAvailable`), then repeat.
    MakeAvailable,
    /// Read the application: if it is there, only the operation failed; otherwise create it again.
    ReadApplication,
    /// Read the resource again and apply the change to what it is now.
    ReapplyChange,
}

impl UcwaError {
    /// What to count a request as that brought no HTTP status.
    pub(super) fn without_status(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "timeout",
            Self::Tls { .. } => "tls",
            Self::TooLarge { .. } => "too_large",
            _ => "network",
        }
    }

    /// HTTP status of the resource's answer. `None` if there was none, also when a token could not be had.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// `ErrorSubcode` of the answer, if its body was UCWA's and had one.
    pub fn subcode(&self) -> Option<&str> {
        self.reason().and_then(|reason| reason.subcode.as_deref()).filter(|subcode| !subcode.is_empty())
    }

    /// The answer's body, if it was UCWA's.
    pub fn reason(&self) -> Option<&Reason> {
        match self {
            Self::Status { reason, .. } => reason.as_deref(),
            _ => None,
        }
    }

    /// How long the server wants to be left alone, 1 s to 15 min: its `Retry-After`, or 30 s for a 429 without one.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, status: 429, .. }
            | Self::TokenService { retry_after, status: 429, .. } => Some(retry_after.unwrap_or(THROTTLED)),
            Self::Status { retry_after, .. } | Self::TokenService { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// There was no HTTP answer: network, TLS, timeout.
    pub fn is_transport(&self) -> bool {
        matches!(self, Self::Network { .. } | Self::Timeout { .. } | Self::Tls { .. })
    }

    /// The request may have been executed. False only if it certainly was not written.
    pub fn was_sent(&self) -> bool {
        match self {
            Self::Network { sent, .. } | Self::Timeout { sent, .. } => *sent,
            Self::Status { .. }
            | Self::NotUcwa { .. }
            | Self::Malformed { .. }
            | Self::Incomplete { .. }
            | Self::TooLarge { .. } => true,
            _ => false,
        }
    }

    /// The token service refused user name and password.
    pub fn is_credentials_refused(&self) -> bool {
        matches!(self, Self::CredentialsRefused { .. })
    }

    /// What the owner of the failed request does next.
    pub fn action(&self) -> Action {
        match self {
            Self::Status { resource, status, reason, challenge, diagnostics, .. } => decide(&Answer {
                resource,
                status: *status,
                is_ucwa: reason.is_some(),
                subcode: self.subcode().unwrap_or("None"),
                challenge: *challenge,
                diagnostics: *diagnostics,
            }),
            Self::TokenService { status, error, .. } => match (*status, error.as_str()) {
                (403, _) | (400, "invalid_request" | "invalid_scope" | "unsupported_grant_type") => {
                    Action::StopAccount
                }
                (429 | 503, _) => Action::Wait,
                _ => Action::RepeatAsIs,
            },
            Self::DiscoveryFailed { attention, .. } if !attention => Action::RepeatAsIs,
            Self::DiscoveryFailed { .. }
            | Self::Tls { .. }
            | Self::Untrusted { .. }
            | Self::Insecure { .. }
            | Self::CredentialsRefused { .. }
            | Self::PassiveSignInWanted { .. }
            | Self::GrantNotOffered { .. }
            | Self::NtlmNotOffered { .. }
            | Self::SecondTokenRefused { .. }
            | Self::Setup { .. } => Action::StopAccount,
            Self::Network { .. }
            | Self::Timeout { .. }
            | Self::NotUcwa { .. }
            | Self::Malformed { .. }
            | Self::NotPermitted { .. }
            | Self::NoChallenge { .. } => Action::RepeatAsIs,
            Self::Incomplete { .. } | Self::TooLarge { .. } | Self::BadLink { .. } => {
                Action::FailThisOperation
            }
        }
    }

    /// For an error on the way to a token: the request that wanted it was not executed.
    pub(super) fn before_the_request(mut self) -> Self {
        if let Self::Network { sent, .. } | Self::Timeout { sent, .. } = &mut self {
            *sent = false;
        }
        match self {
            // A status would be taken for the resource's.
            Self::Status { resource, status, retry_after, .. } => Self::TokenService {
                host: format!("for {resource}"),
                status,
                error: String::new(),
                retry_after,
            },
            other => other,
        }
    }
}

/// An answer that is no success, as far as decisions go by it.
struct Answer<'a> {
    resource: &'a str,
    status: u16,
    /// The body was a UCWA `reason`.
    is_ucwa: bool,
    subcode: &'a str,
    challenge: bool,
    diagnostics: Option<u32>,
}

/// Resources without which an account can't work: what forbids them concerns the account, not one operation.
const ESSENTIAL: [&str; 6] = ["autodiscover", "user", "applications", "application", "me", "makeMeAvailable"];

/// The decision table for commands; the event channel has its own.
#[expect(clippy::match_same_arms, reason = "a row for each kind of answer, in the order of their numbers")]
fn decide(answer: &Answer<'_>) -> Action {
    use Action::{
        FailThisOperation, MakeAvailable, ReadApplication, ReapplyChange, RecreateApplication, Rediscover,
        RenewToken, RepeatAsIs, StopAccount, UseExisting, Wait, WithoutNewerFeature,
    };
    match (answer.status, answer.subcode) {
        (401, _) => RenewToken,
        (403 | 500, _) if answer.challenge => RenewToken,
        (403, _) if answer.diagnostics == Some(TOKEN_INVALID) => RenewToken,
        (500, _) if answer.diagnostics == Some(WEB_TICKET_INVALID) => RenewToken,
        (403, "AnonymousNotAllowed" | "MobileApplicationNoLongerAllowed") => StopAccount,
        (403, _) if ESSENTIAL.contains(&answer.resource) => StopAccount,
        (404, "ApplicationNotFound") => RecreateApplication,
        (404, "APIVersionNotSupported") => WithoutNewerFeature,
        (404, _) if answer.resource == "applications" => Rediscover,
        // IIS or a proxy: the application pool is restarting.
        (404, _) if !answer.is_ucwa => RepeatAsIs,
        (409, "AlreadyExists" | "ThreadIdAlreadyExists") => UseExisting,
        (409, "MakeMeAvailableRequired") => MakeAvailable,
        (409, "AnotherOperationPending") => Wait,
        (409, "TooManyGroups") => FailThisOperation,
        (408 | 409, _) => RepeatAsIs,
        (410, "InactiveApplicationExpired") => RecreateApplication,
        (410, "TooManyApplications" | "UserAgentNotAllowed") => StopAccount,
        (410, "CannotRedirect") => Rediscover,
        (410, _) => ReadApplication,
        (412 | 428, _) => ReapplyChange,
        (429 | 503, _) => Wait,
        (500, "InvalidExchangeServerVersion") => FailThisOperation,
        (500 | 504, "ExchangeServiceFailure" | "ExchangeTimeout") => Wait,
        (500..=599, _) => RepeatAsIs,
        (300..=399, _) => Rediscover,
        _ => FailThisOperation,
    }
}

/// What a status's sentence says beyond the number.
struct Detail<'a> {
    status: u16,
    reason: Option<&'a Reason>,
}

impl fmt::Display for Detail<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = self.reason {
            let words: Vec<&str> = [&reason.code, &reason.subcode]
                .into_iter()
                .flatten()
                .map(String::as_str)
                .filter(|w| !w.is_empty())
                .collect();
            if !words.is_empty() {
                write!(formatter, " {}", printable(&words.join(" "), 80))?;
            }
            if let Some(message) = reason.message.as_deref().filter(|message| !message.trim().is_empty()) {
                write!(formatter, " ({})", printable(message.trim(), 200))?;
            }
            for (name, problem) in reason.parameters.iter().take(5) {
                write!(formatter, "; {}: {}", printable(name, 40), printable(problem, 80))?;
            }
            return Ok(());
        }
        formatter.write_str(match self.status {
            300..=399 => " (a redirect, which is not followed with a token)",
            401 => " (the token was refused, also after it was renewed)",
            403 => " (forbidden: check the user's policies)",
            404 => " (not found, and not in UCWA's words: the web application may be restarting)",
            413 => " (too large)",
            502..=504 => " (a server or proxy on the way is down)",
            _ => "",
        })
    }
}

/// Text of the server, cut and without control characters.
pub(super) fn printable(text: &str, characters: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(characters).collect()
}

struct Attempts<'a>(&'a [(String, String)]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (host, how)) in self.0.iter().enumerate() {
            write!(formatter, "{}{host}: {how}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Reads `Retry-After`: seconds, or an HTTP date (RFC 9110 10.2.3). A date counts from the answer's own `Date`, so
/// that differing clocks do no harm. The result lies between 1 s and 15 min.
pub(super) fn parse_retry_after(value: &str, date: Option<&str>) -> Option<Duration> {
    let value = value.trim();
    let seconds = if value.bytes().all(|byte| byte.is_ascii_digit()) && !value.is_empty() {
        // Only an absurdly large number can fail.
        value.parse::<i64>().unwrap_or(i64::MAX)
    } else {
        let until = http_date(value)?.as_second();
        let from = date.and_then(http_date).unwrap_or_else(jiff::Timestamp::now).as_second();
        until.saturating_sub(from)
    };
    Some(Duration::from_secs(seconds.clamp(1, 15 * 60).unsigned_abs()))
}

/// Reads an HTTP date (RFC 9110 5.6.7) in the form that is written today.
pub(super) fn http_date(text: &str) -> Option<jiff::Timestamp> {
    jiff::fmt::rfc2822::parse(text.trim()).ok().map(|date| date.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use Action::*;

    fn status(status: u16, subcode: Option<&str>) -> UcwaError {
        at("sendMessage", status, subcode)
    }

    fn at(resource: &'static str, status: u16, subcode: Option<&str>) -> UcwaError {
        let reason = subcode
            .map(|subcode| Box::new(Reason { subcode: Some(subcode.to_owned()), ..Reason::default() }));
        UcwaError::Status { resource, status, reason, retry_after: None, challenge: false, diagnostics: None }
    }

    #[test]
    fn each_row_of_the_decision_table_holds() {
        for (code, subcode, action) in [
            (400, Some("ParameterValidationFailure"), FailThisOperation),
            (400, Some("DeserializationFailure"), FailThisOperation),
            (400, Some("None"), FailThisOperation),
            (401, None, RenewToken),
            (403, Some("None"), FailThisOperation),
            (403, Some("NotAllowed"), FailThisOperation),
            (403, Some("AnonymousNotAllowed"), StopAccount),
            (403, Some("MobileApplicationNoLongerAllowed"), StopAccount),
            (404, Some("ApplicationNotFound"), RecreateApplication),
            (404, Some("APIVersionNotSupported"), WithoutNewerFeature),
            (404, Some("ResourceNotFound"), FailThisOperation),
            (404, Some("ConversationNotFound"), FailThisOperation),
            (404, Some("None"), FailThisOperation),
            (404, Some("DestinationNotFound"), FailThisOperation),
            (404, None, RepeatAsIs),
            (405, None, FailThisOperation),
            (408, Some("ClientTimeout"), RepeatAsIs),
            (409, Some("AlreadyExists"), UseExisting),
            (409, Some("PGetReplaced"), RepeatAsIs),
            (409, Some("MakeMeAvailableRequired"), MakeAvailable),
            (409, Some("AnotherOperationPending"), Wait),
            (409, Some("ThreadIdAlreadyExists"), UseExisting),
            (409, Some("TooManyGroups"), FailThisOperation),
            (409, Some("None"), RepeatAsIs),
            (410, Some("InactiveApplicationExpired"), RecreateApplication),
            (410, Some("TooManyApplications"), StopAccount),
            (410, Some("UserAgentNotAllowed"), StopAccount),
            (410, Some("CannotRedirect"), Rediscover),
            (410, Some("None"), ReadApplication),
            (410, None, ReadApplication),
            (412, None, ReapplyChange),
            (428, None, ReapplyChange),
            (413, Some("EntityTooLarge"), FailThisOperation),
            (415, None, FailThisOperation),
            (429, None, Wait),
            (500, Some("CallbackChannelError"), RepeatAsIs),
            (500, Some("ServiceFailure"), RepeatAsIs),
            (500, Some("None"), RepeatAsIs),
            (500, None, RepeatAsIs),
            (500, Some("InvalidExchangeServerVersion"), FailThisOperation),
            (500, Some("ExchangeServiceFailure"), Wait),
            (504, Some("ExchangeTimeout"), Wait),
            (502, None, RepeatAsIs),
            (503, None, Wait),
            (504, Some("Timeout"), RepeatAsIs),
            (504, Some("ServiceTimeout"), RepeatAsIs),
            (302, None, Rediscover),
            (418, Some("SomethingNew"), FailThisOperation),
        ] {
            assert_eq!(status(code, subcode).action(), action, "{code} {subcode:?}");
        }
    }

    #[test]
    fn a_refused_token_is_known_by_challenge_or_diagnostics() {
        for (code, has_challenge, number, action) in [
            (403, true, None, RenewToken),
            (500, true, None, RenewToken),
            (403, false, Some(28055), RenewToken),
            (500, false, Some(28032), RenewToken),
            (403, false, Some(28032), FailThisOperation),
            (500, false, Some(28055), RepeatAsIs),
        ] {
            let error = UcwaError::Status {
                resource: "sendMessage",
                status: code,
                reason: None,
                retry_after: None,
                challenge: has_challenge,
                diagnostics: number,
            };
            assert_eq!(error.action(), action, "{code} {has_challenge} {number:?}");
        }
    }

    #[test]
    fn what_an_account_can_not_work_without_concerns_the_account() {
        for resource in ["application", "applications", "user", "me", "makeMeAvailable"] {
            assert_eq!(at(resource, 403, Some("None")).action(), StopAccount, "{resource}");
        }
        assert_eq!(at("applications", 404, None).action(), Rediscover);
        assert_eq!(at("conversation", 403, Some("None")).action(), FailThisOperation);
    }

    #[test]
    fn a_token_services_answer_is_never_taken_for_the_resources() {
        let answer = |status, error: &str| UcwaError::TokenService {
            host: "h".to_owned(),
            status,
            error: error.to_owned(),
            retry_after: None,
        };
        for (status, words, action) in [
            (400, "invalid_request", StopAccount),
            (400, "invalid_scope", StopAccount),
            (400, "server_error", RepeatAsIs),
            (403, "", StopAccount),
            (429, "", Wait),
            (500, "", RepeatAsIs),
            (503, "", Wait),
            (200, "without JSON", RepeatAsIs),
        ] {
            let error = answer(status, words);
            assert_eq!(error.action(), action, "{status} {words}");
            assert_eq!((error.status(), error.was_sent(), error.is_transport()), (None, false, false));
        }
        assert!(UcwaError::CredentialsRefused { host: String::new() }.is_credentials_refused());
        assert_eq!(UcwaError::CredentialsRefused { host: String::new() }.action(), StopAccount);
        assert_eq!(status(401, None).before_the_request().status(), None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_is_clamped() {
        let now = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        for (value, seconds) in [
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("0", Some(1)),
            ("86400", Some(900)),
            ("99999999999999999999999", Some(900)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(1)),
            ("Mon, 07 Nov 1994 08:49:37 GMT", Some(900)),
            ("-5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(parse_retry_after(value, now), seconds.map(Duration::from_secs), "{value:?}");
        }
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:50:07 GMT", None), Some(Duration::from_secs(1)));
        assert_eq!(status(429, None).retry_after(), Some(Duration::from_secs(30)));
        assert_eq!(status(503, None).retry_after(), None);
    }

    #[test]
    fn sentences_name_code_subcode_and_parameters() {
        let error = UcwaError::Status {
            resource: "startMessaging",
            status: 400,
            reason: Some(Box::new(Reason {
                code: Some("BadRequest".to_owned()),
                subcode: Some("ParameterValidationFailure".to_owned()),
                message: Some("Please check\n the request.".to_owned()),
                parameters: vec![("to".to_owned(), "is no SIP URI".to_owned())],
                ..Reason::default()
            })),
            retry_after: None,
            challenge: false,
            diagnostics: None,
        };
        assert_eq!(
            error.to_string(),
            "startMessaging answered 400 BadRequest ParameterValidationFailure (Please check the request.); to: is no \
             SIP URI"
        );
        assert_eq!(error.subcode(), Some("ParameterValidationFailure"));
    }
}
