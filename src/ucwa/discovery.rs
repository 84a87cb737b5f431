//! Sign-in: autodiscovery, the challenge, the token, the `user` resource and, where the pool is another host, a second
//! token.
//!
//! Nothing is sent to a host that is not trusted, and no redirect is followed with a token. Sources: `RootURL`,
//! `root`, `user`, `redirect` of the UCWA documentation, MS-OCDISCWS.

use std::{pin::pin, time::Duration};

use futures_util::future::{Either, select};
use url::Url;

use super::{
    client::UcwaClient,
    error::UcwaError,
    http::{Call, Reply},
    model::Resource,
    trust::{as_url_host, host_of, resolve},
};

/// How many redirects the whole discovery may follow.
const MAX_HOPS: usize = 5;
/// How long the inside address is waited for before the outside one is asked too.
const HEAD_START: Duration = Duration::from_secs(2);

/// Where a sign-in stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignInStep {
    /// Looking for the account's server.
    Discovery,
    /// Asking where tokens are issued.
    Challenge,
    /// Exchanging the password for a token.
    Token,
    /// Reading the resource `user`.
    User,
    /// Creating or resuming the application.
    Application,
}

/// What a sign-in found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedIn {
    /// The resource `user` of the account's home.
    pub user: Url,
    /// Where applications are created.
    pub applications: Url,
}

/// The addresses that a discovery has been to.
#[derive(Debug, Default)]
struct Trail {
    visited: Vec<Url>,
}

impl Trail {
    fn visit(&mut self, url: &Url) -> Result<(), UcwaError> {
        let problem = if self.visited.contains(url) {
            "it redirects in a loop"
        } else if self.visited.len() > MAX_HOPS {
            "more than five redirects"
        } else {
            self.visited.push(url.clone());
            return Ok(());
        };
        Err(UcwaError::DiscoveryFailed {
            attempts: vec![(host_of(url), problem.to_owned())],
            attention: false,
        })
    }
}

impl UcwaClient {
    /// Finds the account's server and gets the tokens for it. `progress` hears of each step as it begins.
    ///
    /// # Errors
    /// [`UcwaError::DiscoveryFailed`] with what happened at each address (with a configured discovery URL: what
    /// happened there), [`UcwaError::Untrusted`], and those of the token service.
    pub async fn sign_in(
        &self,
        progress: &(dyn Fn(SignInStep) + Send + Sync),
    ) -> Result<SignedIn, UcwaError> {
        progress(SignInStep::Discovery);
        let (mut user, mut trail) = self.find_user().await?;
        loop {
            let (resource, authenticated) = self.read_user(&user, progress).await?;
            if let Some(link) = resource.link("applications") {
                let applications = resolve(&user, &link.href)?;
                if authenticated {
                    self.inner.trust.admit_from_user(&applications)?;
                } else {
                    self.inner.trust.admit(&applications, "the user resource")?;
                }
                self.prepare_pool(&user, &applications, progress).await?;
                self.inner.set_base(&applications);
                return Ok(SignedIn { user, applications });
            }
            let Some(link) = resource.link("redirect") else {
                return Err(UcwaError::Incomplete {
                    resource: "user",
                    what: "a link to applications: the account may not be enabled for Skype for Business",
                });
            };
            progress(SignInStep::Discovery);
            let root = resolve(&user, &link.href)?;
            self.inner.trust.admit(&root, "the user resource")?;
            user = self.walk(root, &mut trail).await?;
        }
    }

