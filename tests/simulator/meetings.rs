//! Online meetings as an invited account meets them, and conversations that grow.

use reqwest::StatusCode;
use ucwa_relay::simulator::{ConversationPhase, IncomingState, MeetingRequest, Saying, Simulator};

use crate::{
    call, data_text, eventually, simulator,
    user::{Found, Happened, LIMIT, User},
};

const USER: &str = "user0001@contoso.example";
const LENE: &str = "sip:silent.lene@contoso.example";
const TOSH: &str = "sip:silent.tosh@contoso.example";
const SARA: &str = "sip:silent.sara@contoso.example";

fn meeting(lobby: bool) -> MeetingRequest {
    MeetingRequest {
        from: LENE.into(),
        to_account: USER.into(),
        others: vec![TOSH.into()],
        subject: "Strategy".into(),
        lobby,
        after: None,
    }
}

async fn invited(user: &mut User) -> Found {
    let started = user.wait("started", "onlineMeetingInvitation").await;
    let invitation = user.resource_of(&started).await;
    assert_eq!(invitation.text("direction"), "Incoming");
    assert!(invitation.text("onlineMeetingUri").contains(":conf:focus:"));
    assert_eq!(invitation.embedded["from"].text("uri"), LENE);
    assert!(!invitation.links.contains_key("message") && !invitation.links.contains_key("messaging"));
    invitation
}

async fn state(user: &User, invitation: &Found) -> String {
    user.read(invitation.link("conversation")).await.text("state").to_owned()
}

/// Who wrote a message, and what.
async fn next_message(user: &mut User) -> (String, String) {
    let event = user.wait("completed", "message").await;
    let message = user.resource_of(&event).await;
    let writer = user.read(message.link("participant")).await;
    (writer.text("uri").to_owned(), data_text(message.link("plainMessage")))
}

