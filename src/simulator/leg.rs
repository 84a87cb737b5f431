//! One application's view of a conversation, and its invitations: what they hold and how they read as resources.
//!
//! Lives inside the application's lock; the conversation itself, which all its members share, changes it. A leg
//! that has ended is kept for a while so that messages and participants which were only linked can still be read.

use std::{collections::VecDeque, sync::Arc};

use jiff::Timestamp;

use super::{
    application::{Account, Application, ApplicationState, address_of},
    conversation::{Conversation, Text},
    event_channel::{Event, EventKind},
    payload::{DataUriStyle, Link, Reason, Resource, Value, encode_data_uri},
    server::Server,
};

/// Messages of a conversation that stay readable.
const MESSAGES_KEPT: usize = 256;

/// The other people of a conversation as one application sees them.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) uri: String,
    pub(crate) name: String,
    /// What events call them; servers leave it empty at times.
    pub(crate) title: String,
    pub(crate) present: bool,
}

/// A message as one application sees it.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) number: u64,
    pub(crate) incoming_from: Option<Member>,
    pub(crate) plain: Option<String>,
    pub(crate) html: Option<String>,
    /// The link of the plain text, where it was given.
    pub(crate) data_uri: Option<String>,
    /// What is said to be the time, where that was given.
    pub(crate) time_stamp: Option<String>,
    pub(crate) time: Timestamp,
    pub(crate) operation_id: Option<String>,
    pub(crate) status: &'static str,
    pub(crate) failed: Vec<Member>,
}

/// See the module.
pub(crate) struct Leg {
    pub(crate) conversation: Arc<Conversation>,
    pub(crate) id: String,
    /// Incoming, Connecting, Connected, Conferencing, Conferenced, Disconnected.
    pub(crate) state: &'static str,
    /// Whether it can become a conference while it is none.
    pub(crate) grows: bool,
    pub(crate) thread_id: String,
    pub(crate) subject: String,
    pub(crate) importance: String,
    /// Connecting, Connected, Disconnected.
    pub(crate) messaging: &'static str,
    /// Counts how often the messaging was rebuilt; each time its addresses change.
    pub(crate) generation: u32,
    pub(crate) html: bool,
    pub(crate) members: Vec<Member>,
    pub(crate) messages: VecDeque<Message>,
    pub(crate) last_message: u64,
    pub(crate) ended: bool,
    /// URIs of those who lead the meeting.
    pub(crate) leaders: Vec<String>,
    /// Who waits to be admitted.
    pub(crate) lobby: Vec<Member>,
}

/// Who may be invited by whom to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Incoming,
    Outgoing,
}

/// An invitation as one application sees it.
#[derive(Debug, Clone)]
pub(crate) struct Invitation {
    /// `messagingInvitation`, `onlineMeetingInvitation` or `participantInvitation`.
    pub(crate) rel: &'static str,
    pub(crate) id: String,
    pub(crate) direction: Direction,
    pub(crate) state: &'static str,
    pub(crate) leg: String,
    /// The call of the conversation that it stands for.
    pub(crate) call: u64,
    pub(crate) operation_id: Option<String>,
    pub(crate) thread_id: String,
    pub(crate) subject: String,
    pub(crate) importance: String,
    /// A data URI.
    pub(crate) message: Option<String>,
    pub(crate) from: Member,
    pub(crate) to: String,
    pub(crate) accepted_by: Option<Member>,
    /// The leg in which the talk goes on.
    pub(crate) derived: Option<String>,
}

/// A data URI in one of the ways that servers write them.
pub(crate) fn data_uri(server: &Server, media_type: &str, text: &str) -> String {
    let style = match server.dice.below(20) {
        0..3 => DataUriStyle::Base64,
        3..6 => DataUriStyle::Percent,
        _ => DataUriStyle::PlusForSpace,
    };
    encode_data_uri(media_type, text, style)
}

impl Text {
    /// The text as an invitation's `message`.
    pub(crate) fn as_data_uri(&self, server: &Server) -> Option<String> {
        match (&self.plain, &self.html) {
            (Some(plain), _) => Some(data_uri(server, "text/plain", plain)),
            (None, Some(html)) => Some(data_uri(server, "text/html", html)),
            (None, None) => None,
        }
    }
}

