//! Conversations: the truth that their members share, and everything that changes it.
//!
//! A [`Conversation`] has a seat for each member: an application's view of it (a [`Leg`]) or a scripted
//! correspondent. While somebody is being called there is a [`Call`]; it ends by acceptance or by a reason. What
//! happens is written into every application's leg and channel while the conversation's own lock is held, so all
//! members see one order. Applications are locked one at a time, inside the conversation's lock.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    application::{Application, ApplicationState, display_name},
    conversation_log::{self, Draft, Line},
    correspondent::{self, PickUp, Script},
    event_channel::{Delivery, Event, EventKind, Status},
    ledger::{IncomingEntry, IncomingState, MessageKind, OutgoingEntry, OutgoingState},
    leg::{Direction, Invitation, Leg, Member, Message, participant_resource},
    meeting::{self, Meeting},
    payload::{Failure, Reason, Resource},
    server::Server,
};
use crate::simulator::Escalation;

/// How long after an answer the events that belong to it come, unless they come before it.
pub(crate) const EVENTS_AFTER_ANSWER: Duration = Duration::from_millis(5);

pub(crate) const DECLINED: Reason =
    Reason { code: "RemoteFailure", subcode: "Declined", message: "Your invitation was declined." };
pub(crate) const DECLINED_HERE: Reason =
    Reason { code: "LocalFailure", subcode: "Declined", message: "The invitation was declined." };
pub(crate) const TIMEOUT: Reason =
    Reason { code: "RemoteFailure", subcode: "Timeout", message: "Nobody answered in time." };
const MISSED: Reason =
    Reason { code: "LocalFailure", subcode: "Missed", message: "The invitation was missed." };
pub(crate) const CANCELED: Reason =
    Reason { code: "RemoteFailure", subcode: "Canceled", message: "The invitation was withdrawn." };
pub(crate) const CANCELED_HERE: Reason =
    Reason { code: "LocalFailure", subcode: "Canceled", message: "The invitation was withdrawn." };
const CONNECTED_ELSEWHERE: Reason = Reason {
    code: "LocalFailure",
    subcode: "ConnectedElsewhere",
    message: "The invitation was answered by another endpoint.",
};
const DERIVED: Reason = Reason {
    code: "Informational",
    subcode: "DerivedConversation",
    message: "The conversation goes on in another one.",
};
const UNAVAILABLE: Reason =
    Reason { code: "RemoteFailure", subcode: "Unavailable", message: "The person is not signed in." };
const ESCALATION_FAILED: Reason = Reason {
    code: "ServiceFailure",
    subcode: "EscalationFailed",
    message: "The conversation could not become a conference.",
};
pub(crate) const TOO_MANY: Reason = Reason {
    code: "LocalFailure",
    subcode: "TooManyConversations",
    message: "The user has too many conversations.",
};
const ENDED: Reason =
    Reason { code: "Informational", subcode: "Ended", message: "The conversation has ended." };

/// What somebody writes: plain, HTML, or both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Text {
    pub(crate) plain: Option<String>,
    pub(crate) html: Option<String>,
    /// The link of the plain text as it is given, where this server would encode it otherwise.
    pub(crate) data_uri: Option<String>,
    /// The message's time as it is given, where it is not the time at which it was written.
    pub(crate) time_stamp: Option<String>,
}

impl Text {
    /// What a reader takes of it; a reader of plain text is given the HTML stripped of its tags.
    fn read_by(&self, html: bool) -> Self {
        match (&self.plain, &self.html) {
            (plain, Some(markup)) if !html => {
                let plain = plain.clone().or_else(|| Some(without_tags(markup)));
                Self { plain, html: None, ..self.clone() }
            }
            _ => self.clone(),
        }
    }
}

fn without_tags(html: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for character in html.chars() {
        match character {
            '<' => inside = true,
            '>' => inside = false,
            other if !inside => text.push(other),
            _ => {}
        }
    }
    text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}

/// How far a conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConversationPhase {
    /// Nobody has accepted yet.
    Ringing,
    /// At least two members are in it.
    Connected,
    /// It is over.
    Ended,
}

#[derive(Clone)]
pub(crate) enum Place {
    /// Called, and not reached yet.
    Nowhere,
    Application {
        application: Arc<Application>,
        leg: String,
    },
    Script(Script),
}

#[derive(Clone)]
pub(crate) struct Seat {
    pub(crate) uri: String,
    pub(crate) name: String,
    pub(crate) place: Place,
    pub(crate) present: bool,
}

/// Somebody being called into the conversation.
pub(crate) struct Call {
    pub(crate) number: u64,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) text: Option<Text>,
    pub(crate) incoming: Option<u64>,
    pub(crate) outgoing: Option<u64>,
    pub(crate) caller_invitation: Option<String>,
    pub(crate) callee_invitation: Option<String>,
    /// Whether the caller's side has been told that it began.
    announced: bool,
    /// Another device of the called account takes it: it is quicker than any application.
    elsewhere: bool,
}

/// What changes in a conversation.
pub(crate) struct Hub {
    pub(crate) thread_id: String,
    pub(crate) subject: String,
    pub(crate) importance: String,
    pub(crate) seats: Vec<Seat>,
    pub(crate) calls: Vec<Call>,
    last_call: u64,
    /// Whether more than two have been in it.
    pub(crate) conference: bool,
    /// Whether it can become a conference while it is none.
    grows: bool,
    /// Whether messaging is closed while the conversation goes on.
    messaging_closed: bool,
    /// Whether it is an online meeting, whose messaging everybody joins alone.
    pub(crate) meeting: Option<Meeting>,
    /// What the logs of the accounts in it will say.
    pub(crate) drafts: HashMap<String, Draft>,
}

/// See the module.
pub(crate) struct Conversation {
    pub(crate) id: String,
    hub: Mutex<Hub>,
    pub(crate) phase: watch::Sender<ConversationPhase>,
}

/// Tells the writer of a message what became of it, once all its readers have it or have not.
#[derive(Debug)]
pub(crate) struct Tracker {
    pub(crate) application: Arc<Application>,
    pub(crate) leg: String,
    pub(crate) number: u64,
    pub(crate) serial: u64,
    pub(crate) remaining: AtomicUsize,
    pub(crate) failed: Mutex<Vec<String>>,
    pub(crate) early: bool,
}

/// One reader's part of a [`Tracker`].
#[derive(Debug, Clone)]
pub(crate) struct Receipt {
    tracker: Arc<Tracker>,
    reader: String,
}

