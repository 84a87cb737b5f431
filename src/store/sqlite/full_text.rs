//! The full-text index over `messages.body` (FTS5), kept by triggers while `archive.full_text` is set.
//!
//! The tokenizer is `trigram`: it finds any run of three characters and more, so it works for languages that put no
//! spaces between words (Chinese, Japanese, Thai), where the word tokenizers see a whole sentence as one word, and for
//! parts of words in those that join them (German). Case and accents are folded. It costs more space than an index of
//! words; whoever does not want that turns the index off. Words of one or two characters are searched without it.

use sqlx::SqlitePool;

use crate::store::{StoreError, trouble::failed};

const CREATE: [&str; 5] = [
    "CREATE VIRTUAL TABLE messages_fts USING fts5(
         body, content = 'messages', content_rowid = 'id', tokenize = 'trigram remove_diacritics 1')",
    "CREATE TRIGGER messages_fts_insert AFTER INSERT ON messages BEGIN
         INSERT INTO messages_fts (rowid, body) VALUES (NEW.id, NEW.body);
     END",
    "CREATE TRIGGER messages_fts_update AFTER UPDATE OF body ON messages WHEN NEW.body IS NOT OLD.body BEGIN
         INSERT INTO messages_fts (messages_fts, rowid, body) VALUES ('delete', OLD.id, OLD.body);
         INSERT INTO messages_fts (rowid, body) VALUES (NEW.id, NEW.body);
     END",
    "CREATE TRIGGER messages_fts_delete AFTER DELETE ON messages BEGIN
         INSERT INTO messages_fts (messages_fts, rowid, body) VALUES ('delete', OLD.id, OLD.body);
     END",
    "INSERT INTO messages_fts (messages_fts) VALUES ('rebuild')",
];

const DROP: [&str; 4] = [
    "DROP TRIGGER messages_fts_insert",
    "DROP TRIGGER messages_fts_update",
    "DROP TRIGGER messages_fts_delete",
    "DROP TABLE messages_fts",
];

/// Makes or drops the index, as the configuration says; an archive that is there already is indexed.
pub(super) async fn arrange(pool: &SqlitePool, wanted: bool) -> Result<(), StoreError> {
    let failed = failed("arranging the full-text index");
    let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
    let is_there: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'messages_fts')")
            .fetch_one(&mut *transaction)
            .await
            .map_err(&failed)?;
    let statements: &[&'static str] = match (wanted, is_there) {
        (true, false) => &CREATE,
        (false, true) => &DROP,
        _ => &[],
    };
    for &statement in statements {
        sqlx::query(statement).execute(&mut *transaction).await.map_err(&failed)?;
    }
    transaction.commit().await.map_err(&failed)
}
