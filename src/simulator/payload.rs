//! A neutral tree of UCWA resources and its two spellings, XML and JSON; the reading of request bodies; data URIs.
//!
//! Owns no state. Everything the simulated server says passes through [`Resource`], [`EventPackage`] or
//! [`Failure`], so that a JSON client and an XML client are told the same.

use std::{borrow::Cow, collections::HashMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hyper::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use percent_encoding::percent_decode;
use quick_xml::{NsReader, XmlVersion, events::Event as XmlEvent};

use super::event_channel::Event;

const NAMESPACE: &str = "http://schemas.microsoft.com/rtc/2012/03/ucwa";
const XML_DECLARATION: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>";

/// How an answer is spelled, chosen by the request's `Accept`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) xml: bool,
    pub(crate) content_type: &'static str,
}

impl Format {
    pub(crate) const JSON: Self = Self { xml: false, content_type: "application/json; charset=utf-8" };
    const UCWA_JSON: Self =
        Self { xml: false, content_type: "application/vnd.microsoft.com.ucwa+json; charset=utf-8" };
    const XML: Self = Self { xml: true, content_type: "application/xml; charset=utf-8" };
    const UCWA_XML: Self =
        Self { xml: true, content_type: "application/vnd.microsoft.com.ucwa+xml; charset=utf-8" };

    /// The acceptable format of the highest quality; JSON where nothing decides it.
    pub(crate) fn negotiate(headers: &HeaderMap) -> Self {
        let mut best: Option<(f32, Self)> = None;
        let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        for range in accepted.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let format = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                "application/vnd.microsoft.com.ucwa+xml" | "application/vnd.microsoft.ucwa+xml" => {
                    Self::UCWA_XML
                }
                "application/xml" | "text/xml" => Self::XML,
                "application/vnd.microsoft.com.ucwa+json" | "application/vnd.microsoft.ucwa+json" => {
                    Self::UCWA_JSON
                }
                "application/json" | "text/json" | "application/*" | "*/*" => Self::JSON,
                _ => continue,
            };
            let quality = parts
                .find_map(|parameter| parameter.strip_prefix("q="))
                .and_then(|text| text.trim().parse::<f32>().ok())
                .unwrap_or(1.0);
            if quality > 0.0 && best.is_none_or(|(known, _)| quality > known) {
                best = Some((quality, format));
            }
        }
        best.map_or(Self::JSON, |(_, format)| format)
    }
}

/// A link of a resource, or the target of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) rel: &'static str,
    pub(crate) href: String,
    pub(crate) title: Option<String>,
    /// Spelled as an array in JSON even when it stands alone.
    list: bool,
}

impl Link {
    pub(crate) fn new(rel: &'static str, href: impl Into<String>) -> Self {
        Self { rel, href: href.into(), title: None, list: false }
    }

    pub(crate) fn titled(rel: &'static str, href: impl Into<String>, title: impl Into<String>) -> Self {
        Self { rel, href: href.into(), title: Some(title.into()), list: false }
    }

    /// The same target in another role.
    pub(crate) fn in_role(self, rel: &'static str) -> Self {
        Self { rel, ..self }
    }

    fn xml_attributes(&self, out: &mut String) {
        let _ = write!(out, " rel=\"{}\" href=\"", self.rel);
        escape_xml(out, &self.href);
        out.push('"');
        if let Some(title) = &self.title {
            out.push_str(" title=\"");
            escape_xml(out, title);
            out.push('"');
        }
    }

    fn json_fields(&self, out: &mut String, with_rel: bool) {
        out.push('{');
        if with_rel {
            json_text(out, "rel");
            out.push(':');
            json_text(out, self.rel);
            out.push(',');
        }
        out.push_str("\"href\":");
        json_text(out, &self.href);
        if let Some(title) = &self.title {
            out.push_str(",\"title\":");
            json_text(out, title);
        }
        out.push('}');
    }
}

