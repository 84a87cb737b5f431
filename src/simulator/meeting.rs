//! Online meetings: a conversation of many to which an account is invited, and who comes and goes in it.
//!
//! Accepting the `onlineMeetingInvitation` joins the meeting but not its messaging, which each application adds for
//! itself. With a lobby, whoever accepts waits until they are admitted or denied. A conversation of two becomes a
//! conference when a third correspondent joins it. An account may start a meeting of its own (`startOnlineMeeting`), in
//! which it is alone until it brings others in.

use std::sync::Arc;

use super::{
    application::{Account, Application, ApplicationState, display_name, uuid_of},
    conversation::{self, Conversation, ConversationPhase, Hub, Place, Seat, TOO_MANY, maybe_embedded},
    correspondent::Script,
    event_channel::{EventKind, Status},
    leg::{Direction, Invitation, Leg, Member, participant_resource},
    payload::{Failure, Link, Reason, Resource},
    server::Server,
};

const DENIED: Reason =
    Reason { code: "RemoteFailure", subcode: "Denied", message: "The organizer denied the admission." };

/// What sets a meeting apart from other conversations.
#[derive(Debug, Default)]
pub(crate) struct Meeting {
    /// Whether whoever accepts has to wait.
    lobby: bool,
    /// The call of whoever waits.
    waiting: Option<u64>,
}

impl Hub {
    /// Whether it is a meeting that nobody is in, or called to, who is not scripted.
    pub(crate) fn is_forsaken(&self) -> bool {
        let application = |seat: &Seat| seat.present && matches!(seat.place, Place::Application { .. });
        self.meeting.is_some() && self.calls.is_empty() && !self.seats.iter().any(application)
    }
}

/// Starts a meeting of scripted correspondents that the first invites an account to. Gives nothing if the account
/// takes no messages.
pub(crate) fn invite(
    server: &Arc<Server>,
    from: &str,
    to: &str,
    others: &[String],
    subject: &str,
    lobby: bool,
    thread_id: Option<String>,
) -> Option<Arc<Conversation>> {
    server.accounts.get(to)?.reachable()?;
    let seat = |uri: &str| Seat {
        uri: uri.to_owned(),
        name: display_name(uri),
        place: Place::Script(Script::of(uri)),
        present: true,
    };
    let thread_id = thread_id.unwrap_or_else(|| format!("Ac{}+/==", &server.dice.hex()[..24]));
    let conversation =
        Conversation::open(server, seat(from), thread_id, subject.to_owned(), "Normal".to_owned());
    let number = {
        let mut hub = conversation.hub();
        hub.conference = true;
        hub.meeting = Some(Meeting { lobby, waiting: None });
        for other in others {
            let index = hub.seat_of(other);
            hub.seats[index] = seat(other);
        }
        let callee = hub.seat_of(to);
        hub.begin_call(0, callee, None).number
    };
    conversation::ring(server, &conversation, number);
    Some(conversation)
}

/// An application starts a meeting and is in it at once; its events come when it is [`announce`]d. Gives the
/// conversation, the leg, and the invitation's id and address.
pub(crate) fn start(
    server: &Server,
    application: &Arc<Application>,
    operation_id: Option<String>,
    thread_id: String,
    subject: String,
    importance: String,
) -> Result<Started, Failure> {
    let Account { uri, name, .. } = &*application.account;
    let leg_id = uuid_of(server);
    let seat = Seat {
        uri: uri.clone(),
        name: name.clone(),
        place: Place::Application { application: Arc::clone(application), leg: leg_id.clone() },
        present: true,
    };
    let conversation = Conversation::open(server, seat, thread_id, subject, importance);
    let mut hub = conversation.hub();
    hub.conference = true;
    hub.meeting = Some(Meeting::default());
    let organizer = Member { uri: uri.clone(), name: name.clone(), title: name.clone(), present: true };
    let invitation = Invitation {
        rel: "onlineMeetingInvitation",
        id: server.dice.hex(),
        direction: Direction::Outgoing,
        state: "Connecting",
        leg: leg_id.clone(),
        // Nobody is called.
        call: 0,
        operation_id,
        thread_id: hub.thread_id.clone(),
        subject: hub.subject.clone(),
        importance: hub.importance.clone(),
        message: None,
        from: organizer,
        to: uri.clone(),
        accepted_by: None,
        derived: None,
    };
    let (id, location) = (invitation.id.clone(), invitation.href(application));
    {
        let mut state = application.lock();
        state.alive()?;
        let mut leg = conversation::new_leg(&conversation, &hub, leg_id.clone(), "Conferencing");
        leg.messaging = "Disconnected";
        state.legs.insert(leg_id.clone(), leg);
        state.invitations.insert(id.clone(), invitation);
    }
    conversation.phase.send_replace(ConversationPhase::Connected);
    drop(hub);
    Ok(Started { application: Arc::clone(application), conversation, leg: leg_id, invitation: id, location })
}

