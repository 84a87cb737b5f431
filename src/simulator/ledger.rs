//! What the simulated server delivered and accepted: the truth that tests, the demo and the benchmark compare with
//! a database.
//!
//! Every message to an account and every message from one has exactly one entry. Entries are added by the
//! conversations and change state when the event channel learns that a package was acknowledged, that a message
//! ran out of time, or that an invitation ended.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// How a message reached its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageKind {
    /// As the first message of an invitation. The repetition after acceptance is no second message.
    Invitation,
    /// As a message of a connected conversation.
    Message,
}

/// What became of a message to an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncomingState {
    /// Its event waits, or its package was not acknowledged yet.
    Pending,
    /// The package that carried it was acknowledged: from now on it is the client's to keep.
    Acknowledged,
    /// It was not fetched in time, or the application was lost before it acknowledged: lost for the client.
    Expired,
    /// It came with an invitation that was declined, missed or cancelled. `package_acknowledged` tells whether
    /// the client had it nevertheless.
    Refused,
}

/// What became of a message from an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutgoingState {
    /// The request was accepted; delivery is not settled yet.
    Accepted,
    /// Every recipient has it.
    Delivered,
    /// At least one recipient does not have it.
    Failed,
}

/// One message that the server delivered, or tried to deliver, to an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingEntry {
    /// Unique over both directions, ascending.
    pub serial: u64,
    /// SIP URI of the receiving account.
    pub account: String,
    /// SIP URI of the writer.
    pub correspondent: String,
    /// The simulator's own id of the conversation, the same for all its members.
    pub conversation: String,
    /// `threadId` as the account's application saw it.
    pub thread_id: String,
    /// The application that it was delivered to.
    pub application: String,
    /// Plain text exactly as delivered, if any was.
    pub text: Option<String>,
    /// HTML exactly as delivered, if any was.
    pub html: Option<String>,
    /// `timeStamp` of the message.
    pub time: Timestamp,
    /// By invitation or in the conversation.
    pub kind: MessageKind,
    /// What became of it.
    pub state: IncomingState,
    /// Whether a package that carried it was ever acknowledged.
    pub package_acknowledged: bool,
    /// When the first package that carried it was ready to leave.
    pub packaged_at: Option<Timestamp>,
    /// When the request came that acknowledged a package that carried it, the first time.
    pub acknowledged_at: Option<Timestamp>,
}

/// One message that the server accepted from an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutgoingEntry {
    /// Unique over both directions, ascending.
    pub serial: u64,
    /// SIP URI of the sending account.
    pub account: String,
    /// SIP URIs of the recipients.
    pub to: Vec<String>,
    /// The simulator's own id of the conversation, the same for all its members.
    pub conversation: String,
    /// `threadId` of the conversation.
    pub thread_id: String,
    /// The sending application.
    pub application: String,
    /// `operationId` of the request, if it gave one.
    pub operation_id: Option<String>,
    /// The text exactly as accepted.
    pub text: String,
    /// `text/plain` or `text/html`.
    pub content_type: String,
    /// When it was accepted.
    pub time: Timestamp,
    /// By invitation or by `sendMessage`.
    pub kind: MessageKind,
    /// What became of it.
    pub state: OutgoingState,
    /// The subcode of the failure, if it failed.
    pub failure: Option<String>,
}

/// Numbers that cost nothing to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerCounters {
    /// Messages to accounts, whatever became of them.
    pub incoming: u64,
    /// Of these, not settled yet.
    pub incoming_pending: u64,
    /// Of these, acknowledged.
    pub incoming_acknowledged: u64,
    /// Of these, lost for the client.
    pub incoming_expired: u64,
    /// Of these, in invitations that came to nothing.
    pub incoming_refused: u64,
    /// Messages accepted from accounts, whatever became of them.
    pub outgoing: u64,
    /// Of these, not settled yet.
    pub outgoing_accepted: u64,
    /// Of these, delivered.
    pub outgoing_delivered: u64,
    /// Of these, failed.
    pub outgoing_failed: u64,
}

