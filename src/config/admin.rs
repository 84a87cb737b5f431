//! Section `admin`: where the admin page, the metrics and the health checks answer.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;

use super::{
    error::Findings,
    values::{self, check_readable},
};

/// Section `admin`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminSection {
    /// Address and port.
    #[serde(deserialize_with = "values::socket_address")]
    pub listen: SocketAddr,
    /// File with the token that signs in to the page; needed for any address but loopback.
    pub token_file: Option<PathBuf>,
    /// Names, besides `localhost` and addresses, by which browsers may ask for it (`Host`).
    pub names: Vec<String>,
    /// Certificate chain (PEM).
    pub tls_cert_file: Option<PathBuf>,
    /// Its key (PEM).
    pub tls_key_file: Option<PathBuf>,
}

impl Default for AdminSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8470)),
            token_file: None,
            names: Vec::new(),
            tls_cert_file: None,
            tls_key_file: None,
        }
    }
}

impl AdminSection {
    pub(super) fn validate(&self, findings: &mut Findings) {
        findings.check(
            self.listen.ip().is_loopback() || self.token_file.is_some(),
            "admin.listen",
            "is reachable from other machines; listen on 127.0.0.1, or set admin.token_file",
        );
        match (&self.tls_cert_file, &self.tls_key_file) {
            (Some(_), None) => findings.add("admin.tls_cert_file", "needs admin.tls_key_file beside it"),
            (None, Some(_)) => findings.add("admin.tls_key_file", "needs admin.tls_cert_file beside it"),
            _ => (),
        }
    }

    pub(super) fn verify_secret(&self, findings: &mut Findings) {
        if let Some(path) = &self.token_file {
            check_readable(findings, "admin.token_file", path);
        }
        if let Some(path) = &self.tls_key_file {
            check_readable(findings, "admin.tls_key_file", path);
        }
    }
}
