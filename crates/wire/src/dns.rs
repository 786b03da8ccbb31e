//! What the agent feeds to `towpath carry` so that it can answer DNS queries: cluster records, in the form of the
//! Kubernetes DNS specification (schema version 1.1.0).
//!
//! The feed is a stream of length-prefixed JSON messages ([`FeedRequest`], 4 bytes big-endian length, at most 64 MiB) over a
//! root-only unix socket. The first message after connecting is a [`FeedMessage::Snapshot`]; changes follow a Service at a time.
//! Each message is answered, in order, with a [`FeedReply`] in the same form.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// A feed has tens of thousands of Services, and remembers what it said.
pub use crate::shared::Shared;

/// One message of the feed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum FeedMessage {
    /// Everything; what is not in it is gone.
    Snapshot {
        /// Cluster domain without a trailing dot, for example `cluster.local`.
        domain: String,
        /// All Services.
        services: Vec<Shared<DnsService>>,
        /// Namespaces that exist: a name below one is NODATA or NXDOMAIN by its own, below none is NXDOMAIN.
        namespaces: Vec<String>,
        /// Pods by address, for `a-b-c-d.ns.pod` names that must exist ("pods verified").
        #[serde(default)]
        pods: Vec<DnsPod>,
        /// What is configured beside the cluster's own names; none: not known yet, so as before.
        #[serde(default)]
        rules: Option<DnsRules>,
    },
    /// What is configured beside the cluster's own names is now so.
    Rules {
        /// All of it.
        rules: DnsRules,
    },
    /// This Service is now so.
    Set {
        /// The Service.
        service: Shared<DnsService>,
    },
    /// This Service is gone.
    Remove {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The namespaces are now these.
    Namespaces {
        /// All of them.
        namespaces: Vec<String>,
    },
    /// The pods are now changed so.
    Pods {
        /// Now there.
        set: Vec<DnsPod>,
        /// Now gone.
        remove: Vec<DnsPod>,
    },
}

/// The longest message of the feed, in bytes.
pub const MAX_FEED_MESSAGE: usize = 64 << 20;

/// What travels from a client of the feed socket to `towpath carry`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "camelCase")]
pub enum FeedRequest {
    /// The agent says what changed.
    Apply {
        /// The change.
        message: FeedMessage,
    },
    /// Somebody asks what was counted.
    Counters,
    /// The agent wants to hear of answers for these names, on this connection, from now on ([`FeedReply::Answers`]): each once before it is
    /// given to whoever asked, and now all that are still good. Said again, with others, it takes the place of what was said before.
    FollowNames {
        /// As policies have them: `example.com`, `*.example.com`.
        names: Vec<String>,
    },
    /// The agent has done what it does about all answers up to this one: they may be given.
    Learned {
        /// [`FeedReply::Answers`]' serial.
        serial: u64,
        /// What was learned before may have been forgotten: each answer is to be told again when it is next given.
        forgot: bool,
    },
}

/// What an upstream server said of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NameAnswer {
    /// The name that it was asked for: lower case, without a trailing dot.
    pub name: String,
    /// Its addresses, those behind aliases too.
    pub addresses: Vec<IpAddr>,
    /// For how long it is given to clients, in seconds.
    pub ttl: u32,
}

/// What `towpath carry` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "camelCase")]
pub enum FeedReply {
    /// Queries are answered from it now.
    Applied,
    /// It was not applied.
    Refused {
        /// Why, for people.
        reason: String,
    },
    /// What was counted.
    Counters {
        /// Since the start of the process.
        counters: DnsCounters,
    },
    /// Answers that wait to be given, or are about to be ([`FeedRequest::FollowNames`]). Not the reply to any one request.
    Answers {
        /// Rises with every message of this kind.
        serial: u64,
        /// At least one.
        answers: Vec<NameAnswer>,
    },
}

/// Response codes that are counted by themselves (IANA's names); the last is all others.
pub const RCODES: [&str; 6] = ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "REFUSED", "other"];

/// Ends of the buckets in which durations are counted, in seconds; one more bucket has what took longer.
pub const DURATIONS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5];

