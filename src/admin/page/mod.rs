//! The page that people look at: HTML made by the server, which needs no script to be read or used.
//!
//! - [`overview`], [`accounts`], [`conversations`], [`search`], [`outbox`]: what each shows and does. [`sign_in`]: the door.
//! - [`live`]: parts of a page that follow what happens, sent as server-sent events to browsers that run the page's script.
//! - [`chart`]: drawings. [`markup`]: what becomes of texts that strangers wrote. [`assets`]: style and script.
//!
//! Whatever is read from the database goes through [`AdminState::ask`], which bounds how many readers the page takes
//! from the relay and how long anybody waits: with a dead database a page says so. Templates escape what they show;
//! only [`markup::sanitised`] makes HTML of something that was not written here. Whoever sees what people wrote is noted
//! in `access_log` first ([`AdminState::note`]).

pub(super) mod accounts;
pub(super) mod assets;
mod chart;
pub(super) mod conversations;
pub(super) mod live;
mod markup;
pub(super) mod outbox;
pub(super) mod overview;
mod pulse;
pub(super) mod search;
pub(super) mod sign_in;

use std::time::Duration;

use askama::Template;
use axum::{
    extract::{FromRequestParts, Path, Query},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{Html, IntoResponse, Response},
};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

pub(super) use self::{overview::OverviewCache, pulse::Pulse};

use super::{
    AdminState,
    viewer::{self, Viewer},
};
use crate::{
    identifiers::SipUri,
    store::{AccountState, OutboxState, StoreError},
};

/// How long a page waits for the database.
const DATABASE_WITHIN: Duration = Duration::from_secs(15);

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub(super) enum PageError {
    /// No such thing, in a sentence.
    #[error("{0}")]
    NotFound(String),
    /// The address or the form has something in it that can't be, in a sentence.
    #[error("{0}")]
    BadRequest(String),
    /// The row is not in a state that allows it, in a sentence.
    #[error("{0}")]
    Conflict(String),
    /// A form that is not from this page, or whose session has ended.
    #[error(
        "This form did not come from a page of this session, so nothing was done. Open the page again and repeat it."
    )]
    Forged,
    /// Another site makes a browser load it.
    #[error("Another site asked for this, so it is not shown. Open it by its address, or by a link.")]
    Embedded,
    /// More bytes were sent than are read.
    #[error("What was sent is longer than {} KiB, so nothing was done.", .0 / 1024)]
    TooLong(usize),
    /// What was sent did not come to its end.
    #[error("What was sent was not there in full within {} s, so nothing was done.", viewer::BODY_WITHIN.as_secs())]
    TooSlow,
    /// What is asked for is understood and can't be, in a sentence.
    #[error("{0}")]
    Unprocessable(String),
    /// A request of a program that is not JSON.
    #[error("Send JSON, as \"Content-Type: application/json\".")]
    NotJson,
    /// Nobody is known.
    #[error("Sign in at /sign-in, or send the token of admin.token_file: \"Authorization: Bearer TOKEN\".")]
    Unknown,
    /// Too many wrong tokens came from who asks; how long they have to wait.
    #[error("Too many wrong tokens came from this address. Try again in {} min.", .0.as_secs().div_ceil(60).max(1))]
    Wait(Duration),
    /// The database could not tell.
    #[error("The database could not tell.")]
    Store(#[from] StoreError),
    /// The database did not tell in time.
    #[error("The database did not answer within {} s.", DATABASE_WITHIN.as_secs())]
    Slow,
    /// Too many live connections.
    #[error("Too many pages are followed live at once.")]
    Busy,
    /// A template could not be rendered.
    #[error("The page could not be made.")]
    Template(#[from] askama::Error),
}

impl PageError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Forged | Self::Embedded => StatusCode::FORBIDDEN,
            Self::TooLong(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Wait(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unprocessable(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Unknown => StatusCode::UNAUTHORIZED,
            Self::Store(_) | Self::Slow | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Template(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(super) fn title(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "Not found",
            Self::BadRequest(_) | Self::Unprocessable(_) | Self::NotJson => "That can't be asked",
            Self::Unknown => "Who asks?",
            Self::Conflict(_) => "That can't be done now",
            Self::Forged | Self::Embedded => "Refused",
            Self::TooLong(_) => "Too long",
            Self::TooSlow => "Too slow",
            Self::Wait(_) => "Too many attempts",
            Self::Store(_) | Self::Slow => "The database does not answer",
            Self::Busy => "Too many at once",
            Self::Template(_) => "Something is wrong in this program",
        }
    }

    /// What programs read beside the words.
    pub(super) fn headers(&self) -> HeaderMap {
        let header = match self {
            Self::Unknown => {
                Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"ucwa-relay\"")))
            }
            Self::Wait(wait) => Some((header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)))),
            _ => None,
        };
        header.into_iter().collect()
    }

    /// For those who asked for no page.
    pub(super) fn in_plain_text(&self) -> Response {
        (self.status(), self.headers(), format!("{self}\n")).into_response()
    }
}

