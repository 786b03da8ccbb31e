//! The life of one pod on its node: a task that goes from volumes to the final delete.
//!
//! Everything that takes time runs in tasks of its own and reports by message, so that a deletion is acted on at any
//! moment, also while a CNI plugin hangs.

mod stop;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use towpath_model::{AskedBandwidth, Bandwidth};

use super::events::Severity;
use super::probes::{self, Finding, Target};
use super::report::Reporter;
use super::slot::{Kind, Slot, State};
use super::start::{self, Start, StartFailure};
use super::volumes::{self, VolumeContext};
use super::{NodeContext, files, status};
use crate::kernel::cgroup;
use crate::runtime::cni::{Attachment, PortMapping};
use crate::runtime::container::{Container, Ended};
use crate::runtime::sandbox::{self, Sandbox, SandboxSpec};

/// What a worker is told.
pub(crate) enum Message {
    /// The pod changed.
    Pod(Arc<Pod>),
    /// The pod's object is gone.
    Gone,
    /// A start is over.
    Started { index: usize, instance: u64, result: Result<Container, StartFailure> },
    /// A container has ended.
    Ended { index: usize, instance: u64, ended: Ended },
    /// A probe says something.
    Probe { index: usize, instance: u64, finding: Finding },
}

/// Why normal life is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The object has a deletion timestamp.
    Deleted,
    /// The object is gone.
    Gone,
    /// All containers have ended for good.
    Finished,
}

/// One pod.
pub(crate) struct Worker {
    pub(super) context: Arc<NodeContext>,
    pub(super) pod: Arc<Pod>,
    pub(super) uid: String,
    inbox: mpsc::UnboundedReceiver<Message>,
    outbox: mpsc::UnboundedSender<Message>,
    tasks: JoinSet<()>,
    pub(super) slots: Vec<Slot>,
    pub(super) sandbox: Option<Sandbox>,
    pub(super) attachment: Option<Attachment>,
    pod_ips: Vec<IpAddr>,
    volumes: HashMap<String, PathBuf>,
    initialized: bool,
    finished: bool,
    failure: Option<(&'static str, String)>,
    gone: bool,
    started: Timestamp,
    reporter: Reporter,
}

/// First and longest wait between attempts to set up a pod.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// How often volumes are refreshed.
const REFRESH: Duration = Duration::from_secs(20);

impl Worker {
    /// A worker and the way to tell it of changes.
    pub(super) fn new(context: Arc<NodeContext>, pod: Arc<Pod>) -> (Self, mpsc::UnboundedSender<Message>) {
        let (outbox, inbox) = mpsc::unbounded_channel();
        let before = pod.status.clone().unwrap_or_default();
        let spec = pod.spec.clone().unwrap_or_default();
        let old = |list: &Option<Vec<_>>, name: &str| {
            list.iter().flatten().find(|s: &&k8s_openapi::api::core::v1::ContainerStatus| s.name == name).cloned()
        };
        let inits = spec.init_containers.unwrap_or_default().into_iter().map(|c| {
            let kind = if c.restart_policy.as_deref() == Some("Always") { Kind::Sidecar } else { Kind::Init };
            let was = old(&before.init_container_statuses, &c.name);
            Slot::new(c, kind, was.as_ref())
        });
        let mains = spec.containers.into_iter().map(|c| {
            let was = old(&before.container_statuses, &c.name);
            Slot::new(c, Kind::Main, was.as_ref())
        });
        let worker = Self {
            uid: pod.uid().unwrap_or_default(),
            slots: inits.chain(mains).collect(),
            started: before.start_time.map_or_else(Timestamp::now, |time| time.0),
            reporter: Reporter::new(context.client.clone(), &pod),
            context,
            pod,
            inbox,
            outbox: outbox.clone(),
            tasks: JoinSet::new(),
            sandbox: None,
            attachment: None,
            pod_ips: Vec::new(),
            volumes: HashMap::new(),
            initialized: false,
            finished: false,
            failure: None,
            gone: false,
        };
        (worker, outbox)
    }

    /// The pod's whole life.
    pub(super) async fn run(mut self) {
        let phase = self.pod.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
        let ended = phase == "Succeeded" || phase == "Failed";
        if !ended && !self.is_deleted() && !self.is_lost() {
            self.publish();
            if self.set_up().await {
                let stop = self.run_containers().await;
                tracing::debug!(pod = %self.label(), ?stop, "pod stops");
            }
            self.stop_containers().await;
        }
        self.tear_down().await;
        if !ended && !self.gone {
            self.publish();
        }
        self.wait_for_deletion().await;
        self.finish().await;
    }

