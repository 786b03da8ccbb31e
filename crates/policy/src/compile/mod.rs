//! The policies in force on one node, compiled to what its kernel holds.
//!
//! A compilation looks at everything, but costs little: selectors are answered by an index over groups of equal pods, and sets
//! see kinds of peers, not peers. Ids outlive it (see [`Compiler::compile`]), so that the difference between two images is as
//! small as what changed.
//!
//! Whoever applies an image over the one before does it in this order; then after every single write each flow is judged as one
//! of the two images says, if they differ by one object (`tests/transition.rs`), else as if the objects changed one by one:
//! 1. new [`rows`](PolicyImage::rows) and new [`set_classes`](PolicyImage::set_classes); neither ever changes in place;
//! 2. [`cidr_classes`](PolicyImage::cidr_classes) added and changed, then [`pod_classes`](PolicyImage::pod_classes) added and
//!    changed, then entries of both removed;
//! 3. the sets of [`pods`](PolicyImage::pods);
//! 4. the revision, and only then rows, and after them set classes, that the new image does not have are removed. (Who still has a set in
//!    hand finds no row then, which denies; without its class, the peer would be a stranger to it, who may be allowed.)
//!
//! Done otherwise (removals of step 2 at the end) a flow may be denied for a moment, but never allowed against both images.

mod bits;
mod bridge;
mod classes;
mod groups;
mod ids;
mod partition;
mod ports;
mod program;
mod regions;
mod set;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::desired::{
    ClassId, LocalClass, PodSets, PolicyImage, PolicyRef, Row, RowKey, RuleId, RuleInfo, SetId, Verdict,
};
use towpath_model::{Action, ClusterNetworkPolicy, Direction, NetworkPolicy, NodeName, Tier};

use self::bits::Bits;
use self::bridge::Bridge;
use self::classes::{Classes, Content, Members};
use self::groups::Groups;
use self::ids::Ids;
use self::partition::{Atoms, PodRanges, Sample};
use self::program::{Program, Rules, Stage};
use self::set::{Set, SetKey};
use crate::view::{Holders, View};

/// Highest rule id that is not reserved, see [`RuleId`].
const MAX_RULE: u32 = 0xffff_ffef;

/// At most so many sets that no pod has any more are kept; a storm of changes must not make every compilation slow.
const MAX_RETIRED: usize = 512;

/// What a kernel still holds from an earlier run of the agent.
#[derive(Clone, Debug, Default)]
pub struct UsedIds {
    /// Sets.
    pub sets: BTreeSet<SetId>,
    /// Classes.
    pub classes: BTreeSet<ClassId>,
    /// Rules, also those that only connections refer to.
    pub rules: BTreeSet<RuleId>,
    /// The maps themselves: classes, set classes, rows, and the sets of pods. What it says of rules and of who isolates is not read.
    pub held: PolicyImage,
}

/// The programs of each group of pods, in the order in which they are asked.
type Selected = BTreeMap<(usize, Direction), Vec<Arc<Program>>>;

/// Where a rule id comes from: version of the program, rule, peer, port.
type RuleKey = (u64, u32, Option<u32>, Option<u32>);

/// Compiles the policies of one node, again and again.
#[derive(Debug)]
pub struct Compiler {
    grace: Duration,
    programs: HashMap<(PolicyRef, Direction), Arc<Program>>,
    next_version: u64,
    sets: BTreeMap<SetKey, Set>,
    set_ids: Ids,
    classes: Classes,
    rules: HashMap<RuleKey, RuleId>,
    rule_ids: Ids,
    bridge: Option<Bridge>,
}

impl Compiler {
    /// A compiler that has nothing yet. `grace`: how long ids rest before they may be used again, and how long a set stays in
    /// the image after its last pod left it. It must be longer than applying an image takes; a few seconds are plenty.
    pub fn new(grace: Duration) -> Self {
        Self {
            grace,
            programs: HashMap::new(),
            next_version: 0,
            sets: BTreeMap::new(),
            set_ids: Ids::up_to(u32::MAX),
            classes: Classes::new(Ids::up_to(u32::MAX)),
            rules: HashMap::new(),
            rule_ids: Ids::up_to(MAX_RULE),
            bridge: None,
        }
    }

