//! What the feed has said so far: applies messages, and gives it all back as one snapshot. No names are parsed here.

use std::collections::{BTreeMap, BTreeSet};

use towpath_wire::dns::{DnsPod, DnsRules, DnsService, FeedMessage, Shared};

/// The state that a feed builds up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    domain: String,
    services: BTreeMap<String, BTreeMap<String, Shared<DnsService>>>,
    namespaces: BTreeSet<String>,
    pods: BTreeSet<DnsPod>,
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
                    pods: pods.into_iter().collect(),
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
                    self.pods.remove(pod);
                }
                self.pods.extend(set);
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
            pods: self.pods.iter().cloned().collect(),
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
    pub fn has_pod(&self, pod: &DnsPod) -> bool {
        self.pods.contains(pod)
    }

    /// The namespaces listed.
    pub fn namespaces(&self) -> &BTreeSet<String> {
        &self.namespaces
    }

    /// The pods listed.
    pub fn pods(&self) -> &BTreeSet<DnsPod> {
        &self.pods
    }
}
