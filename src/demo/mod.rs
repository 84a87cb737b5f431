//! `ucwa-relay demo`: simulator and relay in one process, with lively traffic both ways, and a reckoning at the end.
//!
//! The relay speaks to the simulator over real HTTP on loopback and keeps its archive in a real file, which anybody
//! can query and insert into while it runs. With `--chaos` faults strike at random meanwhile; before the reckoning they
//! are switched off.

pub mod reckoning;

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::time::Instant;

use self::reckoning::Reckoning;
use crate::{
    cli::DemoOptions,
    config::Config,
    relay::{Relay, on_actix, wait_for_signal},
    secrets::Sealer,
    simulator::{ChaosSettings, Simulator, SimulatorSettings, TrafficSettings},
    store::{
        AccountState, Auth, HistoryFilter, NewAccount, NewOutboxRow, OutboxFilter, OutboxState, SecretSource,
        Store, StoreError,
    },
};

/// Share of the traffic that goes through the outbox; the rest comes from the simulator's correspondents.
const OUTGOING_SHARE: f64 = 0.4;
/// How long what is under way may take to settle once the traffic has stopped.
const SETTLE_WITHIN: Duration = Duration::from_secs(90);
/// The same after faults: what became of a lost answer is waited for longer, and accounts may have to come back.
const SETTLE_AFTER_CHAOS_WITHIN: Duration = Duration::from_secs(240);
/// How long the delivery report of an accepted message is waited for after faults, one of which may have destroyed it.
const REPORT_AFTER_CHAOS_WITHIN: Duration = Duration::from_secs(70);
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
    let seed = options.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    let simulator = Simulator::start(SimulatorSettings {
        accounts: options.accounts.get(),
        traffic: None,
        seed,
        ..SimulatorSettings::default()
    })
    .await
    .context("the simulator could not be started")?;
    let config = config_for(&simulator, url, options.chaos)?;
    let relay = Relay::start(&config).await?;
    let admin = relay.answer_admin(&config.admin).await?;
    let accounts = simulator.account_uris();
    add_accounts(relay.store.as_ref(), &config, &accounts).await?;
    introduce(&config, &accounts, options, admin.url(), seed);

    simulator.start_traffic(Some(TrafficSettings {
        messages_per_second: options.rate * (1.0 - OUTGOING_SHARE),
        ..TrafficSettings::default()
    }));
    if options.chaos {
        simulator.start_chaos(ChaosSettings { seed, faults_per_second: faults_per_second(options) });
    }
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
        failed = write_outbox(relay.store.as_ref(), &accounts, options.rate * OUTGOING_SHARE, seed) => failed?,
        failed = show_counts(relay.store.as_ref(), &simulator, began) => failed?,
    }

    println!("\nstopping the traffic and waiting until everything under way is settled ...");
    simulator.stop_traffic();
    simulator.stop_chaos();
    let (limit, report_within) = if options.chaos {
        (SETTLE_AFTER_CHAOS_WITHIN, REPORT_AFTER_CHAOS_WITHIN)
    } else {
        (SETTLE_WITHIN, SETTLE_WITHIN)
    };
    let settled = settle(relay.store.as_ref(), &simulator, limit, report_within).await?;
    let faults = simulator.faults_struck();
    let ledger = simulator.ledger();
    let archive = relay.store.history(&everything()).await?;
    let outbox =
        relay.store.outbox_rows(&OutboxFilter { limit: i64::MAX, ..OutboxFilter::default() }).await?;
    admin.stop().await;
    relay.stop().await;
    simulator.shutdown().await;

    let mut reckoning = Reckoning::compare(&ledger, &archive, &outbox);
    if !options.chaos {
        // Nothing has destroyed reports, or conversations with texts still to be fetched.
        reckoning.unsettled.append(&mut reckoning.unreported);
        reckoning.lost.append(&mut reckoning.withdrawn);
    }
    print!("{}", table(&reckoning));
    if options.chaos {
        println!("{}", faults_in_words(&faults));
    }
    for (name, lines) in [
        ("unsettled", &reckoning.unsettled),
        ("lost", &reckoning.lost),
        ("duplicated", &reckoning.duplicated),
        ("out of order", &reckoning.out_of_order),
    ] {
        for line in lines {
            println!("{name}: {line}");
        }
    }
    verdict(&reckoning, settled.then_some(()).ok_or(limit))
}

