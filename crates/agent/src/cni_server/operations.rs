//! What each CNI verb does on this node.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use towpath_model::{Bandwidth, NamespacedName, Rate, bandwidth};
use towpath_plan::ipam::IpamError;
use towpath_wire::cni::{
    AddRequest, AddResult, Attachment, CheckRequest, CniError, DelRequest, Dns, ErrorCode, Interface, IpConfig,
    PodIdentity, Prefix, Reply, Request, Route,
};

use super::ports::{
    AttachRequest, Attached, Choice, DetachRequest, Fetched, Isolation, PlumbError, PodFacts, PodIndex, PodPlumber,
    Readiness,
};
use super::queue::DeleteQueue;
use super::turns::{Turn, Turns};
use crate::counts;
use crate::ipam::{AttachedDevice, Lease, LeaseError, LeaseStore};

/// How long things may take, and where DELs are queued.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of queued DELs, shared with `towpath-cni`.
    pub deletes: PathBuf,
    /// How long an ADD waits for the agent to be ready.
    pub ready_wait: Duration,
    /// How long asking the API server for a pod may take.
    pub fetch_wait: Duration,
    /// How long making a device may take.
    pub attach_wait: Duration,
    /// How long removing, comparing or listing devices may take.
    pub detach_wait: Duration,
}

impl Settings {
    /// The default times: 10 s to be ready, 2 s for the API server, 30 s to make a device, 20 s to remove one.
    pub fn new(deletes: PathBuf) -> Self {
        Self {
            deletes,
            ready_wait: Duration::from_secs(10),
            fetch_wait: Duration::from_secs(2),
            attach_wait: Duration::from_secs(30),
            detach_wait: Duration::from_secs(20),
        }
    }
}

/// The verb as the CNI specification calls it, and what only we ask.
fn verb(request: &Request) -> &'static str {
    match request {
        Request::Add(_) => "ADD",
        Request::Del(_) => "DEL",
        Request::Check(_) => "CHECK",
        Request::Gc { .. } => "GC",
        Request::Status { .. } => "STATUS",
        Request::Addresses { .. } => "addresses",
    }
}

/// What is answered, and what is to be taken back if nobody takes the answer.
#[derive(Debug)]
pub struct Answer {
    /// For the runtime.
    pub reply: Reply,
    pub(super) made: Option<Made>,
}

/// What an ADD made. While it is held nobody else works on the attachment: the runtime may have asked again, and be answered with what is
/// about to be taken back.
#[derive(Debug)]
pub(super) struct Made {
    request: AddRequest,
    _turn: Turn,
}

/// The verbs.
pub struct Operations<I, P> {
    pub(super) settings: Settings,
    pub(super) index: Arc<I>,
    pub(super) plumber: Arc<P>,
    pub(super) leases: Arc<LeaseStore>,
    readiness: watch::Receiver<Readiness>,
    pub(super) turns: Turns,
    pub(super) queue: DeleteQueue,
}

impl<I: PodIndex, P: PodPlumber> Operations<I, P> {
    /// All it needs.
    pub fn new(
        settings: Settings,
        index: Arc<I>,
        plumber: Arc<P>,
        leases: Arc<LeaseStore>,
        readiness: watch::Receiver<Readiness>,
    ) -> Self {
        let queue = DeleteQueue::new(settings.deletes.clone());
        Self { settings, index, plumber, leases, readiness, turns: Turns::default(), queue }
    }

    /// Answers a request. `asker_gone` ends an ADD that waits for something that nobody waits for any more.
    pub async fn handle(&self, request: Request, netns: Option<OwnedFd>, asker_gone: CancellationToken) -> Answer {
        let (verb, begun) = (verb(&request), Instant::now());
        let answer = self.answer(request, netns, asker_gone).await;
        let outcome = match &answer.reply {
            // Whoever makes pods can have one refused for as long as he likes: that is no trouble of the node's.
            Reply::Failed { error } if error.code == ErrorCode::Choice => counts::Outcome::Refused,
            Reply::Failed { .. } => counts::Outcome::Error,
            _ => counts::Outcome::Success,
        };
        counts::cni(verb, begun.elapsed(), outcome);
        answer
    }