    /// A compiler for a kernel that already holds an image: its ids are not used for anything else, and until the grace period after
    /// the first compilation is over, images say of every peer what the sets that pods had say of it (so that a kernel between what it
    /// holds and the first image judges by one of them).
    pub fn resume(grace: Duration, used: &UsedIds, now: Duration) -> Self {
        let mut compiler = Self::new(grace);
        compiler.set_ids.avoid(used.sets.iter().map(|id| id.0).filter(|id| *id != 0), now);
        compiler.classes.ids.avoid(used.classes.iter().map(|id| id.0).filter(|id| *id != 0), now);
        compiler.rule_ids.avoid(used.rules.iter().map(|id| id.0).filter(|id| (1..=MAX_RULE).contains(id)), now);
        compiler.bridge = Bridge::of(&used.held);
        compiler
    }

    /// Compiles for the pods of `node`. `now` is any clock that does not go back.
    ///
    /// Against the image before: a set whose policies and named ports are the same keeps its id, a changed one gets another; a
    /// local class and a rule keep theirs within a set; a class keeps its id while the remaining sets see it as before. Sets
    /// without pods stay for the grace period, so that a kernel between two images still judges by one of them.
    pub fn compile(&mut self, view: &View<'_>, node: &NodeName, now: Duration) -> PolicyImage {
        self.set_ids.rested(now, self.grace);
        self.classes.ids.rested(now, self.grace);
        self.rule_ids.rested(now, self.grace);
        let holders = Holders::of(view);
        // Sets that are only kept for the grace period must still see nodes as they did.
        let with_nodes = view.world.cluster_policies.values().any(ClusterNetworkPolicy::has_nodes)
            || self.programs.values().any(|program| program.has_nodes());
        let mut groups = Groups::of(view, &holders, node, with_nodes);
        let of_group = self.choose_sets(view, &mut groups, now);
        let image = self.compile_sets(view, &holders, &mut groups, now);
        let image = self.with_pods(image, &groups, &of_group);
        let mut image = self.with_rows(image, now);
        if self.bridge.as_ref().and_then(Bridge::until).is_some_and(|until| until <= now)
            && let Some(bridge) = self.bridge.take()
        {
            bridge.end(&mut self.classes.ids, now);
        }
        if let Some(bridge) = &mut self.bridge {
            bridge.span(&mut image, &mut self.classes.ids, now, self.grace);
        }
        image
    }

    /// When to compile again although nothing changed: then sets that no pod has leave the image.
    pub fn next_expiry(&self) -> Option<Duration> {
        let retired =
            self.sets.values().filter_map(|set| set.retired).min().map(|since| since.saturating_add(self.grace));
        retired.into_iter().chain(self.bridge.as_ref().and_then(Bridge::until)).min()
    }

