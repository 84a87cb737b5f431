//! The full-text index over `messages.body`: a GIN index over PostgreSQL's own `tsvector`, kept while
//! `archive.full_text` is set.
//!
//! It needs no extension and no word lists: the functions that take a text apart are written by this program from what
//! [`crate::query::fold`] says, so that they fold as it does, whatever the database's locale and version. A word is found
//! by its beginning; each character of a script without spaces is a word. The index only chooses candidates. When this
//! program folds otherwise than the one that made the functions, they and the index are made anew; until then searches
//! do without.

use std::sync::LazyLock;

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row};

use crate::{
    query::{
        fold,
        pattern::{self, class},
    },
    store::{StoreError, trouble::failed},
};

/// Advisory lock of the one server that arranges the index.
const LOCK: i64 = 6_076_142_301_170_134;

/// Longest text of which every word is in the index, in characters: a `tsvector` holds 1 MiB. Longer ones are candidates
/// for everything.
const LONGEST_TEXT: usize = 100_000;

/// Whether every word of `m.body` is in the index: it has at most [`LONGEST_TEXT`] characters, since it has no more bytes,
/// which are told sooner.
pub(super) const IS_WHOLE: &str = "octet_length(m.body) <= 100000";

/// Letters of a word that are indexed: an entry has less than 2 KiB. Longer than any text that is looked for.
const LONGEST_WORD: usize = 500;

/// Stands in the index for the words of a text that is too long. No word: it has a space.
const TOO_LONG: &str = "too long";

/// A function of the database.
struct Function {
    declaration: &'static str,
    /// In PL/pgSQL, whose functions are planned once for a connection and not for every call.
    body: String,
}

/// What the index is made of.
static FUNCTIONS: LazyLock<[Function; 3]> = LazyLock::new(|| {
    [
        Function {
            declaration: "ucwa_relay_words(body text) RETURNS text[]",
            body: format!("BEGIN RETURN {}; END", words()),
        },
        Function {
            declaration: "ucwa_relay_search(body text) RETURNS tsvector",
            // Calls no function of ours: vacuum and analyze have an empty search path and would not find it.
            body: format!(
                "BEGIN RETURN array_to_tsvector({}
                     || CASE WHEN char_length(body) > {LONGEST_TEXT} THEN ARRAY['{TOO_LONG}'] END); END",
                words()
            ),
        },
        // For people, who ask by SQL.
        Function {
            declaration: "ucwa_relay_query(words text) RETURNS tsquery",
            body: "BEGIN RETURN (SELECT string_agg('''' || word || ''':*', ' & ')::tsquery
                                   FROM unnest(ucwa_relay_words(words)) word); END"
                .to_owned(),
        },
    ]
});

/// The words of a text, folded, as an expression. No word has a quotation mark or a backslash, since both divide words.
fn words() -> String {
    // Where the characters stand, so that only words that have such ones are looked at character by character.
    let blocks =
        ['\u{80}'..='\u{24f}', '\u{370}'..='\u{1dff}', '\u{1e00}'..='\u{1eff}', '\u{1f00}'..='\u{1ffff}'];
    let mut word = "word".to_owned();
    for block in blocks {
        let (from, to): (String, String) =
            fold::differing().filter(|(c, _)| block.contains(c) && !fold::is_separator(*c)).unzip();
        word = format!(
            "CASE WHEN word ~ '{}' THEN translate({word}, '{from}', '{to}') ELSE {word} END",
            class([block], "")
        );
    }
    // A text that has as many bytes as characters is ASCII.
    format!(
        "ARRAY(
             SELECT left(CASE WHEN octet_length(word) = char_length(word) THEN word ELSE {word} END, {LONGEST_WORD})
               FROM unnest(string_to_array(
                        regexp_replace(
                            CASE WHEN octet_length(body) = char_length(body)
                                 THEN lower(left(body, {LONGEST_TEXT}) COLLATE \"C\")
                                 ELSE regexp_replace(
                                          regexp_replace(lower(left(body, {LONGEST_TEXT}) COLLATE \"C\"), '{marks}', '', 'g'),
                                          '({unspaced})', ' \\1 ', 'g')
                            END,
                            '{separators}', ' ', 'g'),
                        ' ')) word
              WHERE word <> '')",
        marks = class([fold::MARKS], "+"),
        separators = class(fold::SEPARATORS, "+"),
        unspaced = class(fold::UNSPACED, ""),
    )
}

/// A `tsquery` that fits every text which has `text` in it; none if the index knows nothing of that.
pub(super) fn candidates(text: &str) -> Option<String> {
    let words: Vec<String> = pattern::words(text)
        .iter()
        .map(|word| format!("'{}'{}", word.letters, if word.is_open { ":*" } else { "" }))
        .collect();
    if words.is_empty() { None } else { Some(format!("({}) | '{TOO_LONG}'", words.join(" & "))) }
}

/// Whether the index knows of a text whose words are [all in it](IS_WHOLE) if it has `text` in it, so that nobody has to look
/// at the text: there is nothing to it but the beginning of one word. Of several words the index does not tell whether they
/// stand in a row.
pub(super) fn decides(text: &str) -> bool {
    match pattern::words(text).as_slice() {
        [word] => {
            word.is_open && word.letters == fold::folded(text) && word.letters.chars().count() <= LONGEST_WORD
        }
        _ => false,
    }
}

/// Whether there is an index that folds as this program does.
pub(super) async fn is_there(pool: &PgPool) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM pg_index i
                         WHERE i.indexrelid = to_regclass('messages_fts') AND i.indisvalid)
            AND (SELECT count(*) FROM pg_proc p
                  WHERE p.oid IN (to_regproc('ucwa_relay_words'), to_regproc('ucwa_relay_search'))
                    AND p.prosrc IN ($1, $2)) = 2",
    )
    .bind(&FUNCTIONS[0].body)
    .bind(&FUNCTIONS[1].body)
    .fetch_one(pool)
    .await
}

