//! Faults on request: what a server in production, its proxies and the network do to a client now and then.
//!
//! Owns the list of faults that are switched on. A [`Fault`] names an account, an operation and how often it
//! strikes; [`carry_out`] stands around every request and lets those strike that concern it, in one of two moments:
//! before the request is carried out, or on its answer afterwards. A parked GET on `events` is struck by the first
//! sort as soon as the fault is switched on. Faults that change what a package of events says are asked for by the
//! channel when it forms the package, so that its repetition stays the same.
//!
//! The ledger stays true under all of them: what was carried out counts although its answer was lost, and a package
//! whose answer was lost was not acknowledged.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    io,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Response, StatusCode,
    body::Frame,
    header::{self, HeaderValue},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use super::{
    application::{self, Account, Application, Registration},
    event_channel, ntlm,
    payload::Failure,
    server::{Exchange, Reply, Server, answer, reply},
    sign_in,
};

/// What a request asks for, as far as faults tell requests apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Operation {
    /// Every request.
    #[default]
    Any,
    /// The root of discovery.
    Discovery,
    /// The `user` resource.
    User,
    /// The web ticket service; every request there.
    Token,
    /// The web ticket service: the first message of NTLM.
    NtlmNegotiate,
    /// The web ticket service: the answer to NTLM's challenge.
    NtlmAuthenticate,
    /// POST on `applications`.
    Applications,
    /// The application itself.
    Application,
    /// `makeMeAvailable`.
    MakeMeAvailable,
    /// `reportMyActivity`.
    ReportMyActivity,
    /// The event channel.
    Events,
    /// A batch as a whole; its parts are not told apart.
    Batch,
    /// `startMessaging`.
    StartMessaging,
    /// `startOnlineMeeting`.
    StartOnlineMeeting,
    /// `addMessaging`.
    AddMessaging,
    /// `addParticipant`.
    AddParticipant,
    /// `accept` of any invitation.
    Accept,
    /// `decline` of any invitation.
    Decline,
    /// GET of any invitation.
    Invitation,
    /// `sendMessage`.
    SendMessage,
    /// `stopMessaging`.
    StopMessaging,
    /// GET of `messaging`.
    Messaging,
    /// GET of a participant or the list of them.
    Participant,
    /// GET of a message or the list of them.
    Message,
    /// GET of one conversation.
    Conversation,
    /// DELETE of one conversation: the account leaves it.
    LeaveConversation,
    /// The list of conversations.
    Conversations,
    /// `conversationLogs` and everything below it.
    ConversationLogs,
    /// Search and contacts.
    People,
    /// Whatever has no name here.
    Other,
}

impl Operation {
    fn of(exchange: &Exchange) -> Self {
        let lower: Vec<String> =
            exchange.segments.iter().take(4).map(|segment| segment.to_ascii_lowercase()).collect();
        let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
        match lower.as_slice() {
            [] | ["autodiscover", "autodiscoverservice.svc", "root"] => Self::Discovery,
            ["autodiscover", "autodiscoverservice.svc", "root", ..] => Self::User,
            ["webticket", ..] => match ntlm::message_type(exchange) {
                Some(ntlm::MessageType::Negotiate) => Self::NtlmNegotiate,
                Some(ntlm::MessageType::Authenticate) => Self::NtlmAuthenticate,
                _ => Self::Token,
            },
            ["ucwa", "oauth", "v1", "applications"] => Self::below_applications(exchange),
            _ => Self::Other,
        }
    }

    /// Whether a fault that is switched on for this strikes a request that asks for `other`.
    fn covers(self, other: Self) -> bool {
        match self {
            Self::Any => true,
            Self::Token => matches!(other, Self::Token | Self::NtlmNegotiate | Self::NtlmAuthenticate),
            _ => self == other,
        }
    }

