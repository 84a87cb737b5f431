//! From a conversation log of the server to a fact: what was said where the event channel was not followed.
//!
//! Pure, like [`super::interpret`]. The log is the resource `conversationLog`, its transcripts are the resources
//! `conversationLogTranscript`, in whatever order their pages brought them. A transcript says who spoke by a link:
//! `me`, or `contact`. Transcripts of audio and of errors hold no text and are passed over; one that holds a text and
//! does not say when or by whom is kept in the quarantine. Source: protocol 16 and the resource pages of these names.

use std::collections::HashMap;

use super::{
    fact::{Content, Direction, Fact, LoggedConversation, LoggedMessage, Person, Quarantined},
    interpret::{direction, normal_uri, read_content, text, uri_hint},
};
use crate::ucwa::{
    model::{Link, Resource},
    time,
};

/// People by the address of their `contact` resource.
pub type Contacts = HashMap<String, Person>;

/// Contacts by whom something was said and whom neither the log nor their address names: worth a look at the
/// resource.
pub fn unknown_contacts(log: &Resource, transcripts: &[Resource]) -> Vec<String> {
    let known = recipients(log);
    let mut unknown: Vec<String> = transcripts
        .iter()
        .filter(|transcript| holds_text(transcript))
        .filter_map(|transcript| transcript.link("contact"))
        .map(|link| link.href.clone())
        .filter(|href| !href.is_empty())
        .filter(|href| known.get(href).is_none_or(|person| person.uri.is_none()) && uri_hint(href).is_none())
        .collect();
    unknown.sort();
    unknown.dedup();
    unknown
}

/// A `contact` resource as a person.
pub fn interpret_contact(href: &str, resource: &Resource) -> Person {
    Person {
        href: Some(href.to_owned()),
        uri: text(resource, "uri").map(|uri| normal_uri(&uri)),
        name: text(resource, "name"),
        contact_uri: None,
    }
}

/// What a log says, with its messages by time. `contacts` are those that were read because of [`unknown_contacts`].
pub fn interpret_log(log: &Resource, transcripts: &[Resource], contacts: &Contacts) -> Fact {
    let mut known = recipients(log);
    for (href, person) in contacts {
        let entry = known.entry(href.clone()).or_default();
        entry.uri = entry.uri.take().or_else(|| person.uri.clone());
        entry.name = entry.name.take().or_else(|| person.name.clone());
    }
    let mut fact = LoggedConversation {
        href: log.href.clone(),
        thread_id: text(log, "threadId"),
        subject: log.property("subject").map(str::to_owned),
        importance: text(log, "importance"),
        direction: direction(log),
        online_meeting_uri: text(log, "onlineMeetingUri"),
        ..LoggedConversation::default()
    };
    for transcript in transcripts {
        for said in transcript.all_embedded("messageTranscript") {
            message(transcript, said, &known, &mut fact);
        }
    }
    // A stable sort: what bears the same time stays in the order of the log.
    fact.messages.sort_by_key(|message| message.sent_at);
    let speakers = fact.messages.iter().filter_map(|message| message.sender.clone());
    for person in log.all_embedded("conversationLogRecipient").map(recipient).chain(speakers) {
        let person = Person { href: None, ..person };
        let is_known = fact.people.iter().any(|other| match (&other.uri, &person.uri) {
            (Some(other), Some(uri)) => other == uri,
            _ => other.name == person.name,
        });
        if !is_known && (person.uri.is_some() || person.name.is_some()) {
            fact.people.push(person);
        }
    }
    let total = log.property("totalRecipientsCount").and_then(|count| count.trim().parse::<u32>().ok());
    fact.multiparty = text(log, "type").is_some_and(|kind| kind.eq_ignore_ascii_case("ConferenceLog"))
        || total.is_some_and(|total| total > 2)
        || fact.people.len() > 2;
    Fact::Logged(fact)
}

fn holds_text(transcript: &Resource) -> bool {
    transcript.embedded("messageTranscript").is_some()
}

fn recipient(resource: &Resource) -> Person {
    Person {
        href: resource.link("contact").map(|link| link.href.clone()),
        uri: text(resource, "sipUri").map(|uri| normal_uri(&uri)).filter(|uri| uri.contains('@')),
        name: text(resource, "displayName"),
        contact_uri: None,
    }
}

