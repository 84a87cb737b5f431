//! The requests about conversations: invitations, messaging, messages and participants, as a client sends them.
//!
//! Reads and checks what was asked, and hands it to [`conversation`](super::conversation), which does it.

use std::{
    sync::{Arc, Mutex, atomic::AtomicUsize},
    time::Duration,
};

use hyper::{Method, StatusCode, header};
use jiff::Timestamp;

use super::{
    application::{Application, uuid_of},
    conversation::{
        CANCELED, CANCELED_HERE, Conversation, ConversationPhase, DECLINED, DECLINED_HERE,
        EVENTS_AFTER_ANSWER, Invite, Place, Seat, Text, Tracker, accept, announce, deliver, depart, fail,
        new_leg, place_call, show_typing,
    },
    correspondent,
    fault::{FaultKind, Faults, Operation},
    ledger::{MessageKind, OutgoingEntry, OutgoingState},
    leg::{Direction, Leg, Message, participant_resource},
    meeting,
    payload::{Failure, Input, Link, Resource, decode_data_uri},
    server::{Exchange, Outcome, Reply, Server, created, no_content},
};

/// How long an answer is held back when its events come first.
const ANSWER_AFTER_EVENTS: Duration = Duration::from_millis(40);

/// A SIP URI as this server spells it, without parameters.
pub(crate) fn sip_uri(text: &str) -> Result<String, Failure> {
    let problem = || Failure::parameter("to", "The value is not a SIP URI.");
    let lower = text.trim().to_lowercase();
    let address = lower.strip_prefix("sip:").ok_or_else(problem)?;
    let address = address.split([';', '?']).next().unwrap_or_default();
    let (user, host) = address.split_once('@').ok_or_else(problem)?;
    if user.is_empty() || host.is_empty() || address.contains(char::is_whitespace) {
        return Err(problem());
    }
    Ok(format!("sip:{address}"))
}

pub(crate) fn destination_not_found() -> Failure {
    Failure::new(StatusCode::NOT_FOUND, "DestinationNotFound", "There is no such person.")
}

/// The first message of an invitation, from its `message`.
fn first_message(server: &Server, input: &Input) -> Result<Option<Text>, Failure> {
    let Some(uri) = input.link_or_text("message") else { return Ok(None) };
    let Some((media_type, text)) = decode_data_uri(uri) else {
        return Err(Failure::parameter("message", "The value is not a data URI."));
    };
    if text.len() > server.settings.max_message_bytes {
        return Err(too_large());
    }
    match media_type.as_str() {
        "text/plain" => Ok(Some(Text { plain: Some(text), ..Text::default() })),
        "text/html" => Ok(Some(Text { html: Some(text), ..Text::default() })),
        _ => Err(Failure::parameter("message", "The value is neither plain text nor HTML.")),
    }
}

fn too_large() -> Failure {
    Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "None", "The message is too long.")
}

fn events_come_early(server: &Server, application: &Application, operation: Operation) -> bool {
    let early = |kind: &FaultKind| *kind == FaultKind::EarlyEvents;
    Faults::claim_within(server, &application.account, operation, early).is_some()
        || server.dice.chance(server.now().early_event_share)
}

/// Lets an operation's events come after its answer, or before it in the share that the settings ask for.
async fn answer_around(
    server: &Arc<Server>,
    application: &Application,
    operation: Operation,
    answer: Reply,
    events: impl FnOnce(&Arc<Server>) + Send + 'static,
) -> Reply {
    if events_come_early(server, application, operation) {
        events(server);
        tokio::time::sleep(ANSWER_AFTER_EVENTS).await;
    } else {
        server.timers.after_scripted(EVENTS_AFTER_ANSWER, events);
    }
    answer
}