/// A property's value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Text(String),
    Boolean(bool),
    Time(Timestamp),
    List(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

impl From<Vec<String>> for Value {
    fn from(items: Vec<String>) -> Self {
        Self::List(items)
    }
}

/// A resource with its properties, links and embedded resources.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resource {
    /// The role it plays where it stands (`from`): XML's `rel`, JSON's key.
    role: &'static str,
    /// What it is (`participant`): JSON's `rel`. The discovery resources say none.
    kind: Option<&'static str>,
    href: String,
    links: Vec<Link>,
    properties: Vec<(Cow<'static, str>, Value)>,
    embedded: Vec<Resource>,
    etag: Option<String>,
    list: bool,
}

impl Resource {
    pub(crate) fn new(kind: &'static str, href: impl Into<String>) -> Self {
        Self {
            role: kind,
            kind: Some(kind),
            href: href.into(),
            links: Vec::new(),
            properties: Vec::new(),
            embedded: Vec::new(),
            etag: None,
            list: false,
        }
    }

    /// The discovery resources carry no `rel` in JSON.
    pub(crate) fn untyped(mut self) -> Self {
        self.kind = None;
        self
    }

    pub(crate) fn in_role(mut self, role: &'static str) -> Self {
        self.role = role;
        self
    }

    /// Spelled as an array in JSON even when it stands alone.
    pub(crate) fn in_list(mut self) -> Self {
        self.list = true;
        self
    }

    pub(crate) fn link(mut self, rel: &'static str, href: impl Into<String>) -> Self {
        self.links.push(Link::new(rel, href));
        self
    }

    pub(crate) fn links(mut self, links: impl IntoIterator<Item = Link>) -> Self {
        self.links.extend(links);
        self
    }

    /// Links of which there may be any number.
    pub(crate) fn list_links(mut self, links: impl IntoIterator<Item = Link>) -> Self {
        self.links.extend(links.into_iter().map(|link| Link { list: true, ..link }));
        self
    }

    pub(crate) fn property(mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Value>) -> Self {
        self.properties.push((name.into(), value.into()));
        self
    }

    pub(crate) fn embed(mut self, resource: Resource) -> Self {
        self.embedded.push(resource);
        self
    }

    pub(crate) fn etag(mut self, etag: impl Into<String>) -> Self {
        self.etag = Some(etag.into());
        self
    }

    /// The whole document.
    pub(crate) fn render(&self, format: Format) -> String {
        let mut out = String::with_capacity(1024);
        if format.xml {
            out.push_str(XML_DECLARATION);
            self.write_xml(&mut out, true);
        } else {
            self.write_json(&mut out);
        }
        out
    }

    fn write_xml(&self, out: &mut String, outermost: bool) {
        let _ = write!(out, "<resource rel=\"{}\" href=\"", self.role);
        escape_xml(out, &self.href);
        out.push('"');
        if outermost {
            let _ = write!(out, " xmlns=\"{NAMESPACE}\"");
        }
        out.push('>');
        for link in &self.links {
            out.push_str("<link");
            link.xml_attributes(out);
            out.push_str("/>");
        }
        for (name, value) in &self.properties {
            write_xml_property(out, name, value);
        }
        if let Some(etag) = &self.etag {
            write_xml_property(out, "etag", &Value::Text(etag.clone()));
        }
        for resource in &self.embedded {
            resource.write_xml(out, false);
        }
        out.push_str("</resource>");
    }

    fn write_json(&self, out: &mut String) {
        out.push('{');
        for (name, value) in &self.properties {
            json_text(out, name);
            out.push(':');
            write_json_value(out, value);
            out.push(',');
        }
        out.push_str("\"_links\":{\"self\":{\"href\":");
        json_text(out, &self.href);
        out.push('}');
        for (index, link) in self.links.iter().enumerate() {
            if self.links[..index].iter().any(|earlier| earlier.rel == link.rel) {
                continue;
            }
            let same: Vec<&Link> = self.links[index..].iter().filter(|other| other.rel == link.rel).collect();
            out.push(',');
            json_text(out, link.rel);
            out.push(':');
            write_json_group(out, link.list || same.len() > 1, &same, |out, link| {
                link.json_fields(out, false);
            });
        }
        out.push('}');
        if !self.embedded.is_empty() {
            out.push_str(",\"_embedded\":{");
            for (index, resource) in self.embedded.iter().enumerate() {
                if self.embedded[..index].iter().any(|earlier| earlier.role == resource.role) {
                    continue;
                }
                let same: Vec<&Self> =
                    self.embedded[index..].iter().filter(|other| other.role == resource.role).collect();
                if index > 0 {
                    out.push(',');
                }
                json_text(out, resource.role);
                out.push(':');
                write_json_group(out, resource.list || same.len() > 1, &same, |out, each| {
                    each.write_json(out);
                });
            }
            out.push('}');
        }
        if let Some(kind) = self.kind {
            let _ = write!(out, ",\"rel\":\"{kind}\"");
        }
        if let Some(etag) = &self.etag {
            out.push_str(",\"etag\":");
            json_text(out, etag);
        }
        out.push('}');
    }
}

fn write_json_group<T>(out: &mut String, array: bool, items: &[&T], write: impl Fn(&mut String, &T)) {
    if array {
        out.push('[');
    }
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        write(out, item);
    }
    if array {
        out.push(']');
    }
}

