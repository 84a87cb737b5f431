//! `docs/configuration.md` is made of `config/default.toml` and the configuration's structs.

use std::fmt::Write;

use ucwa_relay::config::{self, KeyReference, SectionReference};

const INTRODUCTION: &str = "\
# Configuration

Every key, made of [config/default.toml](../config/default.toml) and the code by `make docs`; not to be edited here.

The server and all commands read one TOML file: the one that `--config` names, else `./ucwa-relay.toml`, else
`/etc/ucwa-relay/ucwa-relay.toml`. A key that is left out has its default. The environment goes over the file: each key
has a variable, whose value is written as in TOML, without quotes around a text; a list of texts may be written with
commas. Relative paths start at the working directory. Durations are texts with units: `\"30s\"`, `\"5m\"`, `\"1h30m\"`.

An unknown key, a value that can't be or a secret that can't be read is an error that names the file or variable and the
key, before anything starts. Keys called *reserved* are checked but have no effect in this version; the server says so if
you set one.
";

#[test]
fn the_reference_of_the_configuration_is_what_the_code_says() {
    let mut text = INTRODUCTION.to_owned();
    for section in config::reference() {
        let heading =
            if section.name == "accounts" { "[[accounts]]" } else { &format!("[{}]", section.name) };
        write!(text, "\n## `{heading}`\n").unwrap();
        if !section.meaning.is_empty() {
            write!(text, "\n{}\n", section.meaning).unwrap();
        }
        for key in &section.keys {
            describe(&mut text, &section, key);
        }
    }
    super::check("docs/configuration.md", &text);
}

fn describe(text: &mut String, section: &SectionReference, key: &KeyReference) {
    let KeyReference { name, meaning, values, default, examples } = key;
    write!(text, "\n### `{}.{name}`\n\n{}\n\n", section.name, escape(meaning))
        .expect("a text takes everything");
    writeln!(text, "- takes {values}").expect("a text takes everything");
    match default {
        Some(default) => writeln!(text, "- default `{default}`").expect("a text takes everything"),
        None => writeln!(text, "- no fixed default; such as `{}`", examples.join("` or `"))
            .expect("a text takes everything"),
    }
    if section.name != "accounts" {
        let variable = format!("UCWA_RELAY__{}__{}", section.name, name).to_uppercase();
        writeln!(text, "- environment `{variable}`").expect("a text takes everything");
    }
}

/// Without what Markdown would read as a tag, and with links to the documents that are named.
fn escape(text: &str) -> String {
    let words = text.split(' ').map(|word| {
        let document = word.strip_prefix("docs/").and_then(|word| word.split_once(".md"));
        document.map_or(word.replace('<', "&lt;"), |(name, rest)| format!("[{name}]({name}.md){rest}"))
    });
    words.collect::<Vec<_>>().join(" ")
}
