//! Command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::load::{Cpus, Measure};
use crate::noise::Limits;
use crate::place::Place;
use crate::rounds::Protocol;

/// Compares paths side by side in one run: Towpath, baselines made by hand, and the bare limit, interleaved in random order.
#[derive(Debug, clap::Parser)]
#[command(name = "towpath-bench", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) hidden: Option<Hidden>,
}

/// Commands that the benchmark starts itself.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Hidden {
    /// Does something in a place.
    #[command(hide = true)]
    Inside {
        #[command(flatten)]
        place: Place,
        #[command(subcommand)]
        what: Inside,
    },
}

/// What a process in a place does.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Inside {
    /// Holds a namespace.
    Hold {
        /// Shown by `ps`.
        name: String,
    },
    /// TCP server.
    ServeTcp,
    /// UDP server.
    ServeUdp,
    /// Client.
    Client,
    /// Runs CNI plugins.
    Plugins,
    /// Adds pods at once.
    Burst,
    /// Adds pods and waits until other nodes let them in.
    FreshPods,
    /// Waits until a Service answers, or refuses.
    UntilItAnswers,
    /// Sends datagrams until they are let in, or kept out.
    UntilVerdict,
    /// Sends datagrams that are kept out.
    Knock {
        /// Where to.
        to: SocketAddr,
        /// How many a second.
        a_second: u32,
    },
    /// Compiles policies and writes them into the kernel.
    Image,
    /// Runs the kernel programs on packets.
    Programs,
    /// Sends frames over veths to nodes that forward in their drivers.
    Wires,
    /// Becomes a command.
    Run {
        /// The command.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
}

/// Part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Group {
    /// `lab up`, the start of a pod, memory.
    Lab,
    /// A lab of many nodes and pods: how soon it is up, and a node's memory.
    LargeLab,
    /// Pods of one node.
    SameNode,
    /// Pods of two nodes.
    CrossNode,
    /// Every backend, in labs of their own, beside the bare underlay.
    Backends,
    /// CNI ADD and DEL.
    Cni,
    /// ADDs at once, and how soon other nodes know a new pod.
    Fresh,
    /// ClusterIP against pod address and against rules shaped as kube-proxy's, with few and many Services.
    Services,
    /// With many Services: start of an agent, memory, and how soon a change of endpoints is in force.
    Endpoints,
    /// What policies cost packets and connections, how soon a change of one is enforced, and what a large cluster's cost a node.
    Policy,
    /// Of `policy` only how soon a change is enforced, and what the pods of a large cluster take of an agent's memory. No part of its own.
    PolicyChanges,
    /// What a packet to a Service costs in the kernel programs.
    Programs,
    /// NodePorts through the driver of a device.
    Wires,
}

/// CPUs of client and server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pin {
    /// Both on one: nothing waits for another CPU to wake up.
    One,
    /// One each.
    Two,
}

