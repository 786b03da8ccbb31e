//! One message in, one message out: the cluster's names at once, all others by way of the forwarder.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use towpath_plan::dns::zone::TTL;
use towpath_plan::dns::{Answer, Data, Outcome, QueryType, Rcode, Record};

use crate::cache::Key;
use crate::cluster::Cluster;
use crate::forward::{Forwarded, Forwarder};
use crate::message::compose::{self, Composed};
use crate::message::{Incoming, Query, Transport, query, rcode};
use crate::names::Wait;
use crate::rules::{Rules, nothing};

/// How many names, of which each leads to the next, are looked up here for one answer.
const MAX_LOOK_UPS: usize = 8;

/// Answers messages.
pub(crate) struct Responder {
    cluster: Arc<Cluster>,
    forwarder: Forwarder,
}

/// What a message leads to.
pub(crate) enum Now {
    /// Nothing is sent.
    Silence,
    /// This is sent.
    Reply(Vec<u8>),
    /// Somebody must be asked first: [`Responder::later`].
    Later(Pending),
}

/// A question that upstream servers must be asked about.
pub(crate) struct Pending {
    query: Query,
    key: Key,
    /// The cluster's own part of the answer, which ends in an alias to `key`.
    alias: Option<Answer>,
    /// The answer is here, and the agent must learn of it first.
    found: Option<(Forwarded, Wait)>,
}

impl Responder {
    pub(crate) fn new(cluster: Arc<Cluster>, forwarder: Forwarder) -> Self {
        Self { cluster, forwarder }
    }

    /// Answers a message without waiting for anybody, if that can be done.
    pub(crate) fn now(&self, bytes: &[u8], transport: Transport) -> Now {
        let now = self.at_once(bytes, transport);
        if let Now::Reply(reply) = &now {
            self.cluster.counters.responded(reply);
        }
        now
    }

    fn at_once(&self, bytes: &[u8], transport: Transport) -> Now {
        let counters = &self.cluster.counters;
        match transport {
            Transport::Udp => counters.udp_queries.add(),
            Transport::Tcp => counters.tcp_queries.add(),
        }
        let query = match query::parse(bytes, transport) {
            Incoming::Silence => {
                counters.malformed.add();
                return Now::Silence;
            }
            Incoming::Reject(reply) => {
                counters.malformed.add();
                return Now::Reply(reply);
            }
            Incoming::Query(query) => query,
        };
        match self.outcome(&query) {
            Outcome::NotReady => Now::Reply(compose::error(&query, rcode::SERVFAIL)),
            Outcome::Answer(answer) => {
                counters.cluster_answers.add();
                match answer.chase.clone().filter(|_| query.recursion_desired) {
                    Some(name) => self.look_up(query, name, Some(answer)),
                    None => Now::Reply(self.composed(&query, compose::cluster(&query, &answer, None))),
                }
            }
            // This server knows nothing of other names by itself, and was told not to ask.
            Outcome::Forward if !query.recursion_desired => Now::Reply(compose::error(&query, rcode::REFUSED)),
            Outcome::Forward => {
                let name = query.name.clone();
                self.look_up(query, name, None)
            }
        }
    }

    /// What is known of a question's name: by the rules, by the cluster, or that others must be asked. Where an ExternalName leads is looked
    /// up as if the client had asked for that.
    fn outcome(&self, query: &Query) -> Outcome {
        let (rules, qtype) = (self.cluster.rules(), QueryType::from(query.qtype));
        let mut aliases: Vec<Record> = Vec::new();
        let mut name = query.name.clone();
        for _ in 0..MAX_LOOK_UPS {
            if let Some(to) = rules.zone_of(&name).and_then(|zone| zone.alias(&name)).map(str::to_owned) {
                aliases.push(Record { owner: name, ttl: TTL, data: Data::Cname(to.clone()) });
                if qtype == QueryType::Cname || is_owner(&aliases, &to) {
                    break;
                }
                name = to;
            }
            let mut answer = match self.outcome_of(&rules, &name, qtype, query.id) {
                Outcome::Answer(answer) => answer,
                Outcome::Forward if !aliases.is_empty() => {
                    return Outcome::Answer(Answer { answers: aliases, chase: Some(name), ..nothing(Rcode::NoError) });
                }
                nothing_known => return nothing_known,
            };
            answer.answers.splice(0..0, aliases);
            match answer.chase.take().filter(|target| !is_owner(&answer.answers, target)) {
                Some(target) => (aliases, name) = (answer.answers, target),
                None => return Outcome::Answer(answer),
            }
        }
        // Names in a circle, or too many of them: what is known so far is all there is.
        Outcome::Answer(Answer { answers: aliases, ..nothing(Rcode::NoError) })
    }

