//! The full-text index over `messages.body` (FTS5), kept by triggers while `archive.full_text` is set.
//!
//! The tokenizer is `trigram`: it finds any run of three characters and more, so it works for languages that put no
//! spaces between words (Chinese, Japanese, Thai), where the word tokenizers see a whole sentence as one word. Case and
//! accents are folded. It costs more space than an index of words; whoever does not want that turns the index off.
//!
//! The index only chooses candidates, and it may not lose any. It folds as SQLite does, which knows fewer letters than
//! [`fold`](crate::query::fold): texts with characters of which the two think otherwise are in a second, small index,
//! `messages_fts_besides`, and candidates for everything.

use std::{ops::RangeInclusive, sync::LazyLock};

use sqlx::{AssertSqlSafe, SqlitePool};

use crate::store::{StoreError, trouble::failed};

/// The index answers for this many letters and more.
const INDEXED_LETTERS: usize = 3;

/// Characters that SQLite's tokenizer takes for other letters than [`fold`](crate::query::fold) does, with some that stand
/// between them.
const FOLDED_OTHERWISE: [RangeInclusive<char>; 27] = [
    '\u{1e0}'..='\u{1e3}',
    '\u{1ee}'..='\u{1ef}',
    '\u{1fc}'..='\u{1ff}',
    '\u{305}'..='\u{305}',
    '\u{30d}'..='\u{30e}',
    '\u{310}'..='\u{310}',
    '\u{312}'..='\u{31a}',
    '\u{31c}'..='\u{322}',
    '\u{329}'..='\u{32c}',
    '\u{32f}'..='\u{32f}',
    '\u{332}'..='\u{36f}',
    '\u{37f}'..='\u{37f}',
    '\u{528}'..='\u{52f}',
    '\u{13a0}'..='\u{13f5}',
    '\u{1c89}'..='\u{1c89}',
    '\u{1c90}'..='\u{1cbf}',
    '\u{2c2f}'..='\u{2c2f}',
    '\u{a698}'..='\u{a69f}',
    '\u{a796}'..='\u{a7f5}',
    '\u{104b0}'..='\u{104d3}',
    '\u{10570}'..='\u{10595}',
    '\u{10c80}'..='\u{10cb2}',
    '\u{10d50}'..='\u{10d65}',
    '\u{118a0}'..='\u{118bf}',
    '\u{16e40}'..='\u{16e5f}',
    '\u{16ea0}'..='\u{16eb8}',
    '\u{1e900}'..='\u{1e921}',
];

/// By name, what makes it. What is there and was made otherwise is made anew.
static OBJECTS: LazyLock<[(&str, &str, String); 5]> = LazyLock::new(|| {
    [
        (
            "TABLE",
            "messages_fts",
            "CREATE VIRTUAL TABLE messages_fts USING fts5(
                 body, content = 'messages', content_rowid = 'id', tokenize = 'trigram remove_diacritics 1')"
                .to_owned(),
        ),
        (
            "INDEX",
            "messages_fts_besides",
            format!("CREATE INDEX messages_fts_besides ON messages (id) WHERE {}", besides("body")),
        ),
        (
            "TRIGGER",
            "messages_fts_insert",
            "CREATE TRIGGER messages_fts_insert AFTER INSERT ON messages BEGIN
                 INSERT INTO messages_fts (rowid, body) VALUES (NEW.id, NEW.body);
             END"
            .to_owned(),
        ),
        (
            "TRIGGER",
            "messages_fts_update",
            "CREATE TRIGGER messages_fts_update AFTER UPDATE OF body ON messages WHEN NEW.body IS NOT OLD.body BEGIN
                 INSERT INTO messages_fts (messages_fts, rowid, body) VALUES ('delete', OLD.id, OLD.body);
                 INSERT INTO messages_fts (rowid, body) VALUES (NEW.id, NEW.body);
             END"
            .to_owned(),
        ),
        (
            "TRIGGER",
            "messages_fts_delete",
            "CREATE TRIGGER messages_fts_delete AFTER DELETE ON messages BEGIN
                 INSERT INTO messages_fts (messages_fts, rowid, body) VALUES ('delete', OLD.id, OLD.body);
             END"
            .to_owned(),
        ),
    ]
});

