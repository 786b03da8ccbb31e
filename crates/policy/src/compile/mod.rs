//! The policies in force on one node, compiled to what its kernel holds.
//!
//! A first compilation looks at everything, but costs little: selectors are answered by an index of labels over groups of equal pods, and
//! sets see kinds of peers, not peers. A later one looks at what changed ([`Touched`]) and at what that changes: a pod's labels touch its
//! class and the sets that its class newly meets, a policy the pods of its namespace on this node and the peers that its rules match.
//! Either way the image is the same, with the same ids (`tests/incremental.rs`). Ids outlive it (see [`Compiler::compile`]), so that the
//! difference between two images is as small as what changed.
//!
//! Whoever applies an image over the one before does it in this order; then after every single write each flow is judged as one
//! of the two images says, if they differ by one object (`tests/transition.rs`), else as if the objects changed one by one:
//! 1. new [`rows`](PolicyImage::rows) and new [`set_classes`](PolicyImage::set_classes); neither ever changes in place;
//! 2. [`pod_classes`](PolicyImage::pod_classes) added and changed; [`cidr_classes`](PolicyImage::cidr_classes) added and changed, the longest
//!    first, then removed, the shortest first; then `pod_classes` removed. So an address goes from its class before to that after in one
//!    step: a pod that a block begins to cover (or DNS, of a name that somebody hostile has) is a pod before it does;
//! 3. the sets of [`pods`](PolicyImage::pods);
//! 4. the revision, and only then rows, and after them set classes, that the new image does not have are removed. (Who still has a set in
//!    hand finds no row then, which denies; without its class, the peer would be a stranger to it, who may be allowed.)
//!
//! A policy that is only audited is in no set that judges. Pods that it selects have a second set of its direction, the one that they would
//! have if it were enforced ([`PodSets::audit_ingress`]): so what enforcing it would do is known before, and enforcing it is no more than
//! another number in the pods' entries, of a set whose rows have long been there.
//!
//! Done otherwise (removals of step 2 at the end) a flow may be denied for a moment, but never allowed against both images.

mod atoms;
mod bridge;
mod budget;
mod classes;
mod ids;
mod kinds;
mod lanes;
mod painted;
mod peers;
mod ports;
mod program;
mod programs;
mod regions;
mod set;
mod show;
mod sight;
mod space;
mod touched;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use towpath_model::desired::{
    ClassId, LocalClass, PodSets, PolicyChanges, PolicyImage, PolicyRef, Row, RuleId, SetId, Verdict,
};
use towpath_model::{ClusterNetworkPolicy, Direction, Labels, NamespacedName, NetworkPolicy, NodeName, Tier};

use self::bridge::Bridge;
use self::budget::Budget;
use self::classes::{Classes, Turnover};
use self::ids::Ids;
use self::peers::{Group, Peers};
use self::program::{Program, Rules, Stage};
use self::programs::{Programs, Whose};
use self::set::{RowDraft, RuleKey, Set, SetKey};
use self::show::Otherwise;
use self::sight::{Looks, Sight};
use crate::view::{PeerPod, View};

pub use self::budget::TooLarge;
pub use self::touched::Touched;

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

/// A program that selects a group of pods, and whether its policy is only audited.
type Asked = (Arc<Program>, bool);

/// The programs of each group of pods, in the order in which they are asked.
type Selected = BTreeMap<(u32, Direction), Vec<Asked>>;

/// The programs that judge: without those that are only audited, or as if they were enforced. What a NetworkPolicy isolates never gets to
/// the baseline.
fn judging(asked: &[Asked], as_if_enforced: bool) -> Vec<Arc<Program>> {
    let mut judging: Vec<&Asked> = asked.iter().filter(|(_, audited)| as_if_enforced || !audited).collect();
    if judging.iter().any(|(program, _)| program.stage == Stage::Namespaced) {
        judging.retain(|(program, _)| program.stage != Stage::Baseline);
    }
    judging.into_iter().map(|(program, _)| program.clone()).collect()
}

/// What a group has a set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// It judges.
    Enforced,
    /// It would, if the policies that are only audited were enforced.
    Audited,
}

