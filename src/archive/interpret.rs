//! From event batches and fetched resources to facts: what an event means to the archive.
//!
//! Pure: no actor, no database, no network. Events are read strictly in document order and each becomes zero or more
//! facts at its place. What the reference lists but the archive has no use for (audio, presence of contacts) is
//! counted by the event channel and passed over; what it does not list is quarantined with its raw text (G8).
//! Sources: `EventsInUCWA`, `ReceiveAnIM`, `SendAnIM` and the resource pages named at each function.

use crate::{
    archive::{
        fact::{
            Content, ConversationEnded, ConversationFact, Direction, EventSender, Fact, FailureReason, Fetch,
            FetchedResource, InvitationFact, InvitationKind, MessageFact, OperationStatus, ParticipantChange,
            ParticipantDetails, ParticipantFact, Person, Phase, Quarantined, TypingFact,
        },
        text::storable,
        vocabulary::{is_listed_rel, is_listed_sender},
    },
    identifiers::OperationId,
    ucwa::{
        data_uri,
        model::{Event, EventBatch, EventKind, Link, Reason, Resource, Sender},
        time,
    },
};

/// Facts of one event-channel response, in document order. `body` is the response text that `batch` was read from.
pub fn interpret_batch(batch: &EventBatch, body: &str) -> Vec<Fact> {
    let mut facts = Vec::new();
    for sender in &batch.senders {
        for event in &sender.events {
            let first = facts.len();
            interpret_event(sender, event, raw_text(event, body), &mut facts);
            for fact in &mut facts[first..] {
                if let Fact::Quarantined(quarantined) = fact {
                    quarantined.sender =
                        Some(EventSender { rel: sender.rel.clone(), href: sender.href.clone() });
                }
            }
        }
    }
    facts
}

/// Facts of a resource that an event had only linked and that was fetched since.
pub fn interpret_fetched(fetch: &Fetch, resource: &Resource) -> Vec<Fact> {
    let mut facts = Vec::new();
    let conversation = fetch.conversation_href.clone();
    match fetch.resource {
        FetchedResource::Message => match conversation.or_else(|| conversation_of(resource)) {
            Some(conversation_href) => {
                let phase = match resource.property("status").and_then(status_of) {
                    Some(_) => Phase::Completed,
                    None => Phase::Started,
                };
                message(
                    &conversation_href,
                    &fetch.href,
                    phase,
                    Some(resource),
                    &Outcome::default(),
                    "",
                    &mut facts,
                );
            }
            None => facts.push(quarantined("a message names no conversation", &describe(resource))),
        },
        FetchedResource::Invitation(kind) => {
            invitation(
                kind,
                &fetch.href,
                Phase::Updated,
                Some(resource),
                &Outcome::default(),
                "",
                &mut facts,
            );
        }
        FetchedResource::Conversation => {
            facts.push(Fact::Conversation(conversation_fact(&fetch.href, resource)));
        }
        FetchedResource::Participant => match conversation.or_else(|| conversation_of(resource)) {
            Some(conversation_href) => facts.push(Fact::Participant(ParticipantFact {
                conversation_href,
                href: fetch.href.clone(),
                change: ParticipantChange::Updated,
                title: None,
                details: Some(participant_details(resource)),
                role: None,
                is_local: resource.link("me").is_some() || resource.rel == "localParticipant",
            })),
            None => facts.push(quarantined("a participant names no conversation", &describe(resource))),
        },
    }
    facts
}

