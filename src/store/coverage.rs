//! When accounts were followed and when not, and which conversation logs are still to be read because of it.

use async_trait::async_trait;
use jiff::Timestamp;

use super::StoreError;
use crate::identifiers::{AccountId, SessionId, SipUri};

/// A row of `sessions`, as a stretch in which the account was followed but for its gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FollowedSession {
    /// `started_at`.
    pub from: Timestamp,
    /// `last_ack_at`: until when it was followed, as far as is known.
    pub to: Timestamp,
    /// It has not ended.
    pub open: bool,
    /// `end_reason`.
    pub end_reason: Option<String>,
}

/// A row of `coverage_gaps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// `from_at`.
    pub from: Timestamp,
    /// `to_at`.
    pub to: Timestamp,
    /// A sentence.
    pub reason: String,
    /// The server's conversation logs have been read since.
    pub backfilled: bool,
    /// Why they can't be, in words.
    pub detail: Option<String>,
}

/// All that is known about one account's coverage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountCoverage {
    /// SIP URI.
    pub account: String,
    /// By time.
    pub sessions: Vec<FollowedSession>,
    /// By time.
    pub gaps: Vec<Gap>,
}

/// A row of `backfills`: the logs are to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backfill {
    /// Row id.
    pub id: i64,
    /// It is for a gap that is not backfilled yet; otherwise it repeats an earlier reading, or follows a hint.
    pub open_gap: bool,
    /// What happened at or after this is of interest.
    pub from: Timestamp,
    /// Not before.
    pub due_at: Timestamp,
    /// When the logs were first read for it.
    pub first_at: Option<Timestamp>,
    /// How often they were read for it.
    pub runs: i64,
}

/// Gaps and what is done about them.
#[async_trait]
pub trait CoverageStore: Send + Sync {
    /// Records that the channel was not followed in a stretch whose ends are both known.
    async fn record_stretch(
        &self,
        account: AccountId,
        session: SessionId,
        from: Timestamp,
        to: Timestamp,
        reason: &str,
    ) -> Result<(), StoreError>;
    /// What an account has to read, earliest first. Every recorded gap asks for it by itself.
    async fn backfills(&self, account: AccountId) -> Result<Vec<Backfill>, StoreError>;
    /// Asks for the logs to be read at `due_at`, and from the start of the schedule on, because the server hinted at
    /// something. Hints of one account are one row.
    async fn request_backfill(
        &self,
        account: AccountId,
        from: Timestamp,
        due_at: Timestamp,
    ) -> Result<(), StoreError>;
    /// The logs were read for this row: its gap is backfilled. `next`: when to read them again, `None` for no more.
    async fn backfilled(
        &self,
        backfill: i64,
        at: Timestamp,
        next: Option<Timestamp>,
    ) -> Result<(), StoreError>;
    /// Says at the open gaps of an account why they can't be backfilled.
    async fn backfill_impossible(&self, account: AccountId, detail: &str) -> Result<(), StoreError>;
    /// Sessions and gaps of all accounts that have any, by URI; `account` narrows it to one.
    async fn coverage(&self, account: Option<&SipUri>) -> Result<Vec<AccountCoverage>, StoreError>;
}
