//! The client: runs blocks that it is asked for.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Done, Measure, Request};

/// Longest silence before a block fails.
const SILENCE: Duration = Duration::from_secs(2);
/// Bytes that a stream is written in.
const CHUNK: usize = 128 * 1024;

/// Counts what happens after a warm-up.
struct Clock {
    begin: Instant,
    end: Instant,
}

impl Clock {
    fn new(request: &Request) -> Self {
        let begin = Instant::now() + Duration::from_millis(request.warm_up);
        Self { begin, end: begin + Duration::from_millis(request.length) }
    }

    /// Repeats a transaction until the end.
    fn run(&self, mut transaction: impl FnMut() -> Result<()>) -> Result<Done> {
        let (mut all, mut before) = (0_u64, 0_u64);
        let mut begun = None;
        loop {
            let now = Instant::now();
            if begun.is_none() && now >= self.begin {
                (begun, before) = (Some(now), all);
            }
            if let Some(begun) = begun.filter(|_| now >= self.end) {
                let seconds = now.duration_since(begun).as_secs_f64();
                return Ok(Done { count: (all - before) as f64, seconds, all: all as f64 });
            }
            transaction()?;
            all += 1;
        }
    }
}

/// Runs a block.
///
/// # Errors
/// The server is not reached, does not answer, or the client's ports have run out.
pub(crate) fn block(request: Request) -> Result<Done> {
    let what = || format!("{} to {}", request.measure.title(), request.to);
    match request.measure {
        Measure::Rr => rr(&request).with_context(what),
        Measure::Crr => Clock::new(&request).run(|| connection(request.to)).with_context(what),
        Measure::Stream => stream(&request).with_context(what),
        Measure::UdpRr => udp_rr(&request).with_context(what),
    }
}

fn connected(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, SILENCE).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

fn rr(request: &Request) -> Result<Done> {
    let mut stream = connected(request.to)?;
    let mut byte = [b'e'];
    Clock::new(request).run(|| {
        stream.write_all(&byte).context("send")?;
        stream.read_exact(&mut byte).context("receive")
    })
}

/// One connection, closed by RST, so that neither side keeps the port in TIME_WAIT.
fn connection(to: SocketAddr) -> Result<()> {
    let mut socket =
        Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).context("make a socket")?;
    socket.set_linger(Some(Duration::ZERO))?;
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
            bail!("all client ports are in use: shorten the blocks (--block), the generator is the limit here")
        }
        Err(error) => return Err(error).context("connect"),
    }
    let mut byte = [b'e'];
    socket.write_all(&byte).context("send")?;
    socket.read_exact(&mut byte).context("receive")
}

/// Sends for the time asked for; counted is what the server has read, in MiB, up to its answer.
fn stream(request: &Request) -> Result<Done> {
    let mut stream = connected(request.to)?;
    let chunk = vec![b's'; CHUNK];
    let sent = Clock::new(request).run(|| stream.write_all(&chunk).context("send"))?;
    let told = Instant::now();
    stream.shutdown(Shutdown::Write).context("end the stream")?;
    let mut total = [0; 8];
    stream.read_exact(&mut total).context("the server did not say how much arrived")?;
    let arrived = u64::from_be_bytes(total) as f64;
    let mib = |chunks: f64| chunks * CHUNK as f64 / f64::from(1 << 20);
    if arrived != sent.all * CHUNK as f64 {
        bail!("the server read {arrived} bytes of {}", sent.all * CHUNK as f64);
    }
    let seconds = sent.seconds + told.elapsed().as_secs_f64();
    Ok(Done { count: mib(sent.count), seconds, all: mib(sent.all) })
}

fn udp_rr(request: &Request) -> Result<Done> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("bind a UDP socket")?;
    socket.connect(request.to).context("connect a UDP socket")?;
    socket.set_read_timeout(Some(SILENCE))?;
    let mut byte = [b'e'];
    Clock::new(request).run(|| {
        socket.send(&byte).context("send")?;
        socket.recv(&mut byte).context("a datagram was lost, or nothing answers")?;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_only_after_the_warm_up() {
        let request = Request { measure: Measure::Rr, to: ([127, 0, 0, 1], 1).into(), warm_up: 40, length: 40 };
        let done = Clock::new(&request)
            .run(|| {
                std::thread::sleep(Duration::from_millis(2));
                Ok(())
            })
            .unwrap();
        assert!(done.count > 0.0 && done.count < done.all, "{done:?}");
        // Every counted transaction took 2 ms within the counted time; how late the first began is the scheduler's.
        assert!(done.seconds >= 0.002 * done.count, "{done:?}");
    }

    #[test]
    fn a_failing_transaction_ends_the_block() {
        // Port 1 of loopback: nobody listens.
        let request = Request { measure: Measure::Crr, to: ([127, 0, 0, 1], 1).into(), warm_up: 0, length: 1000 };
        let error = format!("{:#}", block(request).unwrap_err());
        assert!(error.contains("TCP CRR to 127.0.0.1:1: connect"), "{error}");
    }
}
