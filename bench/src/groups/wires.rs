//! NodePorts through the driver of a device, against the least that turns packets round there and against the stack.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Result;

use super::{Ratio, Run};
use crate::cni::Scratch;
use crate::place::Place;
use crate::rounds::{self, Arm, Block};
use crate::row::{Goal, Null};
use crate::stats;
use crate::wires::{Request, Way};
use crate::worker::Worker;

const NULL: Null = Null { one: "echo", other: "echo again" };
const TOWPATH: &str = "Towpath";
const IPTABLES: &str = "iptables";
/// Longer than a block, and than making everything.
const SLACK: Duration = Duration::from_secs(30);

/// Measures it.
///
/// # Errors
/// The programs do not load, or packets are lost.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let scratch = Scratch::new()?;
    let pin_dir = scratch.path().to_owned();
    let place = Place { new_netns: true, bpffs: Some(pin_dir.clone()), cpu: Some(run.cpus.client), ..Place::default() };
    let mut worker = Worker::start("the sender over veths", &place, &["wires"])?;
    worker.ask::<f64>(&Request::Load { pin_dir }, SLACK)?;
    let (pid, block) = (worker.pid(), run.protocol.block);
    let worker = RefCell::new(worker);
    let arm = |name, way| Arm {
        name,
        pids: vec![pid],
        run: Box::new({
            let worker = &worker;
            move || {
                let value = worker.borrow_mut().ask(&Request::Send { way, block }, block + SLACK)?;
                Ok(Block { value, ..Block::default() })
            }
        }),
    };
    let mut arms = [
        arm(NULL.one, Way::Echo),
        arm(NULL.other, Way::EchoAgain),
        arm(TOWPATH, Way::Towpath),
        arm(IPTABLES, Way::Iptables),
    ];
    let series = rounds::measure("NodePort through XDP", &mut arms, &run.protocol, None, &mut run.random)?;
    drop(arms);
    let rate = |arm: &str| stats::median(&series.values(arm)).unwrap_or(0.0) / 1e6;
    let note = format!(
        "UDP of 1,024 flows, live frames over veth, all on one CPU; million packets a second: echo {:.2}, Towpath {:.2}, iptables {:.2}",
        rate(NULL.one),
        rate(TOWPATH),
        rate(IPTABLES)
    );
    let ratio = |id: &str, what: &str, under, goal| Ratio {
        id: format!("wires.{id}"),
        title: format!("NodePort with an endpoint on another node, XDP ÷ {what}"),
        over: TOWPATH,
        under,
        goal: Some(Goal::AtLeast(goal)),
    };
    let ratios = vec![
        ratio("echo", "a program that sends packets back", NULL.one, 0.6),
        ratio("iptables", "DNAT and masquerade by iptables", IPTABLES, 4.0),
    ];
    let first = run.rows.len();
    run.take("NodePort through XDP".to_owned(), series, NULL, ratios);
    for row in run.rows.iter_mut().skip(first) {
        *row = row.clone().remark(&note);
    }
    Ok(())
}
