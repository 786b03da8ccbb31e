//! As much of SPDY/3.1 as port-forward needs: frames and compressed headers, no flow control (kubectl's SPDY library has none).
//!
//! Source: SPDY protocol draft 3.1, sections 2.2 (framing) and 2.6 (control frames).

use std::collections::HashMap;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

pub(super) type StreamId = u32;

/// The largest frame that is accepted.
const MAX_FRAME: usize = 1 << 20;
/// The largest header block after decompression.
const MAX_HEADERS: usize = 64 << 10;
const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;

/// Words that the compression dictionary of SPDY/3 begins with, each preceded by its length in four bytes (section 2.6.10.1).
const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// The rest of the dictionary.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct \
Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,\
utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS {
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
}

/// What cannot be read as SPDY/3.1.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpdyError {
    #[error("a SPDY frame of {0} bytes is larger than this server accepts")]
    TooLarge(usize),
    #[error("a SPDY control frame of type {0} is cut short")]
    Truncated(u16),
    #[error("SPDY version {0} is not spoken here, only 3")]
    Version(u16),
    #[error("a SPDY header block cannot be decompressed: {0}")]
    Compression(String),
}

/// A frame, in either direction.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The client opens a stream.
    SynStream {
        id: StreamId,
        headers: HashMap<String, String>,
        fin: bool,
    },
    /// The server accepts it.
    SynReply {
        id: StreamId,
    },
    /// Bytes of a stream; `fin`: the last of this side.
    Data {
        id: StreamId,
        data: Vec<u8>,
        fin: bool,
    },
    Reset {
        id: StreamId,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Settings, window updates and the like.
    Other,
}

/// One direction's state: bytes not yet decoded and the compression context.
#[derive(Default)]
pub(super) struct Connection {
    pending: Vec<u8>,
    inflate: Option<Decompress>,
    deflate: Option<Compress>,
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    let slice = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(slice.try_into().ok()?))
}

impl Connection {
    /// Adds bytes and takes the frames that are whole.
    pub(super) fn decode(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, SpdyError> {
        self.pending.extend_from_slice(bytes);
        let mut frames = Vec::new();
        while let (Some(first), Some(second)) = (number32(&self.pending, 0), number32(&self.pending, 4)) {
            let length = (second & 0x00ff_ffff) as usize;
            if length > MAX_FRAME {
                return Err(SpdyError::TooLarge(length));
            }
            let total = length + 8;
            if self.pending.len() < total {
                break;
            }
            let rest = self.pending.split_off(total);
            let frame = std::mem::replace(&mut self.pending, rest);
            let body = frame.get(8..).unwrap_or_default();
            let flags = second.to_be_bytes()[0];
            frames.push(self.frame(first, flags, body)?);
        }
        Ok(frames)
    }

    fn frame(&mut self, first: u32, flags: u8, body: &[u8]) -> Result<Frame, SpdyError> {
        let fin = flags & FLAG_FIN != 0;
        if first & 0x8000_0000 == 0 {
            return Ok(Frame::Data { id: first, data: body.to_vec(), fin });
        }
        let [high, low, kind_high, kind_low] = first.to_be_bytes();
        let version = u16::from_be_bytes([high & 0x7f, low]);
        if version != VERSION {
            return Err(SpdyError::Version(version));
        }
        let kind = u16::from_be_bytes([kind_high, kind_low]);
        let id = || number32(body, 0).map(|id| id & 0x7fff_ffff).ok_or(SpdyError::Truncated(kind));
        Ok(match kind {
            1 => {
                let block = body.get(10..).ok_or(SpdyError::Truncated(kind))?;
                Frame::SynStream { id: id()?, headers: self.headers(block, kind)?, fin }
            }
            // A reply of the client's to a stream of ours: there are none, but the context must be kept in step.
            2 | 8 => {
                let block = body.get(4..).ok_or(SpdyError::Truncated(kind))?;
                self.headers(block, kind)?;
                Frame::Other
            }
            3 => Frame::Reset { id: id()? },
            6 => Frame::Ping { id: number32(body, 0).ok_or(SpdyError::Truncated(kind))? },
            7 => Frame::GoAway,
            _ => Frame::Other,
        })
    }

    fn headers(&mut self, block: &[u8], kind: u16) -> Result<HashMap<String, String>, SpdyError> {
        let plain = self.decompress(block)?;
        let count = number32(&plain, 0).ok_or(SpdyError::Truncated(kind))?;
        let mut headers = HashMap::new();
        let mut at = 4;
        let text = |at: &mut usize| -> Option<String> {
            let length = number32(&plain, *at)? as usize;
            let start = at.checked_add(4)?;
            let end = start.checked_add(length)?;
            *at = end;
            Some(String::from_utf8_lossy(plain.get(start..end)?).into_owned())
        };
        for _ in 0..count {
            let name = text(&mut at).ok_or(SpdyError::Truncated(kind))?;
            let value = text(&mut at).ok_or(SpdyError::Truncated(kind))?;
            headers.insert(name.to_ascii_lowercase(), value);
        }
        Ok(headers)
    }

    fn decompress(&mut self, block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let failed = |error: flate2::DecompressError| SpdyError::Compression(error.to_string());
        let inflate = self.inflate.get_or_insert_with(|| Decompress::new(true));
        let mut out = Vec::with_capacity(block.len() * 4 + 256);
        let mut input = block;
        loop {
            let (read, written) = (inflate.total_in(), inflate.total_out());
            let result = inflate.decompress_vec(input, &mut out, FlushDecompress::Sync);
            let taken = usize::try_from(inflate.total_in() - read).unwrap_or(0);
            input = input.get(taken..).unwrap_or_default();
            match result {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    inflate.set_dictionary(&dictionary()).map_err(failed)?;
                    continue;
                }
                Err(error) => return Err(failed(error)),
            }
            if out.len() > MAX_HEADERS {
                return Err(SpdyError::TooLarge(out.len()));
            }
            let idle = taken == 0 && inflate.total_out() == written;
            if input.is_empty() && out.len() < out.capacity() || idle && out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(out.capacity().max(256));
        }
    }

