//! Medians, bootstrap confidence intervals and the random numbers behind them. Pure: the same seed gives the same answer.

use serde::Serialize;

/// How often a sample is drawn anew for an interval.
const RESAMPLES: usize = 2000;

/// A confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    /// Lower bound.
    pub(crate) low: f64,
    /// Upper bound.
    pub(crate) high: f64,
}

/// The value that this share of all (in percent) does not exceed; none of nothing.
pub(crate) fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The middle value; the mean of the two middle ones of an even number; none of none.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get(sorted.len() / 2 - 1)?;
    Some(f64::midpoint(lower, upper))
}

/// The 95 % percentile-bootstrap interval of the median (Efron 1979); none of no values.
pub(crate) fn interval(values: &[f64], random: &mut Random) -> Option<Interval> {
    let medians = (0..RESAMPLES).map(|_| median(&resample(values, random))).collect::<Option<Vec<f64>>>()?;
    middle_95(medians)
}

/// The same of the quotient of two samples' medians, for figures that were not taken in the same rounds.
pub(crate) fn quotient_interval(over: &[f64], under: &[f64], random: &mut Random) -> Option<Interval> {
    let quotients = (0..RESAMPLES)
        .map(|_| Some(median(&resample(over, random))? / median(&resample(under, random))?))
        .collect::<Option<Vec<f64>>>()?;
    middle_95(quotients)
}

fn middle_95(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_by(f64::total_cmp);
    let tail = values.len() / 40;
    Some(Interval { low: *values.get(tail)?, high: *values.get(values.len().checked_sub(tail + 1)?)? })
}

fn resample(values: &[f64], random: &mut Random) -> Vec<f64> {
    (0..values.len()).filter_map(|_| values.get(random.below(values.len())).copied()).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, fast, and good enough for orders and resampling.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A sequence that the seed decides.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        // The bias of a remainder is below 2^-50 for the sizes used here.
        usize::try_from(self.next() % (bound.max(1) as u64)).unwrap_or(0)
    }

    /// A random order (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([percentile(&hundred, 99.0), percentile(&hundred, 50.0)], [Some(99.0), Some(50.0)]);
        assert_eq!([percentile(&[7.0], 99.0), percentile(&[], 99.0)], [Some(7.0), None]);
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn an_interval_holds_the_median_and_narrows_with_more_values() {
        let mut random = Random::new(7);
        let noisy = |n: usize, random: &mut Random| -> Vec<f64> {
            (0..n).map(|_| 0.9 + random.below(1000) as f64 / 5000.0).collect()
        };
        let (few, many) = (noisy(8, &mut random), noisy(400, &mut random));
        let (wide, narrow) = (interval(&few, &mut random).unwrap(), interval(&many, &mut random).unwrap());
        for (values, found) in [(&few, wide), (&many, narrow)] {
            let middle = median(values).unwrap();
            assert!(found.low <= middle && middle <= found.high, "{found:?} does not hold {middle}");
        }
        assert!(narrow.high - narrow.low < (wide.high - wide.low) / 2.0, "{narrow:?} is not narrower than {wide:?}");
        assert_eq!(interval(&[], &mut random), None);
        assert_eq!(interval(&[2.0], &mut random), Some(Interval { low: 2.0, high: 2.0 }));
    }

    #[test]
    fn bootstrap_intervals_hold_the_true_median_about_as_often_as_they_say() {
        let mut random = Random::new(3);
        let hits = (0..200)
            .filter(|_| {
                let values: Vec<f64> = (0..25).map(|_| random.below(10_001) as f64).collect();
                let found = interval(&values, &mut random).unwrap();
                found.low <= 5000.0 && 5000.0 <= found.high
            })
            .count();
        assert!((176..=200).contains(&hits), "{hits} of 200 intervals hold the median; about 190 should");
    }

    #[test]
    fn a_quotient_of_equal_samples_is_one() {
        let found = quotient_interval(&[2.0; 5], &[2.0; 9], &mut Random::new(1)).unwrap();
        assert_eq!(found, Interval { low: 1.0, high: 1.0 });
    }

    #[test]
    fn shuffling_keeps_all_and_puts_each_first_about_equally_often() {
        let mut random = Random::new(1);
        let mut first = [0; 4];
        for _ in 0..4000 {
            let mut items = [0, 1, 2, 3];
            random.shuffle(&mut items);
            first[items[0]] += 1;
            items.sort_unstable();
            assert_eq!(items, [0, 1, 2, 3]);
        }
        assert!(first.iter().all(|n| (850..1150).contains(n)), "{first:?}");
    }
}
