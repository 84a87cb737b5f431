//! The check of a database's chains, page by page, beside a running server.

use std::collections::BTreeSet;

use super::{
    CheckedChain, Difference,
    chain::{ChainCheck, Completeness},
    seal::Seal,
};
use crate::{
    identifiers::MessageId,
    query::Person,
    store::{ArchivedAccount, Store, StoreError},
};

/// Messages read at once.
const PAGE: i64 = 2000;

/// Checks the chains of all accounts, or of those that `only` names, and gives each difference to `tell` as it is found.
/// Tombstones are believed if one of `trusted` signed them, or anybody, if there is none.
pub async fn verify(
    store: &dyn Store,
    only: Option<&Person>,
    seal: Option<&Seal>,
    trusted: &BTreeSet<String>,
    mut tell: impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<CheckedChain>> {
    let accounts: Vec<ArchivedAccount> = store
        .archived_accounts()
        .await?
        .into_iter()
        .filter(|account| only.is_none_or(|person| person.is_account(&account.uri)))
        .collect();
    let mut checked = Vec::new();
    for account in &accounts {
        checked.push(verify_account(store, account, seal, trusted, &mut tell).await?);
    }
    // An account that was taken out of the table takes its messages along.
    for head in seal.iter().flat_map(|seal| &seal.heads) {
        if only.is_none_or(|person| person.is_account(&head.account))
            && !accounts.iter().any(|account| account.uri == head.account)
        {
            tell(Difference {
                account: head.account.clone(),
                chain_seq: Some(head.seq),
                message_id: None,
                place: None,
                what: "the seal goes up to here, but the database has no such account".to_owned(),
            })?;
        }
    }
    Ok(checked)
}

async fn verify_account(
    store: &dyn Store,
    account: &ArchivedAccount,
    seal: Option<&Seal>,
    trusted: &BTreeSet<String>,
    tell: &mut impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<CheckedChain> {
    let sealed = seal.and_then(|seal| seal.head(&account.uri));
    let mut check = ChainCheck::new(&account.uri, Completeness::Whole, sealed).trusting(trusted);
    let mut last = 0;
    let mut head = None;
    loop {
        let page = store.chained(account.id, last, PAGE).await?;
        for message in &page {
            check.message(message, None);
        }
        check.take_differences().into_iter().try_for_each(&mut *tell)?;
        if let Some(message) = page.last() {
            last = message.chain_seq;
            continue;
        }
        // A server may have gone on meanwhile. Its messages and its head come together, so what is missing behind the
        // end stays missing when it is asked for once more.
        let now = store.chain_head(account.id).await?;
        if now == head || now.as_ref().is_none_or(|now| now.seq <= last) {
            check.end_at(now.as_ref(), "chain_heads");
            break;
        }
        head = now;
    }
    let unchained = tell_unchained(store, account, tell).await?;
    let (rest, mut checked) = check.finish();
    rest.into_iter().try_for_each(&mut *tell)?;
    checked.differences += unchained;
    Ok(checked)
}

/// Messages that were put in beside the chain.
async fn tell_unchained(
    store: &dyn Store,
    account: &ArchivedAccount,
    tell: &mut impl FnMut(Difference) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut count = 0;
    let mut last = MessageId(0);
    loop {
        let page: Result<Vec<MessageId>, StoreError> = store.unchained(account.id, last, PAGE).await;
        let page = page?;
        let Some(&newest) = page.last() else {
            return Ok(count);
        };
        for id in page {
            count += 1;
            tell(Difference {
                account: account.uri.clone(),
                chain_seq: None,
                message_id: Some(id),
                place: None,
                what: "it is not in the chain: it was inserted, or its chain_seq was emptied".to_owned(),
            })?;
        }
        last = newest;
    }
}
