//! How a password gets into the program: a question, stdin, a file, or a reference that the server follows. Never an
//! argument, since every user of the machine can read those.

use std::{
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::failure::UsageError;
use crate::{
    config::Config,
    identifiers::SipUri,
    secrets::{KeyHold, Sealer, is_credential_name, without_line_end},
    store::SecretSource,
};

/// Where the password comes from; without any of these it is asked for.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct PasswordOptions {
    /// Read the password from stdin and seal it
    #[arg(long = "password-stdin")]
    stdin: bool,
    /// Read the password from a file and seal it
    #[arg(long = "password-file", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Keep only the name of an environment variable, which the server reads at each sign-in
    #[arg(long = "password-env", value_name = "NAME")]
    env: Option<String>,
    /// Keep only a reference that the server follows at each sign-in: `env:NAME`, `file:PATH`, or
    /// `credential:NAME` for a credential of its systemd unit
    #[arg(long = "password-ref", value_name = "REF")]
    reference: Option<String>,
}

impl PasswordOptions {
    /// The source to store for `account`: sealed, or a reference.
    pub(super) fn secret_source(&self, account: &SipUri, config: &Config) -> anyhow::Result<GivenSecret> {
        let given = |source| GivenSecret { source, _hold: None };
        if let Some(name) = &self.env {
            return reference(&format!("env:{name}")).map(given);
        }
        if let Some(text) = &self.reference {
            return reference(text).map(given);
        }
        let password = if self.stdin {
            from_stdin()?
        } else if let Some(path) = &self.file {
            from_file(path)?
        } else {
            ask(account)?
        };
        let key_file = config.key_file();
        let failed = || format!("cannot seal the password of {account}");
        Sealer::load_or_create(&key_file).with_context(failed)?;
        let hold = KeyHold::shared(&key_file).with_context(failed)?;
        // While it is held the newest key stays the newest.
        let sealer = Sealer::load(&key_file).with_context(failed)?;
        let source = SecretSource::Sealed(sealer.seal(account, &password));
        Ok(GivenSecret { source, _hold: Some(hold) })
    }
}

/// What to store. The key that sealed it stays in the key file until this is dropped: not before it is stored.
#[derive(Debug)]
pub(super) struct GivenSecret {
    pub(super) source: SecretSource,
    _hold: Option<KeyHold>,
}

fn reference(text: &str) -> anyhow::Result<SecretSource> {
    match text.split_once(':') {
        Some(("env", name)) if !name.is_empty() && !name.contains(['=', '\0']) => {
            Ok(SecretSource::Reference(text.to_owned()))
        }
        Some(("file", path)) if !path.is_empty() => {
            // The server may have another working directory.
            let path = std::path::absolute(path)?;
            Ok(SecretSource::Reference(format!("file:{}", path.display())))
        }
        Some(("credential", name)) if is_credential_name(name) => {
            Ok(SecretSource::Reference(text.to_owned()))
        }
        // The text is not repeated: somebody may have typed the password.
        _ => {
            let problem = "this is no reference to a password; write env:NAME, file:PATH or credential:NAME";
            Err(UsageError(problem.into()).into())
        }
    }
}

fn from_stdin() -> anyhow::Result<SecretString> {
    let mut text = Zeroizing::new(String::new());
    io::stdin().lock().read_to_string(&mut text).context("cannot read the password from stdin")?;
    one_line(&text, "stdin")
}

fn from_file(path: &Path) -> anyhow::Result<SecretString> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the password from {}", path.display()))?;
    one_line(&Zeroizing::new(text), &path.display().to_string())
}

fn one_line(text: &str, place: &str) -> anyhow::Result<SecretString> {
    let password = without_line_end(text);
    ensure!(!password.is_empty(), "the password in {place} is empty");
    ensure!(
        !password.contains(['\n', '\0']),
        "{place} holds more than one line; only the password belongs there"
    );
    Ok(password.into())
}

fn ask(account: &SipUri) -> anyhow::Result<SecretString> {
    if !io::stdin().is_terminal() {
        let problem = "there is no terminal to ask for the password; use --password-stdin, --password-file FILE or \
                       --password-env NAME";
        return Err(UsageError(problem.into()).into());
    }
    let question = |text: String| rpassword::prompt_password(text).map(SecretString::from);
    let password = question(format!("Password of {account}: ")).context("cannot ask for the password")?;
    ensure!(!password.expose_secret().is_empty(), "the password is empty; nothing was changed");
    let again = question("Once more: ".into()).context("cannot ask for the password")?;
    ensure!(
        password.expose_secret() == again.expose_secret(),
        "the two passwords differ; nothing was changed, try again"
    );
    Ok(password)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_line_end_is_taken_off() {
        assert_eq!(one_line(" a b \r\n", "stdin").unwrap().expose_secret(), " a b ");
        assert!(one_line("\n", "stdin").is_err());
        let error = one_line("geheim\nzwei\n", "/f").unwrap_err().to_string();
        assert!(error.contains("/f") && !error.contains("geheim"), "{error}");
    }

    #[test]
    fn a_reference_is_stored_as_the_server_will_follow_it() {
        assert_eq!(reference("env:A").unwrap(), SecretSource::Reference("env:A".into()));
        assert_eq!(reference("file:/a/b").unwrap(), SecretSource::Reference("file:/a/b".into()));
        let credential = "credential:relay.alice";
        assert_eq!(reference(credential).unwrap(), SecretSource::Reference(credential.into()));
        let SecretSource::Reference(relative) = reference("file:b").unwrap() else { panic!() };
        assert!(relative.starts_with("file:/") && relative.ends_with("/b"), "{relative}");
        for text in ["", "env:", "file:", "credential:", "credential:../x", "geheim", "vault:x"] {
            let error = reference(text).unwrap_err().to_string();
            assert!(error.contains("env:NAME") && !error.contains("geheim"), "{error}");
        }
    }
}
