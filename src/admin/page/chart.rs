//! Drawings: shapes with their places, which templates write as SVG. Colours are the style sheet's.

use jiff::{SignedDuration, Timestamp};

use super::{When, in_words, pulse::Flow};
use crate::store::Stretch;

/// Height of either half of a chart of messages.
const HALF: i64 = 48;
/// Width of one bar with its gap.
const STEP: usize = 10;
/// Width of a timeline.
const WIDTH: i64 = 1000;

/// A bar of a chart.
pub(super) struct Bar {
    pub(super) x: usize,
    pub(super) y: i64,
    pub(super) height: i64,
    pub(super) kind: &'static str,
}

/// Messages in and out over time: incoming ones above the line, outgoing ones below.
pub(super) struct FlowChart {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) bars: Vec<Bar>,
    pub(super) width: usize,
    pub(super) incoming: i64,
    pub(super) outgoing: i64,
    /// Most messages of one bar in one direction.
    pub(super) peak: i64,
    /// What a bar stands for.
    pub(super) each: &'static str,
    pub(super) from: &'static str,
}

impl FlowChart {
    pub(super) fn new(
        id: &'static str,
        title: &'static str,
        each: &'static str,
        from: &'static str,
        flows: &[Flow],
    ) -> Self {
        let peak = flows.iter().flat_map(|flow| [flow.incoming, flow.outgoing]).max().unwrap_or(0);
        // What there is can be seen, however high the peak.
        let height = |count: i64| if count == 0 { 0 } else { (count * HALF / peak.max(1)).max(2) };
        let mut bars = Vec::new();
        for (number, flow) in flows.iter().enumerate() {
            let x = number * STEP;
            let (up, down) = (height(flow.incoming), height(flow.outgoing));
            if up > 0 {
                bars.push(Bar { x, y: HALF - up, height: up, kind: "in" });
            }
            if down > 0 {
                bars.push(Bar { x, y: HALF + 2, height: down, kind: "out" });
            }
        }
        Self {
            id,
            title,
            bars,
            width: flows.len() * STEP,
            incoming: flows.iter().map(|flow| flow.incoming).sum(),
            outgoing: flows.iter().map(|flow| flow.outgoing).sum(),
            peak,
            each,
            from,
        }
    }
}

/// A piece of a timeline.
pub(super) struct Piece {
    pub(super) x: i64,
    pub(super) width: i64,
    pub(super) kind: &'static str,
    pub(super) title: String,
}

/// When an account was followed.
pub(super) struct Timeline {
    pub(super) pieces: Vec<Piece>,
    /// Times below it, at equal distances; the last one is before now.
    pub(super) ticks: Vec<String>,
    /// For those who do not see it.
    pub(super) summary: String,
}

/// What a stretch is drawn as, and in a word.
pub(super) fn kind(stretch: &Stretch) -> (&'static str, &'static str) {
    match (stretch.followed, stretch.backfilled) {
        (true, _) => ("followed", "followed"),
        (false, Some(true)) => ("backfilled", "gap, backfilled"),
        (false, _) => ("gap", "gap"),
    }
}

fn in_days(days: i64) -> String {
    if days == 1 { "day".to_owned() } else { format!("{days} days") }
}

impl Timeline {
    /// The last `days` of what is known.
    pub(super) fn new(stretches: &[Stretch], now: Timestamp, days: i64) -> Self {
        let length = SignedDuration::from_hours(24 * days);
        let begin = now.saturating_sub(length).unwrap_or(Timestamp::MIN);
        let place = |at: Timestamp| {
            let since = at.max(begin).min(now).duration_since(begin).as_secs();
            since * WIDTH / length.as_secs().max(1)
        };
        let mut pieces = Vec::new();
        let mut times = [
            ("followed", SignedDuration::ZERO),
            ("gap", SignedDuration::ZERO),
            ("backfilled", SignedDuration::ZERO),
        ];
        for stretch in stretches {
            let to = stretch.to_at.unwrap_or(now).min(now);
            let from = stretch.from_at.max(begin);
            if to <= from {
                continue;
            }
            let (kind, word) = kind(stretch);
            if let Some((_, time)) = times.iter_mut().find(|(name, _)| *name == kind) {
                *time = time.saturating_add(to.duration_since(from));
            }
            let (from_x, to_x) = (place(from), place(to));
            let until = stretch.to_at.map_or_else(
                || "now".to_owned(),
                |to| {
                    let to = When::new(to);
                    format!("{} {}", to.day, to.time)
                },
            );
            let since = When::new(stretch.from_at);
            pieces.push(Piece {
                x: from_x,
                width: (to_x - from_x).max(3),
                kind,
                title: format!("{word}: {} {} to {until} UTC", since.day, since.time),
            });
        }
        // Gaps are short and lie on what is drawn beside them.
        pieces.sort_by_key(|piece| piece.kind != "followed");
        let ticks = (0..days.min(7))
            .map(|number| {
                let at = begin.saturating_add(SignedDuration::from_hours(24 * days * number / days.min(7)));
                let at = When::new(at.unwrap_or(begin));
                let label = if days == 1 { at.time } else { at.day };
                label[label.len() - 5..].to_owned()
            })
            .collect();
        let said: Vec<String> = times
            .iter()
            .filter(|(_, time)| !time.is_zero())
            .map(|(name, time)| match *name {
                "followed" => format!("followed for {}", in_words(*time)),
                "gap" => format!("a gap of {} that is not backfilled", in_words(*time)),
                _ => format!("gaps of {} that were backfilled", in_words(*time)),
            })
            .collect();
        let summary = if said.is_empty() {
            format!("Not followed in the last {}.", in_days(days))
        } else {
            format!("In the last {}: {}.", in_days(days), said.join(", "))
        };
        Self { pieces, ticks, summary }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_stand_on_the_line_and_are_seen_however_small() {
        let flows = [
            Flow { incoming: 0, outgoing: 0 },
            Flow { incoming: 1000, outgoing: 1 },
            Flow { incoming: 500, outgoing: 0 },
        ];
        let chart = FlowChart::new("hour", "Last hour", "minute", "an hour ago", &flows);
        let bars: Vec<_> = chart.bars.iter().map(|bar| (bar.kind, bar.x, bar.y, bar.height)).collect();
        assert_eq!(bars, [("in", 10, 0, 48), ("out", 10, 50, 2), ("in", 20, 24, 24)]);
        assert_eq!((chart.incoming, chart.outgoing, chart.peak, chart.width), (1500, 1, 1000, 30));
    }

    #[test]
    fn a_timeline_shows_its_days_and_says_the_same_in_words() {
        let at = |hours: i64| Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hours);
        let stretch = |from: i64, to: Option<i64>, followed: bool, backfilled: Option<bool>| Stretch {
            account: "sip:alice@contoso.com".to_owned(),
            followed,
            from_at: at(from),
            to_at: to.map(at),
            reason: None,
            backfilled,
            detail: None,
        };
        let stretches = [
            stretch(0, Some(100), true, None),
            stretch(100, Some(110), false, Some(true)),
            stretch(110, None, true, None),
        ];
        let line = Timeline::new(&stretches, at(120), 1);
        let pieces: Vec<_> = line.pieces.iter().map(|piece| (piece.kind, piece.x, piece.width)).collect();
        assert_eq!(pieces, [("followed", 0, 166), ("followed", 583, 417), ("backfilled", 166, 417)]);
        assert_eq!(line.summary, "In the last day: followed for 14 h, gaps of 10 h that were backfilled.");
        assert_eq!(Timeline::new(&[], at(120), 7).summary, "Not followed in the last 7 days.");
    }
}
