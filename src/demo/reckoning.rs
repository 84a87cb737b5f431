//! Compares what the simulated server says happened with what the database says: is anything lost or doubled?
//!
//! Messages are told apart by account, direction and text; the same text several times has to stand several times. What
//! was sent is held against the rows of the queue, recipients included.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    archive::fact::Direction,
    outbox::admission,
    simulator::{IncomingState, LedgerSnapshot, OutgoingEntry, OutgoingState},
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
    /// Rows of `outbox` that failed or expired, each with its reason.
    pub failed: usize,
    /// Rows of `outbox` whose outcome nobody can tell; they may or may not have been accepted.
    pub uncertain: usize,
    /// Rows of `outbox` that have come to no end, one line each. One that a user holds or has cancelled is at its end.
    pub unsettled: Vec<String>,
    /// Rows of `outbox` that the server accepted and whose delivery report has not come, one line each. It never does if
    /// it was lost together with the application, or in a response that could not be read.
    pub unreported: Vec<String>,
    /// What the server counts on and the database does not have, what it delivered although its row says that it failed,
    /// and what went to others than its row names (such lines begin with `misdelivered`), one line each.
    pub lost: Vec<String>,
    /// Messages that stand in the archive without their text: an event only linked it, and the server gave it up with the
    /// conversation before it could be fetched. One line each; their rows say why.
    pub withdrawn: Vec<String>,
    /// What stands or was sent more often than it happened, one line each.
    pub duplicated: Vec<String>,
    /// Messages of one account to the same recipients that the server took in another order than that of the queue, one
    /// line each.
    pub out_of_order: Vec<String>,
}

