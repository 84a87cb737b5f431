//! The database, behind traits in the domain's words.
//!
//! Nothing outside this folder knows SQL or a dialect; nothing inside it knows HTTP, XML or actors. A dialect is one
//! folder (`sqlite/`, `postgres/`) that implements the traits of this file, of `coverage`, `quarantine` and `leases`, and brings
//! the words for the statements of `reading` and `browse`, which stand once; [`connect`] picks it by the URL.
//!
//! Everything a running server writes goes through one writer that joins what many accounts bring within a few
//! milliseconds into one transaction (group commit) and answers each caller only after that transaction is durable.
//! A failure of one caller's part never undoes another's. Readers use connections of their own.

mod attention;
mod browse;
mod columns;
mod coverage;
mod health;
mod inspect;
mod known_accounts;
mod leases;
mod migrations;
mod postgres;
mod quarantine;
mod reading;
mod retention;
mod rows;
mod secrets;
mod selection;
mod sqlite;
mod trouble;
mod writer;

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    archive::{
        fact::{ArchiveCommit, Direction, FailureReason, Fetch},
        workspace::RuleSettings,
    },
    identifiers::{AccountId, ConversationId, MessageId, OperationId, OutboxId, SessionId, SipUri},
    query::{Condition, Person, Query},
};

pub use self::{
    attention::AttentionReason,
    browse::{
        AccountsFilter, BrowseStore, ConversationSummary, ConversationsFilter, FailedSend, MinuteCount,
        OpenGap, ParticipantStay, TranscriptMessage, TranscriptPage, TroubledAccount,
    },
    coverage::{AccountCoverage, Backfill, CoverageStore, FollowedSession, Gap, Stretch},
    inspect::{ClockReading, Connections, Inspection, SchemaVersion, inspect},
    leases::{Cluster, ClusterStore, LeaseStore, Leases},
    quarantine::{QuarantineEntry, QuarantineFilter, QuarantineStore, QuarantinedPayload},
    reading::{
        ArchivedAccount, ArchivedMessage, ChainRange, ChainedMessage, ConversationDetails, DayCount,
        ExportOrder, Head, Page, Place, ReadingStore, Stay,
    },
    retention::{
        Batch, Due, Hold, KeptByHold, NewHold, Policy, PurgeBatch, RetainedAccount, RetentionStore, Signer,
        Stage,
    },
    secrets::{Resealed, SealedSecret, SecretStore},
};

/// What a store could not do, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL names no database this program speaks.
    #[error("database.url {url:?} is not understood: {problem}")]
    Url {
        /// The URL, without its password.
        url: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The database could not be opened when the program began.
    #[error("the database {database} can't be opened: {advice}")]
    CannotOpen {
        /// Which, without secrets.
        database: String,
        /// What to do.
        advice: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The database cannot be reached or opened just now; the same call may succeed later.
    #[error("the database does not answer ({operation})")]
    Unavailable {
        /// Which call.
        operation: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// Another program keeps the database to itself; the same call may succeed later.
    #[error(
        "the database is locked by another program, which has a transaction open ({operation}); end that, then try again"
    )]
    Locked {
        /// Which call.
        operation: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The database answered and refused.
    #[error("the database refused {operation}")]
    Refused {
        /// Which call.
        operation: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// Migrations do not fit this program.
    #[error("the database schema does not fit this program: {problem}")]
    Schema {
        /// What and what to do.
        problem: String,
    },
    /// Another server runs on this SQLite file, or goes by this node's name on this PostgreSQL.
    #[error("{0}")]
    InUse(String),
    /// There is such a row already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The account is no longer held under the epoch that the caller presented (G10).
    #[error("account {0} is held by another node")]
    Fenced(AccountId),
    /// The writer has stopped: because the program is ending, or as [`HistoryStore::broken`] tells.
    #[error("the store is closing")]
    Closing,
}

impl StoreError {
    /// A server's log has it already: its store says once that the database takes nothing, and everybody who writes gets
    /// this error until it does. Trouble with single rows concerns only those who need them.
    pub fn is_told_by_store(&self) -> bool {
        match self {
            Self::Unavailable { source, .. } | Self::Locked { source, .. } => {
                !trouble::is_of_single_rows(source)
            }
            _ => false,
        }
    }
}

/// All that a dialect implements.
pub trait Store:
    AccountStore
    + ArchiveStore
    + BrowseStore
    + CoverageStore
    + QuarantineStore
    + OutboxStore
    + HistoryStore
    + ReadingStore
    + RetentionStore
    + LeaseStore
    + SecretStore
{
}
impl<T> Store for T where
    T: AccountStore
        + ArchiveStore
        + BrowseStore
        + CoverageStore
        + QuarantineStore
        + OutboxStore
        + HistoryStore
        + ReadingStore
        + RetentionStore
        + LeaseStore
        + SecretStore
{
}

/// How to open a database.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// `database.url`.
    pub url: String,
    /// `database.max_connections`: readers; the writer has its own.
    pub max_connections: u32,
    /// `database.commit_interval_ms`: how long the writer waits for company before it commits.
    pub commit_interval: Duration,
    /// `archive.full_text`: keep the full-text index.
    pub full_text: bool,
    /// `cluster.node_id`: the server's name in `nodes`.
    pub node: String,
    /// `cluster.lease_ttl_s`.
    pub lease_ttl: Duration,
    /// What the archive's rules depend on.
    pub rules: RuleSettings,
}

/// Whether the caller is the server, which alone may hold the database for writing the archive, or a tool beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `run`, `demo`: takes the single-server lock of SQLite.
    Server,
    /// Every other command.
    Tool,
}

