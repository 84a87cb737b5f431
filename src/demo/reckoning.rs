//! Compares what the simulated server says happened with what the database says: is anything lost or doubled?
//!
//! Messages are told apart by account, direction and text; the same text several times has to stand several times.

use std::collections::BTreeMap;

use crate::{
    archive::fact::Direction,
    simulator::{IncomingState, LedgerSnapshot},
    store::{HistoryRow, OutboxRow, OutboxState},
    ucwa::html::plain_from_html,
};

/// The result of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reckoning {
    /// Messages that the server delivered to accounts and that were acknowledged.
    pub delivered_to_accounts: usize,
    /// Messages that the server accepted from accounts.
    pub accepted_from_accounts: usize,
    /// Rows of `messages`, incoming.
    pub archived_incoming: usize,
    /// Rows of `messages`, outgoing.
    pub archived_outgoing: usize,
    /// Rows of `outbox` that came through.
    pub relayed: usize,
    /// Rows of `outbox` whose outcome nobody can tell; they may or may not have been accepted.
    pub uncertain: usize,
    /// What the server counts on and the database does not have, one line each.
    pub lost: Vec<String>,
    /// What stands or was sent more often than it happened, one line each.
    pub duplicated: Vec<String>,
}

impl Reckoning {
    /// Nothing lost and nothing doubled.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.duplicated.is_empty()
    }

    /// Compares a ledger with the archive and the queue.
    pub fn compare(ledger: &LedgerSnapshot, archive: &[HistoryRow], outbox: &[OutboxRow]) -> Self {
        let mut reckoning = Self::default();
        let mut archived: BTreeMap<(String, Direction, String), usize> = BTreeMap::new();
        for row in archive {
            match row.direction {
                Direction::Incoming => reckoning.archived_incoming += 1,
                Direction::Outgoing => reckoning.archived_outgoing += 1,
            }
            *archived.entry((row.account.clone(), row.direction, normal_text(&row.body))).or_default() += 1;
        }

        // What was acknowledged has to be there; what was refused or never acknowledged may be.
        let mut owed: BTreeMap<(String, Direction, String), (usize, usize)> = BTreeMap::new();
        for entry in &ledger.incoming {
            let text = match (&entry.text, &entry.html) {
                (Some(text), _) => normal_text(text),
                (None, Some(html)) => normal_text(&plain_from_html(html)),
                (None, None) => String::new(),
            };
            let (due, possible) = owed.entry((entry.account.clone(), Direction::Incoming, text)).or_default();
            *possible += 1;
            if entry.state == IncomingState::Acknowledged {
                *due += 1;
                reckoning.delivered_to_accounts += 1;
            }
        }
        for entry in &ledger.outgoing {
            let text = if entry.content_type.contains("html") {
                normal_text(&plain_from_html(&entry.text))
            } else {
                normal_text(&entry.text)
            };
            let (due, possible) = owed.entry((entry.account.clone(), Direction::Outgoing, text)).or_default();
            *due += 1;
            *possible += 1;
            reckoning.accepted_from_accounts += 1;
        }
        for (key, (due, possible)) in &owed {
            let there = archived.get(key).copied().unwrap_or_default();
            let (account, direction, text) = key;
            for _ in there..*due {
                reckoning
                    .lost
                    .push(format!("{account} {}: {text:?} is not in the archive", direction.as_str()));
            }
            for _ in *possible..there {
                reckoning
                    .duplicated
                    .push(format!("{account} {}: {text:?} is archived twice", direction.as_str()));
            }
        }
        for (key, there) in &archived {
            // A message that the server refused is kept as failed; what it never heard of must not be there.
            if key.1 == Direction::Incoming && !owed.contains_key(key) {
                for _ in 0..*there {
                    reckoning.duplicated.push(format!("{}: {:?} was never delivered", key.0, key.2));
                }
            }
        }

        reckoning.compare_queue(ledger, outbox);
        reckoning
    }

    fn compare_queue(&mut self, ledger: &LedgerSnapshot, outbox: &[OutboxRow]) {
        let mut accepted: BTreeMap<(String, String), usize> = BTreeMap::new();
        for entry in &ledger.outgoing {
            *accepted.entry((entry.account.clone(), normal_text(&entry.text))).or_default() += 1;
        }
        let mut asked: BTreeMap<(String, String), (usize, usize)> = BTreeMap::new();
        for row in outbox {
            let (came_through, rows) =
                asked.entry((normal_uri(&row.account), normal_text(&row.body))).or_default();
            *rows += 1;
            match row.state {
                OutboxState::Sent | OutboxState::Delivered => {
                    *came_through += 1;
                    self.relayed += 1;
                }
                OutboxState::Uncertain => self.uncertain += 1,
                _ => {}
            }
        }
        for ((account, text), (came_through, rows)) in &asked {
            let times = accepted.get(&(account.clone(), text.clone())).copied().unwrap_or_default();
            for _ in times..*came_through {
                self.lost.push(format!("{account}: {text:?} is marked as sent and the server never took it"));
            }
            for _ in *rows..times {
                self.duplicated.push(format!("{account}: {text:?} was sent more often than it was queued"));
            }
        }
    }
}

fn normal_text(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\0', "\u{2400}").trim().to_owned()
}

fn normal_uri(account: &str) -> String {
    account.parse::<crate::identifiers::SipUri>().map_or_else(|_| account.to_owned(), |uri| uri.to_string())
}
