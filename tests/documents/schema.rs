//! `docs/schema.md` is made of the catalogues of a SQLite and of a PostgreSQL database that were just migrated.

use std::{collections::BTreeMap, fmt::Write};

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use ucwa_relay::store::{self, Role};

use crate::support::{
    archive,
    sql::{Kind, Place},
};

const INTRODUCTION: &str = "\
# Schema

Every table and view, made of the catalogues of migrated databases by `make docs`; not to be edited here. On PostgreSQL
the same words are comments of the tables and columns (`\\d+ messages` in psql).

Names and meanings are the same on both databases. Times are UTC: `timestamptz` on PostgreSQL, on SQLite ISO 8601 text
with milliseconds and `Z` (`2026-11-22T16:41:07.123Z`), so that they sort. Ids ascend and are never used again; those of
messages, conversations, participants and invitations ascend in the order of commits. SIP URIs are in lower case with their
scheme, except where users write them. Columns whose meaning begins with *Own* are the service's bookkeeping: they may
change. The full-text index is no part of the migrations; the server keeps it as `archive.full_text` says
([postgresql](postgresql.md#full-text)). So are the roles and their rights ([postgresql](postgresql.md#roles)).

Users write `accounts` (by `ucwa-relay account`), `outbox` and nothing else. Columns and tables are added by later
versions; what there is keeps its meaning.
";

/// A table or view, on both databases.
#[derive(Debug, Default)]
struct Relation {
    is_view: bool,
    on_sqlite: bool,
    meaning: String,
    columns: Vec<Column>,
    /// SQLite's foreign keys: column, table.
    references: Vec<(String, String)>,
    /// PostgreSQL's keys and checks as it words them.
    constraints: Vec<String>,
    /// Index, what SQLite and what PostgreSQL has.
    indexes: BTreeMap<String, [Option<String>; 2]>,
}

#[derive(Debug, Default)]
struct Column {
    name: String,
    sqlite: Option<String>,
    postgres: Option<String>,
    sqlite_takes_null: bool,
    postgres_takes_null: bool,
    default: String,
    choices: Vec<String>,
    meaning: String,
}

type Catalogue = Vec<(String, Relation)>;

#[tokio::test]
async fn the_reference_of_the_schema_is_what_the_migrations_make() {
    let (sqlite, postgres) = (migrated(Kind::Sqlite).await, migrated(Kind::Postgres).await);
    let mut catalogue = of_sqlite(&sqlite.url()).await;
    add_postgres(&mut catalogue, &postgres.url()).await;

    let mut text = INTRODUCTION.to_owned();
    diagram(&mut text, &catalogue);
    for (heading, is_view) in [("Tables", false), ("Views", true)] {
        write!(text, "\n## {heading}\n").unwrap();
        for (name, relation) in catalogue.iter().filter(|(_, relation)| relation.is_view == is_view) {
            describe(&mut text, name, relation);
        }
    }
    super::check("docs/schema.md", &text);
}

async fn migrated(kind: Kind) -> Place {
    let place = Place::new(kind).await;
    let settings = store::StoreSettings { full_text: false, ..archive::settings(place.url()) };
    store::connect(&settings, Role::Server).await.expect("the migrations run").close().await;
    place
}

async fn of_sqlite(url: &str) -> Catalogue {
    let mut sql = SqliteConnection::connect(url).await.expect("the file opens");
    let tables: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT name, type, sql FROM sqlite_schema
          WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' AND name <> '_sqlx_migrations' ORDER BY rowid",
    )
    .fetch_all(&mut sql)
    .await
    .expect("the catalogue can be read");
    let mut catalogue = Catalogue::new();
    for (name, kind, definition) in tables {
        let mut relation = Relation { is_view: kind == "view", on_sqlite: true, ..Relation::default() };
        let columns: Vec<(String, String, bool, Option<String>, i64)> = sqlx::query_as(AssertSqlSafe(format!(
            "SELECT name, type, \"notnull\", dflt_value, pk FROM pragma_table_xinfo('{name}') ORDER BY cid"
        )))
        .fetch_all(&mut sql)
        .await
        .expect("the columns can be read");
        for (column, declared, not_null, _, key) in columns {
            relation.columns.push(Column {
                sqlite: Some(declared),
                sqlite_takes_null: !not_null && key == 0,
                choices: choices_of_sqlite(&definition, &column),
                name: column,
                ..Column::default()
            });
        }
        relation.references = sqlx::query_as(AssertSqlSafe(format!(
            "SELECT \"from\", \"table\" FROM pragma_foreign_key_list('{name}') ORDER BY id DESC"
        )))
        .fetch_all(&mut sql)
        .await
        .expect("the keys can be read");
        let indexes: Vec<(String, String)> = sqlx::query_as(AssertSqlSafe(format!(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = '{name}' AND sql IS NOT NULL"
        )))
        .fetch_all(&mut sql)
        .await
        .expect("the indexes can be read");
        for (index, definition) in indexes {
            let words = definition.split_whitespace().collect::<Vec<_>>().join(" ");
            let (head, columns) = words.split_once(&format!("ON {name} ")).expect("an index is on its table");
            let unique = if head.contains("UNIQUE") { "unique " } else { "" };
            relation.indexes.insert(index, [Some(format!("{unique}{columns}")), None]);
        }
        catalogue.push((name, relation));
    }
    catalogue
}

/// What stands in `CHECK (column IN ('a', 'b'))`.
fn choices_of_sqlite(definition: &str, column: &str) -> Vec<String> {
    let Some((_, after)) = definition.split_once(&format!("CHECK ({column} IN (")) else { return Vec::new() };
    let list = after.split(')').next().unwrap_or_default();
    list.split('\'').skip(1).step_by(2).map(str::to_owned).collect()
}

async fn add_postgres(catalogue: &mut Catalogue, url: &str) {
    let mut sql = PgConnection::connect(url).await.expect("the database can be reached");
    let tables: Vec<(String, bool, Option<String>)> = sqlx::query_as(
        "SELECT relname::text, relkind = 'v', obj_description(oid, 'pg_class') FROM pg_class
          WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND relname <> '_sqlx_migrations'
          ORDER BY oid",
    )
    .fetch_all(&mut sql)
    .await
    .expect("the catalogue can be read");
    for (name, is_view, meaning) in tables {
        if !catalogue.iter().any(|(known, _)| *known == name) {
            catalogue.push((name.clone(), Relation { is_view, ..Relation::default() }));
        }
        let (_, relation) =
            catalogue.iter_mut().find(|(known, _)| *known == name).expect("it was just put in");
        relation.meaning = meaning.unwrap_or_else(|| panic!("{name} has no COMMENT that says what it is"));
        add_columns_of_postgres(&mut sql, &name, relation).await;
        // Lists of values stand with their columns.
        let constraints: Vec<String> = sqlx::query_scalar(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint
              WHERE conrelid = $1::regclass AND contype IN ('c', 'f', 'p', 'u') AND NOT (contype = 'c' AND pg_get_constraintdef(oid) ~ '^CHECK \\(\\(\\w+ = (ANY|'')')
              ORDER BY contype, conname",
        )
        .bind(&name)
        .fetch_all(&mut sql)
        .await
        .expect("the constraints can be read");
        relation.constraints = constraints.iter().map(|definition| without_types(definition)).collect();
        let indexes: Vec<(String, bool, String)> = sqlx::query_as(
            "SELECT i.indexrelid::regclass::text, i.indisunique, pg_get_indexdef(i.indexrelid) FROM pg_index i
              WHERE i.indrelid = $1::regclass
                AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid AND c.contype IN ('p', 'u'))",
        )
        .bind(&name)
        .fetch_all(&mut sql)
        .await
        .expect("the indexes can be read");
        for (index, is_unique, definition) in indexes {
            let (_, columns) = definition.split_once(" USING btree ").expect("all indexes are b-trees");
            let unique = if is_unique { "unique " } else { "" };
            relation.indexes.entry(index).or_default()[1] =
                Some(format!("{unique}{}", without_types(columns)));
        }
    }
}

