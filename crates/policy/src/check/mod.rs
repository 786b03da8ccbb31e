//! The translation check: an image is read as the kernel will read it, and must say what the policies say.
//!
//! It covers every pod of the node, every class of peers and every port of every protocol, not samples of them: peers are cut where any
//! policy in force on the node or any prefix of the image tells two of them apart, and ports are compared as sets. What the policies say
//! is read from their [clauses](crate::verify), not from what the compiler made of them; the two share only who holds which
//! address ([`Holders`]). The tests hold the check against flows that are judged one by one, and break images to see that it notices.
//!
//! Its cost grows with the peers that some policy of the node names, and with the classes of each set; not with pods × policies.

mod effort;
mod peers;
mod rows;
mod scope;
mod subject;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use towpath_model::desired::{LocalClass, PodSets, PolicyImage, RowProtocol, SetId, Verdict};
use towpath_model::{Direction, NamespacedName, NodeName, Pod};

use self::effort::{Effort, TooMuch};
use self::peers::Peers;
use self::rows::Rows;
pub use self::scope::{Before, Scope};
use self::subject::{Interest, Subjects, Text};
use crate::evaluate::{Evaluator, Flow, Side};
use crate::verify::addresses::Addresses;
use crate::verify::ports::Ports;
use crate::view::{Holder, Holders, View};

/// What a check that found nothing looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Kinds of pods of the node, by direction: those that the same policies select.
    pub subjects: usize,
    /// Kinds of peers.
    pub peers: usize,
    /// Sets of ports that were compared.
    pub compared: usize,
}

/// An image does not say what the policies say, or nobody knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// A pod of the node is not in the image.
    Missing {
        /// The pod.
        pod: NamespacedName,
        /// Its address.
        address: IpAddr,
    },
    /// The image has a pod at an address that is none of this node's.
    Surplus {
        /// The address.
        address: IpAddr,
    },
    /// The policies tell more apart than is checked; whether the image does is not known.
    TooLarge,
    /// A flow is judged otherwise.
    Flow {
        /// The pod whose policies are asked.
        pod: NamespacedName,
        /// The direction.
        direction: Direction,
        /// The flow; others may be judged otherwise too.
        flow: Flow,
        /// What the image says.
        image: Verdict,
        /// What the policies say, with the reason.
        policies: Option<Box<Side>>,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Missing { pod, address } => {
                write!(f, "pod {pod} ({address}) has no policy in the compiled image, not even an open one")
            }
            Mismatch::Surplus { address } => {
                write!(f, "the compiled image has a pod at {address}, where this node has none")
            }
            Mismatch::TooLarge => f.write_str(
                "the policies that select pods of this node are too large to be checked (peers times rules): look for thousands of \
                 rules that each speak of the same addresses",
            ),
            Mismatch::Flow { pod, direction, flow, image, policies } => {
                let (asked, said) = match direction {
                    Direction::Ingress => (flow.source, "to reach"),
                    Direction::Egress => (flow.destination, "to be reached by"),
                };
                let image = if *image == Verdict::Allow { "allows" } else { "denies" };
                write!(f, "the compiled image {image} {asked} {said} pod {pod} on ")?;
                match flow.protocol {
                    RowProtocol::Ports(protocol) => write!(f, "{protocol} {}", flow.port)?,
                    RowProtocol::Other => f.write_str("protocols without ports")?,
                }
                match policies {
                    Some(side) => write!(f, ", the policies say: {side}"),
                    None => f.write_str(", the policies otherwise"),
                }
            }
        }
    }
}

impl std::error::Error for Mismatch {}

impl From<TooMuch> for Box<Mismatch> {
    fn from(_: TooMuch) -> Self {
        Box::new(Mismatch::TooLarge)
    }
}

