//! Which events are shown.

use towpath_model::Selector;
use towpath_wire::observe::{DropEvent, Fate, FlowEnd};

/// One of the two that are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Only {
    /// What is dropped or refused.
    Drops,
    /// What passes although an audited policy would deny it.
    Audits,
}

/// What is asked for; nothing: everything.
#[derive(Debug, Default)]
pub(super) struct Filter {
    pub(super) only: Option<Only>,
    pub(super) namespace: Option<String>,
    pub(super) selector: Option<Selector>,
    /// NAME or NAMESPACE/NAME.
    pub(super) pod: Option<String>,
    pub(super) nodes: Vec<String>,
    pub(super) reasons: Vec<String>,
    pub(super) protocol: Option<String>,
    pub(super) port: Option<u16>,
}

impl Filter {
    /// Whether an event is shown.
    pub(super) fn has(&self, event: &DropEvent) -> bool {
        let ends = [&event.source, &event.destination, &event.backend];
        let targets = [&event.destination, &event.backend];
        let is = if event.verdict == Fate::Audited { Only::Audits } else { Only::Drops };
        self.only.is_none_or(|only| only == is)
            && (self.nodes.is_empty() || self.nodes.contains(&event.node))
            && (self.reasons.is_empty() || self.reasons.contains(&event.reason))
            && self.protocol.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(&event.protocol))
            && self.port.is_none_or(|wanted| targets.into_iter().flatten().any(|end| end.port == wanted))
            && (self.asks_of_no_end() || ends.into_iter().flatten().any(|end| self.has_end(end)))
    }

    fn asks_of_no_end(&self) -> bool {
        self.namespace.is_none() && self.selector.is_none() && self.pod.is_none()
    }

    /// Whether one end is all that is asked for.
    fn has_end(&self, end: &FlowEnd) -> bool {
        let Some(is) = &end.is else { return false };
        let is_pod = is.kind == "Pod";
        let is_named = |wanted: &String| match wanted.split_once('/') {
            Some((namespace, name)) => is.namespace == namespace && is.name == name,
            None => is.name == *wanted,
        };
        self.namespace.as_ref().is_none_or(|wanted| is.namespace == *wanted)
            && self.selector.as_ref().is_none_or(|wanted| is_pod && wanted.matches(&end.labels))
            && self.pod.as_ref().is_none_or(|wanted| is_pod && is_named(wanted))
    }
}

#[cfg(test)]
mod tests {
    use towpath_wire::observe::Holder;

    use super::*;

    fn pod(namespace: &str, name: &str, app: &str, port: u16) -> Option<FlowEnd> {
        let is = Holder { kind: "Pod".into(), namespace: namespace.into(), name: name.into() };
        let labels = [("app".to_owned(), app.to_owned())].into();
        Some(FlowEnd { address: [10, 244, 0, 9].into(), port, is: Some(is), labels })
    }

    fn event() -> DropEvent {
        DropEvent {
            node: "n1".into(),
            reason: "ingress_policy".into(),
            protocol: "TCP".into(),
            source: pod("shop", "web", "web", 40000),
            destination: pod("pay", "db", "db", 5432),
            ..DropEvent::default()
        }
    }

    #[test]
    fn each_question_is_asked_of_either_end_and_all_of_one() {
        let text = |text: &str| Some(text.to_owned());
        let selector = |text: &str| Some(text.parse().unwrap());
        for (filter, shown) in [
            (Filter::default(), true),
            (Filter { namespace: text("shop"), ..Filter::default() }, true),
            (Filter { namespace: text("pay"), ..Filter::default() }, true),
            (Filter { namespace: text("other"), ..Filter::default() }, false),
            (Filter { selector: selector("app=db"), ..Filter::default() }, true),
            (Filter { selector: selector("app=db"), namespace: text("shop"), ..Filter::default() }, false),
            (Filter { selector: selector("app=db"), namespace: text("pay"), ..Filter::default() }, true),
            (Filter { pod: text("web"), ..Filter::default() }, true),
            (Filter { pod: text("pay/web"), ..Filter::default() }, false),
            (Filter { pod: text("shop/web"), ..Filter::default() }, true),
            (Filter { nodes: vec!["n2".into()], ..Filter::default() }, false),
            (Filter { nodes: vec!["n2".into(), "n1".into()], ..Filter::default() }, true),
            (Filter { reasons: vec!["malformed".into()], ..Filter::default() }, false),
            (Filter { protocol: text("tcp"), ..Filter::default() }, true),
            (Filter { protocol: text("udp"), ..Filter::default() }, false),
            (Filter { port: Some(5432), ..Filter::default() }, true),
            (Filter { port: Some(40000), ..Filter::default() }, false),
            (Filter { only: Some(Only::Drops), ..Filter::default() }, true),
            (Filter { only: Some(Only::Audits), ..Filter::default() }, false),
        ] {
            assert_eq!(filter.has(&event()), shown, "{filter:?}");
        }
        let audited = DropEvent { verdict: Fate::Audited, ..event() };
        for (only, shown) in [(None, true), (Some(Only::Drops), false), (Some(Only::Audits), true)] {
            assert_eq!(Filter { only, ..Filter::default() }.has(&audited), shown);
        }
    }

    #[test]
    fn who_is_no_pod_has_no_labels_that_are_none() {
        let mut event = event();
        event.destination = Some(FlowEnd { address: [192, 0, 2, 1].into(), port: 80, is: None, labels: [].into() });
        let filter = Filter { selector: Some("app!=web".parse().unwrap()), ..Filter::default() };
        assert!(!filter.has(&event), "an address outside has no labels, and is not asked for by their absence");
    }
}
