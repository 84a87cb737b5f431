//! Who looks at the page: sign-in with the token, the session behind a cookie, and proof that a form came from the page.
//!
//! A browser sends cookies along with whatever any other page makes it ask, so a cookie alone changes nothing: each form
//! carries a secret of its session besides ([`Viewer::csrf`]), the cookie is `SameSite=Strict`, and a request that a
//! browser says came from elsewhere is refused. That holds on loopback without a token, too.
//!
//! Sessions live in this process's memory: they end with it, and nobody finds them in the database.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Redirect, Response},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_util::sync::CancellationToken;

use super::{AdminState, api::Problem, guard, local_user, page::PageError};

/// How long a sign-in lasts.
const SESSION_LASTS: Duration = Duration::from_secs(12 * 3600);
/// Sessions at once; the oldest one ends for the next.
const MOST_SESSIONS: usize = 1000;
/// Wrong tokens that one address may give within [`FORGOTTEN_AFTER`].
const MOST_FAILURES: u32 = 5;
/// How long wrong tokens are held against an address.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10 * 60);
/// Addresses remembered; where there are more, nobody who is not known signs in.
const MOST_ADDRESSES: usize = 10_000;
/// Most bytes that are read of what somebody sends who is known: a long message in percent encoding.
const LONGEST_BODY: usize = 1024 * 1024;
/// Most bytes that are read of the sign-in's form, which anybody may send.
const LONGEST_SIGN_IN: usize = 16 * 1024;
/// How long that may take.
pub(super) const BODY_WITHIN: Duration = Duration::from_secs(15);

/// Who asks, for `access_log` and for the forms of the answer.
#[derive(Debug, Clone)]
pub(super) struct Viewer {
    /// For `access_log.actor`.
    pub(super) actor: String,
    /// What the forms of this viewer's pages carry.
    pub(super) csrf: String,
    /// The name given at the sign-in, if there was one.
    pub(super) name: Option<String>,
    /// When they may see no more.
    pub(super) lasts: Lasts,
}

/// How long somebody may look: for ever without a session, else until it expires or is ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Lasts {
    until: Option<Instant>,
    ended: CancellationToken,
}

impl Lasts {
    /// Waits until it is over.
    pub(super) async fn over(self) {
        let expired = async {
            match self.until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = expired => {}
            () = self.ended.cancelled() => {}
        }
    }
}

/// A signed-in browser.
#[derive(Debug, Clone)]
struct Session {
    name: String,
    csrf: String,
    until: Instant,
    /// Tells who follows a page live that it was ended before its time.
    ended: CancellationToken,
}

/// Sessions and failed sign-ins.
#[derive(Debug)]
pub(super) struct Viewers {
    /// By the digest of what the cookie holds.
    sessions: Mutex<HashMap<[u8; 32], Session>>,
    forms: Throttle,
    bearers: Throttle,
    /// Forms of those who need no session.
    csrf: String,
}

/// 256 bits that nobody guesses.
fn secret() -> String {
    hex::encode(rand::random::<[u8; 32]>())
}

