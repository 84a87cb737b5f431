//! A small UCWA client of either spelling, for the tests alone: it reads what it is told and keeps nothing.

use std::{
    collections::HashMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use quick_xml::{
    Reader, XmlVersion,
    escape::{escape, resolve_xml_entity},
    events::{BytesStart, Event as XmlEvent},
};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, header};
use serde_json::{Value, json};
use ucwa_relay::simulator::Simulator;

/// How long anything may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
pub(crate) const UCWA_XML: &str = "application/vnd.microsoft.com.ucwa+xml";

/// An XML element.
#[derive(Debug, Clone, Default)]
pub(crate) struct Node {
    pub(crate) name: String,
    attributes: HashMap<String, String>,
    text: String,
    children: Vec<Node>,
}

impl Node {
    pub(crate) fn parse(xml: &str) -> Self {
        let mut reader = Reader::from_str(xml);
        let mut stack = vec![Self::default()];
        loop {
            match reader.read_event().unwrap() {
                XmlEvent::Eof => return stack.pop().unwrap().children.pop().unwrap(),
                XmlEvent::Start(start) => stack.push(Self::open(&start)),
                XmlEvent::Empty(start) => stack.last_mut().unwrap().children.push(Self::open(&start)),
                XmlEvent::End(_) => {
                    let node = stack.pop().unwrap();
                    stack.last_mut().unwrap().children.push(node);
                }
                XmlEvent::Text(text) => stack.last_mut().unwrap().text.push_str(&text.xml10_content()),
                XmlEvent::GeneralRef(entity) => {
                    let text = &mut stack.last_mut().unwrap().text;
                    match entity.resolve_char_ref().unwrap() {
                        Some(character) => text.push(character),
                        None => text.push_str(resolve_xml_entity(&entity.xml10_content()).unwrap()),
                    }
                }
                _ => {}
            }
        }
    }

    fn open(start: &BytesStart<'_>) -> Self {
        let attributes = start.attributes().map(|attribute| {
            let attribute = attribute.unwrap();
            let value = attribute.normalized_value(XmlVersion::Explicit1_0).unwrap().into_owned();
            (attribute.key.as_ref().to_owned(), value)
        });
        Self { name: start.name().as_ref().to_owned(), attributes: attributes.collect(), ..Self::default() }
    }

    fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    pub(crate) fn resource(&self) -> Found {
        let mut found =
            Found { href: self.attributes.get("href").cloned().unwrap_or_default(), ..Found::default() };
        for child in &self.children {
            let attribute = |name: &str| child.attributes.get(name).cloned().unwrap_or_default();
            match child.name.as_str() {
                "link" => found.links.entry(attribute("rel")).or_default().push(attribute("href")),
                "property" => {
                    found.properties.insert(attribute("name"), child.text.clone());
                }
                "propertyList" => {
                    let items: Vec<&str> = child.children.iter().map(|item| item.text.as_str()).collect();
                    found.properties.insert(attribute("name"), items.join(","));
                }
                "resource" => {
                    found.embedded.insert(attribute("rel"), child.resource());
                }
                _ => {}
            }
        }
        found
    }
}

/// A resource of either spelling. Of several embedded resources of one name only one is kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    pub(crate) href: String,
    pub(crate) links: HashMap<String, Vec<String>>,
    pub(crate) properties: HashMap<String, String>,
    pub(crate) embedded: HashMap<String, Found>,
}

impl Found {
    fn from_json(value: &Value) -> Self {
        let mut found = Self::default();
        for (name, value) in value.as_object().unwrap() {
            match (name.as_str(), value) {
                ("_links", Value::Object(links)) => {
                    for (rel, link) in links {
                        let all = link.as_array().cloned().unwrap_or_else(|| vec![link.clone()]);
                        let hrefs = all.iter().map(|link| link["href"].as_str().unwrap().to_owned());
                        found.links.insert(rel.clone(), hrefs.collect());
                    }
                }
                ("_embedded", Value::Object(embedded)) => {
                    for (rel, resource) in embedded {
                        let first = resource.as_array().map_or(resource, |all| &all[0]);
                        found.embedded.insert(rel.clone(), Self::from_json(first));
                    }
                }
                (_, Value::Array(items)) => {
                    let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                    found.properties.insert(name.clone(), items.join(","));
                }
                (_, Value::String(text)) => {
                    found.properties.insert(name.clone(), text.clone());
                }
                (_, other) => {
                    found.properties.insert(name.clone(), other.to_string());
                }
            }
        }
        if let Some(own) = found.links.remove("self") {
            found.href.clone_from(&own[0]);
        }
        found
    }

