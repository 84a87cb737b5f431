//! A simulated Skype for Business Server: the UCWA 2.0 API in XML and JSON, in this process, on loopback.
//!
//! For tests, the demo and the benchmark. It knows many accounts, lets any UCWA client sign in to them, joins
//! accounts to each other and to scripted correspondents ([`correspondent`] lists their behaviours), and keeps a
//! ledger of every message it delivered or accepted. It is written from the protocol's description and shares no
//! code with this program's own client, so that the two check each other.
//!
//! | file | subject |
//! | --- | --- |
//! | `server` | accept loop, requests and answers, the table of addresses |
//! | `payload` | resources and their two spellings, request bodies, data URIs |
//! | `sign_in` | discovery, challenge, web ticket service, tokens |
//! | `ntlm` | how a connection is signed in for the Windows grant |
//! | `application` | accounts, applications, `me`, `communication` |
//! | `people` | search, contacts |
//! | `event_channel` | packages of events and their acknowledgement |
//! | `conversation`, `leg`, `group` | what members share, what each sees, more than two |
//! | `conversation_log` | what the mailbox keeps of conversations |
//! | `meeting` | online meetings: invitations, lobby, roles |
//! | `messaging` | the requests about conversations, invitations and messages |
//! | `correspondent`, `traffic` | who is not an account, and what they do by themselves |
//! | `timers` | everything that happens later |
//! | `ledger` | what was delivered and accepted |
//! | `admin` | the control API; its module lists the requests |
//! | `requests` | how many requests came, and which of them too early |
//! | `fault`, `chaos` | what goes wrong on request, and at random |
//! | `batch` | several requests in one |
//!
//! The ledger's promise: a message to an account is `acknowledged` when a GET has asked for the package after the
//! one that carried it; until then the same package is given again to every GET. A message that no GET has fetched
//! within [`SimulatorSettings::message_fetch_limit`] is `expired` and appears nowhere any more.

mod admin;
mod application;
mod batch;
mod chaos;
mod conversation;
mod conversation_log;
pub mod correspondent;
mod event_channel;
mod fault;
mod group;
mod ledger;
mod leg;
mod meeting;
mod messaging;
mod ntlm;
mod payload;
mod people;
mod requests;
mod server;
mod sign_in;
mod timers;
mod traffic;

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, time::Instant};
use tokio_util::task::TaskTracker;

pub use chaos::ChaosSettings;
pub use conversation::ConversationPhase;
pub use conversation_log::{LogEntry, LoggedMessage};
pub use fault::{Fault, FaultKind, FaultState, Operation, Refusal, RefusalBody};
pub use ledger::{
    IncomingEntry, IncomingState, LedgerCounters, LedgerSnapshot, MessageKind, OutgoingEntry, OutgoingState,
};
pub use requests::RequestCount;
pub use traffic::TrafficSettings;

use chaos::Chaos;
use conversation::{Conversation, Place, Text};
use payload::Failure;
use server::{Server, Site};
use timers::Timers;
use traffic::Traffic;