/// A participant; `me` in place of contact links where it is the user.
pub(crate) fn participant_resource(
    application: &Application,
    leg_id: &str,
    uri: &str,
    name: &str,
) -> Resource {
    let base = application.href();
    let conversation = format!("{base}/communication/conversations/{leg_id}");
    let address = address_of(uri);
    let resource = Resource::new("participant", format!("{conversation}/participants/{address}"))
        .property("sourceNetwork", "SameEnterprise")
        .property("anonymous", false)
        .property("name", name)
        .property("uri", uri)
        .link("conversation", conversation);
    if uri == application.account.uri {
        return resource.link("me", format!("{base}/me"));
    }
    resource
        .link("contact", format!("{base}/people/{address}"))
        .link("contactPresence", format!("{base}/people/{address}/presence"))
        .link("contactPhoto", format!("{base}/photos/{address}"))
}

impl Leg {
    pub(crate) fn href(&self, application: &Application) -> String {
        format!("{}/communication/conversations/{}", application.href(), self.id)
    }

    /// `messaging` at first; another address each time it is rebuilt.
    pub(crate) fn messaging_segment(&self) -> String {
        if self.generation == 0 { "messaging".to_owned() } else { format!("messaging{}", self.generation) }
    }

    pub(crate) fn messaging_href(&self, application: &Application) -> String {
        format!("{}/{}", self.href(application), self.messaging_segment())
    }

    pub(crate) fn message_href(&self, application: &Application, number: u64) -> String {
        format!("{}/messages/{number}", self.messaging_href(application))
    }

    fn participant_href(&self, application: &Application, uri: &str) -> String {
        format!("{}/participants/{}", self.href(application), address_of(uri))
    }

    pub(crate) fn participant_link(
        &self,
        application: &Application,
        rel: &'static str,
        member: &Member,
    ) -> Link {
        Link::titled(rel, self.participant_href(application, &member.uri), member.title.as_str())
    }

    fn local_participant_link(&self, application: &Application) -> Link {
        let Account { uri, name, .. } = &*application.account;
        Link::titled("localParticipant", self.participant_href(application, uri), name.as_str())
    }

    /// The sender of events about messages and participants.
    fn sender(&self, application: &Application) -> Link {
        Link::new("conversation", self.href(application))
    }

