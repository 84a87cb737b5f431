//! Which origins an account talks to.
//!
//! An origin is scheme, host and port. It becomes trusted by the configuration, by discovery under the redirect rule
//! (the sign-in domain, what is below it, and the configured domains), or because an authenticated `user` resource
//! names it. Without this, whoever can answer one discovery request could collect passwords.

use std::{collections::HashSet, sync::Mutex};

use url::{Host, Origin, Url};

use super::{client::SignInSettings, error::UcwaError};

/// Told to the operator behind "is not trusted".
const CONFIGURE: &str = ": add it to server.trusted_domains";
const STAY: &str = "; a link within an application must stay on the application's own host";

/// The trusted origins of one account.
#[derive(Debug)]
pub(super) struct Trust {
    /// The sign-in domain and the configured ones, as a URL spells hosts.
    domains: Vec<String>,
    allow_http: bool,
    origins: Mutex<HashSet<Origin>>,
    /// The configured discovery URL's, which may also serve tokens.
    configured: Option<Origin>,
}

impl Trust {
    pub(super) fn new(settings: &SignInSettings) -> Self {
        let domains = std::iter::once(settings.sip_uri.domain())
            .chain(settings.trusted_domains.iter().map(String::as_str))
            .map(as_url_host)
            .filter(|domain| !domain.is_empty())
            .collect();
        let configured = settings.discovery_url.as_ref().map(Url::origin);
        Self {
            domains,
            allow_http: settings.allow_http,
            origins: Mutex::new(configured.iter().cloned().collect()),
            configured,
        }
    }

    /// Refuses everything but https, and http to a loopback address where the configuration allows it.
    pub(super) fn check_scheme(&self, url: &Url) -> Result<(), UcwaError> {
        match url.scheme() {
            "https" if url.host().is_some() => Ok(()),
            "http" if self.allow_http && is_loopback(url) => Ok(()),
            scheme => Err(UcwaError::Insecure { url: format!("{scheme}://{}", host_of(url)) }),
        }
    }

    /// The redirect rule for a host.
    pub(super) fn passes_redirect_rule(&self, url: &Url) -> bool {
        if self.configured.as_ref() == Some(&url.origin()) {
            return true;
        }
        let Some(host) = url.host() else { return false };
        let text = host.to_string();
        let text = text.trim_end_matches('.');
        self.domains.iter().any(|domain| {
            text == domain
                || (matches!(host, Host::Domain(_))
                    && text.strip_suffix(domain.as_str()).is_some_and(|front| front.ends_with('.')))
        })
    }

    /// Takes up an origin under the redirect rule. `lead` says what led there, at the start of a sentence.
    pub(super) fn admit(&self, url: &Url, lead: &'static str) -> Result<(), UcwaError> {
        self.check_scheme(url)?;
        if !self.passes_redirect_rule(url) {
            return Err(UcwaError::Untrusted { lead, host: host_of(url), advice: CONFIGURE });
        }
        self.insert(url);
        Ok(())
    }

    /// Takes up the origin that an authenticated `user` resource names for the applications.
    pub(super) fn admit_from_user(&self, url: &Url) -> Result<(), UcwaError> {
        self.check_scheme(url)?;
        self.insert(url);
        Ok(())
    }

    /// Only for addresses whose origin is trusted already.
    pub(super) fn require(&self, url: &Url) -> Result<(), UcwaError> {
        self.check_scheme(url)?;
        if self.origins.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(&url.origin()) {
            return Ok(());
        }
        Err(UcwaError::Untrusted { lead: "an address of the application", host: host_of(url), advice: STAY })
    }

    fn insert(&self, url: &Url) {
        self.origins.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(url.origin());
    }
}

/// Resolves a link against the address it was found at, which may be another origin. Fragments and user information
/// are dropped: an HTTP client would turn the latter into an `Authorization` header.
pub(super) fn resolve(base: &Url, href: &str) -> Result<Url, UcwaError> {
    let mut url =
        base.join(href.trim()).map_err(|problem| UcwaError::BadLink { problem: problem.to_string() })?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(UcwaError::BadLink { problem: format!("its scheme is {}", url.scheme()) });
    }
    url.set_fragment(None);
    // Both can only fail for addresses without a host, which http and https always have.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Ok(url)
}

/// Resolves a link that has to stay on the origin of `base`.
pub(super) fn resolve_within(base: &Url, href: &str) -> Result<Url, UcwaError> {
    let url = resolve(base, href)?;
    if url.origin() == base.origin() {
        return Ok(url);
    }
    Err(UcwaError::Untrusted { lead: "a link of the application", host: host_of(&url), advice: STAY })
}