/// Who is in a conversation, by its own resource and by its resource `participants`: everybody whose stay is not open in
/// the archive has joined meanwhile.
pub fn interpret_roster(
    conversation_href: &str,
    conversation: &Resource,
    people: Option<&Resource>,
) -> Vec<Fact> {
    let joined = |href: &str, title: Option<&str>, resource: Option<&Resource>, is_local| {
        Fact::Participant(ParticipantFact {
            conversation_href: conversation_href.to_owned(),
            href: href.to_owned(),
            change: ParticipantChange::Joined,
            title: title.filter(|title| !title.trim().is_empty()).map(str::to_owned),
            details: resource.map(participant_details),
            role: None,
            is_local: is_local || resource.is_some_and(|resource| resource.link("me").is_some()),
        })
    };
    let local = conversation
        .embedded("localParticipant")
        .map(|local| joined(&local.href, None, Some(local), true))
        .or_else(|| {
            let link = conversation.link("localParticipant")?;
            Some(joined(&link.href, link.title.as_deref(), None, true))
        });
    let embedded = people.into_iter().flat_map(|people| people.all_embedded("participant"));
    let linked = people.into_iter().flat_map(|people| people.links("participant"));
    local
        .into_iter()
        .chain(embedded.map(|person| joined(&person.href, None, Some(person), false)))
        .chain(linked.map(|link| joined(&link.href, link.title.as_deref(), None, false)))
        .collect()
}

/// Status and reason of an event, which only some events have.
#[derive(Debug, Default)]
struct Outcome {
    status: Option<OperationStatus>,
    reason: Option<FailureReason>,
}

fn interpret_event(sender: &Sender, event: &Event, raw: &str, facts: &mut Vec<Fact>) {
    if let EventKind::Unknown(kind) = &event.kind {
        facts.push(quarantined(&format!("event type {kind:?} is not in the UCWA reference"), raw));
        return;
    }
    if !is_listed_sender(&sender.rel) {
        facts.push(quarantined(&format!("sender {:?} is not in the UCWA reference", sender.rel), raw));
        return;
    }
    if !is_listed_rel(&event.rel) {
        facts.push(quarantined(&format!("rel {:?} is not in the UCWA reference", event.rel), raw));
        return;
    }
    let outcome = Outcome {
        status: event.status.as_deref().and_then(status_of),
        reason: event.reason.as_ref().map(failure_reason),
    };
    let resource = event.resource.as_ref();
    match event.rel.as_str() {
        "conversation" if event.kind == EventKind::Deleted => {
            facts.push(Fact::ConversationEnded(ConversationEnded {
                href: event.href.clone(),
                reason: outcome.reason,
            }));
        }
        "conversation" => facts.push(Fact::Conversation(match resource {
            Some(resource) => conversation_fact(&event.href, resource),
            None => {
                ConversationFact { href: event.href.clone(), link_only: true, ..ConversationFact::default() }
            }
        })),
        "messagingInvitation" => {
            invitation(InvitationKind::Messaging, &event.href, phase(event), resource, &outcome, raw, facts);
        }
        "onlineMeetingInvitation" => {
            invitation(
                InvitationKind::OnlineMeeting,
                &event.href,
                phase(event),
                resource,
                &outcome,
                raw,
                facts,
            );
        }
        "participantInvitation" => {
            invitation(
                InvitationKind::Participant,
                &event.href,
                phase(event),
                resource,
                &outcome,
                raw,
                facts,
            );
        }
        "message" => match conversation_of_sender(sender).or_else(|| resource.and_then(conversation_of)) {
            Some(conversation_href) => {
                message(&conversation_href, &event.href, phase(event), resource, &outcome, raw, facts);
            }
            None => facts.push(quarantined("a message event names no conversation", raw)),
        },
        "participant" | "localParticipant" => {
            match conversation_of_sender(sender).or_else(|| resource.and_then(conversation_of)) {
                Some(conversation_href) => participant(&conversation_href, event, facts),
                None => facts.push(quarantined("a participant event names no conversation", raw)),
            }
        }
        // `messaging`, `communication`, `me` and their like change what can be done, not what happened.
        _ => {}
    }
}

fn conversation_of_sender(sender: &Sender) -> Option<String> {
    (sender.rel == "conversation").then(|| sender.href.clone())
}

/// The conversation that a resource links or embeds.
fn conversation_of(resource: &Resource) -> Option<String> {
    resource
        .link("conversation")
        .map(|link| link.href.clone())
        .or_else(|| resource.embedded("conversation").map(|conversation| conversation.href.clone()))
}

