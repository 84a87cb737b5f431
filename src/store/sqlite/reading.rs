//! Reading the archive at length.

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Row, Sqlite, SqlitePool, query::Query as Statement};

use super::{SqliteStore, column::time_text};
use crate::{
    identifiers::{AccountId, ConversationId, MessageId},
    query::{Query, fold},
    store::{
        ArchivedAccount, ArchivedMessage, ChainRange, ChainedMessage, ConversationDetails, DayCount,
        ExportOrder, Head, HistoryRow, Page, ReadingStore, StoreError,
        columns::Columns,
        reading, rows,
        selection::{Dialect, Sql, Value},
        trouble::failed,
    },
};

/// The trigram index answers for this many letters and more.
const INDEXED_LETTERS: usize = 3;

/// SQLite's words.
struct SqliteDialect {
    /// There is a full-text index.
    indexed: bool,
}

impl SqliteDialect {
    /// For what `query` asks; looks for the full-text index only if a text is looked for.
    async fn new(query: &Query, pool: &SqlitePool) -> Result<Self, sqlx::Error> {
        let looks_for_text =
            query.terms.iter().any(|term| matches!(term.condition, crate::query::Condition::Text(_)));
        let indexed = looks_for_text
            && sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'messages_fts')")
                .fetch_one(pool)
                .await?;
        Ok(Self { indexed })
    }
}

impl Dialect for SqliteDialect {
    fn placeholder(&self, number: usize) -> String {
        format!("?{number}")
    }

    fn by_index(&self, index: &str) -> String {
        format!(" INDEXED BY {index}")
    }

    fn has_text(&self, sql: &mut Sql<'_>, text: &str) {
        if self.indexed && fold::folded(text).count() >= INDEXED_LETTERS {
            sql.push("m.id IN (SELECT f.rowid FROM messages_fts f WHERE f.messages_fts MATCH ")
                .bind_text(format!("\"{}\"", text.replace('"', "\"\"")))
                .push(")");
        } else {
            sql.push("m.body GLOB ").bind_text(glob(text));
        }
    }
}

/// A pattern for texts that have this one in them, whatever case and accents.
fn glob(text: &str) -> String {
    let mut pattern = "*".to_owned();
    for c in text.chars() {
        let alike = fold::alike(c);
        match alike.as_slice() {
            ['*' | '?' | '['] => pattern.extend(['[', c, ']']),
            [_] => pattern.push(c),
            _ => {
                pattern.push('[');
                pattern.extend(alike);
                pattern.push(']');
            }
        }
    }
    pattern + "*"
}

