//! Reads the server's conversation logs for what the event channel could not tell (protocol 16, guarantee G4).
//!
//! One future for each life of an account, beside everything else: it owns nothing that others wait for, makes one
//! request at a time with a pause in between, and shares with all accounts a limit of requests under way. What is to be
//! read stands in the table `backfills`: every recorded gap asks for it, and so do hints of the server (`missedItems`,
//! an invitation that somebody else answered or nobody did). Logs lag, so they are read again 5, 30 and 120 minutes
//! later; the table survives a restart. The person's mailbox is only ever read.
//!
//! Where the server fails, the gap stays open, says why, and is tried again; where it offers no logs, the gap stays.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, Semaphore};
use url::Url;

use crate::{
    account::{backoff::Backoff, delivery::DeliveryContext},
    archive::{
        fact::{ArchiveCommit, Fact},
        interpret_log::{Contacts, interpret_contact, interpret_log, unknown_contacts},
    },
    store::{Backfill, StoreError},
    ucwa::{Action, Event, EventKind, Resource, UcwaError, time},
};

/// A log's `creationTime` is when it reached the mailbox, which is after its conversation; clocks differ.
const BEFORE_THE_GAP: SignedDuration = SignedDuration::from_mins(15);
/// What a hint speaks of began at most so long before it.
const BEFORE_A_HINT: SignedDuration = SignedDuration::from_mins(5);
/// When the logs are read again, counted from the first time.
const AGAIN_AFTER: [SignedDuration; 3] =
    [SignedDuration::from_mins(5), SignedDuration::from_mins(30), SignedDuration::from_mins(120)];
/// Between two requests of one account.
const PAUSE: Duration = Duration::from_millis(25);
/// Between two readings that hints ask for.
const BETWEEN_READINGS: Duration = Duration::from_secs(10);
/// Requests for logs under way, of all accounts.
static UNDER_WAY: Semaphore = Semaphore::const_new(16);
/// Logs asked for at first; more if all of them are of interest.
const LOGS_AT_FIRST: usize = 100;
/// Never more than so many.
const LOGS_AT_MOST: usize = 1600;
/// The newest logs are listed first; after so many old ones in a row no newer one is expected.
const OLD_ONES_IN_A_ROW: usize = 20;
/// Pages of one log's transcripts.
const PAGES_AT_MOST: usize = 1000;
/// After so many logs in a row that can't be read now, Exchange is taken to be away.
const FAILURES_IN_A_ROW: u32 = 3;
/// A single log that still can't be read after so many attempts is asked for less often.
const EAGER_ATTEMPTS: u32 = 20;
/// The channel counts as quiet when its GET has been parked so long: what the server kept has come.
const QUIET: SignedDuration = SignedDuration::from_secs(3);
/// A channel in lively traffic is never quiet.
const WAIT_FOR_QUIET: Duration = Duration::from_secs(15);

/// Why the account might want to look at the logs now; shared with the account and its event channel.
#[derive(Debug, Default)]
pub struct BackfillHints {
    hinted_at: Mutex<Option<Timestamp>>,
    wake: Notify,
}

impl BackfillHints {
    /// The server said something that logs can explain.
    pub fn hint(&self, at: Timestamp) {
        self.hinted_at.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(at);
        self.wake.notify_one();
    }

    /// A gap was recorded.
    pub fn gap_recorded(&self) {
        self.wake.notify_one();
    }

