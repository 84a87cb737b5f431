//! The queue: every transition of a row's state, every cut between a commit and a request, order, and what operators do
//! with rows. docs/outbox.md says the same in words. The database is a real one of either kind; where the server is
//! needed, it is the simulator.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use jiff::{Timestamp, ToSpan};
use support::{
    Relay,
    archive::{Database, NODE, accepted, row},
    eventually,
    scene::QUICK,
    sql::{Kind, Sql},
};
use ucwa_relay::{
    identifiers::OutboxId,
    simulator::{OutgoingEntry, Simulator, SimulatorSettings},
    store::{AccountState, NewOutboxRow, OutboxState, ShapeCell},
};

mod support;

// ------------------------------------------------------------------------------------------------ operators

async fn finished_rows_are_removed_after_their_time_with_their_attempts(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    for to in ["sent", "cancelled", "queued", "held", "sending", "young"] {
        database.store.enqueue(&row(&format!("{to}@contoso.com"))).await.unwrap();
    }
    database.store.enqueue(&row("malformed")).await.unwrap();
    for (id, state) in [(2, OutboxState::Cancelled), (4, OutboxState::Held)] {
        assert!(database.store.set_outbox_state(OutboxId(id), state).await.unwrap());
    }
    outside.run("UPDATE outbox SET send_after = '2999-01-01T00:00:00Z' WHERE id = 3").await.unwrap();
    let claimed = database.claim().await;
    for send in claimed.iter().filter(|send| send.outbox.0 != 5) {
        alice.send_fact(send, accepted(u32::try_from(send.outbox.0).unwrap())).await;
    }
    outside.run("UPDATE outbox SET sent_at = '2020-01-01T00:00:00.000Z' WHERE id = 1").await.unwrap();
    outside
        .run("UPDATE outbox SET finished_at = '2020-01-01T00:00:00.000Z' WHERE id IN (2, 7)")
        .await
        .unwrap();
    // Old, and yet in nobody's way: these are not finished.
    outside
        .run("UPDATE outbox SET created_at = '2020-01-01T00:00:00.000Z' WHERE id IN (3, 4, 5)")
        .await
        .unwrap();
    let yesterday = Timestamp::now() - 24.hours();
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 2, "only so many at once");
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 1);
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 0);
    assert_eq!(
        outside.rows("SELECT id, state FROM outbox ORDER BY id").await,
        ["3|queued", "4|held", "5|sending", "6|sent"]
    );
    assert_eq!(outside.rows("SELECT outbox_id FROM outbox_attempts ORDER BY id").await, ["5", "6"]);
    assert_eq!(outside.count("messages WHERE outbox_id = 1").await, 1, "what was said stays");
}

async fn an_uncertain_row_is_kept_until_somebody_decides(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    assert_eq!(database.claim().await.len(), 1);
    database.reopen().await;
    database.store.abandon_sends(alice.account, "the application is gone").await.unwrap();
    assert_eq!(database.state(1).await.0, OutboxState::Uncertain);
    let tomorrow = Timestamp::now() + 24.hours();
    assert_eq!(database.store.purge_outbox(tomorrow, 10).await.unwrap(), 0);
}

async fn waiting_rows_have_a_shape_by_age_and_destination(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    let mut outside = database.outside().await;
    for to in ["Bob@contoso.com", "sip:bob@contoso.com", "carol@contoso.com;bob@contoso.com"] {
        database.store.enqueue(&row(to)).await.unwrap();
    }
    assert_eq!(database.claim().await.len(), 2);
    // Nobody has looked at this one yet.
    database
        .store
        .enqueue(&NewOutboxRow { account: "nobody@contoso.com".to_owned(), ..row("Dan@contoso.com") })
        .await
        .unwrap();
    outside.run("UPDATE outbox SET created_at = '2026-11-22T10:00:00.000Z' WHERE id = 1").await.unwrap();
    outside.run("UPDATE outbox SET created_at = '2026-11-22T10:07:00.000Z' WHERE id <> 1").await.unwrap();
    let now: Timestamp = "2026-11-22T10:12:00Z".parse().unwrap();
    let times = [now - 5.minutes(), now - 10.minutes()];
    let both = [OutboxState::Queued, OutboxState::Sending];
    let mut shape = database.store.outbox_shape(&both, &times).await.unwrap();
    shape.sort_by(|one, other| (&one.destination, one.age).cmp(&(&other.destination, other.age)));
    let cell = |account: &str, destination: &str, age| ShapeCell {
        account: account.to_owned(),
        destination: destination.to_owned(),
        age,
        count: 1,
    };
    let alice = "sip:alice@contoso.com";
    assert_eq!(
        shape,
        [
            cell("nobody@contoso.com", "Dan@contoso.com", 1),
            cell(alice, "sip:bob@contoso.com", 1),
            cell(alice, "sip:bob@contoso.com", 2),
            cell(alice, "sip:bob@contoso.com;sip:carol@contoso.com", 1),
        ]
    );
    let sending = database.store.outbox_shape(&[OutboxState::Sending], &times).await.unwrap();
    assert_eq!(sending.iter().map(|cell| cell.count).sum::<i64>(), 2);
}

