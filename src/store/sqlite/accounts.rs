//! Accounts and what they are doing.

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, SqliteConnection};

use super::{SqliteStore, column::time_text};
use crate::{
    identifiers::{AccountId, SipUri},
    store::{
        Account, AccountOverview, AccountState, AccountStore, InvitationPolicy, NewAccount, SecretSource,
        StoreError,
        rows::{self, ACCOUNT_COLUMNS, secret_columns},
        trouble::failed,
    },
};

/// Adds an account, or revives a removed one under its old id.
async fn add(connection: &mut SqliteConnection, new: &NewAccount) -> Result<AccountId, StoreError> {
    let (sealed, reference) = secret_columns(&new.secret);
    let added: Option<i64> = sqlx::query_scalar(
        "INSERT INTO accounts (sip_uri, username, auth, secret_sealed, secret_ref, invitations, created_at, updated_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7)
         ON CONFLICT (sip_uri) DO UPDATE
            SET username = excluded.username, auth = excluded.auth, secret_sealed = excluded.secret_sealed,
                secret_ref = excluded.secret_ref, invitations = excluded.invitations, enabled = 1, removed_at = NULL,
                updated_at = excluded.updated_at
          WHERE accounts.removed_at IS NOT NULL
         RETURNING id",
    )
    .bind(new.sip_uri.as_str())
    .bind(&new.username)
    .bind(new.auth.as_str())
    .bind(sealed)
    .bind(reference)
    .bind(new.invitations.map(InvitationPolicy::as_str))
    .bind(time_text(Timestamp::now()))
    .fetch_optional(connection)
    .await
    .map_err(failed("adding an account"))?;
    added
        .map(AccountId)
        .ok_or_else(|| StoreError::AlreadyExists(format!("the account {} is there already", new.sip_uri)))
}

#[async_trait]
impl AccountStore for SqliteStore {
    async fn accounts(&self) -> Result<Vec<Account>, StoreError> {
        let failed = failed("listing accounts");
        let rows = sqlx::query(AssertSqlSafe(format!(
            "SELECT {ACCOUNT_COLUMNS} FROM accounts WHERE removed_at IS NULL ORDER BY sip_uri"
        )))
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?;
        let reading = self.known_accounts.read(&rows).map_err(&failed)?;
        if let Some(server) = &self.server {
            for (id, problem) in &reading.unreadable {
                // Nobody else would: no life of the account begins.
                let state = AccountState::NeedsAttention;
                if let Err(error) = self.record_state(*id, state, Some(problem), &server.node).await {
                    tracing::warn!(account.id = id.0, %error, "an account's state was not recorded");
                }
            }
        }
        Ok(reading.accounts)
    }

    async fn account(&self, sip_uri: &SipUri) -> Result<Option<Account>, StoreError> {
        let failed = failed("reading an account");
        sqlx::query(AssertSqlSafe(format!(
            "SELECT {ACCOUNT_COLUMNS} FROM accounts WHERE sip_uri = ?1 AND removed_at IS NULL"
        )))
        .bind(sip_uri.as_str())
        .fetch_optional(&self.readers)
        .await
        .map_err(&failed)?
        .map(|row| rows::account(&row).map_err(&failed))
        .transpose()
    }

    async fn add_account(&self, account: &NewAccount) -> Result<AccountId, StoreError> {
        let new = account.clone();
        self.writer
            .run("adding an account", true, |connection| Box::pin(async move { add(connection, &new).await }))
            .await
    }

    async fn declare_account(&self, account: &NewAccount) -> Result<AccountId, StoreError> {
        let new = account.clone();
        self.writer
            .run("merging an account of the configuration", true, |connection| {
                Box::pin(async move {
                    let failed = failed("merging an account of the configuration");
                    match add(connection, &new).await {
                        Err(StoreError::AlreadyExists(_)) => {}
                        other => return other,
                    }
                    let (sealed, reference) = secret_columns(&new.secret);
                    // A declaration without a secret leaves the one that `account set-password` gave.
                    sqlx::query(
                        "UPDATE accounts
                            SET username = ?2, auth = ?3, invitations = ?4,
                                secret_sealed = CASE WHEN ?7 THEN ?5 ELSE secret_sealed END,
                                secret_ref = CASE WHEN ?7 THEN ?6 ELSE secret_ref END,
                                updated_at = ?8
                          WHERE sip_uri = ?1
                            AND (username <> ?2 OR auth <> ?3 OR invitations IS NOT ?4
                                 OR (?7 AND (secret_sealed IS NOT ?5 OR secret_ref IS NOT ?6)))",
                    )
                    .bind(new.sip_uri.as_str())
                    .bind(&new.username)
                    .bind(new.auth.as_str())
                    .bind(new.invitations.map(InvitationPolicy::as_str))
                    .bind(sealed)
                    .bind(reference)
                    .bind(new.secret != SecretSource::Missing)
                    .bind(time_text(Timestamp::now()))
                    .execute(&mut *connection)
                    .await
                    .map_err(&failed)?;
                    sqlx::query_scalar("SELECT id FROM accounts WHERE sip_uri = ?1")
                        .bind(new.sip_uri.as_str())
                        .fetch_one(connection)
                        .await
                        .map(AccountId)
                        .map_err(&failed)
                })
            })
            .await
    }

