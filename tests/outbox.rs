//! The queue: every transition of a row's state, every cut between a commit and a request, order, and what operators do
//! with rows. docs/outbox.md says the same in words. The database is a real one of either kind; where the server is
//! needed, it is the simulator.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::{iter, sync::Arc, time::Duration};

use jiff::{Timestamp, ToSpan};
use support::{
    PATIENCE, Relay,
    archive::{
        Database, NODE, Online, accepted, bob_joined, conversation, invitation, message_fact, our_message,
        retry_at, row, uri,
    },
    eventually, eventually_none,
    scene::QUICK,
    sql::{Kind, Place, Sql},
};
use tokio_util::sync::CancellationToken;
use ucwa_relay::{
    archive::fact::{
        Content, Direction, Fact, FailureReason, InvitationFact, LoggedConversation, LoggedMessage,
        MessageFact, OperationStatus, Person, Phase, SendOutcome,
    },
    identifiers::OutboxId,
    outbox::pruning,
    simulator::{
        ConversationPhase, Escalation, Fault, FaultKind, Operation, OutgoingEntry, OutgoingState, Refusal,
        SettingsChange, Simulator, SimulatorSettings,
    },
    store::{AccountState, ClaimedSend, NewOutboxRow, OutboxState, Role, ShapeCell, connect},
};

mod support;

// ------------------------------------------------------------------------------------------------ transitions

/// What happens to a row.
#[derive(Clone, Copy)]
enum Do {
    /// The dispatcher claims what is due, after so many hours.
    Claim(i64),
    /// The claim is given back: nothing left.
    GiveBack,
    /// The attempt's outcome is committed.
    Answer(fn() -> SendOutcome),
    /// The event channel tells something, given the attempt.
    Hear(fn(&ClaimedSend) -> Fact),
    /// The first attempt's event comes although there was another since.
    HearOfFirst(fn(&ClaimedSend) -> Fact),
    /// A conversation log is read.
    ReadLog,
    /// The program starts anew.
    Restart,
    /// The event stream is over, and can tell no more.
    LoseStream,
    /// A user says so by plain SQL: what is set.
    User(&'static str),
    /// A user says so, and the database refuses.
    Refused(&'static str),
}

fn invited(send: &ClaimedSend, phase: Phase, status: Option<(OperationStatus, &str)>) -> Fact {
    let Fact::Invitation(fact) = invitation() else { unreachable!("it is one") };
    Fact::Invitation(InvitationFact {
        href: format!("/invitations/of/{}", send.operation_id),
        phase,
        direction: Some(Direction::Outgoing),
        operation_id: Some(send.operation_id.clone()),
        from: None,
        to_uri: None,
        content: Content::default(),
        status: status.map(|(status, _)| status),
        reason: status.filter(|(status, _)| *status == OperationStatus::Failure).map(|(_, subcode)| {
            FailureReason {
                code: Some("RemoteFailure".to_owned()),
                subcode: Some(subcode.to_owned()),
                message: None,
            }
        }),
        ..fact
    })
}

fn rings(send: &ClaimedSend) -> Fact {
    invited(send, Phase::Started, None)
}

fn answered(send: &ClaimedSend) -> Fact {
    invited(send, Phase::Completed, Some((OperationStatus::Success, "")))
}

fn declined(send: &ClaimedSend) -> Fact {
    invited(send, Phase::Completed, Some((OperationStatus::Failure, "Declined")))
}

fn not_answered(send: &ClaimedSend) -> Fact {
    invited(send, Phase::Completed, Some((OperationStatus::Failure, "Timeout")))
}

fn delivered(send: &ClaimedSend) -> Fact {
    let Fact::Message(fact) = our_message(1) else { unreachable!("it is one") };
    Fact::Message(MessageFact { operation_id: Some(send.operation_id.clone()), ..fact })
}

fn not_delivered(send: &ClaimedSend) -> Fact {
    let Fact::Message(fact) = delivered(send) else { unreachable!("it is one") };
    Fact::Message(MessageFact { status: Some(OperationStatus::Failure), ..fact })
}

fn not_delivered_for_now(send: &ClaimedSend) -> Fact {
    let Fact::Message(fact) = not_delivered(send) else { unreachable!("it is one") };
    let reason = FailureReason { subcode: Some("Timeout".to_owned()), ..FailureReason::default() };
    Fact::Message(MessageFact { reason: Some(reason), ..fact })
}

fn second_delivered(send: &ClaimedSend) -> Fact {
    let Fact::Message(fact) = our_message(2) else { unreachable!("it is one") };
    Fact::Message(MessageFact { operation_id: Some(send.operation_id.clone()), ..fact })
}

fn busy() -> SendOutcome {
    retry_at(Timestamp::now())
}

fn refused() -> SendOutcome {
    SendOutcome::Refused {
        conversation_href: None,
        reason: FailureReason { code: Some("NotFound".to_owned()), ..FailureReason::default() },
        http_status: Some(404),
        error: "there is no such user".to_owned(),
    }
}

fn call_accepted() -> SendOutcome {
    SendOutcome::InvitationAccepted { invitation_href: None }
}

fn uncertain() -> SendOutcome {
    SendOutcome::Uncertain { error: "nobody can tell".to_owned(), again_at: None }
}

fn uncertain_and_again() -> SendOutcome {
    SendOutcome::Uncertain { error: "nobody can tell".to_owned(), again_at: Some(Timestamp::now()) }
}

/// The log of the talk with Bob has the row's text.
fn log_with(text: &str) -> Fact {
    let fact = message_fact(1, text);
    Fact::Logged(LoggedConversation {
        href: "/logs/1".to_owned(),
        thread_id: Some("thread".to_owned()),
        people: vec![Person { href: None, ..support::archive::bob() }],
        messages: vec![LoggedMessage {
            sent_at: Timestamp::now(),
            direction: Direction::Outgoing,
            sender: None,
            content: fact.content,
        }],
        ..LoggedConversation::default()
    })
}

/// A row's way: its name, what is special about the row that is inserted, and what happens with the state it then has.
type Way = (&'static str, &'static str, Vec<(Do, &'static str)>);

/// Every transition of a row's state.
#[expect(clippy::too_many_lines, reason = "it is a table")]
fn transitions() -> Vec<Way> {
    use Do::{Answer, Claim, GiveBack, Hear, HearOfFirst, LoseStream, ReadLog, Refused, Restart, User};
    let claim = (Claim(0), "sending");
    let sent = (Answer(|| accepted(1)), "sent");
    let cancel = User("state = 'cancelled'");
    let queue = User("state = 'queued'");
    vec![
        ("accepted, then delivered", "", vec![claim, sent, (Hear(delivered), "delivered")]),
        (
            "accepted, then not delivered, and queued again",
            "",
            vec![claim, sent, (Hear(not_delivered), "failed"), (queue, "queued"), (Claim(0), "sending")],
        ),
        (
            "not delivered for now, sent again",
            "",
            vec![
                claim,
                sent,
                (Hear(not_delivered_for_now), "queued"),
                (Claim(0), "queued"),
                (Claim(1), "sending"),
                (Hear(second_delivered), "delivered"),
            ],
        ),
        (
            "not delivered for now before the answer",
            "",
            vec![
                claim,
                (Hear(not_delivered_for_now), "queued"),
                (Answer(|| accepted(1)), "queued"),
                (Claim(1), "sending"),
                (Hear(second_delivered), "delivered"),
            ],
        ),
        (
            "not delivered for now at the last attempt",
            "max_attempts = 1",
            vec![claim, sent, (Hear(not_delivered_for_now), "failed")],
        ),
        (
            "delivered before the answer",
            "",
            vec![claim, (Hear(delivered), "delivered"), (Answer(|| accepted(1)), "delivered")],
        ),
        ("answer lost, event tells", "", vec![claim, (Restart, "sending"), (Hear(delivered), "delivered")]),
        (
            "answer lost, event tells of the failure",
            "",
            vec![claim, (Restart, "sending"), (Hear(not_delivered), "failed")],
        ),
        (
            "called and answered",
            "",
            vec![
                claim,
                (Answer(call_accepted), "sent"),
                (Hear(rings), "sent"),
                (Hear(answered), "delivered"),
            ],
        ),
        (
            "rings before the answer",
            "",
            vec![
                claim,
                (Hear(rings), "sent"),
                (Answer(call_accepted), "sent"),
                (Hear(answered), "delivered"),
            ],
        ),
        (
            "declined",
            "",
            vec![claim, (Answer(call_accepted), "sent"), (Hear(declined), "failed"), (Claim(1), "failed")],
        ),
        (
            "declined before the answer",
            "",
            vec![claim, (Hear(declined), "failed"), (Answer(call_accepted), "failed")],
        ),
        (
            "not answered, called again",
            "",
            vec![
                claim,
                (Hear(rings), "sent"),
                (Hear(not_answered), "queued"),
                (Claim(0), "queued"),
                (Claim(1), "sending"),
                (Hear(answered), "delivered"),
            ],
        ),
        ("not answered at the last attempt", "max_attempts = 1", vec![claim, (Hear(not_answered), "failed")]),
        ("given back", "", vec![claim, (GiveBack, "queued"), (Claim(0), "sending")]),
        ("the server is busy", "", vec![claim, (Answer(busy), "queued"), (Claim(1), "sending"), sent]),
        (
            "refused, and queued again",
            "",
            vec![claim, (Answer(refused), "failed"), (queue, "queued"), (Claim(0), "sending")],
        ),
        (
            "an attempt that was given up had succeeded",
            "",
            vec![
                claim,
                (Answer(busy), "queued"),
                (Claim(1), "sending"),
                (HearOfFirst(delivered), "delivered"),
                (Answer(refused), "delivered"),
            ],
        ),
        (
            "an attempt that was given up has failed",
            "",
            vec![
                claim,
                (Answer(busy), "queued"),
                (Claim(1), "sending"),
                (HearOfFirst(not_delivered), "sending"),
                sent,
            ],
        ),
        (
            "nobody can tell",
            "",
            vec![
                claim,
                (Answer(uncertain), "uncertain"),
                (Claim(1), "uncertain"),
                (queue, "queued"),
                (Claim(1), "sending"),
            ],
        ),
        (
            "nobody could tell, until the answer came",
            "",
            vec![claim, (LoseStream, "uncertain"), (Answer(|| accepted(1)), "sent")],
        ),
        (
            "nobody could tell, until an event did",
            "",
            vec![claim, (LoseStream, "uncertain"), (Hear(delivered), "delivered")],
        ),
        (
            "nobody could tell, until nothing had left",
            "",
            vec![claim, (LoseStream, "uncertain"), (GiveBack, "queued")],
        ),
        (
            "nobody could tell, until the log did",
            "",
            vec![
                claim,
                (Restart, "sending"),
                (LoseStream, "uncertain"),
                (ReadLog, "delivered"),
                (ReadLog, "delivered"),
            ],
        ),
        (
            "queued again, when the log tells that it arrived",
            "",
            vec![
                claim,
                (LoseStream, "uncertain"),
                (queue, "queued"),
                (Claim(0), "sending"),
                (GiveBack, "queued"),
                (ReadLog, "delivered"),
                (Claim(1), "delivered"),
            ],
        ),
        (
            "sent again at a risk",
            "",
            vec![claim, (Answer(uncertain_and_again), "queued"), (Claim(1), "sending"), sent],
        ),
        (
            "sent again at a risk, unless the log tells first",
            "",
            vec![claim, (Answer(uncertain_and_again), "queued"), (ReadLog, "delivered")],
        ),
        (
            "no risk beyond the last attempt",
            "max_attempts = 1",
            vec![claim, (Answer(uncertain_and_again), "uncertain")],
        ),
        (
            "the log has it while it is under way",
            "",
            vec![claim, (ReadLog, "sending"), (Hear(delivered), "delivered")],
        ),
        (
            "held and released",
            "",
            vec![(User("state = 'held'"), "held"), (Claim(1), "held"), (queue, "queued"), claim],
        ),
        (
            "withdrawn",
            "",
            vec![(cancel, "cancelled"), (Claim(1), "cancelled"), (Refused("state = 'queued'"), "cancelled")],
        ),
        ("held and withdrawn", "", vec![(User("state = 'held'"), "held"), (cancel, "cancelled")]),
        (
            "withdrawn between two attempts",
            "",
            vec![claim, (Answer(busy), "queued"), (cancel, "cancelled"), (Claim(1), "cancelled")],
        ),
        (
            "too late to withdraw",
            "",
            vec![
                claim,
                (Refused("state = 'cancelled'"), "sending"),
                (Refused("state = 'held'"), "sending"),
                sent,
                (Refused("state = 'cancelled'"), "sent"),
            ],
        ),
        (
            "too late",
            "expires_at = '2001-01-01T00:00:00Z'",
            vec![(Claim(0), "expired"), (queue, "queued"), claim],
        ),
        (
            "wrong, and corrected",
            "recipients = 'bob'",
            vec![
                (Claim(0), "failed"),
                (User("recipients = 'bob@contoso.com', state = 'queued'"), "queued"),
                claim,
            ],
        ),
        (
            "not yet",
            "send_after = '2999-01-01T00:00:00Z'",
            vec![(Claim(1), "queued"), (User("send_after = NULL"), "queued"), claim],
        ),
    ]
}

/// Does one thing to row `id`, whose attempts so far are given.
async fn happen(
    what: Do,
    id: i64,
    database: &mut Database,
    online: &mut Online,
    attempts: &mut Vec<ClaimedSend>,
    cursor: &mut u32,
) {
    let current = || attempts.last().expect("it was claimed").clone();
    match what {
        Do::Claim(hours) => {
            let claimed = database.claim_at(Timestamp::now() + hours.hours()).await;
            attempts.extend(claimed.into_iter().filter(|send| send.outbox.0 == id));
        }
        Do::GiveBack => {
            let send = current();
            database.store.release_claim(&send).await.unwrap();
        }
        Do::Answer(outcome) => online.send_fact(&current(), outcome()).await,
        Do::Hear(fact) | Do::HearOfFirst(fact) => {
            let send = if matches!(what, Do::Hear(_)) { current() } else { attempts[0].clone() };
            *cursor += 1;
            let cursor = format!("/events?ack={cursor}");
            // Whatever is heard is heard twice: nothing was acknowledged.
            for _ in 0..2 {
                online.events(&cursor, vec![conversation(), bob_joined(), fact(&send)]).await;
            }
        }
        Do::ReadLog => {
            online.answer(log_with(&format!("news {id}"))).await;
        }
        Do::Restart => {
            database.reopen().await;
            online.store = database.store.clone();
            let unsettled = database.store.unsettled_sends(online.account).await.unwrap();
            assert!(unsettled.iter().any(|row| row.send.operation_id == current().operation_id));
        }
        Do::LoseStream => {
            assert_eq!(
                database.store.abandon_sends(online.account, "the application is gone").await.unwrap(),
                1
            );
        }
        Do::User(set) => {
            let update = format!("UPDATE outbox SET {set} WHERE id = {id}");
            assert_eq!(database.outside().await.run(&update).await, Ok(1));
        }
        Do::Refused(set) => {
            let update = format!("UPDATE outbox SET {set} WHERE id = {id}");
            let error = database.outside().await.run(&update).await.unwrap_err();
            assert!(error.contains("of outbox"), "{error}");
        }
    }
}

async fn every_transition_leads_where_the_documentation_says(kind: Kind) {
    let mut database = Database::new(kind).await;
    for (number, (name, columns, steps)) in transitions().into_iter().enumerate() {
        let account = format!("user{number}");
        let mut online = database.online(&account).await;
        let id = database
            .store
            .enqueue(&NewOutboxRow { account: uri(&account).to_string(), ..row("bob@contoso.com") })
            .await
            .unwrap()
            .0;
        let mut outside = database.outside().await;
        let columns = if columns.is_empty() { String::new() } else { format!(", {columns}") };
        outside.run(&format!("UPDATE outbox SET body = 'news {id}'{columns} WHERE id = {id}")).await.unwrap();
        drop(outside);
        let (mut attempts, mut cursor, mut doubted) = (Vec::new(), 1, false);
        for (step, (what, expected)) in steps.into_iter().enumerate() {
            let (before, _) = database.store.outbox_row(OutboxId(id)).await.unwrap().unwrap();
            happen(what, id, &mut database, &mut online, &mut attempts, &mut cursor).await;
            let (row, log) = database.store.outbox_row(OutboxId(id)).await.unwrap().unwrap();
            let place = format!("{name}, step {step}: {:?} {:?}", row.last_code, row.last_error);
            assert_eq!(row.state.as_str(), expected, "{place}");
            // What holds after every step.
            assert_eq!(
                row.finished_at.is_some(),
                row.state.is_final() && row.state != OutboxState::Sent,
                "{place}"
            );
            match row.state {
                OutboxState::Sent | OutboxState::Delivered => assert!(row.sent_at.is_some(), "{place}"),
                OutboxState::Queued | OutboxState::Sending => assert!(row.sent_at.is_none(), "{place}"),
                _ => {}
            }
            // Of an attempt that was given up the event may come while the next is under way.
            let open = log.iter().filter(|attempt| attempt.finished_at.is_none()).count();
            assert!(open <= 1 && (open == 1 || row.state != OutboxState::Sending), "{place}");
            // Sent again after nobody could tell, or after the server had taken it: it says so for good.
            let may_have_arrived = before.state == OutboxState::Uncertain
                || (before.state == OutboxState::Failed && before.sent_at.is_some());
            doubted |= may_have_arrived && matches!(what, Do::User(_));
            doubted |= matches!(what, Do::Answer(_))
                && row.state == OutboxState::Queued
                && row.last_error.as_deref().is_some_and(|error| error.contains("twice"));
            assert_eq!(row.possible_duplicate, doubted, "{place}");
        }
        let mut outside = database.outside().await;
        let (row, _) = database.store.outbox_row(OutboxId(id)).await.unwrap().unwrap();
        let archived =
            outside.count(&format!("messages WHERE body = 'news {id}' AND status <> 'failed'")).await;
        assert!(archived <= 1, "{name}: archived {archived} times");
        let open =
            outside.count(&format!("outbox_attempts WHERE outbox_id = {id} AND finished_at IS NULL")).await;
        assert_eq!(open, i64::from(row.state == OutboxState::Sending), "{name}");
        if row.state == OutboxState::Delivered {
            assert_eq!(
                outside.count(&format!("messages WHERE outbox_id = {id} AND status = 'delivered'")).await,
                1,
                "{name}"
            );
        }
        // The next case finds an empty queue.
        database.store.set_enabled(online.account, false).await.unwrap();
        database.store.record_state(online.account, AccountState::Stopped, None, NODE).await.unwrap();
    }
}

// ------------------------------------------------------------------------------------------------ operators

async fn finished_rows_are_removed_after_their_time_with_their_attempts(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    for to in ["sent", "cancelled", "queued", "held", "sending", "young"] {
        database.store.enqueue(&row(&format!("{to}@contoso.com"))).await.unwrap();
    }
    database.store.enqueue(&row("malformed")).await.unwrap();
    for (id, state) in [(2, OutboxState::Cancelled), (4, OutboxState::Held)] {
        assert!(database.store.set_outbox_state(OutboxId(id), state).await.unwrap());
    }
    outside.run("UPDATE outbox SET send_after = '2999-01-01T00:00:00Z' WHERE id = 3").await.unwrap();
    let claimed = database.claim().await;
    for send in claimed.iter().filter(|send| send.outbox.0 != 5) {
        alice.send_fact(send, accepted(u32::try_from(send.outbox.0).unwrap())).await;
    }
    outside.run("UPDATE outbox SET sent_at = '2020-01-01T00:00:00.000Z' WHERE id = 1").await.unwrap();
    outside
        .run("UPDATE outbox SET finished_at = '2020-01-01T00:00:00.000Z' WHERE id IN (2, 7)")
        .await
        .unwrap();
    // Old, and yet in nobody's way: these are not finished.
    outside
        .run("UPDATE outbox SET created_at = '2020-01-01T00:00:00.000Z' WHERE id IN (3, 4, 5)")
        .await
        .unwrap();
    let yesterday = Timestamp::now() - 24.hours();
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 2, "only so many at once");
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 1);
    assert_eq!(database.store.purge_outbox(yesterday, 2).await.unwrap(), 0);
    assert_eq!(
        outside.rows("SELECT id, state FROM outbox ORDER BY id").await,
        ["3|queued", "4|held", "5|sending", "6|sent"]
    );
    assert_eq!(outside.rows("SELECT outbox_id FROM outbox_attempts ORDER BY id").await, ["5", "6"]);
    assert_eq!(outside.count("messages WHERE outbox_id = 1").await, 1, "what was said stays");
}

async fn a_running_server_removes_what_is_over(kind: Kind) {
    let mut scene =
        Scene::begin(kind, SimulatorSettings::default(), "[outbox]\nkeep_finished_days = 3").await;
    let mut ids = Vec::new();
    for name in ["old", "young"] {
        let id = scene.queue(&format!("silent.{name}@fabrikam.example"), name, None).await;
        assert_eq!(scene.outcome(id).await.0, "delivered");
        ids.push(id);
    }
    assert!(scene.relay.server().terminate());
    for (id, days) in ids.iter().zip([4_i64, 2]) {
        let then = (Timestamp::now() - (24 * days).hours()).strftime("%Y-%m-%dT%H:%M:%S.000Z");
        scene.sql.run(&format!("UPDATE outbox SET finished_at = '{then}' WHERE id = {id}")).await.unwrap();
    }
    scene.relay.start();
    eventually("the old row is removed", async || {
        (scene.sql.rows("SELECT id FROM outbox").await == [ids[1].to_string()]).then_some(())
    })
    .await;
    assert_eq!(scene.sql.count("messages WHERE direction = 'outgoing'").await, 2, "what was said stays");
}

async fn a_server_that_stops_leaves_the_rest_of_what_is_over_to_the_next_start(kind: Kind) {
    let database = Database::new(kind).await;
    let mut outside = database.outside().await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    assert!(database.store.set_outbox_state(OutboxId(1), OutboxState::Cancelled).await.unwrap());
    outside.run("UPDATE outbox SET finished_at = '2020-01-01T00:00:00.000Z'").await.unwrap();
    let stop = CancellationToken::new();
    stop.cancel();
    pruning::run(Arc::clone(&database.store), 1, stop).await;
    assert_eq!(outside.count("outbox").await, 1);
}

async fn a_row_whose_time_passes_while_it_waits_for_the_rate_is_not_sent(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), "[outbox]\nper_account_rate = 1").await;
    let expires_at = (Timestamp::now() + 6.seconds()).strftime("'%Y-%m-%dT%H:%M:%S.000Z'").to_string();
    let mut last = 0;
    // Of different people, who have their turns in the order of their addresses.
    for number in 0..12 {
        let column = (number == 11).then_some(("expires_at", expires_at.as_str()));
        last = scene
            .queue(&format!("silent.n{number:02}@fabrikam.example"), &format!("row {number}"), column)
            .await;
    }
    assert_eq!(scene.outcome(last).await.0, "expired");
    assert_eq!(scene.accepted("row 11").len(), 0);
}