/// Opens the database that `settings.url` names, creates it if it is a SQLite file that does not exist, and brings its
/// schema up to date.
///
/// # Errors
/// [`StoreError::Url`] for a database that this program does not speak, [`StoreError::Schema`] for one that a newer program has
/// migrated, [`StoreError::InUse`] if another server runs on it (PostgreSQL: one of the same name), [`StoreError::CannotOpen`] or [`StoreError::Unavailable`] if it cannot be opened.
pub async fn connect(settings: &StoreSettings, role: Role) -> Result<SharedStore, StoreError> {
    if is_postgres(&settings.url) {
        Ok(Arc::new(postgres::PostgresStore::connect(settings, role).await?))
    } else {
        Ok(Arc::new(sqlite::SqliteStore::connect(settings, role).await?))
    }
}

/// Which dialect a URL is for.
fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres://") || url.starts_with("postgresql://")
}

/// A URL for people.
fn without_password(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(mut parsed) => {
            // Options may hold a password, too.
            parsed.set_query(None);
            // Fails only for URLs that cannot carry a password.
            if parsed.password().is_some() && parsed.set_password(Some("***")).is_err() {
                return "(a URL with a password)".to_owned();
            }
            parsed.to_string()
        }
        // Where it cannot be told apart, nothing is shown that might be one.
        Err(_) if url.contains('@') => "(unreadable)".to_owned(),
        Err(_) => url.to_owned(),
    }
}

/// Brings the schema up to date and does nothing else; what `migrate` does.
///
/// # Errors
/// As [`connect`].
pub async fn migrate(settings: &StoreSettings) -> Result<(), StoreError> {
    connect(settings, Role::Tool).await?.close().await;
    Ok(())
}

// ---------------------------------------------------------------------------------------------- accounts

/// `accounts.auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auth {
    /// The password grant of the web ticket service.
    Password,
    /// The Windows grant, NTLM.
    Ntlm,
    /// The Windows grant, Kerberos.
    Kerberos,
    /// Azure AD bearer tokens.
    Aad,
}

/// What to do with incoming invitations: `relay.invitations`, `accounts.invitations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InvitationPolicy {
    /// Join and archive the conversation.
    Accept,
    /// Refuse for this endpoint only, so that the person's other clients still ring.
    Decline,
    /// Do nothing; the invitation and its text are archived.
    Ignore,
}

impl Auth {
    /// As the column `auth` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::Ntlm => "ntlm",
            Self::Kerberos => "kerberos",
            Self::Aad => "aad",
        }
    }
}

impl InvitationPolicy {
    /// As the column `invitations` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Decline => "decline",
            Self::Ignore => "ignore",
        }
    }
}

/// Where an account's password is.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// `secret_ref`: `env:NAME`, `file:PATH` or `credential:NAME`.
    Reference(String),
    /// `secret_sealed`: sealed with the key of `secrets.key_file`; see [`crate::secrets`].
    Sealed(Vec<u8>),
    /// Nothing yet: the account needs attention.
    Missing,
}

