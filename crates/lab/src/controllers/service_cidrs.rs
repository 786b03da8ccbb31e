//! `ServiceCIDR`s: ready while they are there, and gone only when no Service has an address of theirs any more (KEP-1880).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use kube::ResourceExt;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use serde_json::{Value, json};

use super::{Context, Error, drive, gone_is_fine};

/// What keeps an object until its addresses are given back, as kube-controller-manager names it.
const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
/// An object that waits for its addresses is looked at again.
const AGAIN: Duration = Duration::from_millis(500);

pub(super) async fn run(context: Arc<Context>) {
    let all: Api<ServiceCIDR> = Api::all(context.client.clone());
    let controller = Controller::new(all, watcher::Config::default());
    drive("servicecidr", controller, context, |object, context| async move { reconcile(&object, &context).await })
        .await;
}

async fn reconcile(object: &ServiceCIDR, context: &Context) -> Result<Action, Error> {
    let api: Api<ServiceCIDR> = Api::all(context.client.clone());
    if object.metadata.deletion_timestamp.is_none() {
        if !object.finalizers().iter().any(|name| name == FINALIZER) {
            let finalizers: Vec<&str> = object.finalizers().iter().map(String::as_str).chain([FINALIZER]).collect();
            set_finalizers(&api, object, &finalizers).await?;
        }
        say(&api, object, "True", "", "Kubernetes Service CIDR is ready").await?;
        return Ok(Action::await_change());
    }
    if !object.finalizers().iter().any(|name| name == FINALIZER) {
        return Ok(Action::await_change());
    }
    let held: Vec<IpAddr> = addresses(context).await?;
    let others: Vec<IpNet> = api
        .list(&ListParams::default())
        .await?
        .iter()
        .filter(|other| other.metadata.deletion_timestamp.is_none())
        .flat_map(ranges)
        .collect();
    let orphans = |address: &IpAddr| {
        ranges(object).iter().any(|range| range.contains(address))
            && !others.iter().any(|range| range.contains(address))
    };
    if held.iter().any(orphans) {
        let why =
            "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
        say(&api, object, "False", "Terminating", why).await?;
        return Ok(Action::requeue(AGAIN));
    }
    let rest: Vec<&str> = object.finalizers().iter().map(String::as_str).filter(|name| *name != FINALIZER).collect();
    set_finalizers(&api, object, &rest).await?;
    Ok(Action::await_change())
}

fn ranges(object: &ServiceCIDR) -> Vec<IpNet> {
    let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_ref()).into_iter().flatten();
    texts.filter_map(|text| text.parse().ok()).collect()
}

async fn addresses(context: &Context) -> Result<Vec<IpAddr>, Error> {
    let all = Api::<IPAddress>::all(context.client.clone()).list(&ListParams::default()).await?;
    Ok(all.iter().filter_map(|object| object.name_any().parse().ok()).collect())
}

/// Held to the version that was looked at: another's change is looked at first.
async fn set_finalizers(api: &Api<ServiceCIDR>, object: &ServiceCIDR, finalizers: &[&str]) -> Result<(), Error> {
    let patch = json!({"metadata": {"resourceVersion": object.resource_version(), "finalizers": finalizers}});
    Ok(gone_is_fine(api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?)
}

async fn say(
    api: &Api<ServiceCIDR>,
    object: &ServiceCIDR,
    status: &str,
    reason: &str,
    message: &str,
) -> Result<(), Error> {
    let conditions = object.status.as_ref().and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    let said = |c: &&_| -> bool {
        let c: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition = c;
        c.type_ == "Ready" && c.status == status && c.reason == reason
    };
    if conditions.clone().any(|condition| said(&condition)) {
        return Ok(());
    }
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let mut all: Vec<Value> = Vec::new();
    for other in conditions.filter(|condition| condition.type_ != "Ready") {
        all.push(serde_json::to_value(other)?);
    }
    all.push(
        json!({"type": "Ready", "status": status, "reason": reason, "message": message, "lastTransitionTime": now}),
    );
    let patch = json!({"status": {"conditions": all}});
    Ok(gone_is_fine(api.patch_status(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?)
}