/// The whole ledger at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerSnapshot {
    /// Messages to accounts by serial.
    pub incoming: Vec<IncomingEntry>,
    /// Messages from accounts by serial.
    pub outgoing: Vec<OutgoingEntry>,
    /// Their numbers.
    pub counters: LedgerCounters,
}

#[derive(Default)]
struct Books {
    snapshot: LedgerSnapshot,
    last_serial: u64,
}

/// The ledger of one simulator.
#[derive(Default)]
pub(crate) struct Ledger {
    books: Mutex<Books>,
}

impl LedgerCounters {
    fn of_incoming(&mut self, state: IncomingState) -> &mut u64 {
        match state {
            IncomingState::Pending => &mut self.incoming_pending,
            IncomingState::Acknowledged => &mut self.incoming_acknowledged,
            IncomingState::Expired => &mut self.incoming_expired,
            IncomingState::Refused => &mut self.incoming_refused,
        }
    }

    fn of_outgoing(&mut self, state: OutgoingState) -> &mut u64 {
        match state {
            OutgoingState::Accepted => &mut self.outgoing_accepted,
            OutgoingState::Delivered => &mut self.outgoing_delivered,
            OutgoingState::Failed => &mut self.outgoing_failed,
        }
    }
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message to an account; gives its serial.
    pub(crate) fn add_incoming(&self, entry: IncomingEntry) -> u64 {
        let mut books = self.books();
        books.last_serial += 1;
        let serial = books.last_serial;
        books.snapshot.counters.incoming += 1;
        *books.snapshot.counters.of_incoming(entry.state) += 1;
        books.snapshot.incoming.push(IncomingEntry { serial, ..entry });
        serial
    }

    /// Adds a message from an account; gives its serial.
    pub(crate) fn add_outgoing(&self, entry: OutgoingEntry) -> u64 {
        let mut books = self.books();
        books.last_serial += 1;
        let serial = books.last_serial;
        books.snapshot.counters.outgoing += 1;
        *books.snapshot.counters.of_outgoing(entry.state) += 1;
        books.snapshot.outgoing.push(OutgoingEntry { serial, ..entry });
        serial
    }

    /// A package that carries these messages is about to leave.
    pub(crate) fn hand_over(&self, serials: impl IntoIterator<Item = u64>) {
        let now = Timestamp::now();
        let mut books = self.books();
        for serial in serials {
            if let Some(entry) = incoming(&mut books.snapshot, serial) {
                entry.packaged_at.get_or_insert(now);
            }
        }
    }

    /// The packages that carried these messages were acknowledged.
    pub(crate) fn acknowledge(&self, serials: impl IntoIterator<Item = u64>) {
        let now = Timestamp::now();
        let mut books = self.books();
        for serial in serials {
            if let Some(entry) = incoming(&mut books.snapshot, serial) {
                entry.acknowledged_at.get_or_insert(now);
            }
            settle_incoming(&mut books.snapshot, serial, IncomingState::Acknowledged);
        }
    }

    /// The message is lost for the client, unless it had acknowledged it.
    pub(crate) fn expire(&self, serial: u64) {
        settle_incoming(&mut self.books().snapshot, serial, IncomingState::Expired);
    }

    /// The invitation that carried the message came to nothing.
    pub(crate) fn refuse(&self, serial: u64) {
        settle_incoming(&mut self.books().snapshot, serial, IncomingState::Refused);
    }

    /// A message from an account is delivered (`None`) or has failed with a subcode.
    pub(crate) fn settle_outgoing(&self, serial: u64, failure: Option<&str>) {
        let mut books = self.books();
        let LedgerSnapshot { outgoing, counters, .. } = &mut books.snapshot;
        let Ok(index) = outgoing.binary_search_by_key(&serial, |entry| entry.serial) else { return };
        let entry = &mut outgoing[index];
        if entry.state == OutgoingState::Accepted {
            *counters.of_outgoing(entry.state) -= 1;
            entry.state = if failure.is_some() { OutgoingState::Failed } else { OutgoingState::Delivered };
            entry.failure = failure.map(str::to_owned);
            *counters.of_outgoing(entry.state) += 1;
        }
    }