#[derive(Template)]
#[template(path = "error.html")]
struct ErrorPage {
    shell: Shell,
    sentence: String,
    cause: Option<String>,
}

impl IntoResponse for PageError {
    fn into_response(self) -> Response {
        let cause = match &self {
            Self::Store(error) => Some(crate::error_chain(error)),
            _ => None,
        };
        let (status, headers) = (self.status(), self.headers());
        if status.is_server_error() {
            tracing::warn!(error = %crate::error_chain(&self), "a page could not be shown");
        }
        let shell = Shell { title: self.title().to_owned(), ..Shell::bare() };
        let page = ErrorPage { shell, sentence: self.to_string(), cause };
        match page.render() {
            Ok(html) => (status, headers, Html(html)).into_response(),
            Err(_) => (status, headers, page.sentence).into_response(),
        }
    }
}

/// What surrounds every page.
pub(super) struct Shell {
    title: String,
    /// Which entry of the navigation is this one: its address.
    here: &'static str,
    csrf: String,
    /// Who is signed in.
    name: Option<String>,
    /// What was just done.
    notice: Option<&'static str>,
    /// Without navigation: nobody is known.
    bare: bool,
    version: &'static str,
}

impl Shell {
    fn new(title: impl Into<String>, here: &'static str, viewer: &Viewer) -> Self {
        Self {
            title: title.into(),
            here,
            csrf: viewer.csrf.clone(),
            name: viewer.name.clone(),
            notice: None,
            bare: false,
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    fn bare() -> Self {
        Self {
            title: String::new(),
            here: "",
            csrf: String::new(),
            name: None,
            notice: None,
            bare: true,
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

fn html(template: &impl Template) -> Result<Response, PageError> {
    Ok(Html(template.render()?).into_response())
}

/// What stands behind `?`. What can't be read there is an answer in words, not in the framework's.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = PageError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, PageError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(asked)) => Ok(Self(asked)),
            Err(_) => Err(PageError::BadRequest(
                "The address of this page has a value in it that can't be read.".to_owned(),
            )),
        }
    }
}

/// A number in the path.
pub(super) struct Number(pub(super) i64);

impl<S: Send + Sync> FromRequestParts<S> for Number {
    type Rejection = PageError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, PageError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(number)) => Ok(Self(number)),
            Err(_) => Err(PageError::NotFound("There is no such page.".to_owned())),
        }
    }
}

