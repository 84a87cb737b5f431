//! The event channel's decisions, as a state machine without I/O: what was answered, and what to do next.
//!
//! One row of the protocol's table (P-GET states: `EventsInUCWA`, `events`, `ApplicationDashboard`) is one arm here and
//! one test below. [`super::event_channel`] does what the [`Step`] says. Whatever happens, the same address is asked
//! until an answer to it is committed: following its `next` is what acknowledges it.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    account::{backoff::Backoff, sign_in::reason_of},
    store::AttentionReason,
    ucwa::{Action, Continuation, UcwaError},
};

/// What came back from one GET on the event channel.
#[derive(Debug)]
pub enum Answer<'a> {
    /// A readable response.
    Batch(&'a Continuation),
    /// A 200 whose body could not be read; the `next` href that a lenient scan found in it.
    Unreadable(Option<String>),
    /// No response, or an error.
    Failed(&'a UcwaError),
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Store what the response carried together with this cursor, then ask it.
    Commit {
        /// Href to ask next, as the server gave it.
        cursor: String,
    },
    /// As [`Step::Commit`], and note that the server lost track of what we follow (`resume`): what was open has ended, and
    /// what is open is learnt while the cursor is asked.
    CommitAndResume {
        /// Href to ask next, as the server gave it.
        cursor: String,
    },
    /// Our link was wrong (`resync`): note the cursor and ask it; nothing was lost by the server.
    Resynchronise {
        /// Href to ask next, as the server gave it.
        cursor: String,
    },
    /// Keep the body that could not be read in quarantine and ask the same address once more.
    QuarantineAndRepeat,
    /// Keep the body that could not be read in quarantine and pass over it.
    QuarantineAndCommit {
        /// Href that a lenient scan found.
        cursor: String,
    },
    /// Keep the body in quarantine (if there is one) and take the `events` link of the application.
    ReadApplication {
        /// Wait so long first.
        delay: Duration,
    },
    /// Ask the same address again.
    Repeat {
        /// Wait so long first.
        delay: Duration,
    },
    /// The channel cannot go on by itself.
    End(ChannelEnd),
}

/// Why an event channel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelEnd {
    /// Its owner asked it to.
    Requested,
    /// It panicked.
    Panicked,
    /// The server no longer knows the application, in words.
    ApplicationLost(String),
    /// The address may have moved: sign in from discovery on.
    Rediscover(String),
    /// An operator has to look, in words; try again by ourselves after the time, if there is one.
    Attention(AttentionReason, String, Option<Duration>),
    /// Another node holds the account now.
    Fenced,
}

/// Shortest wait after another process took over the parked GET, longest is three times as much.
const AFTER_REPLACED: Duration = Duration::from_secs(5);
/// Pause before an application is created again after `TooManyApplications`: each creation kills another client.
const AFTER_TOO_MANY_APPLICATIONS: Duration = Duration::from_secs(15 * 60);

/// Counters that the decisions depend on.
#[derive(Debug)]
pub struct ChannelState {
    backoff: Backoff,
    resyncs_in_a_row: u32,
    without_link_in_a_row: u32,
    unreadable_in_a_row: u32,
    failures_in_a_row: u32,
    forbidden_in_a_row: u32,
    replaced_at: Vec<Instant>,
}

impl Default for ChannelState {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            resyncs_in_a_row: 0,
            without_link_in_a_row: 0,
            unreadable_in_a_row: 0,
            failures_in_a_row: 0,
            forbidden_in_a_row: 0,
            replaced_at: Vec::new(),
        }
    }
}

impl ChannelState {
    /// Decides what an answer means, `now` being when it came.
    pub fn decide(&mut self, answer: &Answer<'_>, now: Instant) -> Step {
        match answer {
            Answer::Batch(continuation) => self.decide_batch(continuation),
            Answer::Unreadable(next) => self.decide_unreadable(next.as_deref()),
            Answer::Failed(error) => self.decide_failure(error, now),
        }
    }

    /// How many answers in a row were errors.
    pub fn failures_in_a_row(&self) -> u32 {
        self.failures_in_a_row
    }

    fn answered(&mut self) {
        self.backoff.reset();
        self.failures_in_a_row = 0;
        self.forbidden_in_a_row = 0;
    }

