//! A real browser: Debian's Chromium without a window, steered by its own driver (W3C `WebDriver`, and through it the
//! browser's `DevTools` protocol).

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::eventually;

/// How the page is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    Light,
    Dark,
    Tablet,
    Phone,
    DarkPhone,
}

/// What each document notes about itself before anything of it runs: what its policy forbade, and what went wrong.
const WITNESS: &str = "
    window.witnessed = [];
    addEventListener('securitypolicyviolation', (event) =>
        window.witnessed.push('policy: ' + event.violatedDirective + ' ' + event.blockedURI), true);
    addEventListener('error', (event) => window.witnessed.push('error: ' + event.message), true);
";

/// How often a browser is tried to start.
const STARTS: usize = 4;

/// One browser with one window.
pub(crate) struct Browser {
    session: String,
    http: reqwest::Client,
    // First the driver and the browser go, then the folder.
    _driver: Driver,
    _profile: TempDir,
}

impl Browser {
    /// Starts it; `make tools` installs it. A driver that does not get a browser up, as happens when several begin at once,
    /// is let go, and the next one tries.
    pub(crate) async fn start() -> Self {
        let mut problems = Vec::new();
        while problems.len() < STARTS {
            match Self::try_to_start().await {
                Ok(browser) => {
                    browser.devtools("Page.enable", json!({})).await;
                    let witness = json!({ "source": WITNESS });
                    browser.devtools("Page.addScriptToEvaluateOnNewDocument", witness).await;
                    browser.look(Look::Light).await;
                    return browser;
                }
                Err(problem) => problems.push(problem),
            }
        }
        panic!("no browser starts: {problems:#?}");
    }

