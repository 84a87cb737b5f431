//! Accounts and what they are doing.
//!
//! Users write the table by plain SQL too, so any row may hold what cannot be read. Such a row stops no other: it needs
//! attention, and if it was readable before, the server goes on with what it read then.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{AssertSqlSafe, Row, SqliteConnection, sqlite::SqliteRow};

use super::{
    SqliteStore,
    column::{
        failed, lossy_text, optional_user_time, optional_word, some_lossy_text, time_text, undecodable,
        user_time, word,
    },
    load::uri,
};
use crate::{
    identifiers::{AccountId, SipUri},
    store::{
        Account, AccountOverview, AccountState, AccountStore, Auth, InvitationPolicy, NewAccount,
        SecretSource, StoreError,
    },
};

const COLUMNS: &str =
    "id, sip_uri, username, auth, secret_sealed, secret_ref, display_name, enabled, invitations,
                       retention_days, updated_at";

/// What the latest readings of the table brought.
#[derive(Debug, Default)]
pub(super) struct KnownAccounts(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Each account as it was when it could be read last.
    readable: HashMap<AccountId, Account>,
    /// Rows that cannot be read now, with the sentence that was logged.
    unreadable: HashMap<AccountId, String>,
}

/// One reading of the table.
#[derive(Debug, Default)]
struct Reading {
    accounts: Vec<Account>,
    /// Rows that cannot be read since this reading and never could; with why.
    unreadable: Vec<(AccountId, String)>,
}

impl KnownAccounts {
    /// Takes in what the table holds now.
    fn read(&self, rows: &[SqliteRow]) -> Result<Reading, sqlx::Error> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = Known::default();
        let mut reading = Reading::default();
        for row in rows {
            let id = AccountId(row.try_get("id")?);
            let problem = match account(row) {
                Ok(account) => {
                    if known.unreadable.contains_key(&id) {
                        tracing::info!(account.id = id.0, "the account's row can be read again");
                    }
                    now.readable.insert(id, account.clone());
                    reading.accounts.push(account);
                    continue;
                }
                Err(error) => unreadable(error)?,
            };
            let news = known.unreadable.get(&id) != Some(&problem);
            if news {
                tracing::warn!(account.id = id.0, problem, "a row of the table accounts can't be read");
            }
            if let Some(last) = known.readable.get(&id) {
                now.readable.insert(id, last.clone());
                reading.accounts.push(Account { enabled: row.try_get("enabled")?, ..last.clone() });
            } else if news {
                reading.unreadable.push((id, problem.clone()));
            }
            now.unreadable.insert(id, problem);
        }
        *known = now;
        Ok(reading)
    }
}

/// What a user is told of a row that cannot be read. Errors that are not about a value pass through.
fn unreadable(error: sqlx::Error) -> Result<String, sqlx::Error> {
    match error {
        sqlx::Error::ColumnDecode { index, source } => Ok(format!(
            "{} can't be read ({source}); correct the account's row of the table accounts",
            index.trim_matches('"')
        )),
        error => Err(error),
    }
}

fn account(row: &SqliteRow) -> Result<Account, sqlx::Error> {
    let sip_uri = uri(row, "sip_uri")?;
    let stored: &str = row.try_get("sip_uri")?;
    if sip_uri.as_str() != stored {
        // Two rows would be one account.
        return Err(undecodable("sip_uri", format!("{stored:?} has to be written as {sip_uri}")));
    }
    let sealed: Option<Vec<u8>> = row.try_get("secret_sealed")?;
    let reference: Option<String> = row.try_get("secret_ref")?;
    Ok(Account {
        id: AccountId(row.try_get("id")?),
        sip_uri,
        username: row.try_get("username")?,
        auth: word(row, "auth", |text| {
            [Auth::Password, Auth::Ntlm, Auth::Kerberos, Auth::Aad]
                .into_iter()
                .find(|auth| auth.as_str() == text)
        })?,
        secret: match (sealed, reference) {
            (_, Some(reference)) => SecretSource::Reference(reference),
            (Some(sealed), None) => SecretSource::Sealed(sealed),
            (None, None) => SecretSource::Missing,
        },
        display_name: lossy_text(row, "display_name")?,
        enabled: row.try_get("enabled")?,
        invitations: optional_word(row, "invitations", |text| {
            [InvitationPolicy::Accept, InvitationPolicy::Decline, InvitationPolicy::Ignore]
                .into_iter()
                .find(|policy| policy.as_str() == text)
        })?,
        retention_days: row.try_get("retention_days")?,
        updated_at: user_time(row, "updated_at")?,
    })
}

/// The columns `secret_sealed` and `secret_ref`.
fn secret_columns(secret: &SecretSource) -> (Option<Vec<u8>>, Option<String>) {
    match secret {
        SecretSource::Reference(reference) => (None, Some(reference.clone())),
        SecretSource::Sealed(sealed) => (Some(sealed.clone()), None),
        SecretSource::Missing => (None, None),
    }
}

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
            "SELECT {COLUMNS} FROM accounts WHERE removed_at IS NULL ORDER BY sip_uri"
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
            "SELECT {COLUMNS} FROM accounts WHERE sip_uri = ?1 AND removed_at IS NULL"
        )))
        .bind(sip_uri.as_str())
        .fetch_optional(&self.readers)
        .await
        .map_err(&failed)?
        .map(|row| account(&row).map_err(&failed))
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
                    v.restarts, {COLUMNS}
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
        .map(|row| overview(row).map_err(&failed))
        .collect()
    }
}

/// From a row of the view with the account's own columns beside it.
fn overview(row: &SqliteRow) -> Result<AccountOverview, sqlx::Error> {
    let mut overview = AccountOverview {
        account: some_lossy_text(row, "account")?,
        state: some_lossy_text(row, "state")?,
        since: optional_user_time(row, "since")?,
        detail: lossy_text(row, "detail")?,
        messages_today: row.try_get("messages_today")?,
        queued: row.try_get("queued")?,
        last_event_at: optional_user_time(row, "last_event_at")?,
        node_id: lossy_text(row, "node_id")?,
        restarts: row.try_get("restarts")?,
    };
    if let Err(error) = account(row) {
        // Also where no server has seen it yet; one that goes on with what it read before keeps its state.
        overview.detail = Some(unreadable(error)?);
        if overview.state == AccountState::Stopped.as_str() {
            AccountState::NeedsAttention.as_str().clone_into(&mut overview.state);
        }
    }
    Ok(overview)
}
