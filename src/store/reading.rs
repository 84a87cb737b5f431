//! Reading the archive at length: pages of what a query fits, and streams for export and verification.
//!
//! Every method gives one page in a fixed order and is called again with the last row's key (never with an offset), so
//! that reading millions of messages takes the memory of a page, and new messages shift nothing.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{HistoryRow, StoreError, columns::Columns};
use crate::{
    archive::chain,
    identifiers::{AccountId, ConversationId, MessageId},
    query::Query,
};

/// Which messages of those that fit, by id: the order in which they were archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// The newest ones.
    Newest,
    /// The newest ones with a smaller id.
    Before(MessageId),
    /// The oldest ones with a larger id.
    After(MessageId),
}

/// An account that has or had an archive: removed ones are there too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedAccount {
    /// Row id.
    pub id: AccountId,
    /// `sip_uri`.
    pub uri: String,
}

/// A row of `chain_heads`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// `seq`: number of the newest chained message.
    pub seq: i64,
    /// `hash`: its `chain_hash`.
    pub hash: String,
}

/// A chained message as its row has it: what is hashed, in the texts that are hashed, and the digests. Texts that are
/// not UTF-8 have U+FFFD in them, so they fit no digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainedMessage {
    /// `id`.
    pub message_id: MessageId,
    /// `chain_seq`.
    pub chain_seq: i64,
    /// `accounts.sip_uri`.
    pub account: String,
    /// `conversation_id`.
    pub conversation_id: ConversationId,
    /// `direction`.
    pub direction: String,
    /// `sender_uri`.
    pub sender_uri: Option<String>,
    /// `sender_name`.
    pub sender_name: Option<String>,
    /// `content_type`.
    pub content_type: String,
    /// `body`.
    pub body: String,
    /// `body_html`.
    pub body_html: Option<String>,
    /// `sent_at`, in UTC with milliseconds and `Z`.
    pub sent_at: String,
    /// `operation_id`.
    pub operation_id: Option<String>,
    /// `outbox_id`.
    pub outbox_id: Option<i64>,
    /// `correlation`.
    pub correlation: Option<String>,
    /// `content_hash`.
    pub content_hash: Option<String>,
    /// `chain_hash`.
    pub chain_hash: Option<String>,
    /// `purged_at`.
    pub purged_at: Option<String>,
}

impl ChainedMessage {
    /// What `content_hash` has to be.
    pub fn computed_hash(&self) -> String {
        chain::digest(&chain::canonical([
            Some(&self.account),
            Some(&self.conversation_id.to_string()),
            Some(&self.direction),
            self.sender_uri.as_deref(),
            self.sender_name.as_deref(),
            Some(&self.content_type),
            Some(&self.body),
            self.body_html.as_deref(),
            Some(&self.sent_at),
            self.operation_id.as_deref(),
            self.outbox_id.map(|id| id.to_string()).as_deref(),
            self.correlation.as_deref(),
        ]))
    }
}

/// A chained message with what else is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArchivedMessage {
    /// The row.
    #[serde(flatten)]
    pub message: ChainedMessage,
    /// SIP URIs joined by `;`.
    pub recipients: Option<String>,
    /// `conversations.thread_id`.
    pub thread_id: Option<String>,
    /// `conversations.subject`.
    pub subject: Option<String>,
    /// `pending`, `delivered`, `failed`.
    pub status: String,
    /// UCWA's word.
    pub code: Option<String>,
    /// UCWA's word.
    pub subcode: Option<String>,
    /// A sentence.
    pub reason: Option<String>,
    /// SIP URIs joined by `;`.
    pub failed_recipients: Option<String>,
    /// `invitation`, `event`, `conversation_log`.
    pub source: String,
    /// When it was archived, by our clock.
    pub archived_at: String,
}

/// Messages of one account by `chain_seq`: larger than `after`, up to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainRange {
    /// Not this one.
    pub after: i64,
    /// This one too.
    pub to: i64,
}

/// In which order messages are exported, and the last one that was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportOrder {
    /// By `chain_seq`; the range's `after` says where to go on.
    Chain,
    /// By conversation, time and id.
    Conversation(Option<(ConversationId, String, MessageId)>),
}

/// A conversation with who took part in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConversationDetails {
    /// `id`.
    pub id: ConversationId,
    /// `thread_id`.
    pub thread_id: Option<String>,
    /// `subject`.
    pub subject: Option<String>,
    /// `importance`.
    pub importance: Option<String>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// `started_at`.
    pub started_at: String,
    /// `ended_at`.
    pub ended_at: Option<String>,
    /// By the time they joined.
    pub stays: Vec<Stay>,
}

/// A row of `participants`: one stay of one person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stay {
    /// `sip_uri`.
    pub sip_uri: Option<String>,
    /// `display_name`.
    pub display_name: Option<String>,
    /// `role`.
    pub role: Option<String>,
    /// `is_local`: the account itself.
    pub is_local: bool,
    /// `joined_at`.
    pub joined_at: Option<String>,
    /// `left_at`.
    pub left_at: Option<String>,
}

/// What one account's archive has of one day (UTC).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DayCount {
    /// `2026-03-01`.
    pub day: String,
    /// Messages that came.
    pub incoming: i64,
    /// Messages that were sent.
    pub outgoing: i64,
    /// Those of the sent ones that failed.
    pub failed: i64,
}

