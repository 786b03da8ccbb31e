//! The shape that kube-proxy has in iptables mode: one chain with a rule for every Service, a chain a Service that picks an endpoint by
//! chance, a chain an endpoint that translates.

use std::fmt::Write as _;

use super::{PODS, PORT, Port, hash};

/// The ruleset, for `iptables-restore`.
pub(super) fn text(ports: &[Port]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = filter(&mut text).and_then(|()| nat(&mut text, ports));
    text
}

fn filter(text: &mut String) -> std::fmt::Result {
    text.write_str(
        "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n\
         -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -m comment --comment \"kubernetes forwarding rules\" -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment \"kubernetes forwarding conntrack rule\" -j ACCEPT\n\
         COMMIT\n",
    )
}

fn nat(text: &mut String, ports: &[Port]) -> std::fmt::Result {
    text.write_str(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n",
    )?;
    for port in ports {
        writeln!(text, ":{} - [0:0]", service_chain(port))?;
        for number in 0..port.endpoints.len() {
            writeln!(text, ":{} - [0:0]", endpoint_chain(port, number))?;
        }
    }
    text.write_str(
        "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n",
    )?;
    for port in ports {
        let Port { name, address, .. } = port;
        writeln!(
            text,
            "-A KUBE-SERVICES -d {address}/32 -p tcp -m comment --comment \"bench/{name}:p cluster IP\" -m tcp --dport {PORT} -j {}",
            service_chain(port)
        )?;
    }
    text.write_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" \
         -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n",
    )?;
    for port in ports {
        service(text, port)?;
    }
    text.write_str("COMMIT\n")
}

fn service(text: &mut String, port: &Port) -> std::fmt::Result {
    let Port { name, address, endpoints } = port;
    let chain = service_chain(port);
    writeln!(
        text,
        "-A {chain} ! -s {PODS} -d {address}/32 -p tcp -m comment --comment \"bench/{name}:p cluster IP\" -m tcp --dport {PORT} -j KUBE-MARK-MASQ"
    )?;
    for (number, endpoint) in endpoints.iter().enumerate() {
        let left = endpoints.len() - number;
        let chance = match left {
            1 => String::new(),
            left => format!(" -m statistic --mode random --probability {:.10}", 1.0 / left as f64),
        };
        let to = endpoint_chain(port, number);
        writeln!(text, "-A {chain} -m comment --comment \"bench/{name}:p -> {endpoint}:{PORT}\"{chance} -j {to}")?;
        writeln!(text, "-A {to} -s {endpoint}/32 -m comment --comment \"bench/{name}:p\" -j KUBE-MARK-MASQ")?;
        writeln!(
            text,
            "-A {to} -p tcp -m comment --comment \"bench/{name}:p\" -m tcp -j DNAT --to-destination {endpoint}:{PORT}"
        )?;
    }
    Ok(())
}

fn service_chain(port: &Port) -> String {
    format!("KUBE-SVC-{}", hash(&port.name, 16))
}

fn endpoint_chain(port: &Port, number: usize) -> String {
    format!("KUBE-SEP-{}", hash(&format!("{}/{number}", port.name), 16))
}