    /// `name_namespace(uid)`, as the kubelet writes pods.
    pub(super) fn label(&self) -> String {
        format!("{}_{}({})", self.pod.name_any(), self.pod.namespace().unwrap_or_default(), self.uid)
    }

    pub(super) fn event(&self, field: Option<String>, severity: Severity, reason: &'static str, message: String) {
        self.context.events.pod(&self.pod, field, severity, reason, message);
    }

    fn field(slot: &Slot) -> String {
        let list = if slot.kind == Kind::Main { "containers" } else { "initContainers" };
        format!("spec.{list}{{{}}}", slot.name())
    }

    fn is_deleted(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }

    fn policy(&self) -> String {
        self.pod.spec.as_ref().and_then(|s| s.restart_policy.clone()).unwrap_or_else(|| "Always".to_owned())
    }

    fn is_host_network(&self) -> bool {
        self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true))
    }

    /// A pod that must not restart, whose containers ran in an earlier life of the lab, has failed.
    fn is_lost(&mut self) -> bool {
        let lost = self.policy() == "Never" && self.slots.iter().any(|s| s.ever_started);
        if lost {
            for slot in &mut self.slots {
                if let Some(last) = slot.last.take() {
                    slot.state = State::Terminated(last);
                }
            }
            self.finished = true;
        }
        lost
    }

    /// Reports the status as it is now; never blocks.
    fn publish(&mut self) {
        let host_ips = self.context.host_ips();
        let status = status::compute(&status::Facts {
            pod: &self.pod,
            slots: &self.slots,
            networked: self.sandbox.is_some() && !self.pod_ips.is_empty(),
            pod_ips: &self.pod_ips,
            host_ips: &host_ips,
            initialized: self.initialized,
            finished: self.finished,
            failure: self.failure.as_ref().map(|(reason, message)| (*reason, message.as_str())),
            started: self.started,
        });
        self.reporter.report(&self.pod, &status);
    }

    /// Runs `work` while listening; none when the pod is to be deleted meanwhile (`work` is dropped then).
    async fn unless_deleted<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            if self.is_deleted() {
                return None;
            }
            tokio::select! {
                result = &mut work => return Some(result),
                Some(message) = self.inbox.recv() => self.note(message),
            }
        }
    }

    /// Takes what concerns the object itself.
    fn note(&mut self, message: Message) {
        match message {
            Message::Pod(pod) => self.pod = pod,
            Message::Gone => self.gone = true,
            _ => {}
        }
    }

    /// Volumes, sandbox and network, retried until they are there. False when the pod is deleted before.
    async fn set_up(&mut self) -> bool {
        let mut wait = RETRY.0;
        loop {
            let result = self.try_set_up().await;
            let (reason, error) = match result {
                Ok(true) => return true,
                Ok(false) => return false,
                Err(failed) => failed,
            };
            self.event(None, Severity::Warning, reason, format!("{error:#}"));
            tracing::debug!(pod = %self.label(), reason, error = %format!("{error:#}"), "set-up failed");
            if self.unless_deleted(tokio::time::sleep(wait)).await.is_none() {
                return false;
            }
            wait = (wait * 2).min(RETRY.1);
        }
    }

    async fn try_set_up(&mut self) -> Result<bool, (&'static str, anyhow::Error)> {
        let (context, pod) = (self.context.clone(), self.pod.clone());
        let Some(made) = self.unless_deleted(mount_volumes(context, pod, Vec::new())).await else { return Ok(false) };
        self.volumes = made.map_err(|error| ("FailedMount", error))?;
        let failed = |error: anyhow::Error| {
            ("FailedCreatePodSandBox", error.context("Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox"))
        };
        let sandbox = self.make_sandbox().await.map_err(failed)?;
        self.sandbox = Some(sandbox.clone());
        self.context.registry.add_pod(&self.uid, sandbox.netns.clone());
        if self.is_host_network() {
            self.pod_ips = self.context.host_ips();
        } else {
            let attachment = self.attachment(&sandbox);
            self.attachment = Some(attachment.clone());
            let context = self.context.clone();
            let Some(added) = self.unless_deleted(async move { context.cni.add(&attachment).await }).await else {
                return Ok(false);
            };
            match added {
                Ok(addresses) => self.pod_ips = addresses,
                Err(error) => {
                    self.remove_sandbox().await.map_err(failed)?;
                    return Err(failed(error));
                }
            }
        }
        start::write_pod_files(&self.context, &self.pod, &self.pod_ips).map_err(failed)?;
        Ok(true)
    }

    async fn make_sandbox(&self) -> Result<Sandbox> {
        let layout = &self.context.layout;
        let sysctls =
            self.pod.spec.iter().flat_map(|s| s.security_context.iter()).flat_map(|c| c.sysctls.iter().flatten());
        cgroup::create(&layout.pod_cgroup(&self.context.node.name, &self.uid))?;
        Sandbox::create(SandboxSpec {
            dir: layout.pod_run(&self.uid),
            netns: (!self.is_host_network()).then(|| sandbox::netns_name(layout)),
            node_netns: layout.netns(&self.context.node.name),
            hostname: if self.is_host_network() {
                self.context.node.name.clone()
            } else {
                files::kernel_hostname(&self.pod)
            },
            sysctls: sysctls.map(|s| (s.name.clone(), s.value.clone())).collect(),
        })
        .await
    }

    fn attachment(&self, sandbox: &Sandbox) -> Attachment {
        let ports = self.slots.iter().flat_map(|slot| slot.spec.ports.iter().flatten());
        let mappings = ports.filter_map(|port| {
            Some(PortMapping {
                host_port: u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?,
                container_port: u16::try_from(port.container_port).ok()?,
                protocol: port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase(),
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        });
        Attachment {
            container_id: sandbox.id.clone(),
            netns: sandbox.netns.clone(),
            pod: (self.pod.namespace().unwrap_or_default(), self.pod.name_any(), self.uid.clone()),
            port_mappings: mappings.collect(),
            bandwidth: bandwidth(&self.pod),
            cache: self.context.layout.pod_run(&self.uid).join("cni-result.json"),
        }
    }

    /// CNI DEL, then the namespaces.
    async fn remove_sandbox(&mut self) -> Result<()> {
        if let Some(attachment) = &self.attachment {
            self.context.cni.delete(attachment).await?;
            self.attachment = None;
        }
        if let Some(sandbox) = &self.sandbox {
            sandbox.remove()?;
            self.sandbox = None;
        }
        Ok(())
    }

    /// The level-triggered loop: start what is due, take news, report.
    async fn run_containers(&mut self) -> Stop {
        let mut refresh = tokio::time::interval_at(Instant::now() + REFRESH, REFRESH);
        let refreshes = volumes::need_refresh(&self.pod);
        loop {
            if self.is_deleted() {
                return if self.gone { Stop::Gone } else { Stop::Deleted };
            }
            self.advance();
            if self.is_finished() {
                return Stop::Finished;
            }
            self.publish();
            let timer = self.next_timer();
            tokio::select! {
                Some(message) = self.inbox.recv() => self.take(message),
                () = tokio::time::sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => {}
                _ = refresh.tick(), if refreshes => self.refresh_volumes(),
                Some(_) = self.tasks.join_next() => {}
            }
            while let Ok(message) = self.inbox.try_recv() {
                self.take(message);
            }
        }
    }

    fn refresh_volumes(&mut self) {
        let (context, pod, ips) = (self.context.clone(), self.pod.clone(), self.pod_ips.clone());
        self.tasks.spawn(async move {
            let label = pod.name_any();
            if let Err(error) = mount_volumes(context, pod, ips).await {
                tracing::debug!(pod = label, error = %format!("{error:#}"), "volumes not refreshed");
            }
        });
    }

    /// When something is to be done without news: a restart falls due, or `activeDeadlineSeconds` passes.
    fn next_timer(&self) -> Option<Instant> {
        let restarts =
            self.slots.iter().filter(|s| matches!(s.state, State::Waiting { .. })).filter_map(|s| s.not_before);
        restarts.filter(|at| *at > Instant::now()).chain(self.deadline().map(|left| Instant::now() + left)).min()
    }

    /// What is left of `activeDeadlineSeconds`.
    fn deadline(&self) -> Option<Duration> {
        let seconds = self.pod.spec.as_ref()?.active_deadline_seconds?;
        let end = self.started.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()?;
        Some(Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default())
    }

    /// Starts what may start now, in order.
    fn advance(&mut self) {
        if self.deadline().is_some_and(|left| left.is_zero()) {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.event(None, Severity::Normal, "DeadlineExceeded", message.clone());
            self.failure = Some(("DeadlineExceeded", message));
            return;
        }
        let mut blocked = false;
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index) else { return };
            let (kind, due, running) = (slot.kind, slot.is_due(), slot.is_running());
            let (code, passed) = (slot.exit_code(), slot.started);
            match kind {
                Kind::Init if self.initialized || code == Some(0) => {}
                Kind::Init => {
                    let may = code.is_none() || self.policy() != "Never";
                    if may && due {
                        self.start(index);
                    }
                    blocked = true;
                }
                Kind::Sidecar => {
                    if due && !running {
                        self.start(index);
                    }
                    blocked |= !self.initialized && !passed;
                }
                Kind::Main => {
                    self.initialized = true;
                    if due && !running && (code.is_none() || self.restarts_after(index, code)) {
                        self.start(index);
                    }
                }
            }
            if blocked {
                return;
            }
        }
    }

    /// Whether a container that ended so starts again.
    fn restarts_after(&self, index: usize, code: Option<i32>) -> bool {
        let Some(slot) = self.slots.get(index) else { return false };
        match (slot.kind, self.policy().as_str()) {
            (Kind::Sidecar, _) => true,
            (Kind::Init, policy) => code != Some(0) && policy != "Never",
            (Kind::Main, "Always") => true,
            (Kind::Main, "OnFailure") => code != Some(0),
            (Kind::Main, _) => false,
        }
    }

    /// Whether nothing will run any more, apart from sidecars.
    fn is_finished(&mut self) -> bool {
        let over = |slot: &Slot, restarts: bool| slot.exit_code().is_some() && !restarts;
        let failed_init = self
            .slots
            .iter()
            .any(|s| s.kind == Kind::Init && s.exit_code().is_some_and(|code| code != 0) && self.policy() == "Never");
        let all_over = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, s)| s.kind == Kind::Main)
            .all(|(index, slot)| over(slot, self.restarts_after(index, slot.exit_code())));
        self.finished = failed_init || self.failure.is_some() || all_over;
        self.finished
    }

    fn start(&mut self, index: usize) {
        let (Some(sandbox), Some(slot)) = (self.sandbox.clone(), self.slots.get_mut(index)) else { return };
        let instance = slot.begin();
        let start = Start {
            context: self.context.clone(),
            pod: self.pod.clone(),
            declaration: slot.spec.clone(),
            field: Self::field(slot),
            sandbox,
            pod_ips: self.pod_ips.clone(),
            volumes: self.volumes.clone(),
            restarts: slot.restarts,
        };
        let outbox = self.outbox.clone();
        self.tasks.spawn(async move {
            let result = start.run().await;
            let running = result.as_ref().ok().cloned();
            let _ = outbox.send(Message::Started { index, instance, result });
            if let Some(container) = running {
                let ended = container.wait().await;
                let _ = outbox.send(Message::Ended { index, instance, ended });
            }
        });
    }

    fn take(&mut self, message: Message) {
        let current =
            |slots: &[Slot], index: usize, instance: u64| slots.get(index).is_some_and(|s| s.instance == instance);
        match message {
            Message::Pod(_) | Message::Gone => self.note(message),
            Message::Started { index, instance, result } if current(&self.slots, index, instance) => match result {
                Ok(container) => self.has_started(index, container),
                Err(failed) => self.has_not_started(index, &failed),
            },
            Message::Ended { index, instance, ended } if current(&self.slots, index, instance) => {
                self.has_ended(index, &ended);
            }
            Message::Probe { index, instance, finding } if current(&self.slots, index, instance) => {
                self.has_found(index, finding);
            }
            _ => {}
        }
    }

    fn target(&self, index: usize) -> Option<Target> {
        let slot = self.slots.get(index)?;
        Some(Target {
            node_netns: self.context.layout.netns(&self.context.node.name),
            address: *self.pod_ips.first()?,
            spec: slot.spec.clone(),
            container: slot.container.clone()?,
        })
    }

    fn has_started(&mut self, index: usize, container: Container) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.run(container.clone());
        self.context.registry.add_container(&self.uid, slot.name(), container.clone());
        let (kind, instance, probes) =
            (slot.kind, slot.instance, slot.spec.startup_probe.is_none() && slot.spec.readiness_probe.is_none());
        let hook = slot.spec.lifecycle.as_ref().and_then(|l| l.post_start.clone());
        if kind == Kind::Init {
            return;
        }
        if probes && hook.is_none() {
            slot.started = true;
            slot.ready = true;
        }
        let Some(target) = self.target(index) else { return };
        let outbox = self.outbox.clone();
        let watched = tokio::spawn(async move {
            if let Some(hook) = hook
                && let Err(error) = probes::run_hook(&target, &hook, Duration::from_secs(30)).await
            {
                let finding = Finding::Failed("PostStartHook", format!("{error:#}"));
                let _ = outbox.send(Message::Probe { index, instance, finding });
                let _ = outbox.send(Message::Probe { index, instance, finding: Finding::Dead("PostStartHook") });
                return;
            }
            let (findings, mut found) = mpsc::unbounded_channel();
            let forward = async {
                while let Some(finding) = found.recv().await {
                    let _ = outbox.send(Message::Probe { index, instance, finding });
                }
            };
            tokio::join!(probes::watch(target, findings), forward);
        });
        if let Some(slot) = self.slots.get_mut(index) {
            slot.probes = Some(AbortOnDropHandle::new(watched));
        }
    }

    fn has_not_started(&mut self, index: usize, failed: &StartFailure) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let image = slot.spec.image.clone().unwrap_or_default();
        let first = slot.fail(failed.reason, failed.message.clone());
        let field = Self::field(slot);
        if failed.reason == "ErrImagePull" && !first {
            let message = format!("Back-off pulling image {image:?}");
            self.event(Some(field.clone()), Severity::Normal, "BackOff", message);
            self.event(Some(field), Severity::Warning, "Failed", "Error: ImagePullBackOff".to_owned());
        }
    }

    fn has_ended(&mut self, index: usize, ended: &Ended) {
        let label = self.label();
        let Some(slot) = self.slots.get_mut(index) else { return };
        let dir = Start::container_dir(&self.context, &self.pod, slot.name());
        let left = slot.container.as_ref().and_then(|c| start::termination_message(&dir, &slot.spec, c, ended.code));
        slot.end(ended, left);
        if !self.is_deleted() && self.restarts_after(index, Some(ended.code)) {
            let Some(slot) = self.slots.get_mut(index) else { return };
            let wait = slot.schedule_restart(&label);
            if !wait.is_zero() {
                let message = format!("Back-off restarting failed container {} in pod {label}", slot.name());
                let field = Self::field(slot);
                self.event(Some(field), Severity::Warning, "BackOff", message);
            }
        }
    }

    fn has_found(&mut self, index: usize, finding: Finding) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let field = Self::field(slot);
        match finding {
            Finding::Started => slot.started = true,
            Finding::Ready(ready) => slot.ready = ready,
            Finding::Failed("PostStartHook", why) => {
                self.event(
                    Some(field),
                    Severity::Warning,
                    "FailedPostStartHook",
                    format!("PostStartHook failed: {why}"),
                );
            }
            Finding::Failed(kind, why) => {
                self.event(Some(field), Severity::Warning, "Unhealthy", format!("{kind} probe failed: {why}"));
            }
            Finding::Dead(kind) => {
                let name = slot.name().to_owned();
                let container = slot.container.clone();
                slot.probes = None;
                let message = if kind == "PostStartHook" {
                    format!("FailedPostStartHook: Container {name} will be restarted")
                } else {
                    format!("Container {name} failed {} probe, will be restarted", kind.to_lowercase())
                };
                self.event(Some(field), Severity::Normal, "Killing", message);
                let grace = self.grace();
                if let Some(container) = container {
                    self.tasks.spawn(async move {
                        container.terminate();
                        if tokio::time::timeout(grace, container.wait()).await.is_err() {
                            container.kill();
                        }
                    });
                }
            }
        }
    }
}

