//! Questions and answers of a [`Zone`](super::Zone), as values: no wire format here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What is asked for (RFC 1035 QTYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueryType {
    /// 1.
    A,
    /// 2.
    Ns,
    /// 5.
    Cname,
    /// 6.
    Soa,
    /// 12.
    Ptr,
    /// 16.
    Txt,
    /// 28.
    Aaaa,
    /// 33.
    Srv,
    /// 255: answered with a subset (RFC 8482).
    Any,
    /// Any other.
    Other(u16),
}

impl From<u16> for QueryType {
    fn from(number: u16) -> Self {
        match number {
            1 => QueryType::A,
            2 => QueryType::Ns,
            5 => QueryType::Cname,
            6 => QueryType::Soa,
            12 => QueryType::Ptr,
            16 => QueryType::Txt,
            28 => QueryType::Aaaa,
            33 => QueryType::Srv,
            255 => QueryType::Any,
            other => QueryType::Other(other),
        }
    }
}

/// Response code, as far as a zone gives one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rcode {
    /// The name exists (perhaps without data of the type).
    NoError,
    /// It does not.
    NxDomain,
}

/// Data of a record. Names are absolute, without a trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Data {
    /// IPv4 address.
    A(Ipv4Addr),
    /// IPv6 address.
    Aaaa(Ipv6Addr),
    /// Alias.
    Cname(String),
    /// Service location.
    Srv {
        /// Lower is tried first.
        priority: u16,
        /// Share among equals.
        weight: u16,
        /// Port.
        port: u16,
        /// Host.
        target: String,
    },
    /// Name of an address.
    Ptr(String),
    /// Text.
    Txt(String),
    /// Name server.
    Ns(String),
    /// Start of authority.
    Soa {
        /// Primary server.
        mname: String,
        /// Mailbox.
        rname: String,
        /// Rises with every change.
        serial: u32,
    },
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub owner: String,
    /// Seconds it may be kept.
    pub ttl: u32,
    /// Its data.
    pub data: Data,
}

/// An authoritative answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The response code.
    pub rcode: Rcode,
    /// Answer section.
    pub answers: Vec<Record>,
    /// Authority section: the SOA of a negative answer.
    pub authority: Vec<Record>,
    /// Additional section: addresses of SRV targets.
    pub additional: Vec<Record>,
    /// The answer ends in an alias to this name outside the cluster: the server looks it up and appends what it finds.
    pub chase: Option<String>,
}

/// Whether a question is the cluster's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is.
    Answer(Answer),
    /// It is not: ask upstream.
    Forward,
    /// Nothing was fed yet, so nobody can tell: the client should try again (SERVFAIL).
    NotReady,
}

impl Answer {
    pub(super) fn empty(rcode: Rcode) -> Self {
        Self { rcode, answers: Vec::new(), authority: Vec::new(), additional: Vec::new(), chase: None }
    }
}

impl Data {
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Data::A(v4),
            IpAddr::V6(v6) => Data::Aaaa(v6),
        }
    }

    pub(super) fn is(&self, query: QueryType) -> bool {
        matches!(
            (self, query),
            (_, QueryType::Any)
                | (Data::A(_), QueryType::A)
                | (Data::Aaaa(_), QueryType::Aaaa)
                | (Data::Cname(_), QueryType::Cname)
                | (Data::Srv { .. }, QueryType::Srv)
                | (Data::Ptr(_), QueryType::Ptr)
                | (Data::Txt(_), QueryType::Txt)
                | (Data::Ns(_), QueryType::Ns)
                | (Data::Soa { .. }, QueryType::Soa)
        )
    }
}
