//! Names that the UCWA reference lists, so that what it does not list can be told apart and quarantined.
//!
//! Names only; what they mean is in [`super::interpret`]. Source: the resource pages of the UCWA 2.0 reference.

/// Whether the reference has a page for a resource of this name.
pub(crate) fn is_listed_rel(rel: &str) -> bool {
    REFERENCE_RESOURCES.binary_search(&rel).is_ok()
}

/// Whether the reference names this resource as the sender of events.
pub(super) fn is_listed_sender(rel: &str) -> bool {
    matches!(
        rel,
        "application"
            | "audioVideoInvitation"
            | "communication"
            | "conversation"
            | "me"
            | "onlineMeetings"
            | "people"
            | "policies"
    )
}

/// Every resource of the reference, in byte order.
#[rustfmt::skip]
const REFERENCE_RESOURCES: &[&str] = &[
    "accept", "acceptWithAnswer", "acceptWithPhoneAudio", "acceptedByContact", "acceptedByParticipant",
    "addAudio", "addAudioVideo", "addMessaging", "addParticipant", "addPhoneAudio", "addToContactList",
    "addToPresenceSubscription", "addVideo", "admit", "anonApplications", "answer", "application",
    "applicationSharer", "applicationSharing", "applicationSharingRenegotiation", "applications",
    "applications2", "attendees", "audioTranscript", "audioVideo", "audioVideoInvitation",
    "audioVideoNegotiation", "audioVideoPolicies", "audioVideoRenegotiation", "audioVideoSession",
    "audioVideoSessions", "batch", "callForwardingSettings", "cancel", "changeNumber", "changeVisibility",
    "communication", "contact", "contactLocation", "contactNote", "contactPhoto", "contactPresence",
    "contactPrivacyRelationship", "contactPrivacyRelationship2", "contactSupportedModalities",
    "continueAudio", "continueAudioVideo", "continueMessaging", "continuePhoneAudio", "continueVideo",
    "conversation", "conversationExtensionResult", "conversationLog", "conversationLogRecipient",
    "conversationLogTranscript", "conversationLogTranscripts", "conversationLogs", "conversations",
    "dataCollaboration", "decline", "defaultGroup", "delegatesGroup", "delegator", "delegatorsGroup",
    "demote", "derivedAudioVideo", "derivedConversation", "derivedMessaging", "derivedPhoneAudio",
    "dialInRegion", "disableAudienceMessaging", "disableAudienceMuteLock", "dismiss", "distributionGroup",
    "eject", "enableAudienceMessaging", "enableAudienceMuteLock", "errorTranscript", "escalateAudio",
    "escalateAudioVideo", "events", "expandDistributionGroup", "failedDeliveryParticipant", "forwardedBy",
    "from", "group", "group2", "groupContacts", "groupMemberships", "holdPhoneAudio",
    "immediateForwardSettings", "immediateForwardToContact", "immediateForwardToDelegates",
    "immediateForwardToVoicemail", "invitation", "invitations", "joinOnlineMeeting", "leaders", "lobby",
    "localParticipant", "location", "makeMeAvailable", "makeMeAvailable2", "markAsRead", "me",
    "mediaDiagnostics", "mediaPolicies", "mediaRelay", "mediaRelayAccessToken", "memberships", "message",
    "messageTranscript", "messages", "messaging", "messagingInvitation", "missedItems", "muteAudio",
    "muteVideo", "myAssignedOnlineMeeting", "myContacts", "myContactsAndGroupsSubscription",
    "myGroupMembership", "myGroupMembership2", "myGroupMemberships", "myGroupMemberships2", "myGroups",
    "myGroups2", "myOnlineMeeting", "myOnlineMeetings", "myOrganizationGroup", "myPrivacyRelationship",
    "myPrivacyRelationships", "nextConversationLogTranscripts", "note", "onBehalfOf", "onlineMeeting",
    "onlineMeetingDefaultValues", "onlineMeetingEligibleValues", "onlineMeetingExtension",
    "onlineMeetingExtensions", "onlineMeetingInvitation", "onlineMeetingInvitationCustomization",
    "onlineMeetingPolicies", "onlineMeetings", "organizer", "participant", "participantApplicationSharing",
    "participantAudio", "participantDataCollaboration", "participantInvitation", "participantMessaging",
    "participantPanoramicVideo", "participantVideo", "participants", "people", "phone", "phoneAudio",
    "phoneAudioInvitation", "phoneDialInInformation", "phones", "photo", "pinnedGroup", "policies",
    "presence", "presenceSubscription", "presenceSubscriptionMembership", "presenceSubscriptionMemberships",
    "presenceSubscriptions", "promote", "publishCallQualityFeedback", "reason", "redirect", "reject",
    "removeContactFromAllGroups", "removeContactFromAllGroups2", "removeFromContactList", "renegotiations",
    "replaceWithPhoneAudio", "replacesAudioVideo", "replacesPhoneAudio", "replayMessage",
    "reportMediaDiagnostics", "reportMyActivity", "reportMyNetwork", "resetContactPrivacyRelationship",
    "resetUnansweredCallSettings", "resumeAudio", "resumeAudioVideo", "resumePhoneAudio", "root", "search",
    "search2", "sendMessage", "sendProvisionalAnswer", "session", "sessions", "setIsTyping",
    "simultaneousRingSettings", "simultaneousRingToContact", "simultaneousRingToDelegates",
    "simultaneousRingToTeam", "startAudio", "startAudio2", "startAudioOnBehalfOfDelegator",
    "startAudioVideo", "startAudioVideo2", "startAudioVideoOnBehalfOfDelegator", "startEmergencyCall",
    "startMessaging", "startMessaging2", "startOnlineMeeting",
    "startOrRefreshSubscriptionToContactsAndGroups", "startPhoneAudio", "startPhoneAudio2",
    "startPhoneAudioOnBehalfOfDelegator", "startVideo", "stopAudio", "stopAudioVideo", "stopMessaging",
    "stopPhoneAudio", "stopSubscriptionToContactsAndGroups", "stopVideo", "subscribeToGroupPresence",
    "subscribedContacts", "to", "transferredBy", "turnOffCallForwarding", "typingParticipants",
    "unansweredCallSettings", "unansweredCallToContact", "unansweredCallToVoicemail", "unmuteAudio",
    "unmuteVideo", "user", "userAcknowledged", "videoFreeze", "videoLockedOnParticipant", "xframe",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sorted_so_that_it_can_be_searched() {
        assert!(REFERENCE_RESOURCES.is_sorted());
        assert!(is_listed_rel("messagingInvitation") && is_listed_rel("participant"));
        assert!(!is_listed_rel("hologram") && !is_listed_rel("") && !is_listed_sender("hologram"));
    }
}
