//! Conversation logs: what they have and the archive has not becomes rows, everything else stays as it is
//! (protocol 12.5 and 16; guarantee G4).
//!
//! The same message is one of the same thread, direction, sender and normalised text at nearly the same time. Matching
//! is one to one and keeps the order, so an equal text that stands twice in the log stands twice in the archive. It is
//! done anew at each reading and against whatever stands there, so reading a log again adds nothing.
//!
//! A purged row has no text to compare: it is any message of that direction and sender at that time which no other row
//! is. What is taken for it wrongly would be as old, and is not to be kept either.

use std::collections::{BTreeMap, HashSet};

use jiff::{SignedDuration, Timestamp};

use super::{fill, messages::Text, settle::PATIENCE};
use crate::{
    archive::{
        Workspace,
        fact::{
            Direction, LoggedConversation, LoggedMessage, MessageFact, OperationStatus, Person, Quarantined,
        },
        row::{Awaiting, MessageRow, MessageSource, MessageStatus, ParticipantRow},
        text::{is_plausible, to_milliseconds},
        workspace::{Applying, PlainFromHtml},
    },
    identifiers::{ConversationId, OperationId},
    store::OutboxState,
};

/// Messages of a log by number, and rows by place, that say the same.
type Alike = (Vec<usize>, Vec<usize>);

/// How far the times of the server's event and of its log may be apart.
const SAME_TIME: SignedDuration = SignedDuration::from_secs(5);

/// How much later than it was said the text of an invitation may reach us: an application that nobody follows lives
/// about so long and then tells what it kept.
pub(crate) const LATE_INVITATION: SignedDuration = SignedDuration::from_mins(45);

/// How long an attempt may take from its claim until the server has the text: its turn, ringing, settling.
const LONGEST_ATTEMPT: SignedDuration = SignedDuration::from_mins(10);

/// One message of a log, ready for the columns.
struct Said {
    sent_at: Timestamp,
    direction: Direction,
    sender_uri: Option<String>,
    sender_name: Option<String>,
    text: Text,
    key: String,
    /// The log's first: it may have been an invitation's text.
    first: bool,
}

impl Said {
    fn of(message: &LoggedMessage, applying: &Applying, plain_from_html: PlainFromHtml) -> Self {
        let own = applying.account_uri.as_str();
        let sender = message.sender.as_ref();
        let uri = sender.and_then(|sender| sender.uri.as_deref());
        let direction = if uri == Some(own) { Direction::Outgoing } else { message.direction };
        let text = Text::of(&message.content, plain_from_html);
        Self {
            sent_at: to_milliseconds(message.sent_at),
            direction,
            sender_uri: match direction {
                Direction::Outgoing => Some(own.to_owned()),
                Direction::Incoming => uri.map(ToOwned::to_owned),
            },
            sender_name: sender.and_then(|sender| sender.name.clone()),
            key: comparable(&text.body),
            text,
            first: false,
        }
    }

    /// How far apart the row and this are in time; `None` if they can't be the same message.
    fn distance(&self, row: &MessageRow) -> Option<SignedDuration> {
        let same_sender = match (&self.sender_uri, &row.sender_uri) {
            (Some(said), Some(known)) => said == known,
            _ => true,
        };
        if !same_sender || self.direction != row.direction {
            return None;
        }
        let later = row.sent_at.duration_since(self.sent_at);
        // An invitation bears no time: its row has ours, and so may a row of the queue.
        let invitation = row.source == MessageSource::Invitation && row.href.is_none();
        let tolerance = if invitation || row.outbox.is_some() { PATIENCE } else { SAME_TIME };
        (later.abs() <= tolerance).then_some(later.abs())
    }

    /// Whether the row is an invitation that reached us long after it was said: then it is the log's first message.
    fn came_late(&self, row: &MessageRow) -> bool {
        let later = row.sent_at.duration_since(self.sent_at);
        self.first
            && row.source == MessageSource::Invitation
            && row.href.is_none()
            && row.direction == self.direction
            && (row.sender_uri.is_none() || self.sender_uri.is_none() || row.sender_uri == self.sender_uri)
            && !later.is_negative()
            && later <= LATE_INVITATION
    }
}

