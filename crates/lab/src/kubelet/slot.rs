//! One container of a pod over all its restarts: what it is in, what it was in, when it may start again.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as ContainerSpec, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::time::Instant;

use crate::runtime::container::{Container, Ended};
use crate::runtime::image;

/// First and longest wait before a restart, and how long a container must have run for the wait to start over: the
/// kubelet's figures.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
const BACKOFF_RESET: Duration = Duration::from_secs(600);

/// What a container is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs to its end before the next.
    Init,
    /// An init container with `restartPolicy: Always`: goes on beside the main ones.
    Sidecar,
    /// One of `spec.containers`.
    Main,
}

/// What a container is in.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Not started, or to be started again.
    Waiting { reason: String, message: Option<String> },
    /// Being started; shown as waiting.
    Starting { reason: String },
    /// Running.
    Running,
    /// Ended.
    Terminated(ContainerStateTerminated),
}

/// A container and its history.
pub(crate) struct Slot {
    /// Its declaration.
    pub(crate) spec: ContainerSpec,
    /// Its role.
    pub(crate) kind: Kind,
    /// What it is in.
    pub(crate) state: State,
    /// How the instance before ended.
    pub(crate) last: Option<ContainerStateTerminated>,
    /// Restarts so far.
    pub(crate) restarts: i32,
    /// Whether an instance has ever been started (in this or an earlier run of the lab).
    pub(crate) ever_started: bool,
    /// Readiness.
    pub(crate) ready: bool,
    /// Whether the startup probe has passed.
    pub(crate) started: bool,
    /// The running instance, or the last one.
    pub(crate) container: Option<Container>,
    /// Number of the instance; messages of older ones are stale.
    pub(crate) instance: u64,
    /// When it may start; none: now.
    pub(crate) not_before: Option<Instant>,
    /// Ends the instance's probes when dropped.
    pub(crate) probes: Option<tokio_util::task::AbortOnDropHandle<()>>,
    delay: Duration,
    failures: u32,
}

impl Slot {
    /// A container that waits for its first start. `before` is its status of an earlier run.
    pub(crate) fn new(spec: ContainerSpec, kind: Kind, before: Option<&ContainerStatus>) -> Self {
        let reason = if kind == Kind::Main { "ContainerCreating" } else { "PodInitializing" };
        let ran = before.is_some_and(|b| b.container_id.as_deref().is_some_and(|id| !id.is_empty()));
        let last = before.filter(|_| ran).and_then(|b| {
            let state = b.state.clone().unwrap_or_default();
            let lost = state.running.map(|running| ContainerStateTerminated {
                container_id: b.container_id.clone(),
                exit_code: 255,
                reason: Some("Unknown".to_owned()),
                message: Some("the lab was stopped while the container ran".to_owned()),
                started_at: running.started_at,
                finished_at: Some(Time(Timestamp::now())),
                ..ContainerStateTerminated::default()
            });
            state.terminated.or(lost).or_else(|| b.last_state.clone().and_then(|l| l.terminated))
        });
        Self {
            spec,
            kind,
            state: State::Waiting { reason: reason.to_owned(), message: None },
            last,
            restarts: before.map_or(0, |b| b.restart_count),
            ever_started: ran,
            ready: false,
            started: false,
            container: None,
            instance: 0,
            not_before: None,
            probes: None,
            delay: Duration::ZERO,
            failures: 0,
        }
    }

    /// The name.
    pub(crate) fn name(&self) -> &str {
        &self.spec.name
    }

