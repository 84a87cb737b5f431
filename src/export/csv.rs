//! CSV for spreadsheets: RFC 4180 (CRLF, quotes doubled), UTF-8, with a heading.
//!
//! A cell that a spreadsheet would take for a formula (it begins with `=`, `+`, `-`, `@`, a tab or a carriage return,
//! or the wide form of such a sign) gets an apostrophe before it: what a stranger wrote must not run on the desk of who
//! reads it. So CSV is for reading and counting; what has to be exact to the byte is in JSON Lines.

use std::borrow::Cow;

use csv::{Terminator, WriterBuilder};

use crate::{
    archive::text::iso_milliseconds,
    store::{ArchivedMessage, HistoryRow},
};

/// Heading of [`history`].
pub const HISTORY: &[&str] = &[
    "message_id",
    "account",
    "sent_at",
    "direction",
    "sender",
    "sender_name",
    "recipients",
    "conversation_id",
    "thread_id",
    "subject",
    "body",
    "status",
    "source",
    "purged_at",
];

/// Heading of [`archived`].
pub const ARCHIVED: &[&str] = &[
    "message_id",
    "chain_seq",
    "account",
    "conversation_id",
    "sent_at",
    "direction",
    "sender",
    "sender_name",
    "recipients",
    "thread_id",
    "subject",
    "content_type",
    "body",
    "body_html",
    "status",
    "code",
    "subcode",
    "reason",
    "failed_recipients",
    "operation_id",
    "outbox_id",
    "correlation",
    "source",
    "archived_at",
    "purged_at",
    "content_hash",
    "chain_hash",
];

/// The cells of a message as `history` lists it.
pub fn history(row: &HistoryRow) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    vec![
        row.message_id.to_string(),
        row.account.clone(),
        iso_milliseconds(row.sent_at),
        row.direction.as_str().to_owned(),
        text(&row.sender),
        text(&row.sender_name),
        text(&row.recipients),
        row.conversation_id.to_string(),
        text(&row.thread_id),
        text(&row.subject),
        row.body.clone(),
        row.status.clone(),
        row.source.clone(),
        row.purged_at.map(iso_milliseconds).unwrap_or_default(),
    ]
}

/// The cells of a message as an export has it.
pub fn archived(archived: &ArchivedMessage) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let message = &archived.message;
    vec![
        message.message_id.to_string(),
        message.chain_seq.to_string(),
        message.account.clone(),
        message.conversation_id.to_string(),
        message.sent_at.clone(),
        message.direction.clone(),
        text(&message.sender_uri),
        text(&message.sender_name),
        text(&archived.recipients),
        text(&archived.thread_id),
        text(&archived.subject),
        message.content_type.clone(),
        message.body.clone(),
        text(&message.body_html),
        archived.status.clone(),
        text(&archived.code),
        text(&archived.subcode),
        text(&archived.reason),
        text(&archived.failed_recipients),
        text(&message.operation_id),
        message.outbox_id.map(|id| id.to_string()).unwrap_or_default(),
        text(&message.correlation),
        archived.source.clone(),
        archived.archived_at.clone(),
        text(&message.purged_at),
        text(&message.content_hash),
        text(&message.chain_hash),
    ]
}

/// A heading and its records.
pub fn document(heading: &[&str], records: impl Iterator<Item = Vec<String>>) -> csv::Result<Vec<u8>> {
    let mut document = record(&heading.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())?;
    for cells in records {
        document.extend(record(&cells)?);
    }
    Ok(document)
}

/// One record with its line end.
pub fn record(cells: &[String]) -> csv::Result<Vec<u8>> {
    let mut record = Vec::with_capacity(256);
    let mut writer =
        WriterBuilder::new().buffer_capacity(1024).terminator(Terminator::CRLF).from_writer(&mut record);
    writer.write_record(cells.iter().map(|cell| harmless(cell).into_owned()))?;
    writer.flush()?;
    drop(writer);
    Ok(record)
}

/// The cell as text, whatever it begins with.
fn harmless(cell: &str) -> Cow<'_, str> {
    if cell.starts_with(['=', '+', '-', '@', '\t', '\r', '＝', '＋', '－', '＠']) {
        Cow::Owned(format!("'{cell}"))
    } else {
        Cow::Borrowed(cell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_as_the_standard_says_and_never_formulas() {
        let cells = ["a,b", "say \"hi\"", "two\r\nlines", "=1+1", "-5", "＠x", "", "grüße"];
        let record = record(&cells.map(ToOwned::to_owned)).unwrap();
        assert_eq!(
            String::from_utf8(record).unwrap(),
            "\"a,b\",\"say \"\"hi\"\"\",\"two\r\nlines\",'=1+1,'-5,'＠x,,grüße\r\n"
        );
    }
}
