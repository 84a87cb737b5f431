//! Messages: each stands once, whatever order its event, its fetched resource, its invitation and our own request's
//! answer come in (G2; protocol 10-12).

use super::{fill, participants::Sender, sends::with_recipient, sentence};
use crate::{
    archive::{
        Workspace,
        fact::{
            Content, Direction, FailureReason, FetchedResource, MessageFact, OperationStatus, Person, Phase,
        },
        row::{Awaiting, MessageRow, MessageSource, MessageStatus, OutboxSend},
        text::{is_plausible, storable, to_milliseconds},
        workspace::{Applying, PlainFromHtml},
    },
    identifiers::{ConversationId, OperationId},
    store::OutboxState,
};

use super::settle::PATIENCE;

/// Text as the columns hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) content_type: &'static str,
    pub(super) body: String,
    pub(super) body_html: Option<String>,
}

impl Text {
    /// Plain text is derived where only HTML came.
    pub(super) fn of(content: &Content, plain_from_html: PlainFromHtml) -> Self {
        let body_html = content.html.as_deref().map(|html| storable(html).into_owned());
        let body = match (&content.plain, &body_html) {
            (Some(plain), _) => storable(plain).into_owned(),
            (None, Some(html)) => storable(&plain_from_html(html)).into_owned(),
            (None, None) => String::new(),
        };
        let content_type = if body_html.is_some() { "text/html" } else { "text/plain" };
        Self { content_type, body, body_html }
    }

    /// What an outbox row says.
    pub(super) fn of_send(send: &OutboxSend, plain_from_html: PlainFromHtml) -> Self {
        let is_html = send.content_type.trim().to_ascii_lowercase().starts_with("text/html");
        let content = if is_html {
            Content { plain: None, html: Some(send.body.clone()) }
        } else {
            Content { plain: Some(send.body.clone()), html: None }
        };
        Self::of(&content, plain_from_html)
    }
}

/// Takes the server's time of a message over, unless it can't be right: then the time of receipt stands, and `reason`
/// tells what the server said.
fn date(row: &mut MessageRow, applying: &Applying, fact: &MessageFact) {
    let absurd = match (fact.sent_at, &fact.unreadable_time) {
        (Some(sent_at), _) if is_plausible(sent_at, applying.at) => {
            row.sent_at = to_milliseconds(sent_at);
            return;
        }
        (Some(sent_at), _) => sent_at.to_string(),
        (None, Some(text)) => text.chars().take(60).collect(),
        (None, None) => return,
    };
    row.reason.get_or_insert_with(|| {
        let sentence = format!(
            "the server dated this message {absurd:?}, which can't be right; it is dated by its receipt"
        );
        storable(&sentence).into_owned()
    });
}

/// Replaces a row's text.
fn say(row: &mut MessageRow, text: Text) {
    text.content_type.clone_into(&mut row.content_type);
    row.body = text.body;
    row.body_html = text.body_html;
}

impl Workspace {
    /// A new row that is not settled.
    pub(super) fn new_message(
        &mut self,
        applying: &Applying,
        conversation: ConversationId,
        direction: Direction,
        text: &Text,
    ) -> usize {
        let id = self.next_message_id();
        self.messages.insert(MessageRow {
            id,
            account: applying.account,
            conversation,
            session: Some(applying.session),
            direction,
            sender_uri: None,
            sender_name: None,
            content_type: text.content_type.to_owned(),
            body: text.body.clone(),
            body_html: text.body_html.clone(),
            sent_at: applying.at,
            archived_at: applying.now,
            status: MessageStatus::Pending,
            code: None,
            subcode: None,
            reason: None,
            failed_recipients: None,
            operation_id: None,
            outbox: None,
            correlation: None,
            source: MessageSource::Event,
            href: None,
            chain_seq: None,
            content_hash: None,
            chain_hash: None,
            awaiting: Some(Awaiting::Receipt),
            sender_href: None,
            is_purged: false,
        })
    }

