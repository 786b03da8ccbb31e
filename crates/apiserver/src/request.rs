//! What a request asks for: its path, query, body form and the form of the answer.

use http::HeaderMap;
use serde_json::Value;

use crate::status::ApiError;

/// A request for a resource, taken from its path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    /// Empty when the path names none.
    pub(crate) namespace: String,
    /// Empty for collections.
    pub(crate) name: String,
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Resource(Target),
    /// Group and version of `/api/v1` or `/apis/GROUP/VERSION`.
    Version(String, String),
    /// `/apis/GROUP`.
    Group(String),
    Other,
}

/// Splits a URL path; percent-escapes are decoded in each segment.
pub(crate) fn parse_path(path: &str) -> Path {
    let segments: Vec<String> = path.split('/').filter(|s| !s.is_empty()).map(|s| percent_decode(s, false)).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (group, version, rest) = match segments.as_slice() {
        ["api", version, rest @ ..] => ("", *version, rest),
        ["apis", group] => return Path::Group((*group).to_owned()),
        ["apis", group, version, rest @ ..] => (*group, *version, rest),
        _ => return Path::Other,
    };
    let mut target = Target { group: group.to_owned(), version: version.to_owned(), ..Target::default() };
    let rest = match rest {
        [] => return Path::Version(group.to_owned(), version.to_owned()),
        ["namespaces", _, sub @ ("status" | "finalize")] => {
            target.subresource = (*sub).to_owned();
            rest.get(..2).unwrap_or_default()
        }
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => {
            target.namespace = (*namespace).to_owned();
            rest
        }
        other => other,
    };
    match rest {
        [resource] => target.resource = (*resource).to_owned(),
        [resource, name] => {
            target.resource = (*resource).to_owned();
            target.name = (*name).to_owned();
        }
        [resource, name, subresource, ..] => {
            target.resource = (*resource).to_owned();
            target.name = (*name).to_owned();
            target.subresource = rest.get(2..).map(|more| more.join("/")).unwrap_or_else(|| (*subresource).to_owned());
        }
        [] => return Path::Other,
    }
    Path::Resource(target)
}

fn percent_decode(text: &str, plus_is_space: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'%', [high, low, more @ ..]) => {
                let digits = [*high, *low];
                let hex = std::str::from_utf8(&digits).ok().and_then(|text| u8::from_str_radix(text, 16).ok());
                match hex {
                    Some(byte) => {
                        bytes.push(byte);
                        rest = more;
                    }
                    None => bytes.push(b'%'),
                }
            }
            (b'+', _) if plus_is_space => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The query parameters, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decode(key, true), percent_decode(value, true))
        });
        Self(pairs.collect())
    }

    /// The first value of a parameter, empty when absent.
    pub(crate) fn get(&self, key: &str) -> &str {
        self.0.iter().find(|(have, _)| have == key).map_or("", |(_, value)| value.as_str())
    }

    pub(crate) fn all(&self, key: &str) -> Vec<String> {
        self.0.iter().filter(|(have, _)| have == key).map(|(_, value)| value.clone()).collect()
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(have, _)| have == key)
    }

    /// Whether a parameter is given and not `0` or `false`.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.has(key) && !matches!(self.get(key), "0" | "false" | "False" | "f" | "F" | "FALSE")
    }

    /// A number, or none when absent or empty.
    pub(crate) fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, ApiError> {
        match self.get(key) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_error| {
                ApiError::bad_request(format!(
                    "invalid value for query parameter {key}: {text:?} is not a number in range"
                ))
            }),
        }
    }
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The objects themselves.
    Object,
    /// `meta.k8s.io/v1` `Table`.
    Table,
    /// `meta.k8s.io/v1` `PartialObjectMetadata(List)`.
    Metadata,
}

/// What the answer is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Accept {
    pub(crate) form: Form,
    pub(crate) yaml: bool,
}

impl Default for Accept {
    fn default() -> Self {
        Self { form: Form::Object, yaml: false }
    }
}

/// One alternative of an `Accept` header: media type and its parameters.
pub(crate) struct MediaRange {
    pub(crate) media: String,
    pub(crate) parameters: Vec<(String, String)>,
}

impl MediaRange {
    pub(crate) fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
    }
}

/// The alternatives of the `Accept` header, the most wanted first.
pub(crate) fn accepted(headers: &HeaderMap) -> Vec<MediaRange> {
    let text: Vec<&str> =
        headers.get_all(http::header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let mut ranges: Vec<(u32, MediaRange)> = Vec::new();
    for item in text.join(",").split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let mut parts = item.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default().to_ascii_lowercase();
        let parameters: Vec<(String, String)> = parts
            .filter_map(|part| part.split_once('='))
            .map(|(key, value)| (key.trim().to_ascii_lowercase(), value.trim().trim_matches('"').to_owned()))
            .collect();
        let range = MediaRange { media, parameters };
        let quality = range.parameter("q").parse::<f32>().unwrap_or(1.0).clamp(0.0, 1.0);
        ranges.push(((quality * 1000.0) as u32, range));
    }
    ranges.retain(|(quality, _)| *quality > 0);
    ranges.sort_by_key(|(quality, _)| std::cmp::Reverse(*quality));
    ranges.into_iter().map(|(_, range)| range).collect()
}

