//! `/`: whether all is well, and if not, what is wrong.
//!
//! Everybody sees the same snapshot, which is taken when somebody looks and the last one is old: however many look, the
//! database is asked once. If asking takes long, the next snapshot waits longer.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use askama::Template;
use axum::{Extension, extract::State, response::Response};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::{sync::Mutex, time::timeout};

use super::{
    AdminState, Asked, Badge, PageError, Shell, When,
    chart::FlowChart,
    html, in_words,
    live::{self, Have, Live},
    pulse::Flow,
};
use crate::{
    admin::viewer::Viewer,
    store::{
        AccountState, FailedSend, OpenGap, OutboxState, QuarantineEntry, QuarantineFilter, StoreError,
        TroubledAccount,
    },
};

/// How old what is shown may be.
const FRESH: Duration = Duration::from_secs(2);
/// Asking may take this part of the time.
const SHARE: u32 = 10;
/// How long all of it may take.
const WITHIN: Duration = Duration::from_secs(10);
/// Rows of each kind of trouble.
const SHOWN: i64 = 8;
/// How far back trouble that is over is told.
const RECENT: SignedDuration = SignedDuration::from_hours(24);
/// A row that could go and has waited longer needs a look.
const LONG_WAIT: SignedDuration = SignedDuration::from_mins(5);

/// What is known at one moment.
#[derive(Debug, Default, Serialize)]
pub(in crate::admin) struct Snapshot {
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    taken_at: Timestamp,
    /// Why the database could not tell the rest.
    problem: Option<String>,
    /// How many in which state.
    accounts: BTreeMap<String, i64>,
    /// How many in which state.
    #[serde(rename = "outbox")]
    rows: BTreeMap<String, i64>,
    #[serde(rename = "oldest_waiting_at", serialize_with = "crate::archive::text::serialize_optional_time")]
    oldest_waiting: Option<Timestamp>,
    /// Minute by minute, oldest first.
    #[serde(rename = "last_hour")]
    hour: Vec<Flow>,
    /// Quarter of an hour by quarter.
    #[serde(rename = "last_day")]
    day: Vec<Flow>,
    /// All of the last day has been counted.
    #[serde(rename = "last_day_is_whole")]
    counted: bool,
    #[serde(rename = "troubled_accounts")]
    troubled: Vec<TroubledAccount>,
    #[serde(rename = "failed_sends")]
    failed: Vec<FailedSend>,
    #[serde(rename = "open_gaps")]
    gaps: Vec<OpenGap>,
    quarantined: Vec<QuarantineEntry>,
}

/// The last snapshot, with when it was taken and how long that took.
#[derive(Debug, Default)]
pub(in crate::admin) struct OverviewCache(Mutex<Option<(Instant, Duration, Arc<Snapshot>)>>);

impl AdminState {
    pub(in crate::admin) async fn snapshot(&self) -> Arc<Snapshot> {
        // Whoever comes meanwhile waits for this one.
        let mut last = self.overview.0.lock().await;
        if let Some((taken, cost, snapshot)) = &*last
            && taken.elapsed() < FRESH.max(*cost * SHARE)
        {
            return Arc::clone(snapshot);
        }
        let began = Instant::now();
        let problem = match timeout(WITHIN, self.take_snapshot()).await {
            Ok(Ok(snapshot)) => {
                let snapshot = Arc::new(snapshot);
                *last = Some((Instant::now(), began.elapsed(), Arc::clone(&snapshot)));
                return snapshot;
            }
            Ok(Err(error)) => crate::error_chain(&error),
            Err(_) => format!("it did not answer within {} s", WITHIN.as_secs()),
        };
        let mut accounts = BTreeMap::new();
        for published in self.states.all().values() {
            *accounts.entry(published.state.as_str().to_owned()).or_default() += 1;
        }
        let snapshot = Arc::new(Snapshot {
            taken_at: Timestamp::now(),
            problem: Some(problem),
            accounts,
            ..Snapshot::default()
        });
        *last = Some((Instant::now(), Duration::ZERO, Arc::clone(&snapshot)));
        snapshot
    }

    async fn take_snapshot(&self) -> Result<Snapshot, StoreError> {
        let now = Timestamp::now();
        let recent = now.saturating_sub(RECENT).unwrap_or(Timestamp::MIN);
        let store = &self.store;
        let mut pulse = self.pulse.lock().await;
        pulse.follow(store.as_ref(), now).await?;
        Ok(Snapshot {
            taken_at: now,
            problem: None,
            accounts: store.account_counts().await?,
            rows: store.outbox_counts().await?,
            oldest_waiting: store.oldest_waiting(now).await?,
            hour: pulse.stretches(now, 60, 1),
            day: pulse.stretches(now, 96, 15),
            counted: pulse.is_whole(),
            troubled: store.troubled_accounts(SHOWN).await?,
            failed: store.failed_sends(recent, SHOWN).await?,
            gaps: store.open_gaps(SHOWN).await?,
            quarantined: store
                .quarantine_entries(&QuarantineFilter { limit: SHOWN, ..QuarantineFilter::default() })
                .await?,
        })
    }
}

