//! The whole program: the real binary as server against the real binary as simulated Skype for Business Server, and
//! what stands in the database afterwards.

mod support;

use std::time::Duration;

use serde_json::json;
use sqlx::Row;
use support::{Relay, Simulate, count, eventually, eventually_within};

const ALICE: &str = "sip:user0001@contoso.example";
const BOB: &str = "sip:user0002@contoso.example";
const CAROL: &str = "sip:user0003@contoso.example";
const PASSWORD: &str = "simulated";

/// Inserts a row as the documentation shows it, and gives its id.
async fn insert(relay: &Relay, account: &str, recipients: &str, body: &str) -> i64 {
    let pool = relay.sql().await;
    let id = sqlx::query("INSERT INTO outbox (account, recipients, body) VALUES (?, ?, ?)")
        .bind(account)
        .bind(recipients)
        .bind(body)
        .execute(&pool)
        .await
        .expect("anybody can insert")
        .last_insert_rowid();
    pool.close().await;
    id
}

/// Waits until a row of the outbox is in one of these states; gives `state|code|subcode|error`.
async fn outcome(relay: &Relay, id: i64, states: &[&str]) -> String {
    let pool = relay.sql().await;
    let outcome = eventually(&format!("outbox row {id} is {states:?}"), async || {
        let row = sqlx::query(
            "SELECT state, coalesce(last_code, ''), coalesce(last_subcode, ''), coalesce(last_error, '') \
             FROM outbox WHERE id = ?",
        )
        .bind(id)
        .fetch_one(&pool)
        .await
        .expect("the row can be read");
        let state: String = row.get(0);
        states.contains(&state.as_str()).then(|| {
            format!(
                "{state}|{}|{}|{}",
                row.get::<String, _>(1),
                row.get::<String, _>(2),
                row.get::<String, _>(3)
            )
        })
    })
    .await;
    pool.close().await;
    outcome
}

