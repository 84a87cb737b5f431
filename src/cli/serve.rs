//! `run`, `demo` and `simulate`: the commands that stay. Only their options are here, not their work.

use std::{net::SocketAddr, num::NonZeroUsize, time::Duration};

use anyhow::Context;
use clap::Args;

use crate::{
    config::{Config, parse_duration},
    relay::wait_for_signal,
    simulator::{Simulator, SimulatorSettings, TrafficSettings},
};

/// `demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Accounts to sign in
    #[arg(long, value_name = "N", default_value = "5")]
    pub accounts: NonZeroUsize,
    /// End by itself after so long (20s, 5m) [default: when interrupted]
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Messages a second, all accounts and both directions together
    #[arg(long, value_name = "R", default_value_t = 5.0, value_parser = rate)]
    pub rate: f64,
    /// Let faults strike at random: connections cut, answers lost or spoilt, tokens and applications gone, and more
    #[arg(long)]
    pub chaos: bool,
    /// Where all chance begins: the same seed makes the same faults and texts [default: another one each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Database to use [default: a new SQLite file in the working directory]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
}

/// `simulate`.
#[derive(Debug, Clone, Args)]
pub struct SimulateOptions {
    /// Where the simulated server answers
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8480")]
    pub listen: SocketAddr,
    /// Where the simulator is steered and its ledger is read [default: nowhere]
    #[arg(long, value_name = "ADDR")]
    pub admin_listen: Option<SocketAddr>,
    /// Accounts it knows: user0001@DOMAIN, user0002@DOMAIN, ...
    #[arg(long, value_name = "N", default_value = "10")]
    pub accounts: NonZeroUsize,
    /// Their SIP domain
    #[arg(long, default_value = "contoso.example")]
    pub domain: String,
    /// Their password; it protects nothing
    #[arg(long, default_value = "simulated")]
    pub password: String,
    /// Messages a second that its correspondents write, all together; 0 leaves them silent
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = rate)]
    pub rate: f64,
    /// Where all chance begins: the same seed makes the same correspondents
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// How long its tokens last
    #[arg(long, value_name = "DURATION", default_value = "8h", value_parser = parse_duration)]
    pub token_lifetime: Duration,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=100_000.0).contains(&rate) => Ok(rate),
        _ => Err("write a number of messages a second, like 5 or 0.5".into()),
    }
}

/// The server, until it is told to stop.
pub(super) fn run(config: &Config) -> anyhow::Result<()> {
    config.verify_secrets()?;
    for (key, waits_for) in config.without_effect() {
        tracing::warn!(key, "{key} has no effect in this version: it waits for {waits_for}");
    }
    crate::relay::run(config)
}

/// Simulator and relay together.
pub(super) fn demo(options: &DemoOptions) -> anyhow::Result<()> {
    crate::demo::run(options)
}

/// The simulator alone.
pub(super) fn simulate(options: SimulateOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listen = options.listen;
        let simulator = Simulator::start(SimulatorSettings {
            listen,
            admin_listen: options.admin_listen,
            accounts: options.accounts.get(),
            domain: options.domain,
            password: options.password,
            token_lifetime: options.token_lifetime,
            seed: options.seed,
            traffic: (options.rate > 0.0)
                .then(|| TrafficSettings { messages_per_second: options.rate, ..TrafficSettings::default() }),
            ..SimulatorSettings::default()
        })
        .await
        .with_context(|| format!("the simulator cannot listen on {listen}"))?;
        println!("server.discovery_url = \"{}\"", simulator.discovery_url());
        if let Some(admin) = simulator.admin_address() {
            println!("# ledger and control: http://{admin}/ledger");
        }
        println!("server.allow_http = true");
        for uri in simulator.account_uris().iter().take(3) {
            println!("# account: {uri}");
        }
        wait_for_signal().await?;
        simulator.shutdown().await;
        Ok(())
    })
}