fn digest(id: &str) -> [u8; 32] {
    Sha256::digest(id.as_bytes()).into()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Viewers {
    pub(super) fn new() -> Self {
        Self {
            sessions: Mutex::default(),
            forms: Throttle::default(),
            bearers: Throttle::default(),
            csrf: secret(),
        }
    }

    /// A new session; gives what the cookie shall hold.
    fn sign_in(&self, name: &str, now: Instant) -> String {
        let id = secret();
        let mut sessions = lock(&self.sessions);
        sessions.retain(|_, session| session.until > now);
        if sessions.len() >= MOST_SESSIONS {
            let oldest = sessions.iter().min_by_key(|(_, session)| session.until).map(|(&id, _)| id);
            if let Some(session) = oldest.and_then(|id| sessions.remove(&id)) {
                session.ended.cancel();
            }
        }
        let session = Session {
            name: name.to_owned(),
            csrf: secret(),
            until: now + SESSION_LASTS,
            ended: CancellationToken::new(),
        };
        sessions.insert(digest(&id), session);
        id
    }

    fn session(&self, id: &str, now: Instant) -> Option<Session> {
        lock(&self.sessions).get(&digest(id)).filter(|session| session.until > now).cloned()
    }

    fn sign_out(&self, id: &str) {
        if let Some(session) = lock(&self.sessions).remove(&digest(id)) {
            session.ended.cancel();
        }
    }
}

/// Counts wrong tokens by address.
#[derive(Debug, Default)]
struct Throttle(Mutex<HashMap<IpAddr, (u32, Instant)>>);

impl Throttle {
    /// Whether an address may try; otherwise how long it has to wait.
    fn allows(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let mut failures = lock(&self.0);
        failures.retain(|_, (_, since)| now.duration_since(*since) < FORGOTTEN_AFTER);
        match failures.get(&network(address)) {
            Some((count, since)) if *count >= MOST_FAILURES => {
                Err(FORGOTTEN_AFTER.saturating_sub(now.duration_since(*since)))
            }
            None if failures.len() >= MOST_ADDRESSES => Err(FORGOTTEN_AFTER),
            _ => Ok(()),
        }
    }

    fn count(&self, address: IpAddr, now: Instant) {
        lock(&self.0).entry(network(address)).or_insert((0, now)).0 += 1;
    }
}

/// Whoever has one IPv6 address has its whole /64.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address @ IpAddr::V4(_) => address,
    }
}

/// Whether the browser speaks TLS: with this listener, or with a proxy before it that says so. Whoever says so untruly
/// gets a cookie that their browser does not take.
fn is_over_tls(state: &AdminState, headers: &HeaderMap) -> bool {
    let forwarded = headers
        .get(HeaderName::from_static("x-forwarded-proto"))
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(',').next())
        .is_some_and(|scheme| scheme.trim().eq_ignore_ascii_case("https"));
    state.tls || forwarded
}

/// The cookie's name. A browser takes `__Host-` only over TLS, and then from nobody else.
fn cookie_name(secure: bool) -> &'static str {
    if secure { "__Host-ucwa-relay" } else { "ucwa-relay" }
}

fn cookie<'h>(state: &AdminState, headers: &'h HeaderMap) -> Option<&'h str> {
    let wanted = cookie_name(is_over_tls(state, headers));
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == wanted).then_some(value))
}

fn set_cookie(secure: bool, value: &str, lasts: Duration) -> HeaderValue {
    let text = format!(
        "{}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={}{}",
        cookie_name(secure),
        lasts.as_secs(),
        if secure { "; Secure" } else { "" }
    );
    HeaderValue::try_from(text).expect("made of hexadecimal digits and fixed words")
}

/// Signs in with a token; gives the cookie.
pub(super) fn sign_in(
    state: &AdminState,
    peer: SocketAddr,
    headers: &HeaderMap,
    name: &str,
    token: &str,
) -> Result<HeaderValue, SignInRefused> {
    let now = Instant::now();
    state.viewers.forms.allows(peer.ip(), now).map_err(SignInRefused::Wait)?;
    if !state.guard.is_right(token) {
        state.viewers.forms.count(peer.ip(), now);
        tracing::warn!(peer = %peer.ip(), "a sign-in to the admin page was refused: wrong token");
        return Err(SignInRefused::WrongToken);
    }
    Ok(set_cookie(is_over_tls(state, headers), &state.viewers.sign_in(name, now), SESSION_LASTS))
}

/// Why somebody could not sign in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignInRefused {
    /// It is not the token of `admin.token_file`.
    WrongToken,
    /// Too many wrong ones came from this address.
    Wait(Duration),
}

/// Ends the session; gives the cookie that removes the cookie.
pub(super) fn sign_out(state: &AdminState, headers: &HeaderMap) -> HeaderValue {
    if let Some(id) = cookie(state, headers) {
        state.viewers.sign_out(id);
    }
    set_cookie(is_over_tls(state, headers), "", Duration::ZERO)
}