    fn decide_batch(&mut self, continuation: &Continuation) -> Step {
        self.answered();
        self.unreadable_in_a_row = 0;
        if !matches!(continuation, Continuation::Resync(_)) {
            self.resyncs_in_a_row = 0;
        }
        match continuation {
            Continuation::Next(href) => {
                self.without_link_in_a_row = 0;
                Step::Commit { cursor: href.clone() }
            }
            Continuation::Resume(href) => Step::CommitAndResume { cursor: href.clone() },
            Continuation::Resync(href) => {
                self.resyncs_in_a_row += 1;
                match self.resyncs_in_a_row {
                    1 => Step::Resynchronise { cursor: href.clone() },
                    2 => Step::ReadApplication { delay: self.backoff.next_delay() },
                    _ => Step::End(ChannelEnd::ApplicationLost(
                        "the server asked for resync three times in a row".to_owned(),
                    )),
                }
            }
            Continuation::Missing => self.without_link(),
        }
    }

    fn without_link(&mut self) -> Step {
        self.without_link_in_a_row += 1;
        if self.without_link_in_a_row > 2 {
            return Step::End(ChannelEnd::ApplicationLost(
                "the event channel answered three times without a link to go on with".to_owned(),
            ));
        }
        Step::ReadApplication { delay: self.backoff.next_delay() }
    }

    fn decide_unreadable(&mut self, next: Option<&str>) -> Step {
        self.answered();
        self.unreadable_in_a_row += 1;
        match (self.unreadable_in_a_row, next) {
            (1, _) => Step::QuarantineAndRepeat,
            (_, Some(next)) => {
                self.unreadable_in_a_row = 0;
                Step::QuarantineAndCommit { cursor: next.to_owned() }
            }
            (_, None) => self.without_link(),
        }
    }

    fn decide_failure(&mut self, error: &UcwaError, now: Instant) -> Step {
        self.failures_in_a_row += 1;
        let subcode = error.subcode().unwrap_or("None");
        match (error.status(), subcode) {
            (Some(409), "PGetReplaced") => self.replaced(now),
            (Some(404), "ApplicationNotFound") => Step::End(ChannelEnd::ApplicationLost(
                "the server no longer knows the application (404 ApplicationNotFound)".to_owned(),
            )),
            (Some(410), "InactiveApplicationExpired") => Step::End(ChannelEnd::ApplicationLost(
                "the application expired for inactivity (410 InactiveApplicationExpired)".to_owned(),
            )),
            (Some(410), "TooManyApplications") => Step::End(ChannelEnd::Attention(
                AttentionReason::TooManyApplications,
                "the server ended the application because this user has too many of them (410 TooManyApplications): \
                 sign out other UCWA clients of the user"
                    .to_owned(),
                Some(AFTER_TOO_MANY_APPLICATIONS),
            )),
            (Some(410), "UserAgentNotAllowed") => Step::End(ChannelEnd::Attention(
                AttentionReason::Policy,
                "the server's policy no longer allows this client (410 UserAgentNotAllowed): allow the user agent \
                 ucwa-relay"
                    .to_owned(),
                Some(AFTER_TOO_MANY_APPLICATIONS),
            )),
            (Some(410), "CannotRedirect") => {
                Step::End(ChannelEnd::Rediscover("the pool moved without a backup (410 CannotRedirect)".to_owned()))
            }
            (Some(404 | 410), _) => Step::ReadApplication { delay: self.backoff.next_delay() },
            (Some(401), _) => Step::End(ChannelEnd::Rediscover(
                "the server refused a token that was just renewed (401)".to_owned(),
            )),
            (Some(403), _) => {
                self.forbidden_in_a_row += 1;
                if self.forbidden_in_a_row > 1 {
                    return Step::End(ChannelEnd::Attention(
                        AttentionReason::Policy,
                        "the server forbids the event channel (403): check the user's policies".to_owned(),
                        Some(AFTER_TOO_MANY_APPLICATIONS),
                    ));
                }
                Step::ReadApplication { delay: self.backoff.next_delay() }
            }
            (Some(429 | 503), _) => Step::Repeat { delay: self.wait(error) },
            (Some(300..=399), _) => {
                Step::End(ChannelEnd::Rediscover("the event channel was redirected".to_owned()))
            }
            (Some(502), _) if self.failures_in_a_row >= 5 => {
                Step::End(ChannelEnd::Rediscover("the event channel answered 502 five times in a row".to_owned()))
            }
            (Some(408 | 500 | 504), _) if self.failures_in_a_row.is_multiple_of(5) => {
                Step::ReadApplication { delay: self.backoff.next_delay() }
            }
            // A connection error right away may be an idle connection that was cut: come back soon, then less often.
            (None, _) if self.failures_in_a_row == 1 && error.is_transport() => {
                Step::Repeat { delay: self.backoff.next_delay().mul_f64(0.5) }
            }
            (None, _) if !error.is_transport() => match error.action() {
                Action::StopAccount => {
                    Step::End(ChannelEnd::Attention(reason_of(error), crate::error_chain(error), None))
                }
                _ if self.failures_in_a_row >= 5 => Step::End(ChannelEnd::Rediscover(error.to_string())),
                _ => Step::Repeat { delay: self.backoff.next_delay() },
            },
            _ => Step::Repeat { delay: self.wait(error) },
        }
    }

