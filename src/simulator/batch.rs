//! Batches: several requests of one application in one POST, answered together and in order.

use std::{fmt::Write as _, sync::Arc};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{HeaderMap, Method, Request, StatusCode, header, header::HeaderName, header::HeaderValue};

use super::{
    payload::Failure,
    server::{Exchange, Outcome, Server, answer, reply},
};

/// More parts than this are refused as a whole.
const LARGEST_BATCH: usize = 100;

/// Carries out the parts one after the other; event channels and nested batches are not allowed.
pub(crate) async fn carry_out(server: &Arc<Server>, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::POST)?;
    let content_type = exchange.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let boundary = content_type
        .filter(|value| value.to_ascii_lowercase().starts_with("multipart/batching"))
        .and_then(|value| value.split(';').find_map(|part| part.trim().strip_prefix("boundary=")))
        .map(|text| text.trim_matches('"').to_owned());
    let Some(boundary) = boundary.filter(|text| !text.is_empty()) else {
        let message = "A batch is multipart/batching with a boundary.";
        return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "None", message));
    };
    let text = String::from_utf8_lossy(&exchange.body).replace("\r\n", "\n");
    let delimiter = format!("--{boundary}");
    let parts: Vec<&str> =
        text.split(&delimiter).skip(1).take_while(|part| !part.starts_with("--")).collect();
    if parts.len() > LARGEST_BATCH {
        return Err(Failure::new(StatusCode::TOO_MANY_REQUESTS, "None", "The batch has too many parts."));
    }
    let answer_boundary = super::application::uuid_of(server);
    let mut body = String::new();
    for part in parts {
        let inner = part_request(exchange, part)
            .ok_or_else(|| Failure::unreadable("A part of the batch is not an HTTP request."))?;
        let _ =
            write!(body, "--{answer_boundary}\r\nContent-Type: application/http; msgtype=response\r\n\r\n");
        let forbidden = inner.segments.last().is_some_and(|last| last == "events" || last == "batch");
        if forbidden {
            body.push_str("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n\r\n");
            continue;
        }
        // A batch never holds a batch, so this does not go deeper.
        let Ok(answered) = Box::pin(answer(server, &inner)).await;
        let (head, inner_body) = answered.into_parts();
        let reason = head.status.canonical_reason().unwrap_or_default();
        let _ = write!(body, "HTTP/1.1 {} {reason}\r\nCache-Control: no-cache\r\n", head.status.as_u16());
        for (name, value) in &head.headers {
            let _ = write!(body, "{name}: {}\r\n", value.to_str().unwrap_or_default());
        }
        body.push_str("\r\n");
        let inner_body =
            inner_body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        body.push_str(&String::from_utf8_lossy(&inner_body));
        body.push_str("\r\n");
    }
    let _ = write!(body, "--{answer_boundary}--\r\n");
    let mut answered = reply(StatusCode::OK, "multipart/batching", body);
    let content_type = format!("multipart/batching; boundary=\"{answer_boundary}\"");
    if let Ok(value) = HeaderValue::from_str(&content_type) {
        answered.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    Ok(answered)
}

/// Reads the request inside one part. `Content-Length` is not trusted: published samples have it wrong.
fn part_request(outer: &Exchange, part: &str) -> Option<Exchange> {
    let (_, request) = part.trim_start_matches('\n').split_once("\n\n")?;
    let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
    let mut lines = head.trim_start_matches('\u{feff}').lines();
    let mut words = lines.next()?.split(' ');
    let mut headers = HeaderMap::new();
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
        headers.insert(name, HeaderValue::from_str(value.trim()).ok()?);
    }
    if let (false, Some(token)) =
        (headers.contains_key(header::AUTHORIZATION), outer.headers.get(header::AUTHORIZATION))
    {
        headers.insert(header::AUTHORIZATION, token.clone());
    }
    let method: Method = words.next()?.parse().ok()?;
    let mut request = Request::builder().method(method).uri(words.next()?).body(()).ok()?;
    *request.headers_mut() = headers;
    let (parts, ()) = request.into_parts();
    let body = Bytes::from(body.trim_start_matches('\u{feff}').trim_end_matches('\n').to_owned());
    Some(Exchange::read(&parts, body, outer.site, &outer.origin))
}