fn phase(event: &Event) -> Phase {
    match event.kind {
        EventKind::Started | EventKind::Added => Phase::Started,
        EventKind::Completed | EventKind::Deleted => Phase::Completed,
        EventKind::Updated | EventKind::Unknown(_) => Phase::Updated,
    }
}

/// Resource `conversation`.
fn conversation_fact(href: &str, resource: &Resource) -> ConversationFact {
    let state = text(resource, "state");
    let conference = state.as_deref().is_some_and(|state| {
        ["conferencing", "conferenced", "inlobby"].contains(&state.to_ascii_lowercase().as_str())
    });
    let crowded = resource
        .property("participantCount")
        .and_then(|count| count.trim().parse::<u32>().ok())
        .is_some_and(|count| count > 2);
    ConversationFact {
        href: href.to_owned(),
        direction: state
            .as_deref()
            .is_some_and(|state| state.eq_ignore_ascii_case("Incoming"))
            .then_some(Direction::Incoming),
        state,
        thread_id: text(resource, "threadId"),
        subject: resource.property("subject").map(str::to_owned),
        importance: text(resource, "importance"),
        multiparty: (conference || crowded).then_some(true),
        online_meeting_uri: resource
            .embedded("onlineMeeting")
            .and_then(|meeting| text(meeting, "onlineMeetingUri"))
            .or_else(|| text(resource, "onlineMeetingUri")),
        link_only: false,
    }
}

/// Resources `messagingInvitation`, `onlineMeetingInvitation`, `participantInvitation`.
fn invitation(
    kind: InvitationKind,
    href: &str,
    phase: Phase,
    resource: Option<&Resource>,
    outcome: &Outcome,
    raw: &str,
    facts: &mut Vec<Fact>,
) {
    let mut fact = InvitationFact {
        href: href.to_owned(),
        kind,
        phase,
        direction: None,
        state: None,
        operation_id: None,
        thread_id: None,
        subject: None,
        importance: None,
        from: None,
        to_uri: None,
        conversation_href: None,
        content: Content::default(),
        status: outcome.status,
        reason: outcome.reason.clone(),
        online_meeting_uri: None,
        derived_conversation_href: None,
        link_only: resource.is_none(),
    };
    let Some(resource) = resource else {
        facts.push(Fact::Invitation(fact));
        return;
    };
    fact.direction = direction(resource);
    fact.state = text(resource, "state");
    fact.operation_id = text(resource, "operationId").map(OperationId);
    fact.thread_id = text(resource, "threadId");
    fact.subject = resource.property("subject").map(str::to_owned);
    fact.importance = text(resource, "importance");
    fact.conversation_href = conversation_of(resource);
    fact.online_meeting_uri = text(resource, "onlineMeetingUri");
    fact.derived_conversation_href = derived_conversation(resource);
    fact.to_uri = text(resource, "to")
        .or_else(|| resource.embedded("to").and_then(|to| text(to, "uri")))
        .map(|uri| normal_uri(&uri))
        .or_else(|| resource.link("to").and_then(|link| uri_hint(&link.href)));
    fact.from = resource
        .embedded("from")
        .map(person)
        .or_else(|| resource.link("from").map(linked_person))
        .or_else(|| resource.link("organizer").map(linked_person));
    if let Some(link) = resource.link("message") {
        read_content(std::slice::from_ref(&link), raw, &mut fact.content, facts);
    }
    let people: Vec<Fact> = fact
        .conversation_href
        .iter()
        .flat_map(|conversation_href| {
            ["from", "acceptedByParticipant"].into_iter().flat_map(|role| resource.all_embedded(role)).map(
                |participant| {
                    Fact::Participant(ParticipantFact {
                        conversation_href: conversation_href.clone(),
                        href: participant.href.clone(),
                        change: ParticipantChange::Updated,
                        title: None,
                        details: Some(participant_details(participant)),
                        role: None,
                        is_local: participant.link("me").is_some(),
                    })
                },
            )
        })
        .collect();
    facts.push(Fact::Invitation(fact));
    facts.extend(people);
}

