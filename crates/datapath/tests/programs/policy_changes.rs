//! Policy by what became different: the kernel then holds, and judges by, what it would of the whole image.

use std::net::IpAddr;

use towpath_datapath::bpf::{Changes, Limits};
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::L4;
use crate::world::*;

/// What became different from one image to the next, by looking at both.
fn changes(before: &PolicyImage, after: &PolicyImage) -> PolicyChanges {
    fn of<K: Ord + Clone, V: Clone + PartialEq>(
        before: &std::collections::BTreeMap<K, V>,
        after: &std::collections::BTreeMap<K, V>,
    ) -> std::collections::BTreeMap<K, Option<V>> {
        let keys = before.keys().chain(after.keys()).filter(|key| before.get(*key) != after.get(*key));
        keys.map(|key| (key.clone(), after.get(key).cloned())).collect()
    }
    PolicyChanges {
        pod_classes: of(&before.pod_classes, &after.pod_classes),
        cidr_classes: of(&before.cidr_classes, &after.cidr_classes),
        set_classes: of(&before.set_classes, &after.set_classes),
        rows: of(&before.rows, &after.rows),
        pods: after.pods.clone(),
        ..PolicyChanges::default()
    }
}

#[test]
fn changes_leave_what_the_whole_image_would() {
    in_namespaces(|dir| {
        let mut w = World::new(dir, Limits::default());
        let h = hosts(Family::V4);
        let b = w.local_b();
        let tcp = RowProtocol::Ports(Protocol::Tcp);
        let empty = w.image.clone();
        w.isolate(&b, 5, 0);
        w.allow(5, h.a, tcp, 8080, 42);
        w.image.cidr_classes.insert("198.51.100.0/24".parse().unwrap(), ClassId(9));
        w.image.set_classes.insert((SetId(5), ClassId(9)), LocalClass(1));
        let first = w.image.clone();
        assert_ne!(w.programs.apply_policy_changes(&changes(&empty, &first)).unwrap(), Changes::default());
        assert_eq!(w.programs.apply_policy(&first).unwrap(), Changes::default(), "the kernel holds all of it");
        let revision = w.programs.snapshot().unwrap().revision;
        w.from_pod(&sent_by(h.a, 4000, h.b, 8080, L4::syn())).into_pod(w.pod_b);

        // The peer is of another class now, the pod has another set, and nobody is in the range any more.
        let mut second = first.clone();
        second.pod_classes.insert(h.a, ClassId(77));
        second.set_classes.remove(&(SetId(5), ClassId(507)));
        second.cidr_classes.clear();
        let sets = PodSets::enforced(SetId(6), SetId(0));
        second.pods.extend(b.addresses.iter().map(|address: &IpAddr| (*address, sets)));
        second.rows =
            first.rows.iter().map(|(key, row)| (RowKey { set: SetId(6), port: 9090, ..*key }, *row)).collect();
        second.set_classes = [((SetId(6), ClassId(77)), LocalClass(1))].into();
        let written = w.programs.apply_policy_changes(&changes(&first, &second)).unwrap();
        assert!(written.written > 0 && written.removed > 0, "{written:?}");
        assert!(w.programs.snapshot().unwrap().revision > revision, "open connections are judged again");
        assert_eq!(w.programs.apply_policy(&second).unwrap(), Changes::default(), "and nothing else");
        w.from_pod(&sent_by(h.a, 4001, h.b, 9090, L4::syn())).into_pod(w.pod_b);
        w.from_pod(&sent_by(h.a, 4002, h.b, 8080, L4::syn())).dropped("ingress_policy");

        let revision = w.programs.snapshot().unwrap().revision;
        let none = changes(&second, &second);
        assert_eq!(w.programs.apply_policy_changes(&none).unwrap(), Changes::default());
        assert_eq!(w.programs.snapshot().unwrap().revision, revision, "no change, no new judgement");
        w.programs.unpin_all().unwrap();
    });
}