    /// Finds the sets of every group with a local pod, makes new ones, retires and drops old ones.
    fn choose_sets(&mut self, view: &View<'_>, groups: &mut Groups<'_>, now: Duration) -> HashMap<usize, PodSets> {
        let mut local = Bits::none(groups.len());
        groups.members.iter().filter(|m| m.local.is_some()).for_each(|m| local.insert(m.group));
        let mut selected = Selected::new();
        self.select_cluster(view, groups, &local, Tier::Admin, &mut selected);
        let namespaces: BTreeSet<&str> = local.iter().filter_map(|g| groups.namespace(g)).collect();
        for policy in view.world.policies.values().filter(|p| namespaces.contains(p.name.namespace.as_str())) {
            let mut bits = groups.in_namespace(&policy.name.namespace);
            bits.intersect(&local);
            bits.intersect(&groups.with_labels(&policy.pod_selector));
            for direction in [Direction::Ingress, Direction::Egress] {
                let mut program = None;
                for group in bits.iter().filter(|_| policy.rules(direction).is_some()) {
                    let program = program.get_or_insert_with(|| self.program(policy, direction));
                    selected.entry((group, direction)).or_default().push(program.clone());
                }
            }
        }
        self.select_cluster(view, groups, &local, Tier::Baseline, &mut selected);
        let mut live: HashSet<SetId> = HashSet::new();
        let mut of_group: HashMap<usize, PodSets> = HashMap::new();
        for ((group, direction), programs) in selected {
            let id = self.set_of(groups, group, direction, programs);
            live.insert(id);
            let sets = of_group.entry(group).or_default();
            match direction {
                Direction::Ingress => sets.ingress = id,
                Direction::Egress => sets.egress = id,
            }
        }
        self.retire(&live, now);
        of_group
    }

    /// Adds the programs of a tier, in the order in which they are asked.
    fn select_cluster(
        &mut self,
        view: &View<'_>,
        groups: &mut Groups<'_>,
        local: &Bits,
        tier: Tier,
        selected: &mut Selected,
    ) {
        for policy in view.world.cluster_policies_of(tier) {
            let mut bits = groups.in_namespaces(&policy.subject.namespaces).as_ref().clone();
            bits.intersect(local);
            bits.intersect(&groups.with_labels(&policy.subject.pods));
            for direction in [Direction::Ingress, Direction::Egress] {
                let mut program = None;
                for group in bits.iter().filter(|_| !policy.rules(direction).is_empty()) {
                    let programs = selected.entry((group, direction)).or_default();
                    // What a NetworkPolicy isolates never gets to the baseline.
                    if tier == Tier::Baseline && programs.iter().any(|p| p.stage == Stage::Namespaced) {
                        continue;
                    }
                    let program = program.get_or_insert_with(|| self.cluster_program(policy, direction));
                    programs.push(program.clone());
                }
            }
        }
        selected.retain(|_, programs| !programs.is_empty());
    }

    fn program(&mut self, policy: &NetworkPolicy, direction: Direction) -> Arc<Program> {
        let rules = policy.rules(direction).unwrap_or_default();
        let key = (PolicyRef::Namespaced(policy.name.clone()), direction);
        if let Some(known) = self.programs.get(&key)
            && matches!(&known.rules, Rules::Namespaced(same) if same == rules)
        {
            return known.clone();
        }
        self.next_version += 1;
        let program = Arc::new(Program::of(&policy.name, direction, rules, self.next_version));
        self.programs.insert(key, program.clone());
        program
    }

    fn cluster_program(&mut self, policy: &ClusterNetworkPolicy, direction: Direction) -> Arc<Program> {
        let rules = policy.rules(direction);
        let key = (PolicyRef::Cluster { tier: policy.tier, name: policy.name.clone() }, direction);
        if let Some(known) = self.programs.get(&key)
            && matches!(&known.rules, Rules::Cluster(same) if same == rules)
        {
            return known.clone();
        }
        self.next_version += 1;
        let program = Program::of_cluster(&policy.name, policy.tier, direction, rules, self.next_version);
        let program = Arc::new(program);
        self.programs.insert(key, program.clone());
        program
    }

    fn set_of(
        &mut self,
        groups: &Groups<'_>,
        group: usize,
        direction: Direction,
        programs: Vec<Arc<Program>>,
    ) -> SetId {
        let resolved = match direction {
            Direction::Egress => Vec::new(),
            Direction::Ingress => {
                let names = programs.iter().flat_map(|p| &p.named);
                names.map(|(name, protocol)| groups.named_port(group, name, *protocol)).collect()
            }
        };
        let key = SetKey { direction, versions: programs.iter().map(|p| p.version).collect(), resolved };
        if let Some(set) = self.sets.get(&key) {
            return set.id;
        }
        let id = SetId(self.set_ids.take());
        self.sets.insert(key.clone(), Set::new(id, key, programs));
        id
    }

