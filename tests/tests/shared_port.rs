//! Two connections of one pod that reach one backend by two addresses from one port, of sockets that no socket hook sees (the test's
//! own: a sandboxed runtime's are like them). Neither gets the other's answers: the second is refused while the first is open.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(10);
const PORT: u16 = 45678;

const SERVICE: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
"#;

#[test]
fn two_addresses_of_one_backend_from_one_port_are_two_connections() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-port", 2, Families::Ipv4)?;
    // A backend on the node, and one behind another.
    for server_node in ["n1", "n2"] {
        let name = format!("web-{server_node}");
        cluster.apply_text(&(server(&name, server_node, "app: web") + &shell("client", "n1", "") + SERVICE))?;
        let backend = cluster.wait_pod(&name)?;
        let client = Place::of_pod(&cluster, &cluster.wait_pod("client")?)?;
        let service = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
        let node = cluster.nodes()?.into_iter().find(|(node, _)| node == "n2").map(|(_, ip)| ip).unwrap_or_default();
        let (node, pod) = (SocketAddr::new(address(&node)?, 30080), SocketAddr::new(address(&backend.ip)?, 80));
        wait("the Service to have that backend only", PATIENCE, || {
            let answer = client.enter(|| Session::open(service, ANSWER)?.ask(ANSWER))?;
            ensure!(answer.contains(&name), "{answer}");
            client.enter(|| Session::open(node, ANSWER)?.ask(ANSWER))
        })?;
        for (first, others) in [(service, [node, pod]), (node, [service, pod]), (pod, [service, node])] {
            let mut open = client.enter(|| Session::open_from(PORT, first, ANSWER))?;
            open.ask(ANSWER)?;
            for other in others {
                let refused = client.enter(|| Ok(Session::open_from(PORT, other, ANSWER).err()))?;
                let said = refused.map(|error| format!("{error:#}")).unwrap_or_default();
                ensure!(said.contains("ECONNREFUSED"), "{other} beside {first}: {said:?}");
                open.ask(ANSWER)?;
                // From another port there is nothing to tell apart.
                client.enter(|| Session::open(other, ANSWER)?.ask(ANSWER))?;
                open.ask(ANSWER)?;
            }
            drop(open);
            wait("the port to be free", PATIENCE, || {
                client.enter(|| Session::open_from(PORT, others[0], ANSWER)?.ask(ANSWER))
            })?;
            wait("the port to be free again", PATIENCE, || {
                client.enter(|| Session::open_from(PORT, others[1], ANSWER)?.ask(ANSWER))
            })?;
        }
        cluster.try_kubectl(&["delete", "pod", &name, "--wait=true"])?;
    }
    cluster.down()
}
