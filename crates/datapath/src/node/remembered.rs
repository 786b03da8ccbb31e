//! Pods whose record is lost: what somebody else remembers of them is put on record again, so that a pod that runs keeps its
//! device, whatever became of a directory.

use super::Node;
use crate::error::Error;
use crate::net::pod;
use crate::records::Record;
use crate::requests::RememberedPod;
use towpath_model::Bandwidth;

impl Node {
    /// After a restart, before anything is taken away. A device is the remembered one when it has its name, which follows from
    /// the container, its index, which no other device has had since the node started, and its address. How much such a
    /// pod may receive and send is known again by the next [`Node::apply_bandwidth`].
    pub(super) fn remember_pods(&mut self) -> Result<(), Error> {
        let links = self.pod_links()?;
        for RememberedPod { pod, ifname } in std::mem::take(&mut self.config.remembered) {
            let device = pod.host_device.as_str();
            if self.records.get(device).is_some() || self.records.is_buried(device) {
                continue;
            }
            let named = pod::host_device(&pod.container_id, &ifname) == device;
            let same = links.get(device).is_some_and(|l| l.index == pod.ifindex && l.mac == Some(pod.host_mac));
            if named && same {
                let why = self.records.unreadable().get(device).map_or("it is gone", String::as_str);
                tracing::warn!(device, pod = %pod.name, why, "the record of a running pod was lost: written again by its lease");
                let (bandwidth, runtime_bandwidth) = (Bandwidth::default(), Bandwidth::default());
                self.records.put(Record { pod, ifname, bandwidth, runtime_bandwidth })?;
            }
        }
        let lost = self.records.unreadable().iter().filter(|(device, _)| links.contains_key(*device));
        let told = |(device, why): (&String, &String)| {
            format!(
                "device {device}: the record of the pod it is for cannot be read ({why}), and no lease knows the pod: the \
                 device was deleted; recreate the pod of this node that has no network"
            )
        };
        self.lost = lost.map(told).collect();
        Ok(())
    }
}
