//! Documents that are made of the code say what the code says. `make docs` writes them anew.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod backup;
mod configuration;
mod examples;
mod manual;
mod runbook;
mod schema;
mod security;

#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

/// Compares a document with what it should be; with `UPDATE_DOCUMENTS` set it is written instead.
fn check(document: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        std::fs::write(&path, made).expect("the document can be written");
        return;
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let difference = there.lines().zip(made.lines()).position(|(there, made)| there != made);
    let line = difference.unwrap_or_else(|| there.lines().count().min(made.lines().count()));
    assert!(
        there == made,
        "{document} is not what the code gives; `make docs` writes it anew. Line {}:\n  is     {}\n  should {}",
        line + 1,
        there.lines().nth(line).unwrap_or("(nothing)"),
        made.lines().nth(line).unwrap_or("(nothing)"),
    );
}