async fn rows_of_an_account_that_is_not_at_work_stay_queued_and_the_status_says_why(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    let status = "SELECT account, state, count, reason FROM outbox_status";
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let record = async |state, detail| {
        database.store.record_state(alice.account, state, detail, NODE).await.unwrap();
    };
    let cases = [
        (
            AccountState::NeedsAttention,
            Some("the password was refused"),
            "needs attention: the password was refused",
        ),
        (AccountState::BackingOff, None, "backing off"),
        (AccountState::Stopped, None, "stopped"),
    ];
    for (state, detail, words) in cases {
        record(state, detail).await;
        assert!(database.claim().await.is_empty());
        // The first time nobody has looked at the row, later somebody has.
        assert_eq!(
            outside.rows(status).await,
            [format!("sip:alice@contoso.com|queued|1|the account is {words}")]
        );
    }
    database.store.set_enabled(alice.account, false).await.unwrap();
    assert_eq!(outside.rows(status).await, ["sip:alice@contoso.com|queued|1|the account is disabled"]);
    database.store.set_enabled(alice.account, true).await.unwrap();
    record(AccountState::Online, None).await;
    assert_eq!(outside.rows(status).await, ["sip:alice@contoso.com|queued|1|"]);
    assert_eq!(database.claim().await.len(), 1);
}

// ------------------------------------------------------------------------------------------------ with the server

const ALICE: &str = "sip:user0001@contoso.example";

/// A simulated server in the test's own process, the real program with one account, and a connection to its database.
struct Scene {
    simulator: Simulator,
    relay: Relay,
    sql: Sql,
}

impl Scene {
    async fn begin(kind: Kind, settings: SimulatorSettings, configuration: &str) -> Self {
        let settings = SimulatorSettings { accounts: 1, ..settings };
        let simulator = Simulator::start(settings).await.expect("loopback has free ports");
        let mut relay = Relay::configure_on_for(kind, &simulator.discovery_url(), configuration).await;
        relay.add_account(ALICE, "simulated");
        relay.start();
        relay.account_state(ALICE, "online").await;
        let sql = relay.connect().await;
        Self { simulator, relay, sql }
    }

    /// Queues a message; `column` is one more of the table, with its value as SQL.
    async fn queue(&mut self, recipients: &str, body: &str, column: Option<(&str, &str)>) -> i64 {
        let (name, value) = column.map_or((String::new(), String::new()), |(name, value)| {
            (format!(", {name}"), format!(", {value}"))
        });
        let insert = format!(
            "INSERT INTO outbox (account, recipients, body{name}) VALUES ('{ALICE}', '{recipients}', '{body}'{value})
             RETURNING id"
        );
        self.sql.rows(&insert).await[0].parse().unwrap()
    }

    /// Waits until a row has come to its end; gives its state and error.
    async fn outcome(&mut self, id: i64) -> (String, String) {
        let query = format!(
            "SELECT state || '|' || coalesce(last_error, '') FROM outbox
              WHERE id = {id} AND state NOT IN ('queued', 'sending', 'sent')"
        );
        let row =
            eventually(&format!("row {id} has come to its end"), async || self.sql.rows(&query).await.pop())
                .await;
        let (state, error) = row.split_once('|').unwrap();
        (state.to_owned(), error.to_owned())
    }

    /// What the server accepted with this text.
    fn accepted(&self, body: &str) -> Vec<OutgoingEntry> {
        let mut entries = self.simulator.ledger().outgoing;
        entries.retain(|entry| entry.text == body);
        entries
    }
}

