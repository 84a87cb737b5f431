//! What accounts cost that say nothing: memory and processor time of each, how soon all of them are online, and whether
//! that stays the same for each of them however many there are.
//!
//! An account that waits is a GET that hangs. So its memory is compared with what bare hanging GETs cost in the same run,
//! in a process of their own with the same HTTP client and nothing else ([`hang`]).

use std::{
    future::pending,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{Router, routing::get};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Url;
use tokio::{
    net::TcpListener,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    outside::{Database, Place},
    process,
    report::{Figure, Goal},
    stage::{Part, Stage, account, client},
};

/// Messages in a second while their cost is measured.
const RATE: u32 = 200;
/// Connections that are being opened at the same time.
const AT_ONCE: usize = 200;
/// How often is looked whether something has come about.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// Numbers of accounts, ascending: what the last ones add is what an account costs.
    pub(super) accounts: [usize; 3],
    /// How long nothing happens before anything is looked at.
    pub(super) quiet: Duration,
    /// For how long processor time is counted.
    pub(super) counted: Duration,
}

/// One number of accounts.
#[derive(Debug, Clone, Copy)]
struct Measured {
    accounts: f64,
    cold: Duration,
    resumed: Duration,
    memory: f64,
    idle_cpu: f64,
    cpu_of_a_message: f64,
}

/// Everything, on this database.
pub(super) async fn cost(database: &Database, extent: Extent) -> anyhow::Result<Vec<Figure>> {
    let mut measured = Vec::new();
    for accounts in extent.accounts {
        measured.push(measure(database, extent, accounts).await?);
    }
    let [few, some, many] = measured[..] else { anyhow::bail!("three numbers of accounts are measured") };
    anyhow::ensure!(
        few.cpu_of_a_message > 0.0,
        "messages took no processor time that could be told from none"
    );
    let bare = bare_get(extent).await?;
    let of_each =
        |more: Measured, less: Measured| (more.memory - less.memory) / (more.accounts - less.accounts);
    let memory = of_each(many, few);
    let accounts = many.accounts;
    let figure = |name: String, value, unit| Figure::new(name, value, unit).on(database.name());
    let beside = |what: &str, less: Measured| format!("{what} at {} accounts", less.accounts);
    Ok(vec![
        figure(format!("{accounts} accounts online after a cold start"), many.cold.as_secs_f64(), "s")
            .shall(Goal::AtMost(60.0)),
        figure(format!("{accounts} accounts resumed after a restart"), many.resumed.as_secs_f64(), "s")
            .shall(Goal::AtMost(30.0)),
        figure("memory of an idle account over HTTP/1.1".to_owned(), memory / 1e3, "KB"),
        figure("the same as a multiple of a bare hanging GET".to_owned(), memory / bare, "times")
            .beside(bare / 1e3, "KB of a bare GET")
            .shall(Goal::AtMost(1.3)),
        figure(format!("idle processor time with {accounts} accounts"), many.idle_cpu * 100.0, "% of a core")
            .shall(Goal::AtMost(3.0)),
        figure(
            "growth: memory of an account more".to_owned(),
            of_each(many, some) / of_each(some, few),
            "times",
        )
        .beside(
            of_each(some, few) / 1e3,
            format!("KB of each from {} to {} accounts", few.accounts, some.accounts),
        )
        .shall(Goal::AtMost(1.15)),
        figure(
            "growth: processor time of a message".to_owned(),
            many.cpu_of_a_message / few.cpu_of_a_message,
            "times",
        )
        .beside(few.cpu_of_a_message * 1e6, beside("us", few))
        .shall(Goal::AtMost(1.15)),
    ])
}

async fn measure(database: &Database, extent: Extent, accounts: usize) -> anyhow::Result<Measured> {
    let began = Instant::now();
    let mut stage = Stage::set_up(Place::new(database).await?, accounts, "").await?;
    let cold = stage.online_after().unwrap_or_else(|| began.elapsed());
    stage.stop_relay().await?;
    stage.start_relay()?;
    stage.all_online().await?;
    let resumed = stage.online_after().context("the relay was started")?;
    tokio::time::sleep(extent.quiet).await;
    let relay = stage.relay_id().context("the relay runs")?;
    let memory = process::memory(relay)?;
    let before = process::cpu_time(relay)?;
    tokio::time::sleep(extent.counted).await;
    let idle = process::cpu_time(relay)?.saturating_sub(before);
    let idle_cpu = idle.as_secs_f64() / extent.counted.as_secs_f64();
    let cpu_of_a_message = cost_of_a_message(&mut stage, extent, relay, idle_cpu).await?;
    stage.take_down().await?;
    #[expect(clippy::cast_precision_loss, reason = "numbers of accounts and bytes")]
    let (accounts, memory) = (accounts as f64, memory as f64);
    Ok(Measured { accounts, cold, resumed, memory, idle_cpu, cpu_of_a_message })
}

