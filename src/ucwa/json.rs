//! UCWA's JSON read into the same model as its XML.
//!
//! The relay itself speaks XML; this reads what other clients recorded (`ucwa-relay decode`). Source: `PayloadFormat`,
//! `EventChannelDetails`.

use serde_json::{Map, Value};

use super::{
    character::storable,
    model::{Event, EventBatch, EventKind, Link, Reason, Resource, Sender, Target},
    xml::ParseError,
};

/// Reads an event-channel response. Its events have no raw range: JSON is kept whole.
pub fn parse_events(text: &str) -> Result<EventBatch, ParseError> {
    let value: Value = serde_json::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|error| ParseError::Json(error.to_string()))?;
    let Value::Object(response) = value else {
        return Err(ParseError::Json("the document is no object".to_owned()));
    };
    let links = links_of(&response);
    if !response.contains_key("sender")
        && !links.iter().any(|link| ["next", "resume", "resync"].contains(&link.rel.as_str()))
    {
        return Err(ParseError::Json(
            "the object is no event-channel response: it has neither senders nor a link to go on with"
                .to_owned(),
        ));
    }
    let mut batch = EventBatch {
        href: links.iter().find(|link| link.rel == "self").map(|link| link.href.clone()).unwrap_or_default(),
        ..EventBatch::default()
    };
    for link in links {
        batch.take_link(link);
    }
    for sender in objects(response.get("sender")) {
        batch.senders.push(Sender {
            rel: string(sender, "rel").unwrap_or_default(),
            href: string(sender, "href").unwrap_or_default(),
            events: objects(sender.get("events")).map(event).collect(),
        });
    }
    Ok(batch)
}

fn event(object: &Map<String, Value>) -> Event {
    let target = target(object.get("link")).unwrap_or_default();
    let resource = object.get("_embedded").and_then(Value::as_object).and_then(|embedded| {
        embedded.iter().find_map(|(rel, value)| Some(resource(rel, value.as_object()?)))
    });
    Event {
        kind: EventKind::from_name(&string(object, "type").unwrap_or_default()),
        rel: target.rel,
        href: target.href,
        title: target.title,
        resource,
        within: self::target(object.get("in")),
        status: string(object, "status"),
        reason: object.get("reason").and_then(Value::as_object).map(reason),
        raw: 0..0,
    }
}

fn target(value: Option<&Value>) -> Option<Target> {
    let object = value?.as_object()?;
    Some(Target {
        rel: string(object, "rel").unwrap_or_default(),
        href: string(object, "href").unwrap_or_default(),
        title: string(object, "title"),
    })
}

fn reason(object: &Map<String, Value>) -> Reason {
    Reason {
        code: string(object, "code"),
        subcode: string(object, "subcode"),
        message: string(object, "message"),
        parameters: pairs(object.get("parameters")),
        debug_info: pairs(object.get("debugInfo")),
    }
}

fn pairs(value: Option<&Value>) -> Vec<(String, String)> {
    value
        .and_then(Value::as_object)
        .map(|object| object.iter().map(|(name, value)| (name.clone(), scalar(value))).collect())
        .unwrap_or_default()
}

/// A resource; `rel` is the key under which it is embedded.
fn resource(rel: &str, object: &Map<String, Value>) -> Resource {
    let links = links_of(object);
    let mut read = Resource {
        rel: rel.to_owned(),
        href: links.iter().find(|link| link.rel == "self").map(|link| link.href.clone()).unwrap_or_default(),
        links: links.into_iter().filter(|link| link.rel != "self").collect(),
        ..Resource::default()
    };
    for (name, value) in object {
        match (name.as_str(), value) {
            ("_links", _) => {}
            ("_embedded", Value::Object(embedded)) => {
                for (rel, value) in embedded {
                    for object in objects(Some(value)) {
                        read.embedded.push(resource(rel, object));
                    }
                }
            }
            (_, Value::Array(items)) => {
                read.property_lists.push((name.clone(), items.iter().map(scalar).collect()));
            }
            _ => read.properties.push((name.clone(), scalar(value))),
        }
    }
    read
}

fn links_of(object: &Map<String, Value>) -> Vec<Link> {
    let Some(links) = object.get("_links").and_then(Value::as_object) else { return Vec::new() };
    links
        .iter()
        .flat_map(|(rel, value)| {
            objects(Some(value)).map(|link| Link {
                rel: rel.clone(),
                href: string(link, "href").unwrap_or_default(),
                title: string(link, "title"),
                revision: string(link, "revision"),
            })
        })
        .collect()
}

/// An object, or the objects of an array: one and a list of one look alike.
fn objects(value: Option<&Value>) -> impl Iterator<Item = &Map<String, Value>> {
    let (one, many) = match value {
        Some(Value::Array(items)) => (None, items.as_slice()),
        Some(value) => (value.as_object(), [].as_slice()),
        None => (None, [].as_slice()),
    };
    one.into_iter().chain(many.iter().filter_map(Value::as_object))
}

fn string(object: &Map<String, Value>, name: &str) -> Option<String> {
    object.get(name).filter(|value| !value.is_null()).map(scalar)
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => storable(text).into_owned(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}
