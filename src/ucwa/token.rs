//! Tokens: one per origin, got for a password from the token service that the origin's challenge names: by giving it
//! the password, or by proving with NTLM that it is known (MS-OCAUTHWS's Windows grant).
//!
//! A token is renewed before it ends, lazily in front of the request that finds it due, and once when a server refuses
//! it. One renewal at a time per origin; who waited for it shares its result, also a failure. A password that the
//! token service refused is never sent again by the same client, so that the relay locks nobody out. Source:
//! `AuthenticationInUCWA`, `CreateAnApplication`, MS-OCAUTHWS.

use std::{sync::Arc, time::Duration};

use reqwest::{Method, header::HeaderValue};
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::{sync::MutexGuard, time::Instant};
use url::{Url, form_urlencoded};

use super::{
    client::{SignInMethod, UcwaClient},
    error::{Action, UcwaError, printable},
    http::{Call, Reply},
    ntlm::{self, NtlmError},
    observe::Observation,
    trust::{host_of, resolve},
};

/// Assumed if the token service does not tell.
const DEFAULT_LIFETIME: Duration = Duration::from_hours(1);
/// A renewal ahead of time may take so long before the old token is used instead: the event channel has to be asked
/// again within 30 s.
const RENEWAL_PATIENCE: Duration = Duration::from_secs(10);

/// An access token of one origin.
#[derive(Debug)]
pub(super) struct Token {
    /// `Bearer cwt=...`, marked as sensitive.
    pub bearer: HeaderValue,
    expires_at: Instant,
}

/// What is known about an origin's tokens. Locked while one is being got.
#[derive(Debug, Default)]
pub(super) struct OriginTokens {
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The token service.
    service: Option<Url>,
    token: Option<Arc<Token>>,
    renew_at: Option<Instant>,
    /// The last attempt, if it failed, and when it did.
    failure: Option<(Instant, UcwaError)>,
}

impl OriginTokens {
    /// A token was got and may be used or renewed.
    pub(super) async fn has_token(&self) -> bool {
        self.state.lock().await.token.is_some()
    }

    /// Uses the other origin's token here too.
    pub(super) async fn borrow_from(&self, other: &Self) -> Option<Arc<Token>> {
        let (service, token, renew_at) = {
            let other = other.state.lock().await;
            (other.service.clone(), other.token.clone(), other.renew_at)
        };
        let mut state = self.state.lock().await;
        (state.service, state.token, state.renew_at) = (service, token, renew_at);
        state.token.clone()
    }

    /// Forgets a borrowed token that was refused.
    pub(super) async fn forget(&self) {
        *self.state.lock().await = State::default();
    }
}

impl UcwaClient {
    /// The token to send to the origin of `url`, renewed if it is due.
    ///
    /// # Errors
    /// Those of the token service; the request for which the token is wanted was not sent.
    pub(super) async fn token_for(&self, url: &Url) -> Result<Arc<Token>, UcwaError> {
        let began = Instant::now();
        let tokens = self.origin_tokens(url);
        let mut state = tokens.state.lock().await;
        // Every request comes by here and few of them ask the service: that part has memory of its own.
        let Some(token) = state.token.clone() else {
            return Box::pin(self.obtain(&mut state, url, began)).await;
        };
        let now = Instant::now();
        if state.renew_at.is_none_or(|renew_at| now < renew_at) {
            return Ok(token);
        }
        if now >= token.expires_at {
            return Box::pin(self.obtain(&mut state, url, began)).await;
        }
        let renewal = Box::pin(self.obtain(&mut state, url, began));
        let renewal = tokio::time::timeout(RENEWAL_PATIENCE, renewal).await;
        let problem = match renewal {
            Ok(Ok(renewed)) => return Ok(renewed),
            Ok(Err(error)) if error.action() == Action::StopAccount && !error.is_transport() => {
                return Err(error);
            }
            Ok(Err(error)) => crate::error_chain(&error),
            Err(_) => "the token service did not answer in time".to_owned(),
        };
        tracing::warn!(host = %host_of(url), problem, "a token could not be renewed ahead of time; it is used on");
        let left = token.expires_at.saturating_duration_since(Instant::now());
        state.renew_at = Some(Instant::now() + (left / 4).min(Duration::from_mins(1)));
        Ok(token)
    }

