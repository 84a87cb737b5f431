//! Messages by the minute, kept up as they come.
//!
//! The whole of the last day is counted once, in bites, newest first; after that only what has been archived since. So the
//! drawing costs the same whatever the archive's size, and survives a restart, since the archive is what is counted. A
//! message that is archived late counts for the minute in which it was sent.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::{
    identifiers::MessageId,
    store::{MinuteCount, Store, StoreError},
};

/// Messages counted by one statement.
const BITE: i64 = 50_000;
/// Statements of one call.
const BITES: usize = 10;
/// How far back is drawn.
const DRAWN: SignedDuration = SignedDuration::from_hours(24);
/// A message is archived soon after it was sent, by another clock than ours.
const MARGIN: SignedDuration = SignedDuration::from_mins(10);

/// From others to accounts, and from accounts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Flow {
    pub(super) incoming: i64,
    pub(super) outgoing: i64,
}

/// What has been counted so far: messages with an id larger than `oldest`, up to `newest`.
#[derive(Debug, Default)]
pub(in crate::admin) struct Pulse {
    counted: Option<Counted>,
    /// All that is drawn has been counted.
    whole: bool,
    minutes: BTreeMap<i64, Flow>,
}

#[derive(Debug, Clone, Copy)]
struct Counted {
    oldest: MessageId,
    newest: MessageId,
    /// Those up to here were archived before what is drawn.
    begin: MessageId,
}

fn minute(at: Timestamp) -> i64 {
    at.as_second().div_euclid(60)
}

impl Pulse {
    /// Counts what has come since the last call and, at first, what there was; a call does no more than [`BITES`] bites.
    /// What was counted stays if the database fails half way.
    pub(super) async fn follow(&mut self, store: &dyn Store, now: Timestamp) -> Result<(), StoreError> {
        let newest = store.newest_message().await?.unwrap_or(MessageId(0));
        let mut counted = if let Some(counted) = self.counted {
            counted
        } else {
            let since = now.saturating_sub(DRAWN + MARGIN).unwrap_or(Timestamp::MIN);
            Counted { oldest: newest, newest, begin: archived_before(store, since, newest).await? }
        };
        for _ in 0..BITES {
            let (after, to) = if counted.newest < newest {
                (counted.newest, MessageId(newest.0.min(counted.newest.0 + BITE)))
            } else if counted.oldest > counted.begin {
                (MessageId(counted.begin.0.max(counted.oldest.0 - BITE)), counted.oldest)
            } else {
                break;
            };
            for MinuteCount { minute, incoming, outgoing } in store.minute_counts(after, to).await? {
                let flow = self.minutes.entry(minute).or_default();
                flow.incoming += incoming;
                flow.outgoing += outgoing;
            }
            counted.newest = counted.newest.max(to);
            counted.oldest = counted.oldest.min(after);
            self.counted = Some(counted);
        }
        self.counted = Some(counted);
        self.whole = counted.newest >= newest && counted.oldest <= counted.begin;
        let first = minute(now) - DRAWN.as_mins();
        self.minutes.retain(|minute, _| *minute >= first);
        Ok(())
    }

    /// Whether all that is drawn has been counted.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// The last `count` stretches of `minutes` each, oldest first; the last one is not over yet.
    pub(super) fn stretches(&self, now: Timestamp, count: usize, minutes: i64) -> Vec<Flow> {
        let last = minute(now).div_euclid(minutes);
        let mut flows = vec![Flow::default(); count];
        for (&minute, flow) in &self.minutes {
            let back = last - minute.div_euclid(minutes);
            // A server's clock may be a little ahead of ours.
            let back = if (-1..0).contains(&back) { 0 } else { back };
            if let Some(place) = usize::try_from(back).ok().and_then(|back| count.checked_sub(back + 1)) {
                flows[place].incoming += flow.incoming;
                flows[place].outgoing += flow.outgoing;
            }
        }
        flows
    }
}

/// The largest id of which all up to it were archived before `since`: ids ascend in the order of archiving.
async fn archived_before(
    store: &dyn Store,
    since: Timestamp,
    newest: MessageId,
) -> Result<MessageId, StoreError> {
    let (mut before, mut after) = (0, newest.0);
    while before < after {
        let middle = before + (after - before) / 2;
        match store.message_from(MessageId(middle + 1)).await? {
            Some((id, archived_at)) if archived_at < since => before = id.0.min(newest.0),
            _ => after = middle,
        }
    }
    Ok(MessageId(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_are_gathered_into_stretches_that_end_now() {
        let now: Timestamp = "2026-03-01T12:07:30Z".parse().unwrap();
        let this = minute(now);
        let mut pulse = Pulse::default();
        for (back, incoming, outgoing) in
            [(0, 1, 0), (1, 0, 2), (59, 4, 0), (60, 8, 0), (-1, 16, 0), (-5, 32, 0)]
        {
            pulse.minutes.insert(this - back, Flow { incoming, outgoing });
        }
        let hour = pulse.stretches(now, 60, 1);
        assert_eq!(hour[59], Flow { incoming: 17, outgoing: 0 });
        assert_eq!(hour[58], Flow { incoming: 0, outgoing: 2 });
        assert_eq!(hour[0], Flow { incoming: 4, outgoing: 0 });
        let quarters = pulse.stretches(now, 96, 15);
        assert_eq!(quarters[95], Flow { incoming: 49, outgoing: 2 });
        assert_eq!(quarters.iter().map(|flow| flow.incoming).sum::<i64>(), 61);
    }
}
