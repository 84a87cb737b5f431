//! What changing sealed passwords takes of this database.

use async_trait::async_trait;

use super::{SqliteStore, reading::bound};
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
                        bound(&statement.text, &statement.values)
                            .execute(&mut *connection)
                            .await
                            .map_err(failed(doing))?;
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
