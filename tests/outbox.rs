//! The queue: every transition of a row's state, every cut between a commit and a request, order, and what operators do
//! with rows. docs/outbox.md says the same in words. The database is a real one of either kind; where the server is
//! needed, it is the simulator.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use jiff::{Timestamp, ToSpan};
use support::{
    archive::{Database, NODE, accepted, row},
    sql::Kind,
};
use ucwa_relay::{
    identifiers::OutboxId,
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

on_both_databases!(
    "current_thread":
    finished_rows_are_removed_after_their_time_with_their_attempts,
    an_uncertain_row_is_kept_until_somebody_decides,
    waiting_rows_have_a_shape_by_age_and_destination,
    rows_of_an_account_that_is_not_at_work_stay_queued_and_the_status_says_why,
);
