//! The Windows grant, with the messages of a client library on raw connections.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ntlmclient::{
    AuthenticateMessage, ChallengeMessage, Credentials, Flags, Message, NegotiateMessage, OsVersion,
};
use reqwest::{Client, Response, StatusCode, header};
use serde_json::Value;
use ucwa_relay::simulator::{Fault, FaultKind, Operation, SettingsChange, Simulator, WindowsSignIn};

use crate::{simulator, user::LIMIT};

const FLAGS: Flags = Flags::NEGOTIATE_UNICODE
    .union(Flags::REQUEST_TARGET)
    .union(Flags::NEGOTIATE_NTLM)
    .union(Flags::NEGOTIATE_NTLM2_KEY);

/// A client with one connection.
struct Connection {
    http: Client,
    url: String,
}

impl Connection {
    fn to(simulator: &Simulator) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder().timeout(LIMIT).pool_max_idle_per_host(1).http1_only().build().unwrap();
        Self { http, url: format!("http://{}/WebTicket/oauthtoken", simulator.address()) }
    }

    async fn ask(&self, authorization: Option<&str>) -> Response {
        let form = [("grant_type", "urn:microsoft.rtc:windows")];
        let mut request = self.http.post(&self.url).form(&form);
        if let Some(value) = authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        request.send().await.unwrap()
    }

    /// As [`Self::ask`]; the schemes that a 401 offers, with what comes with them. Leaves the connection free.
    async fn refused(&self, authorization: Option<&str>) -> Vec<String> {
        let answer = self.ask(authorization).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        let schemes = answer.headers().get_all(header::WWW_AUTHENTICATE).iter();
        let schemes = schemes.map(|value| value.to_str().unwrap().to_owned()).collect();
        assert!(answer.text().await.unwrap().contains("401"));
        schemes
    }

    /// Asks without the form.
    async fn ask_with_nothing(&self, authorization: &str) -> Response {
        self.http.post(&self.url).header(header::AUTHORIZATION, authorization).body("").send().await.unwrap()
    }

    async fn challenge(&self, scheme: &str) -> ChallengeMessage {
        let schemes = self.refused(Some(&header_of(scheme, &negotiate()))).await;
        assert_eq!(schemes.len(), 1, "the scheme that was asked for is gone on with: {schemes:?}");
        assert!(schemes[0].starts_with(scheme));
        challenge_in(&schemes[0])
    }
}

fn negotiate() -> Message {
    Message::Negotiate(NegotiateMessage {
        flags: FLAGS,
        supplied_domain: String::new(),
        supplied_workstation: String::new(),
        os_version: OsVersion::default(),
    })
}

fn challenge_in(header: &str) -> ChallengeMessage {
    let token = header.split_once(' ').unwrap().1;
    match Message::try_from(STANDARD.decode(token).unwrap().as_slice()).unwrap() {
        Message::Challenge(challenge) => challenge,
        other => panic!("{other:?}"),
    }
}

fn header_of(scheme: &str, message: &Message) -> String {
    format!("{scheme} {}", STANDARD.encode(message.to_bytes().unwrap()))
}

fn answer_to(challenge: &ChallengeMessage, username: &str, domain: &str, password: &str) -> Message {
    let credentials =
        Credentials { username: username.into(), password: password.into(), domain: domain.into() };
    let pairs: Vec<u8> =
        challenge.target_information.iter().flat_map(ntlmclient::TargetInfoEntry::to_bytes).collect();
    let response = ntlmclient::respond_challenge_ntlm_v2(challenge.challenge, &pairs, 0, &credentials);
    response.to_message(&credentials, "TEST", FLAGS)
}

async fn granted(answer: Response) -> bool {
    answer.status() == StatusCode::OK && {
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        body["access_token"].as_str().unwrap().starts_with("cwt=")
    }
}

async fn windows(sign_in: WindowsSignIn) -> Simulator {
    simulator(|settings| settings.windows_sign_in = sign_in).await
}

