//! Every promise has its test in the repository, under the name that `docs/security.md` gives.

use std::path::Path;

#[test]
fn the_tests_that_show_the_promises_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/security.md")).unwrap();
    for promise in 1..=11 {
        let line = text.lines().find(|line| line.starts_with(&format!("| G{promise} |")));
        let shown_by = line.and_then(|line| line.split('|').nth(4)).unwrap_or_default();
        let (mut source, mut tests) = (String::new(), 0);
        for word in shown_by.split('`').skip(1).step_by(2) {
            if word.starts_with("tests/") {
                source =
                    std::fs::read_to_string(root.join(word)).unwrap_or_else(|_| panic!("there is no {word}"));
            } else {
                assert!(source.contains(&format!("fn {word}(")), "G{promise}: there is no test {word}");
                tests += 1;
            }
        }
        assert!(tests > 0, "G{promise} is shown by nothing");
    }
}
