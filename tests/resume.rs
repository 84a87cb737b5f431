//! A server that loses track of what was followed (`resume`), or holds that our link is wrong (`resync`): the account goes
//! on in the same application, without signing in, and says what it may have missed.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::SqlitePool;
use support::{Relay, Simulate, count, eventually, eventually_within};

const ALICE: &str = "sip:user0001@contoso.example";
const PASSWORD: &str = "simulated";
/// Requests that only a sign-in makes.
const SIGN_IN: [&str; 5] = ["discovery", "user", "token", "applications", "makeMeAvailable"];

async fn signed_in(simulator: &Simulate, more: &str) -> Relay {
    let mut relay = Relay::configure(simulator, more);
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    // Each counts from now on how often it is asked.
    for operation in SIGN_IN {
        let counter = json!({ "operation": operation, "fault": "delay", "ms": 0, "count": 1_000_000 });
        inject(simulator, &counter).await;
    }
    relay
}

async fn inject(simulator: &Simulate, request: &Value) -> u64 {
    let answer = simulator.post("/fault", request).await;
    answer["id"].as_u64().unwrap_or_else(|| panic!("{request} was answered {answer}"))
}

async fn strike(simulator: &Simulate, mut request: Value) {
    request["account"] = json!(ALICE);
    request["operation"] = json!("events");
    let id = inject(simulator, &request).await;
    eventually(&format!("{request} has struck"), async || {
        let faults = simulator.get("/faults").await;
        let fault = faults.as_array()?.iter().find(|fault| fault["id"] == id)?;
        (fault["remaining"] == 0).then_some(())
    })
    .await;
}

/// Requests of a sign-in since [`signed_in`].
async fn signed_in_again(simulator: &Simulate) -> Vec<String> {
    let faults = simulator.get("/faults").await;
    let struck = |fault: &&Value| {
        SIGN_IN.iter().any(|name| fault["operation"] == *name) && fault["struck"].as_u64() > Some(0)
    };
    faults.as_array().into_iter().flatten().filter(struck).map(ToString::to_string).collect()
}

async fn insert(pool: &SqlitePool, recipient: &str, body: &str) -> i64 {
    sqlx::query("INSERT INTO outbox (account, recipients, body) VALUES (?, ?, ?)")
        .bind(ALICE)
        .bind(recipient)
        .bind(body)
        .execute(pool)
        .await
        .expect("the database answers")
        .last_insert_rowid()
}

async fn delivered(pool: &SqlitePool, id: i64) {
    eventually(&format!("row {id} is delivered"), async || {
        let state: String = sqlx::query_scalar("SELECT state FROM outbox WHERE id = ?")
            .bind(id)
            .fetch_one(pool)
            .await
            .expect("the database answers");
        (state == "delivered").then_some(())
    })
    .await;
}

