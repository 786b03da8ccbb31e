//! Kernel tables of Services filled to their last entry: what is there goes on, over an agent's death too; what finds no room is told so
//! by an Event that names the limit and where it is raised; and it is served when there is room again.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(20);
/// Refusals are said when they have stood for a moment.
const SAID: Duration = Duration::from_secs(30);
/// A table of Maglev's takes 1,021 places.
const LIMITS: &str = r#"limits={"services":120,"slots":1500,"backends":40}"#;

const SERVICES: &str = r"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
";

/// Of the endpoints of `web`, too.
const EXTRA: &str = r"---
apiVersion: v1
kind: Service
metadata: {name: extra}
spec: {selector: {app: web}, ports: [{port: 80}]}
";

/// Sixty endpoints, more than there may be backends.
fn too_many_backends() -> String {
    let endpoints: Vec<String> = (1..=60).map(|n| format!("{{addresses: [\"10.244.200.{n}\"]}}")).collect();
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: many}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: many-1, labels: {{kubernetes.io/service-name: many}}}}\naddressType: IPv4\n\
         ports: [{{name: http, protocol: TCP, port: 80}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

/// A backend for each of forty ports: with those that are there already, the last ones find no room, and there is none left.
fn last_backends() -> String {
    let ports = |more: &str| {
        let ports: Vec<String> = (1..=40).map(|n| format!("{{name: p{n}, port: {}{more}}}", 2000 + n)).collect();
        ports.join(", ")
    };
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: fill}}\nspec: {{ports: [{}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: fill-1, labels: {{kubernetes.io/service-name: fill}}}}\naddressType: IPv4\n\
         ports: [{}]\nendpoints: [{{addresses: [\"10.244.201.1\"]}}]\n",
        ports(""),
        ports(", protocol: TCP")
    )
}

/// Of the endpoints of `web`, so that only the places in a list are new.
fn too_many_slots(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, annotations: {{towpath.dev/lb-algorithm: maglev}}}}\nspec:\n  \
         selector: {{app: web}}\n  ports: [{{port: 80}}]\n"
    )
}

fn too_many_ranges() -> String {
    let ranges: Vec<String> = (1..=150).map(|n| format!("198.51.100.{n}/32")).collect();
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: ranged}}\nspec:\n  type: LoadBalancer\n  \
         loadBalancerSourceRanges: [{}]\n  selector: {{app: web}}\n  ports: [{{port: 80}}]\n",
        ranges.join(", ")
    )
}

fn too_many_ports() -> String {
    let ports: Vec<String> = (1..=150).map(|n| format!("{{name: p{n}, port: {}, targetPort: 80}}", 1000 + n)).collect();
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: ports}}\nspec:\n  selector: {{app: web}}\n  ports: [{}]\n",
        ports.join(", ")
    )
}

/// A Service of one endpoint.
fn small(name: &str) -> String {
    server(name, "n2", &format!("app: {name}"))
        + &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  selector: {{app: {name}}}\n  ports: [{{port: 80}}]\n"
        )
}

/// The Event that says which table has no room for this Service, and which limit to raise where.
fn is_said(cluster: &Cluster, service: &str, map: &str, limit: &str) -> Result<()> {
    wait(&format!("an Event that {service} finds no room in {map}"), SAID, || {
        let events = cluster.list("events", "")?;
        let about = events.iter().filter(|event| {
            let named = [field(event, "/involvedObject/name"), field(event, "/regarding/name")];
            named.contains(&service.to_owned()) && field(event, "/reason") == "TableFull"
        });
        let notes: Vec<String> = about.map(|e| [field(e, "/note"), field(e, "/message")].concat()).collect();
        let says = |note: &String| [map, limit, "agent.yaml"].iter().all(|word| note.contains(word));
        if notes.iter().any(says) { Ok(()) } else { bail!("{notes:?}") }
    })
}

struct Scene {
    cluster: Cluster,
    near: Place,
    outside: Place,
    web: SocketAddr,
    port: SocketAddr,
}

impl Scene {
    fn vip(&self, service: &str) -> Result<SocketAddr> {
        Ok(SocketAddr::new(address(&field(&self.cluster.get("svc", service)?, "/spec/clusterIP"))?, 80))
    }

    fn answers(&self, service: &str) -> Result<String> {
        let to = self.vip(service)?;
        self.near.enter(|| Session::open(to, ANSWER)?.ask(ANSWER))
    }

