//! Conversation logs hold what the events told, and what they could not tell.

use std::time::Duration;

use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use ucwa_relay::simulator::{CallRequest, ConversationPhase, IncomingState, LogEntry, Simulator};

use crate::{
    call, data_text, eventually, simulator,
    user::{LIMIT, User, http},
};

const USER: &str = "user0001@contoso.example";

async fn with_logs(link_only_share: f64) -> Simulator {
    simulator(|settings| {
        settings.conversation_logs = true;
        settings.missed_calls_logged = true;
        settings.log_delay = Duration::from_millis(30);
        settings.log_page = 2;
        settings.link_only_share = link_only_share;
        settings.admin_listen = Some("127.0.0.1:0".parse().unwrap());
    })
    .await
}

async fn log(simulator: &Simulator, count: usize) -> LogEntry {
    let there = || simulator.conversation_logs(USER).unwrap().len() >= count;
    eventually("no log", there).await;
    simulator.conversation_logs(USER).unwrap().swap_remove(count - 1)
}

fn texts(log: &LogEntry) -> Vec<&str> {
    log.messages.iter().map(|message| message.text.as_deref().unwrap()).collect()
}

#[tokio::test]
async fn a_conversation_appears_in_the_log_after_its_end_in_pages() {
    for link_only_share in [0.0, 1.0] {
        let simulator = with_logs(link_only_share).await;
        let mut user = User::sign_in(&simulator, "user0001", false).await;
        let id = simulator.call(call(USER, "first & foremost")).await.unwrap();
        let invitation = user.wait("started", "messagingInvitation").await;
        let invitation = user.resource_of(&invitation).await;
        assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
        let messaging = user.wait_connected().await;
        for text in ["two", "three"] {
            simulator.say(&id, text).unwrap();
        }
        assert_eq!(user.send(&messaging, "four", "text/plain", "op").await.status(), StatusCode::CREATED);
        simulator.say_from(&id, None, None, Some("<b>five</b>")).unwrap();
        let communication = user.application.embedded["communication"].clone();
        let missed = user.read(communication.link("missedItems")).await;
        assert_eq!(missed.text("conversationLogsCount"), "0");
        simulator.leave(&id).unwrap();
        user.wait("updated", "missedItems").await;

        let entry = log(&simulator, 1).await;
        assert!(entry.incoming && !entry.missed && !entry.conference && entry.messages.len() == 5);
        let logs = user.get(&format!("{}?limit=5", communication.link("conversationLogs"))).await;
        let logs = user.found(logs).await;
        let log = match logs.links.get("conversationLog") {
            Some(links) => user.read(&links[0]).await,
            None => logs.embedded["conversationLog"].clone(),
        };
        assert_eq!(logs.links.contains_key("conversationLog"), link_only_share > 0.5);
        assert_eq!(log.text("status"), "Archived");
        assert_eq!(log.text("direction"), "Incoming");
        assert_eq!(log.text("type"), "MessageLog");
        assert_eq!(log.text("previewMessage"), "first & foremost");
        let recipient = &log.embedded["conversationLogRecipient"];
        assert_eq!(recipient.text("sipUri"), "sip:lene.aaling@contoso.example");

        let mut page = log.link("conversationLogTranscripts").to_owned();
        let (mut pages, mut found) = (0, Vec::new());
        loop {
            let raw: Value = serde_json::from_str(&user.get(&page).await.text().await.unwrap()).unwrap();
            pages += 1;
            for transcript in raw["_embedded"]["conversationLogTranscript"].as_array().unwrap() {
                let text = &transcript["_embedded"]["messageTranscript"]["_links"];
                let uri = text["plainMessage"]["href"].as_str().or(text["htmlMessage"]["href"].as_str());
                let mine = transcript["_links"].get("me").is_some();
                assert_ne!(mine, transcript["_links"].get("contact").is_some());
                found.push((data_text(uri.unwrap()), mine));
            }
            match raw["_links"]["nextConversationLogTranscripts"]["href"].as_str() {
                Some(next) => next.clone_into(&mut page),
                None => break,
            }
        }
        assert_eq!(pages, 3);
        found.sort();
        let mut expected: Vec<_> = ["first & foremost", "two", "three", "four", "<b>five</b>"]
            .iter()
            .map(|text| ((*text).to_owned(), *text == "four"))
            .collect();
        expected.sort();
        assert_eq!(found, expected);
        let ledger = simulator.ledger();
        let serials: Vec<_> = entry.messages.iter().map(|message| message.serial.unwrap()).collect();
        for serial in serials {
            let known = ledger.incoming.iter().map(|entry| entry.serial);
            assert!(
                known.chain(ledger.outgoing.iter().map(|entry| entry.serial)).any(|other| other == serial)
            );
        }
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn without_logs_there_is_no_link() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    let communication = &user.application.embedded["communication"];
    assert!(!communication.links.contains_key("conversationLogs"));
    assert!(!communication.links.contains_key("missedItems"));
    let answer = user.get(&format!("{}/conversationLogs", communication.href)).await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_another_device_answers_is_in_the_log_only() {
    let simulator = with_logs(0.0).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let http = http();
    let admin = format!("http://{}", simulator.admin_address().unwrap());
    let body =
        json!({ "from": "lene.aaling@contoso.example", "to_account": USER, "text": "hi", "elsewhere": true });
    let request = http.post(format!("{admin}/call")).header(header::CONTENT_TYPE, "application/json");
    let called = request.body(body.to_string()).send().await.unwrap().text().await.unwrap();
    let called: Value = serde_json::from_str(&called).unwrap();
    let id = called["conversation"].as_str().unwrap().to_owned();
    let invitation = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&invitation).await;
    let accepted = user.post_empty(invitation.link("accept")).await;
    assert!(accepted.is_client_error(), "the other device was quicker: {accepted}");
    let completed = user.wait("completed", "messagingInvitation").await;
    assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "ConnectedElsewhere"));
    user.wait("deleted", "conversation").await;
    assert!(simulator.connected(&id, LIMIT).await);
    assert_eq!(simulator.say(&id, "where are you?"), Ok(Vec::new()));
    assert_eq!(simulator.say_from(&id, Some(USER), Some("at my desk"), None), Ok(Vec::new()));
    simulator.leave(&id).unwrap();
    let entry = log(&simulator, 1).await;
    assert_eq!(texts(&entry), ["hi", "where are you?", "at my desk"]);
    assert_eq!(entry.messages[2].from, format!("sip:{USER}"));
    assert!(!entry.missed);
    // Only the invitation's text passed through an application.
    let ledger = simulator.ledger();
    assert_eq!(ledger.incoming.len(), 1);
    assert_eq!(ledger.incoming[0].state, IncomingState::Refused);
    assert_eq!(entry.messages[0].serial, Some(ledger.incoming[0].serial));
    let listed = http.get(format!("{admin}/logs?account={USER}")).send().await.unwrap().text().await.unwrap();
    assert_eq!(serde_json::from_str::<Vec<LogEntry>>(&listed).unwrap(), [entry]);
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_nobody_answers_is_missed() {
    let simulator = with_logs(0.0).await;
    // No application at all, and another device.
    let elsewhere = CallRequest { text: Some("a".into()), ..call(USER, "") };
    let id = simulator.call_answered_elsewhere(&elsewhere).unwrap();
    assert!(simulator.connected(&id, LIMIT).await);
    simulator.leave(&id).unwrap();
    assert_eq!(texts(&log(&simulator, 1).await), ["a"]);
    // No application at all, and nobody.
    let id = simulator.call(call(USER, "b")).await.unwrap();
    assert_eq!(simulator.conversation_phase(&id), ConversationPhase::Ended);
    let missed = log(&simulator, 2).await;
    assert!(missed.missed);
    assert_eq!((texts(&missed), missed.messages[0].serial), (vec!["b"], None));
    // An application that loses the call.
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    simulator.call(call(USER, "c")).await.unwrap();
    user.wait("started", "messagingInvitation").await;
    simulator.forget_application(USER).unwrap();
    let missed = log(&simulator, 3).await;
    assert!(missed.missed && missed.messages[0].serial.is_some());
    let user = User::sign_in(&simulator, "user0001", true).await;
    let communication = user.application.embedded["communication"].clone();
    let counts = user.read(communication.link("missedItems")).await;
    assert_eq!(counts.text("missedConversationsCount"), "2");
    let logs = user.read(&format!("{}?limit=1", communication.link("conversationLogs"))).await;
    let newest = logs.embedded["conversationLog"].clone();
    assert_eq!((newest.text("previewMessage"), newest.text("status")), ("c", "Missed"));
    let marked = user.request(Method::POST, newest.link("markAsRead")).send().await.unwrap();
    assert_eq!(marked.status(), StatusCode::NO_CONTENT);
    let counts = user.read(communication.link("missedItems")).await;
    assert_eq!(counts.text("unreadMissedConversationsCount"), "1");
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_expired_for_the_application_is_in_the_log() {
    let simulator = simulator(|settings| {
        settings.conversation_logs = true;
        settings.log_delay = Duration::ZERO;
        settings.message_fetch_limit = Duration::from_millis(100);
    })
    .await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let id = simulator.call(call(USER, "hello")).await.unwrap();
    let invitation = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&invitation).await;
    assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    user.wait("completed", "message").await;
    simulator.say(&id, "unfetched").unwrap();
    eventually("never lost", || simulator.counters().incoming_expired == 1).await;
    simulator.leave(&id).unwrap();
    assert_eq!(texts(&log(&simulator, 1).await), ["hello", "unfetched"]);
    simulator.shutdown().await;
}
