//! `decode`: what the relay understands of an event-channel response, for looking into quarantined payloads.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::output;
use crate::ucwa::decode::describe_events;

/// `decode`.
#[derive(Debug, Args)]
pub struct DecodeOptions {
    /// File to read [default: stdin]
    file: Option<PathBuf>,
}

/// Prints one JSON object for each event, in order.
pub(super) fn decode(options: &DecodeOptions) -> anyhow::Result<()> {
    let file = options.file.as_deref().filter(|path| *path != Path::new("-"));
    let place = file.map_or_else(|| "stdin".into(), |path| path.display().to_string());
    let mut bytes = Vec::new();
    match file {
        Some(path) => std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)),
        None => io::stdin().lock().read_to_end(&mut bytes),
    }
    .with_context(|| format!("cannot read {place}"))?;
    let text = String::from_utf8_lossy(&bytes);
    for event in describe_events(&text).with_context(|| format!("{place} is no event-channel response"))? {
        output::json_line(&event)?;
    }
    Ok(())
}
