//! How people write sets of peers and ports, for `assert` and `prove`.
//!
//! ```text
//! SET    = TERM { "or" TERM }
//! TERM   = "anything" | "outside" | "nodes" | ADDRESS | CIDR
//!        | "in" PLACE | "outside" PLACE
//!        | [ "pods" | "any pod" ] [ SELECTOR ] [ ( "in" | "outside" ) PLACE ]
//!        | NAMESPACE/NAME | NAMESPACE/KIND/NAME | node/NAME
//! PLACE  = "namespace" NAME { "," NAME } | "namespaces" SELECTOR
//! PORTS  = "any port" | PORT { "," PORT }
//! PORT   = 443 | 8000-8080 | 53/udp | http | http/tcp | tcp | udp | sctp | icmp
//! ```
//! `SELECTOR` is what `kubectl -l` takes: `app=db,tier!=test,env in (a, b),!old`. A port without a protocol is TCP's.
//! `tcp` is the ports 1 to 65535 of it: no rule can name port 0. `anything` is every pod and every address outside; `outside` alone is every
//! address that is no pod's; `outside namespace x` is everything but pods of that namespace. Whether a node is among the addresses outside,
//! who asks says: [`super::expect`] means nodes only where they are named, [`super::prove`] any address.

use ipnet::IpNet;
use towpath_model::labels::Requirement;
use towpath_model::{NoSelector, Protocol, Selector, canonical};

use super::ports::Ports;

/// Namespaces, by name or by labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// These.
    Named(Vec<String>),
    /// Those with matching labels.
    Matching(Selector),
}

/// Where pods are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Within {
    /// In any namespace.
    Any,
    /// In these.
    In(Place),
    /// In any but these.
    NotIn(Place),
}

/// One term of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Term {
    /// Every pod and every address outside.
    Anything,
    /// Every address that is no pod's.
    Outside,
    /// Everything but pods of these namespaces.
    NotIn(Place),
    /// Whoever has an address in it, a pod or not.
    Addresses(IpNet),
    /// Pods.
    Pods(Selector, Within),
    /// A workload or pod by name.
    Named {
        /// Its namespace.
        namespace: String,
        /// Its kind, if it was said.
        kind: Option<String>,
        /// Its name.
        name: String,
    },
    /// A node, or all of them.
    Node(Option<String>),
}

/// A set of peers: any of the terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peers(pub Vec<Term>);

/// A set of ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortWords {
    /// By number.
    pub fixed: Ports,
    /// By the name that the destination gives them.
    pub named: Vec<(String, Protocol)>,
}

impl PortWords {
    /// Any port of any protocol.
    pub fn any() -> Self {
        Self { fixed: Ports::all(), named: Vec::new() }
    }
}

/// What was written cannot be understood: why, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misread(pub String);

impl std::fmt::Display for Misread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misread {}

/// Words of a text, with brackets and commas as words.
#[derive(Clone, Debug)]
pub(super) struct Words {
    list: Vec<String>,
    at: usize,
}

/// The longest text that is read: longer ones are no statement by a person.
const LONGEST: usize = 16 * 1024;

const KEYWORDS: [&str; 20] = [
    "or",
    "and",
    "but",
    "on",
    "from",
    "to",
    "in",
    "outside",
    "reaches",
    "nothing",
    "everything",
    "anything",
    "any",
    "pods",
    "pod",
    "nodes",
    "namespace",
    "namespaces",
    "port",
    "notin",
];

impl Words {
    pub(super) fn of(text: &str) -> Result<Self, Misread> {
        if text.len() > LONGEST {
            return Err(Misread(format!("longer than {LONGEST} bytes")));
        }
        let mut list: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            let mut rest = String::new();
            for c in word.chars() {
                if matches!(c, ',' | '(' | ')') {
                    if !rest.is_empty() {
                        list.push(std::mem::take(&mut rest));
                    }
                    list.push(c.to_string());
                } else {
                    rest.push(c);
                }
            }
            if !rest.is_empty() {
                list.push(rest);
            }
        }
        Ok(Self { list, at: 0 })
    }

    pub(super) fn peek(&self) -> Option<&str> {
        self.list.get(self.at).map(String::as_str)
    }

    fn second(&self) -> Option<&str> {
        self.list.get(self.at + 1).map(String::as_str)
    }

    fn next(&mut self) -> Option<String> {
        let word = self.list.get(self.at).cloned();
        self.at += usize::from(word.is_some());
        word
    }

    pub(super) fn take(&mut self, word: &str) -> bool {
        let is = self.peek() == Some(word);
        self.at += usize::from(is);
        is
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.at >= self.list.len()
    }

    /// An error at the next word.
    pub(super) fn wanted(&self, what: &str) -> Misread {
        match self.peek() {
            Some(word) => Misread(format!("word {} ({word:?}): here should be {what}", self.at + 1)),
            None => Misread(format!("at the end: here should be {what}")),
        }
    }

    fn name(&mut self, what: &str) -> Result<String, Misread> {
        match self.peek() {
            Some(word) if !KEYWORDS.contains(&word) && !matches!(word, "," | "(" | ")") => {
                Ok(self.next().unwrap_or_default())
            }
            _ => Err(self.wanted(what)),
        }
    }
}

