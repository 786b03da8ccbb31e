//! Nodes of Flannel, and pods of this node that are Flannel's: what goes there and what is taken from them.

use std::net::IpAddr;

use towpath_datapath::bpf::{NodeConfig, Surroundings};
use towpath_model::Family;
use towpath_model::desired::*;

use crate::frame::{ACK, Frame, L4, Mac, SYN};
use crate::world::*;

const VTEP: Mac = [0xde, 0xad, 0, 0, 0, 2];
/// A device that stands for the bridge; only its number counts.
const BRIDGE: u32 = 4242;

fn old(family: Family) -> IpAddr {
    if family == Family::V4 { ip("10.1.0.77") } else { ip("fd01::77") }
}

/// node2 is Flannel's and reached so; pods of Flannel's are on this node's bridge.
fn with_flannel(reach: Reach) -> impl FnOnce(&mut World) {
    move |w| {
        let mut peers = peers();
        peers[1].flannel = Some(FlannelPeer { taken_over: false });
        (peers[1].reach, peers[1].plain) = (reach, true);
        let elsewhere = BOTH.map(|family| (old(family), BRIDGE)).to_vec();
        let plain = [(peers[1].name.clone(), [w.uplink; 2])].into();
        w.programs.surround(Surroundings { plain, elsewhere, ..Surroundings::default() });
        w.programs.apply_peers(&peers).unwrap();
    }
}

fn in_world_of_flannels(reach: Reach, test: impl FnOnce(&mut World) + Send + 'static) {
    in_world(move |w| {
        with_flannel(reach)(w);
        test(w);
    });
}

#[test]
fn a_frame_for_flannels_device_bears_its_mac_and_others_the_computed_one() {
    in_world_of_flannels(Reach::TunnelTo(VTEP), |w| {
        for h in BOTH.map(hosts) {
            // Twice: the next hop is looked up once and then known.
            for port in [4000, 4001] {
                let inner = w.from_pod(&sent_by(h.a, port, h.remote, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
                assert_eq!(inner.dst_mac, VTEP);
            }
        }
        let third = w.from_pod(&sent_by(ip("10.1.0.10"), 4000, ip("10.3.0.5"), 80, L4::syn()));
        let computed = third.into_tunnel(w, ip("192.168.50.3")).dst_mac;
        assert_eq!(computed[..2], [0x02, 0x74]);
    });
}

#[test]
fn a_routed_node_gets_packets_as_they_are_and_so_sends_them() {
    in_world_of_flannels(Reach::Route, |w| {
        // What its routes do not lead to yet is the kernel's: it takes no envelopes.
        let v6 = hosts(Family::V6);
        w.from_pod(&sent_by(v6.a, 3999, v6.remote, 80, L4::syn())).passed();
        sh("ip -6 route add fd02::/64 via fd50::2 dev up0");
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).out_of(3, w.uplink);
            let answer = arriving(MAC_UPLINK, h.remote, 80, h.a, 4000, L4::tcp(SYN | ACK));
            w.from_uplink(&answer).into_pod(w.pod_a);
            w.to_pod(&answer, w.pod_a, w.uplink).passed();
            // By another device, and from a node of whom nobody said so.
            w.to_pod(&answer, w.pod_a, BRIDGE).dropped("spoofed_node");
        }
        let others = arriving(MAC_UPLINK, ip("10.3.0.5"), 80, ip("10.1.0.10"), 4000, L4::syn());
        w.from_uplink(&others).dropped("spoofed_node");
        w.to_pod(&others, w.pod_a, w.uplink).dropped("spoofed_node");
    });
}

#[test]
fn pods_of_flannels_here_speak_by_their_bridge_and_by_nothing_else() {
    in_world_of_flannels(Reach::TunnelTo(VTEP), |w| {
        for family in BOTH {
            let h = hosts(family);
            let ask = |sport| arriving(MAC_HOST, old(family), sport, h.a, 80, L4::syn());
            w.to_pod(&ask(4000), w.pod_a, BRIDGE).passed();
            w.from_pod(&sent_by(h.a, 80, old(family), 4000, L4::tcp(SYN | ACK))).passed();
            w.from_pod(&sent_by(h.a, 4001, old(family), 80, L4::syn())).passed();
            w.to_pod(&ask(4002), w.pod_a, w.uplink).dropped("spoofed_node");
            w.to_pod(&ask(4003), w.pod_a, w.pod_b).dropped("spoofed_node");
            let outside = Frame { dst_mac: MAC_UPLINK, ..ask(4004) };
            w.from_uplink(&outside).dropped("spoofed_node");
            // An address of the range that nobody has is forged by whomever.
            let mut nobody = ask(4005);
            nobody.src = (if family == Family::V4 { ip("10.1.0.78") } else { ip("fd01::78") }, 4005).into();
            w.to_pod(&nobody, w.pod_a, BRIDGE).dropped("spoofed_node");
        }
    });
}

#[test]
fn what_comes_for_pods_of_flannels_here_goes_to_the_stack_from_who_may_send_it() {
    in_world_of_flannels(Reach::TunnelTo(VTEP), |w| {
        for family in BOTH {
            let h = hosts(family);
            let frame = arriving(MAC_TUNNEL, h.remote, 4000, old(family), 80, L4::syn());
            w.from_tunnel(&frame, "192.168.50.2").passed();
            w.from_tunnel(&frame, "192.168.50.3").dropped("tunnel_source");
        }
    });
}

#[test]
fn over_a_borrowed_device_what_is_not_put_into_an_envelope_goes_to_the_routes() {
    in_world_of_flannels(Reach::TunnelTo(VTEP), |w| {
        let config = NodeConfig { borrowed_tunnel: true, ..node_config(w.tunnel, w.uplink) };
        w.programs.apply_node(&config).unwrap();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            // It came in the other network's device, and that is our tunnel.
            let frame = arriving(MAC_HOST, h.remote, 4001, h.a, 80, L4::syn());
            w.to_pod(&frame, w.pod_a, w.tunnel).passed();
        }
        // And over IPv6 in a device of its own, which is no other's.
        w.programs.apply_node(&NodeConfig { borrowed_tunnel6: BRIDGE, ..config.clone() }).unwrap();
        let h = hosts(Family::V6);
        let by_v6 = |sport| arriving(MAC_HOST, h.remote, sport, h.a, 80, L4::syn());
        w.to_pod(&by_v6(4003), w.pod_a, BRIDGE).passed();
        w.to_pod(&by_v6(4004), w.pod_a, w.uplink).passed();
        w.to_pod(&by_v6(4005), w.pod_a, w.pod_b).dropped("spoofed_node");
        // An underlay that envelopes are not written for.
        let mut peers = peers();
        peers[1].tunnel = ip("fd50::2");
        w.programs.apply_peers(&peers).unwrap();
        w.from_pod(&sent_by(ip("10.1.0.10"), 4002, ip("10.2.0.10"), 80, L4::syn())).passed();
    });
}
