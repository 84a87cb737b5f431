//! Section `archive`: what is archived besides messages, invitations and membership.

use serde::Deserialize;

/// Section `archive`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArchiveSection {
    /// Keep who was typing when.
    pub typing: bool,
    /// Keep a full-text index of the messages.
    pub full_text: bool,
    /// Keep each event-channel response as it came.
    pub raw: bool,
}

impl Default for ArchiveSection {
    fn default() -> Self {
        Self { typing: false, full_text: true, raw: false }
    }
}
