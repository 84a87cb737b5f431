//! Reading page by page, for people who look around: accounts, conversations and their transcripts, searches, and what
//! an overview says.
//!
//! Every page is found by the key of its neighbour, never by an offset: the thousandth page costs what the first does,
//! and rows that come meanwhile shift nothing. As [`super::reading`] it is written once for all databases.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    AccountOverview, AccountState, OutboxState, StoreError,
    columns::Columns,
    reading::Readable,
    rows::{self, direction},
    selection::{Dialect, Sql, Value},
    trouble::failed,
};
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

// ------------------------------------------------------------------------------------------------ statements

/// All rows of a statement, each as what it stands for.
async fn read<S: Readable, T>(
    store: &S,
    sql: Sql<'_>,
    doing: &'static str,
    row: impl Fn(&S::Row) -> Result<T, sqlx::Error>,
) -> Result<Vec<T>, StoreError> {
    let failed = failed(doing);
    let found = store.select(sql.finish()).await.map_err(&failed)?;
    found.iter().map(|found| row(found).map_err(&failed)).collect()
}

/// The words of the database; no text is looked for here.
async fn words<S: Readable>(store: &S, doing: &'static str) -> Result<Box<dyn Dialect>, StoreError> {
    store.dialect(false).await.map_err(failed(doing))
}

#[async_trait]
impl<S: Readable> BrowseStore for S {
    async fn account_counts(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let doing = "counting accounts";
        let dialect = words(self, doing).await?;
        let sql = Sql::new(
            &*dialect,
            "SELECT coalesce(s.state, 'stopped') AS state, count(*) AS count
               FROM accounts a LEFT JOIN account_status s ON s.account_id = a.id
              WHERE a.removed_at IS NULL
              GROUP BY 1",
        );
        let counts = read(self, sql, doing, |row| Ok((row.some_lossy_text("state")?, row.integer("count")?)));
        Ok(counts.await?.into_iter().collect())
    }

    async fn accounts_page(&self, filter: &AccountsFilter) -> Result<Vec<AccountOverview>, StoreError> {
        let doing = "reading a page of accounts";
        let dialect = words(self, doing).await?;
        // The addresses first, so that the view's counts are made for the chosen accounts only.
        let mut sql = Sql::new(
            &*dialect,
            "SELECT v.account, v.state, v.since, v.detail, v.messages_today, v.queued, v.last_event_at, v.node_id,
                    v.restarts, ",
        );
        sql.push(rows::ACCOUNT_COLUMNS).push(
            "
               FROM account_overview v
               JOIN accounts ON sip_uri = v.account
              WHERE v.account IN (
                    SELECT a.sip_uri FROM accounts a LEFT JOIN account_status s ON s.account_id = a.id
                     WHERE a.removed_at IS NULL",
        );
        let order = dialect.by_code_points();
        if let Some(after) = &filter.after {
            sql.push(" AND a.sip_uri").push(order).push(" > ").bind_text(after);
        }
        if let Some(state) = filter.state {
            sql.push(" AND coalesce(s.state, 'stopped') = ").bind_text(state.as_str());
        }
        if let Some(text) = &filter.text {
            let pattern = like(text);
            sql.push(" AND (a.sip_uri").push(dialect.is_like()).bind_text(pattern.as_str());
            sql.push(" ESCAPE '\\' OR a.display_name").push(dialect.is_like()).bind_text(pattern);
            sql.push(" ESCAPE '\\')");
        }
        sql.push(" ORDER BY a.sip_uri")
            .push(order)
            .push(" LIMIT ")
            .bind_integer(filter.limit)
            .push(") ORDER BY v.account")
            .push(order);
        read(self, sql, doing, rows::account_overview).await
    }

    async fn troubled_accounts(&self, limit: i64) -> Result<Vec<TroubledAccount>, StoreError> {
        let doing = "looking for accounts in trouble";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT a.sip_uri AS account, s.state, s.detail, s.since
               FROM account_status s JOIN accounts a ON a.id = s.account_id
              WHERE s.state IN ('needs_attention', 'stalled', 'backing_off')
                AND a.removed_at IS NULL AND a.enabled
              ORDER BY CASE s.state WHEN 'needs_attention' THEN 0 WHEN 'stalled' THEN 1 ELSE 2 END,
                       s.since DESC, a.sip_uri
              LIMIT ",
        );
        sql.bind_integer(limit);
        read(self, sql, doing, troubled_account).await
    }