async fn add_columns_of_postgres(sql: &mut PgConnection, name: &str, relation: &mut Relation) {
    type Row = (String, String, bool, Option<String>, bool, Option<String>, Option<String>);
    let columns: Vec<Row> = sqlx::query_as(
        "SELECT a.attname::text, format_type(a.atttypid, NULL), a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
                a.attidentity <> '', col_description(a.attrelid, a.attnum),
                (SELECT pg_get_constraintdef(k.oid) FROM pg_constraint k
                  WHERE k.conrelid = a.attrelid AND k.contype = 'c' AND k.conkey = ARRAY[a.attnum]
                    AND pg_get_constraintdef(k.oid) ~ '^CHECK \\(\\(\\w+ = (ANY|'')' LIMIT 1)
           FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
          WHERE a.attrelid = $1::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
    )
    .bind(name)
    .fetch_all(sql)
    .await
    .expect("the columns can be read");
    for (column, kind, not_null, default, ascends, meaning, choices) in columns {
        if !relation.columns.iter().any(|known| known.name == column) {
            relation.columns.push(Column { name: column.clone(), ..Column::default() });
        }
        let known =
            relation.columns.iter_mut().find(|known| known.name == column).expect("it was just put in");
        known.postgres = Some(if kind == "timestamp with time zone" { "timestamptz".into() } else { kind });
        known.postgres_takes_null = !not_null;
        known.meaning =
            meaning.unwrap_or_else(|| panic!("{name}.{column} has no COMMENT that says what it is"));
        known.default = match default {
            _ if ascends => "ascends".into(),
            Some(text) if text.contains("clock_timestamp") || text == "now()" => "now".into(),
            Some(text) => format!("`{}`", without_types(&text)),
            None => String::new(),
        };
        let choices: Vec<String> = choices
            .map(|text| text.split('\'').skip(1).step_by(2).map(str::to_owned).collect())
            .unwrap_or_default();
        if known.sqlite.is_some() {
            assert_eq!(
                known.choices, choices,
                "{name}.{column} takes other values on PostgreSQL than on SQLite"
            );
        }
        known.choices = choices;
    }
}