/// The statement with its values.
fn statement(sql: Sql<'_>) -> Statement<'static, Sqlite, sqlx::sqlite::SqliteArguments> {
    // Made of literals and placeholders only; what people typed is bound.
    let mut statement = sqlx::query(AssertSqlSafe(sql.text));
    for value in sql.values {
        statement = match value {
            Value::Text(text) => statement.bind(text),
            Value::Integer(number) => statement.bind(number),
            Value::Time(at) => statement.bind(time_text(at)),
        };
    }
    statement
}

/// What a [`ChainedMessage`] is read from; `m` is `messages`, `a` is `accounts`.
const CHAINED: &str = "m.id, m.chain_seq, a.sip_uri, m.conversation_id, m.direction, m.sender_uri, m.sender_name, \
                       m.content_type, m.body, m.body_html, m.sent_at, m.operation_id, m.outbox_id, m.correlation, \
                       m.content_hash, m.chain_hash, m.purged_at";

/// Adds ` IN (...)` with the ids.
fn push_ids(sql: &mut Sql<'_>, ids: &[ConversationId]) {
    sql.push(" IN (");
    for (number, id) in ids.iter().enumerate() {
        sql.push(if number == 0 { "" } else { ", " }).bind_integer(id.0);
    }
    sql.push(")");
}

#[async_trait]
impl ReadingStore for SqliteStore {
    async fn messages(&self, query: &Query, page: Page, limit: i64) -> Result<Vec<HistoryRow>, StoreError> {
        let failed = failed("reading history");
        let dialect = SqliteDialect::new(query, &self.readers).await.map_err(&failed)?;
        // The ids first, from the table, so that the view's sub-queries run for the chosen rows only; and only the
        // conditions that are given, so that each has its index.
        let mut sql = Sql::new(
            &dialect,
            "SELECT h.* FROM message_history h WHERE h.message_id IN (SELECT m.id FROM messages m WHERE TRUE",
        );
        sql.and_fits(query);
        match page {
            Page::Newest => sql.push(" ORDER BY m.id DESC"),
            Page::Before(id) => sql.push(" AND m.id < ").bind_integer(id.0).push(" ORDER BY m.id DESC"),
            Page::After(id) => sql.push(" AND m.id > ").bind_integer(id.0).push(" ORDER BY m.id"),
        };
        sql.push(" LIMIT ").bind_integer(limit).push(") ORDER BY h.message_id");
        let found = statement(sql).fetch_all(&self.readers).await.map_err(&failed)?;
        found.iter().map(|row| rows::history_row(row).map_err(&failed)).collect()
    }

    async fn archived_accounts(&self) -> Result<Vec<ArchivedAccount>, StoreError> {
        let failed = failed("reading which accounts there are");
        sqlx::query("SELECT id, sip_uri FROM accounts ORDER BY sip_uri")
            .fetch_all(&self.readers)
            .await
            .map_err(&failed)?
            .iter()
            .map(|row| {
                Ok(ArchivedAccount {
                    id: AccountId(row.try_get("id")?),
                    uri: row.some_lossy_text("sip_uri")?,
                })
            })
            .collect::<Result<_, sqlx::Error>>()
            .map_err(&failed)
    }

    async fn chain_head(&self, account: AccountId) -> Result<Option<Head>, StoreError> {
        let failed = failed("reading the head of a chain");
        sqlx::query("SELECT seq, hash FROM chain_heads WHERE account_id = ?1")
            .bind(account.0)
            .fetch_optional(&self.readers)
            .await
            .map_err(&failed)?
            .map(|row| Ok(Head { seq: row.try_get("seq")?, hash: row.some_lossy_text("hash")? }))
            .transpose()
            .map_err(&failed)
    }

    async fn chained(
        &self,
        account: AccountId,
        after: i64,
        limit: i64,
    ) -> Result<Vec<ChainedMessage>, StoreError> {
        let failed = failed("reading a chain");
        sqlx::query(AssertSqlSafe(format!(
            "SELECT {CHAINED} FROM messages m JOIN accounts a ON a.id = m.account_id
              WHERE m.account_id = ?1 AND m.chain_seq > ?2
              ORDER BY m.chain_seq LIMIT ?3"
        )))
        .bind(account.0)
        .bind(after)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| reading::chained(row).map_err(&failed))
        .collect()
    }

    async fn unchained(
        &self,
        account: AccountId,
        after: MessageId,
        limit: i64,
    ) -> Result<Vec<MessageId>, StoreError> {
        let failed = failed("looking for messages that are not chained");
        // By the chain's index, which has those without a number at its beginning.
        sqlx::query_scalar(
            "SELECT m.id FROM messages m INDEXED BY messages_chain
              WHERE m.account_id = ?1 AND m.chain_seq IS NULL AND m.awaiting IS NULL AND m.id > ?2
              ORDER BY m.id LIMIT ?3",
        )
        .bind(account.0)
        .bind(after.0)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map(|ids: Vec<i64>| ids.into_iter().map(MessageId).collect())
        .map_err(&failed)
    }

    async fn export_page(
        &self,
        account: AccountId,
        query: &Query,
        range: ChainRange,
        order: &ExportOrder,
        limit: i64,
    ) -> Result<Vec<ArchivedMessage>, StoreError> {
        let failed = failed("reading messages for an export");
        let dialect = SqliteDialect::new(query, &self.readers).await.map_err(&failed)?;
        let mut sql = Sql::new(&dialect, "SELECT ");
        sql.push(CHAINED).push(
            ", h.recipients, h.thread_id, h.subject, m.status, m.code, m.subcode, m.reason, m.failed_recipients,
               m.source, m.archived_at
              FROM messages m JOIN accounts a ON a.id = m.account_id JOIN message_history h ON h.message_id = m.id
             WHERE m.id IN (SELECT m.id FROM messages m",
        );
        // The index that has the order is named, so that a page never sorts all that would fit.
        match order {
            ExportOrder::Chain => {
                sql.by_index("messages_chain")
                    .push(" WHERE m.account_id = ")
                    .bind_integer(account.0)
                    .push(" AND m.chain_seq > ")
                    .bind_integer(range.after)
                    .push(" AND m.chain_seq <= ")
                    .bind_integer(range.to);
            }
            ExportOrder::Conversation(last) => {
                sql.by_index("messages_of_conversation")
                    .push(" WHERE m.account_id = ")
                    .bind_integer(account.0)
                    .push(" AND m.chain_seq > ")
                    .bind_integer(range.after)
                    .push(" AND m.chain_seq <= ")
                    .bind_integer(range.to);
                if let Some((conversation, sent_at, id)) = last {
                    sql.push(" AND (m.conversation_id, m.sent_at, m.id) > (")
                        .bind_integer(conversation.0)
                        .push(", ")
                        .bind_text(sent_at)
                        .push(", ")
                        .bind_integer(id.0)
                        .push(")");
                }
            }
        }
        let by = match order {
            ExportOrder::Chain => " ORDER BY m.chain_seq",
            ExportOrder::Conversation(_) => " ORDER BY m.conversation_id, m.sent_at, m.id",
        };
        sql.and_fits(query).push(by).push(" LIMIT ").bind_integer(limit).push(")").push(by);
        let rows = statement(sql).fetch_all(&self.readers).await.map_err(&failed)?;
        rows.iter().map(|row| reading::archived(row).map_err(&failed)).collect()
    }

    async fn conversation_details(
        &self,
        account: AccountId,
        ids: &[ConversationId],
    ) -> Result<Vec<ConversationDetails>, StoreError> {
        let failed = failed("reading conversations for an export");
        let dialect = SqliteDialect { indexed: false };
        let mut sql = Sql::new(
            &dialect,
            "SELECT c.id, c.thread_id, c.subject, c.importance, c.multiparty, c.started_at, c.ended_at
               FROM conversations c WHERE c.account_id = ",
        );
        sql.bind_integer(account.0).push(" AND c.id");
        push_ids(&mut sql, ids);
        sql.push(" ORDER BY c.id");
        let rows = statement(sql).fetch_all(&self.readers).await.map_err(&failed)?;
        let mut conversations: Vec<ConversationDetails> =
            rows.iter().map(|row| reading::conversation(row).map_err(&failed)).collect::<Result<_, _>>()?;

        let mut sql = Sql::new(
            &dialect,
            "SELECT p.conversation_id, p.sip_uri, p.display_name, p.role, p.is_local, p.joined_at, p.left_at
               FROM participants p INDEXED BY participants_of_conversation WHERE p.account_id = ",
        );
        sql.bind_integer(account.0).push(" AND p.conversation_id");
        push_ids(&mut sql, ids);
        sql.push(" ORDER BY p.conversation_id, p.joined_at IS NULL, p.joined_at, p.id");
        for row in &statement(sql).fetch_all(&self.readers).await.map_err(&failed)? {
            let id = ConversationId(row.try_get("conversation_id").map_err(&failed)?);
            if let Ok(place) = conversations.binary_search_by_key(&id, |conversation| conversation.id) {
                conversations[place].stays.push(reading::stay(row).map_err(&failed)?);
            }
        }
        Ok(conversations)
    }

    async fn day_counts(
        &self,
        account: AccountId,
        query: &Query,
        to: i64,
    ) -> Result<Vec<DayCount>, StoreError> {
        let failed = failed("counting messages by day");
        let dialect = SqliteDialect::new(query, &self.readers).await.map_err(&failed)?;
        let mut sql = Sql::new(
            &dialect,
            "SELECT substr(m.sent_at, 1, 10) AS day,
                    count(*) FILTER (WHERE m.direction = 'incoming') AS incoming,
                    count(*) FILTER (WHERE m.direction = 'outgoing') AS outgoing,
                    count(*) FILTER (WHERE m.direction = 'outgoing' AND m.status = 'failed') AS failed
               FROM messages m INDEXED BY messages_sent WHERE m.account_id = ",
        );
        sql.bind_integer(account.0).push(" AND m.chain_seq <= ").bind_integer(to).and_fits(query);
        sql.push(" GROUP BY 1 ORDER BY 1");
        let rows = statement(sql).fetch_all(&self.readers).await.map_err(&failed)?;
        rows.iter().map(|row| reading::day_count(row).map_err(&failed)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fold_and_escape() {
        assert_eq!(glob("会*["), "*会[*][[]*");
        let pattern = glob("e");
        assert!(pattern.starts_with("*[") && pattern.contains('É'), "{pattern}");
    }
}
