//! The simulator over real sockets, as clients of either spelling meet it. Expectations come from the protocol's
//! description, not from this program's client.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod faults;
mod logs;
mod meetings;
mod user;
mod windows;

use std::time::{Duration, Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use percent_encoding::percent_decode_str;
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use ucwa_relay::simulator::{
    CallRequest, ConversationPhase, Escalation, IncomingState, LedgerSnapshot, MessageKind, OutgoingState,
    SettingsChange, Simulator, SimulatorSettings, TrafficSettings,
};

use user::{LIMIT, Node, Package, UCWA_XML, User, http, token};

/// The text of a data URI in UTF-8.
fn data_text(uri: &str) -> String {
    let (head, payload) = uri.split_once(',').unwrap();
    let bytes = if head.ends_with(";base64") {
        STANDARD.decode(payload).unwrap()
    } else {
        percent_decode_str(&payload.replace('+', " ")).collect()
    };
    String::from_utf8(bytes).unwrap()
}

async fn simulator(change: impl FnOnce(&mut SimulatorSettings)) -> Simulator {
    let mut settings =
        SimulatorSettings { link_only_share: 0.0, early_event_share: 0.0, ..SimulatorSettings::default() };
    change(&mut settings);
    Simulator::start(settings).await.unwrap()
}

fn call(to: &str, text: &str) -> CallRequest {
    CallRequest {
        from: "sip:lene.aaling@contoso.example".into(),
        to_account: to.into(),
        text: Some(text.into()),
        html: None,
        subject: String::new(),
    }
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    eventually_asked(what, async || condition()).await;
}

/// As [`eventually`], for what has to be asked over the network.
async fn eventually_asked(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

// ---- Sign-in ----

#[tokio::test]
async fn discovery_leads_through_the_challenge_to_the_applications() {
    let simulator = simulator(|settings| {
        settings.named_accounts = vec![("alice".into(), "p+&=%ä".into())];
        settings.token_lifetime = Duration::from_secs(2);
    })
    .await;
    let http = http();
    let root = http.get(simulator.discovery_url()).send().await.unwrap().text().await.unwrap();
    let root: Value = serde_json::from_str(&root).unwrap();
    let user = root["_links"]["user"]["href"].as_str().unwrap();
    let refused = http.get(user).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(refused.headers()[header::CONTENT_TYPE], "text/html");
    let challenges: Vec<_> = refused.headers().get_all(header::WWW_AUTHENTICATE).iter().collect();
    assert_eq!(challenges.len(), 2);
    assert!(challenges[0].to_str().unwrap().starts_with("Bearer trusted_issuers="));
    let ticket_service = format!("http://{}/WebTicket/oauthtoken", simulator.address());
    let expected = format!("MsRtcOAuth href=\"{ticket_service}\",grant_type=\"password\"");
    assert_eq!(challenges[1].to_str().unwrap(), expected);

    let wrong = token(&http, &simulator, "alice", "wrong").await;
    assert_eq!(wrong.status(), StatusCode::BAD_REQUEST);
    assert!(wrong.headers().contains_key("x-ms-diagnostics"));
    assert_eq!(wrong.text().await.unwrap(), "{\"error\":\"invalid_grant\"}");
    let windows = [("grant_type", "urn:microsoft.rtc:windows")];
    let windows = http.post(ticket_service).form(&windows).send().await.unwrap();
    assert_eq!(windows.text().await.unwrap(), "{\"error\":\"unsupported_grant_type\"}");

    for username in ["sip:Alice@contoso.example", "alice@CONTOSO.example", "CONTOSO\\alice"] {
        let granted = token(&http, &simulator, username, "p+&=%ä").await;
        assert_eq!(granted.status(), StatusCode::OK, "{username}");
    }
    let granted = token(&http, &simulator, "alice", "p+&=%ä").await;
    let granted: Value = serde_json::from_str(&granted.text().await.unwrap()).unwrap();
    assert_eq!(granted["expires_in"], 2);
    let bearer = granted["access_token"].as_str().unwrap();
    assert!(bearer.starts_with("cwt="));
    let asked = http.get(user).bearer_auth(bearer).header(header::ACCEPT, UCWA_XML).send().await.unwrap();
    let found = Node::parse(&asked.text().await.unwrap()).resource();
    let applications = found.link("applications");
    assert_eq!(applications, format!("http://{}/ucwa/oauth/v1/applications", simulator.address()));
    eventually_asked("the token never expires", async || {
        let answer = http.get(applications).bearer_auth(bearer).send().await.unwrap();
        match answer.status() {
            StatusCode::UNAUTHORIZED => true,
            status => {
                assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
                false
            }
        }
    })
    .await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_pool_on_another_host_wants_its_own_token() {
    let simulator = simulator(|settings| settings.pool_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let http = http();
    let front = format!("http://{}", simulator.address());
    let pool = format!("http://{}", simulator.pool_address().unwrap());
    let bearer = async |origin: &str| {
        let form = [("grant_type", "password"), ("username", "user0001"), ("password", "simulated")];
        let granted = http.post(format!("{origin}/WebTicket/oauthtoken")).form(&form).send().await.unwrap();
        let granted: Value = serde_json::from_str(&granted.text().await.unwrap()).unwrap();
        granted["access_token"].as_str().unwrap().to_owned()
    };
    let (first, second) = (bearer(&front).await, bearer(&pool).await);
    let user = format!("{front}/Autodiscover/AutodiscoverService.svc/root/oauth/user");
    let found = http.get(&user).bearer_auth(&first).header(header::ACCEPT, UCWA_XML).send().await.unwrap();
    let found = Node::parse(&found.text().await.unwrap()).resource();
    let applications = format!("{pool}/ucwa/oauth/v1/applications");
    assert_eq!(found.link("applications"), applications);
    let status = async |url: &str, token: &str| http.get(url).bearer_auth(token).send().await.unwrap();
    assert_eq!(status(&user, &second).await.status(), StatusCode::UNAUTHORIZED);
    let refused = status(&applications, &first).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let challenges = refused.headers().get_all(header::WWW_AUTHENTICATE).iter();
    let challenges: Vec<_> = challenges.map(|value| value.to_str().unwrap()).collect();
    assert!(challenges[1].starts_with(&format!("MsRtcOAuth href=\"{pool}/WebTicket/oauthtoken\"")));
    assert_eq!(status(&applications, &second).await.status(), StatusCode::METHOD_NOT_ALLOWED);
    let at_front = format!("{front}/ucwa/oauth/v1/applications");
    assert_eq!(status(&at_front, &first).await.status(), StatusCode::NOT_FOUND);
    simulator.shutdown().await;
}

#[tokio::test]
async fn settings_change_while_it_runs() {
    let simulator = simulator(|settings| settings.admin_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let http = http();
    let admin = format!("http://{}/settings", simulator.admin_address().unwrap());
    let change = async |body: Value| {
        let request = http.post(&admin).header(header::CONTENT_TYPE, "application/json");
        request.body(body.to_string()).send().await.unwrap()
    };
    let followed = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let discover = async || {
        let answer = followed.get(simulator.discovery_url()).header(header::ACCEPT, UCWA_XML);
        let answer = answer.send().await.unwrap();
        let location = answer.headers().get(header::LOCATION).map(|value| value.to_str().unwrap().to_owned());
        (answer.status().as_u16(), location, answer.text().await.unwrap())
    };
    let root = "/Autodiscover/AutodiscoverService.svc/root";
    change(json!({ "discovery_redirect": { "location": root } })).await;
    let (_, _, within) = discover().await;
    let within = Node::parse(&within).resource().link("redirect").to_owned();
    assert_eq!(within, format!("http://{}{root}", simulator.address()));
    let led = http.get(within).header(header::ACCEPT, UCWA_XML).send().await.unwrap().text().await.unwrap();
    let user = Node::parse(&led).resource().link("user").to_owned();
    let foreign = "https://foreign.invalid/";
    change(json!({ "discovery_redirect": { "location": foreign, "status": 302 } })).await;
    let (status, location, _) = discover().await;
    assert_eq!((status, location.as_deref()), (302, Some(foreign)));
    change(json!({ "discovery_redirect": { "location": "" }, "user_redirect": foreign })).await;
    assert!(Node::parse(&discover().await.2).resource().links.contains_key("user"));

    let changed = change(json!({ "token_lifetime_ms": 3000, "application_expiry_ms": 200 })).await;
    let now: Value = serde_json::from_str(&changed.text().await.unwrap()).unwrap();
    assert_eq!(now["token_lifetime_ms"], 3000);
    assert_eq!(now["user_redirect"], foreign);
    assert!(change(json!({ "gravity": 0 })).await.status().is_client_error());
    let granted = token(&http, &simulator, "user0001", "simulated").await.text().await.unwrap();
    let granted: Value = serde_json::from_str(&granted).unwrap();
    assert_eq!(granted["expires_in"], 3);
    let bearer = granted["access_token"].as_str().unwrap();
    let found = http.get(user).bearer_auth(bearer).header(header::ACCEPT, UCWA_XML).send().await.unwrap();
    let found = Node::parse(&found.text().await.unwrap()).resource();
    assert_eq!(found.link("redirect"), foreign);
    assert!(!found.links.contains_key("applications"));
    let _user = User::sign_in(&simulator, "user0001", true).await;
    eventually("the application never expires", || simulator.accounts()[0].applications.is_empty()).await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn an_application_is_created_resumed_and_deleted() {
    for xml in [true, false] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in_quietly(&simulator, "user0001", xml).await;
        let me = &user.application.embedded["me"];
        assert!(me.links.contains_key("makeMeAvailable"));
        assert!(!me.links.contains_key("reportMyActivity"));
        assert_eq!(user.application.embedded["communication"].text("supportedModalities"), "");
        let report = format!("{}/reportMyActivity", me.href);
        let refused = user.request(Method::POST, &report).send().await.unwrap();
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        assert_eq!(user.subcode(refused).await, "MakeMeAvailableRequired");

        assert_eq!(user.make_me_available().await.status(), StatusCode::NO_CONTENT);
        let again = user.make_me_available().await;
        assert_eq!(again.status(), StatusCode::CONFLICT);
        assert_eq!(user.subcode(again).await, "AlreadyExists");
        user.read_application().await;
        let me = &user.application.embedded["me"];
        assert!(!me.links.contains_key("makeMeAvailable"));
        assert_eq!(user.post_empty(me.link("reportMyActivity")).await, StatusCode::NO_CONTENT);
        let communication = &user.application.embedded["communication"];
        assert_eq!(communication.text("supportedMessageFormats"), "Plain,Html");

        let resumed = user.create_application("endpoint-1").await;
        assert_eq!(resumed.status(), StatusCode::OK);
        assert_eq!(user.found(resumed).await.href, user.application.href);
        let other = user.create_application("endpoint-2").await;
        assert_eq!(other.status(), StatusCode::CREATED);
        assert!(!other.headers().contains_key(header::LOCATION));
        assert!(other.headers().contains_key(header::ETAG));
        let invalid = user.create_application(&"x".repeat(101)).await;
        assert_eq!(invalid.status(), StatusCode::BAD_REQUEST);
        assert_eq!(user.subcode(invalid).await, "ParameterValidationFailure");

        let gone = user.request(Method::DELETE, &user.application.href).send().await.unwrap();
        assert_eq!(gone.status(), StatusCode::NO_CONTENT);
        let lost = user.get(&user.cursor).await;
        assert_eq!(lost.status(), StatusCode::NOT_FOUND);
        assert_eq!(user.subcode(lost).await, "ApplicationNotFound");
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn an_application_without_a_parked_get_expires() {
    let simulator = simulator(|settings| settings.application_expiry = Duration::from_millis(300)).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    eventually("the application never expires", || simulator.accounts()[0].applications.is_empty()).await;
    let lost = user.get(&user.application.href).await;
    assert_eq!(user.subcode(lost).await, "ApplicationNotFound");
    simulator.shutdown().await;
}

#[tokio::test]
async fn one_application_too_many_ends_the_oldest() {
    let simulator = simulator(|settings| settings.applications_per_account = 1).await;
    let user = User::sign_in(&simulator, "user0001", true).await;
    assert_eq!(user.create_application("endpoint-2").await.status(), StatusCode::CREATED);
    let lost = user.get(&user.cursor).await;
    assert_eq!(lost.status(), StatusCode::GONE);
    assert_eq!(user.subcode(lost).await, "TooManyApplications");
    simulator.shutdown().await;
}

#[tokio::test]
async fn communication_is_changed_with_its_etag_and_all_its_properties() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", false).await;
    let href = user.application.embedded["communication"].href.clone();
    let put = async |etag: Option<&str>, body: String| {
        let request = user.request(Method::PUT, &href).header(header::CONTENT_TYPE, "application/json");
        let request = match etag {
            Some(etag) => request.header(header::IF_MATCH, etag),
            None => request,
        };
        request.body(body).send().await.unwrap().status()
    };
    let answer = user.get(&href).await;
    let etag = answer.headers()[header::ETAG].to_str().unwrap().to_owned();
    let mut body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    assert_eq!(format!("\"{}\"", body["etag"].as_str().unwrap()), etag);
    body["supportedMessageFormats"] = json!(["Plain"]);
    assert_eq!(put(None, body.to_string()).await, StatusCode::PRECONDITION_REQUIRED);
    assert_eq!(put(Some("\"1\""), body.to_string()).await, StatusCode::PRECONDITION_FAILED);
    assert_eq!(put(Some(&etag), "{}".into()).await, StatusCode::BAD_REQUEST);
    assert_eq!(put(Some(&etag), body.to_string()).await, StatusCode::NO_CONTENT);
    assert_eq!(user.read(&href).await.text("supportedMessageFormats"), "Plain");
    simulator.shutdown().await;
}

// ---- The event channel ----

#[tokio::test]
async fn a_package_comes_again_until_the_next_is_asked_for() {
    for xml in [true, false] {
        let simulator = simulator(|_| {}).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        simulator.call(call("user0001@contoso.example", "Hi Tosh")).await.unwrap();
        let first = user.peek().await;
        let second = user.peek().await;
        assert_eq!(first.raw, second.raw);
        assert!(first.events.iter().any(|event| event.rel == "messagingInvitation"));
        assert_eq!(simulator.ledger().incoming[0].state, IncomingState::Pending);

        // A package that does not exist yet: the server says where to go on.
        let far = user.get(&user.cursor.replace("ack=1", "ack=7")).await;
        let far = Package::parse(far.text().await.unwrap(), xml);
        assert_eq!(far.onward, ("resync".to_owned(), user.cursor.clone()));
        assert!(far.events.is_empty());

        let package = user.poll().await;
        assert_eq!(package.raw, first.raw);
        // Asking for the next package is the acknowledgement, before anything comes of it.
        let parked = tokio::spawn(user.request(Method::GET, &user.cursor).send());
        let acknowledged = || simulator.ledger().incoming[0].state == IncomingState::Acknowledged;
        eventually("not acknowledged", acknowledged).await;
        parked.abort();
        eventually("a dropped connection stays parked", || !simulator.accounts()[0].applications[0].parked)
            .await;
        // What was acknowledged does not come again.
        let old = user.get(&user.cursor.replace("ack=2", "ack=1")).await;
        let old = Package::parse(old.text().await.unwrap(), xml);
        assert_eq!(old.onward, ("resync".to_owned(), user.cursor.clone()));
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn a_second_get_replaces_the_first_and_silence_ends_empty() {
    for xml in [true, false] {
        let short = Some(Duration::from_millis(700));
        let simulator = simulator(|settings| settings.poll_timeout_limit = short).await;
        let mut user = User::sign_in_quietly(&simulator, "user0001", xml).await;
        let first = tokio::spawn(user.request(Method::GET, &user.cursor).send());
        eventually("not parked", || simulator.accounts()[0].applications[0].parked).await;
        let second = user.request(Method::GET, &user.cursor).send();
        let (first, second) = tokio::join!(first, second);
        let first = first.unwrap().unwrap();
        assert_eq!(first.status(), StatusCode::CONFLICT);
        assert_eq!(user.subcode(first).await, "PGetReplaced");
        let second = Package::parse(second.unwrap().text().await.unwrap(), xml);
        assert!(second.events.is_empty());
        assert_eq!(second.onward, ("next".to_owned(), user.cursor.replace("ack=1", "ack=2")));
        user.cursor = second.onward.1;
        assert!(user.poll().await.events.is_empty());
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn parameters_out_of_range_are_refused() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in_quietly(&simulator, "user0001", true).await;
    for parameter in ["timeout=179", "timeout=1801", "low=4", "medium=x", "priority=-1", "ack=one"] {
        let answer = user.get(&format!("{}&{parameter}", user.cursor)).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{parameter}");
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_was_not_fetched_in_time_is_lost_and_the_writer_is_told() {
    let limit = Duration::from_millis(400);
    let simulator = simulator(|settings| settings.message_fetch_limit = limit).await;
    let mut alice = User::sign_in(&simulator, "user0001", true).await;
    let mut bob = User::sign_in(&simulator, "user0002", false).await;
    alice.start("sip:user0002@contoso.example", None, "op-1").await;
    let invitation = bob.wait("started", "messagingInvitation").await;
    let invitation = bob.resource_of(&invitation).await;
    assert_eq!(bob.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    let messaging = alice.wait_connected().await;
    bob.wait("completed", "messagingInvitation").await;
    // From here on Bob's client sleeps.
    let sent = alice.send(&messaging, "are you there?", "text/plain", "op-2").await;
    assert_eq!(sent.status(), StatusCode::CREATED);
    let location = sent.headers()[header::LOCATION].to_str().unwrap().to_owned();
    let failed = alice.wait("completed", "message").await;
    assert_eq!((failed.href, failed.status.as_str()), (location, "Failure"));
    let ledger = simulator.ledger();
    assert_eq!(ledger.incoming[0].state, IncomingState::Expired);
    assert_eq!(ledger.outgoing[0].state, OutgoingState::Failed);
    simulator.shutdown().await;
}

// ---- Incoming ----

#[tokio::test]
async fn an_incoming_call_is_accepted_and_its_text_comes_again() {
    for (xml, link_only_share) in [(true, 0.0), (false, 0.0), (true, 1.0), (false, 1.0)] {
        let simulator = simulator(|settings| settings.link_only_share = link_only_share).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        let text = "100% + a&b <c> \u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{1f600}\r\n";
        let id = simulator.call(call("USER0001@contoso.example", text)).await.unwrap();
        let started = user.wait("started", "messagingInvitation").await;
        assert_eq!(started.sender, "communication");
        let invitation = user.resource_of(&started).await;
        assert_eq!(invitation.text("direction"), "Incoming");
        assert_eq!(invitation.text("state"), "Connecting");
        assert_eq!(invitation.text("operationId"), "");
        assert_eq!(data_text(invitation.link("message")), text);
        assert_eq!(invitation.embedded["from"].text("uri"), "sip:lene.aaling@contoso.example");
        assert_eq!(invitation.embedded["from"].text("name"), "Lene Aaling");
        user.wait("added", "conversation").await;
        user.wait("added", "localParticipant").await;
        let caller = user.wait("added", "participant").await;
        assert_eq!(user.resource_of(&caller).await.text("uri"), "sip:lene.aaling@contoso.example");
        assert_eq!(simulator.conversation_phase(&id), ConversationPhase::Ringing);

        let accept = invitation.link("accept");
        assert_eq!(user.post_empty(&format!("{accept}?sessionContext=x")).await, StatusCode::NO_CONTENT);
        assert!(user.post_empty(accept).await.is_client_error());
        let messaging = user.wait_connected().await;
        assert_eq!(messaging.text("negotiatedMessageFormats"), "Plain,Html");
        let completed = user.wait("completed", "messagingInvitation").await;
        assert_eq!(completed.status, "Success");
        let repeated = user.wait("completed", "message").await;
        assert_eq!(repeated.sender, "conversation");
        let repeated = user.resource_of(&repeated).await;
        assert_eq!(data_text(repeated.link("plainMessage")), text);
        assert_eq!(repeated.text("direction"), "Incoming");

        assert!(simulator.connected(&id, LIMIT).await);
        simulator.say_from(&id, None, None, Some("<b>bold</b>")).unwrap();
        let message = user.wait("completed", "message").await;
        let message = user.resource_of(&message).await;
        assert_eq!(data_text(message.link("htmlMessage")), "<b>bold</b>");

        simulator.leave(&id).unwrap();
        user.wait("deleted", "participant").await;
        let deleted = user.wait("deleted", "conversation").await;
        assert!(deleted.resource.is_none());
        assert_eq!(user.get(&deleted.href).await.status(), StatusCode::NOT_FOUND);
        let parked = tokio::spawn(user.request(Method::GET, &user.cursor).send());
        eventually("not quiet", || simulator.is_quiet()).await;
        parked.abort();
        let ledger = simulator.ledger();
        let entries: Vec<_> = ledger.incoming.iter().map(|entry| (entry.kind, entry.state)).collect();
        let acknowledged = IncomingState::Acknowledged;
        assert_eq!(entries, [(MessageKind::Invitation, acknowledged), (MessageKind::Message, acknowledged)]);
        assert_eq!(ledger.incoming[0].text.as_deref(), Some(text));
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn a_call_that_is_declined_or_missed_is_refused_in_the_ledger() {
    let simulator = simulator(|settings| settings.ring_time = Duration::from_millis(300)).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    simulator.call(call("user0001@contoso.example", "one")).await.unwrap();
    let started = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&started).await;
    let answer = user.post(invitation.link("decline"), &[("reason", "Local")], &[]).await;
    assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    let completed = user.wait("completed", "messagingInvitation").await;
    assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "Declined"));
    user.wait("deleted", "conversation").await;

    simulator.call(call("user0001@contoso.example", "two")).await.unwrap();
    let completed = user.wait("completed", "messagingInvitation").await;
    assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", "Missed"));
    let ledger = simulator.ledger();
    assert!(ledger.incoming.iter().all(|entry| entry.state == IncomingState::Refused));
    assert!(ledger.incoming[0].package_acknowledged);
    simulator.shutdown().await;
}

#[tokio::test]
async fn nobody_calls_an_account_that_lurks() {
    let simulator = simulator(|_| {}).await;
    let _lurker = User::sign_in_quietly(&simulator, "user0001", true).await;
    assert!(simulator.call(call("user0001@contoso.example", "x")).await.is_err());
    assert!(simulator.call(call("stranger@contoso.example", "x")).await.is_err());
    assert!(simulator.ledger().incoming.is_empty());
    simulator.shutdown().await;
}

// ---- Outgoing ----

#[tokio::test]
async fn an_outgoing_call_connects_and_sends() {
    for (xml, early) in [(true, 0.0), (false, 0.0), (true, 1.0), (false, 1.0)] {
        let simulator = simulator(|settings| settings.early_event_share = early).await;
        let mut user = User::sign_in(&simulator, "user0001", xml).await;
        let message = "data:text/plain;charset=utf-8,Hi%20there%2b+you";
        let location = user.start("sip:Echo1@contoso.example", Some(message), "op-1").await;
        let started = user.wait("started", "messagingInvitation").await;
        assert_eq!(started.href, location);
        let invitation = started.resource.clone().unwrap();
        assert_eq!(invitation.text("operationId"), "op-1");
        assert_eq!(invitation.text("direction"), "Outgoing");
        assert_eq!(invitation.text("subject"), "Task & <Sample>");
        assert!(invitation.links.contains_key("cancel"));
        let messaging = user.wait_connected().await;
        let completed = user.wait("completed", "messagingInvitation").await;
        assert_eq!(completed.status, "Success");
        let completed = user.resource_of(&completed).await;
        let accepted_by = &completed.embedded["acceptedByParticipant"];
        assert_eq!(accepted_by.text("uri"), "sip:echo1@contoso.example");
        let echo = user.wait("completed", "message").await;
        assert_eq!(data_text(user.resource_of(&echo).await.link("plainMessage")), "Hi there+ you");

        let html = "<i>ü & \u{1f600}</i>";
        let sent = user.send(&messaging, html, "text/html; charset=utf-8", "op-2").await;
        assert_eq!(sent.status(), StatusCode::CREATED);
        let location = sent.headers()[header::LOCATION].to_str().unwrap().to_owned();
        assert!(location.starts_with("/ucwa/"));
        let is_it = |event: &user::Happened| event.kind == "completed" && event.href == location;
        let completed = user.wait_for("the delivery", is_it).await;
        assert_eq!(completed.status, "Success");
        assert_eq!(user.resource_of(&completed).await.text("direction"), "Outgoing");
        let echo = user.wait("completed", "message").await;
        assert_eq!(data_text(user.resource_of(&echo).await.link("htmlMessage")), html);

        let refused = user.send(&messaging, "x", "application/xml", "op-3").await;
        assert_eq!(refused.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
        let refused = user.send(&messaging, &"x".repeat(70_000), "text/plain", "op-4").await;
        assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let wrong = user.request(Method::POST, &messaging.href).body("x").send().await.unwrap();
        assert_eq!(wrong.status(), StatusCode::INTERNAL_SERVER_ERROR);

        assert_eq!(user.post_empty(messaging.link("stopMessaging")).await, StatusCode::NO_CONTENT);
        user.wait("deleted", "conversation").await;
        let gone = user.send(&messaging, "x", "text/plain", "op-5").await;
        assert_eq!(gone.status(), StatusCode::NOT_FOUND);
        let ledger = simulator.ledger();
        let outgoing = ledger.outgoing.iter();
        let outgoing: Vec<_> = outgoing
            .map(|entry| (entry.operation_id.as_deref().unwrap(), entry.text.as_str(), entry.state))
            .collect();
        let delivered = OutgoingState::Delivered;
        assert_eq!(outgoing, [("op-1", "Hi there+ you", delivered), ("op-2", html, delivered)]);
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn correspondents_behave_as_their_addresses_say() {
    let simulator = simulator(|settings| settings.ring_time = Duration::from_millis(300)).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    for (name, subcode) in [
        ("declines", "Declined"),
        ("busy.always", "Busy"),
        ("dnd", "DoNotDisturb"),
        ("absent7", "Timeout"),
        ("unreachable", "Unreachable"),
        ("unknown", "DestinationNotFound"),
        ("user0002", "Unavailable"),
    ] {
        let location = user.start(&format!("sip:{name}@contoso.example"), Some("data:,hello"), name).await;
        let is_it = |event: &user::Happened| event.kind == "completed" && event.href == location;
        let completed = user.wait_for(name, is_it).await;
        assert_eq!((completed.status.as_str(), completed.subcode.as_str()), ("Failure", subcode), "{name}");
        let ledger = simulator.ledger();
        let entry = ledger.outgoing.iter().find(|entry| entry.operation_id.as_deref() == Some(name)).unwrap();
        assert_eq!((entry.state, entry.failure.as_deref()), (OutgoingState::Failed, Some(subcode)));
    }
    let href = user.application.embedded["communication"].link("startMessaging").to_owned();
    let missing = [("operationId", "m"), ("to", "sip:missing@contoso.example")];
    let answer = user.post(&href, &missing, &[]).await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    assert_eq!(user.subcode(answer).await, "DestinationNotFound");
    let answer = user.post(&href, &[("operationId", "m"), ("to", "contoso")], &[]).await;
    assert_eq!(user.subcode(answer).await, "ParameterValidationFailure");

    user.seen.clear();
    user.start("sip:leaves@contoso.example", Some("data:,bye"), "l").await;
    user.wait("completed", "messagingInvitation").await;
    user.wait("deleted", "conversation").await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_call_can_be_withdrawn() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", false).await;
    user.start("sip:absent@contoso.example", Some("data:,hello"), "op").await;
    let started = user.wait("started", "messagingInvitation").await;
    let invitation = user.resource_of(&started).await;
    assert_eq!(user.post_empty(invitation.link("cancel")).await, StatusCode::NO_CONTENT);
    let completed = user.wait("completed", "messagingInvitation").await;
    assert_eq!(completed.subcode, "Canceled");
    simulator.shutdown().await;
}

#[tokio::test]
async fn messaging_that_was_closed_is_added_again() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    user.start("sip:pauses@contoso.example", Some("data:,hello"), "op-1").await;
    user.wait_connected().await;
    user.wait("completed", "messagingInvitation").await;
    let closed = user.wait("updated", "messaging").await;
    let closed = user.resource_of(&closed).await;
    assert_eq!(closed.text("state"), "Disconnected");
    user.seen.clear();
    let answer = user.post(closed.link("addMessaging"), &[("operationId", "op-2")], &[]).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    let started = user.wait("started", "messagingInvitation").await;
    assert_eq!(user.resource_of(&started).await.text("operationId"), "op-2");
    let messaging = user.wait_connected().await;
    assert_eq!(messaging.link("conversation"), closed.link("conversation"));
    assert_eq!(user.send(&messaging, "again", "text/plain", "op-3").await.status(), StatusCode::CREATED);
    simulator.shutdown().await;
}

// ---- Accounts among themselves, groups ----

#[tokio::test]
async fn two_accounts_talk_to_each_other() {
    let simulator = simulator(|settings| settings.link_only_share = 0.3).await;
    let mut alice = User::sign_in(&simulator, "user0001", true).await;
    let mut bob = User::sign_in(&simulator, "user0002", false).await;
    alice.start("sip:user0002@contoso.example", Some("data:text/plain;base64,YSti"), "op-1").await;
    let started = bob.wait("started", "messagingInvitation").await;
    let invitation = bob.resource_of(&started).await;
    assert_eq!(data_text(invitation.link("message")), "a+b");
    assert_eq!(bob.post_empty(invitation.link("accept")).await, StatusCode::NO_CONTENT);
    let hers = alice.wait_connected().await;
    let his = bob.wait_connected().await;
    bob.wait("completed", "message").await;

    assert_eq!(bob.post_empty(his.link("setIsTyping")).await, StatusCode::NO_CONTENT);
    let typing = |event: &user::Happened| event.within.as_deref() == Some("typingParticipants");
    alice.wait_for("typing", typing).await;
    for number in 0..5 {
        let text = format!("message {number}");
        let sent = alice.send(&hers, &text, "text/plain", &format!("a{number}")).await;
        let location = sent.headers()[header::LOCATION].to_str().unwrap().to_owned();
        let message = bob.wait("completed", "message").await;
        assert_eq!(data_text(bob.resource_of(&message).await.link("plainMessage")), text);
        let is_it = |event: &user::Happened| event.kind == "completed" && event.href == location;
        assert_eq!(alice.wait_for("the delivery", is_it).await.status, "Success");
    }
    let left = bob.request(Method::DELETE, his.link("conversation")).send().await.unwrap();
    assert_eq!(left.status(), StatusCode::NO_CONTENT);
    alice.wait("deleted", "conversation").await;
    bob.wait("deleted", "conversation").await;
    let ledger = simulator.ledger();
    assert_eq!((ledger.incoming.len(), ledger.outgoing.len()), (6, 6));
    assert_eq!(ledger.counters.outgoing_delivered, 6);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_third_person_makes_it_a_conference_with_new_addresses() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    user.start("sip:silent1@contoso.example", None, "op-1").await;
    let before = user.wait_connected().await;
    let conversation = user.read(before.link("conversation")).await;
    user.seen.clear();
    for (name, status) in [("silent2", "Success"), ("declines", "Failure")] {
        let to = format!("sip:{name}@contoso.example");
        let properties = [("operationId", name), ("to", to.as_str())];
        let answer = user.post(conversation.link("addParticipant"), &properties, &[]).await;
        assert_eq!(answer.status(), StatusCode::CREATED);
        let started = user.wait("started", "participantInvitation").await;
        assert_eq!(user.resource_of(&started).await.text("to"), to);
        let completed = user.wait("completed", "participantInvitation").await;
        assert_eq!(completed.status, status);
    }
    let after = user.wait_connected().await;
    assert_ne!(after.link("sendMessage"), before.link("sendMessage"));
    let conversation = user.read(after.link("conversation")).await;
    assert_eq!(conversation.text("state"), "Conferenced");
    let participants = user.read(conversation.link("participants")).await;
    assert_eq!(participants.links["participant"].len(), 2);
    assert_eq!(user.send(&before, "x", "text/plain", "x").await.status(), StatusCode::NOT_FOUND);
    assert_eq!(user.send(&after, "x", "text/plain", "y").await.status(), StatusCode::CREATED);
    assert_eq!(simulator.ledger().outgoing[0].to.len(), 2);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_meeting_that_a_user_starts_is_joined_at_once_and_others_are_brought_in() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    let communication = user.application.embedded["communication"].clone();
    let properties = [("operationId", "op-1"), ("subject", "Plan"), ("threadId", "thread-1")];
    let answer = user.post(communication.link("startOnlineMeeting"), &properties, &[]).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    let completed = user.wait("completed", "onlineMeetingInvitation").await;
    assert_eq!(completed.status, "Success");
    let invitation = user.resource_of(&completed).await;
    let told = ["direction", "operationId", "subject", "threadId", "state"].map(|name| invitation.text(name));
    assert_eq!(told, ["Outgoing", "op-1", "Plan", "thread-1", "Connected"]);
    let conversation = user.read(invitation.link("conversation")).await;
    assert_eq!(conversation.text("state"), "Conferenced");

    // Its messaging is not there before it is added, which needs nobody else.
    let messaging = user.read(conversation.link("messaging")).await;
    assert_eq!(messaging.text("state"), "Disconnected");
    user.seen.clear();
    let answer = user.post(messaging.link("addMessaging"), &[("operationId", "op-2")], &[]).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    assert_eq!(user.wait("completed", "messagingInvitation").await.status, "Success");
    // Who declines does not end it, though nobody else is there yet.
    for (name, status) in [("declines", "Failure"), ("silent1", "Success"), ("silent2", "Success")] {
        user.seen.clear();
        let to = format!("sip:{name}@contoso.example");
        let properties = [("operationId", name), ("to", to.as_str())];
        let answer = user.post(conversation.link("addParticipant"), &properties, &[]).await;
        assert_eq!(answer.status(), StatusCode::CREATED);
        assert_eq!(user.wait("completed", "participantInvitation").await.status, status, "{name}");
    }
    let participants = user.read(conversation.link("participants")).await;
    assert_eq!(participants.links["participant"].len(), 2);
    let messaging = user.read(conversation.link("messaging")).await;
    assert_eq!(user.send(&messaging, "x", "text/plain", "hello").await.status(), StatusCode::CREATED);
    assert_eq!(simulator.ledger().outgoing[0].to.len(), 2);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_conversation_of_two_grows_only_where_the_settings_let_it() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    for (number, escalation) in
        [Escalation::Absent, Escalation::Refused, Escalation::Failing].into_iter().enumerate()
    {
        simulator.change_settings(SettingsChange { escalation: Some(escalation), ..Default::default() });
        user.seen.clear();
        user.start(&format!("sip:silent{number}@contoso.example"), None, "op").await;
        let messaging = user.wait_connected().await;
        let conversation = user.read(messaging.link("conversation")).await;
        let offered = conversation.links.contains_key("addParticipant");
        assert_eq!(offered, escalation != Escalation::Absent, "{escalation:?}");
        if !offered {
            continue;
        }
        let properties = [("operationId", "add"), ("to", "sip:silent9@contoso.example")];
        let answer = user.post(conversation.link("addParticipant"), &properties, &[]).await;
        if escalation == Escalation::Refused {
            assert_eq!(answer.status(), StatusCode::CONFLICT);
            continue;
        }
        let completed = user.wait("completed", "participantInvitation").await;
        assert_eq!(completed.status, "Failure");
        // The conversation of two goes on.
        assert_eq!(user.send(&messaging, "x", "text/plain", "x").await.status(), StatusCode::CREATED);
    }
    simulator.shutdown().await;
}

// ---- Others ----

#[tokio::test]
async fn people_are_found_and_batches_are_answered() {
    let simulator = simulator(|_| {}).await;
    let user = User::sign_in(&simulator, "user0001", false).await;
    let people = user.application.embedded["people"].clone();
    let found = user.read(&format!("{}?query=lene.aaling&limit=3", people.link("search"))).await;
    assert_eq!(found.embedded["contact"].text("uri"), "sip:lene.aaling@contoso.example");
    assert_eq!(user.get(people.link("search")).await.status(), StatusCode::BAD_REQUEST);
    assert!(!user.read(people.link("myContacts")).await.embedded.is_empty());

    let batch = user.application.link("batch").to_owned();
    let part = |href: &str| {
        format!(
            "--b\r\nContent-Type: application/http; msgtype=request\r\n\r\nGET {href} HTTP/1.1\r\n\
             Host: simulator\r\nAccept: application/json\r\n\r\n"
        )
    };
    let body = format!("{}{}--b--\r\n", part(people.link("myContacts")), part("/nowhere"));
    let request = user.request(Method::POST, &batch);
    let request = request.header(header::CONTENT_TYPE, "multipart/batching;boundary=b");
    let answer = request.body(body).send().await.unwrap();
    let content_type = answer.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
    assert!(content_type.starts_with("multipart/batching; boundary="), "{content_type}");
    let text = answer.text().await.unwrap();
    assert_eq!(text.matches("HTTP/1.1 ").count(), 2);
    assert!(text.find("200 OK").unwrap() < text.find("404 Not Found").unwrap());
    simulator.shutdown().await;
}

/// Accepts every call and follows the channel for ever.
async fn accept_everything(mut user: User) {
    loop {
        for event in user.poll().await.events {
            if event.kind != "started" || event.rel != "messagingInvitation" {
                continue;
            }
            // A withdrawn call may be gone by now.
            let answer = user.get(&event.href).await;
            if answer.status() == StatusCode::OK {
                let invitation = user.found(answer).await;
                if let Some(accept) = invitation.links.get("accept") {
                    user.post_empty(&accept[0]).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn traffic_is_delivered_whole_and_drains() {
    let simulator = simulator(|settings| {
        settings.accounts = 5;
        settings.link_only_share = 0.3;
        settings.admin_listen = Some("127.0.0.1:0".parse().unwrap());
        settings.traffic = Some(TrafficSettings { messages_per_second: 200.0, ..TrafficSettings::default() });
    })
    .await;
    let mut clients = Vec::new();
    for number in 1..=5 {
        let user = User::sign_in(&simulator, &format!("user{number:04}"), number % 2 == 0).await;
        clients.push(tokio::spawn(accept_everything(user)));
    }
    eventually("no traffic", || simulator.traffic_written() > 150).await;
    let http = http();
    let admin = format!("http://{}", simulator.admin_address().unwrap());
    let stop = http.post(format!("{admin}/traffic")).header(header::CONTENT_TYPE, "application/json");
    let stopped = stop.body("{\"running\":false}").send().await.unwrap();
    assert_eq!(stopped.text().await.unwrap(), "{\"running\":false}");
    assert!(simulator.quiet(LIMIT).await, "{:?}", simulator.counters());
    let counters = simulator.counters();
    assert!(counters.incoming > 150);
    assert_eq!((counters.incoming_pending, counters.incoming_expired), (0, 0));
    let ledger = http.get(format!("{admin}/ledger")).send().await.unwrap().text().await.unwrap();
    let ledger: LedgerSnapshot = serde_json::from_str(&ledger).unwrap();
    assert_eq!(ledger.incoming.len() as u64, counters.incoming);
    for client in clients {
        client.abort();
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_forgotten_application_is_gone_everywhere() {
    let simulator = simulator(|_| {}).await;
    let mut user = User::sign_in(&simulator, "user0001", true).await;
    simulator.call(call("user0001@contoso.example", "hello")).await.unwrap();
    user.wait("started", "messagingInvitation").await;
    simulator.call(call("user0001@contoso.example", "unseen")).await.unwrap();
    assert_eq!(user.get(&user.cursor).await.status(), StatusCode::OK);
    assert_eq!(simulator.forget_application("user0001@contoso.example"), Ok(1));
    let lost = user.get(&user.cursor).await;
    assert_eq!(lost.status(), StatusCode::NOT_FOUND);
    assert_eq!(user.subcode(lost).await, "ApplicationNotFound");
    let ledger = simulator.ledger();
    assert!(ledger.incoming[0].package_acknowledged);
    assert!(!ledger.incoming[1].package_acknowledged);
    assert!(ledger.incoming.iter().all(|entry| entry.state == IncomingState::Refused));
    simulator.shutdown().await;
}
