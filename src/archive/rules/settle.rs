//! Settling: when a message's content is final and it becomes the next link of its account's chain.
//!
//! Most messages are settled in the commit that brings them. The others say in `awaiting` what they wait for, and none
//! waits for ever: an invitation's text for its repetition and our own message for the server's receipt wait at most
//! [`PATIENCE`], and the end of the session settles everything.

use jiff::{SignedDuration, Timestamp};

use super::fill;
use crate::{
    archive::{
        Workspace, chain,
        fact::{Direction, FetchedResource, Unfetchable},
        row::{Awaiting, MessageSource, MessageStatus},
        text::storable,
        workspace::Applying,
    },
    identifiers::{ConversationId, SessionId},
};

/// How long a message waits for its repetition or receipt, and how long the server's own message without an id is
/// taken for the one we sent.
pub(crate) const PATIENCE: SignedDuration = SignedDuration::from_secs(60);

impl Workspace {
    /// What `place` waited for is here, or will not come: settles it unless only the sender's address is missing.
    pub(super) fn release(&mut self, place: usize) {
        let message = self.messages.get(place);
        if message.is_chained() {
            return;
        }
        let stay = message
            .session
            .zip(message.sender_href.as_deref())
            .and_then(|(session, href)| self.participants.by_resource(session, href));
        let mut awaiting = None;
        if let Some(stay) = stay {
            let said = message.sender_uri.clone();
            let stay = self.participants.get_mut(stay);
            if stay.awaiting_fetch && stay.sip_uri.is_none() {
                awaiting = Some(Awaiting::Sender);
            } else {
                // What the message itself said stands where the participant can't be asked any more.
                fill(&mut stay.sip_uri, said.as_ref());
            }
            let (uri, name) = (stay.sip_uri.clone(), stay.display_name.clone());
            let message = self.messages.get_mut(place);
            message.sender_uri = uri.or(said);
            message.sender_name = message.sender_name.take().or(name);
        }
        self.messages.get_mut(place).awaiting = awaiting;
        if awaiting.is_none() {
            self.chain(place);
        }
    }

    /// Makes a message the next link of its account's chain.
    fn chain(&mut self, place: usize) {
        let message = self.messages.get(place);
        let Some(head) = self.chain_heads.by_id(message.account) else {
            // Only a dialect that did not load the head gets here; the maintenance pass chains the row later.
            debug_assert!(false, "the chain head of account {} is not loaded", message.account);
            self.messages.get_mut(place).awaiting = Some(Awaiting::Receipt);
            return;
        };
        let content_hash = chain::Content {
            account: self.chain_heads.get(head).account_uri.as_str(),
            conversation: message.conversation,
            direction: message.direction,
            sender_uri: message.sender_uri.as_deref(),
            sender_name: message.sender_name.as_deref(),
            content_type: &message.content_type,
            body: &message.body,
            body_html: message.body_html.as_deref(),
            sent_at: message.sent_at,
            operation_id: message.operation_id.as_ref().map(|id| id.0.as_str()),
            outbox: message.outbox,
            correlation: message.correlation.as_deref(),
        }
        .hash();
        let head = self.chain_heads.get_mut(head);
        head.seq += 1;
        head.hash = chain::link(&head.hash, head.seq, &content_hash);
        let (seq, hash) = (head.seq, head.hash.clone());
        let message = self.messages.get_mut(place);
        message.chain_seq = Some(seq);
        message.chain_hash = Some(hash);
        message.content_hash = Some(content_hash);
        message.awaiting = None;
    }

    /// A participant became known, or never will: settles what waited for the sender.
    pub(super) fn settle_sender(&mut self, participant: usize) {
        let stay = self.participants.get(participant);
        let (conversation, href) = (stay.conversation, stay.href.clone());
        for place in self.messages.of_conversation(conversation) {
            let message = self.messages.get(place);
            if message.awaiting == Some(Awaiting::Sender) && message.sender_href == href {
                self.release(place);
            }
        }
    }

