//! ICMP errors that an end of a connection makes up: they are believed exactly where an answer to the packet that they quote would be.

use std::net::IpAddr;

use towpath_model::Protocol;
use towpath_model::desired::*;

use crate::frame::L4;
use crate::policy::unreachable;
use crate::world::*;

const UDP_ROWS: RowProtocol = RowProtocol::Ports(Protocol::Udp);
/// Longer than a question without an answer is waited for.
const OVER: u64 = 31;

fn is_remote(address: IpAddr) -> bool {
    BOTH.map(hosts).iter().any(|h| h.remote == address)
}

/// Whether an answer from `to` to what `from` sends there passes, and whether an error that `to` makes up about it does. Each by a connection of
/// its own (`sport` and the next), of which `meanwhile` happens after the opener's packet, which passes or not.
fn answer_and_error(
    w: &mut World,
    [from, to]: [IpAddr; 2],
    sport: u16,
    meanwhile: impl FnOnce(&mut World),
) -> (bool, bool) {
    let send = |w: &World, src: IpAddr, sport, dst: IpAddr, dport| {
        let l4 = L4::udp(b"hello");
        if is_remote(src) {
            w.from_tunnel(&arriving(MAC_TUNNEL, src, sport, dst, dport, l4), "192.168.50.2")
        } else {
            w.from_pod(&sent_by(src, sport, dst, dport, l4))
        }
    };
    for port in [sport, sport + 1] {
        send(w, from, port, to, 53);
    }
    meanwhile(w);
    // The error first: an answer would make the connection younger.
    let mut error = unreachable(to, from, (from, sport + 1, to, 53));
    let error = if is_remote(to) {
        (error.src_mac, error.dst_mac) = (MAC_ROUTER, MAC_TUNNEL);
        w.from_tunnel(&error, "192.168.50.2")
    } else {
        w.from_pod(&error)
    };
    let answer = send(w, to, 53, from, sport);
    for outcome in [&answer, &error] {
        let by_policy = ["ingress_policy", "egress_policy"].contains(&outcome.counted.first().copied().unwrap_or(""));
        assert!(outcome.verdict != DROP || by_policy, "{outcome:?}");
    }
    (answer.verdict != DROP, error.verdict != DROP)
}

#[test]
fn an_error_is_believed_where_an_answer_would_be_and_nowhere_else() {
    in_world(|w| {
        let (a, b) = (w.local_a(), w.local_b());
        for h in BOTH.map(hosts) {
            // Nobody may open anything to a; a may open what it likes.
            w.isolate(&a, 7, 0);
            w.isolate(&b, 0, 0);
            w.apply_policy();
            let open = |w: &mut World, ends, sport| answer_and_error(w, ends, sport, |_| ());
            assert_eq!(open(w, [h.a, h.b], 4000), (true, true));
            assert_eq!(
                open(w, [h.a, h.remote], 4010),
                (true, true),
                "what the other node's policies say is not known here"
            );
            let age = |w: &mut World, ends, sport| answer_and_error(w, ends, sport, |w| w.age(OVER));
            assert_eq!(
                age(w, [h.a, h.b], 4020),
                (false, false),
                "the connection is over, whether or not it was swept yet"
            );
            assert_eq!(age(w, [h.a, h.remote], 4030), (false, false));
            // b hears nobody: what a sends to it is no connection, and nothing that b says is of one.
            w.isolate(&b, 8, 0);
            w.apply_policy();
            assert_eq!(open(w, [h.a, h.b], 4040), (false, false));
            // Nor what a sent to it when it still heard.
            w.isolate(&b, 0, 0);
            w.apply_policy();
            let b_is_closed = |w: &mut World| {
                w.isolate(&w.local_b(), 8, 0);
                w.apply_policy();
            };
            assert_eq!(answer_and_error(w, [h.a, h.b], 4050, b_is_closed), (false, false));
            // Nor where a was told to send nothing any more.
            w.isolate(&b, 0, 0);
            w.apply_policy();
            let a_is_silenced = |w: &mut World| {
                w.isolate(&w.local_a(), 7, 9);
                w.apply_policy();
            };
            assert_eq!(answer_and_error(w, [h.a, h.remote], 4060, a_is_silenced), (false, false));
            // Without a connection both are a packet like any other, which a row may allow.
            w.isolate(&a, 7, 0);
            w.isolate(&b, 8, 0);
            w.allow(7, h.b, RowProtocol::Other, 0, 42);
            for port in 4070..4072 {
                w.allow(7, h.b, UDP_ROWS, port, 43);
            }
            w.apply_policy();
            assert_eq!(open(w, [h.a, h.b], 4070), (true, true));
            w.image.rows.clear();
        }
    });
}
