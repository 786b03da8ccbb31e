//! Services of type LoadBalancer.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Hope, fetch, fetch_from_host};
use crate::cluster::{Cluster, field, host, wait};
use crate::log::Log;

/// The first address of a Service's load balancer, once there is one.
///
/// # Errors
/// There is none in time; what the status says instead is in the message.
pub fn balancer_address(cluster: &Cluster, service: &str) -> Result<String> {
    wait(&format!("an address of Service {service}"), Duration::from_secs(10), || {
        let object = cluster.get("svc", service)?;
        let address = field(&object, "/status/loadBalancer/ingress/0/ip");
        if address.is_empty() { bail!("status: {}", field(&object, "/status")) } else { Ok(address) }
    })
}

pub(super) fn w13(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w13-backend.yaml")?;
    cluster.kubectl(log, &["create", "service", "loadbalancer", "my-service", "--tcp=80:8080"])?;
    cluster.wait_ready("app=backend", 2)?;
    cluster.wait_ready("app=my-service", 1)?;
    let pool = field(&cluster.get("addresspool", "lab")?, "/spec/addresses");
    for (service, pods) in [("myservice", "backend-"), ("my-service", "my-service-")] {
        let address = balancer_address(cluster, service)?;
        let url = format!("http://{}/", host(&address));
        // A node announces an address a moment after the Service has it.
        let outcome = wait(&url, Duration::from_secs(5), || {
            let said = cluster.outside(&fetch_from_host(&url))?;
            if said.ok && said.out.contains(pods) { Ok(()) } else { bail!("{}", said.all()) }
        });
        let outcome = outcome.map_err(|error| format!("{error:#}"));
        log.check(format!("Service {service} has {address} of pool {pool} and answers from outside"), outcome);
        for (place, said) in
            [("a pod", cluster.exec("near", &fetch(&url))?), ("a node", cluster.node("n1", &fetch_from_host(&url))?)]
        {
            log.expect(format!("{url} from {place}"), said.ok && said.out.contains(pods), said.all());
        }
        let said = cluster.outside(&Hope::Silence.ping(&address))?;
        log.expect(format!("ping {address} from outside gets no reply"), !said.ok, said.all());
    }
    Ok(())
}
