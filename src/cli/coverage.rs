//! `coverage`: when each account was followed, and when not.

use clap::Args;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{
    open::{IfMissing, with_store},
    output::{self, Format, Table, optional_time, time},
};
use crate::{config::Config, identifiers::SipUri, store::AccountCoverage};

/// A running server notes at least so often that it follows an account.
const NOTED_WITHIN: SignedDuration = SignedDuration::from_mins(2);

/// `coverage`.
#[derive(Debug, Args)]
pub struct CoverageOptions {
    /// Only of this account
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// A stretch of time in which an account was followed, or was not.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Stretch {
    account: String,
    followed: bool,
    from_at: Timestamp,
    /// `None`: it goes on.
    to_at: Option<Timestamp>,
    /// Why it was not followed.
    reason: Option<String>,
    /// Whether the server's conversation logs have been read for it; `None` where it was followed.
    backfilled: Option<bool>,
    /// Why they could not be.
    detail: Option<String>,
}

/// Prints the stretches of all accounts, or of one.
pub(super) async fn coverage(config: &Config, options: CoverageOptions) -> anyhow::Result<()> {
    with_store(config, IfMissing::Refuse, async |store| {
        if let Some(uri) = &options.account
            && store.account(uri).await?.is_none()
            && store.coverage(Some(uri)).await?.is_empty()
        {
            anyhow::bail!("there is no account {uri}; `ucwa-relay account list` shows them");
        }
        let now = Timestamp::now();
        let stretches: Vec<Stretch> = store
            .coverage(options.account.as_ref())
            .await?
            .into_iter()
            .flat_map(|account| stretches(account, now))
            .collect();
        if options.format == Format::Json {
            return output::json_array(&stretches);
        }
        let mut table = Table::new(["account", "followed", "from", "to", "backfilled", "reason"]);
        for stretch in stretches {
            let reason =
                [stretch.reason, stretch.detail].into_iter().flatten().collect::<Vec<_>>().join("; ");
            table.row([
                stretch.account,
                yes_or_no(stretch.followed).into(),
                time(stretch.from_at),
                optional_time(stretch.to_at),
                stretch.backfilled.map(yes_or_no).unwrap_or_default().into(),
                reason,
            ]);
        }
        table.print("no account has been followed yet")
    })
    .await
}

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// Sessions without their gaps, the gaps, and what is not followed right now, by time.
fn stretches(coverage: AccountCoverage, now: Timestamp) -> Vec<Stretch> {
    let AccountCoverage { account, sessions, gaps } = coverage;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{FollowedSession, Gap};

    fn at(minute: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minute)
    }

    fn told(coverage: AccountCoverage, now: i64) -> Vec<(bool, Option<i64>, Option<i64>)> {
        let minute = |at: Timestamp| Some(at.as_second() / 60);
        stretches(coverage, at(now))
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