impl std::fmt::Debug for SecretSource {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Reference(_) => "Reference(..)",
            Self::Sealed(_) => "Sealed(..)",
            Self::Missing => "Missing",
        })
    }
}

/// A row of `accounts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Row id.
    pub id: AccountId,
    /// Unique.
    pub sip_uri: SipUri,
    /// What Active Directory takes: `user@ad-domain` or `DOMAIN\user`.
    pub username: String,
    /// How it signs in.
    pub auth: Auth,
    /// Where the password is.
    pub secret: SecretSource,
    /// Name from `me`, once it has signed in.
    pub display_name: Option<String>,
    /// Signed in by a running server.
    pub enabled: bool,
    /// `None`: as `relay.invitations` says.
    pub invitations: Option<InvitationPolicy>,
    /// `None`: as `retention.default_days` says.
    pub retention_days: Option<i64>,
    /// Any change of the row moves it forward.
    pub updated_at: Timestamp,
}

/// What `account add` and `[[accounts]]` give.
#[derive(Debug, Clone)]
pub struct NewAccount {
    /// Unique.
    pub sip_uri: SipUri,
    /// See [`Account::username`].
    pub username: String,
    /// How it signs in.
    pub auth: Auth,
    /// Where the password is.
    pub secret: SecretSource,
    /// `None`: as `relay.invitations` says.
    pub invitations: Option<InvitationPolicy>,
}

/// `account_status.state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccountState {
    /// The actor exists and waits for its turn to sign in.
    Starting,
    /// Looking for the server.
    Discovering,
    /// Challenge, token, application, availability.
    SigningIn,
    /// The event channel is followed.
    Online,
    /// Signed in, but the event channel has not completed a round in time.
    Stalled,
    /// A temporary failure; `detail` says which and when the next attempt is.
    BackingOff,
    /// An operator has to do something; `detail` says what.
    NeedsAttention,
    /// Disabled, or the server is not running.
    Stopped,
}

impl AccountState {
    /// Every state, in the order in which an account meets them.
    pub const ALL: [Self; 8] = [
        Self::Starting,
        Self::Discovering,
        Self::SigningIn,
        Self::Online,
        Self::Stalled,
        Self::BackingOff,
        Self::NeedsAttention,
        Self::Stopped,
    ];

    /// As the column `state` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Discovering => "discovering",
            Self::SigningIn => "signing_in",
            Self::Online => "online",
            Self::Stalled => "stalled",
            Self::BackingOff => "backing_off",
            Self::NeedsAttention => "needs_attention",
            Self::Stopped => "stopped",
        }
    }
}

/// A row of `account_overview`.
#[derive(Debug, Clone, Serialize)]
pub struct AccountOverview {
    /// SIP URI.
    pub account: String,
    /// See [`AccountState`]; `stopped` if it never ran.
    pub state: String,
    /// Since when it is in this state.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub since: Option<Timestamp>,
    /// A sentence.
    pub detail: Option<String>,
    /// Messages sent since midnight UTC, by the server's clock.
    pub messages_today: i64,
    /// Rows waiting in the outbox.
    pub queued: i64,
    /// When its event channel last brought something.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub last_event_at: Option<Timestamp>,
    /// Which node holds it.
    pub node_id: Option<String>,
    /// How often it had to be restarted.
    pub restarts: i64,
}

