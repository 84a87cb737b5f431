//! Owns every account of this process: starts one actor for each enabled row of `accounts` that this node holds, restarts
//! it with back-off when it ends, parks it when an operator has to act, and follows changes of the table and of the leases.
//!
//! An account that is to go to another node is stopped in order and then released; one whose lease is over is abandoned at
//! once, and nothing more is said about it anywhere. Either way its UCWA application stays for the node that holds it next.
//!
//! One account's end touches no other: each life is an actor of its own, and its end arrives here as a message with a
//! reason (guarantee G7).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::oneshot;

use crate::{
    account::{
        AccountEnvironment,
        actor::{AbandonAccount, AccountActor, AccountExited, ExitReason, StopAccount, end_open_session},
        backoff::Backoff,
    },
    identifiers::AccountId,
    metrics::{self, Restarted},
    secrets,
    store::{Account, AccountState, Leases, StoreError},
};

/// How soon a change of the table `accounts` is noticed.
const READ_ACCOUNTS_EVERY: Duration = Duration::from_secs(1);
/// How often `sessions` learns that event channels are being followed.
const RECORD_FOLLOWED_EVERY: Duration = Duration::from_secs(15);
/// How often event channels are looked at.
const WATCH_CHANNELS_EVERY: Duration = Duration::from_secs(5);
/// A life that was signed in for so long was healthy: the next failure starts from the shortest delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// Delays between lives.
const RESTART_BASE: Duration = Duration::from_secs(1);
const RESTART_CAP: Duration = Duration::from_secs(60);

/// Asks for an orderly end: every account stops, its application stays for the next start. Answered when all have
/// stopped.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopAll(pub oneshot::Sender<()>);

#[derive(Debug)]
enum Life {
    /// An actor runs.
    Running { address: Addr<AccountActor> },
    /// The next life begins at a time.
    Waiting(SpawnHandle),
    /// No life begins before the row changes.
    Parked,
    /// The actor was asked to stop; afterwards the row decides.
    Stopping { address: Addr<AccountActor> },
}

struct Supervised {
    row: Account,
    life: Life,
    /// Under which lease.
    epoch: i64,
    number: u64,
    backoff: Backoff,
}

/// See the module's documentation.
pub struct AccountSupervisor {
    environment: AccountEnvironment,
    leases: Leases,
    accounts: HashMap<AccountId, Supervised>,
    /// Lives begun so far.
    lives: u64,
    stopping: Option<oneshot::Sender<()>>,
    read_failing: bool,
    /// Lives whose event channel has not completed a round in time.
    stalled: HashSet<AccountId>,
}

impl AccountSupervisor {
    /// A supervisor that begins when it is started.
    pub fn new(environment: AccountEnvironment) -> Self {
        Self {
            leases: environment.store.leases(),
            environment,
            accounts: HashMap::new(),
            lives: 0,
            stopping: None,
            read_failing: false,
            stalled: HashSet::new(),
        }
    }

    fn read_accounts(&mut self, ctx: &mut Context<Self>) {
        let store = Arc::clone(&self.environment.store);
        ctx.spawn(async move { store.accounts().await }.into_actor(self).map(|accounts, supervisor, ctx| {
            supervisor.accounts_read(accounts, ctx);
            ctx.run_later(READ_ACCOUNTS_EVERY, Self::read_accounts);
        }));
    }

    fn accounts_read(&mut self, accounts: Result<Vec<Account>, StoreError>, ctx: &mut Context<Self>) {
        self.follow_leases(ctx);
        if self.stopping.is_some() {
            return;
        }
        let rows = match accounts {
            Ok(rows) => rows,
            Err(error) => {
                if !self.read_failing {
                    tracing::warn!(error = %crate::error_chain(&error), "the table accounts can't be read; going on with what is known");
                }
                self.read_failing = true;
                return;
            }
        };
        self.read_failing = false;
        let mut gone: Vec<AccountId> = self.accounts.keys().copied().collect();
        for row in rows {
            gone.retain(|id| *id != row.id);
            self.follow_row(row, ctx);
        }
        for id in gone {
            self.sign_out(id, "the account was removed", ctx);
        }
        // No life ever began of a row that can't be read, or that was removed at once.
        for id in self.leases.leaving() {
            if !self.accounts.contains_key(&id) {
                self.hand_over(id);
            }
        }
    }