    pub(crate) fn counters(&self) -> LedgerCounters {
        self.books().snapshot.counters
    }

    pub(crate) fn snapshot(&self) -> LedgerSnapshot {
        self.books().snapshot.clone()
    }
}

fn incoming(snapshot: &mut LedgerSnapshot, serial: u64) -> Option<&mut IncomingEntry> {
    let index = snapshot.incoming.binary_search_by_key(&serial, |entry| entry.serial).ok()?;
    snapshot.incoming.get_mut(index)
}

fn settle_incoming(snapshot: &mut LedgerSnapshot, serial: u64, wanted: IncomingState) {
    use IncomingState::{Acknowledged, Expired, Pending, Refused};
    let LedgerSnapshot { incoming, counters, .. } = snapshot;
    let Ok(index) = incoming.binary_search_by_key(&serial, |entry| entry.serial) else { return };
    let entry = &mut incoming[index];
    entry.package_acknowledged |= wanted == Acknowledged;
    let state = match (entry.state, wanted) {
        // What came in time stays; an invitation that failed stays failed, though its package is acknowledged later.
        (Pending, wanted) => wanted,
        (Acknowledged | Expired, Refused) => Refused,
        (state, _) => state,
    };
    *counters.of_incoming(entry.state) -= 1;
    entry.state = state;
    *counters.of_incoming(state) += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incoming() -> IncomingEntry {
        IncomingEntry {
            serial: 0,
            account: "sip:alice@contoso.com".into(),
            correspondent: "sip:lene@contoso.com".into(),
            conversation: "c".into(),
            thread_id: "t".into(),
            application: "1".into(),
            text: Some("Hi".into()),
            html: None,
            time: Timestamp::UNIX_EPOCH,
            kind: MessageKind::Message,
            state: IncomingState::Pending,
            package_acknowledged: false,
            packaged_at: None,
            acknowledged_at: None,
        }
    }

    #[test]
    fn a_message_is_counted_in_one_state_at_a_time() {
        let ledger = Ledger::default();
        let first = ledger.add_incoming(incoming());
        let second = ledger.add_incoming(incoming());
        let third = ledger.add_incoming(incoming());
        ledger.acknowledge([first, first]);
        ledger.expire(second);
        ledger.expire(first);
        ledger.acknowledge([second]);
        ledger.acknowledge([third]);
        ledger.refuse(third);
        let snapshot = ledger.snapshot();
        let states: Vec<_> = snapshot.incoming.iter().map(|entry| entry.state).collect();
        assert_eq!(states, [IncomingState::Acknowledged, IncomingState::Expired, IncomingState::Refused]);
        assert!(snapshot.incoming.iter().all(|entry| entry.package_acknowledged));
        let counters = ledger.counters();
        assert_eq!(
            (
                counters.incoming_pending,
                counters.incoming_acknowledged,
                counters.incoming_expired,
                counters.incoming_refused
            ),
            (0, 1, 1, 1)
        );
    }

    #[test]
    fn only_the_first_package_and_the_first_acknowledgement_count() {
        let ledger = Ledger::default();
        let serial = ledger.add_incoming(incoming());
        ledger.hand_over([serial, serial + 1]);
        let times = |ledger: &Ledger| {
            let entry = &ledger.snapshot().incoming[0];
            (entry.packaged_at, entry.acknowledged_at)
        };
        let (packaged, none) = times(&ledger);
        assert!(packaged.is_some() && none.is_none());
        ledger.acknowledge([serial]);
        let (_, acknowledged) = times(&ledger);
        assert!(acknowledged >= packaged);
        ledger.hand_over([serial]);
        ledger.acknowledge([serial]);
        assert_eq!(times(&ledger), (packaged, acknowledged));
    }

    #[test]
    fn a_snapshot_survives_json() {
        let ledger = Ledger::default();
        ledger.add_incoming(incoming());
        let text = serde_json::to_string(&ledger.snapshot()).unwrap();
        assert_eq!(serde_json::from_str::<LedgerSnapshot>(&text).unwrap(), ledger.snapshot());
    }
}