/// The answer to a pending GET: events in order, or none, and the link to go on with.
pub(crate) struct EventPackage<'a> {
    pub(crate) href: String,
    /// `next`, `resume` or `resync`.
    pub(crate) onward: Link,
    pub(crate) events: &'a [Event],
    /// Whether elements come along that no reference lists.
    pub(crate) strange: bool,
}

impl EventPackage<'_> {
    pub(crate) fn render(&self, format: Format) -> String {
        if format.xml { self.xml() } else { self.json() }
    }

    /// Events that follow each other and have the same sender share one `sender` element; the order stays.
    fn groups(&self) -> impl Iterator<Item = &[Event]> {
        self.events.chunk_by(|left, right| left.sender == right.sender)
    }

    fn xml(&self) -> String {
        let mut out = String::from(XML_DECLARATION);
        out.push_str("<events href=\"");
        escape_xml(&mut out, &self.href);
        let _ = write!(out, "\" xmlns=\"{NAMESPACE}\"><link");
        self.onward.xml_attributes(&mut out);
        out.push_str("/>");
        if self.strange {
            out.push_str("<forecast region=\"north\"><outlook rel=\"next\" href=\"/forecast\">fair</outlook></forecast>");
        }
        for group in self.groups() {
            let _ = write!(out, "<sender rel=\"{}\" href=\"", group[0].sender.rel);
            escape_xml(&mut out, &group[0].sender.href);
            out.push_str("\">");
            for event in group {
                let kind = event.kind.name();
                let _ = write!(out, "<{kind}");
                event.target.xml_attributes(&mut out);
                if let Some(status) = event.status {
                    let _ = write!(out, " status=\"{}\"", status.name());
                }
                out.push('>');
                if let Some(place) = &event.within {
                    out.push_str("<in");
                    place.xml_attributes(&mut out);
                    out.push_str("/>");
                }
                if let Some(resource) = &event.resource {
                    resource.write_xml(&mut out, false);
                }
                if let Some(reason) = &event.reason {
                    out.push_str("<reason>");
                    reason.write_xml_fields(&mut out);
                    out.push_str("</reason>");
                }
                let _ = write!(out, "</{kind}>");
            }
            out.push_str("</sender>");
        }
        out.push_str("</events>");
        out
    }

    fn json(&self) -> String {
        let mut out = String::from("{\"_links\":{\"self\":{\"href\":");
        json_text(&mut out, &self.href);
        let _ = write!(out, "}},\"{}\":", self.onward.rel);
        self.onward.json_fields(&mut out, false);
        out.push('}');
        if self.strange {
            out.push_str(",\"forecast\":{\"region\":\"north\",\"outlook\":[\"fair\"]}");
        }
        if !self.events.is_empty() {
            out.push_str(",\"sender\":[");
            for (index, group) in self.groups().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                let _ = write!(out, "{{\"rel\":\"{}\",\"href\":", group[0].sender.rel);
                json_text(&mut out, &group[0].sender.href);
                out.push_str(",\"events\":[");
                for (position, event) in group.iter().enumerate() {
                    if position > 0 {
                        out.push(',');
                    }
                    json_event(&mut out, event);
                }
                out.push_str("]}");
            }
            out.push(']');
        }
        out.push('}');
        out
    }
}

