//! Sealed passwords as they stand in the database, for whoever changes the key that sealed them.

use async_trait::async_trait;

use super::StoreError;
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
