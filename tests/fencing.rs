//! A node that lost an account can write nothing about it, whatever kind of write it is; and nobody else in the batch
//! notices.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod support;

use std::time::Duration;

use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use jiff::Timestamp;
use support::{
    postgres::{PostgresDatabase, rows},
    take_leases,
};
use ucwa_relay::{
    archive::{
        fact::{ArchiveCommit, ConversationFact, Fact},
        retry::RetryPolicy,
        workspace::RuleSettings,
    },
    identifiers::AccountId,
    store::{
        AccountState, Allowances, Auth, ClaimSettings, NewAccount, NewOutboxRow, Role, SecretSource, Session,
        SharedStore, StoreError, StoreSettings, connect,
    },
};

const TTL: Duration = Duration::from_secs(3600);

async fn node(database: &PostgresDatabase, name: &str) -> SharedStore {
    let settings = StoreSettings {
        url: database.url().to_owned(),
        max_connections: 2,
        commit_interval: Duration::from_millis(2),
        full_text: false,
        node: name.to_owned(),
        lease_ttl: TTL,
        rules: RuleSettings {
            plain_from_html: str::to_owned,
            retry: RetryPolicy { base: Duration::from_secs(30), cap: Duration::from_secs(600) },
            max_attempts: 5,
            retry_uncertain: false,
            typing: false,
        },
    };
    connect(&settings, Role::Server).await.unwrap()
}

struct Held {
    account: AccountId,
    session: Session,
    epoch: i64,
}

impl Held {
    async fn new(store: &SharedStore, name: &str) -> Self {
        let new = NewAccount {
            sip_uri: format!("{name}@contoso.com").parse().unwrap(),
            username: name.to_owned(),
            auth: Auth::Password,
            secret: SecretSource::Missing,
            invitations: None,
        };
        let account = store.add_account(&new).await.unwrap();
        take_leases(store).await;
        let session = store.begin_session(account, "/applications/1", "/e?ack=1", "").await.unwrap();
        store.record_state(account, AccountState::Online, None, "one").await.unwrap();
        Self { account, session, epoch: store.leases().epoch(account).unwrap() }
    }

    fn commit(&self, ack: u32) -> ArchiveCommit {
        let conversation =
            ConversationFact { href: format!("/conversations/{ack}"), ..ConversationFact::default() };
        ArchiveCommit {
            account: self.account,
            session: self.session.id,
            epoch: self.epoch,
            cursor: Some(format!("/e?ack={ack}")),
            received_at: Timestamp::now(),
            facts: vec![Fact::Conversation(conversation)],
        }
    }
}

async fn enqueue(store: &SharedStore, name: &str, to: &str) {
    let row = NewOutboxRow {
        account: format!("{name}@contoso.com"),
        recipients: format!("{to}@contoso.com"),
        body: "hello".to_owned(),
        ..NewOutboxRow::default()
    };
    store.enqueue(&row).await.unwrap();
}

fn claims(node: &str) -> ClaimSettings {
    ClaimSettings {
        node: node.to_owned(),
        max_attempts: 3,
        max_body_bytes: 1000,
        limit: 100,
        allowances: Allowances::UNLIMITED,
    }
}

/// Everything that the database says about an account.
async fn everything(database: &PostgresDatabase, account: AccountId) -> Vec<String> {
    let mut sql = database.connect().await;
    let mut all = Vec::new();
    for table in [
        "account_status",
        "sessions",
        "gaps",
        "backfills",
        "conversations",
        "participants",
        "messages",
        "invitations",
        "chain_heads",
        "event_quarantine",
        "outbox",
    ] {
        let query =
            format!("SELECT to_jsonb(t)::text FROM {table} t WHERE account_id = {} ORDER BY 1", account.0);
        all.extend(rows(&mut sql, &query).await.into_iter().map(|row| format!("{table}: {row}")));
    }
    let attempts = "SELECT to_jsonb(t)::text FROM outbox_attempts t ORDER BY 1";
    all.extend(rows(&mut sql, attempts).await);
    all
}

type Write<'a> = BoxFuture<'a, Result<(), StoreError>>;

