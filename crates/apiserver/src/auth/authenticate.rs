//! From credentials to a user.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use http::HeaderMap;

use super::UserInfo;
use super::token::token_user;
use crate::server::Core;
use crate::status::ApiError;

pub(crate) struct Authenticator {
    tokens: RwLock<HashMap<String, UserInfo>>,
    anonymous: bool,
}

impl Authenticator {
    pub(crate) fn new(tokens: &[(String, UserInfo)], anonymous: bool) -> Self {
        Self { tokens: RwLock::new(tokens.iter().cloned().collect()), anonymous }
    }

    /// These tokens, and no others of the configuration's, are good from now on.
    pub(crate) fn set_tokens(&self, tokens: &[(String, UserInfo)]) {
        *self.tokens.write().unwrap_or_else(PoisonError::into_inner) = tokens.iter().cloned().collect();
    }

    /// Who sends this request: by certificate, then by bearer token. A wrong token is an error, none is anonymous.
    pub(crate) fn identify(
        &self,
        core: &Core,
        certificate: Option<&UserInfo>,
        headers: &HeaderMap,
    ) -> Result<UserInfo, ApiError> {
        let user = match (certificate, bearer(headers)) {
            (Some(user), _) => user.clone(),
            (None, Some(token)) => self.token(core, token).ok_or_else(ApiError::unauthorized)?,
            (None, None) if self.anonymous => UserInfo::anonymous(),
            (None, None) => return Err(ApiError::unauthorized()),
        };
        Ok(user.authenticated())
    }

    /// The user of a bearer token.
    pub(crate) fn token(&self, core: &Core, token: &str) -> Option<UserInfo> {
        if let Some(user) = self.tokens.read().unwrap_or_else(PoisonError::into_inner).get(token) {
            return Some(user.clone());
        }
        token_user(core, &core.tokens.verify(token)?)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}
