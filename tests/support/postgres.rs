//! A throw-away PostgreSQL from the installed programs, or the one of `TEST_POSTGRES_URL`.
//!
//! All tests of a run share one server with a database each, although each test may be a process of its own: whoever
//! comes first starts it, every user holds a shared lock while it runs, and a watchdog stops it when nobody has held one
//! for half a minute. A test that stops its server has one of its own. PostgreSQL refuses to run as root: then it runs as
//! `postgres`, or as `nobody`.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tempfile::TempDir;

/// A database of one test; dropped with it.
pub(crate) struct PostgresDatabase {
    url: String,
    admin: String,
    name: String,
    is_kept: bool,
}

impl PostgresDatabase {
    /// An empty database on the shared server.
    pub(crate) async fn new() -> Self {
        Self::on(&shared_server()).await
    }

    /// An empty database on the server with this URL, whose user may create some.
    pub(crate) async fn on(admin: &str) -> Self {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        run(admin, format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")).await;
        Self::named(admin, name)
    }

    /// The database with this name on that server, which is made if it is not there, and stays.
    pub(crate) async fn kept_on(admin: &str, name: &str) -> Self {
        let mut connection = PgConnection::connect(admin).await.expect("the server can be reached");
        let there =
            rows(&mut connection, &format!("SELECT 1 FROM pg_database WHERE datname = '{name}'")).await;
        if there.is_empty() {
            run(admin, format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")).await;
        }
        let mut database = Self::named(admin, name.to_owned());
        database.is_kept = true;
        database
    }

    fn named(admin: &str, name: String) -> Self {
        let mut url: url::Url = admin.parse().expect("a URL");
        url.set_path(&name);
        Self { url: url.into(), admin: admin.to_owned(), name, is_kept: false }
    }

    /// The same database for this user, who needs no password.
    pub(crate) fn of_user(mut self, name: &str) -> Self {
        let mut url: url::Url = self.url.parse().expect("a URL");
        url.set_username(name).expect("the URL has a host");
        self.url = url.into();
        self
    }

    /// For `database.url`.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A plain connection, as any other program has.
    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.expect("the database can be reached")
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let (admin, statement) =
            (self.admin.clone(), format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name));
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                if let Ok(mut connection) = PgConnection::connect(&admin).await {
                    let _ = sqlx::query(AssertSqlSafe(statement)).execute(&mut connection).await;
                }
            });
        });
        let _ = dropped.join();
    }
}

async fn run(url: &str, statement: String) {
    let mut connection = PgConnection::connect(url).await.expect("the test's PostgreSQL can be reached");
    sqlx::query(AssertSqlSafe(statement)).execute(&mut connection).await.expect("the statement runs");
    connection.close().await.expect("the connection closes");
}

/// Rows as `a|b|c`, NULL as nothing, yes and no as 1 and 0, times as SQLite's schema writes them.
pub(crate) async fn rows(connection: &mut PgConnection, sql: &str) -> Vec<String> {
    sqlx::query(AssertSqlSafe(sql.to_owned()))
        .fetch_all(connection)
        .await
        .expect("the query runs")
        .iter()
        .map(|row| (0..row.len()).map(|column| value(row, column)).collect::<Vec<_>>().join("|"))
        .collect()
}

fn value(row: &sqlx::postgres::PgRow, column: usize) -> String {
    use sqlx::{Column, TypeInfo, ValueRef};
    if row.try_get_raw(column).expect("there is such a column").is_null() {
        return String::new();
    }
    match row.column(column).type_info().name() {
        "BOOL" => i64::from(row.get::<bool, _>(column)).to_string(),
        "INT8" => row.get::<i64, _>(column).to_string(),
        "INT4" => row.get::<i32, _>(column).to_string(),
        "TIMESTAMPTZ" => {
            // In the binary format: microseconds since 2000.
            let microseconds: i64 = row.get_unchecked(column);
            let instant = jiff::Timestamp::from_microsecond(microseconds + 946_684_800_000_000);
            format!("{:.3}", instant.expect("an instant"))
        }
        _ => row.get_unchecked::<String, _>(column),
    }
}

