//! From a container's declaration to a running instance: image, environment, user, mounts, workload.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use k8s_openapi::api::core::v1::{Capabilities, Container as ContainerDeclaration, Pod};
use kube::ResourceExt;

use super::events::Severity;
use super::{NodeContext, environment, files};
use crate::runtime::container::{self, Container, ContainerSpec};
use crate::runtime::image::{Image, OWN_PROGRAM};
use crate::runtime::sandbox::Sandbox;
use crate::stage::{
    BindMount, DEFAULT_CAPABILITIES, InitSpec, ProcessSpec, RootSpec, WebSpec, Workload, capability_bit,
};

/// Everything that one start needs; owned, for it runs in a task.
pub(crate) struct Start {
    /// The node.
    pub(crate) context: Arc<NodeContext>,
    /// The pod.
    pub(crate) pod: Arc<Pod>,
    /// The container.
    pub(crate) declaration: ContainerDeclaration,
    /// `spec.containers{name}` or `spec.initContainers{name}`.
    pub(crate) field: String,
    /// The sandbox.
    pub(crate) sandbox: Sandbox,
    /// The pod's addresses.
    pub(crate) pod_ips: Vec<IpAddr>,
    /// The pod's volumes.
    pub(crate) volumes: HashMap<String, PathBuf>,
    /// Restarts before this instance.
    pub(crate) restarts: i32,
}

/// Why an instance could not be started, as `state.waiting` shows it.
#[derive(Debug)]
pub(crate) struct StartFailure {
    /// `ErrImagePull`, `CreateContainerConfigError`, `RunContainerError` …
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
}

fn failure(reason: &'static str, message: impl std::fmt::Display) -> StartFailure {
    StartFailure { reason, message: message.to_string() }
}

impl Start {
    fn event(&self, severity: Severity, reason: &'static str, message: String) {
        self.context.events.pod(&self.pod, Some(self.field.clone()), severity, reason, message);
    }

    /// Directory of one container in the pod's runtime directory.
    pub(crate) fn container_dir(context: &NodeContext, pod: &Pod, name: &str) -> PathBuf {
        context.layout.pod_run(&pod.uid().unwrap_or_default()).join("containers").join(name)
    }

    /// Starts the instance.
    pub(crate) async fn run(self) -> Result<Container, StartFailure> {
        let reference = self.declaration.image.clone().unwrap_or_default();
        let image = match Image::resolve(&reference) {
            Ok(image) => image,
            Err(why) => {
                self.event(Severity::Normal, "Pulling", format!("Pulling image {reference:?}"));
                self.event(Severity::Warning, "Failed", format!("Failed to pull image {reference:?}: {why}"));
                self.event(Severity::Warning, "Failed", "Error: ErrImagePull".to_owned());
                return Err(failure("ErrImagePull", why));
            }
        };
        let present = format!("Container image {reference:?} already present on machine");
        self.event(Severity::Normal, "Pulled", present);
        let process = self.process(image).await.map_err(|error| {
            self.event(Severity::Warning, "Failed", format!("Error: {error:#}"));
            failure("CreateContainerConfigError", format!("{error:#}"))
        })?;
        let spec = self.container_spec(image, process).map_err(|error| {
            self.event(Severity::Warning, "Failed", format!("Error: {error:#}"));
            failure("CreateContainerError", format!("{error:#}"))
        })?;
        self.event(Severity::Normal, "Created", format!("Created container: {}", self.declaration.name));
        match container::start(spec, &self.sandbox, &self.context.stage).await {
            Ok(container) => {
                self.event(Severity::Normal, "Started", format!("Started container {}", self.declaration.name));
                Ok(container)
            }
            Err(error) => {
                self.event(Severity::Warning, "Failed", format!("Error: {error:#}"));
                Err(failure("RunContainerError", format!("{error:#}")))
            }
        }
    }

    async fn process(&self, image: Image) -> Result<ProcessSpec> {
        let services = self.context.services.state();
        let host_ips = self.context.host_ips();
        let sources = environment::Sources {
            client: &self.context.client,
            pod: &self.pod,
            pod_ips: &self.pod_ips,
            host_ips: &host_ips,
            services: &services,
        };
        let env = environment::resolve(&self.declaration, &sources).await?;
        let expand = |list: &Option<Vec<String>>| -> Vec<String> {
            list.iter().flatten().map(|text| environment::expand(text, &env)).collect()
        };
        let (command, args) = (expand(&self.declaration.command), expand(&self.declaration.args));
        let argv = match (command.is_empty(), args.is_empty(), image) {
            (false, _, _) => command.into_iter().chain(args).collect(),
            (true, _, Image::Towpath) => std::iter::once(OWN_PROGRAM.to_owned()).chain(args).collect(),
            (true, false, _) => args,
            (true, true, Image::Tools) => vec!["sh".to_owned()],
            (true, true, _) => Vec::new(),
        };
        let mut process = ProcessSpec {
            argv,
            env,
            cwd: self.declaration.working_dir.clone().filter(|d| !d.is_empty()).unwrap_or_else(|| "/".to_owned()),
            tty: self.declaration.tty == Some(true),
            ..ProcessSpec::default()
        };
        self.apply_security(&mut process)?;
        Ok(process)
    }