#[tokio::test]
async fn a_right_answer_signs_the_connection_in_and_no_other() {
    let simulator = windows(WindowsSignIn::Ntlm).await;
    for scheme in ["NTLM", "Negotiate"] {
        let connection = Connection::to(&simulator);
        assert_eq!(connection.refused(None).await, ["Negotiate", "NTLM"]);
        let challenge = connection.challenge(scheme).await;
        assert_eq!(challenge.target_name, "CONTOSO");
        let answer = answer_to(&challenge, "user0001", "CONTOSO", "simulated");
        assert!(granted(connection.ask(Some(&header_of(scheme, &answer))).await).await);
        assert!(granted(connection.ask(None).await).await, "the connection is signed in");
        assert_eq!(Connection::to(&simulator).refused(None).await, ["Negotiate", "NTLM"]);
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn an_answer_counts_on_the_connection_of_its_challenge_and_once() {
    let simulator = windows(WindowsSignIn::Ntlm).await;
    let (first, second) = (Connection::to(&simulator), Connection::to(&simulator));
    let challenge = first.challenge("NTLM").await;
    second.challenge("NTLM").await;
    let answer = header_of("NTLM", &answer_to(&challenge, "user0001", "CONTOSO", "simulated"));
    assert_eq!(second.refused(Some(&answer)).await, ["Negotiate", "NTLM"]);
    assert_eq!(Connection::to(&simulator).refused(Some(&answer)).await, ["Negotiate", "NTLM"]);
    assert!(granted(first.ask(Some(&answer)).await).await);
    assert_eq!(first.refused(Some(&answer)).await, ["Negotiate", "NTLM"], "a challenge is answered once");

    // Over HTTP/2 a connection is shared, so that there is no challenge.
    let http = Client::builder().timeout(LIMIT).http2_prior_knowledge().build().unwrap();
    let shared = Connection { http, url: first.url.clone() };
    let refused = shared.refused(Some(&header_of("NTLM", &negotiate()))).await;
    assert_eq!(refused, ["Negotiate", "NTLM"]);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_handshake_needs_the_form_only_at_its_end() {
    let simulator = windows(WindowsSignIn::Ntlm).await;
    let connection = Connection::to(&simulator);
    let first = connection.ask_with_nothing(&header_of("NTLM", &negotiate())).await;
    assert_eq!(first.status(), StatusCode::UNAUTHORIZED);
    let challenge = challenge_in(first.headers()[header::WWW_AUTHENTICATE].to_str().unwrap());
    first.text().await.unwrap();
    let answer = answer_to(&challenge, "user0001", "CONTOSO", "simulated");
    assert!(granted(connection.ask(Some(&header_of("NTLM", &answer))).await).await);
    simulator.shutdown().await;
}

#[tokio::test]
async fn wrong_passwords_names_and_versions_are_refused() {
    let simulator = windows(WindowsSignIn::Ntlm).await;
    for (user, domain, password, right) in [
        ("user0001", "CONTOSO", "simulated", true),
        ("USER0001", "contoso.example", "simulated", true),
        ("user0001@contoso.example", "", "simulated", true),
        ("user0001", "", "simulated", true),
        ("user0001", "CONTOSO", "Simulated", false),
        ("user0001", "FABRIKAM", "simulated", false),
        ("nobody", "CONTOSO", "simulated", false),
        ("", "", "", false),
    ] {
        let connection = Connection::to(&simulator);
        let challenge = connection.challenge("NTLM").await;
        let answer = answer_to(&challenge, user, domain, password);
        let answer = connection.ask(Some(&header_of("NTLM", &answer))).await;
        assert_eq!(granted(answer).await, right, "{user} {domain} {password}");
    }
    let connection = Connection::to(&simulator);
    // Nothing, and as much as NTLMv1 answers.
    for response in [Vec::new(), vec![1; 24]] {
        connection.challenge("NTLM").await;
        let answer = Message::Authenticate(AuthenticateMessage {
            lm_response: response.clone(),
            ntlm_response: response,
            domain_name: "CONTOSO".into(),
            user_name: "user0001".into(),
            workstation_name: "TEST".into(),
            session_key: Vec::new(),
            flags: FLAGS,
            os_version: OsVersion::default(),
        });
        connection.refused(Some(&header_of("NTLM", &answer))).await;
    }
    for header in ["NTLM", "NTLM !", "Basic dXNlcjpwYXNz", "NTLM TlRMTVNTUAADAAAA"] {
        connection.refused(Some(header)).await;
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn the_settings_say_what_is_offered() {
    let simulator = windows(WindowsSignIn::Off).await;
    let http = crate::http();
    let offered = async || {
        let url =
            format!("http://{}/Autodiscover/AutodiscoverService.svc/root/oauth/user", simulator.address());
        let answer = http.get(url).send().await.unwrap();
        let mut challenges = answer.headers().get_all(header::WWW_AUTHENTICATE).iter();
        challenges.next_back().unwrap().to_str().unwrap().split("grant_type=").nth(1).unwrap().to_owned()
    };
    let change = |windows, password| {
        simulator.change_settings(SettingsChange {
            windows_sign_in: Some(windows),
            password_sign_in: Some(password),
            ..SettingsChange::default()
        });
    };
    assert_eq!(offered().await, "\"password\"");
    change(WindowsSignIn::Negotiate, true);
    assert_eq!(offered().await, "\"urn:microsoft.rtc:windows,password\"");
    assert_eq!(Connection::to(&simulator).refused(None).await, ["Negotiate"]);
    change(WindowsSignIn::Kerberos, false);
    assert_eq!(offered().await, "\"urn:microsoft.rtc:windows\"");
    let refused = crate::token(&http, &simulator, "user0001", "simulated").await;
    assert_eq!(refused.text().await.unwrap(), "{\"error\":\"unsupported_grant_type\"}");
    let kerberos = Connection::to(&simulator).refused(Some(&header_of("Negotiate", &negotiate()))).await;
    assert_eq!(kerberos, ["Negotiate"], "NTLM is not answered");
    simulator.shutdown().await;
}

#[tokio::test]
async fn faults_tell_the_messages_of_a_handshake_apart() {
    let simulator = windows(WindowsSignIn::Ntlm).await;
    let counting = |operation| Fault::new(FaultKind::Delay { ms: 0 }).on(operation).times(100);
    let [all, first, second, somebodys, nobodys] = [
        counting(Operation::Token),
        counting(Operation::NtlmNegotiate),
        counting(Operation::NtlmAuthenticate),
        counting(Operation::NtlmAuthenticate).account("user0001"),
        counting(Operation::NtlmAuthenticate).account("user0002"),
    ]
    .map(|fault| simulator.inject(fault).unwrap());
    let connection = Connection::to(&simulator);
    connection.refused(None).await;
    let challenge = connection.challenge("NTLM").await;
    let answer = answer_to(&challenge, "user0001", "CONTOSO", "simulated");
    assert!(granted(connection.ask(Some(&header_of("NTLM", &answer))).await).await);
    let struck = [all, first, second, somebodys, nobodys].map(|fault| simulator.struck(fault));
    assert_eq!(struck, [3, 1, 1, 1, 0]);
    simulator.shutdown().await;
}