    fn below_applications(exchange: &Exchange) -> Self {
        let path: Vec<&str> = exchange.segments.iter().skip(4).map(String::as_str).collect();
        let [_, path @ ..] = path.as_slice() else { return Self::Applications };
        let post = exchange.method == Method::POST;
        match path {
            [] => Self::Application,
            ["events"] => Self::Events,
            ["batch"] => Self::Batch,
            ["me", "makeMeAvailable"] => Self::MakeMeAvailable,
            ["me", "reportMyActivity"] => Self::ReportMyActivity,
            ["people", ..] => Self::People,
            ["communication", rest @ ..] => match rest {
                ["messagingInvitations"] if post => Self::StartMessaging,
                ["onlineMeetingInvitations"] if post => Self::StartOnlineMeeting,
                ["participantInvitations"] if post => Self::AddParticipant,
                ["messagingInvitations" | "onlineMeetingInvitations", _, "accept"] => Self::Accept,
                ["messagingInvitations" | "onlineMeetingInvitations", _, "decline"] => Self::Decline,
                ["messagingInvitations" | "onlineMeetingInvitations" | "participantInvitations", _] => {
                    Self::Invitation
                }
                ["conversationLogs", ..] | ["missedItems"] => Self::ConversationLogs,
                ["conversations"] => Self::Conversations,
                ["conversations", _] if exchange.method == Method::DELETE => Self::LeaveConversation,
                ["conversations", _] => Self::Conversation,
                ["conversations", _, "participants" | "leaders" | "attendees" | "lobby", ..] => {
                    Self::Participant
                }
                ["conversations", _, _, "messages"] if post => Self::SendMessage,
                ["conversations", _, _, "messages", ..] => Self::Message,
                ["conversations", _, _, "terminate"] => Self::StopMessaging,
                ["conversations", _, _, "addMessaging"] => Self::AddMessaging,
                ["conversations", _, _] => Self::Messaging,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// What the body of a refusal looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalBody {
    /// A UCWA `reason`.
    Ucwa,
    /// The page of a proxy.
    Html,
    /// Nothing.
    Empty,
    /// `{"error":"..."}` with the subcode, as the web ticket service answers.
    Oauth,
}

/// An answer with a status of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// UCWA's subcode; `None` where it is absent.
    pub subcode: Option<String>,
    /// What the body looks like; where it is absent, HTML for 502 and a UCWA reason for all others.
    pub body: Option<RefusalBody>,
    /// `Retry-After` in seconds.
    pub retry_after: Option<u64>,
    /// Whether `Retry-After` is spelled as a date.
    pub retry_after_as_date: bool,
    /// Whether the challenge of a 401 comes along.
    pub challenge: bool,
    /// `X-Ms-diagnostics`, such as `28055`.
    pub diagnostics: Option<String>,
    /// Whether the request is carried out nevertheless.
    pub executed: bool,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum FaultKind {
    /// The connection ends before the request is carried out.
    CutBefore,
    /// The request is carried out, and the connection ends without an answer.
    CutAfter,
    /// The request is carried out, and the connection ends in the middle of the answer's body.
    CutMidway,
    /// The request waits before it is carried out.
    Delay {
        /// For how long.
        ms: u64,
    },
    /// The request is carried out, and its answer waits.
    DelayAfter {
        /// For how long.
        ms: u64,
    },
    /// 401 with the challenge; the token that the request bears is valid no longer.
    ExpiredToken,
    /// Any other status.
    Status(Refusal),
    /// 409 `PGetReplaced`, though nothing replaced the GET.
    PgetReplaced,
    /// 404 `ApplicationNotFound`: the server has forgotten the application.
    ApplicationNotFound {
        /// Whether it only says so.
        #[serde(default)]
        keep: bool,
    },
    /// 410 `InactiveApplicationExpired`: the application has ended.
    InactiveApplicationExpired {
        /// Whether it only says so.
        #[serde(default)]
        keep: bool,
    },
    /// 410 `TooManyApplications`: the application has ended.
    TooManyApplications {
        /// Whether it only says so.
        #[serde(default)]
        keep: bool,
    },
    /// A redirect.
    Redirect {
        /// Where to.
        location: String,
        /// 302 where it is absent.
        #[serde(default)]
        status: Option<u16>,
    },
    /// The answer's body ends in the middle; its length says that this is all.
    TruncatedXml,
    /// The answer's body is not well-formed.
    MalformedXml,
    /// The answer's body holds bytes that are not UTF-8.
    InvalidUtf8,
    /// The answer's body begins with a document type that defines entities, and uses them.
    Doctype,
    /// The answer's body is valid and very long.
    HugeBody {
        /// How long; 32 MiB where it is absent.
        #[serde(default)]
        bytes: Option<u64>,
    },
    /// The answer's body never ends.
    EndlessBody,
    /// The answer says that it is something else than it is.
    WrongContentType {
        /// What it says; `text/html` where it is absent.
        #[serde(default)]
        content_type: Option<String>,
    },
    /// Event channel: 200 with `resync` to the package that the server has in mind, and no events. The request's
    /// acknowledgement is not taken.
    Resync,
    /// Event channel: events that no package holds yet are lost, and the next package is empty and says `resume`.
    Resume {
        /// Whether the server has ended the application's conversations meanwhile.
        #[serde(default)]
        lose_conversations: bool,
    },
    /// Event channel: the package names no address to go on with.
    NoLink,
    /// Event channel: senders, events, links, properties and elements that no reference lists, beside the real ones.
    UnknownThings,
    /// Event channel: no event of the package embeds its resource.
    LinkOnly,
    /// Event channel: participants come before everything else of the package, the last first.
    OddOrder,
    /// Event channel: of several events about one resource the package has one.
    Aggregate,
    /// Events of an operation come before its answer.
    EarlyEvents,
}

impl FaultKind {
    /// An answer with this status; 502 in HTML, others with a UCWA reason.
    pub fn status(status: u16) -> Self {
        Self::Status(Refusal { status, ..Refusal::default() })
    }

    /// An answer with this status and a UCWA subcode.
    pub fn refusal(status: u16, subcode: &str) -> Self {
        Self::Status(Refusal { status, subcode: Some(subcode.to_owned()), ..Refusal::default() })
    }

    /// The name of every kind, as `fault` spells it in the control API.
    pub const NAMES: [&'static str; 27] = [
        "cut_before",
        "cut_after",
        "cut_midway",
        "delay",
        "delay_after",
        "expired_token",
        "status",
        "pget_replaced",
        "application_not_found",
        "inactive_application_expired",
        "too_many_applications",
        "redirect",
        "truncated_xml",
        "malformed_xml",
        "invalid_utf8",
        "doctype",
        "huge_body",
        "endless_body",
        "wrong_content_type",
        "resync",
        "resume",
        "no_link",
        "unknown_things",
        "link_only",
        "odd_order",
        "aggregate",
        "early_events",
    ];

    /// Its name, as `fault` spells it in the control API.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CutBefore => "cut_before",
            Self::CutAfter => "cut_after",
            Self::CutMidway => "cut_midway",
            Self::Delay { .. } => "delay",
            Self::DelayAfter { .. } => "delay_after",
            Self::ExpiredToken => "expired_token",
            Self::Status(_) => "status",
            Self::PgetReplaced => "pget_replaced",
            Self::ApplicationNotFound { .. } => "application_not_found",
            Self::InactiveApplicationExpired { .. } => "inactive_application_expired",
            Self::TooManyApplications { .. } => "too_many_applications",
            Self::Redirect { .. } => "redirect",
            Self::TruncatedXml => "truncated_xml",
            Self::MalformedXml => "malformed_xml",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::Doctype => "doctype",
            Self::HugeBody { .. } => "huge_body",
            Self::EndlessBody => "endless_body",
            Self::WrongContentType { .. } => "wrong_content_type",
            Self::Resync => "resync",
            Self::Resume { .. } => "resume",
            Self::NoLink => "no_link",
            Self::UnknownThings => "unknown_things",
            Self::LinkOnly => "link_only",
            Self::OddOrder => "odd_order",
            Self::Aggregate => "aggregate",
            Self::EarlyEvents => "early_events",
        }
    }

    fn moment(&self) -> Moment {
        match self {
            Self::Status(refusal) if refusal.executed => Moment::After,
            Self::CutBefore
            | Self::Delay { .. }
            | Self::ExpiredToken
            | Self::Status(_)
            | Self::PgetReplaced
            | Self::ApplicationNotFound { .. }
            | Self::InactiveApplicationExpired { .. }
            | Self::TooManyApplications { .. }
            | Self::Redirect { .. }
            | Self::Resync => Moment::Before,
            Self::CutAfter
            | Self::CutMidway
            | Self::DelayAfter { .. }
            | Self::TruncatedXml
            | Self::MalformedXml
            | Self::InvalidUtf8
            | Self::Doctype
            | Self::HugeBody { .. }
            | Self::EndlessBody
            | Self::WrongContentType { .. }
            | Self::NoLink => Moment::After,
            Self::Resume { .. }
            | Self::UnknownThings
            | Self::LinkOnly
            | Self::OddOrder
            | Self::Aggregate
            | Self::EarlyEvents => Moment::Within,
        }
    }

    /// Whether nothing can strike after it in the same moment.
    fn is_final(&self) -> bool {
        !matches!(self, Self::Delay { .. } | Self::DelayAfter { .. } | Self::NoLink)
    }

    fn concerns_events_only(&self) -> bool {
        matches!(
            self,
            Self::Resync
                | Self::Resume { .. }
                | Self::NoLink
                | Self::UnknownThings
                | Self::LinkOnly
                | Self::OddOrder
                | Self::Aggregate
        )
    }
}

/// A fault that is to be switched on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// Name or address of the account; all accounts where it is absent. Requests before a sign-in belong to no
    /// account, but the web ticket service is told a name.
    #[serde(default)]
    pub account: Option<String>,
    /// Which requests it concerns. Faults of the event channel concern `events` whatever is said here.
    #[serde(default)]
    pub operation: Operation,
    /// What goes wrong.
    #[serde(flatten)]
    pub kind: FaultKind,
    /// How often it strikes; once where neither this nor a share is given, without end where only a share is.
    #[serde(default)]
    pub count: Option<u64>,
    /// In which share of the requests it strikes; all where it is absent.
    #[serde(default)]
    pub share: Option<f64>,
    /// How many requests that it could strike it lets pass before.
    #[serde(default)]
    pub skip: u64,
}

