//! The servers. The first byte of a connection says whether it is echoed (`e`) or a stream to swallow (`s`).

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::PORT;
use crate::worker;

/// Bytes that a stream is read in.
const CHUNK: usize = 256 * 1024;
/// How long a connection may be silent: longer than any block's pause, so that a lost RST does not block the next one.
const SILENCE: Duration = Duration::from_secs(3);

/// Serves TCP until the process is killed.
///
/// # Errors
/// The port cannot be listened on.
pub(crate) fn tcp() -> Result<()> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).context("make a TCP socket")?;
    listener.set_reuse_address(true)?;
    // Accepted connections have it, too: no system call a connection.
    listener.set_read_timeout(Some(SILENCE))?;
    listener
        .bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())
        .with_context(|| format!("bind port {PORT}"))?;
    listener.listen(1024).with_context(|| format!("listen on port {PORT}"))?;
    worker::say_ready()?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match listener.accept() {
            // A connection that breaks is its client's affair.
            Ok((mut connection, _)) => drop(converse(&mut connection, &mut buffer)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error).context("accept a connection"),
        }
    }
}

fn converse(connection: &mut Socket, buffer: &mut [u8]) -> std::io::Result<()> {
    let first = connection.read(buffer)?;
    if buffer.first() == Some(&b's') {
        return swallow(connection, buffer, first as u64);
    }
    let mut length = first;
    while length > 0 {
        connection.write_all(buffer.get(..length).unwrap_or_default())?;
        length = connection.read(buffer)?;
    }
    Ok(())
}

/// Reads to the end and then says how much there was: the client's clock stops when all has arrived.
fn swallow(connection: &mut Socket, buffer: &mut [u8], mut total: u64) -> std::io::Result<()> {
    loop {
        match connection.read(buffer)? {
            0 => return connection.write_all(&total.to_be_bytes()),
            n => total += n as u64,
        }
    }
}

/// Echoes UDP datagrams until the process is killed.
///
/// # Errors
/// The port cannot be bound.
pub(crate) fn udp() -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).with_context(|| format!("bind UDP port {PORT}"))?;
    worker::say_ready()?;
    let mut buffer = [0; 2048];
    loop {
        // An ICMP error of an answer that nobody waits for any more comes up here.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), from);
    }
}