/// Whether a request carries the token, or none is needed. Wrong ones count wherever they are tried, so that no address
/// is a better place to guess than another.
///
/// # Errors
/// How long who asks has to wait, after too many wrong ones.
pub(super) fn carries_token(
    state: &AdminState,
    headers: &HeaderMap,
    peer: SocketAddr,
) -> Result<bool, Duration> {
    if state.guard.has_token() && headers.contains_key(header::AUTHORIZATION) {
        let now = Instant::now();
        state.viewers.bearers.allows(peer.ip(), now)?;
        if !state.guard.admits(headers) {
            state.viewers.bearers.count(peer.ip(), now);
            tracing::warn!(peer = %peer.ip(), "a request to the admin listener carried a wrong token");
        }
    }
    Ok(state.guard.admits(headers))
}

/// Refuses who does not carry the token, if one is configured. For programs only: a session does not help.
pub(super) async fn require_token(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    match carries_token(&state, request.headers(), peer) {
        Ok(true) => next.run(request).await,
        Ok(false) => PageError::Unknown.in_plain_text(),
        Err(wait) => PageError::Wait(wait).in_plain_text(),
    }
}

/// Who asks, if they may.
fn viewer(state: &AdminState, headers: &HeaderMap, peer: SocketAddr) -> Result<Option<Viewer>, Duration> {
    let address = peer.ip().to_canonical();
    let now = Instant::now();
    if !state.guard.has_token() {
        let who = local_user::name(peer).map_or_else(String::new, |name| format!("{name}, "));
        let actor = format!("admin page ({who}{address})");
        return Ok(Some(Viewer {
            actor,
            csrf: state.viewers.csrf.clone(),
            name: None,
            lasts: Lasts::default(),
        }));
    }
    if headers.contains_key(header::AUTHORIZATION) {
        if carries_token(state, headers, peer)? {
            let actor = format!("admin page (bearer token, {address})");
            return Ok(Some(Viewer {
                actor,
                csrf: state.viewers.csrf.clone(),
                name: None,
                lasts: Lasts::default(),
            }));
        }
        return Ok(None);
    }
    let session = cookie(state, headers).and_then(|id| state.viewers.session(id, now));
    Ok(session.map(|session| Viewer {
        actor: format!("admin page ({}, {address})", session.name),
        csrf: session.csrf,
        name: Some(session.name),
        lasts: Lasts { until: Some(session.until), ended: session.ended },
    }))
}

/// What a browser says of who made it ask (Fetch Metadata).
fn said_by_browser<'h>(headers: &'h HeaderMap, name: &'static str) -> Option<&'h str> {
    headers.get(HeaderName::from_static(name)).map(|value| value.to_str().unwrap_or_default())
}

/// Whether a browser says that another site made it ask.
fn is_from_elsewhere(headers: &HeaderMap, uri: &Uri) -> bool {
    if said_by_browser(headers, "sec-fetch-site").is_some_and(|site| site != "same-origin") {
        return true;
    }
    let origin = headers.get(header::ORIGIN).map(|value| value.to_str().unwrap_or_default());
    origin.is_some_and(|origin| {
        let named = origin.split_once("://").map(|(_, named)| named);
        let host = guard::asked_host(headers, uri);
        !named.zip(host).is_some_and(|(named, host)| named.eq_ignore_ascii_case(host))
    })
}

/// Whether another site makes a browser load this as a part of itself: as a picture, in a frame, by a script. It would see
/// nothing of it, but `access_log` would have it that somebody here has read it. Whoever follows a link sees what they
/// opened.
fn is_part_of_another_site(headers: &HeaderMap) -> bool {
    let says = |name| said_by_browser(headers, name);
    says("sec-fetch-site").is_some_and(|site| !matches!(site, "same-origin" | "none"))
        && (says("sec-fetch-mode") != Some("navigate") || says("sec-fetch-dest") != Some("document"))
}

/// Whether a request asks for more than to be shown something.
fn changes_something(method: &Method) -> bool {
    method != Method::GET && method != Method::HEAD
}

/// What was sent along, in full. Whoever sends without an end, or never sends the end, is not waited for.
async fn in_full(body: Body, longest: usize) -> Result<Bytes, PageError> {
    match tokio::time::timeout(BODY_WITHIN, to_bytes(body, longest)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(PageError::TooLong(longest)),
        Err(_) => Err(PageError::TooSlow),
    }
}