impl Fault {
    /// A fault that strikes once, whoever asks for whatever.
    pub fn new(kind: FaultKind) -> Self {
        Self { account: None, operation: Operation::Any, kind, count: None, share: None, skip: 0 }
    }

    /// Only on this operation.
    #[must_use]
    pub fn on(self, operation: Operation) -> Self {
        Self { operation, ..self }
    }

    /// Only for this account.
    #[must_use]
    pub fn account(self, account: impl Into<String>) -> Self {
        Self { account: Some(account.into()), ..self }
    }

    /// So many times.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// Not before so many requests have passed.
    #[must_use]
    pub fn skip(self, skip: u64) -> Self {
        Self { skip, ..self }
    }

    /// In this share of the requests.
    #[must_use]
    pub fn share(self, share: f64) -> Self {
        Self { share: Some(share), ..self }
    }
}

/// A fault that was switched on, and how often it has struck.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultState {
    /// Its number.
    pub id: u64,
    /// The fault as it was asked for, with the account's SIP URI.
    #[serde(flatten)]
    pub fault: Fault,
    /// How often it has struck.
    pub struck: u64,
    /// How often it will strike yet, if that is limited.
    pub remaining: Option<u64>,
    /// How many requests it has let pass.
    pub passed: u64,
}

impl FaultState {
    fn spent(&self) -> bool {
        self.remaining == Some(0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Before,
    /// While the request is carried out.
    Within,
    After,
}

/// Spent faults that stay listed.
const SPENT_KEPT: usize = 256;

#[derive(Default)]
struct List {
    active: Vec<FaultState>,
    spent: VecDeque<FaultState>,
    last_id: u64,
    /// How often each kind has struck since the start.
    struck: BTreeMap<&'static str, u64>,
}

/// All faults of one simulator.
pub(crate) struct Faults {
    list: Mutex<List>,
    /// How many are active, so that a request without faults takes no lock.
    active: AtomicUsize,
    /// Changes when a fault is switched on.
    changed: watch::Sender<u64>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { list: Mutex::default(), active: AtomicUsize::new(0), changed: watch::Sender::new(0) }
    }
}

/// Whom and what a request concerns.
struct Subject {
    account: Option<String>,
    operation: Operation,
}

impl Subject {
    fn of(server: &Server, exchange: &Exchange, operation: Operation) -> Self {
        let account = || -> Option<Arc<Account>> {
            if Operation::Token.covers(operation) {
                return sign_in::account_named_in(server, exchange);
            }
            if let Some(account) = server.tokens.bearer(&exchange.headers) {
                return Some(account);
            }
            Some(Arc::clone(&application_of(server, exchange)?.account))
        };
        Self { account: account().map(|account| account.uri.clone()), operation }
    }
}

/// The application that the address names, if it lives.
fn application_of(server: &Server, exchange: &Exchange) -> Option<Arc<Application>> {
    let ["ucwa", "oauth", "v1", "applications"] =
        [0, 1, 2, 3].map(|index| exchange.segments.get(index).map_or("", String::as_str))
    else {
        return None;
    };
    match server.application(exchange.segments.get(4)?)? {
        Registration::Alive(application) => Some(application),
        Registration::Gone(_) => None,
    }
}

impl Faults {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches a fault on; gives its number.
    pub(crate) fn inject(&self, fault: Fault) -> u64 {
        let mut list = self.list();
        list.last_id += 1;
        let id = list.last_id;
        let remaining = fault.count.or(if fault.share.is_some() { None } else { Some(1) });
        list.active.push(FaultState { id, fault, struck: 0, remaining, passed: 0 });
        self.sort_out(&mut list);
        drop(list);
        self.changed.send_modify(|number| *number = id);
        id
    }

