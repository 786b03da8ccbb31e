//! Changing an object: read, change, check, write if nobody else wrote; again if somebody did.

use std::sync::Arc;

use serde_json::Value;

use super::create::{CreateOptions, check_fields, check_type, create_object, refusal};
use super::{Call, Reply, delete, read};
use crate::alloc::Reservation;
use crate::patch::managed;
use crate::request::decode_body;
use crate::status::ApiError;
use crate::store::{Expect, Key, WriteRefused};
use crate::{admission, crd, meta};

/// How often an unconditional change is tried when others write at the same time.
const ATTEMPTS: usize = 20;

/// Who is written down as the owner of the changed fields.
#[derive(Clone, Debug)]
pub(crate) enum Tracking {
    /// An `Update` entry of this manager.
    Update { manager: String, subresource: String },
    /// The change brought its own managedFields (server-side apply).
    Given,
    /// Nobody: the server's own bookkeeping.
    Untracked,
}

/// Which rules an update follows.
pub(crate) struct UpdateOptions {
    /// Empty, `status`, or another subresource that has made its own checks.
    pub(crate) subresource: &'static str,
    pub(crate) tracking: Tracking,
}

/// A changed object.
pub(crate) struct Changed {
    pub(crate) object: Value,
    /// Whether fields unknown to the schema have to be looked for.
    pub(crate) check_fields: bool,
}

/// `update` (PUT) of an object or of its status.
pub(crate) async fn replace(call: &Arc<Call>, body: &[u8], subresource: &'static str) -> Result<Reply, ApiError> {
    let mut object = decode_body(&call.headers, body)?;
    check_type(call, &mut object)?;
    let name = meta::name(&object);
    if name.is_empty() {
        meta::set_meta(&mut object, "name", call.target.name.as_str().into());
    } else if name != call.target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.target.name
        )));
    }
    check_fields(call, &mut object)?;
    if subresource.is_empty() && creates_on_update(call) {
        // Whoever names a uid means an object that is gone; a version alone is not looked at.
        same_uid(call, &call.target.name, "", &object)?;
        meta::remove_meta(&mut object, "resourceVersion");
        let tracking = Tracking::Update { manager: call.manager(), subresource: String::new() };
        return Ok(Reply::Object(201, create_object(call, object, CreateOptions { tracking }).await?));
    }
    let tracking = Tracking::Update { manager: call.manager(), subresource: subresource.to_owned() };
    let options = UpdateOptions { subresource, tracking };
    let change = |_old: &Value| Ok(Changed { object: object.clone(), check_fields: false });
    Ok(Reply::Object(200, update_object(call, &call.target.name, &options, change).await?))
}

/// Kinds whose strategy has `AllowCreateOnUpdate`.
fn creates_on_update(call: &Call) -> bool {
    let kind = &call.kind;
    let allowed = matches!(
        (kind.gvk.group.as_ref(), kind.plural.as_ref()),
        ("", "endpoints" | "events" | "limitranges")
            | ("coordination.k8s.io", "leases")
            | ("rbac.authorization.k8s.io", _)
    );
    let key = Key::new(&call.target.namespace, &call.target.name);
    allowed && call.core.store.get(&kind.storage_key, &key).is_none()
}

/// Changes an object until the write succeeds. `change` is given the current object (in this call's version).
pub(crate) async fn update_object<F>(
    call: &Call,
    name: &str,
    options: &UpdateOptions,
    change: F,
) -> Result<Value, ApiError>
where
    F: Fn(&Value) -> Result<Changed, ApiError>,
{
    let mut version = 0;
    for _ in 0..ATTEMPTS {
        match update_once(call, name, options, &change, &mut version) {
            Ok(object) => {
                call.core.store.wait_durable(version).await.map_err(ApiError::internal)?;
                return Ok(object);
            }
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::Again) => {}
        }
    }
    Err(ApiError::modified(&call.kind, name))
}

enum Attempt {
    Failed(ApiError),
    Again,
}