/// Accounts and what they are doing. Rows of removed accounts stay for the archive's sake and are not listed.
#[async_trait]
pub trait AccountStore: Send + Sync {
    /// All accounts that are not removed, by URI. Users write the table too: of a row that cannot be read any more, what
    /// was read last is given, except whether it is enabled; one that never could is left out, logged once, and needs
    /// attention in [`AccountStore::account_overview`].
    async fn accounts(&self) -> Result<Vec<Account>, StoreError>;
    /// One account, if there is one that is not removed; an error if its row cannot be read.
    async fn account(&self, sip_uri: &SipUri) -> Result<Option<Account>, StoreError>;
    /// Adds an account (or revives a removed one under its old id). [`StoreError::AlreadyExists`] if it is there.
    async fn add_account(&self, account: &NewAccount) -> Result<AccountId, StoreError>;
    /// Merges an account declared in the configuration file: adds it, or changes what differs.
    async fn declare_account(&self, account: &NewAccount) -> Result<AccountId, StoreError>;
    /// Replaces the password.
    async fn set_secret(&self, account: AccountId, secret: &SecretSource) -> Result<(), StoreError>;
    /// Signs in or out for good.
    async fn set_enabled(&self, account: AccountId, enabled: bool) -> Result<(), StoreError>;
    /// Takes the account out of service and forgets its password; its archive stays.
    async fn remove_account(&self, account: AccountId) -> Result<(), StoreError>;
    /// Notes the name that `me` gave.
    async fn set_display_name(&self, account: AccountId, name: &str) -> Result<(), StoreError>;
    /// Publishes what an account is doing in `account_status`.
    async fn record_state(
        &self,
        account: AccountId,
        state: AccountState,
        detail: Option<&str>,
        node: &str,
    ) -> Result<(), StoreError>;
    /// Counts a restart in `account_status.restarts`.
    async fn record_restart(&self, account: AccountId) -> Result<(), StoreError>;
    /// `account_overview`, by URI; `account` narrows it to one. Rows that cannot be read are there too, with what to do.
    async fn account_overview(&self, account: Option<&SipUri>) -> Result<Vec<AccountOverview>, StoreError>;
}

// ---------------------------------------------------------------------------------------------- archive

/// A row of `sessions`: one UCWA application of one account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Row id.
    pub id: SessionId,
    /// Absolute address of the application.
    pub application_href: String,
    /// The account's lasting endpoint id.
    pub endpoint_id: String,
    /// Absolute address to ask next; `None` before the first answer.
    pub event_cursor: Option<String>,
}

/// Answer to an [`ArchiveCommit`], given after the transaction is durable.
#[derive(Debug, Clone, Default)]
pub struct CommitOutcome {
    /// What events only linked and must now be fetched, most urgent first.
    pub fetches: Vec<Fetch>,
    /// Outbox rows whose outcome these facts settled, so that whoever waits for them can go on.
    pub settled: Vec<SettledSend>,
}

/// An outbox row whose outcome became known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledSend {
    /// The row.
    pub outbox: OutboxId,
    /// Id of the attempt.
    pub operation_id: OperationId,
    /// The row's new state.
    pub state: OutboxState,
    /// Why, if it failed.
    pub reason: Option<FailureReason>,
}

/// A conversation of a session that has not ended, for an account that takes up its work again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenConversation {
    /// Row id.
    pub id: ConversationId,
    /// Identity within the application.
    pub href: String,
    /// The one remote party, where there is just one.
    pub remote_uri: Option<String>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// For going on with the thread.
    pub thread_id: Option<String>,
    /// The group for which something was last said in it, in the spelling of `outbox.destination`.
    pub group: Option<String>,
}

/// What is known of a conversation, open or over, for going on with it in another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownConversation {
    /// The one remote party, where there was just one.
    pub remote_uri: Option<String>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// For going on with the thread.
    pub thread_id: Option<String>,
    /// As it was.
    pub subject: Option<String>,
}

/// Somebody else's stay in a conversation, as far as events told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownStay {
    /// Who; `None` where nobody said.
    pub uri: Option<String>,
    /// They have not left.
    pub present: bool,
    /// Who it is is being asked for.
    pub being_read: bool,
}

