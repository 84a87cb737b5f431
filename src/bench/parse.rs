//! How fast event-channel responses are read, beside the bare reading of their tokens.

use std::{fmt::Write as _, hint::black_box, time::Duration};

use anyhow::Context as _;
use quick_xml::{NsReader, events::Event as Token};
use tokio::time::Instant;

use super::report::{Figure, Goal, percentile, sorted};
use crate::ucwa::xml::{NAMESPACE, parse_events};

/// Messages of the response.
const MESSAGES: usize = 50;

/// Turns in which both are measured, one after the other, so that what else the machine does slows both.
const TURNS: usize = 9;

/// Both rates, in turns that last so long each.
pub(super) fn rate(turn: Duration) -> anyhow::Result<Vec<Figure>> {
    let text = response();
    let batch = parse_events(&text).context("the benchmark's own response can't be read")?;
    let events: usize = batch.senders.iter().map(|sender| sender.events.len()).sum();
    anyhow::ensure!(events == MESSAGES * 2, "{events} events were read");
    let (mut typed, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        typed.push(bytes_per_second(&text, turn, |text| parse_events(text).map(drop).map_err(Into::into))?);
        bare.push(bytes_per_second(&text, turn, tokens)?);
    }
    let (typed, bare) = (percentile(&sorted(typed), 0.5) / 1e6, percentile(&sorted(bare), 0.5) / 1e6);
    Ok(vec![
        Figure::new("event XML read into the typed model", typed, "MB/s"),
        Figure::new("the same as a share of reading its tokens", typed / bare, "share")
            .beside(bare, "MB/s of bare tokens")
            .shall(Goal::AtLeast(0.4)),
    ])
}

fn bytes_per_second(
    text: &str,
    turn: Duration,
    read: impl Fn(&str) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut bytes = 0_usize;
    while began.elapsed() < turn {
        read(black_box(text))?;
        bytes += text.len();
    }
    #[expect(clippy::cast_precision_loss, reason = "a number of bytes")]
    let bytes = bytes as f64;
    Ok(bytes / began.elapsed().as_secs_f64())
}

/// Every token with its namespace, as any reader of these documents has to see them.
fn tokens(text: &str) -> anyhow::Result<()> {
    let mut reader = NsReader::from_str(text);
    loop {
        if matches!(black_box(reader.read_resolved_event()?).1, Token::Eof) {
            return Ok(());
        }
    }
}

/// A response with messages in several conversations: `started` with a link, `completed` with the resource.
pub(super) fn response() -> String {
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<events xmlns=\"{NAMESPACE}\" \
         href=\"/ucwa/oauth/v1/applications/103/events?ack=7\">\n\
         <link rel=\"next\" href=\"/ucwa/oauth/v1/applications/103/events?ack=8\" />\n"
    );
    for number in 0..MESSAGES {
        let conversation =
            format!("/ucwa/oauth/v1/applications/103/communication/conversations/{}", number % 5);
        let message = format!("{conversation}/messaging/messages/{number}");
        let written = write!(
            text,
            "<sender rel=\"conversation\" href=\"{conversation}\">\n\
             <started rel=\"message\" href=\"{message}\" />\n\
             <completed rel=\"message\" href=\"{message}\" status=\"Success\">\n\
             <resource rel=\"message\" href=\"{message}\">\n\
             <link rel=\"messaging\" href=\"{conversation}/messaging\" />\n\
             <link rel=\"contact\" href=\"/ucwa/oauth/v1/applications/103/people/lene@contoso.example\" />\n\
             <link rel=\"participant\" href=\"{conversation}/participants/lene@contoso.example\" title=\"Lene Aalling\" />\n\
             <link rel=\"plainMessage\" href=\"data:text/plain;charset=utf-8,Shall+we+meet+at+{}%3a00+in+room+{number}%3f\" />\n\
             <property name=\"direction\">Incoming</property>\n\
             <property name=\"timeStamp\">2026-01-05T10:00:{:02}.000Z</property>\n\
             <property name=\"importance\">Normal</property>\n\
             </resource>\n</completed>\n</sender>\n",
            number % 24,
            number % 60,
        );
        debug_assert!(written.is_ok(), "a text takes everything");
    }
    text + "</events>\n"
}