/// What makes a set, and which groups have it for what.
#[derive(Default)]
struct Wanted {
    programs: Vec<Arc<Program>>,
    groups: Vec<(u32, Use)>,
    /// Those of its policies that are only audited.
    audited: BTreeSet<PolicyRef>,
}

/// How large what was compiled is. What grows in it is told in `docs/policy.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Policies that isolate a pod of the node, or have rules for one (or did, within the grace period).
    pub policies: usize,
    /// Sets.
    pub sets: usize,
    /// Classes but 0.
    pub classes: usize,
    /// Classes as sets see them: entries of [`PolicyImage::set_classes`].
    pub set_classes: usize,
    /// Rows.
    pub rows: usize,
    /// Entries of [`PolicyImage::pod_classes`].
    pub addresses: usize,
    /// Entries of [`PolicyImage::cidr_classes`].
    pub ranges: usize,
}

/// A group of this node's pods whose programs are looked for.
#[derive(Clone, Copy, Debug)]
struct Subject<'g> {
    group: u32,
    peer: PeerPod<'g>,
}

/// Compiles the policies of one node, again and again.
#[derive(Debug)]
pub struct Compiler {
    grace: Duration,
    programs: Programs,
    next_version: u64,
    sets: BTreeMap<SetId, Set>,
    set_keys: HashMap<SetKey, SetId>,
    set_ids: Ids,
    classes: Classes,
    /// With how many classes' rows refer to each.
    rules: HashMap<RuleKey, (RuleId, usize)>,
    rule_ids: Ids,
    bridge: Option<Bridge>,
    sight: Sight,
    image: PolicyImage,
    changes: PolicyChanges,
    /// The image as a kernel gets it that holds one of an earlier run.
    spanned: Option<PolicyImage>,
    /// The last image and the one before are not told apart by `changes`.
    rewritten: bool,
    compiled: bool,
    /// Policies with programs in force.
    policies: usize,
}

