//! DNS messages: reading queries, composing answers for the cluster, and passing on what upstream servers answered.

pub(crate) mod compose;
pub(crate) mod query;
pub(crate) mod response;

#[cfg(test)]
mod tests;

pub(crate) use query::{Incoming, Query, Transport};
pub(crate) use response::Response;

/// What this server takes over UDP, and the most it sends: 1232 bytes pass every path unfragmented (DNS flag day 2020).
pub(crate) const UDP_SIZE: u16 = 1232;

/// Response codes used here (IANA DNS RCODEs).
pub(crate) mod rcode {
    pub(crate) const NOERROR: u8 = 0;
    pub(crate) const FORMERR: u8 = 1;
    pub(crate) const SERVFAIL: u8 = 2;
    pub(crate) const NXDOMAIN: u8 = 3;
    pub(crate) const NOTIMP: u8 = 4;
    pub(crate) const REFUSED: u8 = 5;
    /// Extended (RFC 6891): needs an OPT record.
    pub(crate) const BADVERS: u8 = 16;
}

/// Record types told apart here (IANA).
pub(crate) mod rtype {
    pub(crate) const A: u16 = 1;
    pub(crate) const NS: u16 = 2;
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const SOA: u16 = 6;
    pub(crate) const PTR: u16 = 12;
    pub(crate) const MX: u16 = 15;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const SRV: u16 = 33;
    pub(crate) const DNAME: u16 = 39;
    pub(crate) const OPT: u16 = 41;
    pub(crate) const ANY: u16 = 255;
}

/// Length of the header, and of an OPT record without options.
pub(crate) const HEADER: usize = 12;
pub(crate) const OPT_SIZE: usize = 11;

/// The OPT record of a reply (RFC 6891 §6.1): no options, so unknown ones are ignored as they must be.
pub(crate) fn opt_record(rcode: u8, dnssec_ok: bool) -> [u8; OPT_SIZE] {
    let [size_high, size_low] = UDP_SIZE.to_be_bytes();
    let flags = if dnssec_ok { 0x80 } else { 0 };
    [0, 0, 41, size_high, size_low, rcode >> 4, 0, flags, 0, 0, 0]
}