#[tokio::test]
async fn a_meeting_is_joined_first_and_its_messaging_afterwards() {
    for (xml, link_only_share) in [(true, 0.0), (false, 1.0)] {
        let simulator: Simulator = simulator(|settings| settings.link_only_share = link_only_share).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        let id = simulator.meet(&meeting(false)).unwrap();
        let invitation = invited(&mut user).await;
        assert_eq!(state(&user, &invitation).await, "Incoming");
        assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
        assert!(user.post_empty(invitation.link("accept")).await.is_client_error());
        let completed = user.wait("completed", "onlineMeetingInvitation").await;
        assert_eq!(completed.status, "Success");
        let conferencing = user.wait_for("Conferencing", |event| {
            event.rel == "conversation"
                && event.resource.as_ref().is_some_and(|found| found.text("state") == "Conferencing")
        });
        conferencing.await;
        let conversation = user.read(invitation.link("conversation")).await;
        assert_eq!(conversation.text("state"), "Conferenced");
        let participants = user.read(conversation.link("participants")).await;
        assert_eq!(participants.links["participant"].len(), 2);
        assert_eq!(user.read(conversation.link("leaders")).await.links["participant"].len(), 1);
        // Nothing can be said before the messaging is added.
        assert!(simulator.say(&id, "unheard").unwrap().is_empty());
        let messaging = user.read(conversation.link("messaging")).await;
        assert!(!messaging.links.contains_key("sendMessage"));
        let added = user.post(messaging.link("addMessaging"), &[("operationId", "op-1")], &[]).await;
        assert_eq!(added.status(), StatusCode::CREATED);
        let outgoing = user.wait("completed", "messagingInvitation").await;
        assert_eq!(outgoing.status, "Success");
        let messaging = user.wait_connected().await;

        simulator.say_from(&id, Some(LENE), Some("one"), None).unwrap();
        simulator.say_from(&id, Some(TOSH), Some("two"), None).unwrap();
        assert_eq!(next_message(&mut user).await, (LENE.to_owned(), "one".to_owned()));
        assert_eq!(next_message(&mut user).await, (TOSH.to_owned(), "two".to_owned()));
        user.seen.clear();
        simulator.join(&id, SARA).unwrap();
        user.wait("added", "participant").await;
        simulator.say_from(&id, Some(SARA), Some("three"), None).unwrap();
        assert_eq!(next_message(&mut user).await, (SARA.to_owned(), "three".to_owned()));
        // The messaging stays as it was when somebody joins.
        assert_eq!(user.send(&messaging, "all", "text/plain", "x").await.status(), StatusCode::CREATED);
        assert_eq!(simulator.ledger().outgoing.last().unwrap().to.len(), 3);

        simulator.change_role(&id, SARA, true).unwrap();
        let led = user
            .wait_for("a leader", |event| {
                event.within.as_deref() == Some("leaders")
                    && event.href.contains("silent.sara")
                    && event.kind == "added"
            })
            .await;
        assert_eq!(user.read(&led.href).await.text("role"), "Leader");
        assert_eq!(user.read(conversation.link("leaders")).await.links["participant"].len(), 2);
        simulator.leave_from(&id, Some(TOSH)).unwrap();
        user.wait_for("Tosh to leave", |event| {
            event.kind == "deleted" && event.rel == "participant" && event.within.is_none()
        })
        .await;
        simulator.join(&id, TOSH).unwrap();
        user.wait("added", "participant").await;
        let incoming = simulator.ledger().incoming;
        assert_eq!(incoming.len(), 3);
        assert!(incoming.iter().all(|entry| entry.state == IncomingState::Acknowledged));
        assert_eq!(user.post_empty(messaging.link("stopMessaging")).await, StatusCode::NO_CONTENT);
        eventually("a meeting without the account", || {
            simulator.conversation_phase(&id) == ConversationPhase::Ended
        })
        .await;
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn a_lobby_admits_or_denies() {
    for admit in [true, false] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", true).await;
        let id = simulator.meet(&meeting(true)).unwrap();
        let invitation = invited(&mut user).await;
        assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
        assert_eq!(state(&user, &invitation).await, "InLobby");
        assert_eq!(simulator.conversation_phase(&id), ConversationPhase::Ringing);
        simulator.settle_lobby(&id, admit).unwrap();
        let completed = user.wait("completed", "onlineMeetingInvitation").await;
        if admit {
            assert_eq!(completed.status, "Success");
            assert!(simulator.connected(&id, LIMIT).await);
            assert_eq!(state(&user, &invitation).await, "Conferenced");
            assert!(simulator.settle_lobby(&id, true).is_err());
        } else {
            assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "Denied"));
            assert_eq!(simulator.conversation_phase(&id), ConversationPhase::Ended);
        }
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn a_declined_meeting_is_over_for_the_account() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let id = simulator.meet(&meeting(false)).unwrap();
    let invitation = invited(&mut user).await;
    assert_eq!(user.post_empty(invitation.link("decline")).await, StatusCode::NO_CONTENT);
    let completed = user.wait("completed", "onlineMeetingInvitation").await;
    assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "Declined"));
    assert_eq!(simulator.conversation_phase(&id), ConversationPhase::Ended);
    assert!(simulator.quiet(LIMIT).await);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_conversation_of_two_becomes_a_conference_when_somebody_joins() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let id = simulator.call(call(USER, "hi")).await.unwrap();
    let started = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&started).await;
    assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    let before = user.wait_connected().await;
    assert!(simulator.change_role(&id, LENE, true).is_err());
    simulator.join(&id, SARA).unwrap();
    let after = user.wait_connected().await;
    assert_ne!(before.link("sendMessage"), after.link("sendMessage"));
    assert_eq!(state(&user, &invitation).await, "Conferenced");
    simulator.say_from(&id, Some(SARA), Some("hello all"), None).unwrap();
    assert_eq!(next_message(&mut user).await.1, "hi");
    assert_eq!(next_message(&mut user).await, (SARA.to_owned(), "hello all".to_owned()));
    assert!(simulator.join(&id, SARA).is_err());
    simulator.shutdown().await;
}

