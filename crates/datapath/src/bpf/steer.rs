//! The program that says by which queue of the device of `udp` a frame goes (`bpf/steer.c`): an object of its own, which the device keeps.

use std::os::fd::{AsFd, OwnedFd};

use libbpf_rs::ObjectBuilder;

use super::error::{Error, Result};
use super::object;

/// The compiled `bpf/steer.c`.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/steer.o"));

const PROGRAM: &str = "tp_udp_queue";

/// The loaded program.
///
/// # Errors
/// The kernel refuses it.
pub(crate) fn queue_of_flows() -> Result<OwnedFd> {
    let failed = |e| Error::bpf("load", "the program of the queues of udp (bpf/steer.c)", e);
    let object =
        ObjectBuilder::default().name("towpath_steer").and_then(|b| b.open_memory(OBJECT)?.load()).map_err(failed)?;
    let program = object::program(&object, PROGRAM)?;
    program.as_fd().try_clone_to_owned().map_err(|e| Error::kernel("keep program", PROGRAM, e))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::Command;

    use super::*;
    use crate::net::packet::{Listen, PacketSocket};
    use crate::net::tap;
    use crate::testing::alone;

    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const FRAGMENT: u8 = 44;

    /// A frame of a flow: the last bytes of the addresses, a protocol and ports, and of IPv4 what says which fragment it is.
    fn frame(v6: bool, ends: (u8, u8), protocol: u8, ports: (u16, u16), fragment: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 60, protocol, 64]);
            for end in [ends.0, ends.1] {
                frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, end]);
            }
        } else {
            frame.extend([8, 0, 0x45, 0, 0, 80, 0, 1]);
            frame.extend(fragment.to_be_bytes());
            frame.extend([64, protocol, 0, 0, 10, 244, 0, ends.0, 10, 244, 1, ends.1]);
        }
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend([0; 60]);
        frame
    }

    /// A device with queues, and a socket that sends frames by it.
    struct Device {
        queues: Vec<OwnedFd>,
        socket: PacketSocket,
    }

    impl Device {
        fn new(count: usize) -> Self {
            const NAME: &str = "steered0";
            tap::make(NAME).unwrap();
            let queues = tap::open(NAME, count).unwrap().queues;
            tap::steer(NAME, &queues[0], &queue_of_flows().unwrap()).unwrap();
            let up = "echo 1 > /proc/sys/net/ipv6/conf/steered0/disable_ipv6 && ip link set steered0 up";
            assert!(Command::new("sh").args(["-c", up]).status().unwrap().success());
            let index = nix::net::if_::if_nametoindex(NAME).unwrap();
            Self { queues, socket: PacketSocket::open(index, Listen::Arp).unwrap() }
        }

        /// The queue that it goes by.
        fn queue(&self, frame: &[u8]) -> usize {
            self.socket.send(frame).unwrap();
            let mut buffer = [0; 2048];
            loop {
                for (number, queue) in self.queues.iter().enumerate() {
                    let read = nix::unistd::read(queue, &mut buffer).unwrap_or_default();
                    if buffer[..read].ends_with(frame) {
                        return number;
                    }
                }
            }
        }

        /// An answer comes by a queue.
        fn answer(&self, queue: usize, frame: &[u8]) {
            let with_header = [vec![0; 10], frame.to_vec()].concat();
            nix::unistd::write(&self.queues[queue], &with_header).unwrap();
        }
    }

    #[test]
    fn a_flow_keeps_to_one_queue_wherever_its_answers_come_by_and_flows_have_all() {
        alone(|| {
            const QUEUES: usize = 4;
            const FLOWS: u16 = 400;
            let device = Device::new(QUEUES);
            for v6 in [false, true] {
                let mut counts = BTreeMap::<usize, u16>::new();
                for port in 0..FLOWS {
                    let (ports, back) = ((32768 + 2 * port, 80), (80, 32768 + 2 * port));
                    let queue = device.queue(&frame(v6, (2, 3), TCP, ports, 0x4000));
                    device.answer((queue + 1) % QUEUES, &frame(v6, (3, 2), TCP, back, 0x4000));
                    // Not the bytes that differ between its packets.
                    let mut next = frame(v6, (2, 3), TCP, ports, 0x4000);
                    *next.last_mut().unwrap() = 9;
                    assert_eq!(device.queue(&next), queue, "v6 {v6}, port {}", ports.0);
                    *counts.entry(queue).or_default() += 1;
                }
                let fair = FLOWS / QUEUES as u16;
                assert_eq!(counts.len(), QUEUES);
                assert!(counts.values().all(|count| (fair / 2..fair * 2).contains(count)), "v6 {v6}: {counts:?}");
            }
        });
    }

    #[test]
    fn fragments_stay_together_whatever_they_have_in_the_place_of_ports() {
        alone(|| {
            let device = Device::new(8);
            for end in 0..40 {
                let v4 = |ports, offset| device.queue(&frame(false, (2, end), UDP, ports, offset));
                assert_eq!(v4((1, 2), 0x2000), v4((3, 4), 0x20b9));
                assert_eq!(v4((1, 2), 0x2000), v4((5, 6), 0x0172));
                let v6 = |ports| device.queue(&frame(true, (2, end), FRAGMENT, ports, 0));
                assert_eq!(v6((1, 2)), v6((3, 4)));
            }
        });
    }

    #[test]
    fn frames_that_end_early_and_of_other_kinds_go_by_some_queue() {
        alone(|| {
            let device = Device::new(2);
            for v6 in [false, true] {
                let mut arp = frame(v6, (2, 2), TCP, (1, 2), 0);
                for length in 15..arp.len() {
                    device.queue(&arp[..length]);
                }
                arp[12..14].copy_from_slice(&[8, 6]);
                device.queue(&arp);
            }
        });
    }
}
