//! Very many rows at once: all of them come to their end in order, whatever goes wrong meanwhile, and they stand in
//! nobody's way.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use support::{
    Relay, eventually, eventually_none, eventually_within,
    sql::{Kind, Sql},
};
use ucwa_relay::simulator::{ChaosSettings, OutgoingEntry, Simulator, SimulatorSettings};

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
        if kind == Kind::Sqlite {
            // As a program should that inserts beside thousands of others' rows, on a disk that other tests use as well.
            sql.run("PRAGMA busy_timeout = 60000").await.unwrap();
        }
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
        let mut insert = String::from(
            "INSERT INTO outbox (account, recipients, body, content_type, max_attempts) VALUES ",
        );
        for row in 0..rows {
            for recipient in recipients {
                let name = recipient.trim_start_matches("sip:");
                let (body, content_type) = if is_html(recipient, row) {
                    (format!("<p>row <b>{row}</b> to {name}</p>"), "text/html")
                } else {
                    (format!("row {row} to {name}"), "text/plain")
                };
                // Nothing ever reaches the deaf: each row waits for those before it to be given up.
                let attempts = if recipient.starts_with("sip:deaf") { "2" } else { "NULL" };
                write!(insert, "('{account}', '{recipient}', '{body}', '{content_type}', {attempts}),")
                    .unwrap();
            }
        }
        self.sql.run(insert.trim_end_matches(',')).await.unwrap();
    }

    /// Waits until it is so in the database.
    async fn until(&mut self, what: &str, mut is_so: impl AsyncFnMut(&mut Sql) -> bool) {
        eventually_within(PATIENCE, what, async || is_so(&mut self.sql).await.then_some(())).await;
    }
}

/// Whom each account writes to: most of them take everything, some close messaging or leave in between, one receives
/// nothing, one does not exist. Of every fourth account one is a group, and in every other of these somebody declines.
fn recipients(account: usize) -> Vec<String> {
    let people = match account % 8 {
        0 => "silent.e;silent.f;declines.g",
        4 => "silent.e;html.f",
        _ => "silent.e",
    };
    ["silent.a", "silent.b", "silent.c", "silent.d", people, "html", "pauses", "leaves", "deaf", "missing"]
        .into_iter()
        .map(|names| {
            let uris: Vec<String> =
                names.split(';').map(|name| format!("sip:{name}.{account}@fabrikam.example")).collect();
            uris.join(";")
        })
        .collect()
}

/// Every other row is HTML for who reads it, for somebody who doesn't, and for groups.
fn is_html(recipients: &str, row: usize) -> bool {
    let reads = ["sip:html", "sip:silent.b"].iter().any(|known| recipients.starts_with(known));
    (reads || recipients.contains(';')) && row % 2 == 1
}

/// What people see of a row's text or of what was accepted.
fn shown(text: &str) -> String {
    ["<p>", "</p>", "<b>", "</b>"].iter().fold(text.to_owned(), |text, tag| text.replace(tag, ""))
}

/// Of rows that came through: what is not with each recipient once, and not said to be missing there. One line each.
fn missed(rows: &[String], said: &[OutgoingEntry]) -> Vec<String> {
    let mut problems = Vec::new();
    for row in rows {
        let [account, recipients, body, error] = row.splitn(4, '|').collect::<Vec<_>>()[..] else {
            panic!("{row:?} has other columns");
        };
        let text = shown(body);
        let entries: Vec<_> =
            said.iter().filter(|entry| entry.account == account && shown(&entry.text) == text).collect();
        if entries.len() != 1 {
            problems.push(format!("{row}: accepted {} times", entries.len()));
        }
        for recipient in recipients.split(';') {
            let reached = entries.iter().flat_map(|entry| &entry.to).filter(|uri| *uri == recipient).count();
            let named = error.contains(recipient);
            if reached != usize::from(!named) {
                problems.push(format!("{row}: {recipient} was told {reached} times, and is named: {named}"));
            }
        }
    }
    problems
}

