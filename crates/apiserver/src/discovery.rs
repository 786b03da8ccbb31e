//! What is served: discovery documents, version, health and OpenAPI.

use std::sync::Arc;

use http::request::Parts;
use http::{HeaderValue, Response};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::request::{Accept, Path, accepted, parse_path};
use crate::resource::ResourceKind;
use crate::rest::{self, whole, written};
use crate::server::{Core, ResponseBody};
use crate::status::ApiError;
use crate::{crd, openapi};

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// What identifies this process's OpenAPI documents to clients that cache them.
pub(crate) struct OpenApiCache {
    nonce: String,
}

impl Default for OpenApiCache {
    fn default() -> Self {
        Self { nonce: uuid::Uuid::new_v4().to_string() }
    }
}

/// Answers everything that is not a resource.
pub(crate) fn answer(core: &Arc<Core>, parts: &Parts) -> Result<Response<ResponseBody>, ApiError> {
    let path = parts.uri.path().trim_end_matches('/');
    if !matches!(parts.method, http::Method::GET | http::Method::HEAD) {
        return Err(ApiError::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        ));
    }
    let accept = Accept::negotiate(&parts.headers);
    let aggregated = accepted(&parts.headers)
        .iter()
        .any(|range| range.parameter("as") == "APIGroupDiscoveryList" && range.parameter("v") == "v2");
    match path {
        "/api" | "/apis" if aggregated => return Ok(aggregated_discovery(core, path == "/api")),
        "" => return Ok(written(200, &json!({"paths": root_paths(core)}), accept?)),
        "/api" => return Ok(written(200, &core_versions(core), accept?)),
        "/apis" => return Ok(written(200, &group_list(core), accept?)),
        "/version" => return Ok(written(200, &version(), accept?)),
        "/healthz" | "/livez" | "/readyz" => return Ok(whole(200, "text/plain; charset=utf-8", "ok")),
        "/openapi/v2" => return openapi_v2(parts),
        "/openapi/v3" => return Ok(written(200, &openapi_index(core), Accept::default())),
        _ => {}
    }
    for health in ["/healthz/", "/livez/", "/readyz/"] {
        if path.starts_with(health) {
            return Ok(whole(200, "text/plain; charset=utf-8", "ok"));
        }
    }
    if let Some(group_version) = path.strip_prefix("/openapi/v3/") {
        return openapi_v3(core, group_version);
    }
    match parse_path(path) {
        Path::Group(group) => {
            let groups = core.registry.served().groups();
            let found = groups.iter().find(|(name, _)| *name == group && !name.is_empty());
            let (name, versions) = found.ok_or_else(ApiError::no_such_resource)?;
            let mut object = group_object(name, versions);
            if let Some(map) = object.as_object_mut() {
                map.insert("kind".to_owned(), "APIGroup".into());
                map.insert("apiVersion".to_owned(), "v1".into());
            }
            Ok(written(200, &object, accept?))
        }
        Path::Version(group, version) => {
            let kinds = core.registry.served().of_version(&group, &version);
            if kinds.is_empty() {
                return Err(ApiError::no_such_resource());
            }
            let resources: Vec<Value> = kinds.iter().flat_map(|kind| resource_entries(kind)).collect();
            let list = json!({"kind": "APIResourceList", "apiVersion": "v1",
                "groupVersion": group_version(&group, &version), "resources": resources});
            Ok(written(200, &list, accept?))
        }
        _ => Ok(whole(404, "text/plain; charset=utf-8", "404 page not found\n")),
    }
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "33", "gitVersion": concat!("v1.33.0+towpath.", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "none",
        "compiler": "rustc", "platform": format!("linux/{}", std::env::consts::ARCH),
    })
}

fn root_paths(core: &Core) -> Vec<String> {
    let mut paths = vec!["/api".to_owned(), "/apis".to_owned()];
    for (group, versions) in core.registry.served().groups() {
        if !group.is_empty() {
            paths.push(format!("/apis/{group}"));
        }
        for version in versions {
            let prefix = if group.is_empty() { "/api" } else { "/apis" };
            paths.push(format!("{prefix}/{}", group_version(&group, &version)));
        }
    }
    paths.extend(["/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"].map(str::to_owned));
    paths.sort();
    paths
}

fn core_versions(core: &Core) -> Value {
    let groups = core.registry.served().groups();
    let versions = groups.into_iter().find(|(group, _)| group.is_empty()).map(|(_, versions)| versions);
    json!({"kind": "APIVersions", "versions": versions.unwrap_or_default(), "serverAddressByClientCIDRs": []})
}

