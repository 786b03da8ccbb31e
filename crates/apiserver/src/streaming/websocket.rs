//! Taking a request over as a WebSocket (RFC 6455) with one of the Kubernetes subprotocols.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::rest::full;
use crate::server::ResponseBody;
use crate::status::ApiError;

pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// An accepted upgrade: the answer to send, and what becomes the socket after it.
pub(super) struct Accepted {
    pub(super) response: Response<ResponseBody>,
    pub(super) protocol: &'static str,
    upgrade: OnUpgrade,
}

fn lists(headers: &HeaderMap, name: header::HeaderName) -> Vec<String> {
    let values = headers.get_all(name);
    let texts = values.iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).map(|part| part.trim().to_owned()).collect()
}

/// Checks the handshake and picks the first of `offered` that the client asks for.
pub(super) fn accept(
    headers: &HeaderMap,
    upgrade: Option<OnUpgrade>,
    offered: &[&'static str],
) -> Result<Accepted, ApiError> {
    let is_websocket = lists(headers, header::UPGRADE).iter().any(|value| value.eq_ignore_ascii_case("websocket"));
    if !is_websocket {
        return Err(ApiError::bad_request(
            "unable to upgrade: this API server streams over WebSocket only (kubectl 1.31 or newer)",
        ));
    }
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or_else(|| ApiError::bad_request("unable to upgrade: the Sec-WebSocket-Key header is missing"))?;
    let upgrade = upgrade.ok_or_else(|| {
        ApiError::bad_request("unable to upgrade: this connection cannot be taken over (HTTP/2 or in-process)")
    })?;
    let wanted = lists(headers, header::SEC_WEBSOCKET_PROTOCOL);
    let protocol = offered.iter().find(|protocol| wanted.iter().any(|name| name == *protocol)).copied();
    let Some(protocol) = protocol else {
        let message = format!("unable to upgrade: none of the protocols {wanted:?} is served; served are {offered:?}");
        return Err(ApiError::new(403, "Forbidden", message));
    };
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(ApiError::internal)?;
    let fields = response.headers_mut();
    fields.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    fields.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    fields.insert(header::SEC_WEBSOCKET_ACCEPT, answer);
    fields.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    Ok(Accepted { response, protocol, upgrade })
}

/// Waits until the answer is out and the connection is ours.
pub(super) async fn socket(upgrade: OnUpgrade) -> Result<Socket, hyper::Error> {
    let upgraded = upgrade.await?;
    let mut config = WebSocketConfig::default();
    config.write_buffer_size = 0;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await)
}

impl Accepted {
    /// The answer and the connection to come.
    pub(super) fn split(self) -> (Response<ResponseBody>, &'static str, OnUpgrade) {
        (self.response, self.protocol, self.upgrade)
    }
}
