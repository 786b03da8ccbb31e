//! What an attacker tries by writing packets himself, from a pod and from a host on the nodes' own link: to be somebody else, to be believed about the
//! neighbourhood, to put packets into the nodes' envelopes, to get past policy in pieces and behind odd headers, to break others' connections. Nothing of it
//! arrives anywhere, and what the node's programs drop is counted under its reason.
//!
//! Every frame names its attempt. It is looked for in other pods, in what nodes send, and at sockets of the node; frames of the same making that are
//! nobody's abuse arrive there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6FragmentHeader, Ipv6RawExtHeader,
};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Session, address};
use towpath_walkthrough::pods::{server, shell};

#[path = "abuse/frames.rs"]
mod frames;
#[path = "abuse/scene.rs"]
mod scene;

use frames::{
    ALL_NODES_MAC, BROADCAST, VNI, VXLAN, arp_reply, complaint, discovery, discovery_to, ip_headers, raw, tagged,
    tcp_reset, udp, udp_behind, vxlan,
};
use scene::{By, CLOSED, NODES_OWN, OPEN, Scene, Stand, TIMES, after, outside, say};

const IPIP: IpNumber = IpNumber(4);
const IPV6_IN_IP: IpNumber = IpNumber(41);
const SOON: Duration = Duration::from_secs(10);

const POLICY: &str = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {app: victim}}\n  \
                      ingress:\n  - {from: [{podSelector: {matchLabels: {app: attacker}}}], ports: [{port: 5353, protocol: UDP}]}\n  - {from: [{podSelector: \
                      {matchLabels: {app: other}}}]}\n";

impl Scene {
    /// A pod that gives itself other names (A1).
    fn spoofs(&self) -> Result<()> {
        let (attacker, victim, other) = (&self.attacker, &self.victim, &self.other);
        let macs = (attacker.mac, attacker.gateway);
        for six in [false, true] {
            let to = other.at(six, OPEN);
            for (what, from) in [
                ("another pod's address", victim.at(six, 4000)),
                ("its node's address", self.nodes[0].at(six, 4000)),
                ("another node's address", self.nodes[1].at(six, 4000)),
                ("an address of the outside", SocketAddr::new(outside(six), 4000)),
            ] {
                self.one(&format!("a pod with {what}, to a pod"), By::Pod, &["source_address"], |mark| {
                    udp(macs, from, to, mark)
                })?;
                let node = self.nodes[0].at(six, NODES_OWN);
                self.one(&format!("a pod with {what}, to the node"), By::Pod, &["source_address"], |mark| {
                    udp(macs, from, node, mark)
                })?;
            }
            self.one("a pod with the tag of a VLAN, to the outside", By::Pod, &["malformed"], |mark| {
                tagged(&udp(macs, attacker.at(six, 4000), SocketAddr::new(outside(six), 9), mark)?, 100)
            })?;
            self.one("a pod with another pod's MAC", By::Pod, &["source_mac"], |mark| {
                udp((victim.mac, macs.1), attacker.at(six, 4000), to, mark)
            })?;
            // Addresses that mean the node itself where they arrive.
            let own: IpAddr = if six { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            self.one("a pod to the node's loopback", By::Pod, &["loopback"], |mark| {
                udp(macs, attacker.at(six, 4000), SocketAddr::new(own, NODES_OWN), mark)
            })?;
            let kind = if six { [1, 4] } else { [3, 3] };
            self.one("an ICMP error of a pod to the node's loopback", By::Pod, &["loopback"], |mark| {
                let quoted = udp(macs, SocketAddr::new(own, NODES_OWN), attacker.at(six, 4000), mark)?;
                complaint(macs, attacker.ip(six), own, kind, &quoted)
            })?;
            self.one("a pod with a loopback address", By::Pod, &["source_address"], |mark| {
                udp(macs, SocketAddr::new(own, 4000), self.nodes[0].at(six, NODES_OWN), mark)
            })?;
        }
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            v6 => v6,
        };
        self.one("a pod with an IPv4 address in an IPv6 packet", By::Pod, &["mapped_v4"], |mark| {
            udp(
                macs,
                SocketAddr::new(mapped(victim.ip(false)), 4000),
                SocketAddr::new(mapped(other.ip(false)), OPEN),
                mark,
            )
        })?;
        Ok(())
    }

