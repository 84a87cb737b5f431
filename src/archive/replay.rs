//! Quarantined payloads, read again by a program that may understand more than the one that put them aside.
//!
//! A payload is a whole event-channel response, or the raw text of one event, whose sender is kept beside it. Of a
//! response that can be read now, events that still are not understood become quarantined payloads of their own; one
//! event is understood as a whole or not at all.

use std::panic::AssertUnwindSafe;

use super::{
    fact::{EventSender, Fact},
    interpret::interpret_batch,
};
use crate::ucwa::{
    json,
    model::EventBatch,
    xml::{self, NAMESPACE},
};

/// Facts of a payload.
///
/// # Errors
/// A sentence: what still is not understood.
pub fn replay(payload: &str, sender: Option<&EventSender>) -> Result<Vec<Fact>, String> {
    let text = payload.trim_start_matches('\u{feff}').trim_start();
    if text.starts_with('{') {
        let batch = json::parse_events(text).map_err(|problem| problem.to_string())?;
        return interpret(&batch, text);
    }
    if is_event(text) {
        let response = around(text, sender);
        let batch = xml::parse_events(&response).map_err(|problem| problem.to_string())?;
        let facts = interpret(&batch, &response)?;
        let problem = facts.iter().find_map(|fact| match fact {
            Fact::Quarantined(quarantined) => Some(quarantined.reason.clone()),
            _ => None,
        });
        return problem.map_or(Ok(facts), Err);
    }
    let batch = xml::parse_events(text).map_err(|problem| problem.to_string())?;
    interpret(&batch, text)
}

fn interpret(batch: &EventBatch, body: &str) -> Result<Vec<Fact>, String> {
    std::panic::catch_unwind(AssertUnwindSafe(|| interpret_batch(batch, body)))
        .map_err(|_| "it breaks the interpreter; please report it".to_owned())
}

/// Name and prefix of the first element, if the text begins with one.
fn first_element(text: &str) -> Option<(Option<&str>, &str)> {
    let name = text.strip_prefix('<')?;
    let name =
        &name[..name.find(|c: char| c.is_whitespace() || matches!(c, '>' | '/')).unwrap_or(name.len())];
    if !name.starts_with(char::is_alphabetic) {
        return None;
    }
    Some(match name.split_once(':') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, name),
    })
}

/// Any element that is not the root of a response is an event: which types there are may have changed.
fn is_event(text: &str) -> bool {
    first_element(text).is_some_and(|(_, name)| !matches!(name, "events" | "resource" | "reason" | "html"))
}

/// The event in a response of its own.
fn around(event: &str, sender: Option<&EventSender>) -> String {
    let prefix = first_element(event).and_then(|(prefix, _)| prefix);
    let declared = prefix.map(|prefix| format!(" xmlns:{prefix}=\"{NAMESPACE}\"")).unwrap_or_default();
    let attribute = |value: Option<&str>| quick_xml::escape::escape(value.unwrap_or_default()).into_owned();
    format!(
        "<events xmlns=\"{NAMESPACE}\"{declared} href=\"\"><sender rel=\"{}\" href=\"{}\">{event}</sender></events>",
        attribute(sender.map(|sender| sender.rel.as_str())),
        attribute(sender.map(|sender| sender.href.as_str())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> EventSender {
        EventSender { rel: "conversation".to_owned(), href: "/talks/7?a=1&b=2".to_owned() }
    }

    #[test]
    fn an_event_is_read_with_its_sender() {
        let event = "<completed rel=\"message\" href=\"/m/2\" status=\"Success\"><resource rel=\"message\" href=\"/m/2\">\
             <link rel=\"plainMessage\" href=\"data:,late\"/><property name=\"direction\">Incoming</property>\
             </resource></completed>";
        for text in [event.to_owned(), event.replace('<', "<u:").replace("<u:/", "</u:")] {
            let facts = replay(&text, Some(&conversation())).unwrap();
            let [Fact::Message(message)] = facts.as_slice() else { panic!("{facts:?}") };
            assert_eq!(message.conversation_href, "/talks/7?a=1&b=2");
            assert_eq!(message.content.plain.as_deref(), Some("late"));
        }
    }

    #[test]
    fn what_still_is_not_understood_says_so() {
        let problem = replay("<exploded rel=\"message\" href=\"/m\"/>", Some(&conversation())).unwrap_err();
        assert!(problem.contains("exploded"), "{problem}");
        let problem = replay("<added rel=\"message\" href=\"/m\"/>", None).unwrap_err();
        assert!(problem.contains("sender"), "{problem}");
        assert!(replay("<html>no</html>", None).is_err());
        assert!(replay("resource message at /m", None).is_err());
        assert!(replay("<events href=\"/e\"><sender", None).is_err());
    }

    #[test]
    fn a_response_that_can_be_read_now_keeps_what_it_can_not_tell() {
        let facts = replay(
            "\u{feff}<?xml version=\"1.0\"?><events href=\"/e\"><link rel=\"next\" href=\"/e?ack=2\"/>\
             <sender rel=\"conversation\" href=\"/talks/7\"><deleted rel=\"participant\" href=\"/p\"/>\
             <exploded rel=\"message\" href=\"/m\"/></sender></events>",
            None,
        )
        .unwrap();
        let [Fact::Participant(_), Fact::Quarantined(quarantined)] = facts.as_slice() else {
            panic!("{facts:?}")
        };
        assert_eq!(quarantined.sender.as_ref().unwrap().rel, "conversation");
        assert_eq!(quarantined.payload, "<exploded rel=\"message\" href=\"/m\"/>");
    }
}
