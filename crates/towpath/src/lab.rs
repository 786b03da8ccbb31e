//! `towpath lab …`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ipnet::IpNet;
use towpath_lab::commands::{self, LabStatus};
use towpath_lab::layout::LabName;
use towpath_lab::options::{IpFamily, NODE_CIDR_MASK_SIZE, UpOptions};

use tracing_subscriber::EnvFilter;

use crate::lab_client;

/// Commands of the lab.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Brings up a lab.
    Up(Up),
    /// Ends a lab and removes everything it made, also after a crash.
    Down(Named),
    /// Ends a lab's processes and namespaces; its state stays for `lab start`.
    Stop(Named),
    /// Brings a stopped lab back.
    Start(Named),
    /// What is known of a lab.
    Status(Named),
    /// All labs of this machine.
    List,
    /// Changes which nodes a running lab has.
    #[command(subcommand)]
    Node(NodeCommand),
    /// The admin kubeconfig on standard output.
    Kubeconfig {
        #[command(flatten)]
        named: Named,
        /// Only its path.
        #[arg(long)]
        path: bool,
    },
    /// Runs a command on a node.
    Exec {
        #[command(flatten)]
        named: Named,
        /// The node (of `lab exec NODE -- …`), or a pod with --pod.
        target: String,
        /// Container of the pod.
        #[arg(short, long)]
        container: Option<String>,
        /// Namespace of the pod.
        #[arg(short, long)]
        namespace: Option<String>,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs a command on a host outside the cluster.
    Outside {
        #[command(flatten)]
        named: Named,
        /// The host that has this address.
        #[arg(long)]
        from: Option<IpAddr>,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Applies manifests (where there is no kubectl of 1.31 or newer).
    Apply(lab_client::Apply),
    /// Shows objects (where there is no kubectl).
    Get(lab_client::Get),
    /// Deletes objects (where there is no kubectl).
    Delete(lab_client::Delete),
    /// Scales a Deployment (where there is no kubectl).
    Scale(lab_client::Scale),
    #[command(hide = true)]
    Serve { name: LabName },
}

/// Nodes that come and go.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum NodeCommand {
    /// One more joins, as a new machine; it gets the first number that no node has.
    Add(Named),
    /// One is switched off at once and deleted, with the pods that were on it.
    Delete {
        #[command(flatten)]
        named: Named,
        /// Its name.
        node: String,
    },
}

/// Which lab.
#[derive(clap::Args, Debug)]
pub(crate) struct Named {
    /// The lab's name.
    #[arg(long, default_value = "lab")]
    pub(crate) name: LabName,
}

/// Options of `lab up`.
#[derive(clap::Args, Debug)]
pub(crate) struct Up {
    #[command(flatten)]
    named: Named,
    /// Number of nodes.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// ipv4, ipv6 or dual.
    #[arg(long, default_value = "ipv4")]
    ip_family: IpFamily,
    /// Pod ranges, at most one a family.
    #[arg(long, value_delimiter = ',')]
    pod_cidr: Vec<IpNet>,
    /// Length of a node's part of the IPv4 pod range.
    #[arg(long, default_value_t = NODE_CIDR_MASK_SIZE)]
    node_cidr_mask_size: u8,
    /// Service ranges, at most one a family.
    #[arg(long, value_delimiter = ',')]
    service_cidr: Vec<IpNet>,
    /// The nodes' network: the gateway's address and length.
    #[arg(long, value_delimiter = ',')]
    underlay: Vec<IpNet>,
    /// Networks outside the cluster: the gateway's address and length.
    #[arg(long, value_delimiter = ',')]
    outside: Vec<IpNet>,
    /// A CNI configuration list to use instead of Towpath, for comparisons.
    #[arg(long)]
    cni_conf: Option<PathBuf>,
    /// A directory of CNI plugins that is searched first [default: the one of this program].
    #[arg(long)]
    cni_bin_dir: Option<PathBuf>,
    /// Field of the agents' configuration, as KEY=JSON; may be given several times.
    #[arg(long, value_name = "KEY=JSON")]
    agent_config: Vec<String>,
}

