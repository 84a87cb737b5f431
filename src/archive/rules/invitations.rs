//! Invitations, and the text that travels with them (protocol 10, 11 and 12.5).
//!
//! The text of an incoming invitation becomes a message at once, because nobody knows whether the conversation will be
//! accepted here; its repetition as the conversation's first message is the same row. The text of our own invitation is
//! the outbox row's, and becomes a message as soon as its conversation is known.

use super::{fill, messages::Text, participants::Sender, replace, sentence};
use crate::{
    archive::{
        Workspace,
        fact::{
            Direction, FailureReason, FetchedResource, InvitationAction, InvitationAnswered, InvitationFact,
            InvitationKind, OperationStatus, Phase,
        },
        retry::{Healing, classify_invitation_failure},
        row::{Awaiting, InvitationRow, MessageSource, MessageStatus},
        workspace::Applying,
    },
    identifiers::{ConversationId, OperationId},
};

impl Workspace {
    pub(super) fn mention_invitation(
        &mut self,
        applying: &Applying,
        href: &str,
        kind: InvitationKind,
    ) -> usize {
        if let Some(place) = self.invitations.by_resource(applying.session, href) {
            return place;
        }
        let id = self.next_invitation_id();
        self.invitations.insert(InvitationRow {
            id,
            account: applying.account,
            conversation: None,
            session: Some(applying.session),
            href: Some(href.to_owned()),
            kind,
            direction: None,
            state: None,
            operation_id: None,
            thread_id: None,
            subject: None,
            importance: None,
            from_uri: None,
            from_name: None,
            to_uri: None,
            message: None,
            action: None,
            started_at: applying.at,
            finished_at: None,
            code: None,
            subcode: None,
            reason: None,
            awaiting_fetch: false,
        })
    }

    pub(in crate::archive) fn apply_invitation_answered(
        &mut self,
        applying: &mut Applying,
        fact: &InvitationAnswered,
    ) {
        let place = self.mention_invitation(applying, &fact.href, InvitationKind::Messaging);
        self.invitations.get_mut(place).action = Some(fact.action);
    }

    pub(in crate::archive) fn apply_invitation(&mut self, applying: &mut Applying, fact: &InvitationFact) {
        let place = self.mention_invitation(applying, &fact.href, fact.kind);
        let row = self.invitations.get_mut(place);
        row.kind = fact.kind;
        fill(&mut row.direction, fact.direction.as_ref());
        fill(&mut row.operation_id, fact.operation_id.as_ref());
        fill(&mut row.thread_id, fact.thread_id.as_ref());
        fill(&mut row.subject, fact.subject.as_ref());
        fill(&mut row.importance, fact.importance.as_ref());
        fill(&mut row.to_uri, fact.to_uri.as_ref());
        if row.finished_at.is_none() || fact.phase == Phase::Completed {
            replace(&mut row.state, fact.state.as_ref());
        }
        if fact.link_only {
            // Something about it changed, and only the resource says what.
            row.awaiting_fetch = true;
            applying.fetch(
                FetchedResource::Invitation(fact.kind),
                &fact.href,
                fact.conversation_href.as_deref(),
            );
        } else {
            row.awaiting_fetch = false;
            applying.fetched(FetchedResource::Invitation(fact.kind), &fact.href);
        }
        self.place_invitation(applying, place, fact);
        self.derive_conversation(applying, place, fact);
        self.text_of_invitation(applying, place, fact);
        self.finish_invitation(applying, place, fact);
        self.answer_outbox(applying, place, fact);
    }