    /// Switches one fault off, or all of them.
    pub(crate) fn clear(&self, id: Option<u64>) {
        let mut list = self.list();
        list.active.retain(|state| id.is_some_and(|id| state.id != id));
        list.spent.retain(|state| id.is_some_and(|id| state.id != id));
        self.sort_out(&mut list);
    }

    /// All of them, the spent ones first.
    pub(crate) fn states(&self) -> Vec<FaultState> {
        let list = self.list();
        list.spent.iter().chain(&list.active).cloned().collect()
    }

    /// How often each kind has struck since the start, also of faults that are not listed any more.
    pub(crate) fn struck(&self) -> BTreeMap<&'static str, u64> {
        self.list().struck.clone()
    }

    fn sort_out(&self, list: &mut List) {
        let (spent, active): (Vec<_>, Vec<_>) =
            std::mem::take(&mut list.active).into_iter().partition(FaultState::spent);
        list.active = active;
        list.spent.extend(spent);
        while list.spent.len() > SPENT_KEPT {
            list.spent.pop_front();
        }
        self.active.store(list.active.len(), SeqCst);
    }

    fn any(&self) -> bool {
        self.active.load(SeqCst) > 0
    }

    /// Whether the fault strikes now; it has one less to go, and the striking is yet to be counted.
    fn strikes(server: &Server, state: &mut FaultState) -> bool {
        if state.spent() || state.fault.share.is_some_and(|share| !server.dice.chance(share)) {
            return false;
        }
        if state.passed < state.fault.skip {
            state.passed += 1;
            return false;
        }
        state.remaining = state.remaining.map(|remaining| remaining - 1);
        true
    }

