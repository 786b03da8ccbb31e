//! The table as Markdown, and its place in a file.

use std::fmt::Write as _;

use super::{null, rounds};
use crate::row::Row;

/// The table, the facts under it.
pub(super) fn table(rows: &[Row], facts: &[String]) -> String {
    let mut text = String::from(
        "| what | goal | measured [95 % CI] | rounds | A/A | verdict | note |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let cells = [
            row.title.clone(),
            row.goal_text(),
            row.figure(),
            rounds(row),
            null(row),
            row.verdict.word().to_owned(),
            row.note.clone(),
        ];
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    for fact in facts {
        let _ = write!(text, "\n{fact}.\n");
    }
    text
}

/// Lines of cells, the first the head.
pub(super) fn plain<const N: usize>(lines: &[[String; N]]) -> String {
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        let cells: Vec<String> = line.iter().map(|cell| cell.replace('|', "\\|")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if number == 0 {
            let _ = writeln!(text, "|{}", "---|".repeat(N));
        }
    }
    text
}

/// A file's text with the figures between the marks of this name (`<!-- name -->`, `<!-- /name -->`); at the end of a file that has none.
pub(super) fn between_markers(file: &str, name: &str, figures: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- /{name} -->"));
    let parts = file.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    match parts {
        Some((before, after)) => format!("{before}{begin}\n{figures}{end}{after}"),
        None => format!("{file}{begin}\n{figures}{end}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::rows;
    use super::*;

    #[test]
    fn every_row_has_seven_cells_whatever_its_title() {
        let text = table(&rows(), &[]);
        for line in text.lines() {
            assert_eq!(line.replace("\\|", "").matches('|').count(), 8, "{line}");
        }
        assert!(text.contains("slow \\| one"), "{text}");
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let file = "# Title\n<!-- figures -->\nold\n<!-- /figures -->\nmethod\n";
        let once = between_markers(file, "figures", "new\n");
        assert_eq!(once, "# Title\n<!-- figures -->\nnew\n<!-- /figures -->\nmethod\n");
        assert_eq!(between_markers(&once, "figures", "new\n"), once);
        let other = "<!-- figures of x -->\nmore\n<!-- /figures of x -->\n";
        assert_eq!(between_markers(&once, "figures of x", "more\n"), format!("{once}{other}"));
        assert_eq!(
            between_markers(other, "figures", "new\n"),
            format!("{other}<!-- figures -->\nnew\n<!-- /figures -->\n")
        );
    }
}