impl Reckoning {
    /// Nothing lost, misdelivered, doubled or out of order. [`Reckoning::unsettled`] is a matter of its own: it may take
    /// its time.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.duplicated.is_empty() && self.out_of_order.is_empty()
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
            let text = shown_text(&entry.text, &entry.content_type);
            let (due, possible) = owed.entry((entry.account.clone(), Direction::Outgoing, text)).or_default();
            *due += 1;
            *possible += 1;
            reckoning.accepted_from_accounts += 1;
        }
        let mut without_text: BTreeMap<String, usize> = archived
            .iter()
            .filter(|((_, direction, text), _)| *direction == Direction::Incoming && text.is_empty())
            .map(|((account, ..), count)| (account.clone(), *count))
            .collect();
        // Of these the queue itself says that nobody can tell, and so the archive can't have them.
        let mut untold: BTreeMap<(String, String), usize> = BTreeMap::new();
        for row in outbox.iter().filter(|row| row.state == OutboxState::Uncertain) {
            let key = (normal_uri(&row.account), shown_text(&row.body, &row.content_type));
            *untold.entry(key).or_default() += 1;
        }
        for (key, (due, possible)) in &owed {
            let there = archived.get(key).copied().unwrap_or_default();
            let (account, direction, text) = key;
            for _ in there..*due {
                if *direction == Direction::Outgoing
                    && let Some(left) = untold.get_mut(&(normal_uri(account), text.clone()))
                    && *left > 0
                {
                    *left -= 1;
                    continue;
                }
                let line = format!("{account} {}: {text:?} is not in the archive", direction.as_str());
                match without_text.get_mut(account).filter(|left| **left > 0) {
                    Some(left) if *direction == Direction::Incoming => {
                        *left -= 1;
                        reckoning.withdrawn.push(line);
                    }
                    _ => reckoning.lost.push(line),
                }
            }
            for _ in *possible..there {
                reckoning
                    .duplicated
                    .push(format!("{account} {}: {text:?} is archived twice", direction.as_str()));
            }
        }
        for (key, there) in &archived {
            // A message that the server refused is kept as failed; what it never heard of must not be there.
            // An empty row stands for a message whose text went with its application before it could be fetched.
            if key.1 == Direction::Incoming && !owed.contains_key(key) && !key.2.is_empty() {
                for _ in 0..*there {
                    reckoning.duplicated.push(format!("{}: {:?} was never delivered", key.0, key.2));
                }
            }
        }

        reckoning.compare_queue(ledger, outbox);
        reckoning.compare_order(ledger, outbox);
        reckoning
    }

    fn compare_queue(&mut self, ledger: &LedgerSnapshot, outbox: &[OutboxRow]) {
        let mut sent: BTreeMap<(String, String), Said> = BTreeMap::new();
        for entry in &ledger.outgoing {
            let key = (normal_uri(&entry.account), shown_text(&entry.text, &entry.content_type));
            sent.entry(key).or_default().entries.push(entry);
        }
        for row in outbox {
            let key = (normal_uri(&row.account), shown_text(&row.body, &row.content_type));
            let (account, text) = &key;
            match row.state {
                OutboxState::Sent | OutboxState::Delivered => self.relayed += 1,
                OutboxState::Failed | OutboxState::Expired => self.failed += 1,
                OutboxState::Uncertain => self.uncertain += 1,
                OutboxState::Queued | OutboxState::Sending | OutboxState::Held | OutboxState::Cancelled => {}
            }
            let line = format!("{account}: {text:?} (row {}) is {}", row.id, row.state.as_str());
            match row.state {
                OutboxState::Queued | OutboxState::Sending => self.unsettled.push(line),
                OutboxState::Sent => self.unreported.push(line),
                _ => {}
            }
            sent.entry(key).or_default().rows.push(row);
        }
        for ((account, text), Said { entries, rows }) in sent {
            let came_through = rows
                .iter()
                .filter(|row| matches!(row.state, OutboxState::Sent | OutboxState::Delivered))
                .count();
            for _ in entries.len()..came_through {
                self.lost.push(format!("{account}: {text:?} is marked as sent and the server never took it"));
            }
            let given_up = rows
                .iter()
                .filter(|row| matches!(row.state, OutboxState::Failed | OutboxState::Expired))
                .count();
            let delivered = entries.iter().filter(|entry| entry.state == OutgoingState::Delivered).count();
            for _ in rows.len() - given_up..delivered.min(rows.len()) {
                self.lost.push(format!("{account}: {text:?} is marked as failed and was delivered"));
            }
            // What did not arrive may be sent again.
            let arrived = entries.iter().filter(|entry| entry.state != OutgoingState::Failed).count();
            for _ in rows.len()..arrived {
                self.duplicated.push(format!("{account}: {text:?} was sent more often than it was queued"));
            }
            for (entry, row) in misdelivered(entries, rows) {
                self.lost.push(format!(
                    "misdelivered: {account}: {text:?} (row {}) is for {} and went to {}",
                    row.id,
                    row.recipients.as_deref().unwrap_or("its conversation"),
                    if entry.to.is_empty() { "nobody".to_owned() } else { entry.to.join(";") },
                ));
            }
        }
    }

    /// Of rows with the same priority, the one that was queued first leaves first.
    fn compare_order(&mut self, ledger: &LedgerSnapshot, outbox: &[OutboxRow]) {
        let by_operation: BTreeMap<&str, &OutboxRow> = outbox
            .iter()
            .filter(|row| row.send_after.is_none() && row.conversation_id.is_none())
            .filter_map(|row| Some((row.operation_id.as_ref()?.0.as_str(), row)))
            .collect();
        let mut last: BTreeMap<(String, String, i64), &OutboxRow> = BTreeMap::new();
        for entry in &ledger.outgoing {
            let row = entry.operation_id.as_deref().and_then(|operation| by_operation.get(operation));
            let Some(row) = row else { continue };
            let mut recipients: Vec<String> =
                admission::recipients(row.recipients.as_deref().unwrap_or_default())
                    .map(|uris| uris.iter().map(ToString::to_string).collect())
                    .unwrap_or_default();
            recipients.sort();
            let destination = (normal_uri(&row.account), recipients.join(";"), row.priority);
            if let Some(before) = last.get(&destination).filter(|before| before.id > row.id) {
                self.out_of_order.push(format!(
                    "{} to {}: row {} was sent after row {}",
                    destination.0, destination.1, row.id, before.id
                ));
            }
            last.insert(destination, row);
        }
    }
}

/// What one account said in one text.
#[derive(Default)]
struct Said<'a> {
    /// As the server took it.
    entries: Vec<&'a OutgoingEntry>,
    /// As the queue asked for it.
    rows: Vec<&'a OutboxRow>,
}

