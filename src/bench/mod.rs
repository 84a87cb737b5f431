//! `ucwa-relay bench`: what this machine can do, beside the goals and beside limits of the same run.
//!
//! Relay and simulated server are processes of their own; this one inserts, looks at the ledger and counts. Figures are
//! compared with what the same machine does in the same run without the relay (bare requests, bare inserts), since
//! nothing else can be compared between machines, or on one that others use meanwhile.
//!
//! | file | subject |
//! | --- | --- |
//! | `stage`, `outside`, `process` | the measured processes, the database beside them, what the system says about them |
//! | `queue` | from the insert to the server: latency, a burst beside it, throughput |
//! | `bare` | the simulated server's own speed |
//! | `claim` | claiming beside finished rows |
//! | `archive` | messages into the archive, beside bare inserts |
//! | `arrival` | from an event to its commit |
//! | `idle` | accounts that say nothing: memory, processor time, start and restart, growth |
//! | `parse` | event XML into the typed model, beside bare tokens |
//! | `report` | figures, goals, the machine |

mod archive;
mod arrival;
mod bare;
mod claim;
mod idle;
mod outside;
mod parse;
mod process;
mod queue;
mod report;
mod stage;

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;

pub use self::{
    archive::Archivists,
    claim::Queue,
    idle::hang,
    report::{Figure, Goal, Machine, Report},
};
use self::{
    outside::{Database, Place},
    queue::Extent,
};
use crate::relay::wait_for_signal;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// From the insert of a row until the server has it, at a low rate and during a burst of another account
    Latency,
    /// Rows in a second
    Throughput,
    /// Claiming rows beside many finished ones
    Claim,
    /// Messages into the archive, beside bare inserts
    Archive,
    /// From an event's arrival to its commit
    Arrival,
    /// Accounts that say nothing: memory, processor time, start and restart, growth
    Idle,
    /// Reading event XML, beside its bare tokens
    Parse,
}

/// A run.
#[derive(Debug, Clone)]
pub struct BenchSettings {
    /// A database of a PostgreSQL server whose user may create databases; without it only SQLite is measured.
    pub postgres: Option<String>,
    /// Where SQLite's files lie for the run; the system's folder for temporary files if absent.
    pub folder: Option<PathBuf>,
    /// Only these; all of them if empty.
    pub only: Vec<Measurement>,
    /// Just enough to see that everything works.
    pub quick: bool,
}

/// Measures and gives the figures. `tell` hears what is being done, and what came of
/// it. A signal ends the run.
pub async fn run(settings: &BenchSettings, tell: impl Fn(&str)) -> anyhow::Result<Report> {
    let mut databases = vec![Database::Sqlite(settings.folder.clone())];
    databases.extend(settings.postgres.clone().map(Database::on_server));
    let report = tokio::select! {
        report = measure(settings, &databases, tell) => report,
        signal = wait_for_signal() => signal.and(Err(anyhow::anyhow!("interrupted"))),
    };
    for database in &databases {
        database.clean_up().await?;
    }
    report
}

async fn measure(
    settings: &BenchSettings,
    databases: &[Database],
    tell: impl Fn(&str),
) -> anyhow::Result<Report> {
    let mut report = Report::begin(settings.quick);
    for database in databases {
        report.databases.push(version_of(database).await?);
    }
    let extent = if settings.quick {
        Extent { timed: 40, burst: 5_000, through: 5, bare: Duration::from_millis(500) }
    } else {
        Extent { timed: 750, burst: 10_000, through: 300, bare: Duration::from_secs(5) }
    };
    let (finished, claims) = if settings.quick { (2_000, 3) } else { (1_000_000, 30) };
    let archived = if settings.quick {
        archive::Extent { accounts: 10, messages: 20 }
    } else {
        archive::Extent { accounts: 500, messages: 100 }
    };
    let (warm_up, counted) = if settings.quick { (1, 2) } else { (10, 30) };
    let (warm_up, counted) = (Duration::from_secs(warm_up), Duration::from_secs(counted));
    let idle = idle::Extent {
        accounts: if settings.quick { [10, 50, 200] } else { [100, 1_000, 10_000] },
        // Connections that nobody needs any more are closed after half a minute.
        quiet: if settings.quick { warm_up } else { Duration::from_mins(1) },
        counted,
    };
    let turn = if settings.quick { Duration::from_millis(20) } else { Duration::from_millis(500) };
    for measurement in Measurement::value_variants() {
        if !settings.only.is_empty() && !settings.only.contains(measurement) {
            continue;
        }
        for database in databases.iter().take(measurement.on_how_many()) {
            tell(&format!("measuring {} on {} ...", measurement.name(), database.name()));
            let figures = match measurement {
                Measurement::Latency => queue::latency(database, extent).await?,
                Measurement::Throughput => queue::throughput(database, extent).await?,
                Measurement::Claim => claim::cost(database, finished, claims).await?,
                Measurement::Archive => archive::rate(database, archived).await?,
                Measurement::Arrival => {
                    arrival::latency(database, arrival::Extent { warm_up, counted }).await?
                }
                Measurement::Idle => idle::cost(database, idle).await?,
                Measurement::Parse => parse::rate(turn)?,
            };
            for figure in &figures {
                tell(&format!("  {}: {:.2} {}", figure.name, figure.value, figure.unit));
            }
            report.figures.extend(figures);
        }
    }
    Ok(report)
}

impl Measurement {
    const fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Claim => "claims",
            Self::Archive => "the archive",
            Self::Arrival => "arrival",
            Self::Idle => "idle accounts",
            Self::Parse => "reading",
        }
    }

    /// On how many databases it is measured: once, where the database makes no difference.
    const fn on_how_many(self) -> usize {
        match self {
            Self::Idle | Self::Parse => 1,
            Self::Latency | Self::Throughput | Self::Claim | Self::Archive | Self::Arrival => usize::MAX,
        }
    }
}

async fn version_of(database: &Database) -> anyhow::Result<String> {
    let place = Place::new(database).await?;
    let version = async {
        let mut outside = place.connect().await?;
        match database {
            Database::Sqlite(_) => Ok(format!("SQLite {}", outside.text("SELECT sqlite_version()").await?)),
            Database::Postgres { .. } => outside.text("SELECT version()").await,
        }
    };
    let version: anyhow::Result<String> = version.await;
    place.remove().await?;
    version
}
