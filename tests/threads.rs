//! Rows that are to be said in a conversation or a thread that can't be used as it is.

mod support;

use serde_json::{Value, json};
use sqlx::{Row, SqlitePool};
use support::{Relay, Simulate, eventually};

const ALICE: &str = "sip:user0001@contoso.example";
const PASSWORD: &str = "simulated";
const BOB: &str = "silent.bob@fabrikam.example";

async fn signed_in(simulator: &Simulate) -> Relay {
    let mut relay = Relay::configure(simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay
}

async fn insert(
    pool: &SqlitePool,
    recipients: Option<&str>,
    conversation: Option<i64>,
    thread: Option<&str>,
    body: &str,
) -> i64 {
    sqlx::query(
        "INSERT INTO outbox (account, recipients, conversation_id, thread_id, body) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(ALICE)
    .bind(recipients)
    .bind(conversation)
    .bind(thread)
    .bind(body)
    .execute(pool)
    .await
    .expect("anybody can insert")
    .last_insert_rowid()
}

/// Waits for the row's end; gives its state, its conversation and why.
async fn ends(pool: &SqlitePool, id: i64) -> (String, Option<i64>, String) {
    eventually(&format!("row {id} comes to an end"), async || {
        let row =
            sqlx::query("SELECT state, conversation_id, coalesce(last_error, '') FROM outbox WHERE id = ?")
                .bind(id)
                .fetch_one(pool)
                .await
                .expect("the row can be read");
        let state: String = row.get(0);
        (!["queued", "sending", "sent"].contains(&state.as_str())).then(|| (state, row.get(1), row.get(2)))
    })
    .await
}

async fn is_delivered(pool: &SqlitePool, id: i64) -> i64 {
    let (state, conversation, error) = ends(pool, id).await;
    assert_eq!(state, "delivered", "{error}");
    conversation.expect("it was said in a conversation")
}

async fn inject(simulator: &Simulate, request: &Value) {
    let answer = simulator.post("/fault", request).await;
    assert!(answer.get("id").is_some(), "{request} was answered {answer}");
}

async fn spent(simulator: &Simulate) {
    eventually("every fault has struck", async || {
        let faults = simulator.get("/faults").await;
        faults.as_array()?.iter().all(|fault| fault["remaining"] == 0).then_some(())
    })
    .await;
}

/// Lets the relay forget its conversations, which the server keeps.
async fn forget(simulator: &Simulate) {
    let hidden = json!({ "operation": "conversations", "fault": "status", "status": 500, "count": 5 });
    inject(simulator, &hidden).await;
    inject(simulator, &json!({ "account": ALICE, "operation": "events", "fault": "resume" })).await;
    spent(simulator).await;
}

/// A conversation with two others, who are known; gives its thread.
async fn conference(simulator: &Simulate, pool: &SqlitePool) -> String {
    let call = simulator.call(BOB, ALICE, "hello").await;
    simulator.say(&call, "here we are").await;
    simulator.post("/join", &json!({ "conversation": call, "who": "silent.carol@fabrikam.example" })).await;
    eventually("both are known to be in it", async || {
        sqlx::query_scalar(
            "SELECT c.thread_id FROM conversations c
              WHERE c.multiparty AND (SELECT count(DISTINCT p.sip_uri) FROM participants p
                                       WHERE p.conversation_id = c.id AND NOT p.is_local AND p.left_at IS NULL) = 2",
        )
        .fetch_optional(pool)
        .await
        .expect("conversations can be read")
    })
    .await
}

/// Of what the account said: text, thread and conversation.
async fn said(simulator: &Simulate) -> Vec<(String, String, String)> {
    let ledger = simulator.ledger().await;
    let entries = ledger.outgoing.into_iter();
    entries.map(|entry| (entry.text, entry.thread_id, entry.conversation)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thread_that_is_open_without_our_knowing_is_used() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let first = insert(&pool, Some(BOB), None, Some("thread"), "one").await;
    let conversation = is_delivered(&pool, first).await;
    forget(&simulator).await;
    let second = insert(&pool, Some(BOB), None, Some("thread"), "two").await;
    assert_eq!(is_delivered(&pool, second).await, conversation);
    let said = said(&simulator).await;
    assert_eq!(said.len(), 2);
    assert_eq!((said[0].1.as_str(), &said[0].1, &said[0].2), ("thread", &said[1].1, &said[1].2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thread_that_is_open_with_more_people_is_not_used() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let thread = conference(&simulator, &pool).await;
    let row = insert(&pool, Some(BOB), None, Some(&thread), "to one").await;
    let (state, _, error) = ends(&pool, row).await;
    assert_eq!(state, "failed");
    assert!(error.contains(&thread) && error.contains("leave thread_id out"), "{error}");
    assert_eq!(said(&simulator).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_another_thread_gets_a_conversation_of_its_own() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let mut conversations = Vec::new();
    for (thread, text) in [("a", "one"), ("b", "two"), ("a", "three")] {
        let row = insert(&pool, Some(BOB), None, Some(thread), text).await;
        conversations.push(is_delivered(&pool, row).await);
    }
    assert!(
        conversations[0] == conversations[2] && conversations[0] != conversations[1],
        "{conversations:?}"
    );
    let threads: Vec<String> = said(&simulator).await.into_iter().map(|entry| entry.1).collect();
    assert_eq!(threads, ["a", "b", "a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_a_conversation_that_is_over_goes_on_with_its_thread() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let call = simulator.call(BOB, ALICE, "hello").await;
    simulator.say(&call, "are you there?").await;
    let over = |known: bool| {
        let pool = pool.clone();
        async move {
            eventually("the conversation's end is known, or not", async || {
                let open: bool =
                    sqlx::query_scalar("SELECT ended_at IS NULL FROM conversations WHERE id = 1")
                        .fetch_optional(&pool)
                        .await
                        .unwrap()?;
                (open != known).then_some(())
            })
            .await;
        }
    };
    over(false).await;
    // The events of the end are late: only the answers to requests tell of it.
    inject(&simulator, &json!({ "account": ALICE, "operation": "events", "fault": "delay", "ms": 9000 }))
        .await;
    spent(&simulator).await;
    simulator.post("/leave", &json!({ "conversation": call })).await;
    let first = insert(&pool, None, Some(1), None, "yes").await;
    eventually("it is said", async || (said(&simulator).await.len() == 1).then_some(())).await;
    assert_ne!(is_delivered(&pool, first).await, 1);
    over(true).await;
    let ledger = simulator.ledger().await;
    assert_eq!(ledger.outgoing[0].thread_id, ledger.incoming[0].thread_id);
    assert_eq!(ledger.outgoing[0].to, [format!("sip:{BOB}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_to_a_group_that_is_over_fails_and_says_what_to_do() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    conference(&simulator, &pool).await;
    let lost =
        json!({ "account": ALICE, "operation": "events", "fault": "resume", "lose_conversations": true });
    inject(&simulator, &lost).await;
    eventually("the conversation is over", async || {
        let open: i64 = sqlx::query_scalar("SELECT count(*) FROM conversations WHERE ended_at IS NULL")
            .fetch_one(&pool)
            .await
            .unwrap();
        (open == 0).then_some(())
    })
    .await;
    let row = insert(&pool, None, Some(1), None, "again").await;
    let (state, _, error) = ends(&pool, row).await;
    assert_eq!(state, "failed");
    assert!(error.contains("has ended") && error.contains("name recipients"), "{error}");
}
