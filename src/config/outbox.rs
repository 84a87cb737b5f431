//! Section `outbox`: how the queue is worked off.

use std::{num::NonZeroU32, time::Duration};

use serde::Deserialize;

use super::{
    error::Findings,
    values::{self, check_range},
};

/// Shorter than this, an event that is only on its way would count as missing, and its row would be sent twice.
const SHORTEST_SETTLING: Duration = Duration::from_secs(5);

/// A hundred years; for ever is 0.
const LONGEST_KEPT_DAYS: u32 = 36_500;

/// Section `outbox`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutboxSection {
    /// Longest time until new rows are looked for, should nobody have announced them.
    pub poll_ms: u64,
    /// Attempts for rows without a limit of their own.
    pub max_attempts: NonZeroU32,
    /// Wait before the second attempt; it doubles from one to the next.
    #[serde(deserialize_with = "values::duration")]
    pub retry_base: Duration,
    /// Longest wait between two attempts.
    #[serde(deserialize_with = "values::duration")]
    pub retry_max: Duration,
    /// Messages in a second from one account.
    pub per_account_rate: NonZeroU32,
    /// What becomes of a row when nobody can tell whether the server took it.
    pub uncertain: UncertainPolicy,
    /// Longest body that is accepted.
    pub max_body_bytes: usize,
    /// Days after which finished rows are removed; 0 is never.
    pub keep_finished_days: u32,
    /// How long the event stream is waited for to tell the outcome of a request whose answer was lost.
    #[serde(deserialize_with = "values::duration")]
    pub settle_after: Duration,
}

/// `outbox.uncertain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UncertainPolicy {
    /// The row stays `uncertain` until somebody decides.
    Hold,
    /// It is sent again, at the risk that it arrives twice.
    Retry,
}

impl Default for OutboxSection {
    fn default() -> Self {
        Self {
            poll_ms: 1000,
            max_attempts: NonZeroU32::new(5).expect("5 is not 0"),
            retry_base: Duration::from_secs(30),
            retry_max: Duration::from_mins(30),
            per_account_rate: NonZeroU32::new(50).expect("50 is not 0"),
            uncertain: UncertainPolicy::Hold,
            max_body_bytes: 32 * 1024,
            keep_finished_days: 30,
            settle_after: Duration::from_mins(1),
        }
    }
}

impl OutboxSection {
    /// `poll_ms` as a duration.
    pub fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }

    pub(super) fn validate(&self, findings: &mut Findings) {
        let seconds = Duration::from_secs;
        findings.check(
            (10..=60_000).contains(&self.poll_ms),
            "outbox.poll_ms",
            "is out of range; it lies between 10 and 60000",
        );
        check_range(
            findings,
            "outbox.retry_base",
            self.retry_base,
            seconds(1)..=seconds(24 * 3600),
            "1s and 24h",
        );
        check_range(
            findings,
            "outbox.retry_max",
            self.retry_max,
            seconds(1)..=seconds(24 * 3600),
            "1s and 24h",
        );
        findings.check(
            self.retry_base <= self.retry_max,
            "outbox.retry_base",
            "is longer than outbox.retry_max; lower the one or raise the other",
        );
        findings.check(
            (1..=1024 * 1024).contains(&self.max_body_bytes),
            "outbox.max_body_bytes",
            "is out of range; it lies between 1 and 1048576",
        );
        findings.check(
            self.keep_finished_days <= LONGEST_KEPT_DAYS,
            "outbox.keep_finished_days",
            "is out of range; it lies between 0 and 36500",
        );
        check_range(
            findings,
            "outbox.settle_after",
            self.settle_after,
            SHORTEST_SETTLING..=seconds(600),
            "5s and 10m; an event is not missing before it had the time to come",
        );
    }
}