    /// Counts that a fault has struck. Whoever waits for that relies on what it did: an application that it ends has
    /// ended by then.
    fn count(&self, id: u64, kind: &FaultKind) {
        let mut list = self.list();
        let List { active, spent, struck, .. } = &mut *list;
        if let Some(state) = spent.iter_mut().chain(active).find(|state| state.id == id) {
            state.struck += 1;
        }
        *struck.entry(kind.name()).or_default() += 1;
    }

    /// The faults that strike a request in this moment, with their numbers: delays, and the first that leaves room for
    /// no other. Each is to be counted when it has done what it does.
    fn claim(server: &Server, subject: &Subject, moment: Moment) -> Vec<(u64, FaultKind)> {
        let faults = &server.faults;
        let mut list = faults.list();
        let mut kinds = Vec::new();
        for state in &mut list.active {
            let Fault { account, operation, kind, .. } = &state.fault;
            let meant = if kind.concerns_events_only() { Operation::Events } else { *operation };
            let concerned = kind.moment() == moment
                && meant.covers(subject.operation)
                && (account.is_none() || *account == subject.account);
            if concerned && Self::strikes(server, state) {
                kinds.push((state.id, state.fault.kind.clone()));
                if state.fault.kind.is_final() {
                    break;
                }
            }
        }
        faults.sort_out(&mut list);
        kinds
    }

    /// Whether a fault that the event channel or an operation asks for strikes now; it is counted at once.
    pub(crate) fn claim_within(
        server: &Server,
        account: &Account,
        operation: Operation,
        wanted: impl Fn(&FaultKind) -> bool,
    ) -> Option<FaultKind> {
        let faults = &server.faults;
        if !faults.any() {
            return None;
        }
        let mut list = faults.list();
        let mut found = None;
        for state in &mut list.active {
            let Fault { account: named, operation: meant, kind, .. } = &state.fault;
            let concerned = wanted(kind)
                && (kind.concerns_events_only() || *meant == Operation::Any || *meant == operation)
                && named.as_ref().is_none_or(|uri| *uri == account.uri);
            if concerned && Self::strikes(server, state) {
                found = Some((state.id, state.fault.kind.clone()));
                break;
            }
        }
        faults.sort_out(&mut list);
        drop(list);
        let (id, kind) = found?;
        faults.count(id, &kind);
        Some(kind)
    }
}

/// An answer on its way out, which may have no end.
pub(crate) type Sent = Response<UnsyncBoxBody<Bytes, io::Error>>;

pub(crate) fn whole(answer: Reply) -> Sent {
    answer.map(|body| body.map_err(|never| match never {}).boxed_unsync())
}

pub(crate) fn no_body() -> UnsyncBoxBody<Bytes, io::Error> {
    Full::default().map_err(|never: std::convert::Infallible| match never {}).boxed_unsync()
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the simulator cuts the connection")
}