/// Refuses what changes something and was not asked from our own page. For routes outside the session, like the sign-in.
pub(super) async fn refuse_foreign(request: Request, next: Next) -> Response {
    if !changes_something(request.method()) {
        return next.run(request).await;
    }
    if is_from_elsewhere(request.headers(), request.uri()) {
        return PageError::Forged.into_response();
    }
    let (parts, body) = request.into_parts();
    match in_full(body, LONGEST_SIGN_IN).await {
        Ok(body) => next.run(Request::from_parts(parts, Body::from(body))).await,
        Err(error) => error.into_response(),
    }
}

/// Lets only those on who are known, as [`Viewer`]; what changes something has to prove by `proof` that it is meant.
async fn admitted(
    state: &AdminState,
    peer: SocketAddr,
    request: Request,
    proof: impl FnOnce(&Parts, &[u8], &Viewer) -> Result<(), PageError>,
) -> Result<Request, PageError> {
    if is_part_of_another_site(request.headers()) && !changes_something(request.method()) {
        return Err(PageError::Embedded);
    }
    let viewer =
        viewer(state, request.headers(), peer).map_err(PageError::Wait)?.ok_or(PageError::Unknown)?;
    let mut request = request;
    if changes_something(request.method()) {
        if is_from_elsewhere(request.headers(), request.uri()) {
            return Err(PageError::Forged);
        }
        let (parts, body) = request.into_parts();
        let body = in_full(body, LONGEST_BODY).await?;
        proof(&parts, &body, &viewer)?;
        request = Request::from_parts(parts, Body::from(body));
    }
    request.extensions_mut().insert(viewer);
    Ok(request)
}

/// Lets only those on who may see the page, as [`Viewer`], and only forms that carry their secret.
pub(super) async fn require_viewer(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let sign_in = is_for_people(&request).then(|| sign_in_address(request.uri()));
    let carries_secret = |_: &Parts, form: &[u8], viewer: &Viewer| {
        let given = url::form_urlencoded::parse(form)
            .find_map(|(name, value)| (name == "csrf").then(|| value.into_owned()))
            .unwrap_or_default();
        if given.as_bytes().ct_eq(viewer.csrf.as_bytes()).into() { Ok(()) } else { Err(PageError::Forged) }
    };
    match (admitted(&state, peer, request, carries_secret).await, sign_in) {
        (Ok(request), _) => next.run(request).await,
        (Err(PageError::Unknown), Some(address)) => Redirect::to(&address).into_response(),
        (Err(PageError::Unknown), None) => PageError::Unknown.in_plain_text(),
        (Err(error), _) => error.into_response(),
    }
}

