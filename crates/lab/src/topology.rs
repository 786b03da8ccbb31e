//! The underlay: nodes and outside hosts as network namespaces around one router namespace.
//!
//! ```text
//!   n1 eth0 ──┐                                       ┌── eth0 outside  (192.168.26.10)
//!   n2 eth0 ──┼─ nodes0 [underlay: routes, forwards] outer0 ─┤
//!   n3 eth0 ──┘  192.168.255.1          192.168.26.1, 203.0.113.1  └── eth0 outside2 (203.0.113.10)
//! ```
//!
//! The router knows its own networks only: never a pod or Service range. All links are made inside these namespaces.
//! Each outside address is a host (a namespace) of its own, so that `lab outside --from ADDRESS` chooses the source of
//! any program.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use crate::kernel::{ns, sysctl};
use crate::layout::Layout;
use crate::options::{ClusterSpec, NodeSpec};

/// Bridge of the nodes, in the underlay namespace.
const NODES_BRIDGE: &str = "nodes0";
/// Bridge of the outside hosts.
const OUTER_BRIDGE: &str = "outer0";

/// A namespace on one of the bridges, and how it is reached.
struct Host {
    netns: PathBuf,
    port: String,
    bridge: &'static str,
    addresses: Vec<IpNet>,
    gateways: Vec<IpAddr>,
}

/// Makes all namespaces and links of the cluster. None of them may exist.
pub(crate) async fn create(layout: &Layout, spec: &ClusterSpec) -> Result<()> {
    let underlay = layout.netns("underlay");
    ns::create(ns::Pins { net: Some(underlay.clone()), ..ns::Pins::default() }, || prepare_namespace(true)).await?;
    let gateways: Vec<IpNet> = spec.outside.iter().flat_map(|host| host.gateways.iter().copied()).collect();
    let nodes_gateways = spec.underlay.clone();
    with_netlink(&underlay, move |netlink| async move {
        add_bridge(&netlink, NODES_BRIDGE, &nodes_gateways).await?;
        add_bridge(&netlink, OUTER_BRIDGE, &gateways).await
    })
    .await
    .context("build the underlay")?;
    let outside = spec.outside.iter().map(|host| Host {
        netns: layout.netns(&host.netns),
        port: host.netns.clone(),
        bridge: OUTER_BRIDGE,
        addresses: host.addresses.clone(),
        gateways: host.gateways.iter().map(IpNet::addr).collect(),
    });
    add_hosts(layout, spec.nodes.iter().map(|node| machine(layout, spec, node)).chain(outside).collect()).await
}

/// Makes a node's namespace and link, beside those that are there.
pub(crate) async fn add_node(layout: &Layout, spec: &ClusterSpec, node: &NodeSpec) -> Result<()> {
    add_hosts(layout, vec![machine(layout, spec, node)]).await
}

/// Removes a node's link, as who pulls its cable, and its namespace; not there is fine.
pub(crate) async fn remove_node(layout: &Layout, node: &str) -> Result<()> {
    let port = node.to_owned();
    with_netlink(&layout.netns("underlay"), move |netlink| async move {
        // The namespace's own end would take it along, some time after its last process.
        match find_link(&netlink, &port).await? {
            Some(index) => netlink.link().del(index).execute().await.with_context(|| format!("remove link {port}")),
            None => Ok(()),
        }
    })
    .await?;
    ns::remove(&layout.netns(node))
}

fn machine(layout: &Layout, spec: &ClusterSpec, node: &NodeSpec) -> Host {
    Host {
        netns: layout.netns(&node.name),
        port: node.name.clone(),
        bridge: NODES_BRIDGE,
        addresses: node.addresses.clone(),
        gateways: spec.underlay.iter().map(IpNet::addr).collect(),
    }
}

