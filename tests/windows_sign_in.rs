//! Accounts with `auth = "ntlm"`: the client, and the whole program, against the simulated server, whose side of NTLM
//! shares no code with the client's.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::time::Duration;

use secrecy::SecretString;
use serde_json::json;
use support::{Relay, Simulate, count, eventually};
use ucwa_relay::{
    simulator::{Fault, FaultKind, Operation, Simulator, SimulatorSettings, WindowsSignIn},
    ucwa::{
        Action, HttpClients, HttpSettings, NewApplication, SignInMethod, SignInSettings, UcwaClient,
        UcwaError,
    },
};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const PASSWORD: &str = "simulated";

// ------------------------------------------------------------------------------------------------ the client

async fn simulator(windows_sign_in: WindowsSignIn) -> Simulator {
    let settings =
        SimulatorSettings { windows_sign_in, password_sign_in: false, ..SimulatorSettings::default() };
    Simulator::start(settings).await.unwrap()
}

fn clients() -> HttpClients {
    HttpClients::new(&HttpSettings {
        extra_ca_pem: None,
        request_timeout: Duration::from_secs(20),
        poll_margin: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(10),
        allow_http: true,
    })
    .unwrap()
}

fn client(clients: &HttpClients, simulator: &Simulator, username: &str, password: &str) -> UcwaClient {
    let settings = SignInSettings {
        sip_uri: ALICE.parse().unwrap(),
        username: username.to_owned(),
        method: SignInMethod::Ntlm,
        discovery_url: Some(simulator.discovery_url().parse().unwrap()),
        trusted_domains: Vec::new(),
        allow_http: true,
    };
    UcwaClient::new(clients, settings, SecretString::from(password))
}

async fn display_name(client: &UcwaClient) -> String {
    let applications = client.sign_in(&|_| {}).await.unwrap().applications;
    let new = NewApplication {
        culture: "en-US".to_owned(),
        endpoint_id: "endpoint".to_owned(),
        user_agent: "test".to_owned(),
    };
    client.create_application(&applications, &new).await.unwrap().0.display_name().unwrap()
}

#[tokio::test]
async fn every_spelling_of_a_name_signs_in_under_both_schemes() {
    for offered in [WindowsSignIn::Ntlm, WindowsSignIn::Negotiate] {
        let simulator = simulator(offered).await;
        for username in [
            "CONTOSO\\user0001",
            "contoso.example\\USER0001",
            "user0001@contoso.example",
            "User0001@Contoso.Example",
            "user0001",
        ] {
            let client = client(&clients(), &simulator, username, PASSWORD);
            if let Err(error) = client.sign_in(&|_| {}).await {
                panic!("{username}: {error}");
            }
        }
        simulator.shutdown().await;
    }
}

#[tokio::test]
async fn passwords_beyond_ascii_are_proved() {
    let password = "päss wörd € 🦀 \"&+%";
    let simulator = Simulator::start(SimulatorSettings {
        named_accounts: vec![("jörg".to_owned(), password.to_owned())],
        windows_sign_in: WindowsSignIn::Ntlm,
        ..SimulatorSettings::default()
    })
    .await
    .unwrap();
    client(&clients(), &simulator, "CONTOSO\\Jörg", password).sign_in(&|_| {}).await.unwrap();
    simulator.shutdown().await;
}

