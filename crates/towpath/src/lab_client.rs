//! `towpath lab apply|get|delete|scale|exec`: the same requests that kubectl makes, for machines without one.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::discovery::{ApiCapabilities, Discovery, Scope as ApiScope};
use kube::{Client, ResourceExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towpath_lab::commands;
use towpath_lab::layout::LabName;

use crate::lab::Named;

/// Options of `lab apply`.
#[derive(clap::Args, Debug)]
pub(crate) struct Apply {
    #[command(flatten)]
    named: Named,
    /// File of manifests; - for standard input.
    #[arg(short, long)]
    filename: PathBuf,
    /// Namespace of objects that name none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Options of `lab get`.
#[derive(clap::Args, Debug)]
pub(crate) struct Get {
    #[command(flatten)]
    named: Named,
    /// KIND or KIND/NAME.
    kind: String,
    /// The object; all of the kind without one.
    object: Option<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Label selector.
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// json or name.
    #[arg(short, long, default_value = "name")]
    output: String,
}

/// Options of `lab delete`.
#[derive(clap::Args, Debug)]
pub(crate) struct Delete {
    #[command(flatten)]
    named: Named,
    /// KIND.
    kind: String,
    /// The objects.
    #[arg(required = true)]
    objects: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Waits until they are gone.
    #[arg(long, default_value = "true", action = clap::ArgAction::Set)]
    wait: bool,
}

/// Options of `lab scale`.
#[derive(clap::Args, Debug)]
pub(crate) struct Scale {
    #[command(flatten)]
    named: Named,
    /// `deployment`.
    kind: String,
    /// The Deployment.
    object: String,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How many.
    #[arg(long)]
    replicas: u32,
}

fn with_client<T>(lab: &LabName, work: impl AsyncFnOnce(Client) -> Result<T>) -> Result<T> {
    let kubeconfig = commands::kubeconfig(lab)?;
    crate::client_runtime()?.block_on(async { work(crate::kubernetes::client(Some(&kubeconfig)).await?).await })
}

fn api(client: &Client, resource: &ApiResource, capabilities: &ApiCapabilities, namespace: &str) -> Api<DynamicObject> {
    match capabilities.scope {
        ApiScope::Cluster => Api::all_with(client.clone(), resource),
        ApiScope::Namespaced => Api::namespaced_with(client.clone(), namespace, resource),
    }
}

/// A kind by any name that people use for it.
async fn find(client: &Client, kind: &str) -> Result<(ApiResource, ApiCapabilities)> {
    let wanted = kind.to_ascii_lowercase();
    let wanted = match wanted.as_str() {
        "po" => "pods",
        "svc" => "services",
        "deploy" => "deployments",
        "ns" => "namespaces",
        "no" => "nodes",
        "netpol" => "networkpolicies",
        "ep" => "endpoints",
        other => other,
    };
    let discovery = Discovery::new(client.clone()).run().await?;
    discovery
        .groups()
        .flat_map(|group| group.recommended_resources())
        .find(|(resource, _)| resource.plural == wanted || resource.kind.eq_ignore_ascii_case(wanted))
        .with_context(|| format!("the lab's API server has no kind {kind:?}"))
}

fn read(path: &PathBuf) -> Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))
}

/// The objects of a file of several YAML documents.
fn documents(text: &str) -> Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for part in text.split("\n---") {
        let value: serde_json::Value = serde_saphyr::from_str(part).context("the file is not YAML")?;
        if value.is_null() {
            continue;
        }
        objects.push(serde_json::from_value(value).context("a document is no Kubernetes object")?);
    }
    Ok(objects)
}

/// `lab apply`.
pub(crate) fn apply(options: Apply) -> Result<bool> {
    let objects = documents(&read(&options.filename)?)?;
    with_client(&options.named.name, async |client| {
        for object in objects {
            let types = object.types.clone().context("a document has no kind")?;
            let gvk = GroupVersionKind::try_from(&types)?;
            let (resource, capabilities) = kube::discovery::pinned_kind(&client, &gvk).await?;
            let namespace = object.namespace().unwrap_or_else(|| options.namespace.clone());
            let params = PatchParams::apply("towpath-lab").force();
            let name = object.name_any();
            api(&client, &resource, &capabilities, &namespace)
                .patch(&name, &params, &Patch::Apply(&object))
                .await
                .with_context(|| format!("{} {name}", types.kind))?;
            crate::print(&format!("{}/{name} applied", resource.kind.to_lowercase()))?;
        }
        Ok(true)
    })
}

