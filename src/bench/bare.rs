//! How fast the simulated server answers bare requests: the limit that the relay's throughput is compared with.
//!
//! A client that does nothing else signs in by hand, opens conversations, and says something in each of them again and
//! again, one request after the other over one connection for each. It neither reads events meanwhile nor keeps anything.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use reqwest::{Client, Method, RequestBuilder, header};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::stage::{SimulatorPart, account, client};

/// As long as the texts of the queue's rows.
const TEXT: &str = "through 12 12 123";

struct User {
    http: Client,
    origin: String,
    token: String,
    application: Value,
}

/// Requests answered in a second, with `accounts` times `destinations` connections, for `lasting`.
pub(super) async fn posts_per_second(
    simulator: &SimulatorPart,
    accounts: usize,
    destinations: usize,
    lasting: Duration,
) -> anyhow::Result<f64> {
    let http = client()?;
    let mut requests = Vec::new();
    for number in 1..=accounts {
        let user = User::sign_in(&http, &simulator.origin()?, number).await?;
        requests.extend(user.open_conversations(destinations).await?);
    }
    let began = Instant::now();
    let deadline = began + lasting;
    let posts = requests.into_iter().map(|request| tokio::spawn(post_until(request, deadline)));
    let mut answered = 0_u32;
    for posted in try_join_all(posts).await? {
        answered += posted?;
    }
    Ok(f64::from(answered) / began.elapsed().as_secs_f64())
}

async fn post_until(request: RequestBuilder, deadline: Instant) -> anyhow::Result<u32> {
    let mut answered = 0;
    while Instant::now() < deadline {
        let request = request.try_clone().context("the request has a plain body")?;
        request.send().await?.error_for_status()?.bytes().await?;
        answered += 1;
    }
    Ok(answered)
}

impl User {
    async fn sign_in(http: &Client, origin: &str, number: usize) -> anyhow::Result<Arc<Self>> {
        let name = account(number);
        let form = [
            ("grant_type", "password"),
            ("username", name.trim_start_matches("sip:")),
            ("password", "simulated"),
        ];
        let token = http.post(format!("{origin}/WebTicket/oauthtoken")).form(&form).send().await?;
        let token: Value = serde_json::from_str(&token.error_for_status()?.text().await?)?;
        let token = token["access_token"].as_str().context("the simulator gave no token")?.to_owned();
        let mut user =
            Self { http: http.clone(), origin: origin.to_owned(), token, application: Value::Null };
        let input = json!({ "culture": "en-US", "endpointId": "bare", "userAgent": "bare/1" });
        user.application = user.post("/ucwa/oauth/v1/applications", &input).await?;
        let available = json!({
            "signInAs": "Online",
            "supportedModalities": ["Messaging"],
            "supportedMessageFormats": ["Plain", "Html"],
        });
        let me = href(&user.application["_embedded"]["me"]["_links"]["makeMeAvailable"])?;
        user.post(me, &available).await?;
        let own = href(&user.application["_links"]["self"])?.to_owned();
        user.application = user.read(&own).await?;
        Ok(Arc::new(user))
    }

    /// A request ready to be made for each of so many conversations.
    async fn open_conversations(&self, destinations: usize) -> anyhow::Result<Vec<RequestBuilder>> {
        let start = href(&self.application["_embedded"]["communication"]["_links"]["startMessaging"])?;
        for number in 1..=destinations {
            let input = json!({
                "operationId": format!("bare-{number}"),
                "to": format!("sip:silent.{number}@fabrikam.example"),
                "_links": { "message": { "href": "data:text/plain;charset=utf-8,Hello" } },
            });
            self.post(start, &input).await?;
        }
        let mut cursor = href(&self.application["_links"]["events"])?.to_owned();
        let mut links = BTreeSet::new();
        while links.len() < destinations {
            let package = self.read(&cursor).await?;
            send_links(&package, &mut links);
            href(&package["_links"]["next"])?.clone_into(&mut cursor);
        }
        let request = |link: &String| {
            let link = format!("{link}?operationId=bare");
            self.request(Method::POST, &link).header(header::CONTENT_TYPE, "text/plain").body(TEXT)
        };
        Ok(links.iter().map(request).collect())
    }

    fn request(&self, method: Method, href: &str) -> RequestBuilder {
        let url = if href.starts_with('/') { format!("{}{href}", self.origin) } else { href.to_owned() };
        self.http.request(method, url).bearer_auth(&self.token).header(header::ACCEPT, "application/json")
    }

    async fn post(&self, href: &str, input: &Value) -> anyhow::Result<Value> {
        let request = self.request(Method::POST, href).header(header::CONTENT_TYPE, "application/json");
        read(request.body(input.to_string())).await
    }

    async fn read(&self, href: &str) -> anyhow::Result<Value> {
        read(self.request(Method::GET, href)).await
    }
}

async fn read(request: RequestBuilder) -> anyhow::Result<Value> {
    let text = request.send().await?.error_for_status()?.text().await?;
    Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? })
}

fn href(link: &Value) -> anyhow::Result<&str> {
    link["href"].as_str().context("the simulator left a link out")
}

/// Every link `sendMessage`, wherever it stands.
fn send_links(value: &Value, links: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            if let Some(link) = value["_links"]["sendMessage"]["href"].as_str() {
                links.insert(link.to_owned());
            }
            members.values().for_each(|member| send_links(member, links));
        }
        Value::Array(items) => items.iter().for_each(|item| send_links(item, links)),
        _ => {}
    }
}