// ------------------------------------------------------------------------------------------------ servers

/// URL of the shared server's maintenance database. The process holds its lock until it ends.
fn shared_server() -> String {
    static URL: OnceLock<(String, Option<File>)> = OnceLock::new();
    let (url, _) = URL.get_or_init(|| {
        if let Ok(url) = std::env::var("TEST_POSTGRES_URL") {
            return (url, None);
        }
        let (port, held) = start_or_join();
        (admin_url(port), Some(held))
    });
    url.clone()
}

fn admin_url(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

fn start_or_join() -> (u16, File) {
    // One for each checkout, outside of it: the user that runs the server may not be let in there.
    let name = env!("CARGO_TARGET_TMPDIR").replace('/', "-");
    let place = std::env::temp_dir().join(format!("ucwa-relay-tests{name}"));
    fs::create_dir_all(&place).expect("the temporary folder can be written");
    let open = |file: &str| {
        File::options().create(true).append(true).open(place.join(file)).expect("a lock file opens")
    };
    let users = open("users");
    // Waits while the watchdog stops the server.
    users.lock_shared().expect("a lock");
    let starting = open("starting");
    starting.lock().expect("a lock");
    let known = fs::read_to_string(place.join("port")).ok().and_then(|port| port.parse::<u16>().ok());
    let port = known.filter(|_| is_running(&place.join("data"))).unwrap_or_else(|| {
        let server = Installation::find();
        let data = place.join("data");
        let _ = fs::remove_dir_all(&data);
        server.init(&data);
        let port = server.start(&data, &["-c", "fsync=off", "-c", "full_page_writes=off"]);
        fs::write(place.join("port"), port.to_string()).expect("the port is noted");
        server.watch(&place);
        port
    });
    drop(starting);
    (port, users)
}

fn is_running(data: &Path) -> bool {
    let pid = fs::read_to_string(data.join("postmaster.pid"));
    let pid = pid.ok().and_then(|text| text.lines().next().map(str::to_owned));
    pid.is_some_and(|pid| Path::new("/proc").join(pid).exists())
}

/// A server for one test, which may stop it; it keeps what it was told.
pub(crate) struct OwnServer {
    installation: Installation,
    data: PathBuf,
    port: u16,
    /// Goes with the server, if its data are not to be kept.
    temporary: Option<TempDir>,
}

impl OwnServer {
    /// Starts one.
    pub(crate) fn start() -> Self {
        Self::start_in(&std::env::temp_dir(), &[])
    }

    /// Starts one that keeps its data in this folder, with options of its own.
    pub(crate) fn start_in(folder: &Path, options: &[&str]) -> Self {
        let installation = Installation::find();
        let folder = tempfile::tempdir_in(folder).expect("a temporary folder");
        installation.own(folder.path());
        let data = folder.path().join("data");
        installation.init(&data);
        let port = installation.start(&data, options);
        Self { installation, data, port, temporary: Some(folder) }
    }

    /// Starts one whose data stay in this folder, or are there already.
    pub(crate) fn start_kept_in(folder: &Path, options: &[&str]) -> Self {
        let installation = Installation::find();
        let data = folder.join("data");
        if !data.exists() {
            fs::create_dir_all(folder).expect("the folder can be made");
            installation.own(folder);
            installation.init(&data);
        }
        let port = installation.start(&data, options);
        Self { installation, data, port, temporary: None }
    }

    /// Where it writes its log.
    pub(crate) fn log(&self) -> PathBuf {
        self.data.join("log")
    }

    /// Of the maintenance database.
    pub(crate) fn admin_url(&self) -> String {
        admin_url(self.port)
    }

    /// As after a power cut.
    pub(crate) fn stop_immediately(&self) {
        self.installation.pg_ctl(&self.data, &["stop", "-m", "immediate"]);
    }

    /// After [`OwnServer::stop_immediately`], at the same address.
    pub(crate) fn start_again(&self) {
        self.installation.start_at(&self.data, self.port, &[]).expect("the server starts again");
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let mode = if self.temporary.is_some() { "immediate" } else { "fast" };
        let mut stop = self.installation.command("pg_ctl");
        let _ = stop.arg("-D").arg(&self.data).args(["-w", "stop", "-m", mode]).status();
    }
}

/// The programs, and the user they run as.
struct Installation {
    programs: PathBuf,
    user: Option<(u32, u32)>,
}

impl Installation {
    fn find() -> Self {
        let mut places: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|version| Some(version.ok()?.path().join("bin")))
            .collect();
        // The newest first.
        places.sort_by_key(|place| {
            let version = place.parent().and_then(Path::file_name).and_then(|name| name.to_str());
            std::cmp::Reverse(version.and_then(|version| version.parse::<u32>().ok()))
        });
        places.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        let programs = places.into_iter().find(|place| place.join("initdb").exists()).expect(
            "PostgreSQL's server programs (initdb, pg_ctl) are missing: apt-get install postgresql, or name a server by \
             TEST_POSTGRES_URL",
        );
        Self { programs, user: user_instead_of_root() }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        // Neither an interrupted test run nor a killed test takes the shared server with it.
        command.process_group(0).current_dir("/").env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn own(&self, folder: &Path) {
        if let Some((user, group)) = self.user {
            chown(folder, Some(user), Some(group)).expect("root may give a folder away");
        }
    }

    fn init(&self, data: &Path) {
        fs::create_dir(data).expect("the data folder is made");
        self.own(data);
        let mut command = self.command("initdb");
        command.arg("-D").arg(data).args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        ]);
        assert!(command.status().expect("initdb starts").success(), "initdb failed in {}", data.display());
    }

    fn start(&self, data: &Path, options: &[&str]) -> u16 {
        // Somebody else may take the port in between.
        (0..5)
            .find_map(|_| {
                let free = TcpListener::bind("127.0.0.1:0").expect("there are free ports");
                let port = free.local_addr().expect("it has an address").port();
                drop(free);
                self.start_at(data, port, options).map(|()| port)
            })
            .unwrap_or_else(|| {
                let log = fs::read_to_string(data.join("log")).unwrap_or_default();
                panic!("PostgreSQL does not start in {}: {log}", data.display())
            })
    }

    fn start_at(&self, data: &Path, port: u16, options: &[&str]) -> Option<()> {
        let mut server = format!(
            "-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=300 \
             -c shared_buffers=64MB"
        );
        for option in options {
            server.push(' ');
            server.push_str(option);
        }
        let mut command = self.command("pg_ctl");
        command
            .arg("-D")
            .arg(data)
            .arg("-l")
            .arg(data.join("log"))
            .args(["-w", "-t", "60", "-o", &server, "start"]);
        command.status().expect("pg_ctl starts").success().then_some(())
    }

    fn pg_ctl(&self, data: &Path, arguments: &[&str]) {
        let done = self.command("pg_ctl").arg("-D").arg(data).arg("-w").args(arguments).status();
        assert!(done.expect("pg_ctl starts").success(), "pg_ctl {arguments:?} failed");
    }

    /// Stops the shared server when nobody has used it for half a minute.
    #[expect(clippy::zombie_processes, reason = "the watchdog outlives the test that starts it")]
    fn watch(&self, place: &Path) {
        let script = "idle=0
            while sleep 2; do
                if flock -n -x \"$1/users\" true; then idle=$((idle + 1)); else idle=0; fi
                if [ $idle -ge 15 ]; then
                    flock -n -x \"$1/users\" \"$2/pg_ctl\" -D \"$1/data\" stop -m immediate && exit
                fi
            done";
        let mut command = Command::new("sh");
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        command
            .process_group(0)
            .current_dir("/")
            .args(["-c", script, "watchdog"])
            .arg(place)
            .arg(&self.programs);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the watchdog starts");
    }
}

fn user_instead_of_root() -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let is_root = fs::metadata("/proc/self").expect("/proc is there").uid() == 0;
    let users = fs::read_to_string("/etc/passwd").expect("users are listed");
    let ids = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    is_root.then(|| ids("postgres").or_else(|| ids("nobody")).expect("there is a user called nobody"))
}
