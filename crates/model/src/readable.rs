//! Objects of the API as they come: one that does not fit its type must cost itself, never the list that it is in.
//!
//! The API server is written in Go, where a field that is `null` is its zero value; a typed list of another language fails
//! as a whole then. Who may write one such field (`status.conditions[].lastTransitionTime` of a Service, say) would end every
//! watch of that kind. So each object is read by itself, and the parts that nobody here looks at are dropped first.

mod sieve;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{Metadata, Resource};
use serde::de::{DeserializeOwned, DeserializeSeed};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::load_balancer::{INGRESS_FIELD, MANAGER};
use sieve::Place;

/// An object of type `K`, or why it is none, with its metadata in either case.
#[derive(Clone, Debug)]
pub struct Readable<K> {
    metadata: ObjectMeta,
    object: Result<K, String>,
}

impl<K> Readable<K> {
    /// The object; else why it does not fit its type, for people.
    ///
    /// # Errors
    /// It does not fit.
    pub fn object(&self) -> Result<&K, &str> {
        self.object.as_ref().map_err(String::as_str)
    }

    /// As [`Readable::object`], for who keeps it.
    ///
    /// # Errors
    /// It does not fit.
    pub fn into_object(self) -> Result<K, String> {
        self.object
    }
}

impl<K: Resource> Resource for Readable<K> {
    const API_VERSION: &'static str = K::API_VERSION;
    const GROUP: &'static str = K::GROUP;
    const KIND: &'static str = K::KIND;
    const VERSION: &'static str = K::VERSION;
    const URL_PATH_SEGMENT: &'static str = K::URL_PATH_SEGMENT;
    type Scope = K::Scope;
}

impl<K: Metadata<Ty = ObjectMeta>> Metadata for Readable<K> {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Clients want their types to be writable too; this one is only read.
impl<K: Serialize> Serialize for Readable<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.object {
            Ok(object) => object.serialize(serializer),
            Err(reason) => Err(serde::ser::Error::custom(reason)),
        }
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Readable<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Place::Object.deserialize(deserializer)?;
        trim(&mut value);
        let metadata = value.get("metadata").map(essentials).unwrap_or_default();
        let object = serde_json::from_value(value).map_err(|error| error.to_string());
        Ok(Self { metadata, object })
    }
}

/// Drops who wrote which field but for the one entry that says that a load balancer's addresses are ours; and gives conditions the time that their type must have and a Go client may leave out.
fn trim(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        let fields = metadata.remove("managedFields");
        let is_ours = |entry: &Value| {
            entry.get("manager").and_then(Value::as_str) == Some(MANAGER)
                && entry.get("fieldsV1").and_then(|fields| fields.pointer(INGRESS_FIELD)).is_some()
        };
        if fields.as_ref().and_then(Value::as_array).is_some_and(|entries| entries.iter().any(is_ours)) {
            let kept = json!([{"manager": MANAGER, "fieldsV1": {"f:status": {"f:loadBalancer": {"f:ingress": {}}}}}]);
            metadata.insert("managedFields".to_owned(), kept);
        }
    }
    let conditions = value.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        condition.retain(|_, field| !field.is_null());
        condition.entry("lastTransitionTime").or_insert_with(|| Value::from("1970-01-01T00:00:00Z"));
    }
}

/// What an object is known by, read field by field.
fn essentials(metadata: &Value) -> ObjectMeta {
    let text = |field: &str| metadata.get(field).and_then(Value::as_str).map(str::to_owned);
    ObjectMeta {
        name: text("name"),
        namespace: text("namespace"),
        uid: text("uid"),
        resource_version: text("resourceVersion"),
        ..ObjectMeta::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::Service as Noun;
    use crate::load_balancer::is_ours;
    use k8s_openapi::List;
    use k8s_openapi::api::core::v1::Service;

    fn service(status: &Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "managedFields": [{"manager": "kubectl", "time": null}]},
            "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}]},
            "status": status,
        })
    }

    #[test]
    fn a_condition_whose_time_is_null_costs_nothing() {
        let written_in_go = json!({"conditions": [{"type": "A", "status": "True", "lastTransitionTime": null}]});
        let object = service(&written_in_go);
        assert!(serde_json::from_value::<Service>(object.clone()).is_err(), "else this type is not needed any more");
        let read: Readable<Service> = serde_json::from_value(object).unwrap();
        assert_eq!(Noun::try_from(read.object().unwrap()).unwrap().cluster_ips.len(), 1);
    }

    #[test]
    fn of_who_wrote_what_only_that_the_load_balancers_address_is_ours_is_kept() {
        let mut object = service(&json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}));
        let read = |object: &Value| {
            let read: Readable<Service> = serde_json::from_value(object.clone()).unwrap();
            let object = read.into_object().unwrap();
            (object.metadata.managed_fields.clone().unwrap_or_default().len(), is_ours(&object))
        };
        assert_eq!(read(&object), (0, false));
        let wrote = |manager: &str, field: &str| json!({"manager": manager, "time": null, "fieldsV1": {"f:status": {"f:loadBalancer": {field: {}}}}});
        object["metadata"]["managedFields"] = json!([wrote("metallb", "f:ingress"), wrote(MANAGER, "f:other")]);
        assert_eq!(read(&object), (0, false));
        object["metadata"]["managedFields"] = json!([wrote("metallb", "f:ingress"), wrote(MANAGER, "f:ingress")]);
        assert_eq!(read(&object), (1, true));
    }

    #[test]
    fn what_does_not_fit_costs_itself_and_says_why_and_who_it_is() {
        let bad = service(&json!({"loadBalancer": "none"}));
        let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": [bad, service(&json!({}))]});
        assert!(serde_json::from_value::<List<Service>>(list.clone()).is_err());
        let items: Vec<Readable<Service>> = serde_json::from_value(list["items"].clone()).unwrap();
        assert!(items[0].object().unwrap_err().contains("none"), "{:?}", items[0]);
        assert_eq!(items[0].metadata().name.as_deref(), Some("web"));
        assert!(items[1].object().is_ok());
    }

    /// JSON whose names are often those that are looked at.
    fn any_json() -> impl Strategy<Value = Value> {
        let names =
            ["metadata", "managedFields", "manager", "fieldsV1", "f:status", "f:loadBalancer", "f:ingress", "name"];
        let name = proptest::sample::select(names.to_vec()).prop_map(str::to_owned);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-1e9..1e9).prop_map(Value::from),
            Just(Value::from(MANAGER)),
            ".{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(10, 64, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((name.clone(), inner), 0..5)
                    .prop_map(|all| Value::Object(all.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_left_out_while_reading_is_what_would_be_dropped(status in any_json(), fields in any_json(), object in any_json()) {
            let mut whole = service(&status);
            whole["metadata"]["managedFields"] = fields;
            for object in [whole, object] {
                let text = object.to_string();
                let mut object: Value = serde_json::from_str(&text).unwrap();
                let mut read = Place::Object.deserialize(&mut serde_json::Deserializer::from_str(&text)).unwrap();
                trim(&mut object);
                trim(&mut read);
                prop_assert_eq!(read, object);
            }
        }
    }
}
