//! The protocol: every arm once a round, in random order; rounds in which the machine did other work are dropped whole and
//! taken again, as often as half the rounds asked for.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::interrupt;
use crate::noise::{Limits, Noise, Own, Snapshot};
use crate::stats::Random;

/// What one block of one arm gave.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Block {
    /// Transactions or MiB a second, or milliseconds: the same unit in all arms.
    pub(crate) value: f64,
    /// CPU time of client and server a transaction (a MiB of a stream), in microseconds.
    pub(crate) cpu: Option<f64>,
    /// The value without sleeps that are known to be a baseline's own habit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) awake: Option<f64>,
}

/// One of the things that are compared.
pub(crate) struct Arm<'a> {
    /// Its name.
    pub(crate) name: &'static str,
    /// Processes whose work is not noise.
    pub(crate) pids: Vec<u32>,
    /// Runs one block.
    pub(crate) run: Box<dyn FnMut() -> Result<Block> + 'a>,
}

/// How it is measured.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    /// Rounds that count, at best.
    pub(crate) rounds: usize,
    /// Length of a block.
    pub(crate) block: Duration,
    /// What is too noisy.
    pub(crate) limits: Limits,
}

impl Protocol {
    /// Rounds after which it gives up.
    fn most(&self) -> usize {
        self.rounds + self.rounds.div_ceil(2)
    }
}

/// All that was measured of some arms.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// Names of the arms.
    pub(crate) arms: Vec<&'static str>,
    /// Rounds that count: a block an arm, in the order of `arms`.
    pub(crate) rounds: Vec<Vec<Block>>,
    /// Rounds that were dropped as too noisy.
    pub(crate) dropped: usize,
    /// The worst noise of a dropped round, for the message.
    #[serde(skip)]
    pub(crate) worst: Noise,
}

impl Series {
    /// Nothing measured yet.
    fn new(arms: Vec<&'static str>) -> Self {
        Self { arms, rounds: Vec::new(), dropped: 0, worst: Noise::default() }
    }

    /// Takes a round in, or drops it.
    fn take(&mut self, blocks: Vec<Block>, noise: Noise, limits: Limits) {
        if noise.within(limits) {
            self.rounds.push(blocks);
        } else {
            self.dropped += 1;
            self.worst = self.worst.worst(noise);
        }
    }

    /// The same rounds with the values of these arms less their sleeps.
    pub(crate) fn awake(&self, one: &str, other: &str) -> Self {
        let mut series = self.clone();
        for round in &mut series.rounds {
            for (name, block) in self.arms.iter().zip(round) {
                if *name == one || *name == other {
                    block.value = block.awake.unwrap_or(block.value);
                }
            }
        }
        series
    }

    fn column(&self, arm: &str) -> Option<impl Iterator<Item = &Block>> {
        let index = self.arms.iter().position(|name| *name == arm)?;
        Some(self.rounds.iter().filter_map(move |round| round.get(index)))
    }

    /// Values of an arm, round by round; none of an arm that there is not.
    pub(crate) fn values(&self, arm: &str) -> Vec<f64> {
        self.column(arm).map(|blocks| blocks.map(|block| block.value).collect()).unwrap_or_default()
    }

    /// CPU times of an arm.
    pub(crate) fn cpu(&self, arm: &str) -> Vec<f64> {
        self.column(arm).map(|blocks| blocks.filter_map(|block| block.cpu).collect()).unwrap_or_default()
    }

    /// How fast one arm is against another by the CPU time they take, round by round: the second's time over the first's.
    pub(crate) fn cpu_ratios(&self, over: &str, under: &str) -> Vec<f64> {
        self.cpu(over).into_iter().zip(self.cpu(under)).filter(|(over, _)| *over > 0.0).map(|(o, u)| u / o).collect()
    }

    /// Quotients of two arms, round by round.
    pub(crate) fn ratios(&self, over: &str, under: &str) -> Vec<f64> {
        self.values(over)
            .into_iter()
            .zip(self.values(under))
            .filter(|(_, under)| *under > 0.0)
            .map(|(o, u)| o / u)
            .collect()
    }
}

