//! Reading and writing single fields of packets, and the sums over them. Pure; what lies outside the bytes is none.

/// 16 bits in network order.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// 32 bits in network order.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Writes the bytes there.
pub(super) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

/// A sum of 16-bit words folded into one (RFC 1071).
pub(super) fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

/// The sum of the bytes as 16-bit words, not folded. For less than 64 KiB.
pub(super) fn sum(bytes: &[u8]) -> u32 {
    let (words, last) = bytes.as_chunks::<2>();
    let whole: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    whole + last.first().map_or(0, |byte| u32::from(*byte) << 8)
}

/// Writes the checksum of an IPv4 header of `length` bytes.
pub(super) fn finish_ipv4(header: &mut [u8], length: usize) -> Option<()> {
    put(header, 10, [0, 0])?;
    let check = !fold(sum(header.get(..length)?));
    put(header, 10, check.to_be_bytes())
}

/// The checksum field at `at` holds the sum of a pseudo header with the length `old`: now with the length `new`.
pub(super) fn change_length(bytes: &mut [u8], at: usize, old: u16, new: u16) -> Option<()> {
    let sum = u32::from(be16(bytes, at)?) + u32::from(!old) + u32::from(new);
    put(bytes, at, fold(sum).to_be_bytes())
}