    pub(in crate::archive) fn apply_message(&mut self, applying: &mut Applying, fact: &MessageFact) {
        let conversation = self.mention_conversation(applying, &fact.conversation_href);
        let known = self.messages.by_resource(applying.session, &fact.href);
        let known_direction = known
            .map(|place| self.messages.get(place))
            .filter(|message| message.awaiting != Some(Awaiting::Fetch) || message.outbox.is_some())
            .map(|message| message.direction);
        let ours = fact.operation_id.as_ref().is_some_and(|id| self.send_of(applying.account, id).is_some());
        match fact.direction.or(known_direction) {
            Some(Direction::Outgoing) => self.outgoing_message(applying, conversation, known, fact),
            _ if ours => self.outgoing_message(applying, conversation, known, fact),
            _ => self.incoming_message(applying, conversation, known, fact),
        }
    }

    fn incoming_message(
        &mut self,
        applying: &mut Applying,
        conversation: usize,
        known: Option<usize>,
        fact: &MessageFact,
    ) {
        let conversation_id = self.conversations.get(conversation).id;
        // A message that was announced without its text brings it with a later event.
        let has_no_text = fact.content.is_empty() && (fact.link_only || fact.phase != Phase::Completed);
        let conversation_row = self.conversations.get_mut(conversation);
        let first =
            conversation_row.first_message_href.get_or_insert_with(|| fact.href.clone()) == &fact.href;
        let sender = self.resolve_sender(applying, conversation, fact.sender.as_ref());

        let place = match known {
            Some(place) => {
                let awaiting = self.messages.get(place).awaiting;
                if matches!(awaiting, Some(Awaiting::Fetch | Awaiting::Receipt)) {
                    if has_no_text && fact.link_only {
                        // Only the resource says what changed since it was announced.
                        self.messages.get_mut(place).awaiting = Some(Awaiting::Fetch);
                        applying.fetch(FetchedResource::Message, &fact.href, Some(&fact.conversation_href));
                    } else if has_no_text {
                        // Read, and still without text: that comes with an event, and asking again would not bring it.
                        self.messages.get_mut(place).awaiting = Some(Awaiting::Receipt);
                        applying.fetched(FetchedResource::Message, &fact.href);
                    } else {
                        applying.fetched(FetchedResource::Message, &fact.href);
                        self.text_arrived(applying, conversation_id, place, first, &sender, fact);
                    }
                }
                // The text may have turned out to be the invitation's, which is another row.
                self.messages.by_resource(applying.session, &fact.href).unwrap_or(place)
            }
            None if has_no_text => {
                let place = self.new_message(
                    applying,
                    conversation_id,
                    Direction::Incoming,
                    &Text::of(&fact.content, self.plain_from_html),
                );
                self.describe_incoming(applying, place, &sender, fact);
                if fact.link_only {
                    self.messages.get_mut(place).awaiting = Some(Awaiting::Fetch);
                    applying.fetch(FetchedResource::Message, &fact.href, Some(&fact.conversation_href));
                }
                place
            }
            None => {
                let text = Text::of(&fact.content, self.plain_from_html);
                let copy = self
                    .copy_of_invitation(applying, conversation_id, first, &text, &sender, fact)
                    .or_else(|| {
                        let uri = sender.uri.as_deref();
                        self.logged_before(applying, conversation_id, Direction::Incoming, uri, fact)
                    });
                copy.unwrap_or_else(|| {
                    let place = self.new_message(applying, conversation_id, Direction::Incoming, &text);
                    self.describe_incoming(applying, place, &sender, fact);
                    self.release(place);
                    place
                })
            }
        };
        if let Some(status) = fact.status {
            self.report_delivery(place, status, fact.reason.as_ref());
        }
    }

    /// What was only a link has been fetched.
    fn text_arrived(
        &mut self,
        applying: &Applying,
        conversation: ConversationId,
        place: usize,
        first: bool,
        sender: &Sender,
        fact: &MessageFact,
    ) {
        let text = Text::of(&fact.content, self.plain_from_html);
        // The link's row would stand in the way of the same href.
        let placeholder = self.messages.get(place).clone();
        self.delete_message(place);
        if self.copy_of_invitation(applying, conversation, first, &text, sender, fact).is_some() {
            return;
        }
        self.undelete_message(place);
        let row = self.messages.get_mut(place);
        *row = placeholder;
        say(row, text);
        self.describe_incoming(applying, place, sender, fact);
        self.release(place);
    }

