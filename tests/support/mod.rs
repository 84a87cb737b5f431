//! What whole-program tests share: the real binary as simulator and as server, a database of their own, and waiting
//! for conditions.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod archive;
pub(crate) mod browser;
pub(crate) mod postgres;
pub(crate) mod scene;
pub(crate) mod sql;

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sqlx::{ConnectOptions, SqlitePool, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use ucwa_relay::{
    demo::reckoning::Reckoning,
    simulator::LedgerSnapshot,
    store::{self, HistoryFilter, OutboxFilter, Role, SharedStore, StoreSettings},
};

/// Longest time that anything may take; a healthy run needs a fraction of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

const BINARY: &str = env!("CARGO_BIN_EXE_ucwa-relay");

/// Asks again and again until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, &mut ask).await
}

/// As [`eventually`], with a limit of its own.
pub(crate) async fn eventually_within<T>(
    limit: Duration,
    what: &str,
    mut ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {} s in vain: {what}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks again and again until nothing is left; what is left at the end is told.
pub(crate) async fn eventually_none(limit: Duration, what: &str, mut ask: impl AsyncFnMut() -> Vec<String>) {
    let deadline = Instant::now() + limit;
    loop {
        let left = ask().await;
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "after {} s there are still {what}: {left:#?}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A child process that is killed when the test ends, with what it wrote to stderr.
pub(crate) struct Process {
    child: Child,
    stderr: Arc<Mutex<String>>,
    /// Done when the process has closed its stderr.
    reader: Option<JoinHandle<()>>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut pipe = child.stderr.take().expect("stderr is piped");
        let sink = Arc::clone(&stderr);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                sink.lock()
                    .expect("nobody panics with it")
                    .push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, stderr, reader: Some(reader) }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("the process can be killed");
        self.wait();
    }

    /// SIGTERM, then waits; gives whether it ended with exit code 0.
    pub(crate) fn terminate(&mut self) -> bool {
        let killed = Command::new("kill").arg(self.child.id().to_string()).status().expect("kill runs");
        assert!(killed.success());
        self.wait()
    }

    /// Sends it a signal: `STOP`, `CONT`, `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Waits for its end, and until all that it wrote to stderr is read; gives whether its exit code was 0.
    pub(crate) fn wait(&mut self) -> bool {
        let status = self.child.wait().expect("the process can be waited for");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader of stderr doesn't panic");
        }
        status.success()
    }

    /// What it has written to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().expect("nobody panics with it").clone()
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().expect("the process can be asked").is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            self.reader.take().map(JoinHandle::join);
            eprintln!("--- stderr of the process\n{}", self.stderr());
        }
    }
}

/// The simulator as a process of its own, steered through its control API.
pub(crate) struct Simulate {
    /// The process.
    pub process: Process,
    /// For `server.discovery_url`.
    pub discovery_url: String,
    admin: String,
    http: reqwest::Client,
}

impl Simulate {
    /// Starts it on free ports.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command
            .args(["simulate", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
            .args(arguments)
            .stdout(Stdio::piped());
        let mut process = Process::start(command);
        let mut lines = BufReader::new(process.child.stdout.take().expect("stdout is piped")).lines();
        let mut line = || lines.next().expect("the simulator says where it listens").expect("in UTF-8");
        let discovery_url = line().split('"').nth(1).expect("an address in quotes").to_owned();
        let admin =
            line().trim_start_matches("# ledger and control: ").trim_end_matches("/ledger").to_owned();
        std::thread::spawn(move || lines.for_each(drop));
        // Loopback without TLS: the provider is only needed because the client insists on one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { process, discovery_url, admin, http: reqwest::Client::new() }
    }

    /// GET on the control API.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let answer =
            self.http.get(format!("{}{path}", self.admin)).send().await.expect("the control API answers");
        serde_json::from_str(&answer.text().await.expect("in full")).expect("in JSON")
    }

    /// POST on the control API; the answer, whatever its status.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self
            .http
            .post(format!("{}{path}", self.admin))
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .expect("the control API answers");
        let text = answer.text().await.expect("in full");
        if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("in JSON") }
    }

    /// DELETE on the control API.
    pub(crate) async fn delete(&self, path: &str) {
        let request = self.http.delete(format!("{}{path}", self.admin));
        let answer = request.send().await.expect("the control API answers");
        assert!(answer.status().is_success(), "{path} was answered {}", answer.status());
    }

    /// Somebody calls an account; retried until the account takes calls. Gives the conversation's id.
    pub(crate) async fn call(&self, from: &str, to_account: &str, text: &str) -> String {
        let request = json!({ "from": from, "to_account": to_account, "text": text });
        eventually(&format!("{to_account} takes a call"), async || {
            self.post("/call", &request).await["conversation"].as_str().map(str::to_owned)
        })
        .await
    }

    /// The caller says something, as soon as the conversation takes it.
    pub(crate) async fn say(&self, conversation: &str, text: &str) {
        let request = json!({ "conversation": conversation, "text": text });
        eventually("the conversation is connected", async || {
            self.post("/say", &request).await.get("serials").is_some().then_some(())
        })
        .await;
    }

    /// Everything it delivered and accepted.
    pub(crate) async fn ledger(&self) -> LedgerSnapshot {
        serde_json::from_value(self.get("/ledger").await).expect("a ledger")
    }
}

