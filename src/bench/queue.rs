//! The queue: how soon a row is with the server, how many are in a second, and what a burst does to the others.
//!
//! A row counts as accepted when the simulated server entered it into its ledger, by its own clock, which is this
//! machine's: its time to answer is not in the figures.

use std::{collections::HashMap, time::Duration};

use anyhow::Context as _;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};

use super::{
    bare,
    outside::{Database, Outside, Place},
    process,
    report::{Figure, Goal, percentile, sorted},
    stage::{SimulatorPart, Stage, account},
};

/// Accounts whose rows are timed.
const TIMED_ACCOUNTS: usize = 20;
/// One row after so long at least and at most, of all accounts together: a low rate, in step with nobody's timer.
const INSERT_AFTER_MS: (u64, u64) = (20, 60);
/// Destinations of the burst.
const BURST_DESTINATIONS: usize = 100;
/// Accounts and destinations of each for the throughput: as many connections as their product.
const THROUGH: (usize, usize) = (20, 5);

/// How long the parts last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Rows timed in a row.
    pub(super) timed: usize,
    /// Rows of the burst beside them.
    pub(super) burst: usize,
    /// Rows sent for the throughput, for each destination.
    pub(super) through: usize,
    /// For how long bare requests are made.
    pub(super) bare: Duration,
}

/// Insert to accepted at a low rate, alone and beside a burst of another account.
pub(super) async fn latency(database: &Database, extent: Extent) -> anyhow::Result<Vec<Figure>> {
    // One more account, which makes the burst.
    let mut stage = Stage::set_up(Place::new(database).await?, TIMED_ACCOUNTS + 1, "").await?;
    let mut outside = stage.place.connect().await?;
    open_conversations(&mut stage, &mut outside, (1, TIMED_ACCOUNTS), 1).await?;
    let alone = timed(&mut stage, &mut outside, "alone", extent.timed).await?;
    let burst = TIMED_ACCOUNTS + 1;
    outside
        .insert_many("burst", (burst, burst), BURST_DESTINATIONS, extent.burst / BURST_DESTINATIONS)
        .await?;
    let beside = timed(&mut stage, &mut outside, "beside", extent.timed).await?;
    let waiting = outside.number("SELECT count(*) FROM outbox WHERE state = 'queued'").await?;
    anyhow::ensure!(waiting > 0, "the burst was over before the rows beside it were timed");
    stage.take_down().await?;
    let (p50, p99) = match database {
        Database::Sqlite(_) => (60.0, 120.0),
        Database::Postgres { .. } => (5.0, 15.0),
    };
    let figure = |name: &str, value| Figure::new(name, value, "ms").on(database.name());
    let during = |share: f64| {
        let (burst, alone) = (percentile(&beside, share), percentile(&alone, share));
        (burst / alone.max(0.001), alone)
    };
    let ratio = |name: &str, (ratio, alone): (f64, f64)| {
        Figure::new(name, ratio, "times").on(database.name()).beside(alone, "ms without the burst")
    };
    Ok(vec![
        figure("insert to accepted at a low rate, p50", percentile(&alone, 0.5)).shall(Goal::AtMost(p50)),
        figure("insert to accepted at a low rate, p99", percentile(&alone, 0.99)).shall(Goal::AtMost(p99)),
        ratio("the same during a burst of another account, p50", during(0.5)),
        ratio("the same during a burst of another account, p99", during(0.99)),
    ])
}

/// One row to each destination: afterwards every conversation is open.
async fn open_conversations(
    stage: &mut Stage,
    outside: &mut Outside,
    accounts: (usize, usize),
    destinations: usize,
) -> anyhow::Result<()> {
    outside.insert_many("open", accounts, destinations, 1).await?;
    all_finished(stage, outside).await
}

async fn all_finished(stage: &mut Stage, outside: &mut Outside) -> anyhow::Result<()> {
    const UNFINISHED: &str = "SELECT count(*) FROM outbox WHERE state IN ('queued', 'sending', 'sent')";
    stage.until("every row is delivered", async |_| Ok(outside.number(UNFINISHED).await? == 0)).await?;
    let other = outside.number("SELECT count(*) FROM outbox WHERE state <> 'delivered'").await?;
    anyhow::ensure!(other == 0, "{other} rows were not delivered: these figures are worth nothing");
    Ok(())
}

