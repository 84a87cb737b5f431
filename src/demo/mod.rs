//! `ucwa-relay demo`: simulator and relay in one process, with lively traffic both ways, and a reckoning at the end.
//!
//! The relay speaks to the simulator over real HTTP on loopback and keeps its archive in a real file, which anybody
//! can query and insert into while it runs.

pub mod reckoning;

use std::{
    io::{IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use rand::{RngExt, seq::IndexedRandom};
use tokio::time::Instant;

use self::reckoning::Reckoning;
use crate::{
    cli::DemoOptions,
    config::Config,
    relay::{Relay, on_actix, wait_for_signal},
    secrets::Sealer,
    simulator::{Simulator, SimulatorSettings, TrafficSettings},
    store::{
        AccountState, Auth, HistoryFilter, NewAccount, NewOutboxRow, OutboxFilter, OutboxState, SecretSource,
        Store, StoreError,
    },
};

/// Share of the traffic that goes through the outbox; the rest comes from the simulator's correspondents.
const OUTGOING_SHARE: f64 = 0.4;
/// How long what is under way may take to settle once the traffic has stopped.
const SETTLE_WITHIN: Duration = Duration::from_secs(90);
/// How long nothing may happen before everything counts as settled.
const QUIET_FOR: Duration = Duration::from_secs(2);

/// Runs the demo until it is interrupted or its time is over. Fails if anything was lost, misdelivered or doubled,
/// or came to no end.
pub fn run(options: &DemoOptions) -> anyhow::Result<()> {
    on_actix(demonstrate(options))
}

async fn demonstrate(options: &DemoOptions) -> anyhow::Result<()> {
    let url = match &options.database {
        Some(url) => url.clone(),
        None => format!("sqlite://{}", new_file_name(Path::new("."))?.display()),
    };
    let simulator = Simulator::start(SimulatorSettings {
        accounts: options.accounts.get(),
        traffic: None,
        ..SimulatorSettings::default()
    })
    .await
    .context("the simulator could not be started")?;
    let config = config_for(&simulator, url)?;
    let relay = Relay::start(&config).await?;
    let admin = relay.answer_admin(&config.admin).await?;
    let accounts = simulator.account_uris();
    add_accounts(relay.store.as_ref(), &config, &accounts).await?;
    introduce(&config, &accounts, options, admin.url());

    simulator.start_traffic(Some(TrafficSettings {
        messages_per_second: options.rate * (1.0 - OUTGOING_SHARE),
        ..TrafficSettings::default()
    }));
    let began = Instant::now();
    let ending = async {
        match options.duration {
            Some(duration) => {
                tokio::select! {
                    () = tokio::time::sleep(duration) => Ok(()),
                    signal = wait_for_signal() => signal,
                }
            }
            None => wait_for_signal().await,
        }
    };
    tokio::select! {
        ended = ending => ended?,
        failed = write_outbox(relay.store.as_ref(), &accounts, options.rate * OUTGOING_SHARE) => failed?,
        failed = show_counts(relay.store.as_ref(), &simulator, began) => failed?,
    }

    println!("\nstopping the traffic and waiting until everything under way is settled ...");
    simulator.stop_traffic();
    let settled = settle(relay.store.as_ref(), &simulator).await?;
    let ledger = simulator.ledger();
    let archive = relay.store.history(&everything()).await?;
    let outbox =
        relay.store.outbox_rows(&OutboxFilter { limit: i64::MAX, ..OutboxFilter::default() }).await?;
    admin.stop().await;
    relay.stop().await;
    simulator.shutdown().await;

    let reckoning = Reckoning::compare(&ledger, &archive, &outbox);
    print!("{}", table(&reckoning));
    for (name, lines) in [
        ("unsettled", &reckoning.unsettled),
        ("lost", &reckoning.lost),
        ("duplicated", &reckoning.duplicated),
    ] {
        for line in lines {
            println!("{name}: {line}");
        }
    }
    verdict(&reckoning, settled)
}

/// Whether the demo has shown what it is to show.
fn verdict(reckoning: &Reckoning, settled: bool) -> anyhow::Result<()> {
    anyhow::ensure!(
        reckoning.is_clean(),
        "{} messages were lost or misdelivered and {} duplicated; please report this with the lines above",
        reckoning.lost.len(),
        reckoning.duplicated.len()
    );
    anyhow::ensure!(
        settled && reckoning.unsettled.is_empty(),
        "not everything was settled within {} s: {} rows of outbox have come to no end",
        SETTLE_WITHIN.as_secs(),
        reckoning.unsettled.len()
    );
    Ok(())
}

/// A file name that is not taken.
fn new_file_name(folder: &Path) -> anyhow::Result<PathBuf> {
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
    (0..100)
        .map(|number| {
            let suffix = if number == 0 { String::new() } else { format!("-{number}") };
            folder.join(format!("ucwa-relay-demo-{stamp}{suffix}.db"))
        })
        .find(|path| !path.exists())
        .map(|path| path.strip_prefix(".").map_or(path.clone(), Path::to_owned))
        .context("no free file name for the demo's database")
}

/// The configuration of a relay that signs in at the simulator.
fn config_for(simulator: &Simulator, database_url: String) -> anyhow::Result<Config> {
    let mut config = Config::default();
    config.database.url = database_url;
    config.server.discovery_url = Some(simulator.discovery_url().parse().context("the simulator's address")?);
    config.server.allow_http = true;
    config.admin.listen = free_admin_address(config.admin.listen);
    if let Some(path) = config.database.sqlite_path() {
        config.secrets.key_file = Some(path.with_extension("key"));
    }
    Ok(config)
}

/// The usual address, or any free port if something listens there already.
fn free_admin_address(usual: SocketAddr) -> SocketAddr {
    match std::net::TcpListener::bind(usual) {
        Ok(_) => usual,
        Err(_) => SocketAddr::new(usual.ip(), 0),
    }
}

async fn add_accounts(store: &dyn Store, config: &Config, accounts: &[String]) -> anyhow::Result<()> {
    let sealer = Sealer::load_or_create(&config.key_file())?;
    let password = SimulatorSettings::default().password.into();
    for uri in accounts {
        let sip_uri: crate::identifiers::SipUri = uri.parse()?;
        let added = store
            .add_account(&NewAccount {
                username: sip_uri.address().to_owned(),
                auth: Auth::Password,
                secret: SecretSource::Sealed(sealer.seal(&sip_uri, &password)),
                invitations: None,
                sip_uri,
            })
            .await;
        match added {
            Ok(_) | Err(StoreError::AlreadyExists(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn introduce(config: &Config, accounts: &[String], options: &DemoOptions, admin: Option<&str>) {
    let database = config
        .database
        .sqlite_path()
        .map_or_else(|| config.database.shown_url().clone(), |path| path.display().to_string());
    let account = accounts.first().map_or("sip:user0001@contoso.example", String::as_str);
    println!(
        "ucwa-relay demo: {} accounts at a simulated Skype for Business Server, about {} messages a second\n\
         database: {database}\n\
         {}\n\
         try, in another terminal, while it runs:\n\
         \x20 sqlite3 {database} \"SELECT sent_at, account, direction, sender, body FROM message_history ORDER BY message_id DESC LIMIT 5\"\n\
         \x20 sqlite3 {database} \"INSERT INTO outbox (account, recipients, body) VALUES ('{account}', 'sip:echo@fabrikam.example', 'Hello from SQL')\"\n\
         \x20 sqlite3 {database} \"SELECT id, state, last_error FROM outbox ORDER BY id DESC LIMIT 5\"\n\
         {}",
        options.accounts,
        options.rate,
        admin.map_or_else(
            || "no admin page: its address is taken".to_owned(),
            |url| format!("metrics and health: {url}metrics and {url}readyz")
        ),
        if options.duration.is_some() { "" } else { "Ctrl-C ends it with a reckoning\n" },
    );
}

/// What the demo's accounts have to say.
const SAYINGS: [&str; 8] = [
    "Deploy finished",
    "Build is green ✅",
    "الخادم يعمل مرة أخرى",
    "השרת חזר לפעול",
    "100 % of 3+4 = 7 & more <ok>",
    "ディスクの空き容量が少なくなっています",
    "Zażółć gęślą jaźń 🦢",
    "Two lines:\nand the second",
];

/// Inserts rows as other programs would, at a rate; ends only on an error.
async fn write_outbox(store: &dyn Store, accounts: &[String], rate: f64) -> anyhow::Result<()> {
    let mut number = 0_u64;
    loop {
        if rate <= 0.0 || accounts.is_empty() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_secs_f64((1.0 / rate) * rand::rng().random_range(0.2..1.8))).await;
        number += 1;
        let html = number.is_multiple_of(7);
        let (account, saying, friend) = {
            let mut random = rand::rng();
            (
                accounts.choose(&mut random).cloned().unwrap_or_default(),
                SAYINGS.choose(&mut random).copied().unwrap_or_default(),
                random.random_range(1..=4),
            )
        };
        let recipient = match number % 5 {
            0 => format!("echo{friend}@fabrikam.example"),
            1 => format!("html{friend}@fabrikam.example"),
            _ => format!("friend{friend}@fabrikam.example"),
        };
        store
            .enqueue(&NewOutboxRow {
                account,
                recipients: recipient,
                body: if html {
                    format!("<b>{}</b> <i>#{number}</i>", saying.replace('&', "&amp;").replace('<', "&lt;"))
                } else {
                    format!("{saying} #{number}")
                },
                content_type: html.then(|| "text/html".to_owned()),
                ..NewOutboxRow::default()
            })
            .await?;
    }
}

/// Prints one line of live counts; ends only on an error.
async fn show_counts(store: &dyn Store, simulator: &Simulator, began: Instant) -> anyhow::Result<()> {
    let terminal = std::io::stdout().is_terminal();
    loop {
        tokio::time::sleep(if terminal { Duration::from_secs(1) } else { Duration::from_secs(5) }).await;
        let overview = store.account_overview(None).await?;
        let online = overview.iter().filter(|account| account.state == AccountState::Online.as_str()).count();
        let archived: i64 = overview.iter().map(|account| account.messages_today).sum();
        let queue = store.outbox_counts().await?;
        let count = |states: &[OutboxState]| -> i64 {
            states.iter().filter_map(|state| queue.get(state.as_str())).sum()
        };
        let counters = simulator.counters();
        let line = format!(
            "{:>4} s  online {online}/{}  server: {} in, {} out  archived {archived}  outbox: {} waiting, {} sent, {} failed",
            began.elapsed().as_secs(),
            overview.len(),
            counters.incoming,
            counters.outgoing,
            count(&[OutboxState::Queued, OutboxState::Sending]),
            count(&[OutboxState::Sent, OutboxState::Delivered]),
            count(&[OutboxState::Failed, OutboxState::Expired, OutboxState::Uncertain]),
        );
        if terminal {
            print!("\r\x1b[2K{line}");
            std::io::stdout().flush()?;
        } else {
            println!("{line}");
        }
    }
}

/// Waits until nothing is under way; false if that takes too long.
async fn settle(store: &dyn Store, simulator: &Simulator) -> anyhow::Result<bool> {
    let deadline = Instant::now() + SETTLE_WITHIN;
    let mut last_change = (simulator.counters(), Instant::now());
    while Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let counters = simulator.counters();
        let queue = store.outbox_counts().await?;
        let waiting: i64 = [OutboxState::Queued, OutboxState::Sending, OutboxState::Sent]
            .iter()
            .filter_map(|state| queue.get(state.as_str()))
            .sum();
        let settled = waiting == 0 && counters.incoming_pending == 0 && counters.outgoing_accepted == 0;
        if !settled || counters != last_change.0 {
            last_change = (counters, Instant::now());
        } else if last_change.1.elapsed() > QUIET_FOR {
            // Nobody answers any more, and what was delivered last had time to reach the database.
            return Ok(true);
        }
    }
    Ok(false)
}

fn everything() -> HistoryFilter {
    HistoryFilter { limit: i64::MAX, ..HistoryFilter::default() }
}

fn table(reckoning: &Reckoning) -> String {
    let mut text = String::from("\n");
    let sent = reckoning.delivered_to_accounts + reckoning.accepted_from_accounts;
    let archived = reckoning.archived_incoming + reckoning.archived_outgoing;
    for (name, count, meaning) in [
        ("sent", sent, "messages that the server delivered to accounts and accepted from them"),
        ("archived", archived, "rows of messages"),
        ("relayed", reckoning.relayed, "rows of outbox that were sent"),
        ("failed", reckoning.failed, "rows of outbox that failed or expired; last_error says why"),
        ("uncertain", reckoning.uncertain, "rows of outbox whose outcome nobody can tell"),
        ("unsettled", reckoning.unsettled.len(), "rows of outbox that came to no end in time"),
        ("lost", reckoning.lost.len(), ""),
        ("duplicated", reckoning.duplicated.len(), ""),
    ] {
        text.push_str(format!("{name:<12}{count:>8}  {meaning}").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_fails_unless_everything_came_to_a_good_end() {
        let good = Reckoning { relayed: 3, failed: 1, uncertain: 1, ..Reckoning::default() };
        assert!(verdict(&good, true).is_ok());
        assert!(verdict(&good, false).unwrap_err().to_string().contains("not everything was settled"));
        let line = || vec!["a line".to_owned()];
        assert!(verdict(&Reckoning { unsettled: line(), ..good.clone() }, true).is_err());
        assert!(verdict(&Reckoning { lost: line(), ..good.clone() }, true).is_err());
        assert!(verdict(&Reckoning { duplicated: line(), ..good.clone() }, true).is_err());
        let text = table(&good);
        assert!(
            text.contains("\nfailed             1  ") && text.contains("\nunsettled          0"),
            "{text}"
        );
    }
}
