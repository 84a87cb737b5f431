//! Section `secrets`: the key that seals account passwords in the database.

use std::path::PathBuf;

use serde::Deserialize;

use super::error::Findings;

/// Section `secrets`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecretsSection {
    /// `None`: beside the database; see [`super::Config::key_file`].
    pub key_file: Option<PathBuf>,
}

impl SecretsSection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        findings.check(
            self.key_file.as_ref().is_none_or(|path| !path.as_os_str().is_empty() && !path.is_dir()),
            "secrets.key_file",
            "names no file; write the path of the key file, or leave the key out",
        );
    }
}
