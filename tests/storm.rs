//! A server in trouble is not stormed: measured where it counts, at the server.

mod support;

use std::time::{Duration, Instant};

use support::{eventually, scene::Scene};
use ucwa_relay::simulator::{Fault, FaultKind, Operation, Refusal, RequestCount, SimulatorSettings};

const ACCOUNTS: usize = 20;
const AT_ONCE: usize = 3;
const CONFIGURATION: &str = "[outbox]\nsettle_after = \"5s\"\nretry_base = \"1s\"\nretry_max = \"4s\"\nmax_attempts = 99\n\
     [relay]\nsign_in_rate = 200\naccounts_online_at_once = 3\n";

/// How many requests fit into a time: the first at once, then each after at least half of a step that doubles from
/// `base`, and after what the server asked for.
fn allowed(within: Duration, base: Duration, asked: Duration) -> u64 {
    let (mut at, mut requests) = (Duration::ZERO, 1);
    for doubled in 0..20 {
        at += (base * 2_u32.pow(doubled) / 2).min(Duration::from_secs(30)).max(asked);
        if at > within {
            break;
        }
        requests += 1;
    }
    requests
}

fn of(counts: &[RequestCount], operation: Operation) -> Vec<&RequestCount> {
    counts.iter().filter(|count| count.operation == operation).collect()
}

fn all(counts: &[&RequestCount]) -> u64 {
    counts.iter().map(|count| count.requests).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_503_is_asked_less_and_less_and_never_before_it_said() {
    let settings = SimulatorSettings { accounts: ACCOUNTS, ..SimulatorSettings::default() };
    let scene = Scene::begin(settings, 20.0, CONFIGURATION).await;
    let asked = Duration::from_secs(2);
    // From here on nothing gets through.
    scene.simulator.stop_traffic();
    scene.simulator.reset_requests();
    let began = Instant::now();
    let busy = Refusal { status: 503, retry_after: Some(asked.as_secs()), ..Refusal::default() };
    scene.simulator.inject(Fault::new(FaultKind::Status(busy)).share(1.0)).expect("for all accounts");
    for account in &scene.accounts {
        scene.queue(account, "silent.a@fabrikam.example", &format!("from {account}")).await;
    }
    let many = u64::try_from(3 * ACCOUNTS).expect("a small number");
    eventually("every account has asked several times", async || {
        let counts = scene.simulator.requests();
        let asked =
            [Operation::Events, Operation::StartMessaging].map(|operation| all(&of(&counts, operation)));
        asked.iter().all(|asked| *asked >= many).then_some(())
    })
    .await;
    let counts = scene.simulator.requests();
    let within = began.elapsed();
    for count in &counts {
        assert_eq!(count.too_early, 0, "{count:?} came before the server's Retry-After was over");
        // One may have been under way when the trouble began.
        let limit = 1 + allowed(within, Duration::from_secs(1), asked);
        assert!(count.requests <= limit, "{count:?} in {within:?}, {limit} are allowed");
    }
    assert_eq!(all(&of(&counts, Operation::Discovery)), 0, "nobody signs in anew because the server is busy");
    let reckoning = scene.agree().await;
    assert_eq!((reckoning.relayed, reckoning.failed, reckoning.uncertain), (ACCOUNTS, 0, 0));
    scene.undisturbed_since_reset(&scene.accounts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sign_ins_at_a_server_in_trouble_are_few_at_once_and_further_and_further_apart() {
    let settings = SimulatorSettings { accounts: ACCOUNTS, ..SimulatorSettings::default() };
    let mut scene = Scene::begin(settings, 0.0, CONFIGURATION).await;
    scene.relay.server().kill();
    scene.simulator.reset_requests();
    for kind in [FaultKind::Delay { ms: 50 }, FaultKind::status(503)] {
        scene
            .simulator
            .inject(Fault::new(kind).on(Operation::Discovery).share(1.0))
            .expect("for all accounts");
    }
    let began = Instant::now();
    scene.relay.start();
    let many = u64::try_from(4 * ACCOUNTS).expect("a small number");
    eventually("every account has tried several times", async || {
        (all(&of(&scene.simulator.requests(), Operation::Discovery)) >= many).then_some(())
    })
    .await;
    let counts = scene.simulator.requests();
    let within = began.elapsed();
    for count in of(&counts, Operation::Discovery) {
        assert!(count.at_once <= AT_ONCE, "{count:?}");
        let limit =
            allowed(within, Duration::from_secs(1), Duration::ZERO) * u64::try_from(ACCOUNTS).expect("small");
        assert!(count.requests <= limit, "{count:?} in {within:?}, {limit} are allowed");
    }
    assert_eq!(all(&of(&counts, Operation::Token)), 0, "no password goes to a server that is not there");
    scene.simulator.clear_faults(None);
    scene.all_online().await;
    scene.agree().await;
}
