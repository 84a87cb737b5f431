//! `check`: the doctor. Each step is printed as soon as it is done; nothing that is printed is a secret.

use std::{path::PathBuf, time::Instant};

use anyhow::bail;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    failure::UsageError,
    output::{self, Format},
};
use crate::{
    config::Config,
    doctor::{self, Outcome, Scope, Step},
    identifiers::SipUri,
};

/// `check`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 0: all is well, warnings aside; 1: something failed; 2: the configuration can't be used.\n\
                        What is printed holds no password, token or message and can be passed on."
)]
pub struct CheckOptions {
    /// Sign in only this account, enabled or not [default: all that are enabled]
    #[arg(long, value_name = "URI")]
    account: Option<SipUri>,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// What `check --format json` prints.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    #[serde(serialize_with = "crate::archive::text::serialize_time")]
    at: Timestamp,
    ok: bool,
    failed: usize,
    warnings: usize,
    steps: Vec<Step>,
}

/// Looks at everything and tells.
pub(super) async fn check(options: &CheckOptions, path: Option<PathBuf>) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut report = Printer::new(options.format)?;
    let config = match Config::load(path.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            report.take(doctor::unusable_configuration(&error));
            report.finish()?;
            return Err(error.into());
        }
    };
    let scope = Scope { account: options.account.clone() };
    let examined = doctor::examine(&config, &scope, &mut |step| report.take(step)).await;
    let (steps, failed, warnings) = report.finish()?;
    if let Err(error) = examined {
        return Err(UsageError(error.to_string()).into());
    }
    // What `run` would not start with.
    config.verify_secrets()?;
    if failed > 0 {
        bail!("{failed} of {steps} steps failed");
    }
    if options.format == Format::Table {
        let warned = if warnings == 0 { String::new() } else { format!(", {warnings} with a warning") };
        output::line(&format!(
            "all {steps} steps are done{warned}, in {:.1} s",
            began.elapsed().as_secs_f64()
        ))?;
    }
    Ok(())
}

/// Prints steps as they come, or all at the end.
struct Printer {
    format: Format,
    steps: Vec<Step>,
    account: Option<String>,
    /// The first failure to print; nothing more is printed then.
    closed: Option<anyhow::Error>,
}

impl Printer {
    fn new(format: Format) -> anyhow::Result<Self> {
        if format == Format::Table {
            output::line(&format!(
                "ucwa-relay {} on {} {}, {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::OS,
                std::env::consts::ARCH,
                output::time(Timestamp::now())
            ))?;
        }
        Ok(Self { format, steps: Vec::new(), account: None, closed: None })
    }

    fn take(&mut self, step: Step) {
        if self.format == Format::Table
            && self.closed.is_none()
            && let Err(error) = self.print(&step)
        {
            self.closed = Some(error);
        }
        self.steps.push(step);
    }

    fn print(&mut self, step: &Step) -> anyhow::Result<()> {
        if let Some(account) = step.account.as_ref().filter(|account| self.account.as_ref() != Some(*account))
        {
            output::line(account)?;
            self.account = Some(account.clone());
        }
        let mark = match step.outcome {
            Outcome::Ok => "ok",
            Outcome::Warning => "WARNING",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        };
        output::line(&format!(
            "{mark:7} {:>7} ms  {:16} {}{}",
            step.took.as_millis(),
            step.step,
            output::on_one_line(&step.found),
            in_brackets(step)
        ))?;
        if let Some(advice) = &step.advice {
            output::line(&format!("{:20} -> {}", "", output::on_one_line(advice)))?;
        }
        Ok(())
    }

    /// How many steps there were, failed, and gave a warning.
    fn finish(self) -> anyhow::Result<(usize, usize, usize)> {
        if let Some(error) = self.closed {
            return Err(error);
        }
        let count = |outcome| self.steps.iter().filter(|step| step.outcome == outcome).count();
        let (all, failed, warnings) = (self.steps.len(), count(Outcome::Failed), count(Outcome::Warning));
        if self.format == Format::Json {
            output::json_line(&Report {
                version: env!("CARGO_PKG_VERSION"),
                at: Timestamp::now(),
                ok: failed == 0,
                failed,
                warnings,
                steps: self.steps,
            })?;
        }
        Ok((all, failed, warnings))
    }
}

/// The server's words, where the sentence does not have them.
fn in_brackets(step: &Step) -> String {
    let Some(answer) = &step.answer else { return String::new() };
    let mut words = Vec::new();
    if let Some(status) = answer.status.filter(|status| !step.found.contains(&status.to_string())) {
        words.push(format!("status {status}"));
    }
    for word in [&answer.code, &answer.subcode].into_iter().flatten() {
        if !step.found.contains(word.as_str()) {
            words.push(output::on_one_line(word));
        }
    }
    if let Some(number) = answer.diagnostics {
        words.push(format!("diagnostics {number}"));
    }
    if words.is_empty() { String::new() } else { format!(" [{}]", words.join(", ")) }
}
