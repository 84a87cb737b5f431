//! The whole program: the real binary as server against the real binary as simulated Skype for Business Server, and
//! what stands in the database afterwards.

mod support;

use std::time::Duration;

use serde_json::json;
use support::{Relay, Simulate, eventually, eventually_none, eventually_within, sql::Kind};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const CAROL: &str = "sip:user0003@contoso.example";
const PASSWORD: &str = "simulated";

/// Inserts a row as the documentation shows it, and gives its id.
async fn insert(relay: &Relay, account: &str, recipients: &str, body: &str) -> i64 {
    let mut sql = relay.connect().await;
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let values = [account, recipients, body].map(quoted).join(", ");
    let inserted = sql
        .rows(&format!("INSERT INTO outbox (account, recipients, body) VALUES ({values}) RETURNING id"))
        .await;
    inserted[0].parse().expect("an id")
}

/// Waits until a row of the outbox is in one of these states; gives `state|code|subcode|error`.
async fn outcome(relay: &Relay, id: i64, states: &[&str]) -> String {
    let mut sql = relay.connect().await;
    let query = format!("SELECT state, last_code, last_subcode, last_error FROM outbox WHERE id = {id}");
    eventually(&format!("outbox row {id} is {states:?}"), async || {
        let row = sql.rows(&query).await.remove(0);
        states.contains(&row.split('|').next()?).then_some(row)
    })
    .await
}

async fn eventually_clean(relay: &Relay, simulator: &Simulate) {
    eventually_none(Duration::from_secs(150), "ledger and database disagree", async || {
        let quiet = simulator.get("/counters").await["quiet"].as_bool().unwrap_or(false);
        let reckoning = relay.reckon(simulator).await;
        if quiet && reckoning.is_clean() {
            Vec::new()
        } else {
            vec![format!("quiet: {quiet}, {reckoning:#?}")]
        }
    })
    .await;
    let reckoning = relay.reckon(simulator).await;
    assert!(reckoning.archived_incoming >= reckoning.delivered_to_accounts, "{reckoning:?}");
}

async fn a_conversation_is_archived_from_the_call_to_its_end(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;

    let conversation = simulator.call("html.dana@fabrikam.example", ALICE, "Are you there?").await;
    simulator.say(&conversation, "It is urgent: 3 + 4 = 7 & 100 % <ok> 🦀").await;
    simulator.say(&conversation, "שלום\nand a second line").await;
    simulator.post("/say", &json!({ "conversation": conversation, "html": "<b>bold</b> words" })).await;
    simulator.post("/leave", &json!({ "conversation": conversation })).await;

    let mut sql = relay.connect().await;
    eventually("the conversation is over in the archive", async || {
        (sql.count("conversations WHERE ended_at IS NOT NULL").await == 1).then_some(())
    })
    .await;
    // A text that an event only linked may still be on its way.
    eventually("every message is in the hash chain", async || {
        let chained = sql.count("messages WHERE chain_hash IS NOT NULL").await;
        (chained == 4).then_some(())
    })
    .await;
    let rows = sql.rows("SELECT sender_uri, status, source, body_html, body FROM messages ORDER BY id").await;
    let rows: Vec<Vec<&str>> = rows.iter().map(|row| row.splitn(5, '|').collect()).collect();
    let bodies: Vec<String> = rows.iter().map(|row| row[4].trim_end().replace('\r', "")).collect();
    assert_eq!(
        bodies,
        [
            "Are you there?",
            "It is urgent: 3 + 4 = 7 & 100 % <ok> 🦀",
            "שלום\nand a second line",
            "bold words"
        ]
    );
    assert!(rows.iter().all(|row| row[0] == "sip:html.dana@fabrikam.example"));
    assert!(rows.iter().all(|row| row[1] == "delivered"));
    assert_eq!(rows[0][2], "event", "the accepted copy made the invitation's text an event");
    assert_eq!(rows[3][3].trim(), "<b>bold</b> words");
    assert_eq!(
        sql.count("participants WHERE is_local = FALSE AND sip_uri = 'sip:html.dana@fabrikam.example' AND joined_at IS NOT NULL AND left_at IS NOT NULL").await,
        1
    );
    assert_eq!(
        sql.count("invitations WHERE direction = 'incoming' AND action = 'accepted' AND kind = 'messaging'")
            .await,
        1
    );
    assert!(relay.server().terminate(), "SIGTERM ends it in order");
}