async fn a_row_that_waits_for_the_rate_is_still_its_users(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), "[outbox]\nper_account_rate = 1").await;
    // Of different people, so that nothing but the rate holds any of them back.
    let rows: Vec<String> = (0..9)
        .map(|number| format!("('{ALICE}', 'sip:silent.{number}@fabrikam.example', 'news {number}')"))
        .collect();
    scene
        .sql
        .run(&format!("INSERT INTO outbox (account, recipients, body) VALUES {}", rows.join(", ")))
        .await
        .unwrap();
    eventually("the first row is with the server", async || {
        (scene.sql.count("outbox WHERE state IN ('sent', 'delivered')").await > 0).then_some(())
    })
    .await;
    for change in [
        "state = 'cancelled' WHERE body IN ('news 6', 'news 7')",
        "state = 'held' WHERE body = 'news 5'",
        // This one is of the past, in either database's words.
        "expires_at = created_at WHERE body = 'news 8'",
    ] {
        scene.sql.run(&format!("UPDATE outbox SET {change}")).await.unwrap();
    }
    eventually("the others are delivered", async || {
        (scene.sql.count("outbox WHERE state = 'delivered'").await == 5).then_some(())
    })
    .await;
    assert_eq!(scene.sql.count("outbox WHERE state = 'cancelled' AND attempts = 0").await, 2);
    assert_eq!(scene.sql.count("outbox WHERE state = 'held' AND attempts = 0").await, 1);
    assert_eq!(scene.sql.count("outbox WHERE state = 'expired' AND attempts = 0").await, 1);
    scene.sql.run("UPDATE outbox SET state = 'queued' WHERE state = 'held'").await.unwrap();
    eventually("the row that was held is delivered", async || {
        (scene.sql.count("outbox WHERE state = 'delivered' AND body = 'news 5'").await == 1).then_some(())
    })
    .await;
    for withdrawn in ["news 6", "news 7", "news 8"] {
        assert!(scene.accepted(withdrawn).is_empty(), "{withdrawn} was sent");
    }
    assert_eq!(scene.simulator.ledger().outgoing.len(), 6);
}

async fn a_failed_row_is_retried_by_command_and_its_story_is_told_in_order(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    for status in [503, 400] {
        let refused = Fault::new(FaultKind::status(status));
        scene.simulator.inject(refused.on(Operation::StartMessaging).account(ALICE)).unwrap();
    }
    let id = scene.queue("silent.a@fabrikam.example", "hello", None).await;
    assert_eq!(scene.outcome(id).await.0, "failed");
    assert!(scene.accepted("hello").is_empty());
    let number = id.to_string();
    assert_eq!(scene.relay.tool_ok(&["outbox", "retry", &number]), format!("row {id} is queued again\n"));
    assert_eq!(scene.outcome(id).await.0, "delivered");
    assert_eq!(scene.accepted("hello").len(), 1);
    let attempts = "SELECT attempt, outcome, http_status FROM outbox_attempts ORDER BY id";
    assert_eq!(scene.sql.rows(attempts).await, ["1|queued|503", "2|failed|400", "3|delivered|"]);
    assert_eq!(scene.sql.count("outbox WHERE NOT possible_duplicate").await, 1, "the server never took it");

    let shown = scene.relay.tool_ok(&["outbox", "show", &number]);
    let chapters = [
        "put into the queue",
        "attempt 1 begun",
        "attempt 1 came to nothing; the row waits for the next",
        "attempt 2 begun",
        "attempt 2 failed",
        "attempt 3 begun",
        "attempt 3: the server reported its delivery",
        "the row is delivered",
    ];
    let mut rest = shown.as_str();
    for chapter in chapters {
        let at = rest.find(chapter).unwrap_or_else(|| panic!("{chapter:?} is not in its place: {shown}"));
        rest = &rest[at + chapter.len()..];
    }
    let told: serde_json::Value =
        serde_json::from_str(&scene.relay.tool_ok(&["outbox", "show", &number, "--format", "json"])).unwrap();
    let log: Vec<_> = told["attempt_log"]
        .as_array()
        .unwrap()
        .iter()
        .map(|attempt| (attempt["attempt"].as_i64().unwrap(), attempt["outcome"].as_str().unwrap()))
        .collect();
    assert_eq!(log, [(1, "queued"), (2, "failed"), (3, "delivered")]);
}

async fn held_rows_are_left_alone_until_they_are_released_by_command_or_by_update(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), "").await;
    let later = Some(("send_after", "'2999-01-01T00:00:00Z'"));
    let by_command = scene.queue("silent.a@fabrikam.example", "held by command", later).await.to_string();
    let by_update = scene.queue("silent.b@fabrikam.example", "held by update", later).await.to_string();
    scene.relay.tool_ok(&["outbox", "hold", &by_command]);
    let set = async |sql: &mut Sql, set: &str, id: &str| {
        assert_eq!(sql.run(&format!("UPDATE outbox SET {set} WHERE id = {id}")).await, Ok(1));
    };
    set(&mut scene.sql, "state = 'held'", &by_update).await;
    for id in [&by_command, &by_update] {
        set(&mut scene.sql, "send_after = NULL", id).await;
    }
    // What comes later passes them by.
    for to in ["silent.a", "silent.b"] {
        let passing = scene.queue(&format!("{to}@fabrikam.example"), "passes by", None).await;
        assert_eq!(scene.outcome(passing).await.0, "delivered");
    }
    assert_eq!(scene.sql.count("outbox WHERE state = 'held' AND attempts = 0").await, 2);
    assert_eq!(scene.simulator.ledger().outgoing.len(), 2);
    // Either way of letting go undoes either way of holding.
    set(&mut scene.sql, "state = 'queued'", &by_command).await;
    assert_eq!(
        scene.relay.tool_ok(&["outbox", "release", &by_update]),
        format!("row {by_update} is released\n")
    );
    for (id, body) in [(by_command, "held by command"), (by_update, "held by update")] {
        assert_eq!(scene.outcome(id.parse().unwrap()).await.0, "delivered");
        assert_eq!(scene.accepted(body).len(), 1);
    }
}