async fn mount_volumes(
    context: Arc<NodeContext>,
    pod: Arc<Pod>,
    pod_ips: Vec<IpAddr>,
) -> Result<HashMap<String, PathBuf>> {
    let host_ips = context.host_ips();
    let pod_dir = context.layout.pod_run(&pod.uid().unwrap_or_default());
    std::fs::create_dir_all(&pod_dir).with_context(|| format!("create {}", pod_dir.display()))?;
    volumes::prepare(&VolumeContext {
        client: &context.client,
        pod: &pod,
        pod_ips: &pod_ips,
        host_ips: &host_ips,
        pod_dir: &pod_dir,
        host_dir: &context.layout.node_host_dir(&context.node.name),
    })
    .await
}

/// What containerd tells plugins of the annotations (`toCNIBandWidth`). What means nothing is left to the network to refuse.
fn bandwidth(pod: &Pod) -> Option<Value> {
    let asked = AskedBandwidth::of(pod.metadata.annotations.as_ref())?;
    let limits = asked.over(Bandwidth::default(), Bandwidth::default());
    let mut told = serde_json::Map::new();
    for (rate, name, burst) in
        [(limits.ingress, "ingressRate", "ingressBurst"), (limits.egress, "egressRate", "egressBurst")]
    {
        if let Some(rate) = rate {
            told.extend([(name.to_owned(), json!(rate.bits())), (burst.to_owned(), json!(u32::MAX))]);
        }
    }
    (!told.is_empty()).then_some(Value::Object(told))
}
