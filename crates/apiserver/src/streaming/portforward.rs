//! port-forward: `SPDY/3.1+portforward.k8s.io` tunnelled in a WebSocket (kubectl), and `v4.channel.k8s.io` (kube-rs).
//!
//! In SPDY every forwarded connection is two streams of the client, `streamType: error` and `streamType: data`, with the
//! same `requestID` and `port` (KEP-4006). In v4 the ports are in the query and each has a data and an error channel.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{SinkExt, StreamExt};
use http::Response;
use hyper::upgrade::OnUpgrade;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::spdy::{Connection, Frame, StreamId};
use super::websocket::{self, Socket};
use super::{Duplex, StreamHandler};
use crate::rest::Call;
use crate::server::ResponseBody;
use crate::status::ApiError;

const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const CHANNELS: &str = "v4.channel.k8s.io";
const PIPE: usize = 64 << 10;
/// Messages that may wait for the socket.
const QUEUE: usize = 64;
/// Ports of one v4 request at most: each takes two of 256 channels.
const MAX_PORTS: usize = 127;

/// Answers a port-forward request.
pub(crate) fn port_forward(
    call: &Arc<Call>,
    pod: Arc<Value>,
    handler: Arc<dyn StreamHandler>,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<ResponseBody>, ApiError> {
    let (response, protocol, upgrade) = websocket::accept(&call.headers, upgrade, &[TUNNEL, CHANNELS])?.split();
    let ports = if protocol == CHANNELS { ports(call)? } else { Vec::new() };
    call.core.spawn(async move {
        match websocket::socket(upgrade).await {
            Ok(socket) if protocol == CHANNELS => channels(socket, &ports, &pod, &handler).await,
            Ok(socket) => tunnel(socket, &pod, &handler).await,
            Err(error) => tracing::debug!(%error, "a client left before its streams began"),
        }
    });
    Ok(response)
}

fn ports(call: &Call) -> Result<Vec<u16>, ApiError> {
    let texts: Vec<String> =
        call.query.all("ports").iter().flat_map(|list| list.split(',')).map(str::to_owned).collect();
    let ports: Result<Vec<u16>, _> = texts.iter().map(|text| text.parse::<u16>()).collect();
    match ports {
        Ok(ports) if !ports.is_empty() && ports.len() <= MAX_PORTS && !ports.contains(&0) => Ok(ports),
        _ => {
            Err(ApiError::bad_request(format!("the ports {texts:?} must be 1 to {MAX_PORTS} numbers from 1 to 65535")))
        }
    }
}

/// One forwarded connection: runs the handler and hands its output on; ends with the handler's error, if any.
async fn forward<T, F>(
    handler: Arc<dyn StreamHandler>,
    pod: Arc<Value>,
    port: u16,
    from_client: DuplexStream,
    queue: mpsc::Sender<T>,
    wrap: F,
) -> Result<(), ApiError>
where
    T: Send,
    F: Fn(&[u8]) -> T + Send,
{
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let stream = Duplex { reader: Box::pin(from_client), writer: Box::pin(theirs) };
    let copy = async {
        let mut ours = ours;
        let mut buffer = vec![0; 32 << 10];
        while let Ok(count) = ours.read(&mut buffer).await
            && let Some(data) = buffer.get(..count).filter(|data| !data.is_empty())
        {
            if queue.send(wrap(data)).await.is_err() {
                break;
            }
        }
    };
    let (result, ()) = futures::join!(handler.port_forward(pod, port, stream), copy);
    result
}

/// The v4 protocol: channel 2i is port i's data, 2i+1 its errors; both begin with the port in two bytes.
async fn channels(socket: Socket, ports: &[u16], pod: &Arc<Value>, handler: &Arc<dyn StreamHandler>) {
    let (mut sink, mut source) = socket.split();
    let (queue, mut outgoing) = mpsc::channel::<Message>(QUEUE);
    let mut pipes: Vec<Option<DuplexStream>> = Vec::new();
    let mut tasks = JoinSet::new();
    for (index, port) in (0_u8..).zip(ports.iter().copied()) {
        let (data, error) = (index * 2, index * 2 + 1);
        for channel in [data, error] {
            let [low, high] = port.to_le_bytes();
            if sink.send(Message::Binary(vec![channel, low, high].into())).await.is_err() {
                return;
            }
        }
        let (client, server) = tokio::io::duplex(PIPE);
        pipes.push(Some(client));
        let (queue, pod, handler) = (queue.clone(), Arc::clone(pod), Arc::clone(handler));
        tasks.spawn(async move {
            let wrap = move |bytes: &[u8]| tagged(data, bytes);
            if let Err(failed) = forward(handler, pod, port, server, queue.clone(), wrap).await
                && queue.send(tagged(error, failed.message.as_bytes())).await.is_err()
            {
                tracing::debug!(%failed, "a forwarded connection failed after its client left");
            }
        });
    }
    drop(queue);
    let write = async {
        while let Some(message) = outgoing.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        if let Err(error) = sink.send(Message::Close(None)).await {
            tracing::trace!(%error, "the client was gone already");
        }
    };
    let read = async {
        while let Some(Ok(message)) = source.next().await {
            let data = match &message {
                Message::Binary(data) => data.as_ref(),
                Message::Close(_) => return,
                _ => continue,
            };
            let Some((channel, data)) = data.split_first() else { continue };
            let Some(pipe) = pipes.get_mut(usize::from(channel / 2)).filter(|_| channel % 2 == 0) else { continue };
            if let Some(open) = pipe.as_mut()
                && open.write_all(data).await.is_err()
            {
                *pipe = None;
            }
        }
    };
    tokio::select! { () = write => {}, () = read => {} }
    tasks.shutdown().await;
}

fn tagged(channel: u8, data: &[u8]) -> Message {
    let mut message = Vec::with_capacity(data.len() + 1);
    message.push(channel);
    message.extend_from_slice(data);
    Message::Binary(message.into())
}

/// What a stream of the tunnel is for.
enum Role {
    /// Messages about connection `request` go here; the client only closes it.
    Error,
    /// Bytes for the pod.
    Data(Option<mpsc::Sender<Vec<u8>>>),
}

struct Tunnel {
    connection: Connection,
    streams: HashMap<StreamId, Role>,
    /// Error streams that wait for their data stream, by request id.
    waiting: HashMap<String, StreamId>,
    queue: mpsc::Sender<Frame>,
    tasks: JoinSet<()>,
}

/// The SPDY protocol, as bytes of binary messages.
async fn tunnel(socket: Socket, pod: &Arc<Value>, handler: &Arc<dyn StreamHandler>) {
    let (mut sink, mut source) = socket.split();
    let (queue, mut outgoing) = mpsc::channel::<Frame>(QUEUE);
    let mut writer = Connection::default();
    let write = async {
        while let Some(frame) = outgoing.recv().await {
            let bytes = match writer.encode(&frame) {
                Ok(bytes) => bytes,
                Err(error) => {
                    tracing::warn!(%error, "a SPDY frame cannot be written; the port-forward ends");
                    return;
                }
            };
            if sink.send(Message::Binary(bytes.into())).await.is_err() {
                return;
            }
        }
    };
    let mut tunnel = Tunnel {
        connection: Connection::default(),
        streams: HashMap::new(),
        waiting: HashMap::new(),
        queue,
        tasks: JoinSet::new(),
    };
    let read = async {
        while let Some(Ok(message)) = source.next().await {
            let data = match &message {
                Message::Binary(data) => data.as_ref(),
                Message::Close(_) => return,
                _ => continue,
            };
            let frames = match tunnel.connection.decode(data) {
                Ok(frames) => frames,
                Err(error) => {
                    tracing::debug!(%error, "a port-forward client sent what is not SPDY/3.1");
                    return;
                }
            };
            for frame in frames {
                if tunnel.receive(frame, pod, handler).await.is_none() {
                    return;
                }
            }
        }
    };
    tokio::select! { () = write => {}, () = read => {} }
    tunnel.tasks.shutdown().await;
}

impl Tunnel {
    /// Handles one frame; none when the tunnel has ended.
    async fn receive(&mut self, frame: Frame, pod: &Arc<Value>, handler: &Arc<dyn StreamHandler>) -> Option<()> {
        while self.tasks.try_join_next().is_some() {}
        match frame {
            Frame::SynStream { id, headers, fin } => {
                self.open(id, &headers, pod, handler).await?;
                if fin {
                    self.close(id);
                }
            }
            Frame::Data { id, data, fin } => {
                if let Some(Role::Data(Some(pipe))) = self.streams.get(&id)
                    && !data.is_empty()
                    && pipe.send(data).await.is_err()
                {
                    tracing::trace!(id, "the pod's side of a forwarded connection is closed");
                }
                if fin {
                    self.close(id);
                }
            }
            Frame::Reset { id } => {
                self.streams.remove(&id);
            }
            Frame::Ping { id } => self.queue.send(Frame::Ping { id }).await.ok()?,
            Frame::GoAway => return None,
            Frame::SynReply { .. } | Frame::Other => {}
        }
        Some(())
    }

    /// The client writes no more on a stream.
    fn close(&mut self, id: StreamId) {
        if let Some(Role::Data(pipe)) = self.streams.get_mut(&id) {
            *pipe = None;
        }
    }

    async fn open(
        &mut self,
        id: StreamId,
        headers: &HashMap<String, String>,
        pod: &Arc<Value>,
        handler: &Arc<dyn StreamHandler>,
    ) -> Option<()> {
        let header = |name: &str| headers.get(name).map(String::as_str).unwrap_or_default();
        let (kind, request) = (header("streamtype"), header("requestid").to_owned());
        let port = header("port").parse::<u16>().ok().filter(|port| *port != 0);
        match (kind, port) {
            ("error", Some(_)) => {
                self.queue.send(Frame::SynReply { id }).await.ok()?;
                self.streams.insert(id, Role::Error);
                self.waiting.insert(request, id);
            }
            ("data", Some(port)) => {
                self.queue.send(Frame::SynReply { id }).await.ok()?;
                let error = self.waiting.remove(&request);
                let (pipe, incoming) = mpsc::channel(QUEUE);
                self.streams.insert(id, Role::Data(Some(pipe)));
                let run = one_connection(
                    Arc::clone(handler),
                    Arc::clone(pod),
                    port,
                    (id, error),
                    incoming,
                    self.queue.clone(),
                );
                self.tasks.spawn(run);
            }
            _ => self.queue.send(Frame::Reset { id }).await.ok()?,
        }
        Some(())
    }
}

/// One connection of the tunnel from its data stream's opening to its end.
async fn one_connection(
    handler: Arc<dyn StreamHandler>,
    pod: Arc<Value>,
    port: u16,
    (data, error): (StreamId, Option<StreamId>),
    mut incoming: mpsc::Receiver<Vec<u8>>,
    queue: mpsc::Sender<Frame>,
) {
    let (mut client, server) = tokio::io::duplex(PIPE);
    let feed = async move {
        let mut open = true;
        while let Some(bytes) = incoming.recv().await {
            // When the pod's side is closed, what the client still sends is taken and dropped, so that the tunnel's other
            // connections go on.
            open = open && client.write_all(&bytes).await.is_ok();
        }
        drop(client);
        std::future::pending::<Result<(), ApiError>>().await
    };
    let wrap = move |bytes: &[u8]| Frame::Data { id: data, data: bytes.to_vec(), fin: false };
    let run = forward(handler, pod, port, server, queue.clone(), wrap);
    let result = tokio::select! {
        result = run => result,
        never = feed => never,
    };
    let mut last = Vec::new();
    if let Some(error) = error {
        let text = result.err().map(|failed| failed.message.into_bytes()).unwrap_or_default();
        last.push(Frame::Data { id: error, data: text, fin: true });
    }
    last.push(Frame::Data { id: data, data: Vec::new(), fin: true });
    for frame in last {
        if queue.send(frame).await.is_err() {
            return;
        }
    }
}