    /// A frame as bytes.
    pub(super) fn encode(&mut self, frame: &Frame) -> Result<Vec<u8>, SpdyError> {
        Ok(match frame {
            Frame::Data { id, data, fin } => {
                let mut out = (id & 0x7fff_ffff).to_be_bytes().to_vec();
                push_length(&mut out, if *fin { FLAG_FIN } else { 0 }, data.len());
                out.extend_from_slice(data);
                out
            }
            Frame::SynReply { id } => {
                let mut body = id.to_be_bytes().to_vec();
                body.extend(self.compress(&0_u32.to_be_bytes())?);
                control(2, 0, &body)
            }
            Frame::SynStream { id, headers, fin } => {
                let mut body = id.to_be_bytes().to_vec();
                body.extend_from_slice(&[0; 6]);
                let mut block = (headers.len() as u32).to_be_bytes().to_vec();
                for text in headers.iter().flat_map(|(name, value)| [name, value]) {
                    block.extend_from_slice(&(text.len() as u32).to_be_bytes());
                    block.extend_from_slice(text.as_bytes());
                }
                body.extend(self.compress(&block)?);
                control(1, if *fin { FLAG_FIN } else { 0 }, &body)
            }
            Frame::Reset { id } => {
                let mut body = id.to_be_bytes().to_vec();
                // REFUSED_STREAM
                body.extend_from_slice(&3_u32.to_be_bytes());
                control(3, 0, &body)
            }
            Frame::Ping { id } => control(6, 0, &id.to_be_bytes()),
            Frame::GoAway | Frame::Other => control(7, 0, &[0; 8]),
        })
    }

    fn compress(&mut self, block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let failed = |error: &dyn std::fmt::Display| SpdyError::Compression(error.to_string());
        if self.deflate.is_none() {
            let mut deflate = Compress::new(Compression::default(), true);
            deflate.set_dictionary(&dictionary()).map_err(|error| failed(&error))?;
            self.deflate = Some(deflate);
        }
        let Some(deflate) = self.deflate.as_mut() else { return Ok(Vec::new()) };
        let mut out = Vec::with_capacity(block.len() + 128);
        let start = deflate.total_in();
        loop {
            let taken = usize::try_from(deflate.total_in() - start).unwrap_or(0);
            let rest = block.get(taken..).unwrap_or_default();
            deflate.compress_vec(rest, &mut out, FlushCompress::Sync).map_err(|error| failed(&error))?;
            if out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(out.capacity());
        }
    }
}

fn push_length(out: &mut Vec<u8>, flags: u8, length: usize) {
    let [_, a, b, c] = (length as u32).to_be_bytes();
    out.extend_from_slice(&[flags, a, b, c]);
}

fn control(kind: u16, flags: u8, body: &[u8]) -> Vec<u8> {
    let mut out = (VERSION | 0x8000).to_be_bytes().to_vec();
    out.extend_from_slice(&kind.to_be_bytes());
    push_length(&mut out, flags, body.len());
    out.extend_from_slice(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dictionary's checksum is in the first bytes that every SPDY/3 implementation sends: 78 bb e3 c6 a7 c2.
    #[test]
    fn the_dictionary_is_that_of_spdy_3() {
        let bytes = dictionary();
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in &bytes {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((bytes.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn frames_survive_being_cut_anywhere() {
        let headers: HashMap<String, String> =
            [("streamtype", "data"), ("port", "80"), ("requestid", "0")].map(|(k, v)| (k.into(), v.into())).into();
        let frames = [
            Frame::SynStream { id: 1, headers: headers.clone(), fin: false },
            Frame::Data { id: 1, data: b"hello".to_vec(), fin: false },
            Frame::SynStream { id: 3, headers, fin: true },
            Frame::Ping { id: 7 },
            Frame::Data { id: 3, data: Vec::new(), fin: true },
        ];
        let mut sender = Connection::default();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| sender.encode(frame).unwrap()).collect();
        for step in [1, 2, 7, bytes.len()] {
            let mut receiver = Connection::default();
            let got: Vec<Frame> = bytes.chunks(step).flat_map(|chunk| receiver.decode(chunk).unwrap()).collect();
            assert_eq!(got, frames);
        }
    }

    #[test]
    fn rubbish_is_an_error_and_not_a_panic() {
        let mut huge = Connection::default();
        assert!(huge.decode(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]).is_err());
        let mut short = Connection::default();
        assert!(short.decode(&[0x80, 3, 0, 1, 0, 0, 0, 2, 1, 2]).is_err());
        let mut garbled = Connection::default();
        assert!(garbled.decode(&[0x80, 3, 0, 1, 0, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9]).is_err());
    }
}