impl Peers {
    /// Reads a whole text as a set.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, Misread> {
        let mut words = Words::of(text)?;
        let peers = peers(&mut words)?;
        if words.is_at_end() { Ok(peers) } else { Err(words.wanted("the end, or \"or\" and another set")) }
    }
}

impl PortWords {
    /// Reads a whole text as ports.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, Misread> {
        let mut words = Words::of(text)?;
        let ports = ports(&mut words)?;
        if words.is_at_end() { Ok(ports) } else { Err(words.wanted("the end, or a comma and another port")) }
    }
}

pub(super) fn peers(words: &mut Words) -> Result<Peers, Misread> {
    let mut terms = vec![term(words)?];
    while words.take("or") {
        terms.push(term(words)?);
    }
    Ok(Peers(terms))
}

fn term(words: &mut Words) -> Result<Term, Misread> {
    const WANTED: &str = "a set of peers (pods app=web in namespace shop, outside, 10.0.0.0/8, anything …)";
    match words.peek() {
        Some("anything") => {
            words.next();
            Ok(Term::Anything)
        }
        Some("nodes") => {
            words.next();
            Ok(Term::Node(None))
        }
        Some("outside") => {
            words.next();
            if words.take("the") && !words.take("cluster") {
                return Err(words.wanted("\"cluster\""));
            }
            match place(words)? {
                Some(place) => Ok(Term::NotIn(place)),
                None => Ok(Term::Outside),
            }
        }
        Some("in") => {
            words.next();
            let place = place(words)?.ok_or_else(|| words.wanted("\"namespace NAME\" or \"namespaces SELECTOR\""))?;
            Ok(Term::Pods(Selector::everything(), Within::In(place)))
        }
        Some("any") => {
            words.next();
            if !words.take("pod") && !words.take("pods") {
                return Err(words.wanted("\"pod\""));
            }
            pods(words, true)
        }
        Some("pods" | "pod") => {
            words.next();
            pods(words, true)
        }
        Some(word) => match literal(word)? {
            Some(term) => {
                words.next();
                Ok(term)
            }
            None if begins_selector(words) => pods(words, false),
            None => Err(words.wanted(WANTED)),
        },
        None => Err(words.wanted(WANTED)),
    }
}

/// A word that is a set by itself.
fn literal(word: &str) -> Result<Option<Term>, Misread> {
    if let Ok(address) = word.parse::<std::net::IpAddr>() {
        return Ok(Some(Term::Addresses(canonical(address).into())));
    }
    if let Ok(net) = word.parse::<IpNet>() {
        return Ok(Some(Term::Addresses(net.trunc())));
    }
    if word.contains('=') || word.starts_with('!') {
        return Ok(None);
    }
    let parts: Vec<&str> = word.split('/').collect();
    if parts.len() > 1 && parts.iter().any(|part| part.is_empty()) {
        return Err(Misread(format!("{word:?} has an empty part: write NAMESPACE/NAME")));
    }
    if parts.first().is_some_and(|first| first.starts_with(|c: char| c.is_ascii_digit()) && first.contains('.')) {
        return Err(Misread(format!("{word:?} is no address and no CIDR")));
    }
    let named = |namespace: &str, kind: Option<&str>, name: &str| Term::Named {
        namespace: namespace.to_owned(),
        kind: kind.map(str::to_owned),
        name: name.to_owned(),
    };
    Ok(match parts.as_slice() {
        ["node" | "nodes", name] => Some(Term::Node(Some((*name).to_owned()))),
        [namespace, name] => Some(named(namespace, None, name)),
        [namespace, kind, name] => Some(named(namespace, Some(kind), name)),
        _ => None,
    })
}

fn begins_selector(words: &Words) -> bool {
    let set_based =
        matches!(words.second(), Some("in" | "notin")) && words.list.get(words.at + 2).is_some_and(|word| word == "(");
    let spaced = matches!(words.second(), Some("=" | "==" | "!="));
    words.peek().is_some_and(|word| word.contains('=') || word.starts_with('!')) || set_based || spaced
}

