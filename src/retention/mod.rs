//! How long messages are kept: what would be removed, the removal, and its schedule in a running server.
//!
//! A run goes account by account, batch by batch ([`crate::store::RetentionStore`] says what one is), and rests after each for as
//! long as it took, so that archiving goes on beside it. One run is under way at a time on a database, whoever began it:
//! its row in `retention_runs` is a lease that each batch renews in its own transaction. A run that is killed leaves whole
//! batches behind, and the next one goes on with what is left.

pub mod schedule;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    archive::text::serialize_time,
    evidence::{seal, tombstone},
    metrics,
    store::{Due, Policy, PurgeBatch, RetainedAccount, Signer, Stage, Store, StoreError},
};

/// Rows that one transaction looks at: everybody who writes waits no longer than those take.
const AT_ONCE: i64 = 200;
/// How long a run rests between two transactions, at least and at most.
const REST: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// A database that does not answer, or somebody who is just writing a hold, is waited for this long. Less than after
/// which the run counts as interrupted.
const PATIENCE: Duration = Duration::from_secs(60);

/// What of one account goes, or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AccountReport {
    /// SIP URI.
    pub account: String,
    /// How many days its messages are kept.
    pub days: i64,
    /// What was sent before this goes.
    #[serde(serialize_with = "serialize_time")]
    pub before: Timestamp,
    /// How much, and what holds keep.
    #[serde(flatten)]
    pub due: Due,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of every account whose messages are not kept for ever.
    pub accounts: Vec<AccountReport>,
    /// It was asked to stop before it was through.
    pub stopped: bool,
}

impl Report {
    /// Messages whose text went.
    pub fn messages(&self) -> i64 {
        self.accounts.iter().map(|account| account.due.messages).sum()
    }
}

/// Who removes, by which rule, and who signs for it.
pub struct Purger<'a> {
    /// The database.
    pub store: &'a dyn Store,
    /// How old is too old.
    pub policy: Policy,
    /// Who asked for it.
    pub by: &'a str,
    /// `cluster.node_id`.
    pub node: &'a str,
    /// Signs the tombstones.
    pub key: &'a SigningKey,
    /// See [`crate::store::RetentionStore::begin_run`].
    pub replaces_own: bool,
}

/// Accounts whose messages are not kept for ever, with their days and what is older than those.
async fn limited(
    store: &dyn Store,
    policy: Policy,
) -> Result<Vec<(RetainedAccount, i64, Timestamp)>, StoreError> {
    let accounts = store.retained_accounts().await?;
    let limited = accounts.into_iter().filter_map(|account| {
        let (days, before) = policy.days(account.days).zip(policy.before(account.days))?;
        Some((account, days, before))
    });
    Ok(limited.collect())
}

/// Whether a rule says that anything goes at all; without one no key is needed.
///
/// # Errors
/// The database can't be read.
pub async fn is_limited(store: &dyn Store, policy: Policy) -> Result<bool, StoreError> {
    Ok(!limited(store, policy).await?.is_empty())
}

/// What a run would do now; changes nothing.
///
/// # Errors
/// The database can't be read.
pub async fn preview(store: &dyn Store, policy: Policy) -> Result<Vec<AccountReport>, StoreError> {
    let mut reports = Vec::new();
    for (account, days, before) in limited(store, policy).await? {
        let due = store.due(account.id, before).await?;
        reports.push(AccountReport { account: account.uri, days, before, due });
    }
    Ok(reports)
}

/// The key that signs tombstones: that in the file, or, where none ever signed, a new one. Gives whether it is new.
///
/// # Errors
/// The file can't be used, or it is missing although there are tombstones: another key is made only by whoever wants one.
pub async fn signing_key(store: &dyn Store, path: &Path) -> anyhow::Result<(SigningKey, bool)> {
    if !path.exists()
        && let Some(signer) = store.last_signer().await?
    {
        anyhow::bail!(
            "the key file {} is missing, and purged messages here were signed with the key {signer}: put that file back, or \
             copy it from the node that has it; if it is lost, `ucwa-relay seal` makes a new key, and whoever verifies has \
             to know both",
            path.display()
        );
    }
    seal::load_or_create_key(path)
}

impl Purger<'_> {
    /// Removes everything that is old enough and that no hold keeps. `stop` ends it after the batch that is under way.
    ///
    /// # Errors
    /// Another run is under way, or the database can't be written; what is removed by then stays so.
    pub async fn run(&self, stop: &CancellationToken) -> anyhow::Result<Report> {
        let run = self
            .store
            .begin_run(self.by, self.node, &tombstone::public_key(self.key), self.replaces_own)
            .await?;
        let result = self.accounts(run, stop).await;
        let outcome = match &result {
            Ok(report) if report.stopped => "stopped",
            Ok(_) => "done",
            Err(_) => "failed",
        };
        let ended =
            self.store.end_run(run, outcome).await.context("the end of the run can't be written down");
        let report = result?;
        ended?;
        Ok(report)
    }

    async fn accounts(&self, run: i64, stop: &CancellationToken) -> anyhow::Result<Report> {
        let key = self.key.clone();
        let signer: Signer = Arc::new(move |message, at| tombstone::sign(&key, message, at));
        let mut report = Report { accounts: Vec::new(), stopped: false };
        for (account, days, before) in limited(self.store, self.policy).await? {
            let mut gone = Due::default();
            let mut stage = Some(Stage::Messages(None));
            while let Some(at) = stage.take() {
                if stop.is_cancelled() {
                    report.stopped = true;
                    break;
                }
                let begun = Instant::now();
                let batch = PurgeBatch {
                    run,
                    account: account.id,
                    policy: self.policy,
                    stage: at,
                    limit: AT_ONCE,
                    signer: Arc::clone(&signer),
                };
                let done = self.patiently(batch, stop).await.with_context(|| {
                    format!("messages of {} can't be purged; what was purged by now stays so", account.uri)
                })?;
                let Some(done) = done else {
                    report.stopped = true;
                    break;
                };
                metrics::count_purged(&done.gone);
                add(&mut gone, &done.gone);
                stage = done.next;
                if stage.is_some() {
                    stop.run_until_cancelled(sleep(begun.elapsed().clamp(REST.0, REST.1))).await;
                }
            }
            gone.kept = self.store.kept(account.id, before).await?;
            report.accounts.push(AccountReport { account: account.uri, days, before, due: gone });
            if report.stopped {
                break;
            }
        }
        Ok(report)
    }

    /// Does a batch, again while the database or a hold that is just being written is in the way. None: it was asked to stop
    /// meanwhile.
    async fn patiently(
        &self,
        batch: PurgeBatch,
        stop: &CancellationToken,
    ) -> Result<Option<crate::store::Batch>, StoreError> {
        let begun = Instant::now();
        loop {
            match self.store.purge(batch.clone()).await {
                Err(StoreError::Unavailable { .. } | StoreError::Locked { .. })
                    if begun.elapsed() < PATIENCE =>
                {
                    if stop.run_until_cancelled(sleep(REST.1)).await.is_none() {
                        return Ok(None);
                    }
                }
                answer => return answer.map(Some),
            }
        }
    }
}

fn add(all: &mut Due, gone: &Due) {
    all.messages += gone.messages;
    all.conversations += gone.conversations;
    all.payloads += gone.payloads;
    all.oldest = all.oldest.or(gone.oldest);
    all.newest = gone.newest.or(all.newest);
}
