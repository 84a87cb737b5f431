//! The program `ucwa-relay`: see [`ucwa_relay::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ucwa_relay::cli::main()
}