fn json_event(out: &mut String, event: &Event) {
    out.push_str("{\"link\":");
    event.target.json_fields(out, true);
    if let Some(place) = &event.within {
        out.push_str(",\"in\":");
        place.json_fields(out, true);
    }
    if let Some(status) = event.status {
        let _ = write!(out, ",\"status\":\"{}\"", status.name());
    }
    if let Some(reason) = &event.reason {
        let _ = write!(
            out,
            ",\"reason\":{{\"code\":\"{}\",\"subcode\":\"{}\",\"message\":",
            reason.code, reason.subcode
        );
        json_text(out, reason.message);
        out.push('}');
    }
    if let Some(resource) = &event.resource {
        out.push_str(",\"_embedded\":{");
        json_text(out, resource.role);
        out.push(':');
        resource.write_json(out);
        out.push('}');
    }
    let _ = write!(out, ",\"type\":\"{}\"}}", event.kind.name());
}

/// Why an operation ended as it did: part of a `completed` or `updated` event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) code: &'static str,
    pub(crate) subcode: &'static str,
    pub(crate) message: &'static str,
}

impl Reason {
    fn write_xml_fields(&self, out: &mut String) {
        let _ = write!(out, "<code>{}</code><subcode>{}</subcode><message>", self.code, self.subcode);
        escape_xml(out, self.message);
        out.push_str("</message>");
    }
}

/// A refusal: status and the `<reason>` that explains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    code: &'static str,
    pub(crate) subcode: Cow<'static, str>,
    message: String,
    parameters: Vec<(&'static str, &'static str)>,
    /// The verbs that the resource knows, for a 405.
    pub(crate) allow: Option<&'static str>,
}

impl Failure {
    pub(crate) fn new(
        status: StatusCode,
        subcode: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        let code = match status {
            StatusCode::BAD_REQUEST => "BadRequest",
            StatusCode::FORBIDDEN => "Forbidden",
            StatusCode::NOT_FOUND => "NotFound",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowed",
            StatusCode::CONFLICT => "Conflict",
            StatusCode::GONE => "Gone",
            StatusCode::PRECONDITION_FAILED => "PreconditionFailed",
            StatusCode::PAYLOAD_TOO_LARGE => "EntityTooLarge",
            StatusCode::UNSUPPORTED_MEDIA_TYPE => "UnsupportedMediaType",
            StatusCode::PRECONDITION_REQUIRED => "PreconditionRequired",
            StatusCode::TOO_MANY_REQUESTS => "TooManyRequests",
            _ => "ServiceFailure",
        };
        Self {
            status,
            code,
            subcode: subcode.into(),
            message: message.into(),
            parameters: Vec::new(),
            allow: None,
        }
    }

    pub(crate) fn parameter(name: &'static str, problem: &'static str) -> Self {
        Self {
            parameters: vec![(name, problem)],
            ..Self::new(StatusCode::BAD_REQUEST, "ParameterValidationFailure", "A parameter is not valid.")
        }
    }

    pub(crate) fn unreadable(message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DeserializationFailure", message)
    }

    pub(crate) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFound", "The requested resource could not be found.")
    }

    pub(crate) fn conversation_not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "ConversationNotFound", "The conversation has ended.")
    }

    pub(crate) fn application_not_found() -> Self {
        let message = "An application with this identifier does not exist.";
        Self::new(StatusCode::NOT_FOUND, "ApplicationNotFound", message)
    }

    pub(crate) fn conflict(subcode: &'static str, message: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, subcode, message)
    }

    pub(crate) fn method_not_allowed(allow: &'static str) -> Self {
        let refusal =
            Self::new(StatusCode::METHOD_NOT_ALLOWED, "None", "The resource does not know this verb.");
        Self { allow: Some(allow), ..refusal }
    }

    pub(crate) fn render(&self, format: Format) -> String {
        let mut out = String::new();
        if format.xml {
            let _ = write!(
                out,
                "{XML_DECLARATION}<reason xmlns=\"{NAMESPACE}\"><code>{}</code><subcode>",
                self.code
            );
            escape_xml(&mut out, &self.subcode);
            out.push_str("</subcode><message>");
            escape_xml(&mut out, &self.message);
            out.push_str("</message><debugInfo/>");
            if self.parameters.is_empty() {
                out.push_str("<parameters/>");
            } else {
                out.push_str("<parameters>");
                for (name, problem) in &self.parameters {
                    write_xml_property(&mut out, name, &Value::from(*problem));
                }
                out.push_str("</parameters>");
            }
            out.push_str("</reason>");
        } else {
            let _ = write!(out, "{{\"code\":\"{}\",\"subcode\":", self.code);
            json_text(&mut out, &self.subcode);
            out.push_str(",\"message\":");
            json_text(&mut out, &self.message);
            if !self.parameters.is_empty() {
                out.push_str(",\"parameters\":[");
                for (index, (name, problem)) in self.parameters.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    let _ = write!(out, "{{\"name\":\"{name}\",\"reason\":");
                    json_text(&mut out, problem);
                    out.push('}');
                }
                out.push(']');
            }
            out.push('}');
        }
        out
    }
}