    pub(crate) fn link(&self, rel: &str) -> &str {
        self.links.get(rel).unwrap_or_else(|| panic!("no link {rel} in {self:?}"))[0].as_str()
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        self.properties.get(name).map_or("", String::as_str)
    }
}

/// An event of either spelling.
#[derive(Debug, Clone)]
pub(crate) struct Happened {
    pub(crate) sender: String,
    pub(crate) kind: String,
    pub(crate) rel: String,
    pub(crate) href: String,
    pub(crate) within: Option<String>,
    pub(crate) status: String,
    pub(crate) subcode: String,
    pub(crate) resource: Option<Found>,
}

/// The answer to a GET on `events`.
#[derive(Debug, Clone)]
pub(crate) struct Package {
    pub(crate) raw: String,
    /// `next`, `resync` or `resume`, and its href.
    pub(crate) onward: (String, String),
    pub(crate) events: Vec<Happened>,
}

impl Package {
    pub(crate) fn parse(raw: String, xml: bool) -> Self {
        let (onward, events) = if xml { Self::xml(&raw) } else { Self::json(&raw) };
        Self { raw, onward, events }
    }

    fn xml(raw: &str) -> ((String, String), Vec<Happened>) {
        let root = Node::parse(raw);
        assert_eq!(root.name, "events");
        let link = root.child("link").unwrap();
        let mut events = Vec::new();
        for sender in root.children.iter().filter(|child| child.name == "sender") {
            for event in &sender.children {
                let subcode = event.child("reason").and_then(|reason| reason.child("subcode"));
                events.push(Happened {
                    sender: sender.attributes["rel"].clone(),
                    kind: event.name.clone(),
                    rel: event.attributes["rel"].clone(),
                    href: event.attributes["href"].clone(),
                    within: event.child("in").map(|place| place.attributes["rel"].clone()),
                    status: event.attributes.get("status").cloned().unwrap_or_default(),
                    subcode: subcode.map(|subcode| subcode.text.clone()).unwrap_or_default(),
                    resource: event.child("resource").map(Node::resource),
                });
            }
        }
        ((link.attributes["rel"].clone(), link.attributes["href"].clone()), events)
    }

    fn json(raw: &str) -> ((String, String), Vec<Happened>) {
        let root: Value = serde_json::from_str(raw).unwrap();
        let (rel, link) = root["_links"].as_object().unwrap().iter().find(|(rel, _)| *rel != "self").unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut events = Vec::new();
        for sender in root["sender"].as_array().into_iter().flatten() {
            for event in sender["events"].as_array().unwrap() {
                let embedded = event["_embedded"].as_object().and_then(|all| all.values().next());
                events.push(Happened {
                    sender: text(&sender["rel"]),
                    kind: text(&event["type"]),
                    rel: text(&event["link"]["rel"]),
                    href: text(&event["link"]["href"]),
                    within: event["in"]["rel"].as_str().map(str::to_owned),
                    status: text(&event["status"]),
                    subcode: text(&event["reason"]["subcode"]),
                    resource: embedded.map(Found::from_json),
                });
            }
        }
        ((rel.clone(), text(&link["href"])), events)
    }
}

/// One signed-in client.
pub(crate) struct User {
    http: Client,
    origin: String,
    token: String,
    xml: bool,
    pub(crate) application: Found,
    pub(crate) cursor: String,
    /// Everything that its channel has brought and that was not waited for.
    pub(crate) seen: Vec<Happened>,
}

pub(crate) fn http() -> Client {
    // Built without a default provider for TLS, which the client wants even for plain http.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().timeout(LIMIT).build().unwrap()
}