/// Withdraws a row by plain UPDATE. Whether the database let it.
async fn cancel(user: &mut Sql, id: i64) -> bool {
    match user.run(&format!("UPDATE outbox SET state = 'cancelled' WHERE id = {id}")).await {
        Ok(rows) => rows == 1,
        Err(refusal) => {
            assert!(refusal.contains("can be cancelled"), "{refusal}");
            false
        }
    }
}

/// Rows are cancelled by command and by plain UPDATE while they are being claimed.
async fn a_cancel_and_a_claim_of_one_row_exclude_each_other(kind: Kind) {
    const PEOPLE: usize = 40;
    const EACH: usize = 6;
    let fast = "[outbox]\nper_account_rate = 100000\n";
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), fast).await;
    let rows: Vec<String> = (0..EACH)
        .flat_map(|round| {
            (0..PEOPLE).map(move |person| {
                let recipient = format!("sip:silent.{person}@fabrikam.example");
                format!("('{ALICE}', '{recipient}', 'row {round} to {person}', 'held')")
            })
        })
        .collect();
    let insert = format!("INSERT INTO outbox (account, recipients, body, state) VALUES {}", rows.join(", "));
    scene.sql.run(&insert).await.unwrap();
    let ids: Vec<i64> = (1..).take(rows.len()).collect();
    let mut user = scene.relay.connect().await;
    if kind == Kind::Sqlite {
        user.run("PRAGMA busy_timeout = 60000").await.unwrap();
    }
    // Of three rows one is withdrawn by UPDATE, one by command, and one not at all; the first before anything is due.
    assert!(cancel(&mut user, ids[1]).await);
    scene.sql.run("UPDATE outbox SET state = 'queued' WHERE state = 'held'").await.unwrap();
    let by_update: Vec<i64> = ids.iter().copied().skip(2).filter(|id| id % 3 == 2).collect();
    let updates = tokio::spawn(async move {
        let mut withdrawn = Vec::new();
        for id in by_update {
            if cancel(&mut user, id).await {
                withdrawn.push(id);
            }
        }
        withdrawn
    });
    let mut withdrawn = vec![ids[1]];
    let by_command: Vec<String> = ids.iter().filter(|id| *id % 3 == 0).map(ToString::to_string).collect();
    for ids in by_command.chunks(10) {
        let arguments: Vec<&str> =
            ["outbox", "cancel"].into_iter().chain(ids.iter().map(String::as_str)).collect();
        let told = String::from_utf8(scene.relay.tool(&arguments).stdout).unwrap();
        withdrawn.extend(told.lines().map(|line| {
            let id = line.strip_prefix("row ").and_then(|line| line.strip_suffix(" is cancelled"));
            id.unwrap_or_else(|| panic!("{line:?}")).parse::<i64>().unwrap()
        }));
    }
    withdrawn.extend(updates.await.unwrap());
    withdrawn.sort_unstable();
    eventually("every row has come to its end", async || {
        (scene.sql.count("outbox WHERE state NOT IN ('delivered', 'cancelled')").await == 0).then_some(())
    })
    .await;
    let cancelled = scene.sql.rows("SELECT id FROM outbox WHERE state = 'cancelled' ORDER BY id").await;
    let told: Vec<String> = withdrawn.iter().map(ToString::to_string).collect();
    assert_eq!(cancelled, told, "whoever was told that a row is withdrawn can rely on it, and nobody else");
    assert_eq!(
        scene
            .sql
            .count("outbox_attempts a JOIN outbox o ON o.id = a.outbox_id WHERE o.state = 'cancelled'")
            .await,
        0
    );
    let mut said: Vec<String> =
        scene.simulator.ledger().outgoing.into_iter().map(|entry| entry.text).collect();
    said.sort_unstable();
    let mut sent = scene.sql.rows("SELECT body FROM outbox WHERE state = 'delivered'").await;
    sent.sort_unstable();
    assert_eq!(said, sent, "what was not withdrawn was sent once, and nothing else");
    assert!(sent.len() >= ids.len() / 3, "{} rows were sent", sent.len());
}

async fn an_uncertain_row_is_kept_until_somebody_decides(kind: Kind) {
    let mut database = Database::new(kind).await;
    let alice = database.online("alice").await;
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    assert_eq!(database.claim().await.len(), 1);
    database.reopen().await;
    database.store.abandon_sends(alice.account, "the application is gone").await.unwrap();
    assert_eq!(database.state(1).await.0, OutboxState::Uncertain);
    let tomorrow = Timestamp::now() + 24.hours();
    assert_eq!(database.store.purge_outbox(tomorrow, 10).await.unwrap(), 0);
}

async fn what_had_not_begun_when_the_stream_was_lost_is_no_possible_duplicate(kind: Kind) {
    let place = Place::new(kind).await;
    let mut settings = support::archive::settings(place.url());
    settings.rules.retry_uncertain = true;
    let store = connect(&settings, Role::Server).await.unwrap();
    let database = Database { place, store };
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    for to in ["bob@contoso.com", "carol@contoso.com", "dan@contoso.com"] {
        database.store.enqueue(&row(to)).await.unwrap();
    }
    let first = database.claim().await;
    assert_eq!(first.len(), 3);
    let lose_the_stream = async |cursor: &str, asked: &str| {
        let commit = alice.commit_of(Some(cursor), Vec::new());
        database
            .store
            .resume(commit, asked, Timestamp::now(), "the server forgot what we follow")
            .await
            .unwrap();
    };
    lose_the_stream("/events?ack=2", "/events?ack=1").await;
    let rows = "SELECT id, state, attempts, possible_duplicate, last_error IS NULL FROM outbox ORDER BY id";
    let marked = |id: i64| format!("{id}|queued|1|1|0");
    let never_begun = |id: i64| format!("{id}|queued|0|0|1");
    assert_eq!(outside.rows(rows).await, [marked(1), marked(2), marked(3)]);
    database.store.release_claim(&first[0]).await.unwrap();
    // Its user may have been quicker.
    outside.run("UPDATE outbox SET state = 'held' WHERE id = 2").await.unwrap();
    outside.run("UPDATE outbox SET state = 'queued' WHERE id = 2").await.unwrap();
    database.store.release_claim(&first[1]).await.unwrap();
    assert_eq!(outside.rows(rows).await, [never_begun(1), never_begun(2), marked(3)]);

    // Of this one an earlier attempt may have arrived, whatever becomes of the next.
    let second = database.claim_at(Timestamp::now() + 24.hours()).await;
    assert_eq!(second.len(), 3);
    lose_the_stream("/events?ack=3", "/events?ack=2").await;
    for send in &second {
        database.store.release_claim(send).await.unwrap();
    }
    assert_eq!(
        outside.rows("SELECT id, possible_duplicate FROM outbox ORDER BY id").await,
        ["1|0", "2|0", "3|1"]
    );
}

async fn very_many_rows_whose_time_passes_at_once_expire_a_few_at_a_time_and_hold_up_nobody(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    let mut outside = database.outside().await;
    // As the service has admitted them.
    let rows = |number: u32, to: &str, expires_at: &str| {
        format!(
            "INSERT INTO outbox (account, recipients, body, account_id, destination, expires_at)
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number})
             SELECT 'alice@contoso.com', '{to}@contoso.com', 'too late', 1, 'sip:{to}@contoso.com', {expires_at} FROM n"
        )
    };
    let time = |year: u32| match kind {
        Kind::Sqlite => format!("'{year}-01-01T00:00:00.000Z'"),
        Kind::Postgres => format!("timestamptz '{year}-01-01 00:00:00Z'"),
    };
    outside.run(&rows(1200, "bob", &time(2001))).await.unwrap();
    outside.run(&rows(1, "dan", &time(2002))).await.unwrap();
    for to in ["bob", "carol", "dan"] {
        let body = format!("news for {to}");
        database.store.enqueue(&NewOutboxRow { body, ..row(&format!("{to}@contoso.com")) }).await.unwrap();
    }
    let expired = "outbox WHERE state = 'expired' AND last_code = 'Expired' AND finished_at IS NOT NULL";
    // A first row that is late goes with the batch: Dan need not wait until all of Bob's are through.
    for (claimed, late) in [("news for carol", 502), ("news for dan", 1003), ("news for bob", 1201)] {
        let sends: Vec<String> = database.claim().await.into_iter().map(|send| send.body).collect();
        assert_eq!(sends, [claimed]);
        assert_eq!(outside.count(expired).await, late);
    }
    assert_eq!(outside.count("outbox_attempts").await, 3);
}

async fn waiting_rows_have_a_shape_by_age_and_destination(kind: Kind) {
    let database = Database::new(kind).await;
    database.online("alice").await;
    let mut outside = database.outside().await;
    for to in ["Bob@contoso.com", "sip:bob@contoso.com", "carol@contoso.com;bob@contoso.com"] {
        database.store.enqueue(&row(to)).await.unwrap();
    }
    assert_eq!(database.claim().await.len(), 2);
    // Nobody has looked at this one yet.
    database
        .store
        .enqueue(&NewOutboxRow { account: "nobody@contoso.com".to_owned(), ..row("Dan@contoso.com") })
        .await
        .unwrap();
    outside.run("UPDATE outbox SET created_at = '2026-11-22T10:00:00.000Z' WHERE id = 1").await.unwrap();
    outside.run("UPDATE outbox SET created_at = '2026-11-22T10:07:00.000Z' WHERE id <> 1").await.unwrap();
    let now: Timestamp = "2026-11-22T10:12:00Z".parse().unwrap();
    let times = [now - 5.minutes(), now - 10.minutes()];
    let both = [OutboxState::Queued, OutboxState::Sending];
    let mut shape = database.store.outbox_shape(&both, &times).await.unwrap();
    shape.sort_by(|one, other| (&one.destination, one.age).cmp(&(&other.destination, other.age)));
    let cell = |account: &str, destination: &str, age| ShapeCell {
        account: account.to_owned(),
        destination: destination.to_owned(),
        age,
        count: 1,
    };
    let alice = "sip:alice@contoso.com";
    assert_eq!(
        shape,
        [
            cell("nobody@contoso.com", "Dan@contoso.com", 1),
            cell(alice, "sip:bob@contoso.com", 1),
            cell(alice, "sip:bob@contoso.com", 2),
            cell(alice, "sip:bob@contoso.com;sip:carol@contoso.com", 1),
        ]
    );
    let sending = database.store.outbox_shape(&[OutboxState::Sending], &times).await.unwrap();
    assert_eq!(sending.iter().map(|cell| cell.count).sum::<i64>(), 2);
}

async fn a_row_that_names_an_ended_conversation_and_people_has_its_turn_among_the_rows_for_them(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    alice.events("/events?ack=2", vec![conversation(), bob_joined()]).await;
    let named = |recipients: &str, body: &str| {
        format!(
            "INSERT INTO outbox (account, recipients, conversation_id, body)
             VALUES ('alice@contoso.com', '{recipients}', 1, '{body}')"
        )
    };
    let group = "bob@contoso.com;carol@contoso.com";
    let both = "sip:bob@contoso.com;sip:carol@contoso.com";
    outside.run("UPDATE conversations SET multiparty = TRUE").await.unwrap();
    // Admitted while the group is open, and not yet due.
    outside.run(&named(group, "admitted before the end")).await.unwrap();
    outside.run("UPDATE outbox SET send_after = '2999-01-01T00:00:00Z'").await.unwrap();
    assert_eq!(database.claim().await, []);
    let destination = "SELECT destination FROM outbox WHERE id = 1";
    assert_eq!(outside.rows(destination).await, ["conversation:1"]);
    outside.run("UPDATE conversations SET ended_at = started_at").await.unwrap();

    database.store.enqueue(&NewOutboxRow { body: "by address".to_owned(), ..row(group) }).await.unwrap();
    outside.run(&named(group, "by an ended conversation")).await.unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1, "one at a time: {claimed:?}");
    assert_eq!((claimed[0].body.as_str(), claimed[0].destination.as_str()), ("by address", both));
    alice.send_fact(&claimed[0], accepted(1)).await;
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    assert_eq!(
        (claimed[0].body.as_str(), claimed[0].destination.as_str()),
        ("by an ended conversation", both)
    );

    // As the service takes up a row that is due: without a look at what its user may have changed.
    outside.run("UPDATE outbox SET send_after = NULL, revision = revision + 1 WHERE id = 1").await.unwrap();
    let before_the_end = database.claim().await.pop().unwrap();
    assert_eq!(before_the_end.destination, "conversation:1");
    assert!(matches!(before_the_end.conversation, Some((_, None))), "it is over");
    // Its account gives it back, and it waits for the row that is under way.
    database.store.release_claim(&before_the_end).await.unwrap();
    assert_eq!(database.claim().await, []);
    assert_eq!(outside.rows(destination).await, [both]);

    // With one person it was, and is not for another.
    outside.run("UPDATE conversations SET multiparty = FALSE").await.unwrap();
    outside.run(&named("carol@contoso.com", "to whom?")).await.unwrap();
    outside.run(&named("Bob@contoso.com", "to Bob")).await.unwrap();
    let claimed = database.claim().await;
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    assert_eq!(
        (claimed[0].body.as_str(), claimed[0].destination.as_str()),
        ("to Bob", "sip:bob@contoso.com")
    );
    let wrong = "SELECT state, last_code, attempts FROM outbox WHERE body = 'to whom?'";
    assert_eq!(outside.rows(wrong).await, ["failed|OtherRecipients|0"]);
}

async fn rows_of_an_account_that_is_not_at_work_stay_queued_and_the_status_says_why(kind: Kind) {
    let database = Database::new(kind).await;
    let alice = database.online("alice").await;
    let mut outside = database.outside().await;
    let status = "SELECT account, state, count, reason FROM outbox_status";
    database.store.enqueue(&row("bob@contoso.com")).await.unwrap();
    let record = async |state, detail| {
        database.store.record_state(alice.account, state, detail, NODE).await.unwrap();
    };
    let cases = [
        (
            AccountState::NeedsAttention,
            Some("the password was refused"),
            "needs attention: the password was refused",
        ),
        (AccountState::BackingOff, None, "backing off"),
        (AccountState::Stalled, Some("its event channel is silent"), "stalled: its event channel is silent"),
        (AccountState::Stopped, None, "stopped"),
    ];
    for (state, detail, words) in cases {
        record(state, detail).await;
        assert!(database.claim().await.is_empty());
        // The first time nobody has looked at the row, later somebody has.
        assert_eq!(
            outside.rows(status).await,
            [format!("sip:alice@contoso.com|queued|1|the account is {words}")]
        );
    }
    database.store.set_enabled(alice.account, false).await.unwrap();
    assert_eq!(outside.rows(status).await, ["sip:alice@contoso.com|queued|1|the account is disabled"]);
    database.store.set_enabled(alice.account, true).await.unwrap();
    record(AccountState::Online, None).await;
    assert_eq!(outside.rows(status).await, ["sip:alice@contoso.com|queued|1|"]);
    assert_eq!(database.claim().await.len(), 1);
}