async fn a_group_is_told_whoever_of_it_can_be_reached(kind: Kind) {
    let settings =
        SimulatorSettings { ring_time: std::time::Duration::from_secs(2), ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, &format!("{QUICK}\n")).await;
    let full =
        |names: &[&str]| names.iter().map(|name| format!("sip:{name}@fabrikam.example")).collect::<Vec<_>>();
    // Who is named; who of them gets it; what the row says of the others.
    let cases: &[(&[&str], &[&str], &[&str])] = &[
        (&["silent.a", "silent.b", "silent.c"], &["silent.a", "silent.b", "silent.c"], &[]),
        (
            &["silent.d", "declines.d"],
            &["silent.d"],
            &["declines.d@fabrikam.example (the recipient declined"],
        ),
        (
            &["declines.e", "silent.e", "silent.f"],
            &["silent.e", "silent.f"],
            &["declines.e@fabrikam.example (the rec"],
        ),
        (
            &["missing.g", "absent.g", "silent.g"],
            &["silent.g"],
            &["missing.g@", "absent.g@", "did not answer in time"],
        ),
        (
            &["busy.h", "silent.h", "missing.h"],
            &["silent.h"],
            &["busy.h@fabrikam.example (the recipient is busy", "missing.h@"],
        ),
    ];
    let mut ids = Vec::new();
    for (number, (named, ..)) in cases.iter().enumerate() {
        ids.push(scene.queue(&full(named).join(";"), &format!("news {number}"), None).await);
    }
    for (number, (named, reached, words)) in cases.iter().enumerate() {
        let (state, error) = scene.outcome(ids[number]).await;
        assert_eq!(state, "delivered", "{named:?}: {error}");
        let entries = scene.accepted(&format!("news {number}"));
        assert_eq!(entries.len(), 1, "{named:?} is told once");
        let mut to = entries[0].to.clone();
        to.sort();
        assert_eq!(to, full(reached), "{named:?}");
        assert!(words.iter().all(|word| error.contains(word)), "{named:?}: {error}");
        assert_eq!(error.starts_with("not reached: "), !words.is_empty(), "{error}");
        let unreached = named.len() - reached.len();
        let noted = scene
            .sql
            .rows(&format!("SELECT failed_recipients FROM messages WHERE outbox_id = {}", ids[number]))
            .await;
        assert_eq!(noted[0].matches('@').count(), unreached, "{noted:?}");
    }

    // The next row for the same people is said in the group that is there, and so is an answer into its conversation.
    let again = scene.queue(&full(cases[2].0).join(";"), "more news", None).await;
    let (state, error) = scene.outcome(again).await;
    assert_eq!(state, "delivered", "{error}");
    assert!(error.contains("declines.e@"), "{error}");
    let conversation =
        scene.sql.rows(&format!("SELECT conversation_id FROM outbox WHERE id = {}", ids[2])).await.remove(0);
    let answer = scene.queue("", "an answer", Some(("conversation_id", &conversation))).await;
    assert_eq!(scene.outcome(answer).await.0, "delivered");
    let first = scene.accepted("news 2").remove(0);
    for text in ["more news", "an answer"] {
        let entry = scene.accepted(text).remove(0);
        assert_eq!((&entry.conversation, entry.to.len()), (&first.conversation, 2), "{text}");
    }

    // Nobody is there: what waiting can heal is tried again, and what it can't fails at once.
    let refused = scene.queue(&full(&["declines.i", "missing.i"]).join(";"), "to nobody", None).await;
    let (state, error) = scene.outcome(refused).await;
    assert_eq!(state, "failed");
    assert!(
        error.starts_with("nobody could be reached: sip:declines.i@") && error.contains("missing.i@"),
        "{error}"
    );
    let away = scene
        .queue(&full(&["absent.j", "declines.j"]).join(";"), "to nobody", Some(("max_attempts", "2")))
        .await;
    let (state, error) = scene.outcome(away).await;
    assert_eq!(state, "failed");
    assert!(
        error.starts_with("given up after 2 attempts") && error.contains("nobody could be reached"),
        "{error}"
    );
    assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {refused}")).await, 1);
    assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {away}")).await, 2);
    assert!(scene.accepted("to nobody").is_empty());
    assert!(scene.relay.server().terminate());
}

on_both_databases!(
    "multi_thread":
    a_group_is_told_whoever_of_it_can_be_reached,
    finished_rows_are_removed_after_their_time_with_their_attempts,
    an_uncertain_row_is_kept_until_somebody_decides,
    waiting_rows_have_a_shape_by_age_and_destination,
    rows_of_an_account_that_is_not_at_work_stay_queued_and_the_status_says_why,
);
