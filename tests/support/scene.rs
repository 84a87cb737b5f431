//! A simulated server in the test's own process, and the real program against it with many accounts, in lively traffic.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use sqlx::{Row, SqlitePool};
use ucwa_relay::{
    demo::reckoning::Reckoning,
    simulator::{Operation, Simulator, SimulatorSettings, TrafficSettings},
};

use super::{Relay, eventually, sqlite};

/// Lost answers are settled and rows are tried again as soon as the program allows.
pub(crate) const QUICK: &str = "[outbox]\nsettle_after = \"5s\"\nretry_base = \"1s\"\nretry_max = \"2s\"\nmax_attempts = 9\n\
     [relay]\nsign_in_rate = 200\naccounts_online_at_once = 50\n";

/// See the module.
pub(crate) struct Scene {
    /// Steered by the test.
    pub simulator: Simulator,
    /// The program.
    pub relay: Relay,
    /// Its database.
    pub pool: SqlitePool,
    /// Every account, in the order of their ids.
    pub accounts: Vec<String>,
}

impl Scene {
    /// Starts both, and waits until every account is online. `rate` is the incoming messages per second.
    pub(crate) async fn begin(settings: SimulatorSettings, rate: f64, configuration: &str) -> Self {
        let simulator = Simulator::start(settings).await.expect("loopback has free ports");
        let scene = Self::with(simulator, configuration).await;
        scene.all_online().await;
        if rate > 0.0 {
            let traffic = TrafficSettings { messages_per_second: rate, ..TrafficSettings::default() };
            scene.simulator.start_traffic(Some(traffic));
        }
        scene
    }

    /// Starts the program for every account of a simulator, and does not wait for their sign-ins.
    pub(crate) async fn with(simulator: Simulator, configuration: &str) -> Self {
        let accounts = simulator.account_uris();
        let mut configuration = configuration.to_owned();
        for account in &accounts {
            let _ = write!(
                configuration,
                "\n[[accounts]]\nsip_uri = \"{account}\"\npassword = {{ file = \"password\" }}\n"
            );
        }
        let mut relay = Relay::configure_for(&simulator.discovery_url(), &configuration);
        std::fs::write(relay.folder.path().join("password"), "simulated").expect("the folder can be written");
        relay.tool_ok(&["migrate"]);
        let pool = sqlite(&relay.database()).await;
        relay.start();
        let scene = Self { simulator, relay, pool, accounts };
        eventually("every account is known", async || {
            let known: i64 = sqlx::query_scalar("SELECT count(*) FROM account_overview")
                .fetch_one(&scene.pool)
                .await
                .expect("account_overview can be read");
            (usize::try_from(known) == Ok(scene.accounts.len())).then_some(())
        })
        .await;
        scene
    }

    /// Waits until every account is online.
    pub(crate) async fn all_online(&self) {
        eventually("every account is online", async || {
            let online: i64 =
                sqlx::query_scalar("SELECT count(*) FROM account_overview WHERE state = 'online'")
                    .fetch_one(&self.pool)
                    .await
                    .expect("account_overview can be read");
            (usize::try_from(online) == Ok(self.accounts.len())).then_some(())
        })
        .await;
    }

    /// State and detail of an account.
    pub(crate) async fn state(&self, account: &str) -> (String, String) {
        let row = sqlx::query("SELECT state, coalesce(detail, '') FROM account_overview WHERE account = ?")
            .bind(account)
            .fetch_one(&self.pool)
            .await
            .expect("account_overview can be read");
        (row.get(0), row.get(1))
    }

    /// Queues a message; gives the row's id.
    pub(crate) async fn queue(&self, account: &str, recipient: &str, body: &str) -> i64 {
        sqlx::query("INSERT INTO outbox (account, recipients, body) VALUES (?, ?, ?)")
            .bind(account)
            .bind(recipient)
            .bind(body)
            .execute(&self.pool)
            .await
            .expect("anybody can insert")
            .last_insert_rowid()
    }

    /// State and error of a row of the outbox.
    pub(crate) async fn row(&self, id: i64) -> (String, String) {
        let row = sqlx::query("SELECT state, coalesce(last_error, '') FROM outbox WHERE id = ?")
            .bind(id)
            .fetch_one(&self.pool)
            .await
            .expect("the row can be read");
        (row.get(0), row.get(1))
    }

    /// Waits until a row is neither waiting nor under way; gives its state and error.
    pub(crate) async fn outcome(&self, id: i64, what: &str) -> (String, String) {
        eventually(&format!("row {id} has an outcome: {what}"), async || {
            let row = self.row(id).await;
            (!matches!(row.0.as_str(), "queued" | "sending" | "sent")).then_some(row)
        })
        .await
    }

    /// How often an account asked for something.
    pub(crate) fn requests(&self, account: &str, operation: Operation) -> u64 {
        let counts = self.simulator.requests();
        let count = counts
            .iter()
            .find(|count| count.account.as_deref() == Some(account) && count.operation == operation);
        count.map_or(0, |count| count.requests)
    }

    /// These accounts noticed nothing of what befell the others: none of their lives ended, each signed in once.
    pub(crate) async fn undisturbed(&self, accounts: &[String]) {
        for account in accounts {
            let restarts: i64 = sqlx::query_scalar("SELECT restarts FROM account_overview WHERE account = ?")
                .bind(account)
                .fetch_one(&self.pool)
                .await
                .expect("account_overview can be read");
            assert_eq!(restarts, 0, "{account} was restarted");
            assert_eq!(self.requests(account, Operation::Token), 1, "{account} signed in again");
            assert_eq!(self.state(account).await.0, "online", "{account}");
        }
    }

    /// These accounts went on with the life they had: none ended, and nobody signed in since the requests were reset.
    pub(crate) async fn undisturbed_since_reset(&self, accounts: &[String]) {
        for account in accounts {
            let restarts: i64 = sqlx::query_scalar("SELECT restarts FROM account_overview WHERE account = ?")
                .bind(account)
                .fetch_one(&self.pool)
                .await
                .expect("account_overview can be read");
            assert_eq!((restarts, self.requests(account, Operation::Token)), (0, 0), "{account}");
        }
    }

    /// Stops the traffic, switches all faults off, and waits until ledger and database agree and nothing is open.
    pub(crate) async fn agree(&self) -> Reckoning {
        self.simulator.stop_traffic();
        self.simulator.stop_chaos();
        self.simulator.clear_faults(None);
        let deadline = Instant::now() + Duration::from_secs(200);
        loop {
            let reckoning = self.relay.reckon_with(&self.simulator.ledger()).await;
            if self.simulator.is_quiet() && reckoning.is_clean() && reckoning.unsettled.is_empty() {
                return reckoning;
            }
            assert!(
                Instant::now() < deadline,
                "ledger and database do not agree: {:?} {reckoning:#?}",
                self.simulator.counters()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
