//! What every cluster has from the start: system namespaces, the RBAC roles people rely on, the ranges of Services
//! (`ServiceCIDR` `kubernetes`), the Service `default/kubernetes` with its endpoints; and the hourly end of old events.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::meta;
use crate::rest::{Call, Changed, CreateOptions, Tracking, UpdateOptions, create_object, update_object};
use crate::server::{Core, StartError};
use crate::status::ApiError;
use crate::store::Key;

const RBAC: &str = "rbac.authorization.k8s.io";
/// How long events are kept, as kube-apiserver's `--event-ttl`.
const EVENT_SECONDS: i64 = 3600;
const EVENT_SWEEP: Duration = Duration::from_secs(300);
/// How long a failed restoration of `default/kubernetes` rests.
const RETRY: Duration = Duration::from_secs(1);

pub(crate) async fn run(core: &Arc<Core>) -> Result<(), StartError> {
    let result = async {
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            ensure(core, "", "namespaces", json!({"metadata": {"name": name}})).await?;
        }
        for (plural, object) in roles() {
            ensure(core, RBAC, plural, object).await?;
        }
        ensure(core, "networking.k8s.io", "servicecidrs", core.services.first_object()).await?;
        kubernetes_service(core).await
    };
    result.await.map_err(|error: ApiError| StartError::Bootstrap(error.to_string()))?;
    let shared = Arc::clone(core);
    core.spawn(async move {
        loop {
            tokio::time::sleep(EVENT_SWEEP).await;
            expire_events(&shared);
        }
    });
    core.spawn(keep_kubernetes_service(Arc::clone(core)));
    Ok(())
}

/// Makes the Service `default/kubernetes` and its endpoints again when somebody deletes or changes them.
async fn keep_kubernetes_service(core: Arc<Core>) {
    let tables = [("", "services"), ("", "endpoints"), ("discovery.k8s.io", "endpointslices")];
    let mut changes = tables.map(|(group, plural)| core.store.subscribe(&core.storage_key(group, plural)));
    let key = Key::new("default", "kubernetes");
    let state = || {
        tables
            .map(|(group, plural)| core.store.get(&core.storage_key(group, plural), &key).map(|stored| stored.version))
    };
    let mut known = state();
    loop {
        let [services, endpoints, slices] = &mut changes;
        let changed = tokio::select! {
            changed = services.changed() => changed,
            changed = endpoints.changed() => changed,
            changed = slices.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        let now = state();
        if now == known {
            continue;
        }
        if let Err(error) = kubernetes_service(&core).await {
            tracing::warn!(%error, "the Service default/kubernetes cannot be restored");
            tokio::time::sleep(RETRY).await;
        }
        // Our own writes come round once more and find nothing to do.
        known = now;
    }
}

/// Creates an object unless it is there; kinds that are not served are passed over.
async fn ensure(core: &Arc<Core>, group: &str, plural: &str, object: Value) -> Result<(), ApiError> {
    let Some(kind) = core.registry.served().any_version(group, plural) else { return Ok(()) };
    let call = Call::internal(core, kind, meta::namespace(&object));
    // Asked before: of a Service that is there the address is refused first.
    let key = Key::new(meta::namespace(&object), meta::name(&object));
    if core.store.get(&call.kind.storage_key, &key).is_some() {
        return Ok(());
    }
    match create_object(&call, object, CreateOptions { tracking: Tracking::Untracked }).await {
        Err(error) if error.reason == "AlreadyExists" => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Creates an object or makes these fields of it what they should be.
async fn enforce(core: &Arc<Core>, group: &str, plural: &str, object: Value, fields: &[&str]) -> Result<(), ApiError> {
    ensure(core, group, plural, object.clone()).await?;
    let Some(kind) = core.registry.served().any_version(group, plural) else { return Ok(()) };
    let call = Call::internal(core, kind, meta::namespace(&object));
    let options = UpdateOptions { subresource: "", tracking: Tracking::Untracked };
    let change = |old: &Value| {
        let mut new = old.clone();
        for field in fields {
            if let Some(value) = object.get(*field) {
                meta::as_map(&mut new).insert((*field).to_owned(), value.clone());
            }
        }
        Ok(Changed { object: new, check_fields: false })
    };
    update_object(&call, meta::name(&object), &options, change).await.map(|_| ())
}

async fn kubernetes_service(core: &Arc<Core>) -> Result<(), ApiError> {
    let port = core.config.advertise.first().map_or(6443, |(_, port)| *port);
    let Some(address) = core.services.first_addresses().first().copied() else { return Ok(()) };
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {"type": "ClusterIP", "clusterIP": address.to_string(), "sessionAffinity": "None",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]},
    });
    ensure(core, "", "services", service).await?;
    let matching: Vec<String> = core
        .config
        .advertise
        .iter()
        .filter(|(advertised, _)| advertised.is_ipv4() == address.is_ipv4())
        .map(|(advertised, _)| advertised.to_string())
        .collect();
    if matching.is_empty() {
        return Ok(());
    }
    let kind = if matches!(address, IpAddr::V4(_)) { "IPv4" } else { "IPv6" };
    let endpoints: Vec<Value> =
        matching.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}})).collect();
    let ports = json!([{"name": "https", "port": port, "protocol": "TCP"}]);
    let slice = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": kind, "endpoints": endpoints, "ports": ports,
    });
    enforce(core, "discovery.k8s.io", "endpointslices", slice, &["endpoints", "ports"]).await?;
    let addresses: Vec<Value> = matching.iter().map(|address| json!({"ip": address})).collect();
    let object = json!({
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": addresses, "ports": ports}],
    });
    enforce(core, "", "endpoints", object, &["subsets"]).await
}