// ------------------------------------------------------------------------------------------------ with the server

const ALICE: &str = "sip:user0001@contoso.example";

/// A simulated server in the test's own process, the real program with one account, and a connection to its database.
struct Scene {
    simulator: Simulator,
    relay: Relay,
    sql: Sql,
}

impl Scene {
    async fn begin(kind: Kind, settings: SimulatorSettings, configuration: &str) -> Self {
        let settings = SimulatorSettings { accounts: 1, ..settings };
        let simulator = Simulator::start(settings).await.expect("loopback has free ports");
        let mut relay = Relay::configure_on_for(kind, &simulator.discovery_url(), configuration).await;
        relay.add_account(ALICE, "simulated");
        relay.start();
        relay.account_state(ALICE, "online").await;
        let sql = relay.connect().await;
        Self { simulator, relay, sql }
    }

    /// Queues a message; `column` is one more of the table, with its value as SQL.
    async fn queue(&mut self, recipients: &str, body: &str, column: Option<(&str, &str)>) -> i64 {
        let (name, value) = column.map_or((String::new(), String::new()), |(name, value)| {
            (format!(", {name}"), format!(", {value}"))
        });
        let insert = format!(
            "INSERT INTO outbox (account, recipients, body{name}) VALUES ('{ALICE}', '{recipients}', '{body}'{value})
             RETURNING id"
        );
        self.sql.rows(&insert).await[0].parse().unwrap()
    }

    /// Waits until a row has come to its end; gives its state and error.
    async fn outcome(&mut self, id: i64) -> (String, String) {
        let query = format!(
            "SELECT state || '|' || coalesce(last_error, '') FROM outbox
              WHERE id = {id} AND state NOT IN ('queued', 'sending', 'sent')"
        );
        let row =
            eventually(&format!("row {id} has come to its end"), async || self.sql.rows(&query).await.pop())
                .await;
        let (state, error) = row.split_once('|').unwrap();
        (state.to_owned(), error.to_owned())
    }

    /// What the server accepted with this text.
    fn accepted(&self, body: &str) -> Vec<OutgoingEntry> {
        let mut entries = self.simulator.ledger().outgoing;
        entries.retain(|entry| entry.text == body);
        entries
    }
}

async fn a_group_is_told_whoever_of_it_can_be_reached(kind: Kind) {
    let settings = SimulatorSettings { ring_time: Duration::from_secs(2), ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, &format!("{QUICK}\n")).await;
    let full =
        |names: &[&str]| names.iter().map(|name| format!("sip:{name}@fabrikam.example")).collect::<Vec<_>>();
    // Who is named; who of them gets it; what the row says of the others.
    let cases: &[(&[&str], &[&str], &[&str])] = &[
        (&["silent.a", "silent.b", "silent.c"], &["silent.a", "silent.b", "silent.c"], &[]),
        (
            &["silent.d", "declines.d"],
            &["silent.d"],
            &["declines.d@fabrikam.example (the recipient declined"],
        ),
        (
            &["declines.e", "silent.e", "silent.f"],
            &["silent.e", "silent.f"],
            &["declines.e@fabrikam.example (the rec"],
        ),
        (
            &["missing.g", "absent.g", "silent.g"],
            &["silent.g"],
            &["missing.g@", "absent.g@", "did not answer in time"],
        ),
        (
            &["busy.h", "silent.h", "missing.h"],
            &["silent.h"],
            &["busy.h@fabrikam.example (the recipient is busy", "missing.h@"],
        ),
    ];
    let mut ids = Vec::new();
    for (number, (named, ..)) in cases.iter().enumerate() {
        ids.push(scene.queue(&full(named).join(";"), &format!("news {number}"), None).await);
    }
    for (number, (named, reached, words)) in cases.iter().enumerate() {
        let (state, error) = scene.outcome(ids[number]).await;
        assert_eq!(state, "delivered", "{named:?}: {error}");
        // The report may be here before the answer to the request is stored, with which it is known who is missing.
        let query = format!("SELECT coalesce(last_error, '') FROM outbox WHERE id = {}", ids[number]);
        let error = eventually(&format!("{named:?}: the row says {words:?}"), async || {
            let error = scene.sql.rows(&query).await.remove(0);
            words.iter().all(|word| error.contains(word)).then_some(error)
        })
        .await;
        let entries = scene.accepted(&format!("news {number}"));
        assert_eq!(entries.len(), 1, "{named:?} is told once");
        let mut to = entries[0].to.clone();
        to.sort();
        assert_eq!(to, full(reached), "{named:?}");
        assert_eq!(error.starts_with("not reached: "), !words.is_empty(), "{error}");
        let unreached = named.len() - reached.len();
        let query =
            format!("SELECT coalesce(failed_recipients, '') FROM messages WHERE outbox_id = {}", ids[number]);
        eventually(&format!("{named:?}: the message names {unreached}"), async || {
            let noted = scene.sql.rows(&query).await.remove(0);
            (noted.matches('@').count() == unreached).then_some(())
        })
        .await;
    }

    // The next row for the same people is said in the group that is there, and so is an answer into its conversation.
    let again = scene.queue(&full(cases[2].0).join(";"), "more news", None).await;
    let (state, error) = scene.outcome(again).await;
    assert_eq!(state, "delivered", "{error}");
    eventually("the next row says who is missing too", async || {
        let query = format!("SELECT coalesce(last_error, '') FROM outbox WHERE id = {again}");
        scene.sql.rows(&query).await.remove(0).contains("declines.e@").then_some(())
    })
    .await;
    let conversation =
        scene.sql.rows(&format!("SELECT conversation_id FROM outbox WHERE id = {}", ids[2])).await.remove(0);
    let answer = scene.queue("", "an answer", Some(("conversation_id", &conversation))).await;
    assert_eq!(scene.outcome(answer).await.0, "delivered");
    let first = scene.accepted("news 2").remove(0);
    for text in ["more news", "an answer"] {
        let entry = scene.accepted(text).remove(0);
        assert_eq!((&entry.conversation, entry.to.len()), (&first.conversation, 2), "{text}");
    }

    // Nobody is there: what waiting can heal is tried again, and what it can't fails at once.
    let refused = scene.queue(&full(&["declines.i", "missing.i"]).join(";"), "to nobody", None).await;
    let (state, error) = scene.outcome(refused).await;
    assert_eq!(state, "failed");
    assert!(
        error.starts_with("nobody could be reached: sip:declines.i@") && error.contains("missing.i@"),
        "{error}"
    );
    let away = scene
        .queue(&full(&["absent.j", "declines.j"]).join(";"), "to nobody", Some(("max_attempts", "2")))
        .await;
    let (state, error) = scene.outcome(away).await;
    assert_eq!(state, "failed");
    assert!(
        error.starts_with("given up after 2 attempts") && error.contains("nobody could be reached"),
        "{error}"
    );
    assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {refused}")).await, 1);
    assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {away}")).await, 2);
    assert!(scene.accepted("to nobody").is_empty());
    assert!(scene.relay.server().terminate());
}

/// One phone rings for longer than anybody waits, and the server does not say that it is not answered.
async fn who_does_not_answer_in_time_does_not_hold_up_the_rest_of_a_group(kind: Kind) {
    let settings = SimulatorSettings { ring_time: Duration::from_secs(3600), ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let group = "silent.a@fabrikam.example;absent.b@fabrikam.example;silent.c@fabrikam.example";
    let row = scene.queue(group, "news", None).await;
    let (state, error) = scene.outcome(row).await;
    assert_eq!(state, "delivered", "{error}");
    assert_eq!(error, "not reached: sip:absent.b@fabrikam.example (did not answer in time)");
    assert_eq!(scene.told_once("news"), ["sip:silent.a@fabrikam.example", "sip:silent.c@fabrikam.example"]);
    assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {row}")).await, 1);
}

/// The answer by which it would be known who is missing does not arrive, or there is nobody left to hear it.
async fn who_could_not_be_reached_is_named_though_the_answer_is_lost(kind: Kind) {
    let settings = SimulatorSettings { early_event_share: 0.0, ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let cut = Fault::new(FaultKind::CutAfter).on(Operation::SendMessage);
    scene.simulator.inject(cut).unwrap();
    let row = scene.queue("silent.a@fabrikam.example;declines.b@fabrikam.example", "news", None).await;
    assert_eq!(scene.outcome(row).await.0, "delivered");
    assert_eq!(scene.told_once("news"), ["sip:silent.a@fabrikam.example"]);
    let named = format!(
        "outbox o JOIN messages m ON m.outbox_id = o.id
          WHERE o.id = {row} AND o.last_error LIKE 'not reached: sip:declines.b@%'
            AND m.failed_recipients = 'sip:declines.b@fabrikam.example'"
    );
    eventually("row and message name who declined", async || {
        (scene.sql.count(&named).await == 1).then_some(())
    })
    .await;

    let delay = Fault::new(FaultKind::DelayAfter { ms: 60_000 }).on(Operation::SendMessage);
    let delay = scene.simulator.inject(delay).unwrap();
    let row = scene.queue("silent.c@fabrikam.example;declines.d@fabrikam.example", "more news", None).await;
    eventually("the server has it", async || (scene.simulator.struck(delay) == 1).then_some(())).await;
    scene.relay.server().kill();
    scene.simulator.clear_faults(None);
    scene.relay.start();
    let (state, error) = scene.outcome(row).await;
    assert_eq!(state, "delivered", "{error}");
    assert!(error.starts_with("not reached: sip:declines.d@"), "{error}");
    assert_eq!(scene.told_once("more news"), ["sip:silent.c@fabrikam.example"]);
}

/// The talk becomes one of three while the row's request is under way, whose link is gone by that.
async fn what_is_for_one_is_not_said_in_a_talk_that_has_grown(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let first = scene.queue("silent.a@fabrikam.example", "hello", None).await;
    assert_eq!(scene.outcome(first).await.0, "delivered");
    let talk = scene.accepted("hello").remove(0).conversation;
    let delay = Fault::new(FaultKind::Delay { ms: 2_000 }).on(Operation::SendMessage);
    let delay = scene.simulator.inject(delay).unwrap();
    let second = scene.queue("silent.a@fabrikam.example", "between us", None).await;
    eventually("the request is under way", async || (scene.simulator.struck(delay) == 1).then_some(())).await;
    scene.simulator.join(&talk, "sip:silent.b@fabrikam.example").unwrap();
    let (state, error) = scene.outcome(second).await;
    assert_eq!((state.as_str(), error.as_str()), ("delivered", ""));
    assert_eq!(scene.told_once("between us"), ["sip:silent.a@fabrikam.example"]);
}

/// Whoever was being called when the server lost track of its conversations is called again, and nothing is said of them.
async fn a_call_that_the_server_lost_track_of_is_made_again(kind: Kind) {
    let settings = SimulatorSettings {
        answer_delay: (Duration::from_secs(4), Duration::from_secs(4)),
        ..SimulatorSettings::default()
    };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let alone =
        scene.queue("html.a@fabrikam.example", "<b>news</b>", Some(("content_type", "'text/html'"))).await;
    let group = scene.queue("silent.b@fabrikam.example;silent.c@fabrikam.example", "news", None).await;
    eventually("both are called", async || (scene.asked(Operation::StartMessaging) == 2).then_some(())).await;
    scene
        .simulator
        .inject(Fault::new(FaultKind::Resume { lose_conversations: true }).on(Operation::Events))
        .unwrap();
    // The events that were lost might have told of the text, until whoever was to say it says that it was not.
    let delivered =
        format!("outbox WHERE id IN ({alone}, {group}) AND state = 'delivered' AND last_error IS NULL");
    eventually("both are delivered", async || (scene.sql.count(&delivered).await == 2).then_some(())).await;
    assert_eq!(scene.told_once("news").len(), 2);
}

async fn a_row_whose_conversation_ends_while_it_waits_does_not_overtake(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let group = "silent.a@fabrikam.example;silent.b@fabrikam.example";
    let opener = scene.queue(group, "opener", None).await;
    assert_eq!(scene.outcome(opener).await.0, "delivered");
    let talk =
        scene.sql.rows(&format!("SELECT conversation_id FROM outbox WHERE id = {opener}")).await.remove(0);
    for (conversation, body) in [("NULL", "first"), (talk.as_str(), "second")] {
        let insert = format!(
            "INSERT INTO outbox (account, recipients, conversation_id, body, send_after)
             VALUES ('{ALICE}', '{group}', {conversation}, '{body}', '2999-01-01T00:00:00Z')"
        );
        scene.sql.run(&insert).await.unwrap();
    }
    eventually("the second row is for the open group", async || {
        let count = scene.sql.count(&format!("outbox WHERE destination = 'conversation:{talk}'")).await;
        (count == 1).then_some(())
    })
    .await;
    for _ in 0..2 {
        scene.simulator.leave(&scene.accepted("opener")[0].conversation).unwrap();
    }
    eventually("the group's end is known", async || {
        (scene.sql.count("conversations WHERE ended_at IS NULL").await == 0).then_some(())
    })
    .await;
    // The first row waits for another attempt, and those behind it do.
    let busy = Fault::new(FaultKind::status(503));
    let busy = scene.simulator.inject(busy.on(Operation::StartMessaging).account(ALICE)).unwrap();
    // As time passes, which is no change of its user's.
    let due = "UPDATE outbox SET send_after = NULL, revision = revision + 1 WHERE body =";
    scene.sql.run(&format!("{due} 'first'")).await.unwrap();
    eventually("the first attempt failed", async || (scene.simulator.struck(busy) == 1).then_some(())).await;
    scene.sql.run(&format!("{due} 'second'")).await.unwrap();
    eventually("both are delivered", async || {
        (scene.sql.count("outbox WHERE state = 'delivered'").await == 3).then_some(())
    })
    .await;
    let said: Vec<String> = scene.simulator.ledger().outgoing.into_iter().map(|entry| entry.text).collect();
    assert_eq!(said, ["opener", "first", "second"]);
}

/// Who was called when the time was over is not told any more.
async fn a_row_whose_time_passes_while_its_call_rings_is_not_said(kind: Kind) {
    let slow = (Duration::from_secs(3), Duration::from_secs(3));
    let settings = SimulatorSettings { answer_delay: slow, ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let soon = format!("'{}'", Timestamp::now() + 2.seconds());
    let row = scene
        .queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "too late", Some(("expires_at", &soon)))
        .await;
    assert_eq!(scene.outcome(row).await.0, "expired");
    assert_eq!(scene.asked(Operation::StartMessaging), 1);
    assert!(scene.accepted("too late").is_empty());
}

async fn whoever_is_invited_while_the_server_is_busy_is_invited_again(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    scene
        .simulator
        .inject(Fault::new(FaultKind::status(503)).on(Operation::AddParticipant).times(2))
        .unwrap();
    let row = scene.queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "news", None).await;
    assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("news").len(), 2);
}

