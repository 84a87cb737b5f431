//! `ucwa-relay man`: a page for every command, one for the configuration, each whole.

use std::{collections::BTreeSet, path::Path, process::Command};

use clap::CommandFactory;
use ucwa_relay::{cli::Cli, config};

fn run(arguments: &[&str], folder: &Path) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_ucwa-relay"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The names of the pages that a command and those below it have.
fn expected(command: &clap::Command, name: &str, names: &mut BTreeSet<String>) {
    names.insert(format!("{name}.1"));
    for below in command.get_subcommands() {
        expected(below, &format!("{name}-{}", below.get_name()), names);
    }
}

#[test]
fn there_is_a_page_for_every_command_and_for_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    run(&["man", "--out", "pages"], folder.path());
    let mut names = BTreeSet::from(["ucwa-relay.toml.5".to_owned()]);
    expected(&Cli::command(), "ucwa-relay", &mut names);
    let pages = folder.path().join("pages");
    let there: BTreeSet<String> = std::fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, names);

    for name in &there {
        let page = std::fs::read_to_string(pages.join(name)).unwrap();
        let headings: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix(".SH ")).collect();
        assert_eq!(page.matches("\n.TH ").count(), 1, "{name}:\n{page}");
        assert!(headings.contains(&"NAME") && headings.contains(&"\"SEE ALSO\""), "{name}: {headings:?}");
        // A line that begins with a point or an apostrophe and is no request would not be shown.
        for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            let request = line.split(' ').next().unwrap();
            assert!(
                [".TH", ".SH", ".SS", ".TP", ".IP", ".PP", ".RS", ".RE", ".br", ".ie", ".el"]
                    .contains(&request),
                "{name}: {line}"
            );
        }
    }
}

#[test]
fn the_printed_page_is_that_of_the_program_and_tells_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let page = String::from_utf8(run(&["man"], folder.path())).unwrap();
    run(&["man", "--out", "."], folder.path());
    assert_eq!(page, std::fs::read_to_string(folder.path().join("ucwa-relay.1")).unwrap());
    let shown = page.replace('\\', "");
    for command in Cli::command().get_subcommands() {
        let name = format!("ucwa-relay-{}(1)", command.get_name());
        assert!(shown.contains(&name), "{name} is missing:\n{shown}");
    }
    assert!(page.contains("EXIT STATUS"));
}

#[test]
fn the_page_of_the_configuration_tells_every_key() {
    let folder = tempfile::tempdir().unwrap();
    run(&["man", "--out", "."], folder.path());
    let page = std::fs::read_to_string(folder.path().join("ucwa-relay.toml.5")).unwrap();
    for section in config::reference() {
        let (_, of_section) = page.split_once(&format!("[{}]", section.name)).unwrap();
        let (of_section, _) = of_section.split_once("\n.SH").unwrap();
        for key in section.keys {
            assert!(of_section.contains(&format!("\\fB{}\\fR = ", key.name)), "{}: {of_section}", key.name);
        }
    }
}
