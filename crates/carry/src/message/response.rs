//! What an upstream server answered, checked once, and passed on to clients with their own id, letter case and size.

use std::net::IpAddr;

use super::query::{self, Query};
use super::{HEADER, OPT_SIZE, opt_record, rcode, rtype};

/// Aliases of an answer that are followed.
const MAX_ALIASES: usize = 16;
/// Longest time that an answer is kept, in seconds: positive, and negative (RFC 2308 §5 recommends one to three hours).
pub(crate) const MAX_TTL: u32 = 3600;
pub(crate) const MAX_NEGATIVE_TTL: u32 = 300;

/// An answer, without its OPT record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    bytes: Vec<u8>,
    ttl_at: Vec<usize>,
    /// Where each record of the answer section ends.
    answer_ends: Vec<usize>,
    /// Where the name asked for is written out, in the question and as the owner of records.
    name_at: Vec<usize>,
    question_end: usize,
    authority_end: usize,
    /// Records in the authority section.
    authority: u16,
    rcode: u8,
    pub(crate) truncated: bool,
    /// Seconds that it may be kept; none: not at all.
    pub(crate) ttl: Option<u32>,
}

/// Why a datagram is not the answer that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// Another id or question, or no answer at all: forged or late. Wait on.
    Foreign,
    /// The question came back in other letter case than it was asked in: forged, or the server does not keep it. Ask by TCP.
    LetterCase,
    /// It is the answer, and malformed.
    Malformed,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

struct RecordAt {
    owner: usize,
    rtype: u16,
    ttl_at: usize,
    data: usize,
    end: usize,
    root: bool,
}

