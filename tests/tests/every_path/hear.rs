//! What the endpoints and the clients of a batch hear, and what the endpoints answer.
//!
//! What arrives is judged where it arrives: by a packet socket in the endpoint's pod, on all of its devices. In a node's namespace such a
//! socket sees what only passes through, so there it is the endpoint's own socket that judges.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::socket::{LinkAddr, recvfrom};

use crate::axes::{Content, Family, Protocol};
use crate::probe::{Batch, Case, is_later};
use crate::wire::{self, Chunk, Complaint, SMALL};

impl Batch<'_> {
    pub(crate) fn listen_once(&mut self) {
        self.hear_taps();
        self.serve_tcp();
        self.serve_udp();
        self.hear_raw();
        self.hear_clients();
    }

    fn hear_taps(&mut self) {
        let mut buffer = vec![0; 66_000];
        let mut heard = Vec::new();
        for (place, tap) in &self.taps {
            while let Ok((count, from)) = recvfrom::<LinkAddr>(tap.as_raw_fd(), &mut buffer) {
                // What the pod itself sends comes by here, too.
                let inward = from.is_none_or(|from| from.pkttype() != libc::PACKET_OUTGOING);
                let Some(frame) = buffer.get(..count).filter(|_| inward).and_then(wire::read) else { continue };
                let by_port = frame.port.and_then(|port| self.by_port.get(&port));
                let by_case = frame.case.and_then(|case| self.by_number.get(&case));
                heard.extend(by_port.or(by_case).map(|at| (*at, *place, frame.from)));
            }
        }
        for (at, place, from) in heard {
            self.arrive(at, place, from);
        }
    }

    fn serve_tcp(&mut self) {
        for (place, listener) in &self.listeners {
            while let Ok((stream, _)) = listener.accept() {
                if stream.set_nonblocking(true).is_ok() {
                    self.streams.push((*place, stream));
                }
            }
        }
        let mut heard = Vec::new();
        let mut buffer = [0; SMALL];
        for (place, stream) in &mut self.streams {
            let Ok(count) = stream.read(&mut buffer) else { continue };
            let question = buffer.get(..count).unwrap_or_default();
            let (Some(case), Ok(from)) = (wire::case_of(question), stream.peer_addr()) else { continue };
            let _the_client_may_be_gone = stream.write(question);
            heard.extend(self.by_number.get(&case).map(|at| (*at, *place, from.ip())));
        }
        for (at, place, from) in heard {
            self.arrive(at, place, from);
        }
    }

    fn serve_udp(&mut self) {
        let mut buffer = vec![0; 66_000];
        let mut heard = Vec::new();
        for (place, here, server) in &self.servers {
            while let Ok((count, from)) = server.recv_from(&mut buffer) {
                let question = buffer.get(..count).unwrap_or_default();
                let Some(case) = wire::case_of(question) else { continue };
                heard.extend(self.by_number.get(&case).map(|at| (*at, *place, from.ip())));
                let family = if from.is_ipv4() { Family::V4 } else { Family::V6 };
                let complaint = || wire::complaint(Complaint::TooBig, from, *here, case);
                let _lost_as_any_datagram_may_be = match self.content {
                    Content::TooBig => complaint().map(|packet| self.send_raw(*place, family, &packet, from.ip())),
                    _ => Some(server.send_to(question, from).map(drop)),
                };
            }
        }
        for (at, place, from) in heard {
            self.arrive(at, place, from);
        }
    }

    /// SCTP and ICMP, of which every socket gets all that is for its namespace.
    fn hear_raw(&mut self) {
        if self.protocol == Protocol::Udp || self.protocol == Protocol::Tcp {
            return;
        }
        let mut buffer = vec![0; 66_000];
        let (mut answered, mut arrived) = (Vec::new(), Vec::new());
        for ((place, family), socket) in &self.raw {
            let v4 = *family == Family::V4;
            while let Ok((count, from)) = socket.recv_from(&mut buffer) {
                let bytes = buffer.get(..count).unwrap_or_default();
                if self.protocol == Protocol::Icmp {
                    let case = wire::echo_reply(v4, bytes).and_then(|case| self.by_number.get(&case));
                    answered.extend(
                        case.filter(|at| self.cases.get(**at).is_some_and(|case| case.asker == *place)).copied(),
                    );
                    continue;
                }
                let Some(packet) = wire::association(v4, bytes) else { continue };
                let Some(at) = self.by_number.get(&packet.case).copied() else { continue };
                match packet.chunk {
                    Chunk::Init => {
                        arrived.push((at, *place, from.ip()));
                        let reply = wire::sctp(Chunk::InitAck, packet.to, packet.from, packet.case, SMALL);
                        let _lost_as_any_packet_may_be = self.send_raw(*place, *family, &reply, from.ip());
                    }
                    Chunk::InitAck => {
                        let of_case = |case: &&Case| {
                            (case.asker, case.port, case.to.port(), case.to.ip())
                                == (*place, packet.to, packet.from, from.ip())
                        };
                        answered.extend(self.cases.get(at).filter(of_case).map(|_| at));
                    }
                }
            }
        }
        for (at, place, from) in arrived {
            self.arrive(at, place, from);
        }
        for at in answered {
            self.answer(at);
        }
    }

    fn hear_clients(&mut self) {
        let mut buffer = vec![0; 66_000];
        for at in 0..self.clients.len().min(self.begun) {
            let (Some(case), Some(Some(mut client))) = (self.cases.get(at), self.clients.get(at).map(Option::as_ref))
            else {
                continue;
            };
            if self.outcomes.get(at).is_some_and(|outcome| outcome.answered) {
                continue;
            }
            let question = wire::payload(case.number, self.size());
            if self.protocol == Protocol::Tcp && self.asked.get(at) == Some(&false) {
                match client.write(&question) {
                    Ok(_) => {
                        if let Some(asked) = self.asked.get_mut(at) {
                            *asked = true;
                        }
                    }
                    Err(error) if is_later(&error) => continue,
                    Err(error) => {
                        self.tell(at, &error);
                        continue;
                    }
                }
            }
            match client.read(&mut buffer) {
                Ok(count) if buffer.get(..count) == Some(&question) => self.answer(at),
                Ok(count) => self.note(at, format!("{count} bytes that are not its own come back")),
                Err(error) if is_later(&error) => {}
                Err(error) => self.tell(at, &error),
            }
        }
    }
}
