//! The check of an export, without the database: every file by its digest, and in JSON Lines every message.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, BufRead, BufReader, Read},
    path::{Component, Path},
};

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::{
    ExportFormat, Span, journal,
    manifest::{self, FileEntry, Manifest},
};
use crate::{
    evidence::{
        CheckedChain, Difference,
        chain::{ChainCheck, Completeness},
        seal::Seal,
    },
    query::Person,
    store::{ChainedMessage, Head},
};

/// No line of an export is longer: two texts of the largest response that is read, escaped.
const LONGEST_LINE: u64 = 64 * 1024 * 1024;

/// What was checked.
#[derive(Debug)]
pub struct CheckedExport {
    /// Files whose digest was compared.
    pub files: u64,
    /// Chains that were followed; empty for formats that do not have the messages to the byte.
    pub chains: Vec<CheckedChain>,
    /// How many differences were found.
    pub differences: u64,
}

/// Checks the export in `folder` and gives each difference to `tell` as it is found. `only` narrows the check of
/// messages; files are always all checked. Tombstones are believed if one of `trusted` signed them, or anybody, if there is
/// none.
///
/// # Errors
/// If there is no export or its manifest can't be understood.
pub fn verify(
    folder: &Path,
    only: Option<&Person>,
    seal: Option<&Seal>,
    trusted: &BTreeSet<String>,
    mut tell: impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<CheckedExport> {
    let Some(manifest) = Manifest::read(folder)? else {
        let begun = folder.join(journal::NAME).exists();
        anyhow::bail!(
            "{} holds no {}{}",
            folder.display(),
            manifest::NAME,
            if begun { ": the export was interrupted; run it again to go on" } else { "; is it an export?" }
        );
    };
    let mut differences = 0;
    let mut counted = |difference: Difference| {
        differences += 1;
        tell(difference)
    };
    let mut followed = Chains { manifest: &manifest, only, seal, trusted, checks: BTreeMap::new() };
    let mut files = 0;
    let mut known = HashSet::new();
    manifest::read_files(folder, |entry| {
        files += 1;
        if !known.insert(fingerprint(&entry.path)) {
            return counted(of_file(&entry.path, "the manifest names it twice"));
        }
        check_file(folder, &entry, &mut followed, &mut counted)
    })?;
    let chains = followed.finish(&mut counted)?;
    tell_strangers(folder, folder, &known, &mut counted)?;
    Ok(CheckedExport { files, chains, differences })
}

/// The chains of an export's accounts.
struct Chains<'a> {
    manifest: &'a Manifest,
    only: Option<&'a Person>,
    seal: Option<&'a Seal>,
    trusted: &'a BTreeSet<String>,
    checks: BTreeMap<String, ChainCheck>,
}

impl Chains<'_> {
    fn message(&mut self, file_of: &str, message: &ChainedMessage, place: &str) -> Vec<Difference> {
        if self.only.is_some_and(|only| !only.is_account(file_of)) {
            return Vec::new();
        }
        let completeness = if self.manifest.whole_chains { Completeness::Whole } else { Completeness::Part };
        let check = self.checks.entry(file_of.to_owned()).or_insert_with(|| {
            ChainCheck::new(file_of, completeness, self.seal.and_then(|seal| seal.head(file_of)))
                .trusting(self.trusted)
        });
        check.message(message, Some(place));
        check.take_differences()
    }

    fn finish(
        self,
        tell: &mut impl FnMut(Difference) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<CheckedChain>> {
        let mut chains = Vec::new();
        for (account, mut check) in self.checks {
            let entry = self.manifest.accounts.iter().find(|entry| entry.account == account);
            let head = entry.and_then(|entry| entry.last.as_ref());
            let head = head.map(|last| Head { seq: last.chain_seq, hash: last.chain_hash.clone() });
            check.end_at(head.as_ref(), manifest::NAME);
            let (rest, checked) = check.finish();
            rest.into_iter().try_for_each(&mut *tell)?;
            if let Some(entry) = entry
                && entry.messages != checked.messages
            {
                tell(Difference {
                    account,
                    chain_seq: None,
                    message_id: None,
                    place: None,
                    what: format!(
                        "the manifest counts {} messages, the files have {}",
                        entry.messages, checked.messages
                    ),
                })?;
            }
            chains.push(checked);
        }
        Ok(chains)
    }
}

