//! The HTTP side: the accept loop, one request from its bytes to its answer, and the table of addresses.
//!
//! Owns [`Server`], the state that all parts share. HTTP/1.1 and HTTP/2 with prior knowledge are spoken on one
//! port. Every request passes through [`exchange_over_http`] and from there through [`fault::carry_out`], which may
//! spoil the answer or end the connection in place of one.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderValue},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use percent_encoding::percent_decode_str;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    SimulatorSettings, application,
    application::{Account, Application},
    conversation,
    conversation::Conversation,
    conversation_log, event_channel, fault,
    ledger::Ledger,
    messaging, ntlm,
    payload::{Failure, Format, Resource},
    people, sign_in,
    timers::Timers,
    traffic::Traffic,
};

/// Bodies above this are not read at all.
const LARGEST_BODY: usize = 1024 * 1024;

pub(crate) type Reply = Response<Full<Bytes>>;
pub(crate) type Outcome = Result<Reply, Failure>;

/// Chance, from one seed.
pub(crate) struct Dice(Mutex<StdRng>);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }

    fn with<T>(&self, throw: impl FnOnce(&mut StdRng) -> T) -> T {
        throw(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// True in `share` of all cases.
    pub(crate) fn chance(&self, share: f64) -> bool {
        self.with(|rng| rng.random_bool(share.clamp(0.0, 1.0)))
    }

    /// A number below `end`, or 0 if there is none.
    pub(crate) fn below(&self, end: usize) -> usize {
        if end < 2 { 0 } else { self.with(|rng| rng.random_range(0..end)) }
    }

    pub(crate) fn number(&self) -> u64 {
        self.with(rand::RngExt::random)
    }

    /// 32 hexadecimal digits.
    pub(crate) fn hex(&self) -> String {
        self.with(|rng| format!("{:032x}", rng.random::<u128>()))
    }

    /// Any duration from `shortest` to `longest`.
    pub(crate) fn between(&self, shortest: Duration, longest: Duration) -> Duration {
        let span = longest.saturating_sub(shortest);
        shortest + span.mul_f64(self.with(|rng| rng.random_range(0.0..=1.0)))
    }
}

/// What all parts of one simulated server share.
pub(crate) struct Server {
    /// As they were at the start.
    pub(crate) settings: SimulatorSettings,
    /// As they are now; only what a [`SettingsChange`](super::SettingsChange) names can differ.
    changeable: RwLock<SimulatorSettings>,
    pub(crate) address: SocketAddr,
    /// Where the pool serves applications, if not at `address`.
    pub(crate) pool_address: Option<SocketAddr>,
    pub(crate) dice: Dice,
    pub(crate) ledger: Ledger,
    pub(crate) timers: Timers,
    pub(crate) traffic: Traffic,
    pub(crate) faults: fault::Faults,
    pub(crate) chaos: super::chaos::Chaos,
    pub(crate) requests: super::requests::Requests,
    pub(crate) closing: CancellationToken,
    /// By SIP URI; fixed from the start.
    pub(crate) accounts: HashMap<String, Arc<Account>>,
    /// The same accounts in the order of their names.
    pub(crate) account_list: Vec<Arc<Account>>,
    pub(crate) tokens: sign_in::Tokens,
    pub(crate) applications: RwLock<HashMap<String, application::Registration>>,
    pub(crate) conversations: RwLock<HashMap<String, Arc<Conversation>>>,
}

impl Server {
    pub(crate) fn new(
        settings: SimulatorSettings,
        address: SocketAddr,
        pool_address: Option<SocketAddr>,
    ) -> Self {
        let account_list = application::accounts_of(&settings);
        Self {
            changeable: RwLock::new(settings.clone()),
            address,
            pool_address,
            dice: Dice::new(settings.seed),
            ledger: Ledger::default(),
            timers: Timers::default(),
            traffic: Traffic::new(settings.traffic.as_ref()),
            faults: fault::Faults::default(),
            chaos: super::chaos::Chaos::default(),
            requests: super::requests::Requests::default(),
            closing: CancellationToken::new(),
            accounts: account_list.iter().map(|account| (account.uri.clone(), Arc::clone(account))).collect(),
            account_list,
            tokens: sign_in::Tokens::default(),
            applications: RwLock::default(),
            conversations: RwLock::default(),
            settings,
        }
    }

    /// The settings as they are now. Not to be held while anything waits.
    pub(crate) fn now(&self) -> RwLockReadGuard<'_, SimulatorSettings> {
        self.changeable.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self) -> RwLockWriteGuard<'_, SimulatorSettings> {
        self.changeable.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn application(&self, id: &str) -> Option<application::Registration> {
        self.applications.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Whether somebody is being called who has not answered yet.
    pub(crate) fn anything_rings(&self) -> bool {
        let conversations = self.conversations.read().unwrap_or_else(PoisonError::into_inner);
        let mut phases = conversations.values().map(|conversation| conversation.phase());
        phases.any(|phase| phase == conversation::ConversationPhase::Ringing)
    }

    pub(crate) fn conversation(&self, id: &str) -> Option<Arc<Conversation>> {
        self.conversations.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

/// Which of the server's two faces a request came to. Where there is no pool of its own, all come to the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    Front,
    Pool,
}

/// One request, read whole.
pub(crate) struct Exchange {
    pub(crate) method: Method,
    path: String,
    /// The path between its slashes, percent-decoded.
    pub(crate) segments: Vec<String>,
    query: Vec<(String, String)>,
    pub(crate) raw_query: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Scheme and authority that the client used, for absolute links.
    pub(crate) origin: String,
    pub(crate) site: Site,
    pub(crate) format: Format,
    /// The connection it came on, where it can be signed in: not over HTTP/2, where requests of many share one.
    pub(crate) connection: Option<Arc<ntlm::Connection>>,
}

impl Exchange {
    /// A query parameter by name in any case; the last of several.
    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().rev().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// Reads path, query and headers; `default_origin` stands in for a missing `Host`.
    pub(crate) fn read(
        parts: &hyper::http::request::Parts,
        body: Bytes,
        site: Site,
        default_origin: &str,
    ) -> Self {
        let host = parts.headers.get(header::HOST).and_then(|value| value.to_str().ok());
        let host = host.or_else(|| parts.uri.authority().map(hyper::http::uri::Authority::as_str));
        let path = parts.uri.path();
        // A HEAD is a GET whose body stays behind, but it must not take anything out of an event channel.
        let as_get = parts.method == Method::HEAD && !path.ends_with("/events");
        Self {
            method: if as_get { Method::GET } else { parts.method.clone() },
            path: path.to_owned(),
            segments: path
                .split('/')
                .filter(|segment| !segment.is_empty())
                .map(|segment| percent_decode_str(segment).decode_utf8_lossy().into_owned())
                .collect(),
            query: read_form(parts.uri.query().unwrap_or_default()),
            raw_query: parts.uri.query().map(str::to_owned),
            headers: parts.headers.clone(),
            body,
            origin: host.map_or_else(|| default_origin.to_owned(), |host| format!("http://{host}")),
            site,
            format: Format::negotiate(&parts.headers),
            connection: None,
        }
    }

    /// The answer that carries `resource`, with its etag if it has one.
    pub(crate) fn resource(&self, status: StatusCode, resource: &Resource) -> Reply {
        reply(status, self.format.content_type, resource.render(self.format))
    }

    /// The answer that explains a refusal.
    pub(crate) fn refusal(&self, failure: &Failure) -> Reply {
        let mut answer = reply(failure.status, self.format.content_type, failure.render(self.format));
        if let Some(allow) = failure.allow {
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        answer
    }

    /// 405 unless the verb is `verb`.
    pub(crate) fn only(&self, verb: &Method) -> Result<(), Failure> {
        let allow = match *verb {
            Method::GET => "GET",
            Method::PUT => "PUT",
            Method::DELETE => "DELETE",
            _ => "POST",
        };
        if self.method == *verb { Ok(()) } else { Err(Failure::method_not_allowed(allow)) }
    }
}

/// Reads `application/x-www-form-urlencoded`, which a query is as well.
pub(crate) fn read_form(text: &str) -> Vec<(String, String)> {
    let decode = |part: &str| {
        let spaced = part.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(crate) fn no_content() -> Reply {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    answer
}

/// 201 with an empty body and the relative address of what was created.
pub(crate) fn created(location: &str) -> Reply {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::CREATED;
    if let Ok(value) = HeaderValue::from_str(location) {
        answer.headers_mut().insert(header::LOCATION, value);
    }
    answer
}

/// Accepts connections until the server closes.
pub(crate) async fn accept(server: Arc<Server>, listener: TcpListener, site: Site) {
    loop {
        let accepted = tokio::select! {
            () = server.closing.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "simulator cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "simulator cannot set TCP_NODELAY");
        }
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let connection = Arc::new(ntlm::Connection::default());
            let service = service_fn(|request| {
                exchange_over_http(Arc::clone(&server), site, Arc::clone(&connection), request)
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = server.closing.cancelled() => {}
                ended = connection => {
                    if let Err(error) = ended {
                        tracing::trace!(%error, "simulator connection ended");
                    }
                }
            }
        });
    }
}

/// Reads a request, has it answered and dresses the answer as the vendor's server does.
///
/// An error ends the connection without an answer.
async fn exchange_over_http(
    server: Arc<Server>,
    site: Site,
    connection: Arc<ntlm::Connection>,
    request: Request<Incoming>,
) -> Result<fault::Sent, io::Error> {
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, LARGEST_BODY).collect().await;
    let (body, too_large) = match body {
        Ok(body) => (body.to_bytes(), false),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => (Bytes::new(), true),
        Err(error) => return Err(io::Error::other(error)),
    };
    let mut exchange = Exchange::read(&parts, body, site, &format!("http://{}", server.address));
    exchange.connection = (parts.version < Version::HTTP_2).then_some(connection);
    let mut answer = if too_large {
        let failure = Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "None", "The body is too large.");
        fault::whole(exchange.refusal(&failure))
    } else {
        fault::carry_out(&server, &exchange).await?
    };
    if parts.method == Method::HEAD {
        *answer.body_mut() = fault::no_body();
    }
    let headers = answer.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
    headers.insert("x-ms-server-fqdn", HeaderValue::from_static("simulator.invalid"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    if too_large {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    tracing::trace!(method = %exchange.method, path = exchange.path, status = %answer.status(), "simulator answered");
    Ok(answer)
}

/// Answers a request that was read. Also carries out the parts of a batch.
pub(crate) async fn answer(server: &Arc<Server>, exchange: &Exchange) -> Result<Reply, Infallible> {
    if exchange.method == Method::OPTIONS {
        let mut answer = reply(StatusCode::OK, "text/plain", String::new());
        let verbs = HeaderValue::from_static("GET, POST, PUT, DELETE, HEAD, OPTIONS");
        answer.headers_mut().insert(header::ALLOW, verbs);
        return Ok(answer);
    }
    let segments: Vec<&str> = exchange.segments.iter().map(String::as_str).collect();
    let lower: Vec<String> = segments.iter().take(5).map(|segment| segment.to_ascii_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    let outcome = match lower.as_slice() {
        [] | ["autodiscover", "autodiscoverservice.svc", "root"] => sign_in::root(server, exchange),
        ["autodiscover", "autodiscoverservice.svc", "root", "user"]
        | ["autodiscover", "autodiscoverservice.svc", "root", "oauth", "user"] => {
            sign_in::user(server, exchange)
        }
        ["autodiscover", "xframe", _] => Ok(reply(StatusCode::OK, "text/html", sign_in::XFRAME.to_owned())),
        ["webticket", "oauthtoken"] => sign_in::token(server, exchange),
        ["ucwa", "oauth", "v1", "applications", ..]
            if exchange.site == Site::Pool || server.pool_address.is_none() =>
        {
            return Ok(under_applications(server, exchange, &segments[4..]).await);
        }
        _ => Err(Failure::not_found()),
    };
    Ok(outcome.unwrap_or_else(|failure| exchange.refusal(&failure)))
}

async fn under_applications(server: &Arc<Server>, exchange: &Exchange, rest: &[&str]) -> Reply {
    let Some(account) = server.tokens.account(exchange) else {
        return sign_in::challenge(server, exchange);
    };
    let outcome = match rest {
        [] => application::create(server, &account, exchange),
        [id, rest @ ..] => match application_of(server, &account, id) {
            Ok(application) => route(server, &application, exchange, rest).await,
            Err(failure) => Err(failure),
        },
    };
    outcome.unwrap_or_else(|failure| exchange.refusal(&failure))
}

fn application_of(server: &Server, account: &Arc<Account>, id: &str) -> Result<Arc<Application>, Failure> {
    match server.application(id) {
        Some(application::Registration::Alive(application)) if application.account.uri == account.uri => {
            Ok(application)
        }
        Some(application::Registration::Alive(_)) => {
            Err(Failure::new(StatusCode::FORBIDDEN, "None", "The application belongs to another user."))
        }
        Some(application::Registration::Gone(failure)) => Err(*failure),
        None => Err(Failure::application_not_found()),
    }
}

/// The table of addresses below one application.
async fn route(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    match path {
        ["events"] => event_channel::get(server, application, exchange).await,
        ["batch"] => super::batch::carry_out(server, exchange).await,
        [] => application::resource(server, application, exchange),
        ["policies"] => application::policies(application, exchange),
        ["me", rest @ ..] => application::me(server, application, exchange, rest),
        ["communication"] => application::communication(server, application, exchange),
        ["communication", "conversations", rest @ ..] => {
            messaging::conversations(server, application, exchange, rest).await
        }
        ["communication", "onlineMeetingInvitations"] => {
            messaging::start_online_meeting(server, application, exchange).await
        }
        ["communication", "messagingInvitations" | "onlineMeetingInvitations", rest @ ..] => {
            messaging::messaging_invitations(server, application, exchange, rest).await
        }
        ["communication", "participantInvitations", rest @ ..] => {
            super::group::participant_invitations(server, application, exchange, rest).await
        }
        ["communication", "conversationLogs", rest @ ..] => {
            conversation_log::conversation_logs(server, application, exchange, rest)
        }
        ["communication", "missedItems"] => conversation_log::missed_items(server, application, exchange),
        ["people", rest @ ..] => people::people(server, application, exchange, rest),
        ["onlineMeetings"] => {
            exchange.only(&Method::GET)?;
            Ok(exchange.resource(StatusCode::OK, &application.online_meetings_resource()))
        }
        _ => Err(Failure::not_found()),
    }
}