/// Measures arms against each other. `cgroup` is a lab's whose own work is part of what is measured.
///
/// # Errors
/// A block failed, or the user interrupted.
pub(crate) fn measure(
    title: &str,
    arms: &mut [Arm<'_>],
    protocol: &Protocol,
    cgroup: Option<&str>,
    random: &mut Random,
) -> Result<Series> {
    let mut own =
        Own { pids: arms.iter().flat_map(|arm| arm.pids.iter().copied()).collect(), cgroup: cgroup.map(str::to_owned) };
    own.pids.insert(std::process::id());
    let mut series = Series::new(arms.iter().map(|arm| arm.name).collect());
    for _ in 0..protocol.most() {
        if series.rounds.len() >= protocol.rounds {
            break;
        }
        let progress =
            format!("{title}: round {} of {}, {} dropped", series.rounds.len() + 1, protocol.rounds, series.dropped);
        crate::report::progress(&progress);
        let (blocks, noise) = round(arms, &own, random).with_context(|| title.to_owned())?;
        series.take(blocks, noise, protocol.limits);
    }
    crate::report::progress("");
    Ok(series)
}

fn round(arms: &mut [Arm<'_>], own: &Own, random: &mut Random) -> Result<(Vec<Block>, Noise)> {
    let mut order: Vec<usize> = (0..arms.len()).collect();
    random.shuffle(&mut order);
    let mut blocks = vec![Block::default(); arms.len()];
    let mut noise = Noise::default();
    for index in order {
        interrupt::check()?;
        let (Some(arm), Some(block)) = (arms.get_mut(index), blocks.get_mut(index)) else { continue };
        let before = Snapshot::take()?;
        *block = (arm.run)().with_context(|| format!("the arm {:?}", arm.name))?;
        noise = noise.worst(before.until(&Snapshot::take()?, own));
    }
    Ok((blocks, noise))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { steal: 0.01, foreign: 0.02 };

    fn block(value: f64) -> Block {
        Block { value, ..Block::default() }
    }

    #[test]
    fn a_noisy_round_is_dropped_whole_and_counted() {
        let mut series = Series::new(vec!["a", "b"]);
        series.take(vec![block(2.0), block(4.0)], Noise::default(), LIMITS);
        series.take(vec![block(9.0), block(1.0)], Noise { steal: 0.011, foreign: 0.0 }, LIMITS);
        series.take(vec![block(9.0), block(1.0)], Noise { steal: 0.0, foreign: 0.021 }, LIMITS);
        series.take(vec![block(3.0), block(4.0)], Noise { steal: 0.01, foreign: 0.02 }, LIMITS);
        assert_eq!(series.ratios("a", "b"), [0.5, 0.75]);
        assert_eq!(series.dropped, 2);
        assert_eq!(series.worst, Noise { steal: 0.011, foreign: 0.021 });
    }

    #[test]
    fn every_arm_runs_once_a_round_in_changing_order() {
        let order = std::cell::RefCell::new(Vec::new());
        let seen = &order;
        let arm = |name: &'static str| Arm {
            name,
            pids: Vec::new(),
            run: Box::new(move || {
                seen.borrow_mut().push(name);
                Ok(block(if name == "b" { 2.0 } else { 1.0 }))
            }),
        };
        let mut arms = [arm("a"), arm("b"), arm("c")];
        let free = Limits { steal: 1.0, foreign: f64::INFINITY };
        let protocol = Protocol { rounds: 12, block: Duration::ZERO, limits: free };
        let series = measure("test", &mut arms, &protocol, None, &mut Random::new(5)).unwrap();
        drop(arms);
        assert_eq!(series.ratios("b", "a"), [2.0; 12]);
        let order = order.into_inner();
        let rounds: Vec<&[&str]> = order.chunks(3).collect();
        for round in &rounds {
            assert!(["a", "b", "c"].iter().all(|name| round.contains(name)), "{round:?}");
        }
        assert!(rounds.windows(2).any(|pair| pair[0] != pair[1]), "the order never changes");
    }

    #[test]
    fn a_machine_that_stays_noisy_ends_after_half_as_many_rounds_more() {
        let mut runs = 0;
        let run = Box::new(|| {
            runs += 1;
            Ok(block(1.0))
        });
        let mut arms = [Arm { name: "a", pids: Vec::new(), run }];
        let never = Limits { steal: -1.0, foreign: -1.0 };
        let protocol = Protocol { rounds: 5, block: Duration::ZERO, limits: never };
        let series = measure("test", &mut arms, &protocol, None, &mut Random::new(5)).unwrap();
        drop(arms);
        assert_eq!((series.rounds.len(), series.dropped, runs), (0, 8, 8));
    }
}
