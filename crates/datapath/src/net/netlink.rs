//! A synchronous rtnetlink socket: one request and its answer, a dump, or a batch of requests in few system calls.
//!
//! The socket belongs to the network namespace of the thread that opened it and stays there wherever it is used. It is
//! synchronous because namespaces belong to threads: a request never spans an await.

use std::collections::VecDeque;
use std::io;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::error::Error;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// `NLMSGERR_ATTR_MSG`: the kernel's explanation as text.
const ATTR_MSG: u16 = 1;
/// The kernel's dumps come in at most 32 KiB at a time.
const RECEIVE: usize = 64 * 1024;
/// Requests sent at once: their answers fit the default receive buffer.
const BATCH: usize = 64;
/// How often a dump that the kernel marks as inconsistent is asked again.
const DUMP_TRIES: usize = 8;

/// A change to ask for, with words that say what it is.
#[derive(Debug)]
pub struct Request {
    /// What is asked, with the object; for errors.
    pub operation: String,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// `NLM_F_*` beside request and acknowledgement.
    pub flags: u16,
}

impl Request {
    /// A request; `operation` reads like `add route 10.244.1.0/24`.
    pub fn new(operation: impl Into<String>, message: RouteNetlinkMessage, flags: u16) -> Self {
        Self { operation: operation.into(), message, flags }
    }
}

/// An open socket.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    received: Vec<u8>,
}

/// One message from the kernel.
#[derive(Debug)]
enum Answer {
    /// Acknowledged, or the end of a dump.
    Done,
    /// Refused.
    Failed { errno: i32, detail: String },
    /// Content; `None` where it cannot be decoded (a foreign object of a newer kind).
    Content(Option<RouteNetlinkMessage>),
    /// Nothing.
    Noop,
}

#[derive(Debug)]
struct Received {
    sequence: u32,
    flags: u16,
    answer: Answer,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, Error> {
        let failed = |source| Error::system("open a netlink socket", source);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        socket.set_ext_ack(true).map_err(failed)?;
        socket.set_cap_ack(true).map_err(failed)?;
        socket.set_netlink_get_strict_chk(true).map_err(failed)?;
        Ok(Self { socket, sequence: 0, received: Vec::with_capacity(RECEIVE) })
    }

    /// Asks for one change or one object; the answer's content, empty for a change.
    pub fn request(&mut self, request: Request) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let Request { operation, message, flags } = request;
        let sequence = self.send(&operation, [(message, flags)])?;
        let mut content = Vec::new();
        loop {
            for received in self.receive(&operation)? {
                if received.sequence != sequence {
                    continue;
                }
                match received.answer {
                    Answer::Done => return Ok(content),
                    Answer::Failed { errno, detail } => return Err(refused(operation, errno, detail)),
                    Answer::Content(message) => content.extend(message),
                    Answer::Noop => {}
                }
            }
        }
    }

    /// Asks for many changes; the results in the order of the requests. One that fails does not stop those behind it.
    pub fn batch(&mut self, requests: Vec<Request>) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(requests.len());
        let mut rest: VecDeque<Request> = requests.into();
        while !rest.is_empty() {
            let chunk: Vec<Request> = rest.drain(..rest.len().min(BATCH)).collect();
            self.batch_chunk(chunk, &mut results);
        }
        results
    }

    fn batch_chunk(&mut self, chunk: Vec<Request>, results: &mut Vec<Result<(), Error>>) {
        let (mut operations, mut messages) = (VecDeque::new(), Vec::new());
        for request in chunk {
            operations.push_back(request.operation);
            messages.push((request.message, request.flags));
        }
        let count = messages.len() as u32;
        let last = match self.send("send netlink requests", messages) {
            Ok(last) => last,
            Err(error) => return fail_all(operations, &error, results),
        };
        let first = last.wrapping_sub(count).wrapping_add(1);
        while let Some(operation) = operations.front() {
            let answers = match self.receive(operation) {
                Ok(answers) => answers,
                Err(error) => return fail_all(operations, &error, results),
            };
            for received in answers {
                if received.sequence.wrapping_sub(first) >= count {
                    continue;
                }
                match received.answer {
                    Answer::Done => {
                        operations.pop_front();
                        results.push(Ok(()));
                    }
                    Answer::Failed { errno, detail } => {
                        let operation = operations.pop_front().unwrap_or_default();
                        results.push(Err(refused(operation, errno, detail)));
                    }
                    Answer::Content(_) | Answer::Noop => {}
                }
            }
        }
    }

    /// Asks for all objects that `message` (with its filters) stands for. Asked again when the kernel says that the list
    /// changed under the dump. Objects of kinds we cannot decode are left out: they are not ours.
    pub fn dump(&mut self, operation: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(operation, [(message.clone(), NLM_F_DUMP)])?;
            if let Some(content) = self.dump_once(operation, sequence)? {
                return Ok(content);
            }
        }
        Err(Error::Answer {
            operation: operation.to_owned(),
            reason: "the list kept changing while it was read".to_owned(),
        })
    }

    fn dump_once(&mut self, operation: &str, sequence: u32) -> Result<Option<Vec<RouteNetlinkMessage>>, Error> {
        let (mut content, mut consistent) = (Vec::new(), true);
        loop {
            for received in self.receive(operation)? {
                if received.sequence != sequence {
                    continue;
                }
                consistent &= received.flags & NLM_F_DUMP_INTR == 0;
                match received.answer {
                    Answer::Done => return Ok(consistent.then_some(content)),
                    Answer::Failed { errno, detail } => return Err(refused(operation.to_owned(), errno, detail)),
                    Answer::Content(message) => content.extend(message),
                    Answer::Noop => {}
                }
            }
        }
    }

    /// Sends messages in one system call; the last one's sequence number.
    fn send(
        &mut self,
        operation: &str,
        messages: impl IntoIterator<Item = (RouteNetlinkMessage, u16)>,
    ) -> Result<u32, Error> {
        let mut bytes = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.flags = NLM_F_REQUEST | flags | if flags & NLM_F_DUMP == NLM_F_DUMP { 0 } else { NLM_F_ACK };
            header.sequence_number = self.sequence;
            let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
            packet.finalize();
            let start = bytes.len();
            bytes.resize(start + packet.buffer_len().next_multiple_of(4), 0);
            if let Some(room) = bytes.get_mut(start..) {
                packet.serialize(room);
            }
        }
        self.socket.send(&bytes, 0).map_err(|source| Error::system(operation, source))?;
        Ok(self.sequence)
    }

    fn receive(&mut self, operation: &str) -> Result<Vec<Received>, Error> {
        self.received.clear();
        loop {
            match self.socket.recv(&mut self.received, 0) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::system(operation, source)),
            }
        }
        Ok(split(&self.received))
    }
}

