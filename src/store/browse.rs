//! Reading page by page, for people who look around: accounts, conversations and their transcripts, searches, and what
//! an overview says.
//!
//! Every page is found by the key of its neighbour, never by an offset: the thousandth page costs what the first does,
//! and rows that come meanwhile shift nothing.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;

use super::{AccountOverview, AccountState, OutboxState, StoreError, columns::Columns, rows::direction};
use crate::{
    archive::fact::Direction,
    identifiers::{ConversationId, MessageId, OutboxId, SipUri},
};

/// Which accounts.
#[derive(Debug, Clone, Default)]
pub struct AccountsFilter {
    /// Only those with this in their address or name, whatever its case.
    pub text: Option<String>,
    /// Only those in this state.
    pub state: Option<AccountState>,
    /// Only those whose address sorts after this one.
    pub after: Option<String>,
    /// At most so many, by address.
    pub limit: i64,
}

/// Which conversations.
#[derive(Debug, Clone, Default)]
pub struct ConversationsFilter {
    /// Only of this account.
    pub account: Option<SipUri>,
    /// Only those in which this person took part.
    pub with: Option<SipUri>,
    /// Only older ones.
    pub before: Option<ConversationId>,
    /// At most so many, newest first.
    pub limit: i64,
}

/// A row of `conversation_summary`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConversationSummary {
    /// SIP URI of the account.
    pub account: String,
    /// `conversation_id`.
    pub conversation_id: ConversationId,
    /// SIP URIs joined by `;`.
    pub participants: Option<String>,
    /// Messages archived.
    pub message_count: i64,
    /// When the first one was sent, by the server's clock.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub first_message_at: Option<Timestamp>,
    /// When the last one was sent, by the server's clock.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub last_message_at: Option<Timestamp>,
    /// UCWA's word.
    pub state: Option<String>,
    /// Who began it.
    pub direction: Option<Direction>,
    /// As given.
    pub subject: Option<String>,
    /// When it began.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub ended_at: Option<Timestamp>,
    /// More than two people, or a conference.
    pub multiparty: bool,
    /// Where the talk went on.
    pub continued_in: Option<ConversationId>,
}

/// Which messages of a conversation, by the time at which they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TranscriptPage {
    /// The newest ones.
    Newest,
    /// The newest ones before this message.
    Before(MessageId),
    /// The oldest ones after this message.
    After(MessageId),
    /// This message and the oldest ones after it.
    From(MessageId),
}

/// A message of a transcript.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TranscriptMessage {
    /// `id`.
    pub message_id: MessageId,
    /// `incoming` or `outgoing`.
    pub direction: Direction,
    /// SIP URI, where known.
    pub sender: Option<String>,
    /// Display name, where known.
    pub sender_name: Option<String>,
    /// Plain text.
    pub body: String,
    /// As it came, where it came as HTML: never to be shown as it is.
    pub body_html: Option<String>,
    /// Server's clock.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub sent_at: Timestamp,
    /// `pending`, `delivered`, `failed`.
    pub status: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// `invitation`, `event`, `conversation_log`.
    pub source: String,
    /// The row of `outbox` that it was.
    pub outbox_id: Option<OutboxId>,
    /// Its text was removed at the end of its retention.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub purged_at: Option<Timestamp>,
}

/// Somebody's stay in a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParticipantStay {
    /// SIP URI, where known.
    pub sip_uri: Option<String>,
    /// Display name, where known.
    pub display_name: Option<String>,
    /// It is the account itself.
    pub is_local: bool,
    /// When they came.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub joined_at: Option<Timestamp>,
    /// When they went.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub left_at: Option<Timestamp>,
}

/// How many messages were sent in a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MinuteCount {
    /// Minutes since 1970, by the server's clock.
    pub minute: i64,
    /// From others to accounts.
    pub incoming: i64,
    /// From accounts.
    pub outgoing: i64,
}

/// An account that does not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TroubledAccount {
    /// SIP URI.
    pub account: String,
    /// `needs_attention`, `stalled`, `backing_off`.
    pub state: String,
    /// Why, and what to do.
    pub detail: Option<String>,
    /// Since when.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub since: Option<Timestamp>,
}

/// A row of `outbox` that came to a bad end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailedSend {
    /// `id`.
    pub id: OutboxId,
    /// As given.
    pub account: String,
    /// `failed`, `expired` or `uncertain`.
    pub state: OutboxState,
    /// Why.
    pub last_error: Option<String>,
    /// When.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub finished_at: Option<Timestamp>,
}

/// A stretch in which an account was not followed, and that is not backfilled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenGap {
    /// SIP URI.
    pub account: String,
    /// Its beginning.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub from_at: Timestamp,
    /// Its end.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub to_at: Timestamp,
    /// Why there is one.
    pub reason: String,
    /// Why it can't be backfilled.
    pub detail: Option<String>,
}