/// `communication/messagingInvitations` and what is below it.
pub(crate) async fn messaging_invitations(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    match path {
        [] => start_messaging(server, application, exchange).await,
        [id] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            let invitation = state.invitations.get(*id).ok_or_else(Failure::not_found)?;
            Ok(exchange.resource(StatusCode::OK, &invitation.resource(application, &state, true)))
        }
        [id, verb @ ("accept" | "decline" | "cancel")] => {
            exchange.only(&Method::POST)?;
            let input = Input::read(&exchange.headers, &exchange.body)?;
            let (conversation, call, direction) = {
                let state = application.lock();
                let invitation = state.invitations.get(*id).ok_or_else(Failure::not_found)?;
                let leg = state.leg(&invitation.leg)?;
                if invitation.state != "Connecting" {
                    return Err(Failure::conflict("None", "The invitation is settled."));
                }
                (Arc::clone(&leg.conversation), invitation.call, invitation.direction)
            };
            match (*verb, direction) {
                ("accept", Direction::Incoming) => {
                    if !accept(server, &conversation, call) {
                        return Err(Failure::conflict("None", "The invitation is settled."));
                    }
                }
                ("decline", Direction::Incoming) => {
                    let reason = input.text("reason").unwrap_or("Local");
                    if !["Local", "Global"].iter().any(|known| known.eq_ignore_ascii_case(reason)) {
                        return Err(Failure::parameter("reason", "The value must be Local or Global."));
                    }
                    fail(server, &conversation, call, DECLINED, DECLINED_HERE);
                }
                ("cancel", Direction::Outgoing) => fail(server, &conversation, call, CANCELED_HERE, CANCELED),
                _ => return Err(Failure::not_found()),
            }
            Ok(no_content())
        }
        _ => Err(Failure::not_found()),
    }
}

/// The importance that a new conversation is to have.
fn importance(input: &Input) -> Result<&'static str, Failure> {
    let importance = input.text("importance").unwrap_or("Normal");
    ["Normal", "Urgent", "Emergency"]
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(importance))
        .ok_or_else(|| Failure::parameter("importance", "The value is not an importance."))
}

/// `startOnlineMeeting`: a meeting of nobody yet, which an existing thread may go on in. Other meetings can't be joined
/// here.
pub(crate) async fn start_online_meeting(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
) -> Outcome {
    exchange.only(&Method::POST)?;
    if exchange.query("onlineMeetingUri") != Some("adhoc") {
        return Err(Failure::not_found());
    }
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let operation_id = input.optional("operationId", 50)?.map(str::to_owned);
    let importance = importance(&input)?.to_owned();
    let subject = input.optional("subject", 250)?.unwrap_or_default().to_owned();
    let thread_id = input.optional("threadId", 250)?.map_or_else(|| server.dice.hex(), str::to_owned);
    let started = meeting::start(server, application, operation_id, thread_id, subject, importance)?;
    let answer = created(&started.location);
    let events = move |server: &Arc<Server>| meeting::announce(server, &started);
    Ok(answer_around(server, application, Operation::StartOnlineMeeting, answer, events).await)
}

async fn start_messaging(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
) -> Outcome {
    exchange.only(&Method::POST)?;
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let operation_id = input.optional("operationId", 50)?.map(str::to_owned);
    let to = sip_uri(input.required("to", 1000)?)?;
    let importance = importance(&input)?;
    let subject = input.optional("subject", 250)?.unwrap_or_default().to_owned();
    let thread_id = input.optional("threadId", 250)?.map(str::to_owned);
    let text = first_message(server, &input)?;
    if correspondent::is_missing(&to) {
        return Err(destination_not_found());
    }
    if to == application.account.uri {
        return Err(Failure::new(StatusCode::FORBIDDEN, "None", "Nobody can call themselves."));
    }
    if let Some(thread_id) = &thread_id {
        let state = application.lock();
        let taken = state
            .legs
            .values()
            .any(|leg| !leg.ended && leg.thread_id == *thread_id && leg.member(&to).is_some());
        if taken {
            return Err(Failure::conflict("ThreadIdAlreadyExists", "A conversation of this thread is open."));
        }
    }
    let thread_id = thread_id.unwrap_or_else(|| server.dice.hex());
    let leg_id = uuid_of(server);
    let seat = Seat {
        uri: application.account.uri.clone(),
        name: application.account.name.clone(),
        place: Place::Application { application: Arc::clone(application), leg: leg_id.clone() },
        present: true,
    };
    let conversation = Conversation::open(server, seat, thread_id, subject, importance.to_owned());
    let (number, location) = {
        let mut hub = conversation.hub();
        {
            let mut state = application.lock();
            state.alive()?;
            let leg = new_leg(&conversation, &hub, leg_id.clone(), "Connecting");
            state.legs.insert(leg_id, leg);
        }
        let invite = Invite { rel: "messagingInvitation", operation_id, to, text };
        place_call(server, &conversation, &mut hub, 0, invite)?
    };
    let events = move |server: &Arc<Server>| announce(server, &conversation, number, true);
    Ok(answer_around(server, application, Operation::StartMessaging, created(&location), events).await)
}