/// Answers a request, or ends the connection, as the faults that are switched on will have it.
pub(crate) async fn carry_out(server: &Arc<Server>, exchange: &Exchange) -> Result<Sent, io::Error> {
    let subject = Subject::of(server, exchange, Operation::of(exchange));
    let counted = server.requests.begin(subject.account.clone(), subject.operation, Instant::now());
    let answered = struck(server, exchange, &subject).await;
    if let Ok(answered) = &answered {
        counted.answered(answered, Instant::now());
    }
    answered
}

async fn struck(server: &Arc<Server>, exchange: &Exchange, subject: &Subject) -> Result<Sent, io::Error> {
    let operation = subject.operation;
    if operation != Operation::Events && !server.faults.any() {
        let Ok(answered) = answer(server, exchange).await;
        return Ok(whole(answered));
    }
    let mut switched_on = server.faults.changed.subscribe();
    if let Some(struck) = before(server, exchange, subject).await {
        return struck.map(whole);
    }
    let mut answering = pin!(answer(server, exchange));
    let answered = loop {
        tokio::select! {
            biased;
            Ok(answered) = &mut answering => break answered,
            Ok(()) = switched_on.changed(), if operation == Operation::Events => {
                // Leaving the GET here takes it out of its channel, as a connection does that drops.
                if let Some(struck) = before(server, exchange, subject).await {
                    return struck.map(whole);
                }
            }
        }
    };
    let mut answered = answered;
    let mut last = None;
    if server.faults.any() {
        for (id, kind) in Faults::claim(server, subject, Moment::After) {
            server.faults.count(id, &kind);
            match kind {
                FaultKind::DelayAfter { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
                FaultKind::NoLink => answered = without_onward_link(answered).await,
                other => last = Some(other),
            }
        }
    }
    match last {
        None => Ok(whole(answered)),
        Some(kind) => spoil(server, exchange, answered, kind).await,
    }
}

/// What strikes before the request is carried out; `None` if it is to be carried out.
async fn before(
    server: &Arc<Server>,
    exchange: &Exchange,
    subject: &Subject,
) -> Option<Result<Reply, io::Error>> {
    if !server.faults.any() {
        return None;
    }
    for (id, kind) in Faults::claim(server, subject, Moment::Before) {
        if let FaultKind::Delay { ms } = kind {
            server.faults.count(id, &kind);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            continue;
        }
        let struck = strike(server, exchange, &kind);
        server.faults.count(id, &kind);
        if struck.is_some() {
            return struck;
        }
    }
    None
}

/// Does what a fault does instead of the request, at once; `None` if the request is carried out all the same.
fn strike(server: &Arc<Server>, exchange: &Exchange, kind: &FaultKind) -> Option<Result<Reply, io::Error>> {
    let gone = |subcode: &'static str| {
        Failure::new(StatusCode::GONE, subcode, "The application is no longer available.")
    };
    Some(Ok(match kind {
        FaultKind::ExpiredToken => {
            server.tokens.forget(&exchange.headers);
            sign_in::challenge(server, exchange)
        }
        FaultKind::Status(refusal) => refuse(server, exchange, refusal),
        FaultKind::PgetReplaced => exchange.refusal(&event_channel::replaced()),
        FaultKind::ApplicationNotFound { keep } => {
            lose(server, exchange, Failure::application_not_found(), *keep)
        }
        FaultKind::InactiveApplicationExpired { keep } => {
            lose(server, exchange, gone("InactiveApplicationExpired"), *keep)
        }
        FaultKind::TooManyApplications { keep } => lose(server, exchange, gone("TooManyApplications"), *keep),
        FaultKind::Redirect { location, status } => {
            let status = status.and_then(|status| StatusCode::from_u16(status).ok());
            let mut answer = reply(status.unwrap_or(StatusCode::FOUND), "text/html", String::new());
            if let Ok(location) = HeaderValue::from_str(location) {
                answer.headers_mut().insert(header::LOCATION, location);
            }
            answer
        }
        FaultKind::Resync => event_channel::resync(&*application_of(server, exchange)?, exchange),
        _ => return Some(Err(cut())),
    }))
}