impl Up {
    fn options(self) -> Result<UpOptions> {
        let mut options = UpOptions::new(self.named.name)?;
        options.nodes = self.nodes;
        options.ip_family = self.ip_family;
        options.pod_cidrs = self.pod_cidr;
        options.node_cidr_mask_size = self.node_cidr_mask_size;
        options.service_cidrs = self.service_cidr;
        options.underlay = self.underlay;
        options.outside = self.outside;
        options.cni_conf = self.cni_conf;
        options.cni_bin_dir = self.cni_bin_dir;
        for field in self.agent_config {
            let (key, value) =
                field.split_once('=').with_context(|| format!("--agent-config {field:?}: write KEY=JSON"))?;
            let value =
                serde_json::from_str(value).with_context(|| format!("--agent-config {key}: {value:?} is no JSON"))?;
            options.agent_config.insert(key.to_owned(), value);
        }
        Ok(options)
    }
}

/// Runs a command of the lab.
pub(crate) fn run(command: Command) -> Result<bool> {
    match command {
        Command::Up(up) => {
            let options = up.options()?;
            bring_up("up", |progress| commands::up(&options, progress))?;
        }
        Command::Start(named) => bring_up("started", |progress| commands::start(&named.name, progress))?,
        Command::Stop(named) => commands::stop(&named.name)?,
        Command::Down(named) => commands::down(&named.name)?,
        Command::Status(named) => crate::print_json(&commands::status(&named.name)?)?,
        Command::List => {
            for lab in commands::list()? {
                let state = if lab.running { "running" } else { "stopped" };
                crate::print(&format!("{:<20} {state:<8} {} nodes  {}", lab.name.as_str(), lab.nodes.len(), lab.api))?;
            }
        }
        Command::Node(command) => change_nodes(command)?,
        Command::Kubeconfig { named, path } => {
            let file = commands::kubeconfig(&named.name)?;
            if path {
                crate::print(&file.display().to_string())?;
            } else {
                let text =
                    std::fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
                crate::print(text.trim_end())?;
            }
        }
        Command::Exec { named, target, container, namespace, command } => {
            if commands::spec(&named.name)?.node(&target).is_ok() {
                match commands::exec(&named.name, &target, &command)? {}
            }
            return lab_client::exec(&named.name, &target, container, namespace, command);
        }
        Command::Outside { named, from, command } => match commands::outside(&named.name, from, &command)? {},
        Command::Apply(options) => return lab_client::apply(options),
        Command::Get(options) => return lab_client::get(options),
        Command::Delete(options) => return lab_client::delete(options),
        Command::Scale(options) => return lab_client::scale(options),
        Command::Serve { name } => {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
            tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
            commands::serve(&name)?;
        }
    }
    Ok(true)
}

fn change_nodes(command: NodeCommand) -> Result<()> {
    let started = Instant::now();
    match command {
        NodeCommand::Add(Named { name }) => {
            let node = commands::add_node(&name)?;
            let addresses: Vec<String> = node.addresses.iter().map(|net| net.addr().to_string()).collect();
            crate::print(&format!(
                "node {} of lab {name} is ready after {:.1} s: {}",
                node.name,
                started.elapsed().as_secs_f64(),
                addresses.join(", ")
            ))
        }
        NodeCommand::Delete { named: Named { name }, node } => {
            commands::delete_node(&name, &node)?;
            crate::print(&format!("node {node} of lab {name} is deleted"))
        }
    }
}

fn bring_up(word: &str, work: impl FnOnce(&mut dyn FnMut(&str)) -> Result<LabStatus>) -> Result<()> {
    let started = Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}")?);
    bar.enable_steady_tick(Duration::from_millis(100));
    let outcome = work(&mut |step| bar.set_message(step.to_owned()));
    bar.finish_and_clear();
    let lab = outcome?;
    if lab.nodes.is_empty() {
        bail!("lab {} has no nodes", lab.name);
    }
    crate::print(&format!(
        "lab {} is {word} in {:.1} s: {} nodes\nexport KUBECONFIG={}",
        lab.name,
        started.elapsed().as_secs_f64(),
        lab.nodes.len(),
        lab.kubeconfig.display()
    ))
}
