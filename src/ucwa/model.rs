//! UCWA payloads as a typed model that keeps what it does not know.
//!
//! One shape for XML and JSON (`PayloadFormat` of the UCWA documentation): resources with properties, property lists,
//! links and embedded resources; event-channel responses with senders and events in document order.

use std::ops::Range;

/// `<link rel href title revision>`. Several with one `rel` are a list; one and a list of one look alike.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Role.
    pub rel: String,
    /// Address as the server gave it, relative or absolute; for message text a data URI.
    pub href: String,
    /// For people; may be empty.
    pub title: Option<String>,
    /// Version of the capability; absent means 1.
    pub revision: Option<String>,
}

/// `<resource rel href>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resource {
    /// Role in which it is embedded, or its type.
    pub rel: String,
    /// Its address, as the server gave it.
    pub href: String,
    /// `<property name>`, in document order, names as given.
    pub properties: Vec<(String, String)>,
    /// `<propertyList name>`, in document order.
    pub property_lists: Vec<(String, Vec<String>)>,
    /// `<link>`, in document order.
    pub links: Vec<Link>,
    /// Nested `<resource>`, in document order.
    pub embedded: Vec<Resource>,
}

impl Resource {
    /// What the resource is: its property `rel` where it has one (an embedded resource's `rel` is its role).
    pub fn resource_type(&self) -> &str {
        self.property("rel").filter(|rel| !rel.is_empty()).unwrap_or(&self.rel)
    }

    /// The first link of this role. Absent means not allowed, or not possible now.
    pub fn link(&self, rel: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.rel == rel)
    }

    /// All links of this role.
    pub fn links(&self, rel: &str) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(move |link| link.rel == rel)
    }

    /// A scalar property; names are compared without case.
    pub fn property(&self, name: &str) -> Option<&str> {
        self.properties
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// An array property; names are compared without case.
    pub fn property_list(&self, name: &str) -> Option<&[String]> {
        self.property_lists
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, values)| values.as_slice())
    }

    /// The first embedded resource of this role.
    pub fn embedded(&self, rel: &str) -> Option<&Resource> {
        self.embedded.iter().find(|resource| resource.rel == rel)
    }

    /// All embedded resources of this role.
    pub fn all_embedded(&self, rel: &str) -> impl Iterator<Item = &Resource> {
        self.embedded.iter().filter(move |resource| resource.rel == rel)
    }

    /// A boolean property; the server spells them `True` and `true`.
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.property(name)?.trim().to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        }
    }
}

/// The name of an event's element. Operations (invitations, messages) raise the first three, other resources
/// `added`, `updated` and `deleted`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// `started`.
    Started,
    /// `updated`.
    Updated,
    /// `completed`.
    Completed,
    /// `added`.
    Added,
    /// `deleted`.
    Deleted,
    /// A type that the documentation does not know.
    Unknown(String),
}

impl EventKind {
    /// From the element's name (XML) or the property `type` (JSON).
    pub fn from_name(name: &str) -> Self {
        match name {
            "started" => Self::Started,
            "updated" => Self::Updated,
            "completed" => Self::Completed,
            "added" => Self::Added,
            "deleted" => Self::Deleted,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// As the payload spells it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Started => "started",
            Self::Updated => "updated",
            Self::Completed => "completed",
            Self::Added => "added",
            Self::Deleted => "deleted",
            Self::Unknown(name) => name,
        }
    }
}

/// What a link-like element points at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// Role or type.
    pub rel: String,
    /// Address.
    pub href: String,
    /// For people; may be empty.
    pub title: Option<String>,
}

/// `<reason>`: the body of an error, and why an operation failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reason {
    /// `ErrorCode`, or a contextual word like `RemoteFailure`.
    pub code: Option<String>,
    /// `ErrorSubcode`.
    pub subcode: Option<String>,
    /// For people, in the server's language.
    pub message: Option<String>,
    /// Names of bad parameters and what is wrong with them.
    pub parameters: Vec<(String, String)>,
    /// For logs only.
    pub debug_info: Vec<(String, String)>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The element's name.
    pub kind: EventKind,
    /// Type of the target.
    pub rel: String,
    /// Address of the target: its identity.
    pub href: String,
    /// `title` of the target, which may be empty.
    pub title: Option<String>,
    /// The target's state at the time of the event, if the server embedded it.
    pub resource: Option<Resource>,
    /// `in`: the collection that the target joined or left.
    pub within: Option<Target>,
    /// `Success` or `Failure` of a completed operation.
    pub status: Option<String>,
    /// Why it failed.
    pub reason: Option<Reason>,
    /// Where the event stands in the response text, in bytes.
    pub raw: Range<usize>,
}

/// `<sender rel href>`: the owner of what the events are about. The same sender may come several times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sender {
    /// Type.
    pub rel: String,
    /// Address.
    pub href: String,
    /// In document order.
    pub events: Vec<Event>,
}

/// How to go on after an event-channel response. Exactly one of these links should be there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Continuation {
    /// `next`: follow it to acknowledge this response and wait for the next.
    Next(String),
    /// `resume`: the server lost track; what is open has to be learnt anew.
    Resume(String),
    /// `resync`: our link was wrong.
    Resync(String),
    /// None of them.
    #[default]
    Missing,
}

/// An event-channel response (resource `events`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventBatch {
    /// Its own address.
    pub href: String,
    /// How to go on.
    pub continuation: Continuation,
    /// In document order, which is the order of the events.
    pub senders: Vec<Sender>,
}