impl std::fmt::Debug for Application {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Application").field(&self.id).finish()
    }
}

impl Receipt {
    /// The reader has the message, or never will. Not to be called under an application's lock.
    pub(crate) fn settle(self, server: &Arc<Server>, fetched: bool) {
        let Self { tracker, reader } = self;
        if !fetched {
            tracker.failed.lock().unwrap_or_else(PoisonError::into_inner).push(reader);
        }
        if tracker.remaining.fetch_sub(1, SeqCst) != 1 {
            return;
        }
        if tracker.early {
            tracker.complete(server);
        } else {
            server.timers.after(EVENTS_AFTER_ANSWER, move |server| tracker.complete(server));
        }
    }
}

impl Tracker {
    fn complete(&self, server: &Arc<Server>) {
        let failed = std::mem::take(&mut *self.failed.lock().unwrap_or_else(PoisonError::into_inner));
        server.ledger.settle_outgoing(self.serial, (!failed.is_empty()).then_some("Timeout"));
        let mut state = self.application.lock();
        let Some(leg) = state.legs.get_mut(&self.leg) else { return };
        let members: Vec<Member> = failed.iter().filter_map(|uri| leg.member(uri)).cloned().collect();
        let Some(message) = leg.messages.iter_mut().find(|message| message.number == self.number) else {
            return;
        };
        message.status = if failed.is_empty() { "Succeeded" } else { "Failed" };
        message.failed = members;
        let mut told = message.clone();
        // Captured events name no operation; the reference says that they do.
        if server.dice.chance(0.5) {
            told.operation_id = None;
        }
        told.plain = None;
        told.html = None;
        told.data_uri = None;
        let leg = &*leg;
        if leg.ended {
            return;
        }
        let status = if failed.is_empty() { Status::Success } else { Status::Failure };
        let mut event =
            leg.message_event(&self.application, EventKind::Completed, self.number).status(status);
        if status == Status::Failure {
            event = event.reason(Some(TIMEOUT));
        }
        let resource = leg.message_resource(server, &self.application, &told, false);
        let event = maybe_embedded(server, event, resource);
        state.channel.push(event);
    }
}

/// Embeds the resource in most events; the others only link it.
pub(crate) fn maybe_embedded(server: &Server, event: Event, resource: Resource) -> Event {
    if server.dice.chance(server.now().link_only_share) { event } else { event.resource(resource) }
}

impl Conversation {
    pub(crate) fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> ConversationPhase {
        *self.phase.borrow()
    }

    /// A new conversation with its first member in it.
    pub(crate) fn open(
        server: &Server,
        first: Seat,
        thread_id: String,
        subject: String,
        importance: String,
    ) -> Arc<Self> {
        let hub = Hub {
            thread_id,
            subject,
            importance,
            seats: vec![first],
            calls: Vec::new(),
            last_call: 0,
            conference: false,
            grows: server.now().escalation != Escalation::Absent,
            messaging_closed: false,
            meeting: None,
            drafts: HashMap::new(),
        };
        let phase = watch::Sender::new(ConversationPhase::Ringing);
        let conversation = Arc::new(Self { id: server.dice.hex(), hub: Mutex::new(hub), phase });
        let mut conversations = server.conversations.write().unwrap_or_else(PoisonError::into_inner);
        conversations.insert(conversation.id.clone(), Arc::clone(&conversation));
        drop(conversations);
        conversation
    }
}

impl Hub {
    /// Takes a seat for `uri`, or finds the one that it had.
    pub(crate) fn seat_of(&mut self, uri: &str) -> usize {
        if let Some(index) = self.seats.iter().position(|seat| seat.uri == uri) {
            return index;
        }
        let name = display_name(uri);
        self.seats.push(Seat { uri: uri.to_owned(), name, place: Place::Nowhere, present: false });
        self.seats.len() - 1
    }

    pub(crate) fn seat_of_application(&self, application: &Arc<Application>) -> Option<usize> {
        self.seats.iter().position(
            |seat| matches!(&seat.place, Place::Application { application: other, .. } if Arc::ptr_eq(other, application)),
        )
    }

    pub(crate) fn begin_call(&mut self, from: usize, to: usize, text: Option<Text>) -> &mut Call {
        self.last_call += 1;
        let index = self.calls.len();
        self.calls.push(Call {
            number: self.last_call,
            from,
            to,
            text,
            incoming: None,
            outgoing: None,
            caller_invitation: None,
            callee_invitation: None,
            announced: false,
            elsewhere: false,
        });
        &mut self.calls[index]
    }

    pub(crate) fn take_call(&mut self, number: u64) -> Option<Call> {
        let index = self.calls.iter().position(|call| call.number == number)?;
        Some(self.calls.remove(index))
    }

    pub(crate) fn member(&self, server: &Server, seat: usize) -> Member {
        let Seat { uri, name, .. } = &self.seats[seat];
        let title = if server.dice.chance(0.25) { String::new() } else { name.clone() };
        Member { uri: uri.clone(), name: name.clone(), title, present: true }
    }

    /// Everybody but `seat` who is there.
    pub(crate) fn others_present(&self, seat: usize) -> Vec<usize> {
        (0..self.seats.len()).filter(|index| *index != seat && self.seats[*index].present).collect()
    }
}

// ---- Calling somebody ----

/// Starts a conversation on behalf of a scripted correspondent; if `elsewhere`, another device of the account takes
/// it. Gives nothing if the account takes no messages and its log does not either.
pub(crate) fn call_from_script(
    server: &Arc<Server>,
    from: &str,
    to: &str,
    text: Option<Text>,
    subject: &str,
    elsewhere: bool,
) -> Option<Arc<Conversation>> {
    let reachable = server.accounts.get(to)?.reachable().is_some();
    if !reachable && !elsewhere && !logs_missed_calls(server) {
        return None;
    }
    let script = Script::of(from);
    let first =
        Seat { uri: from.to_owned(), name: display_name(from), place: Place::Script(script), present: true };
    // Thread ids of desktop clients are base64, with all its special characters.
    let thread_id = format!("Ac{}+/==", &server.dice.hex()[..24]);
    let conversation = Conversation::open(server, first, thread_id, subject.to_owned(), "Normal".to_owned());
    let number = {
        let mut hub = conversation.hub();
        let callee = hub.seat_of(to);
        let call = hub.begin_call(0, callee, text);
        call.elsewhere = elsewhere;
        call.number
    };
    if elsewhere {
        let (least, most) = server.settings.answer_delay;
        let this = Arc::clone(&conversation);
        server.timers.after_scripted(server.dice.between(least, most), move |server| {
            answer_elsewhere(server, &this, number);
        });
    }
    if reachable {
        ring(server, &conversation, number);
    } else if !elsewhere {
        fail(server, &conversation, number, UNAVAILABLE, MISSED);
    }
    Some(conversation)
}