/// Resource `message`.
fn message(
    conversation_href: &str,
    href: &str,
    phase: Phase,
    resource: Option<&Resource>,
    outcome: &Outcome,
    raw: &str,
    facts: &mut Vec<Fact>,
) {
    let mut fact = MessageFact {
        conversation_href: conversation_href.to_owned(),
        href: href.to_owned(),
        phase,
        direction: None,
        sender: None,
        content: Content::default(),
        sent_at: None,
        unreadable_time: None,
        status: outcome.status,
        reason: outcome.reason.clone(),
        operation_id: None,
        failed_recipients: Vec::new(),
        link_only: resource.is_none(),
    };
    if let Some(resource) = resource {
        fact.direction = direction(resource);
        fact.sender = resource
            .embedded("participant")
            .map(person)
            .or_else(|| {
                let contact_uri = resource.link("contact").and_then(|link| uri_hint(&link.href));
                resource.link("participant").map(|link| Person { contact_uri, ..linked_person(link) })
            })
            .or_else(|| {
                resource.link("contact").map(|link| Person {
                    uri: uri_hint(&link.href),
                    name: link.title.clone().filter(|title| !title.trim().is_empty()),
                    ..Person::default()
                })
            });
        let bodies: Vec<&Link> =
            ["plainMessage", "htmlMessage"].iter().filter_map(|rel| resource.link(rel)).collect();
        read_content(&bodies, raw, &mut fact.content, facts);
        if let Some(stamp) = text(resource, "timeStamp") {
            match time::parse(&stamp) {
                Ok(sent_at) => fact.sent_at = Some(sent_at),
                Err(_) => fact.unreadable_time = Some(stamp),
            }
        }
        fact.status = fact.status.or_else(|| resource.property("status").and_then(status_of));
        fact.operation_id = text(resource, "operationId").map(OperationId);
        fact.failed_recipients = resource
            .all_embedded("failedDeliveryParticipant")
            .map(person)
            .chain(resource.links("failedDeliveryParticipant").map(linked_person))
            .collect();
    }
    facts.push(Fact::Message(fact));
}

/// Resources `participant` and `localParticipant`.
fn participant(conversation_href: &str, event: &Event, facts: &mut Vec<Fact>) {
    let mut role = None;
    let (change, details) = match event.within.as_ref().map(|within| within.rel.as_str()) {
        None => {
            let change = match event.kind {
                EventKind::Added | EventKind::Started => ParticipantChange::Joined,
                EventKind::Deleted => ParticipantChange::Left,
                _ => ParticipantChange::Updated,
            };
            (change, event.resource.as_ref().map(participant_details))
        }
        Some(list @ ("attendees" | "leaders")) if event.kind != EventKind::Deleted => {
            role = Some(if list == "leaders" { "Leader" } else { "Attendee" });
            let change = match event.kind {
                EventKind::Added => ParticipantChange::Joined,
                _ => ParticipantChange::Updated,
            };
            (change, event.resource.as_ref().map(participant_details))
        }
        // Who waits in the lobby is not in the conversation yet, or not any more.
        Some("lobby") if event.kind == EventKind::Added => (ParticipantChange::Waits, None),
        Some("typingParticipants") if event.kind == EventKind::Added => {
            facts.push(Fact::Typing(TypingFact {
                conversation_href: conversation_href.to_owned(),
                who: Person {
                    href: Some(event.href.clone()),
                    name: event.title.clone().filter(|title| !title.trim().is_empty()),
                    ..Person::default()
                },
            }));
            return;
        }
        Some(_) => return,
    };
    facts.push(Fact::Participant(ParticipantFact {
        conversation_href: conversation_href.to_owned(),
        href: event.href.clone(),
        change,
        title: event.title.clone().filter(|title| !title.trim().is_empty()),
        details,
        role,
        is_local: event.rel == "localParticipant",
    }));
}