    fn describe_incoming(&mut self, applying: &Applying, place: usize, sender: &Sender, fact: &MessageFact) {
        let row = self.messages.get_mut(place);
        fill(&mut row.sender_uri, sender.uri.as_ref());
        fill(&mut row.sender_name, sender.name.as_ref());
        fill(&mut row.sender_href, sender.href.as_ref());
        date(row, applying, fact);
        row.href = Some(fact.href.clone());
        row.direction = Direction::Incoming;
        self.messages.index(place);
    }

    /// If this is the first message of the other side and repeats the invitation's text, the invitation's row takes it
    /// in; otherwise that text is known not to be repeated, and is settled (protocol 12.5).
    fn copy_of_invitation(
        &mut self,
        applying: &Applying,
        conversation: ConversationId,
        first: bool,
        text: &Text,
        sender: &Sender,
        fact: &MessageFact,
    ) -> Option<usize> {
        if !first {
            return None;
        }
        let Some(place) = self.repeated_invitation(applying, conversation, &text.body, fact.sent_at) else {
            for place in self.messages.of_conversation(conversation) {
                if self.messages.get(place).awaiting == Some(Awaiting::Copy) {
                    self.release(place);
                }
            }
            return None;
        };
        let row = self.messages.get_mut(place);
        row.href = Some(fact.href.clone());
        row.source = MessageSource::Event;
        if !row.is_chained() {
            if let (None, Some(html)) = (&row.body_html, &text.body_html) {
                row.body_html = Some(html.clone());
                text.content_type.clone_into(&mut row.content_type);
            }
            date(row, applying, fact);
            fill(&mut row.sender_uri, sender.uri.as_ref());
            fill(&mut row.sender_name, sender.name.as_ref());
            fill(&mut row.sender_href, sender.href.as_ref());
        }
        self.messages.index(place);
        self.release(place);
        Some(place)
    }

    fn outgoing_message(
        &mut self,
        applying: &mut Applying,
        conversation: usize,
        known: Option<usize>,
        fact: &MessageFact,
    ) {
        let conversation_id = self.conversations.get(conversation).id;
        // While only a link was known, it may have been taken for the other side's first message.
        let conversation_row = self.conversations.get_mut(conversation);
        if conversation_row.first_message_href.as_deref() == Some(&fact.href) {
            conversation_row.first_message_href = None;
        }
        let place = if let Some(place) = self.our_message(applying, conversation_id, known, fact) {
            if let Some(placeholder) = known.filter(|&other| other != place)
                && !self.messages.get(placeholder).is_chained()
            {
                self.take_report(place, placeholder);
                self.delete_message(placeholder);
            }
            applying.fetched(FetchedResource::Message, &fact.href);
            place
        } else if let Some(place) = known
            .is_none()
            .then(|| self.logged_before(applying, conversation_id, Direction::Outgoing, None, fact))
            .flatten()
        {
            place
        } else {
            let place = known.unwrap_or_else(|| {
                let text = Text::of(&fact.content, self.plain_from_html);
                self.new_message(applying, conversation_id, Direction::Outgoing, &text)
            });
            self.describe_unmatched(applying, place, fact);
            place
        };
        self.receipt(applying, place, fact);
    }

    /// The row of ours that an outgoing event speaks of: by href, by operation id, or as the only one it can be
    /// (protocol 11.4).
    fn our_message(
        &mut self,
        applying: &Applying,
        conversation: ConversationId,
        known: Option<usize>,
        fact: &MessageFact,
    ) -> Option<usize> {
        if let Some(place) = known.filter(|&place| self.messages.get(place).outbox.is_some()) {
            return Some(place);
        }
        if let Some(operation) = &fact.operation_id {
            if let Some(place) = self.messages.by_operation(operation) {
                return Some(place);
            }
            let send = self.send_of(applying.account, operation)?;
            return Some(self.said(applying, send, operation, conversation, MessageSource::Event));
        }
        // A row that was settled without a match stays what it is.
        if known.is_some_and(|place| self.messages.get(place).is_chained()) {
            return None;
        }
        let waiting = |source| {
            move |message: &MessageRow| {
                message.direction == Direction::Outgoing
                    && message.outbox.is_some()
                    && message.href.is_none()
                    && message.source == source
                    && message.status != MessageStatus::Failed
            }
        };
        let accepted = |workspace: &Self, source| {
            workspace
                .messages
                .of_conversation(conversation)
                .into_iter()
                .filter(|&place| waiting(source)(workspace.messages.get(place)))
                .find(|&place| applying.at.duration_since(workspace.messages.get(place).sent_at) <= PATIENCE)
        };
        // The server reports in order: first what it accepted, then what is in flight, then an invitation's text.
        if let Some(place) = accepted(self, MessageSource::Event) {
            return Some(place);
        }
        if let Some((send, operation)) = self.only_send_in_flight(applying, conversation) {
            return Some(self.said(applying, send, &operation, conversation, MessageSource::Event));
        }
        accepted(self, MessageSource::Invitation)
    }