fn write_xml_property(out: &mut String, name: &str, value: &Value) {
    let text = match value {
        Value::Text(text) => Cow::Borrowed(text.as_str()),
        Value::Boolean(value) => Cow::Borrowed(if *value { "true" } else { "false" }),
        Value::Time(time) => Cow::Owned(format!("{time:.7}")),
        Value::List(items) => {
            out.push_str("<propertyList name=\"");
            escape_xml(out, name);
            out.push_str("\">");
            for item in items {
                out.push_str("<item>");
                escape_xml(out, item);
                out.push_str("</item>");
            }
            out.push_str("</propertyList>");
            return;
        }
    };
    out.push_str("<property name=\"");
    escape_xml(out, name);
    out.push_str("\">");
    escape_xml(out, &text);
    out.push_str("</property>");
}

fn write_json_value(out: &mut String, value: &Value) {
    match value {
        Value::Text(text) => json_text(out, text),
        Value::Boolean(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Time(time) => {
            let _ = write!(out, "\"\\/Date({})\\/\"", time.as_millisecond());
        }
        Value::List(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                json_text(out, item);
            }
            out.push(']');
        }
    }
}

fn json_text(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

/// Escapes for element content and attributes alike; what XML 1.0 cannot hold becomes U+FFFD.
fn escape_xml(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' | '\r' => {
                let _ = write!(out, "&#{};", character as u32);
            }
            // XML knows no such characters, and servers write references to them all the same.
            '\0'..='\u{1f}' => {
                let _ = write!(out, "&#x{:X};", character as u32);
            }
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
}

/// What a request body says: properties and links by lower-cased name, because clients vary in case.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Input {
    properties: HashMap<String, Vec<String>>,
    links: HashMap<String, String>,
}