/// A meeting that an application has started.
pub(crate) struct Started {
    application: Arc<Application>,
    conversation: Arc<Conversation>,
    leg: String,
    invitation: String,
    /// The invitation's address.
    pub(crate) location: String,
}

/// Tells the application that its meeting has begun, and that it is in it; or that it has too many conversations.
pub(crate) fn announce(server: &Arc<Server>, started: &Started) {
    let Started { application, leg, invitation, .. } = started;
    {
        let mut state = application.lock();
        let state = &mut *state;
        let (Some(shown), Some(invitation)) = (state.legs.get(leg), state.invitations.get(invitation)) else {
            return;
        };
        let begun = invitation.event(application, EventKind::Started, None);
        let begun = maybe_embedded(server, begun, invitation.resource(application, state, true));
        let added = shown.conversation_event(application, EventKind::Added);
        let added = maybe_embedded(server, added, shown.conversation_resource(application));
        for event in [begun, added] {
            state.channel.push(event);
        }
    }
    if conversation::is_crowded(server, &started.conversation) {
        refuse(server, started);
        return;
    }
    show_meeting(server, application, leg, Some(invitation), Vec::new());
}

/// Ends a meeting that its application may not have.
fn refuse(server: &Arc<Server>, started: &Started) {
    let Started { application, conversation, invitation, .. } = started;
    let mut hub = conversation.hub();
    {
        let mut state = application.lock();
        let state = &mut *state;
        let Some(invitation) = state.invitations.get_mut(invitation) else { return };
        invitation.state = "Failed";
        let failed = invitation.clone();
        let completed =
            failed.event(application, EventKind::Completed, Some(TOO_MANY)).status(Status::Failure);
        let resource = failed.resource(application, state, false);
        state.channel.push(maybe_embedded(server, completed, resource));
    }
    conversation::close(server, conversation, &mut hub, None);
}

/// Whether somebody waits in the lobby.
pub(crate) fn somebody_waits(conversation: &Conversation) -> bool {
    conversation.hub().meeting.as_ref().is_some_and(|meeting| meeting.waiting.is_some())
}

/// Carries out an acceptance if it joins a meeting; gives nothing if it does not.
pub(crate) fn join(
    server: &Arc<Server>,
    conversation: &Conversation,
    hub: &mut Hub,
    number: u64,
) -> Option<bool> {
    let to = hub.calls.iter().find(|call| call.number == number)?.to;
    let Place::Application { application, leg } = hub.seats[to].place.clone() else { return None };
    if hub.seats[to].present {
        return None;
    }
    let meeting = hub.meeting.as_mut()?;
    if meeting.lobby {
        if meeting.waiting.replace(number).is_none() {
            let mut state = application.lock();
            let state = &mut *state;
            let Some(leg) = state.legs.get_mut(&leg) else { return Some(false) };
            leg.state = "InLobby";
            let event = leg.conversation_event(&application, EventKind::Updated);
            let resource = leg.conversation_resource(&application);
            state.channel.push(event.resource(resource));
        }
        return Some(true);
    }
    meeting.waiting = None;
    let call = hub.take_call(number)?;
    hub.seats[to].present = true;
    conversation.phase.send_replace(ConversationPhase::Connected);
    let others: Vec<Member> =
        hub.others_present(to).into_iter().map(|index| hub.member(server, index)).collect();
    show_meeting(server, &application, &leg, call.callee_invitation.as_ref(), others);
    let joiner = hub.member(server, to);
    for index in hub.others_present(to) {
        if let Place::Application { application, leg } = &hub.seats[index].place {
            show_joiner(server, application, leg, &joiner);
            if index == call.from {
                complete(server, application, &mut application.lock(), call.caller_invitation.as_ref());
            }
        }
    }
    Some(true)
}

