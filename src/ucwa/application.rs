//! The UCWA application of an account: its resource and the links that the relay follows.

use url::Url;

use super::{error::UcwaError, model::Resource, trust::resolve_within};

/// Input of the resource `applications`. Culture, endpoint id and user agent together identify an application: asked
/// with the same again, the server hands out the existing one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewApplication {
    /// Language of texts by the server, like `en-US`; at most 100 characters.
    pub culture: String,
    /// Random, one per account and kept for ever; at most 100 characters.
    pub endpoint_id: String,
    /// What policies may allow or forbid; at most 100 characters.
    pub user_agent: String,
}

/// The resource `application`, with `me` and `communication` in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Application {
    /// Its own address.
    pub href: Url,
    /// Where the event channel begins.
    pub events: Option<Url>,
    /// All the server said.
    pub resource: Resource,
}

impl Application {
    /// Reads the application that `requested` answered with; its own address must be on the same origin.
    pub(super) fn read(requested: &Url, resource: Resource) -> Result<Self, UcwaError> {
        let href = if resource.href.is_empty() {
            requested.clone()
        } else {
            resolve_within(requested, &resource.href)?
        };
        let events = resource.link("events").and_then(|link| follow(&href, &link.href));
        Ok(Self { href, events, resource })
    }

    /// `makeMeAvailable` of `me`. Absent when the account is available already, or may not be.
    pub fn make_me_available(&self) -> Option<Url> {
        self.link("me", "makeMeAvailable")
    }

    /// `reportMyActivity` of `me`. Present when the account is available.
    pub fn report_my_activity(&self) -> Option<Url> {
        self.link("me", "reportMyActivity")
    }

    /// `startMessaging` of `communication`. Absent when policies forbid instant messages.
    pub fn start_messaging(&self) -> Option<Url> {
        self.link("communication", "startMessaging")
    }

    /// `startOnlineMeeting` of `communication`, for a meeting of the moment. Absent when policies forbid meetings.
    pub fn start_online_meeting(&self) -> Option<Url> {
        self.link("communication", "startOnlineMeeting")
    }

    /// `conversations` of `communication`.
    pub fn conversations(&self) -> Option<Url> {
        self.link("communication", "conversations")
    }

    /// `conversationLogs` of `communication`. Absent without Exchange.
    pub fn conversation_logs(&self) -> Option<Url> {
        self.link("communication", "conversationLogs")
    }

    /// `name` of `me`.
    pub fn display_name(&self) -> Option<String> {
        let name = self.resource.embedded("me")?.property("name")?.trim();
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn link(&self, part: &str, rel: &str) -> Option<Url> {
        follow(&self.href, &self.resource.embedded(part)?.link(rel)?.href)
    }
}

/// A link of the application; one that leads to another origin counts as absent.
fn follow(base: &Url, href: &str) -> Option<Url> {
    match resolve_within(base, href) {
        Ok(url) => Some(url),
        Err(problem) => {
            tracing::warn!(%problem, "a link of the application is not followed");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::xml;

    fn read(links: &str) -> Result<Application, UcwaError> {
        let text = format!(
            "<resource rel=\"application\" href=\"/ucwa/v1/applications/7\" \
             xmlns=\"http://schemas.microsoft.com/rtc/2012/03/ucwa\">{links}</resource>"
        );
        let requested = Url::parse("https://pool.contoso.test/ucwa/v1/applications").unwrap();
        Application::read(&requested, xml::parse_resource(&text).unwrap())
    }

    #[test]
    fn links_are_resolved_against_the_applications_host() {
        let application = read(
            "<link rel=\"events\" href=\"/ucwa/v1/applications/7/events?ack=1\"/>\
             <resource rel=\"me\" href=\"/me\"><link rel=\"makeMeAvailable\" href=\"/avail\"/>\
             <property name=\"name\">Alice A</property></resource>\
             <resource rel=\"communication\" href=\"/c\"><link rel=\"startMessaging\" href=\"/start\"/>\
             <link rel=\"startOnlineMeeting\" href=\"/meet?onlineMeetingUri=adhoc\"/>\
             <link rel=\"conversations\" href=\"/all?filter=active\"/></resource>",
        )
        .unwrap();
        let at = |path: &str| Some(Url::parse("https://pool.contoso.test").unwrap().join(path).unwrap());
        assert_eq!(Some(application.href.clone()), at("/ucwa/v1/applications/7"));
        assert_eq!(application.events, at("/ucwa/v1/applications/7/events?ack=1"));
        assert_eq!(application.make_me_available(), at("/avail"));
        assert_eq!(application.report_my_activity(), None);
        assert_eq!(application.start_messaging(), at("/start"));
        assert_eq!(application.start_online_meeting(), at("/meet?onlineMeetingUri=adhoc"));
        assert_eq!(application.conversations(), at("/all?filter=active"));
        assert_eq!(application.conversation_logs(), None);
        assert_eq!(application.display_name().as_deref(), Some("Alice A"));
    }

    #[test]
    fn a_link_to_another_host_counts_as_absent() {
        let application = read("<link rel=\"events\" href=\"http://sample/ucwa/events\"/>").unwrap();
        assert_eq!(application.events, None);
        assert_eq!(application.display_name(), None);
    }
}
