//! The benchmark runs from end to end on both databases. What it measures here is worth nothing, so no figure is judged.

use std::process::Command;

use serde_json::Value;
use support::postgres::PostgresDatabase;

mod support;

#[tokio::test(flavor = "multi_thread")]
async fn a_quick_run_measures_everything_on_both_databases() {
    let postgres = PostgresDatabase::new().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"))
        .current_dir(folder.path())
        .args(["bench", "--quick", "--json", "figures.json", "--postgres", postgres.url()])
        .output()
        .expect("the binary starts");
    let (table, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}\n{said}");

    let json = std::fs::read_to_string(folder.path().join("figures.json")).expect("the figures were written");
    let report: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(report["quick"], true);
    assert!(report["machine"]["cores"].as_u64() >= Some(1), "{report}");
    let figures = report["figures"].as_array().expect("figures");
    for database in ["SQLite", "PostgreSQL"] {
        let subjects =
            ["insert to accepted", "outbox rows accepted", "claiming", "messages archived", "event to"];
        for begins in subjects {
            let name = |figure: &Value| figure["name"].as_str().unwrap_or_default().to_owned();
            let found = figures
                .iter()
                .any(|figure| figure["database"] == database && name(figure).starts_with(begins));
            assert!(found, "{begins} on {database}: {report}");
        }
    }
    for begins in ["event XML", "memory of an idle account", "growth"] {
        let named = |figure: &&Value| figure["name"].as_str().is_some_and(|name| name.starts_with(begins));
        assert!(figures.iter().any(|figure| named(&figure)), "{begins}: {report}");
    }
    for figure in figures {
        // So few accounts may use less than the system counts.
        let is_idle = figure["unit"] == "% of a core";
        assert!(figure["value"].as_f64().is_some_and(|value| value > 0.0 || is_idle), "{figure}");
        let line = table.lines().find(|line| line.starts_with(figure["name"].as_str().unwrap_or("?")));
        assert!(line.is_some(), "{figure} is not in the table: {table}");
    }

    // Nothing is left behind.
    let mut connection = postgres.connect().await;
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM pg_database WHERE datname LIKE 'ucwa_relay_bench_%'")
            .fetch_one(&mut connection)
            .await
            .expect("databases can be listed");
    assert_eq!(left, 0);
}