    async fn failed_sends(&self, since: Timestamp, limit: i64) -> Result<Vec<FailedSend>, StoreError> {
        let doing = "looking for failed rows of the outbox";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT o.id, o.account, o.state, o.last_error, o.finished_at
               FROM outbox o",
        );
        sql.by_index("outbox_by_state")
            .push(" WHERE o.state IN ('failed', 'expired', 'uncertain') AND o.finished_at >= ")
            .bind(Value::Time(since))
            .push(" ORDER BY o.id DESC LIMIT ")
            .bind_integer(limit);
        read(self, sql, doing, failed_send).await
    }

    async fn open_gaps(&self, limit: i64) -> Result<Vec<OpenGap>, StoreError> {
        let doing = "looking for gaps";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT account, from_at, to_at, reason, detail FROM coverage_gaps WHERE NOT backfilled
              ORDER BY to_at DESC, account
              LIMIT ",
        );
        sql.bind_integer(limit);
        read(self, sql, doing, open_gap).await
    }

    async fn oldest_waiting(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let doing = "looking for the oldest waiting row of the outbox";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT min(o.created_at) AS oldest FROM outbox o
              WHERE o.state = 'queued' AND (o.send_after IS NULL OR o.send_after <= ",
        );
        sql.bind(Value::Time(now)).push(")");
        let oldest = read(self, sql, doing, |row| row.optional_user_time("oldest")).await?;
        Ok(oldest.into_iter().flatten().next())
    }

    async fn conversations_page(
        &self,
        filter: &ConversationsFilter,
    ) -> Result<Vec<ConversationSummary>, StoreError> {
        let doing = "reading a page of conversations";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT v.* FROM conversation_summary v
              WHERE v.conversation_id IN (SELECT c.id FROM conversations c WHERE TRUE",
        );
        if let Some(account) = &filter.account {
            sql.push(" AND c.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = ")
                .bind_text(account.as_str())
                .push(")");
        }
        if let Some(with) = &filter.with {
            sql.push(" AND c.id IN (SELECT p.conversation_id FROM accounts a")
                .push(dialect.join_to_each())
                .push("participants p")
                .by_index("participants_uri")
                .push(" ON p.account_id = a.id AND p.sip_uri = ")
                .bind_text(with.as_str())
                .push(")");
        }
        if let Some(before) = filter.before {
            sql.push(" AND c.id < ").bind_integer(before.0);
        }
        sql.push(" ORDER BY c.id DESC LIMIT ")
            .bind_integer(filter.limit)
            .push(") ORDER BY v.conversation_id DESC");
        read(self, sql, doing, conversation_summary).await
    }

    async fn conversation_summary(
        &self,
        id: ConversationId,
    ) -> Result<Option<ConversationSummary>, StoreError> {
        let doing = "reading a conversation";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(&*dialect, "SELECT * FROM conversation_summary WHERE conversation_id = ");
        sql.bind_integer(id.0);
        Ok(read(self, sql, doing, conversation_summary).await?.pop())
    }

    async fn transcript(
        &self,
        conversation: ConversationId,
        page: TranscriptPage,
        limit: i64,
    ) -> Result<Vec<TranscriptMessage>, StoreError> {
        let doing = "reading a transcript";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT * FROM (
                 SELECT m.id, m.direction, m.sender_uri, m.sender_name, m.body, m.body_html, m.sent_at, m.status, m.reason,
                        m.source, m.outbox_id, m.purged_at
                   FROM messages m",
        );
        sql.by_index("messages_of_conversation")
            .push(" WHERE m.account_id = (SELECT c.account_id FROM conversations c WHERE c.id = ")
            .bind_integer(conversation.0)
            .push(") AND m.conversation_id = ")
            .bind_integer(conversation.0);
        let (neighbour, order) = match page {
            TranscriptPage::Newest => (None, "DESC"),
            TranscriptPage::Before(id) => (Some((" < ", id)), "DESC"),
            TranscriptPage::After(id) => (Some((" > ", id)), "ASC"),
            TranscriptPage::From(id) => (Some((" >= ", id)), "ASC"),
        };
        if let Some((comparison, id)) = neighbour {
            sql.push(" AND (m.sent_at, m.id)")
                .push(comparison)
                .push("(SELECT n.sent_at, n.id FROM messages n WHERE n.id = ")
                .bind_integer(id.0)
                .push(")");
        }
        sql.push(" ORDER BY m.sent_at ")
            .push(order)
            .push(", m.id ")
            .push(order)
            .push(" LIMIT ")
            .bind_integer(limit)
            .push(") page ORDER BY sent_at, id");
        read(self, sql, doing, transcript_message).await
    }

    async fn stays(
        &self,
        conversation: ConversationId,
        limit: i64,
    ) -> Result<Vec<ParticipantStay>, StoreError> {
        let doing = "reading who took part";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(
            &*dialect,
            "SELECT p.sip_uri, p.display_name, p.is_local, p.joined_at, p.left_at
               FROM participants p",
        );
        sql.by_index("participants_of_conversation")
            .push(" WHERE p.account_id = (SELECT c.account_id FROM conversations c WHERE c.id = ")
            .bind_integer(conversation.0)
            .push(") AND p.conversation_id = ")
            .bind_integer(conversation.0)
            .push(" ORDER BY p.joined_at IS NULL, p.joined_at, p.id LIMIT ")
            .bind_integer(limit);
        read(self, sql, doing, stay).await
    }

    async fn message_from(&self, id: MessageId) -> Result<Option<(MessageId, Timestamp)>, StoreError> {
        let doing = "looking for a message";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(&*dialect, "SELECT id, archived_at FROM messages WHERE id >= ");
        sql.bind_integer(id.0).push(" ORDER BY id LIMIT 1");
        let found =
            read(self, sql, doing, |row| Ok((MessageId(row.integer("id")?), row.user_time("archived_at")?)));
        Ok(found.await?.pop())
    }

    async fn minute_counts(&self, after: MessageId, to: MessageId) -> Result<Vec<MinuteCount>, StoreError> {
        let doing = "counting messages by the minute";
        let dialect = words(self, doing).await?;
        let mut sql = Sql::new(&*dialect, "SELECT ");
        sql.push(&dialect.minute("sent_at"))
            .push(
                " AS minute,
                    count(*) FILTER (WHERE direction = 'incoming') AS incoming,
                    count(*) FILTER (WHERE direction = 'outgoing') AS outgoing
               FROM messages
              WHERE id > ",
            )
            .bind_integer(after.0)
            .push(" AND id <= ")
            .bind_integer(to.0)
            .push(" AND ")
            .push(&dialect.is_time("sent_at"))
            .push(" GROUP BY 1");
        read(self, sql, doing, minute_count).await
    }
}