    /// Lets go of accounts whose lease is over, and stops those that are to go to another node.
    fn follow_leases(&mut self, ctx: &mut Context<Self>) {
        let over: Vec<AccountId> = self
            .accounts
            .iter()
            .filter(|(id, supervised)| !self.leases.holds(**id, supervised.epoch))
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            let Some(supervised) = self.accounts.get(&id) else { continue };
            match &supervised.life {
                Life::Running { address } | Life::Stopping { address } => address.do_send(AbandonAccount),
                Life::Waiting(timer) => {
                    ctx.cancel_future(*timer);
                    self.lease_is_over(id);
                }
                Life::Parked => self.lease_is_over(id),
            }
        }
        for (id, supervised) in &mut self.accounts {
            if self.leases.is_leaving(*id)
                && let Life::Running { address } = &supervised.life
            {
                address.do_send(StopAccount { sign_out: None });
                supervised.life = Life::Stopping { address: address.clone() };
            }
        }
        let idle: Vec<AccountId> = self
            .accounts
            .iter()
            .filter(|(id, supervised)| {
                self.leases.is_leaving(**id)
                    && !matches!(supervised.life, Life::Running { .. } | Life::Stopping { .. })
            })
            .map(|(id, _)| *id)
            .collect();
        for id in idle {
            if let Some(Supervised { life: Life::Waiting(timer), .. }) = self.accounts.get(&id) {
                ctx.cancel_future(*timer);
            }
            self.hand_over(id);
        }
    }

    /// Nothing of the account runs here: another node may have it.
    fn hand_over(&mut self, id: AccountId) {
        tracing::info!(account.id = id.0, "the account has stopped here and goes to another node");
        self.accounts.remove(&id);
        self.environment.states.forget(id);
        self.leases.release(id, "another node is about to take the account over");
    }

    /// What becomes of the account is another's business, or that of a new lease.
    fn lease_is_over(&mut self, id: AccountId) {
        tracing::warn!(
            account.id = id.0,
            "the account's lease is over: its life here has ended, and nothing more is written or sent for it"
        );
        self.accounts.remove(&id);
        self.environment.states.forget(id);
    }

    /// Brings an account's life in line with its row.
    fn follow_row(&mut self, row: Account, ctx: &mut Context<Self>) {
        let id = row.id;
        let Some(epoch) = self.leases.epoch(id) else { return };
        match self.accounts.get_mut(&id) {
            None if !row.enabled => {
                // Not supervised; its state is published once, by whoever disabled it or at the first reading.
                self.environment.states.post(
                    id,
                    AccountState::Stopped,
                    Some("the account is disabled".to_owned()),
                );
                self.leases.release(id, "the account is disabled");
            }
            // Before its life here began.
            None if self.leases.is_leaving(id) => {}
            None => {
                self.accounts.insert(
                    id,
                    Supervised {
                        row,
                        life: Life::Parked,
                        epoch,
                        number: 0,
                        backoff: Backoff::new(RESTART_BASE, RESTART_CAP),
                    },
                );
                self.begin_life(id, ctx);
            }
            Some(_) if !row.enabled => self.sign_out(id, "the account was disabled", ctx),
            Some(supervised) if same_settings(&supervised.row, &row) => supervised.row = row,
            Some(supervised) => {
                tracing::info!(account.id = id.0, "the account's row changed; it signs in anew");
                supervised.row = row;
                supervised.backoff.reset();
                match &supervised.life {
                    Life::Running { address } => {
                        address.do_send(StopAccount { sign_out: None });
                        supervised.life = Life::Stopping { address: address.clone() };
                    }
                    Life::Waiting(timer) => {
                        ctx.cancel_future(*timer);
                        self.begin_life(id, ctx);
                    }
                    Life::Parked => self.begin_life(id, ctx),
                    Life::Stopping { .. } => {}
                }
            }
        }
    }

    fn sign_out(&mut self, id: AccountId, why: &str, ctx: &mut Context<Self>) {
        let Some(supervised) = self.accounts.get_mut(&id) else { return };
        supervised.row.enabled = false;
        match &supervised.life {
            Life::Running { address } => {
                address.do_send(StopAccount { sign_out: Some(why.to_owned()) });
                supervised.life = Life::Stopping { address: address.clone() };
            }
            Life::Waiting(timer) => {
                // Only a sign-in leads to the application that an earlier life left.
                ctx.cancel_future(*timer);
                self.begin_life(id, ctx);
                self.sign_out(id, why, ctx);
            }
            Life::Parked => {
                // Its credentials are refused or something else is wrong for good: the server expires the application.
                let (store, reason) = (Arc::clone(&self.environment.store), why.to_owned());
                let words = reason.clone();
                ctx.spawn(async move { end_open_session(&store, id, &reason).await }.into_actor(self).map(
                    move |(), supervisor, _| {
                        // It may have been enabled meanwhile.
                        let is_over = supervisor.accounts.get(&id).is_some_and(|supervised| {
                            !supervised.row.enabled && matches!(supervised.life, Life::Parked)
                        });
                        if is_over {
                            supervisor.forget(id, &words);
                        }
                    },
                ));
            }
            Life::Stopping { .. } => {}
        }
    }

    fn forget(&mut self, id: AccountId, why: &str) {
        self.accounts.remove(&id);
        self.environment.states.post(id, AccountState::Stopped, Some(why.to_owned()));
        self.leases.release(id, why);
        if self.leases.epoch(id).is_none() {
            // The release tells it.
            self.environment.states.forget(id);
        }
    }

    fn begin_life(&mut self, id: AccountId, ctx: &mut Context<Self>) {
        let Some(supervised) = self.accounts.get_mut(&id) else { return };
        self.lives += 1;
        supervised.number = self.lives;
        let address = AccountActor::new(
            self.environment.clone(),
            supervised.row.clone(),
            supervised.number,
            supervised.epoch,
            ctx.address().recipient(),
        )
        .start();
        supervised.life = Life::Running { address };
    }

    /// Waits and begins the next life.
    fn restart_after(&mut self, id: AccountId, delay: Duration, ctx: &mut Context<Self>) {
        let timer = ctx.run_later(delay, move |supervisor, ctx| supervisor.begin_life(id, ctx));
        if let Some(supervised) = self.accounts.get_mut(&id) {
            supervised.life = Life::Waiting(timer);
        }
    }

    fn count_restart(&self, id: AccountId, ctx: &mut Context<Self>) {
        metrics::count_restart(Restarted::Account);
        let store = Arc::clone(&self.environment.store);
        ctx.spawn(
            async move {
                if let Err(error) = store.record_restart(id).await {
                    tracing::warn!(account.id = id.0, error = %crate::error_chain(&error), "a restart was not counted");
                }
            }
            .into_actor(self),
        );
    }

    fn exited(&mut self, exited: &AccountExited, ctx: &mut Context<Self>) {
        let id = exited.account;
        let Some(supervised) = self.accounts.get_mut(&id) else { return };
        if supervised.number != exited.life {
            return;
        }
        if exited.online_for > HEALTHY_AFTER {
            supervised.backoff.reset();
        }
        let asked_to_stop = matches!(supervised.life, Life::Stopping { .. });
        supervised.life = Life::Parked;
        if !self.leases.holds(id, supervised.epoch) {
            self.lease_is_over(id);
            return;
        }
        if self.stopping.is_some() {
            self.forget(id, "the relay was stopped");
            return;
        }
        if !supervised.row.enabled {
            self.forget(id, "the account is disabled");
            return;
        }
        if self.leases.is_leaving(id) {
            self.hand_over(id);
            return;
        }
        if asked_to_stop {
            // Its row changed: begin with the new one.
            self.begin_life(id, ctx);
            return;
        }
        let delay = supervised.backoff.next_delay();
        let post = |state, detail: String| self.environment.states.post(id, state, Some(detail));
        match &exited.reason {
            ExitReason::Requested => self.restart_after(id, delay, ctx),
            ExitReason::Temporary(sentence, after) => {
                let delay = after.map_or(delay, |after| after.max(delay));
                tracing::warn!(
                    account.id = id.0,
                    reason = sentence,
                    delay_ms = delay.as_millis(),
                    "backing off"
                );
                post(
                    AccountState::BackingOff,
                    format!("{sentence}. The next attempt is at {}", shown_time_after(delay)),
                );
                self.restart_after(id, delay, ctx);
            }
            ExitReason::SessionLost(sentence) => {
                tracing::warn!(account.id = id.0, reason = sentence, "the session is taken up anew");
                post(AccountState::BackingOff, format!("{sentence}; signing in again"));
                self.count_restart(id, ctx);
                self.restart_after(id, delay, ctx);
            }
            ExitReason::Panicked => {
                tracing::error!(
                    account.id = id.0,
                    delay_ms = delay.as_millis(),
                    "the account panicked and is restarted"
                );
                post(
                    AccountState::BackingOff,
                    format!(
                        "an internal error stopped the account; it restarts at {}",
                        shown_time_after(delay)
                    ),
                );
                self.count_restart(id, ctx);
                self.restart_after(id, delay, ctx);
            }
            ExitReason::NeedsAttention(why, sentence, after) => {
                let cure = why.anchor();
                tracing::error!(account.id = id.0, reason = sentence, cure, "the account needs attention");
                let detail = match after {
                    Some(after) => {
                        format!(
                            "{sentence}. Tried again by itself at {}; see {cure} in docs/operations.md",
                            shown_time_after(*after)
                        )
                    }
                    None => format!(
                        "{sentence}. Nothing is tried until the account is changed (ucwa-relay account set-password {}); see \
                         {cure} in docs/operations.md",
                        supervised_uri(&self.accounts, id)
                    ),
                };
                post(AccountState::NeedsAttention, detail);
                if let Some(after) = after {
                    self.restart_after(id, *after, ctx);
                }
            }
            // It was fenced under a lease that is held again by now.
            ExitReason::Fenced => self.restart_after(id, delay, ctx),
        }
    }

    /// Publishes which accounts are `stalled`. Traffic is the proof of life: a round of the event channel takes at most
    /// its own timeout, whether or not there was anything to tell.
    fn watch_channels(&mut self) {
        let now = Timestamp::now();
        let round = self.environment.settings.round;
        let online = self.environment.directory.all();
        self.stalled.retain(|id| online.iter().any(|(online, _)| online == id));
        for (id, online) in online {
            let silent = now.duration_since(online.channel.answered_at());
            if is_stalled(silent, round) {
                let detail = format!(
                    "the event channel was last answered at {}; a round takes at most {} s. It is being asked again and \
                     again; if that lasts, look at the network and the server",
                    shown_time(online.channel.answered_at()),
                    round.as_secs()
                );
                self.stalled.insert(id);
                self.environment.states.post(id, AccountState::Stalled, Some(detail));
            } else if self.stalled.remove(&id) {
                self.environment.states.post(id, AccountState::Online, None);
            }
        }
    }

    fn record_followed(&self, ctx: &mut Context<Self>) {
        let sessions: Vec<_> = self
            .environment
            .directory
            .all()
            .into_iter()
            .filter(|(_, online)| !online.channel.is_failing())
            .map(|(_, online)| online.session)
            .collect();
        if sessions.is_empty() {
            return;
        }
        let store = Arc::clone(&self.environment.store);
        ctx.spawn(
            async move {
                if let Err(error) = store.record_followed(&sessions, Timestamp::now()).await
                    && !error.is_told_by_store()
                {
                    tracing::warn!(error = %crate::error_chain(&error), "sessions.followed_until could not be written");
                }
            }
            .into_actor(self),
        );
    }
}