/// Checks an image of `node` against the policies of the view that it was compiled from.
///
/// # Errors
/// The first flow that the two judge differently, or a pod that only one of them knows.
pub fn check(view: &View<'_>, node: &NodeName, image: &PolicyImage, scope: &Scope) -> Result<Checked, Box<Mismatch>> {
    let mut checked = Checked::default();
    if scope.is_empty() {
        return Ok(checked);
    }
    let whom = Whom { peers: &scope.peers, prefixes: Addresses::of_all(&scope.prefixes) };
    // Whoever gave or took an address: the node's own pods are always looked at.
    let mut known: HashSet<IpAddr> = image.pods.keys().chain(&scope.peers).copied().collect();
    known.extend(view.pod_ips.values().flatten());
    let asked = |ip: IpAddr| scope.everything || known.contains(&ip) || whom.prefixes.has(ip);
    let holders = Holders::among(view, asked);
    let own = own_pods(&holders, node);
    same_pods(&own, image)?;
    let interest = match scope.everything || !scope.prefixes.is_empty() {
        true => Interest::Everybody,
        false => Interest::of(view, &holders, &scope.peers),
    };
    let mut subjects = Subjects::of(view, interest);
    let texts = subjects.select(&own, image);
    let check = Check { view, holders: &holders, image };
    if scope.everything {
        check.run(&subjects, &texts, None, &mut checked)?;
        return Ok(checked);
    }
    check.run(&subjects, &texts, Some(&whom), &mut checked)?;
    let new = texts.iter().filter(|text| {
        let pods = text.addresses.iter().filter_map(|address| own.get(address));
        scope.is_new(&text.addresses, pods.map(|pod| &pod.name.namespace))
    });
    let new = new.flat_map(|text| &text.addresses);
    let new: BTreeMap<IpAddr, &Pod> = new.filter_map(|address| Some((*address, *own.get(address)?))).collect();
    if !new.is_empty() {
        let mut subjects = Subjects::of(view, Interest::Everybody);
        let texts = subjects.select(&new, image);
        Check { view, holders: &Holders::of(view), image }.run(&subjects, &texts, None, &mut checked)?;
    }
    Ok(checked)
}

/// Some peers.
struct Whom<'s> {
    peers: &'s BTreeSet<IpAddr>,
    prefixes: Addresses,
}

impl Whom<'_> {
    fn is_nobody(&self) -> bool {
        self.peers.is_empty() && self.prefixes.is_empty()
    }

    fn has(&self, address: IpAddr) -> bool {
        self.peers.contains(&address) || self.prefixes.has(address)
    }
}

/// An image, and what it was made of.
struct Check<'c, 'a> {
    view: &'c View<'a>,
    holders: &'c Holders<'a>,
    image: &'c PolicyImage,
}

impl<'a> Check<'_, 'a> {
    /// Compares what is said of these pods and everybody, or these.
    fn run(
        &self,
        subjects: &Subjects<'a>,
        texts: &[Text<'a>],
        whom: Option<&Whom<'_>>,
        checked: &mut Checked,
    ) -> Result<(), Box<Mismatch>> {
        let texts = || texts.iter().filter(|text| !text.is_open());
        if texts().next().is_none() || whom.is_some_and(Whom::is_nobody) {
            return Ok(());
        }
        let mut effort = Effort::new();
        let peers = Peers::cut(self.view, self.holders, self.image, subjects, whom, &mut effort)?;
        checked.peers += peers.len();
        let mut rows = Rows::of(self.image);
        for text in texts() {
            checked.subjects += 1;
            if let Some(difference) = compare(subjects, text, &peers, &mut rows, checked, &mut effort)? {
                return Err(Box::new(named(self.view, text, &difference)));
            }
        }
        Ok(())
    }
}

/// The pods of the node, by address.
fn own_pods<'a>(holders: &Holders<'a>, node: &NodeName) -> BTreeMap<IpAddr, &'a Pod> {
    let of_node = holders.all().filter_map(|(address, holder)| match holder {
        Holder::Pod(pod) if pod.node.as_ref() == Some(node) => Some((address, pod)),
        _ => None,
    });
    of_node.collect()
}

