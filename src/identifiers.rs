//! The identifiers that travel through the whole program, each of its own type so that two cannot be swapped.
//!
//! Database ids are 64-bit integers handed out by the store. [`SipUri`] is the one way in which this program
//! spells a person's address; [`OperationId`] is what ties an outgoing request to the events that answer it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! database_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}

database_id! {
    /// Row of the table `accounts`.
    AccountId
}
database_id! {
    /// Row of the table `sessions`: one UCWA application of one account.
    SessionId
}
database_id! {
    /// Row of the table `conversations`.
    ConversationId
}
database_id! {
    /// Row of the table `messages`.
    MessageId
}
database_id! {
    /// Row of the table `outbox`.
    OutboxId
}

/// A SIP URI as the database stores it: lower case, with its scheme, without parameters (`sip:alice@contoso.com`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SipUri(String);

/// Why a text is not a SIP URI, in words for the person who typed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a SIP address: {problem}; write it like sip:alice@contoso.com")]
pub struct InvalidSipUri {
    text: String,
    problem: &'static str,
}

impl SipUri {
    /// Longest address accepted, in bytes: 64 for the user and 255 for the host (RFC 5321 4.5.3.1) with the scheme.
    pub const MAX_BYTES: usize = 64 + 1 + 255 + 5;

    /// The address with its scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands after the `@`: the SIP domain, from which autodiscovery starts.
    pub fn domain(&self) -> &str {
        self.0.rsplit_once('@').map_or("", |(_, domain)| domain)
    }

    /// The address without its scheme (`alice@contoso.com`).
    pub fn address(&self) -> &str {
        self.0.split_once(':').map_or(&self.0, |(_, address)| address)
    }
}

impl FromStr for SipUri {
    type Err = InvalidSipUri;

    /// Accepts any case, with or without `sip:`/`sips:`, and white space around it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |problem| InvalidSipUri { text: text.chars().take(80).collect(), problem };
        let lower = text.trim().to_lowercase();
        let (scheme, address) = match lower.split_once(':') {
            Some((scheme @ ("sip" | "sips"), address)) => (scheme, address),
            Some(_) => return Err(refuse("only the schemes sip: and sips: are known")),
            None => ("sip", lower.as_str()),
        };
        let Some((user, host)) = address.split_once('@') else {
            return Err(refuse("there is no @ in it"));
        };
        if user.is_empty() {
            return Err(refuse("there is no name before the @"));
        }
        if host.is_empty() || host.starts_with('.') || host.ends_with('.') || host.contains("..") {
            return Err(refuse("there is no host after the @"));
        }
        if !host.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-')) {
            return Err(refuse("the host after the @ has a character that no host name has"));
        }
        if user.chars().any(|c| c.is_whitespace() || c.is_control() || "@<>\"();,:?".contains(c)) {
            return Err(refuse("the name before the @ has a character that needs escaping"));
        }
        if scheme.len() + 1 + address.len() > Self::MAX_BYTES {
            return Err(refuse("it is too long"));
        }
        Ok(Self(format!("{scheme}:{address}")))
    }
}

impl fmt::Display for SipUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl<'de> Deserialize<'de> for SipUri {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// UCWA `operationId`: at most 50 characters, new for every request, committed before the request leaves.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationId(pub String);

impl OperationId {
    /// A fresh random id (UUID version 4, 36 characters).
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_stored_lower_case_with_its_scheme() {
        for text in ["sip:Alice@Contoso.com", "alice@contoso.com", " SIP:ALICE@CONTOSO.COM "] {
            assert_eq!(text.parse::<SipUri>().unwrap().as_str(), "sip:alice@contoso.com");
        }
        let uri: SipUri = "sips:a.b+c@x-y.example".parse().unwrap();
        assert_eq!((uri.domain(), uri.address()), ("x-y.example", "a.b+c@x-y.example"));
    }

    #[test]
    fn a_malformed_address_is_refused_with_the_reason() {
        for text in [
            "",
            "alice",
            "@contoso.com",
            "alice@",
            "alice@a b",
            "tel:+123",
            "a@b@c",
            "a@b..c",
            "a b@c",
            "<a@c>",
        ] {
            let refused = text.parse::<SipUri>().unwrap_err().to_string();
            assert!(refused.contains("is not a SIP address"), "{refused}");
        }
    }
}
