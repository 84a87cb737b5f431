//! Each fault strikes where, when and as often as it was asked to, and the ledger stays true.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};
use ucwa_relay::simulator::{
    Fault, FaultKind, FaultState, IncomingState, MessageKind, Operation, OutgoingState, Refusal, RefusalBody,
    Simulator, TrafficSettings,
};

use crate::{
    call, eventually, simulator,
    user::{Found, LIMIT, Package, User, http, token},
};

/// What a client is left with.
#[derive(Debug, PartialEq)]
enum Left {
    /// No whole answer.
    Nothing,
    /// A status, and its body.
    Answer(u16, String),
}

async fn left(answer: reqwest::Result<Response>) -> Left {
    let Ok(answer) = answer else { return Left::Nothing };
    let status = answer.status().as_u16();
    match answer.bytes().await {
        Ok(body) => Left::Answer(status, String::from_utf8_lossy(&body).into_owned()),
        Err(_) => Left::Nothing,
    }
}

fn executed(refusal: Refusal) -> FaultKind {
    FaultKind::Status(Refusal { executed: true, ..refusal })
}

/// Starts a conversation with a correspondent that says nothing by itself, and waits until it is connected.
async fn conversation(user: &mut User, with: &str) -> Found {
    user.start(&format!("sip:{with}@contoso.example"), None, with).await;
    user.wait_connected().await
}

async fn send(user: &User, messaging: &Found, text: &str) -> reqwest::Result<Response> {
    let href = format!("{}?operationId={text}", messaging.link("sendMessage"));
    user.request(Method::POST, &href)
        .header(header::CONTENT_TYPE, "text/plain")
        .body(text.to_owned())
        .send()
        .await
}