    /// Ties the invitation to its conversation, and tells the conversation what the invitation knows.
    fn place_invitation(&mut self, applying: &Applying, place: usize, fact: &InvitationFact) {
        let conversation = match (&fact.conversation_href, self.invitations.get(place).conversation) {
            (Some(href), None) => self.mention_conversation(applying, href),
            (Some(href), Some(id)) => match self.conversations.by_id(id) {
                // It had to stand alone so far, for its text's sake.
                Some(orphan) if self.is_stand_in(place, orphan) => {
                    self.adopt_orphan(applying, place, orphan, href)
                }
                Some(conversation) => conversation,
                None => return,
            },
            (None, Some(id)) => match self.conversations.by_id(id) {
                Some(conversation) => conversation,
                None => return,
            },
            // Without a conversation there is nowhere to put the text: it gets one of its own.
            (None, None) if !fact.content.is_empty() && fact.direction == Some(Direction::Incoming) => {
                self.new_conversation(applying, None)
            }
            (None, None) => return,
        };
        let row = self.conversations.get_mut(conversation);
        fill(&mut row.thread_id, fact.thread_id.as_ref());
        fill(&mut row.subject, fact.subject.as_ref());
        fill(&mut row.importance, fact.importance.as_ref());
        fill(&mut row.online_meeting_uri, fact.online_meeting_uri.as_ref());
        // An invitation in the middle of a talk (to a third person, or after a pause) says nothing about who began.
        if fact.kind != InvitationKind::Participant {
            fill(&mut row.direction, fact.direction.as_ref());
        }
        if fact.kind == InvitationKind::OnlineMeeting {
            row.multiparty = true;
        }
        self.invitations.get_mut(place).conversation = Some(row.id);
    }

    /// The talk goes on in another conversation: the one that it leaves says where (`derivedConversation`).
    fn derive_conversation(&mut self, applying: &Applying, place: usize, fact: &InvitationFact) {
        let left = self.invitations.get(place).conversation.and_then(|id| self.conversations.by_id(id));
        let (Some(href), Some(left)) = (&fact.derived_conversation_href, left) else {
            return;
        };
        let derived = self.mention_conversation(applying, href);
        if derived == left {
            return;
        }
        let known = self.conversations.get(left).clone();
        let row = self.conversations.get_mut(derived);
        fill(&mut row.thread_id, known.thread_id.as_ref());
        fill(&mut row.subject, known.subject.as_ref());
        fill(&mut row.importance, known.importance.as_ref());
        fill(&mut row.direction, known.direction.as_ref());
        let id = row.id;
        self.conversations.get_mut(left).continued_in = Some(id);
    }

    /// Whether a conversation was only made so that the invitation's text has a place: without an address, or going by
    /// the invitation's own.
    fn is_stand_in(&self, place: usize, conversation: usize) -> bool {
        let href = self.conversations.get(conversation).href.as_ref();
        href.is_none() || href == self.invitations.get(place).href.as_ref()
    }

    fn adopt_orphan(&mut self, applying: &Applying, place: usize, orphan: usize, href: &str) -> usize {
        let Some(known) = self.conversations.by_resource(applying.session, href) else {
            self.conversations.get_mut(orphan).href = Some(href.to_owned());
            self.conversations.index(orphan);
            return orphan;
        };
        let (from, to) = (self.conversations.get(orphan).id, self.conversations.get(known).id);
        if let Some(message) = self.invitations.get(place).message.and_then(|id| self.messages.by_id(id))
            && !self.messages.get(message).is_chained()
        {
            let row = self.messages.get_mut(message);
            row.conversation = to;
            let send = row.outbox.and_then(|id| self.outbox.by_id(id));
            self.messages.moved(message, from);
            if let Some(send) = send {
                self.outbox.get_mut(send).conversation = Some(to);
            }
        }
        self.conversations.get_mut(orphan).ended_at.get_or_insert(applying.at);
        known
    }