    fn outcome_of(&self, rules: &Rules, name: &str, qtype: QueryType, turn: u16) -> Outcome {
        let Some(zone) = rules.zone_of(name) else { return self.cluster.answer(name, qtype, turn) };
        if let Some(answer) = zone.host(name, qtype) {
            return Outcome::Answer(answer);
        }
        let outcome = if zone.over_cluster { Outcome::Forward } else { self.cluster.answer(name, qtype, turn) };
        match outcome {
            Outcome::Forward if zone.ends_here() => Outcome::Answer(nothing(Rcode::NxDomain)),
            outcome => outcome,
        }
    }

    fn look_up(&self, query: Query, name: String, alias: Option<Answer>) -> Now {
        let key = Key {
            name,
            qtype: query.qtype,
            dnssec_ok: query.edns.is_some_and(|e| e.dnssec_ok),
            checking_disabled: query.checking_disabled,
        };
        let Some(found) = self.forwarder.cached(&key) else {
            return Now::Later(Pending { query, key, alias, found: None });
        };
        match self.forwarder.tell(&key, &found) {
            None => Now::Reply(self.forwarded(&query, alias.as_ref(), Some(&found))),
            Some(wait) => Now::Later(Pending { query, key, alias, found: Some((found, wait)) }),
        }
    }

    /// What it answers from.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// As [`Forwarder::tell_cached`].
    pub(crate) fn tell_cached(&self) {
        self.forwarder.tell_cached();
    }

    /// Answers a client's question after asking upstream, and after the agent has learned what policies ask for of it.
    pub(crate) async fn later(&self, pending: Pending, client: IpAddr) -> Vec<u8> {
        let Pending { query, key, alias, found } = pending;
        let (found, wait) = match found {
            Some((found, wait)) => (Some(found), Some(wait)),
            None => {
                let begun = Instant::now();
                let found = self.forwarder.resolve(key.clone(), client).await;
                self.cluster.counters.took(begun.elapsed());
                let wait = found.as_ref().and_then(|found| self.forwarder.tell(&key, found));
                (found, wait)
            }
        };
        if let Some(wait) = wait {
            self.cluster.names.learned(wait).await;
        }
        let reply = self.forwarded(&query, alias.as_ref(), found.as_ref());
        self.cluster.counters.responded(&reply);
        reply
    }

    /// The reply to a client of whom as much waits as may.
    pub(crate) fn over_share(&self, pending: &Pending) -> Vec<u8> {
        self.cluster.counters.client_over_share();
        let reply = compose::error(&pending.query, rcode::SERVFAIL);
        self.cluster.counters.responded(&reply);
        reply
    }

    /// A connection was turned away.
    pub(crate) fn count_overload(&self) {
        self.cluster.counters.overloaded.add();
    }

    fn forwarded(&self, query: &Query, alias: Option<&Answer>, found: Option<&Forwarded>) -> Vec<u8> {
        let Some(found) = found else { return compose::error(query, rcode::SERVFAIL) };
        if let Some(answer) = alias {
            return self.composed(query, compose::cluster(query, answer, Some((&found.response, found.age))));
        }
        let (reply, truncated) = found.response.reply(query, found.age, found.cap);
        if truncated {
            self.cluster.counters.truncated.add();
        }
        reply
    }

    fn composed(&self, query: &Query, composed: Option<Composed>) -> Vec<u8> {
        match composed {
            Some(Composed { bytes, truncated }) => {
                if truncated {
                    self.cluster.counters.truncated.add();
                }
                bytes
            }
            None => compose::error(query, rcode::SERVFAIL),
        }
    }
}

/// Whether a name has a record among these.
fn is_owner(records: &[Record], name: &str) -> bool {
    records.iter().any(|record| record.owner == name)
}
