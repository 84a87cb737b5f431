//! Opens the database for a tool, which works beside a running server.

use anyhow::Context;

use crate::{
    config::Config,
    store::{self, Role, SharedStore, Store},
};

/// What to do if there is no database yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfMissing {
    /// Make one: the command writes.
    Create,
    /// Say so: there is nothing to read, and the URL may be wrong.
    Refuse,
}

/// Opens the database, does `work`, and closes it whatever came of it.
pub(super) async fn with_store(
    config: &Config,
    if_missing: IfMissing,
    work: impl AsyncFnOnce(&dyn Store) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let store = open(config, if_missing).await?;
    let result = work(store.as_ref()).await;
    store.close().await;
    result
}

async fn open(config: &Config, if_missing: IfMissing) -> anyhow::Result<SharedStore> {
    let url = config.database.shown_url();
    if let Some(path) = config.database.sqlite_path()
        && !path.exists()
    {
        let path = std::path::absolute(&path).unwrap_or(path);
        anyhow::ensure!(
            if_missing == IfMissing::Create,
            "there is no database {}; `ucwa-relay init` creates one, or correct database.url",
            path.display()
        );
        create(config).await?;
        eprintln!("created the database {}", path.display());
    }
    store::connect(&config.store_settings(), Role::Tool)
        .await
        .with_context(|| format!("cannot open the database {url}"))
}

/// Creates the database or brings its schema up to date.
pub(super) async fn create(config: &Config) -> anyhow::Result<()> {
    store::migrate(&config.store_settings())
        .await
        .with_context(|| format!("cannot create or migrate the database {}", config.database.shown_url()))?;
    Ok(())
}
