//! What the feed has said so far: applies messages, and gives it all back as one snapshot. No names are parsed here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_wire::dns::{DnsPod, DnsRules, DnsService, FeedMessage, Shared};

/// The state that a feed builds up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    domain: String,
    services: BTreeMap<String, BTreeMap<String, Shared<DnsService>>>,
    namespaces: BTreeSet<String>,
    /// By namespace, none of which has no pods: there are as many as the cluster has pods, and all of a namespace say its name.
    pods: BTreeMap<String, BTreeSet<IpAddr>>,
    rules: Option<DnsRules>,
}

impl Records {
    /// Applies one message. A snapshot replaces everything; rules that it does not know stay.
    pub fn apply(&mut self, message: FeedMessage) {
        match message {
            FeedMessage::Snapshot { domain, services, namespaces, pods, rules } => {
                *self = Self {
                    rules: rules.or_else(|| self.rules.take()),
                    domain: domain.trim_end_matches('.').to_ascii_lowercase(),
                    namespaces: namespaces.into_iter().collect(),
                    pods: by_namespace(pods),
                    services: BTreeMap::new(),
                };
                for service in services {
                    self.set(service);
                }
            }
            FeedMessage::Rules { rules } => self.rules = Some(rules),
            FeedMessage::Set { service } => self.set(service),
            FeedMessage::Remove { namespace, name } => {
                if let Some(services) = self.services.get_mut(&namespace) {
                    services.remove(&name);
                    if services.is_empty() {
                        self.services.remove(&namespace);
                    }
                }
            }
            FeedMessage::Namespaces { namespaces } => self.namespaces = namespaces.into_iter().collect(),
            FeedMessage::Pods { set, remove } => {
                for pod in &remove {
                    if let Some(addresses) = self.pods.get_mut(&pod.namespace) {
                        addresses.remove(&pod.address);
                        if addresses.is_empty() {
                            self.pods.remove(&pod.namespace);
                        }
                    }
                }
                for pod in set {
                    self.pods.entry(pod.namespace).or_default().insert(pod.address);
                }
            }
        }
    }

    fn set(&mut self, service: Shared<DnsService>) {
        self.services.entry(service.namespace.clone()).or_default().insert(service.name.clone(), service);
    }

    /// Everything, as the message that makes another [`Records`] equal to this one.
    pub fn snapshot(&self) -> FeedMessage {
        FeedMessage::Snapshot {
            domain: self.domain.clone(),
            services: self.services.values().flat_map(BTreeMap::values).cloned().collect(),
            namespaces: self.namespaces.iter().cloned().collect(),
            pods: self
                .pods
                .iter()
                .flat_map(|(namespace, addresses)| {
                    addresses.iter().map(|address| DnsPod { namespace: namespace.clone(), address: *address })
                })
                .collect(),
            rules: self.rules.clone(),
        }
    }

    /// The cluster domain, lower case, without a trailing dot; empty before the first snapshot.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// What is configured beside the cluster's names, if it was said.
    pub fn rules(&self) -> Option<&DnsRules> {
        self.rules.as_ref()
    }

    /// A Service.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&DnsService> {
        self.services.get(namespace)?.get(name).map(|service| &**service)
    }

    /// All Services.
    pub fn services(&self) -> impl Iterator<Item = &DnsService> {
        self.services.values().flat_map(BTreeMap::values).map(|service| &**service)
    }

    /// Whether a namespace exists: listed, or a Service is in it.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains(namespace) || self.services.contains_key(namespace)
    }

    /// Whether a pod of that namespace has that address.
    pub fn has_pod(&self, namespace: &str, address: IpAddr) -> bool {
        self.pods.get(namespace).is_some_and(|addresses| addresses.contains(&address))
    }

    /// The namespaces listed.
    pub fn namespaces(&self) -> &BTreeSet<String> {
        &self.namespaces
    }

    /// The addresses of the pods listed, by namespace; none of these has no pods.
    pub fn pods(&self) -> &BTreeMap<String, BTreeSet<IpAddr>> {
        &self.pods
    }
}

/// Made anew in one go, a tree's leaves are full; those that grew one by one are half empty.
fn by_namespace(pods: Vec<DnsPod>) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let mut all: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for pod in pods {
        all.entry(pod.namespace).or_default().push(pod.address);
    }
    all.into_iter().map(|(namespace, addresses)| (namespace, addresses.into_iter().collect())).collect()
}
