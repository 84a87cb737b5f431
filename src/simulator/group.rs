//! Groups: `addParticipant` and the participant invitations that it makes.
//!
//! The first addition turns a conversation of two into a conference, which takes the messaging down and builds it
//! anew under other addresses. Where the settings do not let it grow ([`Escalation`]), only a meeting has room for many.

use std::sync::Arc;

use hyper::{Method, StatusCode};

use super::{
    application::Application,
    conversation::Invite,
    correspondent, messaging,
    payload::{Failure, Input},
    server::{Exchange, Outcome, Server},
};
use crate::simulator::Escalation;

/// `communication/participantInvitations` and what is below it.
pub(crate) async fn participant_invitations(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    match path {
        [] => add_participant(server, application, exchange).await,
        [id] => {
            exchange.only(&Method::GET)?;
            let state = application.lock();
            let invitation = state.invitations.get(*id).ok_or_else(Failure::not_found)?;
            Ok(exchange.resource(StatusCode::OK, &invitation.resource(application, &state, true)))
        }
        _ => Err(Failure::not_found()),
    }
}

async fn add_participant(
    server: &Arc<Server>,
    application: &Arc<Application>,
    exchange: &Exchange,
) -> Outcome {
    exchange.only(&Method::POST)?;
    let id = exchange.query("conversation").ok_or_else(Failure::not_found)?;
    let input = Input::read(&exchange.headers, &exchange.body)?;
    let operation_id = input.optional("operationId", 50)?.map(str::to_owned);
    let to = messaging::sip_uri(input.required("to", 1000)?)?;
    if correspondent::is_missing(&to) {
        return Err(messaging::destination_not_found());
    }
    let conversation = Arc::clone(&application.lock().leg(id)?.conversation);
    if server.now().escalation == Escalation::Refused && !conversation.hub().conference {
        return Err(Failure::conflict("None", "The service is not supported."));
    }
    let invite = Invite { rel: "participantInvitation", operation_id, to, text: None };
    messaging::add_to_conversation(server, application, &conversation, invite).await
}