async fn eventually_clean(relay: &Relay, simulator: &Simulate) {
    let reckoning = eventually_within(Duration::from_secs(150), "ledger and database agree", async || {
        let quiet = simulator.get("/counters").await["quiet"].as_bool().unwrap_or(false);
        let reckoning = relay.reckon(simulator).await;
        (quiet && reckoning.is_clean()).then_some(reckoning)
    })
    .await;
    assert!(reckoning.archived_incoming >= reckoning.delivered_to_accounts, "{reckoning:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_is_archived_from_the_call_to_its_end() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;

    let conversation = simulator.call("html.dana@fabrikam.example", ALICE, "Are you there?").await;
    simulator.say(&conversation, "It is urgent: 3 + 4 = 7 & 100 % <ok> 🦀").await;
    simulator.say(&conversation, "שלום\nand a second line").await;
    simulator.post("/say", &json!({ "conversation": conversation, "html": "<b>bold</b> words" })).await;
    simulator.post("/leave", &json!({ "conversation": conversation })).await;

    let pool = relay.sql().await;
    eventually("the conversation is over in the archive", async || {
        (count(&pool, "SELECT count(*) FROM conversations WHERE ended_at IS NOT NULL").await == 1)
            .then_some(())
    })
    .await;
    // A text that an event only linked may still be on its way.
    eventually("every message is in the hash chain", async || {
        let chained = count(&pool, "SELECT count(*) FROM messages WHERE chain_hash IS NOT NULL").await;
        (chained == 4).then_some(())
    })
    .await;
    let rows = sqlx::query(
        "SELECT direction, sender_uri, body, coalesce(body_html, ''), source, status, \
                chain_seq, content_hash, chain_hash FROM messages ORDER BY id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let bodies: Vec<String> =
        rows.iter().map(|row| row.get::<String, _>("body").trim_end().replace('\r', "")).collect();
    assert_eq!(
        bodies,
        [
            "Are you there?",
            "It is urgent: 3 + 4 = 7 & 100 % <ok> 🦀",
            "שלום\nand a second line",
            "bold words"
        ]
    );
    assert!(rows.iter().all(|row| row.get::<String, _>("sender_uri") == "sip:html.dana@fabrikam.example"));
    assert!(rows.iter().all(|row| row.get::<String, _>("status") == "delivered"));
    assert_eq!(
        rows[0].get::<String, _>("source"),
        "event",
        "the accepted copy made the invitation's text an event"
    );
    assert_eq!(rows[3].get::<String, _>(3).trim(), "<b>bold</b> words");
    assert_eq!(
        count(&pool, "SELECT count(*) FROM participants WHERE is_local = 0 AND sip_uri = 'sip:html.dana@fabrikam.example' AND joined_at IS NOT NULL AND left_at IS NOT NULL").await,
        1
    );
    assert_eq!(
        count(&pool, "SELECT count(*) FROM invitations WHERE direction = 'incoming' AND action = 'accepted' AND kind = 'messaging'").await,
        1
    );
    assert!(relay.server().terminate(), "SIGTERM ends it in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inserted_row_becomes_a_delivered_message_and_the_next_one_uses_the_open_conversation() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;

    let first =
        insert(&relay, "USER0001@Contoso.example", "html.Erin@Fabrikam.example", "Deploy finished").await;
    assert!(outcome(&relay, first, &["delivered"]).await.starts_with("delivered"));
    let second = insert(&relay, ALICE, "sip:html.erin@fabrikam.example", "And it works").await;
    outcome(&relay, second, &["delivered"]).await;

    let pool = relay.sql().await;
    assert_eq!(count(&pool, "SELECT count(*) FROM conversations").await, 1, "the open conversation was used");
    assert_eq!(
        count(&pool, "SELECT count(*) FROM messages m JOIN outbox o ON o.message_id = m.id AND m.outbox_id = o.id WHERE m.status = 'delivered'").await,
        2
    );
    assert_eq!(count(&pool, "SELECT count(*) FROM outbox_attempts WHERE finished_at IS NOT NULL").await, 2);
    let ledger = simulator.ledger().await;
    let said: Vec<&str> = ledger.outgoing.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(said, ["Deploy finished", "And it works"]);

    let html = sqlx::query("INSERT INTO outbox (account, recipients, body, content_type, subject, importance) VALUES (?, 'html.erin@fabrikam.example', '<i>so</i>', 'text/html', 'Style', 'Urgent')")
        .bind(ALICE)
        .execute(&pool)
        .await
        .unwrap()
        .last_insert_rowid();
    outcome(&relay, html, &["delivered"]).await;
    assert_eq!(simulator.ledger().await.outgoing[2].content_type.split(';').next(), Some("text/html"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_sent_fails_with_the_servers_words_and_holds_back_nothing() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
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
    let pool = relay.sql().await;
    eventually("the unreachable recipient is tried again later", async || {
        let row = sqlx::query("SELECT state, next_attempt_at FROM outbox WHERE id = ? AND attempts = 1 AND state = 'queued' AND next_attempt_at IS NOT NULL AND last_subcode = 'Unreachable'")
            .bind(absent)
            .fetch_optional(&pool)
            .await
            .unwrap();
        row.map(drop)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_stops_one_account_and_no_other() {
    let simulator = Simulate::start(&["--accounts", "3"]);
    let mut relay = Relay::configure(&simulator, "");
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
    std::fs::write(&file, PASSWORD).unwrap();
    relay.tool_ok(&["account", "set-password", BOB, "--password-file", file.to_str().unwrap()]);
    relay.account_state(BOB, "online").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_taken_up_and_signed_out_while_the_server_runs() {
    let simulator = Simulate::start(&["--accounts", "2"]);
    let mut relay = Relay::configure(&simulator, "");
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
    let pool = relay.sql().await;
    assert_eq!(
        count(
            &pool,
            "SELECT count(*) FROM sessions WHERE ended_at IS NOT NULL AND end_reason LIKE '%disabled%'"
        )
        .await,
        1
    );
    relay.tool_ok(&["account", "enable", ALICE]);
    relay.account_state(ALICE, "online").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_mid_traffic_loses_and_doubles_nothing_and_resumes_the_application() {
    let simulator = Simulate::start(&["--accounts", "3", "--rate", "60", "--seed", "7"]);
    let mut relay = Relay::configure(&simulator, "[outbox]\nsettle_after = \"6s\"");
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
        let pool = relay.sql().await;
        eventually("traffic flows both ways", async || {
            let arrived = count(&pool, "SELECT count(*) FROM messages WHERE direction = 'incoming'").await;
            let sending =
                count(&pool, "SELECT count(*) FROM outbox WHERE state IN ('sending', 'sent', 'delivered')")
                    .await;
            (arrived >= 40 * round && sending >= 20 * round - 15).then_some(())
        })
        .await;
        pool.close().await;
        relay.server().kill();
        relay.start();
    }
    for account in [ALICE, BOB, CAROL] {
        relay.account_state(account, "online").await;
    }
    simulator.post("/traffic", &json!({ "running": false })).await;
    let pool = relay.sql().await;
    eventually_within(Duration::from_secs(120), "every row has its outcome", async || {
        let open =
            count(&pool, "SELECT count(*) FROM outbox WHERE state NOT IN ('delivered', 'uncertain')").await;
        (open == 0).then_some(())
    })
    .await;
    eventually_clean(&relay, &simulator).await;
    assert_eq!(
        count(&pool, "SELECT count(*) FROM sessions").await,
        3,
        "each application was resumed, none was made anew"
    );
    assert!(
        count(&pool, "SELECT count(*) FROM coverage_gaps").await >= 3,
        "the time without a server is visible"
    );
    assert_eq!(count(&pool, "SELECT count(*) FROM event_quarantine").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_application_is_replaced_and_the_session_says_why() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    simulator.post("/forget-application", &json!({ "account": ALICE })).await;
    let pool = relay.sql().await;
    eventually("a second session is open", async || {
        (count(&pool, "SELECT count(*) FROM sessions WHERE ended_at IS NULL AND id > 1").await == 1)
            .then_some(())
    })
    .await;
    let reason: String =
        sqlx::query_scalar("SELECT end_reason FROM sessions WHERE id = 1").fetch_one(&pool).await.unwrap();
    assert!(reason.contains("no longer knows"), "{reason}");
    relay.account_state(ALICE, "online").await;
    let conversation = simulator.call("silent.a@fabrikam.example", ALICE, "still there?").await;
    simulator.say(&conversation, "good").await;
    eventually("the new application's messages are archived", async || {
        (count(&pool, "SELECT count(*) FROM messages").await == 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messaging_that_was_closed_is_added_again_and_an_idle_conversation_is_ended() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "[relay]\nidle_conversation = \"2s\"");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    let first = insert(&relay, ALICE, "pauses.a@fabrikam.example", "one").await;
    outcome(&relay, first, &["delivered"]).await;
    let second = insert(&relay, ALICE, "pauses.a@fabrikam.example", "two").await;
    outcome(&relay, second, &["delivered"]).await;
    let third = insert(&relay, ALICE, "silent.b@fabrikam.example", "three").await;
    outcome(&relay, third, &["delivered"]).await;
    let pool = relay.sql().await;
    eventually("the idle conversation is over", async || {
        let ended = count(
            &pool,
            "SELECT count(*) FROM conversations c JOIN outbox o ON o.conversation_id = c.id WHERE o.body = 'three' AND c.ended_at IS NOT NULL",
        )
        .await;
        (ended == 1).then_some(())
    })
    .await;
    let fourth = insert(&relay, ALICE, "silent.b@fabrikam.example", "four").await;
    outcome(&relay, fourth, &["delivered"]).await;
    let said: Vec<String> =
        simulator.ledger().await.outgoing.iter().map(|entry| entry.text.clone()).collect();
    assert_eq!(said, ["one", "two", "three", "four"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_on_one_database_are_refused() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
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

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_send_is_settled_and_nothing_is_sent_twice() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "[outbox]\nsettle_after = \"6s\"\nretry_base = \"1s\"");
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

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_event_channel_answers_nothing_is_lost_or_doubled() {
    let simulator = Simulate::start(&["--accounts", "2", "--rate", "30", "--seed", "11"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.add_account(BOB, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay.account_state(BOB, "online").await;
    let pool = relay.sql().await;
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
        let before = count(&pool, "SELECT count(*) FROM messages WHERE account_id = 1").await;
        eventually(&format!("messages arrive again after {request}"), async || {
            let faults = simulator.get("/faults").await;
            let spent = faults.as_array()?.iter().all(|fault| fault["remaining"].as_u64().unwrap_or(0) == 0);
            let now = count(&pool, "SELECT count(*) FROM messages WHERE account_id = 1").await;
            (spent && now > before + 5).then_some(())
        })
        .await;
    }
    simulator.post("/traffic", &json!({ "running": false })).await;
    eventually_clean(&relay, &simulator).await;
    let restarts =
        count(&pool, "SELECT restarts FROM account_status s JOIN accounts a ON a.id = s.account_id WHERE a.sip_uri = 'sip:user0002@contoso.example'").await;
    assert_eq!(restarts, 0, "the other account noticed nothing");
}