/// Shows an application that it has joined, and who is there.
fn show_meeting(
    server: &Server,
    application: &Application,
    leg: &str,
    own: Option<&String>,
    others: Vec<Member>,
) {
    let mut state = application.lock();
    let state = &mut *state;
    let Some(leg) = state.legs.get_mut(leg) else { return };
    let mut events = Vec::new();
    leg.state = "Conferencing";
    let conferencing = leg.conversation_event(application, EventKind::Updated);
    events.push(conferencing.resource(leg.conversation_resource(application)));
    leg.state = "Conferenced";
    events.push(leg.local_participant_event(application));
    for member in others {
        if leg.member(&member.uri).is_none() {
            events.push(leg.participant_event(application, EventKind::Added, &member));
            leg.members.push(member);
        }
    }
    let organizer = leg.members.first().cloned();
    leg.leaders = organizer.iter().map(|member| member.uri.clone()).collect();
    for member in &leg.members {
        let list = if leg.leaders.contains(&member.uri) { "leaders" } else { "attendees" };
        let place = Link::new(list, format!("{}/{list}", leg.href(application)));
        events.push(leg.participant_event(application, EventKind::Added, member).within(place));
    }
    events.extend(leg.participant_messaging_events(application));
    let conversation = leg.conversation_event(application, EventKind::Updated);
    events.push(maybe_embedded(server, conversation, leg.conversation_resource(application)));
    let messaging = leg.messaging_event(application);
    events.push(maybe_embedded(server, messaging, leg.messaging_resource(application)));
    for event in events {
        state.channel.push(event);
    }
    complete(server, application, state, own);
}

/// An invitation has come to what it was for.
fn complete(server: &Server, application: &Application, state: &mut ApplicationState, own: Option<&String>) {
    if let Some(invitation) = own.and_then(|id| state.invitations.get_mut(id)) {
        invitation.state = "Connected";
    }
    if let Some(invitation) = own.and_then(|id| state.invitations.get(id)) {
        let completed = invitation.event(application, EventKind::Completed, None).status(Status::Success);
        let resource = invitation.resource(application, state, false);
        state.channel.push(maybe_embedded(server, completed, resource));
    }
}

/// Shows an application that somebody has joined the meeting; its own messaging is left alone.
pub(crate) fn show_joiner(server: &Server, application: &Application, leg: &str, joiner: &Member) {
    let mut state = application.lock();
    let state = &mut *state;
    let Some(leg) = state.legs.get_mut(leg).filter(|leg| !leg.ended) else { return };
    if joiner.uri == application.account.uri || leg.member(&joiner.uri).is_some_and(|member| member.present) {
        return;
    }
    leg.members.retain(|member| member.uri != joiner.uri);
    leg.members.push(joiner.clone());
    let added = leg.participant_event(application, EventKind::Added, joiner);
    let resource = participant_resource(application, &leg.id, &joiner.uri, &joiner.name);
    let list = Link::new("attendees", format!("{}/attendees", leg.href(application)));
    let attends = leg.participant_event(application, EventKind::Added, joiner).within(list);
    state.channel.push(if server.dice.chance(0.8) { added } else { added.resource(resource) });
    state.channel.push(attends);
}

/// The applications that are in a conference see somebody come into its lobby, or go from there. False if none is in
/// it, or somebody is there who should not be, or the other way round.
fn change_lobby(server: &Server, conversation: &Conversation, who: &str, comes: bool) -> bool {
    let hub = conversation.hub();
    let mut shown = false;
    for seat in hub.seats.iter().filter(|seat| seat.present) {
        let Place::Application { application, leg } = &seat.place else { continue };
        let mut state = application.lock();
        let state = &mut *state;
        let Some(leg) = state.legs.get_mut(leg).filter(|leg| leg.state == "Conferenced") else { continue };
        let waits = leg.lobby.iter().position(|member| member.uri == who);
        let present = leg.member(who).is_some_and(|member| member.present);
        let list = Link::new("lobby", format!("{}/lobby", leg.href(application)));
        let event = match (comes, waits) {
            (true, None) if !present => {
                let name = display_name(who);
                let title = if server.dice.chance(0.25) { String::new() } else { name.clone() };
                let member = Member { uri: who.to_owned(), name, title, present: false };
                let event = leg.participant_event(application, EventKind::Added, &member);
                leg.lobby.push(member);
                event
            }
            (false, Some(index)) => {
                let member = leg.lobby.remove(index);
                leg.participant_event(application, EventKind::Deleted, &member)
            }
            _ => continue,
        };
        shown = true;
        state.channel.push(event.within(list));
    }
    shown
}

