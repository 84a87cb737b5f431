//! The accounts: a supervisor, and for each enabled account an actor that owns its event channel and conversations.
//!
//! ```text
//! AccountSupervisor ──owns──▶ Account ──owns──▶ EventChannel          GET, commit, GET ...
//!        ▲                     │  ▲  ╲──owns──▶ Conversation (many)   one send at a time
//!        └──── AccountExited ──┘  └── EventsCommitted, Fetched, ...
//! ```
//!
//! Where several nodes share a database, the [`coordinator`] takes and gives up accounts, and the supervisor follows.
//!
//! Parents supervise, because actix restarts neither after a panic nor with back-off: a child reports its end with a
//! reason, its parent decides. Every life of an account is a fresh actor; what must outlive it is in the database.
//! No handler waits: requests and commits are futures spawned into the actor, and their results come back to it.

pub mod actor;
pub mod backfill;
pub mod backoff;
pub mod channel_state;
pub mod conversation;
pub mod coordinator;
pub mod delivery;
pub mod event_channel;
pub mod gate;
pub mod sign_in;
pub mod state_board;
pub mod supervisor;
mod take_up;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use actix::Addr;
use url::Url;

use crate::{
    account::{actor::AccountActor, gate::SignInGate, state_board::StateBoard},
    archive::retry::RetryPolicy,
    identifiers::AccountId,
    store::{InvitationPolicy, SharedStore},
    ucwa::{EventParameters, HttpClients},
};

/// The part of the configuration that accounts act on.
#[derive(Debug, Clone)]
pub struct AccountSettings {
    /// `server.discovery_url`.
    pub discovery_url: Option<Url>,
    /// `server.trusted_domains`.
    pub trusted_domains: Vec<String>,
    /// `server.allow_http`.
    pub allow_http: bool,
    /// The longest that a round of the event channel may take: its timeout, the answer's way, and a commit. Who has not
    /// completed one for longer is `stalled`.
    pub round: Duration,
    /// Parameters of the event channel; its `timeout` is `server.poll_timeout`.
    pub poll: EventParameters,
    /// `relay.culture`.
    pub culture: String,
    /// `relay.presence`.
    pub presence: String,
    /// `relay.invitations`, for accounts without a setting of their own.
    pub invitations: InvitationPolicy,
    /// `relay.idle_conversation`.
    pub idle_conversation: Duration,
    /// `outbox.settle_after`: how long the event stream may take to settle an unknown outcome.
    pub settle_after: Duration,
    /// `outbox.uncertain` is `retry`.
    pub retry_uncertain: bool,
    /// `outbox.max_attempts`, for rows without a limit of their own.
    pub max_attempts: i64,
    /// `outbox.retry_base`, `outbox.retry_max`.
    pub retry: RetryPolicy,
    /// Name of this node in `account_status.node_id`.
    pub node: String,
}

/// What every account shares; cheap to clone.
#[derive(Clone)]
pub struct AccountEnvironment {
    /// The database.
    pub store: SharedStore,
    /// HTTP clients of all accounts.
    pub clients: HttpClients,
    /// `secrets.key_file`, with which sealed passwords are opened.
    pub key_file: Arc<Path>,
    /// Paces sign-ins.
    pub gate: SignInGate,
    /// Publishes states.
    pub states: StateBoard,
    /// Accounts that are signed in here.
    pub directory: Directory,
    /// Configuration.
    pub settings: Arc<AccountSettings>,
}

/// Accounts that are signed in on this node, for whoever has work for them.
#[derive(Clone, Default)]
pub struct Directory {
    online: Arc<RwLock<HashMap<AccountId, Online>>>,
}

/// One signed-in account.
#[derive(Clone)]
pub struct Online {
    /// Where to send work.
    pub address: Addr<AccountActor>,
    /// How its event channel is doing.
    pub channel: Arc<event_channel::ChannelHealth>,
    /// The UCWA application it works with.
    pub session: crate::identifiers::SessionId,
}

impl Directory {
    /// Enters an account, replacing an earlier life of it.
    pub fn enter(&self, account: AccountId, online: Online) {
        self.online.write().unwrap_or_else(PoisonError::into_inner).insert(account, online);
    }

    /// Removes an account.
    pub fn leave(&self, account: AccountId) {
        self.online.write().unwrap_or_else(PoisonError::into_inner).remove(&account);
    }

    /// The account, if it is signed in here.
    pub fn get(&self, account: AccountId) -> Option<Online> {
        self.online.read().unwrap_or_else(PoisonError::into_inner).get(&account).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<(AccountId, Online)> {
        let online = self.online.read().unwrap_or_else(PoisonError::into_inner);
        online.iter().map(|(account, entry)| (*account, entry.clone())).collect()
    }
}
