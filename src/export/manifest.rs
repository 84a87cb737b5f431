//! `manifest.json`: what an export has, and by which digests that can be checked.
//!
//! It has as many files as there are conversations and days, so `files` comes last and is written and read as a stream.

use std::{
    fmt,
    fs::File,
    io::{BufReader, BufWriter, Write},
    path::Path,
};

use anyhow::Context;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::ExportFormat;
use crate::store::Stretch;

/// Name of the file.
pub const NAME: &str = "manifest.json";
/// `manifest`: which rules it follows.
pub const VERSION: &str = "ucwa-relay-export/1";

/// A message's place in its chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// `chain_seq`.
    pub chain_seq: i64,
    /// `content_hash`.
    pub content_hash: String,
    /// `chain_hash`.
    pub chain_hash: String,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Below the export's folder, with `/`.
    pub path: String,
    /// Of its content, in lower-case hexadecimal.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// Whose messages; empty for what concerns all.
    pub account: String,
    /// How many.
    pub messages: u64,
    /// The one with the smallest number.
    pub first: Option<Link>,
    /// The one with the largest number.
    pub last: Option<Link>,
}

/// One account's part of the export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountEntry {
    /// SIP URI.
    pub account: String,
    /// How many messages.
    pub messages: u64,
    /// The one with the smallest number.
    pub first: Option<Link>,
    /// The one with the largest number.
    pub last: Option<Link>,
    /// Up to which `chain_seq` the account was exported; the next run goes on after it.
    pub exported_to: i64,
    /// When the account was followed and when not, as known when the export was made.
    pub coverage: serde_json::Value,
}

impl AccountEntry {
    /// For an account of which nothing is exported yet.
    pub fn new(account: &str) -> Self {
        Self {
            account: account.to_owned(),
            messages: 0,
            first: None,
            last: None,
            exported_to: 0,
            coverage: serde_json::Value::Array(Vec::new()),
        }
    }

    /// Counts a file in.
    pub fn add(&mut self, file: &FileEntry) {
        self.messages += file.messages;
        if let Some(first) = &file.first
            && self.first.as_ref().is_none_or(|known| first.chain_seq < known.chain_seq)
        {
            self.first = Some(first.clone());
        }
        if let Some(last) = &file.last
            && self.last.as_ref().is_none_or(|known| last.chain_seq > known.chain_seq)
        {
            self.last = Some(last.clone());
        }
    }

    /// Notes when the account was followed.
    pub fn cover(&mut self, stretches: &[Stretch]) -> serde_json::Result<()> {
        self.coverage = serde_json::to_value(stretches)?;
        Ok(())
    }
}

/// All but the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub manifest: String,
    /// Which program made it.
    pub made_by: String,
    /// Kind of the files.
    pub format: ExportFormat,
    /// What was asked for; empty for everything.
    pub query: String,
    /// Nothing but accounts was chosen: no number is missing in a chain.
    pub whole_chains: bool,
    /// Runs so far.
    pub runs: u64,
    /// End of the last run, by our clock.
    pub finished_at: String,
    /// Messages of all accounts.
    pub messages: u64,
    /// By URI.
    pub accounts: Vec<AccountEntry>,
}

impl Manifest {
    /// Reads all but the files; `None` if there is none.
    pub fn read(folder: &Path) -> anyhow::Result<Option<Self>> {
        let path = folder.join(NAME);
        if !path.exists() {
            return Ok(None);
        }
        let file = open(&path)?;
        let manifest: Self = serde_json::from_reader(file)
            .with_context(|| format!("{} can't be understood", path.display()))?;
        anyhow::ensure!(
            manifest.manifest == VERSION,
            "{} is {:?}, this program knows {VERSION}",
            path.display(),
            manifest.manifest
        );
        Ok(Some(manifest))
    }
}

