//! `towpath ipam check`: what leases, devices, the kernel's programs and the API say of a node's addresses, compared.
//!
//! Pure. What is in work at that moment differs for a moment, so whoever asks looks twice and believes what is there both times.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_datapath::PodSurvey;
use towpath_model::NamespacedName;
use towpath_wire::cni::Attachment;
use towpath_wire::ipam::{Finding, Kind};

use super::Lease;

/// A pod as the API has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPod {
    /// Its name.
    pub name: NamespacedName,
    /// Addresses in its status.
    pub addresses: Vec<IpAddr>,
}

/// All that is compared.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The node's pod ranges.
    pub ranges: Vec<IpNet>,
    /// What is written down.
    pub leases: Vec<Lease>,
    /// Attachments that somebody works on now.
    pub busy: BTreeSet<Attachment>,
    /// DELs that wait.
    pub queued: Vec<Attachment>,
    /// Devices, records and entries.
    pub survey: PodSurvey,
    /// Pods of this node that are on the pod network and have not ended; none: they are not all known.
    pub pods: Option<Vec<KnownPod>>,
    /// Addresses in the node's ranges that the network before gave to pods which are still there.
    pub elsewhere: BTreeSet<IpAddr>,
}

/// What does not fit together. `name_of` says what an attachment's device is called.
pub fn check(facts: &Facts, name_of: impl Fn(&Attachment) -> String) -> Vec<Finding> {
    let mut findings = Vec::new();
    let leased: BTreeMap<String, &Lease> = facts.leases.iter().map(|lease| (name_of(&lease.owner), lease)).collect();
    let recorded: BTreeMap<&str, _> =
        facts.survey.records.iter().map(|(pod, ifname)| (pod.host_device.as_str(), (pod, ifname))).collect();
    for (device, lease) in &leased {
        findings.extend(of_lease(facts, lease, facts.survey.devices.contains_key(device)));
    }
    for (pod, ifname) in &facts.survey.records {
        let there = facts.survey.devices.get(&pod.host_device);
        let index = there.copied().filter(|index| *index == pod.ifindex);
        if index.is_some() && !leased.contains_key(&pod.host_device) {
            findings.push(Finding {
                kind: Kind::DeviceWithoutLease,
                object: pod.host_device.clone(),
                pod: named(&pod.name),
                addresses: pod.addresses.clone(),
                what: format!(
                    "the device of {ifname} of container {} is there and its lease is not: its addresses are held, and given to nobody else",
                    pod.container_id
                ),
                repairable: true,
            });
        }
        let known = |address: &&IpAddr| facts.survey.entries.get(*address) != Some(&pod.ifindex);
        let unknown: Vec<IpAddr> = pod.addresses.iter().filter(known).copied().collect();
        if index.is_some() && !unknown.is_empty() {
            findings.push(Finding {
                kind: Kind::DeviceWithoutEntry,
                object: pod.host_device.clone(),
                pod: named(&pod.name),
                addresses: unknown,
                what: "the kernel's programs do not know the pod by this device: nothing reaches it".to_owned(),
                repairable: true,
            });
        }
    }
    for device in facts.survey.devices.keys().filter(|device| !recorded.contains_key(device.as_str())) {
        findings.push(Finding {
            kind: Kind::DeviceWithoutOwner,
            object: device.clone(),
            pod: None,
            addresses: Vec::new(),
            what: "a device that is named as a pod's, and nobody's: taken away by the next full check".to_owned(),
            repairable: true,
        });
    }
    let indexes: BTreeSet<u32> = facts.survey.devices.values().copied().collect();
    for (address, index) in facts.survey.entries.iter().filter(|(_, index)| !indexes.contains(index)) {
        findings.push(Finding {
            kind: Kind::EntryWithoutDevice,
            object: address.to_string(),
            pod: None,
            addresses: vec![*address],
            what: format!("the kernel's programs know a pod at device {index}, which is gone"),
            repairable: true,
        });
    }
    findings.extend(duplicates(facts));
    findings.extend(against_pods(facts));
    findings.extend(facts.queued.iter().filter(|owner| !facts.busy.contains(*owner)).map(|owner| Finding {
        kind: Kind::QueuedDelete,
        object: owner.to_string(),
        pod: None,
        addresses: Vec::new(),
        what: "its DEL could not be done yet: tried again every ten seconds".to_owned(),
        repairable: true,
    }));
    findings.sort();
    findings
}

fn named(pod: &NamespacedName) -> Option<String> {
    // Of a container that Kubernetes does not know the namespace is empty.
    (!pod.namespace.is_empty()).then(|| pod.to_string())
}