/// The archive and the event-channel cursor.
#[async_trait]
pub trait ArchiveStore: Send + Sync {
    /// The lasting endpoint id of an account, made at the first call.
    async fn endpoint_id(&self, account: AccountId) -> Result<String, StoreError>;
    /// The session that has not ended, if there is one.
    async fn open_session(&self, account: AccountId) -> Result<Option<Session>, StoreError>;
    /// Opens a session for an application that was just created. A session that is still open is ended first with
    /// `reason_for_previous`, which closes its conversations and stays and records a gap.
    async fn begin_session(
        &self,
        account: AccountId,
        application_href: &str,
        event_cursor: &str,
        reason_for_previous: &str,
    ) -> Result<Session, StoreError>;
    /// The event stream can no longer tell what became of this account's rows in state `sending`, in words: they become
    /// `uncertain`, or `queued` once more where `outbox.uncertain` says so. Returns how many.
    async fn abandon_sends(&self, account: AccountId, why: &str) -> Result<u64, StoreError>;
    /// Ends a session with a reason in words, its open conversations and stays with it.
    async fn end_session(
        &self,
        account: AccountId,
        session: SessionId,
        reason: &str,
    ) -> Result<(), StoreError>;
    /// Notes that the event channels of these sessions are being followed right now, in one statement.
    async fn record_followed(&self, sessions: &[SessionId], at: Timestamp) -> Result<(), StoreError>;
    /// Records that the channel was not followed since the session was last followed until `to`, with the reason.
    async fn record_gap(
        &self,
        account: AccountId,
        session: SessionId,
        to: Timestamp,
        reason: &str,
    ) -> Result<(), StoreError>;
    /// Stores a response with `resume`: the server lost track of what was followed, and its application lives on. One
    /// transaction records the stretch since `followed_until` as a gap, ends the session's open conversations and stays,
    /// stores facts and cursor as [`ArchiveStore::commit`] does, and gives up sends as [`ArchiveStore::abandon_sends`]
    /// does. `asked` is the cursor to which this was the answer, by which a response that is stored again is told: that
    /// changes nothing.
    async fn resume(
        &self,
        commit: ArchiveCommit,
        asked: &str,
        followed_until: Timestamp,
        why: &str,
    ) -> Result<CommitOutcome, StoreError>;
    /// Stores facts and cursor in one transaction. Applying the same commit again changes nothing (G2).
    async fn commit(&self, commit: ArchiveCommit) -> Result<CommitOutcome, StoreError>;
    /// What a session still has to fetch, for an account that takes up its work again: linked resources, and incoming
    /// invitations of the last minute that were not answered.
    async fn unfetched(&self, account: AccountId, session: SessionId) -> Result<Vec<Fetch>, StoreError>;
    /// Conversations of a session that have not ended.
    async fn open_conversations(
        &self,
        account: AccountId,
        session: SessionId,
    ) -> Result<Vec<OpenConversation>, StoreError>;
    /// The stays of the other people in a conversation of a session, named by its address in the application.
    async fn known_stays(
        &self,
        account: AccountId,
        session: SessionId,
        conversation_href: &str,
    ) -> Result<Vec<KnownStay>, StoreError>;
    /// A conversation of an account, if there is one with this id.
    async fn conversation(
        &self,
        account: AccountId,
        conversation: ConversationId,
    ) -> Result<Option<KnownConversation>, StoreError>;
    /// Settles messages that have waited long enough for their repetition or receipt; the server's writer does so by
    /// itself every few seconds.
    async fn settle_overdue(&self, now: Timestamp) -> Result<(), StoreError>;
    /// Puts a payload into `event_quarantine` outside any batch.
    async fn quarantine(
        &self,
        account: AccountId,
        session: Option<SessionId>,
        reason: &str,
        payload: &str,
    ) -> Result<(), StoreError>;
}

// ---------------------------------------------------------------------------------------------- outbox

/// `outbox.state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutboxState {
    /// Waits for its turn.
    Queued,
    /// Left alone until a user sets it to `queued`.
    Held,
    /// An attempt is under way; its operation id is committed.
    Sending,
    /// Accepted by the server.
    Sent,
    /// The server reported success.
    Delivered,
    /// Will not be sent; `last_error` says why.
    Failed,
    /// Its `expires_at` passed first.
    Expired,
    /// A user withdrew it.
    Cancelled,
    /// Nobody can tell whether the server took it.
    Uncertain,
}

impl OutboxState {
    /// Every state, in the order in which a row meets them.
    pub const ALL: [Self; 9] = [
        Self::Queued,
        Self::Held,
        Self::Sending,
        Self::Sent,
        Self::Delivered,
        Self::Failed,
        Self::Expired,
        Self::Cancelled,
        Self::Uncertain,
    ];

    /// As the column `state` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Held => "held",
            Self::Sending => "sending",
            Self::Sent => "sent",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Uncertain => "uncertain",
        }
    }

    /// Nothing more happens by itself, except that `sent` may become `delivered` or `failed`.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Held | Self::Sending)
    }
}