fn logs_missed_calls(server: &Server) -> bool {
    let settings = server.now();
    settings.conversation_logs && settings.missed_calls_logged
}

/// Another device of the called account accepts: its applications lose the call, and what follows is in its log only.
fn answer_elsewhere(server: &Arc<Server>, conversation: &Arc<Conversation>, number: u64) {
    let mut guard = conversation.hub();
    let hub = &mut *guard;
    let Some(call) = hub.take_call(number) else { return };
    end_call(server, hub, &call, CANCELED_HERE, CONNECTED_ELSEWHERE);
    hub.seats[call.to].place = Place::Script(Script::Device);
    hub.seats[call.to].present = true;
    conversation.phase.send_replace(ConversationPhase::Connected);
}

/// What an application asked for when it calls.
pub(crate) struct Invite {
    pub(crate) rel: &'static str,
    pub(crate) operation_id: Option<String>,
    pub(crate) to: String,
    pub(crate) text: Option<Text>,
}

/// Puts a call by an application in place; its events come when it is [`announce`]d. Gives the call's number and
/// the invitation's address.
pub(crate) fn place_call(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    hub: &mut Hub,
    from: usize,
    invite: Invite,
) -> Result<(u64, String), Failure> {
    let Place::Application { application, leg: leg_id } = hub.seats[from].place.clone() else {
        return Err(Failure::conversation_not_found());
    };
    let to = hub.seat_of(&invite.to);
    let invitation_id = server.dice.hex();
    let kind = MessageKind::Invitation;
    let outgoing = invite.text.as_ref().map(|text| {
        let (content_type, text) = match (&text.plain, &text.html) {
            (None, Some(html)) => ("text/html", html.clone()),
            (plain, _) => ("text/plain", plain.clone().unwrap_or_default()),
        };
        server.ledger.add_outgoing(OutgoingEntry {
            serial: 0,
            account: application.account.uri.clone(),
            to: vec![invite.to.clone()],
            conversation: conversation.id.clone(),
            thread_id: hub.thread_id.clone(),
            application: application.id.clone(),
            operation_id: invite.operation_id.clone(),
            text,
            content_type: content_type.to_owned(),
            time: Timestamp::now(),
            kind,
            state: OutgoingState::Accepted,
            failure: None,
        })
    });
    let (thread_id, subject, importance) =
        (hub.thread_id.clone(), hub.subject.clone(), hub.importance.clone());
    let own = &hub.seats[from];
    let from_member =
        Member { uri: own.uri.clone(), name: own.name.clone(), title: own.name.clone(), present: true };
    let call = hub.begin_call(from, to, invite.text);
    call.outgoing = outgoing;
    call.caller_invitation = Some(invitation_id.clone());
    let number = call.number;
    let invitation = Invitation {
        rel: invite.rel,
        id: invitation_id.clone(),
        direction: Direction::Outgoing,
        state: "Connecting",
        leg: leg_id,
        call: number,
        operation_id: invite.operation_id,
        thread_id,
        subject,
        importance,
        message: None,
        from: from_member,
        to: invite.to,
        accepted_by: None,
        derived: None,
    };
    let href = invitation.href(&application);
    application.lock().invitations.insert(invitation_id, invitation);
    Ok((number, href))
}

/// Tells the calling application that its call has begun, and lets the callee be called.
pub(crate) fn announce(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    number: u64,
    new_conversation: bool,
) {
    {
        let mut hub = conversation.hub();
        let Some(call) = hub.calls.iter_mut().find(|call| call.number == number) else { return };
        call.announced = true;
        let (from, invitation) = (call.from, call.caller_invitation.clone());
        if let Place::Application { application, leg } = &hub.seats[from].place {
            let mut state = application.lock();
            let state = &mut *state;
            if let Some(leg) = state.legs.get(leg)
                && let Some(invitation) = invitation.and_then(|id| state.invitations.get(&id))
            {
                let started = invitation.event(application, EventKind::Started, None);
                let started = maybe_embedded(server, started, invitation.resource(application, state, true));
                let mut events = vec![started];
                if new_conversation {
                    let added = leg.conversation_event(application, EventKind::Added);
                    events.push(maybe_embedded(server, added, leg.conversation_resource(application)));
                    events.push(leg.local_participant_event(application));
                }
                if invitation.rel == "messagingInvitation" {
                    let messaging = leg.messaging_event(application);
                    events.push(maybe_embedded(server, messaging, leg.messaging_resource(application)));
                }
                for event in events {
                    state.channel.push(event);
                }
            }
        }
    }
    if new_conversation && is_crowded(server, conversation) {
        fail(server, conversation, number, TOO_MANY, MISSED);
        return;
    }
    ring(server, conversation, number);
}

/// Whether whoever began this conversation has more of them now than an application may have.
pub(crate) fn is_crowded(server: &Server, conversation: &Conversation) -> bool {
    let Some(limit) = server.settings.conversations_per_application else { return false };
    let hub = conversation.hub();
    let Some(Place::Application { application, .. }) = hub.seats.first().map(|seat| &seat.place) else {
        return false;
    };
    let state = application.lock();
    state.legs.values().filter(|leg| !leg.ended).count() > limit
}

/// Lets the application that makes a call see its conversation in another state.
fn show_state_to_caller(conversation: &Conversation, number: u64, shown: &'static str) {
    let hub = conversation.hub();
    let Some(call) = hub.calls.iter().find(|call| call.number == number) else { return };
    let Place::Application { application, leg } = &hub.seats[call.from].place else { return };
    let mut state = application.lock();
    let state = &mut *state;
    let Some(leg) = state.legs.get_mut(leg) else { return };
    leg.state = shown;
    let updated = leg.conversation_event(application, EventKind::Updated);
    state.channel.push(updated.resource(leg.conversation_resource(application)));
}

