//! `check`, the doctor: what it says of servers, accounts and databases in trouble, and that it leaves nothing behind and
//! gives nothing away.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::{net::TcpListener, process::Output};

use serde_json::Value;
use support::{
    Relay, Simulate, eventually,
    sql::{Kind, Sql},
};
use ucwa_relay::simulator::{
    DiscoveryRedirect, Fault, FaultKind, Operation, SettingsChange, Simulator, SimulatorSettings,
    WindowsSignIn,
};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const PASSWORD: &str = "geheim-4711";

on_both_databases!(
    "multi_thread":
    all_is_well_and_nothing_is_left_behind,
    a_database_that_takes_nothing_is_said_and_the_accounts_are_looked_at,
    a_database_without_a_schema_is_not_given_one,
);

/// A simulated server with two accounts.
async fn simulator() -> Simulator {
    Simulator::start(SimulatorSettings {
        accounts: 2,
        password: PASSWORD.to_owned(),
        conversation_logs: true,
        ..SimulatorSettings::default()
    })
    .await
    .unwrap()
}

/// A relay that is configured for `simulator` and knows Alice.
async fn relay(kind: Kind, simulator: &Simulator, more: &str) -> Relay {
    let relay = Relay::configure_on_for(kind, &simulator.discovery_url(), more).await;
    relay.add_account(ALICE, PASSWORD);
    relay
}

/// What `check --format json` said.
struct Checked {
    code: Option<i32>,
    report: Value,
    stderr: String,
}

impl Checked {
    /// Runs it with more arguments. Whatever comes of it, neither form of its output holds a secret.
    fn run(relay: &Relay, arguments: &[&str]) -> Self {
        let text = relay.tool(&[&["check"], arguments].concat());
        let json = relay.tool(&[&["check", "--format", "json"], arguments].concat());
        for output in [&text, &json] {
            holds_no_secret(output);
        }
        assert_eq!(text.status.code(), json.status.code(), "both forms end alike");
        let report: Value = serde_json::from_slice(&json.stdout).unwrap();
        let shown = String::from_utf8(text.stdout).unwrap();
        for step in report["steps"].as_array().unwrap() {
            let name = step["step"].as_str().unwrap();
            assert!(shown.contains(name), "{name} is missing in {shown}");
        }
        Self { code: json.status.code(), report, stderr: String::from_utf8_lossy(&json.stderr).into_owned() }
    }

    /// The steps of this name, in order.
    fn steps(&self, name: &str) -> Vec<&Value> {
        self.report["steps"].as_array().unwrap().iter().filter(|step| step["step"] == name).collect()
    }

    /// The one failed step of this name, which says all of `words`.
    #[track_caller]
    fn failed(&self, name: &str, words: &[&str]) -> &Value {
        let failed: Vec<&Value> =
            self.steps(name).into_iter().filter(|step| step["outcome"] == "failed").collect();
        assert!(!failed.is_empty(), "{name} did not fail: {:#}", self.report);
        let last = failed[failed.len() - 1];
        let said = format!("{} {}", last["found"], last["advice"]);
        for word in words {
            assert!(said.contains(word), "without {word:?}: {last:#}");
        }
        assert_eq!(self.report["ok"], false);
        assert_eq!(self.code, Some(1), "{}", self.stderr);
        last
    }

    /// Names of the steps in order, each once for each time it follows another.
    fn names(&self) -> Vec<&str> {
        self.report["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect()
    }
}

#[track_caller]
fn holds_no_secret(output: &Output) {
    for stream in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(stream);
        for secret in [PASSWORD, "cwt=", "Bearer ", "panicked"] {
            assert!(!text.contains(secret), "{secret:?} in {text}");
        }
    }
}

/// How many applications the account has on the server.
fn applications(simulator: &Simulator, account: &str) -> usize {
    simulator.accounts().iter().find(|known| known.uri == account).unwrap().applications.len()
}

