//! A plot of the rows: a dot with whiskers a row. Ratios stand as they are; other figures as their part of the goal, so that
//! everything shares one axis. A short bar is the row's goal.

use std::fmt::Write as _;

use crate::row::{Row, Unit, Verdict};

const WIDTH: f64 = 1010.0;
const LEFT: f64 = 480.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 56.0;
const LINE: f64 = 24.0;
/// The axis ends here at the latest: what is beyond is drawn at the edge, its figure says how far.
const FARTHEST: f64 = 2.0;

/// A row as it is drawn.
struct Mark<'a> {
    row: &'a Row,
    /// What a figure is divided by.
    scale: f64,
}

impl Mark<'_> {
    fn new(row: &Row) -> Mark<'_> {
        let scale = match (row.unit, row.goal) {
            (Unit::Ratio, _) | (_, None) => 1.0,
            (_, Some(goal)) => goal.value(),
        };
        Mark { row, scale }
    }

    fn at(&self, value: f64) -> f64 {
        value / self.scale
    }
}

fn x(value: f64, end: f64) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * (value / end).clamp(0.0, 1.0)
}

/// The plot.
pub(super) fn plot(rows: &[Row], machine: &str) -> String {
    let marks: Vec<Mark<'_>> = rows.iter().map(Mark::new).collect();
    let largest = marks.iter().filter_map(|mark| Some(mark.at(mark.row.interval?.high))).fold(1.2, f64::max);
    let end = (largest.min(FARTHEST) * 5.0).ceil() / 5.0;
    let bottom = TOP + LINE * marks.len() as f64;
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">
<title>Towpath benchmarks</title>
<rect width="{WIDTH}" height="{height}" fill="white"/>
<text x="16" y="22" font-size="15" font-weight="bold">Towpath, side by side in one run</text>
<text x="16" y="40" fill="#555">{}; dot: median, whiskers: 95 % CI, bar: goal</text>"##,
        escape(machine),
        height = bottom + 48.0
    );
    axis(&mut svg, end, bottom);
    for (number, mark) in marks.iter().enumerate() {
        draw(&mut svg, mark, TOP + LINE * (number as f64 + 0.5), end);
    }
    svg.push_str("</svg>\n");
    svg
}

fn axis(svg: &mut String, end: f64, bottom: f64) {
    let steps = (end * 5.0).round();
    let mut step = 0.0;
    while step <= steps {
        let value = step / 5.0;
        let (at, colour) = (x(value, end), if value == 1.0 { "#888" } else { "#e4e4e4" });
        let _ = writeln!(svg, r#"<line x1="{at:.1}" y1="{TOP}" x2="{at:.1}" y2="{bottom}" stroke="{colour}"/>"#);
        let _ = writeln!(
            svg,
            r##"<text x="{at:.1}" y="{:.1}" text-anchor="middle" fill="#555">{value:.1}</text>"##,
            bottom + 16.0
        );
        step += 1.0;
    }
    let label = "ratio; for figures with a unit: measured ÷ goal";
    let _ = writeln!(svg, r##"<text x="{LEFT}" y="{:.1}" fill="#555">{label}</text>"##, bottom + 34.0);
}

fn draw(svg: &mut String, mark: &Mark<'_>, y: f64, end: f64) {
    let row = mark.row;
    let colour = match row.verdict {
        Verdict::Met => "#1a7f37",
        Verdict::Missed => "#c2261f",
        Verdict::Shown => "#3b5ba9",
        Verdict::Void => "#b0b0b0",
    };
    let text = y + 4.0;
    let _ =
        writeln!(svg, r#"<text x="{:.1}" y="{text:.1}" text-anchor="end">{}</text>"#, LEFT - 12.0, escape(&row.title));
    if let Some(goal) = row.goal {
        let at = x(mark.at(goal.value()), end);
        let _ = writeln!(
            svg,
            r##"<line x1="{at:.1}" y1="{:.1}" x2="{at:.1}" y2="{:.1}" stroke="#222" stroke-width="2"/>"##,
            y - 9.0,
            y + 9.0
        );
    }
    if let Some(found) = row.interval {
        let (low, high) = (x(mark.at(found.low), end), x(mark.at(found.high), end));
        let _ = writeln!(
            svg,
            r#"<line x1="{low:.1}" y1="{y:.1}" x2="{high:.1}" y2="{y:.1}" stroke="{colour}" stroke-width="2"/>"#
        );
    }
    if let Some(median) = row.median {
        let _ = writeln!(svg, r#"<circle cx="{:.1}" cy="{y:.1}" r="4.5" fill="{colour}"/>"#, x(mark.at(median), end));
    }
    let figure = match (row.median, row.verdict) {
        (None, _) => "void".to_owned(),
        (Some(median), Verdict::Shown) => row.unit.show(median),
        (Some(median), verdict) => format!("{} {}", row.unit.show(median), verdict.word()),
    };
    let _ = writeln!(svg, r#"<text x="{:.1}" y="{text:.1}" fill="{colour}">{figure}</text>"#, WIDTH - RIGHT + 14.0);
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::rows;
    use super::*;

    /// Fails unless the text is one element whose tags close in order and whose texts and attributes hold no bare `<` or `&`.
    fn well_formed(text: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = text.trim_end();
        while let Some(begin) = rest.find('<') {
            let (before, tag) = rest.split_at(begin);
            for entity in before.split('&').skip(1) {
                assert!(
                    ["amp;", "lt;", "gt;", "quot;"].iter().any(|known| entity.starts_with(known)),
                    "bare & in {before:?}"
                );
            }
            let (tag, after) = tag[1..].split_once('>').expect("a tag does not end");
            assert!(!tag.contains('<'), "a tag in a tag: {tag:?}");
            assert_eq!(tag.matches('"').count() % 2, 0, "an open quote in {tag:?}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "closed in another order"),
                None if tag.ends_with('/') => assert!(!open.is_empty(), "a second root element"),
                None => open.push(tag.split(' ').next().unwrap()),
            }
            rest = after;
        }
        assert!(open.is_empty() && rest.is_empty(), "left open: {open:?}, left over: {rest:?}");
    }

    #[test]
    fn the_plot_is_well_formed_xml_with_a_dot_a_figure() {
        let svg = plot(&rows(), "Linux <6> & more");
        well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        well_formed(&plot(&[], ""));
    }

    #[test]
    fn what_is_far_away_stays_inside_the_picture() {
        let svg = plot(&rows(), "");
        for circle in svg.split("<circle cx=\"").skip(1) {
            let at: f64 = circle.split('"').next().unwrap().parse().unwrap();
            assert!((LEFT..=WIDTH - RIGHT).contains(&at), "{at}");
        }
    }
}
