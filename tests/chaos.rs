//! Everything that can go wrong, at random and at once; and the program killed again and again. Afterwards the server's
//! ledger and the database agree.
//!
//! The seed is printed; `UCWA_RELAY_CHAOS_SEED` repeats a run as far as chance allows.

mod support;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use support::{
    eventually_none,
    scene::{QUICK, Scene},
};
use ucwa_relay::simulator::SimulatorSettings;

fn seed() -> u64 {
    let seed = match std::env::var("UCWA_RELAY_CHAOS_SEED") {
        Ok(seed) => seed.parse().expect("UCWA_RELAY_CHAOS_SEED is a number"),
        Err(_) => rand::random_range(0..1_000_000),
    };
    println!("UCWA_RELAY_CHAOS_SEED={seed}");
    seed
}

#[test]
fn a_minute_of_chaos_over_fifty_accounts_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"))
        .current_dir(folder.path())
        .env("RUST_LOG", "warn")
        .args(["demo", "--chaos", "--accounts", "50", "--rate", "30", "--for", "60s"])
        .args(["--seed", &seed().to_string()])
        .output()
        .unwrap();
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{log}");
    assert!(!log.contains("panicked"), "{log}");
    let number = |name: &str| -> usize {
        let line = text
            .lines()
            .rfind(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    for name in ["lost", "duplicated", "unsettled", "disordered"] {
        assert_eq!(number(name), 0, "{name}: {text}");
    }
    assert!(number("faults") >= 100, "{text}");
    assert!(number("relayed") >= 200, "{text}");
    println!("{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_under_traffic_both_ways_lose_and_double_nothing() {
    const KILLS: usize = 20;
    let mut random = StdRng::seed_from_u64(seed());
    let settings = SimulatorSettings { accounts: 6, seed: random.random(), ..SimulatorSettings::default() };
    let mut scene = Scene::begin(settings, 40.0, QUICK).await;
    let mut number = 0;
    for _ in 0..KILLS {
        // Anywhere between the start of the process and the thick of it.
        let until = Instant::now() + Duration::from_millis(random.random_range(50..2500));
        while Instant::now() < until {
            number += 1;
            let account = &scene.accounts[random.random_range(0..scene.accounts.len())];
            let recipient = ["echo.a", "silent.b", "html.c", "pauses.d"][random.random_range(0..4)];
            scene.queue(account, &format!("{recipient}@fabrikam.example"), &format!("row {number}")).await;
            tokio::time::sleep(Duration::from_millis(random.random_range(5..60))).await;
        }
        scene.relay.server().kill();
        scene.relay.start();
    }
    scene.all_online().await;
    let reckoning = scene.agree().await;
    assert_eq!(reckoning.failed, 0, "{reckoning:?}");
    // What a link tells of a message is read after its event was acknowledged.
    eventually_none(Duration::from_mins(1), "rows of which nobody reports the delivery", async || {
        scene.relay.reckon_with(&scene.simulator.ledger()).await.unreported
    })
    .await;
    assert_eq!(reckoning.relayed + reckoning.uncertain, number);
    // Each kill catches a few rows on their way; all others have to be told from those.
    assert!(reckoning.uncertain <= 2 * KILLS, "{} uncertain of {number}", reckoning.uncertain);
    let sessions: i64 =
        sqlx::query_scalar("SELECT count(*) FROM sessions").fetch_one(&scene.pool).await.unwrap();
    assert_eq!(usize::try_from(sessions), Ok(scene.accounts.len()), "every application was resumed");
}
