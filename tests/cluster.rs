//! Several nodes on one PostgreSQL: real processes, real signals, and what the ledger and the database say afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::json;
use support::{
    Process, Relay, Simulate, eventually, eventually_none, eventually_within,
    sql::{Kind, Sql},
};

/// As short as it may be.
const SHORT: u32 = 5;
/// Longer than any test: what happens within it does not happen because a lease ran out.
const LONG: u32 = 3600;
/// For whole clusters under load on a busy machine.
const LONG_PATIENCE: Duration = Duration::from_secs(240);

/// Notes every row about an account that is written by a node which does not hold the account at that moment. Connections
/// go by their node's name.
const WITNESS: [&str; 2] = [
    "CREATE TABLE violations (node text, relation text, account_id bigint, at timestamptz DEFAULT clock_timestamp())",
    "CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        IF current_setting('application_name') LIKE 'node-%' AND NOT EXISTS (
            SELECT FROM account_leases l
             WHERE l.account_id = NEW.account_id AND l.node_id = current_setting('application_name'))
        THEN
            INSERT INTO violations (node, relation, account_id)
            VALUES (current_setting('application_name'), TG_TABLE_NAME, NEW.account_id);
        END IF;
        RETURN NULL;
    END
    $$",
];
const WITNESSED: [&str; 10] = [
    "sessions",
    "conversations",
    "participants",
    "messages",
    "invitations",
    "chain_heads",
    "gaps",
    "backfills",
    "event_quarantine",
    "account_status",
];

struct Cluster {
    simulator: Simulate,
    relay: Relay,
    accounts: usize,
    nodes: BTreeMap<String, Process>,
}

impl Cluster {
    async fn new(accounts: usize, ttl_s: u32, simulator: &[&str]) -> Self {
        let count = accounts.to_string();
        let simulator = Simulate::start(&[&["--accounts", &count], simulator].concat());
        let more = format!(
            "[cluster]\nlease_ttl_s = {ttl_s}\n[outbox]\nsettle_after = \"6s\"\n\
             [relay]\nsign_in_rate = 50\naccounts_online_at_once = 20"
        );
        let relay = Relay::configure_on(Kind::Postgres, &simulator, &more).await;
        relay.tool_ok(&["migrate"]);
        let password = relay.folder.path().join("password");
        std::fs::write(&password, "simulated").unwrap();
        let cluster = Self { simulator, relay, accounts, nodes: BTreeMap::new() };
        let mut sql = cluster.sql().await;
        for number in 1..=accounts {
            let name = account(number);
            let insert = format!(
                "INSERT INTO accounts (sip_uri, username, secret_ref) VALUES ('sip:{name}', '{name}', 'file:{}')",
                password.display()
            );
            sql.run(&insert).await.unwrap();
        }
        for statement in WITNESS {
            sql.run(statement).await.unwrap();
        }
        for table in WITNESSED {
            let trigger = format!(
                "CREATE TRIGGER witness AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION witness()"
            );
            sql.run(&trigger).await.unwrap();
        }
        // Anybody may admit or refuse a row; only who holds the account has to do with its sending.
        let outbox = "CREATE TRIGGER witness AFTER UPDATE ON outbox FOR EACH ROW
                      WHEN (OLD.state = 'sending' OR NEW.state = 'sending') EXECUTE FUNCTION witness()";
        sql.run(outbox).await.unwrap();
        cluster
    }

    async fn sql(&self) -> Sql {
        self.relay.connect().await
    }

    fn start(&mut self, node: &str) {
        self.nodes.insert(node.to_owned(), self.relay.start_node(node));
    }

    fn node(&mut self, node: &str) -> &mut Process {
        self.nodes.get_mut(node).unwrap()
    }

    /// Waits until exactly these nodes have so many accounts each, all online under valid leases of the same node.
    async fn settled(&self, shares: &[(&str, usize)]) {
        let mut sql = self.sql().await;
        let expected: Vec<String> = shares.iter().map(|(node, count)| format!("{node}|{count}")).collect();
        let what = format!("the accounts are spread as {expected:?}");
        eventually_within(LONG_PATIENCE, &what, async || {
            let spread = sql
                .rows(
                    "SELECT o.node_id, count(*) FROM account_overview o JOIN accounts a ON a.sip_uri = o.account
                       JOIN account_leases l ON l.account_id = a.id AND l.node_id = o.node_id AND l.expires_at > now()
                      WHERE o.state = 'online' GROUP BY o.node_id ORDER BY o.node_id",
                )
                .await;
            (spread == expected).then_some(())
        })
        .await;
    }

