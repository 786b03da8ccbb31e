//! Token buckets (`tbf`) at pods' devices: what is sent through a device waits there for its turn.
//!
//! A bucket is the device's root queue. Ours are told from others' by their handle; another's is replaced where a pod has a limit, and
//! never taken away.

use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use towpath_model::Rate;

use super::error::Error;
use super::netlink::{Netlink, Request};

/// Of our buckets, `7470:` in `tc qdisc show`.
const HANDLE: TcHandle = TcHandle { major: 0x7470, minor: 0 };
const KIND: &str = "tbf";

/// `TCA_TBF_*` of linux/pkt_sched.h.
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: packets count as long as they are.
const ETHERNET: u8 = 1;
/// Lengths of `struct tc_ratespec` and of `struct tc_tbf_qopt`, which has two of them and three numbers.
const RATE_LEN: usize = 12;
const PARMS_LEN: usize = 2 * RATE_LEN + 12;
/// The kernel counts time in these many nanoseconds (`PSCHED_SHIFT`).
const TICK: u64 = 64;

/// An Ethernet header, and a VLAN's tag.
const LINK_HEADER: u32 = 18;
/// What may pass at once, whatever the rate: less makes many small pieces of what TCP hands down in one.
const LEAST_BURST: u64 = 16 * 1024;
/// What may wait, whatever the rate.
const LEAST_QUEUE: u64 = 30_000;
/// Neither counts for anything at rates where it would be more.
const MOST_BURST: u64 = 1 << 30;

/// A bucket as it is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes a second, with their Ethernet headers.
    rate: u64,
    /// Bytes that may pass at once: 10 ms of the rate. The kernel cuts what TCP sent in one piece and is longer, and drops anything else that is, so it is no
    /// less than the largest packet.
    burst: u32,
    /// Bytes that may wait, for 50 ms at the rate; twice the burst at least, so that what is not cut finds room.
    queue: u32,
}

impl Bucket {
    /// For packets of at most `mtu` bytes.
    pub fn of(rate: Rate, mtu: u32) -> Self {
        let rate = rate.bytes();
        let largest = u64::from(mtu.saturating_add(LINK_HEADER));
        let burst = (rate / 100).max(LEAST_BURST).max(largest).min(MOST_BURST);
        let queue = (rate / 20).max(LEAST_QUEUE).max(2 * burst).min(2 * MOST_BURST);
        Self { rate, burst: narrow(burst), queue: narrow(queue) }
    }

    /// Time that the burst takes at the rate, in the kernel's ticks.
    fn ticks(&self) -> u64 {
        u64::try_from(u128::from(self.burst) * 1_000_000_000 / u128::from(self.rate.max(1))).unwrap_or(u64::MAX) / TICK
    }

    /// `struct tc_tbf_qopt`: the kernel takes burst and, where it does not fit there, rate from their own attributes.
    fn parms(&self) -> Vec<u8> {
        let mut parms = Vec::with_capacity(PARMS_LEN);
        parms.extend([0, ETHERNET, 0, 0, 0, 0, 0, 0]);
        parms.extend(narrow(self.rate).to_ne_bytes());
        parms.extend([0; RATE_LEN]);
        for number in [self.queue, 0, 0] {
            parms.extend(number.to_ne_bytes());
        }
        parms
    }
}

fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Request: puts a bucket at a device, in place of what is there. Of one of ours only the numbers change; what waits in it goes on waiting. Where it is
/// the first, or the last that is taken away, the kernel drops what comes meanwhile, for some milliseconds.
pub fn put(device: u32, name: &str, bucket: Bucket) -> Request {
    let mut message = root(device);
    message.header.handle = HANDLE;
    message.attributes.push(TcAttribute::Kind(KIND.to_owned()));
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Other(DefaultNla::new(PARMS, bucket.parms())),
        TcOption::Other(DefaultNla::new(RATE64, bucket.rate.to_ne_bytes().to_vec())),
        TcOption::Other(DefaultNla::new(BURST, bucket.burst.to_ne_bytes().to_vec())),
    ]));
    let operation = format!("put a token bucket of {} bit/s at device {name}", bucket.rate.saturating_mul(8));
    Request::new(operation, Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Has the device have this bucket, or none of ours; what was changed, in words.
pub fn ensure(netlink: &mut Netlink, device: u32, name: &str, wanted: Option<Bucket>) -> Result<Option<String>, Error> {
    let present = present(netlink, device, name)?;
    let request = match (wanted, present) {
        (Some(wanted), Some(present)) if present.is(&wanted) => return Ok(None),
        (Some(wanted), _) => put(device, name, wanted),
        (None, None) => return Ok(None),
        (None, Some(_)) => {
            let mut message = root(device);
            message.header.handle = HANDLE;
            Request::new(format!("take the token bucket from device {name}"), Message::DelQueueDiscipline(message), 0)
        }
    };
    let said = request.operation.clone();
    netlink.request(request).map_err(unsupported)?;
    Ok(Some(said))
}

/// What an operator can do about a bucket that the kernel refuses.
pub fn unsupported(error: Error) -> Error {
    match error.errno() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => Error::Refused(format!(
            "{error}: this kernel has no token buckets (sch_tbf), which limits of bandwidth need; try `modprobe sch_tbf`"
        )),
        _ => error,
    }
}