async fn an_inserted_row_becomes_a_delivered_message_and_the_next_one_uses_the_open_conversation(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;

    let first =
        insert(&relay, "USER0001@Contoso.example", "html.Erin@Fabrikam.example", "Deploy finished").await;
    assert!(outcome(&relay, first, &["delivered"]).await.starts_with("delivered"));
    let second = insert(&relay, ALICE, "sip:html.erin@fabrikam.example", "And it works").await;
    outcome(&relay, second, &["delivered"]).await;

    let mut sql = relay.connect().await;
    assert_eq!(sql.count("conversations").await, 1, "the open conversation was used");
    assert_eq!(
        sql.count("messages m JOIN outbox o ON o.message_id = m.id AND m.outbox_id = o.id WHERE m.status = 'delivered'").await,
        2
    );
    assert_eq!(sql.count("outbox_attempts WHERE finished_at IS NOT NULL").await, 2);
    let ledger = simulator.ledger().await;
    let said: Vec<&str> = ledger.outgoing.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(said, ["Deploy finished", "And it works"]);

    let html = sql
        .rows(&format!(
            "INSERT INTO outbox (account, recipients, body, content_type, subject, importance)
             VALUES ('{ALICE}', 'html.erin@fabrikam.example', '<i>so</i>', 'text/html', 'Style', 'Urgent') RETURNING id"
        ))
        .await[0]
        .parse()
        .expect("an id");
    outcome(&relay, html, &["delivered"]).await;
    assert_eq!(simulator.ledger().await.outgoing[2].content_type.split(';').next(), Some("text/html"));
}

async fn what_can_not_be_sent_fails_with_the_servers_words_and_holds_back_nothing(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;

    let mut expected = Vec::new();
    for (recipient, subcode) in [
        ("declines.a@fabrikam.example", "Declined"),
        ("busy.b@fabrikam.example", "Busy"),
        ("dnd.c@fabrikam.example", "DoNotDisturb"),
        ("missing.d@fabrikam.example", "DestinationNotFound"),
        ("unknown.e@fabrikam.example", "DestinationNotFound"),
    ] {
        expected.push((insert(&relay, ALICE, recipient, "hello").await, subcode));
    }
    let good = insert(&relay, ALICE, "silent.f@fabrikam.example", "hello").await;
    outcome(&relay, good, &["delivered"]).await;
    for (id, subcode) in expected {
        let outcome = outcome(&relay, id, &["failed"]).await;
        let parts: Vec<&str> = outcome.splitn(4, '|').collect();
        assert_eq!(parts[2], subcode, "{outcome}");
        assert!(parts[3].len() > 10, "a sentence says why: {outcome}");
    }
    for (account, recipients, body, words) in [
        ("sip:nobody@contoso.example", "sip:x@y.example", "hello", "nobody@contoso.example"),
        (ALICE, "not an address", "hello", "not an address"),
        (ALICE, "sip:x@y.example", "   ", "empty"),
    ] {
        let id = insert(&relay, account, recipients, body).await;
        let outcome = outcome(&relay, id, &["failed"]).await;
        assert!(outcome.contains(words), "{outcome}");
    }
    // Who is not reachable now is tried again.
    let absent = insert(&relay, ALICE, "unreachable.g@fabrikam.example", "hello").await;
    let mut sql = relay.connect().await;
    eventually("the unreachable recipient is tried again later", async || {
        let waiting = format!(
            "outbox WHERE id = {absent} AND attempts = 1 AND state = 'queued' AND next_attempt_at IS NOT NULL
                AND last_subcode = 'Unreachable'"
        );
        (sql.count(&waiting).await == 1).then_some(())
    })
    .await;
}

