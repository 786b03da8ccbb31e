//! What is counted as it happens, for the whole process: there is one agent in it. [`crate::metrics`] shows it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use crate::index::Kind;

/// Labels of a metric.
pub(crate) type Labels = Vec<(&'static str, String)>;
/// Durations by labels.
pub(crate) type Durations = Family<Labels, Histogram, fn() -> Histogram>;

/// From half a millisecond to a minute: what a pod's start can feel.
fn seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0])
}

/// How long CNI requests took, by verb.
pub(crate) static CNI_DURATION: LazyLock<Durations> = LazyLock::new(|| Family::new_with_constructor(seconds));
/// How many there were, by verb and outcome.
pub(crate) static CNI_REQUESTS: LazyLock<Family<Labels, Counter>> = LazyLock::new(Family::default);
/// How long planning and applying took, by part: `policy`, `services`, `peers`, `all`.
pub(crate) static APPLY_DURATION: LazyLock<Durations> = LazyLock::new(|| Family::new_with_constructor(seconds));
/// Time to compile what changed of policies, without writing it: from a twentieth of a millisecond on.
pub(crate) static COMPILE_DURATION: LazyLock<Histogram> =
    LazyLock::new(|| Histogram::new((0..16).map(|power| 0.00005 * f64::from(1 << power))));
/// Time to check what was compiled against the policies.
pub(crate) static CHECK_DURATION: LazyLock<Histogram> =
    LazyLock::new(|| Histogram::new((0..16).map(|power| 0.00005 * f64::from(1 << power))));
/// Images that did not say what the policies say.
pub(crate) static MISMATCHES: LazyLock<Counter> = LazyLock::new(Counter::default);
/// Changes that compiling what changed had missed, and a look at everything found.
pub(crate) static MISSED_CHANGES: LazyLock<Counter> = LazyLock::new(Counter::default);
/// Watches that were interrupted, by kind.
pub(crate) static WATCH_ERRORS: LazyLock<Family<Labels, Counter>> = LazyLock::new(Family::default);

/// From the moment that endpoints changed to the moment that the kernel knew: kube-proxy's buckets, and finer ones below them.
pub(crate) static NETWORK_PROGRAMMING: LazyLock<Histogram> = LazyLock::new(|| {
    let fine = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5];
    let seconds = (1..60).map(f64::from);
    let minutes = (60..120).step_by(5).chain((120..=300).step_by(30)).map(f64::from);
    Histogram::new(fine.into_iter().chain(seconds).chain(minutes))
});
/// Time to plan and apply Services: kube-proxy's buckets, a millisecond to 16 seconds.
pub(crate) static SERVICES_DURATION: LazyLock<Histogram> =
    LazyLock::new(|| Histogram::new((0..15).map(|power| 0.001 * f64::from(1 << power))));
/// What was answered in kube-proxy's place, by path and status code.
pub(crate) static PROXY_HEALTH: LazyLock<Family<Labels, Counter>> = LazyLock::new(Family::default);
/// What happened before is no measure of this process.
static STARTED: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

/// Policies were compiled.
pub(crate) fn compiled(took: Duration) {
    COMPILE_DURATION.observe(took.as_secs_f64());
}

/// Services were planned and applied; when what led to it happened, as far as that is known.
pub(crate) fn services_applied(took: Duration, since: &[SystemTime]) {
    SERVICES_DURATION.observe(took.as_secs_f64());
    APPLY_DURATION.get_or_create(&vec![("part", "services".to_owned())]).observe(took.as_secs_f64());
    let now = SystemTime::now();
    for since in since.iter().filter(|since| **since >= *STARTED) {
        // A clock that is ahead of ours says nothing.
        if let Ok(duration) = now.duration_since(*since) {
            NETWORK_PROGRAMMING.observe(duration.as_secs_f64());
        }
    }
}

/// Labels of [`PROXY_HEALTH`].
pub(crate) fn health_labels(path: &str, code: &str) -> Labels {
    vec![("path", path.to_owned()), ("code", code.to_owned())]
}

/// Notes when the process began.
pub(crate) fn begin() {
    LazyLock::force(&STARTED);
}

/// How a CNI request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As asked.
    Success,
    /// The pod asks for what it cannot have, which only who made it can change.
    Refused,
    /// Not.
    Error,
}

impl Outcome {
    pub(crate) const ALL: [Self; 3] = [Self::Success, Self::Refused, Self::Error];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Error => "error",
        }
    }
}

/// A CNI request is done.
pub(crate) fn cni(verb: &'static str, took: Duration, outcome: Outcome) {
    let outcome = outcome.label();
    CNI_DURATION.get_or_create(&vec![("verb", verb.to_owned())]).observe(took.as_secs_f64());
    CNI_REQUESTS.get_or_create(&vec![("verb", verb.to_owned()), ("outcome", outcome.to_owned())]).inc();
}

/// A part was planned and applied.
pub(crate) fn applied(part: &'static str, took: Duration) {
    APPLY_DURATION.get_or_create(&vec![("part", part.to_owned())]).observe(took.as_secs_f64());
}

/// What is known of one watch.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    /// When it last brought something.
    pub(crate) heard: Option<SystemTime>,
    /// The same by the clock that nobody sets.
    pub(crate) heard_at: Option<Instant>,
    /// Why it was interrupted, until it brings something again.
    pub(crate) trouble: Option<String>,
}

static WATCHES: Mutex<BTreeMap<Kind, Watch>> = Mutex::new(BTreeMap::new());
/// What is wrong and lasts, by what it is about.
static NOTES: Mutex<BTreeMap<&'static str, String>> = Mutex::new(BTreeMap::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A watch brought something.
pub(crate) fn heard(kind: Kind) {
    let (heard, heard_at) = (Some(SystemTime::now()), Some(Instant::now()));
    locked(&WATCHES).insert(kind, Watch { heard, heard_at, trouble: None });
}

/// When any watch last brought something.
pub(crate) fn last_heard() -> Option<Instant> {
    locked(&WATCHES).values().filter_map(|watch| watch.heard_at).max()
}

/// A watch was interrupted.
pub(crate) fn interrupted(kind: Kind, error: &impl fmt::Display) {
    WATCH_ERRORS.get_or_create(&vec![("kind", format!("{kind:?}"))]).inc();
    locked(&WATCHES).entry(kind).or_default().trouble = Some(error.to_string());
}

/// All watches.
pub(crate) fn watches() -> BTreeMap<Kind, Watch> {
    locked(&WATCHES).clone()
}

/// What the API server said when it was last asked for lists that are still missing; nothing when it said nothing bad.
pub(crate) fn trouble(missing: &[Kind]) -> Option<String> {
    let watches = locked(&WATCHES);
    missing.iter().find_map(|kind| watches.get(kind)?.trouble.clone())
}

/// Notes what is wrong until further notice, or that it no longer is.
pub(crate) fn note(about: &'static str, wrong: Option<String>) {
    match wrong {
        Some(wrong) => drop(locked(&NOTES).insert(about, wrong)),
        None => drop(locked(&NOTES).remove(about)),
    }
}

/// All that is noted.
pub(crate) fn notes() -> Vec<String> {
    locked(&NOTES).values().cloned().collect()
}
