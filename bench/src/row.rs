//! Rows of the result: a figure with its interval, its goal, and what the goal says of it.

use serde::Serialize;

use crate::noise::{Limits, Noise};
use crate::rounds::Series;
use crate::stats::{self, Interval, Random};

/// Where the median of the A/A null must lie, or the row says nothing.
const NULL_BAND: std::ops::RangeInclusive<f64> = 0.98..=1.02;
/// Rounds below which a row says nothing.
const FEWEST_ROUNDS: usize = 3;

/// A figure to reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Goal {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

impl Goal {
    fn met_by(self, value: f64) -> bool {
        match self {
            Goal::AtLeast(goal) => value >= goal,
            Goal::AtMost(goal) => value <= goal,
        }
    }

    /// The figure.
    pub(crate) fn value(self) -> f64 {
        match self {
            Goal::AtLeast(goal) | Goal::AtMost(goal) => goal,
        }
    }
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Unit {
    /// A quotient of two arms.
    Ratio,
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// MiB.
    Mebibytes,
    /// Bytes.
    Bytes,
    /// Hundredths.
    Percent,
}

impl Unit {
    /// A figure with its unit.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Unit::Ratio => format!("{value:.3}"),
            Unit::Seconds => format!("{value:.2} s"),
            Unit::Milliseconds => format!("{value:.1} ms"),
            Unit::Mebibytes => format!("{value:.1} MiB"),
            Unit::Bytes => format!("{value:.0} B"),
            Unit::Percent => format!("{value:.2} %"),
        }
    }
}

/// What the goal says of the figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    /// The median reaches the goal.
    Met,
    /// It does not.
    Missed,
    /// There is no goal: shown to compare.
    Shown,
    /// The measurement was too noisy to say anything.
    Void,
}

impl Verdict {
    /// One word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::Shown => "–",
            Verdict::Void => "void",
        }
    }
}

/// A row.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Row {
    /// Identifier that stays.
    pub(crate) id: String,
    /// What is measured.
    pub(crate) title: String,
    /// Unit.
    pub(crate) unit: Unit,
    /// Goal.
    pub(crate) goal: Option<Goal>,
    /// Median; none when no round was quiet enough.
    pub(crate) median: Option<f64>,
    /// Its 95 % confidence interval.
    pub(crate) interval: Option<Interval>,
    /// Rounds (or repetitions) that count.
    pub(crate) kept: usize,
    /// Rounds that were too noisy.
    pub(crate) dropped: usize,
    /// Median of the A/A null.
    pub(crate) null: Option<f64>,
    /// What the goal says.
    pub(crate) verdict: Verdict,
    /// What a reader should know.
    pub(crate) note: String,
    /// The figures that the median is of.
    pub(crate) samples: Vec<f64>,
}

/// What a row is about.
#[derive(Clone, Debug)]
pub(crate) struct About {
    /// Identifier.
    pub(crate) id: String,
    /// Title.
    pub(crate) title: String,
    /// Goal.
    pub(crate) goal: Option<Goal>,
}

/// Two arms that are the same thing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Null {
    /// One.
    pub(crate) one: &'static str,
    /// The other.
    pub(crate) other: &'static str,
}

impl Row {
    /// A row of the ratio of two arms.
    pub(crate) fn of_ratio(
        about: About,
        series: &Series,
        over: &str,
        under: &str,
        null: Null,
        random: &mut Random,
    ) -> Self {
        let samples = series.ratios(over, under);
        let mut note = by_cpu(series, over, under, null).unwrap_or_default();
        if series.dropped > 0 {
            let worst = series.worst;
            add(
                &mut note,
                &format!(
                    "dropped rounds had up to {:.1} % steal, {:.1} % foreign CPU",
                    worst.steal * 100.0,
                    worst.foreign * 100.0
                ),
            );
        }
        let null = stats::median(&series.ratios(null.other, null.one));
        let mut row = Self {
            id: about.id,
            title: about.title,
            unit: Unit::Ratio,
            goal: about.goal,
            median: stats::median(&samples),
            interval: stats::interval(&samples, random),
            kept: samples.len(),
            dropped: series.dropped,
            null,
            verdict: Verdict::Void,
            note,
            samples,
        };
        row.judge(null.is_some_and(|null| NULL_BAND.contains(&null)));
        row
    }