impl Input {
    /// Reads XML or JSON as `Content-Type` says, or as the first character shows where it says nothing.
    pub(crate) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, Failure> {
        let text = std::str::from_utf8(body).map_err(|_| Failure::unreadable("The body is not UTF-8."))?;
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = declared.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        let media_type = media_type.to_ascii_lowercase();
        if media_type.ends_with("json") {
            Self::read_json(text)
        } else if media_type.ends_with("xml") {
            Self::read_xml(text)
        } else if media_type.is_empty() {
            if text.starts_with('<') { Self::read_xml(text) } else { Self::read_json(text) }
        } else {
            let message = "The body must be XML or JSON.";
            Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "None", message))
        }
    }

    fn read_json(text: &str) -> Result<Self, Failure> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|_| Failure::unreadable("The body is not JSON."))?;
        let Some(object) = value.as_object() else {
            return Err(Failure::unreadable("The body is not a JSON object."));
        };
        let mut input = Self::default();
        for (name, value) in object {
            if name == "_links" {
                for (rel, link) in value.as_object().into_iter().flatten() {
                    if let Some(href) = link.get("href").and_then(serde_json::Value::as_str) {
                        input.links.insert(rel.to_lowercase(), href.to_owned());
                    }
                }
                continue;
            }
            let items = match value {
                serde_json::Value::Null | serde_json::Value::Object(_) => continue,
                serde_json::Value::Array(items) => items.iter().filter_map(scalar).collect(),
                other => scalar(other).into_iter().collect(),
            };
            input.properties.insert(name.to_lowercase(), items);
        }
        Ok(input)
    }

    fn read_xml(text: &str) -> Result<Self, Failure> {
        let unreadable = || Failure::unreadable("The body is not an XML input.");
        let mut reader = NsReader::from_str(text);
        let mut input = Self::default();
        let mut depth = 0_usize;
        let mut name = String::new();
        let mut value = String::new();
        let mut root_seen = false;
        loop {
            match reader.read_event().map_err(|_| unreadable())? {
                XmlEvent::DocType(_) => return Err(Failure::unreadable("A DOCTYPE is not allowed.")),
                XmlEvent::Eof if depth == 0 && root_seen => return Ok(input),
                XmlEvent::Eof => return Err(unreadable()),
                tag @ (XmlEvent::Start(_) | XmlEvent::Empty(_)) => {
                    let (element, empty) = match &tag {
                        XmlEvent::Start(element) => (element, false),
                        XmlEvent::Empty(element) => (element, true),
                        _ => return Err(unreadable()),
                    };
                    root_seen = true;
                    let mut attributes = HashMap::new();
                    for attribute in element.attributes() {
                        let attribute = attribute.map_err(|_| unreadable())?;
                        let text =
                            attribute.normalized_value(XmlVersion::Explicit1_0).map_err(|_| unreadable())?;
                        attributes.insert(attribute.key.local_name().as_ref().to_owned(), text.into_owned());
                    }
                    match element.local_name().as_ref() {
                        "link" => {
                            if let (Some(rel), Some(href)) = (attributes.get("rel"), attributes.get("href")) {
                                input.links.insert(rel.to_lowercase(), href.clone());
                            }
                        }
                        "property" | "propertyList" => {
                            name = attributes.get("name").map(|name| name.to_lowercase()).unwrap_or_default();
                            let known = input.properties.entry(name.clone()).or_default();
                            if empty && element.local_name().as_ref() == "property" {
                                known.push(String::new());
                            }
                        }
                        _ => {}
                    }
                    value.clear();
                    depth += usize::from(!empty);
                    if depth > 32 {
                        return Err(unreadable());
                    }
                }
                XmlEvent::End(element) => {
                    if matches!(element.local_name().as_ref(), "property" | "item") {
                        input.properties.entry(name.clone()).or_default().push(std::mem::take(&mut value));
                    }
                    depth = depth.saturating_sub(1);
                }
                XmlEvent::Text(text) => value.push_str(&text.xml10_content()),
                XmlEvent::CData(data) => value.push_str(&data.xml10_content()),
                XmlEvent::GeneralRef(reference) => {
                    if let Some(character) = reference.resolve_char_ref().map_err(|_| unreadable())? {
                        value.push(character);
                    } else {
                        let resolved = quick_xml::escape::resolve_xml_entity(&reference.xml10_content());
                        value.push_str(resolved.ok_or_else(unreadable)?);
                    }
                }
                _ => {}
            }
        }
    }

    /// The property's text, if it was given and is not empty.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        let values = self.properties.get(&name.to_lowercase())?;
        values.first().map(String::as_str).filter(|text| !text.is_empty())
    }

    /// The property list's items, if it was given at all.
    pub(crate) fn list(&self, name: &str) -> Option<&[String]> {
        self.properties.get(&name.to_lowercase()).map(Vec::as_slice)
    }

    /// Whether the property was given, even empty.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.properties.contains_key(&name.to_lowercase())
    }

    /// A link's href, or the property of the same name, which some clients send in its place.
    pub(crate) fn link_or_text(&self, name: &str) -> Option<&str> {
        self.links.get(&name.to_lowercase()).map(String::as_str).or_else(|| self.text(name))
    }

    /// A required text of at most `limit` UTF-16 units.
    pub(crate) fn required(&self, name: &'static str, limit: usize) -> Result<&str, Failure> {
        self.optional(name, limit)?.ok_or_else(|| Failure::parameter(name, "The value is required."))
    }

    /// An optional text of at most `limit` UTF-16 units.
    pub(crate) fn optional(&self, name: &'static str, limit: usize) -> Result<Option<&str>, Failure> {
        match self.text(name) {
            Some(text) if text.encode_utf16().count() > limit => {
                Err(Failure::parameter(name, "The value is too long."))
            }
            text => Ok(text),
        }
    }
}

