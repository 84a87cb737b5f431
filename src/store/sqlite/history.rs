//! Who read the archive, and how the store ends.

use async_trait::async_trait;
use jiff::Timestamp;

use super::{SqliteStore, column::time_text};
use crate::{
    identifiers::SipUri,
    store::{HistoryStore, StoreError, trouble::failed},
};

#[async_trait]
impl HistoryStore for SqliteStore {
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
