//! What became of an outbox row: the answer to its request, and the events that carry its operation id (G5).
//!
//! States only move forward. Every attempt has an operation id of its own, so a late answer is told from a current one:
//! an older attempt's failure concerns only that attempt, but its success means that the message was sent, whatever the
//! row has become meanwhile.

use jiff::Timestamp;

use super::sentence;
use crate::{
    archive::{
        Workspace,
        fact::{Direction, FailureReason, InvitationKind, OperationStatus, SaidIn, SendFact, SendOutcome},
        retry::{Healing, classify_invitation_failure, describe_invitation_failure},
        row::{Awaiting, MessageSource, MessageStatus},
        text::to_milliseconds,
        workspace::Applying,
    },
    identifiers::{AccountId, ConversationId, OperationId},
    store::{OutboxState, SettledSend},
};

/// What an attempt led to, for `outbox_attempts`.
#[derive(Debug, Clone, Copy, Default)]
struct Outcome<'a> {
    http_status: Option<u16>,
    reason: Option<&'a FailureReason>,
    detail: Option<&'a str>,
}

/// How the sentence begins that names who could not be brought into a group.
const NOT_REACHED: &str = "not reached: ";
/// How the one begins that names to whom the server could not deliver.
const NOT_DELIVERED: &str = "not delivered to ";

/// SIP URIs joined by `;`, each of them once.
pub(super) fn with_recipient(recipients: Option<String>, uri: &str) -> String {
    match recipients {
        Some(recipients) if recipients.split(';').any(|known| known == uri) => recipients,
        Some(recipients) => format!("{recipients};{uri}"),
        None => uri.to_owned(),
    }
}

