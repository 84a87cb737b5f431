//! Every operation of the protocol under every fault, in mid-traffic: afterwards the server's ledger and the database
//! agree, and the accounts that no fault struck have noticed nothing.
//!
//! One test is one operation. Each fault strikes an account of its own, all of them at the same time, so a whole table
//! takes as long as its slowest cell.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::time::Duration;

use futures_util::future::join_all;
use sqlx::Row;
use support::{
    eventually,
    scene::{QUICK, Scene},
};
use ucwa_relay::simulator::{
    CallRequest, ConversationPhase, DiscoveryRedirect, Fault, FaultKind, Operation, Refusal, RefusalBody,
    SettingsChange, SimulatorSettings,
};

/// Accounts that no fault strikes.
const BYSTANDERS: usize = 2;

fn refusal(status: u16) -> Refusal {
    Refusal { status, ..Refusal::default() }
}

/// What any request may meet, and what an account survives without an operator.
fn faults() -> Vec<FaultKind> {
    vec![
        FaultKind::CutBefore,
        FaultKind::CutAfter,
        FaultKind::CutMidway,
        FaultKind::Delay { ms: 400 },
        FaultKind::DelayAfter { ms: 400 },
        FaultKind::ExpiredToken,
        FaultKind::Status(Refusal { body: Some(RefusalBody::Html), ..refusal(404) }),
        FaultKind::ApplicationNotFound { keep: false },
        FaultKind::InactiveApplicationExpired { keep: false },
        FaultKind::refusal(409, "AnotherOperationPending"),
        FaultKind::status(429),
        FaultKind::Status(Refusal { retry_after: Some(1), ..refusal(429) }),
        FaultKind::status(503),
        FaultKind::Status(Refusal { retry_after: Some(1), ..refusal(503) }),
        FaultKind::Status(Refusal { retry_after: Some(2), retry_after_as_date: true, ..refusal(503) }),
        FaultKind::status(500),
        FaultKind::Status(Refusal { body: Some(RefusalBody::Empty), ..refusal(500) }),
        FaultKind::Status(Refusal { executed: true, ..refusal(500) }),
        FaultKind::status(502),
        FaultKind::status(504),
        FaultKind::Status(Refusal { executed: true, ..refusal(504) }),
        FaultKind::TruncatedXml,
        FaultKind::MalformedXml,
        FaultKind::InvalidUtf8,
        FaultKind::Doctype,
        FaultKind::HugeBody { bytes: Some(5_000_000) },
        FaultKind::EndlessBody,
        FaultKind::WrongContentType { content_type: None },
    ]
}

/// An account for each fault, and the bystanders.
async fn scene(cells: usize, settings: SimulatorSettings) -> Scene {
    Scene::begin(SimulatorSettings { accounts: cells + BYSTANDERS, ..settings }, 20.0, QUICK).await
}

/// A fault strikes an account's next request of a kind; gives its number.
fn strike(scene: &Scene, account: &str, operation: Operation, kind: &FaultKind) -> u64 {
    scene.simulator.inject(Fault::new(kind.clone()).on(operation).account(account)).unwrap()
}

async fn struck(scene: &Scene, fault: u64, what: &str) {
    eventually(&format!("the fault strikes: {what}"), async || {
        (scene.simulator.struck(fault) > 0).then_some(())
    })
    .await;
}

/// How a row ends whose request meets a fault.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ends {
    Delivered,
    /// With the server's words.
    Failed,
}

/// Messages in order to the one whose conversation the fault concerns, and one to somebody else.
async fn sends_under_faults(
    operation: Operation,
    recipient: &str,
    opener: bool,
    table: Vec<(FaultKind, Ends)>,
) {
    let scene = scene(table.len(), SimulatorSettings::default()).await;
    join_all(table.iter().zip(&scene.accounts).enumerate().map(|(number, ((kind, ends), account))| {
        let scene = &scene;
        async move {
            let what = format!("{operation:?} under {kind:?}");
            let to = format!("{recipient}{number}@fabrikam.example");
            if opener {
                let id = scene.queue(account, &to, &format!("opener {number}")).await;
                assert_eq!(scene.outcome(id, &what).await.0, "delivered", "{what}");
                if operation == Operation::AddMessaging {
                    paused(scene, &format!("opener {number}")).await;
                }
            }
            let fault = strike(scene, account, operation, kind);
            let first = scene.queue(account, &to, &format!("first {number}")).await;
            let second = scene.queue(account, &to, &format!("second {number}")).await;
            struck(scene, fault, &what).await;
            let elsewhere = format!("silent.other{number}@fabrikam.example");
            let other = scene.queue(account, &elsewhere, &format!("other {number}")).await;
            let (state, error) = scene.outcome(first, &what).await;
            match ends {
                Ends::Delivered => assert_eq!(state, "delivered", "{what}: {error}"),
                Ends::Failed => {
                    assert_eq!(state, "failed", "{what}: {error}");
                    assert!(error.contains("answered 4"), "{what}: {error}");
                }
            }
            for id in [second, other] {
                let (state, error) = scene.outcome(id, &what).await;
                assert_eq!(state, "delivered", "{what}, row {id}: {error}");
            }
        }
    }))
    .await;
    let reckoning = scene.agree().await;
    assert_eq!(reckoning.unreported, Vec::<String>::new());
    assert_eq!(reckoning.uncertain, 0);
    scene.undisturbed(&scene.accounts[table.len()..]).await;
}