    fn apply_security(&self, process: &mut ProcessSpec) -> Result<()> {
        let pod = self.pod.spec.as_ref().and_then(|s| s.security_context.clone()).unwrap_or_default();
        let own = self.declaration.security_context.clone().unwrap_or_default();
        let id = |value: Option<i64>| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(0);
        process.uid = id(own.run_as_user.or(pod.run_as_user));
        process.gid = id(own.run_as_group.or(pod.run_as_group));
        process.groups =
            pod.supplemental_groups.iter().flatten().chain(pod.fs_group.iter()).map(|g| id(Some(*g))).collect();
        if own.run_as_non_root.or(pod.run_as_non_root) == Some(true) && process.uid == 0 {
            anyhow::bail!("container has runAsNonRoot and image will run as root (pod: {:?})", self.pod.name_any());
        }
        process.no_new_privileges = own.allow_privilege_escalation == Some(false);
        process.capabilities =
            if own.privileged == Some(true) { u64::MAX } else { capabilities(own.capabilities.as_ref())? };
        Ok(())
    }

    fn container_spec(&self, image: Image, process: ProcessSpec) -> Result<ContainerSpec> {
        let context = &self.context;
        let uid = self.pod.uid().unwrap_or_default();
        let name = &self.declaration.name;
        let node = &context.node.name;
        let dir = Self::container_dir(context, &self.pod, name);
        std::fs::create_dir_all(&dir)?;
        let own = self.declaration.security_context.clone().unwrap_or_default();
        let log = context
            .layout
            .pod_logs(node, &self.pod.namespace().unwrap_or_default(), &self.pod.name_any(), &uid)
            .join(name)
            .join(format!("{}.log", self.restarts));
        let root = RootSpec {
            image: context.image_root.clone(),
            scratch: dir.join("root"),
            binds: self.binds(image, &dir)?,
            read_only: own.read_only_root_filesystem == Some(true),
            privileged: own.privileged == Some(true),
        };
        let workload = self.workload(image, &process.argv);
        Ok(ContainerSpec {
            init: InitSpec { cgroup: context.layout.pod_cgroup(node, &uid).join(name), root, process, workload },
            stdin: self.declaration.stdin == Some(true),
            stdin_once: self.declaration.stdin_once == Some(true),
            dir,
            log,
        })
    }

    fn workload(&self, image: Image, argv: &[String]) -> Workload {
        let has_command = self.declaration.command.as_ref().is_some_and(|c| !c.is_empty());
        match image {
            _ if has_command => Workload::Command,
            Image::Pause => Workload::Pause,
            Image::Tools | Image::Towpath => Workload::Command,
            Image::Web => match argv.first().map(String::as_str) {
                Some("pause") => Workload::Pause,
                Some(first) if !first.starts_with('-') && !SERVER_COMMANDS.contains(&first) => Workload::Command,
                _ => Workload::Web(self.web(argv)),
            },
        }
    }

    fn web(&self, argv: &[String]) -> WebSpec {
        let ports = |wanted: &str| -> Vec<u16> {
            let declared = self.declaration.ports.iter().flatten();
            let same = declared.filter(|p| p.protocol.as_deref().unwrap_or("TCP") == wanted);
            same.filter_map(|p| u16::try_from(p.container_port).ok()).collect()
        };
        let flag = |names: &[&str]| -> Option<String> {
            argv.iter().enumerate().find_map(|(index, arg)| {
                let (name, value) = arg.split_once('=').map_or((arg.as_str(), None), |(n, v)| (n, Some(v)));
                let known = name.starts_with('-') && names.contains(&name.trim_start_matches('-'));
                known.then(|| value.map(str::to_owned).or_else(|| argv.get(index + 1).cloned())).flatten()
            })
        };
        let port_of = |text: String| text.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        let mut http = match flag(&["http-port", "port", "listen"]).and_then(port_of) {
            Some(port) => vec![port],
            None => ports("TCP"),
        };
        if http.is_empty() {
            http.push(80);
        }
        let mut udp = ports("UDP");
        udp.extend(flag(&["udp-port"]).and_then(port_of).filter(|port| !udp.contains(port)));
        WebSpec {
            http,
            udp,
            text: flag(&["text"]),
            pod: self.pod.name_any(),
            namespace: self.pod.namespace().unwrap_or_default(),
            node: self.context.node.name.clone(),
        }
    }

