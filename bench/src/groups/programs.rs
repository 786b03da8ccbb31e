//! What a packet from a pod to a Service costs in the kernel program that sees it, without policies and with some, in units of a program that looks one thing up.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::Result;

use super::{Ratio, Run};
use crate::cni::Scratch;
use crate::place::Place;
use crate::programs::Request;
use crate::rounds::{self, Arm, Block};
use crate::row::{Goal, Null};
use crate::stats;
use crate::worker::Worker;

const NULL: Null = Null { one: "one look-up", other: "one look-up again" };
const NEW: &str = "new flow";
const ESTABLISHED: &str = "established";
const NEW_JUDGED: &str = "new flow, judged";
const ESTABLISHED_JUDGED: &str = "established, judged";
/// Longest time of a block: 65,536 packets, four times.
const SLACK: Duration = Duration::from_secs(30);

/// Measures it.
///
/// # Errors
/// The programs do not load, or a packet does not go where it should.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let scratch = Scratch::new()?;
    let place = Place {
        new_netns: true,
        bpffs: Some(scratch.path().to_owned()),
        cpu: Some(run.cpus.client),
        ..Place::default()
    };
    let mut worker = Worker::start("the kernel programs", &place, &["programs"])?;
    worker.ask::<f64>(&Request::Load { pin_dir: scratch.path().to_owned() }, SLACK)?;
    let pid = worker.pid();
    let worker = RefCell::new(worker);
    let arm = |name, request: Request| Arm {
        name,
        pids: vec![pid],
        run: Box::new({
            let worker = &worker;
            move || Ok(Block { value: worker.borrow_mut().ask(&request, SLACK)?, ..Block::default() })
        }),
    };
    let mut arms = [
        arm(NULL.one, Request::One),
        arm(NULL.other, Request::Again),
        arm(NEW, Request::New),
        arm(ESTABLISHED, Request::Established),
        arm(NEW_JUDGED, Request::NewJudged),
        arm(ESTABLISHED_JUDGED, Request::EstablishedJudged),
    ];
    let title = "kernel programs".to_owned();
    let series = rounds::measure(&title, &mut arms, &run.protocol, None, &mut run.random)?;
    drop(arms);
    let time = |arm: &str| stats::median(&series.values(arm)).unwrap_or(0.0);
    let note = format!(
        "65,536 flows to 10,000 Services, BPF_PROG_TEST_RUN once a flow, an empty program's time taken off: one look-up {:.0} ns, new \
         flow {:.0} ns, established {:.0} ns; with policies of 1,000 rules in each direction for both pods, the last of which matches: new \
         flow {:.0} ns, established {:.0} ns",
        time(NULL.one),
        time(NEW),
        time(ESTABLISHED),
        time(NEW_JUDGED),
        time(ESTABLISHED_JUDGED)
    );
    let ratio = |id: &str, what: &str, over, goal| Ratio {
        id: format!("programs.{id}"),
        title: format!("{what}, from a pod to a Service: its program ÷ a program of one look-up"),
        over,
        under: NULL.one,
        goal: Some(Goal::AtMost(goal)),
    };
    let ratios = vec![
        ratio("new", "first packet of a flow", NEW, 10.0),
        ratio("established", "later packet of an answered flow", ESTABLISHED, 4.0),
        ratio("new-judged", "first packet of a flow, policies judge both ends", NEW_JUDGED, 10.0),
        ratio(
            "established-judged",
            "later packet of an answered flow, policies judge both ends",
            ESTABLISHED_JUDGED,
            4.0,
        ),
    ];
    let first = run.rows.len();
    run.take(title, series, NULL, ratios);
    for row in run.rows.iter_mut().skip(first) {
        *row = row.clone().remark(&note);
    }
    Ok(())
}