    fn retire(&mut self, live: &HashSet<SetId>, now: Duration) {
        for set in self.sets.values_mut() {
            set.retired = if live.contains(&set.id) { None } else { set.retired.or(Some(now)) };
        }
        let mut retired: Vec<(Duration, SetId)> =
            self.sets.values().filter_map(|set| Some((set.retired?, set.id))).collect();
        retired.sort_unstable();
        let surplus = retired.len().saturating_sub(MAX_RETIRED);
        let expired: HashSet<SetId> = retired
            .iter()
            .enumerate()
            // Those that pods have until this very image is applied stay in any case: the kernel still judges by them.
            .filter(|(index, (since, _))| (*index < surplus && *since < now) || since.saturating_add(self.grace) <= now)
            .map(|(_, (_, id))| *id)
            .collect();
        self.sets.retain(|_, set| !expired.contains(&set.id));
        expired.iter().for_each(|id| self.set_ids.release(id.0, now));
        self.programs.retain(|_, program| Arc::strong_count(program) > 1);
    }

    /// Cuts the peers, lets every set classify them, and fills in the classes.
    fn compile_sets(
        &mut self,
        view: &View<'_>,
        holders: &Holders<'_>,
        groups: &mut Groups<'_>,
        now: Duration,
    ) -> PolicyImage {
        let programs: BTreeMap<u64, Arc<Program>> =
            self.sets.values().flat_map(|set| &set.programs).map(|p| (p.version, p.clone())).collect();
        // Only who denies pods must know where there may be more of them.
        let doubts = programs.values().any(|program| program.doubts());
        let pods = if doubts { PodRanges::of(view, holders) } else { PodRanges::default() };
        let atoms = programs.values().flat_map(|p| &p.clauses).filter_map(|c| c.atom.as_ref());
        let atoms = Atoms::of(atoms, groups, &pods);
        let egress_names: BTreeSet<(&str, _)> = programs
            .values()
            .filter(|p| p.direction == Direction::Egress)
            .flat_map(|p| p.named.iter().map(|(name, protocol)| (name.as_str(), *protocol)))
            .collect();
        let kinds = atoms.cut(groups, egress_names.into_iter());
        let mut contents: Vec<Content> = vec![Content::new(); kinds.samples.len()];
        let mut scratch = Vec::new();
        let mut sets: Vec<&mut Set> = self.sets.values_mut().collect();
        sets.sort_unstable_by_key(|set| set.id);
        for set in sets {
            let numbers: Vec<Option<usize>> =
                set.clauses().map(|(_, c)| c.atom.as_ref().and_then(|a| atoms.number(a))).collect();
            set.begin();
            let mut concerned =
                if set.asks_everyone() { kinds.all() } else { kinds.matched_by(numbers.iter().copied().flatten()) };
            if set.doubts() {
                concerned.unite(&kinds.unknown_pods);
            }
            for kind in concerned.iter() {
                let (Some((group, region)), Some(content)) = (kinds.samples.get(kind), contents.get_mut(kind)) else {
                    continue;
                };
                let sample = Sample { atoms: &atoms, groups, group: *group, region: *region };
                let class = set.classify(&numbers, &sample, &mut scratch);
                if class != LocalClass(0) {
                    content.push((set.id, class));
                }
            }
            set.forget_unused();
        }
        let addresses: Vec<(IpAddr, usize)> =
            groups.members.iter().map(|m| m.address).zip(kinds.of_member.iter().copied()).collect();
        let regions: Vec<(IpNet, usize)> =
            atoms.regions.iter().map(|(net, _)| net).zip(kinds.of_region.iter().copied()).collect();
        let members = Members { addresses: &addresses, regions: &regions };
        let all_sets = self.sets.values().map(|set| set.id).collect();
        let of_kind = self.classes.assign(&contents, all_sets, &members, now);
        let class = |kind: usize| of_kind.get(kind).copied().unwrap_or_default();
        self.with_classes(&atoms, &addresses, &regions, class)
    }

