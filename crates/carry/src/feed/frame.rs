//! Length-prefixed JSON over a unix stream: 4 bytes big-endian length, then the message (see `towpath_wire::dns`).

use futures::{SinkExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_util::bytes::Bytes;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use towpath_wire::dns::MAX_FEED_MESSAGE;

use super::client::FeedError;

/// One end of the connection. Reading and writing whole messages is safe to cancel.
pub(crate) struct Frames {
    framed: Framed<UnixStream, LengthDelimitedCodec>,
}

impl Frames {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let codec =
            LengthDelimitedCodec::builder().length_field_length(4).max_frame_length(MAX_FEED_MESSAGE).new_codec();
        Self { framed: Framed::new(stream, codec) }
    }

    /// What is under it; between messages nothing of it is read ahead that was not sent ahead.
    pub(crate) fn stream(&self) -> &UnixStream {
        self.framed.get_ref()
    }

    /// The next message; none at an orderly end.
    pub(crate) async fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FeedError> {
        match self.framed.next().await {
            None => Ok(None),
            Some(frame) => Ok(Some(serde_json::from_slice(&frame.map_err(FeedError::Io)?).map_err(FeedError::Json)?)),
        }
    }

    pub(crate) async fn write<T: Serialize>(&mut self, message: &T) -> Result<(), FeedError> {
        let bytes = serde_json::to_vec(message).map_err(FeedError::Json)?;
        self.framed.send(Bytes::from(bytes)).await.map_err(FeedError::Io)
    }
}