    fn text_of_invitation(&mut self, applying: &mut Applying, place: usize, fact: &InvitationFact) {
        let conversation = self.invitations.get(place).conversation;
        let conversation_place = conversation.and_then(|id| self.conversations.by_id(id));
        let sender = match conversation_place {
            Some(conversation) => self.resolve_sender(applying, conversation, fact.from.as_ref()),
            None => fact
                .from
                .as_ref()
                .map(|from| Sender {
                    uri: from.uri.clone(),
                    name: from.name.clone(),
                    href: from.href.clone(),
                })
                .unwrap_or_default(),
        };
        let row = self.invitations.get_mut(place);
        if row.direction == Some(Direction::Outgoing) {
            row.from_uri.get_or_insert_with(|| applying.account_uri.as_str().to_owned());
        }
        fill(&mut row.from_uri, sender.uri.as_ref());
        fill(&mut row.from_name, sender.name.as_ref());
        let (direction, said_already) = (row.direction, row.message.is_some());
        let Some(conversation) = conversation else {
            return;
        };
        if said_already || fact.content.is_empty() || direction != Some(Direction::Incoming) {
            return;
        }
        let message = self.new_message(
            applying,
            conversation,
            Direction::Incoming,
            &Text::of(&fact.content, self.plain_from_html),
        );
        let row = self.messages.get_mut(message);
        row.source = MessageSource::Invitation;
        // The text is here, whatever becomes of the invitation.
        row.status = MessageStatus::Delivered;
        row.sender_uri = sender.uri;
        row.sender_name = sender.name;
        row.sender_href = sender.href;
        row.awaiting = Some(Awaiting::Copy);
        self.invitations.get_mut(place).message = Some(row.id);
        if self.invitations.get(place).finished_at.is_some() || applying.session_ended_at.is_some() {
            self.release(message);
        }
    }

    fn finish_invitation(&mut self, applying: &Applying, place: usize, fact: &InvitationFact) {
        if fact.phase != Phase::Completed {
            return;
        }
        let row = self.invitations.get_mut(place);
        row.finished_at.get_or_insert(applying.at);
        // The resource may be gone by now; the event alone says how it ended.
        let open = row.state.as_ref().is_none_or(|state| state.eq_ignore_ascii_case("Connecting"));
        match fact.status {
            Some(OperationStatus::Success) if open => row.state = Some("Connected".to_owned()),
            Some(OperationStatus::Failure) if open => row.state = Some("Failed".to_owned()),
            _ => {}
        }
        if fact.status == Some(OperationStatus::Success) && row.direction == Some(Direction::Incoming) {
            // It is connected here, though the answer to our own acceptance may have been lost.
            row.action.get_or_insert(InvitationAction::Accepted);
        }
        if let Some(reason) = &fact.reason {
            replace(&mut row.code, reason.code.as_ref());
            replace(&mut row.subcode, reason.subcode.as_ref());
        }
        if fact.status == Some(OperationStatus::Failure) {
            row.reason.get_or_insert_with(|| sentence(fact.reason.as_ref()));
            if fact.kind != InvitationKind::Participant
                && let (Some(reason), Some(conversation)) = (&fact.reason, row.conversation)
                && let Some(conversation) = self.conversations.by_id(conversation)
                // A conference goes on without the messaging that was asked for.
                && !(fact.kind == InvitationKind::Messaging && self.conversations.get(conversation).multiparty)
            {
                let conversation = self.conversations.get_mut(conversation);
                fill(&mut conversation.end_code, reason.code.as_ref());
                fill(&mut conversation.end_subcode, reason.subcode.as_ref());
            }
        }
        let row = self.invitations.get(place);
        // Not accepted here: no repetition of the text will come.
        if fact.status != Some(OperationStatus::Success)
            && let Some(message) = row.message.and_then(|id| self.messages.by_id(id))
            && self.messages.get(message).awaiting == Some(Awaiting::Copy)
        {
            self.release(message);
        }
    }

