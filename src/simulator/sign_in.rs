//! Discovery, the challenge and the web ticket service: everything up to a valid token.
//!
//! Owns the tokens. A token belongs to one account and one site and expires; nothing renews it but another grant. The
//! web ticket service takes the grants that the settings name: a password, or (MS-OCAUTHWS) a connection that HTTP's
//! `NTLM` or `Negotiate` has signed in, for which `ntlm` does the server's part.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{self, HeaderValue},
};
use tokio::time::Instant;

use super::{
    DiscoveryRedirect, WindowsSignIn,
    application::Account,
    ntlm,
    payload::Resource,
    server::{Exchange, Outcome, Reply, Server, Site, read_form, reply},
};

/// The page that browsers embed to call across origins; it does nothing here.
pub(crate) const XFRAME: &str = "<!DOCTYPE html><html><head><title>XFrame</title></head><body></body></html>";

const ROOT: &str = "/Autodiscover/AutodiscoverService.svc/root";

const PASSWORD_GRANT: &str = "password";
const WINDOWS_GRANT: &str = "urn:microsoft.rtc:windows";

#[derive(Clone)]
struct Token {
    account: Arc<Account>,
    site: Site,
    valid_until: Instant,
}

/// The tokens that were handed out.
#[derive(Default)]
pub(crate) struct Tokens {
    by_text: Mutex<HashMap<String, Token>>,
}

impl Tokens {
    fn issue(&self, server: &Server, account: &Arc<Account>, site: Site, lifetime: Duration) -> String {
        let mut bytes = Vec::with_capacity(48);
        for _ in 0..6 {
            bytes.extend_from_slice(&server.dice.number().to_be_bytes());
        }
        let text = format!("cwt=AAEB{}", URL_SAFE_NO_PAD.encode(bytes));
        let now = Instant::now();
        let mut tokens = self.by_text.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() % 512 == 511 {
            tokens.retain(|_, token| token.valid_until > now);
        }
        tokens
            .insert(text.clone(), Token { account: Arc::clone(account), site, valid_until: now + lifetime });
        text
    }

    /// The account whose token the request bears, if it is valid where the request came to.
    pub(crate) fn account(&self, exchange: &Exchange) -> Option<Arc<Account>> {
        let text = bearer_of(&exchange.headers)?;
        let mut tokens = self.by_text.lock().unwrap_or_else(PoisonError::into_inner);
        let token = tokens.get(text)?;
        if token.valid_until > Instant::now() {
            return (token.site == exchange.site).then(|| Arc::clone(&token.account));
        }
        tokens.remove(text);
        None
    }

    /// The account whose token the request bears, wherever and however long it is valid.
    pub(crate) fn bearer(&self, headers: &HeaderMap) -> Option<Arc<Account>> {
        let tokens = self.by_text.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&tokens.get(bearer_of(headers)?)?.account))
    }

    /// Makes the token that the request bears invalid.
    pub(crate) fn forget(&self, headers: &HeaderMap) {
        if let Some(text) = bearer_of(headers) {
            self.by_text.lock().unwrap_or_else(PoisonError::into_inner).remove(text);
        }
    }

    /// Makes every token of an account invalid.
    pub(crate) fn revoke(&self, account: &str) {
        let mut tokens = self.by_text.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, token| token.account.uri != account);
    }
}

fn bearer_of(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, text) = value.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| text.trim())
}

/// The root resource, which needs no token.
pub(crate) fn root(server: &Server, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::GET)?;
    let origin = &exchange.origin;
    // Only the address that discovery begins with leads elsewhere; what it leads to does not.
    let redirect = server.now().discovery_redirect.clone().filter(|_| exchange.segments.is_empty());
    if let Some(DiscoveryRedirect { location, status }) = redirect {
        let location = absolute(exchange, &location);
        let Some(status) = status else {
            let root = Resource::new("root", format!("{origin}{ROOT}")).untyped();
            return Ok(exchange.resource(StatusCode::OK, &root.link("redirect", location)));
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FOUND);
        let mut answer = reply(status, "text/html", String::new());
        if let Ok(location) = HeaderValue::from_str(&location) {
            answer.headers_mut().insert(header::LOCATION, location);
        }
        return Ok(answer);
    }
    let domain = &server.settings.domain;
    let root = Resource::new("root", format!("{origin}{ROOT}?originalDomain={domain}"))
        .untyped()
        .link("user", format!("{origin}{ROOT}/oauth/user?originalDomain={domain}"))
        .link("xframe", format!("{origin}/Autodiscover/XFrame/XFrame.html"));
    Ok(exchange.resource(StatusCode::OK, &root))
}

