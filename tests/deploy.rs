//! What lies in `deploy/` against the real program: alert rules, dashboard, unit, users and folders.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use support::{PATIENCE, Relay, Simulate, eventually};
use tokio::net::UnixDatagram;

const ALICE: &str = "sip:user0001@contoso.example";

const RULES: &str = "deploy/prometheus/ucwa-relay.rules.yml";
const RULE_TESTS: &str = "deploy/prometheus/ucwa-relay.test.yml";
const DASHBOARD: &str = "deploy/grafana/ucwa-relay.json";
const UNIT: &str = "deploy/systemd/ucwa-relay.service";

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text_of(path: &str) -> String {
    std::fs::read_to_string(repository(path)).expect(path)
}

/// Runs a checker to its end, with something on its stdin; gives whether it was content, and all that it said.
fn check(program: &str, arguments: &[&str], input: &str) -> (bool, String) {
    let fetched = repository("target/tools/prometheus/usr/bin").join(program);
    let program = if fetched.exists() { fetched } else { program.into() };
    let mut child = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{} (run `make tools`): {error}", program.display()));
    std::io::Write::write_all(&mut child.stdin.take().expect("stdin is piped"), input.as_bytes())
        .expect("it reads its input");
    let output = child.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// The only string of that key in each line that has it: the rules keep each value on a line.
fn values<'a>(yaml: &'a str, key: &str) -> Vec<&'a str> {
    let prefix = format!("{key}:");
    yaml.lines()
        .filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix(&prefix))
        .map(|value| value.trim().trim_matches('"'))
        .collect()
}

/// Every `expr` and template query of the dashboard.
fn dashboard_queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if key == "expr" || key == "query" => found.push(text.clone()),
                    _ => dashboard_queries(value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| dashboard_queries(item, found)),
        _ => (),
    }
}

/// What Prometheus reads: for each metric its labels, and for each of them its values.
fn exported(metrics: &str) -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let mut known: BTreeMap<_, BTreeMap<_, BTreeSet<_>>> = BTreeMap::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let name_end = line.find(['{', ' ']).expect("a sample has a value");
        let labels: &mut BTreeMap<_, _> = known.entry(line[..name_end].to_owned()).or_default();
        let Some(block) = line[name_end..].strip_prefix('{').and_then(|rest| rest.split_once('}')) else {
            continue;
        };
        // No value of ours holds a comma or a quote.
        for pair in block.0.split(',') {
            let (label, value) = pair.split_once('=').expect("label=\"value\"");
            labels.entry(label.to_owned()).or_default().insert(value.trim_matches('"').to_owned());
        }
    }
    known
}

/// Labels that Prometheus itself adds.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

/// What an expression asks for and nobody exports.
fn unknown_in(expression: &str, known: &BTreeMap<String, BTreeMap<String, BTreeSet<String>>>) -> Vec<String> {
    let mut missing = Vec::new();
    let mut groups: BTreeSet<&str> = OF_PROMETHEUS.into();
    let word_end =
        |text: &str| text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    for (at, _) in expression.match_indices("ucwa_relay_") {
        let (name, rest) = expression[at..].split_at(word_end(&expression[at..]));
        let Some(labels) = known.get(name) else {
            missing.push(format!("metric {name}"));
            continue;
        };
        groups.extend(labels.keys().map(String::as_str));
        let Some((matchers, _)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) else {
            continue;
        };
        for matcher in matchers.split(',') {
            let (label, condition) = matcher.split_at(word_end(matcher));
            if OF_PROMETHEUS.contains(&label) {
                continue;
            }
            let Some(values) = labels.get(label) else {
                missing.push(format!("label {label} of {name}"));
                continue;
            };
            let wanted = condition.trim_start_matches(['=', '!', '~']).trim_matches('"');
            // A dot stands for a class of statuses, of which not every one has to occur.
            for value in wanted.split('|').filter(|value| !value.contains('.')) {
                if !values.contains(value) {
                    missing.push(format!("{name}{{{label}=\"{value}\"}}"));
                }
            }
        }
    }
    for keyword in ["by (", "without(", "ignoring(", "without ("] {
        for (at, _) in expression.match_indices(keyword) {
            let list = expression[at + keyword.len()..].split(')').next().unwrap_or_default();
            for label in list.split(',').map(str::trim) {
                if !groups.contains(label) {
                    missing.push(format!("label {label} in {expression}"));
                }
            }
        }
    }
    missing
}

