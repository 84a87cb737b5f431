//! What the event channel could not tell is archived from the server's conversation logs, once.

mod support;

use std::collections::BTreeMap;

use serde_json::json;
use sqlx::{Row, SqlitePool};
use support::{Relay, Simulate, count, eventually};

const ALICE: &str = "sip:user0001@contoso.example";
const PASSWORD: &str = "simulated";
const DANA: &str = "silent.dana@fabrikam.example";
const ERIN: &str = "silent.erin@fabrikam.example";

async fn with_logs() -> Simulate {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let logs = json!({ "conversation_logs": true, "log_delay_ms": 200, "missed_calls_logged": true });
    simulator.post("/settings", &logs).await;
    simulator
}

async fn signed_in(simulator: &Simulate) -> Relay {
    let mut relay = Relay::configure(simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay
}

/// Another device of the account takes a call.
async fn call_elsewhere(simulator: &Simulate, from: &str, text: &str) -> String {
    let request = json!({ "from": from, "to_account": ALICE, "text": text, "elsewhere": true });
    let answer = simulator.post("/call", &request).await;
    answer["conversation"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

async fn say_as(simulator: &Simulate, who: &str, conversation: &str, text: &str) {
    let request = json!({ "conversation": conversation, "from": who, "text": text });
    eventually("the conversation is connected", async || {
        simulator.post("/say", &request).await.get("serials").is_some().then_some(())
    })
    .await;
}

async fn leave(simulator: &Simulate, conversation: &str) {
    simulator.post("/leave", &json!({ "conversation": conversation })).await;
}

/// How often each text stands in the archive, by source.
async fn archived(pool: &SqlitePool) -> BTreeMap<(String, String), i64> {
    sqlx::query("SELECT trim(body, char(13, 10)), source, count(*) FROM messages GROUP BY 1, 2")
        .fetch_all(pool)
        .await
        .expect("messages can be read")
        .iter()
        .map(|row| ((row.get(0), row.get(1)), row.get(2)))
        .collect()
}

async fn becomes(pool: &SqlitePool, expected: &[(&str, &str, i64)]) {
    let expected: BTreeMap<_, _> = expected
        .iter()
        .map(|(text, source, times)| (((*text).to_owned(), (*source).to_owned()), *times))
        .collect();
    eventually(&format!("the archive has {expected:#?}"), async || {
        (archived(pool).await == expected).then_some(())
    })
    .await;
}

/// Waits until the logs were read for so many gaps, and none is left.
async fn all_is_read(pool: &SqlitePool, gaps: i64) {
    eventually("every gap is backfilled", async || {
        let filled = count(pool, "SELECT count(*) FROM coverage_gaps WHERE backfilled").await;
        let open = count(pool, "SELECT count(*) FROM coverage_gaps WHERE NOT backfilled").await;
        ((filled, open) == (gaps, 0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_while_the_relay_was_down_is_archived_once() {
    let simulator = with_logs().await;
    let mut relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let followed = simulator.call(DANA, ALICE, "hello").await;
    simulator.say(&followed, "before").await;
    becomes(&pool, &[("hello", "event", 1), ("before", "event", 1)]).await;

    relay.server().kill();
    simulator.say(&followed, "kept by the server").await;
    let elsewhere = call_elsewhere(&simulator, ERIN, "are you at home?").await;
    // More than one page of transcripts, and equal texts within a second.
    for number in 0..10 {
        say_as(&simulator, ERIN, &elsewhere, &format!("number {number}")).await;
    }
    for _ in 0..2 {
        say_as(&simulator, ERIN, &elsewhere, "same").await;
        say_as(&simulator, ALICE, &elsewhere, "same here").await;
    }
    leave(&simulator, &elsewhere).await;

    relay.start();
    relay.account_state(ALICE, "online").await;
    all_is_read(&pool, 1).await;
    let numbers: Vec<String> = (0..10).map(|number| format!("number {number}")).collect();
    let mut expected = vec![
        ("hello", "event", 1),
        ("before", "event", 1),
        ("kept by the server", "event", 1),
        ("are you at home?", "invitation", 1),
        ("same", "conversation_log", 2),
        ("same here", "conversation_log", 2),
    ];
    expected.extend(numbers.iter().map(|text| (text.as_str(), "conversation_log", 1)));
    becomes(&pool, &expected).await;
    let own = "SELECT count(*) FROM messages WHERE direction = 'outgoing' AND body LIKE 'same here%'";
    assert_eq!(count(&pool, own).await, 2);

    // The log of what was followed by events adds nothing.
    let last_read = async || {
        let last =
            sqlx::query_scalar("SELECT coalesce(max(first_at), '') FROM backfills WHERE gap_id IS NULL");
        last.fetch_one(&pool).await.unwrap()
    };
    let before: String = last_read().await;
    leave(&simulator, &followed).await;
    eventually("the logs are read again", async || (last_read().await > before).then_some(())).await;
    becomes(&pool, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_device_answered_is_archived_without_a_gap() {
    let simulator = with_logs().await;
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let elsewhere = call_elsewhere(&simulator, ERIN, "are you at your desk?").await;
    say_as(&simulator, ALICE, &elsewhere, "yes").await;
    say_as(&simulator, ERIN, &elsewhere, "good").await;
    leave(&simulator, &elsewhere).await;
    let expected = [
        ("are you at your desk?", "invitation", 1),
        ("yes", "conversation_log", 1),
        ("good", "conversation_log", 1),
    ];
    becomes(&pool, &expected).await;
    assert_eq!(count(&pool, "SELECT count(*) FROM coverage_gaps").await, 0);
    assert_eq!(count(&pool, "SELECT count(*) FROM conversations").await, 1, "all of it is one conversation");
    let reason: String =
        sqlx::query_scalar("SELECT subcode FROM invitations").fetch_one(&pool).await.unwrap();
    assert_eq!(reason, "ConnectedElsewhere");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_the_lost_application_saw_in_part_is_completed() {
    let simulator = with_logs().await;
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let call = simulator.call(DANA, ALICE, "hello").await;
    simulator.say(&call, "seen").await;
    simulator.say(&call, "seen").await;
    becomes(&pool, &[("hello", "event", 1), ("seen", "event", 2)]).await;
    // What comes now comes to an application that is lost before anybody asks.
    let delay = json!({ "account": ALICE, "operation": "events", "fault": "delay", "ms": 4000 });
    simulator.post("/fault", &delay).await;
    eventually("the channel is silent", async || {
        (simulator.get("/faults").await[0]["remaining"] == 0).then_some(())
    })
    .await;
    simulator.say(&call, "unseen").await;
    simulator.say(&call, "seen").await;
    simulator.post("/forget-application", &json!({ "account": ALICE })).await;
    leave(&simulator, &call).await;
    all_is_read(&pool, 1).await;
    let expected = [
        ("hello", "event", 1),
        ("seen", "event", 2),
        ("seen", "conversation_log", 1),
        ("unseen", "conversation_log", 1),
    ];
    becomes(&pool, &expected).await;
    assert_eq!(count(&pool, "SELECT count(*) FROM conversations").await, 1, "all of it is one conversation");
    assert_eq!(count(&pool, "SELECT count(*) FROM sessions").await, 2);
}
