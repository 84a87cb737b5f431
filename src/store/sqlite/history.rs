//! Reading the archive.

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{QueryBuilder, Sqlite};

use super::{SqliteStore, column::time_text};
use crate::{
    identifiers::SipUri,
    store::{HistoryFilter, HistoryRow, HistoryStore, StoreError, rows, trouble::failed},
};

fn push_account(query: &mut QueryBuilder<Sqlite>, account: &SipUri) {
    query.push("(SELECT a.id FROM accounts a WHERE a.sip_uri = ").push_bind(account.to_string()).push(")");
}

/// Adds that a message is from this person, or in a conversation that the person took part in or was invited to. The
/// other way round, to look at each message's conversation, would read all messages for a person seldom heard of.
fn push_with(query: &mut QueryBuilder<Sqlite>, with: &SipUri, account: Option<&SipUri>) {
    let mut which = |select: &str, column: &str, alias: &str| {
        query.push(select).push(column).push(" = ").push_bind(with.to_string());
        if let Some(account) = account {
            query.push(format!(" AND {alias}.account_id = "));
            push_account(query, account);
        }
    };
    which(" AND m.id IN (SELECT s.id FROM messages s INDEXED BY messages_sender WHERE ", "s.sender_uri", "s");
    which(
        " UNION SELECT s.id FROM participants p INDEXED BY participants_uri
                  CROSS JOIN messages s ON s.account_id = p.account_id AND s.conversation_id = p.conversation_id WHERE ",
        "p.sip_uri",
        "p",
    );
    which(
        " UNION SELECT s.id FROM invitations i INDEXED BY invitations_to
                  CROSS JOIN messages s ON s.account_id = i.account_id AND s.conversation_id = i.conversation_id WHERE ",
        "i.to_uri",
        "i",
    );
    query.push(")");
}

#[async_trait]
impl HistoryStore for SqliteStore {
    async fn history(&self, filter: &HistoryFilter) -> Result<Vec<HistoryRow>, StoreError> {
        let failed = failed("reading history");
        // The ids first, from the table, so that the view's sub-queries run for the chosen rows only; and only the
        // conditions that are given, so that each has its index.
        let mut query = QueryBuilder::<Sqlite>::new(
            "SELECT h.* FROM message_history h WHERE h.message_id IN (SELECT m.id FROM messages m WHERE 1",
        );
        if let Some(account) = &filter.account {
            query.push(" AND m.account_id = ");
            push_account(&mut query, account);
        }
        if let Some(with) = &filter.with {
            push_with(&mut query, with, filter.account.as_ref());
        }
        if let Some(since) = filter.since {
            query.push(" AND m.sent_at >= ").push_bind(time_text(since));
        }
        if let Some(until) = filter.until {
            query.push(" AND m.sent_at < ").push_bind(time_text(until));
        }
        let is_narrowed = filter.account.is_some()
            || filter.with.is_some()
            || filter.since.is_some()
            || filter.until.is_some();
        match filter.after {
            Some(after) => query.push(" AND m.id > ").push_bind(after.0).push(" ORDER BY m.id"),
            None if is_narrowed => query.push(" ORDER BY m.sent_at DESC, m.id DESC"),
            None => query.push(" ORDER BY m.id DESC"),
        };
        query.push(" LIMIT ").push_bind(filter.limit).push(") ORDER BY h.message_id");
        let found = query.build().fetch_all(&self.readers).await.map_err(&failed)?;
        found.iter().map(|row| rows::history_row(row).map_err(&failed)).collect()
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

    async fn takes_writes(&self) -> Result<(), StoreError> {
        let Some(node) = self.server.as_ref().map(|server| server.node.clone()) else { return Ok(()) };
        self.writer
            .run("writing that the server lives", false, move |connection| {
                Box::pin(async move {
                    sqlx::query("UPDATE nodes SET heartbeat_at = ?2 WHERE node_id = ?1")
                        .bind(node)
                        .bind(time_text(Timestamp::now()))
                        .execute(connection)
                        .await
                        .map_err(failed("writing that the server lives"))
                        .map(drop)
                })
            })
            .await
    }

    fn problem(&self) -> Option<String> {
        self.writer.problem()
    }

    async fn broken(&self) {
        self.writer.broken().await;
    }

    async fn close(&self) {
        self.end_service().await;
        self.writer.close().await;
        self.readers.close().await;
        self.unlock();
    }
}
