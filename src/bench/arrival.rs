//! Messages that come in: how soon each is in the database while the server brings many.
//!
//! The simulated server notes when a package of events leaves and when the request comes that acknowledges it, which the
//! relay makes only after the commit. So the time between holds reading, the commit, and both ways over loopback.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::{
    outside::{Database, Place},
    process,
    report::{Figure, Goal, percentile, sorted},
    stage::Stage,
};

/// Accounts that are written to.
const ACCOUNTS: usize = 100;
/// Messages that the simulator is asked for in a second.
const RATE: u32 = 500;

/// How long the parts last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Not counted: conversations begin, statements are prepared.
    pub(super) warm_up: Duration,
    /// Counted.
    pub(super) counted: Duration,
}

/// From the event to the commit at [`RATE`].
pub(super) async fn latency(database: &Database, extent: Extent) -> anyhow::Result<Vec<Figure>> {
    let mut stage = Stage::set_up(Place::new(database).await?, ACCOUNTS, "").await?;
    stage.simulator.post("/traffic", &json!({ "running": true, "messages_per_second": RATE })).await?;
    tokio::time::sleep(extent.warm_up).await;
    let relay = stage.relay_id().context("the relay runs")?;
    let before = (stage.simulator.counters().await?.incoming, process::cpu_time(relay)?);
    tokio::time::sleep(extent.counted).await;
    let after = (stage.simulator.counters().await?.incoming, process::cpu_time(relay)?);
    stage.simulator.post("/traffic", &json!({ "running": false })).await?;
    stage
        .until("every message is acknowledged", async |stage| {
            Ok(stage.simulator.counters().await?.incoming_pending == 0)
        })
        .await?;
    let ledger = stage.simulator.ledger().await?;
    let counted = usize::try_from(before.0)?..usize::try_from(after.0)?;
    let counted = ledger.incoming.get(counted).context("the ledger is shorter than it said")?;
    let took = counted.iter().filter_map(|entry| Some((entry.packaged_at?, entry.acknowledged_at?)));
    let took = took.map(|(left, came)| came.duration_since(left).as_secs_f64() * 1000.0);
    let took = sorted(took.collect());
    anyhow::ensure!(!took.is_empty(), "no message came");
    let mut outside = stage.place.connect().await?;
    let archived = outside.number("SELECT count(*) FROM messages WHERE direction = 'incoming'").await?;
    let acknowledged = stage.simulator.counters().await?.incoming_acknowledged;
    anyhow::ensure!(
        u64::try_from(archived)? >= acknowledged,
        "{archived} messages are archived and {acknowledged} acknowledged: these figures are worth nothing"
    );
    stage.take_down().await?;

    #[expect(clippy::cast_precision_loss, reason = "a number of messages")]
    let messages = took.len() as f64;
    let figure = |name: &str, value, unit| Figure::new(name, value, unit).on(database.name());
    let rate = messages / extent.counted.as_secs_f64();
    let spent = after.1.saturating_sub(before.1).as_secs_f64() * 1e6 / messages;
    let at = format!("while {RATE} messages come in a second");
    Ok(vec![
        figure(&format!("event to acknowledgement {at}, p50"), percentile(&took, 0.5), "ms")
            .shall(Goal::AtMost(3.0)),
        figure(&format!("event to acknowledgement {at}, p99"), percentile(&took, 0.99), "ms")
            .shall(Goal::AtMost(6.0)),
        figure("messages that came in a second meanwhile", rate, "messages/s"),
        figure("processor time of the relay for a message meanwhile", spent, "us"),
    ])
}