fn scalar(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Bool(value) => Some(value.to_string()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// How the text of a data URI is written; servers were seen with all of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataUriStyle {
    /// `%xx` in lower case with `+` for a space, as captured from servers.
    PlusForSpace,
    /// `%XX` with `%20` for a space.
    Percent,
    /// Base64.
    Base64,
}

/// Writes `text` as a data URI of `media_type` in UTF-8.
pub(crate) fn encode_data_uri(media_type: &str, text: &str, style: DataUriStyle) -> String {
    let mut uri = format!("data:{media_type};charset=utf-8");
    if style == DataUriStyle::Base64 {
        uri.push_str(";base64,");
        uri.push_str(&BASE64.encode(text));
        return uri;
    }
    uri.push(',');
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' => uri.push(char::from(byte)),
            b'!' | b'*' | b'(' | b')' if style == DataUriStyle::PlusForSpace => uri.push(char::from(byte)),
            b' ' if style == DataUriStyle::PlusForSpace => uri.push('+'),
            other if style == DataUriStyle::PlusForSpace => {
                let _ = write!(uri, "%{other:02x}");
            }
            other => {
                let _ = write!(uri, "%{other:02X}");
            }
        }
    }
    uri
}

/// Reads a data URI into media type and text. Text pasted in without encoding is taken as it stands.
pub(crate) fn decode_data_uri(uri: &str) -> Option<(String, String)> {
    let rest = uri.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")).map(|_| &uri[5..])?;
    let (head, payload) = rest.split_once(',')?;
    let mut parts = head.split(';').map(str::trim);
    let media_type = match parts.next().unwrap_or_default() {
        "" => "text/plain".to_owned(),
        media_type => media_type.to_ascii_lowercase(),
    };
    let mut base64 = false;
    let mut charset = None;
    for part in parts {
        if part.eq_ignore_ascii_case("base64") {
            base64 = true;
        } else if let Some((name, label)) = part.split_once('=')
            && name.eq_ignore_ascii_case("charset")
        {
            charset = Some(label.trim_matches('"').to_owned());
        }
    }
    let bytes = if base64 {
        let mut encoded: Vec<u8> =
            percent_decode(payload.as_bytes()).filter(|byte| !byte.is_ascii_whitespace()).collect();
        while !encoded.len().is_multiple_of(4) {
            encoded.push(b'=');
        }
        BASE64.decode(encoded).ok()?
    } else {
        percent_decode(payload.replace('+', " ").as_bytes()).collect()
    };
    let encoding = charset.and_then(|label| encoding_rs::Encoding::for_label(label.as_bytes()));
    let (text, _, _) = encoding.unwrap_or(encoding_rs::UTF_8).decode(&bytes);
    Some((media_type, text.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resource_reads_the_same_in_both_spellings() {
        let time: Timestamp = "2014-06-02T21:00:13.1350704Z".parse().unwrap();
        let resource = Resource::new("message", "/m/2")
            .property("direction", "Incoming")
            .property("timeStamp", Value::Time(time))
            .property("formats", vec!["Plain".to_owned()])
            .link("messaging", "/m?a=1&b=2")
            .list_links([Link::titled("participant", "/p", "A \"quoted\" <name>")])
            .embed(Resource::new("participant", "/p").in_role("from").property("anonymous", false));
        assert_eq!(
            resource.render(Format::JSON),
            concat!(
                r#"{"direction":"Incoming","timeStamp":"\/Date(1401742813135)\/","formats":["Plain"],"#,
                r#""_links":{"self":{"href":"/m/2"},"messaging":{"href":"/m?a=1&b=2"},"#,
                r#""participant":[{"href":"/p","title":"A \"quoted\" <name>"}]},"#,
                r#""_embedded":{"from":{"anonymous":false,"_links":{"self":{"href":"/p"}},"rel":"participant"}},"#,
                r#""rel":"message"}"#
            )
        );
        assert_eq!(
            resource.render(Format::XML),
            concat!(
                r#"<?xml version="1.0" encoding="utf-8"?>"#,
                r#"<resource rel="message" href="/m/2" xmlns="http://schemas.microsoft.com/rtc/2012/03/ucwa">"#,
                r#"<link rel="messaging" href="/m?a=1&amp;b=2"/>"#,
                r#"<link rel="participant" href="/p" title="A &quot;quoted&quot; &lt;name&gt;"/>"#,
                r#"<property name="direction">Incoming</property>"#,
                r#"<property name="timeStamp">2014-06-02T21:00:13.1350704Z</property>"#,
                r#"<propertyList name="formats"><item>Plain</item></propertyList>"#,
                r#"<resource rel="from" href="/p"><property name="anonymous">false</property></resource>"#,
                r"</resource>"
            )
        );
    }

    #[test]
    fn input_is_read_alike_from_xml_and_json_in_any_case() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, "application/vnd.microsoft.com.ucwa+xml".parse().unwrap());
        let xml = r#"<?xml version="1.0"?><input xmlns="http://schemas.microsoft.com/rtc/2012/03/ucwa">
            <property name="Culture">a &amp; b&#33;</property><property name="subject"/>
            <propertyList name="supportedModalities"><item>Messaging</item></propertyList>
            <link rel="message" href="data:text/plain,Hi+you"/></input>"#;
        let from_xml = Input::read(&headers, xml.as_bytes()).unwrap();
        headers.insert(header::CONTENT_TYPE, "application/json; charset=utf-8".parse().unwrap());
        let json = r#"{"culture":"a & b!","subject":"","SupportedModalities":["Messaging"],"telemetryId":null,
            "_links":{"message":{"href":"data:text/plain,Hi+you"}}}"#;
        let from_json = Input::read(&headers, json.as_bytes()).unwrap();
        assert_eq!(from_xml, from_json);
        assert_eq!(from_xml.text("culture"), Some("a & b!"));
        assert_eq!(from_xml.list("supportedmodalities"), Some(&["Messaging".to_owned()][..]));
        assert_eq!(from_xml.link_or_text("message"), Some("data:text/plain,Hi+you"));
    }

    #[test]
    fn a_doctype_is_refused() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, "application/xml".parse().unwrap());
        let refused = Input::read(&headers, b"<!DOCTYPE input [<!ENTITY a \"b\">]><input/>").unwrap_err();
        assert_eq!(refused.subcode, "DeserializationFailure");
    }

    #[test]
    fn data_uris_survive_every_style() {
        let text = "100% + a&b, \u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{1f600}\r\n";
        for style in [DataUriStyle::PlusForSpace, DataUriStyle::Percent, DataUriStyle::Base64] {
            let uri = encode_data_uri("text/html", text, style);
            assert_eq!(decode_data_uri(&uri), Some(("text/html".to_owned(), text.to_owned())), "{uri}");
        }
        assert_eq!(
            encode_data_uri("text/plain", "Hi Tosh\r\n", DataUriStyle::PlusForSpace),
            "data:text/plain;charset=utf-8,Hi+Tosh%0d%0a"
        );
        assert_eq!(decode_data_uri("DATA:,a,b"), Some(("text/plain".to_owned(), "a,b".to_owned())));
        assert_eq!(decode_data_uri("data:text/plain;charset=iso-8859-1,caf%e9").unwrap().1, "café");
        assert_eq!(decode_data_uri("http://example"), None);
    }

    #[test]
    fn accept_decides_the_format() {
        let negotiated = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            Format::negotiate(&headers)
        };
        assert_eq!(
            negotiated("application/vnd.microsoft.com.ucwa+xml, application/xml;q=0.9"),
            Format::UCWA_XML
        );
        assert_eq!(negotiated("application/xml"), Format::XML);
        assert_eq!(negotiated("application/xml;q=0.5, application/json"), Format::JSON);
        assert_eq!(negotiated("*/*"), Format::JSON);
        assert_eq!(negotiated("image/png"), Format::JSON);
        assert_eq!(Format::negotiate(&HeaderMap::new()), Format::JSON);
    }
}