async fn a_wrong_password_stops_one_account_and_no_other(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "3"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.add_account(BOB, "not the password");
    relay.add_account(CAROL, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(CAROL, "online").await;
    let detail = relay.account_state(BOB, "needs_attention").await;
    assert!(detail.contains("set-password"), "{detail}");
    assert!(!detail.contains("not the password"), "{detail}");
    let row = insert(&relay, CAROL, "silent.a@fabrikam.example", "works").await;
    outcome(&relay, row, &["delivered"]).await;
    assert!(!relay.server().stderr().contains("not the password"), "no password in a log");
    assert!(!relay.server().stderr().contains("cwt="), "no token in a log");

    let file = relay.folder.path().join("right");
    std::fs::write(&file, PASSWORD).expect("the password file is written");
    relay.tool_ok(&[
        "account",
        "set-password",
        BOB,
        "--password-file",
        file.to_str().expect("a path in UTF-8"),
    ]);
    relay.account_state(BOB, "online").await;
}

async fn accounts_are_taken_up_and_signed_out_while_the_server_runs(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.add_account(BOB, PASSWORD);
    relay.account_state(BOB, "online").await;
    relay.tool_ok(&["account", "disable", ALICE]);
    relay.account_state(ALICE, "stopped").await;
    eventually("the application of the disabled account is deleted", async || {
        let accounts = simulator.get("/accounts").await;
        let alice = accounts.as_array()?.iter().find(|account| account["uri"] == ALICE)?.clone();
        alice["applications"].as_array()?.is_empty().then_some(())
    })
    .await;
    let mut sql = relay.connect().await;
    assert_eq!(sql.count("sessions WHERE ended_at IS NOT NULL AND end_reason LIKE '%disabled%'").await, 1);
    relay.tool_ok(&["account", "enable", ALICE]);
    relay.account_state(ALICE, "online").await;
}

async fn a_kill_in_mid_traffic_loses_and_doubles_nothing_and_resumes_the_application(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "3", "--rate", "60", "--seed", "7"]);
    let mut relay = Relay::configure_on(kind, &simulator, "[outbox]\nsettle_after = \"6s\"").await;
    for account in [ALICE, BOB, CAROL] {
        relay.add_account(account, PASSWORD);
    }
    relay.start();
    for account in [ALICE, BOB, CAROL] {
        relay.account_state(account, "online").await;
    }
    let mut number = 0;
    for round in 1..=3 {
        for _ in 0..20 {
            number += 1;
            let account = [ALICE, BOB, CAROL][number % 3];
            let recipient = format!("echo.{}@fabrikam.example", number % 4);
            insert(&relay, account, &recipient, &format!("row {number}")).await;
        }
        let mut sql = relay.connect().await;
        eventually_within(Duration::from_secs(150), "traffic flows both ways", async || {
            let arrived = sql.count("messages WHERE direction = 'incoming'").await;
            let sending = sql.count("outbox WHERE state IN ('sending', 'sent', 'delivered')").await;
            (arrived >= 40 * round && sending >= 20 * round - 15).then_some(())
        })
        .await;
        relay.server().kill();
        relay.start();
    }
    for account in [ALICE, BOB, CAROL] {
        relay.account_state(account, "online").await;
    }
    simulator.post("/traffic", &json!({ "running": false })).await;
    let mut sql = relay.connect().await;
    eventually_within(Duration::from_secs(120), "every row has its outcome", async || {
        let open = sql.count("outbox WHERE state NOT IN ('delivered', 'uncertain')").await;
        (open == 0).then_some(())
    })
    .await;
    eventually_clean(&relay, &simulator).await;
    assert_eq!(sql.count("sessions").await, 3, "each application was resumed, none was made anew");
    assert!(sql.count("coverage_gaps").await >= 3, "the time without a server is visible");
    assert_eq!(sql.count("event_quarantine").await, 0);
}