/// Lets the callee of a call know of it, or settles at once that it cannot.
pub(crate) fn ring(server: &Arc<Server>, conversation: &Arc<Conversation>, number: u64) {
    let (uri, alone, escalates) = {
        let hub = conversation.hub();
        let Some(call) = hub.calls.iter().find(|call| call.number == number) else { return };
        let escalates = !hub.conference && conversation.phase() == ConversationPhase::Connected;
        (hub.seats[call.to].uri.clone(), call.from == call.to, escalates && !hub.seats[call.to].present)
    };
    let this = Arc::clone(conversation);
    if alone {
        // Who is alone in a meeting and adds messaging is answered by the meeting.
        server.timers.after_scripted(server.settings.answer_delay.0, move |server| {
            accept(server, &this, number);
        });
        return;
    }
    if escalates && server.now().escalation == Escalation::Failing {
        show_state_to_caller(conversation, number, "Conferencing");
        server.timers.after_scripted(server.settings.answer_delay.0, move |server| {
            show_state_to_caller(&this, number, "Connected");
            fail(server, &this, number, ESCALATION_FAILED, MISSED);
        });
        return;
    }
    let ring_time = server.settings.ring_time;
    if let Some(account) = server.accounts.get(&uri) {
        let Some(application) = account.reachable() else {
            let delay = server.settings.answer_delay.0;
            server
                .timers
                .after_scripted(delay, move |server| fail(server, &this, number, UNAVAILABLE, MISSED));
            return;
        };
        if present_call(server, conversation, number, &application) {
            server.timers.after(ring_time, move |server| {
                if !meeting::somebody_waits(&this) {
                    fail(server, &this, number, TIMEOUT, MISSED);
                }
            });
        } else {
            fail(server, conversation, number, UNAVAILABLE, MISSED);
        }
        return;
    }
    let mut script = Script::of(&uri);
    {
        let mut hub = conversation.hub();
        let seat = hub.seat_of(&uri);
        if hub.meeting.is_some() && hub.seats[seat].present {
            // Who adds messaging in a meeting is answered by the meeting.
            script = Script::Silent;
        } else {
            hub.seats[seat].place = Place::Script(script);
        }
    }
    let (least, most) = server.settings.answer_delay;
    let delay = server.dice.between(least, most);
    match script.pick_up() {
        PickUp::Accept => {
            server.timers.after_scripted(delay, move |server| {
                accept(server, &this, number);
            });
        }
        PickUp::Refuse(reason) => {
            server.timers.after_scripted(delay, move |server| fail(server, &this, number, reason, MISSED));
        }
        PickUp::Derive => {
            server.timers.after_scripted(delay, move |server| derive(server, &this, number));
        }
        PickUp::LetItRing => {
            server
                .timers
                .after_scripted(ring_time, move |server| fail(server, &this, number, TIMEOUT, MISSED));
        }
    }
}

/// Puts an incoming call in front of an application. False if the application has just ended.
fn present_call(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    number: u64,
    application: &Arc<Application>,
) -> bool {
    let mut hub = conversation.hub();
    let hub = &mut *hub;
    let Some(call) = hub.calls.iter().find(|call| call.number == number) else { return true };
    let (from, to) = (call.from, call.to);
    let caller = Member { title: hub.seats[from].name.clone(), ..hub.member(server, from) };
    let mut state = application.lock();
    let state = &mut *state;
    if state.alive().is_err() {
        return false;
    }
    let known = match &hub.seats[to].place {
        Place::Application { application: seated, leg } if Arc::ptr_eq(seated, application) => {
            state.legs.get(leg).filter(|leg| !leg.ended).map(|_| leg.clone())
        }
        _ => None,
    };
    let new_conversation = known.is_none();
    let leg_id = known.unwrap_or_else(|| super::application::uuid_of(server));
    if new_conversation {
        let mut leg = new_leg(conversation, hub, leg_id.clone(), "Incoming");
        let others = (0..hub.seats.len()).filter(|index| *index != to && hub.seats[*index].present);
        leg.members = others.map(|index| hub.member(server, index)).collect();
        if hub.meeting.is_some() {
            // Who else is there is told to those who have joined.
            leg.messaging = "Disconnected";
            leg.members.retain(|member| member.uri == caller.uri);
        }
        state.legs.insert(leg_id.clone(), leg);
        hub.seats[to].place =
            Place::Application { application: Arc::clone(application), leg: leg_id.clone() };
    } else if let Some(leg) = state.legs.get_mut(&leg_id) {
        leg.messaging = "Connecting";
    }
    let Some(call) = hub.calls.iter_mut().find(|call| call.number == number) else { return true };
    let text = call.text.as_ref().map(|text| text.read_by(state.reads_html()));
    let message = text.as_ref().and_then(|text| text.as_data_uri(server));
    let invitation = Invitation {
        rel: if hub.meeting.is_some() { "onlineMeetingInvitation" } else { "messagingInvitation" },
        id: server.dice.hex(),
        direction: Direction::Incoming,
        state: "Connecting",
        leg: leg_id.clone(),
        call: number,
        operation_id: None,
        thread_id: hub.thread_id.clone(),
        subject: hub.subject.clone(),
        importance: hub.importance.clone(),
        message,
        from: caller.clone(),
        to: application.account.uri.clone(),
        accepted_by: None,
        derived: None,
    };
    call.incoming = text.map(|text| {
        // An invitation shows one of the two texts only.
        let html = text.html.filter(|_| text.plain.is_none());
        server.ledger.add_incoming(IncomingEntry {
            serial: 0,
            account: application.account.uri.clone(),
            correspondent: caller.uri.clone(),
            conversation: conversation.id.clone(),
            thread_id: hub.thread_id.clone(),
            application: application.id.clone(),
            text: text.plain,
            html,
            time: Timestamp::now(),
            kind: MessageKind::Invitation,
            state: IncomingState::Pending,
            package_acknowledged: false,
            packaged_at: None,
            acknowledged_at: None,
        })
    });
    call.callee_invitation = Some(invitation.id.clone());
    let mut started = invitation.event(application, EventKind::Started, None);
    if let Some(serial) = call.incoming {
        started = started.delivery(Delivery { serial, receipt: None, expires: false });
    }
    let started = maybe_embedded(server, started, invitation.resource(application, state, true));
    let mut events = vec![started];
    if new_conversation && let Some(leg) = state.legs.get(&leg_id) {
        let added = leg.conversation_event(application, EventKind::Added);
        let added = maybe_embedded(server, added, leg.conversation_resource(application));
        // Either order was seen.
        events.insert(usize::from(server.dice.chance(0.8)), added);
        events.push(leg.local_participant_event(application));
        for member in &leg.members {
            let event = leg.participant_event(application, EventKind::Added, member);
            let resource = participant_resource(application, &leg.id, &member.uri, &member.name);
            events.push(if server.dice.chance(0.8) { event } else { event.resource(resource) });
        }
    }
    if server.dice.chance(0.3) {
        let updated = invitation.event(application, EventKind::Updated, None);
        events.push(updated.resource(invitation.resource(application, state, false)));
    }
    state.invitations.insert(invitation.id.clone(), invitation);
    for event in events {
        state.channel.push(event);
    }
    true
}

