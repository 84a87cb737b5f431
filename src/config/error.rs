//! What is wrong with a configuration, in words for the person who wrote it. Values are never repeated: one of them
//! might be a password in the wrong place.

use std::{fmt, path::PathBuf};

/// Why there is no configuration to work with. Every command answers it with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was named, or found, cannot be read.
    #[error("cannot read the configuration file {}: {problem}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why, and what to do.
        problem: String,
    },
    /// The file is not TOML.
    #[error("{} is not TOML: {problem}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Line, column and what was expected there.
        problem: String,
    },
    /// Keys that do not exist or values that make no sense.
    #[error("{}", list(.0))]
    Invalid(Vec<Problem>),
}

/// One thing to correct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, or the environment variable.
    pub origin: String,
    /// For instance `server.poll_timeout`; with an index in `accounts[0].sip_uri`.
    pub key: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}: {}", self.origin, self.key, self.problem)
    }
}

fn list(problems: &[Problem]) -> String {
    match problems {
        [problem] => format!("the configuration cannot be used: {problem}"),
        many => many.iter().fold("the configuration cannot be used:".to_owned(), |text, problem| {
            format!("{text}\n  {problem}")
        }),
    }
}

/// What `validate` of a section has to object to.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<(String, String)>);

impl Findings {
    /// Notes that the value of `key` is no good and what would be.
    pub(super) fn add(&mut self, key: impl Into<String>, problem: impl Into<String>) {
        self.0.push((key.into(), problem.into()));
    }

    /// Notes it unless `good`.
    pub(super) fn check(&mut self, good: bool, key: &str, problem: &str) {
        if !good {
            self.add(key, problem);
        }
    }

    /// `Ok` if there are none; otherwise asks for each key where its value came from.
    pub(super) fn into_result(self, origin_of: impl Fn(&str) -> String) -> Result<(), ConfigError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let problems =
            self.0.into_iter().map(|(key, problem)| Problem { origin: origin_of(&key), key, problem });
        Err(ConfigError::Invalid(problems.collect()))
    }
}