impl AdminState {
    /// Asks the database, as one of few and not for ever.
    pub(super) async fn ask<T>(
        &self,
        reading: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, PageError> {
        let reading = async {
            // The semaphore is never closed.
            let _turn = self.reads.acquire().await.ok();
            reading.await
        };
        Ok(timeout(DATABASE_WITHIN, reading).await.map_err(|_| PageError::Slow)??)
    }

    /// Notes in `access_log` what somebody is about to see.
    pub(super) async fn note(
        &self,
        viewer: &Viewer,
        action: &str,
        account: Option<&SipUri>,
        query: &str,
    ) -> Result<(), PageError> {
        self.ask(self.store.record_access(&viewer.actor, action, account, query)).await
    }
}

/// A field that was left empty is one that was not filled in.
pub(super) fn filled(field: Option<String>) -> Option<String> {
    field.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// An address that somebody typed.
pub(super) fn address(field: Option<String>) -> Result<Option<SipUri>, PageError> {
    filled(field)
        .map(|text| {
            text.parse()
                .map_err(|error: crate::identifiers::InvalidSipUri| PageError::BadRequest(error.to_string()))
        })
        .transpose()
}

/// The address of a page with what is asked for; parts without a value are left out.
fn link(path: &str, query: &[(&str, Option<String>)]) -> String {
    let mut parts = url::form_urlencoded::Serializer::new(String::new());
    for (name, value) in query {
        if let Some(value) = value {
            parts.append_pair(name, value);
        }
    }
    let parts = parts.finish();
    if parts.is_empty() { path.to_owned() } else { format!("{path}?{parts}") }
}

/// An instant for people and for programs.
pub(super) struct When {
    machine: String,
    day: String,
    time: String,
}

impl When {
    fn new(at: Timestamp) -> Self {
        let zoned = at.to_zoned(TimeZone::UTC);
        Self {
            machine: crate::archive::text::iso_milliseconds(at),
            day: zoned.strftime("%Y-%m-%d").to_string(),
            time: zoned.strftime("%H:%M:%S").to_string(),
        }
    }
}

/// A length of time in the two units that matter.
fn in_words(length: SignedDuration) -> String {
    let seconds = length.as_secs().max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, 0) => format!("{hours} h"),
        (0, ..) => format!("{hours} h {minutes} min"),
        (_, 0, _) => format!("{days} d"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A word of a state with a sign and a colour: the colour alone says nothing.
pub(super) struct Badge {
    word: String,
    sign: &'static str,
    tone: &'static str,
}

impl Badge {
    fn of_account(state: &str) -> Self {
        let (sign, tone) = match AccountState::ALL.into_iter().find(|known| known.as_str() == state) {
            Some(AccountState::Online) => ("●", "good"),
            Some(AccountState::Starting | AccountState::Discovering | AccountState::SigningIn) => {
                ("◔", "busy")
            }
            Some(AccountState::Stalled | AccountState::BackingOff) => ("◆", "warn"),
            Some(AccountState::NeedsAttention) => ("▲", "bad"),
            Some(AccountState::Stopped) | None => ("■", "idle"),
        };
        Self { word: state.replace('_', " "), sign, tone }
    }

    fn of_row(state: OutboxState) -> Self {
        let (sign, tone) = match state {
            OutboxState::Queued => ("◔", "busy"),
            OutboxState::Sending => ("➤", "busy"),
            OutboxState::Held => ("❚❚", "idle"),
            OutboxState::Sent => ("✓", "good"),
            OutboxState::Delivered => ("✓✓", "good"),
            OutboxState::Failed => ("▲", "bad"),
            OutboxState::Uncertain => ("◆", "warn"),
            OutboxState::Expired | OutboxState::Cancelled => ("■", "idle"),
        };
        Self { word: state.as_str().to_owned(), sign, tone }
    }
}

/// The limit of a query for a page of so many rows: one row more tells whether another page follows.
pub(super) fn limit(page: usize) -> i64 {
    i64::try_from(page + 1).unwrap_or(i64::MAX)
}

/// Takes off the row that only told whether another page follows.
pub(super) fn cut<T>(rows: &mut Vec<T>, page: usize) -> bool {
    let more = rows.len() > page;
    rows.truncate(page);
    more
}

/// As [`cut`], where the other page lies before this one.
pub(super) fn cut_front<T>(rows: &mut Vec<T>, page: usize) -> bool {
    let more = rows.len() > page;
    if more {
        rows.drain(..rows.len() - page);
    }
    more
}

/// A choice of a form.
pub(super) struct Choice {
    value: &'static str,
    label: String,
    chosen: bool,
}

/// Where `text/html` is not wanted.
fn with_type(content_type: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, "no-cache")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_read_well() {
        for (seconds, words) in [
            (-5, "0 s"),
            (59, "59 s"),
            (61, "1 min"),
            (3600, "1 h"),
            (3660, "1 h 1 min"),
            (86_400, "1 d"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(in_words(SignedDuration::from_secs(seconds)), words);
        }
    }

    #[test]
    fn addresses_of_pages_carry_what_was_given_and_nothing_else() {
        let with = [("q", Some("a&b=c d".to_owned())), ("account", None)];
        assert_eq!(link("/search", &with), "/search?q=a%26b%3Dc+d");
        assert_eq!(link("/search", &[("q", None)]), "/search");
    }
}