fn of_lease(facts: &Facts, lease: &Lease, has_device: bool) -> Vec<Finding> {
    let finding = |kind, addresses: &[IpAddr], what: &str, repairable| Finding {
        kind,
        object: lease.owner.to_string(),
        pod: lease.pod.as_ref().and_then(named),
        addresses: addresses.to_vec(),
        what: what.to_owned(),
        repairable,
    };
    let mut findings = Vec::new();
    match (facts.busy.contains(&lease.owner), &lease.attached) {
        (true, _) => {}
        (false, None) => findings.push(finding(
            Kind::Unfinished,
            &lease.addresses,
            "its ADD was never answered: what it made is removed, and the address released",
            true,
        )),
        (false, Some(_)) if !has_device => findings.push(finding(
            Kind::LeaseWithoutDevice,
            &lease.addresses,
            "its network namespace is gone, and the device with it: the address is released",
            true,
        )),
        (false, Some(_)) => {}
    }
    let outside = |address: &&IpAddr| !facts.ranges.iter().any(|range| range.contains(*address));
    let strays: Vec<IpAddr> = lease.addresses.iter().filter(outside).copied().collect();
    if !strays.is_empty() {
        let what = "the node's pod ranges were others when it was given: other nodes do not reach it; recreate the pod";
        findings.push(finding(Kind::OutOfRange, &strays, what, false));
    }
    findings
}

/// Addresses that two claim: by leases, by records of devices that are there, or one by each.
fn duplicates(facts: &Facts) -> Vec<Finding> {
    let mut claims: BTreeMap<IpAddr, BTreeSet<Attachment>> = BTreeMap::new();
    for lease in &facts.leases {
        for address in &lease.addresses {
            claims.entry(*address).or_default().insert(lease.owner.clone());
        }
    }
    let there = |device: &str, index: u32| facts.survey.devices.get(device) == Some(&index);
    for (pod, ifname) in facts.survey.records.iter().filter(|(pod, _)| there(&pod.host_device, pod.ifindex)) {
        let Ok(owner) = Attachment::new(&pod.container_id, ifname) else { continue };
        for address in &pod.addresses {
            claims.entry(*address).or_default().insert(owner.clone());
        }
    }
    let several = claims.into_iter().filter(|(_, owners)| owners.len() > 1);
    several
        .map(|(address, owners)| {
            let owners: Vec<String> = owners.iter().map(ToString::to_string).collect();
            Finding {
                kind: Kind::Duplicate,
                object: address.to_string(),
                pod: None,
                addresses: vec![address],
                what: format!("claimed by {}: recreate their pods", owners.join(" and by ")),
                repairable: false,
            }
        })
        .collect()
}