async fn becomes(pool: &SqlitePool, what: &str, sql: &'static str, expected: i64) {
    eventually(&format!("{what}: {expected}"), async || (count(pool, sql).await == expected).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_still_has_goes_on_after_a_resume_without_a_sign_in() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator, "").await;
    let pool = relay.sql().await;
    let incoming = simulator.call("html.dana@fabrikam.example", ALICE, "one").await;
    simulator.say(&incoming, "two").await;
    let first = insert(&pool, "silent.erin@fabrikam.example", "three").await;
    delivered(&pool, first).await;
    becomes(&pool, "messages", "SELECT count(*) FROM messages", 3).await;

    strike(&simulator, json!({ "fault": "resume" })).await;
    becomes(&pool, "gaps", "SELECT count(*) FROM coverage_gaps WHERE reason LIKE '%resume%'", 1).await;
    becomes(
        &pool,
        "conversations that were ended and are open again, with everybody in a second stay",
        "SELECT count(*) FROM conversations c
          WHERE c.ended_at IS NULL AND c.end_code IS NULL
            AND (SELECT count(*) FROM participants p
                  WHERE p.conversation_id = c.id AND p.left_at IS NOT NULL AND p.sip_uri IS NOT NULL) = 2
            AND (SELECT count(*) FROM participants p
                  WHERE p.conversation_id = c.id AND p.left_at IS NULL AND p.sip_uri IS NOT NULL) = 2",
        2,
    )
    .await;
    simulator.say(&incoming, "four").await;
    let second = insert(&pool, "silent.erin@fabrikam.example", "five").await;
    let third = insert(&pool, "html.dana@fabrikam.example", "six").await;
    delivered(&pool, second).await;
    delivered(&pool, third).await;
    // The sixth is answered.
    eventually("all are archived", async || {
        (count(&pool, "SELECT count(*) FROM messages WHERE status = 'delivered'").await >= 6).then_some(())
    })
    .await;
    assert_eq!(count(&pool, "SELECT count(*) FROM conversations").await, 2, "open conversations were used");
    assert_eq!(count(&pool, "SELECT count(*) FROM sessions").await, 1);
    assert_eq!(count(&pool, "SELECT restarts FROM account_status").await, 0);
    assert_eq!(signed_in_again(&simulator).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_has_lost_ends_with_the_resume_and_is_begun_anew() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator, "").await;
    let pool = relay.sql().await;
    simulator.call("html.dana@fabrikam.example", ALICE, "one").await;
    let first = insert(&pool, "silent.erin@fabrikam.example", "two").await;
    delivered(&pool, first).await;
    becomes(&pool, "messages", "SELECT count(*) FROM messages", 2).await;

    strike(&simulator, json!({ "fault": "resume", "lose_conversations": true })).await;
    becomes(
        &pool,
        "conversations and stays that ended with it",
        "SELECT count(*) FROM conversations c
          WHERE c.ended_at IS NOT NULL AND c.end_code = 'resume'
            AND NOT EXISTS (SELECT 1 FROM participants p WHERE p.conversation_id = c.id AND p.left_at IS NULL)",
        2,
    )
    .await;
    let second = insert(&pool, "silent.erin@fabrikam.example", "three").await;
    delivered(&pool, second).await;
    let third = simulator.call("html.dana@fabrikam.example", ALICE, "four").await;
    simulator.say(&third, "five").await;
    becomes(&pool, "messages", "SELECT count(*) FROM messages WHERE status = 'delivered'", 5).await;
    assert_eq!(count(&pool, "SELECT count(*) FROM conversations WHERE ended_at IS NULL").await, 2);
    assert_eq!(count(&pool, "SELECT count(*) FROM sessions").await, 1);
    assert_eq!(signed_in_again(&simulator).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_traffic_both_ways_neither_loses_nor_doubles_what_the_server_delivered() {
    let simulator = Simulate::start(&["--accounts", "1", "--rate", "20", "--seed", "5"]);
    let relay = signed_in(&simulator, "[outbox]\nsettle_after = \"6s\"\nretry_base = \"1s\"").await;
    let pool = relay.sql().await;
    let (mut rows, mut resumes) = (0, 0);
    for round in 0..6 {
        for number in 0..5 {
            insert(&pool, &format!("silent.{number}@fabrikam.example"), &format!("{round}/{number}")).await;
            rows += 1;
        }
        let kind = if round % 2 == 0 { "resume" } else { "resync" };
        resumes += i64::from(round % 2 == 0);
        strike(&simulator, json!({ "fault": kind, "lose_conversations": round == 4 })).await;
        let before = count(&pool, "SELECT count(*) FROM messages WHERE direction = 'incoming'").await;
        eventually(&format!("messages come in again after {kind}"), async || {
            let now = count(&pool, "SELECT count(*) FROM messages WHERE direction = 'incoming'").await;
            (now > before + 5).then_some(())
        })
        .await;
    }
    simulator.post("/traffic", &json!({ "running": false })).await;
    let reckoning = eventually_within(Duration::from_secs(120), "ledger and database agree", async || {
        let quiet = simulator.get("/counters").await["quiet"].as_bool()?;
        let reckoning = relay.reckon(&simulator).await;
        let open = count(&pool, "SELECT count(*) FROM outbox WHERE state IN ('queued', 'sending')").await;
        (quiet && open == 0 && reckoning.is_clean()).then_some(reckoning)
    })
    .await;
    // Whose outcome was lost with the events is honestly so.
    assert_eq!(reckoning.relayed + reckoning.uncertain, rows, "{reckoning:?}");
    assert_eq!(count(&pool, "SELECT count(*) FROM coverage_gaps").await, resumes, "a resync is no gap");
    assert_eq!(count(&pool, "SELECT count(*) FROM sessions").await, 1);
    assert_eq!(count(&pool, "SELECT restarts FROM account_status").await, 0);
    assert_eq!(signed_in_again(&simulator).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_under_way_is_uncertain_until_its_own_answer_comes() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator, "").await;
    let pool = relay.sql().await;
    for recipient in ["silent.late@fabrikam.example", "silent.lost@fabrikam.example"] {
        let opener = insert(&pool, recipient, "opener").await;
        delivered(&pool, opener).await;
    }
    eventually("every event of the openers is fetched", async || {
        simulator.get("/counters").await["quiet"].as_bool().filter(|quiet| *quiet)
    })
    .await;
    // No event of the two comes before the server forgets them.
    strike(&simulator, json!({ "fault": "delay", "ms": 12000 })).await;
    inject(&simulator, &json!({ "account": ALICE, "operation": "events", "fault": "resume" })).await;
    inject(&simulator, &json!({ "operation": "sendMessage", "fault": "delay_after", "ms": 18000 })).await;
    let late = insert(&pool, "silent.late@fabrikam.example", "late").await;
    eventually("the first is out", async || {
        simulator.ledger().await.outgoing.iter().any(|entry| entry.text == "late").then_some(())
    })
    .await;
    inject(&simulator, &json!({ "operation": "sendMessage", "fault": "cut_after" })).await;
    let lost = insert(&pool, "silent.lost@fabrikam.example", "lost").await;
    becomes(
        &pool,
        "rows that nobody can tell about, with a reason",
        "SELECT count(*) FROM outbox WHERE state = 'uncertain' AND last_error LIKE '%resume%'",
        2,
    )
    .await;
    becomes(
        &pool,
        "rows whose answer came",
        "SELECT count(*) FROM outbox WHERE state = 'sent' AND body = 'late'",
        1,
    )
    .await;
    let (said, next) =
        (simulator.ledger().await, insert(&pool, "silent.lost@fabrikam.example", "next").await);
    delivered(&pool, next).await;
    for text in ["late", "lost"] {
        assert_eq!(said.outgoing.iter().filter(|entry| entry.text == text).count(), 1, "{text}");
    }
    let state: String = sqlx::query_scalar("SELECT state FROM outbox WHERE id = ?")
        .bind(lost)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(state, "uncertain");
    let outcome: String = sqlx::query_scalar("SELECT outcome FROM outbox_attempts WHERE outbox_id = ?")
        .bind(late)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(outcome, "sent");
    assert_eq!(signed_in_again(&simulator).await.len(), 0);
}
