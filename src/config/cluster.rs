//! Section `cluster`: several servers on one database.

use std::time::Duration;

use serde::Deserialize;

use super::{error::Findings, values};

/// Section `cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// This server's name in `account_status`, `outbox` and `nodes`; no two servers share one. Default: the host's name.
    #[serde(deserialize_with = "values::text")]
    pub node_id: String,
    /// Seconds after which another node may take over the accounts of one that fell silent.
    pub lease_ttl_s: u32,
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self { node_id: host_name(), lease_ttl_s: 30 }
    }
}

impl ClusterSection {
    /// [`Self::lease_ttl_s`].
    pub fn lease_ttl(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_ttl_s))
    }

    pub(super) fn validate(&self, findings: &mut Findings) {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        findings.check(
            !self.node_id.is_empty() && self.node_id.len() <= 100 && self.node_id.chars().all(good),
            "cluster.node_id",
            "is not a name; use up to 100 letters, digits, dots and hyphens",
        );
        findings.check(
            (5..=3600).contains(&self.lease_ttl_s),
            "cluster.lease_ttl_s",
            "is out of range; it lies between 5 and 3600",
        );
    }
}

/// The host's name as the system tells it, with other characters replaced; `ucwa-relay` where it tells none.
fn host_name() -> String {
    let told = ["/proc/sys/kernel/hostname", "/etc/hostname"]
        .into_iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .or_else(|| std::env::var("HOSTNAME").ok())
        .unwrap_or_default();
    let good = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
    let name: String = told.trim().chars().take(100).map(good).collect();
    if name.is_empty() { "ucwa-relay".into() } else { name }
}