fn same_pods(own: &BTreeMap<IpAddr, &Pod>, image: &PolicyImage) -> Result<(), Box<Mismatch>> {
    if let Some((address, pod)) = own.iter().find(|(address, _)| !image.pods.contains_key(*address)) {
        return Err(Box::new(Mismatch::Missing { pod: pod.name.clone(), address: *address }));
    }
    match image.pods.keys().find(|address| !own.contains_key(*address)) {
        Some(address) => Err(Box::new(Mismatch::Surplus { address: *address })),
        None => Ok(()),
    }
}

/// Where an image and the policies differ.
struct Difference {
    peer: IpAddr,
    protocol: RowProtocol,
    port: u16,
    image: Verdict,
}

/// Compares what the image says of a set's pods with their policies, over all peers and ports.
fn compare(
    subjects: &Subjects<'_>,
    text: &Text<'_>,
    peers: &Peers<'_>,
    rows: &mut Rows<'_>,
    checked: &mut Checked,
    effort: &mut Effort,
) -> Result<Option<Difference>, TooMuch> {
    let program = subjects.program(text);
    let classes = rows.classes(text.set);
    // Whom a step of the program, or the set, tells from a stranger. All others are strangers to both: one stands for them.
    let mut visited = vec![false; peers.len()];
    let told_apart = program.tells_apart(peers).chain(classes.keys().flat_map(|class| peers.of_class(*class)));
    told_apart.filter_map(|kind| usize::try_from(*kind).ok()).for_each(|kind| {
        visited.get_mut(kind).into_iter().for_each(|seen| *seen = true);
    });
    visited.iter_mut().find(|seen| !**seen).into_iter().for_each(|seen| *seen = true);
    let mut outcomes: HashMap<Vec<u32>, (Ports, HashSet<LocalClass>)> = HashMap::new();
    for kind in visited.into_iter().zip(peers.all()).filter_map(|(seen, kind)| seen.then_some(kind)) {
        let class = classes.get(&kind.class).copied().unwrap_or_default();
        let case = program.case(kind);
        effort.take(1 + case.len())?;
        let (said, known) = outcomes.entry(case.key()).or_insert_with(|| (program.run(&case), HashSet::new()));
        if !known.insert(class) {
            continue;
        }
        checked.compared += 1;
        let held = rows.ports(text.set, class);
        if held == *said {
            continue;
        }
        let too_much = held.without(said);
        let (ports, image) =
            if too_much.is_empty() { (said.without(&held), Verdict::Deny) } else { (too_much, Verdict::Allow) };
        if let Some((protocol, port)) = ports.sample() {
            return Ok(Some(Difference { peer: kind.sample, protocol, port, image }));
        }
    }
    Ok(None)
}

/// A difference as people read it: with the reason that the evaluator gives.
fn named(view: &View<'_>, text: &Text<'_>, difference: &Difference) -> Mismatch {
    let own = text.addresses.iter().copied().find(|a| a.is_ipv4() == difference.peer.is_ipv4());
    let own = own.or_else(|| text.addresses.first().copied()).unwrap_or(difference.peer);
    let (source, destination) = match text.direction {
        Direction::Ingress => (difference.peer, own),
        Direction::Egress => (own, difference.peer),
    };
    let flow = Flow { source, destination, protocol: difference.protocol, port: difference.port, forwarded: true };
    Mismatch::Flow {
        pod: text.pod.name.clone(),
        direction: text.direction,
        flow,
        image: difference.image,
        policies: Evaluator::new(view).side(&flow, text.direction).map(Box::new),
    }
}

/// The set of a direction.
fn set_of(sets: PodSets, direction: Direction) -> SetId {
    match direction {
        Direction::Ingress => sets.ingress,
        Direction::Egress => sets.egress,
    }
}