/// `communication/conversations` and what is below it.
pub(crate) async fn conversations(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    let base = format!("{}/communication/conversations", application.href());
    match path {
        [] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            let links = state.legs.values().filter(|leg| !leg.ended);
            let links = links.map(|leg| Link::new("conversation", leg.href(application)));
            let query = exchange.raw_query.as_ref().map_or(String::new(), |query| format!("?{query}"));
            let resource = Resource::new("conversations", format!("{base}{query}")).list_links(links);
            Ok(exchange.resource(StatusCode::OK, &resource))
        }
        [id] => match exchange.method {
            Method::GET => {
                let state = application.lock();
                Ok(exchange.resource(StatusCode::OK, &state.leg(id)?.conversation_resource(application)))
            }
            Method::DELETE => {
                hang_up(server, application, id)?;
                Ok(no_content())
            }
            _ => Err(Failure::method_not_allowed("GET, DELETE")),
        },
        [id, list @ ("attendees" | "leaders" | "lobby")] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            Ok(exchange.resource(StatusCode::OK, &meeting::role_list(application, state.leg(id)?, list)))
        }
        [id, "participants", rest @ ..] => participants(application, exchange, id, rest),
        [id, messaging, rest @ ..] if messaging.starts_with("messaging") => {
            {
                let state = application.lock();
                let leg = state.legs.get(*id).ok_or_else(Failure::conversation_not_found)?;
                // A message stays readable under the address that it had.
                if leg.messaging_segment() != *messaging && !matches!(rest, ["messages", _]) {
                    return Err(Failure::not_found());
                }
            }
            messaging_below(server, application, exchange, id, rest).await
        }
        _ => Err(Failure::not_found()),
    }
}

/// The user leaves a conversation, declines it or withdraws from it, whichever its state makes of it.
fn hang_up(server: &Arc<Server>, application: &Arc<Application>, leg: &str) -> Result<(), Failure> {
    let conversation = Arc::clone(&application.lock().leg(leg)?.conversation);
    let (seat, present, incoming_call, outgoing_call) = {
        let hub = conversation.hub();
        let seat = hub.seat_of_application(application).ok_or_else(Failure::conversation_not_found)?;
        let incoming = hub.calls.iter().find(|call| call.to == seat).map(|call| call.number);
        let outgoing = hub.calls.iter().find(|call| call.from == seat).map(|call| call.number);
        (seat, hub.seats[seat].present, incoming, outgoing)
    };
    match (incoming_call, outgoing_call) {
        (Some(call), _) if !present => fail(server, &conversation, call, DECLINED, DECLINED_HERE),
        (_, Some(call)) if conversation.phase() == ConversationPhase::Ringing => {
            fail(server, &conversation, call, CANCELED_HERE, CANCELED);
        }
        _ => depart(server, &conversation, seat),
    }
    Ok(())
}

fn participants(application: &Arc<Application>, exchange: &Exchange, id: &str, path: &[&str]) -> Outcome {
    exchange.only(&Method::GET)?;
    let state = application.lock();
    // Not `leg()`: what was only linked before the end can be read for a while after it.
    let leg = state.legs.get(id).ok_or_else(Failure::conversation_not_found)?;
    let own = &application.account;
    let named = |address: &str| {
        let uri = format!("sip:{}", address.to_lowercase());
        if uri == own.uri {
            return Some((uri, own.name.clone()));
        }
        let present = leg.member(&uri).filter(|member| member.present);
        let member = present.or_else(|| leg.lobby.iter().find(|member| member.uri == uri))?;
        Some((uri, member.name.clone()))
    };
    let resource = match path {
        [] => {
            let members = leg.members.iter().filter(|member| member.present);
            let links = members.map(|member| leg.participant_link(application, "participant", member));
            Resource::new("participants", format!("{}/participants", leg.href(application))).list_links(links)
        }
        [address] => {
            let (uri, name) = named(address).ok_or_else(Failure::not_found)?;
            let resource = participant_resource(application, id, &uri, &name);
            if leg.state == "Conferenced" && leg.lobby.iter().all(|member| member.uri != uri) {
                resource.property("role", if leg.leaders.contains(&uri) { "Leader" } else { "Attendee" })
            } else {
                resource
            }
        }
        [address, "messaging"] => {
            named(address).ok_or_else(Failure::not_found)?;
            let participant = format!("{}/participants/{address}", leg.href(application));
            Resource::new("participantMessaging", format!("{participant}/messaging"))
                .link("participant", participant)
        }
        _ => return Err(Failure::not_found()),
    };
    Ok(exchange.resource(StatusCode::OK, &resource))
}

