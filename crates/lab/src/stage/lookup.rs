//! `lab stage lookup`: asks one DNS server for one name, to see whether cluster DNS answers on a node.

use std::convert::Infallible;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub(super) fn run(address: &str, name: &str) -> Result<Infallible> {
    let server: IpAddr = address.parse().with_context(|| format!("{address:?} is not an address"))?;
    let query = query(name)?;
    let deadline = Instant::now() + Duration::from_secs(1);
    let bind: IpAddr = if server.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    while Instant::now() < deadline {
        let socket = UdpSocket::bind((bind, 0)).context("open a UDP socket")?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let asked = socket.connect((server, 53)).and_then(|()| socket.send(&query));
        let mut answer = [0; 512];
        match asked.and_then(|_| socket.recv(&mut answer)) {
            Ok(length) if length >= 12 && answer.get(..2) == query.get(..2) => std::process::exit(0),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    bail!("{server} does not answer for {name}")
}

/// A recursive query for the addresses (A) of `name`, RFC 1035 section 4.1.
fn query(name: &str) -> Result<Vec<u8>> {
    let mut packet = vec![0x74, 0x70, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        packet.push(u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len)).context("bad DNS name")?);
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 0, 1, 0, 1]);
    Ok(packet)
}