    async fn answer(&self, request: Request, netns: Option<OwnedFd>, asker_gone: CancellationToken) -> Answer {
        let outcome = match request {
            Request::Add(add) => {
                let turn = self.turns.take(&add.attachment).await;
                match self.add(&add, netns, &asker_gone).await {
                    Ok(result) => {
                        tracing::info!(attachment = %add.attachment, pod = ?add.pod.as_ref().map(|p| &p.name), ips = ?result.ips, "ADD");
                        return Answer {
                            reply: Reply::Added { result },
                            made: Some(Made { request: add, _turn: turn }),
                        };
                    }
                    Err(error) => {
                        tracing::warn!(attachment = %add.attachment, %error, "ADD failed");
                        Err(error)
                    }
                }
            }
            Request::Del(del) => self.del(&del).await,
            Request::Check(check) => self.check(&check, netns).await,
            Request::Gc { network, valid } => self.collect_garbage(&network, &valid).await,
            Request::Status { .. } => self.status(),
            Request::Addresses { repair } => match self.addresses(repair).await {
                Ok(addresses) => return Answer { reply: Reply::Addresses { addresses }, made: None },
                Err(error) => Err(error),
            },
        };
        let reply = match outcome {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Failed { error },
        };
        Answer { reply, made: None }
    }

    // ---- ADD ---------------------------------------------------------------------------------------------------------

    /// Call with the attachment's turn.
    async fn add(
        &self,
        request: &AddRequest,
        netns: Option<OwnedFd>,
        asker_gone: &CancellationToken,
    ) -> Result<AddResult, CniError> {
        let netns = container_namespace(netns)?;
        let owner = &request.attachment;
        let bandwidth = runtime_bandwidth(request)?;
        let (isolation, choice) = tokio::select! {
            found = async { self.wait_ready().await?; self.isolation(request.pod.as_ref()).await } => found?,
            () = asker_gone.cancelled() => return Err(given_up(owner)),
        };
        if self.queue.contains(owner) {
            // Asked for before this ADD: the container id is used again.
            self.remove(owner).await?;
        }
        if let Some(result) = self.as_before(request, &netns).await? {
            return Ok(result);
        }
        if asker_gone.is_cancelled() {
            return Err(given_up(owner));
        }
        let (addresses, mac) = match choice {
            Choice::Any => (Vec::new(), None),
            Choice::These { addresses, mac } => (addresses, mac),
            Choice::Refused(why) => return Err(CniError::new(ErrorCode::Choice, why)),
        };
        let reserve =
            |leases: &LeaseStore, (request, addresses): (AddRequest, Vec<IpAddr>)| leases.reserve(&request, &addresses);
        let lease = self.on_disk(reserve, (request.clone(), addresses)).await?;
        let attached = match self.attach(request, &lease, netns, isolation, mac, bandwidth).await {
            Ok(attached) => attached,
            Err(error) => return Err(self.undo(request, error).await),
        };
        let committed =
            self.on_disk(|leases, (owner, attached)| leases.commit(&owner, &attached), (owner.clone(), attached));
        match committed.await {
            Ok(lease) => {
                self.leases.device_gone(&self.plumber.device_name(owner));
                lease
                    .attached
                    .as_ref()
                    .map(|attached| self.result(request, &lease, attached))
                    .ok_or_else(|| given_up(owner))
            }
            Err(error) => Err(self.undo(request, error).await),
        }
    }