/// A scripted correspondent comes into the lobby of a conference. False if nobody sees it.
pub(crate) fn wait_in_lobby(server: &Server, conversation: &Conversation, who: &str) -> bool {
    change_lobby(server, conversation, who, true)
}

/// Lets a correspondent who waits in the lobby in, or turns them away. False if they do not wait.
pub(crate) fn settle_visitor(
    server: &Arc<Server>,
    conversation: &Arc<Conversation>,
    who: &str,
    admit: bool,
) -> bool {
    change_lobby(server, conversation, who, false) && (!admit || bring(server, conversation, who))
}

/// Lets whoever waits in the lobby in, or turns them away. False if nobody waits.
pub(crate) fn settle_lobby(server: &Arc<Server>, conversation: &Arc<Conversation>, admit: bool) -> bool {
    let number = {
        let mut hub = conversation.hub();
        let Some(meeting) = &mut hub.meeting else { return false };
        let Some(number) = meeting.waiting.take() else { return false };
        meeting.lobby = false;
        number
    };
    if admit {
        return conversation::accept(server, conversation, number);
    }
    conversation::fail(server, conversation, number, DENIED, DENIED);
    true
}

/// A scripted correspondent joins a conversation that is connected. False if it is not, or they are there already.
pub(crate) fn bring(server: &Arc<Server>, conversation: &Arc<Conversation>, who: &str) -> bool {
    if conversation.phase() != ConversationPhase::Connected {
        return false;
    }
    let number = {
        let mut hub = conversation.hub();
        let is_host = |seat: &Seat| seat.present && matches!(seat.place, Place::Script(_));
        let Some(host) = hub.seats.iter().position(is_host) else {
            return false;
        };
        let seat = hub.seat_of(who);
        if hub.seats[seat].present {
            return false;
        }
        hub.seats[seat].place = Place::Script(Script::of(who));
        hub.begin_call(host, seat, None).number
    };
    conversation::accept(server, conversation, number)
}

/// Somebody becomes a leader of the meeting, or an attendee. False if they are not there.
pub(crate) fn change_role(conversation: &Conversation, who: &str, leader: bool) -> bool {
    let hub = conversation.hub();
    let mut shown = false;
    for seat in hub.seats.iter().filter(|seat| seat.present) {
        let Place::Application { application, leg } = &seat.place else { continue };
        let mut state = application.lock();
        let state = &mut *state;
        let Some(leg) = state.legs.get_mut(leg).filter(|leg| leg.state == "Conferenced") else { continue };
        let Some(member) = leg.member(who).filter(|member| member.present).cloned() else { continue };
        shown = true;
        leg.leaders.retain(|uri| uri != who);
        if leader {
            leg.leaders.push(who.to_owned());
        }
        let list = |name: &'static str| Link::new(name, format!("{}/{name}", leg.href(application)));
        let (left, joined) = if leader { ("attendees", "leaders") } else { ("leaders", "attendees") };
        let event = |kind| leg.participant_event(application, kind, &member);
        for event in [
            event(EventKind::Updated),
            event(EventKind::Deleted).within(list(left)),
            event(EventKind::Added).within(list(joined)),
        ] {
            state.channel.push(event);
        }
    }
    shown
}

/// Those of a meeting who lead it, attend it, or wait.
pub(crate) fn role_list(application: &Application, leg: &Leg, list: &str) -> Resource {
    let rel = match list {
        "leaders" => "leaders",
        "attendees" => "attendees",
        _ => "lobby",
    };
    let members: Vec<&Member> = if rel == "lobby" {
        leg.lobby.iter().collect()
    } else {
        let present = leg.members.iter().filter(|member| member.present);
        present.filter(|member| leg.leaders.contains(&member.uri) == (rel == "leaders")).collect()
    };
    let links = members.into_iter().map(|member| leg.participant_link(application, "participant", member));
    Resource::new(rel, format!("{}/{rel}", leg.href(application))).list_links(links)
}
