//! What the API server lets in is understood, and what is not understood is refused there: nobody has to find out by a policy that
//! closes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

use std::sync::Arc;

use k8s_openapi::api::networking::v1 as networking;
use serde_json::{Value, json};
use towpath_apiserver::kinds::builtin;
use towpath_apiserver::resource::Strategy;
use towpath_fuzz::cluster::Spec;
use towpath_fuzz::random::Random;
use towpath_fuzz::text::spoil;
use towpath_model::NetworkPolicy;

fn policies() -> Arc<dyn Strategy> {
    let found = builtin().into_iter().find(|kind| kind.gvk.kind == "NetworkPolicy");
    found.unwrap().strategy
}

/// What becomes of an object on its way into the API server: as it is stored, or why it is not.
fn stored(server: &dyn Strategy, mut object: Value) -> Result<Value, String> {
    if let Some(wrong) = server.type_error(&object) {
        return Err(wrong);
    }
    server.prune_unknown_fields(&mut object);
    server.prepare_create(&mut object);
    server.default_object(&mut object);
    match server.validate_create(&object).first() {
        Some(wrong) => Err(format!("{}: {}", wrong.field, wrong.message)),
        None => Ok(object),
    }
}

fn understood(object: &Value) -> Result<(), String> {
    let policy: networking::NetworkPolicy = serde_json::from_value(object.clone()).map_err(|e| e.to_string())?;
    NetworkPolicy::try_from(&policy).map(drop).map_err(|e| e.to_string())
}

#[test]
fn what_the_api_server_lets_in_is_understood() {
    let server = policies();
    let (mut kept, mut refused) = (0u32, 0u32);
    for seed in 0..1_500 {
        let mut random = Random::new(seed);
        for mut object in Spec::random(&mut random).policies {
            // Objects from before Kubernetes 1.36 may have such a block; a new one may not.
            let text = object.to_string();
            if ["10.7.7.7/8", "2001:db8::1/32"].iter().any(|block| text.contains(block)) {
                continue;
            }
            let whole = stored(server.as_ref(), object.clone());
            assert!(whole.is_ok(), "a valid policy is refused: {whole:?}: {object}");
            let place = spoil(&mut random, &mut object);
            match stored(server.as_ref(), object.clone()) {
                Ok(stored) => {
                    kept += 1;
                    let read = understood(&stored);
                    assert!(
                        read.is_ok(),
                        "seed {seed}: let in, and not understood: {read:?}: at {place} of {object}, stored as {stored}"
                    );
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(kept > 500 && refused > 500, "{kept} {refused}");
}

/// What Kubernetes' validation says of the mistakes that policies are full of.
#[test]
fn mistakes_are_refused_in_the_words_that_people_search_for() {
    let server = policies();
    let policy = |spec: Value| json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "n", "name": "p"}, "spec": spec});
    let port = |port: Value| policy(json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
    let block = |block: Value| policy(json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": block}]}]}));
    let selector = |selector: Value| policy(json!({"podSelector": selector}));
    let long = "a".repeat(64);
    for (object, words) in [
        (
            port(json!({"port": 443, "endPort": 80})),
            "endPort: Invalid value: 80: must be greater than or equal to `port`",
        ),
        (port(json!({"port": 0})), "port: Invalid value: 0: must be between 1 and 65535, inclusive"),
        (port(json!({"port": 65536})), "port: Invalid value: 65536: must be between 1 and 65535, inclusive"),
        (port(json!({"port": -1})), "port: Invalid value: -1: must be between 1 and 65535, inclusive"),
        (port(json!({"port": 65535, "endPort": 65536})), "endPort: Invalid value: 65536: must be between 1 and 65535"),
        (port(json!({"endPort": 80})), "endPort: Invalid value: 80: may not be specified when `port` is not specified"),
        (
            port(json!({"port": "a_name"})),
            "port: Invalid value: \"a_name\": must contain only alpha-numeric characters",
        ),
        (
            port(json!({"port": "sixteen-letters-"})),
            "port: Invalid value: \"sixteen-letters-\": must be no more than 15 characters",
        ),
        (port(json!({"port": "80"})), "port: Invalid value: \"80\": must contain at least one letter"),
        (port(json!({"port": 80, "protocol": "tcp"})), "protocol: Unsupported value: \"tcp\": supported values: "),
        (block(json!({"cidr": "10.0.0.0"})), "cidr: Invalid value: \"10.0.0.0\": must be a valid CIDR value"),
        (block(json!({"cidr": ""})), "ipBlock.cidr: Required value"),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]})),
            "except[0]: Invalid value: \"192.168.0.0/16\": must be a strict subset of `cidr`",
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["0.0.0.0/0"]})),
            "except[0]: Invalid value: \"0.0.0.0/0\": must be a strict subset of `cidr`",
        ),
        (
            block(json!({"cidr": "0.0.0.0/0", "except": ["::/0"]})),
            "except[0]: Invalid value: \"::/0\": must be a strict subset of `cidr`",
        ),
        (selector(json!({"matchLabels": {"-a": "b"}})), "spec.podSelector.matchLabels: Invalid value: \"-a\": "),
        (selector(json!({"matchLabels": {"a": "b c"}})), "spec.podSelector.matchLabels: Invalid value: \"b c\": "),
        (selector(json!({"matchLabels": {"a": long}})), "must be no more than 63 "),
        (
            selector(json!({"matchExpressions": [{"key": "a/b/c", "operator": "Exists"}]})),
            "matchExpressions[0].key: Invalid value: \"a/b/c\": ",
        ),
        (
            selector(json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]})),
            "operator: Invalid value: \"Gt\": not a valid selector operator",
        ),
        (
            selector(json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]})),
            "values: Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
        ),
    ] {
        let said = stored(server.as_ref(), object.clone());
        assert!(said.as_ref().is_err_and(|said| said.contains(words)), "{object}\nwanted: {words}\nfound: {said:?}");
    }
    for wrong in [
        port(json!({"port": true})),
        port(json!({"port": 80.5})),
        port(json!({"port": 80, "endPort": "90"})),
        block(json!({"cidr": 10})),
        policy(json!({"podSelector": {}, "ingress": {}})),
        policy(json!({"podSelector": []})),
    ] {
        assert!(server.type_error(&wrong).is_some(), "{wrong}");
    }
}