    /// Classes of addresses; an entry that a shorter prefix already implies is left out.
    fn with_classes(
        &self,
        atoms: &Atoms<'_>,
        addresses: &[(IpAddr, usize)],
        regions: &[(IpNet, usize)],
        class: impl Fn(usize) -> ClassId,
    ) -> PolicyImage {
        let mut image = PolicyImage::default();
        let of_region: Vec<ClassId> = regions.iter().map(|(_, kind)| class(*kind)).collect();
        let at = |region: Option<usize>| region.and_then(|r| of_region.get(r).copied()).unwrap_or_default();
        for (index, (net, parent)) in atoms.regions.iter().enumerate() {
            let own = at(Some(index));
            if own != at(parent) {
                image.cidr_classes.insert(net, own);
            }
        }
        for (address, kind) in addresses {
            let own = class(*kind);
            if own != at(atoms.regions.find(*address)) {
                image.pod_classes.insert(*address, own);
            }
        }
        for (id, content) in self.classes.contents() {
            image.set_classes.extend(content.iter().map(|(set, local)| ((*set, id), *local)));
        }
        image
    }

    fn with_pods(
        &self,
        mut image: PolicyImage,
        groups: &Groups<'_>,
        of_group: &HashMap<usize, PodSets>,
    ) -> PolicyImage {
        for member in groups.members.iter().filter(|m| m.local.is_some()) {
            image.pods.insert(member.address, of_group.get(&member.group).copied().unwrap_or_default());
        }
        image
    }

    fn with_rows(&mut self, mut image: PolicyImage, now: Duration) -> PolicyImage {
        let mut rules: HashMap<RuleKey, RuleId> = HashMap::with_capacity(self.rules.len());
        for set in self.sets.values() {
            let clauses: Vec<_> = set.clauses().collect();
            let names = set.programs.iter().filter_map(|program| match &program.policy {
                PolicyRef::Namespaced(name) => Some(name.clone()),
                PolicyRef::Cluster { .. } => None,
            });
            let names = names.collect();
            image.isolating.insert(set.id, names);
            for (class, rows) in set.rows() {
                for draft in rows.iter() {
                    let row = RowKey {
                        set: set.id,
                        class,
                        protocol: draft.protocol,
                        port: draft.port,
                        port_bits: draft.port_bits,
                    };
                    let Some(position) = draft.clause else {
                        image.rows.insert(row, Row { verdict: Verdict::Allow, rule: RuleId::NOT_ISOLATED });
                        continue;
                    };
                    let position = usize::try_from(position).unwrap_or(usize::MAX);
                    let Some((index, clause)) = clauses.get(position) else { continue };
                    let Some(program) = set.programs.get(*index) else { continue };
                    let key = (program.version, clause.rule, clause.peer, draft.port_index);
                    let rule = *rules.entry(key).or_insert_with(|| {
                        let known = self.rules.get(&key).copied();
                        let rule = known.unwrap_or_else(|| RuleId(self.rule_ids.take()));
                        let info = RuleInfo {
                            policy: program.policy.clone(),
                            direction: program.direction,
                            rule: clause.rule,
                            name: program.rule_name(clause.rule).to_owned(),
                            peer: clause.peer,
                            port: draft.port_index,
                        };
                        image.rules.insert(rule, info);
                        rule
                    });
                    let verdict = if clause.action == Action::Deny { Verdict::Deny } else { Verdict::Allow };
                    image.rows.insert(row, Row { verdict, rule });
                }
            }
        }
        for (key, id) in &self.rules {
            if !rules.contains_key(key) {
                self.rule_ids.release(id.0, now);
            }
        }
        self.rules = rules;
        image
    }
}
