//! `outbox shape`: how many rows wait, by age and destination, laid out as Postfix's qshape lays out a mail queue. A
//! destination whose rows are old in one column is in trouble; old rows everywhere mean that the account is.

use std::collections::HashMap;

use clap::{Args, ValueEnum};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{
    outbox::state_parser,
    output::{self, Format, Table},
};
use crate::store::{OutboxState, ShapeCell, Store};

/// Minutes that divide the columns; each takes what is older than the one before.
const MINUTES: [i64; 9] = [5, 10, 20, 40, 80, 160, 320, 640, 1280];
const COLUMNS: usize = MINUTES.len() + 1;
const HEADING: [&str; COLUMNS + 2] =
    ["", "T", "5", "10", "20", "40", "80", "160", "320", "640", "1280", "1280+"];

/// `outbox shape`.
#[derive(Debug, Args)]
pub struct ShapeOptions {
    /// Whose rows stand in one line
    #[arg(long, value_enum, default_value_t = By::Destination)]
    by: By,
    /// Count rows in this state instead of those that wait or are under way; may be given more than once
    #[arg(long, value_parser = state_parser())]
    state: Vec<OutboxState>,
    /// At most so many lines, those with the most rows first; the total counts all
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// The same as --format json
    #[arg(long)]
    json: bool,
    /// How to print: table or json
    #[arg(long, value_enum, default_value_t = Format::Table, hide_possible_values = true)]
    format: Format,
}

/// `--by`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    /// To whom they go: a recipient, a group, a conversation
    Destination,
    /// The domain of the recipients
    Domain,
    /// The account that sends
    Account,
}

impl By {
    fn of(self, cell: &ShapeCell) -> String {
        match self {
            Self::Destination => cell.destination.clone(),
            Self::Account => cell.account.clone(),
            Self::Domain => domain(&cell.destination),
        }
    }
}

/// The domain of the recipients; of several, in order and each once.
fn domain(destination: &str) -> String {
    let mut domains: Vec<String> = destination
        .split(';')
        .filter_map(|uri| uri.rsplit_once('@').map(|(_, domain)| domain.trim().to_lowercase()))
        .collect();
    domains.sort();
    domains.dedup();
    if domains.is_empty() { destination.to_owned() } else { domains.join(";") }
}

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
struct Line {
    name: String,
    total: i64,
    /// By age; see [`MINUTES`].
    ages: [i64; COLUMNS],
}

impl Line {
    fn add(&mut self, cell: &ShapeCell) {
        self.total += cell.count;
        self.ages[cell.age.min(COLUMNS - 1)] += cell.count;
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Shape {
    /// Upper end of each age but the last, in minutes.
    minutes: [i64; MINUTES.len()],
    total: Line,
    lines: Vec<Line>,
}

impl Shape {
    fn of(cells: &[ShapeCell], by: By, limit: usize) -> Self {
        let mut total = Line { name: "TOTAL".to_owned(), ..Line::default() };
        let mut lines: HashMap<String, Line> = HashMap::new();
        for cell in cells {
            total.add(cell);
            let name = by.of(cell);
            lines.entry(name.clone()).or_insert_with(|| Line { name, ..Line::default() }).add(cell);
        }
        let mut lines: Vec<Line> = lines.into_values().collect();
        lines.sort_by(|one, other| other.total.cmp(&one.total).then_with(|| one.name.cmp(&other.name)));
        lines.truncate(limit);
        Self { minutes: MINUTES, total, lines }
    }
}

/// Draws it.
pub(super) async fn shape(store: &dyn Store, options: ShapeOptions) -> anyhow::Result<()> {
    let waiting = [OutboxState::Queued, OutboxState::Sending];
    let states = if options.state.is_empty() { &waiting[..] } else { &options.state };
    let now = Timestamp::now();
    let times: Vec<Timestamp> = MINUTES
        .iter()
        .map(|&minutes| now.checked_sub(SignedDuration::from_mins(minutes)).unwrap_or(Timestamp::MIN))
        .collect();
    let cells = store.outbox_shape(states, &times).await?;
    let shape = Shape::of(&cells, options.by, options.limit);
    if options.json || options.format == Format::Json {
        return output::json_line(&shape);
    }
    let mut table = Table::new(HEADING);
    for line in std::iter::once(shape.total).chain(shape.lines) {
        let counts = std::iter::once(line.total).chain(line.ages).map(|count| count.to_string());
        table.row(std::iter::once(line.name).chain(counts).collect::<Vec<_>>());
    }
    table.print("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(account: &str, destination: &str, age: usize, count: i64) -> ShapeCell {
        ShapeCell { account: account.to_owned(), destination: destination.to_owned(), age, count }
    }

    #[test]
    fn rows_are_counted_by_whom_they_concern_and_the_most_come_first() {
        let cells = [
            cell("sip:alice@a", "sip:bob@b", 0, 2),
            cell("sip:alice@a", "sip:carol@b;sip:dan@c", 9, 3),
            cell("sip:zoe@a", "sip:bob@b", 1, 4),
            cell("sip:zoe@a", "conversation:7", 1, 1),
        ];
        let names = |by| {
            let shape = Shape::of(&cells, by, 9);
            assert_eq!((shape.total.total, shape.total.ages[9]), (10, 3));
            shape.lines.into_iter().map(|line| (line.name, line.total)).collect::<Vec<_>>()
        };
        let line = |name: &str, total| (name.to_owned(), total);
        assert_eq!(
            names(By::Destination),
            [line("sip:bob@b", 6), line("sip:carol@b;sip:dan@c", 3), line("conversation:7", 1)]
        );
        assert_eq!(names(By::Domain), [line("b", 6), line("b;c", 3), line("conversation:7", 1)]);
        assert_eq!(names(By::Account), [line("sip:alice@a", 5), line("sip:zoe@a", 5)]);
        let short = Shape::of(&cells, By::Destination, 1);
        assert_eq!((short.lines.len(), short.total.total), (1, 10), "the total counts what is not shown");
        assert_eq!(short.lines[0].ages[..3], [2, 4, 0]);
    }
}