    /// From the sign-in address to the `user` link.
    async fn find_user(&self) -> Result<(Url, Trail), UcwaError> {
        let settings = &self.inner.settings;
        if let Some(root) = &settings.discovery_url {
            let mut trail = Trail::default();
            let user = self.walk(root.clone(), &mut trail).await?;
            return Ok((user, trail));
        }
        let domain = as_url_host(settings.sip_uri.domain());
        let (inside, outside) = (format!("lyncdiscoverinternal.{domain}"), format!("lyncdiscover.{domain}"));
        let mut ask_inside = pin!(self.ask_candidate(inside.clone()));
        let ask_outside = pin!(self.ask_candidate(outside.clone()));
        let (inside_failure, outside_failure) = match tokio::time::timeout(HEAD_START, &mut ask_inside).await
        {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(first)) => match ask_outside.await {
                Ok(found) => return Ok(found),
                Err(second) => (first, second),
            },
            Err(_) => match select(ask_inside, ask_outside).await {
                Either::Left((Ok(found), _)) | Either::Right((Ok(found), _)) => return Ok(found),
                Either::Left((Err(first), ask_outside)) => match ask_outside.await {
                    Ok(found) => return Ok(found),
                    Err(second) => (first, second),
                },
                Either::Right((Err(second), ask_inside)) => match ask_inside.await {
                    Ok(found) => return Ok(found),
                    Err(first) => (first, second),
                },
            },
        };
        Err(both_failed((inside, inside_failure), (outside, outside_failure)))
    }

    async fn ask_candidate(&self, host: String) -> Result<(Url, Trail), UcwaError> {
        let root = Url::parse(&format!("https://{host}/")).map_err(|problem| UcwaError::Setup {
            problem: format!(
                "no discovery address can be made from {}: {problem}",
                self.inner.settings.sip_uri
            ),
        })?;
        self.inner.trust.admit(&root, "discovery")?;
        let mut trail = Trail::default();
        let user = self.walk(root, &mut trail).await?;
        Ok((user, trail))
    }

    /// From a root to its `user` link, over redirects, without a token.
    async fn walk(&self, root: Url, trail: &mut Trail) -> Result<Url, UcwaError> {
        let mut url = root;
        loop {
            self.inner.trust.require(&url)?;
            trail.visit(&url)?;
            let reply = self.inner.execute(&Call::get("autodiscover", url.clone()), None).await?;
            let next = match reply.status {
                301 | 302 | 303 | 307 | 308 => redirect_target(&url, &reply)?,
                _ => {
                    let resource = reply.resource()?;
                    match (resource.link("user"), resource.link("redirect")) {
                        (Some(link), _) => {
                            let user = resolve(&url, &link.href)?;
                            self.inner.trust.admit(&user, "discovery")?;
                            return Ok(user);
                        }
                        (None, Some(link)) => resolve(&url, &link.href)?,
                        (None, None) => {
                            return Err(UcwaError::Incomplete {
                                resource: "autodiscover",
                                what: "both links, user and redirect",
                            });
                        }
                    }
                }
            };
            self.inner.trust.admit(&next, "discovery")?;
            url = next;
        }
    }

    /// Reads `user`, first without a token to learn who issues them. Tells whether a token was needed.
    async fn read_user(
        &self,
        user: &Url,
        progress: &(dyn Fn(SignInStep) + Send + Sync),
    ) -> Result<(Resource, bool), UcwaError> {
        progress(SignInStep::Challenge);
        let reply = self.inner.execute(&Call::get("user", user.clone()), None).await?;
        if (200..300).contains(&reply.status) {
            progress(SignInStep::User);
            return Ok((reply.resource()?, false));
        }
        if reply.status != 401 && reply.challenges().oauth.is_none() {
            return Err(reply.refusal());
        }
        progress(SignInStep::Token);
        self.token_from_challenge(user, &reply).await?;
        progress(SignInStep::User);
        Ok((self.authorized(&Call::get("user", user.clone())).await?.resource()?, true))
    }

    /// Gets the pool's own token if the applications are on another origin than the user.
    async fn prepare_pool(
        &self,
        user: &Url,
        applications: &Url,
        progress: &(dyn Fn(SignInStep) + Send + Sync),
    ) -> Result<(), UcwaError> {
        let tokens = self.origin_tokens(applications);
        if tokens.has_token().await {
            return Ok(());
        }
        let reply = self.inner.execute(&Call::get("applications", applications.clone()), None).await?;
        if reply.challenges().oauth.is_some() {
            progress(SignInStep::Token);
            self.token_from_challenge(applications, &reply).await?;
            return Ok(());
        }
        if !matches!(reply.status, 200..=299 | 401 | 403 | 405) {
            return Err(reply.refusal());
        }
        // Some pools do not say where their tokens are issued; the first one may do.
        self.inner.trust.admit(applications, "the user resource")?;
        let Some(token) = tokens.borrow_from(&self.origin_tokens(user)).await else {
            return Err(UcwaError::NoChallenge {
                resource: "applications",
                host: reply.host,
                status: reply.status,
            });
        };
        let call = Call::get("applications", applications.clone());
        let reply = match self.inner.execute(&call, Some(&token.bearer)).await {
            Ok(reply) => reply,
            Err(error) => {
                tokens.forget().await;
                return Err(error);
            }
        };
        if matches!(reply.status, 401 | 403 | 500) {
            tokens.forget().await;
            return Err(UcwaError::SecondTokenRefused { first: host_of(user), pool: host_of(applications) });
        }
        Ok(())
    }
}

fn redirect_target(url: &Url, reply: &Reply) -> Result<Url, UcwaError> {
    match reply.location() {
        Some(location) => resolve(url, &location),
        None => Err(reply.refusal()),
    }
}

/// An untrusted host is the operator's to decide, whatever the other address did.
fn both_failed(inside: (String, UcwaError), outside: (String, UcwaError)) -> UcwaError {
    let mut attempts = Vec::new();
    let mut attention = false;
    for (host, failure) in [inside, outside] {
        if matches!(failure, UcwaError::Untrusted { .. } | UcwaError::Setup { .. }) {
            return failure;
        }
        attention |= matches!(failure, UcwaError::Tls { .. });
        attempts.push((host, crate::error_chain(&failure)));
    }
    UcwaError::DiscoveryFailed { attempts, attention }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::Action;

    #[test]
    fn both_failures_are_told_and_an_untrusted_host_wins() {
        let timeout =
            || UcwaError::Timeout { resource: "autodiscover", host: "a.test".to_owned(), sent: false };
        let both = both_failed(("in.test".to_owned(), timeout()), ("out.test".to_owned(), timeout()));
        let text = both.to_string();
        assert!(text.contains("in.test") && text.contains("out.test") && text.contains("in time"), "{text}");
        assert_eq!(both.action(), Action::RepeatAsIs);
        let untrusted = UcwaError::Untrusted { lead: "discovery", host: "evil.test".to_owned(), advice: "" };
        let failure = both_failed(("in.test".to_owned(), untrusted), ("out.test".to_owned(), timeout()));
        assert!(matches!(failure, UcwaError::Untrusted { .. }));
        assert_eq!(failure.action(), Action::StopAccount);
    }

    #[test]
    fn a_trail_ends_after_five_redirects_and_at_a_repeated_address() {
        let mut trail = Trail::default();
        for hop in 0..=MAX_HOPS {
            trail.visit(&Url::parse(&format!("https://a.test/{hop}")).unwrap()).unwrap();
        }
        assert!(trail.visit(&Url::parse("https://a.test/more").unwrap()).is_err());
        let mut trail = Trail::default();
        trail.visit(&Url::parse("https://a.test/").unwrap()).unwrap();
        assert!(trail.visit(&Url::parse("https://a.test/").unwrap()).is_err());
    }
}