fn group_object(group: &str, versions: &[String]) -> Value {
    let entry = |version: &String| json!({"groupVersion": group_version(group, version), "version": version});
    let entries: Vec<Value> = versions.iter().map(entry).collect();
    let preferred = entries.first().cloned();
    json!({"name": group, "versions": entries, "preferredVersion": preferred})
}

fn group_list(core: &Core) -> Value {
    let groups = core.registry.served().groups();
    let groups: Vec<Value> = groups
        .iter()
        .filter(|(group, _)| !group.is_empty())
        .map(|(group, versions)| group_object(group, versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// Name; group, version and kind of what it answers; verbs.
type SpecialRow = (&'static str, (&'static str, &'static str, &'static str), &'static [&'static str]);

/// A subresource as discovery shows it.
struct Subresource {
    name: &'static str,
    /// Group, version and kind of what it answers.
    kind: (String, String, String),
    verbs: &'static [&'static str],
}

fn subresources(kind: &ResourceKind) -> Vec<Subresource> {
    let own = (kind.gvk.group.to_string(), kind.gvk.version.to_string(), kind.gvk.kind.to_string());
    let of = |group: &str, version: &str, kind: &str| (group.to_owned(), version.to_owned(), kind.to_owned());
    let mut all = Vec::new();
    if kind.scale.is_some() {
        all.push(Subresource {
            name: "scale",
            kind: of("autoscaling", "v1", "Scale"),
            verbs: &["get", "patch", "update"],
        });
    }
    if kind.status {
        all.push(Subresource { name: "status", kind: own.clone(), verbs: &["get", "patch", "update"] });
    }
    let special: &[SpecialRow] = match (kind.gvk.group.as_ref(), kind.plural.as_ref()) {
        ("", "pods") => &[
            ("attach", ("", "v1", "PodAttachOptions"), &["create", "get"]),
            ("binding", ("", "v1", "Binding"), &["create"]),
            ("ephemeralcontainers", ("", "v1", "Pod"), &["get", "patch", "update"]),
            ("eviction", ("policy", "v1", "Eviction"), &["create"]),
            ("exec", ("", "v1", "PodExecOptions"), &["create", "get"]),
            ("log", ("", "v1", "Pod"), &["get"]),
            ("portforward", ("", "v1", "PodPortForwardOptions"), &["create", "get"]),
        ],
        ("", "serviceaccounts") => &[("token", ("authentication.k8s.io", "v1", "TokenRequest"), &["create"])],
        ("", "namespaces") => &[("finalize", ("", "v1", "Namespace"), &["update"])],
        ("certificates.k8s.io", "certificatesigningrequests") => {
            &[("approval", ("certificates.k8s.io", "v1", "CertificateSigningRequest"), &["get", "patch", "update"])]
        }
        _ => &[],
    };
    all.extend(special.iter().map(|(name, (group, version, kind), verbs)| Subresource {
        name,
        kind: of(group, version, kind),
        verbs,
    }));
    all.sort_by_key(|subresource| subresource.name);
    all
}

fn verbs(kind: &ResourceKind) -> &'static [&'static str] {
    if kind.stored { &VERBS } else { &["create"] }
}

fn resource_entries(kind: &ResourceKind) -> Vec<Value> {
    let mut entry = Map::new();
    entry.insert("name".to_owned(), kind.plural.as_ref().into());
    entry.insert("singularName".to_owned(), kind.singular.as_ref().into());
    entry.insert("namespaced".to_owned(), kind.namespaced.into());
    entry.insert("kind".to_owned(), kind.gvk.kind.as_ref().into());
    entry.insert("verbs".to_owned(), json!(verbs(kind)));
    if !kind.short_names.is_empty() {
        entry.insert("shortNames".to_owned(), json!(kind.short_names));
    }
    if !kind.categories.is_empty() {
        entry.insert("categories".to_owned(), json!(kind.categories));
    }
    if kind.stored {
        entry.insert("storageVersionHash".to_owned(), storage_hash(kind).into());
    }
    let mut all = vec![Value::Object(entry)];
    for subresource in subresources(kind) {
        let (group, version, object_kind) = subresource.kind;
        let mut entry = Map::new();
        entry.insert("name".to_owned(), format!("{}/{}", kind.plural, subresource.name).into());
        entry.insert("singularName".to_owned(), "".into());
        entry.insert("namespaced".to_owned(), kind.namespaced.into());
        if group != kind.gvk.group || version != kind.gvk.version {
            entry.insert("group".to_owned(), group.into());
            entry.insert("version".to_owned(), version.into());
        }
        entry.insert("kind".to_owned(), object_kind.into());
        entry.insert("verbs".to_owned(), json!(subresource.verbs));
        all.push(Value::Object(entry));
    }
    all
}