fn role(name: &str, rules: Value) -> (&'static str, Value) {
    (
        "clusterroles",
        json!({"metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}}, "rules": rules}),
    )
}

fn bind(role: &str, groups: &[&str]) -> (&'static str, Value) {
    let subjects: Vec<Value> =
        groups.iter().map(|group| json!({"kind": "Group", "name": group, "apiGroup": RBAC})).collect();
    (
        "clusterrolebindings",
        json!({
            "metadata": {"name": role, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}, "subjects": subjects,
        }),
    )
}

fn roles() -> Vec<(&'static str, Value)> {
    let health = json!(["/healthz", "/livez", "/readyz", "/version", "/version/"]);
    let discovery = json!([
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/"
    ]);
    let reviews = ["selfsubjectaccessreviews", "selfsubjectrulesreviews"];
    let mut all = vec![
        role(
            "cluster-admin",
            json!([
                {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}, {"nonResourceURLs": ["*"], "verbs": ["*"]},
            ]),
        ),
        bind("cluster-admin", &["system:masters"]),
        role("system:discovery", json!([{"nonResourceURLs": discovery, "verbs": ["get"]}])),
        bind("system:discovery", &["system:authenticated"]),
        role("system:public-info-viewer", json!([{"nonResourceURLs": health, "verbs": ["get"]}])),
        bind("system:public-info-viewer", &["system:authenticated", "system:unauthenticated"]),
        role(
            "system:basic-user",
            json!([
                {"apiGroups": ["authorization.k8s.io"], "resources": reviews, "verbs": ["create"]},
                {"apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"]},
            ]),
        ),
        bind("system:basic-user", &["system:authenticated"]),
    ];
    all.extend(user_roles());
    all
}

/// `view`, `edit` and `admin`: read, write, and roles too, within namespaces.
fn user_roles() -> Vec<(&'static str, Value)> {
    let core = [
        "bindings",
        "configmaps",
        "endpoints",
        "events",
        "persistentvolumeclaims",
        "pods",
        "pods/log",
        "pods/status",
        "replicationcontrollers",
        "replicationcontrollers/scale",
        "services",
        "services/status",
        "serviceaccounts",
        "limitranges",
        "resourcequotas",
        "namespaces",
    ];
    let apps = [
        "daemonsets",
        "deployments",
        "deployments/scale",
        "replicasets",
        "replicasets/scale",
        "statefulsets",
        "statefulsets/scale",
        "controllerrevisions",
    ];
    let network = ["ingresses", "networkpolicies"];
    let read = ["get", "list", "watch"];
    let write = ["create", "delete", "deletecollection", "patch", "update"];
    let view = json!([
        {"apiGroups": [""], "resources": core, "verbs": read},
        {"apiGroups": ["apps"], "resources": apps, "verbs": read},
        {"apiGroups": ["batch"], "resources": ["jobs", "cronjobs"], "verbs": read},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
        {"apiGroups": ["networking.k8s.io"], "resources": network, "verbs": read},
        {"apiGroups": ["policy"], "resources": ["poddisruptionbudgets"], "verbs": read},
        {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"], "verbs": read},
    ]);
    let written = [
        "configmaps",
        "endpoints",
        "events",
        "persistentvolumeclaims",
        "pods",
        "replicationcontrollers",
        "secrets",
        "serviceaccounts",
        "services",
    ];
    let edit = json!([
        {"apiGroups": [""], "resources": written, "verbs": write},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": read},
        {"apiGroups": [""], "resources": ["pods/attach", "pods/exec", "pods/portforward", "pods/eviction"],
            "verbs": ["get", "create"]},
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
        {"apiGroups": ["apps"], "resources": apps, "verbs": write},
        {"apiGroups": ["batch"], "resources": ["jobs", "cronjobs"], "verbs": write},
        {"apiGroups": ["networking.k8s.io"], "resources": network, "verbs": write},
        {"apiGroups": ["policy"], "resources": ["poddisruptionbudgets"], "verbs": write},
        {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"], "verbs": write},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"]},
    ]);
    let admin = json!([
        {"apiGroups": [RBAC], "resources": ["roles", "rolebindings"], "verbs": ["*"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["localsubjectaccessreviews"], "verbs": ["create"]},
    ]);
    let mut out = Vec::new();
    for (name, into, rules) in [("view", "edit", view), ("edit", "admin", edit), ("admin", "", admin)] {
        let label = format!("rbac.authorization.k8s.io/aggregate-to-{name}");
        let inner_name = format!("system:aggregate-to-{name}");
        let (plural, mut inner) = role(&inner_name, rules);
        let mut labels = json!({"kubernetes.io/bootstrapping": "rbac-defaults", &label: "true"});
        // What one may view one may also edit, and what one may edit one may administer.
        for further in match into {
            "edit" => ["edit", "admin"].as_slice(),
            "admin" => &["admin"],
            _ => &[],
        } {
            let label = format!("rbac.authorization.k8s.io/aggregate-to-{further}");
            meta::as_map(&mut labels).insert(label, "true".into());
        }
        meta::set_meta(&mut inner, "labels", labels);
        out.push((plural, inner));
        let (plural, mut outer) = role(name, json!([]));
        let rule = json!({"clusterRoleSelectors": [{"matchLabels": {&label: "true"}}]});
        meta::as_map(&mut outer).insert("aggregationRule".to_owned(), rule);
        out.push((plural, outer));
    }
    out
}

/// Removes events whose last occurrence is too old.
fn expire_events(core: &Core) {
    let table = core.storage_key("", "events");
    let oldest = Timestamp::now().as_second() - EVENT_SECONDS;
    for stored in core.store.list(&table, None).0 {
        let Ok(event) = stored.value() else { continue };
        let times = [
            "/lastTimestamp",
            "/deprecatedLastTimestamp",
            "/series/lastObservedTime",
            "/eventTime",
            "/metadata/creationTimestamp",
        ];
        let last = times
            .iter()
            .filter_map(|pointer| meta::text(&event, pointer).parse::<Timestamp>().ok())
            .map(Timestamp::as_second)
            .max();
        if last.is_some_and(|last| last < oldest) {
            let key = stored.key.clone();
            if core.store.remove(&table, &key, event, stored.version).is_err() {
                tracing::debug!(event = %key.name, "an old event changed while it was removed and stays");
            }
        }
    }
}
