//! The `WWW-Authenticate` headers with which a server says where tokens are to be had.
//!
//! They come as several headers or as one, with quoted and bare values, in any case and order, beside challenges of
//! proxies. So they are tokenised, never split at commas. Sources: `AuthenticationInUCWA`, MS-OCAUTHWS, RFC 9110 11,
//! RFC 4559 and MS-NTHT for `Negotiate` and `NTLM`.

/// What the headers of one answer ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Challenges {
    /// The first `MsRtcOAuth` challenge that names a token service.
    pub oauth: Option<OAuthChallenge>,
    /// All schemes in order, lower case: `bearer`, `msrtcoauth`, `negotiate`, `ntlm`.
    pub schemes: Vec<String>,
    /// What the connection's sign-in goes on with, by scheme (`negotiate` or `ntlm`): base64, as given.
    tokens: Vec<(String, String)>,
}

impl Challenges {
    /// The scheme is offered, with or without a token.
    pub(super) fn offers(&self, scheme: &str) -> bool {
        self.schemes.iter().any(|offered| offered == scheme)
    }

    /// The token that came with a scheme.
    pub(super) fn token(&self, scheme: &str) -> Option<&str> {
        self.tokens.iter().find(|(offered, _)| offered == scheme).map(|(_, token)| token.as_str())
    }
}

/// `MsRtcOAuth`: a token service and the grants it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OAuthChallenge {
    /// Address of the token service, as given.
    pub href: String,
    /// `grant_type`, without duplicates. `None` if the server does not say.
    pub grants: Option<Vec<String>>,
}

impl OAuthChallenge {
    /// The server takes this grant, or does not say which it takes.
    pub(super) fn offers(&self, grant: &str) -> bool {
        self.grants
            .as_ref()
            .is_none_or(|grants| grants.iter().any(|offered| offered.eq_ignore_ascii_case(grant)))
    }
}

/// Reads the values of all `WWW-Authenticate` headers of an answer. Nonsense is passed over.
pub(super) fn parse<'a>(headers: impl IntoIterator<Item = &'a str>) -> Challenges {
    let mut challenges = Challenges::default();
    for header in headers {
        let mut scheme = Scheme::default();
        for word in (Words { rest: header, takes_token: false }) {
            match word {
                Word::Scheme(name) => {
                    scheme.finish(&mut challenges);
                    scheme = Scheme { name: name.to_ascii_lowercase(), ..Scheme::default() };
                }
                Word::Token(token) => challenges.tokens.push((scheme.name.clone(), token.to_owned())),
                Word::Parameter(name, value) if name.eq_ignore_ascii_case("href") => {
                    scheme.href = Some(value);
                }
                Word::Parameter(name, value) if name.eq_ignore_ascii_case("grant_type") => {
                    let grants = scheme.grants.get_or_insert_default();
                    for grant in value.split(',').map(str::trim).filter(|grant| !grant.is_empty()) {
                        if !grants.iter().any(|known| known == grant) {
                            grants.push(grant.to_owned());
                        }
                    }
                }
                Word::Parameter(..) => {}
            }
        }
        scheme.finish(&mut challenges);
    }
    challenges
}

#[derive(Default)]
struct Scheme {
    name: String,
    href: Option<String>,
    grants: Option<Vec<String>>,
}

impl Scheme {
    fn finish(&mut self, challenges: &mut Challenges) {
        if self.name.is_empty() {
            return;
        }
        if self.name == "msrtcoauth"
            && challenges.oauth.is_none()
            && let Some(href) = self.href.take().filter(|href| !href.is_empty())
        {
            challenges.oauth = Some(OAuthChallenge { href, grants: self.grants.take() });
        }
        challenges.schemes.push(std::mem::take(&mut self.name));
    }
}

enum Word<'a> {
    Scheme(&'a str),
    Parameter(&'a str, String),
    Token(&'a str),
}

/// Cuts a header into schemes and their parameters.
struct Words<'a> {
    rest: &'a str,
    /// The word before was a scheme that is followed by base64 and not by parameters.
    takes_token: bool,
}

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        if std::mem::take(&mut self.takes_token)
            && let Some((token, rest)) = take_token(self.rest)
        {
            self.rest = rest;
            return Some(Word::Token(token));
        }
        // A quotation mark or an equals sign in front of a word is debris.
        self.rest = self.rest.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ',' | '"' | '='));
        if self.rest.is_empty() {
            return None;
        }
        let end = self
            .rest
            .find(|c: char| c.is_whitespace() || matches!(c, ',' | '=' | '"'))
            .unwrap_or(self.rest.len());
        let (name, after) = self.rest.split_at(end);
        if let Some(value) = after.trim_start().strip_prefix('=') {
            let (value, rest) = take_value(value.trim_start());
            self.rest = rest;
            return Some(Word::Parameter(name, value));
        }
        self.rest = after;
        self.takes_token = name.eq_ignore_ascii_case("negotiate") || name.eq_ignore_ascii_case("ntlm");
        Some(Word::Scheme(name))
    }
}

