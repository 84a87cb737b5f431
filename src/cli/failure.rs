//! How a failed command ends: words on stderr and an exit code.

use std::process::ExitCode;

use super::LogFormat;
use crate::{config::ConfigError, store::StoreError};

/// What was asked for makes no sense, although the arguments parse.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UsageError(pub(super) String);

/// Whoever read our stdout has gone (`ucwa-relay history | head`): no failure, just the end.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
pub(super) struct OutputClosed;

/// Tells the error with its causes and gives the exit code.
pub(super) fn report(error: &anyhow::Error, log_format: LogFormat) -> ExitCode {
    if error.is::<OutputClosed>() {
        return ExitCode::SUCCESS;
    }
    let causes = causes(error);
    match log_format {
        LogFormat::Text => {
            eprintln!("error: {error}");
            for cause in causes {
                eprintln!("  because: {cause}");
            }
        }
        LogFormat::Json => {
            eprintln!(
                "{}",
                serde_json::json!({ "level": "ERROR", "error": error.to_string(), "causes": causes })
            );
        }
    }
    ExitCode::from(exit_code(error))
}

/// The chain below the error, without causes that only repeat what was said above them.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut told = error.to_string();
    let mut causes = Vec::new();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !told.contains(&cause) {
            causes.push(cause.clone());
        }
        told = cause;
    }
    causes
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let is_usage = error.chain().any(|cause| {
        cause.is::<UsageError>()
            || cause.is::<ConfigError>()
            || matches!(cause.downcast_ref::<StoreError>(), Some(StoreError::Url { .. }))
    });
    if is_usage { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn usage_and_configuration_end_with_2_and_the_rest_with_1() {
        assert_eq!(exit_code(&UsageError("no".into()).into()), 2);
        assert_eq!(exit_code(&anyhow::Error::from(ConfigError::Invalid(vec![])).context("cannot start")), 2);
        let url = StoreError::Url { url: "x".into(), problem: "y".into() };
        assert_eq!(exit_code(&anyhow::Error::from(url).context("cannot open")), 2);
        assert_eq!(exit_code(&StoreError::Closing.into()), 1);
        assert_eq!(exit_code(&anyhow!("x")), 1);
    }

    #[test]
    fn a_cause_that_repeats_its_effect_is_left_out() {
        let error = anyhow!("disk full").context("cannot write: disk full").context("cannot add the account");
        assert_eq!(causes(&error), ["cannot write: disk full"]);
    }
}
