//! The examples of `docs/examples` do what they say, against relay and simulator.

use std::process::{Command, Output};

use crate::support::{Relay, Simulate, sql::Kind};

const ALICE: &str = "sip:user0001@contoso.example";
const FRIEND: &str = "sip:friend@fabrikam.example";

fn example(name: &str) -> String {
    format!("{}/docs/examples/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Starts simulator and relay with one account, and runs an example with an account that exists and with one that does not.
async fn works(kind: Kind, run: impl Fn(&Relay, &str) -> Output) {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure_on(kind, &simulator, "").await;
    relay.add_account(ALICE, "simulated");
    relay.start();
    relay.account_state(ALICE, "online").await;

    let done = run(&relay, ALICE);
    let told = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && told.contains("row 1: delivered"), "{told}");
    let ledger = simulator.ledger().await;
    let said: Vec<&str> = ledger.outgoing.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(said, ["it's 100 % \"done\""]);

    let refused = run(&relay, "sip:nobody@contoso.example");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("nobody@contoso.example"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_in_python_queues_a_message_and_waits_for_its_outcome() {
    works(Kind::Sqlite, |relay, from| {
        let mut python = Command::new("python3");
        python.arg(example("queue_and_wait.py")).arg(relay.database());
        python.args([from, FRIEND, "it's 100 % \"done\""]).output().unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_psql_queues_a_message_and_waits_for_its_outcome() {
    works(Kind::Postgres, |relay, from| {
        let mut psql = Command::new("psql");
        psql.args(["--no-psqlrc", &relay.url(), "-v", "ON_ERROR_STOP=1", "-v"]).arg(format!("from={from}"));
        psql.args(["-v", &format!("to={FRIEND}"), "-v", "text=it's 100 % \"done\"", "-f"]);
        psql.arg(example("queue_and_wait.sql")).output().unwrap()
    })
    .await;
}