async fn all_is_well_and_nothing_is_left_behind(kind: Kind) {
    let simulator = simulator().await;
    let relay = relay(kind, &simulator, "").await;
    let checked = Checked::run(&relay, &[]);
    assert_eq!(checked.code, Some(0), "{:#} {}", checked.report, checked.stderr);
    assert_eq!((&checked.report["ok"], &checked.report["failed"]), (&Value::from(true), &Value::from(0)));
    let about_the_database: &[&str] = match kind {
        Kind::Sqlite => &["database", "schema", "writing", "disk", "clock"],
        Kind::Postgres => &["database", "schema", "writing", "connections", "clock"],
    };
    let before = ["configuration", "key file"];
    let after = [
        "file descriptors",
        "admin address",
        "password",
        "discovery",
        "challenge",
        "token",
        "user",
        "clock",
        "application",
        "availability",
        "links",
        "policies",
        "sign-out",
    ];
    assert_eq!(checked.names(), [&before, about_the_database, &after].concat(), "{:#}", checked.report);
    let product = if kind == Kind::Sqlite { "SQLite 3." } else { "PostgreSQL " };
    assert!(checked.steps("database")[0]["found"].as_str().unwrap().contains(product));
    assert_eq!(checked.steps("password")[0]["account"], ALICE);
    assert_eq!(applications(&simulator, ALICE), 0, "the doctor signs out");
    assert_eq!(applications(&simulator, BOB), 0, "nobody asked about Bob");
    let mut sql = relay.connect().await;
    assert_eq!(sql.count("sessions").await, 0);
    assert_eq!(sql.count("nodes").await, 0, "the trial row is withdrawn");
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_application_of_a_running_relay_is_read_and_no_other_one_is_made() {
    let simulator = simulator().await;
    let mut relay = relay(Kind::Sqlite, &simulator, "").await;
    relay.start();
    relay.account_state(ALICE, "online").await;
    // Once an application more is made than there may be, the oldest ends: that would be the relay's.
    let created = |simulator: &Simulator| -> u64 {
        simulator
            .requests()
            .iter()
            .filter(|count| count.operation == Operation::Applications)
            .map(|count| count.requests)
            .sum()
    };
    let before = created(&simulator);
    let checked = Checked::run(&relay, &[]);
    assert_eq!(checked.code, Some(0), "{:#}", checked.report);
    assert!(checked.steps("application")[0]["found"].as_str().unwrap().contains("no other one was made"));
    assert!(checked.steps("sign-out").is_empty());
    assert_eq!((created(&simulator), applications(&simulator, ALICE)), (before, 1));

    // A server that has forgotten it gets one of the doctor's, and only for the moment.
    relay.server().terminate();
    simulator.forget_application(ALICE).unwrap();
    let checked = Checked::run(&relay, &[]);
    assert_eq!(checked.code, Some(0), "{:#}", checked.report);
    assert_eq!((checked.steps("application").len(), checked.steps("sign-out").len()), (2, 1));
    assert_eq!(applications(&simulator, ALICE), 0);
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_an_unknown_user_are_said_and_asked_once() {
    let simulator = simulator().await;
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    relay.add_account("sip:nobody@contoso.example", PASSWORD);
    let file = relay.folder.path().join("wrong");
    std::fs::write(&file, format!("{PASSWORD}-not")).unwrap();
    relay.tool_ok(&["account", "set-password", ALICE, "--password-file", file.to_str().unwrap()]);
    let asked = || -> u64 {
        let counts = simulator.requests();
        counts.iter().filter(|count| count.operation == Operation::Token).map(|count| count.requests).sum()
    };
    let before = asked();
    let output = relay.tool(&["check", "--account", ALICE]);
    holds_no_secret(&output);
    assert_eq!(asked(), before + 1, "a check is one attempt");
    for account in [ALICE, "sip:nobody@contoso.example"] {
        let checked = Checked::run(&relay, &["--account", account]);
        let words = ["refused the user name or the password", "set-password", "locked", "lock-out"];
        let step = checked.failed("token", &words);
        assert_eq!((&step["account"], &step["answer"]["status"]), (&Value::from(account), &Value::from(400)));
        assert!(checked.names().contains(&"challenge") && !checked.names().contains(&"application"));
    }
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_windows_sign_in_is_walked_too_and_what_is_not_offered_is_said() {
    let simulator = Simulator::start(SimulatorSettings {
        accounts: 2,
        password: PASSWORD.to_owned(),
        password_sign_in: false,
        windows_sign_in: WindowsSignIn::Ntlm,
        conversation_logs: true,
        ..SimulatorSettings::default()
    })
    .await
    .unwrap();
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    let file = relay.folder.path().join("password");
    let file = file.to_str().unwrap();
    relay.tool_ok(&["account", "add", BOB, "--auth", "ntlm", "--password-file", file]);

    let checked = Checked::run(&relay, &["--account", BOB]);
    assert_eq!(checked.code, Some(0), "{:#}", checked.report);
    assert!(checked.steps("token")[0]["found"].as_str().unwrap().contains("urn:microsoft.rtc:windows"));
    let checked = Checked::run(&relay, &["--account", ALICE]);
    let words = ["offers urn:microsoft.rtc:windows", "auth = password"];
    checked.failed("token", &words);
    let asked: u64 = simulator
        .requests()
        .iter()
        .filter(|count| count.operation == Operation::Token && count.account.as_deref() == Some(ALICE))
        .map(|count| count.requests)
        .sum();
    assert_eq!(asked, 0, "no password was sent");
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_account_in_trouble_does_not_hide_the_others() {
    let simulator = simulator().await;
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    relay.add_account(BOB, "wrong");
    let checked = Checked::run(&relay, &[]);
    checked.failed("token", &["refused"]);
    let signed_out = checked.steps("sign-out");
    assert_eq!((signed_out.len(), &signed_out[0]["account"]), (1, &Value::from(ALICE)));
    // A disabled account is looked at only if it is named.
    relay.tool_ok(&["account", "disable", BOB]);
    assert_eq!(Checked::run(&relay, &[]).code, Some(0));
    assert_eq!(Checked::run(&relay, &["--account", BOB]).code, Some(1));
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_an_untrusted_domain_is_named_and_gets_no_password() {
    let simulator = simulator().await;
    simulator.change_settings(SettingsChange {
        discovery_redirect: Some(DiscoveryRedirect {
            location: "https://lyncdiscover.evil.example/?key=secret".to_owned(),
            status: Some(302),
        }),
        ..SettingsChange::default()
    });
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    let checked = Checked::run(&relay, &[]);
    checked.failed("discovery", &["lyncdiscover.evil.example", "not trusted", "server.trusted_domains"]);
    assert!(!checked.report.to_string().contains("key=secret"));
    assert!(checked.steps("challenge").is_empty());
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_is_named() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let relay = Relay::configure_for(&format!("http://127.0.0.1:{port}/"), "");
    relay.add_account(ALICE, PASSWORD);
    let checked = Checked::run(&relay, &[]);
    checked.failed("discovery", &[&format!("127.0.0.1:{port}"), "no answer", "firewall"]);
}

#[test]
fn names_that_lead_nowhere_are_told_each_by_itself() {
    let relay = Relay::configure_for("http://127.0.0.1:9/", "");
    let config = format!("[admin]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{}\"\n", relay.url());
    std::fs::write(relay.folder.path().join("ucwa-relay.toml"), config).unwrap();
    relay.add_account("sip:alice@contoso.invalid", PASSWORD);
    let checked = Checked::run(&relay, &[]);
    let names = checked.steps("name");
    let both = ["lyncdiscoverinternal.contoso.invalid", "lyncdiscover.contoso.invalid"];
    assert_eq!(names.len(), both.len());
    for (step, name) in names.iter().zip(both) {
        let found = step["found"].as_str().unwrap();
        assert!(found.starts_with(name) && found.contains("has no address"), "{step:#}");
        assert!(step["advice"].as_str().unwrap().contains("server.discovery_url"), "{step:#}");
    }
    checked.failed("discovery", &both);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_shown_whether_it_is_trusted_or_not() {
    // Anything that speaks TLS will do: the relay's own admin listener.
    let simulator = Simulate::start(&["--accounts", "1"]);
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let admin = format!(
        "[admin]\nlisten = \"127.0.0.1:{port}\"\ntls_cert_file = \"tls.crt\"\ntls_key_file = \"tls.key\"\n"
    );
    let mut server = Relay::configure(&simulator, &admin);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = server.folder.path().join("tls.crt");
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(server.folder.path().join("tls.key"), made.signing_key.serialize_pem()).unwrap();
    server.start();
    eventually("the listener answers", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;

    let discovery = format!("https://localhost:{port}/nowhere");
    let relay = Relay::configure_for(&discovery, "");
    relay.add_account(ALICE, PASSWORD);
    let checked = Checked::run(&relay, &[]);
    let words =
        ["localhost showed CN=rcgen", "signed by CN=rcgen", "ends in", "not trusted", "server.ca_file"];
    checked.failed("certificate", &words);
    checked.failed("discovery", &["no secure connection"]);

    let trusting = Relay::configure_for(&discovery, &format!("ca_file = \"{}\"", certificate.display()));
    trusting.add_account(ALICE, PASSWORD);
    let checked = Checked::run(&trusting, &[]);
    let shown = checked.steps("certificate")[0];
    assert_eq!(shown["outcome"], "ok", "{shown:#}");
    assert!(shown["found"].as_str().unwrap().ends_with("; trusted"), "{shown:#}");
    assert_eq!(checked.failed("discovery", &["web application"])["answer"]["status"], 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_forbids_is_told_with_the_servers_words_and_the_application_goes() {
    let simulator = simulator().await;
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    for (operation, step) in
        [(Operation::Applications, "application"), (Operation::MakeMeAvailable, "availability")]
    {
        let fault =
            Fault::new(FaultKind::refusal(403, "MobileApplicationNoLongerAllowed")).on(operation).times(2);
        simulator.inject(fault).unwrap();
        let checked = Checked::run(&relay, &[]);
        let failed = checked.failed(step, &["403", "EnableMobility"]);
        assert_eq!(failed["answer"]["status"], 403);
        assert_eq!(failed["answer"]["subcode"], "MobileApplicationNoLongerAllowed");
        assert_eq!(applications(&simulator, ALICE), 0);
        simulator.clear_faults(None);
    }
    simulator.shutdown().await;
}

async fn a_database_that_takes_nothing_is_said_and_the_accounts_are_looked_at(kind: Kind) {
    let simulator = simulator().await;
    let relay = relay(kind, &simulator, "").await;
    match &mut relay.connect().await {
        sql @ Sql::Postgres(_) => {
            let database = sql.rows("SELECT current_database()").await.remove(0);
            let statement = format!("ALTER DATABASE {database} SET default_transaction_read_only = on");
            sql.run(&statement).await.unwrap();
        }
        sql @ Sql::Sqlite(_) => {
            // The mode of a file does not hold back a superuser, who may be running this. A file of a version that may
            // only be read (offset 18 of its header) is read-only for everybody.
            sql.run("PRAGMA wal_checkpoint(TRUNCATE)").await.unwrap();
            let mut file = std::fs::read(relay.database()).unwrap();
            file[18] = 3;
            std::fs::write(relay.database(), file).unwrap();
        }
    }
    let checked = Checked::run(&relay, &[]);
    checked.failed("writing", &["it takes nothing", "read-only"]);
    assert_eq!(checked.steps("sign-out").len(), 1, "{:#}", checked.report);
    simulator.shutdown().await;
}

async fn a_database_without_a_schema_is_not_given_one(kind: Kind) {
    let relay = Relay::configure_on_for(kind, "http://127.0.0.1:9/", "").await;
    let checked = Checked::run(&relay, &[]);
    match kind {
        Kind::Sqlite => {
            checked.failed("database", &["there is no database", "archive.db", "ucwa-relay migrate"]);
            assert!(!relay.database().exists());
        }
        Kind::Postgres => {
            checked.failed("schema", &["empty", "ucwa-relay migrate"]);
            let mut sql = relay.connect().await;
            assert_eq!(sql.rows("SELECT to_regclass('accounts')::text").await, [""]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_out_of_reach_hides_no_declared_account() {
    let simulator = simulator().await;
    let relay = Relay::configure_for(
        &simulator.discovery_url(),
        &format!("[[accounts]]\nsip_uri = \"{ALICE}\"\npassword = {{ file = \"secret\" }}\n"),
    );
    std::fs::write(relay.folder.path().join("secret"), PASSWORD).unwrap();
    let checked = Checked::run(&relay, &[]);
    checked.failed("database", &["there is no database"]);
    assert_eq!(checked.steps("sign-out").len(), 1, "{:#}", checked.report);
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_does_not_open_a_password_is_said_for_whom() {
    let simulator = simulator().await;
    let relay = relay(Kind::Sqlite, &simulator, "").await;
    let key = relay.folder.path().join("ucwa-relay.key");
    std::fs::write(&key, format!("{}\n", "ab".repeat(32))).unwrap();
    let checked = Checked::run(&relay, &[]);
    checked.failed("key file", &["does not open 1 of 1", ALICE, "backup"]);
    checked.failed("password", &["does not open"]);
    simulator.shutdown().await;
}

#[test]
fn a_configuration_that_cannot_be_used_ends_with_2_and_is_reported_too() {
    let relay = Relay::configure_for("http://127.0.0.1:9/", "[outbox]\nmax_atempts = 3\n");
    let checked = Checked::run(&relay, &[]);
    assert_eq!(checked.code, Some(2));
    assert!(checked.stderr.contains("did you mean max_attempts?"), "{}", checked.stderr);
    assert_eq!(checked.names(), ["configuration"]);

    let relay = Relay::configure_for("http://127.0.0.1:9/", "");
    relay.tool_ok(&["migrate"]);
    let nobody = relay.tool(&["check", "--account", "sip:nobody@contoso.example"]);
    assert_eq!(nobody.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("account add"));

    let declared =
        format!("[[accounts]]\nsip_uri = \"{ALICE}\"\npassword = {{ env = \"NOT_SET_ANYWHERE\" }}\n");
    let relay = Relay::configure_for("http://127.0.0.1:9/", &declared);
    let checked = Checked::run(&relay, &[]);
    assert_eq!(checked.code, Some(2), "as `run`, which does not start");
    assert!(checked.names().contains(&"secrets"));
}

// ------------------------------------------------------------------------------------------- file descriptors

#[tokio::test(flavor = "multi_thread")]
async fn too_few_file_descriptors_are_said_at_the_start_and_by_the_doctor() {
    let simulator = simulator().await;
    let mut relay = relay(Kind::Sqlite, &simulator, "").await;
    relay.in_shell_after("ulimit -n 80");
    relay.start();
    relay.account_state(ALICE, "online").await;
    let log = relay.server().stderr();
    for words in ["the enabled accounts (1) may need up to 93", "limit=80", "LimitNOFILE"] {
        assert!(log.contains(words), "without {words:?}: {log}");
    }
    relay.server().terminate();
    let checked = relay.tool(&["check"]);
    let shown = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(shown.contains("WARNING") && shown.contains("LimitNOFILE"), "{shown}");
    simulator.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_takes_as_many_file_descriptors_as_it_may() {
    let simulator = simulator().await;
    let mut relay = relay(Kind::Sqlite, &simulator, "").await;
    relay.in_shell_after("ulimit -Sn 80; ulimit -Hn 400");
    relay.start();
    relay.account_state(ALICE, "online").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", relay.server().id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some("400"), "{line}");
    assert!(!relay.server().stderr().contains("LimitNOFILE"));
    simulator.shutdown().await;
}