pub(crate) fn new_leg(conversation: &Arc<Conversation>, hub: &Hub, id: String, state: &'static str) -> Leg {
    Leg {
        conversation: Arc::clone(conversation),
        id,
        state,
        grows: hub.grows,
        thread_id: hub.thread_id.clone(),
        subject: hub.subject.clone(),
        importance: hub.importance.clone(),
        messaging: "Connecting",
        generation: 0,
        html: false,
        members: Vec::new(),
        messages: VecDeque::new(),
        // Servers number messages from 2.
        last_message: 1,
        ended: false,
        leaders: Vec::new(),
        lobby: Vec::new(),
    }
}

/// The callee of a call accepts it. False if the call is over already.
pub(crate) fn accept(server: &Arc<Server>, conversation: &Arc<Conversation>, number: u64) -> bool {
    let mut guard = conversation.hub();
    let hub = &mut *guard;
    let not_to_be_had = |call: &Call| call.elsewhere || (call.caller_invitation.is_some() && !call.announced);
    if hub.calls.iter().any(|call| call.number == number && not_to_be_had(call)) {
        return false;
    }
    if let Some(joined) = meeting::join(server, conversation, hub, number) {
        return joined;
    }
    let Some(call) = hub.take_call(number) else { return false };
    hub.seats[call.to].present = true;
    hub.messaging_closed = false;
    let adds_participant = hub.seats.iter().filter(|seat| seat.present).count() > 2;
    if adds_participant {
        hub.conference = true;
    }
    conversation.phase.send_replace(ConversationPhase::Connected);
    let html = (0..hub.seats.len()).filter(|index| hub.seats[*index].present).all(|index| {
        match &hub.seats[index].place {
            Place::Application { application, .. } => application.lock().reads_html(),
            Place::Script(script) => script.reads_html(),
            Place::Nowhere => true,
        }
    });
    let joiner = hub.member(server, call.to);
    if let Some(serial) = call.outgoing {
        server.ledger.settle_outgoing(serial, None);
    }
    note_first_message(server, hub, &call, true);
    for index in 0..hub.seats.len() {
        let Seat { place, present, .. } = &hub.seats[index];
        if let (true, Place::Application { application, leg }) = (present, place) {
            let role = if index == call.from {
                Role::Caller
            } else if index == call.to {
                Role::Callee
            } else {
                Role::Bystander
            };
            if role == Role::Bystander && hub.meeting.is_some() {
                meeting::show_joiner(server, application, leg, &joiner);
            } else {
                connect_leg(server, application, leg, role, &call, &joiner, hub.conference, html);
            }
        }
    }
    if let (Some(text), Place::Application { application, leg }) =
        (&call.text, hub.seats[call.to].place.clone())
    {
        let writer = hub.member(server, call.from);
        repeat_first_message(server, &application, &leg, &writer, text, call.incoming);
    }
    let (callee, text) = (call.to, call.text);
    let scripts: Vec<(usize, Script)> = hub
        .seats
        .iter()
        .enumerate()
        .filter_map(|(index, seat)| match &seat.place {
            Place::Script(script) if seat.present => Some((index, *script)),
            _ => None,
        })
        .collect();
    drop(guard);
    for (index, script) in scripts {
        if index == callee
            && let Some(text) = &text
        {
            correspondent::react(server, conversation, index, script, text);
        }
    }
    true
}

/// What an application has to do with a call that is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Caller,
    Callee,
    Bystander,
}

/// Shows one application that a call was accepted and who has joined.
#[expect(clippy::too_many_arguments, reason = "each is a fact about one acceptance, and there is one caller")]
fn connect_leg(
    server: &Arc<Server>,
    application: &Arc<Application>,
    leg: &str,
    role: Role,
    call: &Call,
    joiner: &Member,
    conference: bool,
    html: bool,
) {
    let mut state = application.lock();
    let state = &mut *state;
    let Some(leg) = state.legs.get_mut(leg) else { return };
    let mut events = Vec::new();
    let returns = leg.state == "Connected" || leg.state == "Conferenced";
    if conference && leg.state == "Connected" {
        // The two-party messaging is taken down and built anew in the conference.
        leg.messaging = "Disconnected";
        events.push(leg.messaging_event(application).resource(leg.messaging_resource(application)));
        leg.state = "Conferencing";
        let conferencing = leg.conversation_event(application, EventKind::Updated);
        events.push(conferencing.resource(leg.conversation_resource(application)));
        leg.generation += 1;
    }
    let own = match role {
        Role::Callee => call.callee_invitation.as_ref(),
        Role::Caller => call.caller_invitation.as_ref(),
        Role::Bystander => None,
    };
    let invitation = own.and_then(|id| state.invitations.get(id));
    let brings = invitation.is_some_and(|invitation| invitation.rel == "participantInvitation");
    // In a meeting everybody adds messaging for themselves.
    if !brings || leg.state != "Conferenced" {
        leg.messaging = "Connected";
    }
    leg.state = if conference { "Conferenced" } else { "Connected" };
    leg.html = html;
    let is_own = joiner.uri == application.account.uri;
    if role != Role::Callee && !is_own && leg.member(&joiner.uri).is_none_or(|member| !member.present) {
        leg.members.retain(|member| member.uri != joiner.uri);
        leg.members.push(joiner.clone());
        let added = leg.participant_event(application, EventKind::Added, joiner);
        let resource = participant_resource(application, &leg.id, &joiner.uri, &joiner.name);
        events.push(if server.dice.chance(0.8) { added } else { added.resource(resource) });
    }
    let conversation = leg.conversation_event(application, EventKind::Updated);
    let conversation = maybe_embedded(server, conversation, leg.conversation_resource(application));
    let messaging = leg.messaging_event(application);
    let messaging = maybe_embedded(server, messaging, leg.messaging_resource(application));
    if role == Role::Callee {
        events.extend([messaging, conversation]);
    } else {
        events.extend([conversation, messaging]);
    }
    if !returns {
        events.extend(leg.participant_messaging_events(application));
        if let Some(member) = leg.members.iter().find(|member| member.present) {
            events.push(leg.participant_event(application, EventKind::Updated, member));
        }
    }
    if let Some(invitation) = own.and_then(|id| state.invitations.get_mut(id)) {
        invitation.state = "Connected";
        if invitation.direction == Direction::Outgoing && !is_own {
            invitation.accepted_by = Some(joiner.clone());
        }
    }
    if let Some(invitation) = own.and_then(|id| state.invitations.get(id)) {
        let completed = invitation.event(application, EventKind::Completed, None).status(Status::Success);
        let completed = maybe_embedded(server, completed, invitation.resource(application, state, false));
        // Either order of acceptance and open messaging was seen.
        let first =
            invitation.rel == "messagingInvitation" && role == Role::Caller && server.dice.chance(0.3);
        events.insert(if first { 0 } else { events.len() }, completed);
    }
    for event in events {
        state.channel.push(event);
    }
}