fn recipients(log: &Resource) -> Contacts {
    log.all_embedded("conversationLogRecipient")
        .map(recipient)
        .filter_map(|person| Some((person.href.clone()?, person)))
        .collect()
}

fn message(transcript: &Resource, said: &Resource, known: &Contacts, fact: &mut LoggedConversation) {
    let links: Vec<&Link> = ["plainMessage", "htmlMessage"].iter().filter_map(|rel| said.link(rel)).collect();
    let mut content = Content::default();
    let mut problems = Vec::new();
    read_content(&links, "", &mut content, &mut problems);
    fact.unreadable.extend(problems.into_iter().filter_map(|problem| match problem {
        Fact::Quarantined(quarantined) => Some(quarantined),
        _ => None,
    }));
    if content.is_empty() {
        return;
    }
    let mut refuse = |reason: &str| {
        let payload = format!("transcript {} of {}: {content:?}", transcript.href, fact.href);
        fact.unreadable.push(Quarantined::new(reason, payload));
    };
    let stamp = transcript.property("timeStamp").and_then(|stamp| time::parse(stamp).ok());
    let Some(sent_at) = stamp else {
        refuse("a message of a conversation log has no readable timeStamp");
        return;
    };
    // The documentation's sample has both links; a contact that is somebody else is the one who spoke.
    let (direction, sender) = match (transcript.link("contact"), transcript.link("me")) {
        (Some(contact), _) => (Direction::Incoming, Some(speaker(contact, known))),
        (None, Some(_)) => (Direction::Outgoing, None),
        (None, None) => {
            refuse("a message of a conversation log does not say who wrote it");
            return;
        }
    };
    fact.messages.push(LoggedMessage { sent_at, direction, sender, content });
}