/// Looking around.
#[async_trait]
pub trait BrowseStore: Send + Sync {
    /// Accounts that are not removed, by state; who never ran is `stopped`.
    async fn account_counts(&self) -> Result<BTreeMap<String, i64>, StoreError>;
    /// One page of accounts.
    async fn accounts_page(&self, filter: &AccountsFilter) -> Result<Vec<AccountOverview>, StoreError>;
    /// Enabled accounts in `needs_attention`, `stalled` and `backing_off`, in this order, latest first.
    async fn troubled_accounts(&self, limit: i64) -> Result<Vec<TroubledAccount>, StoreError>;
    /// Rows of the outbox that failed, expired or became uncertain at or after `since`, newest first.
    async fn failed_sends(&self, since: Timestamp, limit: i64) -> Result<Vec<FailedSend>, StoreError>;
    /// Gaps that are not backfilled, those that ended last first.
    async fn open_gaps(&self, limit: i64) -> Result<Vec<OpenGap>, StoreError>;
    /// Since when the row waits that has waited longest of those that could go now.
    async fn oldest_waiting(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError>;
    /// One page of conversations.
    async fn conversations_page(
        &self,
        filter: &ConversationsFilter,
    ) -> Result<Vec<ConversationSummary>, StoreError>;
    /// One conversation.
    async fn conversation_summary(
        &self,
        id: ConversationId,
    ) -> Result<Option<ConversationSummary>, StoreError>;
    /// One page of a conversation's messages, in the order in which they were sent.
    async fn transcript(
        &self,
        conversation: ConversationId,
        page: TranscriptPage,
        limit: i64,
    ) -> Result<Vec<TranscriptMessage>, StoreError>;
    /// Who was there when, in the order of coming.
    async fn stays(
        &self,
        conversation: ConversationId,
        limit: i64,
    ) -> Result<Vec<ParticipantStay>, StoreError>;
    /// The first message with this id or a larger one, and when it was archived.
    async fn message_from(&self, id: MessageId) -> Result<Option<(MessageId, Timestamp)>, StoreError>;
    /// Messages by minute, of those with an id larger than `after` and up to `to`.
    async fn minute_counts(&self, after: MessageId, to: MessageId) -> Result<Vec<MinuteCount>, StoreError>;
}

// ------------------------------------------------------------------------------------------------ rows

pub(super) fn conversation_summary(row: &impl Columns) -> Result<ConversationSummary, sqlx::Error> {
    Ok(ConversationSummary {
        account: row.some_lossy_text("account")?,
        conversation_id: ConversationId(row.integer("conversation_id")?),
        participants: row.lossy_text("participants")?,
        message_count: row.integer("message_count")?,
        first_message_at: row.optional_user_time("first_message_at")?,
        last_message_at: row.optional_user_time("last_message_at")?,
        state: row.lossy_text("state")?,
        direction: row.optional_word("direction", direction)?,
        subject: row.lossy_text("subject")?,
        started_at: row.user_time("started_at")?,
        ended_at: row.optional_user_time("ended_at")?,
        multiparty: row.flag("multiparty")?,
        continued_in: row.optional_integer("continued_in")?.map(ConversationId),
    })
}

pub(super) fn transcript_message(row: &impl Columns) -> Result<TranscriptMessage, sqlx::Error> {
    Ok(TranscriptMessage {
        message_id: MessageId(row.integer("id")?),
        direction: row.word("direction", direction)?,
        sender: row.lossy_text("sender_uri")?,
        sender_name: row.lossy_text("sender_name")?,
        body: row.some_lossy_text("body")?,
        body_html: row.lossy_text("body_html")?,
        sent_at: row.user_time("sent_at")?,
        status: row.some_lossy_text("status")?,
        reason: row.lossy_text("reason")?,
        source: row.some_lossy_text("source")?,
        outbox_id: row.optional_integer("outbox_id")?.map(OutboxId),
        purged_at: row.optional_user_time("purged_at")?,
    })
}

pub(super) fn stay(row: &impl Columns) -> Result<ParticipantStay, sqlx::Error> {
    Ok(ParticipantStay {
        sip_uri: row.lossy_text("sip_uri")?,
        display_name: row.lossy_text("display_name")?,
        is_local: row.flag("is_local")?,
        joined_at: row.optional_user_time("joined_at")?,
        left_at: row.optional_user_time("left_at")?,
    })
}

pub(super) fn minute_count(row: &impl Columns) -> Result<MinuteCount, sqlx::Error> {
    Ok(MinuteCount {
        minute: row.integer("minute")?,
        incoming: row.integer("incoming")?,
        outgoing: row.integer("outgoing")?,
    })
}

pub(super) fn troubled_account(row: &impl Columns) -> Result<TroubledAccount, sqlx::Error> {
    Ok(TroubledAccount {
        account: row.some_lossy_text("account")?,
        state: row.some_lossy_text("state")?,
        detail: row.lossy_text("detail")?,
        since: row.optional_user_time("since")?,
    })
}

pub(super) fn failed_send(row: &impl Columns) -> Result<FailedSend, sqlx::Error> {
    Ok(FailedSend {
        id: OutboxId(row.integer("id")?),
        account: row.some_lossy_text("account")?,
        state: row.word("state", super::rows::outbox_state)?,
        last_error: row.lossy_text("last_error")?,
        finished_at: row.optional_user_time("finished_at")?,
    })
}

pub(super) fn open_gap(row: &impl Columns) -> Result<OpenGap, sqlx::Error> {
    Ok(OpenGap {
        account: row.some_lossy_text("account")?,
        from_at: row.user_time("from_at")?,
        to_at: row.user_time("to_at")?,
        reason: row.some_lossy_text("reason")?,
        detail: row.lossy_text("detail")?,
    })
}

/// A pattern for `LIKE ... ESCAPE '\'` that fits whatever has this text in it.
pub(super) fn like(text: &str) -> String {
    let mut pattern = "%".to_owned();
    for c in text.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern + "%"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_take_every_letter_as_itself() {
        assert_eq!(like(r"50%_\"), r"%50\%\_\\%");
    }
}
