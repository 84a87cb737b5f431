//! `[[accounts]]`: accounts declared in the file, for deployments that keep everything in files. The password itself
//! never stands here, only where it is.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Deserializer, de};

use super::{error::Findings, values::check_readable};
use crate::{
    identifiers::SipUri,
    secrets::{credential_file, is_credential_name},
    store::{Auth, InvitationPolicy, NewAccount, SecretSource},
};

/// One `[[accounts]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeclaredAccount {
    /// Its address.
    pub sip_uri: SipUri,
    /// `user@ad-domain` or `DOMAIN\user`; `None`: the address without its scheme.
    #[serde(default)]
    pub username: Option<String>,
    /// How it signs in.
    #[serde(default = "password_grant")]
    pub auth: Auth,
    /// Where its password is; `None`: it is set with `account set-password`.
    #[serde(default)]
    pub password: Option<PasswordReference>,
    /// `None`: as `relay.invitations` says.
    #[serde(default)]
    pub invitations: Option<InvitationPolicy>,
}

fn password_grant() -> Auth {
    Auth::Password
}

/// Where a password is: `{ env = "NAME" }`, `{ file = "PATH" }` or `{ credential = "NAME" }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordReference {
    /// Environment variable of the server.
    Env(String),
    /// File that the server can read.
    File(PathBuf),
    /// Credential of the server's systemd unit.
    Credential(String),
}

impl PasswordReference {
    /// As `accounts.secret_ref` spells it.
    pub fn to_secret_ref(&self) -> String {
        match self {
            Self::Env(name) => format!("env:{name}"),
            Self::File(path) => format!("file:{}", path.display()),
            Self::Credential(name) => format!("credential:{name}"),
        }
    }
}

impl DeclaredAccount {
    /// The row that it declares. [`SecretSource::Missing`] means that the file says nothing about the password, not
    /// that one set otherwise has to go.
    pub fn to_new_account(&self) -> NewAccount {
        NewAccount {
            sip_uri: self.sip_uri.clone(),
            username: self.username.clone().unwrap_or_else(|| self.sip_uri.address().to_owned()),
            auth: self.auth,
            secret: self.password.as_ref().map_or(SecretSource::Missing, |reference| {
                SecretSource::Reference(reference.to_secret_ref())
            }),
            invitations: self.invitations,
        }
    }

    pub(super) fn verify_secret(&self, index: usize, findings: &mut Findings) {
        let key = format!("accounts[{index}].password");
        match &self.password {
            Some(PasswordReference::Env(name))
                if std::env::var_os(name).is_none_or(|value| value.is_empty()) =>
            {
                findings
                    .add(key, format!("the environment variable {name} is not set; set it for the server"));
            }
            Some(PasswordReference::File(path)) => check_readable(findings, key, path),
            Some(PasswordReference::Credential(name)) => match credential_file(name) {
                Some(path) => check_readable(findings, key, &path),
                None => findings.add(
                    key,
                    format!(
                        "systemd gave this process no credentials; write LoadCredential={name}:FILE into the [Service] \
                         section of the server's unit, and for a command beside it set CREDENTIALS_DIRECTORY to the unit's, \
                         below /run/credentials"
                    ),
                ),
            },
            _ => (),
        }
    }
}

pub(super) fn validate(accounts: &[DeclaredAccount], findings: &mut Findings) {
    for (index, account) in accounts.iter().enumerate() {
        if accounts[..index].iter().any(|earlier| earlier.sip_uri == account.sip_uri) {
            findings.add(format!("accounts[{index}].sip_uri"), "is declared twice; remove one of the two");
        }
        if account.username.as_ref().is_some_and(|name| name.trim().is_empty()) {
            findings.add(
                format!("accounts[{index}].username"),
                "is empty; write what Active Directory takes, like user@contoso.com or CONTOSO\\user",
            );
        }
    }
}

const PASSWORD_REMEDY: &str = "say where it is: password = { env = \"NAME\" }, { file = \"PATH\" } or { credential = \
                               \"NAME\" }; or leave it out and use `ucwa-relay account set-password`";

impl<'de> Deserialize<'de> for PasswordReference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ReferenceVisitor)
    }
}

/// Takes a table and refuses everything else without repeating it.
struct ReferenceVisitor;

fn refuse<T, E: de::Error>() -> Result<T, E> {
    Err(E::custom(format!("a password does not belong into a configuration; {PASSWORD_REMEDY}")))
}

impl<'de> de::Visitor<'de> for ReferenceVisitor {
    type Value = PasswordReference;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("{ env = \"NAME\" }, { file = \"PATH\" } or { credential = \"NAME\" }")
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<Self::Value, E> {
        refuse()
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Self::Value, E> {
        refuse()
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
        refuse()
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Self::Value, E> {
        refuse()
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            env: Option<String>,
            file: Option<PathBuf>,
            credential: Option<String>,
        }
        match Table::deserialize(de::value::MapAccessDeserializer::new(map))? {
            Table { env: Some(name), file: None, credential: None } if !name.is_empty() => {
                Ok(PasswordReference::Env(name))
            }
            Table { env: None, file: Some(path), credential: None } if !path.as_os_str().is_empty() => {
                Ok(PasswordReference::File(path))
            }
            Table { env: None, file: None, credential: Some(name) } if is_credential_name(&name) => {
                Ok(PasswordReference::Credential(name))
            }
            _ => Err(de::Error::custom(format!("names no single place; {PASSWORD_REMEDY}"))),
        }
    }
}