    /// A token to use after the server refused `refused`: a new one, unless somebody else got one meanwhile.
    pub(super) async fn token_after_refusal(
        &self,
        url: &Url,
        refused: &Arc<Token>,
        reply: &Reply,
    ) -> Result<Arc<Token>, UcwaError> {
        let began = Instant::now();
        let tokens = self.origin_tokens(url);
        let mut state = tokens.state.lock().await;
        if let Some(token) = state.token.as_ref().filter(|token| !Arc::ptr_eq(token, refused)) {
            return Ok(Arc::clone(token));
        }
        if reply.challenges().oauth.is_some() {
            state.service = Some(self.token_service(url, reply)?);
        }
        self.obtain(&mut state, url, began).await
    }

    /// Gets the first token of an origin from the token service that an answer names.
    pub(super) async fn token_from_challenge(
        &self,
        url: &Url,
        reply: &Reply,
    ) -> Result<Arc<Token>, UcwaError> {
        let service = self.token_service(url, reply)?;
        let tokens = self.origin_tokens(url);
        let mut state = tokens.state.lock().await;
        state.service = Some(service);
        self.obtain(&mut state, url, Instant::now()).await
    }

    /// The token service that an answer names, if the account may sign in there.
    fn token_service(&self, url: &Url, reply: &Reply) -> Result<Url, UcwaError> {
        let challenges = reply.challenges();
        let method = self.inner.settings.method;
        let Some(oauth) = challenges.oauth else {
            if challenges.offers("bearer") {
                return Err(UcwaError::GrantNotOffered {
                    offered: "Azure AD (Bearer) only".to_owned(),
                    configured: method.describe(),
                });
            }
            return Err(UcwaError::NoChallenge {
                resource: reply.resource,
                host: reply.host.clone(),
                status: reply.status,
            });
        };
        self.inner.observe(|| Observation::Challenge {
            from: reply.host.clone(),
            service: resolve(url, &oauth.href).map(|service| host_of(&service)).unwrap_or_default(),
            grants: oauth
                .grants
                .as_ref()
                .map(|grants| grants.iter().map(|grant| printable(grant, 80)).collect()),
        });
        if !oauth.offers(method.grant()) {
            let offered = oauth.grants.unwrap_or_default().join(", ");
            let offered =
                if offered.is_empty() { "no grant at all".to_owned() } else { printable(&offered, 200) };
            return Err(UcwaError::GrantNotOffered { offered, configured: method.describe() });
        }
        let service = resolve(url, &oauth.href)?;
        self.inner.trust.admit(&service, "the challenge for a token")?;
        Ok(service)
    }

