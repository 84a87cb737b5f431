//! Sealed passwords.

use async_trait::async_trait;
use sqlx::Row;

use super::PostgresStore;
use crate::{
    identifiers::AccountId,
    store::{Resealed, SealedSecret, SecretStore, StoreError, trouble::failed},
};

#[async_trait]
impl SecretStore for PostgresStore {
    async fn sealed_secrets(&self) -> Result<Vec<SealedSecret>, StoreError> {
        let failed = failed("reading sealed passwords");
        let rows = sqlx::query(
            "SELECT id, sip_uri, secret_sealed FROM accounts WHERE secret_sealed IS NOT NULL ORDER BY id",
        )
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        let read = |row: &sqlx::postgres::PgRow| {
            Ok(SealedSecret {
                account: AccountId(row.try_get("id")?),
                sip_uri: row.try_get("sip_uri")?,
                sealed: row.try_get("secret_sealed")?,
            })
        };
        rows.iter().map(|row| read(row).map_err(&failed)).collect()
    }

    async fn replace_sealed(&self, resealed: &[Resealed]) -> Result<(), StoreError> {
        let resealed = resealed.to_vec();
        self.writer
            .run("resealing passwords", false, move |connection| {
                Box::pin(async move {
                    for Resealed { old, new } in resealed {
                        sqlx::query(
                            "UPDATE accounts SET secret_sealed = $3 WHERE id = $1 AND secret_sealed = $2",
                        )
                        .bind(old.account.0)
                        .bind(old.sealed)
                        .bind(new)
                        .execute(&mut *connection)
                        .await
                        .map_err(failed("resealing passwords"))?;
                    }
                    Ok(())
                })
            })
            .await
    }

    async fn other_nodes(&self, node: &str) -> Result<Vec<String>, StoreError> {
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