/// Options.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds that count.
    #[arg(long, default_value_t = 15)]
    pub(crate) rounds: usize,
    /// Length of a block, in seconds.
    #[arg(long, default_value_t = 1.5)]
    pub(crate) block: f64,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) only: Vec<Group>,
    /// What is measured of each path.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Measure::Rr, Measure::Crr, Measure::Stream])]
    pub(crate) measures: Vec<Measure>,
    /// CPUs of client and server.
    #[arg(long, value_enum, default_value = "one")]
    pub(crate) pin: Pin,
    /// With how many Services connections are measured.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1_000, 10_000, 50_000])]
    pub(crate) services: Vec<usize>,
    /// With how many Services, of ten endpoints each, changes, starts and memory are measured.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) many: usize,
    /// How often an agent is started without anything of an earlier one in the kernel.
    #[arg(long, default_value_t = 5)]
    pub(crate) cold_starts: usize,
    /// Drop rounds in which the hypervisor took more of the CPU time than this, in percent.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) max_steal: f64,
    /// Drop rounds in which foreign processes used more of the machine's CPU time than this, in percent.
    #[arg(long, default_value_t = 2.0)]
    pub(crate) max_foreign: f64,
    /// Seed of the random orders; from the clock if not given.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Compare only the baselines, without a lab.
    #[arg(long)]
    pub(crate) baselines_only: bool,
    /// Measure in this lab, which is up and stays up, instead of one of the benchmark's own.
    #[arg(long, value_name = "LAB")]
    pub(crate) use_lab: Option<String>,
    /// How often `lab up` is timed.
    #[arg(long, default_value_t = 3)]
    pub(crate) lab_ups: usize,
    /// How many nodes the large lab has.
    #[arg(long, default_value_t = 50)]
    pub(crate) large_nodes: usize,
    /// How many pods run in it.
    #[arg(long, default_value_t = 1_000)]
    pub(crate) large_pods: usize,
    /// How many pods are started to time it.
    #[arg(long, default_value_t = 10)]
    pub(crate) pod_starts: usize,
    /// How many pods are added to time how soon other nodes know them.
    #[arg(long, default_value_t = 200)]
    pub(crate) fresh_pods: usize,
    /// How many of them are added at once.
    #[arg(long, default_value_t = 110)]
    pub(crate) at_once: usize,
    /// How many times that is done.
    #[arg(long, default_value_t = 5)]
    pub(crate) bursts: usize,
    /// How many changes of endpoints are timed.
    #[arg(long, default_value_t = 200)]
    pub(crate) swaps: usize,
    /// How many changes of a policy are timed in each direction; a quarter of them in the largest cluster.
    #[arg(long, default_value_t = 100)]
    pub(crate) policy_changes: usize,
    /// With how many policies changes are timed. With the most, memory is measured too.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1_000, 10_000])]
    pub(crate) policies: Vec<usize>,
    /// How many blocks of addresses the policy admits that has the most.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) blocks: usize,
    /// Write everything, with every round, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the table as Markdown; between the markers `<!-- figures -->` and `<!-- /figures -->` of a file that has them.
    #[arg(long, value_name = "FILE")]
    pub(crate) markdown: Option<PathBuf>,
    /// Write a plot.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

impl Options {
    /// Whether a part is measured that needs a lab.
    pub(crate) fn needs_lab(&self) -> bool {
        let of_the_lab = [Group::Lab, Group::SameNode, Group::CrossNode, Group::Cni, Group::Fresh];
        !self.baselines_only && of_the_lab.into_iter().any(|group| self.has(group))
    }

    /// Whether a part is measured.
    pub(crate) fn has(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
    }

    /// The protocol that they ask for.
    ///
    /// # Errors
    /// A length or count that makes no sense.
    pub(crate) fn protocol(&self) -> Result<Protocol> {
        if !(0.05..=60.0).contains(&self.block) {
            bail!("--block {} s: between 0.05 and 60", self.block);
        }
        if !(1..=1000).contains(&self.rounds) {
            bail!("--rounds {}: between 1 and 1000", self.rounds);
        }
        Ok(Protocol {
            rounds: self.rounds,
            block: Duration::from_secs_f64(self.block),
            limits: Limits { steal: self.max_steal / 100.0, foreign: self.max_foreign / 100.0 },
        })
    }

    /// CPUs of client and server: the last ones that this process may use, as interrupts and most else like the first.
    ///
    /// # Errors
    /// Two are asked for and there is one.
    pub(crate) fn cpus(&self) -> Result<Cpus> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask on which CPUs this may run")?;
        let mut usable = (0..CpuSet::count()).rev().filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let last = usable.next().context("no CPU to run on")?;
        match self.pin {
            Pin::One => Ok(Cpus { server: last, client: last }),
            Pin::Two => {
                let other = usable.next().context("--pin two needs two CPUs")?;
                Ok(Cpus { server: other, client: last })
            }
        }
    }
}
