//! A run: chunks of clusters, on all processors, until the time or the cases are used up or judges differ.
//!
//! A chunk has a seed of its own and begins with an empty kernel and a new compiler. Its clusters follow each other as a cluster changes, so
//! that what is written by difference, ids that are used again and connections that are open when policies change are tried as well.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::cluster::Spec;
use crate::judge::{Difference, Following, judge};
use crate::kernel::Kernel;
use crate::packet::{Packet, Subjects};
use crate::random::Random;
use crate::shrink::shrink;
use crate::tally::Tally;
use crate::text;

/// Clusters of a chunk.
pub const CLUSTERS: u64 = 16;
/// Packets asked of each.
pub const PACKETS: usize = 512;
/// Policies that are spoiled and read again, a chunk.
pub const SPOILED: u64 = 32;
/// How long ids rest. The clock goes on by a second a cluster.
const GRACE: Duration = Duration::from_secs(3);

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of the first chunk; the next ones follow.
    pub seed: u64,
    /// Chunks at most.
    pub chunks: u64,
    /// Time at most. At least one chunk is run.
    pub time: Duration,
    /// Threads.
    pub jobs: usize,
    /// Whether the kernel is asked.
    pub kernel: bool,
}

/// Judges that differ, and what it takes.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Seed of the chunk.
    pub seed: u64,
    /// Who says what, about what.
    pub what: String,
}

impl Failure {
    /// A difference about a packet. `alone`: the cluster, cut down; none: it takes the clusters before it.
    fn of_packet(seed: u64, cluster: u64, difference: &Difference, alone: Option<&Spec>) -> Self {
        let Packet { source, destination, transport, port, way, .. } = difference.packet;
        let head = format!("{} from {source} to {destination} port {port} ({way:?})", transport.name());
        let takes = match alone {
            Some(spec) => {
                format!("The cluster, cut down (the node gave {:?}):\n{}", spec.local, spec.manifests())
            }
            None => format!("Cluster {cluster} of the chunk shows it only behind those before it."),
        };
        Self { seed, what: format!("judges differ about {head}:\n  {}\n{takes}", difference.what) }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\nThis chunk alone: make fuzz ARGS=\"--seed {} --chunks 1\"", self.what, self.seed)
    }
}

/// Runs a plan; what was asked, and the first difference of each thread.
///
/// # Errors
/// The kernel cannot be asked, or the generator made an object that is none.
pub fn run(plan: &Plan) -> Result<(Tally, Vec<Failure>)> {
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new((Tally::default(), Vec::new()));
    let deadline = Instant::now() + plan.time;
    std::thread::scope(|scope| {
        let worker = || -> Result<()> {
            let mut kernel = if plan.kernel { Some(Kernel::load()?) } else { None };
            loop {
                let chunk = next.fetch_add(1, Ordering::Relaxed);
                let over = chunk >= plan.chunks || (chunk > 0 && Instant::now() >= deadline);
                if over || stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let mut tally = Tally::default();
                let failure = run_chunk(plan.seed.wrapping_add(chunk), kernel.as_mut(), &mut tally)?;
                let mut total = total.lock().map_err(|_| anyhow!("another thread panicked"))?;
                total.0.add(&tally);
                if let Some(failure) = failure {
                    stop.store(true, Ordering::Relaxed);
                    total.1.push(failure);
                }
            }
        };
        let workers: Vec<_> = (0..plan.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a thread panicked; what it says stands above"))??;
        }
        Ok::<(), anyhow::Error>(())
    })?;
    total.into_inner().map_err(|_| anyhow!("a thread panicked"))
}

/// One chunk; the first difference.
///
/// # Errors
/// As [`run`].
pub fn run_chunk(seed: u64, mut kernel: Option<&mut Kernel>, tally: &mut Tally) -> Result<Option<Failure>> {
    let mut random = Random::new(seed);
    let mut compiler = Following::new(GRACE);
    let mut spec = Spec::random(&mut random);
    if let Some(kernel) = kernel.as_deref_mut() {
        kernel.clear()?;
    }
    for cluster in 0..CLUSTERS {
        if cluster > 0 {
            if random.chance(3, 4) {
                spec.change(&mut random);
            } else {
                spec = Spec::random(&mut random);
            }
        }
        let subjects = Subjects::of(&spec);
        let packets: Vec<Packet> = (0..PACKETS).filter_map(|_| subjects.packet(&mut random)).collect();
        let now = Duration::from_secs(cluster);
        let found = judge(&spec, &packets, &mut compiler, now, kernel.as_deref_mut(), tally)?;
        if let Some(difference) = found.into_iter().next() {
            let (difference, alone) = explain(&spec, difference, kernel)?;
            return Ok(Some(Failure::of_packet(seed, cluster, &difference, alone.as_ref())));
        }
    }
    for _ in 0..SPOILED {
        match text::check(&mut random) {
            Ok(outcome) => *tally.read.entry(outcome).or_default() += 1,
            Err(what) => return Ok(Some(Failure { seed, what })),
        }
    }
    Ok(None)
}

/// The difference of one packet in a cluster that begins with nothing.
fn alone(spec: &Spec, packet: &Packet, kernel: Option<&mut Kernel>) -> Result<Option<Difference>> {
    if !spec.has_places_of(packet) {
        return Ok(None);
    }
    let mut compiler = Following::new(GRACE);
    let kernel = match kernel {
        Some(kernel) => {
            kernel.clear()?;
            Some(kernel)
        }
        None => None,
    };
    let found = judge(spec, &[*packet], &mut compiler, Duration::ZERO, kernel, &mut Tally::default())?;
    Ok(found.into_iter().next())
}

/// The smallest cluster that shows a difference by itself, if one does.
fn explain(spec: &Spec, found: Difference, mut kernel: Option<&mut Kernel>) -> Result<(Difference, Option<Spec>)> {
    let packet = found.packet;
    if alone(spec, &packet, kernel.as_deref_mut())?.is_none() {
        return Ok((found, None));
    }
    let small = shrink(spec, |spec| matches!(alone(spec, &packet, kernel.as_deref_mut()), Ok(Some(_))));
    let difference = alone(&small, &packet, kernel)?.unwrap_or(found);
    Ok((difference, Some(small)))
}
