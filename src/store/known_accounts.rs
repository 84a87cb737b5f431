//! What a server knows of its accounts' rows when they cannot be read any more.
//!
//! Users write the table by plain SQL too, so any row may hold what cannot be read. Such a row stops no other: it needs
//! attention, and if it was readable before, the server goes on with what it read then.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{Account, columns::Columns, rows};
use crate::identifiers::AccountId;

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
pub(super) struct Reading {
    pub(super) accounts: Vec<Account>,
    /// Rows that cannot be read since this reading and never could; with why.
    pub(super) unreadable: Vec<(AccountId, String)>,
}

impl KnownAccounts {
    /// Takes in what the table holds now.
    pub(super) fn read<R: Columns>(&self, rows: &[R]) -> Result<Reading, sqlx::Error> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = Known::default();
        let mut reading = Reading::default();
        for row in rows {
            let id = AccountId(row.integer("id")?);
            let problem = match rows::account(row) {
                Ok(account) => {
                    if known.unreadable.contains_key(&id) {
                        tracing::info!(account.id = id.0, "the account's row can be read again");
                    }
                    now.readable.insert(id, account.clone());
                    reading.accounts.push(account);
                    continue;
                }
                Err(error) => rows::unreadable_account(error)?,
            };
            let news = known.unreadable.get(&id) != Some(&problem);
            if news {
                tracing::warn!(account.id = id.0, problem, "a row of the table accounts can't be read");
            }
            if let Some(last) = known.readable.get(&id) {
                now.readable.insert(id, last.clone());
                reading.accounts.push(Account { enabled: row.flag("enabled")?, ..last.clone() });
            } else if news {
                reading.unreadable.push((id, problem.clone()));
            }
            now.unreadable.insert(id, problem);
        }
        *known = now;
        Ok(reading)
    }
}
