//! The parts of the benchmark; each measures some arms together and makes rows of them.

pub(crate) mod backends;
mod cluster;
mod cni;
mod cross_node;
mod endpoints;
mod fresh;
mod large_lab;
mod policy;
mod programs;
mod same_node;
mod services;
mod wires;

use anyhow::Result;

use crate::lab::Lab;
use crate::load::{Cpus, Measure, PathArm};
use crate::options::{Group, Options};
use crate::rounds::{self, Protocol, Series};
use crate::row::{About, Goal, Null, Row};
use crate::stats::Random;

/// A run of the benchmark.
pub(crate) struct Run {
    /// Options.
    pub(crate) options: Options,
    /// Protocol.
    pub(crate) protocol: Protocol,
    /// CPUs of client and server.
    pub(crate) cpus: Cpus,
    /// Orders and resampling.
    pub(crate) random: Random,
    /// Rows so far.
    pub(crate) rows: Vec<Row>,
    /// What was measured, by title.
    pub(crate) series: Vec<(String, Series)>,
    /// What is known of the backends that were compared.
    pub(crate) ways: Vec<backends::Way>,
}

/// A ratio of two arms that becomes a row.
struct Ratio {
    id: String,
    title: String,
    over: &'static str,
    under: &'static str,
    goal: Option<Goal>,
}

impl Run {
    /// A run that has measured nothing.
    ///
    /// # Errors
    /// Options that make no sense.
    pub(crate) fn new(options: Options, seed: u64) -> Result<Self> {
        let (protocol, cpus) = (options.protocol()?, options.cpus()?);
        let random = Random::new(seed);
        Ok(Self { options, protocol, cpus, random, rows: Vec::new(), series: Vec::new(), ways: Vec::new() })
    }

    /// Measures everything that the options ask for. What was measured before an error stays in the run.
    ///
    /// # Errors
    /// A part failed.
    pub(crate) fn measure(&mut self) -> Result<()> {
        let mut lab = match &self.options.use_lab {
            _ if !self.options.needs_lab() => None,
            Some(name) => Some(Lab::existing(name)?),
            None if self.options.has(Group::Lab) => Some(Lab::up(self.options.lab_ups)?),
            None => Some(Lab::up(1)?),
        };
        if let Some(lab) = lab.as_mut().filter(|_| self.options.has(Group::Lab)) {
            cluster::measure(self, lab)?;
        }
        if self.options.has(Group::SameNode) {
            same_node::measure(self, lab.as_mut())?;
        }
        if self.options.has(Group::CrossNode) {
            cross_node::measure(self, lab.as_mut())?;
        }
        if self.options.has(Group::Cni) {
            cni::measure(self, lab.as_ref())?;
        }
        if let Some(lab) = lab.as_mut().filter(|_| self.options.has(Group::Fresh)) {
            fresh::measure(self, lab)?;
        }
        // What follows has nodes of its own.
        drop(lab);
        if self.options.has(Group::Backends) {
            backends::measure(self)?;
        }
        if self.options.baselines_only {
            return Ok(());
        }
        if self.options.has(Group::LargeLab) {
            large_lab::measure(self)?;
        }
        if self.options.has(Group::Programs) {
            programs::measure(self)?;
        }
        if self.options.has(Group::Wires) {
            wires::measure(self)?;
        }
        if self.options.has(Group::Policy) {
            policy::measure(self)?;
        } else if self.options.has(Group::PolicyChanges) {
            policy::measure_changes(self)?;
        }
        if self.options.has(Group::Endpoints) {
            endpoints::measure(self)?;
        }
        if self.options.has(Group::Services) {
            services::measure(self)?;
        }
        Ok(())
    }

    /// Measures arms, keeps what was measured, and makes rows of the ratios whose arms there are.
    fn compare(
        &mut self,
        title: &str,
        arms: &[PathArm<'_>],
        measure: Measure,
        null: Null,
        ratios: Vec<Ratio>,
    ) -> Result<()> {
        let mut running: Vec<_> = arms.iter().map(|arm| arm.arm(measure, self.protocol.block)).collect();
        let title = format!("{title}, {}", measure.title());
        let series = rounds::measure(&title, &mut running, &self.protocol, None, &mut self.random)?;
        self.take(title, series, null, ratios);
        Ok(())
    }

    fn take(&mut self, title: String, series: Series, null: Null, ratios: Vec<Ratio>) {
        for ratio in ratios {
            if series.arms.contains(&ratio.over) && series.arms.contains(&ratio.under) {
                let about = About { id: ratio.id, title: ratio.title, goal: ratio.goal };
                let row = Row::of_ratio(about, &series, ratio.over, ratio.under, null, &mut self.random);
                self.add(row);
            }
        }
        self.series.push((title, series));
    }

    fn add(&mut self, row: Row) {
        crate::report::finished(&row);
        self.rows.push(row);
    }
}