    /// A row of repetitions of one thing, in its own unit.
    pub(crate) fn of_samples(about: About, unit: Unit, samples: Vec<f64>, note: String, random: &mut Random) -> Self {
        let mut row = Self {
            id: about.id,
            title: about.title,
            unit,
            goal: about.goal,
            median: stats::median(&samples),
            interval: stats::interval(&samples, random),
            kept: samples.len(),
            dropped: 0,
            null: None,
            verdict: Verdict::Void,
            note,
            samples,
        };
        row.verdict = row.by_goal();
        row
    }

    /// The quotient of two rows' figures, for what cannot be measured in the same rounds. Void when one of them is.
    pub(crate) fn of_rows(about: About, over: &Row, under: &Row, random: &mut Random) -> Self {
        let median = over.median.zip(under.median).map(|(over, under)| over / under);
        let mut row = Self {
            id: about.id,
            title: about.title,
            unit: Unit::Ratio,
            goal: about.goal,
            median,
            interval: stats::quotient_interval(&over.samples, &under.samples, random),
            kept: over.kept.min(under.kept),
            dropped: over.dropped + under.dropped,
            null: None,
            verdict: Verdict::Void,
            note: "quotient of the two rows' medians".to_owned(),
            samples: median.into_iter().collect(),
        };
        row.judge(over.verdict != Verdict::Void && under.verdict != Verdict::Void);
        row
    }

    fn judge(&mut self, quiet: bool) {
        if self.kept < FEWEST_ROUNDS {
            let few = format!("only {} quiet rounds, {FEWEST_ROUNDS} are needed", self.kept);
            add(&mut self.note, &few);
        } else if !quiet {
            let why = match self.null {
                Some(null) => format!("A/A null {null:.3} is outside 0.98–1.02"),
                None => "a row that it is made of is void".to_owned(),
            };
            add(&mut self.note, &why);
        } else {
            self.verdict = self.by_goal();
        }
    }

    fn by_goal(&self) -> Verdict {
        match (self.goal, self.median) {
            (_, None) => Verdict::Void,
            (None, Some(_)) => Verdict::Shown,
            (Some(goal), Some(median)) if goal.met_by(median) => Verdict::Met,
            (Some(_), Some(_)) => Verdict::Missed,
        }
    }

    /// `0.981 [0.975, 0.990]`, or a dash.
    pub(crate) fn figure(&self) -> String {
        let Some(median) = self.median else { return "–".to_owned() };
        match self.interval {
            Some(found) if self.samples.len() > 1 || self.unit == Unit::Ratio => {
                format!(
                    "{} [{}, {}]",
                    self.unit.show(median),
                    short(found.low, self.unit),
                    short(found.high, self.unit)
                )
            }
            _ => self.unit.show(median),
        }
    }

    /// The goal, or a dash.
    pub(crate) fn goal_text(&self) -> String {
        match self.goal {
            None => "–".to_owned(),
            Some(Goal::AtLeast(goal)) => format!("≥ {}", plain(goal, self.unit)),
            Some(Goal::AtMost(goal)) => format!("≤ {}", plain(goal, self.unit)),
        }
    }

    /// A time that missed its goal on a busy machine says nothing; one that met it there met it.
    pub(crate) fn taken_with(mut self, noise: Noise, limits: Limits) -> Self {
        let (steal, foreign) = (noise.steal * 100.0, noise.foreign * 100.0);
        add(&mut self.note, &format!("{steal:.1} % steal, {foreign:.1} % foreign CPU"));
        if self.verdict == Verdict::Missed && !noise.within(limits) {
            self.verdict = Verdict::Void;
        }
        self
    }

    /// Adds to the note.
    pub(crate) fn remark(mut self, remark: &str) -> Self {
        add(&mut self.note, remark);
        self
    }
}

/// What CPU times say of the same two arms; nothing where they were not taken.
fn by_cpu(series: &Series, over: &str, under: &str, null: Null) -> Option<String> {
    let ratio = |over, under| stats::median(&series.cpu_ratios(over, under));
    let time = |arm| stats::median(&series.cpu(arm));
    Some(format!(
        "by CPU time {:.3} ({:.1} against {:.1} µs; A/A {:.3})",
        ratio(over, under)?,
        time(over)?,
        time(under)?,
        ratio(null.other, null.one)?
    ))
}

fn short(value: f64, unit: Unit) -> String {
    unit.show(value).split(' ').next().unwrap_or_default().to_owned()
}

fn plain(goal: f64, unit: Unit) -> String {
    match unit {
        Unit::Ratio => format!("{goal:.2}"),
        Unit::Seconds => format!("{goal} s"),
        Unit::Mebibytes => format!("{goal} MiB"),
        Unit::Bytes => format!("{goal} B"),
        Unit::Milliseconds => format!("{goal} ms"),
        Unit::Percent => format!("{goal} %"),
    }
}