/// What one attempt sends: a row that was admitted, claimed, and whose fresh operation id is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedSend {
    /// The row.
    pub outbox: OutboxId,
    /// The sending account.
    pub account: AccountId,
    /// Rows with the same one leave in order.
    pub destination: String,
    /// Committed before this is handed out.
    pub operation_id: OperationId,
    /// Normalised recipients, in the order given; empty if `conversation` is given without recipients.
    pub recipients: Vec<SipUri>,
    /// `conversation_id`, if the user gave it, with its href if it is open in the current session.
    pub conversation: Option<(ConversationId, Option<String>)>,
    /// As given.
    pub body: String,
    /// `text/plain` or `text/html`.
    pub content_type: String,
    /// As given.
    pub subject: Option<String>,
    /// `Normal`, `Urgent`, `Emergency`.
    pub importance: String,
    /// As given.
    pub thread_id: Option<String>,
    /// This attempt's number, from 1.
    pub attempt: i64,
    /// The row's own limit or the configured one.
    pub max_attempts: i64,
    /// No attempt may start at or after this.
    pub expires_at: Option<Timestamp>,
    /// When the row was inserted, for `ucwa_relay_outbox_latency_seconds`.
    pub created_at: Timestamp,
    /// It was sent before this attempt, and may have been taken then.
    pub possible_duplicate: bool,
}

/// A row that was `sending` when the previous process ended: its outcome has to be settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsettledSend {
    /// The attempt, as it was claimed.
    pub send: ClaimedSend,
    /// When it was claimed.
    pub claimed_at: Timestamp,
    /// An event that came since may have been of it and can't be read any more: it was passed over, the server may have
    /// forgotten it, or it only linked an invitation that nobody could read. Silence proves nothing then.
    pub events_missed: bool,
}

/// The reason of the one kind of gap in which the server forgets nothing that it has to tell of our own requests: it
/// waits for the next GET.
pub const NOT_FOLLOWED: &str = "the relay was not following the event channel";

