//! Who may ask: the right `Host` always, the token where one is configured.
//!
//! A page that anybody may have opened in the operator's browser can make that browser ask `127.0.0.1`, under a name of
//! its own that resolves there (DNS rebinding). Such a request carries that name in `Host`, so only the names by which
//! this listener is known are answered.

use std::{net::IpAddr, sync::Arc};

use anyhow::Context as _;
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

use crate::config::AdminSection;

/// Shortest token that is accepted: a shorter one can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// Said with every answer.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; \
         form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    // Not "no-referrer": with it browsers hide from us, too, where a form came from (Fetch, "append a request Origin header").
    (header::REFERRER_POLICY, "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// What a request is measured against.
#[derive(Debug)]
pub(super) struct Guard {
    names: Vec<String>,
    address: IpAddr,
    token: Option<SecretString>,
}

impl Guard {
    /// # Errors
    /// If `admin.token_file` can't be read or holds no usable token.
    pub(super) fn new(section: &AdminSection) -> anyhow::Result<Self> {
        let token = match &section.token_file {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("admin.token_file {} can't be read", path.display()))?;
                let token = text.trim();
                anyhow::ensure!(
                    token.len() >= SHORTEST_TOKEN,
                    "admin.token_file {} holds a token of {} characters, but fewer than {SHORTEST_TOKEN} can be \
                     guessed; write a longer one (openssl rand -hex 24)",
                    path.display(),
                    token.len()
                );
                Some(SecretString::from(token))
            }
        };
        let names = section.names.iter().map(|name| name.to_ascii_lowercase()).collect();
        Ok(Self { names, address: section.listen.ip(), token })
    }

    /// Whether the listener is known by the name that a `Host` header gives, whatever its port.
    fn knows_host(&self, host: &str) -> bool {
        let name = host_name(host).to_ascii_lowercase();
        if name == "localhost" || self.names.contains(&name) {
            return true;
        }
        match name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            // An address can't be rebound: who asks by it means this machine.
            Ok(address) => address.is_loopback() || address == self.address || self.address.is_unspecified(),
            Err(_) => false,
        }
    }

    /// Whether a token is asked for.
    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Whether this is the token.
    pub(super) fn is_right(&self, given: &str) -> bool {
        self.token.as_ref().is_some_and(|token| same(given.trim(), token))
    }

    /// Whether a request may see more than health: it carries the token, or none is needed.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .is_some_and(|(_, given)| same(given.trim(), token))
    }
}

/// Takes as long for a token that is almost right as for one that is not at all. Digests are compared, since a comparison
/// of texts tells by its time whether they are of one length.
fn same(given: &str, token: &SecretString) -> bool {
    let digest = |text: &str| Sha256::digest(text.as_bytes());
    digest(given).ct_eq(&digest(token.expose_secret())).into()
}

/// `Host` without its port.
fn host_name(host: &str) -> &str {
    if host.starts_with('[') {
        return host.find(']').map_or(host, |end| &host[..=end]);
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

/// By which name, and at which port, a request asks for this listener. HTTP/2 says it in the address.
pub(super) fn asked_host<'r>(headers: &'r HeaderMap, uri: &'r Uri) -> Option<&'r str> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    host.or_else(|| uri.authority().map(Authority::as_str))
}

/// Refuses foreign names and adds the headers that every answer carries.
pub(super) async fn protect(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let host = asked_host(request.headers(), request.uri()).map(str::to_owned);
    let mut response = match host {
        Some(host) if guard.knows_host(&host) => next.run(request).await,
        Some(_) => (
            StatusCode::MISDIRECTED_REQUEST,
            "This server does not go by that name. Ask it as localhost or by its address, or add the name to \
             admin.names in the configuration.\n",
        )
            .into_response(),
        None => (StatusCode::BAD_REQUEST, "The request names no host.\n").into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(listen: &str, names: &[&str]) -> Guard {
        let section = AdminSection {
            listen: listen.parse().unwrap(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            ..AdminSection::default()
        };
        Guard::new(&section).unwrap()
    }

    #[test]
    fn only_its_own_names_are_answered() {
        let table = [
            ("localhost", true),
            ("LOCALHOST:8470", true),
            ("127.0.0.1:8470", true),
            ("127.0.0.1", true),
            ("[::1]:8470", true),
            ("relay.contoso.com:8470", true),
            ("Relay.Contoso.COM", true),
            ("evil.example", false),
            ("evil.example:8470", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("192.0.2.9:8470", false),
            ("", false),
        ];
        let guard = guard("127.0.0.1:8470", &["relay.contoso.com"]);
        for (host, answered) in table {
            assert_eq!(guard.knows_host(host), answered, "{host}");
        }
    }

    #[test]
    fn a_listener_on_every_address_is_known_by_any_address_but_by_no_foreign_name() {
        let guard = guard("0.0.0.0:8470", &[]);
        assert!(guard.knows_host("192.0.2.9:8470"));
        assert!(!guard.knows_host("evil.example"));
    }

    #[test]
    fn a_token_is_asked_for_where_one_is_configured_and_a_short_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let with = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Guard::new(&AdminSection { token_file: Some(path.clone()), ..AdminSection::default() })
        };
        assert!(format!("{:#}", with("short\n").unwrap_err()).contains("openssl rand"));
        let guard = with("a-token-that-is-long-enough\n").unwrap();
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))])
        };
        assert!(guard.admits(&headers("Bearer a-token-that-is-long-enough")));
        assert!(guard.admits(&headers("bearer  a-token-that-is-long-enough")));
        for refused in
            ["Bearer a-token-that-is-long-enougH", "Basic a-token-that-is-long-enough", "Bearer", ""]
        {
            assert!(!guard.admits(&headers(refused)), "{refused}");
        }
        assert!(!guard.admits(&HeaderMap::new()));
        assert!(!format!("{guard:?}").contains("long-enough"));
    }
}