pub(crate) async fn token(http: &Client, simulator: &Simulator, username: &str, password: &str) -> Response {
    let url = format!("http://{}/WebTicket/oauthtoken", simulator.address());
    let form = [("grant_type", "password"), ("username", username), ("password", password)];
    http.post(url).form(&form).send().await.unwrap()
}

impl User {
    /// Signs in and makes itself available for plain text and HTML.
    pub(crate) async fn sign_in(simulator: &Simulator, name: &str, xml: bool) -> Self {
        let mut user = Self::sign_in_quietly(simulator, name, xml).await;
        let answer = user.make_me_available().await;
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        user.read_application().await;
        user
    }

    /// Signs in without making itself available.
    pub(crate) async fn sign_in_quietly(simulator: &Simulator, name: &str, xml: bool) -> Self {
        let http = http();
        let answer = token(&http, simulator, name, "simulated").await;
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        let mut user = Self {
            http,
            origin: format!("http://{}", simulator.address()),
            token: body["access_token"].as_str().unwrap().to_owned(),
            xml,
            application: Found::default(),
            cursor: String::new(),
            seen: Vec::new(),
        };
        let answer = user.create_application("endpoint-1").await;
        user.application = user.found(answer).await;
        user.application.link("events").clone_into(&mut user.cursor);
        user
    }

    pub(crate) async fn create_application(&self, endpoint: &str) -> Response {
        let properties = [("culture", "en-US"), ("endpointId", endpoint), ("userAgent", "test/1")];
        self.post("/ucwa/oauth/v1/applications", &properties, &[]).await
    }

    pub(crate) async fn make_me_available(&self) -> Response {
        let lists: [(&str, &[&str]); 2] =
            [("supportedModalities", &["Messaging"]), ("supportedMessageFormats", &["Plain", "Html"])];
        let me = &self.application.embedded["me"];
        let href = format!("{}/makeMeAvailable", me.href);
        self.post(&href, &[("signInAs", "Online")], &lists).await
    }

    pub(crate) async fn read_application(&mut self) {
        self.application = self.read(&self.application.href).await;
    }

    pub(crate) fn request(&self, method: Method, href: &str) -> RequestBuilder {
        let url = if href.starts_with('/') { format!("{}{href}", self.origin) } else { href.to_owned() };
        let accept = if self.xml {
            "application/vnd.microsoft.com.ucwa+xml, application/xml;q=0.9"
        } else {
            "application/json"
        };
        self.http.request(method, url).bearer_auth(&self.token).header(header::ACCEPT, accept)
    }

    pub(crate) async fn get(&self, href: &str) -> Response {
        self.request(Method::GET, href).send().await.unwrap()
    }

    /// POSTs an input in the user's spelling.
    pub(crate) async fn post(
        &self,
        href: &str,
        properties: &[(&str, &str)],
        lists: &[(&str, &[&str])],
    ) -> Response {
        let (content_type, body) = if self.xml {
            let mut body = String::from("<input xmlns=\"http://schemas.microsoft.com/rtc/2012/03/ucwa\">");
            for (name, value) in properties {
                let value = escape(*value);
                if *name == "message" {
                    write!(body, "<link rel=\"message\" href=\"{value}\"/>").unwrap();
                } else {
                    write!(body, "<property name=\"{name}\">{value}</property>").unwrap();
                }
            }
            for (name, items) in lists {
                write!(body, "<propertyList name=\"{name}\">").unwrap();
                for item in *items {
                    write!(body, "<item>{item}</item>").unwrap();
                }
                body.push_str("</propertyList>");
            }
            (UCWA_XML, body + "</input>")
        } else {
            let mut body = serde_json::Map::new();
            for (name, value) in properties {
                if *name == "message" {
                    body.insert("_links".into(), json!({ "message": { "href": value } }));
                } else {
                    body.insert((*name).into(), json!(value));
                }
            }
            for (name, items) in lists {
                body.insert((*name).into(), json!(items));
            }
            ("application/json", Value::Object(body).to_string())
        };
        let request = self.request(Method::POST, href).header(header::CONTENT_TYPE, content_type);
        request.body(body).send().await.unwrap()
    }

