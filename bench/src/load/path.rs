//! Two ends of a path with a server and a client, and arms that measure what lies between.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Done, Measure, PORT, Request};
use crate::noise::{all_threads_nanoseconds, cpu_nanoseconds};
use crate::place::Place;
use crate::rounds::{Arm, Block};
use crate::worker::Worker;

/// How much longer than its length a block may take.
const SLACK: Duration = Duration::from_secs(8);

/// Which CPUs the ends run on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus {
    /// The server's.
    pub(crate) server: usize,
    /// The client's.
    pub(crate) client: usize,
}

/// A server and a client.
#[derive(Debug)]
pub(crate) struct Ends {
    tcp: Worker,
    udp: Worker,
    client: RefCell<Worker>,
    carriers: Vec<u32>,
}

impl Ends {
    /// Starts them.
    ///
    /// # Errors
    /// A place cannot be entered, or the port is taken there.
    pub(crate) fn start(title: &str, client: &Place, server: &Place, cpus: Cpus) -> Result<Self> {
        let server = server.on(cpus.server);
        Ok(Self {
            tcp: Worker::start(&format!("the TCP server of {title}"), &server, &["serve-tcp"])?,
            udp: Worker::start(&format!("the UDP server of {title}"), &server, &["serve-udp"])?,
            client: RefCell::new(Worker::start(
                &format!("the client of {title}"),
                &client.on(cpus.client),
                &["client"],
            )?),
            carriers: Vec::new(),
        })
    }

    /// With processes that carry packets between the ends: their CPU time is part of what a transaction costs, and no noise.
    pub(crate) fn carried_by(mut self, pids: Vec<u32>) -> Self {
        self.carriers = pids;
        self
    }

    fn server(&self, measure: Measure) -> &Worker {
        if measure == Measure::UdpRr { &self.udp } else { &self.tcp }
    }

    /// The processes of a measure.
    pub(crate) fn pids(&self, measure: Measure) -> Vec<u32> {
        let ends = [self.server(measure).pid(), self.client.borrow().pid()];
        ends.into_iter().chain(self.carriers.iter().copied()).collect()
    }

    /// Runs a block to an address and port.
    ///
    /// # Errors
    /// The client failed.
    pub(crate) fn block(&self, measure: Measure, to: SocketAddr, length: Duration) -> Result<Block> {
        let mut client = self.client.borrow_mut();
        let pids = [self.server(measure).pid(), client.pid()];
        let used = || {
            let ends = pids.iter().map(|pid| cpu_nanoseconds(*pid)).sum::<Result<u64>>()?;
            anyhow::Ok(ends + self.carriers.iter().map(|pid| all_threads_nanoseconds(*pid)).sum::<u64>())
        };
        let milliseconds = u64::try_from(length.as_millis()).context("a block's length")?;
        let request = Request { measure, to, warm_up: (milliseconds / 10).min(100), length: milliseconds };
        let before = used()?;
        let done: Done = client.ask(&request, length + SLACK)?;
        let microseconds = used()?.saturating_sub(before) as f64 / 1000.0;
        Ok(Block { value: done.count / done.seconds, cpu: Some(microseconds / done.all.max(1.0)), awake: None })
    }

    /// An arm that runs from the client to an address of the server.
    pub(crate) fn to(&self, name: &'static str, address: IpAddr) -> PathArm<'_> {
        PathArm { name, ends: self, to: SocketAddr::new(address, PORT) }
    }
}

/// A path to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathArm<'a> {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its ends.
    pub(crate) ends: &'a Ends,
    /// Where its client connects to.
    pub(crate) to: SocketAddr,
}

impl<'a> PathArm<'a> {
    /// One measure of it.
    pub(crate) fn arm(self, measure: Measure, length: Duration) -> Arm<'a> {
        Arm {
            name: self.name,
            pids: self.ends.pids(measure),
            run: Box::new(move || self.ends.block(measure, self.to, length)),
        }
    }
}
