//! Manifests of the pods that most tests begin with: one that serves, and one that only stays.

/// A web server on port 80 that names its pod, on a node, with labels as YAML has them between braces (`app: web`); as one document of
/// several.
pub fn server(name: &str, node: &str, labels: &str) -> String {
    pod(name, node, labels, "{name: web, image: nginx, ports: [{containerPort: 80}]}")
}

/// The same with a host port, as YAML has it between braces beside the container's (`hostPort: 8088`).
pub fn server_with_host_port(name: &str, node: &str, host_port: &str) -> String {
    pod(name, node, "", &format!("{{name: web, image: nginx, ports: [{{containerPort: 80, {host_port}}}]}}"))
}

/// A pod to ask from, by `exec` or in its network namespace.
pub fn shell(name: &str, node: &str, labels: &str) -> String {
    pod(name, node, labels, r#"{name: shell, image: busybox, command: [sleep, "86400"]}"#)
}

fn pod(name: &str, node: &str, labels: &str, container: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{{labels}}}}}\nspec:\n  nodeName: {node}\n  \
         terminationGracePeriodSeconds: 0\n  containers: [{container}]\n"
    )
}