/// Enough for each account to meet one every few seconds, and not so many that nothing gets through.
fn faults_per_second(options: &DemoOptions) -> f64 {
    let accounts = u32::try_from(options.accounts.get()).unwrap_or(u32::MAX);
    (f64::from(accounts) / 5.0).clamp(2.0, 20.0)
}

/// How many faults have struck, by what they are like.
fn faults_in_short(struck: &BTreeMap<&'static str, u64>) -> String {
    let mut groups: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, count) in struck {
        let group = match *name {
            "cut_before" | "cut_after" | "cut_midway" => "cut",
            "delay" | "delay_after" => "late",
            "status" | "redirect" => "refused",
            "expired_token" => "token expired",
            "application_not_found" | "inactive_application_expired" | "too_many_applications" => {
                "session lost"
            }
            "truncated_xml" | "malformed_xml" | "invalid_utf8" | "doctype" | "huge_body" | "endless_body"
            | "wrong_content_type" => "spoilt",
            _ => "events muddled",
        };
        *groups.entry(group).or_default() += count;
    }
    let all: u64 = groups.values().sum();
    let groups: Vec<String> = groups.iter().map(|(group, count)| format!("{count} {group}")).collect();
    format!("faults: {all}{}{}", if groups.is_empty() { "" } else { " = " }, groups.join(" + "))
}

/// How many faults have struck, the most frequent kinds first.
fn faults_in_words(struck: &BTreeMap<&'static str, u64>) -> String {
    let mut kinds: Vec<_> = struck.iter().collect();
    kinds.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), **name));
    let all: u64 = struck.values().sum();
    let kinds: Vec<String> = kinds.iter().map(|(name, count)| format!("{name} {count}")).collect();
    format!("{:<12}{all:>8}  {}", "faults", kinds.join(", "))
}

