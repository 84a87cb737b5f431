//! Conversations: made at their first mention, described by their resource, ended once and for all.

use super::{fill, replace};
use crate::{
    archive::{
        Workspace,
        fact::{ConversationEnded, ConversationFact, FetchedResource},
        row::ConversationRow,
        workspace::Applying,
    },
    identifiers::ConversationId,
};

/// States in which people can talk.
const CONNECTED: [&str; 2] = ["connected", "conferenced"];
/// States in which nobody can any more.
const OVER: [&str; 2] = ["disconnecting", "disconnected"];

/// `end_code` of a conversation that ended for us because the server answered `resume`. It opens again if the server
/// turns out to have it still.
pub(crate) const RESUME: &str = "resume";

impl Workspace {
    /// The conversation with this href, made if this is its first mention.
    pub(in crate::archive) fn mention_conversation(&mut self, applying: &Applying, href: &str) -> usize {
        if let Some(place) = self.conversations.by_resource(applying.session, href) {
            return place;
        }
        self.new_conversation(applying, Some(href))
    }

    pub(super) fn new_conversation(&mut self, applying: &Applying, href: Option<&str>) -> usize {
        let id = self.next_conversation_id();
        self.conversations.insert(ConversationRow {
            id,
            account: applying.account,
            session: Some(applying.session),
            href: href.map(ToOwned::to_owned),
            thread_id: None,
            subject: None,
            importance: None,
            direction: None,
            state: None,
            multiparty: false,
            online_meeting_uri: None,
            started_at: applying.at,
            connected_at: None,
            ended_at: applying.session_ended_at,
            end_code: None,
            end_subcode: None,
            awaiting_fetch: false,
            continued_in: None,
            first_message_href: None,
            purged_at: None,
        })
    }

    pub(in crate::archive) fn apply_conversation(
        &mut self,
        applying: &mut Applying,
        fact: &ConversationFact,
    ) {
        let place = self.mention_conversation(applying, &fact.href);
        let row = self.conversations.get_mut(place);
        replace(&mut row.thread_id, fact.thread_id.as_ref());
        replace(&mut row.subject, fact.subject.as_ref());
        replace(&mut row.importance, fact.importance.as_ref());
        fill(&mut row.direction, fact.direction.as_ref());
        replace(&mut row.online_meeting_uri, fact.online_meeting_uri.as_ref());
        if let Some(multiparty) = fact.multiparty {
            // A talk among several stays one when only two are left.
            row.multiparty |= multiparty;
        }
        let forgotten = row.end_code.as_deref() == Some(RESUME) && applying.session_ended_at.is_none();
        if forgotten
            && fact.state.as_ref().is_some_and(|state| !OVER.contains(&state.to_lowercase().as_str()))
        {
            row.ended_at = None;
            row.end_code = None;
        }
        if row.ended_at.is_none()
            && let Some(state) = &fact.state
        {
            row.state = Some(state.clone());
            if row.connected_at.is_none() && CONNECTED.contains(&state.to_lowercase().as_str()) {
                row.connected_at = Some(applying.at);
            }
        }
        if !fact.link_only {
            row.awaiting_fetch = false;
            applying.fetched(FetchedResource::Conversation, &fact.href);
        } else if row.ended_at.is_none() || forgotten {
            // Something about it changed, and only the resource says what.
            row.awaiting_fetch = true;
            applying.fetch(FetchedResource::Conversation, &fact.href, None);
        }
    }

    pub(in crate::archive) fn apply_conversation_ended(
        &mut self,
        applying: &mut Applying,
        fact: &ConversationEnded,
    ) {
        // Of a conversation that was never heard of there is nothing to keep.
        let Some(place) = self.conversations.by_resource(applying.session, &fact.href) else {
            return;
        };
        let row = self.conversations.get_mut(place);
        let id = row.id;
        row.awaiting_fetch = false;
        if row.end_code.as_deref() == Some(RESUME) {
            row.ended_at = None;
            row.end_code = None;
        }
        if row.ended_at.is_none() {
            row.ended_at = Some(applying.at);
            row.state = Some("Disconnected".to_owned());
            if let Some(reason) = &fact.reason {
                row.end_code.clone_from(&reason.code);
                row.end_subcode.clone_from(&reason.subcode);
            }
        }
        applying.fetched(FetchedResource::Conversation, &fact.href);
        self.close_stays(applying, id);
        self.settle_conversation(id);
    }

    fn close_stays(&mut self, applying: &Applying, conversation: ConversationId) {
        for place in self.participants.of_conversation(conversation) {
            let stay = self.participants.get_mut(place);
            if stay.left_at.is_none() {
                stay.left_at = Some(applying.at);
            }
        }
    }
}