    pub(crate) async fn post_empty(&self, href: &str) -> StatusCode {
        self.request(Method::POST, href).send().await.unwrap().status()
    }

    pub(crate) async fn found(&self, answer: Response) -> Found {
        assert!(answer.status().is_success(), "{} for {}", answer.status(), answer.url());
        let text = answer.text().await.unwrap();
        if self.xml {
            Node::parse(&text).resource()
        } else {
            Found::from_json(&serde_json::from_str(&text).unwrap())
        }
    }

    pub(crate) async fn read(&self, href: &str) -> Found {
        self.found(self.get(href).await).await
    }

    /// The subcode of a refusal.
    pub(crate) async fn subcode(&self, answer: Response) -> String {
        let text = answer.text().await.unwrap();
        if self.xml {
            let reason = Node::parse(&text);
            assert_eq!(reason.name, "reason");
            reason.child("subcode").unwrap().text.clone()
        } else {
            serde_json::from_str::<Value>(&text).unwrap()["subcode"].as_str().unwrap().to_owned()
        }
    }

    /// Asks for a package without moving on.
    pub(crate) async fn peek(&self) -> Package {
        let answer = self.get(&self.cursor).await;
        assert_eq!(answer.status(), StatusCode::OK);
        Package::parse(answer.text().await.unwrap(), self.xml)
    }

    /// Asks for a package; the next call acknowledges it.
    pub(crate) async fn poll(&mut self) -> Package {
        let package = self.peek().await;
        assert_eq!(package.onward.0, "next", "{}", package.raw);
        self.cursor.clone_from(&package.onward.1);
        self.seen.extend(package.events.iter().cloned());
        package
    }

    /// Follows the channel until such an event comes, and takes it out of what was seen.
    pub(crate) async fn wait_for(&mut self, what: &str, wanted: impl Fn(&Happened) -> bool) -> Happened {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(index) = self.seen.iter().position(&wanted) {
                return self.seen.remove(index);
            }
            assert!(Instant::now() < deadline, "{what} did not come; there is {:#?}", self.seen);
            self.poll().await;
        }
    }

    pub(crate) async fn wait(&mut self, kind: &str, rel: &str) -> Happened {
        let what = format!("{kind} {rel}");
        self.wait_for(&what, |event| event.kind == kind && event.rel == rel && event.within.is_none()).await
    }

    /// The event's resource, fetched if it was only linked.
    pub(crate) async fn resource_of(&self, event: &Happened) -> Found {
        match &event.resource {
            Some(resource) => resource.clone(),
            None => self.read(&event.href).await,
        }
    }

    /// Starts a conversation and gives the invitation's address.
    pub(crate) async fn start(&self, to: &str, message: Option<&str>, operation: &str) -> String {
        let href = self.application.embedded["communication"].link("startMessaging").to_owned();
        let mut properties = vec![("operationId", operation), ("to", to), ("subject", "Task & <Sample>")];
        properties.extend(message.map(|message| ("message", message)));
        let answer = self.post(&href, &properties, &[]).await;
        assert_eq!(answer.status(), StatusCode::CREATED);
        answer.headers()[header::LOCATION].to_str().unwrap().to_owned()
    }

    /// Waits until the messaging of some conversation is connected.
    pub(crate) async fn wait_connected(&mut self) -> Found {
        loop {
            let event = self.wait("updated", "messaging").await;
            // One that was taken down meanwhile has no address any more.
            if event.resource.is_none() && !self.get(&event.href).await.status().is_success() {
                continue;
            }
            let messaging = self.resource_of(&event).await;
            if messaging.text("state") == "Connected" {
                return messaging;
            }
        }
    }

    pub(crate) async fn send(
        &self,
        messaging: &Found,
        text: &str,
        content_type: &str,
        operation: &str,
    ) -> Response {
        let href = format!("{}?operationId={operation}", messaging.link("sendMessage"));
        let request = self.request(Method::POST, &href).header(header::CONTENT_TYPE, content_type);
        request.body(text.to_owned()).send().await.unwrap()
    }
}
