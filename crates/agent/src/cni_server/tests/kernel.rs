//! A kernel and an API server that are not there, and a client of the socket.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use towpath_datapath::PodSurvey;
use towpath_model::desired::LocalPod;
use towpath_model::{Bandwidth, NamespacedName};
use towpath_wire::cni::{Attachment, Reply, Request};

use super::super::*;
use crate::ipam::check::KnownPod;
use crate::ipam::tests::{Failing, attached, name_of, request};

/// Devices that outlive the agent, as the kernel's do.
#[derive(Default)]
pub(crate) struct Kernel {
    devices: Mutex<BTreeMap<String, (Device, Isolation)>>,
    refuse: Mutex<BTreeSet<Attachment>>,
    /// What came with the latest request.
    pub(crate) limits: Mutex<Bandwidth>,
    pub(crate) attached: AtomicU32,
    pub(crate) refuse_attach: AtomicBool,
    pub(crate) hang_attach: AtomicBool,
    pub(crate) slow_attach: AtomicBool,
    /// Shared with the disk: after so many operations nothing works any more.
    pub(crate) power: Mutex<Option<Arc<Failing>>>,
}

impl Kernel {
    pub(crate) fn devices(&self) -> Vec<Device> {
        self.devices.lock().unwrap().values().map(|(device, _)| device.clone()).collect()
    }

    pub(crate) fn isolation_of(&self, owner: &Attachment) -> Option<Isolation> {
        self.devices.lock().unwrap().get(&name_of(owner)).map(|(_, isolation)| *isolation)
    }

    /// The namespace is gone, and the device with it.
    pub(crate) fn lose(&self, owner: &Attachment) {
        self.devices.lock().unwrap().remove(&name_of(owner));
    }

    pub(crate) fn reboot(&self) {
        self.devices.lock().unwrap().clear();
    }

    pub(crate) fn refuse_detach(&self, owner: &Attachment, refuse: bool) {
        let mut refused = self.refuse.lock().unwrap();
        if refuse {
            refused.insert(owner.clone())
        } else {
            refused.remove(owner)
        };
    }

    fn step(&self) -> Result<(), PlumbError> {
        let power = self.power.lock().unwrap();
        let Some(power) = power.as_ref() else { return Ok(()) };
        match power.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => Err(PlumbError::Failed("the power is cut".into())),
        }
    }
}

impl PodPlumber for Kernel {
    fn device_name(&self, attachment: &Attachment) -> String {
        name_of(attachment)
    }

    async fn attach(&self, asked: AttachRequest) -> Result<Attached, PlumbError> {
        if self.refuse_attach.load(Ordering::SeqCst) {
            return Err(PlumbError::Failed("no veth".into()));
        }
        if self.slow_attach.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.step()?;
        *self.limits.lock().unwrap() = asked.bandwidth;
        let name = name_of(&asked.attachment);
        let device = Device { name: name.clone(), addresses: asked.addresses.clone() };
        {
            let mut devices = self.devices.lock().unwrap();
            for (other, (there, _)) in devices.iter().filter(|(other, _)| **other != name) {
                assert!(
                    there.addresses.iter().all(|a| !asked.addresses.contains(a)),
                    "{other} has that address already"
                );
            }
            devices.insert(name, (device, asked.isolation));
        }
        if self.hang_attach.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        // The agent may die between making the device and hearing of it.
        self.step()?;
        self.attached.fetch_add(1, Ordering::SeqCst);
        let mut made = attached(&request(asked.attachment.container_id()), &asked.addresses);
        made.pod.mac = asked.mac.unwrap_or(made.pod.mac);
        Ok(made)
    }

    async fn detach(&self, asked: DetachRequest) -> Result<(), PlumbError> {
        if self.refuse.lock().unwrap().contains(&asked.attachment) {
            return Err(PlumbError::Failed("device is busy".into()));
        }
        self.step()?;
        self.lose(&asked.attachment);
        self.step()
    }

    async fn check(&self, pod: &LocalPod, _ifname: &str, _netns: OwnedFd) -> Result<(), PlumbError> {
        if self.devices.lock().unwrap().contains_key(&pod.host_device) {
            Ok(())
        } else {
            Err(PlumbError::Mismatch(format!("device {} is gone", pod.host_device)))
        }
    }

    async fn survey(&self) -> Result<PodSurvey, PlumbError> {
        let mut survey = PodSurvey { pod_mtu: 1450, ..PodSurvey::default() };
        for device in self.devices() {
            let stem = device.name.trim_start_matches("tp-").to_owned();
            let Some(owner) = Attachment::from_file_stem(&stem) else { continue };
            let pod = attached(&request(owner.container_id()), &device.addresses).pod;
            survey.devices.insert(device.name, pod.ifindex);
            survey.entries.extend(device.addresses.iter().map(|address| (*address, pod.ifindex)));
            survey.records.push((pod, owner.ifname().to_owned()));
        }
        Ok(survey)
    }

