//! As much of HTTP/1.1 (RFC 9112) as two probes need: a request a connection, lengths given, no chunks.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;

/// Longest head that is read, in bytes.
const LONGEST_HEAD: u64 = 16 * 1024;

/// The first line, the length of the body, and where the body is read from.
pub(super) struct Message {
    /// Request or status line.
    pub(super) line: String,
    /// `Content-Length`; none: until the end.
    pub(super) length: Option<u64>,
    /// The rest of the stream.
    pub(super) rest: BufReader<TcpStream>,
}

/// Reads a head.
pub(super) async fn read(stream: TcpStream) -> io::Result<Message> {
    let mut head = BufReader::new(stream).take(LONGEST_HEAD);
    let mut line = String::new();
    head.read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended before a first line came"));
    }
    let mut length = None;
    loop {
        let mut field = String::new();
        if head.read_line(&mut field).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the head does not end"));
        }
        let field = field.trim_end();
        if field.is_empty() {
            break;
        }
        if let Some((name, value)) = field.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            let value = value.trim().parse::<u64>();
            length = Some(value.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?);
        }
    }
    Ok(Message { line: line.trim_end().to_owned(), length, rest: head.into_inner() })
}

/// Reads a body of `length` bytes and compares each with what it should be; how many there were.
pub(super) async fn compare(from: &mut (impl AsyncReadExt + Unpin), length: u64) -> io::Result<u64> {
    let mut place: usize = 0;
    let mut buffer = vec![0; 64 * 1024];
    while (place as u64) < length {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            let text = format!("the connection ended after {place} of {length} bytes");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        let got = buffer.get(..read).unwrap_or_default();
        if let Some(at) = got.iter().enumerate().position(|(i, byte)| *byte != super::byte_at(place + i)) {
            let text = format!("byte {} of {length} is not what was sent", place + at);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        place += read;
    }
    Ok(place as u64)
}
