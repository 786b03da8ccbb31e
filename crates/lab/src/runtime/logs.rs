//! Container logs in CRI format: `2006-01-02T15:04:05.000000000Z stdout F line`.
//!
//! Writers tell followers through a watch channel: nothing polls. A file beyond [`ROTATE_BYTES`] is put aside as `.1`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use jiff::Timestamp;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use towpath_apiserver::streaming::LogOptions;

/// Size at which a log is put aside, as the kubelet's default `containerLogMaxSize`.
const ROTATE_BYTES: u64 = 10 * 1024 * 1024;
/// Longest line written as one; longer ones are split and marked partial, as CRI does.
const MAX_LINE: usize = 16 * 1024;

/// Which of the two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output (and all output of a terminal).
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// State of a log that followers wait on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    written: u64,
    rotations: u64,
    closed: bool,
}

/// Writes one container instance's log.
pub(crate) struct LogWriter {
    path: PathBuf,
    file: std::fs::File,
    size: u64,
    partial: [Vec<u8>; 2],
    progress: Arc<watch::Sender<Progress>>,
}

impl LogWriter {
    /// Opens the log at `path`, appending. The channel tells followers of what is written.
    pub(crate) fn open(path: &Path) -> Result<(Self, watch::Receiver<Progress>)> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("open the log {}", path.display()))?;
        let (progress, follow) = watch::channel(Progress::default());
        let size = file.metadata().map(|m| m.len()).unwrap_or_default();
        let partial = [Vec::new(), Vec::new()];
        Ok((Self { path: path.to_owned(), file, size, partial, progress: Arc::new(progress) }, follow))
    }

    /// Takes output as it comes and writes whole lines.
    pub(crate) fn write(&mut self, stream: Stream, data: &[u8]) {
        let slot = usize::from(stream == Stream::Stderr);
        let mut out = Vec::with_capacity(data.len() + 64);
        if let Some(partial) = self.partial.get_mut(slot) {
            partial.extend_from_slice(data);
            let now = timestamp();
            while let Some(end) = partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = partial.drain(..=end).collect();
                push_line(&mut out, &now, stream, b'F', line.strip_suffix(b"\n").unwrap_or(&line));
            }
            while partial.len() >= MAX_LINE {
                let piece: Vec<u8> = partial.drain(..MAX_LINE).collect();
                push_line(&mut out, &now, stream, b'P', &piece);
            }
        }
        self.append(&out);
    }

    fn append(&mut self, out: &[u8]) {
        use std::io::Write;
        if out.is_empty() {
            return;
        }
        if let Err(error) = self.file.write_all(out) {
            tracing::warn!(log = %self.path.display(), %error, "container output is lost");
        }
        self.size += out.len() as u64;
        let rotated = self.size > ROTATE_BYTES && self.rotate().is_ok();
        self.progress.send_modify(|p| {
            p.written += out.len() as u64;
            p.rotations += u64::from(rotated);
        });
    }

    fn rotate(&mut self) -> std::io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
        self.file = std::fs::OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        let mut out = Vec::new();
        let now = timestamp();
        for (stream, slot) in [(Stream::Stdout, 0), (Stream::Stderr, 1)] {
            if let Some(rest) = self.partial.get(slot).filter(|rest| !rest.is_empty()) {
                // The last line without a newline: partial, so that readers add none.
                push_line(&mut out, &now, stream, b'P', rest);
            }
        }
        self.append(&out);
        self.progress.send_modify(|p| p.closed = true);
    }
}

/// RFC 3339 with nanoseconds, UTC.
fn timestamp() -> String {
    let now = Timestamp::now();
    format!("{}.{:09}Z", now.strftime("%Y-%m-%dT%H:%M:%S"), now.subsec_nanosecond())
}

fn push_line(out: &mut Vec<u8>, now: &str, stream: Stream, tag: u8, line: &[u8]) {
    out.extend_from_slice(now.as_bytes());
    out.push(b' ');
    out.extend_from_slice(stream.name().as_bytes());
    out.extend_from_slice(&[b' ', tag, b' ']);
    out.extend_from_slice(line);
    out.push(b'\n');
}

/// Which lines a reader wants.
struct Filter {
    stream: Option<String>,
    since: Option<Timestamp>,
    timestamps: bool,
    left: Option<u64>,
}

impl Filter {
    fn new(options: &LogOptions) -> Result<Self> {
        let since = match (&options.since_time, options.since_seconds) {
            (Some(time), _) => Some(time.parse().with_context(|| format!("sinceTime {time:?}"))?),
            (None, Some(seconds)) => {
                let back = jiff::SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
                Timestamp::now().checked_sub(back).ok()
            }
            (None, None) => None,
        };
        let stream = options.stream.as_ref().map(|s| s.to_ascii_lowercase()).filter(|s| s != "all");
        Ok(Self { stream, since, timestamps: options.timestamps, left: options.limit_bytes })
    }

