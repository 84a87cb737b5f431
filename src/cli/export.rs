//! `export`: hands messages over as files. The reading is noted in `access_log`.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    actor,
    history::{FilterOptions, ensure_accounts},
    open::{IfMissing, with_store},
    output::{self, Format},
};
use crate::{
    config::Config,
    export::{
        ExportFormat,
        run::{Export, run},
    },
};

/// `export`.
#[derive(Debug, Args)]
#[command(
    after_help = "A killed export goes on when it is run again; a later run into the same folder brings what is new.\n\
                        `ucwa-relay verify --export DIR` checks the folder, with or without the database."
)]
pub struct ExportOptions {
    /// Only what fits, as in `search`
    #[arg(value_name = "QUERY")]
    query: Vec<String>,
    /// Kind of the files: eml (mail, one for each conversation and day), jsonl, csv or html
    #[arg(long, value_enum, hide_possible_values = true)]
    format: ExportFormat,
    /// The folder; a new one, or that of an earlier export of the same
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    filters: FilterOptions,
    /// How to print what was done: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    report: Format,
}

/// Fills the folder.
pub(super) async fn export(config: &Config, options: ExportOptions) -> anyhow::Result<()> {
    let query = options.filters.query(&options.query)?;
    let export = Export { folder: options.out, format: options.format, query };
    with_store(config, IfMissing::Refuse, async |store| {
        ensure_accounts(store, &export.query).await?;
        let folder = std::path::absolute(&export.folder).unwrap_or_else(|_| export.folder.clone());
        let noted = format!("{} --out={}", export.query, folder.display());
        store.record_access(&actor::name(), "export", export.query.only_account(), noted.trim()).await?;
        let bar = progress_bar();
        let exported = run(store, &export, |progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        })
        .await
        .with_context(|| format!("the export into {} is not complete", export.folder.display()));
        bar.finish_and_clear();
        let exported = exported?;
        if options.report == Format::Json {
            return output::json_line(&exported);
        }
        let resumed = if exported.resumed { ", after going on where it was interrupted" } else { "" };
        output::line(&format!(
            "{} messages in {} new files{resumed}; {} holds {} messages",
            exported.messages,
            exported.files,
            export.folder.display(),
            exported.messages_in_all
        ))
    })
    .await
}

/// On a terminal; nothing is drawn elsewhere.
pub(super) fn progress_bar() -> ProgressBar {
    let style =
        ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} messages, {per_sec}, {eta} to go");
    let bar = ProgressBar::new(0);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