    pub(crate) fn member(&self, uri: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.uri == uri)
    }

    pub(crate) fn conversation_resource(&self, application: &Application) -> Resource {
        let href = self.href(application);
        let connected = matches!(self.state, "Connected" | "Conferenced" | "Conferencing");
        // As captured: an incoming conversation counts as active, an outgoing one not before it is accepted.
        let active = self.messaging == "Connected" || self.state == "Incoming";
        let active = if active { vec!["Messaging".to_owned()] } else { Vec::new() };
        let mut resource = Resource::new("conversation", &href)
            .property("state", self.state)
            .property("threadId", self.thread_id.as_str())
            .property("subject", self.subject.as_str())
            .property("activeModalities", active)
            .property("importance", self.importance.as_str())
            .property("recording", false)
            .link("applicationSharing", format!("{href}/applicationSharing"))
            .link("audioVideo", format!("{href}/audioVideo"))
            .link("dataCollaboration", format!("{href}/dataCollaboration"))
            .link("messaging", self.messaging_href(application))
            .link("phoneAudio", format!("{href}/phoneAudio"));
        if connected {
            let invite = format!("{}/communication/participantInvitations", application.href());
            resource = resource
                .links([self.local_participant_link(application)])
                .link("participants", format!("{href}/participants"));
            if self.grows || self.state != "Connected" {
                resource = resource.link("addParticipant", format!("{invite}?conversation={}", self.id));
            }
        }
        if self.state == "Conferenced" {
            for list in ["attendees", "leaders", "lobby"] {
                resource = resource.link(list, format!("{href}/{list}"));
            }
        }
        resource
    }

    pub(crate) fn messaging_resource(&self, application: &Application) -> Resource {
        let href = self.messaging_href(application);
        let mut resource = Resource::new("messaging", &href).property("state", self.messaging);
        if self.messaging == "Connected" {
            let mut formats = vec!["Plain".to_owned()];
            if self.html {
                formats.push("Html".to_owned());
            }
            resource = resource.property("negotiatedMessageFormats", formats);
        }
        resource = resource.link("conversation", self.href(application));
        match self.messaging {
            "Connected" => resource
                .link("stopMessaging", format!("{href}/terminate"))
                .link("sendMessage", format!("{href}/messages"))
                .link("setIsTyping", format!("{href}/typing"))
                .link("typingParticipants", format!("{href}/typingParticipants")),
            "Connecting" => resource.link("stopMessaging", format!("{href}/terminate")),
            _ => resource.link("addMessaging", format!("{href}/addMessaging")),
        }
    }

    pub(crate) fn message_resource(
        &self,
        server: &Server,
        application: &Application,
        message: &Message,
        with_status: bool,
    ) -> Resource {
        let direction = if message.incoming_from.is_some() { "Incoming" } else { "Outgoing" };
        let mut resource = Resource::new("message", self.message_href(application, message.number))
            .property("direction", direction)
            .property("timeStamp", message.time_stamp.clone().map_or(Value::Time(message.time), Value::Text));
        if with_status {
            resource = resource.property("status", message.status);
        }
        if let Some(operation_id) = &message.operation_id {
            resource = resource.property("operationId", operation_id.as_str());
        }
        if let Some(writer) = &message.incoming_from {
            let contact = format!("{}/people/{}", application.href(), address_of(&writer.uri));
            resource = resource.link("contact", contact).links([self.participant_link(
                application,
                "participant",
                writer,
            )]);
        }
        resource = resource.list_links(
            message
                .failed
                .iter()
                .map(|member| self.participant_link(application, "failedDeliveryParticipant", member)),
        );
        resource = resource.link("messaging", self.messaging_href(application));
        if let Some(html) = &message.html {
            resource = resource.link("htmlMessage", data_uri(server, "text/html", html));
        }
        if let Some(given) = &message.data_uri {
            resource = resource.link("plainMessage", given.as_str());
        } else if let Some(plain) = &message.plain {
            resource = resource.link("plainMessage", data_uri(server, "text/plain", plain));
        }
        resource
    }

    pub(crate) fn keep(&mut self, message: Message) {
        if self.messages.len() >= MESSAGES_KEPT {
            self.messages.pop_front();
        }
        self.messages.push_back(message);
    }

    pub(crate) fn next_message(&mut self) -> u64 {
        self.last_message += 1;
        self.last_message
    }

    pub(crate) fn conversation_event(&self, application: &Application, kind: EventKind) -> Event {
        Event::new(
            application.communication_sender(),
            kind,
            Link::new("conversation", self.href(application)),
        )
    }

    pub(crate) fn messaging_event(&self, application: &Application) -> Event {
        let target = Link::new("messaging", self.messaging_href(application));
        Event::new(self.sender(application), EventKind::Updated, target)
    }

    pub(crate) fn message_event(&self, application: &Application, kind: EventKind, number: u64) -> Event {
        let target = Link::new("message", self.message_href(application, number));
        Event::new(self.sender(application), kind, target)
    }

    pub(crate) fn participant_event(
        &self,
        application: &Application,
        kind: EventKind,
        member: &Member,
    ) -> Event {
        let target = self.participant_link(application, "participant", member);
        Event::new(self.sender(application), kind, target)
    }

    pub(crate) fn typing_event(&self, application: &Application, kind: EventKind, member: &Member) -> Event {
        let list = format!("{}/typingParticipants", self.messaging_href(application));
        self.participant_event(application, kind, member).within(Link::new("typingParticipants", list))
    }

    pub(crate) fn local_participant_event(&self, application: &Application) -> Event {
        let link = self.local_participant_link(application);
        let Account { uri, name, .. } = &*application.account;
        let resource = participant_resource(application, &self.id, uri, name).in_role("localParticipant");
        Event::new(self.sender(application), EventKind::Added, link).resource(resource)
    }

    /// That the modality messaging was added to everybody who is there.
    pub(crate) fn participant_messaging_events(&self, application: &Application) -> Vec<Event> {
        let added = |who: Link| {
            let href = format!("{}/messaging", who.href);
            let target = Link::new("participantMessaging", href);
            Event::new(self.sender(application), EventKind::Added, target).within(who)
        };
        let local = self.local_participant_link(application);
        let href = format!("{}/messaging", local.href);
        let embedded =
            Resource::new("participantMessaging", href).links([local.clone().in_role("participant")]);
        let mut events = vec![added(local).resource(embedded)];
        for member in self.members.iter().filter(|member| member.present) {
            events.push(added(self.participant_link(application, "participant", member)));
        }
        events
    }
}