/// Whether a row may have asked for a message.
type Rule = fn(&OutgoingEntry, &OutboxRow) -> bool;

/// Gives each message of one account and text to the row that asked for it. Returns the
/// pairs that do not fit.
fn misdelivered<'a>(
    mut entries: Vec<&'a OutgoingEntry>,
    mut rows: Vec<&'a OutboxRow>,
) -> Vec<(&'a OutgoingEntry, &'a OutboxRow)> {
    let mut pairs = Vec::new();
    let same_operation: Rule = |entry, row| {
        entry.operation_id.is_some()
            && entry.operation_id.as_deref() == row.operation_id.as_ref().map(|id| id.0.as_str())
    };
    let exact: Rule = |entry, row| fits(entry, row) == Fit::Exact;
    let partly: Rule = |entry, row| fits(entry, row) != Fit::Not;
    // The operation names the row; an earlier attempt's is known no more, so the rest goes by its recipients.
    let rules: [Rule; 4] = [same_operation, exact, partly, |_, _| true];
    for rule in rules {
        entries.retain(|entry| match rows.iter().position(|row| rule(entry, row)) {
            Some(at) => {
                pairs.push((*entry, rows.swap_remove(at)));
                false
            }
            None => true,
        });
    }
    pairs.retain(|(entry, row)| fits(entry, row) == Fit::Not);
    pairs
}

#[derive(Debug, PartialEq, Eq)]
enum Fit {
    /// All recipients and nobody else.
    Exact,
    /// Some of the recipients and nobody else: whoever did not join a group does not get its messages.
    Partly,
    /// A stranger, or nobody.
    Not,
}

/// Whether a message went to whom the row names. A row that names only a conversation fits any.
fn fits(entry: &OutgoingEntry, row: &OutboxRow) -> Fit {
    let Ok(named) = admission::recipients(row.recipients.as_deref().unwrap_or_default()) else {
        return Fit::Not;
    };
    let named: BTreeSet<String> = named.iter().map(ToString::to_string).collect();
    let reached: BTreeSet<String> = entry.to.iter().map(|uri| normal_uri(uri)).collect();
    if named.is_empty() || named == reached {
        Fit::Exact
    } else if !reached.is_empty() && reached.is_subset(&named) {
        Fit::Partly
    } else {
        Fit::Not
    }
}

/// The text that people see, whether or not HTML was taken.
fn shown_text(text: &str, content_type: &str) -> String {
    if content_type.to_ascii_lowercase().contains("html") {
        normal_text(&plain_from_html(text))
    } else {
        normal_text(text)
    }
}

fn normal_text(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\0', "\u{2400}").trim().to_owned()
}

