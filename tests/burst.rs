//! Very many rows at once: they stand in nobody's way.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::{fmt::Write as _, time::Duration};

use support::{
    Relay, eventually, eventually_within,
    sql::{Kind, Sql},
};
use ucwa_relay::simulator::{Simulator, SimulatorSettings};

mod support;

/// Longest time that a burst may take; a machine without other work needs a tenth of it.
const PATIENCE: Duration = Duration::from_secs(900);

/// Simulated server, program and a plain connection to its database.
struct Scene {
    simulator: Simulator,
    relay: Relay,
    sql: Sql,
    accounts: Vec<String>,
}

impl Scene {
    /// Returns when every account is online.
    async fn begin(kind: Kind, settings: SimulatorSettings, configuration: &str) -> Self {
        let simulator = Simulator::start(settings).await.unwrap();
        let accounts = simulator.account_uris();
        let mut configuration = format!(
            "[relay]\nsign_in_rate = 500\naccounts_online_at_once = 50\n[archive]\nfull_text = false\n{configuration}"
        );
        for account in &accounts {
            write!(
                configuration,
                "\n[[accounts]]\nsip_uri = \"{account}\"\npassword = {{ file = \"password\" }}\n"
            )
            .unwrap();
        }
        let mut relay = Relay::configure_on_for(kind, &simulator.discovery_url(), &configuration).await;
        std::fs::write(relay.folder.path().join("password"), "simulated").unwrap();
        relay.tool_ok(&["migrate"]);
        let mut sql = relay.connect().await;
        relay.start();
        let everybody = i64::try_from(accounts.len()).unwrap();
        eventually("every account is online", async || {
            let online = sql.count("account_status WHERE state = 'online'").await;
            (online == everybody).then_some(())
        })
        .await;
        Self { simulator, relay, sql, accounts }
    }

    /// Queues `rows` rows of an account to each of these recipients, in one statement, the recipients in turn.
    async fn queue(&mut self, account: &str, recipients: &[String], rows: usize) {
        let mut insert = String::from("INSERT INTO outbox (account, recipients, body) VALUES ");
        for row in 0..rows {
            for recipient in recipients {
                write!(insert, "('{account}', '{recipient}', 'row {row} to {recipient}'),").unwrap();
            }
        }
        self.sql.run(insert.trim_end_matches(',')).await.unwrap();
    }

    /// Waits until it is so in the database.
    async fn until(&mut self, what: &str, mut is_so: impl AsyncFnMut(&mut Sql) -> bool) {
        eventually_within(PATIENCE, what, async || is_so(&mut self.sql).await.then_some(())).await;
    }
}

async fn a_burst_of_one_account_holds_up_nobody_else(kind: Kind) {
    const BURST: i64 = 10_000;
    let settings = SimulatorSettings { accounts: 5, ..SimulatorSettings::default() };
    // Nothing slows the burst down but the queue itself.
    let mut scene = Scene::begin(kind, settings, "[outbox]\nper_account_rate = 1000000\n").await;
    let (bursting, others) =
        scene.accounts.clone().split_first().map(|(a, b)| (a.clone(), b.to_vec())).unwrap();
    let crowd: Vec<String> = (0..100).map(|number| format!("sip:silent.{number}@fabrikam.example")).collect();
    scene.queue(&bursting, &crowd, 100).await;
    let of_burst = format!("outbox WHERE account = '{bursting}'");
    assert_eq!(scene.sql.count(&of_burst).await, BURST);
    let accepted = format!("{of_burst} AND state IN ('sent', 'delivered')");
    scene.until("the burst is being sent", async |sql| sql.count(&accepted).await >= 100).await;

    for account in &others {
        scene.queue(account, &crowd[..5], 4).await;
    }
    let open = format!("outbox WHERE account <> '{bursting}' AND state <> 'delivered'");
    scene.until("the others' rows are delivered", async |sql| sql.count(&open).await == 0).await;
    let waiting = scene.sql.count(&format!("{of_burst} AND state = 'queued'")).await;
    assert!(waiting > BURST / 2, "{waiting} rows of the burst wait");
    let reckoning = scene.relay.reckon_with(&scene.simulator.ledger()).await;
    assert_eq!(reckoning.out_of_order, Vec::<String>::new());
    assert_eq!(reckoning.duplicated, Vec::<String>::new());
}

on_both_databases!(
    "multi_thread": a_burst_of_one_account_holds_up_nobody_else,
);