/// How a simulated server behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct SimulatorSettings {
    /// Where UCWA is served; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Where the control API is served, if anywhere.
    pub admin_listen: Option<SocketAddr>,
    /// Accounts `user0001`, `user0002` ... of [`Self::domain`], all with [`Self::password`].
    pub accounts: usize,
    /// More accounts: name or address, and password.
    pub named_accounts: Vec<(String, String)>,
    /// The SIP domain.
    pub domain: String,
    /// Password of the numbered accounts.
    pub password: String,
    /// How long a token is valid.
    pub token_lifetime: Duration,
    /// How long an application lives without a parked GET.
    pub application_expiry: Duration,
    /// How many applications one account may have; a further one ends the oldest.
    pub applications_per_account: usize,
    /// How many conversations an application may have before what it begins fails with `TooManyConversations`. The
    /// documentation names that reason and no number, so there is no limit unless one is set.
    pub conversations_per_application: Option<usize>,
    /// How long an incoming message waits to be fetched before it is lost.
    pub message_fetch_limit: Duration,
    /// How long a call rings.
    pub ring_time: Duration,
    /// How long a GET on `events` is parked if the client does not say.
    pub poll_timeout: Duration,
    /// Parks no GET longer than this, whatever the client says: for tests.
    pub poll_timeout_limit: Option<Duration>,
    /// The shortest and the longest time that correspondents take to do anything.
    pub answer_delay: (Duration, Duration),
    /// How long somebody is shown as typing.
    pub typing_shown: Duration,
    /// Longest message accepted, in bytes.
    pub max_message_bytes: usize,
    /// Share of events that link their resource without embedding it.
    pub link_only_share: f64,
    /// Share of operations whose events come before their answer.
    pub early_event_share: f64,
    /// Share of incoming messages that are announced by `started` before `completed`.
    pub started_share: f64,
    /// What becomes of a conversation of two that is to grow.
    pub escalation: Escalation,
    /// Share of messages that an ordinary correspondent answers.
    pub answer_share: f64,
    /// Where all chance begins.
    pub seed: u64,
    /// Traffic from the start, if any.
    pub traffic: Option<TrafficSettings>,
    /// Where applications are served by a pool of its own, which takes only the tokens that it issued; at
    /// [`Self::listen`] where it is absent.
    pub pool_listen: Option<SocketAddr>,
    /// Where discovery leads to in place of the `user` resource, if anywhere.
    pub discovery_redirect: Option<DiscoveryRedirect>,
    /// Where the `user` resource leads to in place of the applications, if anywhere: a URL, or a path of this server.
    pub user_redirect: Option<String>,
    /// Whether applications that are created from now on are offered conversation logs, and logs are kept.
    pub conversation_logs: bool,
    /// How long after its end a conversation appears in the logs.
    pub log_delay: Duration,
    /// Messages on one page of a log's transcripts.
    pub log_page: usize,
    /// Whether a call to an account without an available application is taken, and appears in its log as missed.
    pub missed_calls_logged: bool,
    /// Whether the web ticket service takes the password grant.
    pub password_sign_in: bool,
    /// By what the web ticket service takes the Windows grant.
    pub windows_sign_in: WindowsSignIn,
}

/// Whether a conversation of two can become a conference (resource `addParticipant`). One that was a conference from
/// its beginning can always grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Escalation {
    /// `addParticipant` is linked and works.
    #[default]
    Offered,
    /// Conversations that begin from now on do not link it while they are of two.
    Absent,
    /// It is linked, and answered with 409 `Conflict`, the service not being supported.
    Refused,
    /// It is taken, and its `participantInvitation` fails with `EscalationFailed`.
    Failing,
}

/// By what a web ticket service takes the grant `urn:microsoft.rtc:windows`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WindowsSignIn {
    /// Not at all; the challenge does not offer it.
    #[default]
    Off,
    /// The schemes `Negotiate` and `NTLM` are offered, and NTLM works in both.
    Ntlm,
    /// `Negotiate` is offered, and takes NTLM's messages.
    Negotiate,
    /// `Negotiate` is offered, and NTLM is refused. Nobody has a Kerberos ticket for a simulator.
    Kerberos,
}

/// Where discovery leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoveryRedirect {
    /// A URL, or a path of this server.
    pub location: String,
    /// With this status and `Location`; by a `redirect` link where it is absent.
    #[serde(default)]
    pub status: Option<u16>,
}

/// What can be changed while the simulator runs; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SettingsChange {
    /// How long the tokens are valid that are issued from now on.
    pub token_lifetime_ms: Option<u64>,
    /// How long an application lives without a parked GET.
    pub application_expiry_ms: Option<u64>,
    /// Share of events that link their resource without embedding it.
    pub link_only_share: Option<f64>,
    /// Share of operations whose events come before their answer.
    pub early_event_share: Option<f64>,
    /// Share of incoming messages that are announced by `started` before `completed`.
    pub started_share: Option<f64>,
    /// What becomes of a conversation of two that is to grow.
    pub escalation: Option<Escalation>,
    /// Where discovery leads to; nowhere else where its `location` is empty.
    pub discovery_redirect: Option<DiscoveryRedirect>,
    /// Where the `user` resource leads to; nowhere else where it is empty.
    pub user_redirect: Option<String>,
    /// Whether conversation logs are kept and offered.
    pub conversation_logs: Option<bool>,
    /// How long after its end a conversation appears in the logs.
    pub log_delay_ms: Option<u64>,
    /// Whether a call to an account without an available application appears in its log.
    pub missed_calls_logged: Option<bool>,
    /// Whether the web ticket service takes the password grant.
    pub password_sign_in: Option<bool>,
    /// By what the web ticket service takes the Windows grant.
    pub windows_sign_in: Option<WindowsSignIn>,
}