/// The text of an accepted invitation comes again as the conversation's first message: the same ledger entry.
fn repeat_first_message(
    server: &Arc<Server>,
    application: &Arc<Application>,
    leg: &str,
    writer: &Member,
    text: &Text,
    serial: Option<u64>,
) {
    let mut state = application.lock();
    let text = text.read_by(state.reads_html());
    let Some(leg) = state.legs.get_mut(leg) else { return };
    let html = text.html.filter(|_| text.plain.is_none());
    let message = Message {
        number: leg.next_message(),
        incoming_from: Some(writer.clone()),
        plain: text.plain,
        html,
        data_uri: text.data_uri,
        time_stamp: text.time_stamp,
        time: Timestamp::now(),
        operation_id: None,
        status: "Succeeded",
        failed: Vec::new(),
    };
    let mut event =
        leg.message_event(application, EventKind::Completed, message.number).status(Status::Success);
    if let Some(serial) = serial {
        event = event.delivery(Delivery { serial, receipt: None, expires: false });
    }
    let event = maybe_embedded(server, event, leg.message_resource(server, application, &message, false));
    leg.keep(message);
    state.channel.push(event);
}

/// A call comes to nothing. Does nothing if it has ended otherwise.
pub(crate) fn fail(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    number: u64,
    caller_is_told: Reason,
    other_is_told: Reason,
) {
    let mut guard = conversation.hub();
    let hub = &mut *guard;
    let Some(call) = hub.take_call(number) else { return };
    end_call(server, hub, &call, caller_is_told, other_is_told);
    // A meeting waits for people.
    let alone = hub.meeting.is_none() && hub.seats.iter().filter(|seat| seat.present).count() < 2;
    if alone || hub.is_forsaken() {
        close(server, conversation, hub, None);
    }
}

/// The callee answers a call of an application in a conversation of their own, to which the invitation leads.
fn derive(server: &Arc<Server>, conversation: &Arc<Conversation>, number: u64) {
    let mut guard = conversation.hub();
    let hub = &mut *guard;
    let Some(call) = hub.take_call(number) else { return };
    let Place::Application { application, .. } = hub.seats[call.from].place.clone() else { return };
    let callee = Seat { present: true, ..hub.seats[call.to].clone() };
    let derived = Conversation::open(
        server,
        callee,
        hub.thread_id.clone(),
        hub.subject.clone(),
        hub.importance.clone(),
    );
    let leg_id = super::application::uuid_of(server);
    {
        let mut derived_hub = derived.hub();
        let member = derived_hub.member(server, 0);
        derived_hub.seats.push(Seat {
            place: Place::Application { application: Arc::clone(&application), leg: leg_id.clone() },
            ..hub.seats[call.from].clone()
        });
        let mut state = application.lock();
        let state = &mut *state;
        let mut leg = new_leg(&derived, &derived_hub, leg_id.clone(), "Connected");
        leg.messaging = "Connected";
        leg.members.push(member.clone());
        let added = leg.conversation_event(&application, EventKind::Added);
        let joined = leg.participant_event(&application, EventKind::Added, &member);
        let messaging = leg.messaging_event(&application).resource(leg.messaging_resource(&application));
        for event in [
            maybe_embedded(server, added, leg.conversation_resource(&application)),
            leg.local_participant_event(&application),
            joined,
            messaging,
        ] {
            state.channel.push(event);
        }
        state.legs.insert(leg_id.clone(), leg);
        if let Some(id) = &call.caller_invitation
            && let Some(invitation) = state.invitations.get_mut(id)
        {
            invitation.derived = Some(leg_id);
        }
        derived.phase.send_replace(ConversationPhase::Connected);
    }
    end_call(server, hub, &call, DERIVED, MISSED);
    close(server, conversation, hub, None);
}

/// Notes the text of a call for the logs of both sides; of a call that came to nothing, for the callee's only.
fn note_first_message(server: &Server, hub: &mut Hub, call: &Call, accepted: bool) {
    let Some(text) = &call.text else { return };
    let Seat { uri: to, place, .. } = hub.seats[call.to].clone();
    let from = hub.seats[call.from].uri.clone();
    let time = Timestamp::now();
    let text = match &place {
        Place::Application { application, .. } => text.read_by(application.lock().reads_html()),
        _ => text.clone(),
    };
    // An invitation shows one of the two texts only.
    let shown = Text { html: text.html.clone().filter(|_| text.plain.is_none()), ..text.clone() };
    let line = Line { from: &from, text: shown, time, serial: call.incoming };
    hub.note(server, &to, true, accepted, line);
    if accepted {
        hub.note(server, &from, false, true, Line { from: &from, text, time, serial: call.outgoing });
    }
}

