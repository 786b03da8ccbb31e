//! What the loop has done, as status, metrics and Events tell it; and what verdicts of the kernel stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, RwLock};
use std::time::SystemTime;

use ipnet::IpNet;
use towpath_model::NamespacedName;
use towpath_model::custom::BackendName;
use towpath_model::desired::{NodePeer, PodSets, PolicyChanges, PolicyImage, PolicyRef, RuleId, RuleInfo, SetId};
use towpath_plan::services::Refusal;
use towpath_policy::compile::Counts;
use towpath_wire::status::AuditedPolicy;

use crate::heard::Heard;
use crate::modes;
use crate::predecessor::Remains;

/// What the loop has done, for status and metrics.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Backend that this node sends by.
    pub backend: BackendName,
    /// Why this node cannot send and take packets by it, if it is `udp`.
    pub no_udp: Option<String>,
    /// Peers as last planned.
    pub peers: Vec<NodePeer>,
    /// Why a node or one of its ranges is left out.
    pub refused: BTreeMap<String, Vec<String>>,
    /// The API server has not listed everything since the start: what an earlier run knew stands in.
    pub recalled: bool,
    /// The ranges of Service addresses that hold.
    pub service_ranges: Vec<IpNet>,
    /// Why a ServiceCIDR's range does not count, by its name.
    pub refused_ranges: BTreeMap<String, Vec<String>>,
    /// CNI configurations of others that the container runtime takes before ours.
    pub preferred: Vec<String>,
    /// What the network before still has on this node.
    pub remains: Remains,
    /// Why a Service, or a pod with host ports, does not get what it asks for.
    pub refused_services: Vec<Refusal>,
    /// Annotations of pods of this node that mean nothing.
    pub misread_pods: Vec<Refusal>,
    /// Annotations of bandwidth of pods of this node that mean nothing.
    pub misread_bandwidth: Vec<Refusal>,
    /// Limits that could not be changed.
    pub bandwidth_problems: Vec<String>,
    /// Pods of this node whose sockets are left alone because they, or their namespaces, ask for it, as `namespace/name`.
    pub at_device: Vec<String>,
    /// Who is in charge of Services and DNS.
    pub in_charge: modes::State,
    /// What is not done of CoreDNS's and kube-dns's configuration.
    pub dns_left_out: Vec<String>,
    /// Frontends in the kernel.
    pub frontends: usize,
    /// Host ports that this node's pods have.
    pub host_ports: usize,
    /// Backends in the kernel.
    pub backends: usize,
    /// How large the policy in the kernel is.
    pub policy: Counts,
    /// What policies ask for and is not enforced.
    pub unenforced: Vec<String>,
    /// What the API server had said when the policies in the kernel were compiled.
    pub heard: Heard,
    /// NetworkPolicies among them that it no longer has.
    pub outliving: BTreeSet<NamespacedName>,
    /// Annotations of policies that mean nothing.
    pub misread_policies: Vec<Refusal>,
    /// Policies that are closed because there is no room for their rules.
    pub aside: Vec<Refusal>,
    /// Policies that are only audited, and what they would have denied here.
    pub audited: Vec<AuditedPolicy>,
    /// What the rules in the kernel, and those of the image before, stand for.
    pub rule_names: Arc<RuleNames>,
    /// Pods that could not be given the MTU that fits.
    pub mtu_problems: Vec<String>,
    /// What could not be applied, newest attempt.
    pub failures: BTreeMap<&'static str, String>,
    /// How often something could not be applied.
    pub failed: u64,
    /// How often something was planned.
    pub plans: u64,
    /// How long the last plan and its writes took, in seconds.
    pub last_seconds: f64,
    /// When Services, or what belongs to them, were last found to be due for planning.
    pub services_due: Option<SystemTime>,
    /// When they were last applied.
    pub services_applied: Option<SystemTime>,
}

/// What verdicts of the kernel refer to.
#[derive(Clone, Debug, Default)]
pub struct RuleNames {
    /// Rules of the present image.
    pub rules: BTreeMap<RuleId, RuleInfo>,
    /// Rules that only the image before had: what was judged by it is still told.
    pub former: BTreeMap<RuleId, RuleInfo>,
    /// Policies that isolate the pods of a set.
    pub isolating: BTreeMap<SetId, BTreeSet<NamespacedName>>,
    /// Sets that are only audited, with the policies that are not enforced in them.
    pub audited: BTreeMap<SetId, BTreeSet<PolicyRef>>,
    /// Sets of this node's pods.
    pub pods: BTreeMap<IpAddr, PodSets>,
}

impl RuleNames {
    /// Those of an image.
    pub(super) fn of(image: &PolicyImage, pods: &BTreeMap<IpAddr, PodSets>) -> Self {
        Self {
            rules: image.rules.clone(),
            former: BTreeMap::new(),
            isolating: image.isolating.clone(),
            audited: image.audited.clone(),
            pods: pods.clone(),
        }
    }

    /// These, with what only `before` has: connections keep the rule that they were judged by until they are judged again.
    pub(super) fn after(mut self, before: &RuleNames) -> Self {
        let gone = before.rules.iter().filter(|(id, _)| !self.rules.contains_key(id));
        self.former = gone.map(|(id, info)| (*id, info.clone())).collect();
        self
    }

    /// What became of them.
    pub(super) fn follow(&mut self, changes: &PolicyChanges, pods: &BTreeMap<IpAddr, PodSets>) {
        if changes.rules.values().any(Option::is_none) {
            self.former.clear();
        }
        for (id, info) in &changes.rules {
            match info {
                Some(info) => drop(self.rules.insert(*id, info.clone())),
                None => self.former.extend(self.rules.remove(id).map(|info| (*id, info))),
            }
        }
        for (set, policies) in &changes.isolating {
            match policies {
                Some(policies) => drop(self.isolating.insert(*set, policies.clone())),
                None => drop(self.isolating.remove(set)),
            }
        }
        self.audited.clone_from(&changes.audited);
        self.pods.clone_from(pods);
    }
}

/// The report, shared with status and metrics.
pub type SharedReport = Arc<RwLock<Report>>;