    async fn held_by(&self, node: &str) -> Vec<String> {
        let query = format!("SELECT account_id FROM account_leases WHERE node_id = '{node}' ORDER BY 1");
        self.sql().await.rows(&query).await
    }

    /// Puts a row for each account into the queue.
    async fn write(&self, round: usize) {
        let mut sql = self.sql().await;
        for number in 1..=self.accounts {
            let insert = format!(
                "INSERT INTO outbox (account, recipients, body)
                 VALUES ('{}', 'echo.{}@fabrikam.example', 'row {round} of {number}')",
                account(number),
                number % 5
            );
            sql.run(&insert).await.unwrap();
        }
    }

    /// Ends the traffic and waits until ledger and database agree; nobody wrote what was not his to write, and no
    /// application was made anew.
    async fn reckon(&self) {
        self.simulator.post("/traffic", &json!({ "running": false })).await;
        let mut sql = self.sql().await;
        let unfinished =
            "SELECT id, account, state, attempts, claimed_by, claimed_at::text, next_attempt_at::text,
                                 last_code, last_error
                            FROM outbox WHERE state NOT IN ('delivered', 'uncertain') ORDER BY id";
        eventually_none(LONG_PATIENCE, "rows without their outcome", async || sql.rows(unfinished).await)
            .await;
        let mut last = None;
        let deadline = Instant::now() + LONG_PATIENCE;
        let reckoning = loop {
            let quiet = self.simulator.get("/counters").await["quiet"].as_bool().unwrap_or(false);
            let reckoning = self.relay.reckon(&self.simulator).await;
            if quiet && reckoning.is_clean() {
                break reckoning;
            }
            assert!(Instant::now() < deadline, "ledger and database differ: {:?}", last.unwrap_or(reckoning));
            last = Some(reckoning);
        };
        assert!(reckoning.archived_incoming >= reckoning.delivered_to_accounts, "{reckoning:?}");
        let written = sql.rows("SELECT node, relation, count(*) FROM violations GROUP BY 1, 2").await;
        assert!(written.is_empty(), "written by nodes that did not hold the account: {written:?}");
        let accounts = i64::try_from(self.accounts).unwrap();
        assert_eq!(sql.count("sessions").await, accounts, "each application was resumed");
        assert_eq!(sql.count("event_quarantine").await, 0);
    }
}

