//! From file and environment to a validated [`Config`], and from what figment and serde say to what a person can act on.

use std::path::{Path, PathBuf};

use figment::{
    Figment, Metadata, Profile, Provider,
    error::{Actual, Kind},
    providers::{Format, Toml},
    value::{Dict, Map, Value},
};
use serde::Deserialize;

use super::{
    AdminSection, ArchiveSection, ClusterSection, Config, ConfigError, DatabaseSection, LOOKUP,
    OutboxSection, Problem, RelaySection, RetentionSection, SecretsSection, ServerSection, TelemetrySection,
    error::Findings,
};

const PREFIX: &str = "UCWA_RELAY__";
const FROM_ENVIRONMENT: &str = "environment";

/// The variables `UCWA_RELAY__SECTION__KEY`, passed in so that tests need not touch the process.
#[derive(Debug, Default)]
pub(super) struct Environment(pub(super) Vec<(String, String)>);

impl Environment {
    pub(super) fn of_this_process() -> Self {
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        Self(std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value))).collect())
    }
}

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named(FROM_ENVIRONMENT)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        let mut dict = Dict::new();
        for (name, text) in &self.0 {
            let Some(key) = name.strip_prefix(PREFIX) else { continue };
            // Numbers, booleans, arrays and tables as in TOML; anything else is a text.
            let value: Value = text.parse().unwrap_or_else(|never| match never {});
            insert(&mut dict, &key.to_lowercase(), value);
        }
        Ok(Profile::Default.collect(dict))
    }
}

/// Puts `value` at `section__key`, among what is there.
fn insert(dict: &mut Dict, path: &str, value: Value) {
    let Some((first, rest)) = path.split_once("__") else {
        dict.insert(path.to_owned(), value);
        return;
    };
    let inner = dict.entry(first.to_owned()).or_insert_with(|| Value::from(Dict::new()));
    if !matches!(inner, Value::Dict(..)) {
        *inner = Value::from(Dict::new());
    }
    if let Value::Dict(_, inner) = inner {
        insert(inner, rest, value);
    }
}

/// Names of the variables that set keys of the configuration.
pub(super) fn overrides() -> Vec<String> {
    let Environment(variables) = Environment::of_this_process();
    let mut names: Vec<String> =
        variables.into_iter().map(|(name, _)| name).filter(|name| name.starts_with(PREFIX)).collect();
    names.sort_unstable();
    names
}

pub(super) fn load(path: Option<&Path>, environment: Environment) -> Result<Config, ConfigError> {
    let file = match path {
        Some(path) => Some(path.to_owned()),
        None => LOOKUP.iter().map(PathBuf::from).find(|path| path.exists()),
    };
    let mut figment = Figment::new();
    if let Some(path) = &file {
        figment = figment.merge(Toml::string(&read(path)?));
    }
    let figment = figment.merge(environment);
    let mut config: Config = figment.extract().map_err(|errors| explain(errors, file.as_deref()))?;
    config.file = file;

    let mut findings = Findings::default();
    config.validate(&mut findings);
    findings.into_result(|key| {
        let path: Vec<String> =
            key.split(['.', '[']).map(|part| part.trim_end_matches(']').to_owned()).collect();
        origin(figment.find_metadata(&path.join(".")), &path, config.file.as_deref())
    })?;
    Ok(config)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => "; `ucwa-relay init` writes a starter file",
            std::io::ErrorKind::PermissionDenied => {
                "; run as the user that the file belongs to, or make it readable"
            }
            std::io::ErrorKind::InvalidData => "; TOML is UTF-8 text",
            _ => "",
        };
        ConfigError::Unreadable { path: path.to_owned(), problem: format!("{error}{remedy}") }
    })
}

/// The file or the environment variable that set the key at `path`.
fn origin(metadata: Option<&Metadata>, path: &[String], file: Option<&Path>) -> String {
    match (metadata, file) {
        (Some(metadata), _) if metadata.name == FROM_ENVIRONMENT => {
            let named = path.iter().take_while(|part| part.parse::<usize>().is_err());
            format!("{PREFIX}{}", named.map(|part| part.to_uppercase()).collect::<Vec<_>>().join("__"))
        }
        (Some(_), Some(file)) => file.display().to_string(),
        (_, Some(file)) => format!("{} (default)", file.display()),
        (_, None) => "default".into(),
    }
}