fn open(path: &Path) -> anyhow::Result<BufReader<File>> {
    Ok(BufReader::new(File::open(path).with_context(|| format!("cannot read {}", path.display()))?))
}

/// Gives each file of a manifest to `each`, in order.
pub fn read_files(
    folder: &Path,
    mut each: impl FnMut(FileEntry) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = folder.join(NAME);
    let mut failure = None;
    let read = Files(&mut |file| {
        each(file).map_err(|error| {
            failure = Some(error);
            Stopped
        })
    })
    .deserialize(&mut serde_json::Deserializer::from_reader(open(&path)?));
    match failure {
        Some(error) => Err(error),
        None => read.with_context(|| format!("{} can't be understood", path.display())),
    }
}

/// The receiver of files wants no more.
struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("stopped")
    }
}

type Receiver<'a> = &'a mut dyn FnMut(FileEntry) -> Result<(), Stopped>;

/// Reads the object and hands out the elements of its `files`.
struct Files<'a>(Receiver<'a>);

impl<'de> DeserializeSeed<'de> for Files<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Files<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "files" {
                map.next_value_seed(Elements(&mut *self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Elements<'a>(Receiver<'a>);

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(file) = elements.next_element()? {
            (self.0)(file).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

/// Writes a manifest, file by file, in the place of the one before.
#[derive(Debug)]
pub struct ManifestWriter {
    file: BufWriter<File>,
    any: bool,
}

/// Its name until it is complete.
const PART: &str = "manifest.json.part";

impl ManifestWriter {
    /// Begins with all but the files.
    pub fn create(folder: &Path, manifest: &Manifest) -> anyhow::Result<Self> {
        let path = folder.join(PART);
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut file = BufWriter::new(file);
        let head = serde_json::to_string_pretty(manifest)?;
        let head = head.trim_end().strip_suffix('}').unwrap_or(&head).trim_end();
        write!(file, "{head},\n  \"files\": [").context("cannot write the manifest")?;
        Ok(Self { file, any: false })
    }

    /// Adds one, on a line of its own.
    pub fn file(&mut self, entry: &FileEntry) -> anyhow::Result<()> {
        let comma = if self.any { "," } else { "" };
        self.any = true;
        write!(self.file, "{comma}\n    {}", serde_json::to_string(entry)?)
            .context("cannot write the manifest")
    }

    /// Completes it.
    pub fn finish(mut self, folder: &Path) -> anyhow::Result<()> {
        self.file.write_all(b"\n  ]\n}\n").context("cannot write the manifest")?;
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all().context("cannot write the manifest")?;
        std::fs::rename(folder.join(PART), folder.join(NAME)).context("cannot write the manifest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(Manifest::read(folder).unwrap(), None);
        let manifest = Manifest {
            manifest: VERSION.into(),
            made_by: "test".into(),
            format: ExportFormat::Eml,
            query: "from:bob".into(),
            whole_chains: false,
            runs: 1,
            finished_at: String::new(),
            messages: 2,
            accounts: vec![AccountEntry::new("sip:alice@contoso.com")],
        };
        let file = |path: &str| FileEntry {
            path: path.into(),
            sha256: String::new(),
            bytes: 1,
            account: String::new(),
            messages: 1,
            first: None,
            last: None,
        };
        let files = [file("a"), file("b")];
        for count in [0, 2] {
            let mut writer = ManifestWriter::create(folder, &manifest).unwrap();
            files[..count].iter().try_for_each(|file| writer.file(file)).unwrap();
            writer.finish(folder).unwrap();
            assert_eq!(Manifest::read(folder).unwrap().as_ref(), Some(&manifest));
            let mut read = Vec::new();
            read_files(folder, |file| {
                read.push(file);
                Ok(())
            })
            .unwrap();
            assert_eq!(read, files[..count]);
        }
        let stopped = read_files(folder, |file| anyhow::bail!("no {}", file.path)).unwrap_err();
        assert_eq!(stopped.to_string(), "no a");
    }
}