/// The `token68` of RFC 9110 11.2, if the text goes on with one up to a comma or the end.
fn take_token(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let digits = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~' | '+' | '/')))
        .unwrap_or(text.len());
    let padding = text[digits..].len() - text[digits..].trim_start_matches('=').len();
    let (token, rest) = text.split_at(digits + padding);
    let ends = matches!(rest.trim_start().chars().next(), None | Some(','));
    (digits > 0 && ends).then_some((token, rest))
}

/// A quoted string with backslash escapes, or everything up to a comma or white space.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| c.is_whitespace() || c == ',').unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (index, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &quoted[index + 1..]),
            _ => value.push(c),
        }
    }
    // The closing quotation mark is missing.
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "https://web.contoso.test/WebTicket/oauthtoken";
    const GRANTS: [&str; 3] = ["urn:microsoft.rtc:windows", "urn:microsoft.rtc:anonmeeting", "password"];

    fn assert_offers_all(headers: &[&str]) {
        let challenges = parse(headers.iter().copied());
        let oauth = challenges.oauth.unwrap_or_else(|| panic!("no challenge in {headers:?}"));
        assert_eq!(oauth.href, SERVICE, "{headers:?}");
        assert_eq!(oauth.grants.unwrap(), GRANTS, "{headers:?}");
    }

    #[test]
    fn the_token_service_is_found_in_every_form_of_the_header() {
        let grants = GRANTS.join(",");
        let quoted = format!("MsRtcOAuth href=\"{SERVICE}\",grant_type=\"{grants}\"");
        let bare_href = format!("MsRtcOAuth href={SERVICE},grant_type=\"{grants}\"");
        let folded = format!("MsRtcOAuth href=\"{SERVICE}\",\r\n    grant_type=\"{grants}\"");
        let other_case = format!("MSRTCOAUTH HREF = \"{SERVICE}\" , Grant_Type = \"{grants}\"");
        let other_order = format!("MsRtcOAuth grant_type=\"{grants}\", href={SERVICE}");
        let doubled = format!("MsRtcOAuth href=\"{SERVICE}\",grant_type=\"{grants}, password\"");
        let bearer = "Bearer trusted_issuers=\"0002@contoso.test\", client_id=\"0004\"";
        let empty_bearer = "Bearer trusted_issuers=\"\", client_id=\"0004\"";
        for form in [&quoted, &bare_href, &folded, &other_case, &other_order, &doubled] {
            assert_offers_all(&[form]);
            assert_offers_all(&[bearer, form]);
            assert_offers_all(&[form, bearer]);
            assert_offers_all(&["Negotiate", "NTLM", form]);
            assert_offers_all(&[&format!("{bearer},{form}")]);
            assert_offers_all(&[&format!("{empty_bearer}, {form}")]);
            assert_offers_all(&[&format!("{form}, {bearer}")]);
            assert_offers_all(&[&format!("Negotiate, NTLM, {form}")]);
            assert_offers_all(&[&format!("Negotiate YIIabc==, {form}")]);
        }
    }

    #[test]
    fn a_challenge_without_a_token_service_is_none() {
        for text in [
            "",
            ",",
            "Negotiate",
            "Bearer authorization_uri=\"https://login.test/\"",
            "MsRtcOAuth",
            "\"",
            "=",
            "MsRtcOAuth grant_type=\"password\"",
            "MsRtcOAuth href=\"\"",
            "Basic realm=\"MsRtcOAuth href=x\"",
        ] {
            assert_eq!(parse([text]).oauth, None, "{text}");
        }
        let both = parse(["Bearer a=b, Negotiate"]);
        assert_eq!(both.schemes, ["bearer", "negotiate"]);
    }

    #[test]
    fn the_token_of_a_windows_sign_in_is_kept_whole() {
        for (headers, scheme, token) in [
            (&["NTLM TlRMTVNTUAAC+/A="][..], "ntlm", Some("TlRMTVNTUAAC+/A=")),
            (&["Negotiate", "NTLM TlRM"], "ntlm", Some("TlRM")),
            (&["negotiate  oYG2MIGz== , NTLM"], "negotiate", Some("oYG2MIGz==")),
            (&["Negotiate TlRM, MsRtcOAuth href=\"x\""], "negotiate", Some("TlRM")),
            (&["Negotiate, NTLM TlRM"], "negotiate", None),
            (&["NTLM realm=\"x\""], "ntlm", None),
            (&["NTLM"], "ntlm", None),
            (&["Bearer TlRM"], "bearer", None),
        ] {
            let challenges = parse(headers.iter().copied());
            assert!(challenges.offers(scheme), "{headers:?}");
            assert_eq!(challenges.token(scheme), token, "{headers:?}");
        }
        let both = parse(["Negotiate TlRM, NTLM"]);
        assert_eq!(both.schemes, ["negotiate", "ntlm"]);
        assert!(!both.offers("kerberos"));
    }

    #[test]
    fn escapes_and_missing_ends_are_read() {
        let challenges = parse([r#"MsRtcOAuth href="https:\/\/a.test\/x\"y", grant_type="password"#]);
        let oauth = challenges.oauth.unwrap();
        assert_eq!(oauth.href, "https://a.test/x\"y");
        assert!(oauth.offers("PASSWORD"));
        assert!(!oauth.offers("urn:microsoft.rtc:windows"));
        assert!(parse(["MsRtcOAuth href=x"]).oauth.unwrap().offers("password"), "silence is no refusal");
    }
}