async fn a_forgotten_application_is_replaced_and_the_session_says_why(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    simulator.post("/forget-application", &json!({ "account": ALICE })).await;
    let mut sql = relay.connect().await;
    eventually("a second session is open", async || {
        (sql.count("sessions WHERE ended_at IS NULL AND id > 1").await == 1).then_some(())
    })
    .await;
    let reason = sql.rows("SELECT end_reason FROM sessions WHERE id = 1").await.remove(0);
    assert!(reason.contains("no longer knows"), "{reason}");
    relay.account_state(ALICE, "online").await;
    let conversation = simulator.call("silent.a@fabrikam.example", ALICE, "still there?").await;
    simulator.say(&conversation, "good").await;
    eventually("the new application's messages are archived", async || {
        (sql.count("messages").await == 2).then_some(())
    })
    .await;
}

async fn messaging_that_was_closed_is_added_again_and_an_idle_conversation_is_ended(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "[relay]\nidle_conversation = \"2s\"").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    let first = insert(&relay, ALICE, "pauses.a@fabrikam.example", "one").await;
    outcome(&relay, first, &["delivered"]).await;
    let second = insert(&relay, ALICE, "pauses.a@fabrikam.example", "two").await;
    outcome(&relay, second, &["delivered"]).await;
    let third = insert(&relay, ALICE, "silent.b@fabrikam.example", "three").await;
    outcome(&relay, third, &["delivered"]).await;
    let mut sql = relay.connect().await;
    eventually("the idle conversation is over", async || {
        let ended = sql.count("conversations c JOIN outbox o ON o.conversation_id = c.id WHERE o.body = 'three' AND c.ended_at IS NOT NULL").await;
        (ended == 1).then_some(())
    })
    .await;
    let fourth = insert(&relay, ALICE, "silent.b@fabrikam.example", "four").await;
    outcome(&relay, fourth, &["delivered"]).await;
    let said: Vec<String> =
        simulator.ledger().await.outgoing.iter().map(|entry| entry.text.clone()).collect();
    assert_eq!(said, ["one", "two", "three", "four"]);
}

async fn two_servers_on_one_database_are_refused(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    let second = relay.tool(&["run"]);
    assert_eq!(second.status.code(), Some(1));
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(words.contains("another"), "{words}");
    assert!(relay.server().runs());
}

