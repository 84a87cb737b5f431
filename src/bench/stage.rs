//! What is measured, each part a process of its own: the simulated server, the relay, and the database between the relay
//! and whoever inserts.
//!
//! Everything lies in one temporary folder (PostgreSQL: in a database made for the run) and is gone afterwards. The parts
//! are this very program with other arguments, so what is measured is what is installed.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Serialize, de::DeserializeOwned};
use tempfile::TempDir;
use tokio::time::Instant;

use super::outside::{Outside, Place};
use crate::simulator::{LedgerCounters, LedgerSnapshot, SettingsChange};

/// The simulator's password of every account.
const PASSWORD: &str = "simulated";
/// Limit for anything that is waited for; a healthy run needs a fraction of it.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often is looked whether something has come about.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A part of the measurement; killed when it is dropped.
pub(super) struct Part {
    child: Child,
    log: PathBuf,
}

impl Part {
    fn start(name: &'static str, folder: &Path, arguments: &[&str], stdout: Stdio) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).context("the log can't be made")?;
        let child = Command::new(program)
            .args(arguments)
            .current_dir(folder)
            // What the operator has set for the server is not meant for this one.
            .env_clear()
            .envs(std::env::vars_os().filter(|(key, _)| !key.to_string_lossy().starts_with("UCWA_RELAY_")))
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(file)
            .spawn()
            .with_context(|| format!("{name} can't be started"))?;
        Ok(Self { child, log })
    }

    /// One that is not listened to.
    pub(super) fn start_quietly(
        name: &'static str,
        folder: &Path,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        Self::start(name, folder, arguments, Stdio::null())
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop, as an operator does.
    fn ask_to_stop(&self) -> anyhow::Result<()> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(id.context("it has no process id")?, Signal::TERM)?)
    }

    /// Fails if it has ended, with the last it said.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(5).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        anyhow::bail!("a measured process has ended ({status}):\n{}", last.join("\n"));
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The simulated server.
pub(super) struct SimulatorPart {
    part: Part,
    /// For `server.discovery_url`.
    pub(super) discovery_url: String,
    control: String,
    http: reqwest::Client,
}

impl SimulatorPart {
    /// Starts one on free ports. What makes a real server's events richer or later than they have to be is off.
    pub(super) async fn start(folder: &Path, accounts: usize) -> anyhow::Result<Self> {
        let accounts = accounts.to_string();
        let arguments =
            ["simulate", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--accounts", &accounts];
        let mut part = Part::start("simulator", folder, &arguments, Stdio::piped())?;
        let stdout = part.child.stdout.take().context("the simulator's output is not there")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut line = || lines.next().context("the simulator said nothing")?.context("it can't be read");
        let said = (line()?, line()?);
        let discovery_url = said.0.split('"').nth(1).context("no address in quotes")?.to_owned();
        let control = said
            .1
            .strip_prefix("# ledger and control: ")
            .and_then(|url| url.strip_suffix("/ledger"))
            .context("no address of the control API")?
            .to_owned();
        // It tells no more, and must not block if it did.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let simulator = Self { part, discovery_url, control, http: client()? };
        let plain = SettingsChange {
            link_only_share: Some(0.0),
            early_event_share: Some(0.0),
            started_share: Some(0.0),
            ..SettingsChange::default()
        };
        simulator.post("/settings", &plain).await?;
        Ok(simulator)
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.part.id()
    }

    /// Scheme, host and port.
    pub(super) fn origin(&self) -> anyhow::Result<String> {
        Ok(url::Url::parse(&self.discovery_url)?.origin().ascii_serialization())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let answer = self.http.get(format!("{}{path}", self.control)).send().await?.error_for_status()?;
        Ok(serde_json::from_str(&answer.text().await?)?)
    }

    /// Steers it.
    pub(super) async fn post(&self, path: &str, body: &impl Serialize) -> anyhow::Result<()> {
        let request = self.http.post(format!("{}{path}", self.control));
        let request = request.header("content-type", "application/json").body(serde_json::to_string(body)?);
        request.send().await?.error_for_status()?;
        Ok(())
    }

    /// A correspondent calls an account; gives the conversation.
    pub(super) async fn call(&self, from: &str, account: &str) -> anyhow::Result<String> {
        let body = serde_json::json!({ "from": from, "to_account": account, "text": "Hello?" });
        let answer = self.http.post(format!("{}/call", self.control));
        let answer = answer.header("content-type", "application/json").body(body.to_string()).send().await?;
        let answer: serde_json::Value = serde_json::from_str(&answer.error_for_status()?.text().await?)?;
        Ok(answer["conversation"].as_str().context("the simulator named no conversation")?.to_owned())
    }

    /// The correspondent writes; `false` if nobody has accepted yet.
    pub(super) async fn say(&self, conversation: &str, text: &str) -> anyhow::Result<bool> {
        let body = serde_json::json!({ "conversation": conversation, "text": text });
        let answer = self.http.post(format!("{}/say", self.control));
        let answer = answer.header("content-type", "application/json").body(body.to_string()).send().await?;
        if answer.status() == reqwest::StatusCode::CONFLICT {
            return Ok(false);
        }
        answer.error_for_status()?;
        Ok(true)
    }

    /// Everything that it delivered and accepted.
    pub(super) async fn ledger(&self) -> anyhow::Result<LedgerSnapshot> {
        self.get("/ledger").await
    }

    /// The numbers of its ledger.
    pub(super) async fn counters(&self) -> anyhow::Result<LedgerCounters> {
        let all: serde_json::Value = self.get("/counters").await?;
        Ok(serde_json::from_value(all["ledger"].clone())?)
    }
}

/// An HTTP client for loopback.
pub(super) fn client() -> anyhow::Result<reqwest::Client> {
    // An error means that the process has a provider already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .tcp_nodelay(true)
        .pool_max_idle_per_host(usize::MAX)
        .build()?)
}

