//! What is open already when an account comes to a UCWA application: compares what the database believes with what the
//! server has, and reads what is needed to go on (protocol 9.6).
//!
//! Owns nothing. What the server does not answer is left out: it is asked again when it is needed.

use std::time::Duration;

use tokio::time::timeout;
use url::Url;

use crate::{
    account::{
        actor::commit_facts,
        backoff::Backoff,
        conversation::{ConversationView, MessagingView},
        delivery::DeliveryContext,
    },
    archive::{
        fact::{ConversationEnded, Fact, Fetch, FetchedResource},
        interpret::{interpret_fetched, interpret_roster},
    },
    store::{StoreError, UnsettledSend},
    ucwa::{Resource, UcwaClient, UcwaError},
};

/// How long what is open on the server is asked for, while rows of the queue wait for the answer.
const LEARN_WITHIN: Duration = Duration::from_secs(30);
/// How often the server is asked for it.
const LEARN_ATTEMPTS: u32 = 5;

/// What an earlier life of the account left open.
#[derive(Default)]
pub(super) struct TakenUp {
    pub(super) open: Open,
    pub(super) unsettled: Vec<UnsettledSend>,
}

/// What is open on the server.
#[derive(Default)]
pub(super) struct Open {
    /// Conversations that can be used.
    pub(super) conversations: Vec<FoundConversation>,
    /// Conversations that the database believed open and the server does not have.
    pub(super) gone: Vec<String>,
    /// What is still to be fetched.
    pub(super) unfetched: Vec<Fetch>,
}

pub(super) struct FoundConversation {
    pub(super) href: String,
    pub(super) view: ConversationView,
    pub(super) remote: Option<String>,
    pub(super) multiparty: bool,
    /// The group of the queue whose conversation it is.
    pub(super) group: Option<String>,
}

/// What an earlier life left, in the database and on the server. Nothing here is worth failing a sign-in for.
/// `conversations` is the link of `communication`.
pub(super) async fn take_up(context: &DeliveryContext, conversations: Option<Url>) -> TakenUp {
    let mut taken_up = TakenUp::default();
    let unsettled = until_read("unsettled sends", || context.store.unsettled_sends(context.account)).await;
    taken_up.unsettled = unsettled
        .into_iter()
        .map(|mut row| {
            if row.send.max_attempts == i64::MAX {
                row.send.max_attempts = context.settings.max_attempts;
            }
            row
        })
        .collect();
    let unfetched =
        until_read("unfetched resources", || context.store.unfetched(context.account, context.session)).await;
    if let Some(conversations) = conversations {
        match learn_conversations(context, &conversations).await {
            Ok(open) => taken_up.open = open,
            Err(error) => tracing::warn!(%error, "what is open on the server can't be read"),
        }
    }
    for fetch in unfetched {
        if !taken_up.open.unfetched.contains(&fetch) {
            taken_up.open.unfetched.push(fetch);
        }
    }
    taken_up
}

