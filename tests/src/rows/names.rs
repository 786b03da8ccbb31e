//! DNS.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::cluster::{Cluster, field, wait};
use crate::log::Log;

pub(super) fn w5(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let dns = field(&cluster.get("svc/kube-dns", "--namespace=kube-system")?, "/spec/clusterIP");
    let said = cluster.exec("near", "cat /etc/resolv.conf")?;
    log.expect(
        format!("/etc/resolv.conf names the DNS Service {dns}"),
        !dns.is_empty() && said.out.lines().any(|l| l.trim() == format!("nameserver {dns}")),
        said.all(),
    );
    let address = field(&cluster.get("svc", "httpd-svc")?, "/spec/clusterIP");
    for name in ["httpd-svc", "httpd-svc.default.svc.cluster.local"] {
        for pod in ["near", "far"] {
            // Debian's busybox nslookup does not walk the search list; ping's resolver does.
            let said = if name.contains('.') {
                cluster.exec(pod, &format!("timeout 5 nslookup {name}"))?
            } else {
                cluster.exec(
                    pod,
                    &format!("timeout 5 ping -c 1 -W 1 {name}; timeout 5 nslookup {name}.default.svc.cluster.local"),
                )?
            };
            log.expect(format!("{name} resolves to {address} in pod {pod}"), said.out.contains(&address), said.all());
        }
    }
    let said = cluster.exec("near", "timeout 5 nslookup no-such-service.default.svc.cluster.local")?;
    log.expect("a name that does not exist is NXDOMAIN", said.all().contains("NXDOMAIN"), said.all());
    Ok(())
}

pub(super) fn w14(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w14-external-name.yaml")?;
    let outcome = wait("the alias", Duration::from_secs(5), || {
        let said = cluster.exec("near", "timeout 5 nslookup elsewhere.default.svc.cluster.local")?;
        let all = said.all();
        if all.contains("canonical name = httpd-svc.default.svc.cluster.local") { Ok(()) } else { bail!("{all}") }
    });
    log.check("the name answers with a CNAME", outcome.map_err(|e| format!("{e:#}")));
    let said = cluster.exec("near", "timeout 4 wget -q -O - http://elsewhere:8080/")?;
    log.expect("and leads where the other name leads", said.ok && said.out.contains("httpd-"), said.all());
    Ok(())
}

pub(super) fn w16(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w16-headless.yaml")?;
    let pods = cluster.wait_ready("app=db", 2)?;
    let outcome = wait("both addresses", Duration::from_secs(5), || {
        let said = cluster.exec("far", "timeout 5 nslookup db.default.svc.cluster.local")?;
        if pods.iter().all(|p| said.out.contains(&p.ip)) { Ok(()) } else { bail!("{}", said.all()) }
    });
    log.check("the Service's name answers with the pods' addresses", outcome.map_err(|e| format!("{e:#}")));
    for pod in &pods {
        let said = cluster.exec("far", &format!("timeout 5 nslookup {}.db.default.svc.cluster.local", pod.name))?;
        log.expect(format!("{}.db answers with {}", pod.name, pod.ip), said.out.contains(&pod.ip), said.all());
    }
    cluster.kubectl(log, &["delete", "statefulset", "db", "--wait=false"])?;
    Ok(())
}