/// Simulator, relay and database.
pub(super) struct Stage {
    // Dropped in this order: nobody is left who writes into a database or a folder that goes.
    relay: Option<Part>,
    /// The simulated server.
    pub(super) simulator: SimulatorPart,
    /// The database.
    pub(super) place: Place,
    folder: TempDir,
    accounts: usize,
    /// When the relay was started, and how long later every account was online.
    started: Instant,
    online_after: Option<Duration>,
}

impl Stage {
    /// Starts all three and waits until every account is online. `configuration` is TOML beside what is needed.
    pub(super) async fn set_up(place: Place, accounts: usize, configuration: &str) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("there is no temporary folder")?;
        let simulator = SimulatorPart::start(folder.path(), accounts).await?;
        let mut text = format!(
            "{configuration}\n[admin]\nlisten = \"127.0.0.1:0\"\n[telemetry]\nlog = \"warn\"\n\
             [database]\nurl = \"{}\"\n[server]\ndiscovery_url = \"{}\"\nallow_http = true\n\
             [relay]\nsign_in_rate = 10000\naccounts_online_at_once = 200\n[secrets]\nkey_file = \"key\"\n",
            place.url(),
            simulator.discovery_url
        );
        for number in 1..=accounts {
            let _ = write!(
                text,
                "\n[[accounts]]\nsip_uri = \"{}\"\npassword = {{ file = \"password\" }}\n",
                account(number)
            );
        }
        std::fs::write(folder.path().join("ucwa-relay.toml"), text)?;
        std::fs::write(folder.path().join("password"), PASSWORD)?;
        let mut stage = Self {
            relay: None,
            simulator,
            place,
            folder,
            accounts,
            started: Instant::now(),
            online_after: None,
        };
        stage.start_relay()?;
        stage.all_online().await?;
        Ok(stage)
    }

    /// Starts the relay again, which does not run.
    pub(super) fn start_relay(&mut self) -> anyhow::Result<()> {
        (self.started, self.online_after) = (Instant::now(), None);
        let arguments = ["--config", "ucwa-relay.toml", "run"];
        self.relay = Some(Part::start("relay", self.folder.path(), &arguments, Stdio::null())?);
        Ok(())
    }

    /// Waits until every account is online.
    pub(super) async fn all_online(&mut self) -> anyhow::Result<()> {
        let wanted = i64::try_from(self.accounts)?;
        let mut outside: Option<Outside> = None;
        self.until("every account is online", async |stage| {
            // The relay makes the schema first.
            if outside.is_none() {
                outside = stage.place.connect().await.ok();
            }
            let Some(outside) = &mut outside else { return Ok(false) };
            let online = outside.number("SELECT count(*) FROM account_status WHERE state = 'online'").await;
            Ok(online.is_ok_and(|online| online == wanted))
        })
        .await?;
        self.online_after = Some(self.started.elapsed());
        Ok(())
    }

    /// How long the relay took, the last time that it was started, until every account was online.
    pub(super) fn online_after(&self) -> Option<Duration> {
        self.online_after
    }

    /// Stops the relay in order and waits for its end.
    pub(super) async fn stop_relay(&mut self) -> anyhow::Result<()> {
        let Some(mut relay) = self.relay.take() else { return Ok(()) };
        relay.ask_to_stop()?;
        self.until("the relay has stopped", async |_| Ok(relay.child.try_wait()?.is_some())).await
    }

    /// Ends everything and removes the database.
    pub(super) async fn take_down(self) -> anyhow::Result<()> {
        let Self { relay, simulator, place, folder, .. } = self;
        drop(relay);
        drop(simulator);
        place.remove().await?;
        Ok(folder.close()?)
    }

    /// The relay's process id.
    pub(super) fn relay_id(&self) -> Option<u32> {
        self.relay.as_ref().map(Part::id)
    }

    /// Asks until it is so.
    pub(super) async fn until(
        &mut self,
        what: &str,
        mut is_so: impl AsyncFnMut(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self).await? {
            self.simulator.part.check()?;
            if let Some(relay) = &mut self.relay {
                relay.check()?;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "waited {} s in vain until {what}\n{}",
                PATIENCE.as_secs(),
                self.relay_log()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    fn relay_log(&self) -> String {
        let mut text = String::new();
        let read = File::open(self.folder.path().join("relay.log"))
            .and_then(|file| file.take(2000).read_to_string(&mut text));
        read.map(|_| text).unwrap_or_default()
    }
}

/// SIP URI of an account of the simulator.
pub(super) fn account(number: usize) -> String {
    format!("sip:user{number:04}@contoso.example")
}
