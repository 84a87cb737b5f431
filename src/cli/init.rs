//! `init` and `migrate`: from nothing to a place where `run` works.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::{failure::UsageError, open, output};
use crate::{
    config::{Config, LOOKUP},
    secrets::Sealer,
};

const STARTER: &str = include_str!("../../config/starter.toml");
const DATABASE_LINE: &str = "url = \"sqlite://ucwa-relay.db\"";

/// `init`.
#[derive(Debug, Args)]
pub struct InitOptions {
    /// Where the archive and the queue shall be: `sqlite://FILE` or `postgres://USER@HOST/DATABASE`
    #[arg(long, value_name = "URL", default_value = "sqlite://ucwa-relay.db")]
    database: String,
}

/// Writes the configuration and creates what it names.
pub(super) async fn init(options: &InitOptions, config: Option<PathBuf>) -> anyhow::Result<()> {
    let path = config.unwrap_or_else(|| LOOKUP[0].into());
    write_new(&path, &starter(&options.database)?)?;
    let config = match Config::load(Some(&path)) {
        Ok(config) => config,
        Err(error) => {
            // What cannot be read was not worth writing.
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            return Err(error.into());
        }
    };
    output::line(&format!("wrote the configuration {}", path.display()))?;
    open::create(&config).await.with_context(|| {
        format!(
            "{} is written, but there is no database yet; correct it and use `ucwa-relay migrate`",
            path.display()
        )
    })?;
    output::line(&format!("created the database {}", config.database.shown_url()))?;
    Sealer::load_or_create(&config.key_file())?;
    output::line(&format!("the key that seals passwords is {}", config.key_file().display()))?;
    output::line("next: `ucwa-relay account add sip:alice@contoso.com`, then `ucwa-relay run`")
}

/// Brings the schema up to date.
pub(super) async fn migrate(config: &Config) -> anyhow::Result<()> {
    open::create(config).await?;
    output::line(&format!("the schema of {} is up to date", config.database.shown_url()))
}

fn starter(database: &str) -> anyhow::Result<String> {
    // A JSON string is a TOML string.
    Ok(STARTER.replacen(DATABASE_LINE, &format!("url = {}", serde_json::to_string(database)?), 1))
}

fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(UsageError(format!(
            "{} is there already and is left as it is; `ucwa-relay migrate` creates the database that it names",
            path.display()
        ))
        .into()),
        written => written.with_context(|| format!("cannot write {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_starter_is_a_configuration_with_the_database_asked_for() {
        assert!(STARTER.contains(DATABASE_LINE));
        let folder = tempfile::tempdir().unwrap();
        for url in ["sqlite://ucwa-relay.db", "sqlite:///a \"b\"/c.db", "postgres://relay@db/relay"] {
            let path = folder.path().join("starter.toml");
            std::fs::write(&path, starter(url).unwrap()).unwrap();
            assert_eq!(Config::load(Some(&path)).unwrap().database.url, url);
        }
    }
}
