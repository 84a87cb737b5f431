//! Reading the archive.

use async_trait::async_trait;
use sqlx::{Row, sqlite::SqliteRow};

use super::{
    SqliteStore,
    column::{direction, failed, optional_time_text, time, word},
};
use crate::{
    identifiers::{ConversationId, MessageId, SipUri},
    store::{HistoryFilter, HistoryRow, HistoryStore, StoreError},
};

fn history_row(row: &SqliteRow) -> Result<HistoryRow, sqlx::Error> {
    Ok(HistoryRow {
        message_id: MessageId(row.try_get("message_id")?),
        account: row.try_get("account")?,
        sent_at: time(row, "sent_at")?,
        direction: word(row, "direction", direction)?,
        sender: row.try_get("sender")?,
        sender_name: row.try_get("sender_name")?,
        recipients: row.try_get("recipients")?,
        conversation_id: ConversationId(row.try_get("conversation_id")?),
        thread_id: row.try_get("thread_id")?,
        subject: row.try_get("subject")?,
        body: row.try_get("body")?,
        status: row.try_get("status")?,
        source: row.try_get("source")?,
    })
}

#[async_trait]
impl HistoryStore for SqliteStore {
    async fn history(&self, filter: &HistoryFilter) -> Result<Vec<HistoryRow>, StoreError> {
        let failed = failed("reading history");
        // The ids first, from the tables, so that the view's sub-queries run for the chosen rows only.
        let query = if filter.after.is_some() {
            sqlx::query(
                "SELECT h.* FROM message_history h
                  WHERE h.message_id IN (
                      SELECT m.id FROM messages m
                       WHERE m.id > ?5
                         AND (?1 IS NULL OR m.account_id = (SELECT id FROM accounts WHERE sip_uri = ?1))
                         AND (?2 IS NULL OR m.sender_uri = ?2
                              OR EXISTS (SELECT 1 FROM participants p
                                          WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id
                                            AND p.sip_uri = ?2)
                              OR EXISTS (SELECT 1 FROM invitations i
                                          WHERE i.account_id = m.account_id AND i.conversation_id = m.conversation_id
                                            AND i.to_uri = ?2))
                         AND (?3 IS NULL OR m.sent_at >= ?3)
                         AND (?4 IS NULL OR m.sent_at < ?4)
                       ORDER BY m.id
                       LIMIT ?6)
                  ORDER BY h.message_id",
            )
        } else {
            sqlx::query(
                "SELECT h.* FROM message_history h
                  WHERE h.message_id IN (
                      SELECT m.id FROM messages m
                       WHERE ?5 IS NULL
                         AND (?1 IS NULL OR m.account_id = (SELECT id FROM accounts WHERE sip_uri = ?1))
                         AND (?2 IS NULL OR m.sender_uri = ?2
                              OR EXISTS (SELECT 1 FROM participants p
                                          WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id
                                            AND p.sip_uri = ?2)
                              OR EXISTS (SELECT 1 FROM invitations i
                                          WHERE i.account_id = m.account_id AND i.conversation_id = m.conversation_id
                                            AND i.to_uri = ?2))
                         AND (?3 IS NULL OR m.sent_at >= ?3)
                         AND (?4 IS NULL OR m.sent_at < ?4)
                       ORDER BY m.id DESC
                       LIMIT ?6)
                  ORDER BY h.message_id",
            )
        };
        let rows = query
            .bind(filter.account.as_ref().map(SipUri::as_str))
            .bind(filter.with.as_ref().map(SipUri::as_str))
            .bind(optional_time_text(filter.since))
            .bind(optional_time_text(filter.until))
            .bind(filter.after.map(|id| id.0))
            .bind(filter.limit)
            .fetch_all(&self.readers)
            .await
            .map_err(&failed)?;
        rows.iter().map(|row| history_row(row).map_err(&failed)).collect()
    }

    async fn record_access(
        &self,
        actor: &str,
        action: &str,
        account: Option<&SipUri>,
        query: &str,
    ) -> Result<(), StoreError> {
        let (actor, action) = (actor.to_owned(), action.to_owned());
        let (account, query) = (account.map(ToString::to_string), query.to_owned());
        self.writer
            .run("noting an access", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO access_log (actor, action, account, query) VALUES (?1, ?2, ?3, ?4)",
                    )
                    .bind(actor)
                    .bind(action)
                    .bind(account)
                    .bind(query)
                    .execute(connection)
                    .await
                    .map_err(failed("noting an access"))
                    .map(drop)
                })
            })
            .await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1")
            .execute(&self.readers)
            .await
            .map_err(failed("asking whether it answers"))
            .map(drop)
    }

    async fn close(&self) {
        self.end_service().await;
        self.writer.close().await;
        self.readers.close().await;
        self.unlock();
    }
}
