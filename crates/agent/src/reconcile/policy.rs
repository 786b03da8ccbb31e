//! NetworkPolicies and ClusterNetworkPolicies, compiled for the pods of this node; and what those that are only audited would have done.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use towpath_datapath::Error;
use towpath_datapath::bpf::{self, Adopted};
use towpath_model::NamespacedName;
use towpath_model::desired::{PolicyChanges, PolicyImage};
use towpath_plan::services::{Asks, Refusal, RefusedPart};
use towpath_policy::check::Mismatch;
use towpath_policy::compile::{TooLarge, Touched, UsedIds};
use towpath_policy::{Compiler, View};
use tracing::error;

use super::crowd::Failure;
use super::{GRACE, Reconciler, RuleNames};
use crate::counts;
use crate::node_network::given;
use crate::read;

/// Everything is looked at again after so long, in case a change was missed.
pub(super) const REVIEW: Duration = Duration::from_secs(600);

/// Said of an image that fails its check.
const NOT_AS_WRITTEN: &str = "the compiled policies do not say what the policies say, and are not enforced; those before stay in force. \
                              This is a fault of Towpath, please report it";

/// Tables that policies fill.
const POLICY_TABLES: [&str; 3] = ["tp_rules", "tp_set_class", "tp_class_cidrs"];

impl Reconciler {
    /// Compiles what changed and writes what became different; the whole image where nobody knows what the kernel holds of it.
    pub(super) async fn write_policy(&mut self) -> Result<(), Failure> {
        self.follow_names();
        self.follow_misread();
        self.compile()?;
        let counts = self.compiler.counts();
        let (unenforced, misread) = (self.unenforced(), self.misread());
        let strangers = self.strangers();
        let changes = self.compiler.changes().filter(|_| self.policy_followed);
        let (changes, image) = match changes {
            Some(changes) => (Some(changes.clone()), None),
            None => (None, Some(in_kernel(self.compiler.image()))),
        };
        let mut pods = self.compiler.image().pods.clone();
        for address in strangers {
            pods.entry(address).or_default();
        }
        // Before the kernel judges by them: whoever hears of a verdict, or of a count, can say whose it is.
        let compiler = &self.compiler;
        tokio::task::block_in_place(|| {
            self.audits.follow(compiler.image(), read(&self.index).world(), SystemTime::now());
        });
        let audited = self.audits.policies();
        self.with_report(|report| {
            report.policy = counts;
            report.unenforced = unenforced;
            report.misread_policies = misread;
            report.audited = audited;
            match &changes {
                Some(changes) => Arc::make_mut(&mut report.rule_names).follow(changes, &pods),
                None => report.rule_names = Arc::new(RuleNames::of(compiler.image(), &pods).after(&report.rule_names)),
            }
        });
        // Of one that fails nobody knows how far it came.
        self.policy_followed = false;
        let pod_sets = pods.clone();
        let applied = match (changes, image) {
            (Some(changes), _) => self.datapath.apply_policy_changes(PolicyChanges { pods, ..changes }).await,
            (None, Some(image)) => self.datapath.apply_policy(PolicyImage { pods, ..image }).await,
            (None, None) => Ok(Default::default()),
        };
        match applied {
            Ok(_) => {}
            Err(error @ Error::Bpf(bpf::Error::Full { map, .. })) if POLICY_TABLES.contains(&map) => {
                // What was compiled is not there and never was.
                self.forget_compiled().await.map_err(Failure::Other)?;
                return Err(Failure::Full(error.to_string()));
            }
            Err(error) => return Err(Failure::Other(error.to_string())),
        }
        self.policy_followed = true;
        self.pod_sets = pod_sets;
        Ok(())
    }

    /// Has what follows compiled over what the kernel holds.
    ///
    /// # Errors
    /// Why nobody knows what it holds.
    pub(super) async fn forget_compiled(&mut self) -> Result<(), String> {
        let adopted = self.datapath.adopted().await.map_err(|error| error.to_string())?;
        self.compiler = Compiler::resume(GRACE, &used(adopted), self.now());
        Ok(())
    }

    /// Addresses of containers that Kubernetes does not know: no policy selects them.
    fn strangers(&self) -> Vec<IpAddr> {
        let leases = self.leases.leases();
        leases.iter().filter(|lease| lease.pod.is_none()).flat_map(|lease| lease.addresses.iter().copied()).collect()
    }

    /// What is said in policies and cannot be enforced here.
    fn unenforced(&self) -> Vec<String> {
        let Some(dns) = self.modes.state().borrow().in_charge.map(|in_charge| in_charge.dns) else { return Vec::new() };
        if dns.answers_here() {
            return Vec::new();
        }
        let index = read(&self.index);
        let named = index.world().cluster_policies.values().filter(|policy| policy.has_domain_names());
        let what = "its domainNames stand for nobody: they are learned from the answers that Towpath gives, and another server \
                    answers DNS here (NetworkConfig spec.dns: towpath makes it Towpath)";
        named.map(|policy| format!("ClusterNetworkPolicy {}: {what}", policy.name)).collect()
    }

    /// Looks again at the annotations of the NetworkPolicies that are touched. Before these are compiled: then they are not touched any more.
    fn follow_misread(&mut self) {
        let index = read(&self.index);
        let policies = &index.world().policies;
        let touched: Vec<&NamespacedName> = match self.policy_touched.policies() {
            Some(touched) => touched.iter().collect(),
            None => {
                self.misread.clear();
                policies.keys().collect()
            }
        };
        for name in touched {
            match policies.get(name).and_then(|policy| policy.enforcement.misread()) {
                Some(reason) => {
                    drop(self.misread.insert(name.clone(), misread(Asks::NetworkPolicy, name.clone(), reason)))
                }
                None => drop(self.misread.remove(name)),
            }
        }
    }

