use serde_json::json;

use crate::kinds::protobuf::decode;

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
    out.extend(bytes);
    out
}

fn number(field: u8, value: u8) -> Vec<u8> {
    vec![field << 3, value]
}

fn body(api_version: &str, kind: &str, object: &[u8]) -> Vec<u8> {
    let meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
    [b"k8s\0".to_vec(), field(1, &meta), field(2, object)].concat()
}

#[test]
fn a_service_as_kubectl_sends_it() {
    // What client-go writes: texts that are empty, numbers that are zero and empty messages are all there.
    let metadata = [
        field(1, b"web"),
        field(2, b""),
        number(7, 0),
        field(8, b""),
        field(11, &[field(1, b"app"), field(2, b"web")].concat()),
    ]
    .concat();
    let target = [number(1, 0), vec![0x10, 0x90, 0x3f], field(3, b"")].concat();
    let port = [field(1, b"80"), field(2, b"TCP"), number(3, 80), field(4, &target), number(5, 0)].concat();
    let spec = [
        field(1, &port),
        field(2, &[field(1, b"app"), field(2, b"web")].concat()),
        field(3, b""),
        field(4, b"LoadBalancer"),
        number(13, 0),
    ]
    .concat();
    let status = field(1, b"");
    let object = [field(1, &metadata), field(2, &spec), field(3, &status)].concat();
    assert_eq!(
        decode(&body("v1", "Service", &object)),
        Ok(json!({
            "kind": "Service", "apiVersion": "v1",
            "metadata": {"name": "web", "labels": {"app": "web"}},
            "spec": {
                "ports": [{"name": "80", "protocol": "TCP", "port": 80, "targetPort": 8080}],
                "selector": {"app": "web"}, "type": "LoadBalancer",
            },
            "status": {"loadBalancer": {}},
        }))
    );
}

#[test]
fn zeros_behind_pointers_and_inlined_messages_stay() {
    let volume = [field(1, b"v"), field(2, &field(2, b""))].concat();
    let template = field(2, &field(1, &volume));
    let spec = [number(1, 0), field(3, &template), number(5, 0)].concat();
    assert_eq!(
        decode(&body("apps/v1", "Deployment", &field(2, &spec))),
        Ok(json!({
            "kind": "Deployment", "apiVersion": "apps/v1",
            "spec": {"replicas": 0, "template": {"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}},
        }))
    );
}

#[test]
fn other_messages_are_known_by_their_kind() {
    let options = decode(&body("policy/v1", "DeleteOptions", &number(1, 0)));
    assert_eq!(options, Ok(json!({"kind": "DeleteOptions", "apiVersion": "policy/v1", "gracePeriodSeconds": 0})));
    let time = [number(1, 60), number(2, 0)].concat();
    let lease = field(2, &field(4, &time));
    assert_eq!(
        decode(&body("coordination.k8s.io/v1", "Lease", &lease)),
        Ok(
            json!({"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "spec": {"renewTime": "1970-01-01T00:01:00Z"}})
        )
    );
}

#[test]
fn malformed_bodies_are_refused_not_guessed() {
    let whole = body("v1", "Pod", &field(2, &field(2, &field(1, b"web"))));
    assert!(decode(&whole).is_ok());
    for end in 0..whole.len() {
        // Cut anywhere: an error, or an object that lost its end; never a panic.
        let _ = decode(&whole[..end]);
    }
    for (bytes, words) in [
        (b"{}".to_vec(), "provided data does not appear to be a protobuf message, expected prefix"),
        (body("v1", "Thing", &[]), "no kind \"Thing\" is registered for version \"v1\" in protobuf"),
        (body("v1", "Pod", &[0x0b]), "proto: illegal wireType 3"),
        (body("v1", "Pod", &[0x0a, 0x7f]), "unexpected EOF"),
        (body("v1", "Pod", &[0xff; 12]), "proto: integer overflow"),
        (body("v1", "Pod", &number(1, 1)), "proto: wrong wireType for a field"),
        (body("v1", "Pod", &field(1, &field(1, &[0xff]))), "proto: a text is not UTF-8"),
    ] {
        assert_eq!(decode(&bytes), Err(words.to_owned()));
    }
}