    async fn wait_ready(&self) -> Result<(), CniError> {
        let mut readiness = self.readiness.clone();
        let ready = readiness.wait_for(|now| *now == Readiness::Ready);
        match tokio::time::timeout(self.settings.ready_wait, ready).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(CniError::new(ErrorCode::TryAgain, "the Towpath agent is stopping")),
            Err(_) => Err(CniError::new(
                ErrorCode::TryAgain,
                format!("the Towpath agent is not ready: {}", self.why_not_ready()),
            )
            .hint("see `towpath status` on this node")),
        }
    }

    fn why_not_ready(&self) -> String {
        match &*self.readiness.borrow() {
            Readiness::Starting(why) => why.clone(),
            Readiness::Ready => "it is just becoming so".to_owned(),
        }
    }

    /// What must hold for the pod's packets, and which addresses it gets, by what is known of it.
    async fn isolation(&self, pod: Option<&PodIdentity>) -> Result<(Isolation, Choice), CniError> {
        let Some(identity) = pod else { return Ok((Isolation::NotAPod, Choice::Any)) };
        let pod = NamespacedName::new(&identity.namespace, &identity.name);
        let known = self.index.lookup(&pod);
        if let Some(facts) = known.as_ref().filter(|facts| is_sandbox_of(identity, facts)) {
            return Ok((Isolation::Policy, facts.choice.clone()));
        }
        let again =
            |why: String| CniError::new(ErrorCode::TryAgain, why).hint("the container runtime tries again by itself");
        match tokio::time::timeout(self.settings.fetch_wait, self.index.fetch(&pod)).await {
            Ok(Fetched::Found(_)) if self.index.policies_are_recalled() => {
                Err(again(format!("pod {pod} is new, and the policies have not been listed since this agent started")))
            }
            Ok(Fetched::Found(facts)) if is_sandbox_of(identity, &facts) => Ok((Isolation::Policy, facts.choice)),
            Ok(Fetched::Found(facts)) => Err(CniError::new(
                ErrorCode::StaleSandbox,
                format!(
                    "pod {pod} is now uid {}, the sandbox is of uid {}",
                    facts.uid.unwrap_or_default(),
                    identity.uid
                ),
            )
            .hint("the pod was replaced; the container runtime should remove this sandbox")),
            Ok(Fetched::Absent) => Err(again(format!("the API server does not know pod {pod}"))),
            Ok(Fetched::Unreachable(why)) if known.is_some() => {
                Err(again(format!("pod {pod} seems to have been replaced, and the API server cannot be asked: {why}")))
            }
            // It may ask for an address that is not given to it afterwards.
            Ok(Fetched::Unreachable(why)) if self.index.pods_choose(&identity.namespace) => Err(again(format!(
                "pods of namespace {} may choose their addresses, and the API server cannot be asked what pod {pod} chooses: {why}",
                identity.namespace
            ))),
            Ok(Fetched::Unreachable(why)) => {
                tracing::warn!(%pod, why, "the pod is not known and the API server cannot be asked: only its node reaches it \
                    until its labels are known");
                Ok((Isolation::HostOnly, Choice::Any))
            }
            Err(_) => Err(again(format!(
                "pod {pod} is not known yet, and the API server did not answer within {:?}",
                self.settings.fetch_wait
            ))),
        }
    }

    /// The answer to an ADD that was answered before, if everything is still so. If not, what is left of it is removed.
    async fn as_before(&self, request: &AddRequest, netns: &OwnedFd) -> Result<Option<AddResult>, CniError> {
        let Some(lease) = self.leases.lease(&request.attachment) else { return Ok(None) };
        if let Some(attached) = &lease.attached
            && lease.network == request.network
            && lease.uid == request.pod.as_ref().map(|p| p.uid.clone()).unwrap_or_default()
            && let Ok(netns) = netns.try_clone()
            && self.compare(&attached.pod, &request.attachment, netns).await.is_ok()
        {
            return Ok(Some(self.result(request, &lease, attached)));
        }
        self.remove(&request.attachment).await?;
        Ok(None)
    }

    async fn attach(
        &self,
        request: &AddRequest,
        lease: &Lease,
        netns: OwnedFd,
        isolation: Isolation,
        mac: Option<[u8; 6]>,
        bandwidth: Bandwidth,
    ) -> Result<Attached, CniError> {
        let attach = self.plumber.attach(AttachRequest {
            attachment: request.attachment.clone(),
            pod: lease.pod.clone().unwrap_or_else(|| NamespacedName::new("", request.attachment.container_id())),
            addresses: lease.addresses.clone(),
            mac,
            gateways: self.leases.gateways(&lease.addresses),
            netns,
            isolation,
            bandwidth,
        });
        match tokio::time::timeout(self.settings.attach_wait, attach).await {
            Ok(Ok(attached)) => Ok(attached),
            Ok(Err(error)) => Err(plumb_error("make", &request.attachment, &error)),
            Err(_) => Err(CniError::new(
                ErrorCode::TryAgain,
                format!("making {} took longer than {:?}", request.attachment, self.settings.attach_wait),
            )),
        }
    }

    /// Removes what a failed ADD may have left; what cannot be removed is queued. Returns the ADD's own error.
    async fn undo(&self, request: &AddRequest, error: CniError) -> CniError {
        if let Err(left) = self.remove(&request.attachment).await {
            tracing::warn!(attachment = %request.attachment, error = %left, "what a failed ADD left cannot be removed; queued");
            let del = DelRequest { attachment: request.attachment.clone(), network: request.network.clone() };
            if let Err(error) = self.queue.put(&del) {
                tracing::error!(attachment = %request.attachment, %error, "nor can that be queued; the next sweep finds it");
            }
        }
        error
    }

    fn result(&self, request: &AddRequest, lease: &Lease, attached: &AttachedDevice) -> AddResult {
        let gateways = self.leases.gateways(&lease.addresses);
        let pair = || lease.addresses.iter().zip(&gateways);
        AddResult {
            interfaces: vec![
                Interface {
                    name: attached.pod.host_device.clone(),
                    mac: mac_text(attached.pod.host_mac),
                    mtu: Some(attached.mtu),
                    ..Interface::default()
                },
                Interface {
                    name: request.attachment.ifname().to_owned(),
                    mac: mac_text(attached.pod.mac),
                    mtu: Some(attached.mtu),
                    sandbox: request.netns.clone(),
                    ..Interface::default()
                },
            ],
            ips: pair()
                .map(|(address, gateway)| IpConfig {
                    address: Prefix::host(*address),
                    gateway: Some(*gateway),
                    interface: Some(1),
                })
                .collect(),
            routes: pair().map(|(address, gateway)| Route::via(Prefix::everything(*address), *gateway)).collect(),
            dns: Dns::default(),
        }
    }

    /// Removes what an ADD made whose answer could not be delivered.
    pub(super) async fn take_back(&self, made: Made) {
        let add = &made.request;
        tracing::warn!(attachment = %add.attachment, "nobody took the answer to ADD; what it made is removed");
        let del = DelRequest { attachment: add.attachment.clone(), network: add.network.clone() };
        if let Err(error) = self.remove_or_queue(&del).await {
            tracing::error!(attachment = %add.attachment, %error, "what ADD made cannot be removed");
        }
    }

    // ---- DEL ---------------------------------------------------------------------------------------------------------

    async fn del(&self, request: &DelRequest) -> Result<(), CniError> {
        let _turn = self.turns.take(&request.attachment).await;
        self.remove_or_queue(request).await
    }

    /// Call with the attachment's turn.
    async fn remove_or_queue(&self, request: &DelRequest) -> Result<(), CniError> {
        match self.remove(&request.attachment).await {
            Ok(()) => {
                tracing::info!(attachment = %request.attachment, "DEL");
                Ok(())
            }
            Err(error) => {
                tracing::warn!(attachment = %request.attachment, %error, "DEL failed; queued and tried again");
                self.queue.put(request).map_err(|io| {
                    CniError::new(ErrorCode::Io, format!("{error}; and the DEL cannot be queued: {io}"))
                        .hint(format!("check {}", self.settings.deletes.display()))
                })
            }
        }
    }

    /// Removes device, lease and queued DEL. Call with the attachment's turn.
    pub(super) async fn remove(&self, owner: &Attachment) -> Result<(), CniError> {
        let lease = self.leases.lease(owner);
        let detach = self.plumber.detach(DetachRequest {
            attachment: owner.clone(),
            addresses: lease.as_ref().map(|l| l.addresses.clone()).unwrap_or_default(),
            attached: lease.and_then(|l| l.attached).map(|a| a.pod),
        });
        match tokio::time::timeout(self.settings.detach_wait, detach).await {
            Ok(outcome) => outcome.map_err(|error| plumb_error("remove", owner, &error))?,
            Err(_) => {
                let wait = self.settings.detach_wait;
                return Err(CniError::new(ErrorCode::Plumbing, format!("removing {owner} took longer than {wait:?}")));
            }
        }
        self.leases.device_gone(&self.plumber.device_name(owner));
        self.on_disk(|leases, owner| leases.release(&owner), owner.clone()).await?;
        // A container that the network before made: its own plugin is not asked any more.
        let before = |leases: &LeaseStore, owner: Attachment| {
            leases.release_before(owner.container_id()).map_err(|source| LeaseError::Before { source })
        };
        self.on_disk(before, owner.clone()).await?;
        self.queue.take_out(owner).map_err(|error| {
            CniError::new(ErrorCode::Io, format!("cannot take the DEL of {owner} out of the queue: {error}"))
        })
    }

    // ---- CHECK, GC, STATUS -------------------------------------------------------------------------------------------

    async fn check(&self, request: &CheckRequest, netns: Option<OwnedFd>) -> Result<(), CniError> {
        let netns = container_namespace(netns)?;
        let owner = &request.attachment;
        let _turn = self.turns.take(owner).await;
        let differs = |why: String| {
            CniError::new(ErrorCode::Mismatch, format!("{owner}: {why}"))
                .hint("delete the pod; its successor is made anew")
        };
        let Some(lease) = self.leases.lease(owner) else {
            return Err(differs("there is no lease of it".to_owned()));
        };
        let Some(attached) = &lease.attached else {
            return Err(differs("its ADD was not completed".to_owned()));
        };
        let has = |name: &str| request.prev_result.interfaces.iter().any(|i| i.name == name);
        for name in [attached.pod.host_device.as_str(), owner.ifname()] {
            if !has(name) {
                return Err(differs(format!("prevResult does not have its interface {name}")));
            }
        }
        for address in &lease.addresses {
            if !request.prev_result.ips.iter().any(|ip| ip.address.address == *address) {
                return Err(differs(format!("prevResult does not have its address {address}")));
            }
        }
        self.compare(&attached.pod, owner, netns).await
    }

    async fn compare(
        &self,
        pod: &towpath_model::desired::LocalPod,
        owner: &Attachment,
        netns: OwnedFd,
    ) -> Result<(), CniError> {
        match tokio::time::timeout(self.settings.detach_wait, self.plumber.check(pod, owner.ifname(), netns)).await {
            Ok(outcome) => outcome.map_err(|error| plumb_error("compare", owner, &error)),
            Err(_) => Err(CniError::new(ErrorCode::TryAgain, format!("comparing {owner} takes too long"))),
        }
    }

    /// Removes what the network has and the runtime no longer uses. Goes on after a failure and reports all of them.
    async fn collect_garbage(&self, network: &str, valid: &[Attachment]) -> Result<(), CniError> {
        let mut failures = Vec::new();
        for lease in self.leases.leases() {
            if lease.network != network || valid.contains(&lease.owner) {
                continue;
            }
            let _turn = self.turns.take(&lease.owner).await;
            if self.leases.lease(&lease.owner).as_ref() == Some(&lease) {
                tracing::info!(attachment = %lease.owner, addresses = ?lease.addresses, "GC: no longer in use; removed");
                if let Err(error) = self.remove(&lease.owner).await {
                    failures.push(error.to_string());
                }
            }
        }
        if failures.is_empty() {
            Ok(())
        } else {
            Err(CniError::new(ErrorCode::Plumbing, format!("GC of network {network}: {}", failures.join("; "))))
        }
    }

    fn status(&self) -> Result<(), CniError> {
        if *self.readiness.borrow() == Readiness::Ready {
            return Ok(());
        }
        Err(CniError::new(ErrorCode::NotAvailable, format!("the Towpath agent is not ready: {}", self.why_not_ready()))
            .hint("see `towpath status` on this node"))
    }

    /// Runs work of the lease store where blocking is allowed. It is not cut short when the caller is.
    pub(super) async fn on_disk<A, T>(
        &self,
        work: impl FnOnce(&LeaseStore, A) -> Result<T, LeaseError> + Send + 'static,
        argument: A,
    ) -> Result<T, CniError>
    where
        A: Send + 'static,
        T: Send + 'static,
    {
        let leases = self.leases.clone();
        match tokio::task::spawn_blocking(move || work(&leases, argument)).await {
            Ok(outcome) => outcome.map_err(lease_error),
            Err(error) => Err(CniError::new(ErrorCode::State, format!("the lease store failed: {error}"))),
        }
    }
}

