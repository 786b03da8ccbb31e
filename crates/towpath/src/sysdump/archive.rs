//! A gzipped tar archive (POSIX.1-2001 pax: ustar headers, an extended one before names that do not fit), written whole or not at all.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

/// Size of a block; everything is padded to it.
const BLOCK: usize = 512;
/// The longest name that a ustar header has room for.
const NAME: usize = 100;

/// Writes an archive whose files are below `directory`; only its owner can read it.
pub(super) fn write<'a>(
    path: &Path,
    directory: &str,
    seconds: i64,
    files: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".part");
    let unfinished = Path::new(&unfinished);
    let written = (|| {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(unfinished)?;
        let mut out = GzEncoder::new(file, Compression::default());
        for (name, text) in files {
            entry(&mut out, &format!("{directory}/{name}"), seconds, text.as_bytes())?;
        }
        out.write_all(&[0; 2 * BLOCK])?;
        out.finish()?.sync_all()?;
        fs::rename(unfinished, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(unfinished);
    }
    written
}

fn entry(out: &mut impl Write, name: &str, seconds: i64, content: &[u8]) -> io::Result<()> {
    if name.len() > NAME {
        let record = pax_record("path", name);
        block(out, "pax-header", b'x', seconds, record.as_bytes())?;
    }
    // Who does not know extended headers sees the end of the name.
    let shown = name.get(name.len().saturating_sub(NAME)..).unwrap_or("file");
    block(out, shown, b'0', seconds, content)
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn pax_record(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len();
    loop {
        let whole = format!("{length}{rest}");
        if whole.len() == length {
            return whole;
        }
        length = whole.len();
    }
}

fn block(out: &mut impl Write, name: &str, kind: u8, seconds: i64, content: &[u8]) -> io::Result<()> {
    let octal = |value: u64, digits: usize| format!("{value:0digits$o}\0");
    let seconds = u64::try_from(seconds).unwrap_or_default();
    let mut header = Vec::with_capacity(BLOCK);
    let mut field = |bytes: &[u8], length: usize| {
        header.extend_from_slice(bytes.get(..length).unwrap_or(bytes));
        header.resize(header.len() + length.saturating_sub(bytes.len()), 0);
    };
    field(name.as_bytes(), NAME);
    field(octal(0o600, 7).as_bytes(), 8);
    field(octal(0, 7).as_bytes(), 8);
    field(octal(0, 7).as_bytes(), 8);
    field(octal(content.len() as u64, 11).as_bytes(), 12);
    field(octal(seconds, 11).as_bytes(), 12);
    // The checksum counts its own field as spaces.
    field(b"        ", 8);
    field(&[kind], 1);
    field(b"", 100);
    field(b"ustar\0", 6);
    field(b"00", 2);
    field(b"", BLOCK - 265);
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let checksum = format!("{sum:06o}\0 ");
    if let Some(place) = header.get_mut(148..156) {
        place.copy_from_slice(checksum.as_bytes());
    }
    out.write_all(&header)?;
    out.write_all(content)?;
    out.write_all(&vec![0; content.len().next_multiple_of(BLOCK) - content.len()])
}
