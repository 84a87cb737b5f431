//! How many rows each account may send now (`outbox.per_account_rate`).
//!
//! An account may send a second's worth at once; after that, evenly. The rows beyond are not claimed, so that they stay
//! `queued` and belong to their users until their turn. An account that left rows behind is passed over until it may send
//! some again: then the dispatcher wakes, and the account's destinations go on where they stopped.

use std::{collections::BTreeMap, num::NonZeroU32, time::Duration};

use tokio::time::Instant;

use crate::{
    identifiers::AccountId,
    store::{Allowance, Allowances, ClaimedSend},
};

/// As much may go at once as in so long evenly.
const AT_ONCE: Duration = Duration::from_secs(1);

/// An account whose rows wait gets a turn as soon as it may send as many as go in so long, since a turn costs a claim.
const TURN: Duration = Duration::from_millis(100);

/// The accounts that sent something within the last second.
#[derive(Debug)]
pub struct Paces {
    rate: NonZeroU32,
    accounts: BTreeMap<AccountId, Pace>,
}

#[derive(Debug)]
struct Pace {
    /// When it may send [`AT_ONCE`] again: each row moves it on by an even share.
    rested: Instant,
    /// It was claimed as much as it might send, so more may wait.
    waits: Option<Waits>,
}

#[derive(Debug)]
struct Waits {
    /// Its next turn.
    until: Instant,
    /// The destination of which a row was claimed last.
    after: String,
}

impl Paces {
    /// Nobody has sent anything; each account may send `rate` rows a second.
    pub fn new(rate: NonZeroU32) -> Self {
        Self { rate, accounts: BTreeMap::new() }
    }

    /// What may be claimed now.
    pub fn allowances(&mut self, now: Instant) -> Allowances {
        self.accounts.retain(|_, pace| pace.rested > now || pace.waits.is_some());
        Allowances {
            each: i64::from(self.rate.get()),
            others: self
                .accounts
                .iter()
                .map(|(&account, pace)| Allowance {
                    account,
                    rows: self.allowance(Some(pace), now),
                    after: pace.waits.as_ref().map(|waits| waits.after.clone()),
                })
                .collect(),
        }
    }

    /// Counts what was claimed under the allowances of `now`, in the order of the claim.
    pub fn count(&mut self, claimed: &[ClaimedSend], now: Instant) {
        let mut rows: BTreeMap<AccountId, (i64, &str)> = BTreeMap::new();
        for send in claimed {
            let (count, last) = rows.entry(send.account).or_default();
            *count += 1;
            *last = &send.destination;
        }
        // Whoever had a turn and did not use it up has nothing more that is due.
        for (account, pace) in &mut self.accounts {
            if !rows.contains_key(account) && pace.waits.as_ref().is_some_and(|waits| waits.until <= now) {
                pace.waits = None;
            }
        }
        for (account, (count, last)) in rows {
            let allowed = self.allowance(self.accounts.get(&account), now);
            let share = self.share();
            let pace = self.accounts.entry(account).or_insert(Pace { rested: now, waits: None });
            pace.rested = pace.rested.max(now) + share * u32::try_from(count).unwrap_or(u32::MAX);
            pace.waits = (count >= allowed).then(|| {
                let turn = (TURN.as_nanos() / share.as_nanos().max(1)).max(1);
                // From then on so many may go: what is owed until all is forgotten leaves room for them.
                let room = share * u32::try_from(turn).unwrap_or(u32::MAX);
                Waits {
                    until: pace.rested.checked_sub(AT_ONCE).unwrap_or(now) + room,
                    after: last.to_owned(),
                }
            });
        }
    }

    /// Of this account a row could not be handed out: it does not count.
    pub fn uncount(&mut self, account: AccountId) {
        let share = self.share();
        if let Some(pace) = self.accounts.get_mut(&account) {
            pace.rested = pace.rested.checked_sub(share).unwrap_or(pace.rested);
        }
    }

    /// When the first account whose rows may wait has its turn.
    pub fn next_turn(&self) -> Option<Instant> {
        self.accounts.values().filter_map(|pace| Some(pace.waits.as_ref()?.until)).min()
    }

    /// From one row to the next.
    fn share(&self) -> Duration {
        AT_ONCE / self.rate.get()
    }