use self::{
    postgres::PostgresDatabase,
    sql::{Kind, Sql},
};

/// A folder with a configuration and a database, and the server that may run in it.
pub(crate) struct Relay {
    /// Everything lies in here.
    pub folder: TempDir,
    /// The running server.
    pub server: Option<Process>,
    /// The database, if it is not a file in the folder.
    postgres: Option<PostgresDatabase>,
    /// What a shell is told before it becomes the program.
    prelude: Option<String>,
}

impl Relay {
    /// Writes a configuration for a simulator, with a SQLite file; `more` is TOML appended to it.
    pub(crate) fn configure(simulator: &Simulate, more: &str) -> Self {
        Self::configure_for(&simulator.discovery_url, more)
    }

    /// As [`Relay::configure`], for a simulator wherever it runs.
    pub(crate) fn configure_for(discovery_url: &str, more: &str) -> Self {
        Self::write(discovery_url, None, more)
    }

    /// As [`Relay::configure`], with a database of this kind.
    pub(crate) async fn configure_on(kind: Kind, simulator: &Simulate, more: &str) -> Self {
        Self::configure_on_for(kind, &simulator.discovery_url, more).await
    }

    /// As [`Relay::configure_on`], for a simulator wherever it runs.
    pub(crate) async fn configure_on_for(kind: Kind, discovery_url: &str, more: &str) -> Self {
        let postgres = match kind {
            Kind::Sqlite => None,
            Kind::Postgres => Some(PostgresDatabase::new().await),
        };
        Self::write(discovery_url, postgres, more)
    }

    /// As [`Relay::configure`], with this database.
    pub(crate) fn configure_in(database: PostgresDatabase, simulator: &Simulate, more: &str) -> Self {
        Self::write(&simulator.discovery_url, Some(database), more)
    }

    fn write(discovery_url: &str, postgres: Option<PostgresDatabase>, more: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let relay = Self { folder, server: None, postgres, prelude: None };
        // Many servers run at once on the machine that tests.
        let admin = if more.contains("[admin]") { "" } else { "[admin]\nlisten = \"127.0.0.1:0\"\n" };
        let text = format!(
            "{admin}[database]\nurl = \"{}\"\n[server]\ndiscovery_url = \"{discovery_url}\"\nallow_http = true\n{more}\n",
            relay.url(),
        );
        std::fs::write(relay.folder.path().join("ucwa-relay.toml"), text)
            .expect("the configuration is written");
        relay
    }

    /// `database.url`.
    pub(crate) fn url(&self) -> String {
        match &self.postgres {
            Some(database) => database.url().to_owned(),
            None => format!("sqlite://{}", self.database().display()),
        }
    }

    /// A plain connection to the database, whichever it is.
    pub(crate) async fn connect(&self) -> Sql {
        if let Some(database) = &self.postgres {
            return Sql::Postgres(Box::new(database.connect().await));
        }
        let options =
            SqliteConnectOptions::new().filename(self.database()).busy_timeout(Duration::from_secs(10));
        Sql::Sqlite(Box::new(options.connect().await.expect("the database opens")))
    }