/// Whether an attempt that was claimed at one time, or given up at another, may have said something at a third.
fn was_attempted_then(claimed: Option<Timestamp>, given_up: Option<Timestamp>, said: Timestamp) -> bool {
    let after = |earlier: Timestamp, later: Timestamp| {
        let between = later.duration_since(earlier);
        between >= -PATIENCE && between <= LONGEST_ATTEMPT
    };
    // A program that was down meanwhile gave up long after; a user who queues the row again takes the claim away.
    match (claimed, given_up) {
        (Some(claimed), _) => after(claimed, said),
        (None, Some(given_up)) => after(said, given_up),
        (None, None) => false,
    }
}

/// A log keeps text another way than events tell it: white space does not count.
fn comparable(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Workspace {
    pub(in crate::archive) fn apply_logged(&mut self, applying: &mut Applying, fact: &LoggedConversation) {
        for (occurrence, unreadable) in (0..).zip(&fact.unreadable) {
            // The address stands for a cursor: each reading of the log brings the same again.
            self.apply_quarantined(applying, unreadable, Some(&fact.href), occurrence);
        }
        let (dated, misdated): (Vec<_>, Vec<_>) =
            fact.messages.iter().partition(|message| is_plausible(message.sent_at, applying.at));
        // By its time a logged message is told from what events brought: one without is kept apart.
        for (occurrence, message) in (fact.unreadable.len()..).zip(misdated) {
            let reason =
                format!("a message of a conversation log is dated {}, which can't be right", message.sent_at);
            let quarantined =
                Quarantined::new(reason, format!("transcript of {}: {:?}", fact.href, message.content));
            let occurrence = i64::try_from(occurrence).unwrap_or(i64::MAX);
            self.apply_quarantined(applying, &quarantined, Some(&fact.href), occurrence);
        }
        let mut said: Vec<Said> =
            dated.into_iter().map(|message| Said::of(message, applying, self.plain_from_html)).collect();
        said.sort_by_key(|said| said.sent_at);
        if let Some(first) = said.first_mut() {
            first.first = true;
        }
        let archived = self.archived_of_thread(applying, fact.thread_id.as_deref());
        let mut matched = self.match_one_to_one(&said, &archived);
        self.set_aside_what_is_under_way(applying, &said, &archived, &mut matched);
        let home =
            archived.iter().find(|place| matched.values().any(|other| other == &Some(**place))).copied();
        let home = home.map(|place| self.messages.get(place).conversation);
        let span = said.first().map(|said| said.sent_at).zip(said.last().map(|said| said.sent_at));
        let Some(span) = span else { return };
        let mut made = None;
        let mut described = HashSet::new();
        for (number, said) in said.into_iter().enumerate() {
            if matched.contains_key(&number) {
                continue;
            }
            let conversation = self
                .conversation_of_thread(applying, fact.thread_id.as_deref(), said.sent_at)
                .or_else(|| {
                    home.filter(|_| fact.thread_id.is_none()).and_then(|id| self.conversations.by_id(id))
                })
                .or(made)
                .unwrap_or_else(|| self.conversation_of_log(applying, fact, span));
            made = Some(conversation);
            let id = self.conversations.get(conversation).id;
            if described.insert(id) {
                self.people_of_log(applying, conversation, &fact.people);
            }
            let in_doubt = self.send_in_doubt(applying, fact, &said);
            let place = match &in_doubt {
                Some((send, operation)) => {
                    self.said(applying, *send, operation, id, MessageSource::ConversationLog)
                }
                None => self.new_message(applying, id, said.direction, &said.text),
            };
            let row = self.messages.get_mut(place);
            row.sent_at = said.sent_at;
            row.sender_uri = said.sender_uri;
            row.sender_name = said.sender_name;
            row.source = MessageSource::ConversationLog;
            row.status = MessageStatus::Delivered;
            self.release(place);
            if let Some((send, operation)) = in_doubt {
                self.send_completed(applying, send, &operation, OperationStatus::Success, None, None);
            }
        }
    }

    /// The row of the queue that a logged message of ours must be, of those of which nobody could tell whether the server
    /// took them, and of those that it took without telling anything more: with the same text, for people who are in the log, and attempted shortly before. With the attempt.
    fn send_in_doubt(
        &self,
        applying: &Applying,
        fact: &LoggedConversation,
        said: &Said,
    ) -> Option<(usize, OperationId)> {
        if said.direction != Direction::Outgoing {
            return None;
        }
        let is_there = |uri: &str| fact.people.iter().any(|person| person.uri.as_deref() == Some(uri));
        let same_thread = |id: ConversationId| {
            let known = self.conversations.by_id(id).map(|place| self.conversations.get(place));
            known.is_some_and(|known| known.thread_id.is_some() && known.thread_id == fact.thread_id)
        };
        self.attempts.iter().find_map(|attempt| {
            let place = self.outbox.by_id(attempt.outbox)?;
            let send = self.outbox.get(place);
            let is_in_doubt = attempt.outcome.as_deref() == Some(OutboxState::Uncertain.as_str())
                && matches!(send.state, OutboxState::Uncertain | OutboxState::Queued);
            // A call with text was answered and its application lost before an event told of it.
            let is_unplaced = send.state == OutboxState::Sent
                && send.message.is_none()
                && send.operation_id.as_ref() == Some(&attempt.operation_id);
            let fits = (is_in_doubt || is_unplaced)
                && send.account == applying.account
                && was_attempted_then(send.claimed_at, attempt.finished_at, said.sent_at)
                && match send.given_conversation {
                    Some(id) => same_thread(id),
                    None => !send.destination.is_empty() && send.destination.split(';').all(is_there),
                }
                && comparable(&Text::of_send(send, self.plain_from_html).body) == said.key;
            fits.then(|| (place, attempt.operation_id.clone()))
        })
    }

    /// The account's loaded messages that may stand in a log of this thread.
    fn archived_of_thread(&self, applying: &Applying, thread: Option<&str>) -> Vec<usize> {
        let mut places = self.messages.places();
        places.retain(|&place| {
            let row = self.messages.get(place);
            let known = self
                .conversations
                .by_id(row.conversation)
                .and_then(|conversation| self.conversations.get(conversation).thread_id.as_deref());
            row.account == applying.account
                && match (thread, known) {
                    (Some(thread), Some(known)) => thread == known,
                    // Who is not known to be in the same thread has to be known as the same person, or not known yet.
                    _ => row.sender_uri.is_some() || !row.is_chained(),
                }
        });
        places.sort_by_key(|&place| (self.messages.get(place).sent_at, place));
        places
    }

    /// Which message of the log is which row. Both lists are sorted by time.
    fn match_one_to_one(&self, said: &[Said], archived: &[usize]) -> BTreeMap<usize, Option<usize>> {
        let mut texts: BTreeMap<(Direction, &str), Alike> = BTreeMap::new();
        for (number, said) in said.iter().enumerate() {
            texts.entry((said.direction, &said.key)).or_default().0.push(number);
        }
        let keys: Vec<String> =
            archived.iter().map(|&place| comparable(&self.messages.get(place).body)).collect();
        for (&place, key) in archived.iter().zip(&keys) {
            if self.messages.get(place).is_purged {
                continue;
            }
            if let Some((_, rows)) = texts.get_mut(&(self.messages.get(place).direction, key.as_str())) {
                rows.push(place);
            }
        }
        let mut matched = BTreeMap::new();
        for (numbers, rows) in texts.into_values() {
            let distance = |one: usize, other: usize| {
                said[numbers[one]]
                    .distance(self.messages.get(rows[other]))
                    .map(|distance| i64::try_from(distance.as_millis()).unwrap_or(i64::MAX))
            };
            for (one, other) in align(numbers.len(), rows.len(), distance) {
                matched.insert(numbers[one], Some(rows[other]));
            }
            let late = numbers.first().filter(|number| !matched.contains_key(number)).and_then(|&number| {
                let free = |place: usize| !matched.values().any(|other| *other == Some(place));
                let late = |place: usize| said[number].came_late(self.messages.get(place)) && free(place);
                Some((number, rows.iter().copied().find(|&place| late(place))?))
            });
            matched.extend(late.map(|(number, row)| (number, Some(row))));
        }
        self.match_purged(said, archived, &mut matched);
        matched
    }

    /// What is left may be what was purged.
    fn match_purged(&self, said: &[Said], archived: &[usize], matched: &mut BTreeMap<usize, Option<usize>>) {
        let rows: Vec<usize> =
            archived.iter().copied().filter(|&place| self.messages.get(place).is_purged).collect();
        let numbers: Vec<usize> = (0..said.len()).filter(|number| !matched.contains_key(number)).collect();
        let distance = |one: usize, other: usize| {
            let (said, row) = (&said[numbers[one]], self.messages.get(rows[other]));
            let distance = said
                .distance(row)
                .or_else(|| said.came_late(row).then(|| row.sent_at.duration_since(said.sent_at)))?;
            Some(i64::try_from(distance.as_millis()).unwrap_or(i64::MAX))
        };
        for (one, other) in align(numbers.len(), rows.len(), distance) {
            matched.insert(numbers[one], Some(rows[other]));
        }
    }

    /// A text that is still being fetched, and a row of the queue whose outcome is open, may be what the log has: the
    /// next reading knows.
    fn set_aside_what_is_under_way(
        &self,
        applying: &Applying,
        said: &[Said],
        archived: &[usize],
        matched: &mut BTreeMap<usize, Option<usize>>,
    ) {
        let mut announced: Vec<usize> = archived
            .iter()
            .copied()
            .filter(|&place| {
                let row = self.messages.get(place);
                row.body.is_empty() && matches!(row.awaiting, Some(Awaiting::Fetch | Awaiting::Receipt))
            })
            .collect();
        let mut sending: Vec<String> = self
            .outbox
            .iter()
            .filter(|send| send.account == applying.account && send.state == OutboxState::Sending)
            .map(|send| comparable(&Text::of_send(send, self.plain_from_html).body))
            .collect();
        for (number, said) in said.iter().enumerate() {
            if matched.contains_key(&number) {
                continue;
            }
            let fetched = announced.iter().position(|&place| {
                self.messages.get(place).sent_at.duration_since(said.sent_at).abs() <= PATIENCE
            });
            let sent = (said.direction == Direction::Outgoing)
                .then(|| sending.iter().position(|body| *body == said.key))
                .flatten();
            if let Some(position) = sent {
                sending.remove(position);
                matched.insert(number, None);
            } else if let Some(position) = fetched {
                announced.remove(position);
                matched.insert(number, None);
            }
        }
    }

    /// The conversation of this thread that was going on at this time, or else the one before it.
    fn conversation_of_thread(
        &self,
        applying: &Applying,
        thread: Option<&str>,
        at: Timestamp,
    ) -> Option<usize> {
        let thread = thread?;
        let mut places = self.conversations.places();
        places.retain(|&place| {
            let row = self.conversations.get(place);
            row.account == applying.account && row.thread_id.as_deref() == Some(thread)
        });
        let begun = |place: &usize| self.conversations.get(*place).started_at <= at;
        let going_on =
            |place: &usize| self.conversations.get(*place).ended_at.is_none_or(|ended_at| at <= ended_at);
        places
            .iter()
            .rfind(|place| begun(place) && going_on(place))
            .or_else(|| places.iter().rfind(|place| begun(place)))
            .or_else(|| places.first())
            .copied()
    }

    /// A conversation that only the log knows.
    fn conversation_of_log(
        &mut self,
        applying: &Applying,
        fact: &LoggedConversation,
        (first, last): (Timestamp, Timestamp),
    ) -> usize {
        let place = self.new_conversation(applying, None);
        let row = self.conversations.get_mut(place);
        row.thread_id.clone_from(&fact.thread_id);
        row.subject.clone_from(&fact.subject);
        row.importance.clone_from(&fact.importance);
        row.direction = fact.direction;
        row.online_meeting_uri.clone_from(&fact.online_meeting_uri);
        row.multiparty = fact.multiparty;
        row.state = Some("Disconnected".to_owned());
        row.started_at = first;
        row.ended_at = Some(last);
        let own = applying.account_uri.as_str().to_owned();
        self.stay_of_log(applying, place, Some(own), None, true);
        place
    }

    /// Everybody the log names is in the conversation.
    fn people_of_log(&mut self, applying: &Applying, conversation: usize, people: &[Person]) {
        let id = self.conversations.get(conversation).id;
        for person in people {
            if person.uri.as_deref() == Some(applying.account_uri.as_str()) {
                continue;
            }
            let known = self.participants.of_conversation(id).into_iter().find(|&place| {
                let stay = self.participants.get(place);
                match (&person.uri, &stay.sip_uri) {
                    (Some(uri), Some(known)) => uri == known,
                    _ => person.name.is_some() && person.name == stay.display_name,
                }
            });
            match known {
                Some(place) => {
                    let stay = self.participants.get_mut(place);
                    fill(&mut stay.sip_uri, person.uri.as_ref());
                    fill(&mut stay.display_name, person.name.as_ref());
                }
                None => {
                    self.stay_of_log(applying, conversation, person.uri.clone(), person.name.clone(), false);
                }
            }
        }
    }

    fn stay_of_log(
        &mut self,
        applying: &Applying,
        conversation: usize,
        sip_uri: Option<String>,
        display_name: Option<String>,
        is_local: bool,
    ) {
        let id = self.next_participant_id();
        let conversation = self.conversations.get(conversation);
        self.participants.insert(ParticipantRow {
            id,
            account: applying.account,
            conversation: conversation.id,
            session: Some(applying.session),
            href: None,
            sip_uri,
            display_name,
            role: None,
            source_network: None,
            is_local,
            joined_at: Some(conversation.started_at),
            left_at: conversation.ended_at,
            awaiting_fetch: false,
        });
    }

    /// The row that a log made of a message whose event comes only now; it takes the event's address.
    pub(super) fn logged_before(
        &mut self,
        applying: &Applying,
        conversation: ConversationId,
        direction: Direction,
        sender_uri: Option<&str>,
        fact: &MessageFact,
    ) -> Option<usize> {
        if fact.content.is_empty() {
            return None;
        }
        let key = comparable(&Text::of(&fact.content, self.plain_from_html).body);
        let (sent_at, tolerance) = match fact.sent_at.filter(|&sent_at| is_plausible(sent_at, applying.at)) {
            Some(sent_at) => (to_milliseconds(sent_at), SAME_TIME),
            None => (applying.at, PATIENCE),
        };
        let place = self.messages.of_conversation(conversation).into_iter().find(|&place| {
            let row = self.messages.get(place);
            row.source == MessageSource::ConversationLog
                && row.href.is_none()
                && row.direction == direction
                && (row.sender_uri.is_none()
                    || sender_uri.is_none()
                    || row.sender_uri.as_deref() == sender_uri)
                && row.sent_at.duration_since(sent_at).abs() <= tolerance
                && (row.is_purged || comparable(&row.body) == key)
        })?;
        self.messages.get_mut(place).href = Some(fact.href.clone());
        self.messages.index(place);
        Some(place)
    }
}

/// Pairs of two lists that keep the order of both: as many as can be, and of those the nearest. `distance` is `None`
/// for what can't be a pair.
fn align(ones: usize, others: usize, distance: impl Fn(usize, usize) -> Option<i64>) -> Vec<(usize, usize)> {
    // best[i][j]: pairs and their distances, negated, that can be had from i and j on.
    let width = others + 1;
    let mut best = vec![(0_u32, 0_i64); (ones + 1) * width];
    let pair = |best: &[(u32, i64)], i: usize, j: usize| {
        let (pairs, nearness) = best[(i + 1) * width + j + 1];
        distance(i, j).map(|distance| (pairs + 1, nearness.saturating_sub(distance)))
    };
    for i in (0..ones).rev() {
        for j in (0..others).rev() {
            let without = best[(i + 1) * width + j].max(best[i * width + j + 1]);
            best[i * width + j] = pair(&best, i, j).map_or(without, |with| with.max(without));
        }
    }
    let mut pairs = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < ones && j < others {
        let here = best[i * width + j];
        if pair(&best, i, j) == Some(here) {
            pairs.push((i, j));
            (i, j) = (i + 1, j + 1);
        } else if best[(i + 1) * width + j] == here {
            i += 1;
        } else {
            j += 1;
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::align;

    #[test]
    fn as_many_pairs_as_can_be_and_then_the_nearest() {
        let pairs = |ones: &[i64], others: &[i64]| {
            align(ones.len(), others.len(), |i, j| {
                let distance = (ones[i] - others[j]).abs();
                (distance <= 5).then_some(distance)
            })
        };
        assert_eq!(pairs(&[0, 4], &[4]), [(1, 0)], "the nearest");
        assert_eq!(pairs(&[0, 4], &[3, 8]), [(0, 0), (1, 1)], "two rather than one that fits better");
        assert_eq!(pairs(&[0, 10], &[20]), []);
        assert_eq!(pairs(&[], &[1]), []);
    }
}