/// After "pods": an optional selector and an optional place.
fn pods(words: &mut Words, said: bool) -> Result<Term, Misread> {
    let plain = |word: &str| !KEYWORDS.contains(&word) && !matches!(word, "," | "(" | ")");
    let some = begins_selector(words) || (said && words.peek().is_some_and(plain));
    let selector = if some { selector(words)? } else { Selector::everything() };
    let within = if words.take("in") {
        Within::In(place(words)?.ok_or_else(|| words.wanted("\"namespace NAME\" or \"namespaces SELECTOR\""))?)
    } else if words.take("outside") {
        Within::NotIn(place(words)?.ok_or_else(|| words.wanted("\"namespace NAME\" or \"namespaces SELECTOR\""))?)
    } else {
        Within::Any
    };
    Ok(Term::Pods(selector, within))
}

fn place(words: &mut Words) -> Result<Option<Place>, Misread> {
    if words.take("namespaces") {
        return selector(words).map(|selector| Some(Place::Matching(selector)));
    }
    if !words.take("namespace") {
        return Ok(None);
    }
    let mut names = vec![namespace(words)?];
    while words.take(",") {
        names.push(namespace(words)?);
    }
    Ok(Some(Place::Named(names)))
}

fn namespace(words: &mut Words) -> Result<String, Misread> {
    let name = words.name("a namespace's name")?;
    let ends = !name.starts_with('-') && !name.ends_with('-');
    let is_one = ends && name.len() <= 63;
    if is_one && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-') {
        return Ok(name);
    }
    Err(Misread(format!("{name:?} is no name of a namespace: those are of lower-case letters, digits and -")))
}

fn selector(words: &mut Words) -> Result<Selector, Misread> {
    let mut requirements = vec![requirement(words)?];
    while words.take(",") {
        requirements.push(requirement(words)?);
    }
    Ok(Selector::of(requirements))
}

/// Finds where a requirement ends; what it says, the model reads.
fn requirement(words: &mut Words) -> Result<Requirement, Misread> {
    const WANTED: &str = "a label selector (app=web, app!=web, app in (a, b), app, !app)";
    let mut text = words.name(WANTED)?;
    let operator = words.peek().unwrap_or_default().to_owned();
    let is_list = matches!(operator.as_str(), "in" | "notin") && words.second() == Some("(");
    if is_list {
        words.take(&operator);
        text = format!("{text} {operator} ");
        loop {
            let word = words.next().ok_or_else(|| words.wanted("a value or \")\""))?;
            text = format!("{text}{word} ");
            if word == ")" {
                break;
            }
        }
    } else if matches!(operator.as_str(), "=" | "==" | "!=") {
        words.take(&operator);
        text = format!("{text}{operator}{}", words.name("a label's value")?);
    }
    let read: Requirement = text.parse().map_err(|why: NoSelector| Misread(why.to_string()))?;
    match &read {
        Requirement::In(_, values) | Requirement::NotIn(_, values) if is_list && values.contains("") => {
            Err(Misread(format!("{:?}: a list without values, or with an empty one", text.trim_end())))
        }
        _ => Ok(read),
    }
}

pub(super) fn ports(words: &mut Words) -> Result<PortWords, Misread> {
    if words.take("any") {
        let protocol = words.peek().and_then(protocol);
        if protocol.is_some() {
            words.next();
        }
        if !words.take("port") {
            return Err(words.wanted("\"port\""));
        }
        return Ok(PortWords { fixed: protocol.map_or(Ports::all(), every_port), named: Vec::new() });
    }
    let mut set = PortWords::default();
    loop {
        port(words, &mut set)?;
        if !words.take(",") {
            return Ok(set);
        }
    }
}

fn protocol(word: &str) -> Option<Protocol> {
    Protocol::ALL.into_iter().find(|p| p.to_string().eq_ignore_ascii_case(word))
}

/// Every port that a rule can name. Of port 0 the API has no word, so that nothing could be shown of all ports if it were one of them.
fn every_port(protocol: Protocol) -> Ports {
    Ports::of(protocol, 1, u16::MAX)
}