/// Inserts rows one by one; gives milliseconds from each commit until the server had the row, in ascending order.
async fn timed(
    stage: &mut Stage,
    outside: &mut Outside,
    name: &str,
    rows: usize,
) -> anyhow::Result<Vec<f64>> {
    let mut inserted: HashMap<String, Timestamp> = HashMap::new();
    let mut due = Instant::now();
    for row in 0..rows {
        sleep_until(due).await;
        due += Duration::from_millis(rand::random_range(INSERT_AFTER_MS.0..=INSERT_AFTER_MS.1));
        let body = format!("{name} {row}");
        let account = account(1 + row % TIMED_ACCOUNTS);
        outside.insert(&account, "silent.1@fabrikam.example", &body).await?;
        inserted.insert(body, Timestamp::now());
    }
    let mut latencies = Vec::new();
    let (inserted, latencies_of) = (&inserted, &mut latencies);
    stage
        .until("every timed row is accepted", async |stage| {
            let ledger = stage.simulator.ledger().await?;
            *latencies_of = ledger
                .outgoing
                .iter()
                .filter_map(|entry| Some((entry.time, inserted.get(&entry.text)?)))
                .map(|(accepted, inserted)| accepted.duration_since(*inserted).as_secs_f64() * 1000.0)
                .collect();
            Ok(latencies_of.len() == rows)
        })
        .await?;
    Ok(sorted(latencies))
}

/// Rows accepted in a second, beside the rate of bare requests over as many connections.
pub(super) async fn throughput(database: &Database, extent: Extent) -> anyhow::Result<Vec<Figure>> {
    let (accounts, destinations) = THROUGH;
    let bare = {
        let folder = tempfile::tempdir()?;
        let simulator = SimulatorPart::start(folder.path(), accounts).await?;
        bare::posts_per_second(&simulator, accounts, destinations, extent.bare).await?
    };
    // The queue itself is to be the limit.
    let configuration = "[outbox]\nper_account_rate = 1000000\n";
    let mut stage = Stage::set_up(Place::new(database).await?, accounts, configuration).await?;
    let mut outside = stage.place.connect().await?;
    open_conversations(&mut stage, &mut outside, (1, accounts), destinations).await?;

    let relay = stage.relay_id().context("the relay runs")?;
    let before = (process::cpu_time(relay)?, process::cpu_time(stage.simulator.id())?);
    let opened = stage.simulator.counters().await?.outgoing;
    let rows = accounts * destinations * extent.through;
    outside.insert_many("through", (1, accounts), destinations, extent.through).await?;
    let began = (Timestamp::now(), Instant::now());
    let wanted = opened + u64::try_from(rows)?;
    stage
        .until(
            "every row is accepted",
            async |stage| Ok(stage.simulator.counters().await?.outgoing >= wanted),
        )
        .await?;
    let accepted_within = last_accepted(&stage, "through ").await?.duration_since(began.0).as_secs_f64();
    all_finished(&mut stage, &mut outside).await?;
    let finished_within = began.1.elapsed().as_secs_f64();
    let after = (process::cpu_time(relay)?, process::cpu_time(stage.simulator.id())?);
    stage.take_down().await?;

    #[expect(clippy::cast_precision_loss, reason = "a number of rows")]
    let rows = rows as f64;
    let rate = rows / accepted_within;
    let per_row =
        |before: Duration, after: Duration| (after.saturating_sub(before)).as_secs_f64() * 1e6 / rows;
    let on = |figure: Figure| figure.on(database.name());
    let connections = accounts * destinations;
    Ok(vec![
        on(Figure::new("outbox rows accepted in a second", rate, "rows/s").shall(Goal::AtLeast(4000.0))),
        on(Figure::new("the same as a share of bare requests", rate / bare, "share")
            .beside(bare, format!("bare POSTs/s over {connections} connections"))
            .shall(Goal::AtLeast(0.5))),
        on(Figure::new("outbox rows delivered in a second", rows / finished_within, "rows/s")),
        on(Figure::new("processor time of the relay for a row", per_row(before.0, after.0), "us")
            .beside(per_row(before.1, after.1), "us of the simulator for it")),
    ])
}

async fn last_accepted(stage: &Stage, begins: &str) -> anyhow::Result<Timestamp> {
    let ledger = stage.simulator.ledger().await?;
    let accepted = ledger.outgoing.iter().filter(|entry| entry.text.starts_with(begins));
    accepted.map(|entry| entry.time).max().context("nothing was accepted")
}