    fn wait(&mut self, error: &UcwaError) -> Duration {
        let delay = self.backoff.next_delay();
        error.retry_after().map_or(delay, |asked| asked.max(delay))
    }

    fn replaced(&mut self, now: Instant) -> Step {
        self.replaced_at.retain(|at| now.duration_since(*at) < Duration::from_secs(600));
        self.replaced_at.push(now);
        if self.replaced_at.len() >= 3 {
            return Step::End(ChannelEnd::Attention(
                AttentionReason::AnotherRelay,
                "the same account is signed in by another relay: its event channel was taken over three times in ten \
                 minutes (409 PGetReplaced). Stop the other relay, or give it other accounts"
                    .to_owned(),
                Some(Duration::from_secs(600)),
            ));
        }
        Step::Repeat { delay: AFTER_REPLACED + AFTER_REPLACED.mul_f64(2.0 * rand::random::<f64>()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ucwa::Reason;

    fn status(status: u16, subcode: &str) -> UcwaError {
        UcwaError::Status {
            resource: "events",
            status,
            reason: (!subcode.is_empty())
                .then(|| Box::new(Reason { subcode: Some(subcode.into()), ..Reason::default() })),
            retry_after: None,
            challenge: false,
            diagnostics: None,
        }
    }

    fn lost() -> UcwaError {
        UcwaError::Timeout { resource: "events", host: "pool.contoso.example".into(), sent: true }
    }

    fn after(error: &UcwaError) -> Step {
        ChannelState::default().decide(&Answer::Failed(error), Instant::now())
    }

    fn batch(state: &mut ChannelState, continuation: &Continuation) -> Step {
        state.decide(&Answer::Batch(continuation), Instant::now())
    }

    fn longest(step: &Step) -> Duration {
        match step {
            Step::Repeat { delay } | Step::ReadApplication { delay } => *delay,
            other => panic!("{other:?} has no delay"),
        }
    }

    #[test]
    fn next_is_committed_and_followed() {
        let mut state = ChannelState::default();
        assert_eq!(batch(&mut state, &Continuation::Next("n".into())), Step::Commit { cursor: "n".into() });
    }

    #[test]
    fn resume_is_committed_and_everything_open_is_learnt_anew() {
        let mut state = ChannelState::default();
        let step = batch(&mut state, &Continuation::Resume("r".into()));
        assert_eq!(step, Step::CommitAndResume { cursor: "r".into() });
    }

    #[test]
    fn resync_is_taken_once_then_the_application_is_asked_then_given_up() {
        let mut state = ChannelState::default();
        let resync = || Continuation::Resync("r".into());
        assert_eq!(batch(&mut state, &resync()), Step::Resynchronise { cursor: "r".into() });
        assert!(matches!(batch(&mut state, &resync()), Step::ReadApplication { .. }));
        assert!(matches!(batch(&mut state, &resync()), Step::End(ChannelEnd::ApplicationLost(_))));
        batch(&mut state, &Continuation::Next("n".into()));
        assert_eq!(batch(&mut state, &resync()), Step::Resynchronise { cursor: "r".into() });
    }

    #[test]
    fn a_response_without_a_link_sends_us_to_the_application_twice() {
        let mut state = ChannelState::default();
        assert!(matches!(batch(&mut state, &Continuation::Missing), Step::ReadApplication { .. }));
        assert!(matches!(batch(&mut state, &Continuation::Missing), Step::ReadApplication { .. }));
        assert!(matches!(
            batch(&mut state, &Continuation::Missing),
            Step::End(ChannelEnd::ApplicationLost(_))
        ));
    }

    #[test]
    fn an_unreadable_response_is_asked_again_once_and_then_passed_over() {
        let mut state = ChannelState::default();
        let decide = |state: &mut ChannelState, next: Option<&str>| {
            state.decide(&Answer::Unreadable(next.map(str::to_owned)), Instant::now())
        };
        assert_eq!(decide(&mut state, Some("n")), Step::QuarantineAndRepeat);
        assert_eq!(decide(&mut state, Some("n")), Step::QuarantineAndCommit { cursor: "n".into() });
        assert_eq!(decide(&mut state, None), Step::QuarantineAndRepeat);
        assert!(matches!(decide(&mut state, None), Step::ReadApplication { .. }));
    }

    #[test]
    fn a_lost_connection_is_asked_again_soon_and_then_less_and_less_often() {
        let mut state = ChannelState::default();
        let first = state.decide(&Answer::Failed(&lost()), Instant::now());
        assert!(longest(&first) <= Duration::from_secs(2), "{first:?}");
        let mut last = first;
        for _ in 0..12 {
            last = state.decide(&Answer::Failed(&lost()), Instant::now());
            assert!(longest(&last) <= Duration::from_secs(60), "{last:?}");
        }
        assert!(longest(&last) >= Duration::from_secs(30), "{last:?}");
        assert_eq!(state.failures_in_a_row(), 13);
        batch(&mut state, &Continuation::Next("n".into()));
        assert!(longest(&state.decide(&Answer::Failed(&lost()), Instant::now())) <= Duration::from_secs(2));
    }

    #[test]
    fn being_replaced_is_waited_out_and_three_times_need_attention() {
        let mut state = ChannelState::default();
        let now = Instant::now();
        let replaced = status(409, "PGetReplaced");
        for _ in 0..2 {
            let delay = longest(&state.decide(&Answer::Failed(&replaced), now));
            assert!((Duration::from_secs(5)..=Duration::from_secs(15)).contains(&delay), "{delay:?}");
        }
        let step = state.decide(&Answer::Failed(&replaced), now);
        assert!(
            matches!(&step, Step::End(ChannelEnd::Attention(_, why, _)) if why.contains("another relay")),
            "{step:?}"
        );
        let mut state = ChannelState::default();
        for minutes in [0, 11, 22, 33] {
            let step = state.decide(&Answer::Failed(&replaced), now + Duration::from_secs(minutes * 60));
            assert!(matches!(step, Step::Repeat { .. }), "{step:?}");
        }
    }

    #[test]
    fn a_forgotten_or_expired_application_is_lost() {
        for error in [status(404, "ApplicationNotFound"), status(410, "InactiveApplicationExpired")] {
            assert!(matches!(after(&error), Step::End(ChannelEnd::ApplicationLost(_))), "{error}");
        }
    }

    #[test]
    fn too_many_applications_and_forbidden_clients_need_attention_and_are_not_stormed() {
        for error in [status(410, "TooManyApplications"), status(410, "UserAgentNotAllowed")] {
            let Step::End(ChannelEnd::Attention(_, _, Some(retry))) = after(&error) else {
                panic!("{error}")
            };
            assert!(retry >= Duration::from_secs(15 * 60));
        }
    }

    #[test]
    fn other_answers_ask_the_application_discover_anew_or_wait() {
        assert!(matches!(after(&status(410, "CannotRedirect")), Step::End(ChannelEnd::Rediscover(_))));
        assert!(matches!(after(&status(404, "")), Step::ReadApplication { .. }));
        assert!(matches!(after(&status(409, "None")), Step::Repeat { .. }));
        assert!(matches!(after(&status(302, "")), Step::End(ChannelEnd::Rediscover(_))));
        assert!(matches!(after(&status(401, "")), Step::End(ChannelEnd::Rediscover(_))));
        for code in [408, 429, 500, 502, 503, 504] {
            assert!(matches!(after(&status(code, "")), Step::Repeat { .. }), "{code}");
        }
    }

    #[test]
    fn forbidden_twice_needs_attention() {
        let mut state = ChannelState::default();
        let forbidden = status(403, "None");
        let now = Instant::now();
        assert!(matches!(state.decide(&Answer::Failed(&forbidden), now), Step::ReadApplication { .. }));
        let step = state.decide(&Answer::Failed(&forbidden), now);
        assert!(matches!(step, Step::End(ChannelEnd::Attention(..))), "{step:?}");
    }

    #[test]
    fn five_errors_of_a_kind_lead_away_from_the_address() {
        let mut state = ChannelState::default();
        for _ in 0..4 {
            assert!(matches!(
                state.decide(&Answer::Failed(&status(500, "")), Instant::now()),
                Step::Repeat { .. }
            ));
        }
        let step = state.decide(&Answer::Failed(&status(500, "")), Instant::now());
        assert!(matches!(step, Step::ReadApplication { .. }), "{step:?}");
        let mut state = ChannelState::default();
        for _ in 0..4 {
            state.decide(&Answer::Failed(&status(502, "")), Instant::now());
        }
        let step = state.decide(&Answer::Failed(&status(502, "")), Instant::now());
        assert!(matches!(step, Step::End(ChannelEnd::Rediscover(_))), "{step:?}");
    }

    #[test]
    fn retry_after_is_obeyed() {
        let error = UcwaError::Status {
            resource: "events",
            status: 503,
            reason: None,
            retry_after: Some(Duration::from_secs(120)),
            challenge: false,
            diagnostics: None,
        };
        assert_eq!(after(&error), Step::Repeat { delay: Duration::from_secs(120) });
    }
}
