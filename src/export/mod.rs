//! Handing the archive over: files that others can read, and that can be proven later.
//!
//! An export is a folder. [`run`] fills it from the store, account by account, a page of messages at a time; a layout
//! ([`rows`], [`eml`], [`html`]) turns messages into files; [`manifest`] says what is in the folder, and [`journal`]
//! what is in it so far, so that a killed export goes on where it was. [`verify`] checks a folder without the database.
//!
//! Only chained messages are exported, each once: what is said in the last minute may still wait for its receipt, and
//! comes with the next run. A run into the same folder brings what was chained since the run before, in new files; files
//! that are finished never change. A file is written as `export.part` and gets its name when it is complete.

pub mod csv;
pub mod eml;
pub mod html;
pub mod journal;
pub mod manifest;
pub mod rows;
pub mod run;
mod transcript;
pub mod verify;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use anyhow::Context;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::manifest::{FileEntry, Link};
use crate::store::ChainedMessage;

/// What kind of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// Mail, one for each conversation and day: what compliance archives take in
    Eml,
    /// JSON Lines: exact, and what `verify --export` checks message by message
    Jsonl,
    /// For spreadsheets
    Csv,
    /// To be opened in a browser
    Html,
}

/// The file that is being written.
const PART: &str = "export.part";

/// Files of this size and more are on disk before they are noted. Waiting for the disk after each of a hundred thousand
/// small mails would take longer than making them; should the power fail, `verify --export` tells which are damaged.
const SYNCED_BYTES: u64 = 1024 * 1024;

/// A file on its way into the folder.
struct OutFile {
    file: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
    span: Span,
}

/// Which messages of a chain a file has.
#[derive(Debug, Default)]
struct Span {
    messages: u64,
    first: Option<Link>,
    last: Option<Link>,
}

impl Span {
    fn add(&mut self, message: &ChainedMessage) {
        self.messages += 1;
        let link = || Link {
            chain_seq: message.chain_seq,
            content_hash: message.content_hash.clone().unwrap_or_default(),
            chain_hash: message.chain_hash.clone().unwrap_or_default(),
        };
        if self.first.as_ref().is_none_or(|first| message.chain_seq < first.chain_seq) {
            self.first = Some(link());
        }
        if self.last.as_ref().is_none_or(|last| message.chain_seq > last.chain_seq) {
            self.last = Some(link());
        }
    }

    fn first_seq(&self) -> i64 {
        self.first.as_ref().map_or(0, |link| link.chain_seq)
    }

    fn last_seq(&self) -> i64 {
        self.last.as_ref().map_or(0, |link| link.chain_seq)
    }
}

impl OutFile {
    fn create(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(PART);
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            file: BufWriter::with_capacity(256 * 1024, file),
            digest: Sha256::new(),
            bytes: 0,
            span: Span::default(),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).context("cannot write the export")
    }

    /// Completes the file and gives it its name: a path below the folder, with `/`.
    fn finish(self, folder: &Path, name: String, account: &str) -> anyhow::Result<FileEntry> {
        let written = self.file.into_inner().map_err(io::IntoInnerError::into_error);
        let file = written.context("cannot write the export")?;
        if self.bytes >= SYNCED_BYTES {
            file.sync_data().context("cannot write the export")?;
        }
        let path = folder.join(&name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::rename(folder.join(PART), &path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(FileEntry {
            path: name,
            sha256: hex::encode(self.digest.finalize()),
            bytes: self.bytes,
            account: account.to_owned(),
            messages: self.span.messages,
            first: self.span.first,
            last: self.span.last,
        })
    }
}

/// An account's name as part of a file name: its address, without what file systems mind.
fn file_name_of(account: &str) -> String {
    /// Longest name kept as it is; file systems take 255 bytes, and more follows it.
    const LONGEST: usize = 120;
    let address = account.split_once(':').map_or(account, |(_, address)| address);
    let mut name = String::new();
    for byte in address.bytes() {
        if byte.is_ascii_alphanumeric() || (b"@._+-".contains(&byte) && !name.is_empty()) {
            name.push(char::from(byte));
        } else {
            let _infallible = write!(name, "%{byte:02x}");
        }
    }
    if name.len() > LONGEST {
        name = format!("{}-{}", &name[..LONGEST - 17], &crate::archive::chain::digest(account)[..16]);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_of_accounts_are_harmless_and_differ() {
        assert_eq!(file_name_of("sip:alice@contoso.com"), "alice@contoso.com");
        assert_eq!(file_name_of("sip:../a b@ü.de"), "%2e./a b@ü.de".replace("./a b@ü", ".%2fa%20b@%c3%bc"));
        let long = format!("sip:{}@contoso.com", "a".repeat(300));
        assert!(file_name_of(&long).len() <= 120);
        assert_ne!(file_name_of(&long), file_name_of(&format!("{long}.de")));
    }
}