fn explain(errors: figment::Error, file: Option<&Path>) -> ConfigError {
    let mut problems = Vec::new();
    for error in errors {
        if let (Some(path), Kind::Message(text), true) = (file, &error.kind, error.path.is_empty()) {
            return ConfigError::Syntax { path: path.to_owned(), problem: without_source_lines(text) };
        }
        let origin = origin(error.metadata.as_ref(), &error.path, file);
        let mut path = error.path.clone();
        if let Kind::MissingField(name) = &error.kind {
            path.push(name.to_string());
        }
        problems.push(Problem { origin, key: spell(&path), problem: in_words(&error.kind, &path) });
    }
    ConfigError::Invalid(problems)
}

/// `accounts.0.sip_uri` as people write it: `accounts[0].sip_uri`.
fn spell(path: &[String]) -> String {
    path.iter().fold(String::new(), |text, part| match part.parse::<usize>() {
        Ok(index) => format!("{text}[{index}]"),
        Err(_) if text.is_empty() => part.clone(),
        Err(_) => format!("{text}.{part}"),
    })
}

/// A TOML error without the line that it quotes: a password may stand there.
fn without_source_lines(text: &str) -> String {
    let quoted =
        |line: &&str| line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ').starts_with('|');
    let lines: Vec<&str> = text.lines().filter(|line| !quoted(line)).map(str::trim).collect();
    lines.join(": ").replace("TOML parse error ", "")
}

fn in_words(kind: &Kind, path: &[String]) -> String {
    match kind {
        Kind::Message(text) => text.clone(),
        Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
            format!("is {}, but {} belongs there", type_in_words(actual), expected_in_words(expected))
        }
        Kind::UnknownVariant(_, choices) => format!("is none of the possible values: {}", choices.join(", ")),
        Kind::UnknownField(name, known) => unknown_key(name, known, path),
        Kind::MissingField(_) => "is missing".into(),
        other => other.to_string(),
    }
}

fn type_in_words(actual: &Actual) -> &'static str {
    match actual {
        Actual::Bool(_) => "true or false",
        Actual::Unsigned(_) | Actual::Signed(_) => "a whole number",
        Actual::Float(_) => "a number with a fraction",
        Actual::Char(_) | Actual::Str(_) => "a text",
        Actual::Seq => "a list",
        Actual::Map => "a table",
        _ => "something else",
    }
}

/// serde's name of what it expected, without Rust's.
fn expected_in_words(expected: &str) -> &str {
    match expected {
        "u16" | "u32" | "u64" | "usize" => "a whole number",
        "a nonzero u32" => "a whole number above 0",
        "a string" => "a text",
        "a boolean" => "true or false",
        "path string" => "a path",
        "a sequence" => "a list of texts",
        text if text.starts_with("struct ") => "a table",
        text => text,
    }
}

fn unknown_key(name: &str, known: &'static [&'static str], path: &[String]) -> String {
    let problem = if path.len() == 1 { "there is no such section" } else { "there is no such key" };
    if let Some(nearest) = nearest(name, known) {
        return format!("{problem}; did you mean {nearest}?");
    }
    if let Some((section, _)) = keys_by_section().into_iter().find(|(_, keys)| keys.contains(&name)) {
        return format!("{problem}; did you mean {section}.{name}?");
    }
    format!("{problem}; known are {}", known.join(", "))
}

