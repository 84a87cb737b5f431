//! The whole server, wired up in one place: store, HTTP clients, accounts, outbox, in the order in which they depend
//! on each other; and taken down in the opposite order.

use std::{path::Path, sync::Arc, time::Duration};

use actix::prelude::*;
use anyhow::Context as _;
use futures_util::FutureExt;
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    account::{
        AccountEnvironment, AccountSettings, Directory,
        coordinator::Coordinator,
        gate::SignInGate,
        state_board::{CurrentStates, StateBoard},
        supervisor::{AccountSupervisor, StopAll},
    },
    admin::AdminServer,
    archive::retry::RetryPolicy,
    config::{AdminSection, Config, UncertainPolicy},
    descriptors::{self, Limits},
    outbox::{
        dispatcher::{self, Dispatcher},
        pace::Paces,
        pruning,
    },
    retention::schedule::Schedule,
    store::{self, Allowances, ClaimSettings, Role, SharedStore, Store},
    systemd,
    ucwa::{EventParameters, HttpClients, HttpSettings},
};

/// How long an orderly stop may take before the process ends anyway. Nothing is lost then; the next start settles it.
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// What a round of the event channel may take beyond its timeout: the answer's way, and a commit.
const POLL_MARGIN: Duration = Duration::from_secs(30);
/// Rows claimed at once.
const CLAIM_LIMIT: i64 = 500;

/// A running server.
pub struct Relay {
    /// The database.
    pub store: SharedStore,
    /// Who is signed in.
    pub directory: Directory,
    /// What each account of this process is doing.
    pub current_states: CurrentStates,
    supervisor: Addr<AccountSupervisor>,
    coordinator: Option<Coordinator>,
    stop: CancellationToken,
    dispatcher: JoinHandle<()>,
    pruning: JoinHandle<()>,
    retention: JoinHandle<()>,
    states: JoinHandle<()>,
}

impl Relay {
    /// Opens the database, declares the configured accounts and starts everything. Must run within an actix system.
    pub async fn start(config: &Config) -> anyhow::Result<Self> {
        Self::start_with(config, account_settings(config)).await
    }

    /// As [`Relay::start`], with accounts that behave so.
    pub(crate) async fn start_with(config: &Config, settings: AccountSettings) -> anyhow::Result<Self> {
        let store = store::connect(&config.store_settings(), Role::Server).await?;
        for declared in &config.accounts {
            store.declare_account(&declared.to_new_account()).await.with_context(|| {
                format!("account {} of the configuration could not be declared", declared.sip_uri)
            })?;
        }
        warn_of_few_descriptors(config, store.as_ref()).await?;
        let clients = HttpClients::new(&http_settings(config).await?)?;
        let node = config.cluster.node_id.clone();
        let (states, writing_states) = StateBoard::start(Arc::clone(&store), node.clone());
        let current_states = states.current();
        let directory = Directory::default();
        let environment = AccountEnvironment {
            store: Arc::clone(&store),
            clients,
            key_file: Arc::from(config.key_file().as_path()) as Arc<Path>,
            gate: SignInGate::new(
                usize::try_from(config.relay.accounts_online_at_once.get()).unwrap_or(usize::MAX),
                f64::from(config.relay.sign_in_rate.get()),
            ),
            states,
            directory: directory.clone(),
            settings: Arc::new(settings),
        };
        let supervisor = AccountSupervisor::new(environment).start();
        let coordinator =
            store.cluster().is_some().then(|| Coordinator::start(Arc::clone(&store), node.clone()));
        let stop = CancellationToken::new();
        let dispatcher = dispatcher::start(
            Dispatcher {
                store: Arc::clone(&store),
                directory: directory.clone(),
                claim: ClaimSettings {
                    node,
                    max_attempts: i64::from(config.outbox.max_attempts.get()),
                    max_body_bytes: config.outbox.max_body_bytes,
                    limit: CLAIM_LIMIT,
                    allowances: Allowances::UNLIMITED,
                },
                paces: Paces::new(config.outbox.per_account_rate),
                poll: config.outbox.poll(),
            },
            stop.clone(),
        );
        let pruning =
            tokio::spawn(pruning::run(Arc::clone(&store), config.outbox.keep_finished_days, stop.clone()));
        let schedule = Schedule {
            default_days: config.retention.default_days,
            node: config.cluster.node_id.clone(),
            key_file: config.seal_key_file(),
        };
        let retention = tokio::spawn(schedule.keep(Arc::clone(&store), stop.clone()));
        tracing::info!(node = %config.cluster.node_id, "ucwa-relay is running");
        Ok(Self {
            store,
            directory,
            current_states,
            supervisor,
            coordinator,
            stop,
            dispatcher,
            pruning,
            retention,
            states: writing_states,
        })
    }

    /// Starts the admin listener of this server.
    pub async fn answer_admin(&self, section: &AdminSection) -> anyhow::Result<AdminServer> {
        AdminServer::start(section, Arc::clone(&self.store), self.current_states.clone()).await
    }

    /// Stops in order: no new rows, sends that are out are finished, event channels end, each account is free for other
    /// nodes as soon as it has stopped, the database is closed. UCWA applications stay, so that the next start, or another
    /// node, resumes them.
    pub async fn stop(self) {
        let Self {
            store,
            directory: _,
            current_states: _,
            supervisor,
            coordinator,
            stop,
            dispatcher,
            pruning,
            retention,
            states,
        } = self;
        if let Some(coordinator) = &coordinator {
            coordinator.retire();
        }
        let in_order = async {
            stop.cancel();
            // It only ends by itself or by this; a panic in it was logged when it happened.
            let _ = dispatcher.await;
            let _ = pruning.await;
            let _ = retention.await;
            let (stopped, all_stopped) = oneshot::channel();
            if supervisor.send(StopAll(stopped)).await.is_ok() {
                let _ = all_stopped.await;
            }
            drop(supervisor);
            // Ends when the last account has dropped its handle, with every state written.
            let _ = states.await;
        };
        if tokio::time::timeout(STOP_WITHIN, in_order).await.is_err() {
            tracing::warn!("not everything stopped in time; what was under way is settled at the next start");
        }
        if let Some(coordinator) = coordinator {
            coordinator.end().await;
        }
        store.close().await;
    }
}

