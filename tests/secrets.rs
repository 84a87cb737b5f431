//! Passwords at rest: another key for all of them, at any moment and through any crash, and passwords that come from
//! elsewhere.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod support;

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Value, json};
use support::{
    Relay, Simulate, eventually,
    sql::{Kind, Sql},
};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const PASSWORD: &str = "simulated";

on_both_databases!(
    "multi_thread":
    a_new_key_seals_every_password_and_a_running_server_goes_on,
    a_crash_in_the_middle_leaves_every_password_readable_and_is_gone_on_with,
    nothing_changes_where_a_password_does_not_open,
);

async fn relay(kind: Kind, simulator: &Simulate, more: &str) -> Relay {
    let relay =
        Relay::configure_on(kind, simulator, &format!("[secrets]\nkey_file = \"the.key\"\n{more}")).await;
    relay.add_account(ALICE, PASSWORD);
    relay.add_account(BOB, PASSWORD);
    relay
}

fn key_file(relay: &Relay) -> PathBuf {
    relay.folder.path().join("the.key")
}

/// The keys in the file, the newest first.
fn keys(relay: &Relay) -> Vec<String> {
    std::fs::read_to_string(key_file(relay)).unwrap().lines().map(str::to_owned).collect()
}

/// The sealed passwords as they stand in the database.
async fn sealed(relay: &Relay) -> BTreeSet<String> {
    let rows = relay.connect().await.rows("SELECT lower(hex(secret_sealed)) FROM accounts").await;
    rows.into_iter().collect()
}

/// The same on PostgreSQL, which has no function of that name.
async fn sealed_on(kind: Kind, relay: &Relay) -> BTreeSet<String> {
    match kind {
        Kind::Sqlite => sealed(relay).await,
        Kind::Postgres => {
            let rows = relay.connect().await.rows("SELECT encode(secret_sealed, 'hex') FROM accounts").await;
            rows.into_iter().collect()
        }
    }
}

/// Every account signs in with the password that the key file opens.
#[track_caller]
fn all_sign_in(relay: &Relay) {
    relay.tool_ok(&["check"]);
}

async fn a_new_key_seals_every_password_and_a_running_server_goes_on(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let mut relay = relay(kind, &simulator, "").await;
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;
    let (old_keys, old_sealed) = (keys(&relay), sealed_on(kind, &relay).await);

    let node = relay.connect().await.rows("SELECT node_id FROM nodes").await.remove(0);
    let said = relay.tool_ok(&["account", "reseal"]);
    assert!(said.contains("resealed 2 passwords"), "{said} on {node}");
    let new_sealed = sealed_on(kind, &relay).await;
    assert!(old_sealed.is_disjoint(&new_sealed));
    assert_eq!((keys(&relay).len(), old_keys.len()), (1, 1));
    assert_ne!(keys(&relay), old_keys);
    let files: Vec<String> = std::fs::read_dir(relay.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("the.key"))
        .collect();
    assert_eq!(files, ["the.key"], "nothing else is left");

    // A change that is one makes the server read all rows; the passwords it has are still the same.
    relay.tool_ok(&["account", "disable", BOB]);
    relay.account_state(BOB, "stopped").await;
    relay.tool_ok(&["account", "enable", BOB]);
    relay.account_state(BOB, "online").await;
    let log = relay.server().stderr();
    assert!(!log.contains("it signs in anew"), "{log}");
    assert!(relay.server().terminate());
    all_sign_in(&relay);

    // A password that is set is noticed, though it is sealed as well.
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.add_wrong_password(ALICE);
    relay.account_state(ALICE, "needs_attention").await;
}