/// A number in 0..=1 that differs from attempt to attempt and is the same whenever the same event is applied.
fn spread(operation: &OperationId) -> f64 {
    let sum = operation.0.bytes().fold(0_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    f64::from(sum) / f64::from(u8::MAX)
}

impl Workspace {
    /// The outbox row for which an operation was started.
    pub(super) fn send_of(&self, account: AccountId, operation: &OperationId) -> Option<usize> {
        let attempt = self.attempts.by_operation(operation)?;
        let send = self.outbox.by_id(self.attempts.get(attempt).outbox)?;
        (self.outbox.get(send).account == account).then_some(send)
    }

    /// Whether this attempt is known to have failed.
    pub(super) fn attempt_failed(&self, operation: &OperationId) -> bool {
        self.attempts.by_operation(operation).is_some_and(|place| {
            self.attempts.get(place).outcome.as_deref() == Some(OutboxState::Failed.as_str())
        })
    }

    fn is_current(&self, send: usize, operation: &OperationId) -> bool {
        self.outbox.get(send).operation_id.as_ref() == Some(operation)
    }

    pub(in crate::archive) fn apply_send(&mut self, applying: &mut Applying, fact: &SendFact) {
        let Some(send) = self.outbox.by_id(fact.outbox) else {
            // Its user deleted the row; there is nobody to tell.
            return;
        };
        if self.outbox.get(send).account != applying.account {
            return;
        }
        let operation = &fact.operation_id;
        match &fact.outcome {
            SendOutcome::MessageAccepted { conversation_href, message_href, as_plain, not_reached } => {
                let conversation = self.mention_conversation(applying, conversation_href);
                let conversation = self.conversations.get(conversation).id;
                let message =
                    self.message_accepted(applying, send, operation, conversation, message_href.as_deref());
                if *as_plain {
                    self.said_as_plain(message);
                }
                self.send_accepted(applying, send, operation, false);
                self.note_not_reached(send, Some(message), not_reached);
                self.placed_by_its_address(applying, conversation_href, message);
                self.complete_if_reported(applying, send, operation, message);
            }
            SendOutcome::NotReached { not_reached } => {
                if self.is_current(send, operation) {
                    let message = self.outbox.get(send).message.and_then(|id| self.messages.by_id(id));
                    self.note_not_reached(send, message, not_reached);
                }
            }
            SendOutcome::InvitationAccepted { invitation_href } => {
                self.send_accepted(applying, send, operation, false);
                if let Some(href) = invitation_href {
                    self.invitation_accepted(applying, send, operation, href);
                }
            }
            SendOutcome::RetryAt { at, reason, http_status, error } => {
                let outcome =
                    Outcome { http_status: *http_status, reason: Some(reason), detail: Some(error) };
                self.close_attempt(applying, operation, OutboxState::Queued, outcome);
                let state = self.outbox.get(send).state;
                // What events have failed meanwhile is the later news.
                if self.is_current(send, operation)
                    && matches!(state, OutboxState::Sending | OutboxState::Uncertain)
                {
                    self.withdraw_message(send, operation);
                    let row = self.outbox.get_mut(send);
                    row.state = OutboxState::Queued;
                    row.next_attempt_at = Some(to_milliseconds(*at));
                    row.conversation = row.given_conversation;
                    row.message = None;
                    row.finished_at = None;
                    row.sent_at = None;
                    row.last_code.clone_from(&reason.code);
                    row.last_subcode.clone_from(&reason.subcode);
                    row.last_error = Some(error.clone());
                }
            }
            SendOutcome::Refused { conversation_href, reason, http_status, error } => {
                let outcome =
                    Outcome { http_status: *http_status, reason: Some(reason), detail: Some(error) };
                self.close_attempt(applying, operation, OutboxState::Failed, outcome);
                let state = self.outbox.get(send).state;
                if self.is_current(send, operation)
                    && matches!(state, OutboxState::Sending | OutboxState::Uncertain)
                {
                    if let Some(href) = conversation_href {
                        self.keep_refused(applying, send, operation, href, reason, error);
                    }
                    let row = self.outbox.get_mut(send);
                    row.state = OutboxState::Failed;
                    row.finished_at = Some(applying.at);
                    row.last_code.clone_from(&reason.code);
                    row.last_subcode.clone_from(&reason.subcode);
                    row.last_error = Some(error.clone());
                }
            }
            SendOutcome::Unheard { since, said_in, silent, doubtful } => {
                let outcome =
                    if self.may_have_been_heard(applying, *since, said_in) { doubtful } else { silent };
                let fact = SendFact {
                    outbox: fact.outbox,
                    operation_id: operation.clone(),
                    outcome: (**outcome).clone(),
                };
                self.apply_send(applying, &fact);
            }
            SendOutcome::Uncertain { error, again_at } => {
                self.send_uncertain(applying, send, operation, error, *again_at);
            }
        }
    }

    /// Nobody can tell whether the server took an attempt.
    fn send_uncertain(
        &mut self,
        applying: &Applying,
        send: usize,
        operation: &OperationId,
        error: &str,
        again_at: Option<Timestamp>,
    ) {
        let outcome = Outcome { detail: Some(error), ..Outcome::default() };
        self.close_attempt(applying, operation, OutboxState::Uncertain, outcome);
        if !self.is_current(send, operation) || self.outbox.get(send).state != OutboxState::Sending {
            return;
        }
        let limit = self.settings.max_attempts;
        let row = self.outbox.get_mut(send);
        row.last_code = None;
        row.last_subcode = None;
        match again_at {
            Some(at) if row.attempts < row.max_attempts.unwrap_or(limit) => {
                row.state = OutboxState::Queued;
                row.next_attempt_at = Some(to_milliseconds(at));
                row.possible_duplicate = true;
                row.last_error = Some(format!("{error}; sent again, so the recipient may get it twice"));
            }
            _ => {
                row.state = OutboxState::Uncertain;
                row.finished_at = Some(applying.at);
                row.last_error = Some(error.to_owned());
            }
        }
    }

    /// Whether the event channel told of a message that nobody claimed, and that a request made at `since` may have
    /// said: one from us, or one that was only linked and can't be read, so that nobody knows whose it is.
    fn may_have_been_heard(&self, applying: &Applying, since: Timestamp, said_in: &SaidIn) -> bool {
        self.messages.iter().any(|message| {
            let Some(conversation) = self.conversations.by_id(message.conversation) else { return false };
            let conversation = self.conversations.get(conversation);
            let fits = match said_in {
                SaidIn::Conversation(href) => conversation.href.as_ref() == Some(href),
                SaidIn::NewConversation => conversation.started_at >= to_milliseconds(since),
                SaidIn::Unknown => true,
            };
            fits && message.account == applying.account
                && message.session == Some(applying.session)
                && (message.direction == Direction::Outgoing || message.is_unread())
                && message.source == MessageSource::Event
                && message.href.is_some()
                && message.outbox.is_none()
                && message.operation_id.is_none()
                && message.archived_at >= to_milliseconds(since)
        })
    }

    /// Recipients of a group that could not be brought in: the message says who, the row says why. Neither forgets whom a
    /// report has named.
    fn note_not_reached(&mut self, send: usize, message: Option<usize>, not_reached: &[(String, String)]) {
        if not_reached.is_empty() {
            return;
        }
        if let Some(message) = message {
            let row = self.messages.get_mut(message);
            for (uri, _) in not_reached {
                row.failed_recipients = Some(with_recipient(row.failed_recipients.take(), uri));
            }
        }
        let words: Vec<String> = not_reached.iter().map(|(uri, why)| format!("{uri} ({why})")).collect();
        let words = format!("{NOT_REACHED}{}", words.join(", "));
        let row = self.outbox.get_mut(send);
        let reported = row
            .last_error
            .as_deref()
            .and_then(|error| error.find(NOT_DELIVERED).map(|at| error[at..].to_owned()));
        row.last_error = Some(match (row.last_error.take(), reported) {
            // What events have failed meanwhile says why.
            (Some(failure), _) if row.state == OutboxState::Failed => format!("{failure}; {words}"),
            (_, Some(reported)) => format!("{words}; {reported}"),
            (_, None) => words,
        });
    }

    /// The delivery report may have come before the answer, or before anybody knew whose message it was of.
    pub(super) fn complete_if_reported(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        message: usize,
    ) {
        if self.names_are_read(applying, send, message) {
            return;
        }
        let row = self.messages.get(message);
        let (status, reason) = match row.status {
            MessageStatus::Pending => return,
            MessageStatus::Delivered => (OperationStatus::Success, None),
            MessageStatus::Failed => (
                OperationStatus::Failure,
                Some(FailureReason {
                    code: row.code.clone(),
                    subcode: row.subcode.clone(),
                    message: row.reason.clone(),
                }),
            ),
        };
        // Whom the report has named, and not who could not be brought into the group.
        let unreached = self.unreached(send);
        let named: Vec<&str> = row
            .failed_recipients
            .iter()
            .flat_map(|named| named.split(';'))
            .filter(|uri| !unreached.iter().any(|unreached| unreached == uri))
            .collect();
        let named = (!named.is_empty()).then(|| named.join(";"));
        self.message_reported(applying, send, operation, message, status, reason.as_ref(), named.as_deref());
    }

    /// The server has reported what became of a message, and has `named` to whom it could not deliver. A message that some
    /// of a group have got is delivered, however the server calls that; one that certainly nobody has got, for a reason that
    /// waiting heals, is sent again.
    #[expect(clippy::too_many_arguments, reason = "what a report says, and of what")]
    pub(super) fn message_reported(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        message: usize,
        status: OperationStatus,
        reason: Option<&FailureReason>,
        named: Option<&str>,
    ) {
        if status == OperationStatus::Success {
            self.send_completed(applying, send, operation, status, reason, named);
            return;
        }
        let conversation = self.messages.get(message).conversation;
        let audience = self.audience(applying, send, conversation);
        let named_of =
            |uri: &String| named.iter().flat_map(|named| named.split(';')).any(|known| known == uri);
        let missed = named.map_or(0, |named| named.split(';').count());
        // Where it is only known what somebody is called, their number has to tell.
        let some_have_it = missed > 0 && missed < audience.len() && !audience.iter().all(named_of);
        if some_have_it {
            self.report_delivery(message, OperationStatus::Success, None);
            self.messages.get_mut(message).reason = None;
            self.send_completed(applying, send, operation, OperationStatus::Success, None, named);
            return;
        }
        let nobody_has_it = audience.len() == 1 || (missed > 0 && missed >= audience.len());
        let heals = nobody_has_it
            && reason.is_some_and(|reason| classify_invitation_failure(reason) == Healing::Temporary);
        if !(heals && self.try_again_later(applying, send, operation, reason)) {
            self.send_completed(applying, send, operation, status, reason, named);
        }
    }

    /// Addresses of the people to whom a row was said: whom it names, but for those who could not be brought into the group,
    /// or whoever is in the conversation that it names.
    pub(super) fn audience(
        &self,
        applying: &Applying,
        send: usize,
        conversation: ConversationId,
    ) -> Vec<String> {
        let destination = &self.outbox.get(send).destination;
        let uris = if destination.starts_with("sip") {
            Some(destination.clone())
        } else {
            self.remote_parties(applying, conversation)
        };
        let unreached = self.unreached(send);
        let uris = uris.iter().flat_map(|uris| uris.split(';'));
        uris.filter(|uri| !unreached.iter().any(|unreached| unreached == uri)).map(str::to_owned).collect()
    }

    /// Addresses of those of a group who could not be brought in, as the row says.
    fn unreached(&self, send: usize) -> Vec<String> {
        let error = self.outbox.get(send).last_error.as_deref().unwrap_or_default();
        let Some(words) = error.strip_prefix(NOT_REACHED) else { return Vec::new() };
        let words = words.split(NOT_DELIVERED).next().unwrap_or_default();
        let words =
            words.split_whitespace().filter(|word| word.starts_with("sip:") || word.starts_with("sips:"));
        words.map(str::to_owned).collect()
    }

    /// 201 with the invitation's address: its event, which may have come or may come, is tied to the row by it.
    fn invitation_accepted(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        href: &str,
    ) {
        let place = self.mention_invitation(applying, href, InvitationKind::Messaging);
        let destination = self.outbox.get(send).destination.clone();
        let row = self.invitations.get_mut(place);
        row.direction.get_or_insert(Direction::Outgoing);
        row.operation_id.get_or_insert_with(|| operation.clone());
        if row.to_uri.is_none() && destination.starts_with("sip") && !destination.contains(';') {
            row.to_uri = Some(destination);
        }
        if let Some(conversation) = row.conversation {
            self.invitation_said(applying, place, conversation);
        }
        // What is still to be read names the conversation too, and ends it then.
        if !self.invitations.get(place).awaiting_fetch {
            self.tell_end(applying, place);
        }
    }

    /// The server has accepted an attempt: by a 201, or by an event that can only follow one.
    pub(super) fn send_accepted(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        by_event: bool,
    ) {
        if self.attempt_failed(operation) {
            return;
        }
        self.close_attempt(applying, operation, OutboxState::Sent, Outcome::default());
        let is_current = self.is_current(send, operation);
        let row = self.outbox.get_mut(send);
        let moves = match row.state {
            OutboxState::Sent | OutboxState::Delivered => false,
            // The failure of this very attempt is the later news.
            OutboxState::Failed => !is_current,
            _ => true,
        };
        if !moves {
            return;
        }
        row.state = OutboxState::Sent;
        row.sent_at.get_or_insert(applying.at);
        row.finished_at = None;
        row.next_attempt_at = None;
        row.last_code = None;
        row.last_subcode = None;
        // Who could not be brought into the group was noted before the text was said.
        row.last_error = row.last_error.take().filter(|error| error.starts_with(NOT_REACHED));
        if by_event {
            applying.settled(SettledSend {
                outbox: row.id,
                operation_id: operation.clone(),
                state: row.state,
                reason: None,
            });
        }
    }

    /// The server has reported the end of an attempt.
    pub(super) fn send_completed(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        status: OperationStatus,
        reason: Option<&FailureReason>,
        failed_recipients: Option<&str>,
    ) {
        let is_current = self.is_current(send, operation);
        match status {
            OperationStatus::Success => {
                self.close_attempt(applying, operation, OutboxState::Delivered, Outcome::default());
                let row = self.outbox.get_mut(send);
                if row.state == OutboxState::Delivered {
                    return;
                }
                row.state = OutboxState::Delivered;
                row.sent_at.get_or_insert(applying.at);
                row.finished_at = Some(applying.at);
                row.next_attempt_at = None;
                row.last_code = None;
                row.last_subcode = None;
                // Who could not be brought into the group stays unreached, though the others have it.
                let unreached = row.last_error.take().filter(|error| error.starts_with(NOT_REACHED));
                let undelivered = failed_recipients.map(|who| format!("{NOT_DELIVERED}{who}"));
                row.last_error = match (unreached, undelivered) {
                    (Some(unreached), Some(undelivered)) => Some(format!("{unreached}; {undelivered}")),
                    (unreached, undelivered) => unreached.or(undelivered),
                };
                applying.settled(SettledSend {
                    outbox: row.id,
                    operation_id: operation.clone(),
                    state: row.state,
                    reason: None,
                });
            }
            OperationStatus::Failure => {
                let words = reason.map_or_else(|| sentence(None), describe_invitation_failure);
                let outcome = Outcome { http_status: None, reason, detail: Some(&words) };
                self.close_attempt(applying, operation, OutboxState::Failed, outcome);
                let row = self.outbox.get_mut(send);
                let concerns_row = is_current
                    && matches!(row.state, OutboxState::Sending | OutboxState::Sent | OutboxState::Uncertain);
                if !concerns_row {
                    return;
                }
                row.state = OutboxState::Failed;
                row.finished_at = Some(applying.at);
                row.last_code = reason.and_then(|reason| reason.code.clone());
                row.last_subcode = reason.and_then(|reason| reason.subcode.clone());
                row.last_error = Some(match failed_recipients {
                    Some(who) => format!("{words}; {NOT_DELIVERED}{who}"),
                    None => words,
                });
                applying.settled(SettledSend {
                    outbox: row.id,
                    operation_id: operation.clone(),
                    state: row.state,
                    reason: reason.cloned(),
                });
            }
        }
    }

    /// The recipient was not there for now, or did not get the message: the row waits for its next attempt, unless this was its last or another
    /// attempt is the current one. Says whether it does.
    pub(super) fn try_again_later(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        reason: Option<&FailureReason>,
    ) -> bool {
        let row = self.outbox.get(send);
        let limit = row.max_attempts.unwrap_or(self.settings.max_attempts);
        let concerns_row = self.is_current(send, operation)
            && matches!(row.state, OutboxState::Sending | OutboxState::Sent | OutboxState::Uncertain);
        if !concerns_row || row.attempts >= limit {
            return false;
        }
        let error = reason.map_or_else(|| sentence(None), describe_invitation_failure);
        let attempts = row.attempts;
        let outcome = Outcome { http_status: None, reason, detail: Some(&error) };
        self.close_attempt(applying, operation, OutboxState::Failed, outcome);
        let at = self.settings.retry.next_attempt(applying.at, attempts, spread(operation));
        let row = self.outbox.get_mut(send);
        row.state = OutboxState::Queued;
        row.next_attempt_at = Some(to_milliseconds(at));
        row.conversation = row.given_conversation;
        row.message = None;
        row.finished_at = None;
        row.sent_at = None;
        row.last_code = reason.and_then(|reason| reason.code.clone());
        row.last_subcode = reason.and_then(|reason| reason.subcode.clone());
        row.last_error = Some(error);
        applying.settled(SettledSend {
            outbox: row.id,
            operation_id: operation.clone(),
            state: row.state,
            reason: reason.cloned(),
        });
        true
    }

    /// Writes down what an attempt led to; later news only replace less final ones.
    fn close_attempt(
        &mut self,
        applying: &Applying,
        operation: &OperationId,
        outcome: OutboxState,
        details: Outcome<'_>,
    ) {
        let Some(place) = self.attempts.by_operation(operation) else {
            return;
        };
        let finality = |outcome: &str| match outcome {
            "queued" | "uncertain" => 1,
            "sent" => 2,
            "failed" => 3,
            "delivered" => 4,
            _ => 0,
        };
        let row = self.attempts.get_mut(place);
        let known = row.outcome.as_deref().map_or(0, finality);
        if finality(outcome.as_str()) <= known {
            return;
        }
        row.outcome = Some(outcome.as_str().to_owned());
        row.finished_at = Some(applying.at);
        if let Some(status) = details.http_status {
            row.http_status = Some(i64::from(status));
        }
        row.code = details.reason.and_then(|reason| reason.code.clone());
        row.subcode = details.reason.and_then(|reason| reason.subcode.clone());
        row.detail = details.detail.map(ToOwned::to_owned);
    }

    /// The row is tried again: what the failed attempt left in the archive is taken back while it is not settled, so
    /// that the row stands there once. The attempt itself stays in `outbox_attempts` and `invitations`. What the server
    /// took into a conversation was said, and stays.
    pub(super) fn withdraw_message(&mut self, send: usize, operation: &OperationId) {
        if let Some(place) = self.messages.by_operation(operation) {
            let message = self.messages.get(place);
            if message.outbox == Some(self.outbox.get(send).id) && !message.is_chained() {
                self.delete_message(place);
            }
        }
    }

    /// Keeps what the server refused to take in an open conversation.
    fn keep_refused(
        &mut self,
        applying: &Applying,
        send: usize,
        operation: &OperationId,
        conversation_href: &str,
        reason: &FailureReason,
        error: &str,
    ) {
        let conversation = self.mention_conversation(applying, conversation_href);
        let conversation = self.conversations.get(conversation).id;
        let place = self.said(applying, send, operation, conversation, MessageSource::Event);
        let row = self.messages.get_mut(place);
        row.status = MessageStatus::Failed;
        row.code.clone_from(&reason.code);
        row.subcode.clone_from(&reason.subcode);
        row.reason = Some(error.to_owned());
        if row.awaiting == Some(Awaiting::Receipt) {
            self.release(place);
        }
    }
}
