//! Section `telemetry`: logs and traces.

use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use url::Url;

use super::{error::Findings, values};

/// Section `telemetry`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetrySection {
    /// What is logged, as tracing's filter directives: `info`, `info,ucwa_relay=debug`.
    pub log: String,
    /// Where traces go by OTLP.
    #[serde(deserialize_with = "values::optional_url")]
    pub otlp_endpoint: Option<Url>,
}

impl Default for TelemetrySection {
    fn default() -> Self {
        Self { log: "info".into(), otlp_endpoint: None }
    }
}

impl TelemetrySection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        if let Err(error) = EnvFilter::try_new(&self.log) {
            findings.add(
                "telemetry.log",
                format!(
                    "is not a filter ({error}); write a level like \"info\", or \"info,ucwa_relay=debug\""
                ),
            );
        }
    }
}
