//! What is open already when an account comes to a UCWA application: compares what the database believes with what the
//! server has, and reads what is needed to go on (protocol 9.6).
//!
//! Owns nothing. What the server does not answer is left out: it is asked again when it is needed.

use url::Url;

use crate::{
    account::{
        actor::commit_facts,
        conversation::{ConversationView, MessagingView},
        delivery::DeliveryContext,
    },
    archive::{
        fact::{ConversationEnded, Fact, Fetch, FetchedResource},
        interpret::interpret_fetched,
    },
    store::{ClaimedSend, SharedStore},
    ucwa::{Resource, UcwaClient, UcwaError},
};

/// What an earlier life of the account left open.
#[derive(Default)]
pub(super) struct TakenUp {
    pub(super) conversations: Vec<FoundConversation>,
    pub(super) unsettled: Vec<ClaimedSend>,
    pub(super) unfetched: Vec<Fetch>,
}

pub(super) struct FoundConversation {
    pub(super) href: String,
    pub(super) view: ConversationView,
    pub(super) remote: Option<String>,
    pub(super) multiparty: bool,
}

/// Compares what the database believes open with what the server has (resource `conversations`), and reads what is
/// needed to go on. Nothing here is worth failing a sign-in for: what can't be read is asked again when it is needed.
pub(super) async fn take_up(
    store: &SharedStore,
    context: &DeliveryContext,
    conversations: Option<Url>,
) -> TakenUp {
    let mut taken_up = TakenUp::default();
    match store.unsettled_sends(context.account).await {
        Ok(unsettled) => {
            taken_up.unsettled = unsettled
                .into_iter()
                .map(|row| ClaimedSend {
                    max_attempts: if row.send.max_attempts == i64::MAX {
                        context.settings.max_attempts
                    } else {
                        row.send.max_attempts
                    },
                    ..row.send
                })
                .collect();
        }
        Err(error) => tracing::error!(error = %crate::error_chain(&error), "unsettled sends can't be read"),
    }
    match store.unfetched(context.account, context.session).await {
        Ok(unfetched) => taken_up.unfetched = unfetched,
        Err(error) => {
            tracing::error!(error = %crate::error_chain(&error), "unfetched resources can't be read");
        }
    }
    let known = match store.open_conversations(context.account, context.session).await {
        Ok(known) => known,
        Err(error) => {
            tracing::error!(error = %crate::error_chain(&error), "open conversations can't be read");
            return taken_up;
        }
    };
    let Some(conversations) = conversations else { return taken_up };
    let listed = match context.client.get(&conversations).await {
        Ok(resource) => resource,
        Err(error) => {
            tracing::warn!(error = %crate::error_chain(&error), "the server's conversations can't be read");
            return taken_up;
        }
    };
    let mut hrefs: Vec<String> = listed
        .links("conversation")
        .map(|link| link.href.clone())
        .chain(listed.all_embedded("conversation").map(|conversation| conversation.href.clone()))
        .collect();
    hrefs.sort();
    hrefs.dedup();
    let mut facts = Vec::new();
    for gone in known.iter().filter(|conversation| !hrefs.contains(&conversation.href)) {
        facts.push(Fact::ConversationEnded(ConversationEnded { href: gone.href.clone(), reason: None }));
    }
    for href in hrefs {
        let known = known.iter().find(|conversation| conversation.href == href);
        match read_conversation(&context.client, &href).await {
            Ok((resource, mut view)) => {
                facts.extend(interpret_fetched(
                    &Fetch {
                        resource: FetchedResource::Conversation,
                        href: href.clone(),
                        conversation_href: Some(href.clone()),
                    },
                    &resource,
                ));
                view.href = Some(href.clone());
                taken_up.conversations.push(FoundConversation {
                    href,
                    view,
                    remote: known.and_then(|conversation| conversation.remote_uri.clone()),
                    multiparty: known.is_some_and(|conversation| conversation.multiparty),
                });
            }
            Err(error) => {
                tracing::debug!(href, error = %crate::error_chain(&error), "an open conversation can't be read");
            }
        }
    }
    if !facts.is_empty() {
        commit_facts(context, facts).await;
    }
    taken_up
}

async fn read_conversation(
    client: &UcwaClient,
    href: &str,
) -> Result<(Resource, ConversationView), UcwaError> {
    let resource = client.get(&client.resolve(href)?).await?;
    let mut view = ConversationView::default();
    view.read_conversation(href, &resource);
    if view.messaging.is_none()
        && let Some(messaging) = view.messaging_href.clone()
    {
        let messaging_resource = client.get(&client.resolve(&messaging)?).await?;
        view.messaging = Some(MessagingView::read(&messaging, &messaging_resource));
    }
    Ok((resource, view))
}