    /// One that answers for others in its neighbourhood (A1).
    fn poisons(&self) -> Result<()> {
        let (attacker, victim) = (&self.attacker, &self.victim);
        let gateway = address(after(&say(&attacker.place, "ip -4 route show default")?, "via")?)?;
        for (what, claimed) in
            [("its gateway", gateway), ("another pod", victim.ip(false)), ("its node", self.nodes[0].ip(false))]
        {
            for to in [attacker.gateway, BROADCAST] {
                self.one(&format!("ARP of a pod that says it is {what}"), By::Pod, &["arp_nd"], |mark| {
                    arp_reply((attacker.mac, to), claimed, mark)
                })?;
            }
        }
        let (IpAddr::V6(own), IpAddr::V6(theirs)) = (attacker.ip(true), victim.ip(true)) else {
            anyhow::bail!("no IPv6")
        };
        let local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x66);
        let link_layer = |kind: u8| [[kind, 1].as_slice(), &attacker.mac].concat();
        let advertisement = [[0x60, 0, 0, 0].as_slice(), &theirs.octets(), &link_layer(2)].concat();
        let solicitation = [[0; 4].as_slice(), &own.octets(), &link_layer(1)].concat();
        let router = [[64, 0, 0x70, 0x80].as_slice(), &[0; 8], &link_layer(1)].concat();
        let redirect = [[0; 4].as_slice(), &theirs.octets(), &local.octets()].concat();
        for (what, from, kind, body, counted) in [
            ("an advertisement of another pod's address", own, 136, &advertisement, ["arp_nd"].as_slice()),
            ("the same as that pod", theirs, 136, &advertisement, &["arp_nd"]),
            ("a solicitation as another pod", theirs, 135, &solicitation, &["arp_nd"]),
            ("a router advertisement", local, 134, &router, &["arp_nd"]),
            ("a router advertisement with its own address", own, 134, &router, &["arp_nd"]),
            ("a redirect", local, 137, &redirect, &["arp_nd"]),
        ] {
            self.one(&format!("{what} of a pod"), By::Pod, counted, |mark| {
                discovery(attacker.mac, from, kind, body, mark)
            })?;
        }
        // What no policy judges is for the link: to anybody else it would carry whatever it likes.
        let honest = [[0x60, 0, 0, 0].as_slice(), &own.octets(), &link_layer(2)].concat();
        for (kind, body) in [(135, &solicitation), (136, &honest)] {
            for (whom, to) in [("the outside", outside(true)), ("a pod of another node", self.other.ip(true))] {
                let what = format!("neighbour discovery {kind} of a pod to {whom}");
                self.one(&what, By::Pod, &["arp_nd"], |mark| {
                    discovery_to((attacker.mac, attacker.gateway), (own, to), kind, body, mark)
                })?;
            }
        }
        let nobody: SocketAddr = "0.0.0.0:68".parse()?;
        let everybody: SocketAddr = "255.255.255.255:67".parse()?;
        self.one("a DHCP client in a pod", By::Pod, &["source_address"], |mark| {
            udp((attacker.mac, BROADCAST), nobody, everybody, mark)
        })?;
        self.one("a DHCP server in a pod", By::Pod, &[], |mark| {
            udp((attacker.mac, BROADCAST), attacker.at(false, 67), "255.255.255.255:68".parse()?, mark)
        })
    }

    /// Envelopes that no node wrote (A2).
    fn injects(&self) -> Result<()> {
        let (attacker, victim, other, neighbour) = (&self.attacker, &self.victim, &self.other, &self.neighbour);
        let [n1, n2] = &self.nodes;
        let out = (attacker.mac, attacker.gateway);
        let link = (neighbour.mac, neighbour.gateway);
        let inner = |six: bool, from: &Stand, mark: &[u8]| {
            udp((BROADCAST, BROADCAST), from.at(six, 4000), victim.at(six, OPEN), mark)
        };
        for six in [false, true] {
            // What a pod here would have other nodes deliver.
            self.one("an envelope of a pod, to another node", By::Pod, &["own_envelope"], |mark| {
                let held = udp((BROADCAST, BROADCAST), victim.at(six, 4000), other.at(six, OPEN), mark)?;
                udp(out, attacker.at(false, 4000), n2.at(false, VXLAN), &vxlan(VNI, &held))
            })?;
            self.one("an envelope of a pod, to its own node", By::Pod, &["own_envelope"], |mark| {
                udp(out, attacker.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, other, mark)?))
            })?;
            let protocol = if six { IPV6_IN_IP } else { IPIP };
            self.one("a packet in an IP header of a pod, to another node", By::Pod, &["own_envelope"], |mark| {
                let held = udp((BROADCAST, BROADCAST), victim.at(six, 4000), other.at(six, OPEN), mark)?;
                raw(out, ip_headers(attacker.ip(false), n2.ip(false))?, protocol, held.get(14..).context("short")?)
            })?;
            self.one("an envelope of a neighbour's", By::Neighbour, &["tunnel_outsider"], |mark| {
                udp(link, neighbour.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, other, mark)?))
            })?;
            self.one(
                "an envelope with a node's address, that holds another node's pod's packet",
                By::Neighbour,
                &["tunnel_source"],
                |mark| udp(link, n2.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, attacker, mark)?)),
            )?;
            self.one("an envelope of another network's number", By::Neighbour, &[], |mark| {
                udp(link, n2.at(false, 4000), n1.at(false, VXLAN), &vxlan([0, 0, 117], &inner(six, other, mark)?))
            })?;
            self.one("a packet in an IP header of a neighbour's", By::Neighbour, &[], |mark| {
                raw(
                    link,
                    ip_headers(neighbour.ip(false), n1.ip(false))?,
                    protocol,
                    inner(six, other, mark)?.get(14..).context("short")?,
                )
            })?;
        }
        Ok(())
    }

    /// A host on the nodes' link that has the node believe that packets are of the cluster's, or its own (A3).
    fn pretends(&self) -> Result<()> {
        let (victim, other, neighbour) = (&self.victim, &self.other, &self.neighbour);
        let link = (neighbour.mac, neighbour.gateway);
        for six in [false, true] {
            let node = self.nodes[0].at(six, NODES_OWN);
            for (what, from) in [
                ("a pod's address", victim.at(six, 4000)),
                ("another node's pod's address", other.at(six, 4000)),
                ("the node's address", self.nodes[0].at(six, 4000)),
            ] {
                self.one(&format!("a neighbour with {what}, to the node"), By::Neighbour, &["spoofed_node"], |mark| {
                    udp(link, from, node, mark)
                })?;
            }
            // As the kernel takes a frame without a tag.
            for (what, from) in
                [("a pod's address", victim.at(six, 4000)), ("the node's address", self.nodes[0].at(six, 4000))]
            {
                self.one(&format!("a neighbour with {what}, by priority"), By::Neighbour, &["spoofed_node"], |mark| {
                    tagged(&tagged(&udp(link, from, node, mark)?, 0)?, 0)
                })?;
            }
            self.one("a neighbour with a pod's address, to a pod", By::Neighbour, &["spoofed_node"], |mark| {
                udp(link, other.at(six, 4000), victim.at(six, OPEN), mark)
            })?;
            self.one(
                "a neighbour with its own address, to a pod that is closed to it",
                By::Neighbour,
                &["ingress_policy"],
                |mark| udp(link, neighbour.at(six, 4000), victim.at(six, OPEN), mark),
            )?;
            let own: IpAddr = if six { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            self.one("a neighbour to the node's loopback", By::Neighbour, &["loopback"], |mark| {
                udp(link, neighbour.at(six, 4000), SocketAddr::new(own, NODES_OWN), mark)
            })?;
            self.one("a neighbour to the node's loopback, by priority", By::Neighbour, &["loopback"], |mark| {
                tagged(&udp(link, neighbour.at(six, 4000), SocketAddr::new(own, NODES_OWN), mark)?, 0)
            })?;
            self.one("a neighbour with a loopback address", By::Neighbour, &["loopback"], |mark| {
                udp(link, SocketAddr::new(own, 4000), node, mark)
            })?;
        }
        // Behind more headers than anybody reads.
        let chain = [[60, 0, 1, 4, 0, 0, 0, 0].as_slice(); 7].concat();
        for (what, from) in
            [("a pod's address", victim.at(true, 4000)), ("the node's address", self.nodes[0].at(true, 4000))]
        {
            let what = format!("a neighbour with {what} behind many headers");
            self.one(&what, By::Neighbour, &["spoofed_node"], |mark| {
                let to = self.nodes[0].at(true, NODES_OWN);
                let datagram = udp(link, from, to, mark)?;
                let mut payload = chain.clone();
                *payload.get_mut(48).context("short")? = 17;
                payload.extend(datagram.get(54..).context("short")?);
                raw(link, ip_headers(from.ip(), to.ip())?, IpNumber(60), &payload)
            })?;
        }
        // To everybody's MAC, or a group's, which IP takes as well.
        for (six, to) in [(false, BROADCAST), (true, ALL_NODES_MAC)] {
            let (link, node) = ((neighbour.mac, to), self.nodes[0].at(six, NODES_OWN));
            for (what, from) in [("a pod's address", victim.at(six, 4000)), ("the node's address", node)] {
                self.one(&format!("a neighbour with {what}, to all"), By::Neighbour, &["spoofed_node"], |mark| {
                    udp(link, from, node, mark)
                })?;
            }
        }
        let (link_of_all, own) = ((neighbour.mac, BROADCAST), SocketAddr::from((Ipv4Addr::LOCALHOST, NODES_OWN)));
        self.one("a neighbour to the node's loopback, to all", By::Neighbour, &["loopback"], |mark| {
            udp(link_of_all, neighbour.at(false, 4000), own, mark)
        })?;
        let local: SocketAddr = "169.254.1.1:4000".parse()?;
        self.one(
            "a neighbour with a link-local address, to a pod that is closed to it",
            By::Neighbour,
            &["ingress_policy"],
            |mark| udp(link, local, victim.at(false, OPEN), mark),
        )
    }

    /// Pieces and odd headers that may hide a closed port (A8).
    fn hides(&self) -> Result<()> {
        let (attacker, victim) = (&self.attacker, &self.victim);
        let macs = (attacker.mac, attacker.gateway);
        let fragment = |id: u16, offset: u16, more: bool| -> Result<IpHeaders> {
            let IpHeaders::Ipv4(header, rest) = ip_headers(attacker.ip(false), victim.ip(false))? else {
                anyhow::bail!("not IPv4")
            };
            let header = Ipv4Header {
                identification: id,
                more_fragments: more,
                dont_fragment: false,
                fragment_offset: IpFragOffset::try_new(offset)?,
                ..header
            };
            Ok(IpHeaders::Ipv4(header, rest))
        };
        let datagram = |port: u16, mark: &[u8]| -> Result<Vec<u8>> {
            let whole = udp(macs, attacker.at(false, 4000), victim.at(false, port), &[mark, &[0; 20]].concat())?;
            Ok(whole.get(34..).context("short")?.to_vec())
        };
        let protocol = IpNumber::UDP;
        self.attempt(
            "a first piece for a closed port after one for an open port",
            By::Pod,
            &["ingress_policy"],
            |mark| {
                let open = datagram(OPEN, b"no mark here")?;
                Ok(vec![
                    raw(macs, fragment(700, 0, true)?, protocol, open.get(..24).context("short")?)?,
                    raw(macs, fragment(700, 0, true)?, protocol, &datagram(CLOSED, mark)?)?,
                ])
            },
        )?;
        self.attempt(
            "a later piece whose first is for a closed port",
            By::Pod,
            &["ingress_policy", "fragment"],
            |mark| {
                let whole = datagram(CLOSED, b"no mark here")?;
                Ok(vec![
                    raw(macs, fragment(701, 0, true)?, protocol, whole.get(..16).context("short")?)?,
                    raw(macs, fragment(701, 2, false)?, protocol, mark)?,
                ])
            },
        )?;
        self.one("a later piece without a first", By::Pod, &["fragment"], |mark| {
            raw(macs, fragment(702, 4, false)?, protocol, mark)
        })?;
        self.one(
            "a first piece of eight bytes of TCP for a closed port",
            By::Pod,
            &["ingress_policy", "malformed"],
            |mark| {
                let ports = [4000_u16.to_be_bytes(), 81_u16.to_be_bytes()].concat();
                let frame = raw(macs, fragment(703, 0, true)?, IpNumber::TCP, &[ports.as_slice(), &[0; 4]].concat())?;
                // Behind the end of the packet, as Ethernet pads.
                Ok([frame.as_slice(), mark].concat())
            },
        )?;
        self.one("IPv4 options before a closed port", By::Pod, &["ingress_policy"], |mark| {
            let IpHeaders::Ipv4(header, rest) = ip_headers(attacker.ip(false), victim.ip(false))? else {
                anyhow::bail!("not IPv4")
            };
            // Record route (RFC 791 3.1).
            let options = Ipv4Options::from([7, 7, 4, 0, 0, 0, 0, 1]);
            udp_behind(macs, IpHeaders::Ipv4(Ipv4Header { options, ..header }, rest), (4000, CLOSED), mark)
        })?;
        let six = |change: &dyn Fn(&mut Ipv6Extensions)| -> Result<IpHeaders> {
            let IpHeaders::Ipv6(header, mut rest) = ip_headers(attacker.ip(true), victim.ip(true))? else {
                anyhow::bail!("not IPv6")
            };
            change(&mut rest);
            Ok(IpHeaders::Ipv6(header, rest))
        };
        // PadN (RFC 8200 4.2).
        let padding = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &[1, 4, 0, 0, 0, 0])?;
        let all = |rest: &mut Ipv6Extensions| {
            rest.hop_by_hop_options = Some(padding.clone());
            rest.destination_options = Some(padding.clone());
        };
        let judged = &["ingress_policy", "malformed", "fragment"];
        self.one("IPv6 options before a closed port", By::Pod, judged, |mark| {
            udp_behind(macs, six(&all)?, (4000, CLOSED), mark)
        })?;
        self.one("a chain of forty IPv6 headers before a closed port", By::Pod, judged, |mark| {
            let udp = udp(macs, attacker.at(true, 4000), victim.at(true, CLOSED), mark)?;
            let chain = [60, 0, 1, 4, 0, 0, 0, 0].repeat(39);
            let last = [17, 0, 1, 4, 0, 0, 0, 0];
            raw(macs, six(&|_| ())?, IpNumber(60), &[chain.as_slice(), &last, udp.get(54..).context("short")?].concat())
        })?;
        self.attempt("an IPv6 piece that ends before the ports, and the next", By::Pod, judged, |mark| {
            let piece = |offset: u16, more: bool| -> Result<IpHeaders> {
                let header = Ipv6FragmentHeader::new(IpNumber(60), IpFragOffset::try_new(offset)?, more, 77);
                six(&move |rest| rest.fragment = Some(header.clone()))
            };
            let udp = udp(macs, attacker.at(true, 4000), victim.at(true, CLOSED), mark)?;
            Ok(vec![
                raw(macs, piece(0, true)?, IpNumber(60), &[17, 0, 1, 4, 0, 0, 0, 0])?,
                raw(macs, piece(1, false)?, IpNumber(60), udp.get(54..).context("short")?)?,
            ])
        })
    }

    /// Errors and resets about others' connections (A9).
    fn breaks(&self, client: SocketAddr) -> Result<()> {
        let (attacker, victim, other, neighbour) = (&self.attacker, &self.victim, &self.other, &self.neighbour);
        let six = client.is_ipv6();
        let server = victim.at(six, 80);
        let quoted = |mark: &[u8]| udp((BROADCAST, BROADCAST), victim.at(six, OPEN), other.at(six, 4000), mark);
        let kinds = if six { [[1, 4], [2, 0]] } else { [[3, 3], [3, 4]] };
        for kind in kinds {
            self.one("an ICMP error of a pod about others", By::Pod, &["source_address", "ingress_policy"], |mark| {
                complaint((attacker.mac, attacker.gateway), attacker.ip(six), victim.ip(six), kind, &quoted(mark)?)
            })?;
            self.one("an ICMP error of a neighbour about pods", By::Neighbour, &["ingress_policy"], |mark| {
                complaint((neighbour.mac, neighbour.gateway), neighbour.ip(six), victim.ip(six), kind, &quoted(mark)?)
            })?;
        }
        self.one("a reset of a pod as a client", By::Pod, &["source_address"], |mark| {
            tcp_reset((attacker.mac, attacker.gateway), client, server, mark)
        })?;
        self.one("a reset of a neighbour as a client", By::Neighbour, &["spoofed_node"], |mark| {
            tcp_reset((neighbour.mac, neighbour.gateway), client, server, mark)
        })
    }
}

