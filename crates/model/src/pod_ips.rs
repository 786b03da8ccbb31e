//! Addresses of a pod: mostly one, at most one a family.

use std::net::IpAddr;
use std::ops::Deref;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Addresses of one pod, read as the list that they are. A single one takes no room of its own: a node keeps those of every pod of the
/// cluster, some of them several times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodIps(Kept);

/// One that is alone is never among many, nor is nobody: so equal lists are kept alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Kept {
    #[default]
    None,
    One(IpAddr),
    Many(Box<[IpAddr]>),
}

impl Deref for PodIps {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Kept::None => &[],
            Kept::One(one) => std::slice::from_ref(one),
            Kept::Many(all) => all,
        }
    }
}

impl From<&[IpAddr]> for PodIps {
    fn from(list: &[IpAddr]) -> Self {
        Self(match list {
            [] => Kept::None,
            [one] => Kept::One(*one),
            all => Kept::Many(all.into()),
        })
    }
}

impl From<Vec<IpAddr>> for PodIps {
    fn from(list: Vec<IpAddr>) -> Self {
        Self::from(list.as_slice())
    }
}

impl FromIterator<IpAddr> for PodIps {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        Self::from(addresses.into_iter().collect::<Vec<_>>())
    }
}

impl<'a> IntoIterator for &'a PodIps {
    type Item = &'a IpAddr;
    type IntoIter = std::slice::Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Serialize for PodIps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (**self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PodIps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_any_length_are_what_they_were_made_of_and_written_as_lists() {
        let all: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        for (length, text) in [(0, "[]"), (1, r#"["10.0.0.1"]"#), (2, r#"["10.0.0.1","fd00::1"]"#)] {
            let ips = PodIps::from(&all[..length]);
            assert_eq!((&*ips, ips.iter().count()), (&all[..length], length));
            assert_eq!(serde_json::to_string(&ips).unwrap(), text);
            assert_eq!(serde_json::from_str::<PodIps>(text).unwrap(), ips);
        }
        assert_eq!(size_of::<PodIps>(), 24);
    }
}