/// Waits until the correspondent who was told `opener` has closed messaging: then they can't write either.
async fn paused(scene: &Scene, opener: &str) {
    let ledger = scene.simulator.ledger();
    let told = ledger.outgoing.iter().find(|entry| entry.text == opener).expect("it was delivered");
    eventually("the correspondent closes messaging", async || {
        scene.simulator.say(&told.conversation, "wait").is_err().then_some(())
    })
    .await;
}

fn delivered(kinds: Vec<FaultKind>) -> Vec<(FaultKind, Ends)> {
    kinds.into_iter().map(|kind| (kind, Ends::Delivered)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_meets_every_fault() {
    let mut table = delivered(faults());
    table.extend([
        // The link may have changed: it is read anew.
        (FaultKind::status(403), Ends::Delivered),
        (FaultKind::status(400), Ends::Failed),
        (FaultKind::refusal(413, "EntityTooLarge"), Ends::Failed),
        (FaultKind::Redirect { location: "http://127.0.0.1:1/".into(), status: None }, Ends::Delivered),
    ]);
    sends_under_faults(Operation::SendMessage, "silent.", true, table).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_meets_every_fault() {
    let mut table = delivered(faults());
    table.extend([
        (FaultKind::status(400), Ends::Failed),
        (FaultKind::refusal(403, "NotAllowed"), Ends::Failed),
        (FaultKind::refusal(404, "DestinationNotFound"), Ends::Failed),
    ]);
    sends_under_faults(Operation::StartMessaging, "silent.", false, table).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messaging_that_is_added_again_meets_every_fault() {
    let mut table = delivered(faults());
    table.extend([
        // The conversation has ended, or messaging has another address: the row is sent as it is now.
        (FaultKind::refusal(404, "ConversationNotFound"), Ends::Delivered),
        (FaultKind::refusal(404, "ResourceNotFound"), Ends::Delivered),
        (FaultKind::status(400), Ends::Failed),
        (FaultKind::refusal(404, "DestinationNotFound"), Ends::Failed),
    ]);
    sends_under_faults(Operation::AddMessaging, "pauses.", true, table).await;
}

fn call(account: &str, from: &str, text: &str) -> CallRequest {
    CallRequest {
        from: from.to_owned(),
        to_account: account.to_owned(),
        text: Some(text.to_owned()),
        html: None,
        subject: String::new(),
    }
}

/// Somebody calls, as soon as the account takes calls.
async fn called(scene: &Scene, account: &str, from: &str, text: &str) -> String {
    let request = call(account, from, text);
    eventually(&format!("{account} takes a call"), async || scene.simulator.call(request.clone()).await.ok())
        .await
}

/// Waits until an account has answered a call.
async fn connected(scene: &Scene, conversation: &str, what: &str) {
    assert_eq!(over_or_connected(scene, conversation, what).await, ConversationPhase::Connected, "{what}");
}

async fn over_or_connected(scene: &Scene, conversation: &str, what: &str) -> ConversationPhase {
    eventually(&format!("the call comes to something: {what}"), async || {
        Some(scene.simulator.conversation_phase(conversation))
            .filter(|phase| *phase != ConversationPhase::Ringing)
    })
    .await
}

/// Waits until a text is in the archive of an account, in full.
async fn archived(scene: &Scene, account: &str, text: &str, what: &str) {
    eventually(&format!("{text:?} is archived: {what}"), async || {
        let rows = sqlx::query(
            "SELECT 1 FROM messages m JOIN accounts a ON a.id = m.account_id \
              WHERE a.sip_uri = ? AND m.body = ? AND m.chain_hash IS NOT NULL",
        )
        .bind(account)
        .bind(text)
        .fetch_all(&scene.pool)
        .await
        .unwrap();
        (rows.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_call_meets_every_fault() {
    let table: Vec<FaultKind> = faults().into_iter().chain([FaultKind::refusal(403, "NotAllowed")]).collect();
    // A call that is not answered is over soon, and not so soon that a patient client misses it.
    let settings = SimulatorSettings { ring_time: Duration::from_secs(10), ..SimulatorSettings::default() };
    let scene = scene(table.len(), settings).await;
    join_all(table.iter().zip(&scene.accounts).enumerate().map(|(number, (kind, account))| {
        let scene = &scene;
        async move {
            let what = format!("accept under {kind:?}");
            let fault = strike(scene, account, Operation::Accept, kind);
            let text = format!("call {number}");
            called(scene, account, &format!("silent.struck{number}"), &text).await;
            struck(scene, fault, &what).await;
            // That one, or one of the traffic's, met the fault; the next one does not.
            let conversation = called(scene, account, &format!("silent.next{number}"), "next").await;
            connected(scene, &conversation, &what).await;
            scene.simulator.say(&conversation, &format!("said {number}")).unwrap();
            archived(scene, account, &format!("said {number}"), &what).await;
        }
    }))
    .await;
    scene.agree().await;
    let unanswered = sqlx::query(
        "SELECT a.sip_uri, i.action FROM invitations i JOIN accounts a ON a.id = i.account_id \
          WHERE i.direction = 'incoming' AND i.state = 'Connected' AND i.action IS NOT 'accepted'",
    )
    .fetch_all(&scene.pool)
    .await
    .unwrap();
    let unanswered: Vec<(&FaultKind, Option<String>)> = unanswered
        .iter()
        .map(|row| {
            let account: String = row.get(0);
            let cell = scene.accounts.iter().position(|known| *known == account).unwrap();
            (&table[cell], row.get(1))
        })
        .collect();
    assert_eq!(unanswered, [], "connected, and yet not noted as accepted");
    scene.undisturbed(&scene.accounts[table.len()..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_events_only_link_meets_every_fault_when_it_is_fetched() {
    let fetches = [
        Operation::Message,
        Operation::Participant,
        Operation::Invitation,
        Operation::Conversation,
        Operation::Messaging,
    ];
    let table = faults();
    let settings = SimulatorSettings { link_only_share: 1.0, ..SimulatorSettings::default() };
    let scene = scene(table.len(), settings).await;
    join_all(table.iter().zip(&scene.accounts).enumerate().map(|(number, (kind, account))| {
        let scene = &scene;
        async move {
            let what = format!("fetches under {kind:?}");
            let loses_the_application = matches!(
                kind,
                FaultKind::ApplicationNotFound { .. } | FaultKind::InactiveApplicationExpired { .. }
            );
            for operation in fetches {
                let fault = strike(scene, account, operation, kind);
                let mut calls = 0;
                while scene.simulator.struck(fault) == 0 {
                    calls += 1;
                    let text = format!("{operation:?} {number} {calls}");
                    let conversation = called(scene, account, "silent.linked", &text).await;
                    over_or_connected(scene, &conversation, &what).await;
                    // It may be over already, where the application is.
                    let _ = scene.simulator.say(&conversation, &format!("{text} said"));
                }
                if loses_the_application {
                    break;
                }
            }
            let conversation =
                called(scene, account, &format!("silent.late{number}"), &format!("late {number}")).await;
            connected(scene, &conversation, &what).await;
            scene.simulator.say(&conversation, &format!("later {number}")).unwrap();
            archived(scene, account, &format!("later {number}"), &what).await;
        }
    }))
    .await;
    scene.agree().await;
    scene.undisturbed(&scene.accounts[table.len()..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_operator_can_mend_stops_one_account_and_says_why() {
    let table: Vec<(Operation, FaultKind, &str)> = vec![
        (Operation::User, FaultKind::status(403), "403"),
        (Operation::Token, FaultKind::status(403), "403"),
        (Operation::Applications, FaultKind::status(403), "403"),
        (Operation::Application, FaultKind::status(403), "403"),
        (Operation::MakeMeAvailable, FaultKind::status(403), "403"),
        (Operation::Events, FaultKind::TooManyApplications { keep: false }, "too many"),
        (Operation::Applications, FaultKind::TooManyApplications { keep: false }, "TooManyApplications"),
    ];
    let mut scene = scene(table.len(), SimulatorSettings::default()).await;
    // Whoever has to create the application anew meets its fault there; the others when they are read.
    scene.simulator.stop_traffic();
    let bystanders = scene.accounts[table.len()..].to_vec();
    scene.relay.server().kill();
    for account in &scene.accounts {
        scene.queue(account, "silent.waiting@fabrikam.example", "sent sooner or later").await;
    }
    for ((operation, kind, _), account) in table.iter().zip(&scene.accounts) {
        if matches!(operation, Operation::Applications | Operation::MakeMeAvailable) {
            scene.simulator.forget_application(account).unwrap();
        }
        strike(&scene, account, *operation, kind);
    }
    scene.simulator.reset_requests();
    scene.relay.start();
    for ((operation, kind, words), account) in table.iter().zip(&scene.accounts) {
        let detail = scene.relay.account_state(account, "needs_attention").await;
        assert!(detail.contains(words), "{operation:?} under {kind:?}: {detail}");
    }
    for account in &bystanders {
        let conversation = called(&scene, account, "silent.caller", &format!("to {account}")).await;
        assert!(scene.simulator.connected(&conversation, Duration::from_secs(20)).await);
    }
    scene.undisturbed(&bystanders).await;
    // What an operator does: anything that changes the row.
    for account in &scene.accounts[..table.len()] {
        scene.relay.tool_ok(&["account", "disable", account]);
        scene.relay.account_state(account, "stopped").await;
        scene.relay.tool_ok(&["account", "enable", account]);
    }
    scene.all_online().await;
    scene.agree().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_last_for_seconds_are_renewed_under_traffic() {
    let settings = SimulatorSettings {
        accounts: 4,
        token_lifetime: Duration::from_secs(2),
        ..SimulatorSettings::default()
    };
    let scene = Scene::begin(settings, 20.0, QUICK).await;
    let mut rows = Vec::new();
    let mut number = 0;
    // Until every account has renewed its token several times.
    while scene.accounts.iter().any(|account| scene.requests(account, Operation::Token) < 4) {
        number += 1;
        for account in &scene.accounts {
            rows.push(scene.queue(account, "echo.a@fabrikam.example", &format!("{number}")).await);
        }
        for id in rows.split_off(0) {
            assert_eq!(scene.outcome(id, "short tokens").await.0, "delivered");
        }
    }
    let reckoning = scene.agree().await;
    assert_eq!((reckoning.failed, reckoning.uncertain), (0, 0));
    for account in &scene.accounts {
        assert_eq!(scene.requests(account, Operation::Applications), 1, "{account} signed in once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_expires_is_replaced_and_the_archive_goes_on() {
    let scene = scene(1, SimulatorSettings::default()).await;
    let (account, bystanders) = (scene.accounts[0].clone(), scene.accounts[1..].to_vec());
    scene
        .simulator
        .change_settings(SettingsChange { application_expiry_ms: Some(1_000), ..SettingsChange::default() });
    // Nobody can park a GET, so the application expires for want of one.
    let fault = Fault::new(FaultKind::Status(Refusal { retry_after: Some(3), ..refusal(503) }));
    scene.simulator.inject(fault.on(Operation::Events).account(account.clone())).unwrap();
    eventually("a second application", async || {
        (scene.requests(&account, Operation::Applications) > 1).then_some(())
    })
    .await;
    let conversation = called(&scene, &account, "silent.after", "after the expiry").await;
    assert!(scene.simulator.connected(&conversation, Duration::from_secs(20)).await);
    archived(&scene, &account, "after the expiry", "expiry").await;
    scene.agree().await;
    scene.undisturbed(&bystanders).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_domain_takes_a_token_of_its_own_and_a_redirect_within_the_domain_is_followed() {
    let settings = SimulatorSettings {
        accounts: 2,
        pool_listen: Some(([127, 0, 0, 1], 0).into()),
        discovery_redirect: Some(DiscoveryRedirect {
            location: "/Autodiscover/AutodiscoverService.svc/root".to_owned(),
            status: Some(302),
        }),
        ..SimulatorSettings::default()
    };
    let configuration = format!("trusted_domains = [\"127.0.0.1\"]\n{QUICK}");
    let scene = Scene::begin(settings, 20.0, &configuration).await;
    for account in &scene.accounts {
        assert_eq!(scene.requests(account, Operation::Token), 2, "one for each host");
        scene.simulator.expire_tokens(account).unwrap();
        let id = scene.queue(account, "echo.a@fabrikam.example", &format!("from {account}")).await;
        assert_eq!(scene.outcome(id, "split domain").await.0, "delivered");
    }
    scene.agree().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_a_foreign_host_is_refused_by_name_and_that_host_hears_nothing() {
    let foreign = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
    let address = foreign.local_addr().unwrap();
    let mut scene = scene(1, SimulatorSettings::default()).await;
    let moved: Vec<SettingsChange> = vec![
        SettingsChange {
            discovery_redirect: Some(DiscoveryRedirect {
                location: format!("http://{address}/root"),
                status: None,
            }),
            ..SettingsChange::default()
        },
        SettingsChange {
            discovery_redirect: Some(DiscoveryRedirect {
                location: format!("http://{address}/root"),
                status: Some(302),
            }),
            ..SettingsChange::default()
        },
        SettingsChange { user_redirect: Some(format!("http://{address}/root")), ..SettingsChange::default() },
    ];
    for change in moved {
        scene.relay.server().kill();
        scene.simulator.change_settings(change);
        scene.relay.start();
        for account in &scene.accounts {
            let detail = scene.relay.account_state(account, "needs_attention").await;
            assert!(detail.contains(&address.to_string()) && detail.contains("not trusted"), "{detail}");
        }
        scene.simulator.change_settings(SettingsChange {
            discovery_redirect: Some(DiscoveryRedirect { location: String::new(), status: None }),
            user_redirect: Some(String::new()),
            ..SettingsChange::default()
        });
    }
    let heard = tokio::time::timeout(Duration::ZERO, foreign.accept()).await;
    assert!(heard.is_err(), "the foreign host was connected to: {heard:?}");
    // A redirect in the middle of the work is no way out either.
    scene.relay.server().kill();
    scene.relay.start();
    scene.all_online().await;
    let away = FaultKind::Redirect { location: format!("http://{address}/events"), status: Some(307) };
    for account in &scene.accounts {
        let fault = strike(&scene, account, Operation::Events, &away);
        struck(&scene, fault, "events redirected").await;
    }
    scene.all_online().await;
    scene.agree().await;
    assert!(tokio::time::timeout(Duration::ZERO, foreign.accept()).await.is_err());
}

/// Each step of a sign-in under each fault that passes: the account comes online by itself and works, the others are
/// online long before.
async fn sign_ins_under_faults(operations: &[Operation]) {
    let mut cells = Vec::new();
    for &operation in operations {
        for kind in faults() {
            // A refused token is a refused password where tokens are issued, and where no token is asked for it is
            // what always comes first.
            let of_a_token = matches!(kind, FaultKind::ExpiredToken)
                && matches!(operation, Operation::Token | Operation::Discovery);
            // Before there is an application, nobody can say that it is gone.
            let of_an_application =
                matches!(
                    kind,
                    FaultKind::ApplicationNotFound { .. } | FaultKind::InactiveApplicationExpired { .. }
                ) && !matches!(operation, Operation::Application | Operation::MakeMeAvailable);
            if !of_a_token && !of_an_application {
                cells.push((operation, kind));
            }
        }
    }
    let settings = SimulatorSettings { accounts: cells.len() + BYSTANDERS, ..SimulatorSettings::default() };
    let simulator = ucwa_relay::simulator::Simulator::start(settings).await.unwrap();
    let accounts = simulator.account_uris();
    let struck: Vec<u64> = cells
        .iter()
        .zip(&accounts)
        .map(|((operation, kind), account)| {
            let fault = Fault::new(kind.clone()).on(*operation);
            // A request to the root of discovery does not say whose it is: its faults strike whoever comes next.
            let fault = if *operation == Operation::Discovery { fault } else { fault.account(account) };
            simulator.inject(fault).unwrap()
        })
        .collect();
    let scene = Scene::with(simulator, QUICK).await;
    for (((operation, kind), account), fault) in cells.iter().zip(&accounts).zip(struck) {
        eventually(&format!("{operation:?} under {kind:?} passes"), async || {
            let (state, detail) = scene.state(account).await;
            assert_ne!(state, "needs_attention", "{operation:?} under {kind:?}: {detail}");
            (scene.simulator.struck(fault) > 0 && state == "online").then_some(())
        })
        .await;
    }
    let mut rows = Vec::new();
    for account in &accounts {
        rows.push(scene.queue(account, "silent.zoe@fabrikam.example", "in spite of it").await);
    }
    for row in rows {
        assert_eq!(scene.outcome(row, "after the sign-in").await.0, "delivered");
    }
    assert_eq!(scene.agree().await.uncertain, 0);
    if !operations.contains(&Operation::Discovery) {
        scene.undisturbed(&accounts[cells.len()..]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_the_server_meets_every_fault() {
    sign_ins_under_faults(&[Operation::Discovery, Operation::User]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn getting_a_token_meets_every_fault() {
    sign_ins_under_faults(&[Operation::Token]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creating_an_application_meets_every_fault() {
    sign_ins_under_faults(&[Operation::Applications]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn making_available_meets_every_fault() {
    sign_ins_under_faults(&[Operation::Application, Operation::MakeMeAvailable]).await;
}
