//! The axes of the matrix, and which of their combinations are no paths, each by a rule with its reason.

use std::fmt;

/// An axis: all of its values, and each one's name.
pub(crate) trait Axis: Copy + Eq + Ord + fmt::Debug + 'static {
    /// Every value, in the order in which they are shown.
    const ALL: &'static [Self];
}

macro_rules! axis {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) enum $name { $($(#[$value_doc])* $value),+ }

        impl Axis for $name {
            const ALL: &'static [Self] = &[$(Self::$value),+];
        }
    };
}

axis! {
    /// Whom the client asks. Every endpoint is on node n1; a Service has one endpoint.
    Way {
        /// The endpoint's own address: a pod's, or its node's if it has `hostNetwork`.
        Address,
        ClusterIp,
        /// The NodePort, at the address of the endpoint's node.
        NodePortHere,
        /// The NodePort, at the other node's address.
        NodePortThere,
        /// The address of a load balancer that the endpoint's node announces.
        BalancerHere,
        /// The same, announced by the other node.
        BalancerThere,
        HostPort,
    }
}

axis! {
    /// Who asks. The pods differ in what policies say of them.
    Client {
        /// Lets others' policies decide.
        Friend,
        Stranger,
        /// A NetworkPolicy isolates it for egress.
        Bound,
        /// ClusterNetworkPolicies are about its egress.
        Tied,
        /// The endpoint's own pod (hairpin).
        Itself,
        /// A process in a node's network namespace, as a pod with `hostNetwork` is.
        Host,
        /// A host outside the cluster, whose network an `ipBlock` allows.
        Outside,
        /// One that no policy names.
        Elsewhere,
    }
}

axis! {
    /// From where the packet enters: by the client's node, or for one outside by the node that it asks.
    Place {
        SameNode,
        CrossNode,
    }
}

axis! {
    /// Where a Service's address is replaced.
    Translated {
        Nowhere,
        /// When the client's socket connects.
        AtSocket,
        /// At the client's device, or at the uplink for who is outside.
        AtDevice,
    }
}

axis! {
    /// What judges at the endpoint.
    Endpoint {
        /// Nothing does.
        Plain,
        /// A NetworkPolicy with selectors, names and numbers of ports.
        Guarded,
        /// A NetworkPolicy with `ipBlock`.
        Blocked,
        /// ClusterNetworkPolicies of both tiers.
        Tiered,
        /// A pod with `hostNetwork`: no policy for ingress is about it.
        Hosted,
    }
}

axis! {
    Family { V4, V6 }
}

axis! {
    Protocol { Tcp, Udp, Sctp, Icmp }
}

axis! {
    /// What is sent, or comes back. What the path takes is remembered by clients, so `TooBig` is last.
    Content {
        /// One packet.
        Whole,
        /// What only fits several.
        Fragments,
        /// With IPv4 options or an IPv6 extension header: what the kernel forwards, by its own routes and the tunnel device.
        Options,
        /// The endpoint complains by ICMP of what the client never sent it: to the client's policies a packet like any other.
        Forged,
        /// Nobody listens: the endpoint's kernel says so in an ICMP error.
        PortUnreachable,
        /// An ICMP error says that the path takes less.
        TooBig,
    }
}

axis! {
    /// What the node does that a client outside asks for an endpoint of another node.
    Entry {
        /// It forwards there and back, in the uplink's hook.
        Hook,
        /// It forwards there, and the endpoint's node answers (`directServerReturn`).
        DirectReturn,
    }
}

axis! {
    /// Two ports of the endpoint; policies that look at ports allow the first.
    Port { Open, Closed }
}

/// One combination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axes {
    pub(crate) way: Way,
    pub(crate) client: Client,
    pub(crate) place: Place,
    pub(crate) translated: Translated,
    pub(crate) endpoint: Endpoint,
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
    pub(crate) content: Content,
    pub(crate) entry: Entry,
    pub(crate) port: Port,
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, client, place, translated, endpoint, family, protocol, content, entry, port } = self;
        write!(
            f,
            "{client:?} → {endpoint:?} by {way:?}, {place:?}, translated {translated:?}, {family:?} {protocol:?} {content:?} {port:?}, entry {entry:?}"
        )
    }
}

/// Every combination, those that the uplink's hook forwards first.
pub(crate) fn all() -> impl Iterator<Item = Axes> {
    fn with<P: Copy + 'static, T: Axis>(before: impl Iterator<Item = P>) -> impl Iterator<Item = (P, T)> {
        before.flat_map(|before| T::ALL.iter().map(move |value| (before, *value)))
    }
    let ways = with(with(with(Entry::ALL.iter().copied())));
    let ends = with(with(with(with(ways))));
    with(with(ends)).map(
        |(((((((((entry, protocol), content), way), client), place), translated), endpoint), family), port)| Axes {
            way,
            client,
            place,
            translated,
            endpoint,
            family,
            protocol,
            content,
            entry,
            port,
        },
    )
}