#[tokio::test]
async fn accounts_that_share_http_clients_get_tokens_of_their_own() {
    let simulator = simulator(WindowsSignIn::Ntlm).await;
    let clients = clients();
    let alice = client(&clients, &simulator, "CONTOSO\\user0001", PASSWORD);
    let bob = client(&clients, &simulator, "CONTOSO\\user0002", PASSWORD);
    let (of_alice, of_bob) = (display_name(&alice).await, display_name(&bob).await);
    assert_ne!(of_alice, of_bob);
    // A third signs in wrongly on the way that both have just taken.
    let mallory = client(&clients, &simulator, "CONTOSO\\user0001", "wrong");
    assert!(mallory.sign_in(&|_| {}).await.unwrap_err().is_credentials_refused());
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_wrong_password_is_proved_once() {
    let simulator = simulator(WindowsSignIn::Ntlm).await;
    let proofs = Fault::new(FaultKind::Delay { ms: 0 }).on(Operation::NtlmAuthenticate).times(100);
    let proofs = simulator.inject(proofs).unwrap();
    let client = client(&clients(), &simulator, "CONTOSO\\user0001", "wrong");
    for _ in 0..2 {
        let error = client.sign_in(&|_| {}).await.unwrap_err();
        assert!(error.is_credentials_refused(), "{error}");
        assert!(!format!("{error} {error:?} {client:?}").contains("wrong"));
    }
    assert_eq!(simulator.struck(proofs), 1);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_handshake_that_is_cut_is_temporary() {
    let simulator = simulator(WindowsSignIn::Ntlm).await;
    let client = client(&clients(), &simulator, "CONTOSO\\user0001", PASSWORD);
    for operation in [Operation::Token, Operation::NtlmNegotiate, Operation::NtlmAuthenticate] {
        for kind in [FaultKind::CutBefore, FaultKind::CutAfter] {
            let cut = simulator.inject(Fault::new(kind).on(operation)).unwrap();
            let error = client.sign_in(&|_| {}).await.unwrap_err();
            assert_eq!(error.action(), Action::RepeatAsIs, "{operation:?}: {error}");
            assert_eq!(simulator.struck(cut), 1);
        }
    }
    client.sign_in(&|_| {}).await.unwrap();
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_token_is_renewed_by_another_handshake() {
    let simulator = simulator(WindowsSignIn::Ntlm).await;
    let proofs = Fault::new(FaultKind::Delay { ms: 0 }).on(Operation::NtlmAuthenticate).times(100);
    let proofs = simulator.inject(proofs).unwrap();
    let client = client(&clients(), &simulator, "user0001@contoso.example", PASSWORD);
    let user = client.sign_in(&|_| {}).await.unwrap().user;
    assert_eq!(simulator.struck(proofs), 1);
    simulator.expire_tokens("user0001").unwrap();
    client.get(&user).await.unwrap();
    assert_eq!(simulator.struck(proofs), 2);
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_the_server_does_not_offer_is_told() {
    let without = Simulator::start(SimulatorSettings::default()).await.unwrap();
    let error = client(&clients(), &without, "user0001", PASSWORD).sign_in(&|_| {}).await.unwrap_err();
    assert!(matches!(error, UcwaError::GrantNotOffered { .. }), "{error}");
    without.shutdown().await;
    let kerberos = simulator(WindowsSignIn::Kerberos).await;
    let error = client(&clients(), &kerberos, "user0001", PASSWORD).sign_in(&|_| {}).await.unwrap_err();
    assert!(matches!(error, UcwaError::NtlmNotOffered { .. }), "{error}");
    assert!(error.to_string().contains("Kerberos"), "{error}");
    assert_eq!(error.action(), Action::StopAccount);
    kerberos.shutdown().await;
}

// ----------------------------------------------------------------------------------------- the whole program

/// A simulator that takes nothing but the Windows grant.
async fn windows_only(windows_sign_in: &str) -> Simulate {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let settings = json!({ "windows_sign_in": windows_sign_in, "password_sign_in": false });
    let changed = simulator.post("/settings", &settings).await;
    assert_eq!(changed["windows_sign_in"], windows_sign_in);
    simulator
}

fn add(relay: &Relay, uri: &str, auth: &str, username: &str, password: &str) {
    let file = relay.folder.path().join("password");
    std::fs::write(&file, password).unwrap();
    let file = file.to_str().unwrap();
    relay.tool_ok(&["account", "add", uri, "--auth", auth, "--username", username, "--password-file", file]);
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_sign_in_by_ntlm_archive_and_send() {
    let simulator = windows_only("ntlm").await;
    let mut relay = Relay::configure(&simulator, "[telemetry]\nlog = \"trace\"");
    add(&relay, ALICE, "ntlm", "CONTOSO\\user0001", PASSWORD);
    add(&relay, BOB, "ntlm", "user0002@contoso.example", PASSWORD);
    // The first handshake of each breaks off.
    let cut = json!({ "fault": "cut_after", "operation": "ntlmNegotiate", "count": 2 });
    assert!(simulator.post("/fault", &cut).await["id"].is_number());
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;

    let to_alice = simulator.call("dana@fabrikam.example", ALICE, "for Alice").await;
    let to_bob = simulator.call("erik@fabrikam.example", BOB, "for Bob").await;
    let pool = relay.sql().await;
    let archived = |uri: &'static str, body: &'static str| {
        let pool = pool.clone();
        async move {
            eventually(&format!("{body} is archived"), async || {
                let found: i64 = sqlx::query_scalar(
                    "SELECT count(*) FROM messages m JOIN accounts a ON a.id = m.account_id \
                     WHERE a.sip_uri = ? AND m.body = ?",
                )
                .bind(uri)
                .bind(body)
                .fetch_one(&pool)
                .await
                .unwrap();
                (found == 1).then_some(())
            })
            .await;
        }
    };
    archived(ALICE, "for Alice").await;
    archived(BOB, "for Bob").await;

    // The token ends, and the account goes on.
    simulator.post("/expire-tokens", &json!({ "account": ALICE })).await;
    simulator.say(&to_alice, "after the token").await;
    archived(ALICE, "after the token").await;
    sqlx::query(
        "INSERT INTO outbox (account, recipients, body) VALUES (?, 'sip:dana@fabrikam.example', 'hello')",
    )
    .bind(ALICE)
    .execute(&pool)
    .await
    .unwrap();
    eventually("the row is delivered", async || {
        (count(&pool, "SELECT count(*) FROM outbox WHERE state = 'delivered'").await == 1).then_some(())
    })
    .await;
    simulator.post("/leave", &json!({ "conversation": to_bob })).await;
    pool.close().await;
    let log = relay.server().stderr();
    assert!(!log.contains(PASSWORD) && !log.contains("TlRMTVNTUAAD"), "a secret is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_operator_can_mend_parks_the_account() {
    let simulator = windows_only("ntlm").await;
    let mut relay = Relay::configure(&simulator, "");
    add(&relay, ALICE, "ntlm", "CONTOSO\\user0001", "not-the-password");
    add(&relay, BOB, "password", "user0002@contoso.example", PASSWORD);
    relay.start();
    let refused = relay.account_state(ALICE, "needs_attention").await;
    assert!(refused.contains("set the right password"), "{refused}");
    let other_grant = relay.account_state(BOB, "needs_attention").await;
    assert!(other_grant.contains("offers urn:microsoft.rtc:windows"), "{other_grant}");
    // The remedy that the sentence names helps.
    let file = relay.folder.path().join("password");
    std::fs::write(&file, PASSWORD).unwrap();
    relay.tool_ok(&["account", "set-password", ALICE, "--password-file", file.to_str().unwrap()]);
    relay.account_state(ALICE, "online").await;
    assert!(!relay.server().stderr().contains("not-the-password"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_kerberos_only_and_ways_that_are_not_spoken_are_told() {
    let simulator = windows_only("kerberos").await;
    let mut relay = Relay::configure(&simulator, "");
    add(&relay, ALICE, "ntlm", "CONTOSO\\user0001", PASSWORD);
    add(&relay, BOB, "kerberos", "CONTOSO\\user0002", PASSWORD);
    add(&relay, "sip:carol@contoso.example", "aad", "carol@contoso.example", PASSWORD);
    relay.start();
    for (uri, words) in [
        (ALICE, ["Kerberos only", "allow NTLM there"]),
        (BOB, ["is kerberos", "set it to ntlm"]),
        ("sip:carol@contoso.example", ["is aad", "not at Azure AD"]),
    ] {
        let detail = relay.account_state(uri, "needs_attention").await;
        assert!(words.iter().all(|word| detail.contains(word)), "{detail}");
    }
}