fn of_file(path: &str, what: impl Into<String>) -> Difference {
    Difference {
        account: String::new(),
        chain_seq: None,
        message_id: None,
        place: Some(path.to_owned()),
        what: what.into(),
    }
}

fn check_file(
    folder: &Path,
    entry: &FileEntry,
    chains: &mut Chains<'_>,
    tell: &mut impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    // A manifest comes from elsewhere: it must not lead out of the folder.
    if !Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_))) {
        return tell(of_file(&entry.path, "its path leads out of the export"));
    }
    let path = folder.join(&entry.path);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return tell(of_file(&entry.path, "the file is missing"));
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut reader =
        Digesting { inner: BufReader::with_capacity(256 * 1024, file), digest: Sha256::new(), bytes: 0 };
    let has_messages = chains.manifest.format == ExportFormat::Jsonl && !entry.account.is_empty();
    let mut span = Span::default();
    if has_messages {
        let mut line = Vec::new();
        for number in 1_u64.. {
            line.clear();
            if reader.line(&mut line).with_context(|| format!("cannot read {}", path.display()))? == 0 {
                break;
            }
            let place = format!("{} line {number}", entry.path);
            match serde_json::from_slice::<ChainedMessage>(&line) {
                Ok(message) => {
                    span.add(&message);
                    chains.message(&entry.account, &message, &place).into_iter().try_for_each(&mut *tell)?;
                }
                Err(_) => tell(of_file(&place, "the line is no message"))?,
            }
        }
    }
    io::copy(&mut reader, &mut io::sink()).with_context(|| format!("cannot read {}", path.display()))?;
    let digest = hex::encode(reader.digest.finalize());
    if digest != entry.sha256 {
        tell(of_file(
            &entry.path,
            format!(
                "the file was changed: it has {} bytes and SHA-256 {digest}, the manifest says {} bytes and {}",
                reader.bytes, entry.bytes, entry.sha256
            ),
        ))?;
    } else if has_messages
        && (span.messages != entry.messages || span.first != entry.first || span.last != entry.last)
    {
        tell(of_file(&entry.path, "the manifest counts other messages than the file has"))?;
    }
    Ok(())
}

/// Files that the manifest does not name.
fn tell_strangers(
    root: &Path,
    folder: &Path,
    known: &HashSet<u64>,
    tell: &mut impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let cannot_read = || format!("cannot read {}", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot_read)? {
        let entry = entry.with_context(cannot_read)?;
        if entry.file_type()?.is_dir() {
            tell_strangers(root, &entry.path(), known, tell)?;
            continue;
        }
        let path = entry.path();
        let path = path.strip_prefix(root).unwrap_or(&path);
        let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        let name = parts.join("/");
        if name == manifest::NAME || known.contains(&fingerprint(&name)) {
            continue;
        }
        tell(of_file(&name, "the manifest does not know this file"))?;
    }
    Ok(())
}

/// Eight bytes for a path, because an export may have millions.
fn fingerprint(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// Digests what is read through it.
struct Digesting<R> {
    inner: R,
    digest: Sha256,
    bytes: u64,
}

impl<R: BufRead> Digesting<R> {
    /// The next line with its end; nothing at the end of the file. A longer one than any that is exported comes in pieces.
    fn line(&mut self, line: &mut Vec<u8>) -> io::Result<usize> {
        let length = (&mut self.inner).take(LONGEST_LINE).read_until(b'\n', line)?;
        self.digest.update(&line[..length]);
        self.bytes += length as u64;
        Ok(length)
    }
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.digest.update(&buffer[..length]);
        self.bytes += length as u64;
        Ok(length)
    }
}