    /// The one outbox row in state `sending` that is for this conversation, as far as can be told.
    fn only_send_in_flight(
        &self,
        applying: &Applying,
        conversation: ConversationId,
    ) -> Option<(usize, OperationId)> {
        let in_flight: Vec<usize> = self
            .outbox
            .places()
            .into_iter()
            .filter(|&place| {
                let send = self.outbox.get(place);
                send.account == applying.account
                    && send.state == OutboxState::Sending
                    && send.operation_id.as_ref().is_some_and(|id| self.messages.by_operation(id).is_none())
            })
            .collect();
        let only = |candidates: Vec<usize>| match candidates[..] {
            [place] => Some((place, self.outbox.get(place).operation_id.clone()?)),
            _ => None,
        };
        let bound: Vec<usize> = in_flight
            .iter()
            .copied()
            .filter(|&place| self.outbox.get(place).conversation == Some(conversation))
            .collect();
        if !bound.is_empty() {
            return only(bound);
        }
        let free = in_flight.into_iter().filter(|&place| self.outbox.get(place).conversation.is_none());
        match self.remote_parties(applying, conversation) {
            Some(parties) => {
                only(free.filter(|&place| self.outbox.get(place).destination == parties).collect())
            }
            // Nobody's address is known yet: then it can only be the only one.
            None => only(free.collect()),
        }
    }

    /// The message that an attempt of an outbox row said in a conversation: found by its operation id, or made.
    pub(super) fn said(
        &mut self,
        applying: &Applying,
        send: usize,
        operation: &OperationId,
        conversation: ConversationId,
        source: MessageSource,
    ) -> usize {
        let place = self.messages.by_operation(operation).unwrap_or_else(|| {
            let text = Text::of_send(self.outbox.get(send), self.plain_from_html);
            let place = self.new_message(applying, conversation, Direction::Outgoing, &text);
            self.messages.get_mut(place).source = source;
            self.attach(applying, place, send, operation);
            place
        });
        let id = self.messages.get(place).id;
        let was_given_up = self.attempt_failed(operation);
        let row = self.outbox.get_mut(send);
        let is_current = row.operation_id.as_ref() == Some(operation) && row.state != OutboxState::Queued;
        // What was given up and is tried again has its own message then.
        if is_current || !was_given_up {
            row.message = Some(id);
            row.conversation = Some(conversation);
        }
        place
    }

    /// Makes an outgoing row the outbox row's.
    fn attach(&mut self, applying: &Applying, place: usize, send: usize, operation: &OperationId) {
        let send = self.outbox.get(send);
        let row = self.messages.get_mut(place);
        row.direction = Direction::Outgoing;
        row.sender_uri = Some(applying.account_uri.as_str().to_owned());
        row.operation_id = Some(operation.clone());
        row.outbox = Some(send.id);
        row.correlation.clone_from(&send.correlation);
        self.messages.index(place);
    }

