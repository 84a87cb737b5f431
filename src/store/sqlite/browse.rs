//! Reading page by page.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, QueryBuilder, Row, Sqlite};

use super::{SqliteStore, accounts::COLUMNS, column::time_text};
use crate::{
    identifiers::{ConversationId, MessageId},
    store::{
        AccountOverview, AccountState, AccountsFilter, BrowseStore, ConversationSummary, ConversationsFilter,
        FailedSend, MinuteCount, OpenGap, ParticipantStay, StoreError, TranscriptMessage, TranscriptPage,
        TroubledAccount, browse, columns::Columns, rows, trouble::failed,
    },
};

#[async_trait]
impl BrowseStore for SqliteStore {
    async fn account_counts(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let failed = failed("counting accounts");
        sqlx::query(
            "SELECT coalesce(s.state, 'stopped') AS state, count(*) AS count
               FROM accounts a LEFT JOIN account_status s ON s.account_id = a.id
              WHERE a.removed_at IS NULL
              GROUP BY 1",
        )
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| Ok((row.try_get("state")?, row.try_get("count")?)))
        .collect::<Result<_, sqlx::Error>>()
        .map_err(failed)
    }

    async fn accounts_page(&self, filter: &AccountsFilter) -> Result<Vec<AccountOverview>, StoreError> {
        let failed = failed("reading a page of accounts");
        // The addresses first, so that the view's counts are made for the chosen accounts only.
        sqlx::query(AssertSqlSafe(format!(
            "SELECT v.account, v.state, v.since, v.detail, v.messages_today, v.queued, v.last_event_at, v.node_id,
                    v.restarts, {COLUMNS}
               FROM account_overview v
               JOIN accounts ON sip_uri = v.account
              WHERE v.account IN (
                    SELECT a.sip_uri FROM accounts a LEFT JOIN account_status s ON s.account_id = a.id
                     WHERE a.removed_at IS NULL
                       AND (?1 IS NULL OR a.sip_uri > ?1)
                       AND (?2 IS NULL OR coalesce(s.state, 'stopped') = ?2)
                       AND (?3 IS NULL OR a.sip_uri LIKE ?3 ESCAPE '\\' OR a.display_name LIKE ?3 ESCAPE '\\')
                     ORDER BY a.sip_uri
                     LIMIT ?4)
              ORDER BY v.account"
        )))
        .bind(&filter.after)
        .bind(filter.state.map(AccountState::as_str))
        .bind(filter.text.as_deref().map(browse::like))
        .bind(filter.limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| rows::account_overview(row).map_err(&failed))
        .collect()
    }

    async fn troubled_accounts(&self, limit: i64) -> Result<Vec<TroubledAccount>, StoreError> {
        let failed = failed("looking for accounts in trouble");
        sqlx::query(
            "SELECT a.sip_uri AS account, s.state, s.detail, s.since
               FROM account_status s JOIN accounts a ON a.id = s.account_id
              WHERE s.state IN ('needs_attention', 'stalled', 'backing_off')
                AND a.removed_at IS NULL AND a.enabled = 1
              ORDER BY CASE s.state WHEN 'needs_attention' THEN 0 WHEN 'stalled' THEN 1 ELSE 2 END,
                       s.since DESC, a.sip_uri
              LIMIT ?1",
        )
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| browse::troubled_account(row).map_err(&failed))
        .collect()
    }

    async fn failed_sends(&self, since: Timestamp, limit: i64) -> Result<Vec<FailedSend>, StoreError> {
        let failed = failed("looking for failed rows of the outbox");
        sqlx::query(
            "SELECT o.id, o.account, o.state, o.last_error, o.finished_at
               FROM outbox o INDEXED BY outbox_by_state
              WHERE o.state IN ('failed', 'expired', 'uncertain') AND o.finished_at >= ?1
              ORDER BY o.id DESC
              LIMIT ?2",
        )
        .bind(time_text(since))
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| browse::failed_send(row).map_err(&failed))
        .collect()
    }

    async fn open_gaps(&self, limit: i64) -> Result<Vec<OpenGap>, StoreError> {
        let failed = failed("looking for gaps");
        sqlx::query(
            "SELECT account, from_at, to_at, reason, detail FROM coverage_gaps WHERE backfilled = 0
              ORDER BY to_at DESC, account
              LIMIT ?1",
        )
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| browse::open_gap(row).map_err(&failed))
        .collect()
    }

    async fn oldest_waiting(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let failed = failed("looking for the oldest waiting row of the outbox");
        let row = sqlx::query(
            "SELECT min(o.created_at) AS oldest FROM outbox o
              WHERE o.state = 'queued' AND (o.send_after IS NULL OR o.send_after <= ?1)",
        )
        .bind(time_text(now))
        .fetch_one(&self.readers)
        .await
        .map_err(&failed)?;
        row.optional_user_time("oldest").map_err(failed)
    }

    async fn conversations_page(
        &self,
        filter: &ConversationsFilter,
    ) -> Result<Vec<ConversationSummary>, StoreError> {
        let failed = failed("reading a page of conversations");
        let mut query = QueryBuilder::<Sqlite>::new(
            "SELECT v.* FROM conversation_summary v
              WHERE v.conversation_id IN (SELECT c.id FROM conversations c WHERE 1",
        );
        if let Some(account) = &filter.account {
            query
                .push(" AND c.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = ")
                .push_bind(account.as_str())
                .push(")");
        }
        if let Some(with) = &filter.with {
            query
                .push(
                    " AND c.id IN (SELECT p.conversation_id
                                     FROM accounts a CROSS JOIN participants p INDEXED BY participants_uri
                                       ON p.account_id = a.id AND p.sip_uri = ",
                )
                .push_bind(with.as_str())
                .push(")");
        }
        if let Some(before) = filter.before {
            query.push(" AND c.id < ").push_bind(before.0);
        }
        query
            .push(" ORDER BY c.id DESC LIMIT ")
            .push_bind(filter.limit)
            .push(") ORDER BY v.conversation_id DESC");
        let found = query.build().fetch_all(&self.readers).await.map_err(&failed)?;
        found.iter().map(|row| browse::conversation_summary(row).map_err(&failed)).collect()
    }

    async fn conversation_summary(
        &self,
        id: ConversationId,
    ) -> Result<Option<ConversationSummary>, StoreError> {
        let failed = failed("reading a conversation");
        sqlx::query("SELECT * FROM conversation_summary WHERE conversation_id = ?1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .map_err(&failed)?
            .map(|row| browse::conversation_summary(&row).map_err(&failed))
            .transpose()
    }

    async fn transcript(
        &self,
        conversation: ConversationId,
        page: TranscriptPage,
        limit: i64,
    ) -> Result<Vec<TranscriptMessage>, StoreError> {
        let failed = failed("reading a transcript");
        let mut query = QueryBuilder::<Sqlite>::new(
            "SELECT * FROM (
                 SELECT m.id, m.direction, m.sender_uri, m.sender_name, m.body, m.body_html, m.sent_at, m.status, m.reason,
                        m.source, m.outbox_id, m.purged_at
                   FROM messages m INDEXED BY messages_of_conversation
                  WHERE m.account_id = (SELECT c.account_id FROM conversations c WHERE c.id = ",
        );
        query.push_bind(conversation.0).push(") AND m.conversation_id = ").push_bind(conversation.0);
        let (neighbour, order) = match page {
            TranscriptPage::Newest => (None, "DESC"),
            TranscriptPage::Before(id) => (Some((" < ", id)), "DESC"),
            TranscriptPage::After(id) => (Some((" > ", id)), "ASC"),
            TranscriptPage::From(id) => (Some((" >= ", id)), "ASC"),
        };
        if let Some((comparison, id)) = neighbour {
            query
                .push(" AND (m.sent_at, m.id)")
                .push(comparison)
                .push("(SELECT n.sent_at, n.id FROM messages n WHERE n.id = ")
                .push_bind(id.0)
                .push(")");
        }
        query
            .push(" ORDER BY m.sent_at ")
            .push(order)
            .push(", m.id ")
            .push(order)
            .push(" LIMIT ")
            .push_bind(limit)
            .push(") ORDER BY sent_at, id");
        let found = query.build().fetch_all(&self.readers).await.map_err(&failed)?;
        found.iter().map(|row| browse::transcript_message(row).map_err(&failed)).collect()
    }

    async fn stays(
        &self,
        conversation: ConversationId,
        limit: i64,
    ) -> Result<Vec<ParticipantStay>, StoreError> {
        let failed = failed("reading who took part");
        sqlx::query(
            "SELECT p.sip_uri, p.display_name, p.is_local, p.joined_at, p.left_at
               FROM participants p INDEXED BY participants_of_conversation
              WHERE p.account_id = (SELECT c.account_id FROM conversations c WHERE c.id = ?1)
                AND p.conversation_id = ?1
              ORDER BY p.joined_at IS NULL, p.joined_at, p.id
              LIMIT ?2",
        )
        .bind(conversation.0)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| browse::stay(row).map_err(&failed))
        .collect()
    }

    async fn message_from(&self, id: MessageId) -> Result<Option<(MessageId, Timestamp)>, StoreError> {
        let failed = failed("looking for a message");
        sqlx::query("SELECT id, archived_at FROM messages WHERE id >= ?1 ORDER BY id LIMIT 1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .map_err(&failed)?
            .map(|row| Ok((MessageId(row.integer("id")?), row.user_time("archived_at")?)))
            .transpose()
            .map_err(failed)
    }

    async fn minute_counts(&self, after: MessageId, to: MessageId) -> Result<Vec<MinuteCount>, StoreError> {
        let failed = failed("counting messages by the minute");
        sqlx::query(
            "SELECT unixepoch(substr(sent_at, 1, 16)) / 60 AS minute,
                    count(*) FILTER (WHERE direction = 'incoming') AS incoming,
                    count(*) FILTER (WHERE direction = 'outgoing') AS outgoing
               FROM messages
              WHERE id > ?1 AND id <= ?2 AND sent_at LIKE '____-__-__T__:__:%'
              GROUP BY 1",
        )
        .bind(after.0)
        .bind(to.0)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| browse::minute_count(row).map_err(&failed))
        .collect()
    }
}
