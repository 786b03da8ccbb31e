//! Volumes: each becomes a directory or file of the machine that containers bind-mount.
//!
//! ConfigMaps, Secrets, projected and downward API volumes are written like the kubelet's atomic writer does: files in a
//! dated directory, a `..data` link that is swapped in one step, and links to it, so that readers never see half an update.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccount, ServiceAccountTokenProjection, Volume,
    VolumeProjection,
};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};

use super::environment;

/// One file of a written volume: its content and mode.
type Files = BTreeMap<PathBuf, (Vec<u8>, u32)>;

/// What volumes are made from.
pub(crate) struct VolumeContext<'a> {
    /// API access.
    pub(crate) client: &'a Client,
    /// The pod.
    pub(crate) pod: &'a Pod,
    /// Its addresses, for the downward API; empty before it has any.
    pub(crate) pod_ips: &'a [IpAddr],
    /// The node's addresses.
    pub(crate) host_ips: &'a [IpAddr],
    /// The pod's runtime directory.
    pub(crate) pod_dir: &'a Path,
    /// The directory that `hostPath` is relative to.
    pub(crate) host_dir: &'a Path,
}

/// Makes or refreshes all volumes; their places by name.
pub(crate) async fn prepare(context: &VolumeContext<'_>) -> Result<HashMap<String, PathBuf>> {
    let mut places = HashMap::new();
    for volume in context.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let place = prepare_one(context, volume)
            .await
            .with_context(|| format!("MountVolume.SetUp failed for volume {:?}", volume.name))?;
        places.insert(volume.name.clone(), place);
    }
    Ok(places)
}

/// Whether the pod has volumes whose content may change.
pub(crate) fn need_refresh(pod: &Pod) -> bool {
    pod.spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten())
        .any(|v| v.config_map.is_some() || v.secret.is_some() || v.projected.is_some() || v.downward_api.is_some())
}

async fn prepare_one(context: &VolumeContext<'_>, volume: &Volume) -> Result<PathBuf> {
    if let Some(host) = &volume.host_path {
        return host_path(context.host_dir, &host.path, host.type_.as_deref().unwrap_or_default());
    }
    let dir = context.pod_dir.join("volumes").join(&volume.name);
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    if volume.empty_dir.is_some() {
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777))?;
        return Ok(dir);
    }
    let files = if let Some(source) = &volume.config_map {
        let mode = source.default_mode.unwrap_or(0o644);
        config_map(context, &source.name, source.optional, source.items.as_deref(), mode).await?
    } else if let Some(source) = &volume.secret {
        let name = source.secret_name.clone().unwrap_or_default();
        secret(context, &name, source.optional, source.items.as_deref(), source.default_mode.unwrap_or(0o644)).await?
    } else if let Some(source) = &volume.downward_api {
        downward(context, source.items.as_deref().unwrap_or_default(), source.default_mode.unwrap_or(0o644))?
    } else if let Some(source) = &volume.projected {
        let mode = source.default_mode.unwrap_or(0o644);
        let mut all = Files::new();
        for part in source.sources.iter().flatten() {
            all.extend(projection(context, part, mode).await?);
        }
        all
    } else {
        bail!(
            "this lab has emptyDir, configMap, secret, projected, downwardAPI and hostPath volumes only; \
             no persistent storage"
        );
    };
    write_atomically(&dir, &files)?;
    Ok(dir)
}

/// `hostPath` below the node's own directory, never the machine's.
fn host_path(root: &Path, path: &str, kind: &str) -> Result<PathBuf> {
    let parts = Path::new(path).components();
    let inner: PathBuf = parts.filter(|part| matches!(part, Component::Normal(_))).collect();
    if Path::new(path).components().any(|part| part == Component::ParentDir) {
        bail!("hostPath {path:?} must not contain '..'");
    }
    let place = root.join(inner);
    match kind {
        "File" | "Socket" if !place.exists() => {
            bail!("hostPath type check failed: {path} is not a {}", kind.to_lowercase())
        }
        "Directory" if !place.is_dir() => bail!("hostPath type check failed: {path} is not a directory"),
        "FileOrCreate" => {
            if let Some(parent) = place.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::OpenOptions::new().create(true).append(true).open(&place)?;
        }
        _ if !place.exists() => std::fs::create_dir_all(&place)?,
        _ => {}
    }
    Ok(place)
}