    async fn try_to_start() -> Result<Self, String> {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver runs; `make tools` installs it");
        let stdout = driver.stdout.take().expect("stdout is piped");
        let mut driver = Driver(driver, None);
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let port: u16 = lines
            .find_map(|line| {
                let port = line
                    .split_once("successfully on port ")
                    .map(|(_, port)| port.trim_end_matches('.').parse());
                said.push(line);
                port?.ok()
            })
            .ok_or_else(|| format!("chromedriver did not say on which port it listens: {said:?}"))?;
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir().expect("a temporary folder");
        let http = reqwest::Client::new();
        let address = format!("http://127.0.0.1:{port}/session");
        let options = json!({
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                "--force-color-profile=srgb",
                format!("--user-data-dir={}", profile.path().display()),
            ],
        });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "acceptInsecureCerts": true, "goog:chromeOptions": options,
        } } });
        let begun = answer(&http, &address, &wanted).await?;
        let (Some(session), Some(process)) =
            (begun["sessionId"].as_str(), begun["capabilities"]["goog:processID"].as_u64())
        else {
            return Err(format!("no session: {begun}"));
        };
        driver.1 = Some(process);
        Ok(Self { session: format!("{address}/{session}"), http, _driver: driver, _profile: profile })
    }

    /// A command of the `DevTools` protocol.
    pub(crate) async fn devtools(&self, command: &str, parameters: Value) -> Value {
        let path = format!("{}/goog/cdp/execute", self.session);
        post(&self.http, &path, &json!({ "cmd": command, "params": parameters })).await
    }

    /// Size of the window and scheme of colours.
    pub(crate) async fn look(&self, look: Look) {
        let (width, height, phone) = match look {
            Look::Light | Look::Dark => (1200, 900, false),
            Look::Tablet => (910, 700, true),
            Look::Phone | Look::DarkPhone => (375, 720, true),
        };
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
        let scheme = if matches!(look, Look::Dark | Look::DarkPhone) { "dark" } else { "light" };
        let scheme = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", scheme).await;
    }

    /// Whether pages may run scripts.
    pub(crate) async fn scripts(&self, allowed: bool) {
        self.devtools("Emulation.setScriptExecutionDisabled", json!({ "value": !allowed })).await;
    }

    /// Opens a page and waits until it is loaded.
    pub(crate) async fn open(&self, url: &str) {
        // The driver's own waiting needs scripts, which a page may not be allowed to run.
        self.ask("window.left = true").await;
        post(&self.http, &format!("{}/url", self.session), &json!({ "url": url })).await;
        eventually(&format!("{url} is loaded"), async || {
            let loaded = self.ask("!window.left && document.readyState === 'complete'").await;
            (loaded == true).then_some(())
        })
        .await;
    }

    /// What an expression gives in the page; promises are waited for. Works whether or not pages may run scripts.
    pub(crate) async fn ask(&self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.devtools("Runtime.evaluate", parameters).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// What can be read on the page.
    pub(crate) async fn text(&self) -> String {
        self.ask("document.body?.innerText").await.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the page says something.
    pub(crate) async fn says(&self, words: &str) {
        eventually(&format!("the page says {words:?}"), async || {
            self.text().await.contains(words).then_some(())
        })
        .await;
    }

    /// Fills a field as a person does, by keys.
    pub(crate) async fn fill(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        post(&self.http, &format!("{}/element/{element}/clear", self.session), &json!({})).await;
        let path = format!("{}/element/{element}/value", self.session);
        post(&self.http, &path, &json!({ "text": text })).await;
    }

    /// Writes where the focus is.
    pub(crate) async fn types(&self, text: &str) {
        self.devtools("Input.insertText", json!({ "text": text })).await;
    }

    /// Presses a key and lets it go: `Tab` or `Enter`.
    pub(crate) async fn press(&self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, None),
            "Enter" => (13, Some("\r")),
            other => panic!("there is no such key: {other}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut pressed = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code });
            if kind == "keyDown" && text.is_some() {
                pressed["text"] = json!(text);
            }
            self.devtools("Input.dispatchKeyEvent", pressed).await;
        }
    }

    /// Clicks what is there.
    pub(crate) async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        post(&self.http, &format!("{}/element/{element}/click", self.session), &json!({})).await;
    }

    async fn element(&self, selector: &str) -> String {
        let wanted = json!({ "using": "css selector", "value": selector });
        eventually(&format!("{selector} is on the page"), async || {
            let found = post(&self.http, &format!("{}/element", self.session), &wanted).await;
            found["element-6066-11e4-a52e-4f735466cecf"].as_str().map(str::to_owned)
        })
        .await
    }

    /// Where the browser is.
    pub(crate) async fn url(&self) -> String {
        self.ask("location.href").await.as_str().expect("a page has an address").to_owned()
    }

    /// What the page's policy forbade, and what went wrong in it.
    pub(crate) async fn witnessed(&self) -> Vec<String> {
        serde_json::from_value(self.ask("window.witnessed").await).expect("a list")
    }

    /// A picture of the whole page under `target/screenshots`.
    pub(crate) async fn photograph(&self, name: &str) -> PathBuf {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/screenshots");
        std::fs::create_dir_all(&folder).expect("a folder for pictures");
        let whole = json!({ "format": "png", "captureBeyondViewport": true });
        let taken = self.devtools("Page.captureScreenshot", whole).await;
        let picture = taken["data"].as_str().unwrap_or_else(|| panic!("no picture of {name}: {taken}"));
        let picture = STANDARD.decode(picture).expect("in base64");
        let path = folder.join(format!("{name}.png"));
        std::fs::write(&path, picture).expect("the picture is written");
        path
    }

    /// What axe-core finds that keeps people from using the page: its findings of impact `serious` and `critical`.
    pub(crate) async fn barriers(&self) -> Vec<String> {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/axe/node_modules/axe-core/axe.min.js");
        let axe = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}; `make tools` installs it", path.display()));
        self.ask(&format!("{axe}; 0")).await;
        let found = self
            .ask(
                "axe.run(document, { resultTypes: ['violations'] }).then((found) => found.violations
                     .filter((finding) => ['serious', 'critical'].includes(finding.impact))
                     .map((finding) => finding.id + ': ' + finding.nodes.map((node) => node.html + ' '
                         + node.failureSummary).join('; ')))",
            )
            .await;
        serde_json::from_value(found).expect("a list")
    }
}

/// The driver, and the browser that it started.
struct Driver(Child, Option<u64>);

impl Drop for Driver {
    fn drop(&mut self) {
        let browser = self.1.map(|process| process.to_string());
        let _ = Command::new("kill").args(browser).arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// The value of the driver's answer.
async fn post(http: &reqwest::Client, url: &str, body: &Value) -> Value {
    answer(http, url, body).await.expect("chromedriver answers")
}

async fn answer(http: &reqwest::Client, url: &str, body: &Value) -> Result<Value, String> {
    let asked = http
        .post(url)
        .timeout(Duration::from_secs(120))
        .header("content-type", "application/json")
        .body(body.to_string());
    let text = async { asked.send().await?.text().await }.await.map_err(|error| error.to_string())?;
    let mut answer: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
    Ok(answer["value"].take())
}