fn refuse(server: &Server, exchange: &Exchange, refusal: &Refusal) -> Reply {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let subcode = refusal.subcode.clone().unwrap_or_else(|| "None".to_owned());
    let body = match refusal.body {
        Some(body) => body,
        None if status == StatusCode::BAD_GATEWAY => RefusalBody::Html,
        None => RefusalBody::Ucwa,
    };
    let mut answer = match body {
        RefusalBody::Ucwa => {
            exchange.refusal(&Failure::new(status, Cow::Owned(subcode), "The request cannot be carried out."))
        }
        RefusalBody::Html => {
            let title = format!("{status}");
            let page = format!(
                "<!DOCTYPE html><html><head><title>{title}</title></head>\
                 <body><center><h1>{title}</h1></center><hr><p>proxy &nbsp; simulator.invalid<br></body></html>"
            );
            reply(status, "text/html", page)
        }
        RefusalBody::Empty => {
            let mut answer = reply(status, "text/plain", String::new());
            answer.headers_mut().remove(header::CONTENT_TYPE);
            answer
        }
        RefusalBody::Oauth => {
            let body = serde_json::json!({ "error": subcode }).to_string();
            reply(status, "application/json;charset=UTF-8", body)
        }
    };
    let headers = answer.headers_mut();
    if let Some(seconds) = refusal.retry_after {
        let text = if refusal.retry_after_as_date { http_date(seconds) } else { seconds.to_string() };
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(header::RETRY_AFTER, value);
        }
    }
    if refusal.challenge {
        sign_in::add_challenge(server, exchange, headers);
    }
    if let Some(number) = &refusal.diagnostics {
        let text = format!("{number};source=\"simulator.invalid\";reason=\"As requested.\"");
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert("x-ms-diagnostics", value);
        }
    }
    answer
}