#[test]
fn what_is_asked_for_in_vain_is_noticed() {
    let known = exported("# HELP x\nucwa_relay_a{state=\"on\",le=\"1\"} 3\nucwa_relay_b 1\n");
    assert!(unknown_in("sum by (state) (ucwa_relay_a{instance=~\"$x\",state=\"on\"})", &known).is_empty());
    for wrong in [
        "ucwa_relay_c",
        "ucwa_relay_a{colour=\"on\"}",
        "ucwa_relay_a{state=\"off\"}",
        "ucwa_relay_a{state=~\"on|off\"}",
        "sum by (state) (ucwa_relay_b)",
        "sum without(colour) (ucwa_relay_a)",
    ] {
        assert_eq!(unknown_in(wrong, &known).len(), 1, "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_alerts_and_dashboard_ask_for_is_exported_and_well_formed() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, "simulated");
    relay.start();
    relay.account_state(ALICE, "online").await;
    simulator.call("silent.dana@fabrikam.example", ALICE, "comes in").await;
    relay.tool_ok(&["send", "--from", ALICE, "--to", "sip:friend@fabrikam.example", "--wait", "goes out"]);
    let url = admin_url(&mut relay).await;
    let metrics = eventually("both ways are counted", async || {
        let text = reqwest::get(format!("{url}metrics")).await.ok()?.text().await.ok()?;
        let has = |sample: &str| text.lines().any(|line| line.starts_with(sample) && !line.ends_with(" 0"));
        (has("ucwa_relay_messages_archived_total{direction=\"incoming\",source=\"invitation\"}")
            && has("ucwa_relay_outbox_latency_seconds_count"))
        .then_some(text)
    })
    .await;

    let known = exported(&metrics);
    let mut expressions: Vec<String> =
        values(&text_of(RULES), "expr").iter().map(|&e| e.to_owned()).collect();
    assert!(expressions.len() >= 13, "{expressions:?}");
    dashboard_queries(&serde_json::from_str(&text_of(DASHBOARD)).expect("JSON"), &mut expressions);
    assert!(expressions.len() >= 40, "{expressions:?}");
    let missing: Vec<_> = expressions.iter().flat_map(|expression| unknown_in(expression, &known)).collect();
    assert!(missing.is_empty(), "nobody exports {missing:#?}");
    // And the other way round: nothing is measured that nobody would ever see.
    let asked = expressions.concat();
    for name in known.keys() {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        assert!(asked.contains(family.unwrap_or(name)), "{name} is on no panel and in no alert");
    }

    let (content, said) = check("promtool", &["check", "metrics"], &metrics);
    assert!(content, "{said}");
    assert!(relay.server().terminate());
}

#[test]
fn no_panel_of_the_dashboard_lies_over_another() {
    let dashboard: Value = serde_json::from_str(&text_of(DASHBOARD)).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_i64()), "{} has another's id", panel["title"]);
        let side = |name: &str| panel["gridPos"][name].as_u64().expect("a number");
        for x in side("x")..side("x") + side("w") {
            assert!(x < 24, "{} is wider than the page", panel["title"]);
            for y in side("y")..side("y") + side("h") {
                assert!(taken.insert((x, y)), "{} lies over another panel", panel["title"]);
            }
        }
    }
}

#[test]
fn alerts_fire_where_they_should_and_lead_to_their_cure() {
    let path = |file: &str| repository(file).display().to_string();
    let (content, said) = check("promtool", &["check", "rules", &path(RULES)], "");
    assert!(content, "{said}");
    let (content, said) = check("promtool", &["test", "rules", &path(RULE_TESTS)], "");
    assert!(content, "{said}");

    let (rules, tests, runbook) = (text_of(RULES), text_of(RULE_TESTS), text_of("docs/operations.md"));
    let alerts = values(&rules, "alert");
    assert!(alerts.len() >= 13);
    let anchors = values(&rules, "runbook");
    for alert in &alerts {
        assert!(tests.contains(&format!("- alertname: {alert}\n")), "{alert} is never seen to fire");
        assert!(
            tests.lines().any(|line| line.contains(&format!("alertname: {alert},")) && line.contains("exp_alerts: []")),
            "{alert} is never seen not to fire"
        );
        let anchor = format!("docs/operations.md#alert-{}", alert.to_lowercase());
        assert!(anchors.contains(&anchor.as_str()), "{alert} does not lead to {anchor}");
        assert!(runbook.contains(&format!("\n### Alert {alert}\n")), "{alert} is not in the run-book");
    }
    assert_eq!(alerts.len(), anchors.len());
    assert_eq!(
        alerts.len(),
        runbook.matches("\n### Alert ").count(),
        "the run-book has alerts that are none"
    );
}