/// Of a meeting that is gone while it is being filled, nobody can say who of its people would come.
async fn whoever_is_invited_to_a_meeting_that_is_gone_is_invited_again(kind: Kind) {
    let mut scene = without_growth(kind, Escalation::Absent).await;
    let gone =
        Refusal { status: 404, subcode: Some("ConversationNotFound".to_owned()), ..Refusal::default() };
    let gone = Fault::new(FaultKind::Status(gone)).on(Operation::AddParticipant).times(2);
    scene.simulator.inject(gone).unwrap();
    let row = scene.queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "news", None).await;
    assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("news").len(), 2);
    assert_eq!(scene.asked(Operation::StartOnlineMeeting), 2);
}

impl Scene {
    /// Waits until the archive has it that somebody left the conversation in which this text was said, so many times.
    async fn has_left(&mut self, who: &str, body: &str, times: usize) {
        let query = format!(
            "SELECT 1 FROM participants p JOIN messages m ON m.conversation_id = p.conversation_id
              WHERE m.body = '{body}' AND p.sip_uri = '{who}' AND p.left_at IS NOT NULL"
        );
        eventually(&format!("{who} has left"), async || {
            (self.sql.rows(&query).await.len() == times).then_some(())
        })
        .await;
    }

    /// Waits until a row says this of whom it did not reach.
    async fn names(&mut self, row: i64, beginning: &str) {
        let query = format!("SELECT coalesce(last_error, '') FROM outbox WHERE id = {row}");
        eventually(&format!("row {row} says {beginning:?}"), async || {
            self.sql.rows(&query).await.remove(0).starts_with(beginning).then_some(())
        })
        .await;
    }
}

async fn whoever_has_left_a_group_is_invited_again(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let group = "silent.a@fabrikam.example;silent.b@fabrikam.example;leaves.c@fabrikam.example";
    let leaver = "sip:leaves.c@fabrikam.example";
    let first = scene.queue(group, "news", None).await;
    assert_eq!(scene.outcome(first).await, ("delivered".to_owned(), String::new()));
    scene.has_left(leaver, "news", 1).await;

    let second = scene.queue(group, "more news", None).await;
    assert_eq!(scene.outcome(second).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("more news").len(), 3);
    assert_eq!(scene.accepted("more news")[0].conversation, scene.accepted("news")[0].conversation);
    assert_eq!(scene.asked(Operation::AddParticipant), 3);
    scene.has_left(leaver, "news", 2).await;

    // Who does not come back is named, and is not invited any more if that can't help.
    scene.simulator.inject(Fault::new(FaultKind::status(403)).on(Operation::AddParticipant)).unwrap();
    for (text, asked) in [("without one", 4), ("still without", 4)] {
        let row = scene.queue(group, text, None).await;
        let (state, error) = scene.outcome(row).await;
        assert_eq!(state, "delivered", "{text}: {error}");
        scene.names(row, &format!("not reached: {leaver} (")).await;
        assert_eq!(scene.told_once(text).len(), 2, "{text}");
        assert_eq!(scene.asked(Operation::AddParticipant), asked, "{text}");
    }
}

async fn whoever_could_not_come_for_now_is_invited_again_later(kind: Kind) {
    let busy = || Fault::new(FaultKind::status(503)).on(Operation::AddParticipant).times(3);
    let group = "silent.a@fabrikam.example;silent.b@fabrikam.example";
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    scene.simulator.inject(busy()).unwrap();
    let first = scene.queue(group, "news", None).await;
    assert_eq!(scene.outcome(first).await.0, "delivered");
    assert_eq!(scene.told_once("news").len(), 1);
    scene.names(first, "not reached: sip:silent.b@").await;
    // When it is time, a row brings them in.
    let mut number = 0;
    eventually("a later row is said to both", async || {
        number += 1;
        let text = format!("more news {number}");
        let row = scene.queue(group, &text, None).await;
        assert_eq!(scene.outcome(row).await.0, "delivered");
        (scene.told_once(&text).len() == 2).then_some(())
    })
    .await;
    assert_eq!(scene.asked(Operation::AddParticipant), 4, "once more");
    assert_eq!(scene.asked(Operation::StartMessaging), 1);

    // Before that, it is not tried by each row anew.
    let patient =
        QUICK.replace("retry_base = \"1s\"\nretry_max = \"2s\"", "retry_base = \"1h\"\nretry_max = \"2h\"");
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), &patient).await;
    scene.simulator.inject(busy()).unwrap();
    for text in ["one", "two"] {
        let row = scene.queue(group, text, None).await;
        assert_eq!(scene.outcome(row).await.0, "delivered");
        scene.names(row, "not reached: sip:silent.b@").await;
        assert_eq!(scene.asked(Operation::AddParticipant), 3, "{text}");
    }
}

async fn a_group_that_nobody_joins_waits_as_long_as_the_server_wants(kind: Kind) {
    let mut scene = without_growth(kind, Escalation::Refused).await;
    let first = scene.queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "news", None).await;
    assert_eq!(scene.outcome(first).await.0, "delivered");
    let busy = FaultKind::Status(Refusal { status: 503, retry_after: Some(3600), ..Refusal::default() });
    scene.simulator.inject(Fault::new(busy).on(Operation::AddParticipant).times(2)).unwrap();
    let row = scene.queue("silent.c@fabrikam.example;silent.d@fabrikam.example", "for others", None).await;
    let now = Timestamp::now();
    let query =
        format!("SELECT next_attempt_at FROM outbox WHERE id = {row} AND state = 'queued' AND attempts = 1");
    let at = eventually("the row waits", async || scene.sql.rows(&query).await.pop()).await;
    let at = at.replace(' ', "T").replace("+00", "Z").replace("ZZ", "Z");
    let wait = at.parse::<Timestamp>().unwrap().duration_since(now);
    // The server's clock is the machine's; what it wants to be left alone is capped.
    assert!(wait.as_secs() >= 600, "{wait:?}");
    assert!(scene.accepted("for others").is_empty());
}

/// Nobody has got what the server says was not delivered: it is sent again while that may help.
async fn a_message_that_was_not_delivered_for_now_is_sent_again(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let first = scene.queue("deaf.a@fabrikam.example", "hello", None).await;
    assert_eq!(scene.outcome(first).await.0, "delivered", "a call brings its text along");
    let row = scene.queue("deaf.a@fabrikam.example", "news", Some(("max_attempts", "3"))).await;
    let (state, error) = scene.outcome(row).await;
    assert_eq!(state, "failed", "{error}");
    assert!(error.contains("not delivered to sip:deaf.a@fabrikam.example"), "{error}");
    assert_eq!(scene.accepted("news").len(), 3);
    assert_eq!(scene.asked(Operation::StartMessaging), 1, "in the same talk");
    let attempts = scene
        .sql
        .rows(&format!("SELECT outcome, subcode FROM outbox_attempts WHERE outbox_id = {row} ORDER BY id"))
        .await;
    assert_eq!(attempts, ["failed|Timeout"; 3]);
    assert_eq!(scene.sql.count("outbox WHERE possible_duplicate").await, 0, "it arrived at no time");
}

/// A group goes on where it is after the program was away, and after the server lost track of what it followed.
async fn a_group_is_found_again(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let group = "silent.a@fabrikam.example;silent.b@fabrikam.example;silent.c@fabrikam.example";
    // One of whom only the first can be had: a talk of two, and yet the group's.
    let pair = "silent.d@fabrikam.example;declines.e@fabrikam.example";
    for (recipients, text) in [(group, "news"), (pair, "for two")] {
        let row = scene.queue(recipients, text, None).await;
        assert_eq!(scene.outcome(row).await.0, "delivered", "{text}");
    }
    let talk = scene.accepted("news").remove(0).conversation;
    let of_pair = scene.accepted("for two").remove(0).conversation;
    let calls = scene.asked(Operation::StartMessaging);

    scene.relay.server().kill();
    scene.simulator.leave_from(&talk, Some("sip:silent.b@fabrikam.example")).unwrap();
    scene.restart().await;
    let row = scene.queue(group, "after the restart", None).await;
    assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("after the restart").len(), 3, "whoever left meanwhile is invited again");
    let row = scene.queue(pair, "for two again", None).await;
    assert_eq!(scene.outcome(row).await.0, "delivered");
    scene.names(row, "not reached: sip:declines.e@").await;

    let lost = Fault::new(FaultKind::Resume { lose_conversations: false }).on(Operation::Events);
    let lost = scene.simulator.inject(lost).unwrap();
    eventually("the server has lost track", async || (scene.simulator.struck(lost) == 1).then_some(())).await;
    let row = scene.queue(group, "after the loss", None).await;
    assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
    for text in ["after the restart", "after the loss"] {
        assert_eq!(scene.accepted(text)[0].conversation, talk, "{text}");
    }
    assert_eq!(scene.accepted("for two again")[0].conversation, of_pair);
    assert_eq!(scene.asked(Operation::StartMessaging), calls, "nobody is called for what is there");
}

impl Scene {
    /// How many conversations the account has open on the server.
    fn open_talks(&self) -> usize {
        let mut accounts = self.simulator.accounts();
        accounts.remove(0).applications.iter().map(|application| application.conversations.len()).sum()
    }
}

/// Nobody's telephone rings for a row that is given up, though no event has told of the call.
async fn a_call_that_is_given_up_is_withdrawn(kind: Kind) {
    let settings = SimulatorSettings { early_event_share: 0.0, ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let silence = Fault::new(FaultKind::Delay { ms: 120_000 }).on(Operation::Events).account(ALICE);
    let silence = scene.simulator.inject(silence).unwrap();
    eventually("the channel is silent", async || (scene.simulator.struck(silence) > 0).then_some(())).await;
    let soon = format!("'{}'", Timestamp::now() + 2.seconds());
    let row = scene
        .queue("absent.a@fabrikam.example;absent.b@fabrikam.example", "late", Some(("expires_at", &soon)))
        .await;
    eventually("somebody is called", async || (scene.open_talks() == 1).then_some(())).await;
    assert_eq!(scene.outcome(row).await.0, "expired");
    assert_eq!(scene.asked(Operation::StopMessaging), 1, "the call was withdrawn");
    assert_eq!(scene.open_talks(), 0);
}

async fn the_longest_idle_conversation_makes_room_for_a_new_one(kind: Kind) {
    let settings =
        SimulatorSettings { conversations_per_application: Some(2), ..SimulatorSettings::default() };
    // Time to leave one before the row is tried again.
    let unhurried =
        QUICK.replace("retry_base = \"1s\"\nretry_max = \"2s\"", "retry_base = \"4s\"\nretry_max = \"4s\"");
    let mut scene = Scene::begin(kind, settings, &unhurried).await;
    let to = |name: &str| format!("silent.{name}@fabrikam.example");
    for name in ["a", "b"] {
        let row = scene.queue(&to(name), &format!("news for {name}"), None).await;
        assert_eq!(scene.outcome(row).await.0, "delivered");
    }
    let again = scene.queue(&to("a"), "more for a", None).await;
    assert_eq!(scene.outcome(again).await.0, "delivered");
    // The text goes with the call, which fails later.
    let third = scene.queue(&to("c"), "news for c", None).await;
    assert_eq!(scene.outcome(third).await.0, "delivered");
    assert_eq!(scene.asked(Operation::LeaveConversation), 1);
    let talk = |body: &str| scene.simulator.conversation_phase(&scene.accepted(body)[0].conversation);
    assert_eq!(
        (talk("news for a"), talk("news for b")),
        (ConversationPhase::Connected, ConversationPhase::Ended)
    );
    // A group is called without it, and the request may be refused at once.
    let full = Fault::new(FaultKind::refusal(403, "TooManyConversations")).on(Operation::StartMessaging);
    scene.simulator.inject(full).unwrap();
    let group = scene.queue(&[to("d"), to("e")].join(";"), "for a group", None).await;
    assert_eq!(scene.outcome(group).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("for a group").len(), 2);
    assert_eq!(scene.open_talks(), 2);

    // Meetings make room as well, after all talks of two.
    let settings = SimulatorSettings {
        conversations_per_application: Some(2),
        escalation: Escalation::Absent,
        ..SimulatorSettings::default()
    };
    let mut scene = Scene::begin(kind, settings, &unhurried).await;
    for (number, pair) in [["a", "b"], ["c", "d"], ["e", "f"]].into_iter().enumerate() {
        let text = format!("meeting {number}");
        let row = scene.queue(&pair.map(to).join(";"), &text, None).await;
        assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
        assert_eq!(scene.told_once(&text).len(), 2);
    }
    let meeting = |number: usize| {
        scene.simulator.conversation_phase(&scene.accepted(&format!("meeting {number}"))[0].conversation)
    };
    assert_eq!(
        [0, 1, 2].map(meeting),
        [ConversationPhase::Ended, ConversationPhase::Connected, ConversationPhase::Connected]
    );
}

/// Of several groups at once, so that a report without an operation id is nobody's before the answer.
async fn who_did_not_get_a_message_is_named_though_the_report_comes_before_the_answer(kind: Kind) {
    let settings = SimulatorSettings { early_event_share: 1.0, ..SimulatorSettings::default() };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let deaf = |number: usize| format!("sip:deaf.{number}@fabrikam.example");
    let mut rows = Vec::new();
    for number in 0..8 {
        let group = format!("silent.{number}@fabrikam.example;{}", deaf(number));
        rows.push(scene.queue(&group, &format!("news {number}"), None).await);
    }
    for (number, row) in rows.into_iter().enumerate() {
        let (state, error) = scene.outcome(row).await;
        assert_eq!(state, "delivered", "{number}: {error}");
        scene.names(row, &format!("not delivered to {}", deaf(number))).await;
        let message = format!(
            "messages WHERE outbox_id = {row} AND status = 'delivered' AND failed_recipients = '{}'",
            deaf(number)
        );
        assert_eq!(scene.sql.count(&message).await, 1, "{number}");
        assert_eq!(scene.told_once(&format!("news {number}")).len(), 2);
    }
}

async fn html_is_said_to_a_group_as_far_as_all_of_it_read_it(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let html = Some(("content_type", "'text/html'"));
    for (group, said, content_type) in [
        ("html.a@fabrikam.example;html.b@fabrikam.example", "<b>news</b> for all", "text/html"),
        ("html.c@fabrikam.example;silent.d@fabrikam.example", "news for all", "text/plain"),
    ] {
        let row = scene.queue(group, "<b>news</b> for all", html).await;
        assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()), "{group}");
        assert_eq!(scene.told_once(said).len(), 2, "{group}");
        assert_eq!(scene.accepted(said)[0].content_type, content_type, "{group}");
        let archived = format!("messages WHERE outbox_id = {row} AND content_type = '{content_type}'");
        assert_eq!(scene.sql.count(&archived).await, 1, "{group}");
    }
}