/// What a user puts into the queue.
#[derive(Debug, Clone, Default)]
pub struct NewOutboxRow {
    /// `account`.
    pub account: String,
    /// `recipients`.
    pub recipients: String,
    /// `body`.
    pub body: String,
    /// `content_type`; `None`: the column's default.
    pub content_type: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`; `None`: the column's default.
    pub importance: Option<String>,
    /// `idempotency_key`.
    pub idempotency_key: Option<String>,
}

/// A row of `outbox` for people.
#[derive(Debug, Clone, Serialize)]
pub struct OutboxRow {
    /// `id`.
    pub id: OutboxId,
    /// As given.
    pub account: String,
    /// As given.
    pub recipients: Option<String>,
    /// As given.
    pub body: String,
    /// As given.
    pub content_type: String,
    /// As given.
    pub subject: Option<String>,
    /// As given.
    pub importance: String,
    /// Filled by the service.
    pub conversation_id: Option<ConversationId>,
    /// As given.
    pub thread_id: Option<String>,
    /// As given.
    pub priority: i64,
    /// As given: no attempt before it.
    pub send_after: Option<String>,
    /// As given: no attempt from it on.
    pub expires_at: Option<String>,
    /// As given; none: as `outbox.max_attempts` says.
    pub max_attempts: Option<i64>,
    /// As given.
    pub idempotency_key: Option<String>,
    /// As given.
    pub correlation: Option<String>,
    /// See [`OutboxState`].
    pub state: OutboxState,
    /// Attempts begun.
    pub attempts: i64,
    /// Earliest next attempt.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub next_attempt_at: Option<Timestamp>,
    /// Of the last attempt.
    pub operation_id: Option<OperationId>,
    /// Its row in `messages`.
    pub message_id: Option<MessageId>,
    /// UCWA's word.
    pub last_code: Option<String>,
    /// UCWA's word.
    pub last_subcode: Option<String>,
    /// A sentence.
    pub last_error: Option<String>,
    /// It was sent again though the server may have taken it before.
    pub possible_duplicate: bool,
    /// When it was inserted.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub created_at: Timestamp,
    /// When the server accepted it.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub sent_at: Option<Timestamp>,
    /// When it came to its final state.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub finished_at: Option<Timestamp>,
}

/// A row of `outbox_attempts`.
#[derive(Debug, Clone, Serialize)]
pub struct OutboxAttempt {
    /// From 1.
    pub attempt: i64,
    /// Which node made it.
    pub node: Option<String>,
    /// When its operation id was committed.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub started_at: Timestamp,
    /// When its outcome was known.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub finished_at: Option<Timestamp>,
    /// The row's state after it.
    pub outcome: Option<String>,
    /// HTTP status of the answer.
    pub http_status: Option<i64>,
    /// UCWA's word.
    pub code: Option<String>,
    /// UCWA's word.
    pub subcode: Option<String>,
    /// A sentence.
    pub detail: Option<String>,
}

/// Which rows of the queue.
#[derive(Debug, Clone, Default)]
pub struct OutboxFilter {
    /// Only of this account.
    pub account: Option<SipUri>,
    /// Only in this state.
    pub state: Option<OutboxState>,
    /// Only older ones.
    pub before: Option<OutboxId>,
    /// At most so many, newest first.
    pub limit: i64,
}

/// Rows of one destination, of one age, for [`OutboxStore::outbox_shape`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeCell {
    /// The sending account; as its user spelled it, if nobody has looked at the rows yet.
    pub account: String,
    /// Whom they go to: an address, several joined by `;`, or `conversation:ID`.
    pub destination: String,
    /// How many of the given times they are older than.
    pub age: usize,
    /// How many they are.
    pub count: i64,
}

/// How claims and retries behave; the configuration's section `outbox`.
#[derive(Debug, Clone)]
pub struct ClaimSettings {
    /// Name written to `claimed_by`.
    pub node: String,
    /// `outbox.max_attempts` for rows without their own.
    pub max_attempts: i64,
    /// Longest body accepted, in bytes.
    pub max_body_bytes: usize,
    /// At most so many rows at once.
    pub limit: i64,
    /// Of each account at most so many.
    pub allowances: Allowances,
}

/// How many rows may be claimed of each account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowances {
    /// Of those that `others` does not name.
    pub each: i64,
    /// What differs.
    pub others: Vec<Allowance>,
}

impl Allowances {
    /// As many as there are.
    pub const UNLIMITED: Self = Self { each: i64::MAX, others: Vec::new() };
}

/// How many rows may be claimed of one account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowance {
    /// Whose.
    pub account: AccountId,
    /// At most so many; none: its rows are not even looked for.
    pub rows: i64,
    /// It was claimed less than waited: among rows of one priority, the destinations that follow this one come first.
    pub after: Option<String>,
}

/// The queue.
#[async_trait]
pub trait OutboxStore: Send + Sync {
    /// Returns when rows may be waiting: another process or this one changed the database, or `poll` has passed.
    async fn outbox_changed(&self, poll: Duration);
    /// In one transaction: refuses new rows that can never be sent (`failed`) or are late (`expired`), each with a
    /// sentence; then claims, for every account that is online on this node and every destination that has no attempt
    /// under way, the first due row by `(priority, id)`, and gives it a fresh operation id. A destination whose first
    /// row waits for its next attempt is passed over, so that order holds (G6). Rows beyond the account's allowance stay
    /// `queued`.
    async fn claim_due(
        &self,
        now: Timestamp,
        settings: &ClaimSettings,
    ) -> Result<Vec<ClaimedSend>, StoreError>;
    /// When the earliest row that waits for a time (`send_after`, `next_attempt_at`, `expires_at`) is due.
    async fn next_due(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError>;
    /// Rows of an account that are `sending`, for an account that takes up its work again.
    async fn unsettled_sends(&self, account: AccountId) -> Result<Vec<UnsettledSend>, StoreError>;
    /// Gives a claimed row back unsent, without counting the attempt (the account went offline before the request). One
    /// that was given up meanwhile is given back too: who holds the claim knows that nothing left, so that this attempt
    /// makes it no possible duplicate. A row that names a conversation is looked at anew: that may be over by now, and the
    /// row has its turn among others then.
    async fn release_claim(&self, send: &ClaimedSend) -> Result<(), StoreError>;
    /// Inserts a row as a user would.
    async fn enqueue(&self, row: &NewOutboxRow) -> Result<OutboxId, StoreError>;
    /// Rows for people.
    async fn outbox_rows(&self, filter: &OutboxFilter) -> Result<Vec<OutboxRow>, StoreError>;
    /// One row with its attempts.
    async fn outbox_row(&self, id: OutboxId) -> Result<Option<(OutboxRow, Vec<OutboxAttempt>)>, StoreError>;
    /// A user's change of state: `cancelled` or `held` from `queued` (and `cancelled` from `held`), `queued` from
    /// `held`, `failed`, `expired` or `uncertain`. `Ok(false)` if the row is not in a state that allows it.
    async fn set_outbox_state(&self, id: OutboxId, state: OutboxState) -> Result<bool, StoreError>;
    /// Rows by state, for the overview.
    async fn outbox_counts(&self) -> Result<BTreeMap<String, i64>, StoreError>;
    /// Rows in these states by account, destination and age: `times` divides the ages, youngest first.
    async fn outbox_shape(
        &self,
        states: &[OutboxState],
        times: &[Timestamp],
    ) -> Result<Vec<ShapeCell>, StoreError>;
    /// Removes rows that were `sent`, `delivered`, `failed`, `expired` or `cancelled` before `before`, with their attempts;
    /// the oldest, and at most `limit`, so that nothing else waits long. What was said stays in the archive. Returns how
    /// many.
    async fn purge_outbox(&self, before: Timestamp, limit: i64) -> Result<u64, StoreError>;
}

// ---------------------------------------------------------------------------------------------- history

/// Which messages.
#[derive(Debug, Clone, Default)]
pub struct HistoryFilter {
    /// Only of this account.
    pub account: Option<SipUri>,
    /// Only from or to this person.
    pub with: Option<SipUri>,
    /// Sent at or after.
    pub since: Option<Timestamp>,
    /// Sent before.
    pub until: Option<Timestamp>,
    /// Only rows with a larger id, oldest first (for following).
    pub after: Option<MessageId>,
    /// At most so many; without `after` those that were sent last, in the order in which they were sent.
    pub limit: i64,
}

impl HistoryFilter {
    /// The same in the language that people use.
    pub fn query(&self) -> Query {
        let person = |uri: &SipUri| vec![Person::Address(uri.clone())];
        Query::default()
            .and_if(self.account.as_ref().map(|uri| Condition::Account(person(uri))))
            .and_if(self.with.as_ref().map(|uri| Condition::With(person(uri))))
            .and_if(self.since.map(Condition::After))
            .and_if(self.until.map(Condition::Before))
    }

    /// Which page of it.
    pub fn page(&self) -> Page {
        self.after.map_or(Page::Newest, Page::After)
    }
}

/// A row of `message_history`.
#[derive(Debug, Clone, Serialize)]
pub struct HistoryRow {
    /// `message_id`.
    pub message_id: MessageId,
    /// SIP URI of the account.
    pub account: String,
    /// Server's clock.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub sent_at: Timestamp,
    /// `incoming` or `outgoing`.
    pub direction: Direction,
    /// SIP URI, where known.
    pub sender: Option<String>,
    /// Display name, where known.
    pub sender_name: Option<String>,
    /// SIP URIs joined by `;`.
    pub recipients: Option<String>,
    /// `conversation_id`.
    pub conversation_id: ConversationId,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// Plain text.
    pub body: String,
    /// `pending`, `delivered`, `failed`.
    pub status: String,
    /// `invitation`, `event`, `conversation_log`.
    pub source: String,
    /// When its text was removed by its age.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub purged_at: Option<Timestamp>,
}

impl HistoryRow {
    /// The text for people, who are told where it was removed.
    pub fn shown_body(&self) -> Cow<'_, str> {
        match self.purged_at {
            Some(at) => Cow::Owned(format!("[purged at {}]", crate::archive::text::iso_milliseconds(at))),
            None => Cow::Borrowed(&self.body),
        }
    }
}

/// Who read the archive, and how the store is and ends.
#[async_trait]
pub trait HistoryStore: Send + Sync {
    /// Notes in `access_log` that somebody read message content.
    async fn record_access(
        &self,
        actor: &str,
        action: &str,
        account: Option<&SipUri>,
        query: &str,
    ) -> Result<(), StoreError>;
    /// The database answers.
    async fn ping(&self) -> Result<(), StoreError>;
    /// The database takes what is written: writes down that this server lives, which a tool has nothing to say of.
    async fn takes_writes(&self) -> Result<(), StoreError>;
    /// Why what a server had to write could not be stored last; `None` if it could.
    fn problem(&self) -> Option<String>;
    /// Returns if the store can write no more although nobody closed it: a fault of this program that only a new start
    /// mends. Never returns otherwise.
    async fn broken(&self);
    /// Commits what is under way and closes every connection.
    async fn close(&self);
}

/// A store that any part of the program can hold.
pub type SharedStore = Arc<dyn Store>;
