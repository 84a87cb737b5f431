//! Reading the archive.

use async_trait::async_trait;
use sqlx::{Postgres, QueryBuilder};

use super::{PostgresStore, column::Time};
use crate::{
    identifiers::SipUri,
    store::{HistoryFilter, HistoryRow, HistoryStore, StoreError, rows, trouble::failed},
};

#[async_trait]
impl HistoryStore for PostgresStore {
    async fn history(&self, filter: &HistoryFilter) -> Result<Vec<HistoryRow>, StoreError> {
        let failed = failed("reading history");
        // The ids first, from the table, so that the view's sub-queries run for the chosen rows only; and only the
        // conditions that are given, so that each has its index.
        let mut query = QueryBuilder::<Postgres>::new(
            "SELECT h.* FROM message_history h WHERE h.message_id IN (SELECT m.id FROM messages m WHERE true",
        );
        if let Some(account) = &filter.account {
            query
                .push(" AND m.account_id = (SELECT a.id FROM accounts a WHERE a.sip_uri = ")
                .push_bind(account.to_string())
                .push(")");
        }
        if let Some(with) = &filter.with {
            query
                .push(" AND (m.sender_uri = ")
                .push_bind(with.to_string())
                .push(
                    " OR EXISTS (SELECT 1 FROM participants p
                                  WHERE p.account_id = m.account_id AND p.conversation_id = m.conversation_id
                                    AND p.sip_uri = ",
                )
                .push_bind(with.to_string())
                .push(
                    ") OR EXISTS (SELECT 1 FROM invitations i
                                   WHERE i.account_id = m.account_id AND i.conversation_id = m.conversation_id
                                     AND i.to_uri = ",
                )
                .push_bind(with.to_string())
                .push("))");
        }
        if let Some(since) = filter.since {
            query.push(" AND m.sent_at >= ").push_bind(Time(since));
        }
        if let Some(until) = filter.until {
            query.push(" AND m.sent_at < ").push_bind(Time(until));
        }
        match (filter.after, &filter.account) {
            (Some(after), _) => query.push(" AND m.id > ").push_bind(after.0).push(" ORDER BY m.id"),
            (None, Some(_)) => query.push(" ORDER BY m.sent_at DESC, m.id DESC"),
            (None, None) => query.push(" ORDER BY m.id DESC"),
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
                        "INSERT INTO access_log (actor, action, account, query) VALUES ($1, $2, $3, $4)",
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

    async fn broken(&self) {
        self.writer.broken().await;
    }

    async fn close(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.end().await;
        }
        self.end_service().await;
        self.writer.close().await;
        self.closed.cancel();
        self.readers.close().await;
    }
}
