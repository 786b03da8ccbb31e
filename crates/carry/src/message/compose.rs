//! Answers composed here: for the cluster's names, and errors.

use domain::base::iana::Rcode;
use domain::base::message_builder::{AnswerBuilder, PushError, RecordSectionBuilder, StaticCompressor};
use domain::base::name::Name;
use domain::base::{Message, MessageBuilder, Rtype, Serial, Ttl};
use domain::rdata::{A, Aaaa, AllRecordData, Cname, Ns, Ptr, Soa, Srv, Txt};
use towpath_plan::dns::zone::TTL;
use towpath_plan::dns::{Answer, Data, Record};

use super::query::Query;
use super::{OPT_SIZE, Response, opt_record, rcode};

type Target = StaticCompressor<Vec<u8>>;

/// Why a record is not in the reply.
enum Failed {
    /// It does not fit.
    Full,
    /// One of its names is none: an ExternalName can be so.
    BadName,
}

impl From<PushError> for Failed {
    fn from(_: PushError) -> Self {
        Failed::Full
    }
}

/// A reply, and whether it had to be truncated.
pub(crate) struct Composed {
    pub(crate) bytes: Vec<u8>,
    pub(crate) truncated: bool,
}

/// An error reply that repeats the question. `code` may be an extended one.
pub(crate) fn error(query: &Query, code: u8) -> Vec<u8> {
    match start(query, code & 0xf, false) {
        Some(builder) => finish(query, builder.finish().into_target(), code),
        None => Vec::new(),
    }
}

/// The reply for a name of the cluster. `chased` is what upstream said of the alias that the answer ends in.
pub(crate) fn cluster(query: &Query, answer: &Answer, chased: Option<(&Response, u32)>) -> Option<Composed> {
    let code = match (answer.rcode, chased) {
        (_, Some((response, _))) => response.rcode(),
        (towpath_plan::dns::Rcode::NoError, None) => rcode::NOERROR,
        (towpath_plan::dns::Rcode::NxDomain, None) => rcode::NXDOMAIN,
    };
    let mut section = start(query, code, true)?;
    let reserved = if query.edns.is_some() { OPT_SIZE } else { 0 };
    section.as_builder_mut().set_push_limit(query.max_size.saturating_sub(reserved));
    let mut truncated = false;
    // Equal records in another order each time: many clients take the first.
    let fixed = answer.answers.iter().take_while(|r| matches!(r.data, Data::Cname(_))).count();
    let (aliases, records) = answer.answers.split_at(fixed);
    let turn = usize::from(query.id).checked_rem(records.len()).unwrap_or(0);
    let (late, early) = records.split_at(turn);
    for record in aliases.iter().chain(early).chain(late) {
        match push(&mut section, query, record) {
            Ok(()) => {}
            Err(Failed::Full) => {
                truncated = true;
                break;
            }
            Err(Failed::BadName) => return None,
        }
    }
    if let Some((response, age)) = chased.filter(|_| !truncated) {
        truncated = push_answers_of(&mut section, response, age).is_err();
    }
    section.header_mut().set_tc(truncated);
    let mut section = section.authority();
    for record in answer.authority.iter().filter(|_| !truncated) {
        if push(&mut section, query, record).is_err() {
            section.header_mut().set_tc(true);
            truncated = true;
            break;
        }
    }
    let mut section = section.additional();
    for record in answer.additional.iter().filter(|_| !truncated) {
        // What does not fit here is left out without a word: nobody asked for it (RFC 2181 §9).
        if push(&mut section, query, record).is_err() {
            break;
        }
    }
    Some(Composed { bytes: finish(query, section.finish().into_target(), code), truncated })
}

fn start(query: &Query, code: u8, authoritative: bool) -> Option<AnswerBuilder<Target>> {
    let mut builder = MessageBuilder::from_target(StaticCompressor::new(Vec::with_capacity(512))).ok()?;
    let header = builder.header_mut();
    header.set_id(query.id);
    header.set_qr(true);
    header.set_aa(authoritative);
    header.set_rd(query.recursion_desired);
    header.set_ra(true);
    header.set_cd(query.checking_disabled);
    header.set_rcode(Rcode::checked_from_int(code)?);
    let mut question = builder.question();
    question.push((Name::from_octets(query.qname.as_slice()).ok()?, Rtype::from_int(query.qtype))).ok()?;
    Some(question.answer())
}

/// Appends the OPT record, if the client speaks EDNS, and counts it.
fn finish(query: &Query, mut bytes: Vec<u8>, code: u8) -> Vec<u8> {
    if let Some(edns) = query.edns
        && let Some([high, low]) = bytes.get(10..12).and_then(|count| <[u8; 2]>::try_from(count).ok())
    {
        let count = u16::from_be_bytes([high, low]).saturating_add(1).to_be_bytes();
        for (to, from) in bytes.iter_mut().skip(10).zip(count) {
            *to = from;
        }
        bytes.extend_from_slice(&opt_record(code, edns.dnssec_ok));
    }
    bytes
}

fn name(query: &Query, text: &str) -> Result<Name<Vec<u8>>, Failed> {
    if text == query.name {
        return Name::from_octets(query.qname.clone()).map_err(|_| Failed::BadName);
    }
    Name::vec_from_str(text).map_err(|_| Failed::BadName)
}

/// Pushes a record.
fn push<B: RecordSectionBuilder<Target>>(section: &mut B, query: &Query, record: &Record) -> Result<(), Failed> {
    let owner = name(query, &record.owner)?;
    let ttl = Ttl::from_secs(record.ttl);
    match &record.data {
        Data::A(address) => section.push((owner, ttl, A::new(*address)))?,
        Data::Aaaa(address) => section.push((owner, ttl, Aaaa::new(*address)))?,
        Data::Cname(target) => section.push((owner, ttl, Cname::new(name(query, target)?)))?,
        Data::Ptr(target) => section.push((owner, ttl, Ptr::new(name(query, target)?)))?,
        Data::Ns(target) => section.push((owner, ttl, Ns::new(name(query, target)?)))?,
        Data::Srv { priority, weight, port, target } => {
            section.push((owner, ttl, Srv::new(*priority, *weight, *port, name(query, target)?)))?;
        }
        Data::Txt(text) => {
            let text: Txt<Vec<u8>> = Txt::build_from_slice(text.as_bytes()).map_err(|_| Failed::BadName)?;
            section.push((owner, ttl, text))?;
        }
        Data::Soa { mname, rname, serial } => {
            let (mname, rname) = (name(query, mname)?, name(query, rname)?);
            let hours = |n: u32| Ttl::from_secs(n * 3600);
            // Nobody transfers this zone; only the last, the negative TTL (RFC 2308 §4), is read.
            let soa =
                Soa::new(mname, rname, Serial(*serial), hours(2), Ttl::from_secs(1800), hours(24), Ttl::from_secs(TTL));
            section.push((owner, ttl, soa))?;
        }
    }
    Ok(())
}

/// Pushes the answer section of an upstream answer that is `age` seconds old.
fn push_answers_of(section: &mut AnswerBuilder<Target>, response: &Response, age: u32) -> Result<(), PushError> {
    let bytes = response.message();
    let Ok(message) = Message::from_octets(bytes) else { return Ok(()) };
    let Ok(records) = message.answer() else { return Ok(()) };
    for record in records.flatten() {
        let Ok(mut record) = record.into_any_record::<AllRecordData<_, _>>() else { continue };
        record.set_ttl(Ttl::from_secs(record.ttl().as_secs().saturating_sub(age).min(TTL)));
        section.push(record)?;
    }
    Ok(())
}
