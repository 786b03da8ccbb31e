//! Domain names of policies: what answers teach goes into the kernel with the next image, and is taken out when its time is over and nobody is
//! connected to it any more.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use towpath_model::desired::Verdict;
use tracing::{info, warn};

use super::Reconciler;
use crate::names::book::{Book, Inside};
use crate::names::{Lesson, NotYet};
use crate::read;

/// Connections are looked at no more often, whatever is overdue,
const LOOK: Duration = Duration::from_secs(10);
/// and for no more than this part of the time.
const LOOK_PART: u32 = 100;

impl Reconciler {
    /// Does something with the book, the world and what is the cluster's own.
    fn with_book<T>(&self, work: impl FnOnce(&mut Book, &towpath_model::World, &Inside<'_>) -> T) -> T {
        let inside =
            Inside { cluster: &self.parsed.ranges.cluster_cidrs, services: self.ranges.in_force(), dns: &self.dns };
        let index = read(&self.index);
        let mut book = self.book.write().unwrap_or_else(PoisonError::into_inner);
        work(&mut book, index.world(), &inside)
    }

    /// Follows what policies ask for, and what is the cluster's own.
    pub(super) fn follow_names(&self) {
        let patterns = self.with_book(|book, world, inside| {
            book.follow(world, inside);
            book.patterns().iter().map(ToString::to_string).collect::<Vec<_>>()
        });
        self.asked_names.send_if_modified(|asked| {
            let other = asked.as_ref() != Some(&patterns);
            if other {
                *asked = Some(patterns);
            }
            other
        });
    }

    /// Takes up lessons; whether the kernel needs another image for them.
    pub(super) fn learn(&mut self, lessons: &[Lesson]) -> bool {
        if lessons.is_empty() {
            return false;
        }
        let new = tokio::task::block_in_place(|| {
            self.with_book(|book, world, inside| {
                // All of them, not up to the first that is new.
                lessons.iter().filter(|lesson| book.learn(&lesson.answers, world, inside)).count() > 0
            })
        });
        self.policy_due |= new;
        new
    }

    /// Says whether lessons are in the kernel: with what is due for it.
    pub(super) fn tell_learned(&self, lessons: Vec<Lesson>, synced: bool) {
        if lessons.is_empty() {
            return;
        }
        let there = synced && !self.policy_due && self.with_report(|report| !report.failures.contains_key("policy"));
        let forgot = there && self.with_book(|book, _, _| book.take_forgot());
        for lesson in lessons {
            // Nobody waits any more: that the answer left is counted where it did.
            let _ = lesson.reply.send(if there { Ok(forgot) } else { Err(NotYet) });
        }
    }

    /// Forgets names whose time is over, but for addresses that pods of this node are connected to.
    pub(super) async fn forget_names(&mut self) {
        if Instant::now() < self.look_at {
            return;
        }
        let overdue = self.with_book(|book, _, _| book.overdue());
        if overdue.is_empty() {
            return tokio::task::block_in_place(|| self.with_book(|book, _, _| book.tidy()));
        }
        let begun = Instant::now();
        let connected = match self.connected_to(&overdue).await {
            Ok(connected) => connected,
            Err(error) => {
                warn!(%error, "connections cannot be looked at: what names stood for stays accepted meanwhile");
                overdue.clone()
            }
        };
        self.look_at = Instant::now() + LOOK.max(begun.elapsed() * LOOK_PART);
        if self.with_book(|book, _, _| book.forget_overdue(&connected)) {
            let (overdue, connected) = (overdue.len(), connected.len());
            info!(overdue, connected, "forgot what names stood for, but for what somebody is connected to");
            self.policy_due = true;
        }
    }

    async fn connected_to(&self, addresses: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, towpath_datapath::Error> {
        let connections = self.datapath.connections().await?;
        let allowed = connections.iter().filter(|connection| {
            connection.is_open() && connection.egress.is_some_and(|judged| judged.verdict == Verdict::Allow)
        });
        Ok(allowed.map(|connection| connection.responder.0).filter(|address| addresses.contains(address)).collect())
    }
}