/// Reading at length.
#[async_trait]
pub trait ReadingStore: Send + Sync {
    /// One page of the messages that fit, in ascending order of id.
    async fn messages(&self, query: &Query, page: Page, limit: i64) -> Result<Vec<HistoryRow>, StoreError>;
    /// Every account that has a row, by URI.
    async fn archived_accounts(&self) -> Result<Vec<ArchivedAccount>, StoreError>;
    /// Head of the account's chain as `chain_heads` has it.
    async fn chain_head(&self, account: AccountId) -> Result<Option<Head>, StoreError>;
    /// Chained messages of an account after a number, in the order of the chain.
    async fn chained(
        &self,
        account: AccountId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<ChainedMessage>, StoreError>;
    /// Messages of an account that are settled and yet not chained, with a larger id, in ascending order of id. The
    /// relay itself leaves none.
    async fn unchained(
        &self,
        account: AccountId,
        after: MessageId,
        limit: i64,
    ) -> Result<Vec<MessageId>, StoreError>;
    /// One page of an account's chained messages that fit, for export.
    async fn export_page(
        &self,
        account: AccountId,
        query: &Query,
        range: ChainRange,
        order: &ExportOrder,
        limit: i64,
    ) -> Result<Vec<ArchivedMessage>, StoreError>;
    /// These conversations, by id.
    async fn conversation_details(
        &self,
        account: AccountId,
        ids: &[ConversationId],
    ) -> Result<Vec<ConversationDetails>, StoreError>;
    /// How many messages that fit the account has on each day, up to a number of its chain.
    async fn day_counts(
        &self,
        account: AccountId,
        query: &Query,
        to: i64,
    ) -> Result<Vec<DayCount>, StoreError>;
}

// ------------------------------------------------------------------------------------------------ rows

/// From a row with the columns of `messages` that are hashed, and `sip_uri`.
pub(super) fn chained(row: &impl Columns) -> Result<ChainedMessage, sqlx::Error> {
    Ok(ChainedMessage {
        message_id: MessageId(row.integer("id")?),
        chain_seq: row.integer("chain_seq")?,
        account: row.some_lossy_text("sip_uri")?,
        conversation_id: ConversationId(row.integer("conversation_id")?),
        direction: row.some_lossy_text("direction")?,
        sender_uri: row.lossy_text("sender_uri")?,
        sender_name: row.lossy_text("sender_name")?,
        content_type: row.some_lossy_text("content_type")?,
        body: row.some_lossy_text("body")?,
        body_html: row.lossy_text("body_html")?,
        sent_at: row.shown_time("sent_at")?.unwrap_or_default(),
        operation_id: row.lossy_text("operation_id")?,
        outbox_id: row.optional_integer("outbox_id")?,
        correlation: row.lossy_text("correlation")?,
        content_hash: row.lossy_text("content_hash")?,
        chain_hash: row.lossy_text("chain_hash")?,
        purged_at: row.shown_time("purged_at")?,
    })
}

/// From such a row with the further columns of `messages` and those of `message_history`.
pub(super) fn archived(row: &impl Columns) -> Result<ArchivedMessage, sqlx::Error> {
    Ok(ArchivedMessage {
        message: chained(row)?,
        recipients: row.lossy_text("recipients")?,
        thread_id: row.lossy_text("thread_id")?,
        subject: row.lossy_text("subject")?,
        status: row.some_lossy_text("status")?,
        code: row.lossy_text("code")?,
        subcode: row.lossy_text("subcode")?,
        reason: row.lossy_text("reason")?,
        failed_recipients: row.lossy_text("failed_recipients")?,
        source: row.some_lossy_text("source")?,
        archived_at: row.shown_time("archived_at")?.unwrap_or_default(),
    })
}

/// From a row of `conversations`, without the stays.
pub(super) fn conversation(row: &impl Columns) -> Result<ConversationDetails, sqlx::Error> {
    Ok(ConversationDetails {
        id: ConversationId(row.integer("id")?),
        thread_id: row.lossy_text("thread_id")?,
        subject: row.lossy_text("subject")?,
        importance: row.lossy_text("importance")?,
        multiparty: row.flag("multiparty")?,
        started_at: row.shown_time("started_at")?.unwrap_or_default(),
        ended_at: row.shown_time("ended_at")?,
        stays: Vec::new(),
    })
}

/// From a row of `participants`.
pub(super) fn stay(row: &impl Columns) -> Result<Stay, sqlx::Error> {
    Ok(Stay {
        sip_uri: row.lossy_text("sip_uri")?,
        display_name: row.lossy_text("display_name")?,
        role: row.lossy_text("role")?,
        is_local: row.flag("is_local")?,
        joined_at: row.shown_time("joined_at")?,
        left_at: row.shown_time("left_at")?,
    })
}

/// From a row with the counts of a day.
pub(super) fn day_count(row: &impl Columns) -> Result<DayCount, sqlx::Error> {
    Ok(DayCount {
        day: row.some_lossy_text("day")?,
        incoming: row.integer("incoming")?,
        outgoing: row.integer("outgoing")?,
        failed: row.integer("failed")?,
    })
}