/// Reads what an earlier life left, as often as it takes: a row that nobody settles would stay `sending` for the whole
/// life, and hold up all that is for the same people. Nothing if the database refuses the very question, which it would
/// again, or if this life is over.
async fn until_read<T, F>(what: &str, read: impl Fn() -> F) -> Vec<T>
where
    F: Future<Output = Result<Vec<T>, StoreError>>,
{
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match read().await {
            Ok(rows) => return rows,
            Err(error @ (StoreError::Closing | StoreError::Fenced(_) | StoreError::Refused { .. })) => {
                tracing::error!(error = %crate::error_chain(&error), "{what} can't be read");
                return Vec::new();
            }
            Err(error) => {
                if backoff.failures() == 0 {
                    tracing::warn!(
                        error = %crate::error_chain(&error),
                        "{what} can't be read now; the account is online when they are"
                    );
                }
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

/// What is open in an application that goes on, after the server lost track of it or said that it holds something we do
/// not know of. Makes the account available again if the server says it is not.
pub(super) async fn learn_open(context: &DeliveryContext, application: &Url) -> Open {
    let learn = async {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(5));
        loop {
            match read_application(context, application).await {
                Ok(open) => return open,
                Err(error) if backoff.failures() + 1 < LEARN_ATTEMPTS => {
                    tracing::debug!(%error, "what is open on the server can't be read; trying again");
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "what is open on the server can't be read");
                    return Open::default();
                }
            }
        }
    };
    timeout(LEARN_WITHIN, learn).await.unwrap_or_else(|_| {
        tracing::warn!("the server takes too long to tell what is open");
        Open::default()
    })
}

async fn read_application(context: &DeliveryContext, application: &Url) -> Result<Open, LearnError> {
    let mut read = context.client.application(application).await?;
    if let Some(link) = read.make_me_available() {
        context.client.make_me_available(&link, &context.settings.presence).await?;
        read = context.client.application(application).await?;
    }
    match read.conversations() {
        Some(conversations) => learn_conversations(context, &conversations).await,
        None => Ok(Open::default()),
    }
}

/// Why what is open could not be learnt.
#[derive(Debug, thiserror::Error)]
enum LearnError {
    #[error("{}", crate::error_chain(.0))]
    Server(#[from] UcwaError),
    #[error("{}", crate::error_chain(.0))]
    Store(#[from] StoreError),
}

/// Compares what the database believes open with resource `conversations`, and reads each conversation with its people.
async fn learn_conversations(context: &DeliveryContext, conversations: &Url) -> Result<Open, LearnError> {
    let mut open = Open::default();
    // Read first: what begins later is in no list.
    let known = context.store.open_conversations(context.account, context.session).await?;
    let listed = context.client.get(conversations).await?;
    let mut hrefs: Vec<String> = listed
        .links("conversation")
        .map(|link| link.href.clone())
        .chain(listed.all_embedded("conversation").map(|conversation| conversation.href.clone()))
        .collect();
    hrefs.sort();
    hrefs.dedup();
    let mut facts = Vec::new();
    for gone in known.into_iter().filter(|conversation| !hrefs.contains(&conversation.href)) {
        facts.push(Fact::ConversationEnded(ConversationEnded { href: gone.href.clone(), reason: None }));
        open.gone.push(gone.href);
    }
    for href in hrefs {
        match read_conversation(&context.client, &href).await {
            Ok(Read { resource, mut view, people }) => {
                facts.extend(interpret_fetched(
                    &Fetch {
                        resource: FetchedResource::Conversation,
                        href: href.clone(),
                        conversation_href: Some(href.clone()),
                    },
                    &resource,
                ));
                facts.extend(interpret_roster(&href, &resource, people.as_ref()));
                view.href = Some(href.clone());
                open.conversations.push(FoundConversation {
                    href,
                    view,
                    remote: None,
                    multiparty: false,
                    group: None,
                });
            }
            Err(error) => {
                tracing::debug!(href, error = %crate::error_chain(&error), "an open conversation can't be read");
            }
        }
    }
    if !facts.is_empty() {
        open.unfetched = commit_facts(context, facts).await.fetches;
    }
    // Whom each is with, as far as the database knows now.
    let known = context.store.open_conversations(context.account, context.session).await?;
    for found in &mut open.conversations {
        if let Some(known) = known.iter().find(|conversation| conversation.href == found.href) {
            found.remote.clone_from(&known.remote_uri);
            found.multiparty = known.multiparty;
            found.group.clone_from(&known.group);
        }
    }
    Ok(open)
}

/// A conversation as the server has it.
struct Read {
    resource: Resource,
    view: ConversationView,
    /// Resource `participants`.
    people: Option<Resource>,
}

async fn read_conversation(client: &UcwaClient, href: &str) -> Result<Read, UcwaError> {
    let resource = client.get(&client.resolve(href)?).await?;
    let mut view = ConversationView::default();
    view.read_conversation(href, &resource);
    if view.messaging.is_none()
        && let Some(messaging) = view.messaging_href.clone()
    {
        let messaging_resource = client.get(&client.resolve(&messaging)?).await?;
        view.messaging = Some(MessagingView::read(&messaging, &messaging_resource));
    }
    let people = match (resource.embedded("participants"), resource.link("participants")) {
        (Some(people), _) => Some(people.clone()),
        (None, Some(link)) => match client.get(&client.resolve(&link.href)?).await {
            Ok(people) => Some(people),
            Err(error) => {
                tracing::debug!(href, error = %crate::error_chain(&error), "a conversation's participants can't be read");
                None
            }
        },
        (None, None) => None,
    };
    Ok(Read { resource, view, people })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::identifiers::AccountId;

    /// How often was asked until the answer was taken, and the answer; the first two questions find no database.
    async fn asked(answer: impl Fn() -> Result<Vec<i32>, StoreError>) -> (u32, Vec<i32>) {
        let times = Cell::new(0);
        let rows = until_read("rows", || {
            times.set(times.get() + 1);
            let result = if times.get() <= 2 {
                Err(StoreError::Unavailable { operation: "reading", source: sqlx::Error::PoolTimedOut })
            } else {
                answer()
            };
            std::future::ready(result)
        })
        .await;
        (times.get(), rows)
    }

    #[tokio::test]
    async fn what_an_earlier_life_left_is_read_as_often_as_it_takes() {
        assert_eq!(asked(|| Ok(vec![7])).await, (3, vec![7]));
        assert_eq!(asked(|| Err(StoreError::Closing)).await, (3, vec![]), "the program ends");
        assert_eq!(asked(|| Err(StoreError::Fenced(AccountId(1)))).await, (3, vec![]), "another node's");
    }
}