fn speaker(contact: &Link, known: &Contacts) -> Person {
    let person = known.get(&contact.href);
    Person {
        href: None,
        uri: person.and_then(|person| person.uri.clone()).or_else(|| uri_hint(&contact.href)),
        name: person
            .and_then(|person| person.name.clone())
            .or_else(|| contact.title.clone().filter(|title| !title.trim().is_empty())),
        contact_uri: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::xml::parse_resource;

    const LOG: &str = "<resource rel=\"conversationLog\" href=\"/a/1/logs/9\" \
         xmlns=\"http://schemas.microsoft.com/rtc/2012/03/ucwa\">\
         <link rel=\"conversationLogTranscripts\" href=\"/a/1/logs/9/transcripts\"/>\
         <link rel=\"markAsRead\" href=\"/a/1/logs/9/markAsRead\"/>\
         <property name=\"creationTime\">2026-11-22T10:20:24.6066543Z</property>\
         <property name=\"direction\">Incoming</property><property name=\"importance\">Normal</property>\
         <property name=\"status\">Missed</property><property name=\"subject\">Plan</property>\
         <property name=\"threadId\">t+/=9</property><property name=\"totalRecipientsCount\">1</property>\
         <property name=\"type\">MessageLog</property>\
         <resource rel=\"conversationLogRecipient\" href=\"/a/1/logs/9/r/1\">\
         <link rel=\"contact\" href=\"/a/1/people/282\"/><property name=\"displayName\">Bob B</property>\
         <property name=\"sipUri\">Bob@Contoso.com</property></resource></resource>";

    fn transcripts(inside: &str) -> Vec<Resource> {
        let page = format!("<resource rel=\"conversationLogTranscripts\" href=\"/t\">{inside}</resource>");
        parse_resource(&page).unwrap().all_embedded("conversationLogTranscript").cloned().collect()
    }

    fn transcript(time: &str, who: &str, said: &str) -> String {
        format!(
            "<resource rel=\"conversationLogTranscript\" href=\"/t/1\">{who}\
             <property name=\"timeStamp\">{time}</property>{said}</resource>"
        )
    }

    fn plain(text: &str) -> String {
        format!(
            "<resource rel=\"messageTranscript\" href=\"/t/1/m\">\
             <link rel=\"plainMessage\" href=\"data:text/plain;charset=utf8,{text}\"/></resource>"
        )
    }

    fn read(inside: &str, contacts: &Contacts) -> LoggedConversation {
        let Fact::Logged(fact) = interpret_log(&parse_resource(LOG).unwrap(), &transcripts(inside), contacts)
        else {
            panic!("a log is a log")
        };
        fact
    }

    #[test]
    fn a_log_tells_thread_people_and_messages_by_time() {
        let them = "<link rel=\"contact\" href=\"/a/1/people/282\"/>";
        let me = "<link rel=\"me\" href=\"/a/1/me\"/>";
        let inside = transcript("2026-11-22T11:00:07.25+01:00", me, &plain("gladly"))
            + &transcript("2026-11-22T10:00:05Z", them, &plain("lunch%3f"))
            + &transcript(
                "2026-11-22T10:00:09Z",
                them,
                "<resource rel=\"audioTranscript\" href=\"/x\"><property name=\"duration\">PT1M</property></resource>",
            );
        let fact = read(&inside, &Contacts::new());
        assert_eq!(fact.thread_id.as_deref(), Some("t+/=9"));
        assert_eq!((fact.direction, fact.multiparty), (Some(Direction::Incoming), false));
        let said: Vec<_> = fact
            .messages
            .iter()
            .map(|message| {
                (message.sent_at.to_string(), message.direction, message.content.plain.clone().unwrap())
            })
            .collect();
        assert_eq!(
            said,
            [
                ("2026-11-22T10:00:05Z".to_owned(), Direction::Incoming, "lunch?".to_owned()),
                ("2026-11-22T10:00:07.25Z".to_owned(), Direction::Outgoing, "gladly".to_owned()),
            ]
        );
        let bob = Person {
            href: None,
            uri: Some("sip:bob@contoso.com".to_owned()),
            name: Some("Bob B".to_owned()),
            contact_uri: None,
        };
        assert_eq!(fact.messages[0].sender.as_ref(), Some(&bob));
        assert_eq!(fact.people, [bob]);
        assert!(fact.unreadable.is_empty());
    }

    #[test]
    fn a_speaker_is_known_by_address_by_the_contact_that_was_read_or_by_name() {
        let addressed = "<link rel=\"contact\" href=\"/a/1/people/carol%40x.example\"/>";
        let numbered = "<link rel=\"contact\" href=\"/a/1/people/7\" title=\"Dan\"/>";
        let inside = transcript("2026-11-22T10:00:05Z", addressed, &plain("a"))
            + &transcript("2026-11-22T10:00:06Z", numbered, &plain("b"));
        let log = parse_resource(LOG).unwrap();
        assert_eq!(unknown_contacts(&log, &transcripts(&inside)), ["/a/1/people/7"]);
        let sender = |fact: &LoggedConversation, number: usize| {
            let sender = fact.messages[number].sender.clone().unwrap();
            (sender.uri, sender.name)
        };
        let fact = read(&inside, &Contacts::new());
        assert_eq!(sender(&fact, 0), (Some("sip:carol@x.example".to_owned()), None));
        assert_eq!(sender(&fact, 1), (None, Some("Dan".to_owned())));
        let contact = parse_resource(
            "<resource rel=\"contact\" href=\"/a/1/people/7\"><property name=\"uri\">sip:Dan@x.example</property>\
             <property name=\"name\">Dan D</property></resource>",
        )
        .unwrap();
        let contacts =
            Contacts::from([("/a/1/people/7".to_owned(), interpret_contact("/a/1/people/7", &contact))]);
        let fact = read(&inside, &contacts);
        assert_eq!(sender(&fact, 1), (Some("sip:dan@x.example".to_owned()), Some("Dan D".to_owned())));
        assert!(fact.multiparty, "Bob, Carol and Dan");
    }

    #[test]
    fn a_message_without_time_or_speaker_and_a_text_that_can_not_be_decoded_are_kept_apart() {
        let them = "<link rel=\"contact\" href=\"/a/1/people/282\"/>";
        let broken = "<resource rel=\"messageTranscript\" href=\"/m\">\
             <link rel=\"htmlMessage\" href=\"data:text/html;base64,@@@\"/></resource>";
        let inside = transcript("soon", them, &plain("when"))
            + &transcript("2026-11-22T10:00:05Z", "", &plain("who"))
            + &transcript("2026-11-22T10:00:05Z", them, broken);
        let fact = read(&inside, &Contacts::new());
        assert!(fact.messages.is_empty(), "{:?}", fact.messages);
        let reasons: Vec<_> = fact.unreadable.iter().map(|problem| problem.reason.as_str()).collect();
        assert_eq!(reasons.len(), 3);
        assert!(reasons[0].contains("timeStamp") && reasons[1].contains("who wrote it"));
        assert!(reasons[2].contains("base64") && fact.unreadable[2].payload.contains("@@@"));
    }
}