#[tokio::test]
async fn a_command_is_carried_out_or_not_and_the_ledger_knows() {
    let status = |status| FaultKind::status(status);
    // The fault, the status that the client sees (0: none), and whether the message was accepted.
    let cases: Vec<(FaultKind, u16, bool)> = vec![
        (FaultKind::CutBefore, 0, false),
        (FaultKind::CutAfter, 0, true),
        (FaultKind::CutMidway, 0, true),
        (FaultKind::Delay { ms: 20 }, 201, true),
        (FaultKind::DelayAfter { ms: 20 }, 201, true),
        (status(403), 403, false),
        (FaultKind::refusal(409, "AnotherOperationPending"), 409, false),
        (status(429), 429, false),
        (status(500), 500, false),
        (status(502), 502, false),
        (status(503), 503, false),
        (status(504), 504, false),
        (executed(Refusal { status: 504, ..Refusal::default() }), 504, true),
        (executed(Refusal { status: 500, body: Some(RefusalBody::Empty), ..Refusal::default() }), 500, true),
        (FaultKind::PgetReplaced, 409, false),
        (FaultKind::ApplicationNotFound { keep: true }, 404, false),
        (FaultKind::InactiveApplicationExpired { keep: true }, 410, false),
        (FaultKind::TooManyApplications { keep: true }, 410, false),
        (FaultKind::TruncatedXml, 201, true),
        (FaultKind::MalformedXml, 201, true),
        (FaultKind::InvalidUtf8, 201, true),
        (FaultKind::Doctype, 201, true),
        (FaultKind::WrongContentType { content_type: None }, 201, true),
        (FaultKind::HugeBody { bytes: Some(100_000) }, 201, true),
        (FaultKind::EarlyEvents, 201, true),
    ];
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let messaging = conversation(&mut user, "silent1").await;
    let mut accepted = 0;
    for (index, (kind, expected, counts)) in cases.into_iter().enumerate() {
        let fault = Fault::new(kind.clone()).on(Operation::SendMessage).account("user0001");
        let id = simulator.inject(fault).unwrap();
        match left(send(&user, &messaging, &format!("m{index}")).await).await {
            Left::Nothing => assert_eq!(expected, 0, "{kind:?}"),
            Left::Answer(status, _) => assert_eq!(status, expected, "{kind:?}"),
        }
        assert_eq!(simulator.struck(id), 1, "{kind:?}");
        accepted += usize::from(counts);
        let is_accepted = || simulator.ledger().outgoing.len() == accepted;
        eventually(&format!("{kind:?} and the ledger"), is_accepted).await;
        // Once means once.
        assert_eq!(user.send(&messaging, "after", "text/plain", "x").await.status(), StatusCode::CREATED);
        accepted += 1;
        user.read(messaging.link("conversation")).await;
    }
    let delivered = || simulator.counters().outgoing_delivered == accepted as u64;
    eventually("not delivered", delivered).await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_package_whose_answer_was_lost_or_spoilt_comes_again_unchanged() {
    let status = |status| FaultKind::status(status);
    let kinds = vec![
        FaultKind::CutBefore,
        FaultKind::CutAfter,
        FaultKind::CutMidway,
        status(409),
        status(429),
        status(502),
        status(503),
        executed(Refusal { status: 504, ..Refusal::default() }),
        FaultKind::PgetReplaced,
        FaultKind::TruncatedXml,
        FaultKind::MalformedXml,
        FaultKind::InvalidUtf8,
        FaultKind::Doctype,
        FaultKind::WrongContentType { content_type: Some("text/plain".into()) },
        FaultKind::HugeBody { bytes: Some(3_000_000) },
        FaultKind::NoLink,
        FaultKind::Resync,
        FaultKind::Redirect { location: "http://foreign.invalid/".into(), status: None },
    ];
    for xml in [true, false] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        let messaging = conversation(&mut user, "silent1").await;
        let id = simulator.accounts()[0].applications[0].conversations[0].clone();
        user.wait("completed", "messagingInvitation").await;
        for (index, kind) in kinds.iter().enumerate() {
            let text = format!("text {index}");
            simulator.say(&id, &text).unwrap();
            let fault = simulator.inject(Fault::new(kind.clone()).on(Operation::Events)).unwrap();
            let request = user.request(Method::GET, &user.cursor);
            let spoilt = left(without_redirects(request).await).await;
            assert_eq!(simulator.struck(fault), 1, "{kind:?}");
            let entry = simulator.ledger().incoming.pop().unwrap();
            assert_eq!((entry.text.as_deref(), entry.state), (Some(text.as_str()), IncomingState::Pending));
            let first = user.peek().await;
            assert_eq!(first.raw, user.peek().await.raw, "{kind:?}");
            if !matches!(kind, FaultKind::WrongContentType { .. }) {
                assert_ne!(spoilt, Left::Answer(200, first.raw.clone()), "{kind:?}");
            }
            let package = user.poll().await;
            assert_eq!(package.raw, first.raw, "{kind:?}");
            let told = package.events.iter().filter(|event| event.rel == "message");
            assert_eq!(told.filter(|event| event.kind == "completed").count(), 1, "{kind:?}");
        }
        assert_eq!(user.send(&messaging, "bye", "text/plain", "x").await.status(), StatusCode::CREATED);
        user.wait_for("the sent message", |event| event.rel == "message").await;
        simulator.shutdown().await;
    }
}

/// Sends a request of a user with a client that follows no redirect.
async fn without_redirects(request: reqwest::RequestBuilder) -> reqwest::Result<Response> {
    let client = reqwest::Client::builder()
        .timeout(LIMIT)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap();
    client.execute(request.build().unwrap()).await
}