/// Makes namespaces, and a link from each to its bridge.
async fn add_hosts(layout: &Layout, hosts: Vec<Host>) -> Result<()> {
    let made = hosts.iter().map(|host| {
        let pins = ns::Pins { net: Some(host.netns.clone()), ..ns::Pins::default() };
        let forwards = host.bridge == NODES_BRIDGE;
        ns::create(pins, move || prepare_namespace(forwards))
    });
    futures::future::try_join_all(made).await?;
    let ports: Vec<(String, &'static str, PathBuf)> =
        hosts.iter().map(|h| (h.port.clone(), h.bridge, h.netns.clone())).collect();
    with_netlink(&layout.netns("underlay"), move |netlink| async move {
        for (port, bridge, netns) in ports {
            add_port(&netlink, &port, bridge, &netns).await?;
        }
        Ok(())
    })
    .await
    .context("join hosts to the underlay")?;
    let configured = hosts.into_iter().map(|host| {
        let netns = host.netns.clone();
        async move {
            with_netlink(&netns, move |netlink| async move { configure_host(&netlink, &host).await })
                .await
                .with_context(|| format!("configure {}", netns.display()))
        }
    });
    futures::future::try_join_all(configured).await?;
    Ok(())
}

/// Switches of a fresh namespace. Nodes and the router forward, as every Kubernetes node must; duplicate address
/// detection is off, for addresses here are given out once and waiting for it costs a second.
fn prepare_namespace(forwards: bool) -> Result<()> {
    if forwards {
        sysctl::set_net("ipv4/ip_forward", "1")?;
        sysctl::try_set_net("ipv6/conf/all/forwarding", "1");
        sysctl::try_set_net("ipv6/conf/default/forwarding", "1");
    }
    for scope in ["all", "default"] {
        sysctl::try_set_net(&format!("ipv6/conf/{scope}/accept_dad"), "0");
        sysctl::try_set_net(&format!("ipv6/conf/{scope}/accept_ra"), "0");
    }
    Ok(())
}

/// Runs `work` with a netlink connection into the namespace at `path`, on a runtime of that thread.
pub(crate) async fn with_netlink<T, F, W>(path: &std::path::Path, work: W) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>>,
    W: FnOnce(Handle) -> F + Send + 'static,
{
    let path = path.to_owned();
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netlink".to_owned())
        .spawn(move || {
            let run = || -> Result<T> {
                ns::enter_net(&path)?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
                runtime.block_on(async {
                    let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
                    let connection = tokio::spawn(connection);
                    let result = work(handle).await;
                    connection.abort();
                    result
                })
            };
            let _ = done.send(run());
        })
        .context("start a netlink thread")?;
    result.await.context("a netlink thread died")?
}

async fn find_link(netlink: &Handle, name: &str) -> Result<Option<u32>> {
    match netlink.link().get().match_name(name.to_owned()).execute().try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENODEV => Ok(None),
        Err(error) => Err(error).with_context(|| format!("find link {name}")),
    }
}

async fn link_index(netlink: &Handle, name: &str) -> Result<u32> {
    find_link(netlink, name).await?.with_context(|| format!("link {name} is not there"))
}

async fn set_up(netlink: &Handle, name: &str) -> Result<u32> {
    let index = link_index(netlink, name).await?;
    let message = LinkUnspec::new_with_index(index).up().build();
    netlink.link().set(message).execute().await.with_context(|| format!("set link {name} up"))?;
    Ok(index)
}

async fn add_address(netlink: &Handle, index: u32, address: IpNet) -> Result<()> {
    let mut request = netlink.address().add(index, address.addr(), address.prefix_len());
    if address.addr().is_ipv6() {
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await.with_context(|| format!("add address {address}"))
}

async fn add_bridge(netlink: &Handle, name: &str, addresses: &[IpNet]) -> Result<()> {
    let message = LinkBridge::new(name).mcast_snooping(false).forward_delay(0).build();
    netlink.link().add(message).execute().await.with_context(|| format!("add bridge {name}"))?;
    let index = set_up(netlink, name).await?;
    for address in addresses {
        add_address(netlink, index, *address).await?;
    }
    Ok(())
}

/// A veth whose other end is born as `eth0` in the namespace at `netns`.
async fn add_port(netlink: &Handle, name: &str, bridge: &str, netns: &std::path::Path) -> Result<()> {
    let target = ns::open(netns)?;
    let mut peer = LinkMessage::default();
    peer.attributes.push(LinkAttribute::IfName("eth0".to_owned()));
    peer.attributes.push(LinkAttribute::NetNsFd(target.as_raw_fd()));
    let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Veth)
        .name(name.to_owned())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .controller(link_index(netlink, bridge).await?)
        .up()
        .build();
    netlink.link().add(message).execute().await.with_context(|| format!("add the link of {}", netns.display()))
}

async fn configure_host(netlink: &Handle, host: &Host) -> Result<()> {
    set_up(netlink, "lo").await?;
    let index = set_up(netlink, "eth0").await?;
    for address in &host.addresses {
        add_address(netlink, index, *address).await?;
    }
    for gateway in &host.gateways {
        let route = match gateway {
            IpAddr::V4(via) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().gateway(*via).build(),
            IpAddr::V6(via) => {
                RouteMessageBuilder::<std::net::Ipv6Addr>::new().gateway(*via).output_interface(index).build()
            }
        };
        netlink.route().add(route).execute().await.with_context(|| format!("add the default route by {gateway}"))?;
    }
    Ok(())
}