    /// Whether it runs.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running)
    }

    /// The exit code, when it has ended.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        match &self.state {
            State::Terminated(t) => Some(t.exit_code),
            _ => None,
        }
    }

    /// Whether it waits and may be started now.
    pub(crate) fn is_due(&self) -> bool {
        !matches!(self.state, State::Starting { .. } | State::Running)
            && self.not_before.is_none_or(|at| at <= Instant::now())
    }

    /// A start begins: an instance that follows another counts as a restart.
    pub(crate) fn begin(&mut self) -> u64 {
        if let State::Terminated(t) = &self.state {
            self.last = Some(t.clone());
        }
        if self.ever_started {
            self.restarts += 1;
        }
        let reason = match &self.state {
            State::Waiting { reason, .. } => reason.clone(),
            _ => "ContainerCreating".to_owned(),
        };
        self.state = State::Starting { reason };
        self.not_before = None;
        self.instance += 1;
        self.instance
    }

    /// A start failed before anything ran. Returns whether it is the first failure in a row.
    pub(crate) fn fail(&mut self, reason: &str, message: String) -> bool {
        if self.ever_started {
            self.restarts -= 1;
        }
        self.failures += 1;
        let first = self.failures == 1;
        let shown = if reason == "ErrImagePull" && !first { "ImagePullBackOff" } else { reason };
        let doubled = Duration::from_secs(1 << self.failures.min(8));
        self.not_before = Some(Instant::now() + doubled.min(BACKOFF.1));
        self.state = State::Waiting { reason: shown.to_owned(), message: Some(message) };
        first
    }

    /// An instance runs.
    pub(crate) fn run(&mut self, container: Container) {
        self.failures = 0;
        self.ever_started = true;
        self.started = false;
        self.ready = false;
        self.container = Some(container);
        self.state = State::Running;
    }

    /// The instance has ended; `message` is what it left in its termination message file.
    pub(crate) fn end(&mut self, ended: &Ended, message: Option<String>) {
        self.probes = None;
        self.ready = false;
        self.started = false;
        let started = self.container.as_ref().map(Container::started);
        let reason = if ended.code == 0 { "Completed" } else { "Error" };
        self.state = State::Terminated(ContainerStateTerminated {
            container_id: self.container.as_ref().map(container_id),
            exit_code: ended.code,
            reason: Some(reason.to_owned()),
            message,
            started_at: started.map(Time),
            finished_at: Some(Time(ended.at)),
            ..ContainerStateTerminated::default()
        });
    }

    /// Decides when an ended container starts again: at once the first time, then after 10 s, 20 s … 5 min. Returns the wait.
    pub(crate) fn schedule_restart(&mut self, pod: &str) -> Duration {
        let State::Terminated(ended) = &self.state else { return Duration::ZERO };
        let ran = match (&ended.started_at, &ended.finished_at) {
            (Some(from), Some(to)) => Duration::try_from(to.0.duration_since(from.0)).unwrap_or_default(),
            _ => Duration::ZERO,
        };
        if ran >= BACKOFF_RESET {
            self.delay = Duration::ZERO;
        }
        let wait = self.delay;
        self.delay = (wait * 2).clamp(BACKOFF.0, BACKOFF.1);
        if !wait.is_zero() {
            self.last = Some(ended.clone());
            self.not_before = Some(Instant::now() + wait);
            self.state = State::Waiting {
                reason: "CrashLoopBackOff".to_owned(),
                message: Some(format!(
                    "back-off {}s restarting failed container={} pod={pod}",
                    wait.as_secs(),
                    self.spec.name
                )),
            };
        }
        wait
    }

    /// Its entry in `status.containerStatuses`.
    pub(crate) fn status(&self) -> ContainerStatus {
        let waiting = |reason: &str, message: &Option<String>| ContainerState {
            waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message: message.clone() }),
            ..ContainerState::default()
        };
        let state = match &self.state {
            State::Waiting { reason, message } => waiting(reason, message),
            State::Starting { reason } => waiting(reason, &None),
            State::Running => ContainerState {
                running: Some(ContainerStateRunning { started_at: self.container.as_ref().map(|c| Time(c.started())) }),
                ..ContainerState::default()
            },
            State::Terminated(t) => ContainerState { terminated: Some(t.clone()), ..ContainerState::default() },
        };
        let last_id = self.last.as_ref().and_then(|l| l.container_id.clone());
        let reference = self.spec.image.clone().unwrap_or_default();
        let ready = match self.kind {
            Kind::Init => self.exit_code() == Some(0),
            Kind::Sidecar | Kind::Main => self.ready,
        };
        ContainerStatus {
            name: self.spec.name.clone(),
            image: image::canonical(&reference),
            image_id: if self.ever_started {
                format!("towpath-lab://{}", image::canonical(&reference))
            } else {
                String::new()
            },
            container_id: self.container.as_ref().map(container_id).or(last_id),
            ready,
            started: Some(match self.kind {
                Kind::Init => self.is_running(),
                _ => self.started,
            }),
            restart_count: self.restarts,
            state: Some(state),
            last_state: Some(ContainerState { terminated: self.last.clone(), ..ContainerState::default() }),
            ..ContainerStatus::default()
        }
    }
}

/// The container's id with the runtime's name, as `status` has it.
fn container_id(container: &Container) -> String {
    format!("towpath-lab://{}", container.id())
}