fn runtime_bandwidth(request: &AddRequest) -> Result<Bandwidth, CniError> {
    let said = request.bandwidth.unwrap_or_default();
    let rate = |name: &str, bits: u64| match Rate::new(bits) {
        _ if bits == 0 => Ok(None),
        Some(rate) => Ok(Some(rate)),
        None => Err(CniError::new(
            ErrorCode::InvalidConfig,
            format!("{}: runtimeConfig.bandwidth: {name} {bits} is not {}", request.attachment, bandwidth::BOUNDS),
        )),
    };
    Ok(Bandwidth { ingress: rate("ingressRate", said.ingress_rate)?, egress: rate("egressRate", said.egress_rate)? })
}

fn is_sandbox_of(identity: &PodIdentity, facts: &PodFacts) -> bool {
    identity.uid.is_empty() || facts.uid.as_ref().is_none_or(|uid| *uid == identity.uid)
}

fn given_up(owner: &Attachment) -> CniError {
    CniError::new(ErrorCode::TryAgain, format!("{owner}: the container runtime no longer waits for the answer"))
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The namespace that came with a request. The agent's own is refused: a pod's device there would be the node's.
fn container_namespace(netns: Option<OwnedFd>) -> Result<OwnedFd, CniError> {
    let netns = netns.ok_or_else(|| {
        CniError::new(ErrorCode::InvalidEnvironment, "the request came without the container's network namespace")
    })?;
    let same = || -> io::Result<bool> {
        let own = rustix::fs::stat("/proc/self/ns/net")?;
        let container = rustix::fs::fstat(netns.as_fd())?;
        Ok((own.st_dev, own.st_ino) == (container.st_dev, container.st_ino))
    };
    match same() {
        Ok(false) => Ok(netns),
        Ok(true) => Err(CniError::new(ErrorCode::InvalidEnvironment, "CNI_NETNS is the node's own network namespace")
            .hint("pods with hostNetwork need no CNI")),
        Err(error) => {
            Err(CniError::new(ErrorCode::Io, format!("cannot look at the container's network namespace: {error}")))
        }
    }
}

fn lease_error(error: LeaseError) -> CniError {
    let code = match &error {
        LeaseError::Ipam(IpamError::Exhausted { .. }) => ErrorCode::Exhausted,
        LeaseError::Ipam(IpamError::NoRange) => ErrorCode::TryAgain,
        LeaseError::Ipam(IpamError::Elsewhere { .. } | IpamError::Reserved { .. } | IpamError::Taken { .. }) => {
            ErrorCode::Choice
        }
        LeaseError::Resting { .. } => ErrorCode::Choice,
        _ => ErrorCode::State,
    };
    CniError::new(code, error.to_string())
}

pub(super) fn plumb_error(what: &str, owner: &Attachment, error: &PlumbError) -> CniError {
    let code = match error {
        PlumbError::Again(_) => ErrorCode::TryAgain,
        PlumbError::Namespace(_) => ErrorCode::UnknownContainer,
        PlumbError::Asked(_) => ErrorCode::InvalidConfig,
        PlumbError::Mismatch(_) => ErrorCode::Mismatch,
        PlumbError::Choice(_) => ErrorCode::Choice,
        PlumbError::Failed(_) => ErrorCode::Plumbing,
    };
    CniError::new(code, format!("cannot {what} {owner}: {error}"))
}