// ------------------------------------------------------------------------------------------------ rows

fn conversation_summary(row: &impl Columns) -> Result<ConversationSummary, sqlx::Error> {
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

fn transcript_message(row: &impl Columns) -> Result<TranscriptMessage, sqlx::Error> {
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

fn stay(row: &impl Columns) -> Result<ParticipantStay, sqlx::Error> {
    Ok(ParticipantStay {
        sip_uri: row.lossy_text("sip_uri")?,
        display_name: row.lossy_text("display_name")?,
        is_local: row.flag("is_local")?,
        joined_at: row.optional_user_time("joined_at")?,
        left_at: row.optional_user_time("left_at")?,
    })
}

fn minute_count(row: &impl Columns) -> Result<MinuteCount, sqlx::Error> {
    Ok(MinuteCount {
        minute: row.integer("minute")?,
        incoming: row.integer("incoming")?,
        outgoing: row.integer("outgoing")?,
    })
}

fn troubled_account(row: &impl Columns) -> Result<TroubledAccount, sqlx::Error> {
    Ok(TroubledAccount {
        account: row.some_lossy_text("account")?,
        state: row.some_lossy_text("state")?,
        detail: row.lossy_text("detail")?,
        since: row.optional_user_time("since")?,
    })
}

fn failed_send(row: &impl Columns) -> Result<FailedSend, sqlx::Error> {
    Ok(FailedSend {
        id: OutboxId(row.integer("id")?),
        account: row.some_lossy_text("account")?,
        state: row.word("state", rows::outbox_state)?,
        last_error: row.lossy_text("last_error")?,
        finished_at: row.optional_user_time("finished_at")?,
    })
}

fn open_gap(row: &impl Columns) -> Result<OpenGap, sqlx::Error> {
    Ok(OpenGap {
        account: row.some_lossy_text("account")?,
        from_at: row.user_time("from_at")?,
        to_at: row.user_time("to_at")?,
        reason: row.some_lossy_text("reason")?,
        detail: row.lossy_text("detail")?,
    })
}

/// A pattern for `LIKE ... ESCAPE '\'` that fits whatever has this text in it.
fn like(text: &str) -> String {
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