impl Client {
    /// Whether it is a host outside the cluster.
    pub(crate) fn is_outside(self) -> bool {
        matches!(self, Self::Outside | Self::Elsewhere)
    }
}

impl Way {
    /// The node by which who is outside comes in; none: where the packet's way begins has nothing to do with it.
    fn entered(self) -> Option<Place> {
        match self {
            Self::NodePortHere | Self::BalancerHere | Self::HostPort => Some(Place::SameNode),
            Self::NodePortThere | Self::BalancerThere => Some(Place::CrossNode),
            Self::Address | Self::ClusterIp => None,
        }
    }
}

impl Axes {
    /// Why this is no path of its own; none: it is one, and is tried.
    pub(crate) fn is_no_path(&self) -> Option<&'static str> {
        self.no_such_way()
            .or_else(|| self.not_translated_there())
            .or_else(|| self.no_such_packet())
            .or_else(|| self.not_forwarded_so())
    }

    fn no_such_way(&self) -> Option<&'static str> {
        if self.endpoint == Endpoint::Hosted && self.way == Way::HostPort {
            return Some("a pod with hostNetwork has its ports on the node already");
        }
        if self.client == Client::Itself && self.endpoint == Endpoint::Hosted {
            return Some("a pod with hostNetwork that asks itself is the node that asks itself: Host");
        }
        if self.client == Client::Itself && self.place == Place::CrossNode {
            return Some("a pod is on one node");
        }
        if self.client.is_outside() && self.way.entered() != Some(self.place) {
            // Addresses of nodes are routed, those of pods and ClusterIPs are not.
            return Some("from outside a packet enters by the node that has or announces the address");
        }
        None
    }

    fn not_translated_there(&self) -> Option<&'static str> {
        match self.translated {
            Translated::Nowhere if self.way != Way::Address => Some("a Service's address is replaced somewhere"),
            Translated::AtSocket | Translated::AtDevice if self.way == Way::Address => {
                Some("the endpoint's own address is not replaced")
            }
            Translated::AtSocket if self.client.is_outside() => Some("who is outside has no socket of ours"),
            Translated::AtDevice if self.client == Client::Host => {
                Some("what a node's processes send is translated in their sockets only")
            }
            Translated::AtSocket if self.content == Content::Options => {
                Some("what has options is sent by a raw socket here, which no hook sees")
            }
            Translated::AtSocket if self.protocol == Protocol::Sctp => Some(
                "socket hooks are for TCP and UDP, and SCTP goes by raw sockets here: not every kernel has its own",
            ),
            _ => None,
        }
    }

    fn not_forwarded_so(&self) -> Option<&'static str> {
        if self.entry == Entry::Hook {
            return None;
        }
        if !self.client.is_outside() || self.place == Place::SameNode || self.endpoint == Endpoint::Hosted {
            return Some("only for pods that are asked by who is outside does another node forward");
        }
        None
    }

    fn no_such_packet(&self) -> Option<&'static str> {
        let by_service = self.way != Way::Address;
        if self.content == Content::Forged {
            return self.no_such_forgery();
        }
        let translated_twice =
            self.endpoint == Endpoint::Hosted && self.place == Place::CrossNode && self.client.is_outside();
        if self.content == Content::Options && translated_twice {
            return Some(
                "what only the kernel could forward is dropped on its way to an endpoint that is no pod (docs/services.md)",
            );
        }
        if self.content == Content::Options && self.protocol != Protocol::Udp {
            return Some("options are tried with UDP: what is odd is the network header");
        }
        match (self.protocol, self.content) {
            (Protocol::Icmp, _) if by_service => Some("ICMP has no ports, so no Service has it"),
            (Protocol::Icmp, _) if self.port == Port::Closed => Some("ICMP has no ports, so there is one case of it"),
            (Protocol::Sctp, _) if self.way == Way::HostPort => {
                Some("there are no host ports of SCTP (docs/roadmap.md)")
            }
            (Protocol::Tcp, Content::Fragments) => Some("TCP sends what fits"),
            (Protocol::Sctp, Content::Fragments) if by_service => {
                Some("an SCTP packet in fragments is dropped where its port changes (docs/services.md)")
            }
            (Protocol::Tcp | Protocol::Sctp | Protocol::Icmp, Content::PortUnreachable | Content::TooBig) => {
                Some("ICMP errors are tried about UDP: TCP answers by itself, raw sockets are told of none")
            }
            _ => None,
        }
    }

    fn no_such_forgery(&self) -> Option<&'static str> {
        if self.protocol != Protocol::Icmp || self.port == Port::Closed || self.way != Way::Address {
            return Some("a forged complaint is one ICMP packet, from the endpoint to the client");
        }
        if matches!(self.client, Client::Itself | Client::Host) || self.client.is_outside() {
            return Some("no policy is about what comes to a node, to a host outside, or to oneself");
        }
        None
    }
}
