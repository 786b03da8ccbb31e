//! ADDs that come at once, as when a node starts again or a Deployment grows: each is a plugin of its own, and all begin together.

use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cni::{Container, Plugin, milliseconds};

/// Containers to add at once, and then to delete at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The plugin.
    pub(crate) plugin: Plugin,
    /// Its configuration.
    pub(crate) config: Value,
    /// `CNI_ARGS` of each container: whose sandbox it is.
    pub(crate) pods: Vec<String>,
}

/// What it took, in milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Each ADD, from when all began.
    pub(crate) adds: Vec<f64>,
    /// Each DEL, from when all began.
    pub(crate) dels: Vec<f64>,
}

/// Runs one.
///
/// # Errors
/// The plugin failed; what it said is in the message.
pub(crate) fn block(request: Request) -> Result<Done> {
    let containers = (0..request.pods.len()).map(Container::new).collect::<Result<Vec<_>>>()?;
    let all = |verb: &'static str| -> Result<Vec<f64>> {
        let begin = Barrier::new(containers.len());
        let call = |container: &Container, args: &str| {
            begin.wait();
            let started = Instant::now();
            request.plugin.call(container, verb, &request.config, args).map(|_| milliseconds(started))
        };
        let call = &call;
        std::thread::scope(|scope| {
            let pairs = containers.iter().zip(&request.pods);
            let calls: Vec<_> = pairs.map(|(container, args)| scope.spawn(move || call(container, args))).collect();
            calls.into_iter().map(|call| call.join().map_err(|_| anyhow!("the thread of a plugin died"))?).collect()
        })
    };
    Ok(Done { adds: all("ADD")?, dels: all("DEL")? })
}