fn end_call(server: &Arc<Server>, hub: &mut Hub, call: &Call, caller_is_told: Reason, other_is_told: Reason) {
    let elsewhere = other_is_told == CONNECTED_ELSEWHERE;
    if elsewhere || call.callee_invitation.is_some() || logs_missed_calls(server) {
        note_first_message(server, hub, call, elsewhere);
    }
    if let Some(serial) = call.outgoing {
        server.ledger.settle_outgoing(serial, Some(caller_is_told.subcode));
    }
    if let Some(serial) = call.incoming {
        server.ledger.refuse(serial);
    }
    let sides = [
        (call.from, &call.caller_invitation, caller_is_told),
        (call.to, &call.callee_invitation, other_is_told),
    ];
    for (seat, invitation, reason) in sides {
        let Place::Application { application, leg } = hub.seats[seat].place.clone() else { continue };
        let mut state = application.lock();
        let state = &mut *state;
        if let Some(invitation) = invitation.as_ref().and_then(|id| state.invitations.get_mut(id)) {
            invitation.state = "Failed";
        }
        if let Some(invitation) = invitation.as_ref().and_then(|id| state.invitations.get(id)) {
            let completed = invitation.event(&application, EventKind::Completed, Some(reason));
            let completed = completed.status(Status::Failure);
            let completed =
                maybe_embedded(server, completed, invitation.resource(&application, state, false));
            state.channel.push(completed);
            if invitation.rel == "messagingInvitation"
                && let Some(leg) = state.legs.get_mut(&leg)
                && leg.messaging == "Connecting"
            {
                leg.messaging = "Disconnected";
                let event = leg.messaging_event(&application).reason(Some(reason));
                let event = maybe_embedded(server, event, leg.messaging_resource(&application));
                state.channel.push(event);
            }
        }
        if seat == call.to && !hub.seats[seat].present {
            end_leg(server, &application, state, &leg, None);
            hub.seats[seat].place = Place::Nowhere;
        }
    }
}

/// Ends an application's view of a conversation. What it was told by links only stays readable for a while.
fn end_leg(
    server: &Arc<Server>,
    application: &Arc<Application>,
    state: &mut ApplicationState,
    id: &str,
    reason: Option<Reason>,
) {
    let Some(leg) = state.legs.get_mut(id).filter(|leg| !leg.ended) else { return };
    leg.ended = true;
    leg.state = "Disconnected";
    let was_open = leg.messaging == "Connected";
    leg.messaging = "Disconnected";
    let mut events = Vec::new();
    // Any step can be missing but the last.
    if was_open && server.dice.chance(0.8) {
        let event = leg.messaging_event(application).reason(reason);
        let resource = Resource::new("messaging", leg.messaging_href(application))
            .property("state", "Disconnected")
            .link("conversation", leg.href(application));
        events.push(maybe_embedded(server, event, resource));
    }
    events.push(leg.conversation_event(application, EventKind::Deleted));
    for event in events {
        state.channel.push(event);
    }
    let (application, id) = (Arc::clone(application), id.to_owned());
    server.timers.after(server.settings.message_fetch_limit, move |_| {
        let mut state = application.lock();
        state.legs.remove(&id);
        state.invitations.retain(|_, invitation| invitation.leg != id);
    });
}

/// Ends the conversation for everybody who is still in it.
pub(crate) fn close(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    hub: &mut Hub,
    reason: Option<Reason>,
) {
    for call in std::mem::take(&mut hub.calls) {
        end_call(server, hub, &call, CANCELED_HERE, CANCELED);
    }
    for seat in &hub.seats {
        if let Place::Application { application, leg } = &seat.place {
            end_leg(server, application, &mut application.lock(), leg, reason);
        }
    }
    conversation_log::deliver_later(server, &conversation.id, hub);
    // Frees the applications, which the seats would hold on to otherwise.
    hub.seats.clear();
    conversation.phase.send_replace(ConversationPhase::Ended);
    let mut conversations = server.conversations.write().unwrap_or_else(PoisonError::into_inner);
    conversations.remove(&conversation.id);
}

/// A member leaves; where too few remain, the conversation ends.
pub(crate) fn depart(server: &Arc<Server>, conversation: &Arc<Conversation>, seat: usize) {
    let mut guard = conversation.hub();
    let hub = &mut *guard;
    if seat >= hub.seats.len() || !hub.seats[seat].present {
        return;
    }
    // Whoever it was calling, or whoever was calling it alone, is told first.
    let own: Vec<u64> = hub.calls.iter().filter(|call| call.from == seat).map(|call| call.number).collect();
    for number in own {
        if let Some(call) = hub.take_call(number) {
            end_call(server, hub, &call, CANCELED_HERE, CANCELED);
        }
    }
    hub.seats[seat].present = false;
    let Seat { uri, .. } = hub.seats[seat].clone();
    if let Place::Application { application, leg } = hub.seats[seat].place.clone() {
        end_leg(server, &application, &mut application.lock(), &leg, None);
    }
    let others = hub.others_present(seat);
    for index in &others {
        let Place::Application { application, leg } = &hub.seats[*index].place else { continue };
        let mut state = application.lock();
        let state = &mut *state;
        let Some(leg) = state.legs.get_mut(leg) else { continue };
        let Some(member) = leg.members.iter_mut().find(|member| member.uri == uri && member.present) else {
            continue;
        };
        member.present = false;
        let member = member.clone();
        let event = leg.participant_event(application, EventKind::Deleted, &member);
        state.channel.push(event);
    }
    if others.len() < 2 || hub.is_forsaken() {
        close(server, conversation, hub, Some(ENDED));
    }
}

/// Called when an application has ended: its member is gone without a word.
pub(crate) fn application_left(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    application: &Arc<Application>,
) {
    let (seat, ringing) = {
        let hub = conversation.hub();
        let Some(seat) = hub.seat_of_application(application) else { return };
        let ringing: Vec<u64> =
            hub.calls.iter().filter(|call| call.to == seat).map(|call| call.number).collect();
        (seat, ringing)
    };
    for number in ringing {
        fail(server, conversation, number, UNAVAILABLE, MISSED);
    }
    depart(server, conversation, seat);
}

// ---- Saying something ----

/// What came of saying something.
pub(crate) struct Said {
    /// The ledger serials of what was delivered to accounts.
    pub(crate) serials: Vec<u64>,
}

/// A scripted correspondent writes. `None` if it is not in the conversation, or nobody can be written to.
pub(crate) fn say(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    seat: usize,
    text: &Text,
) -> Option<Said> {
    let mut hub = conversation.hub();
    let present = hub.seats.get(seat).is_some_and(|seat| seat.present);
    if !present || conversation.phase() != ConversationPhase::Connected || hub.messaging_closed {
        return None;
    }
    Some(Said { serials: deliver(server, conversation, &mut hub, seat, text, None) })
}

