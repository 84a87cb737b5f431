//! `bench`: the load benchmark, with a table for people and a file for programs.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::output::Table;
use crate::bench::{self, BenchSettings, Figure, Goal, Measurement, Report};

/// `bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchOptions {
    /// Measure on PostgreSQL, too: a database of a server whose user may create others. The run makes its own there and
    /// drops them afterwards
    #[arg(long, value_name = "URL")]
    postgres: Option<String>,
    /// Where SQLite's files lie during the run: the disk that is to be measured [default: the system's folder for
    /// temporary files]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Measure only this; may be given several times
    #[arg(long, value_enum)]
    only: Vec<Measurement>,
    /// A few seconds each, to see that everything works: figures of such a run say little
    #[arg(long)]
    quick: bool,
    /// Where the figures are written for programs
    #[arg(long, value_name = "FILE", default_value = "ucwa-relay-bench.json")]
    json: PathBuf,
    /// Instead of a run: hold GETs on this address that are never answered. What `idle` compares with is such a process
    #[arg(long, hide = true, value_name = "URL", requires = "gets")]
    hang: Option<reqwest::Url>,
    /// How many of them
    #[arg(long, hide = true, value_name = "N", requires = "hang")]
    gets: Option<usize>,
}

/// Measures, prints, writes.
pub(super) fn bench(options: BenchOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let Some((url, gets)) = options.hang.zip(options.gets) {
        return runtime.block_on(bench::hang(url, gets));
    }
    if cfg!(debug_assertions) {
        eprintln!("this is a debug build: build with --release for figures that say something");
    }
    let settings = BenchSettings {
        postgres: options.postgres,
        folder: options.folder,
        only: options.only,
        quick: options.quick,
    };
    let report = runtime.block_on(bench::run(&settings, |what| eprintln!("{what}")))?;
    let mut json = serde_json::to_vec_pretty(&report)?;
    json.push(b'\n');
    std::fs::write(&options.json, json)
        .with_context(|| format!("the figures can't be written to {}", options.json.display()))?;
    print(&report)
}

fn print(report: &Report) -> anyhow::Result<()> {
    let machine = &report.machine;
    eprintln!(
        "ucwa-relay {} ({}), {} cores of {}, {}, load before {}; {}",
        report.version,
        report.commit.unwrap_or("commit not known"),
        machine.cores,
        machine.processor,
        machine.system,
        machine.load_before,
        report.databases.join("; ")
    );
    let mut table = Table::new(["figure", "database", "value", "unit", "goal", "met", "compared with"]);
    for figure in &report.figures {
        table.row(row(figure));
    }
    table.print("nothing was measured")
}

fn row(figure: &Figure) -> [String; 7] {
    [
        figure.name.clone(),
        figure.database.unwrap_or_default().to_owned(),
        number(figure.value),
        figure.unit.to_owned(),
        match figure.goal {
            None => String::new(),
            Some(Goal::AtMost(most)) => format!("<= {}", number(most)),
            Some(Goal::AtLeast(least)) => format!(">= {}", number(least)),
        },
        figure.met.map_or("", |met| if met { "yes" } else { "no" }).to_owned(),
        figure.limit.as_ref().map(|(limit, what)| format!("{} {what}", number(*limit))).unwrap_or_default(),
    ]
}

/// Three digits that say something.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_as_many_digits_as_they_deserve() {
        assert_eq!([4123.4, 41.26, 0.517, 0.0].map(number), ["4123", "41.3", "0.52", "0.00"]);
    }
}
