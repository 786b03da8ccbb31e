//! Traffic control filters that run a kernel program on a device (`clsact`, `cls_bpf` in direct action).
//!
//! Attaching a BPF link to a device waits for an RCU grace period with the lock of all network configuration held: 7 to 20 ms a
//! link. A filter is there in a fraction of a millisecond, because the kernel waits for an expedited one. So a new device gets
//! its programs as filters, and links later, when nobody waits.
//!
//! A link's verdict ends the chain, so where both are attached the filter is not run, and either may come or go without a gap.
//! What a filter lacks is an owner: anybody's `tc qdisc del dev … clsact` takes it away.
//!
//! The qdisc that filters hang on is added to devices that are down, and stays while they do: on a device that is up the kernel
//! stops the transmit queues while either is done, and loses packets. A kernel without links ([`ensure`], Linux before 6.6) leaves
//! no choice for the uplink, and for a device whose filters somebody took away.

use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::error::Error;
use super::netlink::{Netlink, Request};

/// Ours run first.
const PRIORITY: u32 = 1;
/// Tells our filter from another of the same priority.
const HANDLE: u32 = 0x7470_0116;
/// `ETH_P_ALL` in network byte order, as `tcm_info` has it.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;

/// Which packets of the device a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the device receives.
    Ingress,
    /// What is sent through it.
    Egress,
}

/// A program to run on a device's packets.
#[derive(Clone, Copy, Debug)]
pub struct Filter<'a> {
    /// Which packets.
    pub direction: Direction,
    /// The loaded program, of type `BPF_PROG_TYPE_SCHED_CLS`.
    pub program: BorrowedFd<'a>,
    /// Its name, for `tc filter show`.
    pub name: &'a str,
}

/// What becomes of a filter of ours that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Present {
    /// It goes on running the program that it runs.
    Stays,
    /// It runs the program from one packet to the next.
    Updated,
}

/// Attaches filters to a device that is down and never had any.
///
/// # Errors
/// The kernel refuses one of them (without `clsact` or `cls_bpf` all of them): none may be relied on.
pub fn attach(netlink: &mut Netlink, device: u32, name: &str, filters: &[Filter<'_>]) -> Result<(), Error> {
    let mut requests = vec![add_qdisc(device, name)];
    requests.extend(filters.iter().map(|filter| put(device, name, filter, NLM_F_CREATE | NLM_F_EXCL)));
    netlink.batch(requests).into_iter().collect()
}

/// Makes the filters that are there run these programs, each in one step. Whether all of them were there.
pub fn replace(netlink: &mut Netlink, device: u32, name: &str, filters: &[Filter<'_>]) -> Result<bool, Error> {
    let requests = filters.iter().map(|filter| put(device, name, filter, NLM_F_REPLACE)).collect();
    let mut all = true;
    for replaced in netlink.batch(requests) {
        match replaced {
            Ok(()) => {}
            Err(error) if is_missing(&error) => all = false,
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Has the device run these programs, whatever is there: makes the filters that are missing, and the qdisc under them, also on a
/// device that is up. Other owners' filters stay.
///
/// # Errors
/// The kernel has no `clsact` or `cls_bpf`, or another owner's filter has our place.
pub fn ensure(
    netlink: &mut Netlink,
    device: u32,
    name: &str,
    filters: &[Filter<'_>],
    present: Present,
) -> Result<(), Error> {
    let flag = match present {
        Present::Stays => NLM_F_EXCL,
        Present::Updated => NLM_F_REPLACE,
    };
    for filter in filters {
        let mut attempt = netlink.request(put(device, name, filter, NLM_F_CREATE | flag));
        if attempt.as_ref().is_err_and(is_missing) {
            match netlink.request(add_qdisc(device, name)) {
                Err(error) if !error.is_present() => return Err(unsupported(error)),
                _ => attempt = netlink.request(put(device, name, filter, NLM_F_CREATE | flag)),
            }
        }
        match attempt {
            Err(error) if error.is_present() && present == Present::Stays => {}
            Err(error) => return Err(unsupported(error)),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// What an operator can do about a filter that the kernel refuses.
fn unsupported(error: Error) -> Error {
    match error.errno() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => Error::Refused(format!(
            "{error}: this kernel has no tcx (Linux 6.6) and neither sch_ingress nor cls_bpf in its place; \
             try `modprobe -a sch_ingress cls_bpf`"
        )),
        Some(libc::EINVAL | libc::EEXIST) => Error::Refused(format!(
            "{error}: perhaps another program's filter has priority {PRIORITY}; see `tc filter show dev DEVICE ingress`"
        )),
        _ => error,
    }
}

/// Takes our filters away and, if there were any, the qdisc under them when no other filter hangs on it. On a device that is up this
/// stops its queues for a moment.
///
/// # Errors
/// The kernel refuses.
pub fn clear(netlink: &mut Netlink, device: u32, name: &str) -> Result<(), Error> {
    if !remove_ours(netlink, device, name)? {
        return Ok(());
    }
    for minor in [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS] {
        let all = Message::GetTrafficFilter(message(device, TcHandle { major: u16::MAX, minor }));
        match netlink.dump(&format!("list the filters of device {name}"), all) {
            Ok(others) if others.is_empty() => {}
            Ok(_) => return Ok(()),
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let operation = format!("remove qdisc clsact from device {name}");
    match netlink.request(Request::new(operation, Message::DelQueueDiscipline(qdisc(device)), 0)) {
        Err(error) if !is_missing(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Takes our filters away; fine where there are none, or no device.
pub fn detach(netlink: &mut Netlink, device: u32, name: &str) -> Result<(), Error> {
    remove_ours(netlink, device, name).map(drop)
}

/// Whether there was one.
fn remove_ours(netlink: &mut Netlink, device: u32, name: &str) -> Result<bool, Error> {
    let remove = |direction| {
        let operation = format!("remove our {direction:?} filter from device {name}");
        Request::new(operation, Message::DelTrafficFilter(ours(device, direction)), 0)
    };
    let mut removed = false;
    for result in netlink.batch([Direction::Ingress, Direction::Egress].map(remove).into()) {
        match result {
            Ok(()) => removed = true,
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// A device without `clsact` refuses with `EINVAL`.
fn is_missing(error: &Error) -> bool {
    error.is_absent() || error.errno() == Some(libc::EINVAL)
}

fn message(device: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = device.cast_signed();
    message.header.parent = parent;
    message
}

fn qdisc(device: u32) -> TcMessage {
    let mut qdisc = message(device, TcHandle::CLSACT);
    qdisc.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    qdisc.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    qdisc
}

fn add_qdisc(device: u32, name: &str) -> Request {
    let operation = format!("add qdisc clsact to device {name}");
    Request::new(operation, Message::NewQueueDiscipline(qdisc(device)), NLM_F_CREATE | NLM_F_EXCL)
}

/// Names our filter.
fn ours(device: u32, direction: Direction) -> TcMessage {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    let mut message = message(device, TcHandle { major: u16::MAX, minor });
    message.header.handle = HANDLE.into();
    message.header.info = (PRIORITY << 16) | ALL_PROTOCOLS;
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message
}

fn put(device: u32, name: &str, filter: &Filter<'_>, flags: u16) -> Request {
    let mut message = ours(device, filter.direction);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(filter.program.as_raw_fd().cast_unsigned())),
        TcOption::Bpf(TcFilterBpfOption::ProgName(filter.name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    Request::new(format!("run {} as a filter of device {name}", filter.name), Message::NewTrafficFilter(message), flags)
}
