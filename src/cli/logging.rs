//! Starts the log: filtered, to stderr, as text or JSON.

use std::io::{self, IsTerminal};

use anyhow::anyhow;
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, filter_fn},
    fmt,
    layer::SubscriberExt,
    registry,
    util::SubscriberInitExt,
};

use super::LogFormat;
use crate::{
    config::{Config, TelemetrySection},
    traces::{Traces, is_trace},
};

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
    start_with(filter, format, None)
}

/// As [`start`], and sends spans to a collector, if there is one.
pub(super) fn start_with(filter: &str, format: LogFormat, traces: Option<&Traces>) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| super::failure::UsageError(format!("telemetry.log is not a filter: {error}")))?;
    // Spans for a collector are no context of the log's lines, and go out whatever is logged.
    let logged = filter.and(filter_fn(|metadata| !is_trace(metadata)));
    let registry = registry().with(traces.map(|traces| traces.layer().with_filter(filter_fn(is_trace))));
    let started = match format {
        LogFormat::Text => {
            let colours = io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            let layer = fmt::layer().with_writer(io::stderr).with_ansi(colours);
            registry.with(layer.with_filter(logged)).try_init()
        }
        LogFormat::Json => {
            let layer = fmt::layer().json().flatten_event(true).with_writer(io::stderr);
            registry.with(layer.with_filter(logged)).try_init()
        }
    };
    started.map_err(|error| anyhow!("cannot start the log: {error}"))
}