impl Default for SimulatorSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            admin_listen: None,
            accounts: 10,
            named_accounts: Vec::new(),
            domain: "contoso.example".to_owned(),
            password: "simulated".to_owned(),
            token_lifetime: Duration::from_hours(8),
            application_expiry: Duration::from_mins(10),
            applications_per_account: 16,
            conversations_per_application: None,
            message_fetch_limit: Duration::from_secs(30),
            ring_time: Duration::from_secs(30),
            poll_timeout: Duration::from_mins(3),
            poll_timeout_limit: None,
            answer_delay: (Duration::from_millis(20), Duration::from_millis(150)),
            typing_shown: Duration::from_secs(5),
            max_message_bytes: 64 * 1024,
            link_only_share: 0.2,
            early_event_share: 0.2,
            started_share: 0.1,
            escalation: Escalation::Offered,
            answer_share: 0.5,
            seed: 1,
            traffic: None,
            pool_listen: None,
            discovery_redirect: None,
            user_redirect: None,
            conversation_logs: false,
            log_delay: Duration::from_secs(2),
            log_page: 10,
            missed_calls_logged: false,
            password_sign_in: true,
            windows_sign_in: WindowsSignIn::Off,
        }
    }
}

/// Somebody calls an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRequest {
    /// SIP address of the caller, with or without `sip:`; any that is not an account.
    pub from: String,
    /// SIP address of the account, with or without `sip:`.
    pub to_account: String,
    /// The invitation's text.
    #[serde(default)]
    pub text: Option<String>,
    /// The invitation's text in HTML; shown only where `text` is absent.
    #[serde(default)]
    pub html: Option<String>,
    /// The conversation's subject.
    #[serde(default)]
    pub subject: String,
}

/// Somebody invites an account to an online meeting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeetingRequest {
    /// SIP address of the organizer, with or without `sip:`; any that is not an account.
    pub from: String,
    /// SIP address of the account, with or without `sip:`.
    pub to_account: String,
    /// SIP addresses of other correspondents who are in the meeting already.
    #[serde(default)]
    pub others: Vec<String>,
    /// The meeting's subject.
    #[serde(default)]
    pub subject: String,
    /// Whether the account has to wait until it is admitted.
    #[serde(default)]
    pub lobby: bool,
    /// A conversation whose thread the meeting goes on with, if any.
    #[serde(default)]
    pub after: Option<String>,
}

/// What a correspondent writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saying {
    /// Who of several correspondents; the first where it is absent.
    #[serde(default)]
    pub from: Option<String>,
    /// Plain text.
    #[serde(default)]
    pub text: Option<String>,
    /// HTML, alone or beside the plain text.
    #[serde(default)]
    pub html: Option<String>,
    /// The link of the plain text in the message, as it is: any charset and encoding, or none that can be read.
    #[serde(default)]
    pub data_uri: Option<String>,
    /// `timeStamp` of the message, as it is.
    #[serde(default)]
    pub time_stamp: Option<String>,
}

/// Why something could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No account has this address.
    #[error("no account has the address {0}")]
    NoSuchAccount(String),
    /// The account has no application that takes messages.
    #[error("{0} has no application that takes messages")]
    NotReachable(String),
    /// The caller is an account itself: only its client can call.
    #[error("{0} is an account: only its client can call")]
    CallerIsAnAccount(String),
    /// The conversation is over, or never was.
    #[error("conversation {0} is over")]
    NoSuchConversation(String),
    /// The conversation cannot take a message now.
    #[error("conversation {0} is not connected")]
    NotConnected(String),
}

/// One application of an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationState {
    /// Its id, the last part of its address.
    pub id: String,
    /// Whether `makeMeAvailable` was done.
    pub available: bool,
    /// Whether a GET on `events` is parked now.
    pub parked: bool,
    /// The package that the next GET should ask for.
    pub next_package: u64,
    /// The simulator's own ids of the conversations it is in.
    pub conversations: Vec<String>,
}

/// One account and its applications.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountState {
    /// Its SIP URI.
    pub uri: String,
    /// Its applications, the oldest first.
    pub applications: Vec<ApplicationState>,
}