impl Walk<'_> {
    fn u16(&mut self) -> Option<u16> {
        let value = u16_at(self.bytes, self.at)?;
        self.at += 2;
        Some(value)
    }

    /// Passes a name and checks it: RFC 1035 §4.1.4, pointers only backwards, 255 bytes at most.
    fn name(&mut self) -> Option<()> {
        self.at = check_name(self.bytes, self.at)?;
        Some(())
    }

    fn record(&mut self) -> Option<RecordAt> {
        let owner = self.at;
        let root = self.bytes.get(owner) == Some(&0);
        self.name()?;
        let rtype = self.u16()?;
        self.at += 2;
        let ttl_at = self.at;
        self.at += 4;
        let length = usize::from(self.u16()?);
        let data = self.at;
        let end = data.checked_add(length).filter(|end| *end <= self.bytes.len())?;
        // The types whose names may be compressed: what is passed on must not trap a careless client.
        let names: &[usize] = match rtype {
            rtype::NS | rtype::CNAME | rtype::PTR | rtype::DNAME => &[0],
            rtype::MX => &[2],
            rtype::SRV => &[6],
            rtype::SOA => &[0, 0],
            _ => &[],
        };
        for skip in names {
            self.at = self.at.checked_add(*skip)?;
            self.name()?;
        }
        let rest = if rtype == rtype::SOA { 20 } else { 0 };
        if !names.is_empty() && self.at + rest != end {
            return None;
        }
        self.at = end;
        Some(RecordAt { owner, rtype, ttl_at, data, end, root })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Where the name at `start` ends.
fn check_name(bytes: &[u8], start: usize) -> Option<usize> {
    let (mut at, mut lowest, mut length, mut end) = (start, start, 0usize, None);
    loop {
        let byte = *bytes.get(at)?;
        match byte {
            0 => {
                let here = at + 1;
                return (here <= bytes.len()).then(|| end.unwrap_or(here));
            }
            1..=63 => {
                length += usize::from(byte) + 1;
                at += usize::from(byte) + 1;
                if length > 254 || at >= bytes.len() {
                    return None;
                }
            }
            192.. => {
                let target = usize::from(u16_at(bytes, at)? & 0x3fff);
                end.get_or_insert(at + 2);
                // Each jump goes below everything visited: no loop is possible.
                if target >= lowest || target < HEADER {
                    return None;
                }
                (at, lowest) = (target, target);
            }
            _ => return None,
        }
    }
}

/// A name in lower case and without pointers; empty where there is none.
fn plain_name(bytes: &[u8], start: usize) -> Vec<u8> {
    let (mut at, mut plain) = (start, Vec::with_capacity(32));
    // Checked when the message was read: every pointer leads backwards. The limit is for what was not.
    for _ in 0..256 {
        match bytes.get(at).copied() {
            Some(length @ 1..=63) => {
                let end = at + 1 + usize::from(length);
                plain.extend(bytes.get(at..end).unwrap_or_default().iter().map(u8::to_ascii_lowercase));
                at = end;
            }
            Some(192..) => at = usize::from(u16_at(bytes, at).unwrap_or_default() & 0x3fff),
            _ => break,
        }
    }
    plain
}

/// The address of an A or AAAA record.
fn address_at(bytes: &[u8], record: &RecordAt) -> Option<IpAddr> {
    let data = bytes.get(record.data..record.end)?;
    match record.rtype {
        rtype::A => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
        rtype::AAAA => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Checks a message against what was asked: id, and the question byte for byte (`qname` with the letter case sent).
pub(crate) fn parse(bytes: &[u8], id: u16, qname: &[u8], qtype: u16) -> Result<Response, Mismatch> {
    let header = bytes.get(..HEADER).ok_or(Mismatch::Foreign)?;
    let [id_high, id_low, high, low, ..] = *header else { return Err(Mismatch::Foreign) };
    if u16::from_be_bytes([id_high, id_low]) != id || high & 0xf8 != 0x80 {
        return Err(Mismatch::Foreign);
    }
    let count = |at| u16_at(bytes, at).ok_or(Mismatch::Foreign);
    let (questions, code) = (count(4)?, low & 0xf);
    let question_end = HEADER + qname.len() + 4;
    if questions == 0 && matches!(code, rcode::FORMERR | rcode::NOTIMP | rcode::REFUSED | rcode::SERVFAIL) {
        // Some servers repeat no question when they do not like the query; the id must do.
        return Ok(Response::bare(code));
    }
    let asked = bytes.get(HEADER..HEADER + qname.len()).ok_or(Mismatch::Foreign)?;
    let same_type = u16_at(bytes, question_end - 4) == Some(qtype) && u16_at(bytes, question_end - 2) == Some(1);
    if questions != 1 || !same_type || !asked.eq_ignore_ascii_case(qname) {
        return Err(Mismatch::Foreign);
    }
    if asked != qname {
        return Err(Mismatch::LetterCase);
    }
    let counts = [count(6)?, count(8)?, count(10)?];
    read(bytes, question_end, counts, qtype, code, high & 0x02 != 0).ok_or(Mismatch::Malformed)
}

fn read(
    bytes: &[u8],
    question_end: usize,
    counts: [u16; 3],
    qtype: u16,
    code: u8,
    truncated: bool,
) -> Option<Response> {
    let [answers, authority, additional] = counts;
    let mut walk = Walk { bytes, at: question_end };
    let (mut ttl_at, mut answer_ends) = (Vec::new(), Vec::new());
    let qname = bytes.get(HEADER..question_end.checked_sub(4)?)?;
    let mut name_at = vec![HEADER];
    let (mut least, mut found, mut negative) = (MAX_TTL, false, None::<u32>);
    let seconds =
        |record: &RecordAt| u32_at(bytes, record.ttl_at).map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl });
    for _ in 0..answers {
        let record = walk.record()?;
        if record.rtype == rtype::OPT {
            return None;
        }
        found |= record.rtype == qtype || qtype == rtype::ANY;
        least = least.min(seconds(&record)?);
        let owner = bytes.get(record.owner..record.owner.saturating_add(qname.len()));
        if owner.is_some_and(|owner| owner.eq_ignore_ascii_case(qname)) {
            name_at.push(record.owner);
        }
        ttl_at.push(record.ttl_at);
        answer_ends.push(record.end);
    }
    for _ in 0..authority {
        let record = walk.record()?;
        if record.rtype == rtype::SOA && record.end - record.data >= 22 {
            negative = Some(seconds(&record)?.min(u32_at(bytes, record.end - 4)?).min(MAX_NEGATIVE_TTL));
        }
        ttl_at.push(record.ttl_at);
    }
    let authority_end = walk.at;
    let (mut end, mut kept, mut code_high) = (authority_end, 0u16, 0u8);
    for _ in 0..additional {
        let record = walk.record()?;
        if record.rtype == rtype::OPT {
            if !record.root {
                return None;
            }
            code_high = bytes.get(record.ttl_at).copied()?;
            break; // What follows it (a TSIG that was not asked for) is left out.
        }
        ttl_at.push(record.ttl_at);
        (end, kept) = (record.end, kept + 1);
    }
    // An extended error (BADVERS, BADCOOKIE) is between that server and us.
    let rcode = if code_high == 0 { code } else { rcode::SERVFAIL };
    let ttl = match rcode {
        _ if truncated => None,
        rcode::NOERROR if found => Some(least),
        rcode::NOERROR | rcode::NXDOMAIN => negative.map(|n| n.min(least)),
        _ => None,
    };
    let mut message = bytes.get(..end)?.to_vec();
    for (to, from) in message.iter_mut().skip(10).zip(kept.to_be_bytes()) {
        *to = from;
    }
    // Out of the random letter case that was sent (length bytes are below the letters).
    for at in &name_at {
        message.iter_mut().skip(*at).take(qname.len()).for_each(|byte| byte.make_ascii_lowercase());
    }
    Some(Response {
        bytes: message,
        ttl_at,
        answer_ends,
        name_at,
        question_end,
        authority_end,
        authority,
        rcode,
        truncated,
        ttl: ttl.filter(|ttl| *ttl > 0),
    })
}

impl Response {
    /// An answer that is only a code.
    pub(crate) fn bare(rcode: u8) -> Self {
        Self {
            bytes: Vec::new(),
            ttl_at: Vec::new(),
            answer_ends: Vec::new(),
            name_at: Vec::new(),
            question_end: 0,
            authority_end: 0,
            authority: 0,
            rcode,
            truncated: false,
            ttl: None,
        }
    }

    /// Whether it says that there is nothing: no such name, or no record of the type.
    pub(crate) fn is_denial(&self) -> bool {
        self.answer_ends.is_empty()
    }

    /// The addresses that the answer section gives for the name asked for, directly or by way of aliases (CNAME) in it. What belongs to
    /// another name is none of them.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let mut walk = Walk { bytes: &self.bytes, at: self.question_end };
        let records: Vec<RecordAt> = self.answer_ends.iter().map_while(|_| walk.record()).collect();
        let internet = |record: &RecordAt| u16_at(&self.bytes, record.ttl_at.saturating_sub(2)) == Some(1);
        let mut names = vec![plain_name(&self.bytes, HEADER)];
        // An alias may stand before or behind what leads to it; each round follows one step at least.
        for _ in 0..MAX_ALIASES {
            let before = names.len();
            for record in records.iter().filter(|record| record.rtype == rtype::CNAME && internet(record)) {
                let (owner, target) = (plain_name(&self.bytes, record.owner), plain_name(&self.bytes, record.data));
                if names.contains(&owner) && !names.contains(&target) {
                    names.push(target);
                }
            }
            if names.len() == before {
                break;
            }
        }
        let of_name =
            records.iter().filter(|record| internet(record) && names.contains(&plain_name(&self.bytes, record.owner)));
        of_name.filter_map(|record| address_at(&self.bytes, record)).collect()
    }

    /// The least TTL of the answer section, in seconds.
    pub(crate) fn least_ttl(&self) -> u32 {
        let end = self.answer_ends.last().copied().unwrap_or_default();
        let of_answers = self.ttl_at.iter().take_while(|at| **at < end).filter_map(|at| u32_at(&self.bytes, *at));
        // RFC 2181 §8: with the highest bit set it is 0.
        of_answers.map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl }).min().unwrap_or(0)
    }

    pub(crate) fn rcode(&self) -> u8 {
        self.rcode
    }

    /// The message as the upstream server sent it, less its OPT record; empty for a bare code.
    pub(crate) fn message(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes it takes in memory, about.
    pub(crate) fn size(&self) -> usize {
        self.bytes.len()
            + (self.ttl_at.len() + self.answer_ends.len() + self.name_at.len()) * size_of::<usize>()
            + size_of::<Self>()
    }

    /// The reply to `query`, `age` seconds after it was received; TTLs are at most `cap`. And whether it was truncated.
    pub(crate) fn reply(&self, query: &Query, age: u32, cap: u32) -> (Vec<u8>, bool) {
        if self.bytes.len() < HEADER || self.question_end > self.bytes.len() {
            return (super::compose::error(query, self.rcode), false);
        }
        let room = query.max_size.saturating_sub(if query.edns.is_some() { OPT_SIZE } else { 0 });
        let answers_end = self.answer_ends.last().copied().unwrap_or(self.question_end);
        let answers = self.answer_ends.len();
        // The additional section goes first, then the authority of a positive answer: nobody asked for them.
        let (end, answers, authority, additional, truncated) = if self.bytes.len() <= room {
            let additional = u16_at(&self.bytes, 10).unwrap_or(0);
            (self.bytes.len(), answers, self.authority, additional, self.truncated)
        } else if self.authority_end <= room {
            (self.authority_end, answers, self.authority, 0, self.truncated)
        } else if answers_end <= room && answers > 0 {
            (answers_end, answers, 0, 0, self.truncated)
        } else {
            let fit = self.answer_ends.iter().take_while(|end| **end <= room).count();
            let end = self.answer_ends.iter().copied().take(fit).next_back().unwrap_or(self.question_end);
            (end, fit, 0, 0, true)
        };
        let mut reply = self.bytes.get(..end).map(<[u8]>::to_vec).unwrap_or_default();
        let counts =
            [1, u16::try_from(answers).unwrap_or(u16::MAX), authority, additional + u16::from(query.edns.is_some())];
        self.write_header(&mut reply, query, counts, truncated);
        for at in self.name_at.iter().filter(|at| **at < end) {
            for (to, from) in reply.iter_mut().skip(*at).zip(&query.qname) {
                *to = *from;
            }
        }
        for at in self.ttl_at.iter().copied().take_while(|at| *at < end) {
            let ttl = u32_at(&reply, at).unwrap_or(0).saturating_sub(age).min(cap);
            for (to, from) in reply.iter_mut().skip(at).zip(ttl.to_be_bytes()) {
                *to = from;
            }
        }
        if let Some(edns) = query.edns {
            reply.extend_from_slice(&opt_record(self.rcode, edns.dnssec_ok));
        }
        (reply, truncated)
    }

    fn write_header(&self, reply: &mut [u8], query: &Query, counts: [u16; 4], truncated: bool) {
        let authentic = reply.get(3).is_some_and(|low| low & 0x20 != 0);
        // RFC 6840 §5.8: AD only to those who understand it.
        let understands = query.authentic_data || query.edns.is_some_and(|e| e.dnssec_ok);
        let mut header = [0u8; HEADER];
        let [id_high, id_low] = query.id.to_be_bytes();
        let high = 0x80 | u8::from(truncated) << 1 | u8::from(query.recursion_desired);
        let low =
            0x80 | u8::from(authentic && understands) << 5 | u8::from(query.checking_disabled) << 4 | self.rcode & 0xf;
        let bytes = [id_high, id_low, high, low].into_iter().chain(counts.into_iter().flat_map(u16::to_be_bytes));
        for (to, from) in header.iter_mut().zip(bytes) {
            *to = from;
        }
        for (to, from) in reply.iter_mut().zip(header) {
            *to = from;
        }
    }
}