    /// Gets a token and keeps it. `began` is when the caller began to wait: a failure since then is its failure too.
    async fn obtain(
        &self,
        state: &mut MutexGuard<'_, State>,
        url: &Url,
        began: Instant,
    ) -> Result<Arc<Token>, UcwaError> {
        if let Some((at, failure)) = &state.failure
            && *at >= began
        {
            return Err(failure.clone());
        }
        match self.obtain_now(state, url).await {
            Ok((token, lifetime)) => {
                tracing::debug!(host = %host_of(url), lifetime_s = lifetime.as_secs(), "a token was issued");
                self.inner.observe(|| Observation::Token {
                    host: host_of(url),
                    grant: self.inner.settings.method.grant(),
                    lifetime,
                });
                let now = Instant::now();
                state.renew_at = Some(now + renewal_delay(lifetime, rand::random::<f64>()));
                state.failure = None;
                let token = Arc::new(Token { bearer: token, expires_at: now + lifetime });
                state.token = Some(Arc::clone(&token));
                Ok(token)
            }
            Err(error) => {
                state.failure = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn obtain_now(
        &self,
        state: &mut MutexGuard<'_, State>,
        url: &Url,
    ) -> Result<(HeaderValue, Duration), UcwaError> {
        if let Some(service) = state.service.clone() {
            return self.ask_token_service(&service).await;
        }
        // Without Authorization, so that the answer is this origin's own challenge.
        let reply = self.inner.execute(&Call::get("token challenge", url.clone()), None).await?;
        if !matches!(reply.status, 200..=299 | 401 | 403 | 500) {
            return Err(reply.refusal());
        }
        let service = self.token_service(url, &reply)?;
        state.service = Some(service.clone());
        self.ask_token_service(&service).await
    }

    /// Signs in at the token service and reads its answer.
    async fn ask_token_service(&self, service: &Url) -> Result<(HeaderValue, Duration), UcwaError> {
        let host = host_of(service);
        if self.inner.credentials_refused() {
            return Err(UcwaError::CredentialsRefused { host });
        }
        let method = self.inner.settings.method;
        let reply = match method {
            SignInMethod::Password => self.ask_with_password(service).await?,
            SignInMethod::Ntlm => self.ask_with_ntlm(service).await?,
        };
        let answer = serde_json::from_str::<Value>(&reply.text()).unwrap_or(Value::Null);
        let result = read_token_answer(&host, method, reply.status, &answer, reply.retry_after());
        if let Err(error) = &result
            && error.is_credentials_refused()
        {
            self.inner.remember_refused_credentials();
        }
        result
    }

    /// `POST grant_type=password`.
    async fn ask_with_password(&self, service: &Url) -> Result<Reply, UcwaError> {
        let call = token_call(
            service,
            &[
                ("grant_type", SignInMethod::Password.grant()),
                ("username", &self.inner.settings.username),
                ("password", self.inner.password.expose_secret()),
            ],
        );
        self.inner.execute(&call, None).await
    }

    /// `POST grant_type=urn:microsoft.rtc:windows`: once to learn what the service takes, then on a connection of its own
    /// with NTLM's first message and with the answer to its challenge, which sign that connection in.
    ///
    /// A status other than 401 ends the handshake and is the service's answer; a 401 that this returns is its refusal
    /// of user name or password. What a proxy asks for by 407 is not answered.
    async fn ask_with_ntlm(&self, service: &Url) -> Result<Reply, UcwaError> {
        let host = host_of(service);
        let call = token_call(service, &[("grant_type", SignInMethod::Ntlm.grant())]);
        // Servers refuse Windows sign-ins over HTTP/2, so that the shared client is no good for asking either.
        let asking = self.inner.http.one_connection()?;
        let reply = self.inner.watched(&call, asking.execute(&call, None)).await?;
        if reply.status != 401 {
            return Ok(reply);
        }
        let challenges = reply.challenges();
        // Windows takes NTLM's messages within `Negotiate` as they are, so that SPNEGO adds nothing here.
        let Some(scheme) = ["ntlm", "negotiate"].into_iter().find(|scheme| challenges.offers(scheme)) else {
            let offered = printable(&challenges.schemes.join(", "), 80);
            let offered = if offered.is_empty() { "nothing that it names".to_owned() } else { offered };
            return Err(UcwaError::NtlmNotOffered { host, offered });
        };
        let connection = self.inner.http.one_connection()?;
        let first = ntlm::negotiate().map_err(|error| handshake_failure(&reply, error))?;
        let first = proof(scheme, &first)?;
        let reply = self.inner.watched(&call, connection.execute(&call, Some(&first))).await?;
        if reply.status != 401 {
            return Ok(reply);
        }
        let challenges = reply.challenges();
        let Some(challenge) = challenges.token(scheme) else {
            let offered = format!("{scheme} without an answer to NTLM (Kerberos only, or a policy)");
            return Err(UcwaError::NtlmNotOffered { host, offered });
        };
        let answer = ntlm::authenticate(challenge, &self.inner.settings.username, &self.inner.password)
            .map_err(|error| handshake_failure(&reply, error))?;
        let answer = proof(scheme, &answer)?;
        self.inner.watched(&call, connection.execute(&call, Some(&answer))).await
    }
}

/// A request to a token service.
fn token_call(service: &Url, form: &[(&str, &str)]) -> Call<'static> {
    let form = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
    Call {
        resource: "token service",
        method: Method::POST,
        url: service.clone(),
        accept: "application/json",
        body: Some(("application/x-www-form-urlencoded;charset=UTF-8".to_owned(), form)),
        parked: None,
    }
}

/// `Authorization` with a message of NTLM, which printing hides.
fn proof(scheme: &str, message: &str) -> Result<HeaderValue, UcwaError> {
    let scheme = if scheme == "ntlm" { "NTLM" } else { "Negotiate" };
    let mut value = HeaderValue::from_str(&format!("{scheme} {message}"))
        .map_err(|_| UcwaError::Setup { problem: "an NTLM message fits no header".to_owned() })?;
    value.set_sensitive(true);
    Ok(value)
}

fn handshake_failure(reply: &Reply, error: NtlmError) -> UcwaError {
    match error {
        NtlmError::Unreadable => UcwaError::TokenService {
            host: reply.host.clone(),
            status: reply.status,
            error: error.to_string(),
            retry_after: reply.retry_after(),
        },
        NtlmError::NameTooLong => UcwaError::Setup { problem: error.to_string() },
    }
}

/// Tells a token, a refusal that concerns the operator and a passing trouble apart.
fn read_token_answer(
    host: &str,
    method: SignInMethod,
    status: u16,
    answer: &Value,
    retry_after: Option<Duration>,
) -> Result<(HeaderValue, Duration), UcwaError> {
    let host = host.to_owned();
    let trouble = |error: &str| UcwaError::TokenService {
        host: host.clone(),
        status,
        error: printable(error, 80),
        retry_after,
    };
    if (200..300).contains(&status) {
        let Some(token) = answer["access_token"].as_str().filter(|token| !token.is_empty()) else {
            return Err(trouble("without a token"));
        };
        let Ok(mut bearer) = HeaderValue::from_str(&format!("Bearer {token}")) else {
            return Err(trouble("with a token that fits no header"));
        };
        bearer.set_sensitive(true);
        return Ok((bearer, read_lifetime(&answer["expires_in"])));
    }
    match (status, answer["error"].as_str().unwrap_or_default()) {
        (400, "invalid_grant") => match answer["ms_rtc_passiveauthuri"].as_str() {
            Some(address) => Err(UcwaError::PassiveSignInWanted {
                address: printable(address.split(['?', '#']).next().unwrap_or_default(), 200),
            }),
            None => Err(UcwaError::CredentialsRefused { host }),
        },
        (401, _) => Err(UcwaError::CredentialsRefused { host }),
        (400, "unsupported_grant_type") => Err(UcwaError::GrantNotOffered {
            offered: format!("another sign-in (its token service {host} has this one switched off)"),
            configured: method.describe(),
        }),
        (407, _) => Err(trouble("in a proxy's name: the relay signs in at no proxy")),
        (_, error) => Err(trouble(error)),
    }
}

/// `expires_in` is a number or a text, in seconds; absent or nonsense counts as an hour.
fn read_lifetime(expires_in: &Value) -> Duration {
    let seconds = match expires_in {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    match seconds {
        // A year is as good as for ever, and can be added to any instant.
        Some(seconds) if seconds >= 1.0 => Duration::from_secs_f64(seconds.min(31_536_000.0)),
        Some(seconds) if seconds > 0.0 => Duration::from_secs(1),
        _ => DEFAULT_LIFETIME,
    }
}

/// How long after its issue a token is due: at 90 % of its lifetime or 10 minutes before its end, whichever is earlier,
/// but not in the first half; up to a tenth earlier by chance (0 to 1), so that accounts do not renew together.
fn renewal_delay(lifetime: Duration, chance: f64) -> Duration {
    let ahead = lifetime.saturating_sub(Duration::from_mins(10)).max(lifetime / 2);
    lifetime.mul_f64(0.9).min(ahead).mul_f64(1.0 - 0.1 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(status: u16, answer: &Value) -> Result<(HeaderValue, Duration), UcwaError> {
        read_token_answer("sts.test", SignInMethod::Password, status, answer, None)
    }

    #[test]
    fn a_token_is_used_whole_for_as_long_as_it_says() {
        for (expires_in, seconds) in [
            (json!(28289), 28289),
            (json!("3600"), 3600),
            (json!(2), 2),
            (json!(0.2), 1),
            (json!(0), 3600),
            (json!(-1), 3600),
            (json!("soon"), 3600),
            (json!(1e300), 31_536_000),
            (Value::Null, 3600),
        ] {
            let (bearer, lifetime) =
                read(200, &json!({"access_token": "cwt=AA+/=", "expires_in": expires_in})).unwrap();
            assert_eq!((bearer.to_str().unwrap(), lifetime.as_secs()), ("Bearer cwt=AA+/=", seconds));
            assert!(!format!("{bearer:?}").contains("AA"), "a token must not be printed");
        }
    }

    #[test]
    fn refusals_are_told_apart() {
        let refused = |error: &UcwaError| error.is_credentials_refused();
        let stops = |error: &UcwaError| error.action() == Action::StopAccount;
        assert!(refused(&read(400, &json!({"error": "invalid_grant"})).unwrap_err()));
        assert!(refused(&read(401, &Value::Null).unwrap_err()));
        let passive =
            json!({"error": "invalid_grant", "ms_rtc_passiveauthuri": "https://sts.test/p.aspx?ticket=1"});
        match read(400, &passive).unwrap_err() {
            UcwaError::PassiveSignInWanted { address } => assert_eq!(address, "https://sts.test/p.aspx"),
            other => panic!("{other}"),
        }
        let unsupported = read(400, &json!({"error": "unsupported_grant_type"})).unwrap_err();
        assert!(matches!(unsupported, UcwaError::GrantNotOffered { .. }) && stops(&unsupported));
        for error in ["invalid_request", "invalid_scope"] {
            assert!(stops(&read(400, &json!({ "error": error })).unwrap_err()), "{error}");
        }
        assert!(stops(&read(403, &Value::Null).unwrap_err()));
        for (status, answer) in [
            (400, json!({"error": "server_error"})),
            (200, Value::Null),
            (200, json!({"access_token": ""})),
            (200, json!({"access_token": "a\nb"})),
            (500, Value::Null),
            (502, Value::Null),
            (302, Value::Null),
        ] {
            let error = read(status, &answer).unwrap_err();
            assert_eq!(error.action(), Action::RepeatAsIs, "{status} {answer}");
        }
    }

    #[test]
    fn renewal_comes_before_the_end_and_not_at_once() {
        for (lifetime, latest) in [(28800, 25920), (7200, 6480), (3600, 3000), (900, 450), (10, 5), (1, 1)] {
            let lifetime = Duration::from_secs(lifetime);
            for chance in [0.0, 0.5, 1.0] {
                let delay = renewal_delay(lifetime, chance);
                assert!(delay <= Duration::from_secs(latest), "{lifetime:?} {delay:?}");
                assert!(delay >= lifetime.mul_f64(0.45), "{lifetime:?} {delay:?}");
            }
        }
        assert_ne!(renewal_delay(DEFAULT_LIFETIME, 0.0), renewal_delay(DEFAULT_LIFETIME, 1.0));
    }
}
