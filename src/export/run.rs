//! One run of an export: from the store into the folder.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use jiff::{Timestamp, ToSpan, civil, tz::TimeZone};

use super::{
    ExportFormat, OutFile, csv,
    eml::Mails,
    html::Pages,
    journal::{self, Journal, Plan, PlannedAccount, Position, Step},
    manifest::{self, AccountEntry, FileEntry, Manifest, ManifestWriter},
    rows::Rows,
};
use crate::{
    archive::text::iso_milliseconds,
    identifiers::ConversationId,
    query::{Condition, Query},
    store::{AccountCoverage, ArchivedMessage, ChainRange, ConversationDetails, ExportOrder, Store, Stretch},
};

/// Messages read at once.
const PAGE: i64 = 1000;
/// Messages in, out and failed, and gaps, of each account and day.
const SUMMARY: &str = "daily-summary.csv";

/// What to export, and where to.
#[derive(Debug, Clone)]
pub struct Export {
    /// Created if it is not there.
    pub folder: PathBuf,
    /// Kind of the files.
    pub format: ExportFormat,
    /// Which messages.
    pub query: Query,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Messages of the chains that were passed, whether they fit or not.
    pub done: u64,
    /// All that the run will pass.
    pub total: u64,
}

/// What a run brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Messages in new files.
    pub messages: u64,
    /// New files, without manifest and summary.
    pub files: u64,
    /// Messages in the folder now.
    pub messages_in_all: u64,
    /// The run went on where a killed one was.
    pub resumed: bool,
}

/// A file that was completed, and where to go on after it.
pub(super) type Finished = (FileEntry, Position);

/// Turns the messages of one account into files.
pub(super) trait Layout {
    /// Takes the next message; a file may be complete without it.
    fn message(
        &mut self,
        folder: &Path,
        message: ArchivedMessage,
        conversation: Option<&ConversationDetails>,
    ) -> anyhow::Result<Option<Finished>>;
    /// No message of the account comes any more.
    fn finish(&mut self, folder: &Path) -> anyhow::Result<Option<Finished>>;
}

/// Exports what is not in the folder yet.
///
/// # Errors
/// If the folder holds something else or an export of something else, or another process is exporting into it.
pub async fn run(
    store: &dyn Store,
    export: &Export,
    mut progress: impl FnMut(Progress),
) -> anyhow::Result<Exported> {
    let folder = &export.folder;
    let manifest = ready_folder(export)?;
    let resumed = Journal::resume(folder, manifest.as_ref())?;
    let was_resumed = resumed.is_some();
    let mut journal = match resumed {
        Some(journal) => {
            ensure_same(export, journal.plan.format, &journal.plan.query)?;
            journal
        }
        None => Journal::create(folder, plan(store, export, manifest.as_ref()).await?)?,
    };
    let mut positions: BTreeMap<String, Position> = BTreeMap::new();
    journal.steps(|step| {
        positions.insert(step.account, step.position);
        Ok(())
    })?;
    let accounts = journal.plan.accounts.clone();
    let length = |account: &PlannedAccount| u64::try_from(account.to - account.after).unwrap_or(0);
    let total = accounts.iter().map(length).sum();
    let mut done = 0;
    for account in &accounts {
        let position = positions.remove(&account.uri);
        if position != Some(Position::Done) && account.to > account.after {
            let mut passed = |within: u64| progress(Progress { done: done + within, total });
            export_account(store, export, account, position, &mut journal, &mut passed).await?;
        }
        done += length(account);
        progress(Progress { done, total });
    }
    conclude(store, export, manifest, journal, was_resumed).await
}

/// The folder is there, and holds nothing or an export of the same.
fn ready_folder(export: &Export) -> anyhow::Result<Option<Manifest>> {
    let folder = &export.folder;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let manifest = Manifest::read(folder)?;
    if let Some(manifest) = &manifest {
        ensure_same(export, manifest.format, &manifest.query)?;
    } else {
        let is_export = folder.join(journal::NAME).exists();
        let cannot_read = || format!("cannot read {}", folder.display());
        let is_empty = fs::read_dir(folder).with_context(cannot_read)?.next().is_none();
        ensure!(
            is_export || is_empty,
            "{} is not empty and holds no export; choose a new folder",
            folder.display()
        );
    }
    Ok(manifest)
}

fn ensure_same(export: &Export, format: ExportFormat, query: &str) -> anyhow::Result<()> {
    let asked = export.query.to_string();
    ensure!(
        export.format == format && asked == query,
        "{} holds an export of something else (format {format:?}, query {query:?}, not {:?}, {asked:?}); a later run \
         asks for the same, with absolute times; choose a new folder for anything else",
        export.folder.display(),
        export.format,
    );
    Ok(())
}