/// The date of HTTP, so many seconds from now.
fn http_date(seconds: u64) -> String {
    let moment = SystemTime::now() + Duration::from_secs(seconds);
    let moment = jiff::Timestamp::try_from(moment).unwrap_or_default();
    moment.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// Answers that the application is gone, and sees to it.
fn lose(server: &Arc<Server>, exchange: &Exchange, failure: Failure, keep: bool) -> Reply {
    let answer = exchange.refusal(&failure);
    if let (false, Some(application)) = (keep, application_of(server, exchange)) {
        application::end(server, &application, failure);
    }
    answer
}

async fn body_of(answered: Reply) -> (hyper::http::response::Parts, Bytes) {
    let (head, body) = answered.into_parts();
    let Ok(body) = body.collect().await;
    (head, body.to_bytes())
}

async fn without_onward_link(answered: Reply) -> Reply {
    let (head, body) = body_of(answered).await;
    let text = String::from_utf8_lossy(&body);
    let cut_out = |start: &str, end: &str| {
        let from = text.find(start)?;
        let to = from + text[from..].find(end)? + end.len();
        Some(format!("{}{}", &text[..from], &text[to..]))
    };
    let changed = cut_out("<link rel=\"", "/>").or_else(|| cut_out(",\"next\":{", "}"));
    let body = changed.map_or(body, Bytes::from);
    Response::from_parts(head, Full::new(body))
}

/// Spoils the answer to a request that was carried out.
async fn spoil(
    server: &Server,
    exchange: &Exchange,
    answered: Reply,
    kind: FaultKind,
) -> Result<Sent, io::Error> {
    if let FaultKind::Status(refusal) = &kind {
        return Ok(whole(refuse(server, exchange, refusal)));
    }
    if matches!(kind, FaultKind::CutAfter) {
        return Err(cut());
    }
    let (mut head, body) = body_of(answered).await;
    let xml = exchange.format.xml;
    // Where there is no body, the fault brings one.
    let mut text = String::from_utf8_lossy(&body).into_owned();
    if text.is_empty() {
        if head.status == StatusCode::NO_CONTENT {
            head.status = StatusCode::OK;
        }
        let empty = super::payload::Resource::new("unexpected", "/unexpected");
        text = empty.render(exchange.format);
        head.headers
            .entry(header::CONTENT_TYPE)
            .or_insert(HeaderValue::from_static(exchange.format.content_type));
    }
    let middle = (text.len() / 2..text.len()).find(|index| text.is_char_boundary(*index)).unwrap_or(0);
    let body = match kind {
        FaultKind::CutMidway => {
            let half = Bytes::from(text[..middle].to_owned());
            let frames = [Ok(Frame::data(half)), Err(cut())];
            return Ok(Response::from_parts(head, StreamBody::new(stream::iter(frames)).boxed_unsync()));
        }
        FaultKind::EndlessBody => {
            let first = Bytes::from(text[..middle].to_owned());
            let more = Bytes::from(vec![b' '; 16 * 1024]);
            let chunks = stream::unfold(Some(first), move |first| {
                let chunk = first.unwrap_or_else(|| more.clone());
                async move { Some((Ok(Frame::data(chunk)), None)) }
            });
            return Ok(Response::from_parts(head, StreamBody::new(chunks).boxed_unsync()));
        }
        FaultKind::HugeBody { bytes } => {
            // Space between the declaration and the root is allowed; so is space before JSON.
            let at = if xml { text.find("?>").map_or(0, |index| index + 2) } else { 0 };
            let missing = bytes.unwrap_or(32 * 1024 * 1024).saturating_sub(text.len() as u64);
            let chunk = Bytes::from(vec![b' '; 64 * 1024]);
            let repeated = usize::try_from(missing.div_ceil(64 * 1024)).unwrap_or(usize::MAX);
            let start = Bytes::from(text[..at].to_owned());
            let end = Bytes::from(text[at..].to_owned());
            let padding = std::iter::repeat_n(chunk, repeated);
            let chunks = std::iter::once(start).chain(padding).chain(std::iter::once(end));
            let frames = stream::iter(chunks.map(|chunk| Ok(Frame::data(chunk))));
            return Ok(Response::from_parts(head, StreamBody::new(frames).boxed_unsync()));
        }
        FaultKind::TruncatedXml => Bytes::from(text[..middle].to_owned()),
        FaultKind::InvalidUtf8 => {
            // Before the last end tag, where text may stand.
            let at = text.rfind("</").unwrap_or(middle);
            Bytes::from([&text.as_bytes()[..at], b"\xff\xfe\xc3", &text.as_bytes()[at..]].concat())
        }
        FaultKind::Doctype => Bytes::from(with_doctype(&text)),
        FaultKind::WrongContentType { content_type } => {
            let content_type = content_type.as_deref().unwrap_or("text/html");
            let value = HeaderValue::from_str(content_type);
            head.headers.insert(header::CONTENT_TYPE, value.unwrap_or(HeaderValue::from_static("text/html")));
            Bytes::from(text)
        }
        // Malformed: an end tag that nothing opened, a bracket that nothing opened.
        _ => Bytes::from(text + if xml { "</unopened>" } else { "]" }),
    };
    Ok(whole(Response::from_parts(head, Full::new(body))))
}

/// The document with entities that grow a thousandfold each, one of which stands in its text.
fn with_doctype(text: &str) -> String {
    let at = text.find("?>").map_or(0, |index| index + 2);
    let (declaration, rest) = text.split_at(at);
    let mut entities = String::from("<!ENTITY a0 \"ha\">");
    for level in 1..10 {
        let references = format!("&a{};", level - 1).repeat(1000);
        let _ = write!(entities, "<!ENTITY a{level} \"{references}\">");
    }
    let root: String = rest.trim_start_matches('<').chars().take_while(char::is_ascii_alphanumeric).collect();
    let used = "<property name=\"laughter\">&a9;</property>";
    let end = rest.rfind("</").unwrap_or(rest.len());
    format!("{declaration}<!DOCTYPE {root} [{entities}]>{}{used}{}", &rest[..end], &rest[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_read_from_one_flat_object() {
        let fault: Fault = serde_json::from_str(
            r#"{"account":"user0001","operation":"sendMessage","fault":"status","status":503,
                "retry_after":2,"executed":true,"count":3}"#,
        )
        .unwrap();
        let refusal = Refusal { status: 503, retry_after: Some(2), executed: true, ..Refusal::default() };
        let expected =
            Fault::new(FaultKind::Status(refusal)).on(Operation::SendMessage).account("user0001").times(3);
        assert_eq!(fault, expected);
        let fault: Fault = serde_json::from_str(r#"{"fault":"application_not_found"}"#).unwrap();
        assert_eq!(fault, Fault::new(FaultKind::ApplicationNotFound { keep: false }));
        assert!(serde_json::from_str::<Fault>(r#"{"fault":"earthquake"}"#).is_err());
    }

    #[test]
    fn every_kind_has_the_name_that_the_control_api_spells() {
        for name in FaultKind::NAMES {
            let object = format!(r#"{{"fault":"{name}","ms":1,"status":500,"location":"/"}}"#);
            let fault: Fault = serde_json::from_str(&object).unwrap();
            assert_eq!(fault.kind.name(), name);
        }
    }

    #[test]
    fn dates_are_spelled_as_http_wants_them() {
        let date = http_date(60);
        assert_eq!(date.len(), "Sun, 06 Nov 1994 08:49:37 GMT".len(), "{date}");
        assert!(date.ends_with(" GMT") && date.as_bytes()[3] == b',', "{date}");
    }

    #[test]
    fn a_doctype_names_the_root() {
        let text = with_doctype("<?xml version=\"1.0\"?><events href=\"x\"></events>");
        assert!(text.starts_with("<?xml version=\"1.0\"?><!DOCTYPE events [<!ENTITY a0 "), "{text}");
        assert!(text.ends_with("<property name=\"laughter\">&a9;</property></events>"));
    }
}
