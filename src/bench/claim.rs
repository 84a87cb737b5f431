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
    store::{
        self, AccountState, Allowances, Auth, ClaimSettings, NewAccount, Role, SecretSource, SharedStore,
    },
};

const NODE: &str = "bench";
/// Each claim takes the first row of each of so many destinations.
const DESTINATIONS: usize = 100;
const LEASE_TTL_S: u32 = 3600;
/// Finished rows of the first series.
const FEW: usize = 10;

/// The queue of one account in an otherwise empty database, and the store that claims its rows.
pub struct Queue {
    store: SharedStore,
    outside: Outside,
}

/// Median times of claims beside few and beside `finished` finished rows.
pub(super) async fn cost(database: &Database, finished: usize, claims: usize) -> anyhow::Result<Vec<Figure>> {
    let place = Place::new(database).await?;
    let mut queue = Queue::open(&place.url()).await?;
    queue.finish_rows(FEW).await?;
    let few = times(&mut queue, claims).await?;
    queue.finish_rows(finished).await?;
    let many = times(&mut queue, claims).await?;
    queue.close().await;
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

/// Seconds of each of so many claims, in ascending order.
async fn times(queue: &mut Queue, claims: usize) -> anyhow::Result<Vec<f64>> {
    queue.fill(claims + 1).await?;
    let mut times = Vec::new();
    for round in 0..=claims {
        let took = queue.claim().await?;
        // The first one prepares statements.
        if round > 0 {
            times.push(took.as_secs_f64());
        }
        queue.finish_claimed().await?;
    }
    Ok(sorted(times))
}

impl Queue {
    /// Makes the schema in an empty database, and an account that is online.
    ///
    /// # Errors
    /// The database can't be opened, or refuses something.
    pub async fn open(url: &str) -> anyhow::Result<Self> {
        let mut config = Config::default();
        url.clone_into(&mut config.database.url);
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
        Ok(Self { store, outside: Outside::connect(url).await? })
    }

    /// Adds so many rows as the service leaves them behind.
    ///
    /// # Errors
    /// The database refuses them.
    pub async fn finish_rows(&mut self, rows: usize) -> anyhow::Result<()> {
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
            self.outside.run(&statement).await?;
        }
        Ok(())
    }

    /// Adds rows for so many claims.
    ///
    /// # Errors
    /// The database refuses them.
    pub async fn fill(&mut self, claims: usize) -> anyhow::Result<()> {
        self.outside.insert_many("claim", (1, 1), DESTINATIONS, claims).await?;
        // New rows are looked at first, some in each claim; that is not what is measured.
        let nothing = ClaimSettings { limit: 0, ..Self::settings()? };
        let new = "SELECT count(*) FROM outbox WHERE state = 'queued' AND destination IS NULL";
        while self.outside.number(new).await? > 0 {
            self.store.claim_due(Timestamp::now(), &nothing).await?;
        }
        Ok(())
    }

    /// Claims the first row of every destination, of which there are a hundred; gives how long that took.
    ///
    /// # Errors
    /// The database refuses, or there is nothing to claim.
    pub async fn claim(&mut self) -> anyhow::Result<Duration> {
        let settings = Self::settings()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let began = Instant::now();
            let claimed = self.store.claim_due(Timestamp::now(), &settings).await?;
            let took = began.elapsed();
            if !claimed.is_empty() {
                anyhow::ensure!(claimed.len() == DESTINATIONS, "{} rows were claimed", claimed.len());
                return Ok(took);
            }
            anyhow::ensure!(Instant::now() < deadline, "nothing could be claimed");
        }
    }

    /// What was claimed is delivered.
    ///
    /// # Errors
    /// The database refuses.
    pub async fn finish_claimed(&mut self) -> anyhow::Result<()> {
        self.outside
            .run("UPDATE outbox SET state = 'delivered', revision = revision + 1 WHERE state = 'sending'")
            .await
            .context("finishing what was claimed")
    }

    /// Lets the database go.
    pub async fn close(self) {
        self.store.close().await;
    }

    fn settings() -> anyhow::Result<ClaimSettings> {
        Ok(ClaimSettings {
            node: NODE.to_owned(),
            max_attempts: 5,
            max_body_bytes: 32 * 1024,
            limit: i64::try_from(DESTINATIONS)?,
            allowances: Allowances::UNLIMITED,
        })
    }
}
