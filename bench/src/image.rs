//! What a large cluster's policies cost a node before any packet: compiled, checked, and written into the maps of programs that are really
//! loaded, in a network namespace and on a BPF file system of our own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use towpath_datapath::bpf::{BpfConfig, Isolation, Limits, NodeConfig, Programs};
use towpath_model::desired::{LocalPod, PodSets, PolicyChanges};
use towpath_model::{NamespacedName, NodeName, Pod, World};
use towpath_policy::check::Checker;
use towpath_policy::compile::Touched;
use towpath_policy::{Compiler, View};

use crate::cluster::policies::{Scale, world};
use crate::lab::map_memory;

const NODE: &str = "n1";
/// Index of `lo` in every network namespace: a device that no packet is measured on.
const LO: u32 = 1;
/// As the agent's.
const GRACE: Duration = Duration::from_secs(5);
const NOW: Duration = Duration::from_secs(1);

/// What is to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Makes the cluster; pins go to directories in this one, on a BPF file system.
    Make {
        /// The directory.
        pin_dir: PathBuf,
        /// How large it is.
        scale: Scale,
    },
    /// Everything, into maps that are empty.
    Everything,
    /// After [`Request::Everything`]: another label of a pod on another node.
    Label,
    /// What the kernel's maps grow by with the pods of other nodes.
    Memory,
}

/// What it took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Took {
    /// Compiling.
    pub(crate) compile: f64,
    /// The translation check.
    pub(crate) check: f64,
    /// Writing into the kernel.
    pub(crate) load: f64,
    /// Entries that were written or removed.
    pub(crate) entries: usize,
    /// With [`Request::Memory`] alone: bytes that the kernel counts more for each pod of another node.
    pub(crate) bytes_a_pod: f64,
}

impl Took {
    /// All of it, in milliseconds.
    pub(crate) fn all(&self) -> f64 {
        self.compile + self.check + self.load
    }
}

/// The worker's side.
#[derive(Default)]
pub(crate) struct Bench {
    made: Option<Made>,
}

struct Made {
    world: World,
    pin_dir: PathBuf,
    /// How many programs were opened: each has a directory.
    opened: usize,
    labels: usize,
    loaded: Option<Loaded>,
}

/// Programs, and the compiler whose image they hold.
struct Loaded {
    programs: Programs,
    compiler: Compiler,
    checker: Checker,
}