/// A running simulated server. Clones are handles of the same server.
#[derive(Clone)]
pub struct Simulator {
    server: Arc<Server>,
    admin_address: Option<SocketAddr>,
    tasks: TaskTracker,
}

impl Simulator {
    /// Binds the ports and starts to serve.
    ///
    /// # Errors
    ///
    /// If a port cannot be bound.
    pub async fn start(settings: SimulatorSettings) -> io::Result<Self> {
        let listener = TcpListener::bind(settings.listen).await?;
        let admin_listener = match settings.admin_listen {
            Some(address) => Some(TcpListener::bind(address).await?),
            None => None,
        };
        let pool_listener = match settings.pool_listen {
            Some(address) => Some(TcpListener::bind(address).await?),
            None => None,
        };
        let address = listener.local_addr()?;
        let admin_address = admin_listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let pool_address = pool_listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let server = Arc::new(Server::new(settings, address, pool_address));
        let simulator = Self { server: Arc::clone(&server), admin_address, tasks: TaskTracker::new() };
        application::sweep(&server);
        simulator.tasks.spawn(server::accept(Arc::clone(&server), listener, Site::Front));
        if let Some(listener) = pool_listener {
            simulator.tasks.spawn(server::accept(Arc::clone(&server), listener, Site::Pool));
        }
        simulator.spawn(Timers::run(Arc::clone(&server)));
        simulator.spawn(Traffic::run(Arc::clone(&server)));
        simulator.spawn(Chaos::run(Arc::clone(&server)));
        if let Some(listener) = admin_listener {
            let router = admin::router(simulator.clone());
            simulator.spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    tracing::warn!(%error, "simulator control API ended");
                }
            });
        }
        simulator.tasks.close();
        Ok(simulator)
    }

    /// Runs a task until the server closes.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closing = self.server.closing.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = closing.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Where UCWA is served.
    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// What a client is given as its discovery address.
    pub fn discovery_url(&self) -> String {
        format!("http://{}/", self.server.address)
    }

    /// Where the pool serves applications, if it is a server of its own.
    pub fn pool_address(&self) -> Option<SocketAddr> {
        self.server.pool_address
    }

    /// Where the control API is served, if anywhere.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// The SIP URIs of all accounts, the named ones first.
    pub fn account_uris(&self) -> Vec<String> {
        self.server.account_list.iter().map(|account| account.uri.clone()).collect()
    }

    /// Every account with its applications.
    pub fn accounts(&self) -> Vec<AccountState> {
        let accounts = self.server.account_list.iter();
        let state = |account: &Arc<application::Account>| AccountState {
            uri: account.uri.clone(),
            applications: account
                .living_applications()
                .iter()
                .map(|application| {
                    let state = application.lock();
                    let legs = state.legs.values().filter(|leg| !leg.ended);
                    ApplicationState {
                        id: application.id.clone(),
                        available: state.is_available(),
                        parked: state.channel.is_parked(),
                        next_package: state.channel.current(),
                        conversations: legs.map(|leg| leg.conversation.id.clone()).collect(),
                    }
                })
                .collect(),
        };
        accounts.map(state).collect()
    }

    /// Everything delivered and accepted so far.
    pub fn ledger(&self) -> LedgerSnapshot {
        self.server.ledger.snapshot()
    }

    /// The ledger's numbers, without copying it.
    pub fn counters(&self) -> LedgerCounters {
        self.server.ledger.counters()
    }

    /// A correspondent calls an account. Gives the conversation's id at once, while it rings.
    ///
    /// # Errors
    ///
    /// If there is no such account or it takes no messages, or the caller is an account.
    #[expect(clippy::unused_async, reason = "callers await it, so that it may one day wait for something")]
    pub async fn call(&self, request: CallRequest) -> Result<String, Refused> {
        self.place_call(&request, false)
    }

    /// A correspondent calls an account, and another device of the account answers. Gives the conversation's id.
    ///
    /// The account's applications, if it has any, see it ring until `ConnectedElsewhere`. The other device writes
    /// by [`Self::say_from`] with the account's address.
    ///
    /// # Errors
    ///
    /// If there is no such account, or the caller is an account.
    pub fn call_answered_elsewhere(&self, request: &CallRequest) -> Result<String, Refused> {
        self.place_call(request, true)
    }

    fn place_call(&self, request: &CallRequest, elsewhere: bool) -> Result<String, Refused> {
        let (from, to) = (with_scheme(&request.from), with_scheme(&request.to_account));
        if !self.server.accounts.contains_key(&to) {
            return Err(Refused::NoSuchAccount(to));
        }
        if self.server.accounts.contains_key(&from) {
            return Err(Refused::CallerIsAnAccount(from));
        }
        let text = text_of(request.text.as_deref(), request.html.as_deref());
        conversation::call_from_script(&self.server, &from, &to, text, &request.subject, elsewhere)
            .map(|conversation| conversation.id.clone())
            .ok_or(Refused::NotReachable(to))
    }

    /// A correspondent invites an account to an online meeting. Gives the conversation's id while it rings.
    ///
    /// # Errors
    ///
    /// If there is no such account or it takes no messages, or one of the correspondents is an account.
    pub fn meet(&self, request: &MeetingRequest) -> Result<String, Refused> {
        let (from, to) = (with_scheme(&request.from), with_scheme(&request.to_account));
        if !self.server.accounts.contains_key(&to) {
            return Err(Refused::NoSuchAccount(to));
        }
        let others: Vec<String> = request.others.iter().map(|other| with_scheme(other)).collect();
        let mut people = others.iter().chain([&from]);
        if let Some(account) = people.find(|uri| self.server.accounts.contains_key(*uri)) {
            return Err(Refused::CallerIsAnAccount(account.clone()));
        }
        let thread_id = match &request.after {
            None => None,
            Some(id) => {
                let earlier = self.server.conversation(id);
                let earlier = earlier.ok_or_else(|| Refused::NoSuchConversation(id.clone()))?;
                let thread_id = earlier.hub().thread_id.clone();
                Some(thread_id)
            }
        };
        meeting::invite(&self.server, &from, &to, &others, &request.subject, request.lobby, thread_id)
            .map(|conversation| conversation.id.clone())
            .ok_or(Refused::NotReachable(to))
    }

    /// A correspondent joins a connected conversation, which becomes a conference if it was one of two.
    ///
    /// # Errors
    ///
    /// If the conversation is not connected, or they are in it, or are an account.
    pub fn join(&self, conversation: &str, who: &str) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        let who = with_scheme(who);
        if self.server.accounts.contains_key(&who) {
            return Err(Refused::CallerIsAnAccount(who));
        }
        let joined = meeting::bring(&self.server, &found, &who);
        if joined { Ok(()) } else { Err(Refused::NotConnected(conversation.to_owned())) }
    }

    /// A correspondent becomes a leader of a conference, or an attendee.
    ///
    /// # Errors
    ///
    /// If the conversation is over or no conference, or they are not in it.
    pub fn change_role(&self, conversation: &str, who: &str, leader: bool) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        let changed = meeting::change_role(&found, &with_scheme(who), leader);
        if changed { Ok(()) } else { Err(Refused::NotConnected(conversation.to_owned())) }
    }

    /// Lets the account that waits in a meeting's lobby in, or turns it away.
    ///
    /// # Errors
    ///
    /// If nobody waits there.
    pub fn settle_lobby(&self, conversation: &str, admit: bool) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        let settled = meeting::settle_lobby(&self.server, &found, admit);
        if settled { Ok(()) } else { Err(Refused::NotConnected(conversation.to_owned())) }
    }

    /// A correspondent comes into the lobby of a conference that an account is in.
    ///
    /// # Errors
    ///
    /// If the conversation is over or no conference, or they are in it or its lobby already.
    pub fn wait_in_lobby(&self, conversation: &str, who: &str) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        let waits = meeting::wait_in_lobby(&self.server, &found, &with_scheme(who));
        if waits { Ok(()) } else { Err(Refused::NotConnected(conversation.to_owned())) }
    }

    /// Lets a correspondent who waits in the lobby of a conference in, or turns them away.
    ///
    /// # Errors
    ///
    /// If they do not wait there.
    pub fn settle_visitor(&self, conversation: &str, who: &str, admit: bool) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        let settled = meeting::settle_visitor(&self.server, &found, &with_scheme(who), admit);
        if settled { Ok(()) } else { Err(Refused::NotConnected(conversation.to_owned())) }
    }

    /// A correspondent begins to type, or stops.
    ///
    /// # Errors
    ///
    /// If the conversation is over, or they are not in it.
    pub fn show_typing(&self, conversation: &str, from: Option<&str>, types: bool) -> Result<(), Refused> {
        let (found, seat) = self.correspondent(conversation, from)?;
        conversation::show_typing(&found, seat, types);
        Ok(())
    }

    /// The conversation logs of an account, the oldest first.
    ///
    /// # Errors
    ///
    /// If there is no such account.
    pub fn conversation_logs(&self, account: &str) -> Result<Vec<LogEntry>, Refused> {
        Ok(self.account_named(account)?.logs.entries())
    }

    /// How far a conversation is.
    pub fn conversation_phase(&self, conversation: &str) -> ConversationPhase {
        self.server.conversation(conversation).map_or(ConversationPhase::Ended, |found| found.phase())
    }

    /// Waits until a conversation is connected; false if it ended, or `limit` passed, before.
    pub async fn connected(&self, conversation: &str, limit: Duration) -> bool {
        let Some(found) = self.server.conversation(conversation) else { return false };
        let mut phase = found.phase.subscribe();
        let reached = phase.wait_for(|phase| *phase != ConversationPhase::Ringing);
        match tokio::time::timeout(limit, reached).await {
            Ok(Ok(phase)) => *phase == ConversationPhase::Connected,
            _ => false,
        }
    }

    /// The correspondent of a conversation writes. Gives the ledger serials of what was delivered.
    ///
    /// # Errors
    ///
    /// If the conversation is over or not connected.
    pub fn say(&self, conversation: &str, text: &str) -> Result<Vec<u64>, Refused> {
        self.say_from(conversation, None, Some(text), None)
    }

    /// A certain correspondent of a conversation writes, in plain text, HTML or both.
    ///
    /// # Errors
    ///
    /// If the conversation is over or not connected.
    pub fn say_from(
        &self,
        conversation: &str,
        from: Option<&str>,
        text: Option<&str>,
        html: Option<&str>,
    ) -> Result<Vec<u64>, Refused> {
        let saying = Saying {
            from: from.map(str::to_owned),
            text: text.map(str::to_owned),
            html: html.map(str::to_owned),
            ..Saying::default()
        };
        self.say_as(conversation, &saying)
    }

    /// A correspondent writes, and it is spelled and dated as asked for. What a reader should take of it stands in
    /// the ledger as [`Saying::text`] and [`Saying::html`].
    ///
    /// # Errors
    ///
    /// If the conversation is over or not connected.
    pub fn say_as(&self, conversation: &str, saying: &Saying) -> Result<Vec<u64>, Refused> {
        let (found, seat) = self.correspondent(conversation, saying.from.as_deref())?;
        let text = Text {
            plain: saying.text.clone(),
            html: saying.html.clone(),
            data_uri: saying.data_uri.clone(),
            time_stamp: saying.time_stamp.clone(),
        };
        conversation::say(&self.server, &found, seat, &text)
            .map(|said| said.serials)
            .ok_or_else(|| Refused::NotConnected(conversation.to_owned()))
    }

    /// The correspondent of a conversation leaves it; a call that still rings is withdrawn.
    ///
    /// # Errors
    ///
    /// If the conversation is over.
    pub fn leave(&self, conversation: &str) -> Result<(), Refused> {
        self.leave_from(conversation, None)
    }

    /// A certain correspondent of a conversation leaves it.
    ///
    /// # Errors
    ///
    /// If the conversation is over.
    pub fn leave_from(&self, conversation: &str, from: Option<&str>) -> Result<(), Refused> {
        let (found, seat) = self.correspondent(conversation, from)?;
        conversation::depart(&self.server, &found, seat);
        Ok(())
    }

    /// Closes the messaging of a connected conversation, which goes on without it until somebody adds it again.
    ///
    /// # Errors
    ///
    /// If the conversation is over or not connected.
    pub fn close_messaging(&self, conversation: &str) -> Result<(), Refused> {
        let (found, _) = self.correspondent(conversation, None)?;
        if conversation::close_messaging(&self.server, &found) {
            Ok(())
        } else {
            Err(Refused::NotConnected(conversation.to_owned()))
        }
    }

    fn correspondent(
        &self,
        conversation: &str,
        from: Option<&str>,
    ) -> Result<(Arc<Conversation>, usize), Refused> {
        let over = || Refused::NoSuchConversation(conversation.to_owned());
        let found = self.server.conversation(conversation).ok_or_else(over)?;
        let wanted = from.map(with_scheme);
        let seat = {
            let hub = found.hub();
            hub.seats.iter().position(|seat| {
                let named = wanted.as_ref().is_none_or(|uri| *uri == seat.uri);
                seat.present && named && matches!(seat.place, Place::Script(_))
            })
        };
        Ok((found, seat.ok_or_else(over)?))
    }

    /// Starts the traffic, with new settings or those it had.
    pub fn start_traffic(&self, settings: Option<TrafficSettings>) {
        self.server.traffic.start(settings);
    }

    /// Changes the traffic's messages per second.
    pub fn set_traffic_rate(&self, messages_per_second: f64) {
        self.server.traffic.set_rate(messages_per_second);
    }

    /// Stops the traffic: no new calls and messages but answers to what accounts send.
    pub fn stop_traffic(&self) {
        self.server.traffic.stop();
    }

    /// Whether the traffic runs.
    pub fn traffic_is_running(&self) -> bool {
        self.server.traffic.is_running()
    }

    /// Messages that the traffic has written so far.
    pub fn traffic_written(&self) -> u64 {
        self.server.traffic.written()
    }

    /// Whether the traffic is stopped, no correspondent is about to do anything, nobody is being called, and no
    /// message is unsettled in either direction.
    pub fn is_quiet(&self) -> bool {
        let counters = self.counters();
        !self.traffic_is_running()
            && self.server.timers.nothing_scripted()
            && !self.server.anything_rings()
            && counters.incoming_pending == 0
            && counters.outgoing_accepted == 0
    }

    /// Waits until the simulator is quiet; false if it is not after `limit`.
    pub async fn quiet(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.is_quiet() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }

    /// The server forgets the account's applications, as after a failover. Gives how many there were.
    ///
    /// # Errors
    ///
    /// If there is no such account.
    pub fn forget_application(&self, account: &str) -> Result<usize, Refused> {
        let account = self.account_named(account)?;
        let applications = account.living_applications();
        for application in &applications {
            application::end(&self.server, application, Failure::application_not_found());
        }
        Ok(applications.len())
    }

    /// Makes the account's tokens invalid before their time.
    ///
    /// # Errors
    ///
    /// If there is no such account.
    pub fn expire_tokens(&self, account: &str) -> Result<(), Refused> {
        let account = self.account_named(account)?;
        self.server.tokens.revoke(&account.uri);
        Ok(())
    }

    /// Switches a fault on; gives its number.
    ///
    /// # Errors
    ///
    /// If the fault names an account that does not exist.
    pub fn inject(&self, fault: Fault) -> Result<u64, Refused> {
        let account = match &fault.account {
            None => None,
            Some(name) => Some(self.account_named(name)?.uri.clone()),
        };
        Ok(inject(&self.server, Fault { account, ..fault }))
    }

    /// Every fault that is switched on, and the last ones that have struck as often as they should.
    pub fn faults(&self) -> Vec<FaultState> {
        self.server.faults.states()
    }

    /// How often a fault has struck; 0 if it is not known any more.
    pub fn struck(&self, fault: u64) -> u64 {
        self.faults().iter().find(|state| state.id == fault).map_or(0, |state| state.struck)
    }

    /// Switches one fault off, or all of them.
    pub fn clear_faults(&self, fault: Option<u64>) {
        self.server.faults.clear(fault);
    }

    /// How often each kind of fault has struck since the start; the names are those of the control API.
    pub fn faults_struck(&self) -> BTreeMap<&'static str, u64> {
        self.server.faults.struck()
    }

    /// How often each account asked for what since the start or the last reset.
    pub fn requests(&self) -> Vec<RequestCount> {
        self.server.requests.counts()
    }

    /// Counts requests anew from now on.
    pub fn reset_requests(&self) {
        self.server.requests.reset();
    }

    /// Lets faults strike at random from now on.
    pub fn start_chaos(&self, settings: ChaosSettings) {
        self.server.chaos.start(settings);
    }

    /// No faults at random any more; those that wait are switched off.
    pub fn stop_chaos(&self) {
        self.server.chaos.stop();
    }

    /// Whether faults strike at random.
    pub fn chaos_is_running(&self) -> bool {
        self.server.chaos.is_running()
    }

    /// An account by its address, with or without `sip:` and domain.
    fn account_named(&self, name: &str) -> Result<&Arc<application::Account>, Refused> {
        let mut uri = with_scheme(name);
        if !uri.contains('@') {
            uri = format!("{uri}@{}", self.server.settings.domain.to_lowercase());
        }
        self.server.accounts.get(&uri).ok_or(Refused::NoSuchAccount(uri))
    }

    /// Changes settings from now on.
    pub fn change_settings(&self, change: SettingsChange) {
        let mut settings = self.server.change();
        let SettingsChange {
            token_lifetime_ms,
            application_expiry_ms,
            link_only_share,
            early_event_share,
            started_share,
            escalation,
            discovery_redirect,
            user_redirect,
            conversation_logs,
            log_delay_ms,
            missed_calls_logged,
            password_sign_in,
            windows_sign_in,
        } = change;
        let set = |place: &mut Duration, ms: Option<u64>| *place = ms.map_or(*place, Duration::from_millis);
        set(&mut settings.token_lifetime, token_lifetime_ms);
        set(&mut settings.application_expiry, application_expiry_ms);
        settings.link_only_share = link_only_share.unwrap_or(settings.link_only_share);
        settings.early_event_share = early_event_share.unwrap_or(settings.early_event_share);
        settings.started_share = started_share.unwrap_or(settings.started_share);
        settings.escalation = escalation.unwrap_or(settings.escalation);
        set(&mut settings.log_delay, log_delay_ms);
        settings.conversation_logs = conversation_logs.unwrap_or(settings.conversation_logs);
        settings.missed_calls_logged = missed_calls_logged.unwrap_or(settings.missed_calls_logged);
        settings.password_sign_in = password_sign_in.unwrap_or(settings.password_sign_in);
        settings.windows_sign_in = windows_sign_in.unwrap_or(settings.windows_sign_in);
        if let Some(redirect) = discovery_redirect {
            settings.discovery_redirect = Some(redirect).filter(|redirect| !redirect.location.is_empty());
        }
        if let Some(location) = user_redirect {
            settings.user_redirect = Some(location).filter(|location| !location.is_empty());
        }
    }

    /// Everything that can be changed, as it is now.
    pub fn changeable_settings(&self) -> SettingsChange {
        let settings = self.server.now();
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        SettingsChange {
            token_lifetime_ms: Some(ms(settings.token_lifetime)),
            application_expiry_ms: Some(ms(settings.application_expiry)),
            link_only_share: Some(settings.link_only_share),
            early_event_share: Some(settings.early_event_share),
            started_share: Some(settings.started_share),
            escalation: Some(settings.escalation),
            discovery_redirect: settings.discovery_redirect.clone(),
            user_redirect: settings.user_redirect.clone(),
            conversation_logs: Some(settings.conversation_logs),
            log_delay_ms: Some(ms(settings.log_delay)),
            missed_calls_logged: Some(settings.missed_calls_logged),
            password_sign_in: Some(settings.password_sign_in),
            windows_sign_in: Some(settings.windows_sign_in),
        }
    }

    /// Closes the ports and cuts every connection.
    pub async fn shutdown(&self) {
        self.server.closing.cancel();
        self.tasks.wait().await;
    }
}

/// Switches a fault on whose account is spelled as the server does; gives its number.
fn inject(server: &Server, fault: Fault) -> u64 {
    let id = server.faults.inject(fault);
    // A parked GET looks again, in case the fault concerns its channel.
    for account in &server.account_list {
        for application in account.living_applications() {
            application.lock().channel.wake();
        }
    }
    id
}

fn with_scheme(address: &str) -> String {
    let lower = address.trim().to_lowercase();
    if lower.starts_with("sip:") { lower } else { format!("sip:{lower}") }
}

fn text_of(text: Option<&str>, html: Option<&str>) -> Option<Text> {
    (text.is_some() || html.is_some()).then(|| Text {
        plain: text.map(str::to_owned),
        html: html.map(str::to_owned),
        ..Text::default()
    })
}