/// A bucket of ours that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Present {
    rate: u64,
    queue: u32,
    /// Of the burst; what does not fit is cut off.
    ticks: u32,
}

impl Present {
    fn is(&self, wanted: &Bucket) -> bool {
        // The kernel rounds twice.
        let near = |ticks: u64| ticks.abs_diff(u64::from(self.ticks)) <= 2 + ticks / 1000;
        let ticks = wanted.ticks();
        self.rate == wanted.rate && self.queue == wanted.queue && (ticks > u64::from(u32::MAX) || near(ticks))
    }
}

fn present(netlink: &mut Netlink, device: u32, name: &str) -> Result<Option<Present>, Error> {
    let request = Request::new(
        format!("look up the queue of device {name}"),
        Message::GetQueueDiscipline(root(device)),
        // Without, the kernel tells others and not who asks.
        NLM_F_ECHO,
    );
    let answers = match netlink.request(request) {
        Ok(answers) => answers,
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(answers.into_iter().find_map(|answer| match answer {
        Message::NewQueueDiscipline(message) if message.header.handle == HANDLE => read(&message),
        _ => None,
    }))
}

fn read(message: &TcMessage) -> Option<Present> {
    let is_ours = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == KIND);
    if !message.attributes.iter().any(is_ours) {
        return None;
    }
    message.attributes.iter().find_map(|attribute| {
        let TcAttribute::Options(options) = attribute else { return None };
        options.iter().find_map(|option| match option {
            TcOption::Other(all) => read_options(&value(all)),
            _ => None,
        })
    })
}

fn value(nla: &DefaultNla) -> Vec<u8> {
    use rtnetlink::packet_core::Nla;
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    bytes
}

/// The attributes in `TCA_OPTIONS`.
fn read_options(mut rest: &[u8]) -> Option<Present> {
    let number = |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let (mut present, mut rate64) = (None, None);
    while let Some((header, _)) = rest.split_first_chunk::<4>() {
        let [a, b, c, d] = *header;
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = rest.get(4..length)?;
        match kind {
            PARMS => {
                present = Some(Present {
                    rate: u64::from(number(value, 8)?),
                    queue: number(value, 2 * RATE_LEN)?,
                    ticks: number(value, 2 * RATE_LEN + 4)?,
                });
            }
            RATE64 => rate64 = Some(u64::from_ne_bytes(value.try_into().ok()?)),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    present.map(|present: Present| Present { rate: rate64.unwrap_or(present.rate), ..present })
}

fn root(device: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = device.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate: &str, mtu: u32) -> (u64, u32, u32) {
        let Bucket { rate, burst, queue } = Bucket::of(Rate::parse(rate).unwrap(), mtu);
        (rate, burst, queue)
    }

    #[test]
    fn a_bucket_holds_ten_milliseconds_and_fifty_wait_but_never_less_than_packets_need() {
        assert_eq!(bucket("1k", 1450), (125, 16_384, 32_768));
        assert_eq!(bucket("8M", 1500), (1_000_000, 16_384, 50_000));
        assert_eq!(bucket("100M", 1500), (12_500_000, 125_000, 625_000));
        assert_eq!(bucket("8M", 9000), (1_000_000, 16_384, 50_000));
        assert_eq!(bucket("8M", 65_520), (1_000_000, 65_538, 131_076));
        assert_eq!(bucket("1P", 1500), (125_000_000_000_000, 1 << 30, 1 << 31));
    }

    #[test]
    fn what_the_kernel_says_of_a_bucket_is_read() {
        let options = |bucket: &Bucket, ticks: u32, rate64: Option<u64>| {
            let mut parms = bucket.parms();
            parms[28..32].copy_from_slice(&ticks.to_ne_bytes());
            let mut bytes = Vec::new();
            for (kind, value) in
                [(PARMS, parms)].into_iter().chain(rate64.map(|rate| (RATE64, rate.to_ne_bytes().to_vec())))
            {
                bytes.extend((value.len() as u16 + 4).to_ne_bytes());
                bytes.extend(kind.to_ne_bytes());
                bytes.extend(value);
            }
            bytes
        };
        let eight = Bucket::of(Rate::parse("8M").unwrap(), 1500);
        assert_eq!(eight.parms().len(), PARMS_LEN);
        let present = read_options(&options(&eight, 256_000, None)).unwrap();
        assert!(present.is(&eight));
        for other in [("9M", 1500), ("8M", 20_000)] {
            assert!(!present.is(&Bucket::of(Rate::parse(other.0).unwrap(), other.1)), "{other:?}");
        }
        let large = Bucket::of(Rate::parse("100G").unwrap(), 1500);
        let ticks = large.ticks() as u32;
        assert!(read_options(&options(&large, ticks, Some(12_500_000_000))).unwrap().is(&large));
        assert!(!read_options(&options(&large, ticks, None)).unwrap().is(&large));
        assert_eq!(read_options(&options(&eight, 0, None)[..20]), None, "cut");
        assert_eq!(read_options(&[]), None);
    }
}