/// As [`require_viewer`], for programs. What changes something has to come as JSON, which no other site's page can make a
/// browser send: it would have to ask first, by CORS, and nobody answers that here.
pub(super) async fn require_program(
    State(state): State<AdminState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let is_json = |parts: &Parts, _: &[u8], _: &Viewer| {
        let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        kind.and_then(|kind| kind.split(';').next())
            .filter(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
            .map(|_| ())
            .ok_or(PageError::NotJson)
    };
    match admitted(&state, peer, request, is_json).await {
        Ok(request) => next.run(request).await,
        Err(error) => Problem(error).into_response(),
    }
}

/// Whether a browser asks for a page that it would show.
fn is_for_people(request: &Request) -> bool {
    let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    request.method() == Method::GET && accept.is_some_and(|accept| accept.contains("text/html"))
}

/// The sign-in that leads back to this address.
fn sign_in_address(uri: &Uri) -> String {
    let next = uri.path_and_query().map_or("/", |path| path.as_str());
    let query: String =
        url::form_urlencoded::Serializer::new(String::new()).append_pair("next", next).finish();
    format!("/sign-in?{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_guesses_has_to_wait_and_others_do_not() {
        let throttle = Throttle::default();
        let (guesser, other): (IpAddr, IpAddr) =
            ("2001:db8::1".parse().unwrap(), "2001:db8:0:1::1".parse().unwrap());
        let begin = Instant::now();
        for _ in 0..MOST_FAILURES {
            assert_eq!(throttle.allows(guesser, begin), Ok(()));
            throttle.count(guesser, begin);
        }
        let neighbour = "2001:db8::2".parse().unwrap();
        assert_eq!(throttle.allows(neighbour, begin), Err(FORGOTTEN_AFTER));
        assert_eq!(throttle.allows(other, begin), Ok(()));
        assert_eq!(throttle.allows(guesser, begin + FORGOTTEN_AFTER), Ok(()));
    }

    #[test]
    fn a_session_ends_in_time_and_at_the_sign_out() {
        let viewers = Viewers::new();
        let begin = Instant::now();
        let (one, two) = (viewers.sign_in("one", begin), viewers.sign_in("two", begin));
        assert_eq!(viewers.session(&one, begin).map(|session| session.name).as_deref(), Some("one"));
        assert_ne!(
            viewers.session(&one, begin).map(|session| session.csrf),
            viewers.session(&two, begin).map(|session| session.csrf)
        );
        viewers.sign_out(&one);
        assert!(viewers.session(&one, begin).is_none());
        assert!(viewers.session(&two, begin).is_some());
        assert!(viewers.session(&two, begin + SESSION_LASTS).is_none());
        assert!(viewers.session("", begin).is_none());
    }

    #[tokio::test]
    async fn who_follows_a_page_is_told_when_it_is_over() {
        let is_over = async |lasts: &Lasts| {
            tokio::select! {
                biased;
                () = lasts.clone().over() => true,
                () = tokio::task::yield_now() => false,
            }
        };
        assert!(!is_over(&Lasts::default()).await);
        let later = Lasts { until: Some(Instant::now() + SESSION_LASTS), ..Lasts::default() };
        assert!(!is_over(&later).await);
        later.ended.cancel();
        later.over().await;
        Lasts { until: Some(Instant::now()), ..Lasts::default() }.over().await;
    }

    #[test]
    fn sessions_do_not_pile_up() {
        let viewers = Viewers::new();
        let begin = Instant::now();
        let first = viewers.sign_in("first", begin);
        let ended = viewers.session(&first, begin).map(|session| session.ended).unwrap();
        for second in 0..MOST_SESSIONS as u64 {
            viewers.sign_in("another", begin + Duration::from_secs(1 + second));
        }
        assert_eq!(lock(&viewers.sessions).len(), MOST_SESSIONS);
        assert!(viewers.session(&first, begin).is_none());
        assert!(ended.is_cancelled());
    }

    #[test]
    fn what_another_site_asks_is_known() {
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs
                .iter()
                .map(|&(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                .collect()
        };
        for (pairs, elsewhere) in [
            (&[("host", "localhost:8470")][..], false),
            (&[("host", "localhost:8470"), ("origin", "http://localhost:8470")], false),
            (&[("host", "localhost:8470"), ("sec-fetch-site", "same-origin")], false),
            (&[("host", "localhost:8470"), ("origin", "http://localhost:3000")], true),
            (&[("host", "localhost:8470"), ("origin", "https://evil.example")], true),
            (&[("host", "localhost:8470"), ("origin", "null")], true),
            (&[("host", "localhost:8470"), ("sec-fetch-site", "cross-site")], true),
            (&[("host", "localhost:8470"), ("sec-fetch-site", "same-site")], true),
        ] {
            assert_eq!(is_from_elsewhere(&headers(pairs), &Uri::from_static("/")), elsewhere, "{pairs:?}");
        }
        // HTTP/2 has no Host.
        let asked = Uri::from_static("https://localhost:8470/sign-in");
        assert!(!is_from_elsewhere(&headers(&[("origin", "https://localhost:8470")]), &asked));
        assert!(is_from_elsewhere(&headers(&[("origin", "https://evil.example")]), &asked));

        for (site, mode, dest, part) in [
            ("cross-site", "no-cors", "image", true),
            ("same-site", "cors", "empty", true),
            ("cross-site", "navigate", "iframe", true),
            ("cross-site", "navigate", "document", false),
            ("none", "navigate", "document", false),
            ("same-origin", "cors", "empty", false),
        ] {
            let said = [("sec-fetch-site", site), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)];
            assert_eq!(is_part_of_another_site(&headers(&said)), part, "{said:?}");
        }
        assert!(!is_part_of_another_site(&HeaderMap::new()), "programs say nothing of it");
    }
}
