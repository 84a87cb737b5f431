//! Section `server`: how Skype for Business servers are found, trusted and waited for.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;
use url::Url;

use super::{
    error::Findings,
    values::{self, check_range, check_readable, is_loopback},
};

/// Section `server`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSection {
    /// Fixed autodiscovery address instead of `lyncdiscoverinternal`/`lyncdiscover` in the account's domain.
    #[serde(deserialize_with = "values::optional_url")]
    pub discovery_url: Option<Url>,
    /// Certificates (PEM) to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Domains, besides the account's own, to which discovery may lead and to which credentials may go.
    #[serde(deserialize_with = "values::list")]
    pub trusted_domains: Vec<String>,
    /// Lets loopback addresses be spoken to without TLS; never any other.
    pub allow_http: bool,
    /// How long the server holds an event-channel request that has nothing to tell.
    #[serde(deserialize_with = "values::duration")]
    pub poll_timeout: Duration,
    /// How long any other request may take.
    #[serde(deserialize_with = "values::duration")]
    pub request_timeout: Duration,
}

impl Default for ServerSection {
    fn default() -> Self {
        Self {
            discovery_url: None,
            ca_file: None,
            trusted_domains: Vec::new(),
            allow_http: false,
            poll_timeout: Duration::from_mins(3),
            request_timeout: Duration::from_secs(45),
        }
    }
}

impl ServerSection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        if let Some(url) = &self.discovery_url
            && url.scheme() == "http"
        {
            if !is_loopback(url) {
                findings.add(
                    "server.discovery_url",
                    "is not encrypted: passwords would be readable on the way; use https:// \
                     (plain http is only ever allowed to loopback addresses)",
                );
            } else if !self.allow_http {
                findings.add(
                    "server.discovery_url",
                    "is not encrypted; use https://, or set server.allow_http = true",
                );
            }
        }
        if let Some(url) = &self.discovery_url
            && (!url.username().is_empty() || url.password().is_some())
        {
            findings.add(
                "server.discovery_url",
                "has a user name or a password in it, which logs would show; leave it out, accounts have their own",
            );
        }
        if let Some(path) = &self.ca_file {
            check_readable(findings, "server.ca_file", path);
        }
        let is_domain = |text: &String| {
            !text.is_empty()
                && text
                    .split('.')
                    .all(|label| !label.is_empty() && label.chars().all(|c| c.is_alphanumeric() || c == '-'))
        };
        findings.check(
            self.trusted_domains.iter().all(is_domain),
            "server.trusted_domains",
            "holds something that is no domain; write names without scheme, port or *, like \"contoso.com\"",
        );
        let (seconds, minutes) = (Duration::from_secs, |count: u64| Duration::from_secs(60 * count));
        check_range(
            findings,
            "server.poll_timeout",
            self.poll_timeout,
            seconds(180)..=minutes(30),
            "180s and 30m, as UCWA has it",
        );
        check_range(
            findings,
            "server.request_timeout",
            self.request_timeout,
            seconds(1)..=minutes(10),
            "1s and 10m",
        );
    }
}