/// What the DNS server counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DnsCounters {
    /// Queries over UDP.
    pub udp_queries: u64,
    /// Queries over TCP.
    pub tcp_queries: u64,
    /// Answered from what the agent fed.
    pub cluster_answers: u64,
    /// Answered from the cache of upstream answers.
    pub cache_hits: u64,
    /// Asked upstream.
    pub forwarded: u64,
    /// Joined a query that was already on its way.
    pub joined: u64,
    /// Answered from the cache after its time because no upstream answered (RFC 8767).
    pub stale_answers: u64,
    /// No upstream answered.
    pub upstream_failures: u64,
    /// Answers truncated for UDP.
    pub truncated: u64,
    /// Messages that were no query, and got silence or FORMERR.
    pub malformed: u64,
    /// Queries turned away because too many were on their way upstream, or too many connections open.
    pub overloaded: u64,
    /// Of those, queries of a client that had its share of what may wait or be on its way.
    pub clients_over_share: u64,
    /// Of those, queries for upstream servers that had their share of what may be on its way.
    pub servers_over_share: u64,
    /// Messages of the feed applied.
    pub feed_messages: u64,
    /// Responses sent, by [`RCODES`].
    pub rcodes: [u64; RCODES.len()],
    /// Answers that somebody upstream was asked for, by the bucket of the time they took ([`DURATIONS`]).
    pub durations: [u64; DURATIONS.len() + 1],
    /// All that time together, in microseconds.
    pub durations_micros: u64,
    /// Answers that were told to the agent because policies ask for their names.
    pub names_told: u64,
    /// Answers that waited until the agent had learned them, or no longer.
    pub names_held: u64,
    /// All that waiting together, in microseconds.
    pub names_held_micros: u64,
    /// Of those, answers that were given before the agent said that it had learned them: it took too long.
    pub names_late: u64,
    /// Answers for names that policies ask for, given while no agent wanted to hear of them.
    pub names_unheard: u64,
    /// Upstream answers cached now.
    pub cached: u64,
    /// Their size in bytes.
    pub cached_bytes: u64,
}

/// What is answered, and asked where, beside the cluster's own names: what can be done of CoreDNS's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DnsRules {
    /// Zones, each at most once. Of those that a name is in, the longest counts.
    pub zones: Vec<DnsZone>,
}

/// A zone: a name and everything below it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DnsZone {
    /// Lower case, without a trailing dot; empty: the root.
    pub name: String,
    /// Its names are asked for even where the cluster would have an answer: it is within the cluster's domain or the reverse zones,
    /// and has no part of the cluster's own.
    pub over_cluster: bool,
    /// Who is asked.
    pub upstream: DnsUpstream,
    /// Names with addresses of their own. They come before everything else, the cluster's names too.
    pub hosts: Vec<DnsHost>,
    /// The addresses of `hosts` have names, too.
    pub hosts_reverse: bool,
    /// Names of the zone that `hosts` does not have are looked up further; else they do not exist.
    pub hosts_fall_through: bool,
    /// Names that stand for others.
    pub aliases: Vec<DnsAlias>,
    /// Longest that answers may be kept, in seconds; none: an hour.
    pub success_ttl: Option<u32>,
    /// The same of answers that there is nothing.
    pub denial_ttl: Option<u32>,
}

/// Who is asked about names that are not answered here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum DnsUpstream {
    /// The node's own resolvers.
    #[default]
    Node,
    /// These servers.
    Servers {
        /// With their ports.
        servers: Vec<SocketAddr>,
    },
    /// Nobody: such a question fails.
    Nobody,
}

/// A name and its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsHost {
    /// Lower case, without a trailing dot.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A name that stands for another; both lower case, without a trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAlias {
    /// What is asked for.
    pub from: String,
    /// What is answered.
    pub to: String,
}

/// A pod's address and namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DnsPod {
    /// Its namespace.
    pub namespace: String,
    /// Its address.
    pub address: IpAddr,
}

/// What DNS says of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsService {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What its name leads to.
    pub answer: DnsAnswer,
}

/// What a Service's name leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum DnsAnswer {
    /// Its cluster addresses.
    ClusterIps {
        /// The addresses.
        addresses: Vec<IpAddr>,
        /// Its named and unnamed ports.
        ports: Vec<DnsPort>,
        /// Endpoints that have a `hostname`: those that are ready, or all with `publishNotReadyAddresses`. The others have no name.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        endpoints: Vec<DnsEndpoint>,
    },
    /// Its endpoints (headless): those that are ready, or all with `publishNotReadyAddresses`.
    Endpoints {
        /// The endpoints.
        endpoints: Vec<DnsEndpoint>,
    },
    /// Another name (ExternalName).
    Alias {
        /// The target, without a trailing dot.
        target: String,
    },
}

/// A Service port, for SRV records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsPort {
    /// Its name, empty for the only port of a Service.
    pub name: String,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Its number.
    pub port: u16,
}

/// An endpoint that has a name below its Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its own name below the Service, if it has one; else the server derives one from the address.
    pub hostname: Option<String>,
    /// Ports of the slice it is in.
    pub ports: Vec<DnsPort>,
}