/// Whether a channel that was last answered so long ago has failed to complete a round in time.
fn is_stalled(silent: SignedDuration, round: Duration) -> bool {
    Duration::try_from(silent).is_ok_and(|silent| silent > round)
}

fn supervised_uri(accounts: &HashMap<AccountId, Supervised>, id: AccountId) -> String {
    accounts.get(&id).map_or_else(String::new, |supervised| supervised.row.sip_uri.to_string())
}

/// Whether a life that was begun with one row need not be begun anew for the other.
fn same_settings(known: &Account, read: &Account) -> bool {
    known.sip_uri == read.sip_uri
        && known.username == read.username
        && known.auth == read.auth
        && secrets::is_same_password(&known.secret, &read.secret)
        && known.enabled == read.enabled
        && known.invitations == read.invitations
}

fn shown_time_after(delay: Duration) -> String {
    let at = Timestamp::now()
        .checked_add(SignedDuration::try_from(delay).unwrap_or_default())
        .unwrap_or(Timestamp::MAX);
    shown_time(at)
}

fn shown_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

impl Actor for AccountSupervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(1024);
        self.read_accounts(ctx);
        ctx.run_interval(RECORD_FOLLOWED_EVERY, |supervisor, ctx| supervisor.record_followed(ctx));
        ctx.run_interval(WATCH_CHANNELS_EVERY, |supervisor, _| supervisor.watch_channels());
    }
}

