//! One exchange with the agent, and the queue of DELs for when it is not there.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, sendmsg, socket_with,
};
use towpath_wire::cni::{DelRequest, MAX_MESSAGE, Reply, Request};

/// How long the agent may take to accept a request.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// Sends a request, with the container's network namespace if it has one, and waits for the reply.
pub(crate) fn ask(socket: &Path, request: &Request, netns: Option<&File>, patience: Duration) -> io::Result<Reply> {
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Bounds connect(2) too, which otherwise waits for ever on an agent that accepts nothing.
    set_socket_timeout(&fd, Timeout::Send, Some(SEND_PATIENCE))?;
    set_socket_timeout(&fd, Timeout::Recv, Some(patience))?;
    connect(&fd, &SocketAddrUnix::new(socket)?)?;
    let mut stream = UnixStream::from(fd);
    let body = serde_json::to_vec(request)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    send_length(&stream, length, netns)?;
    stream.write_all(&body)?;
    let mut header = [0u8; 4];
    stream.read_exact(&mut header)?;
    let length = usize::try_from(u32::from_be_bytes(header)).unwrap_or(usize::MAX);
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the agent announces {length} bytes")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn send_length(stream: &UnixStream, length: u32, netns: Option<&File>) -> io::Result<()> {
    let header = length.to_be_bytes();
    let fds: Vec<_> = netns.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for the namespace's descriptor"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(header.get(sent..).unwrap_or_default())
}

/// Puts a DEL into `deletes/` of the state directory. The file's name says it all, so it is whole as soon as it is there; its
/// content is for people. No fsync: a machine that loses power loses its containers too.
pub(crate) fn queue(dir: &Path, request: &DelRequest) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = dir.join(request.attachment.delete_file());
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // What is written here is not needed, so neither is it an error when the disk is full.
    let _ = file.write_all(&serde_json::to_vec(request)?);
    Ok(())
}