async fn a_crash_in_the_middle_leaves_every_password_readable_and_is_gone_on_with(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let relay = relay(kind, &simulator, "").await;
    let (old_keys, old_sealed) = (keys(&relay), sealed_on(kind, &relay).await);
    // Somebody's transaction keeps the passwords from being written, so that it ends between two steps.
    let mut other = relay.connect().await;
    let hold = match &other {
        Sql::Sqlite(_) => "BEGIN IMMEDIATE",
        Sql::Postgres(_) => "BEGIN; SELECT id FROM accounts FOR UPDATE",
    };
    other.run_all(hold).await.unwrap();
    let mut resealing = relay.start_tool(&["account", "reseal"]);
    eventually("the new key is in the file", async || (keys(&relay).len() == 2).then_some(())).await;
    resealing.kill();
    other.run("ROLLBACK").await.unwrap();

    let between = keys(&relay);
    assert_eq!(between[1..], old_keys);
    assert_eq!(sealed_on(kind, &relay).await, old_sealed);
    all_sign_in(&relay);
    let kept = std::fs::read(key_file(&relay)).unwrap();

    let output = relay.tool(&["account", "reseal"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("resealed 2 passwords"), "{said}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("went on with the new key"));
    assert_eq!(keys(&relay), between[..1]);
    assert!(sealed_on(kind, &relay).await.is_disjoint(&old_sealed));
    all_sign_in(&relay);

    // A crash after the database has forgotten the old key and before the file has.
    let resealed = sealed_on(kind, &relay).await;
    std::fs::write(key_file(&relay), kept).unwrap();
    all_sign_in(&relay);
    let said = relay.tool_ok(&["account", "reseal"]);
    assert!(said.contains("resealed 0 passwords"), "{said}");
    assert_eq!((keys(&relay), sealed_on(kind, &relay).await), (between[..1].to_vec(), resealed));
    all_sign_in(&relay);
}

async fn nothing_changes_where_a_password_does_not_open(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let relay = relay(kind, &simulator, "").await;
    let mut sql = relay.connect().await;
    // Sealed for Alice, which opens for nobody else.
    let copy = format!(
        "UPDATE accounts SET secret_sealed = (SELECT secret_sealed FROM accounts WHERE sip_uri = '{ALICE}') \
         WHERE sip_uri = '{BOB}'"
    );
    sql.run(&copy).await.unwrap();
    let before = (keys(&relay), sealed_on(kind, &relay).await);
    let output = relay.tool(&["account", "reseal"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(BOB) && !said.contains(ALICE) && said.contains("nothing was changed"), "{said}");
    assert_eq!((keys(&relay), sealed_on(kind, &relay).await), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_waits_for_its_turn_signs_in_with_the_new_key() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let mut relay = relay(Kind::Sqlite, &simulator, "[relay]\naccounts_online_at_once = 1\n").await;
    // One account takes the only place for a while.
    let fault = json!({ "fault": "delay", "ms": 5000, "operation": "discovery", "count": 1 });
    simulator.post("/fault", &fault).await;
    relay.start();
    eventually("one account is held up", async || {
        (simulator.get("/faults").await[0]["remaining"] == 0).then_some(())
    })
    .await;
    relay.tool_ok(&["account", "reseal"]);
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_may_have_copies_of_the_key_file_get_the_new_key_first() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let relay = relay(Kind::Postgres, &simulator, "").await;
    let mut sql = relay.connect().await;
    let other = "INSERT INTO nodes (node_id, version, started_at, heartbeat_at) VALUES ('relay-2', '1', now(), now())";
    sql.run(other).await.unwrap();
    let before = keys(&relay);
    let output = relay.tool(&["account", "reseal"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    for word in ["relay-2", "--shared", "--prepare"] {
        assert!(said.contains(word), "without {word}: {said}");
    }
    assert_eq!(keys(&relay), before);

    relay.tool_ok(&["account", "reseal", "--prepare"]);
    let prepared = keys(&relay);
    assert_eq!(prepared[1..], before);
    relay.tool_ok(&["account", "reseal", "--prepare"]);
    assert_eq!(keys(&relay), prepared, "one new key is enough");
    let checked = relay.tool_ok(&["check", "--format", "json"]);
    let checked: Value = serde_json::from_str(&checked).unwrap();
    let step = checked["steps"].as_array().unwrap().iter().find(|step| step["step"] == "key file").unwrap();
    assert_eq!(step["outcome"], "warning", "{step:#}");
    relay.tool_ok(&["account", "reseal"]);
    assert_eq!(keys(&relay), prepared[..1]);
    relay.tool_ok(&["account", "reseal", "--shared"]);
    assert!(!prepared.contains(&keys(&relay)[0]));
    all_sign_in(&relay);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_comes_from_a_systemd_credential_or_it_is_said_what_to_write_where() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let declared =
        format!("[[accounts]]\nsip_uri = \"{ALICE}\"\npassword = {{ credential = \"relay.alice\" }}\n");
    let mut relay = Relay::configure(&simulator, &declared);
    relay.tool_ok(&["account", "add", BOB, "--password-ref", "credential:bob"]);

    // Beside the service.
    let refused = relay.tool(&["run"]);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("LoadCredential=relay.alice:FILE") && said.contains("CREDENTIALS_DIRECTORY"),
        "{said}"
    );
    let said = String::from_utf8(relay.tool(&["check", "--account", BOB]).stdout).unwrap();
    assert!(said.contains("systemd credential bob") && said.contains("LoadCredential=bob:FILE"), "{said}");

    // As systemd starts it.
    let directory = relay.folder.path().join("credentials");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("relay.alice"), PASSWORD).unwrap();
    relay.in_shell_after(&format!("export CREDENTIALS_DIRECTORY='{}'", directory.display()));
    let said = String::from_utf8(relay.tool(&["check", "--account", BOB]).stdout).unwrap();
    assert!(said.contains("cannot be read from the systemd credential bob"), "{said}");
    std::fs::write(directory.join("bob"), format!("{PASSWORD}\n")).unwrap();
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;
    let shown = relay.tool_ok(&["account", "show", BOB]);
    assert!(shown.contains("credential:bob") && !shown.contains(PASSWORD), "{shown}");
}