/// Whether the demo has shown what it is to show. `settled` holds how long it was waited for in vain.
fn verdict(reckoning: &Reckoning, settled: Result<(), Duration>) -> anyhow::Result<()> {
    anyhow::ensure!(
        reckoning.is_clean(),
        "{} messages were lost or misdelivered, {} duplicated and {} sent out of order; please report this with the \
         lines above",
        reckoning.lost.len(),
        reckoning.duplicated.len(),
        reckoning.out_of_order.len()
    );
    if let Err(limit) = settled {
        anyhow::bail!(
            "not everything was settled within {} s: {} rows of outbox have come to no end",
            limit.as_secs(),
            reckoning.unsettled.len()
        );
    }
    anyhow::ensure!(
        reckoning.unsettled.is_empty(),
        "{} rows of outbox have come to no end",
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
fn config_for(simulator: &Simulator, database_url: String, chaos: bool) -> anyhow::Result<Config> {
    let mut config = Config::default();
    config.database.url = database_url;
    config.server.discovery_url = Some(simulator.discovery_url().parse().context("the simulator's address")?);
    config.server.allow_http = true;
    config.admin.listen = free_admin_address(config.admin.listen);
    if chaos {
        // Whoever looks on does not wait for minutes until a second attempt.
        config.outbox.retry_base = Duration::from_secs(1);
        config.outbox.retry_max = Duration::from_secs(10);
        config.outbox.settle_after = Duration::from_secs(6);
    }
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

fn introduce(config: &Config, accounts: &[String], options: &DemoOptions, admin: Option<&str>, seed: u64) {
    let (database, shell) = match config.database.sqlite_path() {
        Some(path) => (path.display().to_string(), format!("sqlite3 {}", path.display())),
        // psql asks for a password where one is needed.
        None => (config.database.shown_url(), format!("psql {} -c", config.database.url_without_password())),
    };
    let account = accounts.first().map_or("sip:user0001@contoso.example", String::as_str);
    println!(
        "ucwa-relay demo: {} accounts at a simulated Skype for Business Server, about {} messages a second\n\
         database: {database}\n\
         {}\n\
         try, in another terminal, while it runs:\n\
         \x20 {shell} \"SELECT sent_at, account, direction, sender, body FROM message_history ORDER BY message_id DESC LIMIT 5\"\n\
         \x20 {shell} \"INSERT INTO outbox (account, recipients, body) VALUES ('{account}', 'sip:echo@fabrikam.example', 'Hello from SQL')\"\n\
         \x20 {shell} \"SELECT id, state, last_error FROM outbox ORDER BY id DESC LIMIT 5\"\n\
         {}{}",
        options.accounts,
        options.rate,
        admin.map_or_else(
            || "no admin page: its address is taken".to_owned(),
            |url| format!("metrics and health: {url}metrics and {url}readyz")
        ),
        if options.chaos {
            format!("faults strike at random; --seed {seed} makes the same ones again\n")
        } else {
            String::new()
        },
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
async fn write_outbox(store: &dyn Store, accounts: &[String], rate: f64, seed: u64) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut number = 0_u64;
    loop {
        if rate <= 0.0 || accounts.is_empty() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_secs_f64((1.0 / rate) * random.random_range(0.2..1.8))).await;
        number += 1;
        let html = number.is_multiple_of(7);
        let account = accounts.choose(&mut random).cloned().unwrap_or_default();
        let saying = SAYINGS.choose(&mut random).copied().unwrap_or_default();
        let friend = random.random_range(1..=4);
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
    let mut told = false;
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
        let faults = simulator.chaos_is_running().then(|| faults_in_short(&simulator.faults_struck()));
        if terminal {
            // Over what was printed last: the faults have a line of their own below.
            let up = if faults.is_some() && told { "\x1b[1A" } else { "" };
            print!("\r{up}\x1b[2K{line}");
            if let Some(faults) = &faults {
                print!("\n\x1b[2K{faults}");
            }
            told = true;
            std::io::stdout().flush()?;
        } else {
            println!("{line}{}", faults.map(|faults| format!("  {faults}")).unwrap_or_default());
        }
    }
}

/// Waits until nothing is under way; false if that takes too long. Delivery reports that are still missing when nothing
/// else has happened for `report_within` do not come any more.
async fn settle(
    store: &dyn Store,
    simulator: &Simulator,
    limit: Duration,
    report_within: Duration,
) -> anyhow::Result<bool> {
    let deadline = Instant::now() + limit;
    let mut last_change = (simulator.counters(), 0, Instant::now());
    while Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let counters = simulator.counters();
        let queue = store.outbox_counts().await?;
        let count = |state: OutboxState| queue.get(state.as_str()).copied().unwrap_or_default();
        let waiting = count(OutboxState::Queued) + count(OutboxState::Sending);
        let unreported = count(OutboxState::Sent);
        let settled = waiting == 0 && counters.incoming_pending == 0 && counters.outgoing_accepted == 0;
        let quiet_for = if unreported == 0 { QUIET_FOR } else { report_within };
        if !settled || (counters, unreported) != (last_change.0, last_change.1) {
            last_change = (counters, unreported, Instant::now());
        } else if last_change.2.elapsed() > quiet_for {
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
        (
            "unreported",
            reckoning.unreported.len(),
            "rows of outbox that were sent, and whose delivery report was lost",
        ),
        ("unsettled", reckoning.unsettled.len(), "rows of outbox that came to no end in time"),
        (
            "withdrawn",
            reckoning.withdrawn.len(),
            "messages whose text the server gave up before it was fetched",
        ),
        ("lost", reckoning.lost.len(), ""),
        ("duplicated", reckoning.duplicated.len(), ""),
        (
            "disordered",
            reckoning.out_of_order.len(),
            "messages that were sent before one that was queued earlier",
        ),
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
        assert!(verdict(&good, Ok(())).is_ok());
        assert!(
            verdict(&good, Err(Duration::from_secs(90)))
                .unwrap_err()
                .to_string()
                .contains("not everything was settled")
        );
        let line = || vec!["a line".to_owned()];
        assert!(verdict(&Reckoning { unsettled: line(), ..good.clone() }, Ok(())).is_err());
        assert!(verdict(&Reckoning { lost: line(), ..good.clone() }, Ok(())).is_err());
        assert!(verdict(&Reckoning { duplicated: line(), ..good.clone() }, Ok(())).is_err());
        assert!(verdict(&Reckoning { out_of_order: line(), ..good.clone() }, Ok(())).is_err());
        let text = table(&good);
        assert!(
            text.contains("\nfailed             1  ") && text.contains("\nunsettled          0"),
            "{text}"
        );
    }
    #[test]
    fn faults_are_told_in_short_and_in_full() {
        let struck = BTreeMap::from([("cut_before", 2), ("cut_after", 3), ("resync", 1), ("status", 5)]);
        assert_eq!(faults_in_short(&struck), "faults: 11 = 5 cut + 1 events muddled + 5 refused");
        assert_eq!(faults_in_short(&BTreeMap::new()), "faults: 0");
        let words = faults_in_words(&struck);
        assert!(
            words.starts_with("faults")
                && words.ends_with("11  status 5, cut_after 3, cut_before 2, resync 1")
        );
    }
}
