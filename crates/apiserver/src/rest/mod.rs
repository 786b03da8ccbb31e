//! From an HTTP request to its answer: who, what, may they, then the verb.

mod convert;
mod create;
mod delete;
mod patching;
mod read;
mod render;
mod subresources;
mod update;
mod watch;

pub(crate) use create::{CreateOptions, create_object};
pub(crate) use update::{Changed, Tracking, UpdateOptions, update_object};

use std::sync::{Arc, Mutex, PoisonError};

use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes};
use hyper::upgrade::OnUpgrade;
use serde_json::Value;

use crate::auth::{Attributes, UserInfo, authorize};
use crate::request::{Accept, Path, Query, Target, parse_path};
use crate::resource::ResourceKind;
use crate::server::{Core, ResponseBody};
use crate::status::ApiError;
use crate::{discovery, meta};

/// The largest body that is read, as kube-apiserver has it (3 MiB).
const MAX_BODY: usize = 3 << 20;

/// What is known of the sender before the request is read.
pub(crate) enum Who {
    /// A connection, perhaps with a verified client certificate.
    Presented(Arc<Option<UserInfo>>),
    /// An in-process caller.
    Known(UserInfo),
}

/// What is done with fields that the schema does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// One request for a resource.
pub(crate) struct Call {
    pub(crate) core: Arc<Core>,
    pub(crate) user: UserInfo,
    pub(crate) kind: Arc<ResourceKind>,
    pub(crate) target: Target,
    pub(crate) query: Query,
    pub(crate) accept: Accept,
    pub(crate) headers: http::HeaderMap,
    pub(crate) dry_run: bool,
    warnings: Mutex<Vec<String>>,
}

impl Call {
    /// A call that the server makes itself, as an administrator.
    pub(crate) fn internal(core: &Arc<Core>, kind: Arc<ResourceKind>, namespace: &str) -> Self {
        let target = Target {
            group: kind.gvk.group.to_string(),
            version: kind.gvk.version.to_string(),
            resource: kind.plural.to_string(),
            namespace: namespace.to_owned(),
            ..Target::default()
        };
        Self {
            core: Arc::clone(core),
            user: UserInfo::new("system:apiserver", &["system:masters"]),
            kind,
            target,
            query: Query::default(),
            accept: Accept::default(),
            headers: http::HeaderMap::new(),
            dry_run: false,
            warnings: Mutex::default(),
        }
    }

    /// Adds a `Warning:` header to the answer.
    pub(crate) fn warn(&self, text: impl Into<String>) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        let text = text.into();
        if !warnings.contains(&text) {
            warnings.push(text);
        }
    }

    /// Who is written into managedFields: `fieldManager`, or the user agent's program name.
    pub(crate) fn manager(&self) -> String {
        let given = self.query.get("fieldManager");
        if !given.is_empty() {
            return given.to_owned();
        }
        let agent =
            self.headers.get(http::header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let program = agent.split('/').next().unwrap_or_default();
        if program.is_empty() { self.user.name.clone() } else { program.chars().take(128).collect() }
    }

    pub(crate) fn api_version(&self) -> String {
        api_version(&self.kind)
    }

    pub(crate) fn field_validation(&self) -> Result<FieldValidation, ApiError> {
        match self.query.get("fieldValidation") {
            "Strict" => Ok(FieldValidation::Strict),
            "" | "Warn" => Ok(FieldValidation::Warn),
            "Ignore" => Ok(FieldValidation::Ignore),
            other => Err(ApiError::new(
                422,
                "Invalid",
                format!(
                    "fieldValidation: Unsupported value: {other:?}: supported values: \"Ignore\", \"Strict\", \"Warn\""
                ),
            )),
        }
    }
}

/// `v1` or `apps/v1`.
pub(crate) fn api_version(kind: &ResourceKind) -> String {
    if kind.gvk.group.is_empty() {
        kind.gvk.version.to_string()
    } else {
        format!("{}/{}", kind.gvk.group, kind.gvk.version)
    }
}

