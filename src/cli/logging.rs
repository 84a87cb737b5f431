//! Starts the log: filtered, to stderr, as text or JSON.

use std::io::{self, IsTerminal};

use anyhow::anyhow;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, registry, util::SubscriberInitExt};

use super::LogFormat;
use crate::config::{Config, TelemetrySection};

/// What tools log: what they are asked to, but by default only what goes wrong, since they print their results.
pub(super) fn filter_for_tools(config: &Config) -> &str {
    if config.telemetry == TelemetrySection::default() { "warn" } else { &config.telemetry.log }
}

/// For commands that read no configuration file: the variable that would go over it, or only what goes wrong.
pub(super) fn filter_without_configuration() -> String {
    std::env::var("UCWA_RELAY__TELEMETRY__LOG").unwrap_or_else(|_| "warn".into())
}

/// Starts the log for the rest of the process.
pub(super) fn start(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| super::failure::UsageError(format!("telemetry.log is not a filter: {error}")))?;
    let registry = registry().with(filter);
    let started = match format {
        LogFormat::Text => {
            let colours = io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            registry.with(fmt::layer().with_writer(io::stderr).with_ansi(colours)).try_init()
        }
        LogFormat::Json => {
            registry.with(fmt::layer().json().flatten_event(true).with_writer(io::stderr)).try_init()
        }
    };
    started.map_err(|error| anyhow!("cannot start the log: {error}"))
}
