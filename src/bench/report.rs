//! What was measured, beside its goal and the limit it is compared with.

use jiff::Timestamp;
use serde::Serialize;

/// In which direction a figure is good.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// It shall not be more.
    AtMost(f64),
    /// It shall not be less.
    AtLeast(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// On which database, if it depends on one.
    pub database: Option<&'static str>,
    /// The number.
    pub value: f64,
    /// What it counts.
    pub unit: &'static str,
    /// What it is compared with, measured in the same run, and what that is.
    pub limit: Option<(f64, String)>,
    /// What it shall be.
    pub goal: Option<Goal>,
    /// Whether it is so.
    pub met: Option<bool>,
}

impl Figure {
    /// A figure without a goal.
    pub(super) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), database: None, value, unit, limit: None, goal: None, met: None }
    }

    /// Depends on a database.
    pub(super) fn on(self, database: &'static str) -> Self {
        Self { database: Some(database), ..self }
    }

    /// Is compared with something of the same run.
    pub(super) fn beside(self, limit: f64, what: impl Into<String>) -> Self {
        Self { limit: Some((limit, what.into())), ..self }
    }

    /// Shall be so.
    pub(super) fn shall(self, goal: Goal) -> Self {
        Self { goal: Some(goal), met: Some(goal.is_met(self.value)), ..self }
    }
}

/// The machine, as far as it matters for comparing figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// Its processor.
    pub processor: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel.
    pub system: String,
    /// Load average of the last minute before the run: others' work spoils figures.
    pub load_before: f64,
}

impl Machine {
    /// This one; what its `/proc` does not tell stays empty.
    pub(super) fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| -> Option<String> {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kilobytes = memory.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            memory_bytes: kilobytes.unwrap_or_default() * 1024,
            system: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim()),
            load_before: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

/// Everything about a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// Commit it was built from, if the build was told (`UCWA_RELAY_COMMIT`).
    pub commit: Option<&'static str>,
    /// Whether it is a build for speed; figures of any other say little.
    pub optimized: bool,
    /// Whether the run was a short one; its figures say little, too.
    pub quick: bool,
    /// When it began.
    pub began_at: Timestamp,
    /// Where.
    pub machine: Machine,
    /// Versions of the databases.
    pub databases: Vec<String>,
    /// In the order in which they were measured.
    pub figures: Vec<Figure>,
}

impl Report {
    /// An empty one.
    pub(super) fn begin(quick: bool) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("UCWA_RELAY_COMMIT"),
            optimized: !cfg!(debug_assertions),
            quick,
            began_at: Timestamp::now(),
            machine: Machine::here(),
            databases: Vec::new(),
            figures: Vec::new(),
        }
    }
}

/// The value below which `share` of the sorted values lie (nearest rank). 0 if there are none.
pub(super) fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a place in a list that fits into memory"
    )]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// In ascending order.
pub(super) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let values = sorted(vec![3.0, 1.0, 2.0, 4.0]);
        let found = [0.5, 0.99, 0.0].map(|share| percentile(&values, share));
        assert_eq!(found.map(|value| value.to_string()), ["2", "4", "1"]);
        assert_eq!(percentile(&[], 0.5).to_string(), "0");
    }

    #[test]
    fn a_goal_is_met_at_its_very_limit() {
        let figure = |goal| Figure::new("f", 5.0, "ms").shall(goal).met;
        assert_eq!(figure(Goal::AtMost(5.0)), Some(true));
        assert_eq!(figure(Goal::AtMost(4.9)), Some(false));
        assert_eq!(figure(Goal::AtLeast(5.0)), Some(true));
        assert_eq!(figure(Goal::AtLeast(5.1)), Some(false));
    }
}