    fn allowance(&self, pace: Option<&Pace>, now: Instant) -> i64 {
        let rate = i64::from(self.rate.get());
        let Some(pace) = pace else { return rate };
        if pace.waits.as_ref().is_some_and(|waits| waits.until > now) {
            return 0;
        }
        let room = AT_ONCE.saturating_sub(pace.rested.saturating_duration_since(now));
        let rows = room.as_nanos() / self.share().as_nanos().max(1);
        i64::try_from(rows).unwrap_or(rate).min(rate)
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::identifiers::{OperationId, OutboxId};

    const ALICE: AccountId = AccountId(1);
    const BOB: AccountId = AccountId(2);

    fn paces(rate: u32) -> Paces {
        Paces::new(NonZeroU32::new(rate).unwrap())
    }

    fn allowed(paces: &mut Paces, account: AccountId, now: Instant) -> i64 {
        let allowances = paces.allowances(now);
        let own = allowances.others.iter().find(|other| other.account == account);
        own.map_or(allowances.each, |own| own.rows)
    }

    /// One row for each of the destinations `0`, `1`, `2` and so on.
    fn claimed(account: AccountId, rows: i64) -> Vec<ClaimedSend> {
        (0..rows)
            .map(|number| ClaimedSend {
                outbox: OutboxId(number),
                account,
                destination: number.to_string(),
                operation_id: OperationId::random(),
                recipients: Vec::new(),
                conversation: None,
                body: String::new(),
                content_type: "text/plain".to_owned(),
                subject: None,
                importance: "Normal".to_owned(),
                thread_id: None,
                attempt: 1,
                max_attempts: 1,
                expires_at: None,
                created_at: Timestamp::UNIX_EPOCH,
                possible_duplicate: false,
            })
            .collect()
    }

    fn after(milliseconds: u64, begun: Instant) -> Instant {
        begun + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_seconds_worth_goes_at_once_and_the_rest_evenly_in_turns() {
        let (mut paces, begun) = (paces(50), Instant::now());
        assert_eq!(paces.allowances(begun), Allowances { each: 50, others: Vec::new() });
        paces.count(&claimed(ALICE, 50), begun);
        assert_eq!((allowed(&mut paces, ALICE, begun), allowed(&mut paces, BOB, begun)), (0, 50));
        assert_eq!(paces.allowances(begun).others[0].after.as_deref(), Some("49"));
        for turn in 1..=3 {
            let at = after(100 * turn, begun);
            assert_eq!(paces.next_turn(), Some(at));
            assert_eq!(allowed(&mut paces, ALICE, after(100 * turn - 1, begun)), 0);
            assert_eq!(allowed(&mut paces, ALICE, at), 5);
            paces.count(&claimed(ALICE, 5), at);
        }
        // A turn that is not used up is the last one, and after a second of rest all is forgotten.
        let last = after(400, begun);
        paces.count(&claimed(ALICE, 2), last);
        assert_eq!((paces.next_turn(), allowed(&mut paces, ALICE, last)), (None, 3));
        assert_eq!(paces.allowances(after(1400, begun)), Allowances { each: 50, others: Vec::new() });
    }

    #[test]
    fn who_has_nothing_left_gives_up_the_turn() {
        let (mut paces, begun) = (paces(1), Instant::now());
        paces.count(&claimed(ALICE, 1), begun);
        let turn = after(1000, begun);
        assert_eq!(paces.next_turn(), Some(turn));
        // Somebody else's row woke the dispatcher before.
        paces.count(&claimed(BOB, 1), after(500, begun));
        assert_eq!(paces.next_turn(), Some(turn));
        paces.count(&[], turn);
        assert_eq!(paces.next_turn(), Some(after(1500, begun)));
    }

    #[test]
    fn what_could_not_be_handed_out_does_not_count() {
        let (mut paces, begun) = (paces(3), Instant::now());
        paces.count(&claimed(ALICE, 2), begun);
        paces.uncount(ALICE);
        assert_eq!(allowed(&mut paces, ALICE, begun), 2);
    }

    #[test]
    fn a_rate_that_nobody_can_use_up_is_no_limit() {
        let (mut paces, now) = (paces(u32::MAX), Instant::now());
        paces.count(&claimed(ALICE, 100), now);
        assert_eq!((paces.next_turn(), allowed(&mut paces, ALICE, now)), (None, i64::from(u32::MAX)));
    }
}