/// The user resource: the challenge, or with a token the way to the applications.
pub(crate) fn user(server: &Server, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::GET)?;
    if server.tokens.account(exchange).is_none() {
        return Ok(challenge(server, exchange));
    }
    let origin = &exchange.origin;
    // As captured: `self` lacks the `oauth` of the address that was asked for.
    let user = Resource::new("user", format!("{origin}{ROOT}/user")).untyped();
    if let Some(location) = server.now().user_redirect.as_ref().filter(|_| exchange.site == Site::Front) {
        return Ok(exchange.resource(StatusCode::OK, &user.link("redirect", absolute(exchange, location))));
    }
    let pool = server.pool_address.map_or_else(|| origin.clone(), |address| format!("http://{address}"));
    let user = user
        .link("applications", format!("{pool}/ucwa/oauth/v1/applications"))
        .link("xframe", format!("{origin}/Autodiscover/XFrame/XFrame.html"));
    Ok(exchange.resource(StatusCode::OK, &user))
}

/// The address, of this very server where it is only a path.
fn absolute(exchange: &Exchange, location: &str) -> String {
    if location.starts_with('/') { format!("{}{location}", exchange.origin) } else { location.to_owned() }
}

/// 401 with the two challenges and a body of HTML.
pub(crate) fn challenge(server: &Server, exchange: &Exchange) -> Reply {
    let mut answer = unauthorized();
    add_challenge(server, exchange, answer.headers_mut());
    answer
}

fn unauthorized() -> Reply {
    let body = "<html><head><title>401 - Unauthorized</title></head>\
        <body><h2>401 - Unauthorized: Access is denied due to invalid credentials.</h2></body></html>";
    reply(StatusCode::UNAUTHORIZED, "text/html", body.to_owned())
}

/// The two challenges, which may come with other statuses as well.
pub(crate) fn add_challenge(server: &Server, exchange: &Exchange, headers: &mut HeaderMap) {
    let bearer = "Bearer trusted_issuers=\"00000002-0000-0ff1-ce00-000000000000@simulator\", \
        client_id=\"00000004-0000-0ff1-ce00-000000000000\"";
    headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static(bearer));
    // Only what works is offered.
    let settings = server.now();
    let windows = (settings.windows_sign_in != WindowsSignIn::Off).then_some(WINDOWS_GRANT);
    let password = settings.password_sign_in.then_some(PASSWORD_GRANT);
    let grants: Vec<&str> = windows.into_iter().chain(password).collect();
    let ticket_service = format!(
        "MsRtcOAuth href=\"{}/WebTicket/oauthtoken\",grant_type=\"{}\"",
        exchange.origin,
        grants.join(",")
    );
    if let Ok(value) = HeaderValue::from_str(&ticket_service) {
        headers.append(header::WWW_AUTHENTICATE, value);
    }
}

/// The web ticket service.
pub(crate) fn token(server: &Server, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::POST)?;
    let windows = server.now().windows_sign_in != WindowsSignIn::Off;
    // The first messages of a handshake may come without the form.
    if windows
        && exchange.headers.contains_key(header::AUTHORIZATION)
        && let Some(unauthorized) = sign_connection_in(server, exchange)
    {
        return Ok(unauthorized);
    }
    let form = read_form(&String::from_utf8_lossy(&exchange.body));
    let field = |name: &str| form.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let mut answer = match field("grant_type") {
        None => refuse("invalid_request", "28020", "No valid security token."),
        Some(PASSWORD_GRANT) if server.now().password_sign_in => {
            let account = field("username").and_then(|name| account_of(server, name));
            match account.filter(|account| field("password") == Some(account.password.as_str())) {
                Some(account) => issue(server, exchange, &account),
                None => refuse("invalid_grant", "28020", "No valid security token."),
            }
        }
        Some(WINDOWS_GRANT) if windows => {
            match exchange.connection.as_ref().and_then(|connection| connection.account()) {
                Some(account) => issue(server, exchange, &account),
                None => unauthorized_by(windows_schemes(server).0.iter().map(|scheme| (*scheme).to_owned())),
            }
        }
        Some(_) => refuse("unsupported_grant_type", "28029", "Authentication type not allowed."),
    };
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer.headers_mut().insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
    Ok(answer)
}