#[tokio::test]
async fn spoilt_bodies_are_spoilt_in_their_own_way() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    let href = user.application.href.clone();
    let ask = async |kind: FaultKind| {
        simulator.inject(Fault::new(kind).on(Operation::Application)).unwrap();
        without_redirects(user.request(Method::GET, &href)).await.unwrap()
    };
    let body = async |kind: FaultKind| ask(kind).await.text().await.unwrap();
    let whole = user.get(&href).await.text().await.unwrap();
    let truncated = body(FaultKind::TruncatedXml).await;
    assert!(truncated.len() < whole.len() && truncated.starts_with("<?xml"), "{truncated}");
    assert!(body(FaultKind::MalformedXml).await.ends_with("</unopened>"));
    assert!(body(FaultKind::Doctype).await.contains("<!DOCTYPE resource [<!ENTITY a0 "));
    let bytes = ask(FaultKind::InvalidUtf8).await.bytes().await.unwrap();
    assert!(std::str::from_utf8(&bytes).is_err());
    let huge = body(FaultKind::HugeBody { bytes: Some(5_000_000) }).await;
    assert!(huge.len() >= 5_000_000 && huge.ends_with("</resource>"));
    let typed = ask(FaultKind::WrongContentType { content_type: None }).await;
    assert_eq!(typed.headers()[header::CONTENT_TYPE], "text/html");
    let redirect = FaultKind::Redirect { location: "https://evil.example/x".into(), status: Some(307) };
    let redirected = ask(redirect).await;
    assert_eq!(redirected.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(redirected.headers()[header::LOCATION], "https://evil.example/x");
    assert!(body(FaultKind::status(502)).await.contains("<h1>502 Bad Gateway</h1>"));
    let refusal = Refusal {
        status: 500,
        body: Some(RefusalBody::Html),
        diagnostics: Some("28032".into()),
        ..Refusal::default()
    };
    let refused = ask(FaultKind::Status(refusal)).await;
    assert!(refused.headers()["x-ms-diagnostics"].to_str().unwrap().starts_with("28032;"));

    // An endless body ends when the reader has enough.
    let mut endless = ask(FaultKind::EndlessBody).await;
    let mut read = 0;
    while read < 20 * 1024 * 1024 {
        read += endless.chunk().await.unwrap().unwrap().len();
    }
    drop(endless);
    assert_eq!(user.get(&href).await.text().await.unwrap(), whole);
    simulator.shutdown().await;
}

#[tokio::test]
async fn retry_after_is_spelled_as_asked() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    for (status, retry_after, as_date) in
        [(429, None, false), (429, Some(7), false), (503, Some(7), true), (503, None, true)]
    {
        let kind = FaultKind::Status(Refusal {
            status,
            retry_after,
            retry_after_as_date: as_date,
            ..Refusal::default()
        });
        simulator.inject(Fault::new(kind).on(Operation::ReportMyActivity)).unwrap();
        let me = &user.application.embedded["me"];
        let answer = user.request(Method::POST, me.link("reportMyActivity")).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status);
        let header =
            answer.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
        match (retry_after, as_date) {
            (None, _) => assert_eq!(header, None),
            (Some(seconds), false) => assert_eq!(header, Some(seconds.to_string())),
            (Some(_), true) => assert!(header.unwrap().ends_with(" GMT")),
        }
        assert_eq!(user.subcode(answer).await, "None");
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn an_expired_token_is_expired_and_another_one_works() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    simulator.inject(Fault::new(FaultKind::ExpiredToken).account("sip:user0001@contoso.example")).unwrap();
    for _ in 0..2 {
        let refused = user.get(&user.application.href).await;
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(refused.headers().get_all(header::WWW_AUTHENTICATE).iter().count(), 2);
    }
    let again = User::sign_in_quietly(&simulator, "user0001", true).await;
    assert_eq!(again.application.href, user.application.href);
    simulator.shutdown().await;
}