#[tokio::test]
async fn somebody_else_waits_in_the_lobby_until_they_are_let_in() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let id = simulator.meet(&meeting(false)).unwrap();
    let invitation = invited(&mut user).await;
    assert!(simulator.wait_in_lobby(&id, SARA).is_err(), "there is no lobby before there is a conference");
    assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    user.wait("completed", "onlineMeetingInvitation").await;
    let conversation = user.read(invitation.link("conversation")).await;
    for admit in [false, true] {
        user.seen.clear();
        simulator.wait_in_lobby(&id, SARA).unwrap();
        assert!(simulator.wait_in_lobby(&id, SARA).is_err());
        let in_lobby =
            |kind| move |event: &Happened| event.kind == kind && event.within.as_deref() == Some("lobby");
        let comes = user.wait_for("Sara to come", in_lobby("added")).await;
        assert_eq!(user.read(&comes.href).await.text("uri"), SARA);
        assert_eq!(user.read(conversation.link("lobby")).await.links["participant"].len(), 1);
        assert_eq!(user.read(conversation.link("participants")).await.links["participant"].len(), 2);
        simulator.settle_visitor(&id, SARA, admit).unwrap();
        user.wait_for("Sara to go on", in_lobby("deleted")).await;
        assert!(simulator.settle_visitor(&id, SARA, true).is_err());
    }
    let joined = |event: &Happened| event.kind == "added" && event.within.is_none();
    user.wait_for("Sara to join", joined).await;
    assert_eq!(user.read(conversation.link("participants")).await.links["participant"].len(), 3);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_call_that_is_answered_elsewhere_leads_to_the_conversation_in_which_it_goes_on() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    user.start("sip:derives.lene@contoso.example", Some("data:,hello"), "op").await;
    let completed = user.wait("completed", "messagingInvitation").await;
    assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "DerivedConversation"));
    let invitation = user.resource_of(&completed).await;
    let derived = user.read(invitation.link("derivedConversation")).await;
    assert_ne!(derived.href, invitation.link("conversation"));
    assert_eq!(derived.text("threadId"), invitation.text("threadId"));
    let messaging = user.read(invitation.link("derivedMessaging")).await;
    assert_eq!(user.send(&messaging, "op-2", "text/plain", "there").await.status(), StatusCode::CREATED);
    let ledger = simulator.ledger().outgoing;
    assert_eq!(ledger[0].failure.as_deref(), Some("DerivedConversation"));
    assert_eq!(ledger[1].to, ["sip:derives.lene@contoso.example"]);
    simulator.shutdown().await;
}

#[tokio::test]
async fn messages_are_spelled_and_dated_as_asked_and_typing_is_shown() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let id = simulator.call(call(USER, "hi")).await.unwrap();
    let started = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&started).await;
    assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    user.wait_connected().await;
    simulator.show_typing(&id, None, true).unwrap();
    let types = |event: &Happened| event.within.as_deref() == Some("typingParticipants");
    assert_eq!(user.wait_for("typing", types).await.kind, "added");
    let saying = Saying {
        text: Some("é".into()),
        data_uri: Some("data:text/plain;charset=utf-16le,%e9%00".into()),
        time_stamp: Some("0001-01-01T00:00:00Z".into()),
        ..Saying::default()
    };
    simulator.say_as(&id, &saying).unwrap();
    user.wait("completed", "message").await;
    let event = user.wait("completed", "message").await;
    let message = user.resource_of(&event).await;
    assert_eq!(message.link("plainMessage"), "data:text/plain;charset=utf-16le,%e9%00");
    assert_eq!(message.text("timeStamp"), "0001-01-01T00:00:00Z");
    assert_eq!(simulator.ledger().incoming.last().unwrap().text.as_deref(), Some("é"));
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_message_that_does_not_reach_somebody_names_them() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    user.start("sip:deaf.hans@contoso.example", None, "op").await;
    let messaging = user.wait_connected().await;
    assert_eq!(user.send(&messaging, "op-2", "text/plain", "there?").await.status(), StatusCode::CREATED);
    let completed = user.wait("completed", "message").await;
    assert_eq!(completed.status, "Failure");
    let message = user.resource_of(&completed).await;
    let failed = user.read(message.link("failedDeliveryParticipant")).await;
    assert_eq!(failed.text("uri"), "sip:deaf.hans@contoso.example");
    simulator.shutdown().await;
}

#[tokio::test]
async fn whoever_has_as_many_conversations_as_they_may_begins_no_more() {
    let simulator = simulator(|settings| settings.conversations_per_application = Some(1)).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let open = || simulator.accounts()[0].applications[0].conversations.len();
    let outcome = |event: &Happened| (event.status.clone(), event.subcode.clone());
    let refused = ("Failure".to_owned(), "TooManyConversations".to_owned());

    user.start(LENE, None, "first").await;
    user.wait_connected().await;
    assert_eq!(user.wait("completed", "messagingInvitation").await.status, "Success");
    user.start(TOSH, None, "second").await;
    assert_eq!(outcome(&user.wait("completed", "messagingInvitation").await), refused);
    let communication = user.application.embedded["communication"].link("startOnlineMeeting").to_owned();
    let answer = user.post(&communication, &[("operationId", "third")], &[]).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    assert_eq!(outcome(&user.wait("completed", "onlineMeetingInvitation").await), refused);
    assert_eq!(open(), 1);

    let talk = simulator.accounts()[0].applications[0].conversations[0].clone();
    simulator.leave(&talk).unwrap();
    user.start(TOSH, None, "fourth").await;
    assert_eq!(user.wait("completed", "messagingInvitation").await.status, "Success");
    simulator.shutdown().await;
}
