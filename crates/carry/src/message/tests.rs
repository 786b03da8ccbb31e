use proptest::prelude::*;
use towpath_plan::dns::{Answer, Data, Rcode, Record};

use super::query::{Incoming, Query, Transport, parse};
use super::response::{Mismatch, question, random_case, wire_name};
use super::{Response, compose, rcode, response};

/// `labels` in wire form.
fn wire(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in name.split('.').filter(|l| !l.is_empty()) {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

/// A query: header with id 0x1234, flags and counts, then `rest`.
fn message(flags: u16, counts: [u16; 4], rest: &[u8]) -> Vec<u8> {
    let mut out = vec![0x12, 0x34];
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend(counts.iter().flat_map(|c| c.to_be_bytes()));
    out.extend_from_slice(rest);
    out
}

fn asked(name: &str, qtype: u16, qclass: u16) -> Vec<u8> {
    let mut out = wire(name);
    out.extend_from_slice(&qtype.to_be_bytes());
    out.extend_from_slice(&qclass.to_be_bytes());
    out
}

fn opt(size: u16, version: u8, flags: u8, options: &[u8]) -> Vec<u8> {
    let mut out = vec![0, 0, 41];
    out.extend_from_slice(&size.to_be_bytes());
    out.extend_from_slice(&[0, version, flags, 0]);
    out.extend_from_slice(&u16::try_from(options.len()).unwrap().to_be_bytes());
    out.extend_from_slice(options);
    out
}

fn with(first: &[u8], more: &[u8]) -> Vec<u8> {
    [first, more].concat()
}

fn query(bytes: &[u8], transport: Transport) -> Query {
    match parse(bytes, transport) {
        Incoming::Query(query) => query,
        other => panic!("{other:?}"),
    }
}

/// The response code, extended where there is an OPT record at the end.
fn code(reply: &[u8]) -> u16 {
    assert_eq!((reply[0], reply[1]), (0x12, 0x34), "the client's id");
    assert_eq!(reply[2] & 0x80, 0x80, "a response");
    let high = if reply[11] == 1 { u16::from(reply[reply.len() - 6]) << 4 } else { 0 };
    high | u16::from(reply[3] & 0xf)
}

#[test]
fn queries_are_read() {
    let plain = query(&message(0x0110, [1, 0, 0, 0], &asked("WWW.Example.com", 28, 1)), Transport::Udp);
    assert_eq!((plain.name.as_str(), plain.qtype, plain.max_size, plain.edns), ("www.example.com", 28, 512, None));
    assert!(plain.recursion_desired && plain.checking_disabled && !plain.authentic_data);
    assert_eq!(plain.qname, wire("WWW.Example.com"), "letter case is the client's");

    let root = query(&message(0, [1, 0, 0, 0], &asked("", 2, 1)), Transport::Tcp);
    assert_eq!((root.name.as_str(), root.max_size), ("", 65535));

    for (size, expected) in [(0, 512), (511, 512), (1000, 1000), (4096, 1232)] {
        // A cookie and an option nobody knows are ignored.
        let options = [0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0xfe, 0, 0];
        let body = with(&asked("a.b", 1, 1), &opt(size, 0, 0x80, &options));
        let read = query(&message(0x0100, [1, 0, 0, 1], &body), Transport::Udp);
        assert_eq!((read.max_size, read.edns.unwrap().dnssec_ok), (expected, true));
    }
}

#[test]
fn labels_with_unusual_bytes_cannot_pass_for_other_names() {
    let mut body = vec![7, b'a', b'.', b'b', b'\\', 0, 0xff, b'*', 0];
    body.extend_from_slice(&[0, 1, 0, 1]);
    assert_eq!(query(&message(0, [1, 0, 0, 0], &body), Transport::Udp).name, "a\\046b\\092\\000\\255\\042");
}

#[test]
fn what_is_no_query_gets_silence() {
    let question = asked("a.b", 1, 1);
    for bytes in [
        vec![],
        vec![0; 11],
        message(0x8000, [1, 0, 0, 0], &question),
        message(0x8180, [1, 0, 0, 0], &question),
        message(0xa800, [0, 0, 0, 0], &[]),
    ] {
        assert_eq!(parse(&bytes, Transport::Udp), Incoming::Silence, "{bytes:02x?}");
    }
}

#[test]
fn what_cannot_be_answered_gets_the_right_error() {
    use rcode::{BADVERS, FORMERR, NOTIMP, REFUSED};
    let good = asked("a.b", 1, 1);
    let one = [1, 0, 0, 0];
    let long: Vec<u8> = std::iter::repeat_n([&[63u8][..], &[b'x'; 63]].concat(), 4).flatten().collect();
    let table: &[(&str, Vec<u8>, u8)] = &[
        ("status query", message(0x1000, one, &good), NOTIMP),
        ("update", message(0x2800, one, &good), NOTIMP),
        ("unassigned opcode", message(0x7800, one, &[1, 2, 3]), NOTIMP),
        ("no question", message(0, [0, 0, 0, 0], &[]), FORMERR),
        ("two questions", message(0, [2, 0, 0, 0], &with(&good, &good)), FORMERR),
        ("65535 questions", message(0, [65535, 0, 0, 0], &good), FORMERR),
        ("question missing", message(0, one, &[]), FORMERR),
        ("question cut in its name", message(0, one, &[5, b'a']), FORMERR),
        ("question cut after its name", message(0, one, &[1, b'a', 0, 0]), FORMERR),
        ("name points to itself", message(0, one, &[0xc0, 12, 0, 1, 0, 1]), FORMERR),
        ("name points forward", message(0, one, &[0xc0, 40, 0, 1, 0, 1]), FORMERR),
        ("name points into the header", message(0, one, &[1, b'a', 0xc0, 4, 0, 1, 0, 1]), FORMERR),
        ("name in a loop", message(0, one, &[1, b'a', 0xc0, 12, 0, 1, 0, 1]), FORMERR),
        ("label of a reserved type", message(0, one, &[0x41, b'a', 0, 0, 1, 0, 1]), FORMERR),
        ("name over 255 bytes", message(0, one, &with(&long, &[0, 0, 1, 0, 1])), FORMERR),
        ("record announced, missing", message(0, [1, 0, 0, 1], &good), FORMERR),
        (
            "record with a wrong length",
            message(0, [1, 0, 0, 1], &with(&good, &[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 9])),
            FORMERR,
        ),
        (
            "two OPT",
            message(0, [1, 0, 0, 2], &[good.clone(), opt(512, 0, 0, &[]), opt(512, 0, 0, &[])].concat()),
            FORMERR,
        ),
        (
            "OPT not at the root",
            message(0, [1, 0, 0, 1], &with(&good, &with(&[1, b'x'], &opt(512, 0, 0, &[])))),
            FORMERR,
        ),
        ("option cut", message(0, [1, 0, 0, 1], &with(&good, &opt(512, 0, 0, &[0, 10, 0, 8, 1]))), FORMERR),
        ("EDNS version 1", message(0, [1, 0, 0, 1], &with(&good, &opt(512, 1, 0, &[]))), BADVERS),
        ("EDNS version 255", message(0, [1, 0, 0, 1], &with(&good, &opt(512, 255, 0, &[]))), BADVERS),
        ("asks for OPT", message(0, one, &asked("a.b", 41, 1)), FORMERR),
        ("zone transfer", message(0, one, &asked("cluster.local", 252, 1)), REFUSED),
        ("incremental transfer", message(0, one, &asked("cluster.local", 251, 1)), REFUSED),
        ("TSIG", message(0, one, &asked("a.b", 250, 1)), NOTIMP),
        ("class CH", message(0, one, &asked("version.bind", 16, 3)), REFUSED),
        ("class ANY", message(0, one, &asked("a.b", 1, 255)), REFUSED),
    ];
    for (what, bytes, expected) in table {
        for transport in [Transport::Udp, Transport::Tcp] {
            match parse(bytes, transport) {
                Incoming::Reject(reply) => assert_eq!(code(&reply), u16::from(*expected), "{what}"),
                other => panic!("{what}: {other:?}"),
            }
        }
    }
}

fn answer(records: Vec<Record>) -> Answer {
    Answer { rcode: Rcode::NoError, answers: records, authority: vec![], additional: vec![], chase: None }
}

fn a_record(owner: &str, last: u8) -> Record {
    Record { owner: owner.to_owned(), ttl: 5, data: Data::A([10, 0, 0, last].into()) }
}

#[test]
fn cluster_answers_are_authoritative_and_keep_the_clients_letter_case() {
    let asked = query(&message(0x0100, [1, 0, 0, 0], &asked("Web.C", 1, 1)), Transport::Udp);
    let reply = compose::cluster(&asked, &answer(vec![a_record("web.c", 1)]), None).unwrap();
    assert_eq!(&reply.bytes[2..12], [0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    assert_eq!(&reply.bytes[12..19], wire("Web.C"));
    assert_eq!(
        &reply.bytes[23..],
        [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 1],
        "owner compressed to the question"
    );
}

#[test]
fn records_take_turns_at_being_first() {
    let mut first = std::collections::BTreeSet::new();
    for id in 0..6u8 {
        let mut bytes = message(0x0100, [1, 0, 0, 0], &asked("w.c", 1, 1));
        bytes[1] = id;
        let records = (1..=3).map(|n| a_record("w.c", n)).collect();
        let reply = compose::cluster(&query(&bytes, Transport::Udp), &answer(records), None).unwrap().bytes;
        first.insert(reply[12 + 9 + 15]);
    }
    assert_eq!(first.into_iter().collect::<Vec<u8>>(), [1, 2, 3]);
}

#[test]
fn what_does_not_fit_is_truncated_at_a_record_and_said_so() {
    let many = answer((0..200).map(|n| a_record("w.c", n)).collect());
    for (bytes, limit) in [
        (message(0, [1, 0, 0, 0], &asked("w.c", 1, 1)), 512),
        (message(0, [1, 0, 0, 1], &with(&asked("w.c", 1, 1), &opt(1232, 0, 0, &[]))), 1232),
    ] {
        let reply = compose::cluster(&query(&bytes, Transport::Udp), &many, None).unwrap();
        assert!(reply.truncated && reply.bytes[2] & 2 == 2);
        assert!(reply.bytes.len() <= limit && reply.bytes.len() > limit - 32, "{}", reply.bytes.len());
        let count = usize::from(u16::from_be_bytes([reply.bytes[6], reply.bytes[7]]));
        let opt = if limit == 512 { 0 } else { 11 };
        assert_eq!(reply.bytes.len(), 21 + 16 * count + opt, "whole records, then OPT");
        let whole = compose::cluster(&query(&bytes, Transport::Tcp), &many, None).unwrap();
        assert!(!whole.truncated && whole.bytes[2] & 2 == 0 && whole.bytes[7] == 200);
    }
}

// ---- upstream answers -------------------------------------------------------------------------------------------------

const ID: u16 = 0x1234;

/// An upstream answer to `w.c A`: `records` are (section, type, ttl, data).
fn upstream(flags: u16, records: &[(usize, u16, u32, Vec<u8>)]) -> Vec<u8> {
    let mut counts = [1u16, 0, 0, 0];
    let mut body = asked("w.c", 1, 1);
    for (section, count) in counts.iter_mut().enumerate().skip(1) {
        for (_, rtype, ttl, data) in records.iter().filter(|r| r.0 == section) {
            *count += 1;
            if *rtype == 41 {
                body.extend_from_slice(data);
                continue;
            }
            body.extend_from_slice(&[0xc0, 12]);
            body.extend_from_slice(&rtype.to_be_bytes());
            body.extend_from_slice(&[0, 1]);
            body.extend_from_slice(&ttl.to_be_bytes());
            body.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
            body.extend_from_slice(data);
        }
    }
    message(flags, counts, &body)
}

fn soa(minimum: u32) -> Vec<u8> {
    let mut data = vec![0xc0, 12, 0xc0, 12];
    data.extend_from_slice(&[0; 16]);
    data.extend_from_slice(&minimum.to_be_bytes());
    data
}

fn read(bytes: &[u8]) -> Result<Response, Mismatch> {
    response::parse(bytes, ID, &wire("w.c"), 1)
}

#[test]
fn answers_to_other_questions_are_foreign() {
    let good = upstream(0x8180, &[(1, 1, 60, vec![1, 2, 3, 4])]);
    assert!(read(&good).is_ok());
    let edit = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        read(&bytes).unwrap_err()
    };
    assert_eq!(edit(0, 9), Mismatch::Foreign, "id");
    assert_eq!(edit(2, 0x01), Mismatch::Foreign, "no response");
    assert_eq!(edit(13, b'v'), Mismatch::Foreign, "name");
    assert_eq!(edit(18, 28), Mismatch::Foreign, "type");
    assert_eq!(edit(5, 2), Mismatch::Foreign, "two questions");
    assert_eq!(edit(13, b'W'), Mismatch::LetterCase);
    assert_eq!(read(&good[..good.len() - 1]), Err(Mismatch::Malformed));
    assert_eq!(read(&good[..11]), Err(Mismatch::Foreign));
}

#[test]
fn names_in_upstream_answers_that_loop_or_point_forward_are_malformed() {
    let answers_at = 12 + 9;
    for (what, rtype, data) in [
        ("to itself", 5, vec![0xc0, u8::try_from(answers_at + 12).unwrap()]),
        ("round in a circle", 5, vec![1, b'x', 0xc0, u8::try_from(answers_at + 12).unwrap()]),
        ("forward", 2, vec![0xc0, 200]),
        ("into the header", 12, vec![0xc0, 2]),
        ("past its data", 5, vec![9, b'x']),
        ("more after the name", 5, vec![0xc0, 12, 0]),
        ("reserved label", 15, vec![0, 1, 0x80, 0]),
    ] {
        assert_eq!(read(&upstream(0x8180, &[(1, rtype, 1, data)])), Err(Mismatch::Malformed), "{what}");
    }
    assert!(read(&upstream(0x8180, &[(1, 5, 1, vec![1, b'x', 0xc0, 12])])).is_ok());
}

#[test]
fn answers_are_kept_as_long_as_they_say_within_limits() {
    let ttl = |flags, records: &[(usize, u16, u32, Vec<u8>)]| read(&upstream(flags, records)).unwrap().ttl;
    let a = |seconds| (1, 1, seconds, vec![1, 2, 3, 4]);
    assert_eq!(ttl(0x8180, &[a(60), a(30)]), Some(30));
    assert_eq!(ttl(0x8180, &[a(1_000_000)]), Some(3600));
    assert_eq!(ttl(0x8180, &[a(0)]), None);
    assert_eq!(ttl(0x8180, &[a(0x8000_0000)]), None, "RFC 2181: a negative TTL is none");
    assert_eq!(ttl(0x8380, &[a(60)]), None, "truncated");
    assert_eq!(ttl(0x8183, &[(2, 6, 900, soa(20))]), Some(20), "NXDOMAIN: the SOA's minimum");
    assert_eq!(ttl(0x8180, &[(2, 6, 10, soa(20))]), Some(10), "NODATA: the SOA's own TTL if less");
    assert_eq!(ttl(0x8183, &[(2, 6, 90000, soa(90000))]), Some(300));
    assert_eq!(ttl(0x8183, &[]), None, "no SOA, no negative caching");
    assert_eq!(
        ttl(0x8180, &[(1, 5, 60, vec![1, b'x', 0])]),
        None,
        "an alias without the type asked for and without SOA"
    );
    assert_eq!(ttl(0x8182, &[(2, 6, 900, soa(20))]), None, "SERVFAIL");
}

#[test]
fn replies_from_upstream_answers_are_the_clients_own() {
    let upstream =
        read(&upstream(0x81a0, &[(1, 1, 60, vec![1, 2, 3, 4]), (3, 41, 0, opt(4096, 0, 0, &[0, 10, 0, 2, 7, 7]))]))
            .unwrap();
    let mut bytes = message(0x0110, [1, 0, 0, 0], &asked("W.c", 1, 1));
    bytes[0] = 0x77;
    let (reply, truncated) = upstream.reply(&query(&bytes, Transport::Udp), 50, 3600);
    assert!(!truncated);
    assert_eq!(&reply[..12], [0x77, 0x34, 0x81, 0x90, 0, 1, 0, 1, 0, 0, 0, 0], "no AA, no AD, CD as asked, no OPT");
    assert_eq!(&reply[12..17], wire("W.c"));
    assert_eq!(&reply[27..31], [0, 0, 0, 10], "TTL less age");

    let body = with(&asked("w.c", 1, 1), &opt(1232, 0, 0x80, &[]));
    let (reply, _) = upstream.reply(&query(&message(0x0100, [1, 0, 0, 1], &body), Transport::Udp), 99, 3600);
    assert_eq!(reply[3] & 0x20, 0x20, "AD for who understands it");
    assert_eq!((reply[11], &reply[27..31]), (1, &[0, 0, 0, 0][..]));
    assert_eq!(
        &reply[reply.len() - 11..],
        [0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0],
        "an OPT of ours, no cookie of theirs"
    );
}

#[test]
fn long_upstream_answers_lose_what_nobody_asked_for_first() {
    let a = |section| (section, 1, 60, vec![1, 2, 3, 4]);
    let client = query(&message(0x0100, [1, 0, 0, 0], &asked("w.c", 1, 1)), Transport::Udp);
    let case = |answers: usize, authority: usize, additional: usize| {
        let records: Vec<_> =
            [(1, answers), (2, authority), (3, additional)].iter().flat_map(|(s, n)| (0..*n).map(|_| a(*s))).collect();
        let (reply, truncated) = read(&upstream(0x8180, &records)).unwrap().reply(&client, 0, 60);
        assert!(reply.len() <= 512);
        assert_eq!(reply[2] & 2 == 2, truncated);
        assert_eq!(
            reply.len(),
            21 + 16 * reply[5..12].iter().step_by(2).skip(1).map(|n| usize::from(*n)).sum::<usize>()
        );
        (reply[7], reply[9], reply[11], truncated)
    };
    assert_eq!(case(10, 5, 5), (10, 5, 5, false));
    assert_eq!(case(10, 5, 30), (10, 5, 0, false));
    assert_eq!(case(10, 30, 5), (10, 0, 0, false));
    assert_eq!(case(40, 5, 5), (30, 0, 0, true));
}

#[test]
fn names_go_to_wire_form_and_their_letters_are_shuffled_and_nothing_else() {
    assert_eq!(wire_name("www.example.com").unwrap(), wire("www.example.com"));
    assert_eq!(wire_name("").unwrap(), [0]);
    assert_eq!(wire_name("a\\046b.c").unwrap(), [3, b'a', b'.', b'b', 1, b'c', 0]);
    assert!(wire_name(&"a".repeat(64)).is_none());
    let name = wire("abc-1.xyz");
    let shuffled = random_case(&name, &[0b0010_1010]);
    assert_eq!(shuffled, wire("aBc-1.XyZ"));
    assert_eq!(question(ID, &name, 1, true, true, true)[..12], [0x12, 0x34, 1, 0x10, 0, 1, 0, 0, 0, 0, 0, 1]);
}

/// Bytes that look like messages often enough to get past the first checks.
fn mangled() -> impl Strategy<Value = Vec<u8>> {
    let seeds = prop_oneof![
        Just(message(0x0100, [1, 0, 0, 1], &with(&asked("w.c", 1, 1), &opt(1232, 0, 0, &[0, 10, 0, 2, 1, 1])))),
        Just(upstream(
            0x8180,
            &[(1, 5, 9, vec![1, b'x', 0xc0, 12]), (2, 6, 9, soa(9)), (3, 41, 0, opt(512, 0, 0, &[]))]
        )),
        prop::collection::vec(any::<u8>(), 0..80),
    ];
    (
        seeds,
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(mut bytes, edits, cut, whole)| {
            for (at, value) in edits {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
            }
            if !whole && !bytes.is_empty() {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn any_bytes_lead_to_a_query_a_reply_with_the_same_id_or_silence(bytes in mangled(), tcp in any::<bool>()) {
        match parse(&bytes, if tcp { Transport::Tcp } else { Transport::Udp }) {
            Incoming::Silence => prop_assert!(bytes.len() < 12 || bytes[2] & 0x80 != 0),
            Incoming::Reject(reply) => {
                prop_assert_eq!(&reply[..2], &bytes[..2]);
                prop_assert!(reply[2] & 0x80 != 0 && (reply[3] & 0xf != 0 || reply[11] == 1 && reply[reply.len() - 6] != 0));
                prop_assert!(reply.len() <= bytes.len() + 11, "no amplification");
                prop_assert_eq!(parse(&reply, Transport::Udp), Incoming::Silence);
            }
            Incoming::Query(query) => {
                prop_assert!(wire_name(&query.name).is_some_and(|w| w.eq_ignore_ascii_case(&query.qname)));
                let reply = compose::error(&query, rcode::SERVFAIL);
                prop_assert!(reply.len() <= query.max_size);
            }
        }
    }

    #[test]
    fn any_upstream_bytes_are_refused_or_make_a_well_formed_reply(bytes in mangled(), age in any::<u32>(), tcp in any::<bool>()) {
        if let Ok(response) = response::parse(&bytes, ID, &wire("w.c"), 1) {
            let asked = message(0x0100, [1, 0, 0, 1], &with(&asked("W.C", 1, 1), &opt(512, 0, 0, &[])));
            let client = query(&asked, if tcp { Transport::Tcp } else { Transport::Udp });
            let (reply, _) = response.reply(&client, age, 30);
            prop_assert!(reply.len() <= client.max_size);
            let message = domain::base::Message::from_octets(reply.as_slice()).unwrap();
            prop_assert!(message.opt().is_some());
            for record in message.iter() {
                prop_assert!(record.is_ok(), "{reply:02x?}");
            }
        }
    }
}

/// A record: owner (wire form or a pointer), type, class, data.
fn record(owner: &[u8], rtype: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut out = owner.to_vec();
    out.extend_from_slice(&rtype.to_be_bytes());
    out.extend_from_slice(&class.to_be_bytes());
    out.extend_from_slice(&ttl.to_be_bytes());
    out.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn answered(qtype: u16, records: &[Vec<u8>]) -> Response {
    let count = u16::try_from(records.len()).unwrap();
    let body = with(&asked("a.b", qtype, 1), &records.concat());
    response::parse(&message(0x8180, [1, count, 0, 0], &body), 0x1234, &wire("a.b"), qtype).unwrap()
}

#[test]
fn an_answer_has_the_addresses_of_the_name_and_of_its_aliases_and_no_others() {
    let me = [0xc0, 12];
    let of = |records: &[Vec<u8>]| -> Vec<String> {
        answered(1, records).addresses().iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        of(&[record(&me, 1, 1, 60, &[192, 0, 2, 1]), record(&me, 1, 1, 30, &[192, 0, 2, 2])]),
        ["192.0.2.1", "192.0.2.2"]
    );
    let chain = [
        // Written in the order in which nobody needs them, and in other letters.
        record(&wire("END.c"), 1, 1, 60, &[192, 0, 2, 3]),
        record(&wire("mid.c"), 5, 1, 60, &wire("end.C")),
        record(&me, 5, 1, 60, &wire("Mid.c")),
        record(&wire("other.c"), 1, 1, 60, &[192, 0, 2, 4]),
        record(&wire("endc"), 1, 1, 60, &[192, 0, 2, 5]),
        record(&wire("end.c"), 28, 1, 60, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    ];
    assert_eq!(of(&chain), ["192.0.2.3", "2001:db8::1"]);
    assert_eq!(of(&[record(&wire("c"), 1, 1, 60, &[192, 0, 2, 1])]), [""; 0], "of another name");
    assert_eq!(of(&[record(&me, 1, 3, 60, &[192, 0, 2, 1])]), [""; 0], "of another class");
    assert_eq!(of(&[record(&me, 1, 1, 60, &[192, 0, 2])]), [""; 0], "no address");
    let round = [record(&me, 5, 1, 60, &wire("x.c")), record(&wire("x.c"), 5, 1, 60, &wire("a.b"))];
    assert_eq!(of(&round), [""; 0], "aliases in a circle");
    assert_eq!(Response::bare(rcode::SERVFAIL).addresses(), Vec::<std::net::IpAddr>::new());
}

#[test]
fn the_least_ttl_is_of_the_answers_alone() {
    let me = [0xc0, 12];
    assert_eq!(
        answered(1, &[record(&me, 5, 1, 20, &wire("x.c")), record(&wire("x.c"), 1, 1, 60, &[192, 0, 2, 1])])
            .least_ttl(),
        20
    );
    assert_eq!(answered(1, &[record(&me, 1, 1, u32::MAX, &[192, 0, 2, 1])]).least_ttl(), 0);
    assert_eq!(answered(1, &[]).least_ttl(), 0);
}
