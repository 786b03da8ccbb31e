//! Service account tokens: issued by `serviceaccounts/NAME/token`, signed with a key of the data directory.
//!
//! They are JSON web tokens (HMAC-SHA256) with the claims Kubernetes puts into them, so clients can read them. A token
//! ends with its time, its service account or the pod it is bound to.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::UserInfo;
use crate::meta;
use crate::rest::Call;
use crate::server::{Core, StartError};
use crate::status::ApiError;
use crate::store::Key;

pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const MIN_SECONDS: i64 = 600;
const MAX_SECONDS: i64 = 1 << 32;
const DEFAULT_SECONDS: i64 = 3600;

pub(crate) struct TokenIssuer {
    key: Vec<u8>,
}

impl TokenIssuer {
    pub(crate) fn open(directory: &Path) -> Result<Self, StartError> {
        let path = directory.join("token.key");
        if !path.exists() {
            let key: Vec<u8> = (0..3).flat_map(|_| uuid::Uuid::new_v4().into_bytes()).collect();
            crate::tls::write_private(&path, &key)?;
        }
        let key = std::fs::read(&path).map_err(|source| StartError::File { path, source })?;
        Ok(Self { key })
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let mut block = [0_u8; 64];
        let hashed;
        let key = if self.key.len() > block.len() {
            hashed = Sha256::digest(&self.key).to_vec();
            &hashed
        } else {
            &self.key
        };
        for (slot, byte) in block.iter_mut().zip(key) {
            *slot = *byte;
        }
        let inner = Sha256::new().chain_update(block.map(|b| b ^ 0x36)).chain_update(message).finalize();
        Sha256::new().chain_update(block.map(|b| b ^ 0x5c)).chain_update(inner).finalize().to_vec()
    }

    pub(crate) fn issue(&self, claims: &Value) -> String {
        let header = URL_SAFE_NO_PAD.encode(br#"{"alg":"HS256","typ":"JWT"}"#);
        let body = URL_SAFE_NO_PAD.encode(claims.to_string());
        let message = format!("{header}.{body}");
        let signature = URL_SAFE_NO_PAD.encode(self.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    /// The claims of a token that this server signed and that has not expired.
    pub(crate) fn verify(&self, token: &str) -> Option<Value> {
        let (message, signature) = token.rsplit_once('.')?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        let expected = self.sign(message.as_bytes());
        let differences = expected.iter().zip(&signature).fold(0_u8, |all, (a, b)| all | (a ^ b));
        if expected.len() != signature.len() || differences != 0 {
            return None;
        }
        let (_, body) = message.split_once('.')?;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()?;
        (claims.get("exp")?.as_i64()? > Timestamp::now().as_second()).then_some(claims)
    }
}

/// The user of a verified token, when its service account and pod still exist.
pub(crate) fn token_user(core: &Core, claims: &Value) -> Option<UserInfo> {
    let facts = claims.get("kubernetes.io")?;
    let namespace = meta::text(facts, "/namespace");
    let (account, uid) = (meta::text(facts, "/serviceaccount/name"), meta::text(facts, "/serviceaccount/uid"));
    if !same_uid(core, "serviceaccounts", namespace, account, uid) {
        return None;
    }
    let mut user = UserInfo::new(
        format!("system:serviceaccount:{namespace}:{account}"),
        &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")],
    );
    user.uid = uid.to_owned();
    let (pod, pod_uid) = (meta::text(facts, "/pod/name"), meta::text(facts, "/pod/uid"));
    if !pod.is_empty() {
        if !same_uid(core, "pods", namespace, pod, pod_uid) {
            return None;
        }
        user.extra.insert("authentication.kubernetes.io/pod-name".to_owned(), vec![pod.to_owned()]);
        user.extra.insert("authentication.kubernetes.io/pod-uid".to_owned(), vec![pod_uid.to_owned()]);
    }
    Some(user)
}

fn same_uid(core: &Core, plural: &str, namespace: &str, name: &str, uid: &str) -> bool {
    let Some(kind) = core.registry.served().any_version("", plural) else { return false };
    core.store
        .get(&kind.storage_key, &Key::new(namespace, name))
        .and_then(|stored| stored.value().ok())
        .is_some_and(|object| meta::meta(&object, "uid") == uid)
}

/// Answers a `TokenRequest` for a service account.
pub(crate) fn request_token(call: &Call, account: &Value, mut request: Value) -> Result<Value, ApiError> {
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(DEFAULT_SECONDS);
    if !(MIN_SECONDS..=MAX_SECONDS).contains(&seconds) {
        return Err(ApiError::invalid(
            "authentication.k8s.io",
            "TokenRequest",
            meta::name(account),
            &[crate::resource::FieldError {
                reason: "FieldValueInvalid",
                field: "spec.expirationSeconds".to_owned(),
                message: format!(
                    "Invalid value: {seconds}: may not specify a duration less than 10 minutes or more than 2^32 seconds"
                ),
            }],
        ));
    }
    let mut audiences = meta::strings(request.pointer("/spec/audiences"));
    if audiences.is_empty() {
        audiences.push(ISSUER.to_owned());
    }
    let now = Timestamp::now().as_second();
    let (namespace, name) = (meta::namespace(account), meta::name(account));
    let mut facts = Map::new();
    facts.insert("namespace".to_owned(), namespace.into());
    facts.insert("serviceaccount".to_owned(), json!({"name": name, "uid": meta::meta(account, "uid")}));
    if meta::text(&request, "/spec/boundObjectRef/kind") == "Pod" {
        facts.insert("pod".to_owned(), bound_pod(call, namespace, &request)?);
    }
    let claims = json!({
        "aud": audiences, "exp": now + seconds, "iat": now, "nbf": now, "iss": ISSUER,
        "jti": uuid::Uuid::new_v4().to_string(),
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
        "kubernetes.io": facts,
    });
    let token = call.core.tokens.issue(&claims);
    let spec = meta::object_at(&mut request, "spec");
    spec.insert("audiences".to_owned(), audiences.into());
    spec.insert("expirationSeconds".to_owned(), seconds.into());
    let expiration = meta::now_plus(seconds);
    meta::set_meta(&mut request, "name", name.into());
    meta::set_meta(&mut request, "namespace", namespace.into());
    meta::set_meta(&mut request, "creationTimestamp", meta::now().into());
    meta::as_map(&mut request).insert("status".to_owned(), json!({"token": token, "expirationTimestamp": expiration}));
    Ok(request)
}

fn bound_pod(call: &Call, namespace: &str, request: &Value) -> Result<Value, ApiError> {
    let (name, uid) =
        (meta::text(request, "/spec/boundObjectRef/name"), meta::text(request, "/spec/boundObjectRef/uid"));
    let kind = call.core.registry.served().any_version("", "pods").ok_or_else(ApiError::no_such_resource)?;
    let pod = call
        .core
        .store
        .get(&kind.storage_key, &Key::new(namespace, name))
        .and_then(|stored| stored.value().ok())
        .ok_or_else(|| ApiError::not_found(&kind, name))?;
    let found = meta::meta(&pod, "uid");
    if !uid.is_empty() && uid != found {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(ApiError::conflict(&kind, name, &why));
    }
    Ok(json!({"name": name, "uid": found}))
}
