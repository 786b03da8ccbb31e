//! The table that compares backends: what each carried, what that cost, and what it demands.

use crate::groups::Run;
use crate::groups::backends::{Way, title};
use crate::load::Measure;
use crate::stats;

/// Columns of the table, head first; empty when no backends were compared.
pub(super) fn lines(run: &Run) -> Vec<[String; 9]> {
    if run.ways.is_empty() {
        return Vec::new();
    }
    let head = [
        "way between nodes",
        "TCP RR a second",
        "µs of CPU an RR",
        "TCP CRR a second",
        "µs of CPU a CRR",
        "TCP stream",
        "µs of CPU a MiB",
        "MTU",
        "demands of the underlay",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(run.ways.iter().map(|way| line(run, way)));
    lines
}

fn line(run: &Run, way: &Way) -> [String; 9] {
    let [(rr, rr_cpu), (crr, crr_cpu), (stream, stream_cpu)] =
        [Measure::Rr, Measure::Crr, Measure::Stream].map(|measure| medians(run, measure, way.name));
    let count = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.0}"));
    let cost = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
    [
        way.name.to_owned(),
        count(rr),
        cost(rr_cpu),
        count(crr),
        cost(crr_cpu),
        // Blocks count MiB.
        stream.map_or("–".to_owned(), |value| format!("{:.2} Gbit/s", value * 8.0 * 1_048_576.0 / 1e9)),
        cost(stream_cpu),
        way.mtu.to_string(),
        way.demands.to_owned(),
    ]
}

/// Of what was measured in quiet rounds: how much a second, and CPU time each.
fn medians(run: &Run, measure: Measure, arm: &str) -> (Option<f64>, Option<f64>) {
    let wanted = title(measure);
    match run.series.iter().find(|(title, _)| *title == wanted) {
        Some((_, series)) => (stats::median(&series.values(arm)), stats::median(&series.cpu(arm))),
        None => (None, None),
    }
}