impl Handler<AccountExited> for AccountSupervisor {
    type Result = ();

    fn handle(&mut self, exited: AccountExited, ctx: &mut Self::Context) {
        self.exited(&exited, ctx);
        if self.accounts.is_empty()
            && let Some(stopped) = self.stopping.take()
        {
            // Whoever asked may have given up waiting.
            let _ = stopped.send(());
            ctx.stop();
        }
    }
}

impl Handler<StopAll> for AccountSupervisor {
    type Result = ();

    fn handle(&mut self, StopAll(stopped): StopAll, ctx: &mut Self::Context) {
        self.record_followed(ctx);
        let parked: Vec<AccountId> = self
            .accounts
            .iter()
            .filter(|(_, supervised)| matches!(supervised.life, Life::Parked | Life::Waiting(_)))
            .map(|(id, _)| *id)
            .collect();
        for id in parked {
            self.accounts.remove(&id);
            self.leases.release(id, "the relay was stopped");
        }
        for supervised in self.accounts.values_mut() {
            if let Life::Running { address } = &supervised.life {
                address.do_send(StopAccount { sign_out: None });
                supervised.life = Life::Stopping { address: address.clone() };
            }
        }
        if self.accounts.is_empty() {
            let _ = stopped.send(());
            ctx.stop();
        } else {
            self.stopping = Some(stopped);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        account::{
            AccountSettings,
            actor::tests::{Explode, HearOfMeetingLate},
        },
        config::{AdminSection, Config},
        relay::{Relay, account_settings},
        secrets::Sealer,
        simulator::{CallRequest, Simulator, SimulatorSettings},
        store::{Auth, HistoryFilter, NewAccount, SecretSource, Store},
    };

    async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
        let asking = async {
            loop {
                if let Some(answer) = ask().await {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), asking)
            .await
            .unwrap_or_else(|_| panic!("in vain: {what}"))
    }

    async fn relay(folder: &Path, simulator: &Simulator) -> Relay {
        relay_with(folder, simulator, |_| ()).await
    }

    async fn relay_with(
        folder: &Path,
        simulator: &Simulator,
        change: impl FnOnce(&mut AccountSettings),
    ) -> Relay {
        let mut config = Config::default();
        config.database.url = format!("sqlite://{}", folder.join("archive.db").display());
        config.server.discovery_url = Some(simulator.discovery_url().parse().unwrap());
        config.server.allow_http = true;
        let mut settings = account_settings(&config);
        change(&mut settings);
        let relay = Relay::start_with(&config, settings).await.unwrap();
        let sealer = Sealer::load_or_create(&config.key_file()).unwrap();
        for uri in simulator.account_uris() {
            let sip_uri: crate::identifiers::SipUri = uri.parse().unwrap();
            let account = NewAccount {
                username: sip_uri.address().to_owned(),
                auth: Auth::Password,
                secret: SecretSource::Sealed(sealer.seal(&sip_uri, &"simulated".into())),
                invitations: None,
                sip_uri,
            };
            relay.store.add_account(&account).await.unwrap();
        }
        relay
    }

    async fn online(store: &dyn Store, uri: &str) {
        let uri = uri.parse().unwrap();
        eventually("the account is online", async || {
            let overview = store.account_overview(Some(&uri)).await.unwrap();
            (overview[0].state == AccountState::Online.as_str()).then_some(())
        })
        .await;
    }

    async fn archived(relay: &Relay, uri: &str, simulator: &Simulator, text: &str) {
        let request = CallRequest {
            from: "silent.zoe@fabrikam.example".to_owned(),
            to_account: uri.to_owned(),
            text: Some(text.to_owned()),
            html: None,
            subject: String::new(),
        };
        eventually("the account takes a call", async || simulator.call(request.clone()).await.ok()).await;
        let filter =
            HistoryFilter { account: Some(uri.parse().unwrap()), limit: 100, ..HistoryFilter::default() };
        eventually("the call is archived", async || {
            let rows = relay.store.history(&filter).await.unwrap();
            rows.iter().any(|row| row.body == text).then_some(())
        })
        .await;
    }

    #[test]
    fn a_channel_is_stalled_once_a_round_takes_too_long() {
        let round = Duration::from_secs(210);
        assert!(!is_stalled(SignedDuration::from_secs(-5), round));
        assert!(!is_stalled(SignedDuration::from_secs(210), round));
        assert!(is_stalled(SignedDuration::from_secs(211), round));
    }

    #[actix_rt::test]
    async fn an_account_that_panics_is_restarted_and_the_others_never_notice() {
        let folder = tempfile::tempdir().unwrap();
        let simulator = Simulator::start(SimulatorSettings { accounts: 2, ..SimulatorSettings::default() })
            .await
            .unwrap();
        let relay = relay(folder.path(), &simulator).await;
        let (victim, other) = (simulator.account_uris()[0].clone(), simulator.account_uris()[1].clone());
        online(relay.store.as_ref(), &victim).await;
        online(relay.store.as_ref(), &other).await;
        let ids: HashMap<String, AccountId> = relay
            .store
            .accounts()
            .await
            .unwrap()
            .into_iter()
            .map(|account| (account.sip_uri.to_string(), account.id))
            .collect();
        let before = relay.directory.get(ids[&victim]).unwrap().address;
        let neighbour = relay.directory.get(ids[&other]).unwrap().address;

        assert!(before.send(Explode).await.is_err(), "the handler panicked");

        archived(&relay, &other, &simulator, "the neighbour works on").await;
        let restarted = eventually("the account lives again", async || {
            relay.directory.get(ids[&victim]).filter(|online| online.address != before)
        })
        .await;
        assert!(restarted.address.connected());
        assert!(!before.connected());
        assert_eq!(
            relay.directory.get(ids[&other]).unwrap().address,
            neighbour,
            "the neighbour's life goes on"
        );
        archived(&relay, &victim, &simulator, "and so does the account that panicked").await;
        let overview = relay.store.account_overview(None).await.unwrap();
        let restarts = |uri: &str| overview.iter().find(|account| account.account == uri).unwrap().restarts;
        assert_eq!((restarts(&victim), restarts(&other)), (1, 0));
        relay.stop().await;
        simulator.shutdown().await;
    }

    #[actix_rt::test]
    async fn a_meeting_that_is_heard_of_late_keeps_its_conversation() {
        let folder = tempfile::tempdir().unwrap();
        let simulator = Simulator::start(SimulatorSettings { accounts: 1, ..SimulatorSettings::default() })
            .await
            .unwrap();
        let relay = relay(folder.path(), &simulator).await;
        online(relay.store.as_ref(), &simulator.account_uris()[0]).await;
        let id = relay.store.accounts().await.unwrap().remove(0).id;
        let account = relay.directory.get(id).unwrap().address;
        assert!(account.send(HearOfMeetingLate).await.unwrap());
        relay.stop().await;
        simulator.shutdown().await;
    }

    /// The server is there, holds the connection and says nothing: no ping would notice.
    #[actix_rt::test]
    async fn an_account_that_hears_nothing_is_stalled_for_everybody_to_see_until_it_hears_something() {
        let folder = tempfile::tempdir().unwrap();
        let simulator = Simulator::start(SimulatorSettings { accounts: 2, ..SimulatorSettings::default() })
            .await
            .unwrap();
        // The simulator holds requests for much longer where nothing happens.
        let round = Duration::from_secs(3);
        let relay = relay_with(folder.path(), &simulator, |settings| settings.round = round).await;
        let (alice, bob) = (simulator.account_uris()[0].clone(), simulator.account_uris()[1].clone());
        let admin = AdminSection { listen: "127.0.0.1:0".parse().unwrap(), ..AdminSection::default() };
        let admin = relay.answer_admin(&admin).await.unwrap();
        let url = admin.url().unwrap().to_owned();
        let get =
            async |path: &str| reqwest::get(format!("{url}{path}")).await.unwrap().text().await.unwrap();
        let status = async |uri: &str| {
            let uri = uri.parse().unwrap();
            let overview = relay.store.account_overview(Some(&uri)).await.unwrap().remove(0);
            (overview.state, overview.detail)
        };

        for uri in [&alice, &bob] {
            let detail = eventually("the account is stalled", async || {
                let (state, detail) = status(uri).await;
                (state == AccountState::Stalled.as_str()).then_some(detail.unwrap_or_default())
            })
            .await;
            assert!(detail.contains("the event channel was last answered at 20"), "{detail}");
            assert!(detail.contains("a round takes at most 3 s"), "{detail}");
        }
        let metrics = get("metrics").await;
        assert!(metrics.contains("ucwa_relay_accounts{state=\"stalled\"} 2\n"), "{metrics}");
        let page = get("accounts?state=stalled").await;
        assert!([&alice, &bob].iter().all(|uri| page.contains(uri.trim_start_matches("sip:"))), "{page}");

        // A channel that is stalled is asked all the same, and its account works.
        let call = CallRequest {
            from: "silent.zoe@fabrikam.example".to_owned(),
            to_account: alice.clone(),
            text: None,
            html: None,
            subject: String::new(),
        };
        let conversation = simulator.call(call).await.unwrap();
        eventually("who hears something is online again, and tells no old trouble", async || {
            // Refused until the call is answered.
            let _ = simulator.say(&conversation, "are you there?");
            (status(&alice).await == (AccountState::Online.as_str().to_owned(), None)).then_some(())
        })
        .await;
        assert_eq!(status(&bob).await.0, AccountState::Stalled.as_str());
        admin.stop().await;
        relay.stop().await;
        simulator.shutdown().await;
    }
}