async fn projection(context: &VolumeContext<'_>, part: &VolumeProjection, mode: i32) -> Result<Files> {
    if let Some(source) = &part.config_map {
        return config_map(context, &source.name, source.optional, source.items.as_deref(), mode).await;
    }
    if let Some(source) = &part.secret {
        return secret(context, &source.name, source.optional, source.items.as_deref(), mode).await;
    }
    if let Some(source) = &part.downward_api {
        return downward(context, source.items.as_deref().unwrap_or_default(), mode);
    }
    if let Some(source) = &part.service_account_token {
        let token = request_token(context, source).await?;
        return Ok(Files::from([(safe_path(&source.path)?, (token.into_bytes(), file_mode(mode)))]));
    }
    bail!("a projected volume has a source that this lab does not know")
}

/// A token for the pod's service account, bound to the pod.
async fn request_token(context: &VolumeContext<'_>, source: &ServiceAccountTokenProjection) -> Result<String> {
    let spec = context.pod.spec.as_ref();
    let account = spec.and_then(|s| s.service_account_name.clone()).unwrap_or_else(|| "default".to_owned());
    let namespace = context.pod.namespace().unwrap_or_default();
    let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), &namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: source.audience.clone().map(|audience| vec![audience]),
            expiration_seconds: Some(source.expiration_seconds.unwrap_or(3600)),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: context.pod.metadata.name.clone(),
                uid: context.pod.metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let answer = api.create_token_request(&account, &PostParams::default(), &request).await;
    let answer = answer.with_context(|| format!("failed to fetch token for service account {namespace}/{account}"))?;
    answer.status.and_then(|status| status.token).context("the API server issued no token")
}

async fn config_map(
    context: &VolumeContext<'_>,
    name: &str,
    optional: Option<bool>,
    items: Option<&[KeyToPath]>,
    mode: i32,
) -> Result<Files> {
    let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), &context.pod.namespace().unwrap_or_default());
    let Some(map) = api.get_opt(name).await? else {
        return if optional == Some(true) { Ok(Files::new()) } else { bail!("configmap {name:?} not found") };
    };
    let text = map.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.into_bytes()));
    let binary = map.binary_data.unwrap_or_default().into_iter().map(|(key, ByteString(value))| (key, value));
    select(text.chain(binary).collect(), items, mode, optional == Some(true))
}

async fn secret(
    context: &VolumeContext<'_>,
    name: &str,
    optional: Option<bool>,
    items: Option<&[KeyToPath]>,
    mode: i32,
) -> Result<Files> {
    let api: Api<Secret> = Api::namespaced(context.client.clone(), &context.pod.namespace().unwrap_or_default());
    let Some(secret) = api.get_opt(name).await? else {
        return if optional == Some(true) { Ok(Files::new()) } else { bail!("secret {name:?} not found") };
    };
    let data = secret.data.unwrap_or_default().into_iter().map(|(key, ByteString(value))| (key, value)).collect();
    select(data, items, mode, optional == Some(true))
}

fn select(data: BTreeMap<String, Vec<u8>>, items: Option<&[KeyToPath]>, mode: i32, optional: bool) -> Result<Files> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return data.into_iter().map(|(key, value)| Ok((safe_path(&key)?, (value, file_mode(mode))))).collect();
    };
    let mut files = Files::new();
    for item in items {
        match data.get(&item.key) {
            Some(value) => {
                files.insert(safe_path(&item.path)?, (value.clone(), file_mode(item.mode.unwrap_or(mode))));
            }
            None if optional => {}
            None => bail!("references non-existent key: {}", item.key),
        }
    }
    Ok(files)
}

