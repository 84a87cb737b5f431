//! The full-text index over `messages.body` (FTS5), kept while `archive.full_text` is set.
//!
//! It holds the words of each text as [`query::pattern`](crate::query::pattern) takes it apart: folded, with every character
//! of a script without spaces as a word of its own. So it folds as this program does, and a phrase of such words in a row
//! is what is looked for. SQLite's own tokenizer sees words with spaces between them and has nothing to decide. Triggers
//! can't take texts apart: whoever writes a message adds its words; what removes or changes a text removes them.
//!
//! The index only chooses candidates. When this program folds otherwise than the one that made the index, it is made
//! anew; until then searches do without.

use std::{fmt::Write as _, sync::LazyLock};

use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, SqliteConnection, SqlitePool};

use super::flush::in_chunks;
use crate::{
    query::{fold, pattern},
    store::{StoreError, trouble::failed},
};

/// Texts that are taken apart at once when the index is made of an archive that is there already.
const PAGE: i64 = 1000;

/// What SQLite says where a statement asks the index and there is none any more.
pub(super) const IS_GONE: &str = "no such table: messages_fts";

/// Name of each object and what makes it. What is there and was made otherwise is made anew.
static OBJECTS: LazyLock<[(&str, String); 3]> = LazyLock::new(|| {
    [
        (
            "messages_fts",
            // All but spaces is part of a word. The comment stays with the table and tells who folded the words.
            format!(
                "CREATE VIRTUAL TABLE messages_fts /* {} */ USING fts5(
                     body, content = '', contentless_delete = 1,
                     tokenize = 'unicode61 remove_diacritics 2 categories ''L* M* N* P* S* C*''')",
                folding()
            ),
        ),
        (
            "messages_fts_update",
            "CREATE TRIGGER messages_fts_update AFTER UPDATE OF body ON messages WHEN NEW.body IS NOT OLD.body BEGIN
                 DELETE FROM messages_fts WHERE rowid = OLD.id;
             END"
            .to_owned(),
        ),
        (
            "messages_fts_delete",
            "CREATE TRIGGER messages_fts_delete AFTER DELETE ON messages BEGIN
                 DELETE FROM messages_fts WHERE rowid = OLD.id;
             END"
            .to_owned(),
        ),
    ]
});

/// What tells one way of folding from another.
fn folding() -> String {
    let mut digest = Sha256::new();
    for range in fold::SEPARATORS.iter().chain(&fold::UNSPACED).chain([&fold::MARKS]) {
        digest.update(format!("{range:?}"));
    }
    for (character, letter) in fold::differing() {
        digest.update([character, letter].iter().collect::<String>());
    }
    digest.finalize().iter().take(8).fold("words ".to_owned(), |mut name, byte| {
        let _infallible = write!(name, "{byte:02x}");
        name
    })
}

/// What FTS5 is asked for candidates of a text that is looked for: its words in a row; none if it has no word, or has the
/// character that would end the question.
pub(super) fn candidates(text: &str) -> Option<String> {
    let words = pattern::words(text);
    let last = words.last().filter(|_| !text.contains('\0'))?;
    let ending = if last.is_open { " *" } else { "" };
    Some(format!("\"{}\"{ending}", pattern::indexed(text)))
}

/// Whether there is an index to add words to.
pub(super) async fn is_kept(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'messages_fts')")
        .fetch_one(connection)
        .await
}

/// Adds the words of messages that have none in the index, by [`pattern::indexed`].
pub(super) async fn add(
    connection: &mut SqliteConnection,
    texts: &[(i64, String)],
) -> Result<(), sqlx::Error> {
    in_chunks(connection, texts, "INSERT INTO messages_fts (rowid, body) ", "", |values, (id, words)| {
        values.put(*id).put(words.clone());
    })
    .await
}

/// Whether there is an index that was made as this program makes it.
pub(super) async fn is_there(pool: &SqlitePool) -> Result<bool, sqlx::Error> {
    let mut is_there = true;
    for (name, sql) in &*OBJECTS {
        is_there = is_there
            && sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = ?1 AND sql = ?2)")
                .bind(name)
                .bind(sql)
                .fetch_one(pool)
                .await?;
    }
    Ok(is_there)
}

/// Makes or drops the index, as the configuration says; an archive that is there already is indexed.
pub(super) async fn arrange(pool: &SqlitePool, wanted: bool) -> Result<(), StoreError> {
    let failed = failed("arranging the full-text index");
    if wanted && is_there(pool).await.map_err(&failed)? {
        return Ok(());
    }
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
    // The table last: its own parts go with it. What another version kept besides goes, too.
    let there: Vec<(String, String)> = sqlx::query_as(
        "SELECT type, name FROM sqlite_schema
          WHERE name GLOB 'messages_fts_*' AND type IN ('trigger', 'index') OR name = 'messages_fts'
          ORDER BY name = 'messages_fts'",
    )
    .fetch_all(&mut *transaction)
    .await
    .map_err(&failed)?;
    for (kind, name) in there {
        let statement = AssertSqlSafe(format!("DROP {kind} {name}"));
        sqlx::query(statement).execute(&mut *transaction).await.map_err(&failed)?;
    }
    if wanted {
        for (_, sql) in &*OBJECTS {
            sqlx::query(AssertSqlSafe(sql.clone())).execute(&mut *transaction).await.map_err(&failed)?;
        }
        add_all(&mut transaction).await.map_err(&failed)?;
    }
    transaction.commit().await.map_err(&failed)
}

/// Adds the words of all texts. One that is no text is taken for what can be read of it.
async fn add_all(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut last = i64::MIN;
    loop {
        let page: Vec<(i64, Vec<u8>)> =
            sqlx::query_as("SELECT id, CAST(body AS BLOB) FROM messages WHERE id > ?1 ORDER BY id LIMIT ?2")
                .bind(last)
                .bind(PAGE)
                .fetch_all(&mut *connection)
                .await?;
        let Some(&(newest, _)) = page.last() else { return Ok(()) };
        last = newest;
        let texts: Vec<(i64, String)> = page
            .iter()
            .map(|(id, body)| (*id, pattern::indexed(&String::from_utf8_lossy(body))))
            .filter(|(_, words)| !words.is_empty())
            .collect();
        add(connection, &texts).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_asked_for_in_a_row() {
        for (text, expected) in [
            ("Quarterly BUDG", Some("\"quarterly budg\" *")),
            ("\"Grüße\"", Some("\"gruße\"")),
            ("会議", Some("\"会 議\"")),
            ("' %", None),
            ("a\0b", None),
        ] {
            assert_eq!(candidates(text).as_deref(), expected, "{text:?}");
        }
    }
}
