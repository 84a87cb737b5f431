//! JSON Lines and CSV: a message a line, in the order of the chain.

use std::path::Path;

use super::{
    ExportFormat, OutFile, csv, file_name_of,
    journal::Position,
    run::{Finished, Layout},
};
use crate::store::{ArchivedMessage, ConversationDetails};

/// A file has at most so many messages: what a killed export loses, and what a spreadsheet opens without a sigh.
const MESSAGES_PER_FILE: u64 = 50_000;

/// Lines of one account.
pub(super) struct Rows {
    account: String,
    format: ExportFormat,
    file: Option<OutFile>,
}

impl Rows {
    pub(super) fn new(account: &str, format: ExportFormat) -> Self {
        Self { account: account.to_owned(), format, file: None }
    }

    fn begin(&self, folder: &Path) -> anyhow::Result<OutFile> {
        let mut file = OutFile::create(folder)?;
        if self.format == ExportFormat::Csv {
            file.write(&csv::document(csv::ARCHIVED, std::iter::empty())?)?;
        }
        Ok(file)
    }

    fn line(&self, message: &ArchivedMessage) -> anyhow::Result<Vec<u8>> {
        if self.format == ExportFormat::Csv {
            return Ok(csv::record(&csv::archived(message))?);
        }
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(line)
    }
}

impl Layout for Rows {
    fn message(
        &mut self,
        folder: &Path,
        message: ArchivedMessage,
        _: Option<&ConversationDetails>,
    ) -> anyhow::Result<Option<Finished>> {
        let line = self.line(&message)?;
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.begin(folder)?,
        };
        file.write(&line)?;
        file.span.add(&message.message);
        let is_full = file.span.messages >= MESSAGES_PER_FILE;
        self.file = Some(file);
        if is_full { self.finish(folder) } else { Ok(None) }
    }

    fn finish(&mut self, folder: &Path) -> anyhow::Result<Option<Finished>> {
        let Some(file) = self.file.take() else {
            return Ok(None);
        };
        let (first, last) = (file.span.first_seq(), file.span.last_seq());
        let extension = if self.format == ExportFormat::Csv { "csv" } else { "jsonl" };
        let account = file_name_of(&self.account);
        let name = format!("{account}/{account}_{first:010}-{last:010}.{extension}");
        Ok(Some((file.finish(folder, name, &self.account)?, Position::Chain(last))))
    }
}