    /// The line as the person sees it; none when it is not wanted.
    fn apply(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        let mut fields = raw.splitn(4, |b| *b == b' ');
        let (time, stream, tag, text) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        if self.stream.as_ref().is_some_and(|wanted| wanted.as_bytes() != stream) {
            return None;
        }
        if let Some(since) = self.since {
            let written: Timestamp = std::str::from_utf8(time).ok()?.parse().ok()?;
            if written < since {
                return None;
            }
        }
        let mut out = Vec::with_capacity(raw.len());
        if self.timestamps {
            out.extend_from_slice(time);
            out.push(b' ');
        }
        out.extend_from_slice(text);
        if tag == b"F" {
            out.push(b'\n');
        }
        if let Some(left) = &mut self.left {
            out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= out.len() as u64;
        }
        Some(out)
    }

    fn is_done(&self) -> bool {
        self.left == Some(0)
    }
}

/// Copies a log to `out` as the options ask; with a channel, goes on until the writer closes the log.
pub(crate) async fn copy(
    path: &Path,
    options: &LogOptions,
    follow: Option<watch::Receiver<Progress>>,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<()> {
    let mut filter = Filter::new(options)?;
    let mut seen = follow.as_ref().map(|f| *f.borrow()).unwrap_or_default();
    let mut file = std::fs::File::open(path).with_context(|| format!("open the log {}", path.display()))?;
    let mut carried = Vec::new();
    let lines = read_lines(&mut file, &mut carried)?;
    let mut shown: Vec<Vec<u8>> = lines.iter().filter_map(|line| filter.apply(line)).collect();
    if let Some(tail) = options.tail_lines {
        let skip = shown.len().saturating_sub(usize::try_from(tail).unwrap_or(usize::MAX));
        shown.drain(..skip);
    }
    out.write_all(&shown.concat()).await?;
    let Some(mut follow) = follow else { return Ok(()) };
    out.flush().await?;
    while !filter.is_done() {
        let closed = seen.closed;
        let lines = read_lines(&mut file, &mut carried)?;
        let shown: Vec<Vec<u8>> = lines.iter().filter_map(|line| filter.apply(line)).collect();
        if !shown.is_empty() {
            out.write_all(&shown.concat()).await?;
            out.flush().await?;
        }
        let now = *follow.borrow_and_update();
        if now.rotations != seen.rotations {
            file = std::fs::File::open(path).with_context(|| format!("open the log {}", path.display()))?;
        } else if closed || (now == seen && follow.changed().await.is_err()) {
            break;
        }
        seen = *follow.borrow();
    }
    Ok(())
}

/// Reads what was added; a last line without its end stays in `carried`.
fn read_lines(file: &mut std::fs::File, carried: &mut Vec<u8>) -> Result<Vec<Vec<u8>>> {
    file.read_to_end(carried).context("read a log")?;
    let Some(end) = carried.iter().rposition(|b| *b == b'\n') else { return Ok(Vec::new()) };
    let whole: Vec<u8> = carried.drain(..=end).collect();
    Ok(whole.split(|b| *b == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(path: &Path, options: LogOptions) -> String {
        let mut out = Vec::new();
        copy(path, &options, None, &mut out).await.unwrap();
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn lines_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let (mut writer, _follow) = LogWriter::open(&path).unwrap();
        writer.write(Stream::Stdout, b"one\ntw");
        writer.write(Stream::Stderr, b"bad\n");
        writer.write(Stream::Stdout, b"o\nprompt");
        drop(writer);
        assert_eq!(read(&path, LogOptions::default()).await, "one\nbad\ntwo\nprompt");
        let tail = LogOptions { tail_lines: Some(2), ..LogOptions::default() };
        assert_eq!(read(&path, tail).await, "two\nprompt");
        let errors = LogOptions { stream: Some("Stderr".to_owned()), ..LogOptions::default() };
        assert_eq!(read(&path, errors).await, "bad\n");
        let limited = LogOptions { limit_bytes: Some(5), ..LogOptions::default() };
        assert_eq!(read(&path, limited).await, "one\nb");
        let future = LogOptions { since_time: Some("2999-01-01T00:00:00Z".to_owned()), ..LogOptions::default() };
        assert_eq!(read(&path, future).await, "");
    }

    #[tokio::test]
    async fn a_follower_sees_everything_until_the_container_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let (mut writer, follow) = LogWriter::open(&path).unwrap();
        writer.write(Stream::Stdout, b"before\n");
        let reading = tokio::spawn({
            let path = path.clone();
            async move {
                let mut out = Vec::new();
                copy(&path, &LogOptions { follow: true, ..LogOptions::default() }, Some(follow), &mut out)
                    .await
                    .unwrap();
                String::from_utf8(out).unwrap()
            }
        });
        for n in 0..100 {
            writer.write(Stream::Stdout, format!("line {n}\n").as_bytes());
            tokio::task::yield_now().await;
        }
        drop(writer);
        let all = tokio::time::timeout(std::time::Duration::from_secs(5), reading).await.unwrap().unwrap();
        assert_eq!(all.lines().count(), 101);
    }
}