    async fn set_secret(&self, account: AccountId, secret: &SecretSource) -> Result<(), StoreError> {
        let (sealed, reference) = secret_columns(secret);
        self.writer
            .run("changing a password", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "UPDATE accounts SET secret_sealed = ?2, secret_ref = ?3, updated_at = ?4 WHERE id = ?1",
                    )
                    .bind(account.0)
                    .bind(sealed)
                    .bind(reference)
                    .bind(time_text(Timestamp::now()))
                    .execute(connection)
                    .await
                    .map_err(failed("changing a password"))
                    .map(drop)
                })
            })
            .await
    }

    async fn set_enabled(&self, account: AccountId, enabled: bool) -> Result<(), StoreError> {
        self.writer
            .run("enabling or disabling an account", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "UPDATE accounts SET enabled = ?2, updated_at = ?3 WHERE id = ?1 AND enabled <> ?2",
                    )
                    .bind(account.0)
                    .bind(enabled)
                    .bind(time_text(Timestamp::now()))
                    .execute(connection)
                    .await
                    .map_err(failed("enabling or disabling an account"))
                    .map(drop)
                })
            })
            .await
    }

    async fn remove_account(&self, account: AccountId) -> Result<(), StoreError> {
        self.writer
            .run("removing an account", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "UPDATE accounts
                            SET removed_at = ?2, updated_at = ?2, enabled = 0, secret_sealed = NULL, secret_ref = NULL
                          WHERE id = ?1 AND removed_at IS NULL",
                    )
                    .bind(account.0)
                    .bind(time_text(Timestamp::now()))
                    .execute(connection)
                    .await
                    .map_err(failed("removing an account"))
                    .map(drop)
                })
            })
            .await
    }

    async fn set_display_name(&self, account: AccountId, name: &str) -> Result<(), StoreError> {
        let name = name.to_owned();
        self.writer
            .run("noting an account's name", false, move |connection| {
                Box::pin(async move {
                    // Not a change by a person: updated_at stays, so that the server does not take it for one.
                    sqlx::query(
                        "UPDATE accounts SET display_name = ?2 WHERE id = ?1 AND display_name IS NOT ?2",
                    )
                    .bind(account.0)
                    .bind(name)
                    .execute(connection)
                    .await
                    .map_err(failed("noting an account's name"))
                    .map(drop)
                })
            })
            .await
    }

    async fn record_state(
        &self,
        account: AccountId,
        state: AccountState,
        detail: Option<&str>,
        node: &str,
    ) -> Result<(), StoreError> {
        let (detail, node) = (detail.map(ToOwned::to_owned), node.to_owned());
        self.writer
            .run("recording an account's state", state == AccountState::Online, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO account_status (account_id, state, detail, since, node_id)
                         VALUES (?1, ?2, ?3, ?4, ?5)
                         ON CONFLICT (account_id) DO UPDATE
                            SET since = CASE WHEN account_status.state = excluded.state THEN account_status.since
                                             ELSE excluded.since END,
                                state = excluded.state, detail = excluded.detail, node_id = excluded.node_id",
                    )
                    .bind(account.0)
                    .bind(state.as_str())
                    .bind(detail)
                    .bind(time_text(Timestamp::now()))
                    .bind(node)
                    .execute(connection)
                    .await
                    .map_err(failed("recording an account's state"))
                    .map(drop)
                })
            })
            .await
    }

    async fn record_restart(&self, account: AccountId) -> Result<(), StoreError> {
        self.writer
            .run("counting a restart", false, move |connection| {
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO account_status (account_id, state, since, restarts) VALUES (?1, 'starting', ?2, 1)
                         ON CONFLICT (account_id) DO UPDATE SET restarts = restarts + 1",
                    )
                    .bind(account.0)
                    .bind(time_text(Timestamp::now()))
                    .execute(connection)
                    .await
                    .map_err(failed("counting a restart"))
                    .map(drop)
                })
            })
            .await
    }

    async fn account_overview(&self, account: Option<&SipUri>) -> Result<Vec<AccountOverview>, StoreError> {
        let failed = failed("reading the overview of accounts");
        sqlx::query(AssertSqlSafe(format!(
            "SELECT v.account, v.state, v.since, v.detail, v.messages_today, v.queued, v.last_event_at, v.node_id,
                    v.restarts, {ACCOUNT_COLUMNS}
               FROM account_overview v
               JOIN accounts ON sip_uri = v.account
              WHERE ?1 IS NULL OR v.account = ?1
              ORDER BY v.account"
        )))
        .bind(account.map(SipUri::as_str))
        .fetch_all(&self.readers)
        .await
        .map_err(&failed)?
        .iter()
        .map(|row| rows::account_overview(row).map_err(&failed))
        .collect()
    }
}