#[tokio::test]
async fn every_kind_of_write_about_a_lost_account_is_refused_and_the_neighbours_are_not() {
    let database = PostgresDatabase::new().await;
    let one = node(&database, "one").await;
    let (alice, bob) = (Held::new(&one, "alice").await, Held::new(&one, "bob").await);
    enqueue(&one, "alice", "carol").await;
    let claimed = one.claim_due(Timestamp::now(), &claims("one")).await.unwrap().remove(0);
    enqueue(&one, "alice", "dave").await;
    // Anybody admits rows; none is claimed.
    one.claim_due(Timestamp::now(), &ClaimSettings { limit: 0, ..claims("one") }).await.unwrap();
    one.record_gap(alice.account, alice.session.id, Timestamp::now(), "a test").await.unwrap();
    let backfill = one.backfills(alice.account).await.unwrap().remove(0).id;

    // As when its time was over before another node took the account, which this process has not heard of yet.
    let mut sql = database.connect().await;
    let run_out =
        format!("UPDATE account_leases SET expires_at = now() WHERE account_id = {}", alice.account.0);
    sqlx::query(sqlx::AssertSqlSafe(run_out)).execute(&mut sql).await.unwrap();
    let two = node(&database, "two").await;
    take_leases(&two).await;
    assert_eq!(two.leases().epoch(alice.account), Some(alice.epoch + 1));
    assert_eq!(two.leases().epoch(bob.account), None, "that lease has not run out");
    assert!(one.leases().holds(alice.account, alice.epoch), "it believes so");
    let before = everything(&database, alice.account).await;

    // In one batch with the neighbour's.
    let now = Timestamp::now();
    let (stale, resumed, good) = (alice.commit(2), alice.commit(3), bob.commit(2));
    let (refused, stored) = tokio::join!(one.commit(stale.clone()), one.commit(good));
    assert!(matches!(refused, Err(StoreError::Fenced(account)) if account == alice.account), "{refused:?}");
    stored.unwrap();
    assert_eq!(one.leases().epoch(alice.account), None, "now it knows");

    // The process refuses them by itself from now on.
    let (account, session) = (alice.account, alice.session.id);
    let writes: Vec<(&str, Write<'_>)> = vec![
        ("commit", one.commit(stale).map(|done| done.map(drop)).boxed()),
        ("resume", one.resume(resumed, "/events?ack=1", now, "a test").map(|done| done.map(drop)).boxed()),
        ("begin_session", one.begin_session(account, "/a", "/e", "").map(|done| done.map(drop)).boxed()),
        ("end_session", one.end_session(account, session, "a test")),
        ("abandon_sends", one.abandon_sends(account, "a test").map(|done| done.map(drop)).boxed()),
        ("record_gap", one.record_gap(account, session, now, "a test")),
        ("record_stretch", one.record_stretch(account, session, now - TTL, now, "a test")),
        ("record_followed", one.record_followed(std::slice::from_ref(&alice.session.id), now)),
        ("quarantine", one.quarantine(account, Some(session), "a test", "payload")),
        ("record_state", one.record_state(account, AccountState::Stopped, None, "one")),
        ("record_restart", one.record_restart(account)),
        ("set_display_name", one.set_display_name(account, "Eve")),
        ("request_backfill", one.request_backfill(account, now, now)),
        ("backfilled", one.backfilled(backfill, now, None)),
        ("backfill_impossible", one.backfill_impossible(account, "a test")),
        ("release_claim", one.release_claim(&claimed)),
    ];
    for (name, write) in writes {
        let refused = write.await;
        assert!(matches!(refused, Err(StoreError::Fenced(id)) if id == account), "{name}: {refused:?}");
    }
    assert!(
        one.claim_due(now, &claims("one")).await.unwrap().is_empty(),
        "alice's rows are not for this node"
    );
    one.settle_overdue(now + TTL).await.unwrap();
    assert_eq!(everything(&database, account).await, before);

    one.record_followed(&[bob.session.id], now).await.unwrap();
    one.record_state(bob.account, AccountState::Online, Some("as before"), "one").await.unwrap();
    two.record_state(account, AccountState::Online, None, "two").await.unwrap();
    let theirs = two.claim_due(now, &claims("two")).await.unwrap();
    assert_eq!(theirs.len(), 1, "dave's row; carol's is to be settled first");
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn the_database_judges_writes_of_a_process_that_believes_itself_the_holder() {
    let database = PostgresDatabase::new().await;
    let one = node(&database, "one").await;
    let mut sql = database.connect().await;
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
    let mut held = Vec::new();
    for name in names {
        held.push(Held::new(&one, name).await);
    }
    let neighbour = Held::new(&one, "neighbour").await;
    let now = Timestamp::now();
    // Behind its back, so that each kind of write is the first to find out.
    let taken = "UPDATE account_leases SET node_id = 'two', epoch = epoch + 1
                  WHERE account_id <> (SELECT max(account_id) FROM account_leases)";
    sqlx::query(taken).execute(&mut sql).await.unwrap();
    let mut before = Vec::new();
    for account in &held {
        before.push(everything(&database, account.account).await);
    }
    let id = |number: usize| held[number].account;
    let session = |number: usize| held[number].session.id;
    let followed = [session(6), neighbour.session.id];
    let writes: Vec<Write<'_>> = vec![
        one.commit(held[0].commit(2)).map(|done| done.map(drop)).boxed(),
        one.resume(held[1].commit(2), "/events?ack=1", now, "a test").map(|done| done.map(drop)).boxed(),
        one.begin_session(id(2), "/a", "/e", "").map(|done| done.map(drop)).boxed(),
        one.end_session(id(3), session(3), "a test"),
        one.abandon_sends(id(4), "a test").map(|done| done.map(drop)).boxed(),
        one.record_gap(id(5), session(5), now, "a test"),
        one.record_followed(&followed, now + TTL),
        one.quarantine(id(7), Some(session(7)), "a test", "payload"),
        one.record_state(id(8), AccountState::Stopped, None, "one"),
        one.record_restart(id(9)),
        one.set_display_name(id(10), "Eve"),
        one.request_backfill(id(11), now, now),
    ];
    let (refused, stored) = tokio::join!(join_all(writes), one.commit(neighbour.commit(2)));
    stored.unwrap();
    for (number, refused) in refused.into_iter().enumerate() {
        assert!(
            matches!(refused, Err(StoreError::Fenced(account)) if account == id(number)),
            "{number}: {refused:?}"
        );
        assert_eq!(everything(&database, id(number)).await, before[number]);
    }
    let noted = format!("SELECT last_ack_at > now() FROM sessions WHERE id = {}", neighbour.session.id.0);
    assert_eq!(rows(&mut sql, &noted).await, ["1"], "the neighbour was followed");
    one.close().await;
}

