//! What each pod's device is for, on disk: the kernel keeps the device, but not the pod's name, addresses and sandbox.
//!
//! One JSON file a device, written by rename, in a directory that outlives the agent. The device in the kernel is the truth:
//! a record without one is stale, a device without one was never finished, unless somebody else remembers whose it is
//! ([`RememberedPod`](crate::RememberedPod)). A pod that was detached leaves a tombstone (its
//! record with another ending) until its connections are gone from the programs' tables, however often the agent dies meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use towpath_model::Bandwidth;
use towpath_model::desired::LocalPod;

use crate::error::Error;

/// Ending of the record of a pod that has its device.
const LIVE: &str = "json";
/// Ending of the record of a pod that was detached.
const TOMBSTONE: &str = "gone";

/// A pod's device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// The pod.
    pub pod: LocalPod,
    /// Name of the device inside the pod.
    pub ifname: String,
    /// How much it may receive and send.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// The same by what the runtime said, where the pod itself asks for nothing.
    #[serde(default)]
    pub runtime_bandwidth: Bandwidth,
}

/// All records, by the name of the host device.
#[derive(Debug)]
pub(crate) struct Records {
    directory: PathBuf,
    records: BTreeMap<String, Record>,
    tombstones: Vec<(PathBuf, Record)>,
    /// Devices whose record is there and says nothing, with the reason.
    unreadable: BTreeMap<String, String>,
}

impl Records {
    /// Reads the directory, making it if need be. A file that cannot be understood is left where it is and reported in the
    /// log; its device has no record.
    pub(crate) fn open(directory: PathBuf) -> Result<Self, Error> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Record { operation, path, source }
        };
        fs::create_dir_all(&directory).map_err(failed("make directory", &directory))?;
        let (mut records, mut tombstones, mut unreadable) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        for entry in fs::read_dir(&directory).map_err(failed("read directory", &directory))? {
            let path = entry.map_err(failed("read directory", &directory))?.path();
            let dead = path.extension().is_some_and(|e| e == TOMBSTONE);
            if !dead && path.extension().is_none_or(|e| e != LIVE) {
                continue;
            }
            let bytes = fs::read(&path).map_err(failed("read", &path))?;
            match serde_json::from_slice::<Record>(&bytes) {
                Ok(record) if dead => tombstones.push((path, record)),
                Ok(record) => {
                    records.insert(record.pod.host_device.clone(), record);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "pod record left out: cannot be read");
                    if let Some(device) = path.file_stem().filter(|_| !dead) {
                        unreadable.insert(device.to_string_lossy().into_owned(), error.to_string());
                    }
                }
            }
        }
        Ok(Self { directory, records, tombstones, unreadable })
    }

    /// Why the record of a device, which is there, cannot be read.
    pub(crate) fn unreadable(&self) -> &BTreeMap<String, String> {
        &self.unreadable
    }

    /// Whether an earlier process left a tombstone of a device that was not yet taken.
    pub(crate) fn is_buried(&self, device: &str) -> bool {
        self.tombstones.iter().any(|(_, record)| record.pod.host_device == device)
    }

    pub(crate) fn get(&self, device: &str) -> Option<&Record> {
        self.records.get(device)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// Writes a record, replacing the device's earlier one.
    pub(crate) fn put(&mut self, record: Record) -> Result<(), Error> {
        let path = self.path(&record.pod.host_device);
        let temporary = path.with_extension("tmp");
        let failed = |source| Error::Record { operation: "write", path: path.clone(), source };
        let text = serde_json::to_vec(&record).map_err(|e| failed(io::Error::other(e)))?;
        fs::write(&temporary, text).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)?;
        self.unreadable.remove(&record.pod.host_device);
        self.records.insert(record.pod.host_device.clone(), record);
        Ok(())
    }

    /// Forgets a device; fine when it is not known.
    pub(crate) fn remove(&mut self, device: &str) -> Result<(), Error> {
        self.records.remove(device);
        let path = self.path(device);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Record { operation: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// Forgets a device, but leaves a tombstone; its path, and what it remembers. None when the device is not known.
    pub(crate) fn bury(&mut self, device: &str) -> Result<Option<(PathBuf, Record)>, Error> {
        let Some(record) = self.records.get(device).cloned() else { return Ok(None) };
        let (path, tombstone) = (self.path(device), self.directory.join(device).with_extension(TOMBSTONE));
        fs::rename(&path, &tombstone).map_err(|source| Error::Record { operation: "rename", path, source })?;
        self.records.remove(device);
        Ok(Some((tombstone, record)))
    }

    /// Tombstones that an earlier process left, once.
    pub(crate) fn take_tombstones(&mut self) -> Vec<(PathBuf, Record)> {
        std::mem::take(&mut self.tombstones)
    }

    fn path(&self, device: &str) -> PathBuf {
        self.directory.join(device).with_extension(LIVE)
    }
}

#[cfg(test)]
mod tests {
    use towpath_model::{NamespacedName, Rate};

    use super::*;

    fn record(device: &str) -> Record {
        let pod = LocalPod {
            name: NamespacedName::new("default", "web"),
            container_id: "c".to_owned(),
            addresses: vec!["10.244.1.2".parse().unwrap()],
            host_device: device.to_owned(),
            ifindex: 7,
            mac: [1; 6],
            host_mac: [2; 6],
            netns_cookie: 9,
            pod_id: 7,
        };
        let bandwidth = Bandwidth { ingress: Rate::new(8_000_000), egress: None };
        Record { pod, ifname: "eth0".to_owned(), bandwidth, runtime_bandwidth: Bandwidth::default() }
    }

    #[test]
    fn records_survive_and_a_broken_one_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let mut records = Records::open(directory.path().join("pods")).unwrap();
        records.put(record("tp00000000001")).unwrap();
        records.put(record("tp00000000002")).unwrap();
        records.remove("tp00000000002").unwrap();
        records.remove("tp00000000002").unwrap();
        fs::write(directory.path().join("pods/tp00000000003.json"), "{").unwrap();
        let (tombstone, buried) = records.bury("tp00000000001").unwrap().unwrap();
        assert!(records.get("tp00000000001").is_none());
        assert_eq!(
            Records::open(directory.path().join("pods")).unwrap().take_tombstones(),
            [(tombstone, buried.clone())]
        );
        records.put(buried).unwrap();
        let again = Records::open(directory.path().join("pods")).unwrap();
        assert_eq!(again.iter().collect::<Vec<_>>(), [&record("tp00000000001")]);
        assert!(directory.path().join("pods/tp00000000003.json").exists());
    }

    #[test]
    fn a_record_of_before_there_were_limits_is_of_a_pod_without() {
        let directory = tempfile::tempdir().unwrap();
        let mut records = Records::open(directory.path().to_owned()).unwrap();
        records.put(record("tp00000000001")).unwrap();
        let path = directory.path().join("tp00000000001.json");
        let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for field in ["bandwidth", "runtimeBandwidth"] {
            assert!(old.as_object_mut().unwrap().remove(field).is_some());
        }
        fs::write(&path, old.to_string()).unwrap();
        let again = Records::open(directory.path().to_owned()).unwrap();
        let kept = again.get("tp00000000001").unwrap();
        assert_eq!((kept.bandwidth, &kept.pod), (Bandwidth::default(), &record("tp00000000001").pod));
    }
}