impl Invitation {
    pub(crate) fn href(&self, application: &Application) -> String {
        format!("{}/communication/{}s/{}", application.href(), self.rel, self.id)
    }

    /// `answerable` is false for the states in which servers drop `accept` and `decline`.
    pub(crate) fn resource(
        &self,
        application: &Application,
        state: &ApplicationState,
        answerable: bool,
    ) -> Resource {
        let base = application.href();
        let href = self.href(application);
        let conversation = format!("{base}/communication/conversations/{}", self.leg);
        let messaging = state
            .legs
            .get(&self.leg)
            .map_or_else(|| format!("{conversation}/messaging"), |leg| leg.messaging_href(application));
        let incoming = self.direction == Direction::Incoming;
        let mut resource = Resource::new(self.rel, &href)
            .property("direction", if incoming { "Incoming" } else { "Outgoing" })
            .property("importance", self.importance.as_str())
            .property("threadId", self.thread_id.as_str())
            .property("state", self.state);
        if let Some(operation_id) = &self.operation_id {
            resource = resource.property("operationId", operation_id.as_str());
        }
        resource = resource.property("subject", self.subject.as_str());
        if self.rel == "onlineMeetingInvitation" {
            let organizer = address_of(&self.from.uri);
            let uri = format!("sip:{organizer};gruu;opaque=app:conf:focus:id:{}", &self.id[..8]);
            resource = resource
                .property("onlineMeetingUri", uri)
                .property("availableModalities", vec!["Messaging".to_owned()]);
        }
        if self.rel == "participantInvitation" {
            resource = resource.property("to", self.to.as_str());
        }
        resource = resource
            .link("to", format!("{base}/people/{}", address_of(&self.to)))
            .link("conversation", conversation.as_str());
        if answerable && self.state == "Connecting" {
            if incoming {
                resource = resource
                    .link("accept", format!("{href}/accept"))
                    .link("decline", format!("{href}/decline"));
            } else if self.rel == "messagingInvitation" {
                resource = resource.link("cancel", format!("{messaging}/terminate"));
            }
        }
        if self.rel == "messagingInvitation" {
            resource = resource.link("messaging", messaging);
        }
        if let Some(leg) = self.derived.as_ref().and_then(|leg| state.legs.get(leg)) {
            resource = resource
                .link("derivedConversation", leg.href(application))
                .link("derivedMessaging", leg.messaging_href(application));
        }
        if let Some(message) = self.message.as_ref().filter(|_| incoming) {
            resource = resource.link("message", message.as_str());
        }
        if incoming {
            let from = participant_resource(application, &self.leg, &self.from.uri, &self.from.name);
            resource = resource.embed(from.in_role("from"));
        } else {
            let from = format!("{conversation}/participants/{}", address_of(&self.from.uri));
            resource = resource.links([Link::titled("from", from, self.from.title.as_str())]);
        }
        if let Some(member) = &self.accepted_by {
            let by = participant_resource(application, &self.leg, &member.uri, &member.title);
            resource = resource.embed(by.in_role("acceptedByParticipant").in_list());
        }
        resource
    }

    pub(crate) fn event(&self, application: &Application, kind: EventKind, reason: Option<Reason>) -> Event {
        let target = Link::new(self.rel, self.href(application));
        Event::new(application.communication_sender(), kind, target).reason(reason)
    }
}
