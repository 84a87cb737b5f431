//! Section `database`: where the archive and the queue are.

use std::{fmt, num::NonZeroU32, path::PathBuf, time::Duration};

use serde::Deserialize;
use url::Url;

use super::error::Findings;

/// Section `database`.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatabaseSection {
    /// `sqlite://relative.db`, `sqlite:///absolute/path.db` or `postgres://user@host/db`.
    pub url: String,
    /// Connections for reading; the writer has its own.
    pub max_connections: NonZeroU32,
    /// How long the writer waits for company before it commits.
    pub commit_interval_ms: u64,
}

impl Default for DatabaseSection {
    fn default() -> Self {
        Self {
            url: "sqlite://ucwa-relay.db".into(),
            max_connections: NonZeroU32::new(8).expect("8 is not 0"),
            commit_interval_ms: 2,
        }
    }
}

/// Shows no password.
impl fmt::Debug for DatabaseSection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DatabaseSection")
            .field("url", &self.shown_url())
            .field("max_connections", &self.max_connections)
            .field("commit_interval_ms", &self.commit_interval_ms)
            .finish()
    }
}

impl DatabaseSection {
    /// `commit_interval_ms` as a duration.
    pub fn commit_interval(&self) -> Duration {
        Duration::from_millis(self.commit_interval_ms)
    }

    /// The SQLite file, if it is one.
    pub fn sqlite_path(&self) -> Option<PathBuf> {
        let rest = self.url.strip_prefix("sqlite:")?;
        let path = rest.strip_prefix("//").unwrap_or(rest).split('?').next()?;
        if path.is_empty() || path == ":memory:" {
            return None;
        }
        Some(PathBuf::from(percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned()))
    }

    /// The URL for people: without a password.
    pub fn shown_url(&self) -> String {
        if self.url.starts_with("sqlite:") {
            return self.url.clone();
        }
        let Ok(mut url) = Url::parse(&self.url) else { return "(unreadable)".into() };
        url.set_query(None);
        if url.password().is_some() && url.set_password(Some("***")).is_err() {
            return "(unreadable)".into();
        }
        url.to_string()
    }

    /// The URL as one may type it: without the password and the options.
    pub fn url_without_password(&self) -> String {
        self.shown_url().replacen(":***@", "@", 1)
    }

    pub(super) fn validate(&self, findings: &mut Findings) {
        let understood = match self.url.split_once(':') {
            Some(("sqlite", _)) => self.sqlite_path().is_some() || self.url.contains(":memory:"),
            Some(("postgres" | "postgresql", _)) => {
                Url::parse(&self.url).is_ok_and(|url| url.path().len() > 1)
            }
            _ => false,
        };
        findings.check(
            understood,
            "database.url",
            "names no database; write sqlite://FILE, sqlite:///ABSOLUTE/FILE or postgres://USER@HOST/DATABASE",
        );
        findings.check(
            self.commit_interval_ms <= 1000,
            "database.commit_interval_ms",
            "is out of range; it lies between 0 and 1000, since every message waits that long",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(url: &str) -> DatabaseSection {
        DatabaseSection { url: url.into(), ..DatabaseSection::default() }
    }

    #[test]
    fn a_sqlite_url_names_its_file() {
        for (url, path) in [
            ("sqlite://relative.db", Some("relative.db")),
            ("sqlite:///absolute/path.db", Some("/absolute/path.db")),
            ("sqlite:plain.db?mode=ro", Some("plain.db")),
            ("sqlite:///with%20space.db", Some("/with space.db")),
            ("sqlite::memory:", None),
            ("postgres://host/db", None),
        ] {
            assert_eq!(section(url).sqlite_path(), path.map(PathBuf::from), "{url}");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        assert_eq!(
            section("postgres://me:geheim@host/db?password=x").shown_url(),
            "postgres://me:***@host/db"
        );
        assert_eq!(section("postgres://me@host/db").shown_url(), "postgres://me@host/db");
        assert_eq!(section("postgres://me:geheim@host/db").url_without_password(), "postgres://me@host/db");
    }
}