/// Of the texts whose words the index may not have: a condition on a column.
pub(super) fn besides(column: &str) -> String {
    let mut ranges = String::new();
    for range in &FOLDED_OTHERWISE {
        ranges.extend([*range.start(), '-', *range.end()]);
    }
    format!("{column} GLOB '*[{ranges}]*'")
}

/// What FTS5 is asked for candidates of a folded text; none if the text is too short for the index.
pub(super) fn indexed_parts(folded: &str) -> Option<String> {
    // White space is folded into one space here and not there.
    let parts: Vec<String> = folded
        .split(' ')
        .filter(|part| part.chars().count() >= INDEXED_LETTERS)
        .map(|part| format!("\"{}\"", part.replace('"', "\"\"")))
        .collect();
    if parts.is_empty() { None } else { Some(parts.join(" ")) }
}

/// Whether there is an index that was made as this program makes it.
pub(super) async fn is_there(pool: &SqlitePool) -> Result<bool, sqlx::Error> {
    let mut is_there = true;
    for (_, name, sql) in &*OBJECTS {
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
    for (kind, name, _) in OBJECTS.iter().rev() {
        let statement = format!("DROP {kind} IF EXISTS {name}");
        sqlx::query(AssertSqlSafe(statement)).execute(&mut *transaction).await.map_err(&failed)?;
    }
    if wanted {
        let rebuild = "INSERT INTO messages_fts (messages_fts) VALUES ('rebuild')";
        for statement in OBJECTS.iter().map(|(_, _, sql)| sql.as_str()).chain([rebuild]) {
            sqlx::query(AssertSqlSafe(statement.to_owned()))
                .execute(&mut *transaction)
                .await
                .map_err(&failed)?;
        }
    }
    transaction.commit().await.map_err(&failed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use sqlx::{Connection, SqliteConnection};

    use super::*;
    use crate::query::fold;

    /// Asks SQLite about every character that is not its own letter, and about all marks.
    #[tokio::test]
    async fn characters_that_are_folded_otherwise_are_known() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::query(AssertSqlSafe(OBJECTS[0].2.replace("content = 'messages', content_rowid = 'id', ", "")))
            .execute(&mut connection)
            .await
            .unwrap();
        let differing = fold::differing().filter(|(_, letter)| *letter != ' ');
        let texts: Vec<(char, String, String)> = differing
            .map(|(c, letter)| (c, format!("<{c}>"), format!("<{letter}>")))
            .chain(fold::MARKS.map(|mark| (mark, format!("<a{mark}>"), "<a>".to_owned())))
            .collect();
        let mut otherwise = BTreeSet::new();
        for (c, text, wanted) in texts {
            sqlx::query("DELETE FROM messages_fts").execute(&mut connection).await.unwrap();
            sqlx::query("INSERT INTO messages_fts (body) VALUES (?1)")
                .bind(text)
                .execute(&mut connection)
                .await
                .unwrap();
            let found: i64 =
                sqlx::query_scalar("SELECT count(*) FROM messages_fts WHERE messages_fts MATCH ?1")
                    .bind(indexed_parts(&wanted))
                    .fetch_one(&mut connection)
                    .await
                    .unwrap();
            if found == 0 {
                otherwise.insert(c);
            }
        }
        let is_known = |c: char| FOLDED_OTHERWISE.iter().any(|range| range.contains(&c));
        let unknown: Vec<char> = otherwise.iter().copied().filter(|&c| !is_known(c)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        let useless: Vec<_> =
            FOLDED_OTHERWISE.iter().filter(|range| !otherwise.iter().any(|c| range.contains(c))).collect();
        assert!(useless.is_empty(), "{useless:?}");
    }

    #[test]
    fn short_parts_are_not_asked_for() {
        assert_eq!(indexed_parts("ab cde \"fgh\"").as_deref(), Some("\"cde\" \"\"\"fgh\"\"\""));
        assert_eq!(indexed_parts("ab cd"), None);
    }
}