/// The row has to open the messaging again and to bring somebody back; the program is killed as it asks for the first.
async fn a_group_that_grows_again_while_the_program_is_killed_is_told_once(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    for (number, cut) in
        [FaultKind::Delay { ms: 60_000 }, FaultKind::DelayAfter { ms: 60_000 }].into_iter().enumerate()
    {
        let [begin, news] = ["begin", "news"].map(|text| format!("{text} {number}"));
        let group =
            ["silent.a", "silent.b", "leaves.c"].map(|who| format!("sip:{who}.{number}@fabrikam.example"));
        let first = scene.queue(&group.join(";"), &begin, None).await;
        assert_eq!(scene.outcome(first).await, ("delivered".to_owned(), String::new()), "{cut:?}");
        scene.has_left(&group[2], &begin, 1).await;
        let talk = scene.accepted(&begin).remove(0).conversation;
        let cut = scene.simulator.inject(Fault::new(cut.clone()).on(Operation::AddMessaging)).unwrap();
        scene.simulator.close_messaging(&talk).unwrap();
        let row = scene.queue(&group.join(";"), &news, None).await;
        eventually("the messaging is asked for", async || (scene.simulator.struck(cut) > 0).then_some(()))
            .await;
        let taken = format!("outbox WHERE id = {row} AND state <> 'queued'");
        eventually("the row is taken", async || (scene.sql.count(&taken).await == 1).then_some(())).await;
        scene.relay.server().kill();
        scene.simulator.clear_faults(None);
        scene.restart().await;
        assert_eq!(scene.outcome(row).await, ("delivered".to_owned(), String::new()));
        assert_eq!(scene.told_once(&news).len(), 3);
        assert_eq!(scene.accepted(&news)[0].conversation, talk);
        assert_eq!(scene.sql.count("outbox WHERE possible_duplicate").await, 0);
    }
}

/// The row opens the group's messaging again, before the account does so by itself.
async fn an_answer_into_a_group_whose_messaging_is_closed_is_for_all_of_it(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    let row = scene.queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "news", None).await;
    assert_eq!(scene.outcome(row).await.0, "delivered");
    let talk = scene.accepted("news").remove(0).conversation;
    scene.simulator.close_messaging(&talk).unwrap();
    let conversation =
        scene.sql.rows(&format!("SELECT conversation_id FROM outbox WHERE id = {row}")).await.remove(0);
    let answer = scene.queue("", "an answer", Some(("conversation_id", &conversation))).await;
    assert_eq!(scene.outcome(answer).await, ("delivered".to_owned(), String::new()));
    assert_eq!(scene.told_once("an answer").len(), 2);
}

/// An account of a server that plays conversations of two which do not grow, in the given way.
async fn without_growth(kind: Kind, escalation: Escalation) -> Scene {
    let settings = SimulatorSettings {
        ring_time: Duration::from_secs(2),
        escalation,
        early_event_share: 0.0,
        ..SimulatorSettings::default()
    };
    Scene::begin(kind, settings, &format!("{QUICK}\n")).await
}

impl Scene {
    /// How often the account asked for this.
    fn asked(&self, operation: Operation) -> u64 {
        self.asked_by(ALICE, operation)
    }

    /// As [`Self::asked`], for another account.
    fn asked_by(&self, account: &str, operation: Operation) -> u64 {
        self.simulator
            .requests()
            .iter()
            .filter(|count| count.account.as_deref() == Some(account) && count.operation == operation)
            .map(|count| count.requests)
            .sum()
    }

    /// Whom the server took this text for; it took it once.
    fn told_once(&self, body: &str) -> Vec<String> {
        let mut entries = self.accepted(body);
        assert_eq!(entries.len(), 1, "{body}");
        let mut to = entries.remove(0).to;
        to.sort();
        to
    }
}

async fn a_group_gets_a_meeting_where_conversations_of_two_do_not_grow(kind: Kind) {
    let group = "silent.a@fabrikam.example;declines.b@fabrikam.example;silent.c@fabrikam.example";
    let reached = ["sip:silent.a@fabrikam.example", "sip:silent.c@fabrikam.example"];
    for escalation in [Escalation::Absent, Escalation::Refused, Escalation::Failing] {
        let mut scene = without_growth(kind, escalation).await;
        let first = scene.queue(group, "news", None).await;
        let (state, error) = scene.outcome(first).await;
        assert_eq!(state, "delivered", "{escalation:?}: {error}");
        assert_eq!(scene.told_once("news"), reached, "{escalation:?}");
        eventually(&format!("{escalation:?}: the row names who declined"), async || {
            let query = format!("SELECT coalesce(last_error, '') FROM outbox WHERE id = {first}");
            scene.sql.rows(&query).await.remove(0).starts_with("not reached: sip:declines.b@").then_some(())
        })
        .await;
        assert_eq!(
            scene.asked(Operation::StartMessaging),
            1,
            "{escalation:?}: a conversation of two was tried"
        );
        assert_eq!(scene.asked(Operation::StartOnlineMeeting), 1, "{escalation:?}");
        assert_eq!(scene.sql.count(&format!("outbox_attempts WHERE outbox_id = {first}")).await, 1);

        // What comes next for the same people, or into the conversation, is said in the meeting that is there.
        let again = scene.queue(group, "more news", None).await;
        assert_eq!(scene.outcome(again).await.0, "delivered");
        let conversation =
            scene.sql.rows(&format!("SELECT conversation_id FROM outbox WHERE id = {first}")).await.remove(0);
        let answer = scene.queue("", "an answer", Some(("conversation_id", &conversation))).await;
        assert_eq!(scene.outcome(answer).await.0, "delivered");
        for text in ["more news", "an answer"] {
            assert_eq!(scene.told_once(text), reached, "{escalation:?}: {text}");
        }
        assert_eq!(scene.asked(Operation::StartOnlineMeeting), 1, "{escalation:?}");

        // Another group meets at once.
        let other =
            scene.queue("silent.d@fabrikam.example;silent.e@fabrikam.example", "for others", None).await;
        let (state, error) = scene.outcome(other).await;
        assert_eq!(state, "delivered", "{escalation:?}: {error}");
        assert_eq!(scene.told_once("for others").len(), 2, "{escalation:?}");
        assert_eq!(scene.asked(Operation::StartMessaging), 1, "{escalation:?}: nobody is called first");
        assert_eq!(scene.asked(Operation::StartOnlineMeeting), 2, "{escalation:?}");

        // Nobody comes.
        let nobody =
            scene.queue("declines.f@fabrikam.example;missing.f@fabrikam.example", "to nobody", None).await;
        let (state, error) = scene.outcome(nobody).await;
        assert_eq!(state, "failed", "{escalation:?}");
        let both = error.contains("declines.f@") && error.contains("missing.f@");
        assert!(error.starts_with("nobody could be reached: ") && both, "{escalation:?}: {error}");
        assert!(scene.accepted("to nobody").is_empty());
        // One person is called as ever.
        let alone = scene.queue("silent.g@fabrikam.example", "for one", None).await;
        assert_eq!(scene.outcome(alone).await.0, "delivered");
        assert_eq!(scene.asked(Operation::StartMessaging), 2, "{escalation:?}");
        assert!(scene.relay.server().terminate());
    }
}

/// That the link is missing is believed of the conversation as it can be read, not of what an early event said.
async fn a_conversation_that_cannot_be_read_is_not_given_up_for_a_meeting(kind: Kind) {
    let mut scene = without_growth(kind, Escalation::Absent).await;
    let unreadable = Fault::new(FaultKind::status(500));
    let unreadable = scene.simulator.inject(unreadable.on(Operation::Conversation).times(1000)).unwrap();
    let row = scene.queue("silent.a@fabrikam.example;silent.b@fabrikam.example", "news", None).await;
    eventually("the conversation was asked for in vain, twice", async || {
        (scene.simulator.struck(unreadable) >= 2).then_some(())
    })
    .await;
    assert_eq!(scene.asked(Operation::StartOnlineMeeting), 0);
    scene.simulator.clear_faults(None);
    let (state, error) = scene.outcome(row).await;
    assert_eq!((state.as_str(), error.as_str()), ("delivered", ""));
    assert_eq!(scene.told_once("news").len(), 2);
    assert_eq!(scene.asked(Operation::StartOnlineMeeting), 1);
}

/// Whoever asks for the messaging first, the account for a conference that it hears of or the row for its meeting: it is one.
async fn meetings_of_which_events_only_link_are_told_once(kind: Kind) {
    let settings = SimulatorSettings {
        escalation: Escalation::Absent,
        link_only_share: 1.0,
        ..SimulatorSettings::default()
    };
    let mut scene = Scene::begin(kind, settings, QUICK).await;
    let mut rows = Vec::new();
    for number in 0..6 {
        let group = format!("silent.{number}@fabrikam.example;silent.x{number}@fabrikam.example");
        rows.push(scene.queue(&group, &format!("news {number}"), None).await);
    }
    for (number, row) in rows.iter().enumerate() {
        assert_eq!(scene.outcome(*row).await, ("delivered".to_owned(), String::new()), "{number}");
        assert_eq!(scene.told_once(&format!("news {number}")).len(), 2, "{number}");
    }
    assert_eq!(scene.asked(Operation::StartOnlineMeeting), 6);
    assert_eq!(scene.sql.count("outbox_attempts").await, 6, "each at its first attempt");
}

async fn a_group_is_told_as_far_as_it_goes_where_meetings_are_refused(kind: Kind) {
    let mut scene = without_growth(kind, Escalation::Refused).await;
    let refused = Fault::new(FaultKind::status(403)).on(Operation::StartOnlineMeeting).times(100);
    scene.simulator.inject(refused).unwrap();
    for (first, second) in [("silent.a", "silent.b"), ("silent.c", "silent.d")] {
        let group = format!("{first}@fabrikam.example;{second}@fabrikam.example");
        let row = scene.queue(&group, first, None).await;
        let (state, _) = scene.outcome(row).await;
        assert_eq!(state, "delivered");
        assert_eq!(scene.told_once(first), [format!("sip:{first}@fabrikam.example")]);
        let named = format!("outbox WHERE id = {row} AND last_error LIKE 'not reached: sip:{second}@%'");
        eventually("the row names who is missing", async || {
            (scene.sql.count(&named).await == 1).then_some(())
        })
        .await;
    }
    assert_eq!(scene.asked(Operation::StartOnlineMeeting), 1, "it is not asked again");
}

/// The requests with which a row for three gets its meeting where a conversation of two does not grow, in their order: each
/// with how many of its kind come before it.
static WAY_TO_A_MEETING: [(Operation, u64); 9] = [
    (Operation::StartMessaging, 0),
    (Operation::AddParticipant, 0),
    (Operation::LeaveConversation, 0),
    (Operation::StartOnlineMeeting, 0),
    (Operation::AddMessaging, 0),
    (Operation::AddParticipant, 1),
    (Operation::AddParticipant, 2),
    (Operation::AddParticipant, 3),
    (Operation::SendMessage, 0),
];

/// A row for a group, of an account of its own, with a fault on its way.
struct OnTheWay {
    account: String,
    /// Where it is struck, and its text.
    place: String,
    fault: u64,
    /// The row.
    id: i64,
    /// What is asked of the server until then.
    gone: &'static [(Operation, u64)],
    /// Whether the server has executed the last of it.
    executed: bool,
}

impl OnTheWay {
    /// What is struck.
    fn operation(&self) -> Operation {
        self.gone[self.gone.len() - 1].0
    }
}

impl Scene {
    /// Queues a row for three at each account, and lets one of the faults strike it at one of the requests that it needs:
    /// the first kind before the server executes the request, the second after that.
    async fn queue_on_the_way_to_meetings(&mut self, faults: [FaultKind; 2]) -> Vec<OnTheWay> {
        let mut accounts = self.simulator.account_uris().into_iter();
        let mut rows = Vec::new();
        for (number, (operation, skip)) in WAY_TO_A_MEETING.into_iter().enumerate() {
            for (kind, executed) in faults.iter().zip([false, true]) {
                let account = accounts.next().unwrap();
                let place = format!("{operation:?} {skip} {}", kind.name());
                let fault = Fault::new(kind.clone()).on(operation).skip(skip).account(&account);
                let fault = self.simulator.inject(fault).unwrap();
                let insert = format!(
                    "INSERT INTO outbox (account, recipients, body) VALUES ('{account}',
                     'silent.a@fabrikam.example;silent.b@fabrikam.example;silent.c@fabrikam.example', '{place}') RETURNING id"
                );
                let id = self.sql.rows(&insert).await[0].parse().unwrap();
                rows.push(OnTheWay {
                    account,
                    place,
                    fault,
                    executed,
                    id,
                    gone: &WAY_TO_A_MEETING[..=number],
                });
            }
        }
        rows
    }
}

/// Accounts of a server whose conversations of two do not grow: one for each cut.
async fn on_the_way_to_meetings(kind: Kind) -> Scene {
    let settings = SimulatorSettings {
        accounts: 2 * WAY_TO_A_MEETING.len(),
        escalation: Escalation::Refused,
        early_event_share: 0.0,
        // A meeting that is not known by its invitation at once gets its messaging as any other: then the row asks for none.
        link_only_share: 0.0,
        ..SimulatorSettings::default()
    };
    let simulator = Simulator::start(settings).await.unwrap();
    let accounts = simulator.account_uris().into_iter().map(|account| {
        format!("\n[[accounts]]\nsip_uri = \"{account}\"\npassword = {{ file = \"password\" }}\n")
    });
    let configuration = iter::once(QUICK.to_owned()).chain(accounts).collect::<String>();
    let mut relay = Relay::configure_on_for(kind, &simulator.discovery_url(), &configuration).await;
    std::fs::write(relay.folder.path().join("password"), "simulated").unwrap();
    relay.tool_ok(&["migrate"]);
    relay.start();
    let sql = relay.connect().await;
    let mut scene = Scene { simulator, relay, sql };
    scene.all_online().await;
    scene
}

