//! What is on this machine, and the database: everything that `run` needs before it asks a UCWA server for anything.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Outcome, Step, Subject};
use crate::{
    config::{self, Config},
    descriptors::{self, Limits},
    secrets::Sealer,
    store::{self, ClockReading, Connections, Inspection, SecretSource},
    system_user,
};

/// Below this a disk fills up within days.
const LITTLE_DISK: u64 = 1 << 30;
/// Below this it may be full before anybody has read what the doctor said.
const NO_DISK: u64 = 100 << 20;
/// From here on a clock is said to be wrong.
const CLOCK_OFF: Duration = Duration::from_secs(5);
/// From here on servers refuse proofs of identity for it.
const CLOCK_WRONG: Duration = Duration::from_secs(5 * 60);
/// How long whoever has the admin address may take to say who it is.
const ADMIN_WITHIN: Duration = Duration::from_secs(3);

/// Which file was read, and what the environment puts over it.
pub(super) fn configuration(config: &Config) -> Step {
    let mut found = config.file.as_ref().map_or_else(
        || "no file, only defaults".to_owned(),
        |path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            path.display().to_string()
        },
    );
    // The values are not said: one of them may hold a password.
    let overrides = config::overrides();
    if !overrides.is_empty() {
        found.push_str("; from the environment: ");
        found.push_str(&overrides.join(", "));
    }
    let without_effect = config.without_effect();
    if without_effect.is_empty() {
        return Step::new("configuration", Outcome::Ok, Duration::ZERO, found);
    }
    let keys: Vec<String> =
        without_effect.iter().map(|(key, waits_for)| format!("{key} (it waits for {waits_for})")).collect();
    let advice = format!("without effect in this version: {}", keys.join(", "));
    Step::new("configuration", Outcome::Warning, Duration::ZERO, found).advise(advice)
}

/// Files and variables that the configuration names but that can't be read.
pub(super) fn secrets(config: &Config) -> Option<Step> {
    let began = Instant::now();
    let error = config.verify_secrets().err()?;
    Some(
        Step::new("secrets", Outcome::Failed, began.elapsed(), error.to_string())
            .advise("look whether this command runs as the server does: the same user, the same environment"),
    )
}

/// The key that seals passwords, and whether it opens them.
pub(super) fn key_file(config: &Config, subjects: &[Subject]) -> Step {
    let began = Instant::now();
    let path = config.key_file();
    let path = std::path::absolute(&path).unwrap_or(path);
    let sealed: Vec<_> = subjects
        .iter()
        .filter_map(|subject| match &subject.secret {
            SecretSource::Sealed(sealed) => Some((&subject.sip_uri, sealed)),
            _ => None,
        })
        .collect();
    if sealed.is_empty() && !path.exists() {
        let found = format!("{} is not there, and no password is sealed", path.display());
        return Step::new("key file", Outcome::Ok, began.elapsed(), found);
    }
    let key = match Sealer::load(&path) {
        Ok(key) => key,
        Err(error) => {
            return Step::new("key file", Outcome::Failed, began.elapsed(), crate::error_chain(&error));
        }
    };
    let refused: Vec<String> = sealed
        .iter()
        .filter(|(account, sealed)| key.open(account, sealed).is_err())
        .map(|(account, _)| account.to_string())
        .collect();
    if refused.is_empty() && key.keys() > 1 {
        let found =
            format!("{} holds {} keys: a new one and what it is to replace", path.display(), key.keys());
        return Step::new("key file", Outcome::Warning, began.elapsed(), found).advise(
            "`ucwa-relay account reseal` seals all passwords with the new one and drops the old ones",
        );
    }
    if refused.is_empty() {
        let opens = match sealed.len() {
            0 => "no password is sealed".to_owned(),
            1 => "opens the one sealed password".to_owned(),
            all => format!("opens all {all} sealed passwords"),
        };
        let found = format!("{} is its owner's alone and {opens}", path.display());
        return Step::new("key file", Outcome::Ok, began.elapsed(), found);
    }
    let found = format!(
        "{} does not open {} of {} sealed passwords: {}",
        path.display(),
        refused.len(),
        sealed.len(),
        refused.join(", ")
    );
    Step::new("key file", Outcome::Failed, began.elapsed(), found).advise(
        "restore the key file from its backup, or set these passwords again with `ucwa-relay account set-password`",
    )
}

