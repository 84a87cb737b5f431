//! Participants: a row per stay, so that who was there when can be told (protocol 13).

use super::{fill, replace};
use crate::{
    archive::{
        Workspace,
        fact::{FetchedResource, ParticipantChange, ParticipantDetails, ParticipantFact, Person},
        row::ParticipantRow,
        workspace::Applying,
    },
    identifiers::ConversationId,
};

/// Who said something, as far as it is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Sender {
    pub(super) uri: Option<String>,
    pub(super) name: Option<String>,
    pub(super) href: Option<String>,
}

impl Workspace {
    pub(in crate::archive) fn apply_participant(&mut self, applying: &mut Applying, fact: &ParticipantFact) {
        let latest = self.participants.by_resource(applying.session, &fact.href);
        if fact.change == ParticipantChange::Waits {
            // Who only waits is not there; who is put back into the lobby has left.
            if let Some(place) = latest {
                self.participants.get_mut(place).left_at.get_or_insert(applying.at);
            }
            return;
        }
        let conversation = self.mention_conversation(applying, &fact.conversation_href);
        let conversation_over = self.conversations.get(conversation).ended_at.is_some();
        let place = match (latest, fact.change) {
            // Joining again after leaving is another stay, unless it is the same event delivered again, or all is over.
            (Some(place), ParticipantChange::Joined)
                if self.participants.get(place).left_at.is_some()
                    && !applying.redelivered
                    && !conversation_over =>
            {
                let known = self.participants.get(place).clone();
                let place = self.new_stay(applying, conversation, &fact.href);
                let stay = self.participants.get_mut(place);
                stay.sip_uri = known.sip_uri;
                stay.display_name = known.display_name;
                stay.role = known.role;
                stay.source_network = known.source_network;
                stay.is_local = known.is_local;
                place
            }
            (Some(place), _) => place,
            (None, _) => {
                let place = self.new_stay(applying, conversation, &fact.href);
                if fact.change == ParticipantChange::Left {
                    // It came before we did.
                    self.participants.get_mut(place).joined_at = None;
                }
                place
            }
        };
        let stay = self.participants.get_mut(place);
        if fact.is_local {
            stay.is_local = true;
            fill(&mut stay.sip_uri, Some(&applying.account_uri.as_str().to_owned()));
        }
        if let Some(details) = &fact.details {
            describe(stay, details);
            stay.awaiting_fetch = false;
            applying.fetched(FetchedResource::Participant, &fact.href);
        }
        replace(&mut stay.role, fact.role.map(str::to_owned).as_ref());
        fill(&mut stay.display_name, fact.title.as_ref());
        if fact.change == ParticipantChange::Left {
            stay.left_at.get_or_insert(applying.at);
            // A participant who left cannot be fetched any more.
            stay.awaiting_fetch = false;
            applying.fetched(FetchedResource::Participant, &fact.href);
        } else if stay.sip_uri.is_none() && fact.details.is_none() {
            let tried = !stay.awaiting_fetch && latest == Some(place);
            if !(tried && (applying.redelivered || fact.change == ParticipantChange::Joined)) {
                stay.awaiting_fetch = true;
            }
            if stay.awaiting_fetch {
                applying.fetch(FetchedResource::Participant, &fact.href, Some(&fact.conversation_href));
            }
        }
        if !self.participants.get(place).awaiting_fetch {
            self.settle_sender(place);
        }
    }

    fn new_stay(&mut self, applying: &Applying, conversation: usize, href: &str) -> usize {
        let id = self.next_participant_id();
        let conversation = self.conversations.get(conversation);
        self.participants.insert(ParticipantRow {
            id,
            account: applying.account,
            conversation: conversation.id,
            session: Some(applying.session),
            href: Some(href.to_owned()),
            sip_uri: None,
            display_name: None,
            role: None,
            source_network: None,
            is_local: false,
            joined_at: Some(applying.at),
            left_at: conversation.ended_at,
            awaiting_fetch: false,
        })
    }

    /// Who a message or an invitation's text is from.
    pub(super) fn resolve_sender(
        &mut self,
        applying: &mut Applying,
        conversation: usize,
        person: Option<&Person>,
    ) -> Sender {
        let Some(person) = person else {
            return Sender::default();
        };
        let mut sender =
            Sender { uri: person.uri.clone(), name: person.name.clone(), href: person.href.clone() };
        let Some(place) = self.mention_participant(applying, conversation, person) else {
            return sender;
        };
        let stay = self.participants.get(place);
        fill(&mut sender.uri, stay.sip_uri.as_ref());
        fill(&mut sender.name, stay.display_name.as_ref());
        let known = stay.sip_uri.is_some();
        // Until the participant says it, and where they can't be asked any more.
        fill(&mut sender.uri, person.contact_uri.as_ref());
        if known {
            self.settle_sender(place);
        }
        sender
    }

    /// The latest stay of a participant who did something. Who is not known yet gets a row and, without an address, is
    /// fetched.
    pub(super) fn mention_participant(
        &mut self,
        applying: &mut Applying,
        conversation: usize,
        person: &Person,
    ) -> Option<usize> {
        let href = person.href.as_ref()?;
        let known = self.participants.by_resource(applying.session, href);
        let place = known.unwrap_or_else(|| self.new_stay(applying, conversation, href));
        let conversation_href = self.conversations.get(conversation).href.clone();
        let stay = self.participants.get_mut(place);
        fill(&mut stay.sip_uri, person.uri.as_ref());
        fill(&mut stay.display_name, person.name.as_ref());
        if stay.sip_uri.is_some() {
            stay.awaiting_fetch = false;
            applying.fetched(FetchedResource::Participant, href);
        } else if known.is_none() {
            stay.awaiting_fetch = true;
            applying.fetch(FetchedResource::Participant, href, conversation_href.as_deref());
        }
        Some(place)
    }

    /// How a person is called where only a text can stand: by address, by name, by href.
    pub(super) fn called(&self, applying: &Applying, person: &Person) -> Option<String> {
        let stay = person
            .href
            .as_deref()
            .and_then(|href| self.participants.by_resource(applying.session, href))
            .map(|place| self.participants.get(place));
        person
            .uri
            .clone()
            .or_else(|| stay.and_then(|stay| stay.sip_uri.clone()))
            .or_else(|| person.name.clone())
            .or_else(|| stay.and_then(|stay| stay.display_name.clone()))
            .or_else(|| person.href.clone())
    }

    /// Addresses of the other people who are in a conversation, in the spelling of `outbox.destination`; none if no
    /// address is known.
    pub(super) fn remote_parties(&self, applying: &Applying, conversation: ConversationId) -> Option<String> {
        let mut uris: Vec<&str> = self
            .participants
            .of_conversation(conversation)
            .into_iter()
            .map(|place| self.participants.get(place))
            .filter(|stay| stay.left_at.is_none() && !stay.is_local)
            .filter_map(|stay| stay.sip_uri.as_deref())
            .filter(|uri| *uri != applying.account_uri.as_str())
            .collect();
        uris.sort_unstable();
        uris.dedup();
        (!uris.is_empty()).then(|| uris.join(";"))
    }
}

fn describe(stay: &mut ParticipantRow, details: &ParticipantDetails) {
    fill(&mut stay.sip_uri, details.uri.as_ref());
    fill(&mut stay.display_name, details.name.as_ref());
    // A role changes during a stay; the last one is kept.
    replace(&mut stay.role, details.role.as_ref());
    fill(&mut stay.source_network, details.source_network.as_ref());
}
