//! What an event-channel response says, one JSON object an event: the work of `ucwa-relay decode`.

use serde_json::{Map, Value, json};

use super::{
    data_uri, json,
    model::{Event, Sender},
    xml::{self, ParseError},
};

/// Reads an event-channel response, XML or JSON, and describes its events in document order.
///
/// Each object has `sender`, `type`, `rel`, `href`, and where there are such `sender_rel`, `title`, `in`, `status`,
/// `reason`; messages and invitations have the decoded `text` and `html`, or `undecodable` with the reason. An event
/// without text has none of these three.
///
/// # Errors
/// [`ParseError`] if the document as a whole can't be read; then nothing of it is described.
pub fn describe_events(body: &str) -> Result<Vec<Value>, ParseError> {
    let batch = if body.trim_start_matches('\u{feff}').trim_start().starts_with(['{', '[']) {
        json::parse_events(body)?
    } else {
        xml::parse_events(body)?
    };
    Ok(batch
        .senders
        .iter()
        .flat_map(|sender| sender.events.iter().map(move |event| describe(sender, event)))
        .collect())
}

fn describe(sender: &Sender, event: &Event) -> Value {
    let mut object = Map::new();
    object.insert("sender".to_owned(), json!(sender.href));
    object.insert("sender_rel".to_owned(), json!(sender.rel));
    object.insert("type".to_owned(), json!(event.kind.as_str()));
    object.insert("rel".to_owned(), json!(event.rel));
    object.insert("href".to_owned(), json!(event.href));
    if let Some(title) = &event.title {
        object.insert("title".to_owned(), json!(title));
    }
    if let Some(within) = &event.within {
        object.insert(
            "in".to_owned(),
            json!({ "rel": within.rel, "href": within.href, "title": within.title }),
        );
    }
    if let Some(status) = &event.status {
        object.insert("status".to_owned(), json!(status));
    }
    if let Some(reason) = &event.reason {
        object.insert(
            "reason".to_owned(),
            json!({ "code": reason.code, "subcode": reason.subcode, "message": reason.message }),
        );
    }
    if let Some(resource) = &event.resource {
        for rel in ["message", "plainMessage", "htmlMessage"] {
            let Some(link) = resource.link(rel) else { continue };
            match data_uri::decode(&link.href) {
                Ok(decoded) if decoded.media_type == "text/html" => {
                    object.insert("html".to_owned(), json!(decoded.text));
                }
                Ok(decoded) if decoded.media_type == "text/plain" => {
                    object.insert("text".to_owned(), json!(decoded.text));
                }
                Ok(decoded) => {
                    let why = format!("{rel} has the media type {}", decoded.media_type);
                    object.insert("undecodable".to_owned(), json!({ "why": why, "data": link.href }));
                }
                Err(why) => {
                    let why = format!("the data URI of {rel} can't be decoded: {why}");
                    object.insert("undecodable".to_owned(), json!({ "why": why, "data": link.href }));
                }
            }
        }
    }
    Value::Object(object)
}