    /// The server accepted a message of ours (201): ties its row and its `Location` together.
    pub(super) fn message_accepted(
        &mut self,
        applying: &mut Applying,
        send: usize,
        operation: &OperationId,
        conversation: ConversationId,
        href: Option<&str>,
    ) -> usize {
        let event = match href {
            Some(href) => self.messages.by_resource(applying.session, href),
            // Without a Location it is the outgoing event that nobody claimed, if there is just one.
            None => self.unclaimed_event(conversation),
        };
        if let Some(place) = event
            && self.messages.get(place).outbox.is_none()
            && self.messages.by_operation(operation).is_none()
            && !self.messages.get(place).is_chained()
        {
            let text = Text::of_send(self.outbox.get(send), self.plain_from_html);
            let row = self.messages.get_mut(place);
            say(row, text);
            let id = row.id;
            self.attach(applying, place, send, operation);
            let names_are_read = self.names_are_read(applying, send, place);
            if let Some(href) = href.filter(|_| !names_are_read) {
                applying.fetched(FetchedResource::Message, href);
            }
            let row = self.outbox.get_mut(send);
            row.message = Some(id);
            row.conversation = Some(conversation);
            if names_are_read {
                return place;
            }
            // The event has brought the server's time.
            self.release(place);
            return place;
        }
        let place = self.said(applying, send, operation, conversation, MessageSource::Event);
        if let Some(href) = href
            && self.messages.get(place).href.is_none()
        {
            if let Some(unclaimed) = event.filter(|&other| other != place)
                && self.messages.get(unclaimed).outbox.is_none()
            {
                self.take_report(place, unclaimed);
                if !self.messages.get(unclaimed).is_chained() {
                    let sent_at = self.messages.get(unclaimed).sent_at;
                    self.delete_message(unclaimed);
                    let row = self.messages.get_mut(place);
                    if !row.is_chained() {
                        row.sent_at = sent_at;
                    }
                }
            }
            if self.messages.by_resource(applying.session, href).is_none() {
                self.messages.get_mut(place).href = Some(href.to_owned());
                self.messages.index(place);
            }
        }
        place
    }

    /// An event has told by a link only that the message failed, and whom of several it did not reach is being read.
    pub(super) fn names_are_read(&self, applying: &Applying, send: usize, place: usize) -> bool {
        let message = self.messages.get(place);
        message.awaiting == Some(Awaiting::Fetch)
            && message.status == MessageStatus::Failed
            && self.audience(applying, send, message.conversation).len() != 1
    }

    /// What was reported of a message while only its link was known is of the row that it turned out to be.
    fn take_report(&mut self, place: usize, placeholder: usize) {
        let reported = self.messages.get(placeholder).clone();
        let row = self.messages.get_mut(place);
        for uri in reported.failed_recipients.iter().flat_map(|named| named.split(';')) {
            row.failed_recipients = Some(with_recipient(row.failed_recipients.take(), uri));
        }
        if reported.status != MessageStatus::Pending && row.status == MessageStatus::Pending {
            row.status = reported.status;
            row.code = reported.code;
            row.subcode = reported.subcode;
            row.reason = reported.reason;
            if reported.awaiting == Some(Awaiting::Fetch) && !row.is_chained() {
                row.awaiting = Some(Awaiting::Fetch);
            }
        }
    }

    /// Our HTML went out as its plain rendition, because the conversation takes nothing else.
    pub(super) fn said_as_plain(&mut self, place: usize) {
        let row = self.messages.get_mut(place);
        if !row.is_chained() {
            row.body_html = None;
            "text/plain".clone_into(&mut row.content_type);
        }
    }

    fn unclaimed_event(&self, conversation: ConversationId) -> Option<usize> {
        let unclaimed: Vec<usize> = self
            .messages
            .of_conversation(conversation)
            .into_iter()
            .filter(|&place| {
                let message = self.messages.get(place);
                message.direction == Direction::Outgoing
                    && message.outbox.is_none()
                    && message.href.is_some()
                    && message.awaiting == Some(Awaiting::Receipt)
            })
            .collect();
        match unclaimed[..] {
            [place] => Some(place),
            _ => None,
        }
    }

    /// An outgoing message that no outbox row is known for; its 201 may still come.
    fn describe_unmatched(&mut self, applying: &mut Applying, place: usize, fact: &MessageFact) {
        let row = self.messages.get_mut(place);
        row.href = Some(fact.href.clone());
        if !row.is_chained() {
            row.direction = Direction::Outgoing;
            row.sender_uri = Some(applying.account_uri.as_str().to_owned());
            row.sender_href = None;
            fill(&mut row.operation_id, fact.operation_id.as_ref());
            if row.body.is_empty() && !fact.content.is_empty() {
                let text = Text::of(&fact.content, self.plain_from_html);
                say(row, text);
            }
            if fact.link_only && row.body.is_empty() {
                row.awaiting = Some(Awaiting::Fetch);
                applying.fetch(FetchedResource::Message, &fact.href, Some(&fact.conversation_href));
            } else {
                row.awaiting = Some(Awaiting::Receipt);
                applying.fetched(FetchedResource::Message, &fact.href);
            }
        }
        self.messages.index(place);
    }

