//! The configuration: a TOML file, then the environment, checked as a whole before anything starts.
//!
//! One section is one file with one struct, its own `Default` and `validate`. [`Config::load`] is the only way in: it
//! finds the file, merges `UCWA_RELAY__SECTION__KEY` over it, and answers with a [`ConfigError`] that names the file or
//! the environment variable, the key, what is wrong and what would be right. Every problem that can be told at once is
//! told at once. `config/default.toml` documents each key; [`reference()`] reads it, and tests hold it to the structs.
//!
//! Relative paths (and `sqlite://relative.db`) start at the working directory, wherever the file is.

mod accounts;
mod admin;
mod archive;
mod cluster;
mod database;
mod error;
mod load;
mod outbox;
mod reference;
mod relay;
mod retention;
mod secrets;
mod server;
mod telemetry;
mod values;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub(crate) use self::values::parse_duration;
pub use self::{
    accounts::{DeclaredAccount, PasswordReference},
    admin::AdminSection,
    archive::ArchiveSection,
    cluster::ClusterSection,
    database::DatabaseSection,
    error::{ConfigError, Problem},
    outbox::{OutboxSection, UncertainPolicy},
    reference::{KeyReference, SectionReference, reference},
    relay::{Presence, RelaySection},
    retention::RetentionSection,
    secrets::SecretsSection,
    server::ServerSection,
    telemetry::TelemetrySection,
};
use self::{error::Findings, load::Environment};
use crate::{
    archive::{retry::RetryPolicy, workspace::RuleSettings},
    store::StoreSettings,
};

/// Where the file is looked for when `--config` does not name one; the first that exists is read.
pub const LOOKUP: [&str; 2] = ["ucwa-relay.toml", "/etc/ucwa-relay/ucwa-relay.toml"];

/// Names of the environment variables that go over the file, not their values.
pub fn overrides() -> Vec<String> {
    load::overrides()
}

/// Everything that can be configured, validated.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the archive and the queue are.
    pub database: DatabaseSection,
    /// How Skype for Business servers are found and trusted.
    pub server: ServerSection,
    /// How accounts behave once they are signed in.
    pub relay: RelaySection,
    /// How the queue is worked off.
    pub outbox: OutboxSection,
    /// What is archived.
    pub archive: ArchiveSection,
    /// How long it is kept.
    pub retention: RetentionSection,
    /// The admin page, metrics and health.
    pub admin: AdminSection,
    /// The key that seals passwords.
    pub secrets: SecretsSection,
    /// Several servers on one database.
    pub cluster: ClusterSection,
    /// Logs and traces.
    pub telemetry: TelemetrySection,
    /// Accounts declared in the file; merged into the table `accounts`.
    pub accounts: Vec<DeclaredAccount>,
    /// The file that was read, if there was one.
    #[serde(skip)]
    pub file: Option<PathBuf>,
}

impl Config {
    /// Reads `path`, or the first file of [`LOOKUP`] that exists, or none; then the environment; then validates.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        load::load(path, Environment::of_this_process())
    }

    /// How to open the database.
    pub fn store_settings(&self) -> StoreSettings {
        StoreSettings {
            url: self.database.url.clone(),
            max_connections: self.database.max_connections.get(),
            commit_interval: self.database.commit_interval(),
            full_text: self.archive.full_text,
            node: self.cluster.node_id.clone(),
            lease_ttl: self.cluster.lease_ttl(),
            rules: RuleSettings {
                plain_from_html: crate::ucwa::html::plain_from_html,
                retry: RetryPolicy { base: self.outbox.retry_base, cap: self.outbox.retry_max },
                max_attempts: i64::from(self.outbox.max_attempts.get()),
                retry_uncertain: self.outbox.uncertain == UncertainPolicy::Retry,
                typing: self.archive.typing,
            },
        }
    }

    /// The file with the key that seals passwords: `secrets.key_file`, else `ucwa-relay.key` beside the SQLite file,
    /// else (PostgreSQL) beside the configuration file.
    pub fn key_file(&self) -> PathBuf {
        if let Some(path) = &self.secrets.key_file {
            return path.clone();
        }
        let beside = self.database.sqlite_path().or_else(|| self.file.clone());
        beside.as_deref().and_then(Path::parent).unwrap_or(Path::new("")).join("ucwa-relay.key")
    }

    /// The file with the key that signs seals and tombstones: `ucwa-relay.seal.key` beside [`Config::key_file`]. It is
    /// another one, because who checks passwords has no business signing evidence.
    pub fn seal_key_file(&self) -> PathBuf {
        let beside = self.key_file();
        beside.parent().unwrap_or(Path::new("")).join("ucwa-relay.seal.key")
    }

    /// Tries to read every secret that the configuration refers to, for commands that will need them: passwords of
    /// `[[accounts]]` and `admin.token_file`.
    pub fn verify_secrets(&self) -> Result<(), ConfigError> {
        let mut findings = Findings::default();
        for (index, account) in self.accounts.iter().enumerate() {
            account.verify_secret(index, &mut findings);
        }
        self.admin.verify_secret(&mut findings);
        let origin =
            self.file.as_ref().map_or_else(|| "environment".into(), |file| file.display().to_string());
        findings.into_result(|_| origin.clone())
    }

    /// Keys that were changed although nothing in this version looks at them, each with what it waits for.
    pub fn without_effect(&self) -> Vec<(&'static str, &'static str)> {
        let default = Self::default();
        [("archive.raw", "the raw event stream", self.archive.raw != default.archive.raw)]
            .into_iter()
            .filter(|(_, _, changed)| *changed)
            .map(|(key, waits_for, _)| (key, waits_for))
            .collect()
    }

    fn validate(&self, findings: &mut Findings) {
        self.database.validate(findings);
        self.server.validate(findings);
        self.relay.validate(findings);
        self.outbox.validate(findings);
        self.retention.validate(findings);
        self.admin.validate(findings);
        self.secrets.validate(findings);
        self.cluster.validate(findings);
        self.telemetry.validate(findings);
        accounts::validate(&self.accounts, findings);
    }
}