/// `lab get`.
pub(crate) fn get(options: Get) -> Result<bool> {
    with_client(&options.named.name, async |client| {
        let (kind, object) = match options.kind.split_once('/') {
            Some((kind, object)) => (kind.to_owned(), Some(object.to_owned())),
            None => (options.kind.clone(), options.object.clone()),
        };
        let (resource, capabilities) = find(&client, &kind).await?;
        let api = api(&client, &resource, &capabilities, &options.namespace);
        let json = options.output == "json";
        if let Some(name) = object {
            let object = api.get(&name).await?;
            if json {
                crate::print_json(&object)?;
            } else {
                crate::print(&name)?;
            }
            return Ok(true);
        }
        let params = ListParams { label_selector: options.selector.clone(), ..ListParams::default() };
        let list = api.list(&params).await?;
        if json {
            crate::print_json(&list)?;
        } else {
            for object in list.items {
                crate::print(&object.name_any())?;
            }
        }
        Ok(true)
    })
}

/// `lab delete`.
pub(crate) fn delete(options: Delete) -> Result<bool> {
    with_client(&options.named.name, async |client| {
        let (resource, capabilities) = find(&client, &options.kind).await?;
        let api = api(&client, &resource, &capabilities, &options.namespace);
        for name in &options.objects {
            api.delete(name, &DeleteParams::default()).await?;
            while options.wait && api.get_opt(name).await?.is_some() {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            crate::print(&format!("{}/{name} deleted", resource.kind.to_lowercase()))?;
        }
        Ok(true)
    })
}

/// `lab scale`.
pub(crate) fn scale(options: Scale) -> Result<bool> {
    if !["deployment", "deployments", "deploy"].contains(&options.kind.as_str()) {
        bail!("only Deployments are scaled here, not {:?}", options.kind);
    }
    with_client(&options.named.name, async |client| {
        let api: Api<Deployment> = Api::namespaced(client, &options.namespace);
        let patch = Patch::Merge(serde_json::json!({"spec": {"replicas": options.replicas}}));
        api.patch_scale(&options.object, &PatchParams::default(), &patch).await?;
        crate::print(&format!("deployment/{} scaled", options.object))?;
        Ok(true)
    })
}

/// `lab exec POD -- COMMAND`; success when the command's exit code is 0.
pub(crate) fn exec(
    lab: &LabName,
    pod: &str,
    container: Option<String>,
    namespace: Option<String>,
    command: Vec<String>,
) -> Result<bool> {
    with_client(lab, async |client| {
        let api: Api<Pod> = Api::namespaced(client, namespace.as_deref().unwrap_or("default"));
        let mut params = AttachParams::default().stdin(false).stdout(true).stderr(true);
        params.container = container;
        let mut session = api.exec(pod, command, &params).await.with_context(|| format!("pod {pod}"))?;
        let (out, err) = (session.stdout(), session.stderr());
        let status = session.take_status();
        let (copied_out, copied_err) = futures::join!(copy(out, tokio::io::stdout()), copy(err, tokio::io::stderr()));
        copied_out.and(copied_err)?;
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        let succeeded = status.as_ref().is_some_and(|s| s.status.as_deref() == Some("Success"));
        if !succeeded {
            let why =
                status.and_then(|s| s.message).unwrap_or_else(|| "the connection ended without a status".to_owned());
            eprintln!("{why}");
        }
        Ok(succeeded)
    })
}

async fn copy(
    from: Option<impl tokio::io::AsyncRead + Unpin>,
    mut to: impl tokio::io::AsyncWrite + Unpin,
) -> Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(to.flush().await?);
        }
        to.write_all(buffer.get(..n).unwrap_or_default()).await?;
    }
}