/// Fixes which part of which chain this run brings.
async fn plan(store: &dyn Store, export: &Export, manifest: Option<&Manifest>) -> anyhow::Result<Plan> {
    let mut accounts = Vec::new();
    for account in store.archived_accounts().await? {
        let is_asked_for = export.query.terms.iter().all(|term| match &term.condition {
            Condition::Account(people) => {
                people.iter().any(|person| person.is_account(&account.uri)) != term.negated
            }
            _ => true,
        });
        if !is_asked_for {
            continue;
        }
        let exported = manifest.and_then(|manifest| {
            manifest.accounts.iter().find(|entry| entry.account == account.uri).map(|entry| entry.exported_to)
        });
        let after = exported.unwrap_or(0);
        let to = store.chain_head(account.id).await?.map_or(0, |head| head.seq);
        accounts.push(PlannedAccount { id: account.id, uri: account.uri, after, to: to.max(after) });
    }
    Ok(Plan {
        run: manifest.map_or(0, |manifest| manifest.runs) + 1,
        format: export.format,
        query: export.query.to_string(),
        accounts,
    })
}

async fn export_account(
    store: &dyn Store,
    export: &Export,
    account: &PlannedAccount,
    position: Option<Position>,
    journal: &mut Journal,
    passed: &mut dyn FnMut(u64),
) -> anyhow::Result<()> {
    let mut layout: Box<dyn Layout> = match export.format {
        ExportFormat::Jsonl | ExportFormat::Csv => Box::new(Rows::new(&account.uri, export.format)),
        ExportFormat::Eml => Box::new(Mails::new(&account.uri)),
        ExportFormat::Html => Box::new(Pages::new(&account.uri, &export.query.to_string())),
    };
    let mut range = ChainRange { after: account.after, to: account.to };
    let mut order = match export.format {
        ExportFormat::Jsonl | ExportFormat::Csv => ExportOrder::Chain,
        ExportFormat::Eml | ExportFormat::Html => ExportOrder::Conversation(None),
    };
    match position {
        Some(Position::Chain(seq)) => range.after = seq,
        Some(Position::Conversation(conversation, sent_at, id)) => {
            order = ExportOrder::Conversation(Some((conversation, sent_at, id)));
        }
        Some(Position::Done) | None => (),
    }
    let mut count = 0;
    loop {
        let page = store.export_page(account.id, &export.query, range, &order, PAGE).await?;
        let Some((last, sent_at_key)) = page.last().map(|last| (&last.message, last.sent_at_key.clone()))
        else {
            break;
        };
        count += page.len() as u64;
        let mut conversations = Vec::new();
        match &mut order {
            ExportOrder::Chain => {
                range.after = last.chain_seq;
                passed(u64::try_from(range.after - account.after).unwrap_or(0));
            }
            ExportOrder::Conversation(after) => {
                *after = Some((last.conversation_id, sent_at_key, last.message_id));
                passed(count);
                let ids: HashSet<ConversationId> =
                    page.iter().map(|message| message.message.conversation_id).collect();
                let ids: Vec<ConversationId> = ids.into_iter().collect();
                conversations = store.conversation_details(account.id, &ids).await?;
            }
        }
        for message in page {
            let id = message.message.conversation_id;
            let conversation = conversations
                .binary_search_by_key(&id, |conversation| conversation.id)
                .ok()
                .map(|place| &conversations[place]);
            if let Some(finished) = layout.message(&export.folder, message, conversation)? {
                note(journal, account, finished)?;
            }
        }
    }
    if let Some(finished) = layout.finish(&export.folder)? {
        note(journal, account, finished)?;
    }
    journal.step(&Step { account: account.uri.clone(), file: None, position: Position::Done })
}

fn note(journal: &mut Journal, account: &PlannedAccount, (file, position): Finished) -> anyhow::Result<()> {
    journal.step(&Step { account: account.uri.clone(), file: Some(file), position })
}