    /// The conversation is over: no repetition and no receipt comes any more. An invitation's text of ours that failed
    /// keeps its patience, because the queue may try again and would then take it back.
    pub(super) fn settle_conversation(&mut self, conversation: ConversationId) {
        for place in self.messages.of_conversation(conversation) {
            let message = self.messages.get(place);
            match message.awaiting {
                Some(Awaiting::Copy) => self.release(place),
                Some(Awaiting::Receipt) if message.status != MessageStatus::Failed => self.release(place),
                _ => {}
            }
        }
    }

    /// Settles what has waited for its repetition or receipt for a minute; of the loaded rows.
    pub fn settle_overdue(&mut self, now: Timestamp) {
        for place in self.messages.places() {
            let message = self.messages.get(place);
            if matches!(message.awaiting, Some(Awaiting::Copy | Awaiting::Receipt))
                && now.duration_since(message.archived_at) >= PATIENCE
            {
                self.release(place);
            }
        }
    }

    /// The session is over: settles everything that still waits in it, of the loaded rows.
    pub fn settle_session(&mut self, session: SessionId) {
        for place in self.messages.places() {
            let message = self.messages.get_mut(place);
            if message.session != Some(session) || message.awaiting.is_none() {
                continue;
            }
            if message.awaiting == Some(Awaiting::Fetch) && message.outbox.is_none() {
                message.reason = Some("the session ended before the text could be fetched".to_owned());
            }
            message.awaiting = None;
            self.chain(place);
        }
    }

    pub(in crate::archive) fn apply_unfetchable(&mut self, applying: &mut Applying, fact: &Unfetchable) {
        let href = &fact.fetch.href;
        applying.fetched(fact.fetch.resource, href);
        match fact.fetch.resource {
            FetchedResource::Message => {
                let Some(place) = self.messages.by_resource(applying.session, href) else {
                    return;
                };
                let message = self.messages.get_mut(place);
                if message.awaiting != Some(Awaiting::Fetch) {
                    return;
                }
                if message.outbox.is_none() {
                    message.reason = Some(storable(&fact.why).into_owned());
                }
                let operation = message.operation_id.clone();
                self.release(place);
                // Whom of several our message did not reach nobody can tell any more.
                if let Some(operation) = operation
                    && let Some(send) = self.send_of(applying.account, &operation)
                {
                    self.complete_if_reported(applying, send, &operation, place);
                }
            }
            FetchedResource::Invitation(_) => {
                if let Some(place) = self.invitations.by_resource(applying.session, href) {
                    let invitation = self.invitations.get_mut(place);
                    if invitation.awaiting_fetch {
                        invitation.awaiting_fetch = false;
                        invitation.reason.get_or_insert_with(|| storable(&fact.why).into_owned());
                        self.tell_end(applying, place);
                    }
                }
            }
            FetchedResource::Conversation => {
                if let Some(place) = self.conversations.by_resource(applying.session, href) {
                    self.conversations.get_mut(place).awaiting_fetch = false;
                }
            }
            FetchedResource::Participant => {
                if let Some(place) = self.participants.by_resource(applying.session, href) {
                    self.participants.get_mut(place).awaiting_fetch = false;
                    self.settle_sender(place);
                }
            }
        }
    }

    /// The invitation's text that this first message of the other side repeats (protocol 12.5), if it does.
    pub(super) fn repeated_invitation(
        &self,
        applying: &Applying,
        conversation: ConversationId,
        plain: &str,
        sent_at: Option<Timestamp>,
    ) -> Option<usize> {
        self.messages.of_conversation(conversation).into_iter().find(|&place| {
            let text = self.messages.get(place);
            text.direction == Direction::Incoming
                && text.source == MessageSource::Invitation
                && text.href.is_none()
                && !text.is_purged
                && crate::archive::text::same_message(&text.body, plain)
                // Its own time is when it was received: by our clock, or by the server's if we were away in between.
                && (applying.at.duration_since(text.sent_at) <= PATIENCE
                    || sent_at.is_some_and(|sent_at| sent_at.duration_since(text.sent_at).abs() <= PATIENCE))
        })
    }
}