async fn twenty_thousand_rows_under_every_fault_all_end_as_the_server_says(kind: Kind) {
    const ACCOUNTS: usize = 100;
    const ROWS: usize = 20;
    // The same faults each time; `UCWA_RELAY_CHAOS_SEED` makes others.
    let seed = std::env::var("UCWA_RELAY_CHAOS_SEED").map_or(7, |seed| seed.parse().expect("a number"));
    // What an application that is lost knew, its account's conversation log still tells.
    let settings = SimulatorSettings {
        accounts: ACCOUNTS,
        seed,
        conversation_logs: true,
        log_delay: Duration::from_secs(2),
        ..SimulatorSettings::default()
    };
    let quick = "[outbox]\nper_account_rate = 10000\nsettle_after = \"20s\"\nretry_base = \"1s\"\nretry_max = \"2s\"\n\
                 max_attempts = 30\n";
    let mut scene = Scene::begin(kind, settings, quick).await;
    scene.simulator.start_chaos(ChaosSettings { seed, faults_per_second: 20.0 });
    for (number, account) in scene.accounts.clone().into_iter().enumerate() {
        scene.queue(&account, &recipients(number), ROWS).await;
    }
    let rows = i64::try_from(ACCOUNTS * recipients(0).len() * ROWS).unwrap();
    let open = "outbox WHERE state IN ('queued', 'sending')";
    // Faults come by the clock: as many as a fast machine meets, not more on a slow one.
    let simulator = scene.simulator.clone();
    let three_quarters = u64::try_from(rows * 3 / 4).unwrap();
    let enough = |struck: BTreeMap<&str, u64>| struck.values().sum::<u64>() >= 1500;
    scene
        .until("three quarters of the rows are with the server", async |_| {
            simulator.counters().outgoing >= three_quarters || enough(simulator.faults_struck())
        })
        .await;
    scene.simulator.stop_chaos();
    let struck = scene.simulator.faults_struck();
    assert!(struck.len() >= 20 && struck.values().sum::<u64>() >= 200, "{struck:?}");
    scene.until("every row has come to its end", async |sql| sql.count(open).await == 0).await;
    scene.until("the server has settled everything", async |_| simulator.is_quiet()).await;
    // Of a call whose application was lost before its events came, the text is archived after a while.
    let ledger = scene.simulator.ledger();
    eventually_none(PATIENCE, "messages that are lost", async || scene.relay.reckon_with(&ledger).await.lost)
        .await;

    assert_eq!(scene.sql.count("outbox").await, rows);
    let reckoning = scene.relay.reckon_with(&scene.simulator.ledger()).await;
    let none = Vec::<String>::new();
    let alike = "SELECT m.id, m.account_id, m.conversation_id, m.session_id, m.source, m.status, m.outbox_id, m.sent_at,
                        m.archived_at, m.href, m.operation_id, m.body
                   FROM messages m
                   JOIN (SELECT account_id, body FROM messages WHERE direction = 'outgoing'
                          GROUP BY account_id, body HAVING count(*) > 1) d
                     ON d.account_id = m.account_id AND d.body = m.body
                  WHERE m.direction = 'outgoing' ORDER BY m.body, m.id";
    assert_eq!(
        (&reckoning.duplicated, &reckoning.out_of_order),
        (&none, &none),
        "{:#?}",
        scene.sql.rows(alike).await
    );
    let groups = "SELECT account, recipients, body, coalesce(last_error, '') FROM outbox
                   WHERE recipients LIKE '%;%' AND state IN ('sent', 'delivered')";
    let groups = scene.sql.rows(groups).await;
    assert_eq!(missed(&groups, &scene.simulator.ledger().outgoing), none);
    println!(
        "faults struck: {struck:?}; uncertain rows: {}; group rows that came through: {}",
        reckoning.uncertain,
        groups.len()
    );
    assert!(reckoning.uncertain * 100 <= usize::try_from(rows).unwrap(), "{} uncertain", reckoning.uncertain);
    let healthy_and_failed = "SELECT account, recipients, attempts, last_code, last_subcode, last_error FROM outbox
                               WHERE state = 'failed' AND recipients NOT LIKE 'sip:deaf%' AND recipients NOT LIKE 'sip:missing%'";
    assert_eq!(scene.sql.rows(healthy_and_failed).await, Vec::<String>::new());
    // Of a call whose answer was lost nobody may be able to tell that it was refused.
    let missing = "outbox WHERE recipients LIKE 'sip:missing%' AND state NOT IN ('failed', 'uncertain')";
    assert_eq!(scene.sql.count(missing).await, 0);
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
    // An INSERT may have to wait for the disk, as the burst goes on.
    let before = scene.sql.count(&accepted).await;
    let open = format!("outbox WHERE account <> '{bursting}' AND state <> 'delivered'");
    scene.until("the others' rows are delivered", async |sql| sql.count(&open).await == 0).await;
    let meanwhile = scene.sql.count(&accepted).await - before;
    assert!(meanwhile < BURST / 2, "{meanwhile} rows of the burst went while 80 of others did");
    let waiting = scene.sql.count(&format!("{of_burst} AND state = 'queued'")).await;
    assert!(waiting > 0, "the burst was over before the others' rows were delivered");
    let reckoning = scene.relay.reckon_with(&scene.simulator.ledger()).await;
    assert_eq!(reckoning.out_of_order, Vec::<String>::new());
    assert_eq!(reckoning.duplicated, Vec::<String>::new());
}

on_both_databases!(
    "multi_thread": twenty_thousand_rows_under_every_fault_all_end_as_the_server_says,
    a_burst_of_one_account_holds_up_nobody_else,
);