impl Scene {
    /// The rows were told to all three, once each, and `asked` gives all that was asked of the server for each of them:
    /// nobody is called or invited oftener.
    async fn told_each_once(&mut self, rows: &[OnTheWay], asked: impl Fn(&OnTheWay) -> Vec<Operation>) {
        for row in rows {
            let place = &row.place;
            let (state, error) = self.outcome(row.id).await;
            assert_eq!((state.as_str(), error.as_str()), ("delivered", ""), "{place}");
            let all = ["a", "b", "c"].map(|name| format!("sip:silent.{name}@fabrikam.example"));
            assert_eq!(self.told_once(place), all, "{place}");
            let asked = asked(row);
            for operation in [
                Operation::StartMessaging,
                Operation::AddParticipant,
                Operation::LeaveConversation,
                Operation::StartOnlineMeeting,
                Operation::SendMessage,
            ] {
                let expected = asked.iter().filter(|known| **known == operation).count();
                assert_eq!(self.asked_by(&row.account, operation), expected as u64, "{place}: {operation:?}");
            }
        }
        let doubtful = self.sql.count("outbox WHERE possible_duplicate").await;
        assert_eq!(doubtful, 0, "nothing was sent again that may have arrived");
    }
}

async fn a_meeting_whose_account_is_killed_at_any_point_is_told_once(kind: Kind) {
    let mut scene = on_the_way_to_meetings(kind).await;
    let rows = scene
        .queue_on_the_way_to_meetings([FaultKind::Delay { ms: 60_000 }, FaultKind::DelayAfter { ms: 60_000 }])
        .await;
    eventually_none(PATIENCE, "rows whose request is not made", async || {
        rows.iter()
            .filter(|row| scene.simulator.struck(row.fault) == 0)
            .map(|row| row.place.clone())
            .collect()
    })
    .await;
    scene.relay.server().kill();
    scene.simulator.clear_faults(None);
    scene.relay.start();
    scene
        .told_each_once(&rows, |row| {
            let told = row.operation() == Operation::SendMessage && row.executed;
            // Where nothing told of the text, all is done anew.
            let anew: &[_] = if told { &[] } else { &WAY_TO_A_MEETING };
            row.gone.iter().chain(anew).map(|(operation, _)| *operation).collect()
        })
        .await;
}

async fn a_meeting_whose_requests_are_cut_off_is_told_once(kind: Kind) {
    let mut scene = on_the_way_to_meetings(kind).await;
    let rows = scene.queue_on_the_way_to_meetings([FaultKind::CutBefore, FaultKind::CutAfter]).await;
    scene
        .told_each_once(&rows, |row| {
            // No event tells that a talk of two can't grow, nor is one waited for that tells of leaving it.
            let untold = row.gone.len() == 2 || row.operation() == Operation::LeaveConversation;
            let again = (untold || !row.executed).then(|| row.operation());
            WAY_TO_A_MEETING.iter().map(|(operation, _)| *operation).chain(again).collect()
        })
        .await;
    for row in &rows {
        let again = row.operation() == Operation::AddMessaging && !row.executed;
        let asked = scene.asked_by(&row.account, Operation::AddMessaging);
        assert_eq!(asked, 1 + u64::from(again), "{}: only the row adds the messaging", row.place);
    }
}

async fn a_talk_of_two_that_could_not_be_left_is_not_gone_on_with(kind: Kind) {
    let mut scene = on_the_way_to_meetings(kind).await;
    let accounts = scene.simulator.account_uris();
    for account in &accounts {
        // The relay asks once more.
        let stays =
            Fault::new(FaultKind::status(503)).on(Operation::LeaveConversation).times(2).account(account);
        scene.simulator.inject(stays).unwrap();
    }
    // Both are of one thread and with the same people: the talk, and the meeting that took its place.
    for text in ["first", "second"] {
        let rows = scene
            .sql
            .rows(&format!(
                "INSERT INTO outbox (account, recipients, body, thread_id)
                 SELECT sip_uri, 'silent.a@fabrikam.example;silent.b@fabrikam.example', '{text} ' || sip_uri, 'thread'
                   FROM accounts
                 RETURNING id"
            ))
            .await;
        assert_eq!(rows.len(), accounts.len());
        for id in rows {
            let (state, error) = scene.outcome(id.parse().unwrap()).await;
            assert_eq!((state.as_str(), error.as_str()), ("delivered", ""), "{text}");
        }
        for account in &accounts {
            assert_eq!(scene.told_once(&format!("{text} {account}")).len(), 2, "{account}: {text}");
            assert_eq!(scene.asked_by(account, Operation::StartOnlineMeeting), 1, "{account}: {text}");
            assert_eq!(scene.asked_by(account, Operation::LeaveConversation), 2, "{account}: {text}");
        }
    }
}

/// How many of a rate of so many a second may have left within so long: a second's worth at once, then evenly.
fn allowed(rate: f64, since: Duration) -> f64 {
    rate + rate * since.as_secs_f64()
}

async fn an_account_sends_no_faster_than_its_rate_allows(kind: Kind) {
    const RATE: u8 = 5;
    const ROWS: u8 = 25;
    let configuration = format!("[outbox]\nper_account_rate = {RATE}\n");
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), &configuration).await;
    // Each to somebody else, so that nothing but the rate holds any of them back.
    let rows: Vec<String> = (0..ROWS)
        .map(|number| format!("('{ALICE}', 'sip:silent.{number}@fabrikam.example', 'news for {number}')"))
        .collect();
    let begun = Timestamp::now();
    let insert = format!("INSERT INTO outbox (account, recipients, body) VALUES {}", rows.join(", "));
    scene.sql.run(&insert).await.unwrap();
    eventually("every row is delivered", async || {
        (scene.sql.count("outbox WHERE state = 'delivered'").await == i64::from(ROWS)).then_some(())
    })
    .await;
    let mut accepted: Vec<Timestamp> =
        scene.simulator.ledger().outgoing.iter().map(|entry| entry.time).collect();
    accepted.sort();
    assert_eq!(accepted.len(), usize::from(ROWS));
    // Whatever delays a request makes it later, so this bound holds on any machine. The ledger counts in milliseconds.
    for (sent, at) in (1_u8..).zip(&accepted) {
        let since =
            Duration::try_from(at.duration_since(begun)).unwrap_or_default() + Duration::from_millis(1);
        assert!(f64::from(sent) <= allowed(f64::from(RATE), since), "{sent} were accepted within {since:?}");
    }
}

async fn who_keeps_us_waiting_or_declines_holds_back_only_themselves(kind: Kind) {
    // Nobody who is absent, and nothing that waits for another attempt, comes to an end while this test runs.
    let settings = SimulatorSettings { ring_time: Duration::from_secs(3600), ..SimulatorSettings::default() };
    let configuration = "[outbox]\nretry_base = \"1h\"\nretry_max = \"1h\"\n";
    let mut scene = Scene::begin(kind, settings, configuration).await;
    // The call of who is slow is not carried out while the others are written to.
    let late = Fault::new(FaultKind::Delay { ms: 3_600_000 }).on(Operation::StartMessaging).account(ALICE);
    let late = scene.simulator.inject(late).unwrap();
    let mut waiting = vec![("slow", scene.queue("sip:silent.slow@fabrikam.example", "first", None).await)];
    eventually("the call of who is slow is out", async || (scene.simulator.struck(late) == 1).then_some(()))
        .await;
    for (name, recipient) in
        [("absent", "sip:absent.a@fabrikam.example"), ("unreachable", "sip:unreachable.a@fabrikam.example")]
    {
        waiting.push((name, scene.queue(recipient, "first", None).await));
    }
    let declined = scene.queue("sip:declines.a@fabrikam.example", "first", None).await;
    let after_declined = scene.queue("sip:declines.a@fabrikam.example", "second", None).await;
    eventually("who is unreachable has been tried", async || {
        let tried = "outbox WHERE last_subcode = 'Unreachable' AND state = 'queued' AND attempts = 1";
        (scene.sql.count(tried).await == 1).then_some(())
    })
    .await;

    let good = scene.queue("sip:silent.good@fabrikam.example", "hello", None).await;
    assert_eq!(scene.outcome(good).await.0, "delivered");
    for id in [declined, after_declined] {
        let (state, error) = scene.outcome(id).await;
        assert_eq!(state, "failed", "{error}");
    }
    for (name, id) in waiting {
        let open = format!("outbox WHERE id = {id} AND state IN ('queued', 'sending', 'sent')");
        assert_eq!(scene.sql.count(&open).await, 1, "who is {name} keeps us waiting");
    }
}

/// The call of a row in HTML carries no text: how it ended is known from its events alone, and these only link.
async fn a_call_that_failed_by_events_that_only_link_is_tried_again(kind: Kind) {
    let settings = SimulatorSettings {
        ring_time: Duration::from_millis(300),
        link_only_share: 1.0,
        ..SimulatorSettings::default()
    };
    let mut scene = Scene::begin(kind, settings, "[outbox]\nretry_base = \"1h\"\nretry_max = \"1h\"\n").await;
    // The call is over before anybody could read what its first event linked.
    let late = Fault::new(FaultKind::Delay { ms: 1500 }).on(Operation::Invitation).account(ALICE);
    scene.simulator.inject(late).unwrap();
    let id = scene
        .queue("sip:absent.a@fabrikam.example", "<b>hello</b>", Some(("content_type", "'text/html'")))
        .await;
    let row = eventually("the call has failed", async || {
        let ended = format!(
            "SELECT state, attempts, last_subcode FROM outbox WHERE id = {id} AND state NOT IN ('sending', 'sent')
                AND attempts > 0"
        );
        scene.sql.rows(&ended).await.pop()
    })
    .await;
    assert_eq!(row, "queued|1|Timeout");
}

async fn html_is_said_in_plain_text_to_who_reads_no_other(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), "").await;
    let html = "<p>All is <b>well</b> &amp; good</p>";
    // The first row makes the call, and the second is said in the conversation that is open.
    for (row, plain) in [(html, "All is well & good"), ("<i>still</i> so", "still so")] {
        let id = scene
            .queue("sip:silent.reader@fabrikam.example", row, Some(("content_type", "'text/html'")))
            .await;
        let (state, error) = scene.outcome(id).await;
        assert_eq!(state, "delivered", "{error}");
        let entries = scene.accepted(plain);
        assert_eq!(entries.len(), 1, "{:?}", scene.simulator.ledger().outgoing);
        assert_eq!(entries[0].content_type.split(';').next(), Some("text/plain"));
        eventually("the archive has it as it was said", async || {
            let said = format!(
                "messages WHERE outbox_id = {id} AND body = '{plain}' AND body_html IS NULL AND content_type = 'text/plain'"
            );
            (scene.sql.count(&said).await == 1).then_some(())
        })
        .await;
        // The queue keeps what was asked for.
        assert_eq!(scene.sql.rows(&format!("SELECT body FROM outbox WHERE id = {id}")).await, [row]);
    }
}

async fn html_arrives_byte_for_byte_with_who_reads_it(kind: Kind) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), "").await;
    let html = "<!-- as it is -->\r\n<P style='color:red' >5 &lt; 6 &amp;amp; \u{1F600} e\u{301} \u{a0}&nbsp;\t<br>\n<unknown/>it's  </p>\n ";
    // The first row makes the call, and the second is said in the conversation that is open.
    for round in ["first", "second"] {
        let body = html.replace("as it is", round);
        let literal = body.replace('\'', "''");
        let id = scene
            .queue("html.reader@fabrikam.example", &literal, Some(("content_type", "'text/html'")))
            .await;
        let (state, error) = scene.outcome(id).await;
        assert_eq!(state, "delivered", "{error}");
        let entries = scene.accepted(&body);
        assert_eq!(entries.len(), 1, "{:?}", scene.simulator.ledger().outgoing);
        assert_eq!(entries[0].content_type.split(';').next(), Some("text/html"));
        eventually("the archive has it as it was said", async || {
            (scene.sql.count(&format!("messages WHERE outbox_id = {id} AND body_html = '{literal}'")).await
                == 1)
                .then_some(())
        })
        .await;
    }
}

async fn whoever_sends_with_wait_sees_the_row_to_its_end(kind: Kind) {
    let scene = Scene::begin(kind, SimulatorSettings::default(), "").await;
    let send = |to: &str, more: &[&str]| {
        let to = format!("{to}@fabrikam.example");
        scene.relay.tool(&[&["send", "--from", ALICE, "--to", &to, "--wait", "hello"], more].concat())
    };
    let followed = send("silent.a", &[]);
    let told = String::from_utf8(followed.stdout).unwrap();
    assert!(followed.status.success(), "{}", String::from_utf8_lossy(&followed.stderr));
    assert!(told.lines().last().unwrap().ends_with("is delivered"), "{told}");

    let followed = send("silent.b", &["--format", "json"]);
    let told = String::from_utf8(followed.stdout).unwrap();
    assert!(followed.status.success(), "{}", String::from_utf8_lossy(&followed.stderr));
    let states: Vec<String> = told
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["state"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(states.last().map(String::as_str), Some("delivered"), "{states:?}");

    // Who declines is told in the server's words, and by the exit code.
    let refused = send("declines.a", &[]);
    assert_eq!(refused.status.code(), Some(1));
    let words = String::from_utf8(refused.stderr).unwrap();
    assert!(words.contains("is failed: the recipient declined"), "{words}");
}

/// Where a send is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    /// Killed after the claim is committed, while the request has not been carried out.
    KilledBeforeTheRequest,
    /// Killed when the server has carried the request out and not answered.
    KilledBeforeTheAnswer,
    /// Killed when the answer and the event have come, and the database takes neither.
    KilledBeforeTheCommit,
    /// The database is away while the answer and the event come, and is back.
    DatabaseAway,
    /// The connection ends before the server has carried it out.
    ConnectionLostBefore,
    /// The connection ends when the server has carried it out.
    ConnectionLostAfter,
    /// The event comes before the answer.
    EventFirst,
    /// Killed when the server has carried it out, and the application is gone; the conversation's log tells.
    ApplicationGoneAndLogged,
    /// As before, without a log.
    ApplicationGone,
}