    /// What the event says about a message of ours: the server's time, delivery, who was not reached.
    fn receipt(&mut self, applying: &mut Applying, place: usize, fact: &MessageFact) {
        let failed: Vec<String> = fact
            .failed_recipients
            .iter()
            .filter_map(|person: &Person| self.called(applying, person))
            .collect();
        let failed = (!failed.is_empty()).then(|| failed.join(";"));
        let href_is_free = self.messages.by_resource(applying.session, &fact.href).is_none();
        let row = self.messages.get_mut(place);
        // A row that was chained before anybody claimed it keeps its href.
        if row.href.is_none() && href_is_free {
            row.href = Some(fact.href.clone());
        }
        if !row.is_chained() {
            date(row, applying, fact);
        }
        // Besides whoever could not be brought into the group.
        for uri in failed.iter().flat_map(|failed| failed.split(';')) {
            row.failed_recipients = Some(with_recipient(row.failed_recipients.take(), uri));
        }
        let (operation, is_ours) = (row.operation_id.clone(), row.outbox.is_some());
        let is_failure_by_link = fact.link_only && fact.status == Some(OperationStatus::Failure);
        if is_failure_by_link && is_ours && row.status == MessageStatus::Delivered {
            // What the link leads to was read, and says that some have it.
            self.messages.index(place);
            return;
        }
        // The resource does not say why, the event did.
        let known_reason = (row.status == MessageStatus::Failed).then(|| FailureReason {
            code: row.code.clone(),
            subcode: row.subcode.clone(),
            message: row.reason.clone(),
        });
        let reason = fact.reason.clone().or(known_reason);
        self.messages.index(place);
        if let Some(status) = fact.status {
            self.report_delivery(place, status, reason.as_ref());
        }
        let send = operation.as_ref().and_then(|operation| self.send_of(applying.account, operation));
        if is_failure_by_link
            && let Some(send) = send.filter(|_| is_ours && !self.messages.get(place).is_chained())
        {
            self.messages.get_mut(place).awaiting = Some(Awaiting::Fetch);
            if self.names_are_read(applying, send, place) {
                applying.fetch(FetchedResource::Message, &fact.href, Some(&fact.conversation_href));
                return;
            }
        }
        if is_ours && (fact.sent_at.is_some() || fact.phase == Phase::Completed) {
            self.release(place);
        }
        let row = self.messages.get_mut(place);
        if is_ours && row.awaiting == Some(Awaiting::Fetch) {
            row.awaiting = Some(Awaiting::Receipt);
        }
        let Some((operation, send)) = operation.zip(send) else {
            return;
        };
        match fact.status {
            Some(status) => {
                let reason = reason.as_ref().filter(|_| status == OperationStatus::Failure);
                self.message_reported(applying, send, &operation, place, status, reason, failed.as_deref());
            }
            None if self.messages.get(place).status == MessageStatus::Pending => {
                self.send_accepted(applying, send, &operation, true);
            }
            // Read before the report that has come meanwhile.
            None => self.complete_if_reported(applying, send, &operation, place),
        }
    }

    /// `completed`, or a resource's `status`.
    pub(super) fn report_delivery(
        &mut self,
        place: usize,
        status: OperationStatus,
        reason: Option<&FailureReason>,
    ) {
        let row = self.messages.get_mut(place);
        match status {
            OperationStatus::Success => {
                row.status = MessageStatus::Delivered;
                row.code = None;
                row.subcode = None;
            }
            OperationStatus::Failure => {
                row.status = MessageStatus::Failed;
                row.code = reason.and_then(|reason| reason.code.clone());
                row.subcode = reason.and_then(|reason| reason.subcode.clone());
                row.reason = Some(sentence(reason));
            }
        }
    }
}