/// Decodes `plainMessage`, `htmlMessage` or `message` links into `content`; what cannot be decoded is quarantined.
pub(super) fn read_content(links: &[&Link], raw: &str, content: &mut Content, facts: &mut Vec<Fact>) {
    for link in links {
        match data_uri::decode(&link.href) {
            Ok(decoded) if decoded.media_type.eq_ignore_ascii_case("text/html") => {
                content.html = Some(decoded.text);
            }
            Ok(decoded) if decoded.media_type.eq_ignore_ascii_case("text/plain") => {
                content.plain = Some(decoded.text);
            }
            Ok(decoded) => facts.push(quarantined(
                &format!("{} has the media type {:?}, which is not text", link.rel, decoded.media_type),
                if raw.is_empty() { &link.href } else { raw },
            )),
            Err(problem) => facts.push(quarantined(
                &format!("the data URI of {} can't be decoded: {problem}", link.rel),
                if raw.is_empty() { &link.href } else { raw },
            )),
        }
    }
}

fn participant_details(resource: &Resource) -> ParticipantDetails {
    ParticipantDetails {
        uri: text(resource, "uri").map(|uri| normal_uri(&uri)),
        name: text(resource, "name"),
        role: text(resource, "role"),
        source_network: text(resource, "sourceNetwork"),
    }
}

fn person(resource: &Resource) -> Person {
    Person {
        href: Some(resource.href.clone()).filter(|href| !href.is_empty()),
        uri: text(resource, "uri").map(|uri| normal_uri(&uri)),
        name: text(resource, "name"),
        contact_uri: None,
    }
}

fn linked_person(link: &Link) -> Person {
    Person {
        href: Some(link.href.clone()),
        name: link.title.clone().filter(|title| !title.trim().is_empty()),
        ..Person::default()
    }
}

/// The conversation in which the talk goes on after this invitation's; the link may lead to its messaging only.
fn derived_conversation(resource: &Resource) -> Option<String> {
    let embedded = |rel| resource.embedded(rel);
    resource
        .link("derivedConversation")
        .map(|link| link.href.clone())
        .or_else(|| embedded("derivedConversation").map(|conversation| conversation.href.clone()))
        .or_else(|| embedded("derivedMessaging").and_then(conversation_of))
}

pub(super) fn direction(resource: &Resource) -> Option<Direction> {
    match resource.property("direction")?.trim().to_ascii_lowercase().as_str() {
        "incoming" => Some(Direction::Incoming),
        "outgoing" => Some(Direction::Outgoing),
        _ => None,
    }
}

/// `Success`/`Failure` on events, `Succeeded`/`Failed` in resources; `Pending` is neither.
fn status_of(word: &str) -> Option<OperationStatus> {
    match word.trim().to_ascii_lowercase().as_str() {
        "success" | "succeeded" => Some(OperationStatus::Success),
        "failure" | "failed" => Some(OperationStatus::Failure),
        _ => None,
    }
}

fn failure_reason(reason: &Reason) -> FailureReason {
    FailureReason {
        code: reason.code.clone(),
        subcode: reason.subcode.clone(),
        message: reason.message.clone(),
    }
}

/// A property that is there and not empty.
pub(super) fn text(resource: &Resource, name: &str) -> Option<String> {
    resource.property(name).map(str::trim).filter(|value| !value.is_empty()).map(str::to_owned)
}

/// URIs are stored lower case; a scheme is added to a bare address.
pub(super) fn normal_uri(uri: &str) -> String {
    let lower = storable(uri.trim()).to_lowercase();
    if lower.contains(':') || !lower.contains('@') { lower } else { format!("sip:{lower}") }
}

/// The address that a contact's href ends in. A hint for a name, for where nothing better is known.
pub(super) fn uri_hint(href: &str) -> Option<String> {
    let path = href.split(['?', '#']).next()?;
    let segment = path.trim_end_matches('/').rsplit('/').next()?;
    let decoded = percent_encoding::percent_decode_str(segment).decode_utf8().ok()?;
    decoded.contains('@').then(|| normal_uri(&decoded))
}

fn raw_text<'body>(event: &Event, body: &'body str) -> &'body str {
    body.get(event.raw.clone()).unwrap_or(body)
}

pub(super) fn quarantined(reason: &str, payload: &str) -> Fact {
    Fact::Quarantined(Quarantined::new(reason, payload))
}