/// A section, and how its struct refuses a key with a value.
type Section = (&'static str, fn(&str, Value) -> Option<Kind>);

const SECTIONS: [Section; 11] = [
    ("database", refusal::<DatabaseSection>),
    ("server", refusal::<ServerSection>),
    ("relay", refusal::<RelaySection>),
    ("outbox", refusal::<OutboxSection>),
    ("archive", refusal::<ArchiveSection>),
    ("retention", refusal::<RetentionSection>),
    ("admin", refusal::<AdminSection>),
    ("secrets", refusal::<SecretsSection>),
    ("cluster", refusal::<ClusterSection>),
    ("telemetry", refusal::<TelemetrySection>),
    ("accounts", refusal::<super::DeclaredAccount>),
];

/// Every section with its keys, as serde knows them: asked for a key that it cannot have, a struct lists those that it has.
pub(super) fn keys_by_section() -> [(&'static str, &'static [&'static str]); 11] {
    SECTIONS.map(|(section, refuse)| match refuse("", Value::from(0)) {
        Some(Kind::UnknownField(_, known)) => (section, known),
        _ => (section, &[][..]),
    })
}

/// What a key takes, in words: what its type asks for instead of a table that nothing takes. Empty if there is no such key.
pub(super) fn expected_values(section: &str, key: &str) -> String {
    let nothing_takes_this = Value::from(Dict::from([(String::new(), Value::from(Dict::new()))]));
    let refusal = SECTIONS
        .into_iter()
        .find(|(name, _)| *name == section)
        .and_then(|(_, refuse)| refuse(key, nothing_takes_this));
    match refusal {
        Some(Kind::InvalidType(_, expected)) => expected_in_words(&expected).to_owned(),
        Some(Kind::UnknownVariant(_, choices)) => {
            let choices: Vec<String> = choices.iter().map(|choice| format!("`\"{choice}\"`")).collect();
            format!("one of {}", choices.join(", "))
        }
        Some(Kind::UnknownField(_, keys)) if !key.is_empty() => {
            format!("a table with one of `{}`", keys.join("`, `"))
        }
        Some(Kind::Message(expected)) => expected.trim_start_matches("is not ").to_owned(),
        _ => String::new(),
    }
}

fn refusal<'de, T: Deserialize<'de>>(key: &str, value: Value) -> Option<Kind> {
    Value::from(Dict::from([(key.to_owned(), value)])).deserialize::<T>().err().map(|error| error.kind)
}

fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let distances = candidates.iter().map(|candidate| (edit_distance(word, candidate), *candidate));
    let (distance, candidate) = distances.min()?;
    (distance <= 1 + word.len() / 4).then_some(candidate)
}

/// Levenshtein's distance.
fn edit_distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str) -> Result<Config, String> {
        load_with(text, &[])
    }

    fn load_with(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ucwa-relay.toml");
        std::fs::write(&file, text).unwrap();
        let environment =
            Environment(variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect());
        load(Some(&file), environment).map_err(|error| error.to_string())
    }

    #[test]
    fn each_mistake_is_named_with_file_key_and_remedy() {
        let table: &[(&str, &[&str])] = &[
            (
                "[databse]\nurl = 'x'",
                &["ucwa-relay.toml: databse: there is no such section; did you mean database?"],
            ),
            ("[nonsense]\n", &["nonsense: there is no such section; known are database, server"]),
            (
                "[server]\npol_timeout = '3m'",
                &["server.pol_timeout: there is no such key; did you mean poll_timeout?"],
            ),
            ("[server]\nlisten = '127.0.0.1:1'", &["server.listen", "did you mean admin.listen?"]),
            ("url = 'sqlite://a.db'", &["url: there is no such section", "did you mean database.url?"]),
            ("[database]\nurl = 5", &["database.url: is a whole number, but a text belongs there"]),
            ("[database]\nurl = 'mysql://me:geheim@host/db'", &["database.url", "sqlite://", "postgres://"]),
            ("[database]\nmax_connections = 0", &["database.max_connections", "a whole number above 0"]),
            ("[database]\nmax_connections = '8'", &["database.max_connections: is a text"]),
            ("[database]\ncommit_interval_ms = 5000", &["database.commit_interval_ms", "1000"]),
            ("[server]\npoll_timeout = 180", &["server.poll_timeout", "\"30s\""]),
            ("[server]\npoll_timeout = '2h'", &["server.poll_timeout", "180s and 30m"]),
            ("[server]\npoll_timeout = '60s'", &["server.poll_timeout", "180s and 30m"]),
            ("[server]\npoll_timeout = '-5m'", &["server.poll_timeout", "negative"]),
            ("[server]\npoll_timeout = 'soon'", &["server.poll_timeout", "\"30s\""]),
            (
                "[server]\ndiscovery_url = 'http://127.0.0.1:1/'",
                &["server.discovery_url", "server.allow_http = true"],
            ),
            (
                "[server]\nallow_http = true\ndiscovery_url = 'http://lync.contoso.com/'",
                &["server.discovery_url", "loopback"],
            ),
            (
                "[server]\ndiscovery_url = 'https://relay:geheim@lync.contoso.com/'",
                &["server.discovery_url: has a user name or a password in it"],
            ),
            ("[server]\ndiscovery_url = 'contoso.com'", &["server.discovery_url", "https://"]),
            ("[server]\ntrusted_domains = ['https://x/']", &["server.trusted_domains", "without scheme"]),
            ("[server]\nca_file = '/does/not/exist.pem'", &["server.ca_file", "/does/not/exist.pem"]),
            ("[relay]\ninvitations = 'maybe'", &["relay.invitations", "accept, decline, ignore"]),
            ("[relay]\npresence = 'online'", &["relay.presence", "Online, Busy"]),
            ("[relay]\nculture = 'english please'", &["relay.culture", "en-US"]),
            ("[outbox]\nretry_base = '1h'", &["outbox.retry_base", "outbox.retry_max"]),
            ("[outbox]\nuncertain = 'drop'", &["outbox.uncertain", "hold, retry"]),
            ("[outbox]\npoll_ms = 0", &["outbox.poll_ms"]),
            ("[outbox]\nsettle_after = '4s'", &["outbox.settle_after", "5s and 10m", "time to come"]),
            ("[admin]\nlisten = '0.0.0.0:8470'", &["admin.listen", "admin.token_file"]),
            ("[admin]\nlisten = 'everywhere'", &["admin.listen", "127.0.0.1:8470"]),
            ("[admin]\ntls_cert_file = '/x'", &["admin.tls_cert_file", "admin.tls_key_file"]),
            ("[cluster]\nlease_ttl_s = 1", &["cluster.lease_ttl_s", "5"]),
            ("[telemetry]\nlog = 'a=b=c'", &["telemetry.log", "info,ucwa_relay=debug"]),
            ("[[accounts]]\nusername = 'x'", &["accounts[0].sip_uri: is missing"]),
            ("[[accounts]]\nsip_uri = 'alice'", &["accounts[0].sip_uri", "there is no @ in it"]),
            (
                "[[accounts]]\nsip_uri = 'a@x.y'\n[[accounts]]\nsip_uri = 'sip:A@x.y'",
                &["accounts[1].sip_uri", "declared twice"],
            ),
            ("[[accounts]]\nsip_uri = 'a@x.y'\nauth = 'magic'", &["accounts[0].auth", "password, ntlm"]),
            ("[[accounts]]\nsip_uri = 'a@x.y'\npassword = {}", &["accounts[0].password", "env = "]),
            (
                "[[accounts]]\nsip_uri = 'a@x.y'\npassword = { environment = 'X' }",
                &["accounts[0].password.environment", "known are env, file"],
            ),
            ("[server", &["ucwa-relay.toml is not TOML: at line 1, column 8"]),
        ];
        for (text, expected) in table {
            let error = load_text(text).map(|_| "no error").unwrap_err();
            for part in *expected {
                assert!(error.contains(part), "{text}\ngave: {error}\nwithout: {part}");
            }
        }
    }

    #[test]
    fn a_password_in_the_file_is_refused_and_not_repeated() {
        for value in ["'geheim-4711'", "4711", "47.11", "[ 'geheim-4711' ]", "geheim-4711"] {
            let text = format!("[[accounts]]\nsip_uri = 'a@x.y'\npassword = {value}");
            let error = load_text(&text).map(|_| "no error").unwrap_err();
            assert!(!error.contains("4711") && !error.contains("47.11"), "{error}");
        }
        let error = load_text("[[accounts]]\nsip_uri = 'a@x.y'\npassword = 'plain'").unwrap_err();
        for part in ["accounts[0].password", "{ env = ", "{ file = "] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_database_password_is_not_repeated() {
        let error = load_text("[database]\nurl = 'mysql://me:geheim@host/db'").unwrap_err();
        assert!(!error.contains("geheim"), "{error}");
        let config = load_text("[database]\nurl = 'postgres://me:geheim@host/db'").unwrap();
        assert!(!format!("{config:?}").contains("geheim"), "{config:?}");
    }

    #[test]
    fn all_mistakes_of_validation_are_told_at_once() {
        let error = load_text("[outbox]\npoll_ms = 0\n[cluster]\nlease_ttl_s = 1").unwrap_err();
        assert!(error.contains("outbox.poll_ms") && error.contains("cluster.lease_ttl_s"), "{error}");
    }

    #[test]
    fn the_environment_wins_and_is_named_when_it_is_wrong() {
        let file = "[outbox]\nmax_attempts = 3\nretry_base = '10s'";
        let variables = [
            ("UCWA_RELAY__OUTBOX__MAX_ATTEMPTS", "7"),
            ("UCWA_RELAY__ADMIN__LISTEN", "127.0.0.1:9999"),
            ("UCWA_RELAY__SERVER__TRUSTED_DOMAINS", "a.example, b.example"),
            ("UCWA_RELAY__ARCHIVE__FULL_TEXT", "false"),
            ("UCWA_RELAY__CLUSTER__NODE_ID", "42"),
            ("UCWA_RELAY_OTHER", "ignored"),
        ];
        let config = load_with(file, &variables).unwrap();
        assert_eq!(config.outbox.max_attempts.get(), 7);
        assert_eq!(config.outbox.retry_base.as_secs(), 10);
        assert_eq!(config.admin.listen.port(), 9999);
        assert_eq!(config.server.trusted_domains, ["a.example", "b.example"]);
        assert!(!config.archive.full_text);
        assert_eq!(config.cluster.node_id, "42");

        for (name, value, expected) in [
            (
                "UCWA_RELAY__OUTBOX__POLL_MS",
                "often",
                "UCWA_RELAY__OUTBOX__POLL_MS: outbox.poll_ms: is a text",
            ),
            ("UCWA_RELAY__OUTBOX__POLL_MS", "0", "UCWA_RELAY__OUTBOX__POLL_MS: outbox.poll_ms: "),
            (
                "UCWA_RELAY__OUTBOX__POL_MS",
                "5",
                "UCWA_RELAY__OUTBOX__POL_MS: outbox.pol_ms: there is no such key",
            ),
            ("UCWA_RELAY__OUTBX__POLL_MS", "5", "did you mean outbox?"),
        ] {
            let error = load_with(file, &[(name, value)]).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let error =
            load(Some(Path::new("/does/not/exist.toml")), Environment::default()).unwrap_err().to_string();
        assert!(error.contains("/does/not/exist.toml") && error.contains("ucwa-relay init"), "{error}");
    }

    #[test]
    fn default_toml_says_what_default_says() {
        let mut config = load_text(crate::config::reference::DEFAULT_TOML).unwrap();
        config.file = None;
        assert_eq!(config, Config::default());
    }

    #[test]
    fn the_key_file_lies_beside_the_database() {
        let key_file = |text: &str| load_text(text).unwrap().key_file();
        assert_eq!(key_file(""), Path::new("ucwa-relay.key"));
        assert_eq!(
            key_file("[database]\nurl = 'sqlite:///var/lib/x/a.db?mode=rw'"),
            Path::new("/var/lib/x/ucwa-relay.key")
        );
        assert_eq!(key_file("[database]\nurl = 'sqlite://data/a.db'"), Path::new("data/ucwa-relay.key"));
        assert_eq!(key_file("[secrets]\nkey_file = '/k'"), Path::new("/k"));
        let beside_the_configuration = key_file("[database]\nurl = 'postgres://host/db'");
        assert!(
            beside_the_configuration.is_absolute() && beside_the_configuration.ends_with("ucwa-relay.key")
        );
    }

    #[test]
    fn what_has_no_effect_yet_is_told() {
        assert!(Config::default().without_effect().is_empty());
        let config = load_text("[archive]\nraw = true\n[retention]\ndefault_days = 30").unwrap();
        let keys: Vec<&str> = config.without_effect().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["archive.raw"]);
    }

    #[test]
    fn secrets_that_cannot_be_read_are_named() {
        let config = load_text(
            "[[accounts]]\nsip_uri = 'a@x.y'\npassword = { env = 'UCWA_RELAY_TEST_UNSET' }\n\
             [[accounts]]\nsip_uri = 'b@x.y'\npassword = { file = '/does/not/exist' }",
        )
        .unwrap();
        let error = config.verify_secrets().unwrap_err().to_string();
        for part in [
            "ucwa-relay.toml: accounts[0].password",
            "UCWA_RELAY_TEST_UNSET",
            "accounts[1].password",
            "/does/not/exist",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