fn normal_uri(account: &str) -> String {
    account.parse::<crate::identifiers::SipUri>().map_or_else(|_| account.to_owned(), |uri| uri.to_string())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        identifiers::{ConversationId, MessageId, OperationId, OutboxId},
        simulator::{IncomingEntry, MessageKind},
    };

    const ALICE: &str = "sip:alice@contoso.com";
    const BOB: &str = "sip:bob@contoso.com";
    const CAROL: &str = "sip:carol@contoso.com";

    fn delivered(text: Option<&str>, html: Option<&str>, state: IncomingState) -> IncomingEntry {
        IncomingEntry {
            serial: 0,
            account: ALICE.into(),
            correspondent: BOB.into(),
            conversation: "c".into(),
            thread_id: "t".into(),
            application: "1".into(),
            text: text.map(ToOwned::to_owned),
            html: html.map(ToOwned::to_owned),
            time: Timestamp::UNIX_EPOCH,
            kind: MessageKind::Message,
            state,
            package_acknowledged: state == IncomingState::Acknowledged,
            packaged_at: None,
            acknowledged_at: None,
        }
    }

    fn accepted(text: &str, to: &[&str], operation: &str) -> OutgoingEntry {
        OutgoingEntry {
            serial: 0,
            account: ALICE.into(),
            to: to.iter().map(|uri| (*uri).to_owned()).collect(),
            conversation: "c".into(),
            thread_id: "t".into(),
            application: "1".into(),
            operation_id: Some(operation.into()),
            text: text.into(),
            content_type: "text/plain".into(),
            time: Timestamp::UNIX_EPOCH,
            kind: MessageKind::Message,
            state: OutgoingState::Delivered,
            failure: None,
        }
    }

    fn archived(direction: Direction, body: &str) -> HistoryRow {
        HistoryRow {
            message_id: MessageId(1),
            account: ALICE.into(),
            sent_at: Timestamp::UNIX_EPOCH,
            direction,
            sender: None,
            sender_name: None,
            recipients: None,
            conversation_id: ConversationId(1),
            thread_id: None,
            subject: None,
            body: body.into(),
            status: "delivered".into(),
            source: "event".into(),
            purged_at: None,
        }
    }

    fn queued(id: i64, recipients: &str, body: &str, state: OutboxState) -> OutboxRow {
        OutboxRow {
            id: OutboxId(id),
            account: "Alice@Contoso.com".into(),
            recipients: Some(recipients.into()),
            body: body.into(),
            content_type: "text/plain".into(),
            subject: None,
            importance: "Normal".into(),
            conversation_id: None,
            thread_id: None,
            priority: 100,
            send_after: None,
            expires_at: None,
            max_attempts: None,
            idempotency_key: None,
            correlation: None,
            state,
            attempts: 1,
            next_attempt_at: None,
            operation_id: Some(OperationId(format!("operation {id}"))),
            message_id: None,
            last_code: None,
            last_subcode: None,
            last_error: None,
            possible_duplicate: false,
            created_at: Timestamp::UNIX_EPOCH,
            sent_at: None,
            finished_at: None,
        }
    }

    fn incoming(entries: Vec<IncomingEntry>, bodies: &[&str]) -> Reckoning {
        let ledger = LedgerSnapshot { incoming: entries, ..LedgerSnapshot::default() };
        let archive: Vec<_> = bodies.iter().map(|body| archived(Direction::Incoming, body)).collect();
        Reckoning::compare(&ledger, &archive, &[])
    }

    /// With everything that was accepted in the archive.
    fn outgoing(entries: Vec<OutgoingEntry>, rows: &[OutboxRow]) -> Reckoning {
        let archive: Vec<_> = entries
            .iter()
            .map(|entry| archived(Direction::Outgoing, &shown_text(&entry.text, &entry.content_type)))
            .collect();
        let ledger = LedgerSnapshot { outgoing: entries, ..LedgerSnapshot::default() };
        Reckoning::compare(&ledger, &archive, rows)
    }

    fn numbers(reckoning: &Reckoning) -> (usize, usize) {
        (reckoning.lost.len(), reckoning.duplicated.len())
    }

    #[test]
    fn what_was_acknowledged_is_owed_as_often_as_it_was_said() {
        let twice = || vec![delivered(Some("Hi"), None, IncomingState::Acknowledged); 2];
        assert!(incoming(twice(), &["Hi", "Hi\r\n"]).is_clean());
        let lost = incoming(twice(), &["Hi"]);
        assert_eq!((numbers(&lost), lost.delivered_to_accounts), ((1, 0), 2));
        assert!(lost.lost[0].contains("\"Hi\" is not in the archive"));
        assert_eq!(numbers(&incoming(twice(), &["Hi", "Hi", "Hi"])), (0, 1));
        assert_eq!(numbers(&incoming(twice(), &["Hi", "Hi", "Ho"])), (0, 1), "nobody said so");
    }

    #[test]
    fn a_row_without_text_stands_for_one_message_of_its_account() {
        let two = || vec![delivered(Some("Hi"), None, IncomingState::Acknowledged); 2];
        let reckoning = incoming(two(), &[""]);
        assert_eq!((numbers(&reckoning), reckoning.withdrawn.len()), ((1, 0), 1));
    }

    #[test]
    fn what_nobody_can_tell_of_is_uncertain_and_not_lost() {
        let reckon = |state, accepted_times: usize| {
            let ledger = LedgerSnapshot {
                outgoing: vec![accepted("Hi", &[BOB], "operation 1"); accepted_times],
                ..LedgerSnapshot::default()
            };
            Reckoning::compare(&ledger, &[], &[queued(1, BOB, "Hi", state)])
        };
        let uncertain = reckon(OutboxState::Uncertain, 1);
        assert_eq!((numbers(&uncertain), uncertain.uncertain), ((0, 0), 1));
        assert_eq!(numbers(&reckon(OutboxState::Delivered, 1)), (1, 0));
        assert_eq!(numbers(&reckon(OutboxState::Uncertain, 2)), (1, 1), "sent twice");
    }

    #[test]
    fn what_was_refused_or_never_acknowledged_may_be_there_once() {
        for state in [IncomingState::Refused, IncomingState::Expired, IncomingState::Pending] {
            let entry = || vec![delivered(Some("Hi"), None, state)];
            assert!(incoming(entry(), &[]).is_clean());
            assert!(incoming(entry(), &["Hi"]).is_clean());
            assert_eq!(numbers(&incoming(entry(), &["Hi", "Hi"])), (0, 1));
        }
    }

    #[test]
    fn html_counts_as_the_text_that_people_see() {
        let html = || delivered(None, Some("<b>3</b> &lt; 4"), IncomingState::Acknowledged);
        assert!(incoming(vec![html()], &["3 < 4"]).is_clean());
        assert_eq!(numbers(&incoming(vec![html()], &["<b>3</b> &lt; 4"])), (1, 1));

        let row = OutboxRow {
            content_type: "Text/HTML; charset=utf-8".into(),
            ..queued(1, BOB, "<b>3</b> &lt; 4", OutboxState::Delivered)
        };
        let as_html = OutgoingEntry {
            content_type: "text/html".into(),
            ..accepted("<b>3</b> &lt; 4", &[BOB], "operation 1")
        };
        assert!(outgoing(vec![as_html], std::slice::from_ref(&row)).is_clean());
        assert!(outgoing(vec![accepted("3 < 4", &[BOB], "operation 1")], &[row]).is_clean());
    }

    #[test]
    fn rows_to_the_same_people_are_sent_in_the_order_of_the_queue() {
        let rows = [
            queued(1, BOB, "one", OutboxState::Delivered),
            queued(2, CAROL, "two", OutboxState::Delivered),
            queued(3, "Bob@contoso.com", "three", OutboxState::Delivered),
        ];
        let one = || accepted("one", &[BOB], "operation 1");
        let two = || accepted("two", &[CAROL], "operation 2");
        let three = || accepted("three", &[BOB], "operation 3");
        assert!(outgoing(vec![two(), one(), three()], &rows).is_clean(), "different people");
        let swapped = outgoing(vec![three(), one(), two()], &rows);
        assert_eq!(
            swapped.out_of_order,
            ["sip:alice@contoso.com to sip:bob@contoso.com: row 1 was sent after row 3"]
        );
        assert!(!swapped.is_clean());
        let mut urgent = rows.clone();
        urgent[2].priority = 1;
        assert!(outgoing(vec![three(), one(), two()], &urgent).is_clean(), "a higher priority overtakes");
    }

    #[test]
    fn what_was_delivered_has_not_failed() {
        let failed = [queued(1, BOB, "Hi", OutboxState::Failed)];
        assert_eq!(numbers(&outgoing(vec![accepted("Hi", &[BOB], "operation 1")], &failed)), (1, 0));
        let one_of_two =
            [queued(1, BOB, "Hi", OutboxState::Failed), queued(2, BOB, "Hi", OutboxState::Delivered)];
        assert!(outgoing(vec![accepted("Hi", &[BOB], "operation 2")], &one_of_two).is_clean());
        let refused = OutgoingEntry { state: OutgoingState::Failed, ..accepted("Hi", &[BOB], "operation 1") };
        assert!(outgoing(vec![refused], &failed).is_clean());
    }

    #[test]
    fn a_row_is_sent_once_and_truly() {
        let row = |state| [queued(1, BOB, "Hi", state)];
        let once = || vec![accepted("Hi", &[BOB], "operation 1")];
        let clean = outgoing(once(), &row(OutboxState::Delivered));
        assert!(clean.is_clean() && clean.relayed == 1, "{clean:?}");
        let invented = outgoing(Vec::new(), &row(OutboxState::Delivered));
        assert_eq!(numbers(&invented), (1, 0));
        assert!(invented.lost[0].contains("never took it"));
        let twice = outgoing([once(), once()].concat(), &row(OutboxState::Delivered));
        assert_eq!(numbers(&twice), (0, 1));
        let failed = OutgoingEntry { state: OutgoingState::Failed, ..once().remove(0) };
        assert!(
            outgoing(vec![failed, once().remove(0)], &row(OutboxState::Delivered)).is_clean(),
            "arrived once"
        );
        assert_eq!(numbers(&outgoing(once(), &[])), (0, 1), "no row asked for it");
        assert!(outgoing(once(), &row(OutboxState::Uncertain)).is_clean());
        assert!(outgoing(Vec::new(), &row(OutboxState::Uncertain)).is_clean());
        let ledger = LedgerSnapshot { outgoing: once(), ..LedgerSnapshot::default() };
        let unarchived = Reckoning::compare(&ledger, &[], &row(OutboxState::Delivered));
        assert_eq!(numbers(&unarchived), (1, 0));
    }

    #[test]
    fn what_went_to_others_is_misdelivered() {
        let sent = |recipients: &str, to: &[&str]| {
            outgoing(
                vec![accepted("Hi", to, "operation 1")],
                &[queued(1, recipients, "Hi", OutboxState::Delivered)],
            )
        };
        assert!(sent("BOB@contoso.com", &[BOB]).is_clean());
        assert!(sent("bob@contoso.com;carol@contoso.com", &[CAROL, BOB]).is_clean());
        assert!(sent("bob@contoso.com;carol@contoso.com", &[CAROL]).is_clean(), "Bob did not join");
        assert!(sent("", &[CAROL]).is_clean(), "into a conversation");
        for (recipients, to, words) in [
            (BOB, vec![CAROL], "is for sip:bob@contoso.com and went to sip:carol@contoso.com"),
            (BOB, vec![BOB, CAROL], "went to sip:bob@contoso.com;sip:carol@contoso.com"),
            (BOB, vec![], "went to nobody"),
        ] {
            let wrong = sent(recipients, &to);
            assert_eq!(numbers(&wrong), (1, 0));
            assert!(wrong.lost[0].starts_with("misdelivered") && wrong.lost[0].contains(words), "{wrong:?}");
        }
    }

    #[test]
    fn the_same_text_to_several_people_is_told_apart() {
        let rows = [
            queued(1, "bob@contoso.com;carol@contoso.com", "Hi", OutboxState::Delivered),
            queued(2, BOB, "Hi", OutboxState::Delivered),
            queued(3, CAROL, "Hi", OutboxState::Delivered),
        ];
        let sent = |operations: [&str; 3]| {
            let [first, second, third] = operations;
            outgoing(
                vec![
                    accepted("Hi", &[BOB], second),
                    accepted("Hi", &[CAROL], third),
                    accepted("Hi", &[BOB, CAROL], first),
                ],
                &rows,
            )
        };
        assert!(sent(["operation 1", "operation 2", "operation 3"]).is_clean());
        assert!(sent(["", "", ""]).is_clean(), "by the recipients alone");
        assert_eq!(numbers(&sent(["operation 1", "operation 3", "operation 2"])), (2, 0), "interchanged");
    }

    #[test]
    fn rows_are_counted_by_their_end() {
        let rows: Vec<_> = OutboxState::ALL
            .into_iter()
            .zip(1..)
            .map(|(state, id)| queued(id, BOB, &format!("text {id}"), state))
            .collect();
        let entries = rows
            .iter()
            .filter(|row| matches!(row.state, OutboxState::Sent | OutboxState::Delivered))
            .map(|row| accepted(&row.body, &[BOB], &format!("operation {}", row.id)))
            .collect();
        let reckoning = outgoing(entries, &rows);
        assert!(reckoning.is_clean(), "{reckoning:?}");
        assert_eq!((reckoning.relayed, reckoning.failed, reckoning.uncertain), (2, 2, 1));
        assert_eq!((reckoning.unsettled.len(), reckoning.unreported.len()), (2, 1));
        assert!(reckoning.unsettled[0].contains("(row 1) is queued"), "{:?}", reckoning.unsettled);
    }
}