fn fail_all(operations: VecDeque<String>, error: &Error, results: &mut Vec<Result<(), Error>>) {
    for operation in operations {
        results.push(Err(Error::Answer { operation, reason: error.to_string() }));
    }
}

fn refused(operation: String, errno: i32, detail: String) -> Error {
    Error::Netlink { operation, detail, source: io::Error::from_raw_os_error(errno) }
}

/// What one receive gave of content that we can decode.
pub(super) fn contents(bytes: &[u8]) -> Vec<RouteNetlinkMessage> {
    let content = |received: Received| if let Answer::Content(message) = received.answer { message } else { None };
    split(bytes).into_iter().filter_map(content).collect()
}

/// Splits what one receive gave into messages (`struct nlmsghdr`, linux/netlink.h). Stops at the first that is cut short.
fn split(mut bytes: &[u8]) -> Vec<Received> {
    let mut messages = Vec::new();
    while let Some(length) = u32_at(bytes, 0).map(|l| l as usize) {
        let Some(message) = bytes.get(..length).filter(|_| length >= HEADER) else { break };
        let (kind, flags) = (u16_at(message, 4).unwrap_or(0), u16_at(message, 6).unwrap_or(0));
        messages.push(Received {
            sequence: u32_at(message, 8).unwrap_or(0),
            flags,
            answer: read(message, kind, flags),
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

fn read(message: &[u8], kind: u16, flags: u16) -> Answer {
    match kind {
        NLMSG_NOOP => Answer::Noop,
        NLMSG_ERROR | NLMSG_DONE => match u32_at(message, HEADER).map_or(0, |code| code as i32) {
            0 => Answer::Done,
            code => Answer::Failed { errno: code.saturating_neg(), detail: explanation(message, kind, flags) },
        },
        _ => Answer::Content(match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
            Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(inner), .. }) => Some(inner),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(kind, %error, "netlink message left out: cannot be decoded");
                None
            }
        }),
    }
}

/// The text attribute behind a refusal. With `NETLINK_CAP_ACK` only the refused request's header is echoed before it.
fn explanation(message: &[u8], kind: u16, flags: u16) -> String {
    if flags & NLM_F_ACK_TLVS == 0 {
        return String::new();
    }
    let echoed = match kind {
        NLMSG_DONE => 0,
        _ if flags & NLM_F_CAPPED != 0 => HEADER,
        _ => u32_at(message, HEADER + 4).map_or(HEADER, |l| (l as usize).next_multiple_of(4)),
    };
    let mut attributes = message.get(HEADER + 4 + echoed..).unwrap_or_default();
    while let (Some(length), Some(name)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        let Some(value) = attributes.get(4..length) else { break };
        if name & 0x3fff == ATTR_MSG {
            return String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_acknowledgement_and_a_refusal_with_its_reason_are_told_apart() {
        let mut body = Vec::new();
        body.extend((-libc::EEXIST).to_ne_bytes());
        body.extend([0; HEADER]);
        body.extend([12, 0, 1, 0]);
        body.extend(b"exists!\0");
        let mut bytes = message(NLMSG_ERROR, 0, 7, &[0; 4 + HEADER]);
        bytes.extend(message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, 8, &body));
        let messages = split(&bytes);
        assert_eq!(messages.len(), 2);
        assert!(matches!(&messages[0], Received { sequence: 7, answer: Answer::Done, .. }));
        let Answer::Failed { errno, detail } = &messages[1].answer else { panic!("{:?}", messages[1]) };
        assert_eq!((*errno, detail.as_str()), (libc::EEXIST, "exists!"));
    }

    #[test]
    fn a_message_cut_short_ends_the_list_without_a_panic() {
        let mut bytes = message(NLMSG_ERROR, 0, 7, &[0; 4]);
        for cut in 0..bytes.len() {
            assert!(split(&bytes[..cut]).is_empty(), "cut at {cut}");
        }
        bytes[0] = 3;
        assert!(split(&bytes).is_empty());
    }
}