async fn messaging_below(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    id: &str,
    path: &[&str],
) -> Outcome {
    match path {
        [] => match exchange.method {
            Method::GET => {
                let state = application.lock();
                Ok(exchange.resource(StatusCode::OK, &state.leg(id)?.messaging_resource(application)))
            }
            // What a server was seen to say to a text that is posted here.
            Method::POST => {
                let message = "There has been an internal server error. Please wait and try again.";
                Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "None", message))
            }
            _ => Err(Failure::method_not_allowed("GET")),
        },
        ["messages"] if exchange.method == Method::GET => {
            let state = application.lock();
            let leg = state.leg(id)?;
            let links = leg.messages.iter();
            let links =
                links.map(|message| Link::new("message", leg.message_href(application, message.number)));
            let href = format!("{}/messages", leg.messaging_href(application));
            Ok(exchange.resource(StatusCode::OK, &Resource::new("messages", href).list_links(links)))
        }
        ["messages"] => send_message(server, application, exchange, id).await,
        ["messages", number] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            let leg = state.legs.get(id).ok_or_else(Failure::conversation_not_found)?;
            let number: u64 = number.parse().map_err(|_| Failure::not_found())?;
            let message = leg.messages.iter().find(|message| message.number == number);
            let message = message.ok_or_else(Failure::not_found)?;
            Ok(exchange.resource(StatusCode::OK, &leg.message_resource(server, application, message, true)))
        }
        ["terminate"] => {
            exchange.only(&Method::POST)?;
            hang_up(server, application, id)?;
            Ok(no_content())
        }
        ["typing"] => {
            exchange.only(&Method::POST)?;
            let conversation = {
                let state = application.lock();
                let leg = state.leg(id)?;
                require_open(leg)?;
                Arc::clone(&leg.conversation)
            };
            let seat = conversation.hub().seat_of_application(application);
            if let Some(seat) = seat {
                show_typing(&conversation, seat, true);
                server.timers.after_scripted(server.settings.typing_shown, move |_| {
                    show_typing(&conversation, seat, false);
                });
            }
            Ok(no_content())
        }
        ["typingParticipants"] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            let href = format!("{}/typingParticipants", state.leg(id)?.messaging_href(application));
            Ok(exchange.resource(StatusCode::OK, &Resource::new("typingParticipants", href)))
        }
        ["addMessaging"] => add_messaging(server, application, exchange, id).await,
        _ => Err(Failure::not_found()),
    }
}

fn require_open(leg: &Leg) -> Result<(), Failure> {
    if leg.messaging == "Connected" {
        Ok(())
    } else {
        Err(Failure::conflict("None", "The messaging modality is not connected."))
    }
}

async fn add_messaging(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    id: &str,
) -> Outcome {
    exchange.only(&Method::POST)?;
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let operation_id = input.optional("operationId", 50)?.map(str::to_owned);
    let text = first_message(server, &input)?;
    let conversation = Arc::clone(&application.lock().leg(id)?.conversation);
    let (number, location) = {
        let mut hub = conversation.hub();
        let seat = hub.seat_of_application(application).ok_or_else(Failure::conversation_not_found)?;
        let others = hub.others_present(seat);
        // In a meeting nobody is called: whoever stands for it must not be an account.
        let scripted = |index: &&usize| matches!(hub.seats[**index].place, Place::Script(_));
        let other = others.iter().find(scripted).or(others.first()).copied();
        let other = other.or(hub.meeting.is_some().then_some(seat));
        let other = other.ok_or_else(Failure::conversation_not_found)?;
        {
            let mut state = application.lock();
            let leg = state.legs.get_mut(id).filter(|leg| !leg.ended);
            let leg = leg.ok_or_else(Failure::conversation_not_found)?;
            if leg.messaging != "Disconnected" {
                return Err(Failure::conflict("AlreadyExists", "The messaging modality is there already."));
            }
            leg.messaging = "Connecting";
        }
        let to = hub.seats[other].uri.clone();
        let invite = Invite { rel: "messagingInvitation", operation_id, to, text };
        place_call(server, &conversation, &mut hub, seat, invite)?
    };
    let events = move |server: &Arc<Server>| announce(server, &conversation, number, false);
    Ok(answer_around(server, application, Operation::AddMessaging, created(&location), events).await)
}

