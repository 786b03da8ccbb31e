//! Pings and TCP connections between pods that go on while something is done, and what of them was lost.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use towpath_walkthrough::place::{Place, Session, address};

const ANSWER: Duration = Duration::from_secs(3);

/// Everything that is under way.
#[derive(Default)]
pub(crate) struct Traffic {
    over: Arc<AtomicBool>,
    pings: Vec<(String, Child)>,
    sessions: Vec<(String, JoinHandle<Result<usize>>)>,
}

impl Traffic {
    /// From a place to a pod: a ping every 20 ms, and requests over one connection that stays open.
    pub(crate) fn between(&mut self, from: &Place, to: &str, ip: &str) -> Result<()> {
        let name = format!("{} to {to} ({ip})", from.name());
        let ping = from.enter(|| {
            let command = Command::new("ping")
                .args(["-n", "-D", "-i", "0.02", "-W", "5", ip])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            command.context("start ping")
        })?;
        self.pings.push((name.clone(), ping));
        let target = SocketAddr::new(address(ip)?, 80);
        let mut session = from.enter(|| Session::open(target, ANSWER)).with_context(|| name.clone())?;
        let over = self.over.clone();
        let thread = std::thread::spawn(move || {
            let mut asked = 0;
            while !over.load(Ordering::Relaxed) {
                session.ask(ANSWER).with_context(|| format!("request {asked} over the open connection"))?;
                asked += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(asked)
        });
        self.sessions.push((name, thread));
        Ok(())
    }

    /// Ends it all; what was lost, in words.
    pub(crate) fn end(mut self) -> Result<Vec<String>> {
        // A little longer, so that what is done last is under traffic too.
        std::thread::sleep(Duration::from_millis(300));
        let mut lost = Vec::new();
        for (name, ping) in std::mem::take(&mut self.pings) {
            kill(Pid::from_raw(i32::try_from(ping.id())?), Signal::SIGINT).context("end ping")?;
            let out = ping.wait_with_output().context("wait for ping")?;
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let counts = text.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
            let number = |word: &str| {
                counts
                    .split(", ")
                    .find(|part| part.contains(word))
                    .and_then(|part| part.split(' ').next()?.parse::<u64>().ok())
            };
            let (sent, received) =
                number("transmitted").zip(number("received")).with_context(|| format!("{name}: ping said {text}"))?;
            // Only the last one may be under way when it ends.
            let gaps = gaps(&text);
            if sent < 10 || received + 1 < sent || !gaps.is_empty() || counts.contains("duplicates") {
                lost.push(format!("{name}: {counts}; without an answer: {}", gaps.join(", ")));
            }
        }
        self.over.store(true, Ordering::Relaxed);
        for (name, session) in self.sessions.drain(..) {
            match session.join().map_err(|_| anyhow!("panicked"))? {
                Ok(asked) if asked > 3 => {}
                Ok(asked) => lost.push(format!("{name}: only {asked} requests")),
                Err(error) => lost.push(format!("{name}: {error:#}")),
            }
        }
        Ok(lost)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for (_, ping) in &mut self.pings {
            let _ = ping.kill();
            let _ = ping.wait();
        }
    }
}

/// Whether an address answers a ping from where the caller is.
pub(crate) fn answers(ip: &str) -> Result<bool> {
    let ping = Command::new("ping").args(["-n", "-c", "1", "-W", "3", ip]).stdout(Stdio::null()).status();
    Ok(ping.context("start ping")?.success())
}

/// Sequence numbers that nobody answered, and when (seconds since 1970) the answer before them came.
fn gaps(text: &str) -> Vec<String> {
    let mut next = 1_u64;
    let mut gaps = Vec::new();
    let mut last = "";
    for line in text.lines() {
        let Some(sequence) =
            line.split("icmp_seq=").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok())
        else {
            continue;
        };
        if sequence > next {
            gaps.push(format!("{next}-{} after {last}", sequence - 1));
        }
        last = line.split(']').next().unwrap_or_default().trim_start_matches('[');
        next = next.max(sequence + 1);
    }
    gaps
}