    /// Annotations of policies that mean nothing.
    fn misread(&self) -> Vec<Refusal> {
        let index = read(&self.index);
        let cluster = index.world().cluster_policies.values().filter_map(|policy| {
            let reason = policy.enforcement.misread()?;
            Some(misread(Asks::ClusterNetworkPolicy, NamespacedName::new("", &policy.name), reason))
        });
        self.misread.values().cloned().chain(cluster).collect()
    }

    /// Adds up what the kernel has counted for policies that are only audited.
    pub(super) async fn read_audits(&mut self) -> Result<(), String> {
        if !self.audits.is_in_use() {
            return Ok(());
        }
        let counts = self.datapath.audited().await.map_err(|e| e.to_string())?;
        let gone = tokio::task::block_in_place(|| self.audits.read(&counts, SystemTime::now()));
        let audited = self.audits.policies();
        self.with_report(|report| report.audited = audited);
        if !gone.is_empty() {
            self.datapath.forget_audited(gone.clone()).await.map_err(|e| e.to_string())?;
            self.audits.forgotten(&gone);
        }
        Ok(())
    }

    /// Compiles what is touched and has it checked ([`towpath_policy::check`]): nothing that fails the check is written.
    fn compile(&mut self) -> Result<(), Failure> {
        let own = self.leases.leases();
        let now = self.now();
        let (index, book, dns) = (self.index.clone(), self.book.clone(), self.dns.clone());
        let touched = std::mem::take(&mut self.policy_touched);
        let review = Instant::now() >= self.review_at;
        tokio::task::block_in_place(|| {
            let index = read(&index);
            let pod_ips = given::addresses(index.world(), index.given(), &own);
            let book = book.read().unwrap_or_else(PoisonError::into_inner);
            let view = View { world: index.world(), dns: &dns, pod_ips: &pod_ips, names: book.learned() };
            let begun = Instant::now();
            let followed = self.compiler.follow(&view, &self.node, now, &touched);
            counts::compiled(begun.elapsed());
            if let Err(reason) = followed {
                // The check has not heard of what was touched.
                self.policy_followed = false;
                return Err(too_large(reason));
            }
            let mut checked = self.check(&view, Some(&touched));
            if review {
                self.review_at = Instant::now() + REVIEW;
            }
            if review || checked.is_err() {
                let told = self.checker.has(self.compiler.image());
                self.compiler.follow(&view, &self.node, now, &Touched::everything()).map_err(too_large)?;
                let differs = self.compiler.changes().is_some_and(|changes| !changes.is_empty());
                if differs || !told || matches!(&checked, Err(mismatch) if **mismatch == Mismatch::Untold) {
                    counts::MISSED_CHANGES.inc();
                    error!(
                        "a change was missed by the policies in force: repaired now. This is a fault of Towpath, please report it"
                    );
                }
                self.policy_followed = false;
                checked = self.check(&view, None);
            }
            checked.map_err(|mismatch| not_enforced(&mismatch))
        })
    }

    /// Has the image checked: what may be another since the last one, if these objects may have changed and the kernel has that; else all of it.
    fn check(&mut self, view: &View<'_>, touched: Option<&Touched>) -> Result<(), Box<Mismatch>> {
        let begun = Instant::now();
        let image = self.compiler.image();
        let changes = self.compiler.changes().filter(|_| self.policy_followed);
        let outcome = match touched {
            Some(touched) => self.checker.follow(view, image, changes, touched),
            None => self.checker.check(view, image),
        };
        counts::CHECK_DURATION.observe(begun.elapsed().as_secs_f64());
        outcome.map(drop).inspect_err(|mismatch| {
            if !matches!(**mismatch, Mismatch::TooLarge) {
                counts::MISMATCHES.inc();
                error!(%mismatch, "{NOT_AS_WRITTEN}");
            }
        })
    }
}

/// What the kernel holds, for a compiler that goes on from there.
pub(super) fn used(adopted: Adopted) -> UsedIds {
    UsedIds { sets: adopted.sets, classes: adopted.classes, rules: adopted.rules, held: adopted.policy }
}

fn misread(asks: Asks, name: NamespacedName, reason: String) -> Refusal {
    Refusal { asks, name, part: RefusedPart::Field, reason }
}

/// Of policies that are not compiled.
fn too_large(error: TooLarge) -> Failure {
    Failure::TooLarge(error.to_string())
}

/// Of an image that was not found to say what the policies say.
fn not_enforced(mismatch: &Mismatch) -> Failure {
    match mismatch {
        Mismatch::TooLarge => Failure::TooLarge(mismatch.to_string()),
        other => Failure::Other(format!("{NOT_AS_WRITTEN}: {other}")),
    }
}

/// What of an image is in the kernel.
fn in_kernel(image: &PolicyImage) -> PolicyImage {
    PolicyImage {
        pod_classes: image.pod_classes.clone(),
        cidr_classes: image.cidr_classes.clone(),
        set_classes: image.set_classes.clone(),
        rows: image.rows.clone(),
        pods: image.pods.clone(),
        ..PolicyImage::default()
    }
}