/// The one glance.
struct Verdict {
    tone: &'static str,
    sign: &'static str,
    words: String,
    reasons: Vec<String>,
}

fn plural(count: i64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

impl Snapshot {
    fn accounts(&self, states: &[AccountState]) -> i64 {
        states.iter().filter_map(|state| self.accounts.get(state.as_str())).sum()
    }

    fn rows(&self, state: OutboxState) -> i64 {
        self.rows.get(state.as_str()).copied().unwrap_or(0)
    }

    fn verdict(&self) -> Verdict {
        use AccountState::{BackingOff, Discovering, NeedsAttention, Online, SigningIn, Stalled, Starting};
        let mut bad = Vec::new();
        let mut warnings = Vec::new();
        if let Some(problem) = &self.problem {
            bad.push(format!("the database does not answer: {problem}"));
        }
        let attention = self.accounts(&[NeedsAttention]);
        if attention > 0 {
            bad.push(format!(
                "{} attention",
                if attention == 1 {
                    "1 account needs".to_owned()
                } else {
                    format!("{attention} accounts need")
                }
            ));
        }
        let unwell = self.accounts(&[Stalled, BackingOff]);
        if unwell > 0 {
            warnings
                .push(format!("{} stalled or trying again", plural(unwell, "account is", "accounts are")));
        }
        if let Some(oldest) = self.oldest_waiting
            && self.taken_at.duration_since(oldest) > LONG_WAIT
        {
            warnings.push(format!(
                "a message has waited {} to be sent",
                in_words(self.taken_at.duration_since(oldest))
            ));
        }
        if !self.failed.is_empty() {
            warnings.push("messages could not be sent in the last 24 h".to_owned());
        }
        if !self.gaps.is_empty() {
            warnings.push("stretches of the archive are missing and not backfilled".to_owned());
        }
        if !self.quarantined.is_empty() {
            warnings.push("the server said things that were not understood".to_owned());
        }
        let busy = self.accounts(&[Starting, Discovering, SigningIn]);
        let online = self.accounts(&[Online]);
        let (tone, sign, words) = if !bad.is_empty() {
            ("bad", "▲", "Something is wrong".to_owned())
        } else if !warnings.is_empty() {
            ("warn", "◆", "Worth a look".to_owned())
        } else if busy > 0 {
            ("busy", "◔", format!("{} in", plural(busy, "account is signing", "accounts are signing")))
        } else if online == 0 {
            ("idle", "■", "No account is signed in".to_owned())
        } else {
            ("good", "●", "All is well".to_owned())
        };
        bad.append(&mut warnings);
        if bad.is_empty() && online > 0 {
            bad.push(format!("{} online", plural(online, "account is", "accounts are")));
        }
        if bad.is_empty() && self.accounts.values().sum::<i64>() == 0 {
            bad.push(
                "add one with: ucwa-relay account add sip:alice@contoso.com --username alice@contoso.com"
                    .to_owned(),
            );
        }
        Verdict { tone, sign, words, reasons: bad }
    }
}

struct Count {
    badge: Badge,
    number: i64,
    link: String,
}

/// A line of recent trouble.
struct Trouble {
    badge: Badge,
    what: String,
    link: Option<String>,
    detail: String,
    at: Option<When>,
}

#[derive(Template)]
#[template(path = "overview_live.html")]
struct Overview {
    verdict: Verdict,
    accounts: Vec<Count>,
    rows: Vec<Count>,
    waiting: i64,
    oldest: Option<String>,
    charts: Vec<FlowChart>,
    counted: bool,
    known: bool,
    troubles: Vec<Trouble>,
}

impl Overview {
    fn new(snapshot: &Snapshot) -> Self {
        let accounts = AccountState::ALL
            .into_iter()
            .map(|state| Count {
                badge: Badge::of_account(state.as_str()),
                number: snapshot.accounts(&[state]),
                link: format!("/accounts?state={}", state.as_str()),
            })
            .filter(|count| count.number > 0)
            .collect();
        let rows = OutboxState::ALL
            .into_iter()
            .map(|state| Count {
                badge: Badge::of_row(state),
                number: snapshot.rows(state),
                link: format!("/outbox?state={}", state.as_str()),
            })
            .filter(|count| count.number > 0)
            .collect();
        let waiting = snapshot.rows(OutboxState::Queued) + snapshot.rows(OutboxState::Sending);
        let oldest = snapshot.oldest_waiting.map(|oldest| in_words(snapshot.taken_at.duration_since(oldest)));
        Self {
            verdict: snapshot.verdict(),
            accounts,
            rows,
            waiting,
            oldest,
            charts: vec![
                FlowChart::new("hour", "Last hour", "a minute", "60 min ago", &snapshot.hour),
                FlowChart::new("day", "Last day", "15 minutes", "24 h ago", &snapshot.day),
            ],
            counted: snapshot.counted,
            known: snapshot.problem.is_none(),
            troubles: troubles(snapshot),
        }
    }
}

/// Accounts first, since all else hangs on them; then what is over, latest first.
fn troubles(snapshot: &Snapshot) -> Vec<Trouble> {
    let account = |uri: &str| super::accounts::account_link(uri);
    let mut troubles: Vec<Trouble> = snapshot
        .troubled
        .iter()
        .map(|troubled| Trouble {
            badge: Badge::of_account(&troubled.state),
            what: troubled.account.clone(),
            link: Some(account(&troubled.account)),
            detail: troubled.detail.clone().unwrap_or_default(),
            at: troubled.since.map(When::new),
        })
        .collect();
    let mut past: Vec<(Timestamp, Trouble)> = Vec::new();
    past.extend(snapshot.failed.iter().map(|send| {
        let trouble = Trouble {
            badge: Badge::of_row(send.state),
            what: format!("message {} of {}", send.id, send.account),
            link: Some(format!("/outbox/{}", send.id)),
            detail: send.last_error.clone().unwrap_or_default(),
            at: send.finished_at.map(When::new),
        };
        (send.finished_at.unwrap_or(Timestamp::MIN), trouble)
    }));
    past.extend(snapshot.gaps.iter().map(|gap| {
        let length = in_words(gap.to_at.duration_since(gap.from_at));
        let trouble = Trouble {
            badge: Badge { word: "gap".to_owned(), sign: "◆", tone: "warn" },
            what: gap.account.clone(),
            link: Some(account(&gap.account)),
            detail: match &gap.detail {
                Some(detail) => format!("{length}: {}; {detail}", gap.reason),
                None => format!("{length}: {}", gap.reason),
            },
            at: Some(When::new(gap.to_at)),
        };
        (gap.to_at, trouble)
    }));
    past.extend(snapshot.quarantined.iter().map(|entry| {
        let trouble = Trouble {
            badge: Badge { word: "not understood".to_owned(), sign: "◆", tone: "warn" },
            what: entry.account.clone(),
            link: Some(account(&entry.account)),
            detail: format!("{} (ucwa-relay quarantine show {})", entry.reason, entry.id),
            at: Some(When::new(entry.received_at)),
        };
        (entry.received_at, trouble)
    }));
    past.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    troubles.extend(past.into_iter().map(|(_, trouble)| trouble));
    troubles
}

#[derive(Template)]
#[template(path = "overview.html")]
struct OverviewPage {
    shell: Shell,
    live: Live,
}

/// `GET /`.
pub(in crate::admin) async fn page(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
) -> Result<Response, PageError> {
    let live = Live::new(Overview::new(&*state.snapshot().await).render()?, "/live", &[]);
    html(&OverviewPage { shell: Shell::new("Overview", "/", &viewer), live })
}

/// `GET /live`.
pub(in crate::admin) async fn follow(
    State(state): State<AdminState>,
    Extension(viewer): Extension<Viewer>,
    Asked(have): Asked<Have>,
) -> Result<Response, PageError> {
    live::follow(&state.clone(), &viewer, have, move |_| {
        let state = state.clone();
        async move { Ok(Overview::new(&*state.snapshot().await).render()?) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(accounts: &[(AccountState, i64)]) -> Snapshot {
        Snapshot {
            taken_at: "2026-03-01T12:00:00Z".parse().unwrap(),
            accounts: accounts.iter().map(|(state, count)| (state.as_str().to_owned(), *count)).collect(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn one_glance_tells() {
        use AccountState::{NeedsAttention, Online, SigningIn, Stalled};
        let well = snapshot(&[(Online, 3)]);
        assert_eq!(
            (well.verdict().tone, well.verdict().reasons.join("; ").as_str()),
            ("good", "3 accounts are online")
        );
        assert_eq!(snapshot(&[]).verdict().tone, "idle");
        assert_eq!(snapshot(&[(Online, 3), (SigningIn, 1)]).verdict().tone, "busy");
        assert_eq!(snapshot(&[(Online, 3), (Stalled, 1)]).verdict().tone, "warn");
        let bad = snapshot(&[(Online, 3), (Stalled, 1), (NeedsAttention, 1)]).verdict();
        assert_eq!((bad.tone, bad.reasons[0].as_str()), ("bad", "1 account needs attention"));
        let dead = Snapshot { problem: Some("refused".to_owned()), ..snapshot(&[(Online, 3)]) };
        assert_eq!(dead.verdict().tone, "bad");
    }

    #[test]
    fn a_row_that_waits_long_is_told() {
        let waiting = |since: &str| Snapshot {
            oldest_waiting: Some(since.parse().unwrap()),
            ..snapshot(&[(AccountState::Online, 1)])
        };
        assert_eq!(waiting("2026-03-01T11:59:00Z").verdict().tone, "good");
        let verdict = waiting("2026-03-01T11:00:00Z").verdict();
        assert_eq!(
            (verdict.tone, verdict.reasons[0].as_str()),
            ("warn", "a message has waited 1 h to be sent")
        );
    }
}