impl Compiler {
    /// A compiler that has nothing yet. `grace`: how long ids rest before they may be used again, and how long a set stays in
    /// the image after its last pod left it. It must be longer than applying an image takes; a few seconds are plenty.
    pub fn new(grace: Duration) -> Self {
        Self {
            grace,
            programs: Programs::default(),
            next_version: 0,
            sets: BTreeMap::new(),
            set_keys: HashMap::new(),
            set_ids: Ids::up_to(u32::MAX),
            classes: Classes::new(Ids::up_to(u32::MAX)),
            rules: HashMap::new(),
            rule_ids: Ids::up_to(MAX_RULE),
            bridge: None,
            sight: Sight::default(),
            image: PolicyImage::default(),
            changes: PolicyChanges::default(),
            spanned: None,
            rewritten: true,
            compiled: false,
            policies: 0,
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

    /// Compiles for the pods of `node`, looking at everything. `now` is any clock that does not go back.
    ///
    /// Against the image before: a set whose policies and named ports are the same keeps its id, a changed one gets another; a
    /// local class and a rule keep theirs within a set; a class keeps its id while the remaining sets see it as before. Sets
    /// without pods stay for the grace period, so that a kernel between two images still judges by one of them.
    ///
    /// # Errors
    /// The policies ask for more than is compiled. The image is the one before, and what is compiled next follows on it as on one of an
    /// earlier run ([`Compiler::resume`]).
    pub fn compile(&mut self, view: &View<'_>, node: &NodeName, now: Duration) -> Result<PolicyImage, TooLarge> {
        self.follow(view, node, now, &Touched::everything())?;
        Ok(self.image().clone())
    }

    /// As [`Compiler::compile`], looking at what is touched since the last time only. The image is the same, with the same ids.
    ///
    /// # Errors
    /// As of [`Compiler::compile`].
    pub fn follow(
        &mut self,
        view: &View<'_>,
        node: &NodeName,
        now: Duration,
        touched: &Touched,
    ) -> Result<(), TooLarge> {
        self.set_ids.rested(now, self.grace);
        self.classes.ids.rested(now, self.grace);
        self.rule_ids.rested(now, self.grace);
        self.changes = PolicyChanges::default();
        let mut sight = std::mem::take(&mut self.sight);
        let looks = sight.look(view, node, touched);
        let everything = Touched::everything();
        let touched = if matches!(looks, Looks::All { .. }) { &everything } else { touched };
        let (turnover, gone) = self.choose_sets(view, &mut sight, touched, now);
        if let Err(error) = self.compile_sets(view, &mut sight, &looks, touched, &turnover, &gone, now) {
            self.start_over(now);
            return Err(error);
        }
        self.with_pods(&sight);
        if matches!(looks, Looks::All { .. }) {
            full(&mut self.image.pod_classes);
            full(&mut self.image.set_classes);
            full(&mut self.image.rows);
        }
        self.sight = sight;
        if !gone.is_empty() {
            let programs = gone.iter().flat_map(|set| &set.programs);
            let whose: BTreeSet<Whose> = programs.map(|program| (program.policy.clone(), program.direction)).collect();
            drop(gone);
            if view.world.cluster_policies.is_empty() {
                self.programs.remove_idle(whose.into_iter());
            } else {
                // Of a tier some may have been made that no set got.
                self.programs.retain(|_, program| Arc::strong_count(program) > 1);
            }
        }
        self.policies = self.programs.policies_but(&self.image.audited.values().flatten().collect());
        self.span(now);
        Ok(())
    }

    /// Forgets all but the last image, as if an earlier run had made it.
    fn start_over(&mut self, now: Duration) {
        let held = self.image().clone();
        let used = UsedIds {
            sets: self.set_ids.taken().map(SetId).collect(),
            classes: self.classes.ids.taken().map(ClassId).collect(),
            rules: self.rule_ids.taken().map(RuleId).collect(),
            held: held.clone(),
        };
        *self = Self { spanned: Some(held), next_version: self.next_version, ..Self::resume(self.grace, &used, now) };
    }

    /// The image that was compiled last.
    pub fn image(&self) -> &PolicyImage {
        self.spanned.as_ref().unwrap_or(&self.image)
    }

    /// How the last image differs from the one before. None: nobody knows; the whole image is to be written.
    pub fn changes(&self) -> Option<&PolicyChanges> {
        (!self.rewritten).then_some(&self.changes)
    }

    /// How large the last image is.
    pub fn counts(&self) -> Counts {
        let image = self.image();
        Counts {
            policies: self.policies,
            sets: self.sets.len(),
            classes: self.classes.contents.len(),
            set_classes: image.set_classes.len(),
            rows: image.rows.len(),
            addresses: image.pod_classes.len(),
            ranges: image.cidr_classes.len(),
        }
    }

    /// While a kernel may hold sets of an earlier run, has the image speak to them.
    fn span(&mut self, now: Duration) {
        self.rewritten = self.spanned.take().is_some() || !std::mem::replace(&mut self.compiled, true);
        if self.bridge.as_ref().and_then(Bridge::until).is_some_and(|until| until <= now)
            && let Some(bridge) = self.bridge.take()
        {
            bridge.end(&mut self.classes.ids, now);
        }
        if let Some(bridge) = &mut self.bridge {
            let mut image = self.image.clone();
            bridge.span(&mut image, &mut self.classes.ids, now, self.grace);
            self.spanned = Some(image);
            self.rewritten = true;
        }
        if self.rewritten {
            // Nobody asks for them, and of a first image they are as large as it is.
            self.changes = PolicyChanges::default();
        }
    }

    /// When to compile again although nothing changed: then sets that no pod has leave the image.
    pub fn next_expiry(&self) -> Option<Duration> {
        let retired =
            self.sets.values().filter_map(|set| set.retired).min().map(|since| since.saturating_add(self.grace));
        retired.into_iter().chain(self.bridge.as_ref().and_then(Bridge::until)).min()
    }

    /// Finds the sets of every group with a local pod, makes new ones, retires and drops old ones: those dropped.
    fn choose_sets(
        &mut self,
        view: &View<'_>,
        sight: &mut Sight,
        touched: &Touched,
        now: Duration,
    ) -> (Turnover, Vec<Set>) {
        self.forget_changed(view, touched);
        let local = sight.peers.local_groups();
        sight.of_group.retain(|group, _| local.contains(group));
        let by_policy: BTreeSet<&str> = touched.policies.iter().map(|name| name.namespace.as_str()).collect();
        let any_cluster = !view.world.cluster_policies.is_empty();
        let again = |group: &u32, peer: &PeerPod<'_>| {
            touched.everything
                || touched.cluster_policies
                || !sight.of_group.contains_key(group)
                || by_policy.contains(peer.namespace)
                || (any_cluster && touched.namespaces.contains(peer.namespace))
        };
        let subjects = local.into_iter().filter_map(|group| {
            let peer = sight.peers.group(group)?.as_peer()?;
            again(&group, &peer).then_some(Subject { group, peer })
        });
        let mut by_namespace: BTreeMap<&str, Vec<Subject<'_>>> = BTreeMap::new();
        subjects.for_each(|subject| by_namespace.entry(subject.peer.namespace).or_default().push(subject));
        let mut selected = Selected::new();
        self.select_cluster(view, &by_namespace, Tier::Admin, &mut selected);
        for (namespace, subjects) in &by_namespace {
            let from = NamespacedName::new(*namespace, "");
            let policies = view.world.policies.range(from..).map(|(_, policy)| policy);
            for policy in policies.take_while(|policy| policy.name.namespace == *namespace) {
                let chosen: Vec<u32> = subjects
                    .iter()
                    .filter(|subject| policy.pod_selector.matches(subject.peer.labels))
                    .map(|subject| subject.group)
                    .collect();
                for direction in [Direction::Ingress, Direction::Egress] {
                    if policy.rules(direction).is_none() || chosen.is_empty() {
                        continue;
                    }
                    let asked = (self.program(policy, direction), policy.enforcement.is_audited());
                    for group in &chosen {
                        selected.entry((*group, direction)).or_default().push(asked.clone());
                    }
                }
            }
        }
        self.select_cluster(view, &by_namespace, Tier::Baseline, &mut selected);
        let chosen: Vec<u32> = by_namespace.values().flatten().map(|subject| subject.group).collect();
        let (sets, came) = self.sets_of(&sight.peers, selected);
        for group in chosen {
            sight.of_group.insert(group, sets.get(&group).copied().unwrap_or_default());
        }
        let live: HashSet<SetId> = sight.of_group.values().flat_map(PodSets::all).collect();
        let audits = sight.of_group.values().flat_map(|sets| [sets.audit_ingress, sets.audit_egress]);
        let audits: HashSet<SetId> = audits.collect();
        self.image.audited.retain(|set, _| audits.contains(set));
        let gone = self.retire(&live, now);
        let went = gone.iter().map(|set| set.id).collect();
        (Turnover { came, went }, gone)
    }

    /// Adds the programs of a tier, in the order in which they are asked.
    fn select_cluster(
        &mut self,
        view: &View<'_>,
        by_namespace: &BTreeMap<&str, Vec<Subject<'_>>>,
        tier: Tier,
        selected: &mut Selected,
    ) {
        let policies = view.world.cluster_policies_of(tier);
        if policies.is_empty() {
            return;
        }
        let labels: Vec<(&Vec<Subject<'_>>, Labels)> =
            by_namespace.iter().map(|(name, subjects)| (subjects, view.world.namespace_labels(name))).collect();
        for policy in policies {
            let inside = labels.iter().filter(|(_, labels)| policy.subject.namespaces.matches(labels));
            let chosen: Vec<u32> = inside
                .flat_map(|(subjects, _)| subjects.iter())
                .filter(|subject| policy.subject.pods.matches(subject.peer.labels))
                .map(|subject| subject.group)
                .collect();
            let audited = policy.enforcement.is_audited();
            for direction in [Direction::Ingress, Direction::Egress] {
                let mut program = None;
                for group in chosen.iter().filter(|_| !policy.rules(direction).is_empty()) {
                    let asked = selected.entry((*group, direction)).or_default();
                    // No set has it: what a NetworkPolicy isolates never gets to the baseline.
                    let hides = |(program, only_audited): &Asked| {
                        program.stage == Stage::Namespaced && (audited || !only_audited)
                    };
                    if tier == Tier::Baseline && asked.iter().any(hides) {
                        continue;
                    }
                    let program = program.get_or_insert_with(|| self.cluster_program(policy, direction));
                    asked.push((program.clone(), audited));
                }
            }
        }
        selected.retain(|_, asked| !asked.is_empty());
    }

    /// Forgets the programs of policies that have other rules now, or are gone; also of those that select no pod of this node at the moment:
    /// sets that pods had keep them alive, and the next pod must not get them.
    fn forget_changed(&mut self, view: &View<'_>, touched: &Touched) {
        let world = view.world;
        let is_current = |policy: &PolicyRef, direction: Direction, program: &Program| match (policy, &program.rules) {
            (PolicyRef::Namespaced(name), Rules::Namespaced(rules)) => {
                world.policies.get(name).and_then(|policy| policy.rules(direction)) == Some(rules.as_slice())
            }
            (PolicyRef::Cluster { tier, name }, Rules::Cluster(rules)) => {
                let policy = world.cluster_policies.get(name).filter(|policy| policy.tier == *tier);
                policy.is_some_and(|policy| policy.rules(direction) == rules.as_slice())
            }
            _ => false,
        };
        if touched.everything || touched.cluster_policies {
            self.programs.retain(|(policy, direction), program| is_current(policy, *direction, program));
            return;
        }
        for name in &touched.policies {
            for direction in [Direction::Ingress, Direction::Egress] {
                let key = (PolicyRef::Namespaced(name.clone()), direction);
                if self.programs.get(&key).is_some_and(|program| !is_current(&key.0, direction, program)) {
                    self.programs.remove(&key);
                }
            }
        }
    }

    /// The program of a policy. One that is known is current ([`Compiler::forget_changed`]).
    fn program(&mut self, policy: &NetworkPolicy, direction: Direction) -> Arc<Program> {
        let key = (PolicyRef::Namespaced(policy.name.clone()), direction);
        let rules = policy.rules(direction).unwrap_or_default();
        self.known_or(key, |version| Program::of(&policy.name, direction, rules, version))
    }

    fn cluster_program(&mut self, policy: &ClusterNetworkPolicy, direction: Direction) -> Arc<Program> {
        let key = (PolicyRef::Cluster { tier: policy.tier, name: policy.name.clone() }, direction);
        let rules = policy.rules(direction);
        self.known_or(key, |version| Program::of_cluster(&policy.name, policy.tier, direction, rules, version))
    }

    fn known_or(&mut self, whose: Whose, make: impl FnOnce(u64) -> Program) -> Arc<Program> {
        let version = &mut self.next_version;
        self.programs.get_or(whose, || {
            *version += 1;
            make(*version)
        })
    }

    /// The sets of the groups, and those of them that are new. Ids are given in the order of what makes a set, not of who has it.
    fn sets_of(&mut self, peers: &Peers, selected: Selected) -> (HashMap<u32, PodSets>, HashSet<SetId>) {
        let mut of_key: BTreeMap<SetKey, Wanted> = BTreeMap::new();
        for ((group, direction), asked) in selected {
            let mut add = |programs: Vec<Arc<Program>>, use_: Use, audited: BTreeSet<PolicyRef>| {
                if !programs.is_empty() {
                    let key = set_key(peers.group(group), direction, &programs);
                    let wanted = of_key.entry(key).or_default();
                    wanted.programs = programs;
                    wanted.groups.push((group, use_));
                    wanted.audited.extend(audited);
                }
            };
            add(judging(&asked, false), Use::Enforced, BTreeSet::new());
            if !asked.iter().any(|(_, audited)| *audited) {
                continue;
            }
            let as_if = judging(&asked, true);
            let is_audited =
                |program: &Arc<Program>| asked.iter().any(|(p, audited)| *audited && Arc::ptr_eq(p, program));
            let audited: BTreeSet<PolicyRef> =
                as_if.iter().filter(|program| is_audited(program)).map(|program| program.policy.clone()).collect();
            if !audited.is_empty() {
                add(as_if, Use::Audited, audited);
            }
        }
        let mut came = HashSet::new();
        let mut of_group: HashMap<u32, PodSets> = HashMap::new();
        for (key, Wanted { programs, groups, audited }) in of_key {
            let direction = key.direction;
            let id = match self.set_keys.get(&key) {
                Some(id) => *id,
                None => {
                    let id = SetId(self.set_ids.take());
                    self.set_keys.insert(key.clone(), id);
                    self.sets.insert(id, Set::new(id, key, programs));
                    came.insert(id);
                    id
                }
            };
            if !audited.is_empty() {
                self.image.audited.insert(id, audited);
            }
            for (group, use_) in groups {
                let sets = of_group.entry(group).or_default();
                match (direction, use_) {
                    (Direction::Ingress, Use::Enforced) => sets.ingress = id,
                    (Direction::Ingress, Use::Audited) => sets.audit_ingress = id,
                    (Direction::Egress, Use::Enforced) => sets.egress = id,
                    (Direction::Egress, Use::Audited) => sets.audit_egress = id,
                }
            }
        }
        (of_group, came)
    }

    /// Drops the sets that no pod has had for long.
    fn retire(&mut self, live: &HashSet<SetId>, now: Duration) -> Vec<Set> {
        for set in self.sets.values_mut() {
            set.retired = if live.contains(&set.id) { None } else { set.retired.or(Some(now)) };
        }
        let mut retired: Vec<(Duration, SetId)> =
            self.sets.values().filter_map(|set| Some((set.retired?, set.id))).collect();
        retired.sort_unstable();
        let surplus = retired.len().saturating_sub(MAX_RETIRED);
        let expired: Vec<SetId> = retired
            .iter()
            .enumerate()
            // Those that pods have until this very image is applied stay in any case: the kernel still judges by them.
            .filter(|(index, (since, _))| (*index < surplus && *since < now) || since.saturating_add(self.grace) <= now)
            .map(|(_, (_, id))| *id)
            .collect();
        expired.iter().for_each(|id| self.set_ids.release(id.0, now));
        let gone: Vec<Set> = expired.iter().filter_map(|id| self.sets.remove(id)).collect();
        self.set_keys.retain(|_, id| self.sets.contains_key(id));
        gone
    }

    /// Cuts the peers, lets the sets classify those that are new to them, and fills in the classes.
    #[expect(clippy::too_many_arguments, reason = "all of one compilation")]
    fn compile_sets(
        &mut self,
        view: &View<'_>,
        sight: &mut Sight,
        looks: &Looks,
        touched: &Touched,
        turnover: &Turnover,
        gone: &[Set],
        now: Duration,
    ) -> Result<(), TooLarge> {
        let mut budget = Budget::new();
        let all = matches!(looks, Looks::All { .. });
        if all {
            self.sets.values_mut().for_each(Set::begin);
        }
        let recut = sight.recut(view, looks, touched, &mut self.sets, turnover, gone, &mut budget)?;
        let left = self.seen_by(&turnover.went);
        let contents = left.iter().filter_map(|id| self.classes.contents.get(id));
        let left_by = contents.filter_map(|content| sight.kinds.number_of(content)).collect();
        let (changed, mut concerned) = sight.classify(&mut self.sets, all, turnover, &left_by, &mut budget)?;
        // From here on nothing fails, and the image becomes another.
        let (classes, otherwise) = if recut.regions {
            (sight.reassign(&mut self.classes, &changed, &recut.moved, turnover), None)
        } else if turnover.is_empty() {
            (sight.add_classes(&mut self.classes, &changed), Some(Otherwise::new()))
        } else {
            let (classes, otherwise) = sight.reassign_some(&mut self.classes, &changed, &recut.moved, turnover, &left);
            (classes, Some(otherwise))
        };
        self.show_set_classes(classes, now);
        self.show_addresses(sight, looks, &recut, otherwise.as_ref());
        sight.settle(&recut.moved);
        concerned.extend(&turnover.came);
        for id in &concerned {
            if let Some(set) = self.sets.get_mut(id) {
                set.forget_unused();
            }
        }
        self.with_rows(&concerned, gone, now);
        Ok(())
    }

    /// The classes that these sets, which were in the last image, tell from a stranger.
    fn seen_by(&self, sets: &HashSet<SetId>) -> BTreeSet<ClassId> {
        let of = |set: &SetId| self.image.set_classes.range((*set, ClassId(0))..=(*set, ClassId(u32::MAX)));
        sets.iter().flat_map(of).map(|((_, class), _)| *class).collect()
    }

    fn with_pods(&mut self, sight: &Sight) {
        let sets = sight.peers.local.iter().filter_map(|ip| {
            let group = sight.peers.addresses.get(ip)?.group;
            Some((*ip, sight.of_group.get(&group).copied().unwrap_or_default()))
        });
        self.image.pods = sets.collect();
        self.changes.pods.clone_from(&self.image.pods);
        self.changes.audited.clone_from(&self.image.audited);
    }

    /// Has the image show the rows of the classes that peers are in, with their rules, and of no others.
    fn with_rows(&mut self, concerned: &BTreeSet<SetId>, gone: &[Set], now: Duration) {
        let mut sets = std::mem::take(&mut self.sets);
        let mut hidden: Vec<(SetId, LocalClass, Arc<[RowDraft]>)> = Vec::new();
        for set in concerned.iter().filter_map(|id| sets.get(id)) {
            if set.shown.is_empty() {
                let names: BTreeSet<NamespacedName> = set.isolating().cloned().collect();
                self.changes.isolating.insert(set.id, Some(names.clone()));
                self.image.isolating.insert(set.id, names);
            }
            for class in set.to_show() {
                self.show_rows(set, class);
            }
        }
        for id in concerned {
            if let Some(set) = sets.get_mut(id) {
                let of_set = set.show();
                hidden.extend(of_set.into_iter().map(|(class, rows)| (*id, class, rows)));
            }
        }
        for (id, class, rows) in hidden {
            if let Some(set) = sets.get(&id) {
                self.hide_rows(set, class, &rows, now);
            }
        }
        for set in gone {
            for (class, rows) in &set.shown {
                self.hide_rows(set, *class, rows, now);
            }
            self.image.isolating.remove(&set.id);
            self.changes.isolating.insert(set.id, None);
        }
        self.sets = sets;
    }

    fn show_rows(&mut self, set: &Set, class: LocalClass) {
        for (row, rule) in set.rows_of(class).iter().flat_map(|rows| set.resolve(class, rows)) {
            let value = match rule {
                None => Row { verdict: Verdict::Allow, rule: RuleId::NOT_ISOLATED },
                Some(rule) => {
                    let ids = &mut self.rule_ids;
                    let entry = self.rules.entry(rule.key).or_insert_with(|| (RuleId(ids.take()), 0));
                    entry.1 += 1;
                    let id = entry.0;
                    if entry.1 == 1 {
                        let info = rule.info();
                        if self.compiled {
                            self.changes.rules.insert(id, Some(info.clone()));
                        }
                        self.image.rules.insert(id, info);
                    }
                    Row { verdict: rule.verdict, rule: id }
                }
            };
            self.image.rows.insert(row, value);
            // Of a first image nobody asks what changed.
            if self.compiled {
                self.changes.rows.insert(row, Some(value));
            }
        }
    }

    fn hide_rows(&mut self, set: &Set, class: LocalClass, rows: &Arc<[RowDraft]>, now: Duration) {
        for (row, rule) in set.resolve(class, rows) {
            self.image.rows.remove(&row);
            self.changes.rows.insert(row, None);
            let Some(rule) = rule else { continue };
            if let Some((id, rows)) = self.rules.get_mut(&rule.key) {
                *rows -= 1;
                if *rows == 0 {
                    let id = *id;
                    self.rules.remove(&rule.key);
                    self.rule_ids.release(id.0, now);
                    self.image.rules.remove(&id);
                    self.changes.rules.insert(id, None);
                }
            }
        }
    }
}

/// Makes a tree anew, in one go: then its leaves are full. Those of one that grew one by one are half empty, and so are those of its copies.
fn full<K: Ord, V>(tree: &mut BTreeMap<K, V>) {
    *tree = std::mem::take(tree).into_iter().collect();
}

/// What makes a group have the same set as another.
fn set_key(group: Option<&Group>, direction: Direction, programs: &[Arc<Program>]) -> SetKey {
    let resolved = match direction {
        Direction::Egress => Vec::new(),
        Direction::Ingress => {
            let names = programs.iter().flat_map(|p| &p.named);
            names.map(|(name, protocol)| group?.named_port(name, *protocol)).collect()
        }
    };
    SetKey { direction, versions: programs.iter().map(|p| p.version).collect(), resolved }
}