    async fn repair(&self) -> Result<Vec<String>, PlumbError> {
        Ok(Vec::new())
    }

    async fn list(&self) -> Result<Vec<Device>, PlumbError> {
        self.step()?;
        Ok(self.devices())
    }
}

/// Knows every pod by the uid its sandbox has, until told otherwise.
#[derive(Default)]
pub(crate) struct Api {
    known: Mutex<Option<BTreeMap<String, Option<String>>>>,
    answer: Mutex<Option<Fetched>>,
    choice: Mutex<Choice>,
    choosing: Mutex<Vec<String>>,
    pub(crate) fetches: AtomicU32,
}

impl Api {
    pub(crate) fn forget(&self) {
        *self.known.lock().unwrap() = Some(BTreeMap::new());
    }

    pub(crate) fn knows(&self, pod: &str, uid: Option<&str>) {
        self.known.lock().unwrap().get_or_insert_default().insert(pod.to_owned(), uid.map(str::to_owned));
    }

    /// What known pods ask for.
    pub(crate) fn choose(&self, choice: Choice) {
        *self.choice.lock().unwrap() = choice;
    }

    /// A namespace lets its pods choose.
    pub(crate) fn lets_choose(&self, namespace: &str) {
        self.choosing.lock().unwrap().push(namespace.to_owned());
    }

    /// What the API server says; none: nothing, ever.
    pub(crate) fn answer(&self, fetched: Option<Fetched>) {
        *self.answer.lock().unwrap() = fetched;
    }
}

impl PodIndex for Api {
    fn lookup(&self, pod: &NamespacedName) -> Option<PodFacts> {
        let choice = self.choice.lock().unwrap().clone();
        match self.known.lock().unwrap().as_ref() {
            None => Some(PodFacts { uid: None, choice }),
            Some(known) => known.get(&pod.name).map(|uid| PodFacts { uid: uid.clone(), choice }),
        }
    }

    fn of_this_node(&self) -> Option<Vec<KnownPod>> {
        None
    }

    fn pods_choose(&self, namespace: &str) -> bool {
        self.choosing.lock().unwrap().iter().any(|one| one == namespace)
    }

    async fn fetch(&self, _pod: &NamespacedName) -> Fetched {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let answer = self.answer.lock().unwrap().clone();
        match answer {
            Some(fetched) => fetched,
            None => std::future::pending().await,
        }
    }
}

/// A namespace that is not the test's own, so that none has to be made: any descriptor will do for a fake kernel.
pub(crate) fn netns() -> File {
    File::open("/proc/self/ns/uts").unwrap()
}

pub(crate) async fn ask(socket: &Path, request: &Request, netns: Option<&File>) -> io::Result<Reply> {
    let mut stream = send(socket, request, netns).await?;
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; u32::from_be_bytes(header) as usize];
    stream.read_exact(&mut body).await?;
    Ok(serde_json::from_slice(&body)?)
}

/// Hangs up without waiting for the reply, as a plugin does that is killed.
pub(crate) async fn ask_and_leave(socket: &Path, request: &Request, netns: &File) {
    drop(send(socket, request, Some(netns)).await.unwrap());
}

/// As [`ask_and_leave`], when what is returned is dropped.
pub(crate) async fn ask_and_leave_later(socket: &Path, request: &Request, netns: &File) -> tokio::net::UnixStream {
    send(socket, request, Some(netns)).await.unwrap()
}

async fn send(socket: &Path, request: &Request, netns: Option<&File>) -> io::Result<tokio::net::UnixStream> {
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    let body = serde_json::to_vec(request)?;
    let header = u32::try_from(body.len()).unwrap().to_be_bytes();
    stream.writable().await?;
    let fds: Vec<_> = netns.iter().map(|f| f.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    assert_eq!(sendmsg(stream.as_fd(), &[IoSlice::new(&header)], &mut ancillary, SendFlags::empty())?, 4);
    stream.write_all(&body).await?;
    Ok(stream)
}

/// Sends a request as a user that is not root, for which the calling thread gives up being root; what is answered.
pub(crate) fn ask_as_nobody(socket: &Path) -> io::Result<Vec<u8>> {
    use std::io::{Read as _, Write as _};
    let nobody = rustix::process::Uid::from_raw(65534);
    rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    // Turned away at once, perhaps before this is written.
    let _ = stream.write_all(b"\0\0\0\x02{}");
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(answer),
        outcome => outcome.map(|_| answer),
    }
}
