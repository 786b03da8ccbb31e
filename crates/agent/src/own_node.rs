//! Who this node is: what the data path cannot be opened without, waited for when the agent starts.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use tokio::sync::{mpsc, watch as channel};
use towpath_datapath::net::address::DeviceAddress;
use towpath_datapath::net::netlink::Netlink;
use towpath_wire::config::AgentConfig;
use tracing::warn;

use crate::cni_server::Readiness;
use crate::settings::{Here, OwnNode, Parsed};
use crate::{SharedIndex, counts, index, read, watch, write};

/// Where it is kept what is known of this node.
pub(crate) fn file(config: &AgentConfig) -> PathBuf {
    config.state_dir.join("node.json")
}

/// All addresses of this network namespace.
pub(crate) async fn own_addresses() -> Result<Vec<DeviceAddress>> {
    let list = || -> Result<_> { Ok(towpath_datapath::net::address::list(&mut Netlink::open()?)?) };
    tokio::task::spawn_blocking(list).await?.context("could not list this node's addresses")
}

/// What is known of this node: from its object as soon as it can be used, else from an earlier run.
pub(crate) async fn own_node(
    config: &AgentConfig,
    parsed: &Parsed,
    index: &SharedIndex,
    inbox: &mut mpsc::Receiver<watch::Update>,
    ready: &channel::Sender<Readiness>,
) -> Result<OwnNode> {
    let path = file(config);
    let kept = match OwnNode::load(&path) {
        Ok(kept) => kept,
        Err(error) => {
            warn!("{error:#}");
            None
        }
    };
    let addresses = own_addresses().await?;
    let before = kept.clone();
    // Whether pods have addresses of it is seen when leases are read; until then what was in use is.
    let still = |range: &IpNet| before.as_ref().is_some_and(|own| own.pod_cidrs.contains(range));
    let mut told = String::new();
    let patience = tokio::time::sleep(Duration::from_secs(3));
    tokio::pin!(patience);
    loop {
        let reason = {
            let index = read(index);
            match index.world().nodes.get(&parsed.node) {
                Some(node) => match OwnNode::of(node, parsed, &Here { addresses: &addresses, still: &still }) {
                    Ok(own) => {
                        own.store(&path)?;
                        return Ok(own);
                    }
                    Err(reason) => format!("{reason:#}"),
                },
                None if index.missing().contains(&index::Kind::Node) => {
                    let said = counts::trouble(&[index::Kind::Node]).map(|said| format!("; it says: {said}"));
                    format!("waiting for the API server's list of nodes{}", said.unwrap_or_default())
                }
                None => format!("node {} is not registered yet: kubelet does that; check nodeName", parsed.node),
            }
        };
        if told != reason {
            warn!("{reason}");
            ready.send_replace(Readiness::Starting(reason.clone()));
            told = reason;
        }
        tokio::select! {
            update = inbox.recv() => match update {
                Some(update) => update(&mut write(index)),
                None => bail!("all watches ended"),
            },
            // Errors of watches bring no update.
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = &mut patience, if kept.is_some() => {
                if let Some(own) = kept {
                    warn!("{told}; going on with what an earlier run knew of this node");
                    return Ok(own);
                }
            }
        }
    }
}