async fn send_message(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    id: &str,
) -> Outcome {
    exchange.only(&Method::POST)?;
    let operation_id = exchange.query("operationId").or_else(|| exchange.query("OperationContext"));
    if operation_id.is_some_and(|text| text.encode_utf16().count() > 50) {
        return Err(Failure::parameter("operationId", "The value is too long."));
    }
    let declared = exchange.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let declared = declared.unwrap_or("text/plain");
    let mut parts = declared.split(';').map(str::trim);
    let html = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
        "text/plain" => false,
        "text/html" => true,
        _ => {
            let message = "A message is plain text or HTML.";
            return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "None", message));
        }
    };
    if exchange.body.len() > server.settings.max_message_bytes {
        return Err(too_large());
    }
    let charset = parts.find_map(|part| part.strip_prefix("charset=")).map(|label| label.trim_matches('"'));
    let encoding = charset.and_then(|label| encoding_rs::Encoding::for_label(label.as_bytes()));
    let (text, _, _) = encoding.unwrap_or(encoding_rs::UTF_8).decode(&exchange.body);
    let text = text.into_owned();
    let early = events_come_early(server, application, Operation::SendMessage);
    let conversation = Arc::clone(&application.lock().leg(id)?.conversation);
    let location = {
        let mut hub = conversation.hub();
        let seat = hub.seat_of_application(application).ok_or_else(Failure::conversation_not_found)?;
        let readers: Vec<String> =
            hub.others_present(seat).into_iter().map(|index| hub.seats[index].uri.clone()).collect();
        let (number, serial, location) = {
            let mut state = application.lock();
            state.alive()?;
            let leg = state.legs.get_mut(id).filter(|leg| !leg.ended);
            let leg = leg.ok_or_else(Failure::conversation_not_found)?;
            require_open(leg)?;
            if html && !leg.html {
                let message = "HTML was not negotiated.";
                return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "None", message));
            }
            let content_type = if html { "text/html" } else { "text/plain" };
            let serial = server.ledger.add_outgoing(OutgoingEntry {
                serial: 0,
                account: application.account.uri.clone(),
                to: readers.clone(),
                conversation: conversation.id.clone(),
                thread_id: leg.thread_id.clone(),
                application: application.id.clone(),
                operation_id: operation_id.map(str::to_owned),
                text: text.clone(),
                content_type: content_type.to_owned(),
                time: Timestamp::now(),
                kind: MessageKind::Message,
                state: OutgoingState::Accepted,
                failure: None,
            });
            let number = leg.next_message();
            leg.keep(Message {
                number,
                incoming_from: None,
                plain: None,
                html: None,
                data_uri: None,
                time_stamp: None,
                time: Timestamp::now(),
                operation_id: operation_id.map(str::to_owned),
                status: "Pending",
                failed: Vec::new(),
            });
            (number, serial, leg.message_href(application, number))
        };
        let tracker = Arc::new(Tracker {
            application: Arc::clone(application),
            leg: id.to_owned(),
            number,
            serial,
            remaining: AtomicUsize::new(readers.len()),
            failed: Mutex::default(),
            early,
        });
        let text = if html {
            Text { html: Some(text), ..Text::default() }
        } else {
            Text { plain: Some(text), ..Text::default() }
        };
        deliver(server, &conversation, &mut hub, seat, &text, Some(&tracker));
        location
    };
    if early {
        tokio::time::sleep(ANSWER_AFTER_EVENTS).await;
    }
    Ok(created(&location))
}

/// Calls somebody into a conversation that is connected.
pub(crate) async fn add_to_conversation(
    server: &Arc<Server>,
    application: &Arc<Application>,
    conversation: &Arc<Conversation>,
    invite: Invite,
) -> Outcome {
    let (number, location) = {
        let mut hub = conversation.hub();
        let seat = hub.seat_of_application(application).ok_or_else(Failure::conversation_not_found)?;
        if conversation.phase() != ConversationPhase::Connected {
            return Err(Failure::conflict("None", "The conversation is not connected."));
        }
        if hub.seats.iter().any(|seat| seat.uri == invite.to && seat.present) {
            return Err(Failure::conflict("AlreadyExists", "The person is in the conversation."));
        }
        place_call(server, conversation, &mut hub, seat, invite)?
    };
    let this = Arc::clone(conversation);
    let events = move |server: &Arc<Server>| announce(server, &this, number, false);
    Ok(answer_around(server, application, Operation::AddParticipant, created(&location), events).await)
}
