//! Sealed passwords as they stand in the database, for whoever changes the key that sealed them. As [`super::browse`] it
//! is written once for all databases.

use async_trait::async_trait;

use super::{
    StoreError,
    columns::Columns as _,
    reading::Readable,
    selection::{Sql, Statement, Value},
    trouble::failed,
};
use crate::identifiers::AccountId;

/// A sealed password of a row of `accounts`, whatever else is in that row.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedSecret {
    /// The row.
    pub account: AccountId,
    /// `sip_uri`, as it stands there.
    pub sip_uri: String,
    /// `secret_sealed`.
    pub sealed: Vec<u8>,
}

impl std::fmt::Debug for SealedSecret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SealedSecret").field("account", &self.account).finish_non_exhaustive()
    }
}

/// A sealed password and what it is to be replaced with.
#[derive(Clone, PartialEq, Eq)]
pub struct Resealed {
    /// As it was read.
    pub old: SealedSecret,
    /// The same password under another key.
    pub new: Vec<u8>,
}

/// Sealed passwords.
#[async_trait]
pub trait SecretStore: Send + Sync {
    /// All there are, also of rows that can't be read otherwise.
    async fn sealed_secrets(&self) -> Result<Vec<SealedSecret>, StoreError>;
    /// Replaces all of these in one transaction, except where another password was set meanwhile.
    async fn replace_sealed(&self, resealed: &[Resealed]) -> Result<(), StoreError>;
    /// Servers, besides the one of this name, that have said lately that they live. None on a database that takes only
    /// one.
    async fn other_nodes(&self, node: &str) -> Result<Vec<String>, StoreError>;
}

// ------------------------------------------------------------------------------------------------ statements

/// What a database has to be able to do for it besides being read.
#[async_trait]
pub(super) trait Resealable: Readable {
    /// Does all of the statements in one transaction, or none.
    async fn change_together(
        &self,
        doing: &'static str,
        statements: Vec<Statement>,
    ) -> Result<(), StoreError>;
    /// As [`SecretStore::other_nodes`].
    async fn nodes_besides(&self, node: &str) -> Result<Vec<String>, StoreError>;
}

#[async_trait]
impl<S: Resealable> SecretStore for S {
    async fn sealed_secrets(&self) -> Result<Vec<SealedSecret>, StoreError> {
        let failed = failed("reading sealed passwords");
        let dialect = self.dialect(false).await.map_err(&failed)?;
        let sql = Sql::new(
            &*dialect,
            "SELECT id, sip_uri, secret_sealed FROM accounts WHERE secret_sealed IS NOT NULL ORDER BY id",
        );
        let rows = self.select(sql.finish()).await.map_err(&failed)?;
        let read = |row: &S::Row| {
            Ok(SealedSecret {
                account: AccountId(row.integer("id")?),
                sip_uri: row.text("sip_uri")?,
                sealed: row.optional_bytes("secret_sealed")?.unwrap_or_default(),
            })
        };
        rows.iter().map(|row| read(row).map_err(&failed)).collect()
    }

    async fn replace_sealed(&self, resealed: &[Resealed]) -> Result<(), StoreError> {
        let doing = "resealing passwords";
        let dialect = self.dialect(false).await.map_err(failed(doing))?;
        let replace = |Resealed { old, new }: &Resealed| {
            let mut sql = Sql::new(&*dialect, "UPDATE accounts SET secret_sealed = ");
            sql.bind(Value::Bytes(new.clone()))
                .push(" WHERE id = ")
                .bind_integer(old.account.0)
                .push(" AND secret_sealed = ")
                .bind(Value::Bytes(old.sealed.clone()));
            sql.finish()
        };
        self.change_together(doing, resealed.iter().map(replace).collect()).await
    }

    async fn other_nodes(&self, node: &str) -> Result<Vec<String>, StoreError> {
        self.nodes_besides(node).await
    }
}