/// The database, and whether it may be opened: that would create a missing one, and migrate an old one.
pub(super) async fn database(config: &Config) -> (Vec<Step>, bool) {
    let began = Instant::now();
    let shown = config.database.shown_url();
    let file = config.database.sqlite_path();
    if let Some(path) = file.as_deref().filter(|path| !path.exists()) {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let found = format!("there is no database {}", path.display());
        let advice = "`ucwa-relay migrate` creates it, and so does `run`; or correct database.url";
        return (vec![Step::new("database", Outcome::Failed, began.elapsed(), found).advise(advice)], false);
    }
    let inspection = match store::inspect(&config.store_settings()).await {
        Ok(inspection) => inspection,
        Err(error) => {
            let found = crate::error_chain(&error);
            return (vec![Step::new("database", Outcome::Failed, began.elapsed(), found)], false);
        }
    };
    let Inspection { product, schema, writable, writing_took, clock, connections } = inspection;
    let took = began.elapsed().saturating_sub(writing_took);
    let mut steps = vec![Step::new("database", Outcome::Ok, took, format!("{shown} answers: {product}"))];
    steps.push(match schema.applied {
        Some(version) if schema.fits() => Step::new(
            "schema",
            Outcome::Ok,
            Duration::ZERO,
            format!("version {version}, as this program needs it"),
        ),
        Some(version) if version > schema.known => {
            let found = format!("version {version}, of a newer ucwa-relay; this one knows {}", schema.known);
            Step::new("schema", Outcome::Failed, Duration::ZERO, found)
                .advise("install the newer program, or restore a copy of the database from before")
        }
        version => {
            let found = version.map_or_else(
                || "the database is empty".to_owned(),
                |version| format!("version {version}; this program needs {}", schema.known),
            );
            Step::new("schema", Outcome::Failed, Duration::ZERO, found).advise(
                "`ucwa-relay migrate` brings it up to date, and so does `run`; back the database up before",
            )
        }
    });
    match writable {
        Some(Ok(())) => {
            let found = "it takes what is written (a row was tried and withdrawn)";
            steps.push(Step::new("writing", Outcome::Ok, writing_took, found));
        }
        Some(Err(error)) => {
            let found = format!("it takes nothing: {}", crate::error_chain(&error));
            let advice = if file.is_some() {
                "look at the owner and the mode of the file and its directory, whether its file system is mounted \
                 read-only, and whether the disk is full"
            } else {
                "look whether the database is a standby or read-only (default_transaction_read_only), whether its disk \
                 is full, and whether the user of database.url owns the tables"
            };
            steps.push(Step::new("writing", Outcome::Failed, writing_took, found).advise(advice));
        }
        None => {}
    }
    if let Some(path) = &file {
        steps.extend(disk(path));
    }
    steps.extend(connections.map(connections_of_database));
    steps.push(clock.map_or_else(
        || {
            let found =
                "the database has no clock of its own; the accounts below compare ours with their server's";
            Step::new("clock", Outcome::Ok, Duration::ZERO, found)
        },
        |reading| clock_of("the database's", reading),
    ));
    (steps, schema.fits())
}

/// The directory of a SQLite file: whose it is, and how much room is left.
fn disk(path: &Path) -> Option<Step> {
    use std::os::unix::fs::MetadataExt;
    let began = Instant::now();
    let directory = std::path::absolute(path).ok()?.parent()?.to_owned();
    let looked = std::fs::metadata(path).and_then(|metadata| {
        let space = rustix::fs::statvfs(&directory)?;
        Ok((metadata.uid(), space.f_bavail.saturating_mul(space.f_frsize)))
    });
    let (owner, free) = match looked {
        Ok(looked) => looked,
        Err(error) => {
            let found = format!("{} can't be looked at: {error}", directory.display());
            return Some(Step::new("disk", Outcome::Failed, began.elapsed(), found));
        }
    };
    let (owner, user) = (system_user::name_of(owner), system_user::current());
    let found = format!(
        "{} has {} free; the database belongs to {owner}, and this is {user}",
        directory.display(),
        in_bytes(free)
    );
    let outcome = match free {
        0..NO_DISK => Outcome::Failed,
        NO_DISK..LITTLE_DISK => Outcome::Warning,
        _ if owner != user => Outcome::Warning,
        _ => Outcome::Ok,
    };
    let step = Step::new("disk", outcome, began.elapsed(), found);
    Some(if free < LITTLE_DISK {
        step.advise("make room, or move the database: nothing is archived or sent once the disk is full")
    } else if owner != user {
        step.advise(format!(
            "run this command as the server's user, to see what the server sees: sudo -u {owner}"
        ))
    } else {
        step
    })
}

fn connections_of_database(connections: Connections) -> Step {
    let Connections { open, limit, wanted } = connections;
    let found =
        format!("{open} of {limit} connections are taken; a server with these settings opens up to {wanted}");
    let step = |outcome| Step::new("connections", outcome, Duration::ZERO, found.clone());
    if limit - open >= wanted {
        return step(Outcome::Ok);
    }
    step(Outcome::Warning).advise(
        "that is enough only if those of a running relay are among them; otherwise raise max_connections of PostgreSQL, \
         or lower database.max_connections",
    )
}

