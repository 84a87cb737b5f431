//! Whether this node may write about an account, judged by the database in the very transaction that writes.
//!
//! Judging locks the account's row of `account_leases` with `FOR KEY SHARE` until the transaction ends. Renewing a lease
//! changes no key and so does not wait for that lock, nor it for the renewal. Taking a lease or giving it up raises `epoch`,
//! which is part of a unique key: it conflicts with the lock, and a transaction that was judged well is over before the account can
//! belong to anybody else. Tools hold no leases and are not judged: what they write, an operator asked for.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use crate::{
    identifiers::AccountId,
    store::{Leases, StoreError, columns::Columns, trouble::failed},
};

/// Accounts with rows that may be claimed, by jumping from one to the next in the index; in ascending order.
const WAITING: &str = "
    WITH RECURSIVE waiting (account_id) AS (
        SELECT (SELECT min(o.account_id) FROM outbox o WHERE o.state = 'queued' AND o.destination IS NOT NULL)
        UNION ALL
        SELECT (SELECT min(o.account_id) FROM outbox o
                 WHERE o.state = 'queued' AND o.destination IS NOT NULL AND o.account_id > w.account_id)
          FROM waiting w
         WHERE w.account_id IS NOT NULL)
    SELECT account_id FROM waiting WHERE account_id IS NOT NULL ORDER BY account_id";

/// What a server knows of its leases; of a tool, nothing.
#[derive(Debug, Clone)]
pub(in crate::store) struct Fence {
    /// `cluster.node_id` of a server.
    pub(super) node: Option<String>,
    /// What it holds.
    pub(super) leases: Leases,
}

impl Fence {
    /// The epoch under which a transaction about this account is to be judged; `None` for tools.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if this process knows by itself that it does not hold the account.
    pub(super) fn epoch(&self, account: AccountId) -> Result<Option<i64>, StoreError> {
        if self.node.is_none() {
            return Ok(None);
        }
        self.leases.epoch(account).map(Some).ok_or(StoreError::Fenced(account))
    }

    /// Judges one account under the epoch of [`Fence::epoch`].
    pub(super) async fn judge(
        &self,
        connection: &mut PgConnection,
        account: AccountId,
        epoch: Option<i64>,
    ) -> Result<(), StoreError> {
        let Some(epoch) = epoch else { return Ok(()) };
        let presented = BTreeSet::from([(account, epoch)]);
        let fenced =
            self.refused(connection, &presented).await.map_err(failed("looking at an account's lease"))?;
        if fenced.is_empty() { Ok(()) } else { Err(StoreError::Fenced(account)) }
    }

    /// Which of these accounts this node does not hold under the epoch given.
    pub(super) async fn refused(
        &self,
        connection: &mut PgConnection,
        presented: &BTreeSet<(AccountId, i64)>,
    ) -> Result<BTreeSet<(AccountId, i64)>, sqlx::Error> {
        let Some(node) = &self.node else { return Ok(BTreeSet::new()) };
        let (asked, mut refused): (BTreeSet<_>, BTreeSet<_>) =
            presented.iter().copied().partition(|(account, epoch)| self.leases.holds(*account, *epoch));
        let held = lock_held(connection, node, asked.iter()).await?;
        for lost in asked.difference(&held) {
            if self.leases.lose(lost.0, lost.1) {
                tracing::warn!(account.id = lost.0.0, epoch = lost.1, "another node has taken the account");
            }
            refused.insert(*lost);
        }
        Ok(refused)
    }

    /// As [`Fence::held`], of accounts with rows waiting in the queue: these are few, and claims are frequent.
    pub(super) async fn held_of_waiting(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<Vec<i64>>, sqlx::Error> {
        let Some(node) = &self.node else { return Ok(None) };
        let waiting: Vec<i64> = sqlx::query_scalar(WAITING).fetch_all(&mut *connection).await?;
        let held = self.leases.held();
        // What is being handed over sends what it has and takes nothing more.
        let presented = held.iter().filter(|(account, _)| {
            waiting.binary_search(&account.0).is_ok() && !self.leases.is_leaving(*account)
        });
        let held = lock_held(connection, node, presented).await?;
        Ok(Some(held.into_iter().map(|(account, _)| account.0).collect()))
    }

    /// All accounts that this node holds; `None` for tools, which need not hold any.
    pub(super) async fn held(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<Vec<AccountId>>, sqlx::Error> {
        let Some(node) = &self.node else { return Ok(None) };
        let held = lock_held(connection, node, self.leases.held().iter()).await?;
        Ok(Some(held.into_iter().map(|(account, _)| account).collect()))
    }
}

/// Locks the leases that the node has under the epochs given, until the transaction ends.
async fn lock_held<'a>(
    connection: &mut PgConnection,
    node: &str,
    presented: impl Iterator<Item = &'a (AccountId, i64)>,
) -> Result<BTreeSet<(AccountId, i64)>, sqlx::Error> {
    let (accounts, epochs): (Vec<i64>, Vec<i64>) =
        presented.map(|(account, epoch)| (account.0, *epoch)).unzip();
    if accounts.is_empty() {
        return Ok(BTreeSet::new());
    }
    sqlx::query(
        "SELECT l.account_id, l.epoch
           FROM unnest($2::bigint[], $3::bigint[]) AS k (account_id, epoch)
           JOIN account_leases l ON l.account_id = k.account_id AND l.epoch = k.epoch
          WHERE l.node_id = $1 AND l.account_id = ANY ($2)
            FOR KEY SHARE OF l",
    )
    .bind(node)
    .bind(accounts)
    .bind(epochs)
    .fetch_all(connection)
    .await?
    .iter()
    .map(|row| Ok((AccountId(row.integer("account_id")?), row.integer("epoch")?)))
    .collect()
}