fn storage_hash(kind: &ResourceKind) -> String {
    use base64::Engine;
    let digest = Sha256::digest(format!("{}/{}/{}", kind.gvk.group, kind.gvk.version, kind.gvk.kind));
    base64::engine::general_purpose::STANDARD.encode(digest.get(..8).unwrap_or_default())
}

fn aggregated_discovery(core: &Core, core_group: bool) -> Response<ResponseBody> {
    let served = core.registry.served();
    let items: Vec<Value> = served
        .groups()
        .iter()
        .filter(|(group, _)| group.is_empty() == core_group)
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let kinds = served.of_version(group, version);
                    let resources: Vec<Value> = kinds.iter().map(|kind| aggregated_resource(kind)).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    let list = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items});
    let mut response = whole(200, AGGREGATED, list.to_string());
    response.headers_mut().insert(http::header::VARY, HeaderValue::from_static("Accept"));
    response
}

fn aggregated_resource(kind: &ResourceKind) -> Value {
    let response_kind =
        |(group, version, kind): (&str, &str, &str)| json!({"group": group, "version": version, "kind": kind});
    let mut entry = Map::new();
    entry.insert("resource".to_owned(), kind.plural.as_ref().into());
    let gvk = (kind.gvk.group.as_ref(), kind.gvk.version.as_ref(), kind.gvk.kind.as_ref());
    entry.insert("responseKind".to_owned(), response_kind(gvk));
    entry.insert("scope".to_owned(), if kind.namespaced { "Namespaced" } else { "Cluster" }.into());
    entry.insert("singularResource".to_owned(), kind.singular.as_ref().into());
    entry.insert("verbs".to_owned(), json!(verbs(kind)));
    if !kind.short_names.is_empty() {
        entry.insert("shortNames".to_owned(), json!(kind.short_names));
    }
    if !kind.categories.is_empty() {
        entry.insert("categories".to_owned(), json!(kind.categories));
    }
    let subresources: Vec<Value> = subresources(kind)
        .iter()
        .map(|subresource| {
            let (group, version, object_kind) = &subresource.kind;
            json!({"subresource": subresource.name, "responseKind": response_kind((group, version, object_kind)),
                "verbs": subresource.verbs})
        })
        .collect();
    if !subresources.is_empty() {
        entry.insert("subresources".to_owned(), subresources.into());
    }
    Value::Object(entry)
}

fn openapi_index(core: &Core) -> Value {
    let mut paths = Map::new();
    for (group, versions) in core.registry.served().groups() {
        for version in versions {
            let prefix = if group.is_empty() { "api" } else { "apis" };
            let path = format!("{prefix}/{}", group_version(&group, &version));
            // A custom group's document changes with its definitions; a built-in one only with the process.
            let state = if core.registry.is_builtin_group(&group) { 0 } else { crd::definitions_version(core) };
            let digest = Sha256::digest(format!("{}{path}{state}", core.openapi.nonce));
            let hash: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
            let url = format!("/openapi/v3/{path}?hash={hash}");
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

fn openapi_v3(core: &Core, path: &str) -> Result<Response<ResponseBody>, ApiError> {
    let (group, version) = match path.split('/').collect::<Vec<_>>().as_slice() {
        ["api", version] => (String::new(), (*version).to_owned()),
        ["apis", group, version] => ((*group).to_owned(), (*version).to_owned()),
        _ => return Err(ApiError::no_such_resource()),
    };
    let document = openapi::v3(&group, &version)
        .or_else(|| crd::openapi_v3(core, &group, &version))
        .ok_or_else(ApiError::no_such_resource)?;
    Ok(rest::whole(200, "application/json", document.to_string()))
}

fn openapi_v2(parts: &Parts) -> Result<Response<ResponseBody>, ApiError> {
    let json_wanted = accepted(&parts.headers)
        .iter()
        .any(|range| matches!(range.media.as_str(), "application/json" | "*/*" | "application/*"));
    // kubectl asks for protobuf here and, refused, goes on with the v3 documents.
    if !json_wanted && !accepted(&parts.headers).is_empty() {
        return Err(ApiError::not_acceptable());
    }
    Ok(whole(200, "application/json", openapi::v2().to_string()))
}
