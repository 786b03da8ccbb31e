//! What the programs need of a kernel, each by itself: asked when a kernel refused them, so that an error names what is missing and
//! since which release it is there. Promises to attach and pin nothing.

use std::ffi::c_void;
use std::fmt;
use std::ptr;

/// Something that the kernel must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name in the kernel.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Release that it came with.
    pub since: &'static str,
    probe: Probe,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is missing ({}; Linux {})", self.name, self.purpose, self.since)
    }
}

/// How to ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Program(u32),
    Map(u32),
    Helper { program: u32, helper: u32 },
}

use libbpf_sys as sys;

const DEVICE: u32 = sys::BPF_PROG_TYPE_SCHED_CLS;
const SOCKET: u32 = sys::BPF_PROG_TYPE_CGROUP_SOCK_ADDR;
const CALLED: u32 = sys::BPF_PROG_TYPE_SYSCALL;

const fn helper(name: &'static str, purpose: &'static str, since: &'static str, program: u32, helper: u32) -> Feature {
    Feature { name, purpose, since, probe: Probe::Helper { program, helper } }
}

/// All of them, oldest first.
const NEEDED: [Feature; 15] = [
    Feature {
        name: "BPF_PROG_TYPE_SCHED_CLS",
        purpose: "hooks of devices",
        since: "4.1",
        probe: Probe::Program(DEVICE),
    },
    Feature {
        name: "BPF_MAP_TYPE_LPM_TRIE",
        purpose: "ranges of addresses",
        since: "4.11",
        probe: Probe::Map(sys::BPF_MAP_TYPE_LPM_TRIE),
    },
    Feature {
        name: "BPF_PROG_TYPE_CGROUP_SOCK_ADDR",
        purpose: "Services for sockets; CONFIG_CGROUP_BPF",
        since: "4.17",
        probe: Probe::Program(SOCKET),
    },
    helper("bpf_fib_lookup", "ways to other nodes", "4.18", DEVICE, sys::BPF_FUNC_fib_lookup),
    Feature {
        name: "BPF_MAP_TYPE_SK_STORAGE",
        purpose: "Services for sockets",
        since: "5.2",
        probe: Probe::Map(sys::BPF_MAP_TYPE_SK_STORAGE),
    },
    helper("bpf_get_netns_cookie", "whose socket connects", "5.7", SOCKET, sys::BPF_FUNC_get_netns_cookie),
    helper("bpf_sk_storage_get", "Services for sockets", "5.9", SOCKET, sys::BPF_FUNC_sk_storage_get),
    helper("bpf_redirect_neigh", "ways to other nodes", "5.10", DEVICE, sys::BPF_FUNC_redirect_neigh),
    helper("bpf_redirect_peer", "pods of one node", "5.10", DEVICE, sys::BPF_FUNC_redirect_peer),
    helper("bpf_ktime_get_coarse_ns", "time of connections", "5.11", DEVICE, sys::BPF_FUNC_ktime_get_coarse_ns),
    helper("bpf_for_each_map_elem", "walking the connection table", "5.13", DEVICE, sys::BPF_FUNC_for_each_map_elem),
    Feature {
        name: "BPF_PROG_TYPE_SYSCALL",
        purpose: "collecting idle connections",
        since: "5.14",
        probe: Probe::Program(CALLED),
    },
    helper("bpf_timer_init", "collecting without the agent", "5.15", CALLED, sys::BPF_FUNC_timer_init),
    helper("bpf_timer_set_callback", "collecting without the agent", "5.15", CALLED, sys::BPF_FUNC_timer_set_callback),
    helper(
        "bpf_set_retval",
        "refusing a connect to a Service without endpoints",
        "5.18",
        SOCKET,
        sys::BPF_FUNC_set_retval,
    ),
];

impl Feature {
    /// Whether the kernel says that it does not have it. Where the question itself fails (no rights, no memory) it is not said to
    /// be missing.
    fn is_missing(&self) -> bool {
        let no_options: *const c_void = ptr::null();
        // SAFETY: libbpf makes, and closes, a small program or map of the kind; it takes no options.
        let answer = unsafe {
            match self.probe {
                Probe::Program(kind) => sys::libbpf_probe_bpf_prog_type(kind, no_options),
                Probe::Map(kind) => sys::libbpf_probe_bpf_map_type(kind, no_options),
                Probe::Helper { program, helper } => sys::libbpf_probe_bpf_helper(program, helper, no_options),
            }
        };
        answer == 0
    }
}

/// Everything that is needed, and whether this kernel has it. Needs `CAP_BPF` or `CAP_SYS_ADMIN`: without, nothing is there.
pub fn needed_here() -> Vec<(Feature, bool)> {
    NEEDED.into_iter().map(|feature| (feature, !feature.is_missing())).collect()
}

/// What this kernel lacks of what is needed.
pub(crate) fn missing() -> Vec<Feature> {
    NEEDED.into_iter().filter(Feature::is_missing).collect()
}

/// The running kernel's release, as `uname -r` says it.
pub(crate) fn release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or_else(|_| "of unknown release".to_owned(), |text| text.trim().to_owned())
}

/// Whether `bpf_skb_adjust_room` makes an IPv6 packet of an IPv4 one whose header it takes off (`BPF_F_ADJ_ROOM_DECAP_L3_IPV6`): since
/// Linux 6.3. Before, the flag is refused.
pub(crate) fn takes_ipv6_out_of_ipv4() -> bool {
    is_since(&release(), (6, 3))
}

/// Whether a release is this version or a later one; one that cannot be read is not.
fn is_since(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::Error;
    use crate::testing::root;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        for (release, new_enough) in [
            ("6.3.0", true),
            ("6.18.44-fc-v769", true),
            ("10.0", true),
            ("6.2.16", false),
            ("5.15.0-105-generic", false),
            ("6", false),
            ("", false),
        ] {
            assert_eq!(is_since(release, (6, 3)), new_enough, "{release}");
        }
    }

    #[test]
    fn what_a_kernel_lacks_is_named_with_the_release_that_has_it() {
        let missing = vec![
            helper("bpf_set_retval", "refusing a connect", "5.18", SOCKET, sys::BPF_FUNC_set_retval),
            helper("bpf_timer_init", "collecting", "5.15", CALLED, sys::BPF_FUNC_timer_init),
        ];
        let said = Error::Unsupported { release: "5.15.0-91-generic".to_owned(), missing }.to_string();
        assert!(said.starts_with("kernel 5.15.0-91-generic is too old"), "{said}");
        assert!(said.contains("bpf_set_retval is missing (refusing a connect; Linux 5.18); bpf_timer_init"), "{said}");
        assert!(said.contains("run Linux 6.1 or newer") && !said.contains('\n'), "{said}");
    }

    #[test]
    fn this_kernel_has_all_that_is_needed_and_not_what_no_kernel_has() {
        if !root() {
            return;
        }
        assert_eq!(missing(), []);
        let invented = helper("bpf_invented", "nothing", "99.0", DEVICE, 100_000);
        assert!(invented.is_missing());
        // It is there, and not for programs of this kind.
        let misplaced = helper("bpf_set_retval", "nothing", "5.18", DEVICE, sys::BPF_FUNC_set_retval);
        assert!(misplaced.is_missing());
    }
}