#[test]
fn the_demo_reckons_and_finds_nothing_lost() {
    let folder = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ucwa-relay"))
        .current_dir(folder.path())
        .args(["demo", "--accounts", "4", "--for", "8s", "--rate", "30"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let number = |name: &str| -> usize {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(number("archived") >= 100, "{text}");
    assert!(number("relayed") >= 40, "{text}");
    assert_eq!((number("lost"), number("duplicated"), number("unsettled")), (0, 0, 0));
}

/// Injects a fault that strikes `count` times.
async fn fault(simulator: &Simulate, request: &serde_json::Value) {
    let answer = simulator.post("/fault", request).await;
    assert!(answer.get("id").is_some(), "{request} was answered {answer}");
}

async fn a_lost_answer_to_a_send_is_settled_and_nothing_is_sent_twice(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay =
        Relay::configure_on(kind, &simulator, "[outbox]\nsettle_after = \"6s\"\nretry_base = \"1s\"").await;
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    let mut number = 0;
    for (operation, kind) in [
        ("startMessaging", "cut_after"),
        ("startMessaging", "cut_before"),
        ("sendMessage", "cut_after"),
        ("sendMessage", "cut_before"),
    ] {
        if operation == "sendMessage" {
            let opener = insert(&relay, ALICE, &format!("silent.{kind}@fabrikam.example"), "opener").await;
            outcome(&relay, opener, &["delivered"]).await;
        }
        fault(&simulator, &json!({ "operation": operation, "fault": kind })).await;
        number += 1;
        let recipient = if operation == "sendMessage" { kind.to_owned() } else { format!("new.{kind}") };
        let text = format!("{operation} {kind} {number}");
        let id = insert(&relay, ALICE, &format!("silent.{recipient}@fabrikam.example"), &text).await;
        outcome(&relay, id, &["delivered"]).await;
        let accepted = simulator.ledger().await.outgoing.iter().filter(|entry| entry.text == text).count();
        assert_eq!(accepted, 1, "{text}");
    }
    eventually_clean(&relay, &simulator).await;
}

async fn whatever_the_event_channel_answers_nothing_is_lost_or_doubled(kind: Kind) {
    let simulator = Simulate::start(&["--accounts", "2", "--rate", "30", "--seed", "11"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, PASSWORD);
    relay.add_account(BOB, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;
    let mut sql = relay.connect().await;
    for request in [
        json!({ "fault": "cut_before" }),
        json!({ "fault": "cut_after" }),
        json!({ "fault": "cut_midway" }),
        json!({ "fault": "expired_token" }),
        json!({ "fault": "status", "status": 500, "body": "empty" }),
        json!({ "fault": "status", "status": 502, "body": "html" }),
        json!({ "fault": "status", "status": 503, "retry_after": 1 }),
        json!({ "fault": "truncated_xml" }),
        json!({ "fault": "malformed_xml" }),
        json!({ "fault": "doctype" }),
        json!({ "fault": "invalid_utf8" }),
        json!({ "fault": "wrong_content_type" }),
        json!({ "fault": "unknown_things" }),
        json!({ "fault": "link_only", "count": 5 }),
        json!({ "fault": "odd_order", "count": 5 }),
        json!({ "fault": "resync" }),
    ] {
        let mut request = request.clone();
        request["account"] = json!(ALICE);
        request["operation"] = json!("events");
        fault(&simulator, &request).await;
        let before = sql.count("messages WHERE account_id = 1").await;
        eventually(&format!("messages arrive again after {request}"), async || {
            let faults = simulator.get("/faults").await;
            let spent = faults.as_array()?.iter().all(|fault| fault["remaining"].as_u64().unwrap_or(0) == 0);
            let now = sql.count("messages WHERE account_id = 1").await;
            (spent && now > before + 5).then_some(())
        })
        .await;
    }
    simulator.post("/traffic", &json!({ "running": false })).await;
    eventually_clean(&relay, &simulator).await;
    let restarts = sql
        .rows(
            "SELECT restarts FROM account_status s JOIN accounts a ON a.id = s.account_id
              WHERE a.sip_uri = 'sip:user0002@contoso.example'",
        )
        .await;
    assert_eq!(restarts, ["0"], "the other account noticed nothing");
}

on_both_databases!(
    "multi_thread":
    a_conversation_is_archived_from_the_call_to_its_end,
    an_inserted_row_becomes_a_delivered_message_and_the_next_one_uses_the_open_conversation,
    what_can_not_be_sent_fails_with_the_servers_words_and_holds_back_nothing,
    a_wrong_password_stops_one_account_and_no_other,
    accounts_are_taken_up_and_signed_out_while_the_server_runs,
    a_kill_in_mid_traffic_loses_and_doubles_nothing_and_resumes_the_application,
    a_forgotten_application_is_replaced_and_the_session_says_why,
    messaging_that_was_closed_is_added_again_and_an_idle_conversation_is_ended,
    two_servers_on_one_database_are_refused,
    a_lost_answer_to_a_send_is_settled_and_nothing_is_sent_twice,
    whatever_the_event_channel_answers_nothing_is_lost_or_doubled,
);
