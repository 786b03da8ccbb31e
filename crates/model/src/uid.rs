//! `metadata.uid` of objects.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A uid. The API server gives UUIDs, of which the number is kept; any other text is kept as it is. Empty: not known.
#[derive(Clone, PartialEq, Eq)]
pub struct Uid(Kept);

/// What is written as a UUID is never kept as text: so equal uids are kept alike.
#[derive(Clone, PartialEq, Eq)]
enum Kept {
    Uuid([u8; 16]),
    Text(Box<str>),
}

/// Where a UUID's text has its hyphens.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

/// A UUID as the API server writes it, in lower case; any other writing is another text.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.as_bytes();
    if text.len() != 36 || HYPHENS.iter().any(|at| text.get(*at) != Some(&b'-')) {
        return None;
    }
    let (mut bytes, mut digits) = ([0; 16], 0);
    for (_, digit) in text.iter().enumerate().filter(|(at, _)| !HYPHENS.contains(at)) {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        let byte: &mut u8 = bytes.get_mut(digits / 2)?;
        *byte = *byte << 4 | value;
        digits += 1;
    }
    Some(bytes)
}

impl Uid {
    /// Whether it is not known.
    pub fn is_empty(&self) -> bool {
        matches!(&self.0, Kept::Text(text) if text.is_empty())
    }

    /// Whether it is another's than `other`, as far as both are known.
    pub fn is_other_than(&self, other: &Uid) -> bool {
        !self.is_empty() && !other.is_empty() && self != other
    }
}

impl Default for Uid {
    fn default() -> Self {
        Self(Kept::Text(Box::default()))
    }
}

impl From<&str> for Uid {
    fn from(text: &str) -> Self {
        Self(uuid(text).map_or_else(|| Kept::Text(text.into()), Kept::Uuid))
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kept::Text(text) => f.write_str(text),
            Kept::Uuid(bytes) => bytes.iter().enumerate().try_for_each(|(index, byte)| {
                let hyphen = if [4, 6, 8, 10].contains(&index) { "-" } else { "" };
                write!(f, "{hyphen}{byte:02x}")
            }),
        }
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for Uid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self::from(text.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "0a1b2c3d-4e5f-6789-abcd-ef0123456789";

    #[test]
    fn every_uid_is_said_as_it_was_given() {
        let odd = ["", "uid-web", "0A1B2C3D-4e5f-6789-abcd-ef0123456789", "0a1b2c3d4e5f-6789-abcd-ef0123456789-"];
        for text in [GIVEN].into_iter().chain(odd) {
            assert_eq!(Uid::from(text).to_string(), text);
            let written = serde_json::to_string(&Uid::from(text)).unwrap();
            assert_eq!(written, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Uid>(&written).unwrap(), Uid::from(text));
        }
        assert!(matches!(Uid::from(GIVEN).0, Kept::Uuid(_)));
        assert_eq!(size_of::<Uid>(), 24);
    }

    #[test]
    fn what_is_not_known_is_nobody_elses() {
        let [one, other, none] = [GIVEN, "uid", ""].map(Uid::from);
        assert!(one.is_other_than(&other) && other.is_other_than(&one) && !one.is_other_than(&one));
        assert!(none.is_empty() && !none.is_other_than(&one) && !one.is_other_than(&none));
    }
}