fn port(words: &mut Words, set: &mut PortWords) -> Result<(), Misread> {
    const WANTED: &str = "a port (443, 8000-8080, 53/udp, http, udp, icmp) or \"any port\"";
    let word = words.name(WANTED)?;
    if word.eq_ignore_ascii_case("icmp") {
        set.fixed = set.fixed.or(&Ports::without_ports());
        return Ok(());
    }
    if let Some(protocol) = protocol(&word) {
        set.fixed = set.fixed.or(&every_port(protocol));
        return Ok(());
    }
    let (number, of) = match word.split_once('/') {
        None => (word.as_str(), Protocol::Tcp),
        Some((number, name)) => {
            let of = protocol(name).ok_or_else(|| Misread(format!("{word:?}: {name:?} is none of tcp, udp, sctp")))?;
            (number, of)
        }
    };
    if number.starts_with(|c: char| c.is_ascii_digit()) {
        let (first, last) = number.split_once('-').unwrap_or((number, number));
        let parse = |text: &str| {
            let port = text.parse::<u16>().ok().filter(|port| *port > 0);
            port.ok_or_else(|| Misread(format!("{word:?}: {text:?} is not between 1 and 65535")))
        };
        let (first, last) = (parse(first)?, parse(last)?);
        if last < first {
            return Err(Misread(format!("{word:?}: {last} is below {first}")));
        }
        set.fixed = set.fixed.or(&Ports::of(of, first, last));
        return Ok(());
    }
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if number.is_empty() || number.len() > 15 || !number.chars().all(is_name) {
        return Err(Misread(format!("{word:?} is no port: {WANTED}")));
    }
    set.named.push((number.to_owned(), of));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equals(key: &str, value: &str) -> Selector {
        Selector::equals([(key, value)])
    }

    #[test]
    fn sets_are_read_as_they_are_written() {
        let place = || Place::Named(vec!["shop".to_owned()]);
        let set = |text: &str| Peers::parse(text).unwrap().0;
        assert_eq!(set("pods app=db in namespace shop"), [Term::Pods(equals("app", "db"), Within::In(place()))]);
        assert_eq!(set("app=db outside namespace shop"), [Term::Pods(equals("app", "db"), Within::NotIn(place()))]);
        assert_eq!(set("app = db in namespace shop"), [Term::Pods(equals("app", "db"), Within::In(place()))]);
        assert_eq!(set("in namespace shop"), [Term::Pods(Selector::everything(), Within::In(place()))]);
        assert_eq!(set("outside namespace shop"), [Term::NotIn(place())]);
        assert_eq!(set("outside or any pod"), [Term::Outside, Term::Pods(Selector::everything(), Within::Any)]);
        assert_eq!(set("outside the cluster"), [Term::Outside]);
        assert_eq!(set("10.1.2.3/8"), [Term::Addresses("10.0.0.0/8".parse().unwrap())]);
        assert_eq!(set("::ffff:10.0.0.1"), [Term::Addresses("10.0.0.1/32".parse().unwrap())]);
        assert_eq!(set("node/n1 or nodes"), [Term::Node(Some("n1".to_owned())), Term::Node(None)]);
        let named = |kind: Option<&str>| Term::Named {
            namespace: "shop".to_owned(),
            kind: kind.map(str::to_owned),
            name: "web".to_owned(),
        };
        assert_eq!(set("shop/web or shop/deployment/web"), [named(None), named(Some("deployment"))]);
        let [Term::Pods(selector, Within::In(Place::Matching(team)))] =
            &set("pods app in (a, b), !old, tier!=x, app.kubernetes.io/name in namespaces team=a")[..]
        else {
            panic!("another form")
        };
        assert_eq!(selector.to_string(), "app in (a,b),tier notin (x),app.kubernetes.io/name,!old");
        assert_eq!(team.to_string(), "team=a");
    }

    #[test]
    fn ports_are_read_as_they_are_written() {
        let ports = |text: &str| PortWords::parse(text).unwrap();
        assert_eq!(ports("any port"), PortWords::any());
        assert_eq!(ports("443, 8000-8080, 53/udp").fixed.to_string(), "TCP 443,8000-8080, UDP 53");
        assert_eq!(ports("http/udp").named, [("http".to_owned(), Protocol::Udp)]);
        assert_eq!(ports("udp, icmp").fixed.to_string(), "UDP 1-65535, ICMP");
        assert_eq!(ports("any tcp port").fixed.to_string(), "TCP 1-65535");
    }

    #[test]
    fn what_is_no_set_or_port_is_refused_at_its_word() {
        for text in [
            "",
            "or",
            "pods in",
            "pods app in ()",
            "pods app in (a",
            "shop/",
            "web",
            "10.0.0.0/33",
            "app=a in shop",
            "outside the",
            "in namespace or",
            "a/b/c/d",
            "!",
            "=x",
            "app='web'",
            "app in (a,)",
            "app in (a b)",
            "in namespace 'shop'",
            "in namespace Shop",
        ] {
            let error = Peers::parse(text).expect_err(text);
            assert!(!error.0.is_empty());
        }
        for text in ["", "0", "70000", "80-79", "80/foo", "any", "any foo port", "HTTP_", "80 81", "80,,81", "1-"] {
            assert!(PortWords::parse(text).is_err(), "{text}");
        }
        let error = Peers::parse("pods app=a in shop").unwrap_err();
        assert_eq!(error.0, "word 4 (\"shop\"): here should be \"namespace NAME\" or \"namespaces SELECTOR\"");
    }
}