    fn binds(&self, image: Image, dir: &Path) -> Result<Vec<BindMount>> {
        let pod_dir = self.context.layout.pod_run(&self.pod.uid().unwrap_or_default());
        let termination = dir.join("termination-log");
        std::fs::write(&termination, "")?;
        std::fs::set_permissions(&termination, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        let message =
            self.declaration.termination_message_path.clone().unwrap_or_else(|| "/dev/termination-log".to_owned());
        let mut binds =
            vec![BindMount { source: termination, sub_path: None, target: message.into(), read_only: false }];
        if image == Image::Towpath {
            let source = self.context.stage.program.clone();
            binds.push(BindMount { source, sub_path: None, target: OWN_PROGRAM.into(), read_only: true });
        }
        let mounts = self.declaration.volume_mounts.clone().unwrap_or_default();
        for name in ["hosts", "hostname", "resolv.conf"] {
            let target = PathBuf::from("/etc").join(name);
            if !mounts.iter().any(|m| Path::new(&m.mount_path) == target) {
                let source = pod_dir.join("etc").join(name);
                binds.push(BindMount { source, sub_path: None, target, read_only: false });
            }
        }
        for mount in mounts {
            let Some(source) = self.volumes.get(&mount.name) else {
                anyhow::bail!("volume {:?} of mount {} is not there", mount.name, mount.mount_path);
            };
            binds.push(BindMount {
                source: source.clone(),
                sub_path: mount.sub_path.filter(|p| !p.is_empty()).map(PathBuf::from),
                target: Path::new("/").join(mount.mount_path),
                read_only: mount.read_only == Some(true),
            });
        }
        Ok(binds)
    }
}

/// First arguments by which server images (agnhost) are told what to serve.
const SERVER_COMMANDS: [&str; 5] = ["netexec", "serve-hostname", "test-webserver", "porter", "http-echo"];

fn capabilities(wanted: Option<&Capabilities>) -> Result<u64> {
    let bits = |names: &Option<Vec<String>>| -> Result<u64> {
        names.iter().flatten().try_fold(0, |all, name| match capability_bit(name) {
            Some(bit) => Ok(all | bit),
            None => anyhow::bail!("unknown capability {name:?}"),
        })
    };
    match wanted {
        None => Ok(DEFAULT_CAPABILITIES),
        Some(c) => {
            let (add, drop) = (bits(&c.add)?, bits(&c.drop)?);
            let all = capability_bit("ALL").unwrap_or(u64::MAX);
            // `drop: [ALL], add: [X]` leaves X; `add: [ALL], drop: [X]` leaves all but X.
            Ok(if add == all { all & !drop } else { (DEFAULT_CAPABILITIES & !drop) | add })
        }
    }
}

/// Writes the pod's files that all its containers see.
pub(crate) fn write_pod_files(context: &NodeContext, pod: &Pod, pod_ips: &[IpAddr]) -> Result<()> {
    let dir = context.layout.pod_run(&pod.uid().unwrap_or_default()).join("etc");
    std::fs::create_dir_all(&dir)?;
    let node_resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    std::fs::write(dir.join("hosts"), files::hosts(pod, pod_ips))?;
    std::fs::write(dir.join("hostname"), format!("{}\n", files::kernel_hostname(pod)))?;
    std::fs::write(dir.join("resolv.conf"), files::resolv_conf(pod, &context.spec.dns_addresses, &node_resolv))?;
    Ok(())
}

/// What the instance left at its `terminationMessagePath`, or the log's end with `FallbackToLogsOnError`.
pub(crate) fn termination_message(
    dir: &Path,
    declaration: &ContainerDeclaration,
    container: &Container,
    code: i32,
) -> Option<String> {
    let tail = |text: String, limit: usize| -> String {
        let skip = text.chars().count().saturating_sub(limit);
        text.chars().skip(skip).collect()
    };
    let text = std::fs::read(dir.join("termination-log")).ok().map(|b| String::from_utf8_lossy(&b).into_owned());
    if let Some(text) = text.filter(|t| !t.is_empty()) {
        return Some(tail(text, 4096));
    }
    let falls_back = declaration.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if !falls_back || code == 0 {
        return None;
    }
    let log = std::fs::read_to_string(container.log_path()).ok()?;
    let lines: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    Some(tail(lines.join("\n"), 2048)).filter(|t| !t.is_empty())
}