/// A fetched resource in words, for the quarantine: its XML is gone by then.
fn describe(resource: &Resource) -> String {
    format!("resource {} at {} with properties {:?}", resource.rel, resource.href, resource.properties)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::xml::{parse_events, parse_resource};

    const TALK: &str = "/a/1/communication/conversations/7";

    fn facts(senders: &str) -> Vec<Fact> {
        let body =
            format!("<events href=\"/e?ack=1\"><link rel=\"next\" href=\"/e?ack=2\"/>{senders}</events>");
        interpret_batch(&parse_events(&body).unwrap(), &body)
    }

    fn in_talk(events: &str) -> Vec<Fact> {
        facts(&format!("<sender rel=\"conversation\" href=\"{TALK}\">{events}</sender>"))
    }

    fn in_communication(events: &str) -> Vec<Fact> {
        facts(&format!("<sender rel=\"communication\" href=\"/a/1/communication\">{events}</sender>"))
    }

    #[test]
    fn a_call_becomes_an_invitation_with_its_text_and_the_caller() {
        let facts = in_communication(&format!(
            "<started rel=\"messagingInvitation\" href=\"/a/1/inv/3\"><resource rel=\"messagingInvitation\" href=\"/a/1/inv/3\">\
             <link rel=\"conversation\" href=\"{TALK}\"/><link rel=\"to\" href=\"/a/1/people/Alice%40contoso.com\"/>\
             <link rel=\"message\" href=\"data:text/plain;charset=utf-8,Hi+there%0d%0a\"/>\
             <property name=\"direction\">Incoming</property><property name=\"subject\"></property>\
             <property name=\"threadId\">t+/=</property><property name=\"state\">Connecting</property>\
             <resource rel=\"from\" href=\"{TALK}/participants/bob@x.example\"><property name=\"name\">Bob</property>\
             <property name=\"uri\">sip:Bob@X.example</property></resource></resource></started>"
        ));
        let [Fact::Invitation(invitation), Fact::Participant(caller)] = facts.as_slice() else {
            panic!("{facts:?}")
        };
        assert_eq!(invitation.direction, Some(Direction::Incoming));
        assert_eq!(invitation.content.plain.as_deref(), Some("Hi there\r\n"));
        assert_eq!(invitation.thread_id.as_deref(), Some("t+/="));
        assert_eq!(invitation.to_uri.as_deref(), Some("sip:alice@contoso.com"));
        assert_eq!(invitation.from.as_ref().unwrap().uri.as_deref(), Some("sip:bob@x.example"));
        assert_eq!((invitation.phase, invitation.link_only), (Phase::Started, false));
        assert_eq!(caller.details.as_ref().unwrap().uri.as_deref(), Some("sip:bob@x.example"));
        assert_eq!(caller.change, ParticipantChange::Updated);
    }

    #[test]
    fn a_message_brings_text_time_sender_and_status() {
        let facts = in_talk(
            "<completed rel=\"message\" href=\"/m/2\" status=\"Success\"><resource rel=\"message\" href=\"/m/2\">\
             <link rel=\"participant\" href=\"/p/bob\" title=\"Bob\"/>\
             <link rel=\"plainMessage\" href=\"data:text/plain;charset=utf-8,1%2b1+%3d+2\"/>\
             <link rel=\"htmlMessage\" href=\"data:text/html;charset=utf-8,%3cb%3e1%2b1%3c%2fb%3e\"/>\
             <property name=\"direction\">Incoming</property>\
             <property name=\"timeStamp\">2014-06-02T23:00:14.1359999+02:00</property></resource></completed>",
        );
        let [Fact::Message(message)] = facts.as_slice() else { panic!("{facts:?}") };
        assert_eq!(message.conversation_href, TALK);
        assert_eq!(message.content.plain.as_deref(), Some("1+1 = 2"));
        assert_eq!(message.content.html.as_deref(), Some("<b>1+1</b>"));
        assert_eq!(message.sent_at.unwrap().to_string(), "2014-06-02T21:00:14.135Z");
        assert_eq!(message.status, Some(OperationStatus::Success));
        let sender = message.sender.as_ref().unwrap();
        assert_eq!((sender.href.as_deref(), sender.name.as_deref()), (Some("/p/bob"), Some("Bob")));
    }

    #[test]
    fn a_partial_delivery_names_who_was_not_reached() {
        let facts = in_talk(
            "<completed rel=\"message\" href=\"/m/9\" status=\"Failure\"><resource rel=\"message\" href=\"/m/9\">\
             <link rel=\"failedDeliveryParticipant\" href=\"/p/a\" title=\"Ann\"/>\
             <link rel=\"failedDeliveryParticipant\" href=\"/p/b\" title=\"\"/>\
             <property name=\"direction\">Outgoing</property><property name=\"operationId\">op</property></resource>\
             <reason><code>RemoteFailure</code><subcode>Unreachable</subcode></reason></completed>",
        );
        let [Fact::Message(message)] = facts.as_slice() else { panic!("{facts:?}") };
        assert_eq!(message.failed_recipients.len(), 2);
        assert_eq!(message.failed_recipients[1].name, None, "an empty title is no name");
        assert_eq!(message.reason.as_ref().unwrap().subcode.as_deref(), Some("Unreachable"));
        assert_eq!(message.operation_id.as_ref().unwrap().0, "op");
    }

    #[test]
    fn typing_roles_and_the_lobby_are_not_membership() {
        let typing = in_talk(
            "<added rel=\"participant\" href=\"/p/a\" title=\"Ann\"><in rel=\"typingParticipants\" href=\"/t\"/></added>\
             <deleted rel=\"participant\" href=\"/p/a\"><in rel=\"typingParticipants\" href=\"/t\"/></deleted>",
        );
        let [Fact::Typing(typing)] = typing.as_slice() else { panic!("{typing:?}") };
        assert_eq!((typing.who.href.as_deref(), typing.who.name.as_deref()), (Some("/p/a"), Some("Ann")));
        let lobby =
            in_talk("<added rel=\"participant\" href=\"/p/a\"><in rel=\"lobby\" href=\"/l\"/></added>");
        let [Fact::Participant(waiting)] = lobby.as_slice() else { panic!("{lobby:?}") };
        assert_eq!(waiting.change, ParticipantChange::Waits);
        let admitted =
            in_talk("<deleted rel=\"participant\" href=\"/p/a\"><in rel=\"lobby\" href=\"/l\"/></deleted>");
        assert!(admitted.is_empty(), "{admitted:?}");
        let leader =
            in_talk("<added rel=\"participant\" href=\"/p/a\"><in rel=\"leaders\" href=\"/l\"/></added>");
        let [Fact::Participant(leader)] = leader.as_slice() else { panic!("{leader:?}") };
        assert_eq!((leader.change, leader.role), (ParticipantChange::Joined, Some("Leader")));
        assert_eq!(leader.details, None, "a list says nothing about who they are");
        let modality = in_talk(
            "<added rel=\"participantMessaging\" href=\"/p/a/m\"><in rel=\"participant\" href=\"/p/a\"/></added>",
        );
        assert!(modality.is_empty(), "{modality:?}");
    }

    #[test]
    fn members_join_and_leave_by_link_alone() {
        let facts = in_talk(
            "<added rel=\"localParticipant\" href=\"/p/me\"/><added rel=\"participant\" href=\"/p/b\" title=\"Bo\"/>\
             <deleted rel=\"participant\" href=\"/p/b\" title=\"Bo\"/>",
        );
        let changes: Vec<_> = facts
            .iter()
            .map(|fact| match fact {
                Fact::Participant(participant) => (participant.change, participant.is_local),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            changes,
            [
                (ParticipantChange::Joined, true),
                (ParticipantChange::Joined, false),
                (ParticipantChange::Left, false)
            ]
        );
    }

    #[test]
    fn what_the_reference_does_not_list_is_quarantined_with_its_raw_text_and_the_rest_goes_on() {
        let facts = facts(&format!(
            "<sender rel=\"hologram\" href=\"/h\"><added rel=\"participant\" href=\"/p\"/></sender>\
             <sender rel=\"conversation\" href=\"{TALK}\"><exploded rel=\"message\" href=\"/m\"/>\
             <added rel=\"hologram\" href=\"/g\" title=\"x\"/><deleted rel=\"participant\" href=\"/p\"/></sender>\
             <sender rel=\"people\" href=\"/people\"><updated rel=\"contactPresence\" href=\"/c\"/></sender>"
        ));
        let [
            Fact::Quarantined(sender),
            Fact::Quarantined(kind),
            Fact::Quarantined(rel),
            Fact::Participant(_),
        ] = facts.as_slice()
        else {
            panic!("{facts:?}")
        };
        assert!(sender.reason.contains("hologram") && sender.payload.starts_with("<added"), "{sender:?}");
        assert!(
            kind.reason.contains("exploded") && kind.payload == "<exploded rel=\"message\" href=\"/m\"/>"
        );
        assert_eq!(rel.payload, "<added rel=\"hologram\" href=\"/g\" title=\"x\"/>");
    }

    #[test]
    fn a_text_that_can_not_be_decoded_is_quarantined_and_the_message_stands() {
        let facts = in_talk(
            "<completed rel=\"message\" href=\"/m/2\" status=\"Success\"><resource rel=\"message\" href=\"/m/2\">\
             <link rel=\"plainMessage\" href=\"data:text/plain;base64,@@@\"/>\
             <property name=\"direction\">Incoming</property></resource></completed>",
        );
        let [Fact::Quarantined(quarantined), Fact::Message(message)] = facts.as_slice() else {
            panic!("{facts:?}")
        };
        assert!(quarantined.reason.contains("base64") && quarantined.payload.contains("@@@"));
        assert!(message.content.is_empty());
    }

    #[test]
    fn a_conversation_tells_its_state_and_its_end() {
        let facts = in_communication(&format!(
            "<updated rel=\"conversation\" href=\"{TALK}\"><resource rel=\"conversation\" href=\"{TALK}\">\
             <property name=\"state\">Conferenced</property><property name=\"subject\">Plan</property></resource></updated>\
             <deleted rel=\"conversation\" href=\"{TALK}\"><reason><code>Informational</code><subcode>Ended</subcode></reason></deleted>"
        ));
        let [Fact::Conversation(conversation), Fact::ConversationEnded(ended)] = facts.as_slice() else {
            panic!("{facts:?}")
        };
        assert_eq!(
            (conversation.state.as_deref(), conversation.multiparty),
            (Some("Conferenced"), Some(true))
        );
        assert_eq!(ended.reason.as_ref().unwrap().subcode.as_deref(), Some("Ended"));
    }

    #[test]
    fn a_fetched_resource_says_what_its_event_did_not() {
        let fetch = |resource, href: &str| Fetch {
            resource,
            href: href.to_owned(),
            conversation_href: Some(TALK.to_owned()),
        };
        let resource = parse_resource(
            "<resource rel=\"message\" href=\"/m/4\"><link rel=\"plainMessage\" href=\"data:,late\"/>\
             <property name=\"direction\">Incoming</property><property name=\"status\">Succeeded</property></resource>",
        )
        .unwrap();
        let facts = interpret_fetched(&fetch(FetchedResource::Message, "/m/4"), &resource);
        let [Fact::Message(message)] = facts.as_slice() else { panic!("{facts:?}") };
        assert_eq!((message.phase, message.content.plain.as_deref()), (Phase::Completed, Some("late")));
        let resource = parse_resource(
            "<resource rel=\"participant\" href=\"/p/b\"><property name=\"uri\">sip:B@x.example</property></resource>",
        )
        .unwrap();
        let facts = interpret_fetched(&fetch(FetchedResource::Participant, "/p/b"), &resource);
        let [Fact::Participant(participant)] = facts.as_slice() else { panic!("{facts:?}") };
        assert_eq!(participant.details.as_ref().unwrap().uri.as_deref(), Some("sip:b@x.example"));
    }
}