fn issue(server: &Server, exchange: &Exchange, account: &Arc<Account>) -> Reply {
    let lifetime = server.now().token_lifetime;
    let text = server.tokens.issue(server, account, exchange.site, lifetime);
    let seconds = lifetime.as_secs().max(1);
    let body = format!(
        "{{\"access_token\":\"{text}\",\"expires_in\":{seconds},\
         \"ms_rtc_identityscope\":\"local\",\"token_type\":\"Bearer\"}}"
    );
    reply(StatusCode::OK, "application/json", body)
}

/// The schemes under which a connection can be signed in, and whether NTLM works in them.
fn windows_schemes(server: &Server) -> (&'static [&'static str], bool) {
    match server.now().windows_sign_in {
        WindowsSignIn::Off => (&[], false),
        WindowsSignIn::Ntlm => (&["Negotiate", "NTLM"], true),
        WindowsSignIn::Negotiate => (&["Negotiate"], true),
        WindowsSignIn::Kerberos => (&["Negotiate"], false),
    }
}

/// What the web server makes of `Authorization` before the web ticket service sees the request: 401 with how to go on,
/// or nothing where the connection is signed in now.
fn sign_connection_in(server: &Server, exchange: &Exchange) -> Option<Reply> {
    let (schemes, ntlm_works) = windows_schemes(server);
    let step = match &exchange.connection {
        Some(connection) if ntlm_works => connection.take(server, &exchange.headers, schemes),
        _ => ntlm::Step::Refused,
    };
    match step {
        ntlm::Step::SignedIn => None,
        ntlm::Step::Refused => Some(unauthorized_by(schemes.iter().map(|scheme| (*scheme).to_owned()))),
        ntlm::Step::Challenge { scheme, token } => Some(unauthorized_by([format!("{scheme} {token}")])),
    }
}

fn unauthorized_by(schemes: impl IntoIterator<Item = String>) -> Reply {
    let mut answer = unauthorized();
    for scheme in schemes {
        if let Ok(value) = HeaderValue::from_str(&scheme) {
            answer.headers_mut().append(header::WWW_AUTHENTICATE, value);
        }
    }
    answer
}

fn refuse(error: &str, number: &str, reason: &str) -> Reply {
    let body = format!("{{\"error\":\"{error}\"}}");
    let mut answer = reply(StatusCode::BAD_REQUEST, "application/json;charset=UTF-8", body);
    let diagnostics = format!("{number};source=\"simulator.invalid\";reason=\"{reason}\"");
    if let Ok(value) = HeaderValue::from_str(&diagnostics) {
        answer.headers_mut().insert("x-ms-diagnostics", value);
    }
    answer
}

/// The account that a request to the web ticket service names.
pub(crate) fn account_named_in(server: &Server, exchange: &Exchange) -> Option<Arc<Account>> {
    let form = read_form(&String::from_utf8_lossy(&exchange.body));
    match form.iter().find(|(known, _)| known == "username") {
        Some((_, name)) => account_of(server, name),
        None => ntlm::account_named_in(server, exchange),
    }
}

/// The account that signs in as `sip:user@domain`, `user@domain`, `DOMAIN\user` or `user`, in any case.
pub(crate) fn account_of(server: &Server, name: &str) -> Option<Arc<Account>> {
    let name = name.trim().to_lowercase();
    let name = name.strip_prefix("sip:").unwrap_or(&name);
    let domain = server.settings.domain.to_lowercase();
    let address = match name.split_once('\\') {
        Some((realm, user)) => {
            let known = realm == domain || Some(realm) == domain.split('.').next();
            known.then(|| format!("{user}@{domain}"))?
        }
        None if name.contains('@') => name.to_owned(),
        None => format!("{name}@{domain}"),
    };
    server.accounts.get(&format!("sip:{address}")).cloned()
}