    fn fill_and_empty(&self) -> Result<()> {
        let cluster = &self.cluster;
        cluster.apply_text(&[too_many_backends(), too_many_slots("first"), too_many_ranges()].concat())?;
        wait("the first table of Maglev's", PATIENCE, || self.answers("first"))?;
        cluster.apply_text(&[too_many_slots("second"), last_backends()].concat())?;
        is_said(cluster, "fill", "tp_backends", "limits.backends")?;
        cluster.apply_text(&small("late"))?;
        cluster.wait_pod("late")?;
        is_said(cluster, "many", "tp_backends", "limits.backends")?;
        is_said(cluster, "late", "tp_backends", "limits.backends")?;
        is_said(cluster, "second", "tp_slots", "limits.slots")?;
        is_said(cluster, "ranged", "tp_source_ranges", "limits.services")?;
        ensure!(self.answers("late").is_err(), "there is room after all");
        wait("a plain list in the place of a table", PATIENCE, || self.answers("second"))?;
        cluster.apply_text(&too_many_ports())?;
        is_said(cluster, "ports", "tp_services", "limits.services")?;
        cluster.apply_text(EXTRA)?;
        is_said(cluster, "extra", "tp_services", "limits.services")?;
        ensure!(self.answers("extra").is_err(), "there is room after all");
        self.agent_dies()?;
        let log = Log::new(Voice::Plain);
        cluster.kubectl(&log, &["delete", "service", "many", "fill", "first", "ranged", "ports"])?;
        cluster.kubectl(&log, &["delete", "endpointslice", "many-1", "fill-1", "--ignore-not-found"])?;
        // (Backends stay for a minute, for connections that are still open.)
        wait("room for the extra Service", PATIENCE, || self.answers("extra").map(drop))
    }

    /// Its successor finds everything full, and leaves what it finds.
    fn agent_dies(&self) -> Result<()> {
        let dead = machine::lab_agent(self.cluster.name(), "n1")?;
        machine::kill(dead)?;
        machine::another_agent(self.cluster.name(), "n1", dead)?;
        let ready = "for p in 9116; do wget -qO- http://127.0.0.1:$p/readyz; done";
        wait("it to be ready", PATIENCE, || {
            let said = self.cluster.node("n1", ready)?;
            if said.ok { Ok(()) } else { bail!("{}", said.all()) }
        })
    }
}

#[test]
fn full_tables_leave_what_is_there_and_say_what_finds_no_room() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up_with("e2e-full", 2, Families::Ipv4, &["--agent-config", LIMITS])?;
    // Two: a table of one would have one place.
    let webs = ["n1", "n2"].map(|node| server(&format!("web-{node}"), node, "app: web")).concat();
    cluster.apply_text(&(webs + &shell("near", "n1", "") + SERVICES))?;
    cluster.wait_ready("app=web", 2)?;
    let near = Place::of_pod(&cluster, &cluster.wait_pod("near")?)?;
    let outside = Place::of_node(&cluster, "outside")?;
    let web = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
    let n1 = cluster.node_ip("n1")?;
    let port = SocketAddr::new(address(&n1)?, 30080);
    let scene = Scene { cluster, near, outside, web, port };
    wait("the Service to answer", PATIENCE, || {
        scene.near.enter(|| Session::open(web, ANSWER)?.ask(ANSWER))?;
        scene.outside.enter(|| Session::open(port, ANSWER)?.ask(ANSWER))
    })?;
    let kept = [Load::sessions(&scene.near, &[scene.web], 5)?, Load::sessions(&scene.outside, &[scene.port], 5)?];
    let load = Load::default();
    let done = std::thread::scope(|scope| {
        let (load, scene) = (&load, &scene);
        for sessions in kept {
            scope.spawn(|| load.keep("while tables fill", sessions, Duration::from_millis(500)));
        }
        let openers =
            [("a pod", &scene.near, scene.web), ("outside", &scene.outside, scene.port)].map(|(what, from, to)| {
                scope.spawn(move || {
                    from.enter(|| {
                        load.open(what, &[to], 20);
                        Ok(())
                    })
                })
            });
        let done = scene.fill_and_empty();
        load.ends();
        openers.into_iter().try_for_each(|opener| opener.join().map_err(|_| anyhow!("a thread panicked"))?)?;
        done
    });
    let judged = load.judge(200, 100);
    done.and(judged)?;
    scene.cluster.down()
}