/// Host and port, for sentences.
pub(super) fn host_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
    }
}

/// A configured domain as URLs spell it: lower case, punycode, without the dots and stars that people put around it.
pub(super) fn as_url_host(domain: &str) -> String {
    let domain = domain.trim().trim_start_matches("*.").trim_matches('.');
    Host::parse(domain).map_or_else(|_| domain.to_lowercase(), |host| host.to_string())
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name.trim_end_matches('.') == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::client::SignInMethod;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn trust(trusted: &[&str], discovery_url: Option<&str>, allow_http: bool) -> Trust {
        Trust::new(&SignInSettings {
            sip_uri: "sip:alice@contoso.test".parse().unwrap(),
            username: String::new(),
            method: SignInMethod::Password,
            discovery_url: discovery_url.map(url),
            trusted_domains: trusted.iter().map(|domain| (*domain).to_owned()).collect(),
            allow_http,
        })
    }

    #[test]
    fn the_redirect_rule_takes_the_domain_what_is_below_it_and_the_configured_ones() {
        let trust = trust(
            &["online.lync.test", ".Pool.Corp.", "*.star.test", "10.1.2.3", "b\u{fc}cher.test"],
            None,
            false,
        );
        for (address, trusted) in [
            ("https://contoso.test/", true),
            ("https://CONTOSO.test./", true),
            ("https://lyncdiscover.contoso.test/", true),
            ("https://a.b.contoso.test:4443/", true),
            ("https://online.lync.test/", true),
            ("https://webdir1.online.lync.test/", true),
            ("https://fe1.pool.corp/", true),
            ("https://web.star.test/", true),
            ("https://10.1.2.3/", true),
            ("https://web.xn--bcher-kva.test/", true),
            ("https://evilcontoso.test/", false),
            ("https://contoso.test.evil.test/", false),
            ("https://contoso.test@evil.test/", false),
            ("https://lync.test/", false),
            ("https://110.1.2.3/", false),
            ("https://1.10.1.2.3.evil.test/", false),
            ("https://test/", false),
            ("https://[::1]/", false),
        ] {
            assert_eq!(trust.admit(&url(address), "discovery").is_ok(), trusted, "{address}");
            assert_eq!(trust.require(&url(address)).is_ok(), trusted, "{address}");
        }
    }

    #[test]
    fn an_untrusted_host_is_named_with_the_remedy() {
        let refused =
            trust(&[], None, false).admit(&url("https://evil.test:444/x?secret=1"), "discovery").unwrap_err();
        assert_eq!(
            refused.to_string(),
            "discovery leads to evil.test:444, which is not trusted: add it to server.trusted_domains"
        );
    }

    #[test]
    fn http_is_for_loopback_and_only_if_allowed() {
        for (address, allowed) in [
            ("http://127.0.0.1:8080/", true),
            ("http://localhost/", true),
            ("http://[::1]:1/", true),
            ("http://contoso.test/", false),
            ("http://localhost.contoso.test/", false),
            ("ftp://127.0.0.1/", false),
        ] {
            assert_eq!(trust(&[], None, true).check_scheme(&url(address)).is_ok(), allowed, "{address}");
            assert!(trust(&[], None, false).check_scheme(&url(address)).is_err(), "{address}");
        }
    }

    #[test]
    fn a_configured_origin_is_trusted_with_its_port_only() {
        let trust = trust(&[], Some("http://127.0.0.1:8080/root"), true);
        assert!(trust.require(&url("http://127.0.0.1:8080/other")).is_ok());
        assert!(trust.admit(&url("http://127.0.0.1:8080/token"), "discovery").is_ok());
        assert!(trust.admit(&url("http://127.0.0.1:8081/token"), "discovery").is_err());
    }

    #[test]
    fn links_of_an_application_stay_on_its_origin() {
        let base = url("https://pool.contoso.test/ucwa/oauth/v1/applications/102");
        for (href, resolved) in [
            ("/ucwa/me", Some("https://pool.contoso.test/ucwa/me")),
            ("https://pool.contoso.test:443/ucwa/me?a=b#c", Some("https://pool.contoso.test/ucwa/me?a=b")),
            ("https://u:p@pool.contoso.test/x", Some("https://pool.contoso.test/x")),
            ("https://other.contoso.test/ucwa/me", None),
            ("https://pool.contoso.test:444/ucwa/me", None),
            ("http://pool.contoso.test/ucwa/me", None),
            ("//evil.test/x", None),
            ("data:text/plain,x", None),
            ("javascript:x", None),
            ("https://", None),
        ] {
            assert_eq!(resolve_within(&base, href).ok().as_ref().map(Url::as_str), resolved, "{href}");
        }
    }
}