/// What the API says of pods of this node.
fn against_pods(facts: &Facts) -> Vec<Finding> {
    let Some(pods) = &facts.pods else { return Vec::new() };
    let given: BTreeSet<IpAddr> = facts.leases.iter().flat_map(|lease| lease.addresses.iter().copied()).collect();
    let mut findings = Vec::new();
    for pod in pods {
        let lost = |address: &&IpAddr| !given.contains(*address) && !facts.elsewhere.contains(*address);
        let lost: Vec<IpAddr> = pod.addresses.iter().filter(lost).copied().collect();
        if !lost.is_empty() {
            findings.push(Finding {
                kind: Kind::PodWithoutLease,
                object: pod.name.to_string(),
                pod: Some(pod.name.to_string()),
                addresses: lost,
                what: "its status says an address that this node gave to nobody: recreate the pod".to_owned(),
                repairable: false,
            });
        }
    }
    let known: BTreeSet<&NamespacedName> = pods.iter().map(|pod| &pod.name).collect();
    for lease in facts.leases.iter().filter(|lease| !facts.busy.contains(&lease.owner)) {
        if let Some(pod) = lease.pod.as_ref().filter(|pod| !known.contains(pod)) {
            findings.push(Finding {
                kind: Kind::LeaseWithoutPod,
                object: lease.owner.to_string(),
                pod: Some(pod.to_string()),
                addresses: lease.addresses.clone(),
                what: "the API server has no such pod on this node, or it has ended: its sandbox was not deleted (crictl stopp, crictl rmp)".to_owned(),
                repairable: false,
            });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::AttachedDevice;
    use super::super::tests::{attached, name_of, ranges, request};
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn lease(id: &str, address: &str) -> Lease {
        let request = request(id);
        let made = attached(&request, &[ip(address)]);
        Lease {
            owner: request.attachment,
            network: request.network,
            pod: request.pod.map(|pod| NamespacedName::new(pod.namespace, pod.name)),
            uid: String::new(),
            netns: String::new(),
            addresses: vec![ip(address)],
            attached: Some(AttachedDevice { pod: made.pod, mtu: made.mtu }),
        }
    }

    /// Two containers of which all say the same.
    fn facts() -> Facts {
        let leases = vec![lease("a", "10.244.1.2"), lease("b", "10.244.1.3")];
        let mut survey = PodSurvey::default();
        let mut pods = Vec::new();
        for (lease, index) in leases.iter().zip(7..) {
            let mut pod = lease.attached.clone().unwrap().pod;
            pod.ifindex = index;
            survey.devices.insert(name_of(&lease.owner), index);
            survey.entries.insert(lease.addresses[0], index);
            survey.records.push((pod, "eth0".to_owned()));
            pods.push(KnownPod { name: lease.pod.clone().unwrap(), addresses: lease.addresses.clone() });
        }
        Facts { ranges: ranges(), leases, survey, pods: Some(pods), ..Facts::default() }
    }

    fn found(change: impl FnOnce(&mut Facts)) -> Vec<(Kind, String, bool)> {
        let mut facts = facts();
        change(&mut facts);
        check(&facts, name_of).into_iter().map(|f| (f.kind, f.object, f.repairable)).collect()
    }

    #[test]
    fn what_fits_together_is_no_finding() {
        assert_eq!(found(|_| {}), []);
    }

    #[test]
    fn each_difference_is_found_under_its_name() {
        let a = || "eth0 of container a".to_owned();
        let device = || name_of(&request("a").attachment);
        let gone = |facts: &mut Facts| {
            facts.survey.devices.remove(&device());
        };
        assert_eq!(
            found(gone),
            [(Kind::LeaseWithoutDevice, a(), true), (Kind::EntryWithoutDevice, "10.244.1.2".into(), true)]
        );
        assert_eq!(found(|facts| facts.leases[0].attached = None), [(Kind::Unfinished, a(), true)]);
        let lost = |facts: &mut Facts| drop(facts.leases.remove(0));
        assert_eq!(
            found(lost),
            [(Kind::DeviceWithoutLease, device(), true), (Kind::PodWithoutLease, "default/pod-a".into(), false)]
        );
        let stray = |facts: &mut Facts| facts.survey.devices.extend([("tpstray".to_owned(), 99)]);
        assert_eq!(found(stray), [(Kind::DeviceWithoutOwner, "tpstray".into(), true)]);
        let unknown = |facts: &mut Facts| facts.survey.entries.retain(|address, _| *address != ip("10.244.1.2"));
        assert_eq!(found(unknown), [(Kind::DeviceWithoutEntry, device(), true)]);
        let moved =
            |facts: &mut Facts| facts.ranges = vec!["10.244.1.0/31".parse().unwrap(), "10.244.1.3/32".parse().unwrap()];
        assert_eq!(found(moved), [(Kind::OutOfRange, a(), false)]);
        let ended = |facts: &mut Facts| drop(facts.pods.as_mut().unwrap().remove(0));
        assert_eq!(found(ended), [(Kind::LeaseWithoutPod, a(), false)]);
        let queued = |facts: &mut Facts| facts.queued.push(request("a").attachment);
        assert_eq!(found(queued), [(Kind::QueuedDelete, a(), true)]);
    }

    #[test]
    fn an_address_of_two_is_found_whoever_claims_it() {
        let both = |facts: &mut Facts| facts.leases.push(lease("c", "10.244.1.3"));
        assert!(found(both).contains(&(Kind::Duplicate, "10.244.1.3".into(), false)));
        // A device without a lease, and the lease of another.
        let device = |facts: &mut Facts| {
            facts.leases.remove(0);
            facts.survey.records[0].0.addresses = vec![ip("10.244.1.3")];
        };
        assert!(found(device).contains(&(Kind::Duplicate, "10.244.1.3".into(), false)));
    }

    #[test]
    fn what_is_in_work_is_no_finding() {
        let adding = |facts: &mut Facts| {
            facts.leases[0].attached = None;
            facts.busy.insert(request("a").attachment);
        };
        assert_eq!(found(adding), []);
        let deleting = |facts: &mut Facts| {
            facts.survey.devices.remove(&name_of(&request("a").attachment));
            facts.survey.entries.remove(&ip("10.244.1.2"));
            facts.queued.push(request("a").attachment);
            facts.busy.insert(request("a").attachment);
        };
        assert_eq!(found(deleting), []);
    }

    #[test]
    fn without_all_pods_nothing_is_said_of_pods_and_those_of_the_network_before_have_theirs() {
        let deaf = |facts: &mut Facts| {
            facts.pods = None;
            facts.leases[0].pod = Some(NamespacedName::new("default", "nobody"));
        };
        assert_eq!(found(deaf), []);
        let before = |facts: &mut Facts| {
            let pod = KnownPod { name: NamespacedName::new("default", "old"), addresses: vec![ip("10.244.1.9")] };
            facts.pods.as_mut().unwrap().push(pod);
            facts.elsewhere.insert(ip("10.244.1.9"));
        };
        assert_eq!(found(before), []);
    }
}