#[tokio::test]
async fn an_application_that_a_fault_ends_is_gone() {
    for (kind, status, subcode) in [
        (FaultKind::ApplicationNotFound { keep: false }, 404, "ApplicationNotFound"),
        (FaultKind::InactiveApplicationExpired { keep: false }, 410, "InactiveApplicationExpired"),
        (FaultKind::TooManyApplications { keep: false }, 410, "TooManyApplications"),
    ] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", true).await;
        let other = User::sign_in(&simulator, "user0002", true).await;
        simulator.call(call("user0001@contoso.example", "unseen")).await.unwrap();
        simulator.inject(Fault::new(kind.clone()).on(Operation::Events).account("user0001")).unwrap();
        for _ in 0..2 {
            let lost = user.get(&user.cursor).await;
            assert_eq!(lost.status().as_u16(), status);
            assert_eq!(user.subcode(lost).await, subcode);
        }
        assert_eq!(simulator.ledger().incoming[0].state, IncomingState::Refused);
        assert!(!simulator.ledger().incoming[0].package_acknowledged);
        assert_eq!(other.get(&other.application.href).await.status(), StatusCode::OK);
        let again = User::sign_in(&simulator, "user0001", true).await;
        assert_ne!(again.application.href, user.application.href);
        user.seen.clear();
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn a_parked_get_is_struck_at_once() {
    for kind in [FaultKind::CutBefore, FaultKind::status(503), FaultKind::Resync, FaultKind::ExpiredToken] {
        let simulator = simulator(|_| {}).await;
        let user = User::sign_in_quietly(&simulator, "user0001", true).await;
        let parked = tokio::spawn(user.request(Method::GET, &user.cursor).send());
        let is_parked = || simulator.accounts()[0].applications[0].parked;
        eventually("not parked", is_parked).await;
        simulator.inject(Fault::new(FaultKind::CutBefore).on(Operation::SendMessage)).unwrap();
        simulator.inject(Fault::new(kind.clone()).on(Operation::Events).account("user0002")).unwrap();
        assert!(is_parked(), "{kind:?} struck somebody else");
        let id = simulator.inject(Fault::new(kind.clone()).on(Operation::Events)).unwrap();
        let answer = left(parked.await.unwrap()).await;
        assert_eq!(simulator.struck(id), 1);
        match (&kind, answer) {
            (FaultKind::CutBefore, answer) => assert_eq!(answer, Left::Nothing),
            (FaultKind::Resync, Left::Answer(200, raw)) => {
                let package = Package::parse(raw, true);
                assert_eq!(package.onward, ("resync".to_owned(), user.cursor.clone()));
            }
            (FaultKind::ExpiredToken, Left::Answer(status, _)) => assert_eq!(status, 401),
            (_, Left::Answer(status, _)) => assert_eq!(status, 503),
            (_, Left::Nothing) => panic!("{kind:?} left nothing"),
        }
        eventually("still parked", || !is_parked()).await;
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn resume_loses_what_no_package_held_and_says_so() {
    for lose_conversations in [false, true] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", true).await;
        conversation(&mut user, "silent1").await;
        user.wait("completed", "messagingInvitation").await;
        let id = simulator.accounts()[0].applications[0].conversations[0].clone();
        simulator.say(&id, "given").unwrap();
        let given = user.peek().await;
        simulator.say(&id, "lost").unwrap();
        simulator.inject(Fault::new(FaultKind::Resume { lose_conversations }).on(Operation::Events)).unwrap();
        // What a package holds is given first.
        assert_eq!(user.poll().await.raw, given.raw);
        let (address, number) = user.cursor.rsplit_once('=').unwrap();
        let following = format!("{address}={}", number.parse::<u64>().unwrap() + 1);
        let resumed = user.peek().await;
        assert_eq!(resumed.onward, ("resume".to_owned(), following));
        assert!(resumed.events.is_empty());
        assert_eq!(user.peek().await.raw, resumed.raw);
        let states: Vec<_> = simulator.ledger().incoming.iter().map(|entry| entry.state).collect();
        assert_eq!(states, [IncomingState::Acknowledged, IncomingState::Expired]);
        user.cursor = resumed.onward.1;
        let communication = &user.application.embedded["communication"];
        let conversations = user.read(communication.link("conversations")).await;
        assert_eq!(conversations.links.contains_key("conversation"), !lose_conversations);
        if !lose_conversations {
            simulator.say(&id, "later").unwrap();
            user.wait("completed", "message").await;
        }
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn strange_packages_hold_everything_that_happened() {
    for xml in [true, false] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        for kind in [FaultKind::UnknownThings, FaultKind::LinkOnly, FaultKind::OddOrder, FaultKind::Aggregate]
        {
            let id = simulator.inject(Fault::new(kind.clone()).on(Operation::Events).times(100)).unwrap();
            user.seen.clear();
            let called = simulator.call(call("user0001@contoso.example", "hello")).await.unwrap();
            let invitation = user.wait("started", "messagingInvitation").await;
            let invitation = user.resource_of(&invitation).await;
            assert_eq!(user.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
            simulator.say(&called, "one").unwrap();
            simulator.say(&called, "two").unwrap();
            let first = user.peek().await;
            assert_eq!(first.raw, user.peek().await.raw, "{kind:?}");
            let mut texts = Vec::new();
            for _ in 0..3 {
                let message = user.wait("completed", "message").await;
                let message = user.resource_of(&message).await;
                texts.push(crate::data_text(message.link("plainMessage")));
            }
            assert_eq!(texts, ["hello", "one", "two"], "{kind:?}");
            let struck = simulator.struck(id);
            match kind {
                FaultKind::UnknownThings => {
                    assert!(first.raw.contains("forecast") && first.raw.contains("phaseOfTheMoon"));
                    assert!(first.events.iter().any(|event| event.kind == "transfigured"));
                    assert!(first.events.iter().any(|event| event.sender == "observatory"));
                    assert!(struck >= 2);
                }
                FaultKind::LinkOnly => assert!(first.events.iter().all(|event| event.resource.is_none())),
                FaultKind::OddOrder => assert!(struck >= 1),
                _ => {
                    let messaging = first.events.iter().filter(|event| event.rel == "conversation");
                    assert!(messaging.count() <= 1, "{first:?}");
                }
            }
            simulator.clear_faults(None);
            simulator.leave(&called).unwrap();
            user.wait("deleted", "conversation").await;
        }
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn events_come_before_their_answer_on_request() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    simulator.inject(Fault::new(FaultKind::EarlyEvents).on(Operation::StartMessaging)).unwrap();
    simulator.inject(Fault::new(FaultKind::DelayAfter { ms: 60_000 }).on(Operation::StartMessaging)).unwrap();
    let href = user.application.embedded["communication"].link("startMessaging").to_owned();
    let request = user
        .request(Method::POST, &href)
        .header(header::CONTENT_TYPE, "application/json")
        .body(json!({ "operationId": "op-1", "to": "sip:silent1@contoso.example" }).to_string());
    let answer = tokio::spawn(request.send());
    let started = user.wait("started", "messagingInvitation").await;
    assert_eq!(user.resource_of(&started).await.text("operationId"), "op-1");
    assert!(!answer.is_finished());
    answer.abort();
    simulator.shutdown().await;
}

#[tokio::test]
async fn shares_follow_the_seed_and_other_accounts_are_left_alone() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let simulator = simulator(|_| {}).await;
        let user = User::sign_in(&simulator, "user0001", true).await;
        let other = User::sign_in(&simulator, "user0002", true).await;
        let fault = Fault::new(FaultKind::status(503)).account("user0001").share(0.5);
        simulator.inject(fault).unwrap();
        let mut statuses = Vec::new();
        for _ in 0..40 {
            statuses.push(user.get(&user.application.href).await.status().as_u16());
            assert_eq!(other.get(&other.application.href).await.status(), StatusCode::OK);
        }
        assert!(statuses.contains(&200) && statuses.contains(&503));
        runs.push(statuses);
        simulator.shutdown().await;
    }
    assert_eq!(runs[0], runs[1]);
}

#[tokio::test]
async fn a_fault_lets_pass_what_it_skips_and_leaving_a_conversation_is_not_reading_it() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let messaging = conversation(&mut user, "silent1").await;
    let href = messaging.link("conversation").to_owned();
    let request =
        |method: Method| async { user.request(method, &href).send().await.unwrap().status().as_u16() };
    let busy = |operation| Fault::new(FaultKind::status(503)).on(operation);
    let leaving = simulator.inject(busy(Operation::LeaveConversation).skip(1)).unwrap();
    let reading = simulator.inject(busy(Operation::Conversation).skip(2).times(2)).unwrap();
    let mut answers = Vec::new();
    for _ in 0..5 {
        answers.push(request(Method::GET).await);
    }
    assert_eq!(answers, [200, 200, 503, 503, 200]);
    assert_eq!((simulator.struck(reading), simulator.struck(leaving)), (2, 0));
    assert_eq!([request(Method::DELETE).await, request(Method::DELETE).await], [204, 503]);
    simulator.shutdown().await;
}

#[tokio::test]
async fn faults_are_switched_by_the_control_api() {
    let simulator = simulator(|settings| settings.admin_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let http = http();
    let admin = format!("http://{}", simulator.admin_address().unwrap());
    let post = async |body: Value| {
        let request = http.post(format!("{admin}/fault")).header(header::CONTENT_TYPE, "application/json");
        request.body(body.to_string()).send().await.unwrap()
    };
    let switched_on = post(json!({
        "account": "user0001", "operation": "token", "fault": "status", "status": 400, "body": "oauth",
        "subcode": "invalid_grant", "count": 2, "skip": 0
    }))
    .await;
    assert_eq!(switched_on.text().await.unwrap(), "{\"id\":1}");
    let unknown = post(json!({ "account": "nobody", "fault": "cut_before" })).await;
    assert_eq!(unknown.status(), StatusCode::CONFLICT);
    for unreadable in [
        json!({ "fault": "earthquake" }),
        json!({ "fault": "cut_before", "operations": "events" }),
        json!({ "fault": "cut_before", "operation": "flying" }),
        json!({ "fault": "delay" }),
    ] {
        let refused = post(unreadable.clone()).await;
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST, "{unreadable}");
        assert!(refused.text().await.unwrap().starts_with("{\"error\":"), "{unreadable}");
    }
    post(json!({ "operation": "discovery", "fault": "delay", "ms": 1, "share": 0.5 })).await;

    assert_eq!(token(&http, &simulator, "user0002", "simulated").await.status(), StatusCode::OK);
    let refused = token(&http, &simulator, "user0001", "simulated").await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    assert_eq!(refused.text().await.unwrap(), "{\"error\":\"invalid_grant\"}");
    let listed = http.get(format!("{admin}/faults")).send().await.unwrap().text().await.unwrap();
    let listed: Vec<FaultState> = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed, simulator.faults());
    assert_eq!((listed[0].struck, listed[0].remaining), (1, Some(1)));
    assert_eq!(listed[0].fault.account.as_deref(), Some("sip:user0001@contoso.example"));
    assert_eq!(listed[1].remaining, None);
    http.delete(format!("{admin}/faults?id=1")).send().await.unwrap();
    assert_eq!(token(&http, &simulator, "user0001", "simulated").await.status(), StatusCode::OK);
    assert_eq!(simulator.faults().len(), 1);
    http.delete(format!("{admin}/faults")).send().await.unwrap();
    assert!(simulator.faults().is_empty());
    simulator.shutdown().await;
}

/// Every message of the ledger is settled, and the writer was told.
#[tokio::test]
async fn a_lost_answer_changes_nothing_for_the_reader() {
    let simulator: Simulator = simulator(|_| {}).await;
    let mut alice = User::sign_in(&simulator, "user0001", true).await;
    let mut bob = User::sign_in(&simulator, "user0002", false).await;
    alice.start("sip:user0002@contoso.example", None, "op-1").await;
    let invitation = bob.wait("started", "messagingInvitation").await;
    let invitation = bob.resource_of(&invitation).await;
    // The acceptance is carried out although nobody hears of it.
    simulator.inject(Fault::new(FaultKind::CutAfter).on(Operation::Accept).account("user0002")).unwrap();
    assert!(bob.request(Method::POST, invitation.link("accept")).send().await.is_err());
    let messaging = alice.wait_connected().await;
    simulator.inject(Fault::new(FaultKind::CutAfter).on(Operation::SendMessage)).unwrap();
    assert_eq!(left(send(&alice, &messaging, "hello").await).await, Left::Nothing);
    simulator.inject(Fault::new(FaultKind::CutAfter).on(Operation::Events).account("user0002")).unwrap();
    let lost = bob.request(Method::GET, &bob.cursor).send();
    assert_eq!(left(lost.await).await, Left::Nothing);
    let message = bob.wait("completed", "message").await;
    let message = bob.resource_of(&message).await;
    assert_eq!(crate::data_text(message.link("plainMessage")), "hello");
    let settled = || simulator.ledger().outgoing[0].state == OutgoingState::Delivered;
    eventually("not delivered", settled).await;
    assert_eq!(simulator.ledger().incoming.len(), 1);
    assert_eq!(simulator.ledger().outgoing.len(), 1);
    tokio::time::timeout(Duration::from_secs(5), alice.wait("completed", "message")).await.unwrap();
    simulator.shutdown().await;
}

/// A client that survives anything: it asks for the same package until it can read it.
async fn follow(simulator: Simulator, name: String, received: Arc<Mutex<Vec<String>>>) {
    let mut user = User::sign_in(&simulator, &name, true).await;
    loop {
        let Left::Answer(200, raw) = left(user.request(Method::GET, &user.cursor).send().await).await else {
            tokio::task::yield_now().await;
            continue;
        };
        if !raw.ends_with("</events>") || raw.contains("<!DOCTYPE") || raw.contains('\u{fffd}') {
            continue;
        }
        let package = Package::parse(raw, true);
        if package.onward.0 == "next" {
            for event in &package.events {
                let message = event.resource.as_ref().filter(|_| event.rel == "message");
                let links = message.map(|message| message.links.clone()).unwrap_or_default();
                let text = links.get("plainMessage").or(links.get("htmlMessage"));
                received.lock().unwrap().extend(text.map(|links| crate::data_text(&links[0])));
                if event.kind == "started" && event.rel == "messagingInvitation" {
                    let accept = format!("{}/accept", event.href);
                    let _ = left(user.request(Method::POST, &accept).send().await).await;
                }
            }
        }
        user.cursor = package.onward.1;
    }
}

#[tokio::test]
async fn everything_at_once_loses_nothing_that_was_acknowledged() {
    let simulator = simulator(|settings| {
        settings.accounts = 4;
        settings.traffic = Some(TrafficSettings { messages_per_second: 150.0, ..TrafficSettings::default() });
    })
    .await;
    let received = Arc::new(Mutex::new(Vec::new()));
    let mut clients = Vec::new();
    for number in 1..=4 {
        let client = follow(simulator.clone(), format!("user{number:04}"), Arc::clone(&received));
        clients.push(tokio::spawn(client));
    }
    let all_there = || simulator.accounts().iter().all(|account| !account.applications.is_empty());
    eventually("not signed in", all_there).await;
    for kind in [
        FaultKind::CutBefore,
        FaultKind::CutAfter,
        FaultKind::CutMidway,
        FaultKind::Delay { ms: 3 },
        FaultKind::DelayAfter { ms: 3 },
        FaultKind::status(503),
        FaultKind::PgetReplaced,
        FaultKind::TruncatedXml,
        FaultKind::InvalidUtf8,
        FaultKind::Doctype,
        FaultKind::Resync,
        FaultKind::UnknownThings,
        FaultKind::OddOrder,
    ] {
        simulator.inject(Fault::new(kind).on(Operation::Events).share(0.05)).unwrap();
    }
    eventually("no traffic", || simulator.traffic_written() > 300).await;
    simulator.stop_traffic();
    simulator.clear_faults(None);
    assert!(simulator.quiet(LIMIT).await, "{:?}", simulator.counters());
    for client in clients {
        client.abort();
    }
    let received = received.lock().unwrap().clone();
    let messages = simulator
        .ledger()
        .incoming
        .into_iter()
        .filter(|entry| entry.kind == MessageKind::Message && entry.state == IncomingState::Acknowledged);
    for entry in messages {
        let text = entry.text.or(entry.html).unwrap();
        assert!(received.contains(&text), "{text:?} was acknowledged and never read");
    }
    simulator.shutdown().await;
}
