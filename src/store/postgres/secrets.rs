//! What changing sealed passwords takes of this database.

use async_trait::async_trait;

use super::{PostgresStore, reading::bound};
use crate::store::{StoreError, secrets::Resealable, selection::Statement, trouble::failed};

#[async_trait]
impl Resealable for PostgresStore {
    async fn change_together(
        &self,
        doing: &'static str,
        statements: Vec<Statement>,
    ) -> Result<(), StoreError> {
        self.writer
            .run(doing, false, move |connection| {
                Box::pin(async move {
                    for statement in statements {
                        bound(&statement).execute(&mut *connection).await.map_err(failed(doing))?;
                    }
                    Ok(())
                })
            })
            .await
    }

    async fn nodes_besides(&self, node: &str) -> Result<Vec<String>, StoreError> {
        // A server says so every few seconds; one that has been silent for an hour is gone.
        sqlx::query_scalar(
            "SELECT node_id FROM nodes
              WHERE node_id <> $1 AND stopped_at IS NULL AND heartbeat_at > now() - interval '1 hour'
              ORDER BY node_id",
        )
        .bind(node)
        .fetch_all(&self.readers)
        .await
        .map_err(failed("listing nodes"))
    }
}
