//! What the archive knows and how events change it: facts in, rows out, without XML, SQL or actors.
//!
//! - [`fact`]: what became known, in the archive's words. [`interpret`]: from events and resources to facts,
//!   [`interpret_log`]: from conversation logs. [`replay`]: quarantined payloads, read again.
//! - [`retry`]: which failures of a send heal by waiting, and how long.
//! - [`keys`]: which rows a batch of facts mentions, so that a dialect loads them with one query per table.
//! - [`workspace`]: those rows in memory, the rules that facts follow, and what changed; `rules` holds the rules,
//!   one file per subject.
//! - [`chain`]: the tamper-evident hash chain over settled messages (G11).
//! - [`row`]: rows as the rules see them. [`text`]: how texts and times are compared and written.

pub mod chain;
pub mod fact;
pub mod interpret;
pub mod interpret_log;
pub mod keys;
pub mod replay;
pub mod retry;
pub mod row;
mod rules;
pub mod text;
mod vocabulary;
pub mod workspace;

pub use keys::Keys;
pub(crate) use rules::{PATIENCE, RESUME};
pub(crate) use vocabulary::is_listed_rel;
pub use workspace::{Changes, Workspace};
