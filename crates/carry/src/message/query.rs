//! What a client sent: a query, something that gets an error, or something that gets nothing.

use domain::base::{Message, Rtype};
use domain::rdata::AllRecordData;

use super::{HEADER, UDP_SIZE, rcode};

/// How a message came, and so how long the answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// EDNS as the client speaks it (RFC 6891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edns {
    pub(crate) dnssec_ok: bool,
}

/// A question to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Query {
    pub(crate) id: u16,
    pub(crate) recursion_desired: bool,
    pub(crate) authentic_data: bool,
    pub(crate) checking_disabled: bool,
    /// The name as the client wrote it, in wire form, uncompressed.
    pub(crate) qname: Vec<u8>,
    /// The name in lower case without a trailing dot; bytes other than letters, digits, `-` and `_` are `\DDD`.
    pub(crate) name: String,
    pub(crate) qtype: u16,
    pub(crate) edns: Option<Edns>,
    /// The longest answer, in bytes.
    pub(crate) max_size: usize,
}

/// What to do with a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// Nothing: it is too short to answer, or itself an answer.
    Silence,
    /// This reply.
    Reject(Vec<u8>),
    /// A query of class IN.
    Query(Query),
}

/// Reads a client's message. Total: any bytes lead to one of the three.
pub(crate) fn parse(bytes: &[u8], transport: Transport) -> Incoming {
    let Ok(message) = Message::from_octets(bytes) else { return Incoming::Silence };
    let header = message.header();
    // An answer to an answer could go round for ever (RFC 5452 §4; CVE-class "DNS loop").
    if header.qr() {
        return Incoming::Silence;
    }
    if header.opcode().to_int() != 0 {
        return Incoming::Reject(bare_error(bytes, rcode::NOTIMP));
    }
    match read(&message, transport) {
        Some(Ok(query)) => Incoming::Query(query),
        Some(Err((query, code))) => Incoming::Reject(super::compose::error(&query, code)),
        None => Incoming::Reject(bare_error(bytes, rcode::FORMERR)),
    }
}

/// The query; or the query and the error it gets; or nothing if it is malformed.
fn read(message: &Message<&[u8]>, transport: Transport) -> Option<Result<Query, (Query, u8)>> {
    let header = message.header();
    // More than one question has no meaning (RFC 9619), none neither.
    let question = message.sole_question().ok()?;
    let name = question.qname();
    // Nothing precedes the first name that it could point to.
    if name.is_compressed() {
        return None;
    }
    let mut qname = Vec::with_capacity(64);
    for label in name.iter() {
        qname.push(u8::try_from(label.len()).ok()?);
        qname.extend_from_slice(label.as_slice());
    }
    let mut query = Query {
        id: header.id(),
        recursion_desired: header.rd(),
        authentic_data: header.ad(),
        checking_disabled: header.cd(),
        name: text(&qname),
        qname,
        qtype: question.qtype().to_int(),
        edns: None,
        max_size: if transport == Transport::Tcp { usize::from(u16::MAX) } else { 512 },
    };
    let mut version = 0;
    for section in [message.answer(), message.authority(), message.additional()] {
        for record in section.ok()? {
            let record = record.ok()?;
            if record.rtype() != Rtype::OPT {
                continue;
            }
            // RFC 6891 §6.1.1: one at most, in the additional section, owned by the root.
            let well_formed = record.owner().is_root() && query.edns.is_none();
            let size = record.class().to_int();
            let flags = record.ttl().as_secs();
            let parsed = record.into_any_record::<AllRecordData<_, _>>().ok()?;
            let AllRecordData::Opt(_) = parsed.data() else { return None };
            if !well_formed {
                return None;
            }
            query.edns = Some(Edns { dnssec_ok: flags & 0x8000 != 0 });
            version = flags >> 16 & 0xff;
            if transport == Transport::Udp {
                query.max_size = usize::from(size.clamp(512, UDP_SIZE));
            }
        }
    }
    let error = match (version, query.qtype, question.qclass().to_int()) {
        (1.., _, _) => Some(rcode::BADVERS),
        // OPT is no type to ask for; TKEY, TSIG, zone transfers and mail types are not served.
        (_, 41, _) => Some(rcode::FORMERR),
        (_, 249 | 250, _) => Some(rcode::NOTIMP),
        (_, 251..=254, _) => Some(rcode::REFUSED),
        (_, _, 1) => None,
        _ => Some(rcode::REFUSED),
    };
    Some(match error {
        Some(code) => Err((query, code)),
        None => Ok(query),
    })
}

/// A reply of nothing but a header, for what has no question that could be repeated.
fn bare_error(bytes: &[u8], code: u8) -> Vec<u8> {
    let mut reply = vec![0; HEADER];
    for (to, from) in reply.iter_mut().zip(bytes.iter().take(2)) {
        *to = *from;
    }
    // QR, the opcode and RD as asked; RA.
    let flags = bytes.get(2).copied().unwrap_or(0);
    if let [_, _, high, low, ..] = reply.as_mut_slice() {
        *high = 0x80 | flags & 0x79;
        *low = 0x80 | code;
    }
    reply
}

/// The name as the zone and the cache know it.
pub(crate) fn text(qname: &[u8]) -> String {
    let mut out = String::with_capacity(qname.len());
    let mut rest = qname;
    while let [length, after @ ..] = rest {
        let (label, next) = after.split_at(usize::from(*length).min(after.len()));
        if label.is_empty() {
            break;
        }
        if !out.is_empty() {
            out.push('.');
        }
        for byte in label {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(*byte)),
                b'A'..=b'Z' => out.push(char::from(byte.to_ascii_lowercase())),
                other => {
                    out.push_str(&format!("\\{other:03}"));
                }
            }
        }
        rest = next;
    }
    out
}
