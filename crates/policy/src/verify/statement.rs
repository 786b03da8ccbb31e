//! What `prove` is asked, and how it is written.
//!
//! ```text
//! STATEMENT = ( "nothing" | "everything" ) [ SET ] "reaches" SET [ "on" PORTS ] { ( "but" | "and" ) EXCEPTION }
//! EXCEPTION = PORTS [ "from" SET ] [ "to" SET ] | "from" SET [ "to" SET ] [ "on" PORTS ] | "to" SET [ "on" PORTS ]
//! ```
//! Without the first set: `anything`; without ports: any port. `nothing` says that no such flow is open, `everything` that every
//! one is; a flow that an exception matches is not spoken of. Sets and ports: [`super::words`].

use super::words::{Misread, Peers, PortWords, Term, Words, peers, ports};

/// What is claimed of the flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// None of them is open.
    Nothing,
    /// Each of them is open.
    Everything,
}

/// Flows that a statement does not speak of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// From these; none: from anyone.
    pub from: Option<Peers>,
    /// To these; none: to anyone.
    pub to: Option<Peers>,
    /// On these.
    pub ports: PortWords,
}

/// A statement over all possible pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// What is claimed.
    pub claim: Claim,
    /// Of flows from these
    pub from: Peers,
    /// to these
    pub to: Peers,
    /// on these ports
    pub ports: PortWords,
    /// but not of these.
    pub but: Vec<Exception>,
}

impl Statement {
    /// Reads a statement.
    ///
    /// # Errors
    /// It is none; the error names the word.
    pub fn parse(text: &str) -> Result<Self, Misread> {
        let mut words = Words::of(text)?;
        let claim = if words.take("nothing") {
            Claim::Nothing
        } else if words.take("everything") {
            Claim::Everything
        } else {
            return Err(words.wanted("\"nothing\" or \"everything\""));
        };
        let from = match words.peek() {
            Some("reaches") => Peers(vec![Term::Anything]),
            _ => peers(&mut words)?,
        };
        if !words.take("reaches") {
            return Err(words.wanted("\"reaches\", or \"or\" and another set"));
        }
        let to = peers(&mut words)?;
        let ports = if words.take("on") { ports(&mut words)? } else { PortWords::any() };
        let mut but = Vec::new();
        while words.take("but") || (!but.is_empty() && words.take("and")) {
            but.push(exception(&mut words)?);
        }
        if !words.is_at_end() {
            return Err(words.wanted("\"on PORTS\", \"but …\" or the end"));
        }
        Ok(Self { claim, from, to, ports, but })
    }
}

fn exception(words: &mut Words) -> Result<Exception, Misread> {
    let mut found = Exception { from: None, to: None, ports: PortWords::any() };
    if !matches!(words.peek(), Some("from" | "to")) {
        found.ports = ports(words)?;
        if words.take("from") {
            found.from = Some(peers(words)?);
        }
        if words.take("to") {
            found.to = Some(peers(words)?);
        }
        return Ok(found);
    }
    if words.take("from") {
        found.from = Some(peers(words)?);
    }
    if words.take("to") {
        found.to = Some(peers(words)?);
    }
    if words.take("on") {
        found.ports = ports(words)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::words::{Place, Within};
    use towpath_model::Selector;

    #[test]
    fn the_statement_of_the_tutorial_is_read() {
        let read = Statement::parse(
            "nothing outside namespace payments reaches app=db in namespace payments on any port but 5432 from app=api",
        )
        .unwrap();
        let place = Place::Named(vec!["payments".to_owned()]);
        assert_eq!(read.claim, Claim::Nothing);
        assert_eq!(read.from.0, [Term::NotIn(place.clone())]);
        assert_eq!(read.to.0, [Term::Pods(Selector::equals([("app", "db")]), Within::In(place))]);
        assert_eq!(read.ports, PortWords::any());
        let [but] = &read.but[..] else { panic!("{read:?}") };
        assert_eq!(but.ports.fixed.to_string(), "TCP 5432");
        assert_eq!(but.from, Some(Peers(vec![Term::Pods(Selector::equals([("app", "api")]), Within::Any)])));
        let short = Statement::parse("nothing reaches any pod but from app=a on 80 and to app=b and icmp").unwrap();
        assert_eq!((short.from.0, short.but.len()), (vec![Term::Anything], 3));
    }

    #[test]
    fn what_is_no_statement_is_refused_at_its_word() {
        for text in [
            "",
            "something reaches app=a",
            "nothing",
            "nothing reaches",
            "nothing app=a",
            "nothing reaches app=a on",
            "nothing reaches app=a but",
            "nothing reaches app=a on 80 from app=b",
            "nothing reaches app=a and 80",
        ] {
            assert!(Statement::parse(text).is_err(), "{text}");
        }
        let error = Statement::parse("nothing reaches app=a on 80 from app=b").unwrap_err();
        assert_eq!(error.0, "word 6 (\"from\"): here should be \"on PORTS\", \"but …\" or the end");
    }
}