/// Seconds of processor time for each message, beyond what idling takes. Always as many accounts are written to, each in one
/// conversation, so that only the number of those who wait differs.
async fn cost_of_a_message(
    stage: &mut Stage,
    extent: Extent,
    relay: u32,
    idle_cpu: f64,
) -> anyhow::Result<f64> {
    let mut conversations = Vec::new();
    for number in 1..=extent.accounts[0] {
        conversations.push(stage.simulator.call("sip:lene@fabrikam.example", &account(number)).await?);
    }
    stage
        .until("every call is accepted", async |stage| {
            let mut said = true;
            for conversation in &conversations {
                said &= stage.simulator.say(conversation, "Is anybody there?").await?;
            }
            Ok(said)
        })
        .await?;
    // What was said until here is over and done with.
    tokio::time::sleep(extent.quiet).await;
    let (cpu, began) = (process::cpu_time(relay)?, Instant::now());
    let mut tick = interval(Duration::from_secs(1) / RATE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut messages = 0_u32;
    for conversation in conversations.iter().cycle() {
        if began.elapsed() >= extent.counted {
            break;
        }
        tick.tick().await;
        anyhow::ensure!(
            stage.simulator.say(conversation, "Still there?").await?,
            "a conversation ended while its messages were counted"
        );
        messages += 1;
    }
    let took = began.elapsed().as_secs_f64();
    let cpu = process::cpu_time(relay)?.saturating_sub(cpu).as_secs_f64();
    Ok((cpu - idle_cpu * took).max(0.0) / f64::from(messages.max(1)))
}

// ------------------------------------------------------------------------------------------------ bare GETs

/// Bytes of memory that a hanging GET takes.
async fn bare_get(extent: Extent) -> anyhow::Result<f64> {
    let [few, _, many] = extent.accounts;
    let (less, more) = (hanging(few, extent.quiet).await?, hanging(many, extent.quiet).await?);
    #[expect(clippy::cast_precision_loss, reason = "numbers of bytes and GETs")]
    let each = (more as f64 - less as f64) / (many - few) as f64;
    anyhow::ensure!(each > 0.0, "{many} hanging GETs take no more memory than {few}");
    Ok(each)
}

/// Memory of a process with so many hanging GETs.
async fn hanging(gets: usize, quiet: Duration) -> anyhow::Result<u64> {
    let arrived = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&arrived);
    let hangs = get(async move || {
        counter.fetch_add(1, SeqCst);
        pending::<()>().await;
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/hang", listener.local_addr()?);
    let server =
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/hang", hangs)).await });
    let folder = tempfile::tempdir()?;
    let gets_text = gets.to_string();
    let mut part =
        Part::start_quietly("gets", folder.path(), &["bench", "--hang", &url, "--gets", &gets_text])?;
    let deadline = Instant::now() + Duration::from_secs(300);
    while arrived.load(SeqCst) < gets {
        part.check()?;
        anyhow::ensure!(Instant::now() < deadline, "only {} of {gets} GETs came", arrived.load(SeqCst));
        tokio::time::sleep(LOOK_EVERY).await;
    }
    tokio::time::sleep(quiet).await;
    let memory = process::memory(part.id())?;
    drop(part);
    server.abort();
    Ok(memory)
}

/// Holds so many GETs on `url` that are never answered, until somebody ends this process.
pub async fn hang(url: Url, gets: usize) -> anyhow::Result<()> {
    crate::descriptors::raise().context("the limit of file descriptors can't be raised")?;
    let http = client()?;
    // Each is begun after some before it are on their way, as accounts sign in.
    let begun = stream::iter(0..gets)
        .map(|_| {
            let request = http.get(url.clone()).send();
            async { Ok::<_, anyhow::Error>(tokio::spawn(request)) }
        })
        .buffered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    for get in begun {
        get.await??;
    }
    writeln!(std::io::stderr(), "the server answered what it should let hang")?;
    Ok(())
}
