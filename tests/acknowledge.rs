//! The event channel against a database that does not answer: what is not stored is not acknowledged (G1).

mod support;

use serde_json::json;
use support::{Relay, Simulate, count, eventually, sqlite};
use ucwa_relay::simulator::{IncomingEntry, IncomingState};

const ALICE: &str = "sip:user0001@contoso.example";
const PASSWORD: &str = "simulated";

async fn signed_in(simulator: &Simulate) -> Relay {
    let mut relay = Relay::configure(simulator, "");
    relay.add_account(ALICE, PASSWORD);
    relay.start();
    relay.account_state(ALICE, "online").await;
    relay
}

/// Counts from now on how often the event channel is asked; gives the counter's id.
async fn count_polls(simulator: &Simulate) -> u64 {
    let counter = json!({ "operation": "events", "fault": "delay", "ms": 0, "count": 1_000_000 });
    simulator.post("/fault", &counter).await["id"].as_u64().expect("a fault has an id")
}

async fn polls(simulator: &Simulate, counter: u64) -> u64 {
    let faults = simulator.get("/faults").await;
    let counter = faults.as_array().into_iter().flatten().find(|fault| fault["id"] == counter);
    counter.and_then(|fault| fault["struck"].as_u64()).expect("the counter is there")
}

async fn is_parked(simulator: &Simulate) {
    eventually("a GET is parked", async || {
        simulator.get("/accounts").await.to_string().contains("\"parked\":true").then_some(())
    })
    .await;
}

async fn entry(simulator: &Simulate, text: &str) -> IncomingEntry {
    let ledger = simulator.ledger().await;
    ledger.incoming.into_iter().find(|entry| entry.text.as_deref() == Some(text)).expect("it was said")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_acknowledges_what_the_database_has_not_taken() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = signed_in(&simulator).await;
    let pool = relay.sql().await;
    let call = simulator.call("silent.dana@fabrikam.example", ALICE, "one").await;
    simulator.say(&call, "two").await;
    eventually("both are acknowledged", async || {
        let ledger = simulator.ledger().await;
        ledger.incoming.iter().all(|entry| entry.package_acknowledged).then_some(())
    })
    .await;
    eventually("what they brought about is archived", async || {
        let known = count(&pool, "SELECT count(*) FROM messages WHERE chain_seq IS NOT NULL").await;
        (known == 2).then_some(())
    })
    .await;
    is_parked(&simulator).await;

    let counter = count_polls(&simulator).await;
    let other = sqlite(&relay.database()).await;
    let mut lock = other.acquire().await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *lock).await.unwrap();
    is_parked(&simulator).await;
    let before = polls(&simulator, counter).await;
    simulator.say(&call, "held").await;
    // It has come, and the database did not take it.
    eventually("the database refused it", async || {
        relay.server().stderr().contains("nothing is acknowledged until").then_some(())
    })
    .await;
    assert_eq!(polls(&simulator, counter).await, before, "nobody asked on");
    let held = entry(&simulator, "held").await;
    assert!(!held.package_acknowledged && held.state != IncomingState::Acknowledged, "{held:?}");

    sqlx::query("ROLLBACK").execute(&mut *lock).await.unwrap();
    eventually("it is acknowledged", async || {
        entry(&simulator, "held").await.package_acknowledged.then_some(())
    })
    .await;
    // Whoever sees it acknowledged finds it stored; an event may only link the text, which is fetched afterwards.
    assert_eq!(count(&pool, "SELECT count(*) FROM messages").await, 3);
    eventually("its text is stored", async || {
        let held =
            count(&pool, "SELECT count(*) FROM messages WHERE trim(body, char(13, 10)) = 'held'").await;
        (held == 1).then_some(())
    })
    .await;
    assert!(polls(&simulator, counter).await > before);
}