impl Cut {
    const ALL: [Self; 9] = [
        Self::KilledBeforeTheRequest,
        Self::KilledBeforeTheAnswer,
        Self::KilledBeforeTheCommit,
        Self::DatabaseAway,
        Self::ConnectionLostBefore,
        Self::ConnectionLostAfter,
        Self::EventFirst,
        Self::ApplicationGoneAndLogged,
        Self::ApplicationGone,
    ];

    fn fault(self) -> Option<FaultKind> {
        match self {
            Self::KilledBeforeTheRequest => Some(FaultKind::Delay { ms: 60_000 }),
            Self::KilledBeforeTheAnswer | Self::ApplicationGone | Self::ApplicationGoneAndLogged => {
                Some(FaultKind::DelayAfter { ms: 60_000 })
            }
            Self::KilledBeforeTheCommit | Self::DatabaseAway => Some(FaultKind::DelayAfter { ms: 1000 }),
            Self::ConnectionLostBefore => Some(FaultKind::CutBefore),
            Self::ConnectionLostAfter => Some(FaultKind::CutAfter),
            Self::EventFirst => None,
        }
    }
}

impl Scene {
    async fn all_online(&mut self) {
        let query = "SELECT account FROM account_overview WHERE state = 'online'";
        let accounts = self.simulator.account_uris().len();
        eventually("every account is online", async || {
            (self.sql.rows(query).await.len() == accounts).then_some(())
        })
        .await;
    }

    async fn restart(&mut self) {
        self.relay.start();
        self.relay.account_state(ALICE, "online").await;
    }

    async fn until_accepted(&self, body: &str) {
        eventually(&format!("the server has {body}"), async || {
            (!self.accepted(body).is_empty()).then_some(())
        })
        .await;
    }

    /// Takes the database away from everybody else, until [`Sql::run`] says `COMMIT`.
    async fn lock(&self, kind: Kind) -> Sql {
        let mut other = self.relay.connect().await;
        match kind {
            Kind::Sqlite => other.run("BEGIN IMMEDIATE").await.unwrap(),
            Kind::Postgres => {
                other.run("BEGIN").await.unwrap();
                other.run("LOCK TABLE outbox, messages IN EXCLUSIVE MODE").await.unwrap()
            }
        };
        other
    }

    /// Sends one row through a cut; gives its id.
    async fn send_through(&mut self, cut: Cut, operation: Operation, kind: Kind, text: Text) -> i64 {
        let reader = if text == Text::Html { "html" } else { "silent" };
        let recipient = format!("{reader}.{cut:?}.{operation:?}@fabrikam.example").to_lowercase();
        let body = text.body(operation, cut);
        let logged = cut == Cut::ApplicationGoneAndLogged;
        self.simulator.change_settings(SettingsChange {
            early_event_share: Some(if cut == Cut::EventFirst { 1.0 } else { 0.0 }),
            conversation_logs: Some(logged),
            log_delay_ms: Some(10),
            ..SettingsChange::default()
        });
        if operation == Operation::SendMessage {
            let opener = self.queue(&recipient, "opener", None).await;
            assert_eq!(self.outcome(opener).await.0, "delivered", "{body}");
        }
        let fault = cut
            .fault()
            .map(|fault| self.simulator.inject(Fault::new(fault).on(operation).account(ALICE)).unwrap());
        if matches!(cut, Cut::ApplicationGone | Cut::ApplicationGoneAndLogged) {
            // No event of it comes while the application is there.
            let delay = Fault::new(FaultKind::Delay { ms: 60_000 }).on(Operation::Events).account(ALICE);
            let silence = self.simulator.inject(delay).unwrap();
            eventually("the channel is silent", async || (self.simulator.struck(silence) > 0).then_some(()))
                .await;
        }
        let content_type = format!("'{}'", text.content_type());
        let id = self.queue(&recipient, &body, Some(("content_type", &content_type))).await;
        match cut {
            Cut::KilledBeforeTheRequest => {
                let fault = fault.unwrap();
                eventually("the request waits", async || (self.simulator.struck(fault) > 0).then_some(()))
                    .await;
                self.relay.server().kill();
                self.restart().await;
            }
            Cut::KilledBeforeTheAnswer => {
                self.until_accepted(&body).await;
                self.relay.server().kill();
                self.restart().await;
            }
            Cut::KilledBeforeTheCommit | Cut::DatabaseAway => {
                self.until_accepted(&body).await;
                let mut lock = self.lock(kind).await;
                eventually("the recipient has it", async || {
                    let settled = |entry: &OutgoingEntry| entry.state != OutgoingState::Accepted;
                    self.accepted(&body).iter().any(settled).then_some(())
                })
                .await;
                if cut == Cut::KilledBeforeTheCommit {
                    self.relay.server().kill();
                }
                lock.run("COMMIT").await.unwrap();
                if cut == Cut::KilledBeforeTheCommit {
                    self.restart().await;
                }
            }
            Cut::ApplicationGone | Cut::ApplicationGoneAndLogged => {
                self.until_accepted(&body).await;
                self.relay.server().kill();
                let talk = self.accepted(&body)[0].conversation.clone();
                eventually("the recipient has it", async || {
                    self.accepted(&body)
                        .iter()
                        .any(|entry| entry.state != OutgoingState::Accepted)
                        .then_some(())
                })
                .await;
                let logs = || self.simulator.conversation_logs(ALICE).unwrap().len();
                let before = logs();
                self.simulator.leave(&talk).unwrap();
                if logged {
                    eventually("the talk is logged", async || (logs() > before).then_some(())).await;
                }
                self.simulator.forget_application(ALICE).unwrap();
                self.restart().await;
            }
            Cut::ConnectionLostBefore | Cut::ConnectionLostAfter | Cut::EventFirst => {}
        }
        id
    }
}

/// What is cut.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Text {
    Plain,
    Html,
}

impl Text {
    fn content_type(self) -> &'static str {
        match self {
            Self::Plain => "text/plain",
            Self::Html => "text/html",
        }
    }

    fn body(self, operation: Operation, cut: Cut) -> String {
        match self {
            Self::Plain => format!("{operation:?} {cut:?}"),
            Self::Html => format!("<p>{operation:?} <b>{cut:?}</b></p>"),
        }
    }
}

async fn cuts_through(operation: Operation, kind: Kind, text: Text) {
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), QUICK).await;
    for cut in Cut::ALL {
        let id = scene.send_through(cut, operation, kind, text).await;
        let place = Text::Plain.body(operation, cut);
        let expected = if cut == Cut::ApplicationGone { "uncertain" } else { "delivered" };
        eventually(&format!("{place}: {expected}"), async || {
            let (state, error) = scene.outcome(id).await;
            // A log is read after nobody could tell.
            let may_change = cut == Cut::ApplicationGoneAndLogged && state == "uncertain";
            assert!(state == expected || may_change, "{place}: {state}: {error}");
            (state == expected).then_some(())
        })
        .await;
        let accepted = scene.accepted(&text.body(operation, cut));
        assert_eq!(accepted.len(), 1, "{place}: the server took it once");
        assert_eq!(accepted[0].content_type.split(';').next(), Some(text.content_type()), "{place}");
        let archived = scene.sql.count(&format!("messages WHERE body = '{place}'")).await;
        assert_eq!(archived, i64::from(expected == "delivered"), "{place}");
        scene.simulator.clear_faults(None);
    }
    let doubtful = scene.sql.count("outbox WHERE possible_duplicate").await;
    assert_eq!(doubtful, 0, "nothing was sent again that may have arrived");
}

async fn a_call_that_is_cut_at_any_point_is_made_once(kind: Kind) {
    cuts_through(Operation::StartMessaging, kind, Text::Plain).await;
}

async fn a_message_that_is_cut_at_any_point_is_sent_once(kind: Kind) {
    cuts_through(Operation::SendMessage, kind, Text::Plain).await;
}

async fn html_that_is_cut_at_any_point_is_sent_once(kind: Kind) {
    cuts_through(Operation::SendMessage, kind, Text::Html).await;
}

async fn a_row_that_waits_while_the_stream_is_lost_is_sent_once_and_not_marked(kind: Kind) {
    let configuration = QUICK.replace("[outbox]", "[outbox]\nuncertain = \"retry\"");
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), &configuration).await;
    // While it is read what the server still has, rows are claimed and not begun.
    let slow = Fault::new(FaultKind::Delay { ms: 20_000 }).on(Operation::Conversations).account(ALICE);
    let slow = scene.simulator.inject(slow).unwrap();
    let lost =
        || Fault::new(FaultKind::Resume { lose_conversations: false }).on(Operation::Events).account(ALICE);
    scene.simulator.inject(lost()).unwrap();
    eventually("what is open is being read", async || (scene.simulator.struck(slow) == 1).then_some(()))
        .await;
    let id = scene.queue("silent.waits@fabrikam.example", "hello", None).await;
    eventually("the row is claimed", async || {
        (scene.sql.count(&format!("outbox WHERE id = {id} AND state = 'sending'")).await == 1).then_some(())
    })
    .await;
    scene.simulator.inject(lost()).unwrap();
    assert_eq!(scene.outcome(id).await.0, "delivered");
    assert_eq!(scene.sql.count("coverage_gaps").await, 2, "the stream was lost twice");
    assert_eq!(scene.accepted("hello").len(), 1);
    assert_eq!(scene.sql.count("outbox WHERE possible_duplicate").await, 0, "nothing had left");
    let attempts = format!("SELECT attempt, outcome FROM outbox_attempts WHERE outbox_id = {id}");
    assert_eq!(scene.sql.rows(&attempts).await, ["1|delivered"]);
}

async fn what_nobody_can_tell_of_is_sent_again_and_marked_where_that_is_wanted(kind: Kind) {
    let configuration = QUICK.replace("[outbox]", "[outbox]\nuncertain = \"retry\"");
    let mut scene = Scene::begin(kind, SimulatorSettings::default(), &configuration).await;
    let id = scene.send_through(Cut::ApplicationGone, Operation::StartMessaging, kind, Text::Plain).await;
    assert_eq!(scene.outcome(id).await.0, "delivered");
    let body = format!("{:?} {:?}", Operation::StartMessaging, Cut::ApplicationGone);
    assert_eq!(scene.accepted(&body).len(), 2, "the risk that was taken");
    assert_eq!(scene.sql.count(&format!("outbox WHERE id = {id} AND possible_duplicate")).await, 1);
    assert_eq!(
        scene
            .sql
            .rows(&format!("SELECT outcome FROM outbox_attempts WHERE outbox_id = {id} ORDER BY id"))
            .await,
        ["uncertain", "delivered"]
    );
}

on_both_databases!(
    "multi_thread":
    every_transition_leads_where_the_documentation_says,
    a_call_that_is_cut_at_any_point_is_made_once,
    a_message_that_is_cut_at_any_point_is_sent_once,
    html_that_is_cut_at_any_point_is_sent_once,
    html_arrives_byte_for_byte_with_who_reads_it,
    a_conversation_that_cannot_be_read_is_not_given_up_for_a_meeting,
    who_does_not_answer_in_time_does_not_hold_up_the_rest_of_a_group,
    what_nobody_can_tell_of_is_sent_again_and_marked_where_that_is_wanted,
    a_group_is_told_whoever_of_it_can_be_reached,
    who_could_not_be_reached_is_named_though_the_answer_is_lost,
    what_is_for_one_is_not_said_in_a_talk_that_has_grown,
    a_call_that_the_server_lost_track_of_is_made_again,
    an_answer_into_a_group_whose_messaging_is_closed_is_for_all_of_it,
    a_row_whose_time_passes_while_its_call_rings_is_not_said,
    whoever_is_invited_while_the_server_is_busy_is_invited_again,
    whoever_is_invited_to_a_meeting_that_is_gone_is_invited_again,
    a_group_is_found_again,
    meetings_of_which_events_only_link_are_told_once,
    who_did_not_get_a_message_is_named_though_the_report_comes_before_the_answer,
    html_is_said_to_a_group_as_far_as_all_of_it_read_it,
    a_group_that_grows_again_while_the_program_is_killed_is_told_once,
    a_call_that_is_given_up_is_withdrawn,
    the_longest_idle_conversation_makes_room_for_a_new_one,
    a_message_that_was_not_delivered_for_now_is_sent_again,
    whoever_has_left_a_group_is_invited_again,
    whoever_could_not_come_for_now_is_invited_again_later,
    a_group_that_nobody_joins_waits_as_long_as_the_server_wants,
    a_group_gets_a_meeting_where_conversations_of_two_do_not_grow,
    a_talk_of_two_that_could_not_be_left_is_not_gone_on_with,
    a_group_is_told_as_far_as_it_goes_where_meetings_are_refused,
    a_meeting_whose_account_is_killed_at_any_point_is_told_once,
    a_meeting_whose_requests_are_cut_off_is_told_once,
    an_account_sends_no_faster_than_its_rate_allows,
    who_keeps_us_waiting_or_declines_holds_back_only_themselves,
    a_call_that_failed_by_events_that_only_link_is_tried_again,
    html_is_said_in_plain_text_to_who_reads_no_other,
    whoever_sends_with_wait_sees_the_row_to_its_end,
    finished_rows_are_removed_after_their_time_with_their_attempts,
    a_running_server_removes_what_is_over,
    a_row_whose_time_passes_while_it_waits_for_the_rate_is_not_sent,
    a_row_that_waits_for_the_rate_is_still_its_users,
    a_server_that_stops_leaves_the_rest_of_what_is_over_to_the_next_start,
    an_uncertain_row_is_kept_until_somebody_decides,
    a_failed_row_is_retried_by_command_and_its_story_is_told_in_order,
    held_rows_are_left_alone_until_they_are_released_by_command_or_by_update,
    a_cancel_and_a_claim_of_one_row_exclude_each_other,
    waiting_rows_have_a_shape_by_age_and_destination,
    very_many_rows_whose_time_passes_at_once_expire_a_few_at_a_time_and_hold_up_nobody,
    what_had_not_begun_when_the_stream_was_lost_is_no_possible_duplicate,
    a_row_that_waits_while_the_stream_is_lost_is_sent_once_and_not_marked,
    a_row_that_names_an_ended_conversation_and_people_has_its_turn_among_the_rows_for_them,
    a_row_whose_conversation_ends_while_it_waits_does_not_overtake,
    rows_of_an_account_that_is_not_at_work_stay_queued_and_the_status_says_why,
);