impl Accept {
    /// The first alternative that can be made. No header: JSON.
    pub(crate) fn negotiate(headers: &HeaderMap) -> Result<Self, ApiError> {
        let ranges = accepted(headers);
        if ranges.is_empty() {
            return Ok(Self::default());
        }
        ranges.iter().find_map(Self::from_range).ok_or_else(ApiError::not_acceptable)
    }

    fn from_range(range: &MediaRange) -> Option<Self> {
        let yaml = match range.media.as_str() {
            "application/json" | "application/*" | "*/*" => false,
            "application/yaml" | "application/x-yaml" | "text/yaml" => true,
            _ => return None,
        };
        let group_version_ok = range.parameter("g") == "meta.k8s.io" && range.parameter("v") == "v1";
        let form = match range.parameter("as") {
            "" => Form::Object,
            "Table" if group_version_ok => Form::Table,
            "PartialObjectMetadata" | "PartialObjectMetadataList" if group_version_ok => Form::Metadata,
            _ => return None,
        };
        Some(Self { form, yaml })
    }
}

/// The media type of the body without parameters; JSON when not said.
pub(crate) fn content_type(headers: &HeaderMap) -> String {
    let text = headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media.is_empty() { "application/json".to_owned() } else { media }
}

/// Parses a JSON, YAML or protobuf body.
pub(crate) fn decode_body(headers: &HeaderMap, body: &[u8]) -> Result<Value, ApiError> {
    match content_type(headers).as_str() {
        "application/json" | "text/plain" | "*/*" => decode_json(body),
        "application/yaml" | "application/x-yaml" | "text/yaml" => decode_yaml(body),
        // kubectl's typed commands (create deployment, create token, drain …) send protobuf and take JSON back.
        "application/vnd.kubernetes.protobuf" => crate::kinds::protobuf::decode(body)
            .map_err(|why| ApiError::bad_request(format!("couldn't parse the body as protobuf: {why}"))),
        _ => Err(ApiError::unsupported_media_type(
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}

pub(crate) fn decode_json(body: &[u8]) -> Result<Value, ApiError> {
    // kubectl sends some YAML without saying so, as the real server's decoder also recognises.
    match serde_json::from_slice(body) {
        Ok(value) => Ok(value),
        Err(error) if body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{') => {
            Err(ApiError::bad_request(format!("couldn't parse the body as JSON: {error}")))
        }
        Err(_) => decode_yaml(body),
    }
}

pub(crate) fn decode_yaml(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body)
        .map_err(|error| ApiError::bad_request(format!("the body is not valid UTF-8: {error}")))?;
    let options = serde_saphyr::options! { strict_booleans: true, legacy_octal_numbers: true };
    serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| ApiError::bad_request(format!("couldn't parse the body as YAML: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: &str) -> Target {
        match parse_path(path) {
            Path::Resource(target) => target,
            other => panic!("{path} is {other:?}"),
        }
    }

    #[test]
    fn paths_of_resources_are_taken_apart() {
        let pod = target("/api/v1/namespaces/a/pods/x/log");
        assert_eq!((&*pod.namespace, &*pod.resource, &*pod.name, &*pod.subresource), ("a", "pods", "x", "log"));
        let namespace = target("/api/v1/namespaces/a");
        assert_eq!((&*namespace.namespace, &*namespace.resource, &*namespace.name), ("", "namespaces", "a"));
        let finalize = target("/api/v1/namespaces/a/finalize");
        assert_eq!((&*finalize.resource, &*finalize.name, &*finalize.subresource), ("namespaces", "a", "finalize"));
        let all = target("/apis/apps/v1/deployments");
        assert_eq!((&*all.group, &*all.version, &*all.resource), ("apps", "v1", "deployments"));
        assert_eq!(parse_path("/apis/apps"), Path::Group("apps".into()));
        assert_eq!(parse_path("/api/v1"), Path::Version(String::new(), "v1".into()));
        assert_eq!(parse_path("/version"), Path::Other);
        assert_eq!(target("/api/v1/namespaces/a/pods/x%2Fy").name, "x/y");
    }

    #[test]
    fn kubectls_accept_header_asks_for_tables_and_protobuf_is_refused() {
        let mut headers = HeaderMap::new();
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        headers.insert("accept", kubectl.parse().unwrap());
        assert_eq!(Accept::negotiate(&headers).unwrap().form, Form::Table);
        headers.insert("accept", "application/vnd.kubernetes.protobuf".parse().unwrap());
        assert_eq!(Accept::negotiate(&headers).unwrap_err().code, 406);
        headers.insert("accept", "application/vnd.kubernetes.protobuf,application/json".parse().unwrap());
        assert_eq!(Accept::negotiate(&headers).unwrap().form, Form::Object);
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse(Some("command=sh&command=-c&labelSelector=a%3Db%2Cc&watch=true&x"));
        assert_eq!(query.all("command"), ["sh", "-c"]);
        assert_eq!(query.get("labelSelector"), "a=b,c");
        assert!(query.flag("watch") && query.flag("x") && !query.flag("y"));
    }
}