/// Makes or drops the index, as the configuration says; an archive that is there already is indexed while others write. Of
/// nodes that start together one does it, the others go on: whoever waited would be waited for by the index. The lock goes
/// with the connection.
pub(super) async fn arrange(connection: &mut PgConnection, wanted: bool) -> Result<(), StoreError> {
    let failed = failed("arranging the full-text index");
    let is_ours: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
        .bind(LOCK)
        .fetch_one(&mut *connection)
        .await
        .map_err(&failed)?;
    if !is_ours {
        return Ok(());
    }
    let bodies: Vec<&str> = FUNCTIONS.iter().map(|function| function.body.as_str()).collect();
    let row = sqlx::query(
        "SELECT (SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = to_regclass('messages_fts')) AS is_valid,
                (SELECT count(*) FROM pg_proc p
                  WHERE p.oid IN (to_regproc('ucwa_relay_words'), to_regproc('ucwa_relay_search'),
                                  to_regproc('ucwa_relay_query'))
                    AND p.prosrc = ANY ($1)) = cardinality($1) AS is_current",
    )
    .bind(bodies)
    .fetch_one(&mut *connection)
    .await
    .map_err(&failed)?;
    let is_valid: Option<bool> = row.try_get("is_valid").map_err(&failed)?;
    let is_current: bool = row.try_get("is_current").map_err(&failed)?;
    // One that is not valid was being made when its server ended.
    if is_valid.is_some() && (is_valid == Some(false) || !is_current || !wanted) {
        sqlx::query("DROP INDEX CONCURRENTLY IF EXISTS messages_fts")
            .execute(&mut *connection)
            .await
            .map_err(&failed)?;
    }
    if !wanted {
        return Ok(());
    }
    if !is_current {
        for Function { declaration, body } in &*FUNCTIONS {
            // Costly, so that the planner asks the index and not every text.
            let statement = format!(
                "CREATE OR REPLACE FUNCTION {declaration}
                 LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE STRICT COST 1000 AS $function${body}$function$"
            );
            sqlx::query(AssertSqlSafe(statement)).execute(&mut *connection).await.map_err(&failed)?;
        }
    }
    if is_valid != Some(true) || !is_current {
        sqlx::query(
            "CREATE INDEX CONCURRENTLY IF NOT EXISTS messages_fts ON messages USING gin (ucwa_relay_search(body))",
        )
        .execute(connection)
        .await
        .map_err(&failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_one_word_needs_no_look_at_the_text() {
        assert!(IS_WHOLE.ends_with(&format!(" {LONGEST_TEXT}")));
        for (text, decided) in [
            ("Köl", true),
            ("budget2", true),
            ("会", false),
            ("budget.", false),
            ("(budget", false),
            (" budget", false),
            ("two words", false),
            ("%", false),
        ] {
            assert_eq!(decides(text), decided, "{text}");
        }
        assert!(!decides(&"a".repeat(LONGEST_WORD + 1)));
    }

    #[test]
    fn candidates_are_words_by_their_beginning() {
        assert_eq!(
            candidates("Grüße, Köl").as_deref(),
            Some("('große' & 'kol':*) | 'too long'".replace("große", "gruße")).as_deref()
        );
        assert_eq!(candidates("会議").as_deref(), Some("('会' & '議') | 'too long'"));
        assert_eq!(candidates("' \\ %"), None);
    }
}