/// Brings a text to everybody else in the conversation.
pub(crate) fn deliver(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    hub: &mut Hub,
    from: usize,
    text: &Text,
    tracker: Option<&Arc<Tracker>>,
) -> Vec<u64> {
    let mut serials = Vec::new();
    let time = Timestamp::now();
    let writer_uri = hub.seats[from].uri.clone();
    let own =
        Line { from: &writer_uri, text: text.clone(), time, serial: tracker.map(|tracker| tracker.serial) };
    hub.note(server, &writer_uri, false, true, own);
    for index in hub.others_present(from) {
        let receipt = tracker
            .map(|tracker| Receipt { tracker: Arc::clone(tracker), reader: hub.seats[index].uri.clone() });
        match hub.seats[index].place.clone() {
            Place::Nowhere => {}
            Place::Script(script) => {
                let reader = hub.seats[index].uri.clone();
                let line = Line { from: &writer_uri, text: text.clone(), time, serial: None };
                hub.note(server, &reader, true, true, line);
                // Correspondents answer accounts only; among themselves they would never end.
                if matches!(hub.seats[from].place, Place::Application { .. }) {
                    correspondent::react(server, conversation, index, script, text);
                }
                if let Some(receipt) = receipt {
                    receipt.settle(server, script.hears());
                }
            }
            Place::Application { application, leg } => {
                let writer = hub.member(server, from);
                let entry = IncomingEntry {
                    serial: 0,
                    account: application.account.uri.clone(),
                    correspondent: writer.uri.clone(),
                    conversation: conversation.id.clone(),
                    thread_id: hub.thread_id.clone(),
                    application: application.id.clone(),
                    text: None,
                    html: None,
                    time,
                    kind: MessageKind::Message,
                    state: IncomingState::Pending,
                    package_acknowledged: false,
                    packaged_at: None,
                    acknowledged_at: None,
                };
                let html = application.lock().legs.get(&leg).is_some_and(|leg| leg.html);
                match deliver_to(server, &application, &leg, &writer, text, entry, receipt) {
                    Ok(serial) => {
                        let text = text.read_by(html);
                        let line = Line { from: &writer_uri, text, time, serial: Some(serial) };
                        hub.note(server, &application.account.uri, true, true, line);
                        serials.push(serial);
                    }
                    Err(Some(receipt)) => receipt.settle(server, false),
                    Err(None) => {}
                }
            }
        }
    }
    serials
}

/// Puts a message into an application's channel. Gives the receipt back if it cannot.
fn deliver_to(
    server: &Arc<Server>,
    application: &Arc<Application>,
    leg: &str,
    writer: &Member,
    text: &Text,
    entry: IncomingEntry,
    receipt: Option<Receipt>,
) -> Result<u64, Option<Receipt>> {
    let serial = {
        let mut state = application.lock();
        let state = &mut *state;
        let Some(leg) = state.legs.get_mut(leg).filter(|leg| !leg.ended && leg.messaging == "Connected")
        else {
            return Err(receipt);
        };
        let text = text.read_by(leg.html);
        let serial = server.ledger.add_incoming(IncomingEntry {
            text: text.plain.clone(),
            html: text.html.clone(),
            ..entry
        });
        let message = Message {
            number: leg.next_message(),
            incoming_from: Some(writer.clone()),
            plain: text.plain,
            html: text.html,
            data_uri: text.data_uri,
            time_stamp: text.time_stamp,
            time: entry.time,
            operation_id: None,
            status: "Pending",
            failed: Vec::new(),
        };
        let mut delivery = Delivery { serial, receipt, expires: true };
        if server.dice.chance(server.now().started_share) {
            // The reference tells of this first event; captures have only the second.
            let event = leg.message_event(application, EventKind::Started, message.number);
            let resource = leg.message_resource(server, application, &message, true);
            state.channel.push(event.resource(resource).delivery(delivery.clone()));
            delivery.receipt = None;
        }
        let message = Message { status: "Succeeded", ..message };
        let event =
            leg.message_event(application, EventKind::Completed, message.number).status(Status::Success);
        let resource = leg.message_resource(server, application, &message, false);
        let event = maybe_embedded(server, event, resource).delivery(delivery);
        leg.keep(message);
        state.channel.push(event);
        serial
    };
    let application = Arc::clone(application);
    server.timers.after(server.settings.message_fetch_limit, move |server| {
        let taken = application.lock().channel.take_unfetched(serial);
        if taken.is_empty() {
            return;
        }
        server.ledger.expire(serial);
        for receipt in taken.into_iter().filter_map(|delivery| delivery.receipt) {
            receipt.settle(server, false);
        }
    });
    Ok(serial)
}

/// Shows everybody else that a member types, or has stopped to.
pub(crate) fn show_typing(conversation: &Arc<Conversation>, seat: usize, begins: bool) {
    let hub = conversation.hub();
    let Some(uri) = hub.seats.get(seat).filter(|seat| seat.present).map(|seat| seat.uri.clone()) else {
        return;
    };
    for index in hub.others_present(seat) {
        let Place::Application { application, leg } = &hub.seats[index].place else { continue };
        let mut state = application.lock();
        let Some(leg) = state.legs.get(leg).filter(|leg| leg.messaging == "Connected") else { continue };
        let Some(member) = leg.member(&uri).cloned() else { continue };
        let kind = if begins { EventKind::Added } else { EventKind::Deleted };
        let event = leg.typing_event(application, kind, &member);
        state.channel.push(event);
    }
}

/// Closes the messaging of a conversation that goes on, as desktop clients do when it was idle for long.
pub(crate) fn close_messaging(server: &Arc<Server>, conversation: &Arc<Conversation>) -> bool {
    let mut hub = conversation.hub();
    if conversation.phase() != ConversationPhase::Connected {
        return false;
    }
    hub.messaging_closed = true;
    for seat in hub.seats.iter().filter(|seat| seat.present) {
        let Place::Application { application, leg } = &seat.place else { continue };
        let mut state = application.lock();
        let state = &mut *state;
        let Some(leg) = state.legs.get_mut(leg) else { continue };
        leg.messaging = "Disconnected";
        let event = leg.messaging_event(application).reason(Some(ENDED));
        let event = maybe_embedded(server, event, leg.messaging_resource(application));
        state.channel.push(event);
        let event = leg.conversation_event(application, EventKind::Updated);
        let event = maybe_embedded(server, event, leg.conversation_resource(application));
        state.channel.push(event);
    }
    true
}
