//! The run-book has a cure for every reason for which an account needs attention.

use ucwa_relay::store::AttentionReason;

#[test]
fn the_run_book_has_a_cure_for_every_reason_for_attention() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once("\n### Alert UcwaRelayAccountNeedsAttention\n").unwrap();
    let (section, _) = section.split_once("\n### ").unwrap();
    let mut cures: Vec<(&str, &str)> =
        section.split("\n#### ").skip(1).map(|part| part.split_once('\n').unwrap()).collect();
    for reason in AttentionReason::ALL {
        let at = cures.iter().position(|(heading, _)| *heading == reason.anchor());
        let at = at.unwrap_or_else(|| panic!("docs/operations.md has no cure for {}", reason.anchor()));
        let (heading, cure) = cures.remove(at);
        assert!(cure.trim().len() > 100, "{heading} says too little: {cure}");
    }
    assert!(cures.is_empty(), "the program knows no such reason: {cures:?}");
}