fn without_types(text: &str) -> String {
    text.replace("::text", "").replace("::bigint", "")
}

fn diagram(text: &mut String, catalogue: &Catalogue) {
    text.push_str("\n```mermaid\nerDiagram\n");
    for (name, relation) in catalogue {
        for (column, table) in &relation.references {
            // Everything belongs to an account: those lines would hide the others.
            if table != "accounts"
                || relation.columns.len() < 8
                || name == "sessions"
                || name == "conversations"
            {
                writeln!(text, "  {table} ||--o{{ {name} : {column}").expect("a text takes everything");
            }
        }
    }
    text.push_str("  messages |o--o| outbox : outbox_id\n```\n");
    text.push_str("\nEvery table of the archive also has an `account_id`, which leads to `accounts`.\n");
}

fn describe(text: &mut String, name: &str, relation: &Relation) {
    let only = if relation.on_sqlite { "" } else { " PostgreSQL only." };
    write!(text, "\n### {name}\n\n{}{only}\n\n", relation.meaning).expect("a text takes everything");
    text.push_str(if relation.is_view {
        "| column | PostgreSQL | meaning |\n| --- | --- | --- |\n"
    } else {
        "| column | SQLite | PostgreSQL | NULL | default | meaning |\n| --- | --- | --- | --- | --- | --- |\n"
    });
    for column in &relation.columns {
        let postgres = column.postgres.as_deref().unwrap_or("-");
        let mut meaning = column.meaning.replace('|', "\\|");
        if !column.choices.is_empty() {
            write!(meaning, " One of `{}`.", column.choices.join("`, `")).expect("a text takes everything");
        }
        if let Some((_, table)) = relation.references.iter().find(|(from, _)| *from == column.name) {
            write!(meaning, " Refers to [{table}](#{table}).").expect("a text takes everything");
        }
        let line = if relation.is_view {
            format!("| `{}` | {postgres} | {meaning} |", column.name)
        } else {
            let sqlite = column.sqlite.as_deref().unwrap_or("-");
            let null = match (column.sqlite_takes_null && column.sqlite.is_some(), column.postgres_takes_null)
            {
                (true, true) => "yes",
                (false, true) if column.sqlite.is_none() => "yes",
                (false, false) => "",
                (true, false) => "SQLite",
                (false, true) => "PostgreSQL",
            };
            format!("| `{}` | {sqlite} | {postgres} | {null} | {} | {meaning} |", column.name, column.default)
        };
        text.push_str(&line);
        text.push('\n');
    }
    keys(text, relation);
}

fn keys(text: &mut String, relation: &Relation) {
    if relation.constraints.is_empty() && relation.indexes.is_empty() {
        return;
    }
    text.push_str("\n<details><summary>Keys, checks and indexes</summary>\n\n");
    for constraint in &relation.constraints {
        writeln!(text, "- `{constraint}`").expect("a text takes everything");
    }
    for (index, [sqlite, postgres]) in &relation.indexes {
        let comparable = |text: &Option<String>| text.as_ref().map(|text| text.replace(['(', ')', ' '], ""));
        let line = match (sqlite, postgres) {
            (Some(shown), Some(_)) if comparable(sqlite) == comparable(postgres) => {
                format!("index `{index}`: `{shown}`")
            }
            (Some(sqlite), Some(postgres)) => {
                format!("index `{index}`: `{postgres}`; SQLite: `{sqlite}`")
            }
            (Some(sqlite), None) => format!("index `{index}`, SQLite only: `{sqlite}`"),
            (None, Some(postgres)) => format!("index `{index}`, PostgreSQL only: `{postgres}`"),
            (None, None) => continue,
        };
        writeln!(text, "- {line}").expect("a text takes everything");
    }
    text.push_str("\n</details>\n");
}