/// Compares a clock with ours.
pub(super) fn clock_of(whose: &str, reading: ClockReading) -> Step {
    let ClockReading { theirs, ours, uncertainty } = reading;
    let ahead = ours.duration_since(theirs);
    let off = ahead.unsigned_abs();
    let direction = if ahead.is_negative() { "behind" } else { "ahead of" };
    let found = format!(
        "this machine's is {:.1} s {direction} {whose} (give or take {:.1} s)",
        off.as_secs_f64(),
        uncertainty.as_secs_f64()
    );
    let certain = off.saturating_sub(uncertainty);
    let step = |outcome| Step::new("clock", outcome, Duration::ZERO, found.clone());
    if certain < CLOCK_OFF {
        return step(Outcome::Ok);
    }
    step(if certain < CLOCK_WRONG { Outcome::Warning } else { Outcome::Failed }).advise(
        "set both by NTP (`timedatectl` tells whether this one is): times of the archive, send_after and proofs of \
         identity go by them",
    )
}

/// Whether all enabled accounts get their connections.
pub(super) fn descriptors(config: &Config, enabled: usize) -> Step {
    let limits = Limits::current();
    let needed = descriptors::needed(enabled, config.database.max_connections.get());
    let shown = |limit: Option<u64>| limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string());
    let found = format!(
        "the enabled accounts ({enabled}) need up to {needed}; this shell allows {} and the server may raise that to {}",
        shown(limits.soft),
        shown(limits.hard)
    );
    // The server raises the soft limit by itself.
    let raised = Limits { soft: limits.hard, ..limits };
    if raised.allow(needed) {
        return Step::new("file descriptors", Outcome::Ok, Duration::ZERO, found);
    }
    Step::new("file descriptors", Outcome::Warning, Duration::ZERO, found).advise(descriptors::advice(needed))
}

/// Whether the admin listener gets its address, or has it.
pub(super) async fn admin(config: &Config) -> Step {
    let began = Instant::now();
    let address = config.admin.listen;
    let step = |outcome, found: String| Step::new("admin address", outcome, began.elapsed(), found);
    match TcpListener::bind(address) {
        Ok(_) => return step(Outcome::Ok, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) => {
            return step(Outcome::Failed, format!("{address} can't be listened on: {error}")).advise(
                "correct admin.listen: an address of this machine, and a port that this user may take",
            );
        }
    }
    if config.admin.tls_cert_file.is_some() {
        return step(
            Outcome::Ok,
            format!("{address} is in use, by TLS; if no relay runs here, another program has it"),
        );
    }
    match tokio::time::timeout(ADMIN_WITHIN, is_relay(address)).await {
        Ok(Ok(true)) => step(Outcome::Ok, format!("{address} is in use by a running relay, which answers")),
        _ => step(Outcome::Failed, format!("{address} is in use by another program"))
            .advise("end that one, or give admin.listen another port"),
    }
}

/// Whether `/healthz` answers there as the relay does.
async fn is_relay(address: SocketAddr) -> io::Result<bool> {
    let mut connection = TcpStream::connect(address).await?;
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    connection.take(4096).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"))
}

/// A number of bytes for people.
fn in_bytes(bytes: u64) -> String {
    let mebibytes = bytes >> 20;
    if mebibytes < 10 << 10 { format!("{mebibytes} MiB") } else { format!("{} GiB", mebibytes >> 10) }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn a_clock_counts_as_wrong_only_beyond_what_the_comparison_can_tell() {
        let reading = |off: i64, uncertainty| ClockReading {
            theirs: Timestamp::from_second(1_000_000).unwrap(),
            ours: Timestamp::from_second(1_000_000 + off).unwrap(),
            uncertainty: Duration::from_secs(uncertainty),
        };
        for (off, uncertainty, outcome) in [
            (0, 0, Outcome::Ok),
            (-4, 0, Outcome::Ok),
            (-5, 0, Outcome::Warning),
            (8, 4, Outcome::Ok),
            (299, 0, Outcome::Warning),
            (-300, 0, Outcome::Failed),
        ] {
            let step = clock_of("theirs", reading(off, uncertainty));
            assert_eq!(step.outcome, outcome, "{step:?}");
            assert_eq!(step.found.contains("behind"), off < 0, "{step:?}");
            assert_eq!(step.advice.is_some(), outcome != Outcome::Ok);
        }
    }

    #[tokio::test]
    async fn an_address_that_another_program_has_is_told_apart_from_a_free_one() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = Config::default();
        config.admin.listen = other.local_addr().unwrap();
        let taken = std::thread::spawn(move || drop(other.accept()));
        let step = admin(&config).await;
        assert_eq!(step.outcome, Outcome::Failed, "{step:?}");
        taken.join().unwrap();
        assert_eq!(admin(&config).await.outcome, Outcome::Ok);
    }
}