#[test]
fn what_an_attacker_writes_arrives_nowhere_and_is_counted() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-abuse", 2, Families::Dual)?;
    let pods = [
        shell("attacker", "n1", "app: attacker"),
        server("victim", "n1", "app: victim"),
        shell("other", "n2", "app: other"),
    ];
    cluster.apply_text(&(pods.concat() + POLICY))?;
    let scene = Scene::new(cluster)?;
    wait("honest frames to arrive", SOON, || scene.honest_frames_arrive())?;
    wait("the policy", SOON, || {
        let (attacker, victim) = (&scene.attacker, &scene.victim);
        let denied = scene.send(By::Pod, &["ingress_policy"], |mark| {
            Ok(vec![udp((attacker.mac, attacker.gateway), attacker.at(false, 4000), victim.at(false, CLOSED), mark)?])
        })?;
        ensure!(denied.0.is_empty() && denied.1 == TIMES, "{denied:?}");
        Ok(())
    })?;
    let mut sessions = Vec::new();
    for (six, port) in [(false, 40_004), (true, 40_006)] {
        let session = scene.other.place.enter(|| Session::open_from(port, scene.victim.at(six, 80), SOON))?;
        sessions.push((session, scene.other.at(six, port)));
    }
    let known = scene.known()?;
    let begun = Instant::now();
    scene.spoofs()?;
    scene.poisons()?;
    scene.injects()?;
    scene.pretends()?;
    scene.hides()?;
    for (session, client) in &mut sessions {
        scene.breaks(*client)?;
        session.ask(SOON).context("a connection that was to be broken")?;
    }
    println!("{} attempts in {:.1} s", scene.number.get(), begun.elapsed().as_secs_f64());
    let failures = scene.failures.borrow().join("\n");
    ensure!(failures.is_empty(), "{failures}");
    let now = scene.known()?;
    ensure!(now == known, "neighbours or routes are others: {known}\nnow {now}");
    scene.honest_frames_arrive()?;
    let Scene { cluster, .. } = scene;
    cluster.down()
}
