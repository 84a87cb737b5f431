//! What changing sealed passwords takes of this database.

use async_trait::async_trait;

use super::{SqliteStore, reading::prepared};
use crate::store::{StoreError, secrets::Resealable, selection::Statement, trouble::failed};

#[async_trait]
impl Resealable for SqliteStore {
    async fn change_together(
        &self,
        doing: &'static str,
        statements: Vec<Statement>,
    ) -> Result<(), StoreError> {
        self.writer
            .run(doing, false, move |connection| {
                Box::pin(async move {
                    for statement in statements {
                        prepared(statement).execute(&mut *connection).await.map_err(failed(doing))?;
                    }
                    Ok(())
                })
            })
            .await
    }

    /// One server has the file, and its key file with it.
    async fn nodes_besides(&self, _: &str) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }
}