/// What is answered, before it is put into the form that was asked for.
pub(crate) enum Reply {
    /// One object of the resource (or a review and the like).
    Object(u16, Value),
    /// Something that is answered as it is: Status, Scale, lists made ready.
    Value(u16, Value),
    /// JSON text made ready.
    Json(Bytes),
    /// A whole answer: streams and upgrades.
    Response(Response<ResponseBody>),
}

/// Answers one request; never fails.
pub(crate) async fn answer<B>(core: Arc<Core>, who: Who, mut request: Request<B>) -> Response<ResponseBody>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: std::fmt::Display,
{
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (parts, body) = request.into_parts();
    let accept = Accept::negotiate(&parts.headers).unwrap_or_default();
    let body = match Limited::new(body.map_err(|error| error.to_string()), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let too_large = error.downcast_ref::<http_body_util::LengthLimitError>().is_some();
            let error = if too_large {
                ApiError::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {MAX_BODY}"))
            } else {
                ApiError::bad_request(format!("the body could not be read: {error}"))
            };
            return failure(&error, accept);
        }
    };
    let started = std::time::Instant::now();
    let (method, uri) = (parts.method.clone(), parts.uri.clone());
    let response = match route(core, who, parts, body, upgrade).await {
        Ok(response) => response,
        Err(error) => failure(&error, accept),
    };
    tracing::debug!(%method, %uri, code = response.status().as_u16(), took = ?started.elapsed(), "request");
    response
}

async fn route(
    core: Arc<Core>,
    who: Who,
    parts: Parts,
    body: Bytes,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<ResponseBody>, ApiError> {
    let user = match who {
        Who::Known(user) => user,
        Who::Presented(certificate) => {
            core.authenticator.identify(&core, certificate.as_ref().as_ref(), &parts.headers)?
        }
    };
    let user = crate::auth::impersonated(&core, user, &parts.headers)?;
    let query = Query::parse(parts.uri.query());
    let path = parts.uri.path();
    let Path::Resource(target) = parse_path(path) else {
        let verb = parts.method.as_str().to_ascii_lowercase();
        let attributes = Attributes {
            user: &user,
            verb: &verb,
            group: "",
            version: "",
            resource: "",
            subresource: "",
            namespace: "",
            name: "",
            path,
        };
        authorize(&core, &attributes)?;
        return discovery::answer(&core, &parts);
    };
    let verb = verb(&parts.method, &target, &query)?;
    authorize_target(&core, &user, verb, &target, &query, path)?;
    let kind = core
        .registry
        .served()
        .get(&target.group, &target.version, &target.resource)
        .filter(|kind| kind.namespaced || target.namespace.is_empty())
        .ok_or_else(ApiError::no_such_resource)?;
    let call = Call {
        accept: if verb == "connect" { Accept::default() } else { Accept::negotiate(&parts.headers)? },
        dry_run: dry_run(&query)?,
        core,
        user,
        kind,
        target,
        query,
        headers: parts.headers,
        warnings: Mutex::default(),
    };
    let call = Arc::new(call);
    let reply = match dispatch(&call, verb, &body, upgrade).await {
        Ok(reply) => reply,
        Err(error) => {
            let mut response = failure(&error, call.accept);
            add_warnings(&call, &mut response);
            return Ok(response);
        }
    };
    let mut response = render::respond(&call, reply)?;
    add_warnings(&call, &mut response);
    Ok(response)
}

fn dry_run(query: &Query) -> Result<bool, ApiError> {
    match query.get("dryRun") {
        "" => Ok(false),
        "All" => Ok(true),
        other => Err(ApiError::new(
            422,
            "Invalid",
            format!("dryRun: Unsupported value: {other:?}: supported values: \"All\""),
        )),
    }
}

fn verb(method: &Method, target: &Target, query: &Query) -> Result<&'static str, ApiError> {
    let collection = target.name.is_empty();
    Ok(match *method {
        Method::GET | Method::HEAD if collection && query.flag("watch") => "watch",
        Method::GET | Method::HEAD if collection => "list",
        Method::GET | Method::HEAD if query.flag("watch") && target.subresource.is_empty() => "watch",
        Method::GET | Method::HEAD => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if collection => "deletecollection",
        Method::DELETE => "delete",
        _ => {
            return Err(ApiError::new(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            ));
        }
    })
}