/// Says so where not every enabled account can get the connections that it needs. With several nodes each account counts
/// here, too: the others may be gone.
async fn warn_of_few_descriptors(config: &Config, store: &dyn Store) -> anyhow::Result<()> {
    let enabled = store.accounts().await?.iter().filter(|account| account.enabled).count();
    let needed = descriptors::needed(enabled, config.database.max_connections.get());
    let limits = Limits::current();
    if let Some(limit) = limits.soft.filter(|_| !limits.allow(needed)) {
        tracing::warn!(
            limit,
            needed,
            "the enabled accounts ({enabled}) may need up to {needed} file descriptors, and this process may have {limit}: \
             accounts beyond that can't sign in, and the database can't be opened; {}",
            descriptors::advice(needed)
        );
    }
    Ok(())
}

/// How accounts talk HTTP.
pub(crate) async fn http_settings(config: &Config) -> anyhow::Result<HttpSettings> {
    let extra_ca_pem = match &config.server.ca_file {
        Some(path) => Some(
            tokio::fs::read(path)
                .await
                .with_context(|| format!("server.ca_file {} can't be read", path.display()))?,
        ),
        None => None,
    };
    Ok(HttpSettings {
        extra_ca_pem,
        request_timeout: config.server.request_timeout,
        poll_margin: POLL_MARGIN,
        connect_timeout: Duration::from_secs(10),
        allow_http: config.server.allow_http,
    })
}

/// How accounts behave, as configured.
pub(crate) fn account_settings(config: &Config) -> AccountSettings {
    AccountSettings {
        discovery_url: config.server.discovery_url.clone(),
        trusted_domains: config.server.trusted_domains.clone(),
        allow_http: config.server.allow_http,
        round: config.server.poll_timeout + POLL_MARGIN,
        poll: EventParameters {
            low: Duration::from_secs(15),
            medium: Duration::from_secs(5),
            timeout: config.server.poll_timeout,
            priority: 0,
        },
        culture: config.relay.culture.clone(),
        presence: config.relay.presence.as_str().to_owned(),
        invitations: config.relay.invitations,
        idle_conversation: config.relay.idle_conversation,
        settle_after: config.outbox.settle_after,
        retry_uncertain: config.outbox.uncertain == UncertainPolicy::Retry,
        max_attempts: i64::from(config.outbox.max_attempts.get()),
        retry: RetryPolicy { base: config.outbox.retry_base, cap: config.outbox.retry_max },
        node: config.cluster.node_id.clone(),
    }
}

/// Runs the server until it is interrupted or terminated: a first signal stops it in order, a second one at once. Fails
/// if the database can be written no more: whoever supervises the process starts it anew.
pub fn run(config: &Config) -> anyhow::Result<()> {
    if let Err(error) = descriptors::raise() {
        tracing::warn!(%error, "the limit of file descriptors can't be raised to what this process is allowed");
    }
    on_actix(async {
        let relay = Relay::start(config).await?;
        // Whoever hears that it answers may ask it to stop in order.
        let signal = signals()?;
        let admin = match relay.answer_admin(&config.admin).await {
            Ok(admin) => admin,
            Err(error) => {
                relay.stop().await;
                return Err(error);
            }
        };
        let watchdog = systemd::ready(Arc::clone(&relay.store));
        let ended = until_ended(signal.map(Ok), relay.store.broken()).await;
        if ended.is_ok() {
            tracing::info!("stopping; a second signal stops at once");
        }
        systemd::stopping();
        if let Some(watchdog) = watchdog {
            // An orderly stop has a time limit of its own.
            watchdog.abort();
        }
        let stop = async {
            admin.stop().await;
            relay.stop().await;
        };
        tokio::select! {
            () = stop => ended,
            again = wait_for_signal() => ended.and(again),
        }
    })
}

/// What ends the server.
async fn until_ended(
    signal: impl Future<Output = anyhow::Result<()>>,
    broken: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    tokio::select! {
        signal = signal => signal,
        () = broken => Err(anyhow::anyhow!(
            "an internal error has ended the database's writer, so nothing more can be archived or sent; the log \
             says more. Start the server again, and please report it"
        )),
    }
}

/// Runs a future on an actix system over a tokio runtime with a worker for each core.
///
/// # Panics
/// If the system has no thread or file descriptor left for the runtime.
pub fn on_actix<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let system = System::with_tokio_rt(|| {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .expect("the system gives threads and an event queue to a program that has just started")
    });
    system.block_on(future)
}

/// Waits for SIGINT or SIGTERM.
pub async fn wait_for_signal() -> anyhow::Result<()> {
    signals()?.await;
    Ok(())
}

/// Listens for SIGINT and SIGTERM from now on; the first one ends the future.
fn signals() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT can't be listened for")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be listened for")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn a_broken_store_is_an_error_and_a_signal_is_not() {
        assert!(until_ended(ready(Ok(())), pending()).await.is_ok());
        let broken = until_ended(pending(), ready(())).await.unwrap_err().to_string();
        assert!(broken.contains("Start the server again"), "{broken}");
    }
}
