//! What a run has finished so far: `export.journal`, a JSON line for the run's plan and one for each file.
//!
//! The journal is locked while a run writes to it, so two never fill one folder. A run that finds the journal of a killed
//! one takes up its plan; a last line that was cut short is as if it had not been written, and its file is made again.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::{
    ExportFormat,
    manifest::{FileEntry, Manifest},
};
use crate::identifiers::{AccountId, ConversationId, MessageId};

/// Name of the file.
pub const NAME: &str = "export.journal";

/// What a run is going to do, fixed at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Number of the run, from 1; [`Manifest::runs`] once it is finished.
    pub run: u64,
    /// Kind of the files.
    pub format: ExportFormat,
    /// What is asked for.
    pub query: String,
    /// By URI.
    pub accounts: Vec<PlannedAccount>,
}

/// Which part of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedAccount {
    /// Row id.
    pub id: AccountId,
    /// SIP URI.
    pub uri: String,
    /// Exported by the runs before.
    pub after: i64,
    /// Up to here, this one too.
    pub to: i64,
}

/// Where to go on in one account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// After this `chain_seq`.
    Chain(i64),
    /// After this message, by conversation, time and id.
    Conversation(ConversationId, String, MessageId),
    /// The account is finished.
    Done,
}

/// A line after the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// SIP URI.
    pub account: String,
    /// The file that was finished.
    pub file: Option<FileEntry>,
    /// Where to go on.
    pub position: Position,
}

/// The open journal of this run.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// What the run does.
    pub plan: Plan,
}

impl Journal {
    /// Takes up the journal of a run that was interrupted, if there is one.
    ///
    /// # Errors
    /// If another process is exporting into the folder.
    pub fn resume(folder: &Path, manifest: Option<&Manifest>) -> anyhow::Result<Option<Self>> {
        let path = folder.join(NAME);
        if !path.exists() {
            return Ok(None);
        }
        let mut file = File::options().read(true).write(true).open(&path)?;
        lock(&file, folder)?;
        let whole = whole_lines(&file)?;
        file.set_len(whole)?;
        file.seek(SeekFrom::Start(0))?;
        let mut first = String::new();
        BufReader::new(&file).read_line(&mut first)?;
        let plan: Option<Plan> = serde_json::from_str(&first).ok();
        file.seek(SeekFrom::End(0))?;
        match plan {
            Some(plan) if manifest.is_none_or(|manifest| manifest.runs < plan.run) => {
                Ok(Some(Self { file, path, plan }))
            }
            // Cut short before it said anything, or left over by a run that finished all but removing it.
            _ => {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                Ok(None)
            }
        }
    }

    /// Begins a run.
    pub fn create(folder: &Path, plan: Plan) -> anyhow::Result<Self> {
        let path = folder.join(NAME);
        let mut file = File::create_new(&path)
            .with_context(|| format!("cannot create {}: is another export running?", path.display()))?;
        lock(&file, folder)?;
        writeln!(file, "{}", serde_json::to_string(&plan)?)?;
        file.sync_all()?;
        Ok(Self { file, path, plan })
    }

    /// Notes what was finished.
    pub fn step(&mut self, step: &Step) -> anyhow::Result<()> {
        let line = serde_json::to_string(step)? + "\n";
        self.file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Gives every step so far to `each`.
    pub fn steps(&self, mut each: impl FnMut(Step) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let reader = BufReader::new(File::open(&self.path)?);
        for line in reader.lines().skip(1) {
            let step = serde_json::from_str(&line?).with_context(|| {
                format!("{} is damaged; remove it, and this run begins anew", self.path.display())
            })?;
            each(step)?;
        }
        Ok(())
    }

    /// The run is over and its manifest written.
    pub fn remove(self) -> anyhow::Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }
}

fn lock(file: &File, folder: &Path) -> anyhow::Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another export into {} is running", folder.display())
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("the export into {} cannot be locked", folder.display()))
        }
    }
}

/// Length up to the last line end.
fn whole_lines(file: &File) -> anyhow::Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut whole, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)? as u64;
        if !line.ends_with(b"\n") {
            return Ok(whole);
        }
        whole += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_that_was_cut_short_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let plan = Plan { run: 1, format: ExportFormat::Csv, query: String::new(), accounts: Vec::new() };
        let step = |seq| Step { account: "a".into(), file: None, position: Position::Chain(seq) };
        let mut journal = Journal::create(folder, plan.clone()).unwrap();
        journal.step(&step(1)).unwrap();
        assert!(Journal::resume(folder, None).unwrap_err().to_string().contains("another export"));
        journal.file.write_all(b"{\"account\":\"a\",\"fi").unwrap();
        drop(journal);

        let mut journal = Journal::resume(folder, None).unwrap().unwrap();
        assert_eq!(journal.plan, plan);
        journal.step(&step(2)).unwrap();
        let mut steps = Vec::new();
        journal
            .steps(|step| {
                steps.push(step);
                Ok(())
            })
            .unwrap();
        assert_eq!(steps, [step(1), step(2)]);
        journal.remove().unwrap();
        assert!(Journal::resume(folder, None).unwrap().is_none());
        fs::write(folder.join(NAME), "{\"run\"").unwrap();
        assert!(Journal::resume(folder, None).unwrap().is_none());
    }
}