#[test]
fn the_unit_is_sound_and_exposes_little() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // The checker looks for the program, which is not installed here.
    let unit = text_of(UNIT).replace("/usr/bin/ucwa-relay", env!("CARGO_BIN_EXE_ucwa-relay"));
    let file = folder.path().join("ucwa-relay.service");
    std::fs::write(&file, unit).expect("written");
    let file = file.to_str().expect("a path in UTF-8");
    let (content, said) =
        check("systemd-analyze", &["verify", "--man=no", "--recursive-errors=no", file], "");
    assert!(content && said.trim().is_empty(), "{said}");
    let (content, said) = check("systemd-analyze", &["security", "--offline=true", "--no-pager", file], "");
    assert!(content, "{said}");
    let (_, exposure) = said.split_once("Overall exposure level for ucwa-relay.service: ").expect(&said);
    let exposure: f64 = exposure.split(' ').next().and_then(|level| level.parse().ok()).expect(exposure);
    assert!(exposure < 2.0, "{said}");
}

#[test]
fn its_user_and_its_folders_can_be_made() {
    let sysusers = repository("deploy/systemd/ucwa-relay.sysusers");
    let (content, said) = check("systemd-sysusers", &["--dry-run", sysusers.to_str().expect("UTF-8")], "");
    assert!(content, "{said}");

    let root = tempfile::tempdir().expect("a temporary folder");
    // Whoever tests can't give anything away to another user.
    let tmpfiles = text_of("deploy/systemd/ucwa-relay.tmpfiles")
        .replace(" ucwa-relay ucwa-relay -", " - - -")
        .replace(" root ucwa-relay -", " - - -");
    let file = root.path().join("tmpfiles.conf");
    std::fs::write(&file, tmpfiles).expect("written");
    let root_option = format!("--root={}", root.path().display());
    let (content, said) =
        check("systemd-tmpfiles", &["--create", &root_option, file.to_str().expect("UTF-8")], "");
    assert!(content && said.trim().is_empty(), "{said}");
    for (folder, mode) in [("etc/ucwa-relay", 0o750), ("var/lib/ucwa-relay", 0o700)] {
        let made = std::fs::metadata(root.path().join(folder)).expect(folder);
        assert_eq!(made.permissions().mode() & 0o7777, mode, "{folder}");
    }
}

/// Reads what the service tells systemd until it says this.
async fn told(socket: &UnixDatagram, what: &str) {
    let reading = async {
        let mut buffer = [0; 512];
        loop {
            let length = socket.recv(&mut buffer).await.expect("the socket can be read");
            if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line == what) {
                return;
            }
        }
    };
    assert!(tokio::time::timeout(PATIENCE, reading).await.is_ok(), "systemd waits for {what} in vain");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_works_under_what_its_unit_forbids_and_tells_systemd_how_it_is() {
    let simulator = Simulate::start(&["--accounts", "1"]);
    let mut relay = Relay::configure(&simulator, "");
    relay.add_account(ALICE, "simulated");
    let path = relay.folder.path().join("notify");
    let systemd = UnixDatagram::bind(&path).expect("a socket");
    let (wrapper, unit) = (repository("tests/support/under_unit.py"), repository(UNIT));
    relay.start_through(
        &["python3", wrapper.to_str().expect("UTF-8"), unit.to_str().expect("UTF-8")],
        &[("NOTIFY_SOCKET", path.to_str().expect("UTF-8")), ("WATCHDOG_USEC", "400000")],
    );
    told(&systemd, "READY=1").await;
    relay.account_state(ALICE, "online").await;
    simulator.call("silent.dana@fabrikam.example", ALICE, "comes in").await;
    relay.tool_ok(&["send", "--from", ALICE, "--to", "sip:friend@fabrikam.example", "--wait", "goes out"]);
    eventually("the call is archived", async || {
        relay.tool_ok(&["history"]).contains("comes in").then_some(())
    })
    .await;
    let url = admin_url(&mut relay).await;
    assert_eq!(reqwest::get(format!("{url}readyz")).await.expect("it answers").status(), 200);
    told(&systemd, "WATCHDOG=1").await;
    told(&systemd, "WATCHDOG=1").await;
    assert!(relay.server().terminate());
    told(&systemd, "STOPPING=1").await;
}

/// Where the admin listener answers, as the log says.
async fn admin_url(relay: &mut Relay) -> String {
    eventually("the admin listener answers", async || {
        let log = relay.server().stderr();
        let (_, rest) = log.split_once("url=http://")?;
        rest.split_once('\n').map(|(address, _)| format!("http://{}", address.trim().trim_matches('"')))
    })
    .await
}
