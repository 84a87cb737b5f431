//! `man`: manual pages, made of what the commands say of themselves and of what the configuration's keys say.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;
use roff::{Roff, bold, italic, roman};

use super::{Cli, output};
use crate::config::{LOOKUP, reference};

const PROGRAM: &str = "ucwa-relay";
const CONFIGURATION_PAGE: &str = "ucwa-relay.toml.5";

/// `man`.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// Folder into which a page per command and ucwa-relay.toml(5) are written; without it, the
    /// program's page is printed
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints the program's page, or writes all of them.
pub(super) fn man(options: &ManOptions) -> anyhow::Result<()> {
    let Some(folder) = &options.out else {
        return output::bytes(&program_page(&complete_command())?);
    };
    fs::create_dir_all(folder).with_context(|| format!("the folder {} can't be made", folder.display()))?;
    let mut count = 0_usize;
    for (name, page) in pages()? {
        write(folder, &name, &page)?;
        count += 1;
    }
    output::line(&format!("{count} pages are in {}", folder.display()))
}

fn write(folder: &Path, name: &str, page: &[u8]) -> anyhow::Result<()> {
    let path = folder.join(name);
    fs::write(&path, page).with_context(|| format!("{} can't be written", path.display()))
}

/// All pages with their files' names.
fn pages() -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let program = complete_command();
    let mut pages = vec![
        (format!("{PROGRAM}.1"), program_page(&program)?),
        (CONFIGURATION_PAGE.to_owned(), configuration_page()),
    ];
    let mut commands: Vec<&Command> = program.get_subcommands().collect();
    while let Some(command) = commands.pop() {
        commands.extend(command.get_subcommands());
        let man = Man::new(command.clone());
        let mut page = Vec::new();
        man.render(&mut page)?;
        page.extend(see_also(&[(PROGRAM, "1"), ("ucwa-relay.toml", "5")]));
        pages.push((man.get_filename(), page));
    }
    pages.sort();
    Ok(pages)
}

/// The command line with the names under which its pages refer to each other.
fn complete_command() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

/// The program's own page, with what no option tells.
fn program_page(program: &Command) -> anyhow::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(program.clone()).render(&mut page)?;
    let mut more = Roff::new();
    more.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in [("0", "done"), ("1", "failed"), ("2", "usage or configuration error")] {
        more.control("TP", []).text([bold(code)]).text([roman(meaning)]);
    }
    more.control("SH", ["ENVIRONMENT"]);
    more.control("TP", []).text([bold("UCWA_RELAY__"), italic("SECTION"), bold("__"), italic("KEY")]);
    more.text([roman(
        "Goes over the configuration file: UCWA_RELAY__OUTBOX__MAX_ATTEMPTS=3 sets outbox.max_attempts.",
    )]);
    more.control("TP", []).text([bold("NO_COLOR")]).text([roman("If set, nothing is coloured.")]);
    more.control("SH", ["FILES"]);
    for path in LOOKUP {
        more.control("TP", []).text([bold(path)]);
        more.text([roman(
            "Configuration, unless --config names another file; the first that exists is read.",
        )]);
    }
    page.extend(more.to_roff().into_bytes());
    page.extend(see_also(&[("ucwa-relay.toml", "5")]));
    Ok(page)
}

fn see_also(pages: &[(&str, &str)]) -> Vec<u8> {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    let mut references = Vec::new();
    for (index, (page, section)) in pages.iter().enumerate() {
        references.extend([
            roman(if index == 0 { "" } else { ", " }),
            bold(*page),
            roman(format!("({section})")),
        ]);
    }
    roff.text(references);
    roff.to_roff().into_bytes()
}

/// `ucwa-relay.toml(5)`: every key.
fn configuration_page() -> Vec<u8> {
    let mut roff = Roff::new();
    roff.control("TH", ["ucwa-relay.toml", "5", "", &format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"))]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("ucwa-relay.toml - configuration of ucwa-relay")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman(
        "A TOML file. A key that is left out has its default. The environment goes over it: \
         UCWA_RELAY__OUTBOX__MAX_ATTEMPTS=3 sets outbox.max_attempts. Durations are texts with units: \"30s\", \"5m\", \
         \"1h30m\". An unknown key or a value that can't be is an error that names file and key.",
    )]);
    for section in reference() {
        let heading = match section.name {
            "accounts" => "[[accounts]]".to_owned(),
            name => format!("[{name}]"),
        };
        roff.control("SH", [heading.as_str()]);
        if !section.meaning.is_empty() {
            roff.text([roman(section.meaning.as_str())]);
        }
        for key in section.keys {
            let (value, without) = match &key.default {
                Some(default) => (default.clone(), ""),
                None => (key.examples.join(" or "), " An example; there is no fixed default."),
            };
            roff.control("TP", []).text([bold(key.name), roman(" = "), roman(value)]);
            roff.text([roman(format!("{} Takes {}.{without}", key.meaning, key.values.replace('`', "")))]);
        }
    }
    let mut page = roff.render().into_bytes();
    page.extend(see_also(&[(PROGRAM, "1")]));
    page
}