/// A query to an upstream server.
pub(crate) fn question(
    id: u16,
    qname: &[u8],
    qtype: u16,
    edns: bool,
    dnssec_ok: bool,
    checking_disabled: bool,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + qname.len() + 4 + OPT_SIZE);
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&[1, u8::from(checking_disabled) << 4, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
    bytes.extend_from_slice(qname);
    bytes.extend_from_slice(&qtype.to_be_bytes());
    bytes.extend_from_slice(&[0, 1]);
    if edns {
        bytes.extend_from_slice(&opt_record(0, dnssec_ok));
    }
    bytes
}

/// The name in wire form with the case of its letters taken from random bits, which a forger must guess
/// (draft-vixie-dnsext-dns0x20).
pub(crate) fn random_case(qname: &[u8], random: &[u8]) -> Vec<u8> {
    let mut out = qname.to_vec();
    let mut letters = 0usize;
    let mut at = 0usize;
    while let Some(length) = out.get(at).copied().filter(|length| *length > 0) {
        let label = at + 1..at + 1 + usize::from(length);
        for byte in out.get_mut(label.clone()).into_iter().flatten().filter(|b| b.is_ascii_alphabetic()) {
            let bit = random.get(letters / 8).copied().unwrap_or(0) >> (letters % 8) & 1;
            *byte = if bit == 1 { byte.to_ascii_uppercase() } else { byte.to_ascii_lowercase() };
            letters += 1;
        }
        at = label.end;
    }
    out
}

/// A name as text in wire form, for names that an alias of the cluster leads to; none if it is no name.
pub(crate) fn wire_name(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() {
        return Some(vec![0]);
    }
    let name = domain::base::name::Name::vec_from_str(text).ok()?;
    let bytes = name.into_octets();
    (query::text(&bytes) == text).then_some(bytes)
}