fn authorize_target(
    core: &Core,
    user: &UserInfo,
    verb: &str,
    target: &Target,
    query: &Query,
    path: &str,
) -> Result<(), ApiError> {
    // A list or watch of one name is authorized as that name, so that roles with resourceNames apply.
    let selected = query.get("fieldSelector").strip_prefix("metadata.name=").filter(|name| !name.contains(','));
    let name = match (target.name.as_str(), selected) {
        ("", Some(name)) => name,
        (name, _) => name,
    };
    let core_group = target.group.is_empty();
    let namespace = if core_group && target.resource == "namespaces" { &target.name } else { &target.namespace };
    let attributes = Attributes {
        user,
        verb,
        group: &target.group,
        version: &target.version,
        resource: &target.resource,
        subresource: &target.subresource,
        namespace,
        name,
        path,
    };
    authorize(core, &attributes)
}

async fn dispatch(call: &Arc<Call>, verb: &str, body: &[u8], upgrade: Option<OnUpgrade>) -> Result<Reply, ApiError> {
    if !call.target.subresource.is_empty() {
        return subresources::dispatch(call, verb, body, upgrade).await;
    }
    if verb != "create" && !call.kind.stored {
        return Err(ApiError::method_not_allowed(&call.kind, verb));
    }
    let named = !call.target.name.is_empty();
    if call.kind.namespaced && call.target.namespace.is_empty() && (named || verb == "create") {
        return Err(ApiError::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource: it is namespaced, so name a namespace",
        ));
    }
    match verb {
        "get" => read::get(call),
        "list" => read::list(call),
        "watch" => watch::watch(call),
        "create" if !named => create::create(call, body).await,
        "update" if named => update::replace(call, body, "").await,
        "patch" if named => patching::patch(call, body, "").await,
        "delete" => delete::delete(call, body).await,
        "deletecollection" => delete::delete_collection(call, body).await,
        _ => Err(ApiError::method_not_allowed(&call.kind, verb)),
    }
}

fn add_warnings(call: &Call, response: &mut Response<ResponseBody>) {
    let warnings = std::mem::take(&mut *call.warnings.lock().unwrap_or_else(PoisonError::into_inner));
    for warning in warnings {
        let text = warning.replace('\\', "\\\\").replace('"', "\\\"").replace(['\n', '\r'], " ");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            response.headers_mut().append(http::header::WARNING, value);
        }
    }
}

/// A body that is all there.
pub(crate) fn full(bytes: impl Into<Bytes>) -> ResponseBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer with a whole body.
pub(crate) fn whole(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response<ResponseBody> {
    let mut response = Response::new(full(body));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// A value as JSON or YAML.
pub(crate) fn written(code: u16, value: &Value, accept: Accept) -> Response<ResponseBody> {
    if accept.yaml {
        match serde_saphyr::to_string(value) {
            Ok(text) => return whole(code, "application/yaml", text),
            Err(error) => tracing::warn!(%error, "an answer could not be written as YAML and goes out as JSON"),
        }
    }
    whole(code, "application/json", value.to_string())
}

/// The answer for an error.
pub(crate) fn failure(error: &ApiError, accept: Accept) -> Response<ResponseBody> {
    let mut response = written(error.code, &error.status(), accept);
    if let Some(seconds) = error.retry_after {
        response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A success `Status` that names the object.
pub(crate) fn success(kind: &ResourceKind, object: &Value) -> Value {
    let mut details = serde_json::Map::new();
    let facts = [
        ("name", meta::name(object)),
        ("group", &kind.gvk.group),
        ("kind", &kind.plural),
        ("uid", meta::meta(object, "uid")),
    ];
    for (key, value) in facts {
        if !value.is_empty() {
            details.insert(key.to_owned(), value.into());
        }
    }
    serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}