/// Writes summary and manifest of all runs so far, and ends the run.
async fn conclude(
    store: &dyn Store,
    export: &Export,
    before: Option<Manifest>,
    journal: Journal,
    resumed: bool,
) -> anyhow::Result<Exported> {
    let folder = &export.folder;
    let had_files = before.is_some();
    let mut accounts: BTreeMap<String, AccountEntry> = before
        .into_iter()
        .flat_map(|manifest| manifest.accounts)
        .map(|entry| (entry.account.clone(), entry))
        .collect();
    let now = Timestamp::now();
    let coverage: BTreeMap<String, Vec<Stretch>> = store
        .coverage(None)
        .await?
        .into_iter()
        .map(|coverage| (coverage.account.clone(), AccountCoverage::stretches(coverage, now)))
        .collect();
    for planned in &journal.plan.accounts {
        let entry = accounts.entry(planned.uri.clone()).or_insert_with(|| AccountEntry::new(&planned.uri));
        entry.exported_to = planned.to;
        entry.cover(coverage.get(&planned.uri).map_or(&[], Vec::as_slice))?;
    }
    let (mut messages, mut files) = (0, 0);
    journal.steps(|step| {
        if let Some(file) = step.file {
            messages += file.messages;
            files += 1;
            if let Some(entry) = accounts.get_mut(&file.account) {
                entry.add(&file);
            }
        }
        Ok(())
    })?;
    let summary = write_summary(store, export, &journal.plan, &coverage, now).await?;
    let messages_in_all = accounts.values().map(|entry| entry.messages).sum();
    let manifest = Manifest {
        manifest: manifest::VERSION.to_owned(),
        made_by: concat!("ucwa-relay ", env!("CARGO_PKG_VERSION")).to_owned(),
        format: export.format,
        query: export.query.to_string(),
        whole_chains: export.query.terms.iter().all(|term| matches!(term.condition, Condition::Account(_))),
        runs: journal.plan.run,
        finished_at: iso_milliseconds(now),
        messages: messages_in_all,
        accounts: accounts.into_values().collect(),
    };
    let mut writer = ManifestWriter::create(folder, &manifest)?;
    writer.file(&summary)?;
    if had_files {
        manifest::read_files(folder, |file| if file.path == SUMMARY { Ok(()) } else { writer.file(&file) })?;
    }
    journal.steps(|step| step.file.iter().try_for_each(|file| writer.file(file)))?;
    writer.finish(folder)?;
    journal.remove()?;
    Ok(Exported { messages, files, messages_in_all, resumed })
}

/// For reconciliation: what each account has of each day, and how long it was not followed on it.
async fn write_summary(
    store: &dyn Store,
    export: &Export,
    plan: &Plan,
    coverage: &BTreeMap<String, Vec<Stretch>>,
    now: Timestamp,
) -> anyhow::Result<FileEntry> {
    let mut file = OutFile::create(&export.folder)?;
    let heading = ["account", "day", "incoming", "outgoing", "failed", "gaps", "gap_seconds"];
    file.write(&csv::document(&heading, std::iter::empty())?)?;
    for account in &plan.accounts {
        let mut days: BTreeMap<String, [i64; 5]> = BTreeMap::new();
        for count in store.day_counts(account.id, &export.query, account.to).await? {
            days.insert(count.day, [count.incoming, count.outgoing, count.failed, 0, 0]);
        }
        for stretch in coverage.get(&account.uri).into_iter().flatten().filter(|stretch| !stretch.followed) {
            for (day, seconds) in by_day(stretch.from_at, stretch.to_at.unwrap_or(now)) {
                let row = days.entry(day.to_string()).or_default();
                row[3] += 1;
                row[4] += seconds;
            }
        }
        for (day, counts) in days {
            let mut cells = vec![account.uri.clone(), day];
            cells.extend(counts.map(|count| count.to_string()));
            file.write(&csv::record(&cells)?)?;
        }
    }
    file.finish(&export.folder, SUMMARY.to_owned(), "")
}

/// The days (UTC) on which a stretch lies, each with its seconds on that day.
fn by_day(from: Timestamp, to: Timestamp) -> Vec<(civil::Date, i64)> {
    let mut days = Vec::new();
    let mut from = from;
    while from < to {
        let day = TimeZone::UTC.to_datetime(from).date();
        let midnight = day
            .checked_add(1.day())
            .ok()
            .and_then(|next| next.to_zoned(TimeZone::UTC).ok())
            .map_or(to, |midnight| midnight.timestamp());
        let end = midnight.min(to);
        days.push((day, end.duration_since(from).as_secs()));
        from = end;
    }
    days
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_divided_at_midnight() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let days = by_day(at("2026-02-28T23:59:00Z"), at("2026-03-02T00:00:10Z"));
        let days: Vec<(String, i64)> =
            days.into_iter().map(|(day, seconds)| (day.to_string(), seconds)).collect();
        let expected = [("2026-02-28", 60), ("2026-03-01", 86_400), ("2026-03-02", 10)];
        assert_eq!(days, expected.map(|(day, seconds)| (day.to_owned(), seconds)));
        assert!(by_day(at("2026-03-01T00:00:00Z"), at("2026-03-01T00:00:00Z")).is_empty());
    }
}
