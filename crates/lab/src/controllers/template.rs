//! Pod templates: the hash that tells one from another, and the pods made from them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::Error;

/// Label by which a Deployment tells its ReplicaSets apart.
pub(super) const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// Letters that Kubernetes uses in generated names: no vowels, nothing that looks like another.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A short stable hash of a template, safe in a name. `collision` makes another of the same template.
pub(super) fn hash(template: &PodTemplateSpec, collision: i32) -> Result<String, Error> {
    let mut bytes = serde_json::to_vec(template)?;
    bytes.extend(collision.to_be_bytes());
    // FNV-1a, 64 bits (draft-eastlake-fnv): stable between versions of the program, which std's hasher is not.
    let mut state =
        bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let mut text = String::with_capacity(10);
    let radix = ALPHABET.len() as u64;
    for _ in 0..10 {
        let letter = usize::try_from(state % radix).unwrap_or(0);
        text.push(ALPHABET.get(letter).copied().map_or('x', char::from));
        state /= radix;
    }
    Ok(text)
}

/// A pod of a template, owned by `owner`.
pub(super) fn pod(template: &PodTemplateSpec, namespace: &str, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", owner.name)),
            namespace: Some(namespace.to_owned()),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Adds a label to a template.
pub(super) fn with_label(template: &PodTemplateSpec, key: &str, value: &str) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    meta.labels.get_or_insert_with(BTreeMap::new).insert(key.to_owned(), value.to_owned());
    template
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_depends_on_the_template_and_the_collision_count_only() {
        let one = PodTemplateSpec::default();
        let other = with_label(&one, "app", "web");
        assert_eq!(hash(&one, 0).unwrap(), hash(&one.clone(), 0).unwrap());
        assert_ne!(hash(&one, 0).unwrap(), hash(&other, 0).unwrap());
        assert_ne!(hash(&one, 0).unwrap(), hash(&one, 1).unwrap());
        assert!(hash(&one, 0).unwrap().bytes().all(|b| ALPHABET.contains(&b)));
    }
}
