//! How often each account asked for what, and whether it waited when it was told to.
//!
//! What makes a client a burden for a server in trouble can only be measured at the server: how many requests came, how
//! many at once, and how many came although an earlier answer had asked for patience (`Retry-After`).

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use hyper::{Response, header};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::fault::Operation;

/// Requests of one account for one operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCount {
    /// SIP URI of the account; `None` where the request does not tell.
    pub account: Option<String>,
    /// What was asked for.
    pub operation: Operation,
    /// How often.
    pub requests: u64,
    /// How often before the time was over for which the answer before had asked for patience.
    pub too_early: u64,
    /// Most of them that were being carried out at the same time.
    pub at_once: usize,
}

#[derive(Default)]
struct Tally {
    requests: u64,
    too_early: u64,
    under_way: usize,
    at_once: usize,
    not_before: Option<Instant>,
}

/// All requests since the start or the last reset.
#[derive(Default)]
pub(crate) struct Requests {
    tallies: Mutex<HashMap<(Option<String>, Operation), Tally>>,
}

/// One request, until it is answered or given up.
pub(crate) struct Counted<'a> {
    requests: &'a Requests,
    key: (Option<String>, Operation),
}

impl Requests {
    fn tallies(&self) -> MutexGuard<'_, HashMap<(Option<String>, Operation), Tally>> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins.
    pub(crate) fn begin(&self, account: Option<String>, operation: Operation, now: Instant) -> Counted<'_> {
        let key = (account, operation);
        let mut tallies = self.tallies();
        let tally = tallies.entry(key.clone()).or_default();
        tally.requests += 1;
        // Whoever is not known cannot be told from others that were not asked for patience.
        if key.0.is_some() && tally.not_before.is_some_and(|not_before| now < not_before) {
            tally.too_early += 1;
        }
        tally.under_way += 1;
        tally.at_once = tally.at_once.max(tally.under_way);
        drop(tallies);
        Counted { requests: self, key }
    }

    /// Every count, by account and operation.
    pub(crate) fn counts(&self) -> Vec<RequestCount> {
        let tallies = self.tallies();
        let mut counts: Vec<RequestCount> = tallies
            .iter()
            .map(|((account, operation), tally)| RequestCount {
                account: account.clone(),
                operation: *operation,
                requests: tally.requests,
                too_early: tally.too_early,
                at_once: tally.at_once,
            })
            .collect();
        counts.sort_by_key(|count| (count.account.clone(), format!("{:?}", count.operation)));
        counts
    }

    /// Counts anew. What was asked for stays asked for.
    pub(crate) fn reset(&self) {
        let mut tallies = self.tallies();
        for tally in tallies.values_mut() {
            (tally.requests, tally.too_early, tally.at_once) = (0, 0, tally.under_way);
        }
    }
}

impl Counted<'_> {
    /// The request is answered; the time for which the answer asks for patience begins.
    pub(crate) fn answered<B>(&self, answer: &Response<B>, now: Instant) {
        let asked = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let not_before = asked.and_then(patience).map(|patience| now + patience);
        if let Some(tally) = self.requests.tallies().get_mut(&self.key) {
            tally.not_before = not_before.max(tally.not_before);
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some(tally) = self.requests.tallies().get_mut(&self.key) {
            tally.under_way -= 1;
        }
    }
}

/// What `Retry-After` asks for. A date has whole seconds, so it may be over up to a second earlier than it was meant.
fn patience(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
    SystemTime::from(until).duration_since(SystemTime::now()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_wait_is_seen() {
        let requests = Requests::default();
        let start = Instant::now();
        let ask = |account: &str, second: u64| {
            let now = start + Duration::from_secs(second);
            requests.begin(Some(account.to_owned()), Operation::SendMessage, now)
        };
        let busy = Response::builder().header(header::RETRY_AFTER, "5").body(()).unwrap();
        let first = ask("a", 0);
        let second = ask("a", 0);
        first.answered(&busy, start);
        drop((first, second));
        drop(ask("b", 1));
        ask("a", 4).answered(&Response::new(()), start + Duration::from_secs(4));
        drop(ask("a", 5));
        let told: Vec<(Option<String>, u64, u64, usize)> = requests
            .counts()
            .into_iter()
            .map(|count| (count.account, count.requests, count.too_early, count.at_once))
            .collect();
        assert_eq!(told, [(Some("a".into()), 4, 1, 2), (Some("b".into()), 1, 0, 1)]);
        requests.reset();
        assert_eq!(requests.counts()[0].requests, 0);
    }
}