    /// The database file.
    pub(crate) fn database(&self) -> PathBuf {
        self.folder.path().join("archive.db")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match &self.prelude {
            None => Command::new(BINARY),
            Some(prelude) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("{prelude}; exec \"$0\" \"$@\""), BINARY]);
                shell
            }
        };
        command.current_dir(self.folder.path()).args(arguments).env("NO_COLOR", "1");
        command
    }

    /// From now on a shell does this before it becomes the program: sets limits or variables, or ignores signals, which
    /// the program inherits.
    pub(crate) fn in_shell_after(&mut self, commands: &str) {
        self.prelude = Some(commands.to_owned());
    }

    /// Runs a command of the program to its end.
    pub(crate) fn tool(&self, arguments: &[&str]) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().expect("the binary starts")
    }

    /// Starts a command of the program that does not end by itself, or is not to.
    pub(crate) fn start_tool(&self, arguments: &[&str]) -> Process {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Process::start(command)
    }

    /// As [`Relay::tool`]; it has to succeed. Gives its stdout.
    pub(crate) fn tool_ok(&self, arguments: &[&str]) -> String {
        let output = self.tool(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?} failed: {stderr}");
        String::from_utf8(output.stdout).expect("in UTF-8")
    }

    /// Adds an account with a password.
    pub(crate) fn add_account(&self, uri: &str, password: &str) {
        let file = self.folder.path().join("password");
        std::fs::write(&file, password).expect("the password file is written");
        let username = uri.trim_start_matches("sip:");
        let file = file.to_str().expect("a path in UTF-8");
        self.tool_ok(&["account", "add", uri, "--username", username, "--password-file", file]);
    }

    /// Gives an account a password that is not its own.
    pub(crate) fn add_wrong_password(&self, uri: &str) {
        let file = self.folder.path().join("wrong-password");
        std::fs::write(&file, "wrong").expect("the password file is written");
        let file = file.to_str().expect("a path in UTF-8");
        self.tool_ok(&["account", "set-password", uri, "--password-file", file]);
    }

    /// Starts `run`.
    pub(crate) fn start(&mut self) {
        let mut command = self.command(&["run"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).env("RUST_BACKTRACE", "1");
        self.server = Some(Process::start(command));
    }

    /// Starts `run` through a program that takes it and its arguments as its own last ones.
    pub(crate) fn start_through(&mut self, wrapper: &[&str], variables: &[(&str, &str)]) {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).args([BINARY, "run"]).current_dir(self.folder.path());
        command.env("NO_COLOR", "1").envs(variables.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.server = Some(Process::start(command));
    }

    /// Starts `run` as one of several nodes. The database knows its connections by the node's name.
    pub(crate) fn start_node(&self, node: &str) -> Process {
        let mut url: url::Url = self.url().parse().expect("a URL");
        url.query_pairs_mut().append_pair("application_name", node);
        let mut command = self.command(&["run"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).env("RUST_BACKTRACE", "1");
        command.env("UCWA_RELAY__CLUSTER__NODE_ID", node).env("UCWA_RELAY__DATABASE__URL", url.as_str());
        Process::start(command)
    }

    /// The running server.
    pub(crate) fn server(&mut self) -> &mut Process {
        self.server.as_mut().expect("the server was started")
    }

    /// A pool on the SQLite file, as any other program has.
    pub(crate) async fn sql(&self) -> SqlitePool {
        sqlite(&self.database()).await
    }

    /// Waits until an account is in a state; gives its detail.
    pub(crate) async fn account_state(&self, uri: &str, state: &str) -> String {
        let mut sql = self.connect().await;
        let query = format!(
            "SELECT coalesce(detail, '') FROM account_overview WHERE account = '{uri}' AND state = '{state}'"
        );
        eventually(&format!("{uri} is {state}"), async || sql.rows(&query).await.pop()).await
    }

    /// Compares the simulator's ledger with the database.
    pub(crate) async fn reckon(&self, simulator: &Simulate) -> Reckoning {
        self.reckon_with(&simulator.ledger().await).await
    }

    /// Compares a ledger with the database.
    pub(crate) async fn reckon_with(&self, ledger: &LedgerSnapshot) -> Reckoning {
        let store =
            store::connect(&store_settings(&self.url()), Role::Tool).await.expect("the database opens");
        let archive = store
            .history(&HistoryFilter { limit: i64::MAX, ..HistoryFilter::default() })
            .await
            .expect("the archive can be read");
        let outbox = store
            .outbox_rows(&OutboxFilter { limit: i64::MAX, ..OutboxFilter::default() })
            .await
            .expect("the queue can be read");
        store.close().await;
        Reckoning::compare(ledger, &archive, &outbox)
    }
}

/// A server's store takes all accounts that are free, as the server itself does again and again.
pub(crate) async fn take_leases(store: &SharedStore) {
    if let Some(cluster) = store.cluster() {
        cluster.renew_leases().await.expect("leases can be renewed");
        cluster.acquire_leases(usize::MAX).await.expect("leases can be taken");
    }
}

/// Settings for reading a database through the program's own store.
pub(crate) fn store_settings(url: &str) -> StoreSettings {
    let mut config = ucwa_relay::config::Config::default();
    url.clone_into(&mut config.database.url);
    config.store_settings()
}

/// A plain connection to a SQLite file.
pub(crate) async fn sqlite(database: &Path) -> SqlitePool {
    let options = SqliteConnectOptions::new().filename(database).busy_timeout(Duration::from_secs(10));
    SqlitePool::connect_with(options).await.expect("the database opens")
}

/// One number.
pub(crate) async fn count(pool: &SqlitePool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("the query runs")
}