impl Bench {
    /// Does it.
    ///
    /// # Errors
    /// The kernel refuses, or what was compiled is not what the policies say.
    pub(crate) fn block(&mut self, request: Request) -> Result<Took> {
        let made = match (request, &mut self.made) {
            (Request::Make { pin_dir, scale }, made) => {
                let objects = [scale.namespaces(), scale.pods(NODE), scale.network_policies()].concat();
                *made = Some(Made { world: world(objects)?, pin_dir, opened: 0, labels: 0, loaded: None });
                return Ok(Took::default());
            }
            (_, None) => bail!("there is no cluster yet"),
            (Request::Everything, Some(made)) => return made.everything(),
            (Request::Label, Some(made)) => return made.label(),
            (Request::Memory, Some(made)) => made,
        };
        made.memory()
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn is_local(pod: &Pod) -> bool {
    pod.node.as_ref().is_some_and(|node| node.to_string() == NODE)
}

impl Made {
    /// Programs whose maps hold no policy yet, and the node's pods.
    fn open(&mut self) -> Result<Programs> {
        // Those before let go of their maps first.
        self.loaded = None;
        self.opened += 1;
        let pin_dir = self.pin_dir.join(self.opened.to_string());
        std::fs::create_dir(&pin_dir).with_context(|| format!("create {}", pin_dir.display()))?;
        let mut programs = Programs::open(BpfConfig { pin_dir, limits: Limits::default() })?;
        programs.apply_node(&NodeConfig {
            addresses: vec![[192, 168, 77, 1].into()],
            netns_cookie: 1,
            uplink_ifindex: LO,
            tunnel_ifindex: LO,
            vni: 7,
            tunnel_port: 4789,
            ..NodeConfig::default()
        })?;
        for (number, pod) in self.world.pods.values().filter(|pod| is_local(pod)).enumerate() {
            let id = u32::try_from(number)? + 1;
            let pod = LocalPod {
                name: pod.name.clone(),
                container_id: pod.name.to_string(),
                addresses: pod.ips.to_vec(),
                host_device: "lo".to_owned(),
                ifindex: LO,
                mac: [2, 0, 0, 0, 0, 1],
                host_mac: [2, 0, 0, 0, 0, 2],
                // Of nobody's namespace: no socket is made here.
                netns_cookie: 1_000_000 + u64::from(id),
                pod_id: id,
            };
            programs.set_pod(&pod, Isolation::Sets(PodSets::default()))?;
        }
        Ok(programs)
    }

    fn everything(&mut self) -> Result<Took> {
        let mut programs = self.open()?;
        let (view, node) = (View::of(&self.world), NodeName::new(NODE));
        let mut compiler = Compiler::new(GRACE);
        let begun = Instant::now();
        compiler.follow(&view, &node, NOW, &Touched::everything())?;
        let compile = milliseconds(begun);
        let begun = Instant::now();
        let mut checker = Checker::new(node.clone());
        checker.check(&view, compiler.image())?;
        let checked = milliseconds(begun);
        let begun = Instant::now();
        let changes = programs.apply_policy(compiler.image())?;
        let load = milliseconds(begun);
        self.loaded = Some(Loaded { programs, compiler, checker });
        Ok(Took { compile, check: checked, load, entries: changes.written + changes.removed, bytes_a_pod: 0.0 })
    }

    fn label(&mut self) -> Result<Took> {
        let loaded = self.loaded.as_mut().context("nothing is loaded yet")?;
        self.labels += 1;
        let apps = self.world.pods.values().filter_map(|pod| pod.labels.get("app"));
        let app = apps.clone().nth(self.labels * 97).cloned().context("a pod without a label")?;
        let mut remote = self.world.pods.values().filter(|pod| !is_local(pod));
        let name: NamespacedName = remote.nth(self.labels * 101).context("too few pods on other nodes")?.name.clone();
        if let Some(pod) = self.world.pods.get_mut(&name) {
            pod.labels.insert("app".to_owned(), app);
        }
        let mut touched = Touched::nothing();
        touched.pod(name);
        let (view, node) = (View::of(&self.world), NodeName::new(NODE));
        let begun = Instant::now();
        loaded.compiler.follow(&view, &node, NOW, &touched)?;
        let compile = milliseconds(begun);
        let begun = Instant::now();
        let changes = loaded.compiler.changes().context("the compiler does not know what it changed")?;
        loaded.checker.follow(&view, loaded.compiler.image(), Some(changes), &touched)?;
        let checked = milliseconds(begun);
        let begun = Instant::now();
        let changes = PolicyChanges { pods: loaded.compiler.image().pods.clone(), ..changes.clone() };
        let changes = loaded.programs.apply_policy_changes(&changes)?;
        let load = milliseconds(begun);
        Ok(Took { compile, check: checked, load, entries: changes.written + changes.removed, bytes_a_pod: 0.0 })
    }

    fn memory(&mut self) -> Result<Took> {
        let mut programs = self.open()?;
        let node = NodeName::new(NODE);
        let mut alone = World { pods: BTreeMap::new(), ..self.world.clone() };
        let local = self.world.pods.iter().filter(|(_, pod)| is_local(pod));
        alone.pods.extend(local.map(|(name, pod)| (name.clone(), pod.clone())));
        let remote = self.world.pods.len() - alone.pods.len();
        let mut compiler = Compiler::new(GRACE);
        programs.apply_policy(&compiler.compile(&View::of(&alone), &node, NOW)?)?;
        let before = map_memory("self")?;
        // Sets are the same, whoever their peers are: what comes is of the pods.
        programs.apply_policy(&compiler.compile(&View::of(&self.world), &node, NOW)?)?;
        let grown = (map_memory("self")? - before) * 1_048_576.0;
        Ok(Took { bytes_a_pod: grown / remote.max(1) as f64, ..Took::default() })
    }
}