#[tokio::test]
async fn an_account_changes_hands_only_between_transactions() {
    let database = PostgresDatabase::new().await;
    let one = node(&database, "one").await;
    let alice = Held::new(&one, "alice").await;
    let two = node(&database, "two").await;
    // What the fence does, in a transaction that takes its time.
    let mut sql = database.connect().await;
    for statement in [
        "UPDATE account_leases SET expires_at = now()",
        "BEGIN",
        "SELECT FROM account_leases WHERE node_id = 'one' FOR KEY SHARE",
    ] {
        sqlx::query(statement).execute(&mut sql).await.unwrap();
    }
    take_leases(&two).await;
    assert_eq!(two.leases().epoch(alice.account), None, "not while a transaction of the holder is open");
    let renewed = one.cluster().unwrap().renew_leases().await;
    assert_eq!(renewed.unwrap().nodes, 2, "renewing waits for nobody");
    assert!(one.leases().holds(alice.account, alice.epoch));
    sqlx::query("UPDATE account_leases SET expires_at = now()").execute(&mut sql).await.unwrap();
    sqlx::query("COMMIT").execute(&mut sql).await.unwrap();
    take_leases(&two).await;
    assert_eq!(two.leases().epoch(alice.account), Some(alice.epoch + 1));
    one.close().await;
    two.close().await;
}
