//! Whether a pod's sockets are translated when they connect to a Service, or its packets at its device.
//!
//! The second is slower and sees less (a socket has chosen its backend before it has a port); it is for what must see the Service's own
//! address leave the pod: a mesh's sidecar that takes connections by their destination, a proxy or a packet filter in the pod.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Annotation of a pod, or of a namespace for those of its pods that say nothing: [`SocketServices::ENABLED`] or
/// [`SocketServices::DISABLED`].
pub const SOCKET_SERVICES_ANNOTATION: &str = "towpath.dev/socket-services";

/// No more of what is not understood is kept, in characters.
const KEPT: usize = 40;

/// What a pod or a namespace says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketServices {
    /// Nothing: as the namespace says; if that says nothing either, sockets are translated.
    #[default]
    Unsaid,
    /// Sockets are translated, whatever the namespace says.
    Enabled,
    /// Sockets are left alone.
    Disabled,
    /// Something that means nothing, the beginning of it. As if it were not there.
    Misunderstood(Box<str>),
}

impl SocketServices {
    /// The annotation's value for [`SocketServices::Enabled`].
    pub const ENABLED: &str = "enabled";
    /// The annotation's value for [`SocketServices::Disabled`].
    pub const DISABLED: &str = "disabled";

    /// What an object's annotations say.
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Self {
        match annotations.and_then(|all| all.get(SOCKET_SERVICES_ANNOTATION)).map(String::as_str) {
            None => Self::Unsaid,
            Some(Self::ENABLED) => Self::Enabled,
            Some(Self::DISABLED) => Self::Disabled,
            Some(other) => Self::Misunderstood(other.chars().take(KEPT).collect()),
        }
    }

    /// Whether a pod that says this, in a namespace that says `namespace`, has its sockets translated.
    pub fn translates(&self, namespace: &Self) -> bool {
        match (self, namespace) {
            (Self::Enabled, _) => true,
            (Self::Disabled, _) => false,
            (Self::Unsaid | Self::Misunderstood(_), namespace) => *namespace != Self::Disabled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(value: &str) -> SocketServices {
        SocketServices::of(Some(&[(SOCKET_SERVICES_ANNOTATION.to_owned(), value.to_owned())].into()))
    }

    #[test]
    fn a_pod_comes_before_its_namespace_and_nonsense_counts_for_nothing() {
        let (unsaid, nonsense) = (SocketServices::of(None), said("Disabled"));
        assert_eq!(SocketServices::of(Some(&BTreeMap::new())), SocketServices::Unsaid);
        assert_eq!(nonsense, SocketServices::Misunderstood("Disabled".into()), "values are exact");
        assert!(unsaid.translates(&unsaid));
        assert!(!unsaid.translates(&said("disabled")));
        assert!(!nonsense.translates(&said("disabled")));
        assert!(unsaid.translates(&nonsense));
        assert!(said("enabled").translates(&said("disabled")));
        assert!(!said("disabled").translates(&said("enabled")));
    }

    #[test]
    fn of_what_is_not_understood_only_the_beginning_is_kept() {
        let SocketServices::Misunderstood(kept) = said(&"é".repeat(1 << 16)) else { panic!("understood") };
        assert_eq!(kept.chars().count(), KEPT);
    }
}