fn downward(context: &VolumeContext<'_>, items: &[DownwardAPIVolumeFile], mode: i32) -> Result<Files> {
    let mut files = Files::new();
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            environment::field_of(context.pod, context.pod_ips, context.host_ips, &field.field_path)?
        } else if let Some(field) = &item.resource_field_ref {
            let name = field.container_name.clone().unwrap_or_default();
            let containers = context.pod.spec.iter().flat_map(|spec| &spec.containers);
            let container = containers.into_iter().find(|c| c.name == name);
            let container =
                container.with_context(|| format!("container {name:?} of a downward API file is not there"))?;
            environment::resource_value(
                container,
                &field.resource,
                field.divisor.as_ref().map_or("", |q| q.0.as_str()),
            )?
        } else {
            String::new()
        };
        files.insert(safe_path(&item.path)?, (text.into_bytes(), file_mode(item.mode.unwrap_or(mode))));
    }
    Ok(files)
}

fn file_mode(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0o644) & 0o777
}

/// A relative path of normal names only.
fn safe_path(path: &str) -> Result<PathBuf> {
    let path = Path::new(path);
    let good = path.components().all(|part| matches!(part, Component::Normal(_)));
    if !good || path.as_os_str().is_empty() || path.starts_with("..data") {
        bail!("{} is not a path inside the volume", path.display());
    }
    Ok(path.to_owned())
}

fn write_atomically(dir: &Path, files: &Files) -> Result<()> {
    let data = dir.join("..data");
    if is_current(&data, files) {
        return Ok(());
    }
    let stamp = format!("..{}", uuid::Uuid::new_v4().simple());
    let fresh = dir.join(&stamp);
    for (path, (content, mode)) in files {
        let target = fresh.join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        }
        std::fs::write(&target, content).with_context(|| format!("write {}", target.display()))?;
        std::fs::set_permissions(&target, PermissionsExt::from_mode(*mode))?;
    }
    std::fs::create_dir_all(&fresh)?;
    let old = std::fs::read_link(&data).ok();
    let swap = dir.join("..data_tmp");
    let _ = std::fs::remove_file(&swap);
    symlink(&stamp, &swap).and_then(|()| std::fs::rename(&swap, &data)).context("swap in the volume's new content")?;
    link_entries(dir, files)?;
    if let Some(old) = old {
        let _ = std::fs::remove_dir_all(dir.join(old));
    }
    Ok(())
}

/// The volume's visible names are links through `..data`.
fn link_entries(dir: &Path, files: &Files) -> Result<()> {
    let wanted: Vec<&std::ffi::OsStr> =
        files.keys().filter_map(|path| path.components().next()).map(|c| c.as_os_str()).collect();
    for entry in std::fs::read_dir(dir)?.flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with("..") && !wanted.contains(&name.as_os_str()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    for name in wanted {
        let link = dir.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    Ok(())
}

fn is_current(data: &Path, files: &Files) -> bool {
    fn count(dir: &Path) -> usize {
        std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .fold(0, |sum, entry| sum + if entry.path().is_dir() { count(&entry.path()) } else { 1 })
    }
    data.exists()
        && count(data) == files.len()
        && files.iter().all(|(path, (content, _))| std::fs::read(data.join(path)).is_ok_and(|have| have == *content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_swap_in_whole_and_drop_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| (PathBuf::from(name), (text.as_bytes().to_vec(), 0o644));
        write_atomically(dir.path(), &Files::from([file("a", "1"), file("sub/b", "2")])).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("sub/b")).unwrap(), "2");
        let first = std::fs::read_link(dir.path().join("..data")).unwrap();
        write_atomically(dir.path(), &Files::from([file("a", "1"), file("sub/b", "2")])).unwrap();
        assert_eq!(
            std::fs::read_link(dir.path().join("..data")).unwrap(),
            first,
            "nothing changed, nothing is swapped"
        );
        write_atomically(dir.path(), &Files::from([file("a", "3")])).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert!(!dir.path().join("sub").exists());
        assert!(!dir.path().join(first).exists());
    }

    #[test]
    fn paths_cannot_leave_the_volume_or_the_node() {
        for bad in ["../x", "/etc/passwd", "a/../../b", "", "..data/x"] {
            assert!(safe_path(bad).is_err(), "{bad:?} was accepted");
        }
        let root = tempfile::tempdir().unwrap();
        assert!(host_path(root.path(), "/a/../../etc", "").is_err());
        assert!(host_path(root.path(), "/data", "DirectoryOrCreate").unwrap().starts_with(root.path()));
        assert!(host_path(root.path(), "/absent", "Directory").is_err());
    }
}
