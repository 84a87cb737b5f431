//! The command line: what people type, and what they get back.
//!
//! One command (or family of commands) is one file that holds its options and its work. Commands load the
//! configuration, open the store as a tool beside the server, and print for people on a terminal, in columns divided by
//! tabs into a pipe, or as JSON with `--format json`. Results go to stdout; logs, questions and errors go to stderr.
//!
//! Exit codes: 0 done, 1 failed, 2 usage or configuration error. An error says what happened, to which account or file,
//! and what to do; its causes follow, one on a line.

mod account;
mod actor;
mod bench;
mod check;
mod coverage;
mod decode;
mod export;
mod failure;
mod history;
mod init;
mod logging;
mod man;
mod open;
mod outbox;
mod outbox_shape;
mod output;
mod password;
mod quarantine;
mod retention;
mod send;
mod serve;
mod verify;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use self::serve::{DemoOptions, SimulateOptions};
use crate::{config::Config, traces::Traces};

/// Archives every instant message of Skype for Business accounts in SQL and sends the rows you insert, over UCWA.
#[derive(Debug, Parser)]
#[command(name = "ucwa-relay", version, max_term_width = 100)]
pub struct Cli {
    /// Configuration file [default: ./ucwa-relay.toml, else /etc/ucwa-relay/ucwa-relay.toml]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// How logs and errors are written to stderr: text or json
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t = LogFormat::Text,
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server: sign in every enabled account, archive what it hears, send the outbox
    Run,
    /// See it work: simulator, relay and lively traffic in one process, on loopback
    Demo(DemoOptions),
    /// Run only the simulated Skype for Business server
    Simulate(SimulateOptions),
    /// Write a commented starter configuration and create the database and the key
    Init(init::InitOptions),
    /// Create the database or bring its schema up to date (`run` does so too)
    Migrate,
    /// The doctor: look at everything that `run` needs, sign each account in, and say what to do
    Check(check::CheckOptions),
    /// Accounts: list, add, change, remove; a running server picks changes up
    #[command(subcommand)]
    Account(account::AccountCommand),
    /// Queue a message
    Send(send::SendOptions),
    /// The queue: list, show, cancel, retry, hold, release
    #[command(subcommand)]
    Outbox(outbox::OutboxCommand),
    /// Read the archive
    History(history::HistoryOptions),
    /// Look for text in the archive
    Search(history::SearchOptions),
    /// Hand messages over as mail, JSON Lines, CSV or HTML, with a manifest
    Export(export::ExportOptions),
    /// Check that the archive, or an export, is as it was written
    Verify(verify::VerifyOptions),
    /// Sign the heads of all chains, to be kept elsewhere
    Seal(verify::SealOptions),
    /// Messages that were kept long enough: remove their text, or say what would go
    #[command(subcommand)]
    Retention(retention::RetentionCommand),
    /// Legal holds: keep messages however old they get
    #[command(subcommand)]
    Hold(retention::HoldCommand),
    /// When accounts were followed, and when not
    Coverage(coverage::CoverageOptions),
    /// Payloads that were not understood: list, show, read again
    #[command(subcommand)]
    Quarantine(quarantine::QuarantineCommand),
    /// Print what the relay understands of an event-channel response, one JSON object per event
    Decode(decode::DecodeOptions),
    /// Measure what this machine can do: relay against the simulated server, each figure beside its goal
    Bench(bench::BenchOptions),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page, or write one for each command
    Man(man::ManOptions),
}

/// The whole program: parses the arguments of this process, does what they say, reports, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(with_minus_words(std::env::args_os()));
    let log_format = cli.log_format;
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error, log_format),
    }
}

/// Commands that take a query.
const ASKING: [&str; 3] = ["history", "search", "export"];

/// In a query `-word` is no option: behind a command that takes a query its minus becomes a minus sign, which the query
/// language knows, too. The only options with one minus are those for help.
fn with_minus_words(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut is_query = false;
    arguments
        .map(|argument| {
            let Some(text) = argument.to_str() else {
                return argument;
            };
            let word = text.strip_prefix('-').filter(|word| !word.starts_with('-') && !word.is_empty());
            let word = word.filter(|_| is_query && text != "-h" && text != "-V");
            is_query |= ASKING.contains(&text);
            word.map_or(argument.clone(), |word| format!("\u{2212}{word}").into())
        })
        .collect()
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    let Cli { config: path, log_format, command } = cli;
    match command {
        Command::Completions { shell } => return completions(shell),
        Command::Man(options) => return man::man(&options),
        Command::Decode(options) => return decode::decode(&options),
        Command::Demo(options) => {
            logging::start(&logging::filter_without_configuration(), log_format)?;
            return serve::demo(&options);
        }
        Command::Bench(options) => {
            logging::start(&logging::filter_without_configuration(), log_format)?;
            return bench::bench(options);
        }
        Command::Simulate(options) => {
            logging::start(&logging::filter_without_configuration(), log_format)?;
            return serve::simulate(options);
        }
        Command::Init(options) => {
            logging::start(&logging::filter_without_configuration(), log_format)?;
            return with_runtime(init::init(&options, path));
        }
        // It says by itself what is wrong with the configuration, and what others would log.
        Command::Check(options) => return with_runtime(check::check(&options, path)),
        _ => (),
    }
    let config = Config::load(path.as_deref())?;
    if matches!(command, Command::Run) {
        let endpoint = config.telemetry.otlp_endpoint.as_ref();
        let traces = endpoint.map(|endpoint| Traces::start(endpoint, &config.cluster.node_id)).transpose()?;
        logging::start_with(&config.telemetry.log, log_format, traces.as_ref())?;
        let ran = serve::run(&config);
        if let Some(traces) = traces {
            traces.finish();
        }
        return ran;
    }
    logging::start(logging::filter_for_tools(&config), log_format)?;
    with_runtime(async {
        match command {
            Command::Migrate => init::migrate(&config).await,
            Command::Account(command) => account::account(&config, command).await,
            Command::Send(options) => send::send(&config, options).await,
            Command::Outbox(command) => outbox::outbox(&config, command).await,
            Command::History(options) => history::history(&config, options).await,
            Command::Search(options) => history::search(&config, options).await,
            Command::Export(options) => export::export(&config, options).await,
            Command::Verify(options) => verify::verify(&config, options).await,
            Command::Seal(options) => verify::seal(&config, options).await,
            Command::Retention(command) => retention::retention(&config, command).await,
            Command::Hold(command) => retention::hold(&config, command).await,
            Command::Coverage(options) => coverage::coverage(&config, options).await,
            Command::Quarantine(command) => quarantine::quarantine(&config, command).await,
            Command::Run
            | Command::Demo(_)
            | Command::Simulate(_)
            | Command::Bench(_)
            | Command::Init(_)
            | Command::Check(_)
            | Command::Decode(_)
            | Command::Completions { .. }
            | Command::Man(_) => unreachable!("was dealt with before the configuration was read"),
        }
    })
}

/// Tools need a reactor for the database, but not one thread per processor.
fn with_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ucwa-relay", &mut script);
    output::bytes(&script)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_word_with_a_minus_is_part_of_a_query_and_no_option() {
        let read = |line: &str| with_minus_words(line.split(' ').map(OsString::from)).join(OsStr::new(" "));
        assert_eq!(
            read("relay search -hello a-b --limit 3 -h - --"),
            "relay search \u{2212}hello a-b --limit 3 -h - --"
        );
        assert_eq!(read("relay account list -x"), "relay account list -x");
    }
}
