//! One connection: who asks, the request with its file descriptor, the reply.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use towpath_wire::cni::{CniError, ErrorCode, MAX_MESSAGE, Reply, Request};

use super::operations::{Answer, Operations};
use super::ports::{PodIndex, PodPlumber};

/// How long a peer may take to send its request, or to take the reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves a connection to its end.
pub(super) async fn serve<I: PodIndex, P: PodPlumber>(mut stream: UnixStream, operations: Arc<Operations<I, P>>) {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 => {}
        Ok(peer) => {
            tracing::warn!(
                uid = peer.uid(),
                pid = peer.pid(),
                "a CNI request that does not come from root; turned away"
            );
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "cannot tell who sends a CNI request; turned away");
            return;
        }
    }
    let (request, netns) = match tokio::time::timeout(PATIENCE, receive(&mut stream)).await {
        Ok(Ok(received)) => received,
        Ok(Err(error)) => {
            let error = CniError::new(ErrorCode::Decode, format!("the request is not understood: {error}"))
                .hint("check that towpath-cni and the agent are of versions that fit");
            let _ = send(&mut stream, &Reply::Failed { error }).await;
            return;
        }
        Err(_) => return,
    };
    let asker_gone = CancellationToken::new();
    let work = operations.handle(request, netns, asker_gone.clone());
    tokio::pin!(work);
    let Answer { reply, made } = tokio::select! {
        answer = &mut work => answer,
        () = hung_up(&stream) => {
            asker_gone.cancel();
            work.await
        }
    };
    let delivered = tokio::time::timeout(PATIENCE, send(&mut stream, &reply)).await;
    if let (false, Some(made)) = (matches!(delivered, Ok(Ok(()))), made) {
        operations.take_back(made).await;
    }
}

/// Returns when the peer has closed the connection (it sends nothing after its request).
async fn hung_up(stream: &UnixStream) {
    loop {
        let mut byte = [0u8; 1];
        match stream.readable().await.and_then(|()| stream.try_read(&mut byte)) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

async fn receive(stream: &mut UnixStream) -> io::Result<(Request, Option<OwnedFd>)> {
    let mut header = [0u8; 4];
    let (mut have, mut netns) = (0usize, None);
    while have < header.len() {
        let rest = header.get_mut(have..).unwrap_or_default();
        let (count, fd) = stream.async_io(Interest::READABLE, || receive_part(stream, rest)).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        have += count;
        netns = netns.or(fd);
    }
    let length = usize::try_from(u32::from_be_bytes(header)).unwrap_or(usize::MAX);
    if length > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{length} bytes announced, {MAX_MESSAGE} allowed"),
        ));
    }
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body).await?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((serde_json::from_slice(&body)?, netns))
}

/// One recvmsg(2): bytes and the first descriptor that came with them. Further ones are closed.
fn receive_part(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more file descriptors than one"));
    }
    let mut first = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for fd in fds {
                first = first.or(Some(fd));
            }
        }
    }
    Ok((received.bytes, first))
}

async fn send(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let body = serde_json::to_vec(reply)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut message = length.to_be_bytes().to_vec();
    message.extend(body);
    stream.write_all(&message).await
}
