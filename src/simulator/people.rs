//! People: the directory search, the contact list, and the resources of one contact.
//!
//! The directory holds the accounts and the correspondents that the traffic uses; any other address is a contact
//! as well when it is asked for, because any address can be called.

use std::sync::Arc;

use hyper::{Method, StatusCode};

use super::{
    application::{Application, address_of, display_name},
    correspondent,
    payload::{Failure, Link, Resource},
    server::{Exchange, Outcome, Server, created, no_content},
};

/// `people` and what is below it.
pub(crate) fn people(
    server: &Server,
    application: &Arc<Application>,
    exchange: &Exchange,
    path: &[&str],
) -> Outcome {
    let base = format!("{}/people", application.href());
    match path {
        [] => {
            exchange.only(&Method::GET)?;
            Ok(exchange.resource(StatusCode::OK, &application.people_resource()))
        }
        ["search"] => search(server, application, exchange),
        ["contacts"] => {
            exchange.only(&Method::GET)?;
            let mut contacts = Resource::new("myContacts", format!("{base}/contacts"));
            for uri in correspondent::directory(&server.settings.domain).into_iter().take(5) {
                contacts = contacts.embed(contact(&base, &uri).in_list());
            }
            Ok(exchange.resource(StatusCode::OK, &contacts))
        }
        [list @ ("groups" | "groupMemberships" | "privacyRelationships" | "subscribedContacts")] => {
            exchange.only(&Method::GET)?;
            let rel = match *list {
                "groups" => "myGroups",
                "groupMemberships" => "myGroupMemberships",
                "privacyRelationships" => "myPrivacyRelationships",
                _ => "subscribedContacts",
            };
            Ok(exchange.resource(StatusCode::OK, &Resource::new(rel, format!("{base}/{list}"))))
        }
        [
            list @ ("presenceSubscriptions"
            | "presenceSubscriptionMemberships"
            | "contactsAndGroupsSubscription"),
        ] => {
            match exchange.method {
                Method::GET => {
                    let rel = match *list {
                        "presenceSubscriptions" => "presenceSubscriptions",
                        "presenceSubscriptionMemberships" => "presenceSubscriptionMemberships",
                        _ => "myContactsAndGroupsSubscription",
                    };
                    Ok(exchange.resource(StatusCode::OK, &Resource::new(rel, format!("{base}/{list}"))))
                }
                // Accepted, and nothing comes of it: the simulated people do not change their presence.
                Method::POST => Ok(created(&format!("{base}/{list}/{}", server.dice.hex()))),
                _ => Err(Failure::method_not_allowed("GET, POST")),
            }
        }
        ["presenceSubscriptions", _] => match exchange.method {
            Method::POST | Method::DELETE => Ok(no_content()),
            _ => Err(Failure::method_not_allowed("POST, DELETE")),
        },
        [address, rest @ ..] if address.contains('@') => {
            exchange.only(&Method::GET)?;
            if correspondent::is_missing(address) {
                return Err(Failure::not_found());
            }
            let uri = format!("sip:{address}");
            let href = format!("{base}/{}", address.to_lowercase());
            let resource = match rest {
                [] => contact(&base, &uri),
                ["presence"] => Resource::new("contactPresence", format!("{href}/presence"))
                    .property("activity", "Available")
                    .property("availability", "Online")
                    .property("deviceType", "Desktop"),
                ["location"] => {
                    Resource::new("contactLocation", format!("{href}/location")).property("location", "")
                }
                ["note"] => Resource::new("contactNote", format!("{href}/note"))
                    .property("message", "")
                    .property("type", "Personal"),
                ["supportedMedia"] => {
                    Resource::new("contactSupportedModalities", format!("{href}/supportedMedia"))
                        .property("modalities", vec!["Messaging".to_owned()])
                }
                ["privacyRelationship"] => {
                    Resource::new("contactPrivacyRelationship", format!("{href}/privacyRelationship"))
                        .property("relationshipLevel", "Colleagues")
                }
                _ => return Err(Failure::not_found()),
            };
            Ok(exchange.resource(StatusCode::OK, &resource))
        }
        _ => Err(Failure::not_found()),
    }
}

fn contact(people: &str, uri: &str) -> Resource {
    let address = address_of(uri);
    let href = format!("{people}/{}", address.to_lowercase());
    let sum = address.bytes().fold(17_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    Resource::new("contact", &href)
        .property("uri", uri)
        .property("sourceNetwork", "SameEnterprise")
        .property("emailAddresses", vec![address.to_owned()])
        .property("type", "User")
        .property("name", display_name(uri))
        .links([
            Link::new("contactPresence", format!("{href}/presence")),
            Link::new("contactLocation", format!("{href}/location")),
            Link::new("contactNote", format!("{href}/note")),
            Link::new("contactSupportedModalities", format!("{href}/supportedMedia")),
            Link::new("contactPrivacyRelationship", format!("{href}/privacyRelationship")),
        ])
        .etag(sum.to_string())
}

fn search(server: &Server, application: &Application, exchange: &Exchange) -> Outcome {
    exchange.only(&Method::GET)?;
    let query = exchange.query("query").filter(|query| !query.is_empty());
    let query = query.ok_or_else(|| Failure::parameter("query", "The value is required."))?;
    if query.encode_utf16().count() > 256 {
        return Err(Failure::parameter("query", "The value is too long."));
    }
    let limit = match exchange.query("limit").map(str::parse::<usize>) {
        None => 50,
        Some(Ok(limit)) if (1..=100).contains(&limit) => limit,
        Some(_) => return Err(Failure::parameter("limit", "The value is out of range.")),
    };
    let wanted = query.to_lowercase();
    let wanted = wanted.strip_prefix("sip:").unwrap_or(&wanted);
    let matches =
        |uri: &str, name: &str| address_of(uri).contains(wanted) || name.to_lowercase().contains(wanted);
    let accounts = server.account_list.iter();
    let mut found: Vec<String> = accounts
        .filter(|account| matches(&account.uri, &account.name))
        .map(|account| account.uri.clone())
        .take(limit + 1)
        .collect();
    let others = correspondent::directory(&server.settings.domain);
    found.extend(others.into_iter().filter(|uri| matches(uri, &display_name(uri))));
    let more = found.len() > limit;
    found.truncate(limit);
    let people = format!("{}/people", application.href());
    let parameters = exchange.raw_query.as_deref().unwrap_or_default();
    let mut resource = Resource::new("search", format!("{people}/search?{parameters}"))
        .property("moreResultsAvailable", more);
    for uri in found {
        resource = resource.embed(contact(&people, &uri).in_list());
    }
    Ok(exchange.resource(StatusCode::OK, &resource))
}