    fn take(&self) -> Option<Timestamp> {
        self.hinted_at.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Whether an event says that there is something in the logs which events do not tell.
pub fn is_hint(event: &Event) -> bool {
    match event.rel.as_str() {
        "missedItems" => event.kind == EventKind::Updated,
        "messagingInvitation" | "onlineMeetingInvitation" => {
            let reason = event.reason.as_ref();
            let words = reason.into_iter().flat_map(|reason| [&reason.subcode, &reason.code]).flatten();
            event.kind == EventKind::Completed
                && words.into_iter().any(|word| {
                    ["ConnectedElsewhere", "Missed"].iter().any(|known| word.eq_ignore_ascii_case(known))
                })
        }
        _ => false,
    }
}

/// When the logs are read again for a row that was read just now.
fn next_reading(backfill: &Backfill, now: Timestamp) -> Option<Timestamp> {
    let number = usize::try_from(backfill.runs).ok()?;
    let after = AGAIN_AFTER.get(number)?;
    backfill.first_at.unwrap_or(now).checked_add(*after).ok()
}

/// Why the logs could not be read.
#[derive(Debug)]
enum Trouble {
    /// The application is gone; the event channel finds the same and ends this life.
    SessionLost,
    /// It will not get better.
    ForGood(String),
    /// Try again, not before the time that the server asked for.
    ForNow(String, Option<Duration>),
    /// All but some logs were read; try again, but not for ever as eagerly.
    InPart(String),
}

impl Trouble {
    fn of(error: &UcwaError) -> Self {
        if error.action() == Action::RecreateApplication {
            return Self::SessionLost;
        }
        let words = crate::error_chain(error);
        if error.subcode() == Some("InvalidExchangeServerVersion") {
            return Self::ForGood(format!(
                "the mailbox is on an Exchange Server without conversation logs: {words}"
            ));
        }
        Self::ForNow(words, error.retry_after())
    }

    /// This one resource is gone or refused; others may be read.
    fn is_of_one_resource(error: &UcwaError) -> bool {
        matches!(error.status(), Some(400..=499))
            && !matches!(error.status(), Some(401 | 408 | 429))
            && error.action() != Action::RecreateApplication
    }
}

/// Reads logs whenever there is reason to, for one life of the account. `logs` is the link `conversationLogs` of
/// `communication`.
pub async fn run(
    context: Arc<DeliveryContext>,
    application: Url,
    mut logs: Option<Url>,
    hints: Arc<BackfillHints>,
) {
    let mut soon = Backoff::new(Duration::from_secs(5), Duration::from_secs(35));
    let mut later = Backoff::new(Duration::from_mins(1), Duration::from_mins(5));
    loop {
        keep_hint(&context, &hints).await;
        let wanted = match context.store.backfills(context.account).await {
            Ok(wanted) => wanted,
            Err(StoreError::Closing | StoreError::Fenced(_)) => return,
            Err(error) => {
                // The store tells of writing; this is read on connections of their own.
                let is_told = error.is_told_by_store() && context.store.problem().is_some();
                if !is_told && soon.failures() == 0 {
                    tracing::warn!(error = %crate::error_chain(&error), "what is to be backfilled can't be read");
                }
                tokio::time::sleep(soon.next_delay()).await;
                continue;
            }
        };
        let Some(first) = wanted.first() else {
            hints.wake.notified().await;
            continue;
        };
        let wait = Duration::try_from(first.due_at.duration_since(Timestamp::now())).unwrap_or_default();
        if !wait.is_zero() {
            // In steps, so that a clock that is set does not matter.
            let step = wait.min(Duration::from_mins(1));
            tokio::select! {
                () = tokio::time::sleep(step) => {}
                () = hints.wake.notified() => {}
            }
            continue;
        }
        if logs.is_none() {
            let read = Box::pin(context.client.application(&application)).await;
            logs = read.ok().and_then(|read| read.conversation_logs());
        }
        let Some(link) = &logs else {
            say(&context, "the server offers no conversation logs for this account").await;
            hints.wake.notified().await;
            continue;
        };
        until_quiet(&context).await;
        let now = Timestamp::now();
        let due: Vec<&Backfill> = wanted.iter().filter(|backfill| backfill.due_at <= now).collect();
        let from = due.iter().map(|backfill| backfill.from).min().unwrap_or(now);
        let from = from.checked_sub(BEFORE_THE_GAP).unwrap_or(from);
        // Of its own, since this future is as large as its largest part, and it mostly waits.
        match Box::pin(read_logs(&context, link, from)).await {
            Ok(()) => {
                soon.reset();
                later.reset();
                for backfill in due {
                    let next = next_reading(backfill, now);
                    if let Err(error) = context.store.backfilled(backfill.id, now, next).await {
                        tracing::warn!(error = %crate::error_chain(&error), "a backfill could not be noted");
                    }
                }
                tokio::time::sleep(BETWEEN_READINGS).await;
            }
            Err(Trouble::SessionLost) => return,
            Err(Trouble::ForGood(why)) => {
                tracing::warn!(why, "conversation logs can't be read");
                say(&context, &why).await;
                return;
            }
            Err(Trouble::InPart(why)) => {
                tracing::warn!(why, "some conversation logs can't be read");
                say(&context, &format!("some conversation logs can't be read yet: {why}")).await;
                let eager = due.iter().any(|backfill| backfill.open_gap) && soon.failures() < EAGER_ATTEMPTS;
                let delay = if eager { soon.next_delay() } else { later.next_delay() };
                tokio::time::sleep(delay).await;
            }
            Err(Trouble::ForNow(why, asked)) => {
                tracing::warn!(why, "conversation logs can't be read now");
                say(&context, &format!("the conversation logs can't be read yet: {why}")).await;
                // The link may have moved.
                logs = None;
                let open_gap = due.iter().any(|backfill| backfill.open_gap);
                let delay = if open_gap { soon.next_delay() } else { later.next_delay() };
                tokio::time::sleep(delay.max(asked.unwrap_or_default())).await;
            }
        }
    }
}

/// Puts a hint into the table.
async fn keep_hint(context: &DeliveryContext, hints: &BackfillHints) {
    let Some(at) = hints.take() else { return };
    let from = at.checked_sub(BEFORE_A_HINT).unwrap_or(at);
    if let Err(error) = context.store.request_backfill(context.account, from, at).await {
        tracing::warn!(error = %crate::error_chain(&error), "a hint at conversation logs could not be stored");
        tokio::time::sleep(Duration::from_secs(1)).await;
        hints.hint(at);
    }
}

/// Says at the open gaps why they stay.
async fn say(context: &DeliveryContext, why: &str) {
    if let Err(error) = context.store.backfill_impossible(context.account, why).await {
        tracing::warn!(error = %crate::error_chain(&error), "the state of a gap could not be stored");
    }
}

/// What the server kept for the event channel comes first, so that the logs add only what it does not tell.
async fn until_quiet(context: &DeliveryContext) {
    let quiet = async {
        let channel = &context.channel;
        while channel.is_failing() || Timestamp::now().duration_since(channel.parked_at()) < QUIET {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    // Too lively to be quiet: the rules hold apart what is under way.
    let _ = tokio::time::timeout(WAIT_FOR_QUIET, quiet).await;
}

async fn get(context: &DeliveryContext, url: &Url) -> Result<Resource, UcwaError> {
    let permit = UNDER_WAY.acquire().await;
    let answer = context.client.get(url).await;
    drop(permit);
    tokio::time::sleep(PAUSE).await;
    answer
}

async fn get_href(context: &DeliveryContext, href: &str) -> Result<Resource, UcwaError> {
    get(context, &context.client.resolve(href)?).await
}

/// `conversationLogs` with `limit`.
fn with_limit(logs: &Url, limit: usize) -> Url {
    let mut url = logs.clone();
    let others: Vec<(String, String)> = logs
        .query_pairs()
        .filter(|(name, _)| name != "limit")
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    url.query_pairs_mut().clear().extend_pairs(others).append_pair("limit", &limit.to_string());
    url
}

/// Archives every log that was created at `from` or later.
async fn read_logs(context: &DeliveryContext, logs: &Url, from: Timestamp) -> Result<(), Trouble> {
    let mut contacts = Contacts::new();
    let mut read = HashSet::new();
    let mut limit = LOGS_AT_FIRST;
    let mut failed: Option<String> = None;
    loop {
        let list = get(context, &with_limit(logs, limit)).await.map_err(|error| Trouble::of(&error))?;
        let embedded: Vec<&Resource> = list.all_embedded("conversationLog").collect();
        let hrefs: Vec<&str> = embedded
            .iter()
            .map(|log| log.href.as_str())
            .chain(list.links("conversationLog").map(|link| link.href.as_str()))
            .collect();
        let (mut old_ones, mut failures) = (0, 0);
        for href in &hrefs {
            if !read.insert((*href).to_owned()) {
                continue;
            }
            let known =
                embedded.iter().find(|log| log.href == **href && log.property("creationTime").is_some());
            match read_log(context, href, known.copied(), from, &mut contacts).await {
                Ok(true) => (old_ones, failures) = (0, 0),
                Ok(false) => (old_ones, failures) = (old_ones + 1, 0),
                Err(Trouble::ForNow(why, asked)) => {
                    failures += 1;
                    if failures >= FAILURES_IN_A_ROW || asked.is_some() {
                        return Err(Trouble::ForNow(why, asked));
                    }
                    failed.get_or_insert(why);
                }
                Err(trouble) => return Err(trouble),
            }
            if old_ones >= OLD_ONES_IN_A_ROW {
                break;
            }
        }
        if old_ones > 0 || hrefs.len() < limit || limit >= LOGS_AT_MOST {
            return failed.map_or(Ok(()), |why| Err(Trouble::InPart(why)));
        }
        limit *= 4;
    }
}

/// Archives one log, unless it is older than `from`. Says whether it was of interest.
async fn read_log(
    context: &DeliveryContext,
    href: &str,
    known: Option<&Resource>,
    from: Timestamp,
    contacts: &mut Contacts,
) -> Result<bool, Trouble> {
    let log = match known {
        Some(log) => log.clone(),
        None => match get_href(context, href).await {
            Ok(log) => log,
            // The owner may have deleted it.
            Err(error) if Trouble::is_of_one_resource(&error) => return Ok(true),
            Err(error) => return Err(Trouble::of(&error)),
        },
    };
    let created = log.property("creationTime").and_then(|text| time::parse(text).ok());
    if created.is_some_and(|created| created < from) {
        return Ok(false);
    }
    let transcripts = match read_transcripts(context, &log).await {
        Ok(transcripts) => transcripts,
        Err(error) if Trouble::is_of_one_resource(&error) => return Ok(true),
        Err(error) => return Err(Trouble::of(&error)),
    };
    for contact in unknown_contacts(&log, &transcripts) {
        if contacts.contains_key(&contact) {
            continue;
        }
        // Without it the name has to do.
        let person = match get_href(context, &contact).await {
            Ok(resource) => interpret_contact(&contact, &resource),
            Err(error) => {
                tracing::debug!(error = %crate::error_chain(&error), "a contact of a log could not be read");
                continue;
            }
        };
        contacts.insert(contact, person);
    }
    commit(context, interpret_log(&log, &transcripts, contacts)).await?;
    Ok(true)
}

/// All pages of a log's transcripts, with what they only link.
async fn read_transcripts(context: &DeliveryContext, log: &Resource) -> Result<Vec<Resource>, UcwaError> {
    let mut transcripts = Vec::new();
    let mut next = log.link("conversationLogTranscripts").map(|link| link.href.clone());
    let mut seen = HashSet::new();
    while let Some(href) = next.take() {
        if seen.len() >= PAGES_AT_MOST || !seen.insert(href.clone()) {
            tracing::warn!(
                href,
                pages = seen.len(),
                "the pages of a conversation log do not end; the rest is left"
            );
            break;
        }
        let page = get_href(context, &href).await?;
        transcripts.extend(page.all_embedded("conversationLogTranscript").cloned());
        for link in page.links("conversationLogTranscript") {
            transcripts.push(get_href(context, &link.href).await?);
        }
        next = page.link("nextConversationLogTranscripts").map(|link| link.href.clone());
    }
    for transcript in &mut transcripts {
        if transcript.embedded("messageTranscript").is_none()
            && let Some(link) = transcript.link("messageTranscript").cloned()
        {
            let mut said = get_href(context, &link.href).await?;
            "messageTranscript".clone_into(&mut said.rel);
            transcript.embedded.push(said);
        }
    }
    Ok(transcripts)
}

async fn commit(context: &DeliveryContext, fact: Fact) -> Result<(), Trouble> {
    let commit = ArchiveCommit {
        account: context.account,
        session: context.session,
        epoch: context.epoch,
        cursor: None,
        received_at: Timestamp::now(),
        facts: vec![fact],
    };
    match context.store.commit(commit).await {
        Ok(_) => Ok(()),
        Err(StoreError::Closing | StoreError::Fenced(_)) => Err(Trouble::SessionLost),
        Err(error) => Err(Trouble::ForNow(crate::error_chain(&error), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::xml::parse_events;

    fn hinted(event: &str) -> bool {
        let body = format!(
            "<events href=\"/e\"><link rel=\"next\" href=\"/n\"/>\
             <sender rel=\"communication\" href=\"/c\">{event}</sender></events>"
        );
        is_hint(&parse_events(&body).unwrap().senders[0].events[0])
    }

    #[test]
    fn missed_items_and_calls_that_others_took_or_nobody_are_hints() {
        let call = |subcode: &str| {
            format!(
                "<completed rel=\"messagingInvitation\" href=\"/i\" status=\"Failure\"><reason><code>Informational</code>\
                 <subcode>{subcode}</subcode></reason></completed>"
            )
        };
        assert!(hinted("<updated rel=\"missedItems\" href=\"/m\"/>"));
        assert!(hinted(&call("ConnectedElsewhere")) && hinted(&call("Missed")));
        assert!(!hinted(&call("Declined")));
        assert!(!hinted("<added rel=\"missedItems\" href=\"/m\"/>"));
        assert!(!hinted("<started rel=\"messagingInvitation\" href=\"/i\"/>"));
    }

    #[test]
    fn logs_are_read_again_after_5_30_and_120_minutes_and_no_more() {
        let first = "2026-11-22T10:00:00Z".parse::<Timestamp>().unwrap();
        let backfill = |runs| Backfill {
            id: 1,
            open_gap: false,
            from: first,
            due_at: first,
            first_at: (runs > 0).then_some(first),
            runs,
        };
        let next =
            |runs, now| next_reading(&backfill(runs), now).map(|at| at.duration_since(first).as_secs() / 60);
        assert_eq!(next(0, first), Some(5));
        let late = first + SignedDuration::from_mins(7);
        assert_eq!(next(1, late), Some(30));
        assert_eq!(next(2, late), Some(120));
        assert_eq!(next(3, late), None);
    }

    #[test]
    fn the_limit_is_set_and_nothing_else_of_the_link_changes() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert_eq!(
            with_limit(&url("https://h.test/logs?a=%2B&limit=5"), 100).as_str(),
            "https://h.test/logs?a=%2B&limit=100"
        );
        assert_eq!(with_limit(&url("https://h.test/logs"), 7).as_str(), "https://h.test/logs?limit=7");
    }
}
