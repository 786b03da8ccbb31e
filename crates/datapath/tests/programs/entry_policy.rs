//! Policy where clients outside come in, and XDP meets packets first: the endpoint's node judges, by whichever of its programs a packet comes.

use std::net::{IpAddr, SocketAddr};

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4, SYN};
use crate::world::*;

/// NodePorts of an endpoint here, and of one on another node.
const HERE: u16 = 30080;
const THERE: u16 = 30081;
const NODE2: &str = "192.168.50.2";

fn allow_range(w: &mut World, set: u32, client: IpAddr, port: u16) {
    let class = ClassId(set * 100 + u32::from(client.is_ipv4()));
    w.image.cidr_classes.insert(client.into(), class);
    w.image.set_classes.insert((SetId(set), class), LocalClass(1));
    let key = RowKey {
        set: SetId(set),
        class: LocalClass(1),
        protocol: RowProtocol::Ports(Protocol::Tcp),
        port,
        port_bits: 16,
    };
    w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(42) });
}

/// Which of the ways to an endpoint a client's packet gets through: by the NodePort here, and from the node that it asked, in an envelope.
fn got_in(w: &World, family: Family, sport: u16, l4: &L4) -> [bool; 2] {
    let h = hosts(family);
    let by_port = w.from_uplink(&arriving(MAC_UPLINK, h.outside, sport, h.node, HERE, l4.clone()));
    let forwarded = arriving(MAC_TUNNEL, h.outside, sport + 1, h.b, 8080, l4.clone());
    [by_port, w.from_tunnel(&forwarded, NODE2)].map(|outcome| {
        if outcome.verdict == DROP {
            outcome.dropped("ingress_policy");
            return false;
        }
        outcome.into_pod(w.pod_b);
        true
    })
}

#[test]
fn the_endpoints_node_judges_by_whatever_way_a_client_outside_comes() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let of = |n: u32| n + 10 * u32::from(h.node.is_ipv4());
            w.serve(of(1), family, None, HERE, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
            w.serve(of(2), family, None, THERE, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            let b = w.local_b();
            // Nobody may: nothing comes in. What another node's endpoint may hear is not judged here.
            w.isolate(&b, 5, 0);
            w.apply_policy();
            assert_eq!(got_in(w, family, 4000, &L4::syn()), [false; 2]);
            let asked = |sport, l4| arriving(MAC_UPLINK, h.outside, sport, h.node, THERE, l4);
            w.from_uplink(&asked(4000, L4::syn())).into_tunnel(w, ip(NODE2));
            let answer = arriving(MAC_TUNNEL, h.remote, 8080, h.outside, 4000, L4::tcp(SYN | ACK));
            let back = w.from_tunnel(&answer, NODE2);
            assert_eq!(read_source(&back.bytes), SocketAddr::new(h.node, THERE));
            // The client may, and goes on.
            allow_range(w, 5, h.outside, 8080);
            w.apply_policy();
            assert_eq!(got_in(w, family, 4010, &L4::syn()), [true; 2]);
            assert_eq!(got_in(w, family, 4010, &L4::tcp(ACK)), [true; 2]);
            // And then may not any more: what is open ends, by either way, and another node's endpoint's goes on.
            w.image.rows.clear();
            w.apply_policy();
            assert_eq!(got_in(w, family, 4010, &L4::tcp(ACK)), [false; 2]);
            w.from_uplink(&asked(4000, L4::tcp(ACK))).into_tunnel(w, ip(NODE2));
            // An endpoint here that sends nothing of its own accord answers what was let in, and nothing else.
            allow_range(w, 5, h.outside, 8080);
            w.isolate(&b, 5, 6);
            w.apply_policy();
            assert_eq!(got_in(w, family, 4020, &L4::syn()), [true; 2]);
            let says = |sport| w.from_pod(&sent_by(h.b, 8080, h.outside, sport, L4::tcp(SYN | ACK)));
            assert_eq!([says(4020).verdict != DROP, says(4021).verdict != DROP], [true; 2]);
            says(4022).dropped("egress_policy");
            w.isolate(&b, 0, 0);
            w.image.rows.clear();
            w.apply_policy();
        }
    });
}

fn read_source(bytes: &[u8]) -> SocketAddr {
    crate::frame::read(bytes).src
}
