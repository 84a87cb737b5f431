//! Section `retention`: how long the archive keeps a message.

use serde::Deserialize;

use super::error::Findings;

/// Section `retention`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionSection {
    /// Days, unless the account says otherwise; 0 keeps for ever.
    pub default_days: u32,
}

impl RetentionSection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        findings.check(
            self.default_days <= 36_500,
            "retention.default_days",
            "is out of range; it lies between 0 (for ever) and 36500",
        );
    }
}