    /// Our own invitation is the answer to an outbox row.
    fn answer_outbox(&mut self, applying: &mut Applying, place: usize, fact: &InvitationFact) {
        let row = self.invitations.get(place);
        let Some(operation) = row.operation_id.clone() else {
            return;
        };
        let conversation = row.conversation;
        let Some(send) = self.send_of(applying.account, &operation) else {
            return;
        };
        if let Some(conversation) = conversation {
            self.invitation_said(applying, place, conversation);
        }
        let end = match (fact.phase, fact.status) {
            (Phase::Completed, Some(status)) => Some((status, fact.reason.clone())),
            // It may have come before anybody knew whose invitation it is of, since an event may only link it.
            _ => self.invitations.get(place).end(),
        };
        // Where its text was said only the resource knows, which is asked for; or nobody does, and then this is told.
        let unplaced = conversation.is_none() && self.invitations.get(place).awaiting_fetch;
        match end {
            Some((OperationStatus::Success, _)) if unplaced => {
                self.send_accepted(applying, send, &operation, true);
            }
            Some((status, reason)) => {
                self.invitation_ended(applying, place, send, &operation, status, reason.as_ref());
            }
            None => self.send_accepted(applying, send, &operation, true),
        }
    }

    /// Tells the outbox row of an invitation how it ended, if that and whose it is are known.
    pub(super) fn tell_end(&mut self, applying: &mut Applying, place: usize) {
        let row = self.invitations.get(place);
        let Some(operation) = row.operation_id.clone() else { return };
        let Some(send) = self.send_of(applying.account, &operation) else { return };
        if let Some((status, reason)) = self.invitations.get(place).end() {
            self.invitation_ended(applying, place, send, &operation, status, reason.as_ref());
        }
    }

    /// Tells an outbox row how its invitation ended.
    fn invitation_ended(
        &mut self,
        applying: &mut Applying,
        place: usize,
        send: usize,
        operation: &OperationId,
        status: OperationStatus,
        reason: Option<&FailureReason>,
    ) {
        if status == OperationStatus::Success {
            self.place_accepted(applying, place);
        }
        if let Some(message) = self.invitations.get(place).message.and_then(|id| self.messages.by_id(id)) {
            self.report_delivery(message, status, reason);
            if status == OperationStatus::Success {
                self.release(message);
            }
        }
        let heals = status == OperationStatus::Failure
            && reason.is_none_or(|reason| classify_invitation_failure(reason) == Healing::Temporary);
        if heals && self.try_again_later(applying, send, operation, reason) {
            self.withdraw_message(send, operation);
        } else {
            self.send_completed(applying, send, operation, status, reason, None);
        }
    }

    /// The text of a call that was accepted belongs into the archive, though nobody could tell which conversation the call
    /// opened: it gets one of its own, which goes by the address of the call.
    fn place_accepted(&mut self, applying: &Applying, place: usize) {
        let row = self.invitations.get(place);
        let Some(href) = row.href.clone().filter(|_| row.conversation.is_none() && row.message.is_none())
        else {
            return;
        };
        let conversation = self.mention_conversation(applying, &href);
        let conversation = self.conversations.get(conversation).id;
        self.invitations.get_mut(place).conversation = Some(conversation);
        self.invitation_said(applying, place, conversation);
    }

    /// Ties a call to its text, which was archived in a conversation that goes by the address of the call, and tells how
    /// the call ended if that is known.
    pub(super) fn placed_by_its_address(&mut self, applying: &mut Applying, href: &str, message: usize) {
        let Some(place) = self.invitations.by_resource(applying.session, href) else { return };
        let message = self.messages.get(message);
        let row = self.invitations.get_mut(place);
        row.conversation.get_or_insert(message.conversation);
        row.message.get_or_insert(message.id);
        self.tell_end(applying, place);
    }

    /// The message that our own invitation carries, made if its outbox row is known.
    pub(super) fn invitation_said(
        &mut self,
        applying: &Applying,
        place: usize,
        conversation: ConversationId,
    ) -> Option<usize> {
        let row = self.invitations.get(place);
        if let Some(message) = row.message {
            return self.messages.by_id(message);
        }
        let operation = row.operation_id.clone()?;
        let send = self.send_of(applying.account, &operation)?;
        // An attempt that is known to have failed and was taken back does not come back.
        if self.attempt_failed(&operation) {
            return None;
        }
        let message = self.said(applying, send, &operation, conversation, MessageSource::Invitation);
        self.invitations.get_mut(place).message = Some(self.messages.get(message).id);
        Some(message)
    }
}
