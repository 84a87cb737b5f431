//! What commands print to stdout: tables for a terminal, the same columns divided by tabs for a pipe, JSON for programs.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, LineStyle, TableStyle};
use jiff::Timestamp;
use serde::Serialize;

use super::failure::OutputClosed;
use crate::query::{Query, fold};

/// `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people; into a pipe: one line a row, columns divided by tabs
    Table,
    /// For programs
    Json,
}

/// `--format` of commands that print messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RowFormat {
    /// For people; into a pipe: one line a row, columns divided by tabs
    Table,
    /// One JSON object a line
    Jsonl,
    /// A JSON array
    Json,
    /// RFC 4180, safe to open in a spreadsheet
    Csv,
}

/// No more ink than it takes to tell the heading from the rows.
const LINE_BELOW_HEADING: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// Writes to stdout. A reader that went away ends the command without a word.
pub(super) fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        written => Ok(written?),
    }
}

/// Writes one line to stdout.
pub(super) fn line(text: &str) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes one JSON object on a line of its own.
pub(super) fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// Writes a JSON array, one element a line.
pub(super) fn json_array<T: Serialize>(values: &[T]) -> anyhow::Result<()> {
    let elements: Vec<String> = values.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    if elements.is_empty() { line("[]") } else { line(&format!("[\n{}\n]", elements.join(",\n"))) }
}

/// Rows under a heading.
#[derive(Debug)]
pub(super) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(heading: impl Into<Vec<&'static str>>) -> Self {
        Self { heading: heading.into(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: impl Into<Vec<String>>) {
        self.rows.push(cells.into());
    }

    /// Adds a row with the name and value of a property, unless the value is empty.
    pub(super) fn property(&mut self, name: &str, value: String) {
        if !value.is_empty() {
            self.row([name.to_owned(), value]);
        }
    }

    /// Writes the table; on a terminal, `nothing` if there are no rows.
    pub(super) fn print(self, nothing: &str) -> anyhow::Result<()> {
        self.print_highlighted(nothing, &Highlight::default())
    }

    /// As [`Table::print`], of cells that [`Highlight::mark`] has marked.
    pub(super) fn print_highlighted(self, nothing: &str, highlight: &Highlight) -> anyhow::Result<()> {
        if !io::stdout().is_terminal() {
            return bytes(self.with_tabs().as_bytes());
        }
        if self.rows.is_empty() {
            return line(nothing);
        }
        let mut table = comfy_table::Table::new();
        table.load_style(LINE_BELOW_HEADING).set_content_arrangement(ContentArrangement::Dynamic);
        table.set_header(self.heading);
        for row in self.rows {
            table.add_row(row.into_iter().map(|cell| harmless(&cell)));
        }
        line(&highlight.show(&table.to_string()))
    }

    fn with_tabs(&self) -> String {
        let mut text = self.heading.join("\t") + "\n";
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(|cell| on_one_line(cell)).collect();
            text.push_str(&cells.join("\t"));
            text.push('\n');
        }
        text
    }
}

/// Shows on a terminal where the texts of a query were found.
///
/// Places are marked by two characters without width while a table is laid out, so that columns stay aligned, and
/// become colour in the finished text. What others wrote cannot bring such marks along.
#[derive(Debug, Default)]
pub(super) struct Highlight {
    texts: Vec<String>,
}

impl Highlight {
    const START: char = '\u{2062}';
    const END: char = '\u{2063}';
    const BOLD_YELLOW: &str = "\u{1b}[1;33m";
    const PLAIN: &str = "\u{1b}[0m";

    /// For the texts of `query`, if stdout is a terminal whose user does not mind colour (`NO_COLOR`).
    pub(super) fn on_terminal(query: &Query) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if unwanted || !io::stdout().is_terminal() {
            return Self::default();
        }
        Self::of(query)
    }

    fn of(query: &Query) -> Self {
        Self { texts: query.texts().map(ToOwned::to_owned).collect() }
    }

    /// The text with marks around what was found.
    pub(super) fn mark(&self, text: &str) -> String {
        if self.texts.is_empty() {
            return text.to_owned();
        }
        let text = text.replace([Self::START, Self::END], "");
        let mut places: Vec<_> = self.texts.iter().flat_map(|wanted| fold::find(&text, wanted)).collect();
        places.sort_by_key(|place| (place.start, std::cmp::Reverse(place.end)));
        let (mut marked, mut done) = (String::with_capacity(text.len() + 16), 0);
        for place in places {
            if place.start < done {
                continue;
            }
            marked.push_str(&text[done..place.start]);
            marked.push(Self::START);
            marked.push_str(&text[place.clone()]);
            marked.push(Self::END);
            done = place.end;
        }
        marked + &text[done..]
    }

    /// The finished text with colour for marks. Colour ends with its line: what follows on the next one may be
    /// another column.
    pub(super) fn show(&self, text: &str) -> String {
        if self.texts.is_empty() {
            return text.to_owned();
        }
        let lines: Vec<String> = text
            .split('\n')
            .map(|line| {
                let mut shown = String::with_capacity(line.len());
                let mut coloured = false;
                for c in line.chars() {
                    match c {
                        Self::START => shown.push_str(Self::BOLD_YELLOW),
                        Self::END if coloured => shown.push_str(Self::PLAIN),
                        Self::END => (),
                        _ => shown.push(c),
                    }
                    coloured = (coloured || c == Self::START) && c != Self::END;
                }
                if coloured {
                    shown.push_str(Self::PLAIN);
                }
                shown
            })
            .collect();
        lines.join("\n")
    }
}

/// Without characters that would control the terminal: what others wrote is shown, not obeyed.
pub(super) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Harmless, and without line ends and tabs.
pub(super) fn on_one_line(text: &str) -> String {
    harmless(&text.replace("\r\n", " ").replace(['\n', '\r', '\t'], " "))
}

/// `2026-03-01T12:00:05Z`, which `--since` takes too.
pub(super) fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A time, or nothing.
pub(super) fn optional_time(at: Option<Timestamp>) -> String {
    at.map(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_stays_on_its_line_in_a_pipe() {
        let mut table = Table::new(["id", "body"]);
        table.row(["1".into(), "two\r\nlines\tand \u{1b}[31mred".into()]);
        assert_eq!(table.with_tabs(), "id\tbody\n1\ttwo lines and \u{fffd}[31mred\n");
    }

    #[test]
    fn what_was_found_is_coloured_and_nothing_else() {
        let query = crate::query::parse("cafe \"at four\" -tea", Timestamp::now()).unwrap();
        let highlight = Highlight::of(&query);
        let marked = highlight.mark("Café\u{2062} at four: tea, CAFÉ");
        assert_eq!(
            highlight.show(&marked),
            "\u{1b}[1;33mCafé\u{1b}[0m \u{1b}[1;33mat four\u{1b}[0m: tea, \u{1b}[1;33mCAFÉ\u{1b}[0m"
        );
        assert_eq!(highlight.show("\u{2062}at\nfour\u{2063}"), "\u{1b}[1;33mat\u{1b}[0m\nfour");
        assert_eq!(Highlight::default().mark("Café"), "Café");
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time("2026-03-01T12:00:05.678+02:00".parse().unwrap()), "2026-03-01T10:00:05Z");
    }
}
