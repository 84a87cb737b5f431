//! When accounts were followed and when not, and which conversation logs are still to be read because of it.

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::StoreError;
use crate::identifiers::{AccountId, SessionId, SipUri};

/// A running server notes at least so often that it follows an account.
const NOTED_WITHIN: SignedDuration = SignedDuration::from_mins(2);

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

/// A stretch of time in which an account was followed, or was not.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Stretch {
    /// SIP URI.
    pub account: String,
    /// Whether it was.
    pub followed: bool,
    /// Its beginning.
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    pub from_at: Timestamp,
    /// `None`: it goes on.
    #[serde(serialize_with = "crate::archive::text::serialize_optional_time")]
    pub to_at: Option<Timestamp>,
    /// Why it was not followed.
    pub reason: Option<String>,
    /// Whether the server's conversation logs have been read for it; `None` where it was followed.
    pub backfilled: Option<bool>,
    /// Why they could not be.
    pub detail: Option<String>,
}

impl AccountCoverage {
    /// Sessions without their gaps, the gaps, and what is not followed right now, by time.
    pub fn stretches(self, now: Timestamp) -> Vec<Stretch> {
        let Self { account, sessions, gaps } = self;
        let followed = |from_at: Timestamp, to_at: Option<Timestamp>| Stretch {
            account: account.clone(),
            followed: true,
            from_at,
            to_at,
            reason: None,
            backfilled: None,
            detail: None,
        };
        let mut stretches = Vec::new();
        let last = sessions.len().saturating_sub(1);
        for (number, session) in sessions.into_iter().enumerate() {
            let now_followed = session.open && now.duration_since(session.to) < NOTED_WITHIN;
            let mut from = session.from;
            for gap in &gaps {
                if gap.to <= from || gap.from >= session.to {
                    continue;
                }
                if gap.from > from {
                    stretches.push(followed(from, Some(gap.from)));
                }
                from = from.max(gap.to);
            }
            if now_followed {
                stretches.push(followed(from, None));
                continue;
            }
            if from < session.to {
                stretches.push(followed(from, Some(session.to)));
            }
            // A gap is recorded when the account is followed again.
            if number == last {
                stretches.push(Stretch {
                    reason: Some(session.end_reason.unwrap_or_else(|| "nobody follows it now".to_owned())),
                    followed: false,
                    backfilled: Some(false),
                    ..followed(session.to.max(from), None)
                });
            }
        }
        stretches.extend(gaps.into_iter().map(|gap| Stretch {
            account: account.clone(),
            followed: false,
            from_at: gap.from,
            to_at: Some(gap.to),
            reason: Some(gap.reason),
            backfilled: Some(gap.backfilled),
            detail: gap.detail,
        }));
        stretches.sort_by_key(|stretch| (stretch.from_at, stretch.to_at.is_none(), stretch.to_at));
        stretches
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minute: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minute)
    }

    fn told(coverage: AccountCoverage, now: i64) -> Vec<(bool, Option<i64>, Option<i64>)> {
        let minute = |at: Timestamp| Some(at.as_second() / 60);
        coverage
            .stretches(at(now))
            .into_iter()
            .map(|stretch| (stretch.followed, minute(stretch.from_at), stretch.to_at.and_then(minute)))
            .collect()
    }

    fn session(from: i64, to: i64, open: bool) -> FollowedSession {
        FollowedSession { from: at(from), to: at(to), open, end_reason: None }
    }

    fn gap(from: i64, to: i64) -> Gap {
        Gap { from: at(from), to: at(to), reason: "why".to_owned(), backfilled: true, detail: None }
    }

    fn coverage(sessions: Vec<FollowedSession>, gaps: Vec<Gap>) -> AccountCoverage {
        AccountCoverage { account: "sip:alice@contoso.com".to_owned(), sessions, gaps }
    }

    #[test]
    fn gaps_divide_sessions_and_lie_between_them() {
        let coverage = coverage(
            vec![session(0, 60, false), session(70, 100, true)],
            vec![gap(10, 20), gap(60, 70), gap(80, 81)],
        );
        assert_eq!(
            told(coverage, 101),
            [
                (true, Some(0), Some(10)),
                (false, Some(10), Some(20)),
                (true, Some(20), Some(60)),
                (false, Some(60), Some(70)),
                (true, Some(70), Some(80)),
                (false, Some(80), Some(81)),
                (true, Some(81), None),
            ]
        );
    }

    #[test]
    fn what_nobody_follows_any_more_says_so() {
        let ended = coverage(vec![session(0, 60, false)], Vec::new());
        assert_eq!(told(ended, 100), [(true, Some(0), Some(60)), (false, Some(60), None)]);
        let silent = coverage(vec![session(0, 60, true)], vec![gap(50, 60)]);
        assert_eq!(
            told(silent, 100),
            [(true, Some(0), Some(50)), (false, Some(50), Some(60)), (false, Some(60), None)]
        );
    }
}