impl From<ApiError> for Attempt {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

fn update_once<F>(
    call: &Call,
    name: &str,
    options: &UpdateOptions,
    change: &F,
    version: &mut u64,
) -> Result<Value, Attempt>
where
    F: Fn(&Value) -> Result<Changed, ApiError>,
{
    let kind = &call.kind;
    let key = Key::new(&call.target.namespace, name);
    let stored = call.core.store.get(&kind.storage_key, &key).ok_or_else(|| ApiError::not_found(kind, name))?;
    let old = read::parsed(kind, &stored)?;
    let changed = change(&old)?;
    let mut object = changed.object;
    if changed.check_fields {
        check_fields(call, &mut object)?;
    }
    preconditions(call, name, &old, &object, stored.version)?;
    keep_identity(&mut object, &old);
    let mut reservation = prepare(call, name, options, &mut object, &old)?;
    if managed::same_but_times(&object, &old) {
        *version = stored.version;
        return Ok(old);
    }
    if call.dry_run {
        return Ok(object);
    }
    let written = if delete::is_finished(kind, &object) {
        call.core.store.remove(&kind.storage_key, &key, object, stored.version)
    } else {
        call.core.store.put(&kind.storage_key, &key, object, Expect::Version(stored.version))
    };
    match written {
        Ok(written) => {
            *version = written.version;
            if let Some(reservation) = reservation.as_mut() {
                reservation.keep();
            }
            after_write(call, &key, &written.object);
            Ok(written.object)
        }
        // A change that named a version finds another one then, and fails.
        Err(WriteRefused::Changed) => Err(Attempt::Again),
        Err(refused) => Err(refusal(call, name, refused).into()),
    }
}

/// Admission, defaults, ownership and validation of a changed object.
fn prepare<'a>(
    call: &'a Call,
    name: &str,
    options: &UpdateOptions,
    object: &mut Value,
    old: &Value,
) -> Result<Option<Reservation<'a>>, ApiError> {
    let kind = &call.kind;
    let mut reservation = None;
    match options.subresource {
        "status" => {
            kind.strategy.prepare_status_update(object, old);
            kind.strategy.default_object(object);
        }
        "" => {
            admission::admit_update(call, object);
            kind.strategy.prepare_update(object, old);
            kind.strategy.default_object(object);
            reservation = Some(call.core.services.reserve(call, object, Some(old))?);
        }
        _ => {}
    }
    if let Tracking::Update { manager, subresource } = &options.tracking {
        managed::track(kind, Some(old), object, manager, subresource);
    } else if matches!(options.tracking, Tracking::Untracked) {
        meta::copy_meta(object, old, "managedFields");
    }
    let errors = match options.subresource {
        "" => kind.strategy.validate_update(object, old),
        "status" => kind.strategy.validate_status_update(object, old),
        _ => Vec::new(),
    };
    if !errors.is_empty() {
        return Err(ApiError::invalid_object(kind, name, &errors));
    }
    if options.subresource.is_empty() {
        kind.strategy.warnings(object).into_iter().for_each(|warning| call.warn(warning));
        crd::check_definition(call, object)?;
    }
    Ok(reservation)
}

fn after_write(call: &Call, key: &Key, object: &Value) {
    if call.core.store.get(&call.kind.storage_key, key).is_some() {
        crd::changed(&call.core, &call.kind, object);
    } else {
        delete::after_removal(call, object);
    }
}

/// Checks uid and resource version of the new object, where it has them.
fn preconditions(call: &Call, name: &str, old: &Value, new: &Value, version: u64) -> Result<(), ApiError> {
    same_uid(call, name, meta::meta(old, "uid"), new)?;
    let given = meta::meta(new, "resourceVersion");
    if given.is_empty() {
        return Ok(());
    }
    match given.parse::<u64>() {
        Ok(number) if number == 0 || number == version => Ok(()),
        Ok(_) => Err(ApiError::modified(&call.kind, name)),
        Err(_) => Err(ApiError::bad_request(format!("resourceVersion {given:?} is not a version of this server"))),
    }
}

/// A uid that the new object names must be the one that is stored.
fn same_uid(call: &Call, name: &str, had: &str, new: &Value) -> Result<(), ApiError> {
    let given = meta::meta(new, "uid");
    if given.is_empty() || given == had {
        return Ok(());
    }
    let why = format!(
        "StorageError: invalid object, Code: 4, Key: {}/{name}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {given}, UID in object meta: {had}",
        call.target.namespace
    );
    Err(ApiError::conflict(&call.kind, name, &why))
}

/// What no client may change.
fn keep_identity(object: &mut Value, old: &Value) {
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "name",
        "namespace",
        "generateName",
        "resourceVersion",
    ] {
        meta::copy_meta(object, old, field);
    }
    meta::remove_meta(object, "selfLink");
}
