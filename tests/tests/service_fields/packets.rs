//! Packets that are not a connection's own: errors about it, and its pieces.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::wait;

use crate::scene::{NODES, PATIENCE, Scene, datagram};

/// A target port on which nobody listens: the pod's kernel says so, about an address that the client never heard of. The client's socket
/// believes it only if it is told of the address that it asked.
pub(crate) fn errors(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: nobody}\nspec:\n  type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  \
         selector: {app: web}\n  ports: [{port: 80, protocol: UDP, targetPort: 9, nodePort: 30150}]\n",
    )?;
    let told = |what: &str, from, to: SocketAddr| {
        wait(&format!("an error about {to} for {what}"), PATIENCE, || match datagram(from, to, b"anybody?") {
            Err(error) if format!("{error:#}").contains("refused") => Ok(()),
            other => bail!("{other:?}"),
        })
    };
    for six in [false, true] {
        let vip = SocketAddr::new(scene.vip("nobody", six)?, 80);
        for (what, from, _) in scene.inside() {
            told(what, from, vip)?;
        }
        for node in NODES {
            told("outside", &scene.outside, SocketAddr::new(scene.node_ip(node, six)?, 30150))?;
        }
    }
    Ok(())
}

/// Datagrams that are larger than any link lets through, there and back.
pub(crate) fn fragments(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: pieces}\nspec:\n  type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  \
         selector: {app: web}\n  ports: [{port: 80, protocol: UDP, targetPort: 80, nodePort: 30151}]\n",
    )?;
    for six in [false, true] {
        let vip = SocketAddr::new(scene.vip("pieces", six)?, 80);
        let port = SocketAddr::new(scene.node_ip("n1", six)?, 30151);
        for (what, from) in scene.everywhere().into_iter() {
            let to = if what == "outside" { port } else { vip };
            for size in [1_600_usize, 4_000, 12_000] {
                let payload: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
                wait(&format!("the first of {size} bytes"), PATIENCE, || datagram(from, to, &payload))
                    .with_context(|| format!("{what} to {to}"))?;
                // Whichever endpoint, on this node or another.
                for _ in 0..8 {
                    let back = datagram(from, to, &payload).with_context(|| format!("{size} bytes, {what} to {to}"))?;
                    ensure!(back == payload, "{what} to {to}: {size} bytes come back as {}", back.len());
                }
            }
        }
    }
    Ok(())
}