fn account(number: usize) -> String {
    format!("user{number:04}@contoso.example")
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_come_and_go_in_order_share_evenly_without_waiting_for_leases_to_run_out() {
    let mut cluster = Cluster::new(12, LONG, &["--rate", "10"]).await;
    cluster.start("node-1");
    cluster.start("node-2");
    cluster.settled(&[("node-1", 6), ("node-2", 6)]).await;
    cluster.write(1).await;
    cluster.start("node-3");
    cluster.settled(&[("node-1", 4), ("node-2", 4), ("node-3", 4)]).await;
    cluster.write(2).await;
    assert!(cluster.node("node-2").terminate(), "SIGTERM ends it in order");
    cluster.settled(&[("node-1", 6), ("node-3", 6)]).await;
    let mut sql = cluster.sql().await;
    let nodes = "SELECT node_id FROM nodes WHERE stopped_at IS NULL ORDER BY 1";
    assert_eq!(sql.rows(nodes).await, ["node-1", "node-3"]);
    // An account that is disabled is nobody's.
    let first = format!("sip:{}", account(1));
    cluster.relay.tool_ok(&["account", "disable", &first]);
    eventually("its lease is released", async || {
        (sql.count("account_leases WHERE node_id IS NULL").await == 1).then_some(())
    })
    .await;
    assert_eq!(cluster.relay.account_state(&first, "stopped").await, "the account is disabled");
    cluster.relay.tool_ok(&["account", "enable", &first]);
    cluster.relay.account_state(&first, "online").await;
    let anew = "sessions WHERE ended_at IS NULL AND account_id > 1";
    assert_eq!(sql.count(anew).await, 11);
    sql.run("DELETE FROM outbox WHERE account_id = 1 AND state = 'queued'").await.unwrap();
    let written = sql.rows("SELECT node, relation, count(*) FROM violations GROUP BY 1, 2").await;
    assert!(written.is_empty(), "{written:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_one_nodes_and_whoever_starts_again_under_it_has_its_accounts_at_once() {
    let mut cluster = Cluster::new(4, LONG, &[]).await;
    cluster.start("node-1");
    cluster.settled(&[("node-1", 4)]).await;
    let mut twin = cluster.relay.start_node("node-1");
    assert!(!twin.wait(), "it refuses to run");
    let words = twin.stderr();
    assert!(words.contains("another ucwa-relay server") && words.contains("cluster.node_id"), "{words}");
    cluster.write(1).await;
    cluster.node("node-1").kill();
    cluster.start("node-1");
    let mut sql = cluster.sql().await;
    eventually("all leases are taken anew", async || {
        (sql.count("account_leases WHERE node_id = 'node-1' AND epoch = 2").await == 4).then_some(())
    })
    .await;
    cluster.settled(&[("node-1", 4)]).await;
    cluster.reckon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_accounts_of_a_node_that_dies_go_on_elsewhere() {
    let mut cluster = Cluster::new(12, SHORT, &["--rate", "30", "--seed", "3"]).await;
    for node in ["node-1", "node-2", "node-3"] {
        cluster.start(node);
    }
    cluster.settled(&[("node-1", 4), ("node-2", 4), ("node-3", 4)]).await;
    for round in 1..=4 {
        cluster.write(round).await;
    }
    cluster.node("node-2").kill();
    cluster.write(5).await;
    cluster.settled(&[("node-1", 6), ("node-3", 6)]).await;
    cluster.reckon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_slept_through_its_leases_touches_nothing_and_comes_back() {
    let mut cluster = Cluster::new(6, SHORT, &["--rate", "30", "--seed", "5"]).await;
    cluster.start("node-1");
    cluster.start("node-2");
    cluster.settled(&[("node-1", 3), ("node-2", 3)]).await;
    for round in 1..=4 {
        cluster.write(round).await;
    }
    let lost = cluster.held_by("node-2").await;
    cluster.node("node-2").signal("STOP");
    cluster.write(5).await;
    cluster.settled(&[("node-1", 6)]).await;
    cluster.write(6).await;
    cluster.node("node-2").signal("CONT");
    for account in &lost {
        let fenced = format!("account.id={account}");
        let node = &cluster.nodes["node-2"];
        eventually("it lets go of its accounts", async || {
            let log = node.stderr();
            log.lines().any(|line| line.contains("lease is over") && line.contains(&fenced)).then_some(())
        })
        .await;
    }
    cluster.settled(&[("node-1", 3), ("node-2", 3)]).await;
    cluster.write(7).await;
    cluster.reckon().await;
}

/// The whole picture, with what it cost.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_accounts_on_nodes_that_die_sleep_and_come() {
    let mut cluster = Cluster::new(60, SHORT, &["--rate", "30", "--seed", "11"]).await;
    for node in ["node-1", "node-2", "node-3"] {
        cluster.start(node);
    }
    cluster.settled(&[("node-1", 20), ("node-2", 20), ("node-3", 20)]).await;
    cluster.write(1).await;

    let orphans = cluster.held_by("node-1").await;
    cluster.node("node-1").kill();
    let took = takeover_times(&cluster, &orphans, "node-1").await;
    cluster.settled(&[("node-2", 30), ("node-3", 30)]).await;
    cluster.write(2).await;

    let asleep = cluster.held_by("node-2").await;
    cluster.node("node-2").signal("STOP");
    let took_sleeping = takeover_times(&cluster, &asleep, "node-2").await;
    cluster.settled(&[("node-3", 60)]).await;
    cluster.write(3).await;
    cluster.node("node-2").signal("CONT");
    cluster.start("node-4");
    cluster.settled(&[("node-2", 20), ("node-3", 20), ("node-4", 20)]).await;
    cluster.write(4).await;
    cluster.reckon().await;
    for (what, took) in [("killed", took), ("stopped", took_sleeping)] {
        eprintln!(
            "{what}: {} accounts online elsewhere after {:.2} (median), {:.2} (worst) lease_ttl_s of {SHORT} s",
            took.len(),
            took[took.len() / 2],
            took[took.len() - 1]
        );
    }
}

/// How long it takes from now until each account is online on another node, in units of the lease's time, ascending.
async fn takeover_times(cluster: &Cluster, accounts: &[String], from: &str) -> Vec<f64> {
    let began = Instant::now();
    let mut sql = cluster.sql().await;
    let mut times: BTreeMap<String, f64> = BTreeMap::new();
    let query = format!(
        "SELECT s.account_id FROM account_status s JOIN account_leases l ON l.account_id = s.account_id
          WHERE s.account_id IN ({}) AND s.state = 'online' AND s.node_id <> '{from}' AND l.node_id = s.node_id",
        accounts.join(",")
    );
    eventually_within(LONG_PATIENCE, "all accounts are online elsewhere", async || {
        for account in sql.rows(&query).await {
            let units = began.elapsed().as_secs_f64() / f64::from(SHORT);
            times.entry(account).or_insert(units);
        }
        (times.len() == accounts.len()).then_some(())
    })
    .await;
    let mut times: Vec<f64> = times.into_values().collect();
    times.sort_by(f64::total_cmp);
    times
}