fn add(note: &mut String, more: &str) {
    if !more.is_empty() {
        if !note.is_empty() {
            note.push_str("; ");
        }
        note.push_str(more);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rounds::Block;

    const NULL: Null = Null { one: "limit", other: "limit again" };

    fn series(rounds: &[[f64; 3]]) -> Series {
        let block = |value: &f64| Block { value: *value, cpu: Some(10.0), awake: None };
        Series {
            arms: vec!["ours", "limit", "limit again"],
            rounds: rounds.iter().map(|round| round.iter().map(block).collect()).collect(),
            dropped: 0,
            worst: Noise::default(),
        }
    }

    pub(crate) fn about(goal: Option<Goal>) -> About {
        About { id: "x".to_owned(), title: "X".to_owned(), goal }
    }

    fn verdict(rounds: &[[f64; 3]], goal: Option<Goal>) -> Verdict {
        Row::of_ratio(about(goal), &series(rounds), "ours", "limit", NULL, &mut Random::new(1)).verdict
    }

    #[test]
    fn a_median_at_the_goal_meets_it() {
        let rounds = [[95.0, 100.0, 101.0], [90.0, 100.0, 99.0], [99.0, 100.0, 100.0]];
        assert_eq!(verdict(&rounds, Some(Goal::AtLeast(0.95))), Verdict::Met);
        assert_eq!(verdict(&rounds, Some(Goal::AtLeast(0.951))), Verdict::Missed);
        assert_eq!(verdict(&rounds, Some(Goal::AtMost(0.95))), Verdict::Met);
        assert_eq!(verdict(&rounds, Some(Goal::AtMost(0.5))), Verdict::Missed);
        assert_eq!(verdict(&rounds, None), Verdict::Shown);
    }

    #[test]
    fn two_like_arms_that_differ_void_a_row_however_good_it_is() {
        let rounds = [[120.0, 100.0, 97.0]; 5];
        assert_eq!(verdict(&rounds, Some(Goal::AtLeast(0.95))), Verdict::Void);
        let row = Row::of_ratio(about(None), &series(&rounds), "ours", "limit", NULL, &mut Random::new(1));
        assert!(row.note.contains("A/A null 0.970"), "{}", row.note);
    }

    #[test]
    fn an_arm_that_takes_half_the_cpu_time_is_twice_as_fast_by_it() {
        let mut series = series(&[[1.0, 1.0, 1.0]; 3]);
        for round in &mut series.rounds {
            round[0].cpu = Some(5.0);
        }
        let row = Row::of_ratio(about(None), &series, "ours", "limit", NULL, &mut Random::new(1));
        assert_eq!(row.note, "by CPU time 2.000 (5.0 against 10.0 µs; A/A 1.000)");
    }

    #[test]
    fn noise_voids_what_missed_but_not_what_met() {
        let limits = Limits { steal: 0.01, foreign: 0.02 };
        let noisy = Noise { steal: 0.0, foreign: 0.5 };
        let verdict = |seconds: f64, noise: Noise| {
            let goal = about(Some(Goal::AtMost(3.0)));
            let row = Row::of_samples(goal, Unit::Seconds, vec![seconds], String::new(), &mut Random::new(1));
            row.taken_with(noise, limits).verdict
        };
        assert_eq!([verdict(2.0, noisy), verdict(4.0, noisy)], [Verdict::Met, Verdict::Void]);
        assert_eq!(verdict(4.0, Noise::default()), Verdict::Missed);
    }

    #[test]
    fn too_few_rounds_say_nothing() {
        assert_eq!(verdict(&[[100.0, 100.0, 100.0]; 2], Some(Goal::AtLeast(0.95))), Verdict::Void);
        assert_eq!(verdict(&[], Some(Goal::AtLeast(0.95))), Verdict::Void);
    }

    #[test]
    fn a_row_made_of_a_void_row_is_void() {
        let mut random = Random::new(1);
        let good = Row::of_ratio(about(None), &series(&[[95.0, 100.0, 100.0]; 5]), "ours", "limit", NULL, &mut random);
        let void = Row::of_ratio(about(None), &series(&[[95.0, 100.0, 90.0]; 5]), "ours", "limit", NULL, &mut random);
        assert_eq!(Row::of_rows(about(Some(Goal::AtLeast(0.98))), &good, &good, &mut random).verdict, Verdict::Met);
        assert_eq!(Row::of_rows(about(Some(Goal::AtLeast(0.98))), &good, &void, &mut random).verdict, Verdict::Void);
    }
}
