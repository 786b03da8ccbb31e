//! NetworkPolicies and ClusterNetworkPolicies, compiled for the pods of this node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use towpath_model::NamespacedName;
use towpath_model::desired::{PolicyImage, PolicyRef};
use towpath_policy::View;

use super::{Reconciler, RuleNames};
use crate::node_network::given;
use crate::read;

impl Reconciler {
    pub(super) async fn apply_policy(&mut self) -> Result<(), String> {
        let mut image = self.compile();
        let isolating: BTreeSet<&NamespacedName> = image.isolating.values().flatten().collect();
        let rules = image.rules.values().map(|rule| &rule.policy);
        let of_cluster: BTreeSet<&PolicyRef> = rules.filter(|p| matches!(p, PolicyRef::Cluster { .. })).collect();
        let policies = isolating.len() + of_cluster.len();
        let unenforced = self.unenforced();
        let classes: BTreeSet<u32> =
            image.pod_classes.values().chain(image.cidr_classes.values()).map(|class| class.0).collect();
        self.with_report(|report| {
            report.policies = policies;
            report.unenforced = unenforced;
            report.classes = classes.len();
            report.rules = image.rows.len();
        });
        let pod_sets = image.pods.clone();
        let names = RuleNames {
            rules: std::mem::take(&mut image.rules),
            former: BTreeMap::new(),
            isolating: std::mem::take(&mut image.isolating),
            pods: pod_sets.clone(),
        };
        // Before the kernel judges by them: whoever hears of a verdict can say whose it is.
        self.with_report(|report| report.rule_names = Arc::new(names.after(&report.rule_names)));
        self.datapath.apply_policy(image).await.map_err(|e| e.to_string())?;
        self.pod_sets = pod_sets;
        Ok(())
    }

    /// What is said in policies and cannot be enforced yet.
    fn unenforced(&self) -> Vec<String> {
        let index = read(&self.index);
        let named = index.world().cluster_policies.values().filter(|policy| policy.has_domain_names());
        let what = "domainNames are not enforced yet: its rules accept nobody by name";
        named.map(|policy| format!("ClusterNetworkPolicy {}: {what}", policy.name)).collect()
    }

    fn compile(&mut self) -> PolicyImage {
        let leases = self.leases.leases();
        let own = self.leases.pod_addresses();
        let now = self.now();
        let index = self.index.clone();
        tokio::task::block_in_place(|| {
            let index = read(&index);
            let mut pod_ips = given::believed(index.world(), index.given());
            pod_ips.extend(own);
            let view = View { world: index.world(), dns: &self.dns, pod_ips: &pod_ips };
            let mut image = self.compiler.compile(&view, &self.node, now);
            // Containers that Kubernetes does not know: no policy selects them.
            for address in leases.iter().filter(|l| l.pod.is_none()).flat_map(|l| &l.addresses) {
                image.pods.entry(*address).or_default();
            }
            image
        })
    }
}
