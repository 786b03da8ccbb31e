//! Which of a set's clauses decide anything, found before any peer is looked at.
//!
//! The clauses of a set with the same ports, in the same stage, are a lane. Of those that surely match a peer the first of a lane decides what the
//! lane decides: it accepts, denies or passes, and each of them ends the stage for its ports. So the later ones need not be looked at;
//! nor those behind one of all ports. A clause that only may match (what is said of pods, to a peer that may be one) ends nothing.

use std::collections::HashMap;
use std::sync::Arc;

use super::program::{Ports, Program, Stage};

/// In a list of lanes: none, an earlier clause about everybody decides.
const DEAD: u32 = u32::MAX;

#[derive(Debug, Default)]
pub(super) struct Lanes {
    /// The first position of each program.
    starts: Vec<u32>,
    /// The lane of each clause, by its position.
    of: Vec<u32>,
    /// The lane of all ports of its stage, by lane.
    whole: Vec<Option<u32>>,
    everyone: Vec<u32>,
    everyone_named: Vec<u32>,
    doubtful: Vec<u32>,
}

impl Lanes {
    /// Of these programs, in the order in which they are asked.
    pub(super) fn of(programs: &[Arc<Program>]) -> Self {
        let mut lanes = Self::default();
        let mut numbers: HashMap<(Stage, &Arc<Ports>), u32> = HashMap::new();
        let mut of_program: Vec<Vec<u32>> = Vec::with_capacity(programs.len());
        let mut wholes: HashMap<Stage, u32> = HashMap::new();
        let mut stages: Vec<Stage> = Vec::new();
        for program in programs {
            let list = program.ports.iter().map(|ports| {
                *numbers.entry((program.stage, ports)).or_insert_with(|| {
                    let number = u32::try_from(stages.len()).unwrap_or(DEAD);
                    stages.push(program.stage);
                    if ports.list.is_none() {
                        wholes.insert(program.stage, number);
                    }
                    number
                })
            });
            of_program.push(list.collect());
        }
        lanes.whole = (0u32..).zip(&stages).map(|(n, stage)| wholes.get(stage).copied().filter(|w| *w != n)).collect();
        let mut closed = vec![false; stages.len()];
        let mut position = 0u32;
        for (program, of_program) in programs.iter().zip(&of_program) {
            lanes.starts.push(position);
            for clause in &program.clauses {
                let lane = of_program.get(clause.lane).copied().unwrap_or(DEAD);
                let is_closed = |lane: u32| index(lane).and_then(|lane| closed.get(lane)).copied().unwrap_or(false);
                let dead = is_closed(lane) || lanes.whole_beside(lane).is_some_and(is_closed);
                if clause.doubts() && program.stage != Stage::Namespaced {
                    lanes.doubtful.push(position);
                }
                if clause.atom.is_none() && !dead {
                    lanes.everyone.push(position);
                    if !clause.ports.named.is_empty() {
                        lanes.everyone_named.push(position);
                    }
                    index(lane).and_then(|lane| closed.get_mut(lane)).into_iter().for_each(|closed| *closed = true);
                }
                lanes.of.push(if dead { DEAD } else { lane });
                position = position.saturating_add(1);
            }
        }
        lanes
    }

    /// The lane of the clause at a position; none: it decides nothing that it surely matches.
    pub(super) fn lane(&self, position: u32) -> Option<u32> {
        self.of.get(index(position)?).copied().filter(|lane| *lane != DEAD)
    }

    /// The lane of all ports in the stage of another lane.
    pub(super) fn whole_beside(&self, lane: u32) -> Option<u32> {
        self.whole.get(index(lane)?).copied().flatten()
    }

    /// Which program has the clause at a position, and where.
    pub(super) fn program(&self, position: u32) -> Option<(usize, usize)> {
        let program = self.starts.partition_point(|start| *start <= position).checked_sub(1)?;
        Some((program, index(position.checked_sub(*self.starts.get(program)?)?)?))
    }

    /// Positions of clauses about everybody that decide something, ascending.
    pub(super) fn everyone(&self) -> &[u32] {
        &self.everyone
    }

    /// Those of them with named ports.
    pub(super) fn everyone_named(&self) -> &[u32] {
        &self.everyone_named
    }

    /// Positions of clauses that are asked of whoever may be a pod that is not known yet, ascending.
    pub(super) fn doubtful(&self) -> &[u32] {
        &self.doubtful
    }
}

fn index(number: u32) -> Option<usize> {
    usize::try_from(number).ok()
}
