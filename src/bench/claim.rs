//! What it costs to claim due rows, beside few and beside very many finished ones.

use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    outside::{Database, Outside, Place},
    report::{Figure, Goal, percentile, sorted},
    stage::account,
};
use crate::{
    config::Config,
    store::{self, AccountState, Allowances, Auth, ClaimSettings, NewAccount, Role, SecretSource, Store},
};

const NODE: &str = "bench";
/// Each claim takes the first row of each of so many destinations.
const DESTINATIONS: usize = 100;
const LEASE_TTL_S: u32 = 3600;
/// Finished rows of the first series.
const FEW: usize = 10;

/// Median times of claims beside few and beside `finished` finished rows.
pub(super) async fn cost(database: &Database, finished: usize, claims: usize) -> anyhow::Result<Vec<Figure>> {
    let place = Place::new(database).await?;
    let mut config = Config::default();
    config.database.url = place.url();
    NODE.clone_into(&mut config.cluster.node_id);
    // Nobody renews the lease while a million rows are made.
    config.cluster.lease_ttl_s = LEASE_TTL_S;
    let store = store::connect(&config.store_settings(), Role::Server).await?;
    let id = store
        .add_account(&NewAccount {
            sip_uri: account(1).parse()?,
            username: "bench".to_owned(),
            auth: Auth::Password,
            secret: SecretSource::Missing,
            invitations: None,
        })
        .await?;
    if let Some(cluster) = store.cluster() {
        cluster.renew_leases().await?;
        cluster.acquire_leases(usize::MAX).await?;
    }
    store.record_state(id, AccountState::Online, None, NODE).await?;
    let mut outside = place.connect().await?;

    finish_rows(&mut outside, FEW).await?;
    let few = claim(store.as_ref(), &mut outside, claims).await?;
    finish_rows(&mut outside, finished).await?;
    let many = claim(store.as_ref(), &mut outside, claims).await?;
    store.close().await;
    place.remove().await?;

    let ms = |times: &[f64]| percentile(times, 0.5) * 1000.0;
    let name = format!("claiming {DESTINATIONS} rows beside {finished} finished ones, p50");
    Ok(vec![
        Figure::new(name, ms(&many), "ms").on(database.name()),
        Figure::new("the same, compared with few finished ones", ms(&many) / ms(&few).max(0.001), "times")
            .on(database.name())
            .beside(ms(&few), format!("ms beside {FEW} finished rows"))
            .shall(Goal::AtMost(1.5)),
    ])
}

/// Rows as the service leaves them behind.
async fn finish_rows(outside: &mut Outside, rows: usize) -> anyhow::Result<()> {
    // Held, so that nobody wants to send them in between. Whoever raises the revision is the service.
    for statement in [
        format!(
            "INSERT INTO outbox (account, recipients, body, state)
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
             SELECT '{}', 'silent.1@fabrikam.example', 'finished', 'held' FROM n",
            account(1)
        ),
        "UPDATE outbox
            SET state = 'delivered', account_id = 1, destination = 'sip:silent.1@fabrikam.example', attempts = 1,
                finished_at = created_at, sent_at = created_at, revision = revision + 1
          WHERE state = 'held'"
            .to_owned(),
        // As the database does by itself after so many rows, but now.
        "ANALYZE outbox".to_owned(),
    ] {
        outside.run(&statement).await?;
    }
    Ok(())
}

/// Seconds of each of so many claims, in ascending order.
async fn claim(store: &dyn Store, outside: &mut Outside, claims: usize) -> anyhow::Result<Vec<f64>> {
    let settings = ClaimSettings {
        node: NODE.to_owned(),
        max_attempts: 5,
        max_body_bytes: 32 * 1024,
        limit: i64::try_from(DESTINATIONS)?,
        allowances: Allowances::UNLIMITED,
    };
    outside.insert_many("claim", (1, 1), DESTINATIONS, claims + 1).await?;
    // New rows are looked at first, some in each claim; that is not timed.
    let nothing = ClaimSettings { limit: 0, ..settings.clone() };
    while outside.number("SELECT count(*) FROM outbox WHERE state = 'queued' AND destination IS NULL").await?
        > 0
    {
        store.claim_due(Timestamp::now(), &nothing).await?;
    }
    let mut times = Vec::new();
    for round in 0..=claims {
        let mut claimed = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut took = Duration::ZERO;
        while claimed.is_empty() {
            let began = Instant::now();
            claimed = store.claim_due(Timestamp::now(), &settings).await?;
            took = began.elapsed();
            anyhow::ensure!(Instant::now() < deadline, "nothing could be claimed");
        }
        if round > 0 {
            anyhow::ensure!(claimed.len() == DESTINATIONS, "{} rows were claimed", claimed.len());
            times.push(took.as_secs_f64());
        }
        outside
            .run("UPDATE outbox SET state = 'delivered', revision = revision + 1 WHERE state = 'sending'")
            .await
            .context("finishing what was claimed")?;
    }
    Ok(sorted(times))
}
