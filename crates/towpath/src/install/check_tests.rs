//! The checked-in files are what this program prints: `deploy/towpath.yaml`, `deploy/towpath-uninstall.yaml`, the Helm chart, and the
//! kustomizations. `TOWPATH_REFRESH=1` (`make manifests`) writes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use serde_json::Value as Json;

use super::manifests::{BASE, DNS, UNINSTALL, Values, install, uninstall};
use super::{Options, chart};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

fn hold(path: &Path, wanted: &str) {
    if std::env::var_os("TOWPATH_REFRESH").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, wanted).unwrap();
    }
    let have = fs::read_to_string(path).unwrap_or_default();
    assert!(have == wanted, "{} is not what deploy/kustomize/ gives: run `make manifests`", path.display());
}

/// Objects by kind, namespace and name.
pub(super) fn objects(text: &str) -> BTreeMap<String, Json> {
    let documents: Vec<Json> = serde_saphyr::from_multiple(text).unwrap();
    documents
        .into_iter()
        .filter(|object| !object.is_null())
        .map(|object| {
            let at = |pointer: &str| object.pointer(pointer).and_then(Json::as_str).unwrap_or_default().to_owned();
            (format!("{} {}/{}", at("/kind"), at("/metadata/namespace"), at("/metadata/name")), object)
        })
        .collect()
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

pub(super) fn values(arguments: &[&str]) -> anyhow::Result<Values> {
    Line::try_parse_from([&["install"], arguments].concat())?.options.values()
}

fn refused(arguments: &[&str]) -> String {
    format!("{:#}", values(arguments).unwrap_err())
}

const EVERYTHING: [&str; 15] = [
    "--service-proxy=towpath",
    "--image=registry.example/net/towpath@sha256:00",
    "--cluster-cidr=10.8.0.0/14,fd00:8::/48",
    "--service-cidr=10.100.0.0/16",
    "--service-cidr=fd00:9::/112",
    "--dns=towpath",
    "--cluster-domain=example.internal",
    "--api-server=https://api.example:6443",
    "--mtu=1400",
    "--non-masquerade-cidr=192.168.0.0/16",
    "--non-masquerade-cidr=172.16.0.0/12",
    "--vxlan-port=4789",
    "--controller-replicas=3",
    "--cluster-dns=10.100.0.53",
    "--cluster-dns=fd00:9::53",
];

#[test]
fn the_options_have_the_defaults_of_the_files() {
    assert_eq!(values(&[]).unwrap(), Values::default());
}

#[test]
fn the_checked_in_manifests_are_what_is_printed() {
    hold(&deploy().join("towpath.yaml"), &install(&Values::default()).unwrap());
    hold(&deploy().join("towpath-uninstall.yaml"), &uninstall(&Values::default()).unwrap());
}

#[test]
fn the_checked_in_chart_is_made_of_the_same_files() {
    let chart = deploy().join("helm/towpath");
    let files = chart::files().unwrap();
    for (path, text) in &files {
        hold(&chart.join(path), text);
    }
    let count = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(
        count(&chart) - 1 + count(&chart.join("templates")),
        files.len(),
        "a file of the chart is not made here"
    );
}

#[test]
fn the_chart_renders_to_the_same_objects() {
    for values in [Values::default(), values(&EVERYTHING).unwrap()] {
        let given = chart::values_of(&values);
        let rendered: String = chart::files()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.starts_with("templates/"))
            .map(|(_, text)| format!("---\n{}\n", chart::render(text, &given).unwrap()))
            .collect();
        assert_eq!(objects(&rendered), objects(&install(&values).unwrap()));
    }
    let file: Json =
        serde_saphyr::from_str(&fs::read_to_string(deploy().join("helm/towpath/values.yaml")).unwrap()).unwrap();
    assert_eq!(file, chart::values_of(&Values::default()), "the chart's defaults");
}

#[test]
fn the_kustomizations_name_every_file() {
    let resources = |path: &str| -> Vec<String> {
        let text = fs::read_to_string(deploy().join("kustomize").join(path).join("kustomization.yaml")).unwrap();
        let object: Json = serde_saphyr::from_str(&text).unwrap();
        object["resources"].as_array().unwrap().iter().map(|r| format!("{path}/{}", r.as_str().unwrap())).collect()
    };
    assert_eq!(resources("base"), BASE.map(|file| file.path));
    assert_eq!(resources("components/dns"), [DNS.path]);
    assert_eq!(resources("uninstall"), [UNINSTALL.path]);
}

#[test]
fn kustomize_gives_the_same_objects() {
    let dir = deploy().join("kustomize/base");
    let Ok(output) = Command::new("kubectl").arg("kustomize").arg(&dir).output() else {
        assert!(std::env::var_os("CI").is_none(), "no kubectl here, and CI has one");
        println!("skipped: no kubectl here");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let built = objects(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(built, objects(&install(&Values::default()).unwrap()));
}

#[test]
fn options_that_do_not_go_together_are_refused_by_name() {
    assert!(refused(&["--cluster-cidr=10.0.0.0/16", "--cluster-cidr=10.1.0.0/16"]).contains("--cluster-cidr"));
    assert!(refused(&["--cluster-dns=10.96.0.10"]).contains("--dns towpath"));
    assert!(refused(&["--dns=towpath", "--cluster-dns=10.95.0.10"]).contains("10.95.0.10"));
    assert!(refused(&["--api-server=http://a:1"]).contains("https://HOST:PORT"));
    assert!(refused(&["--api-server=https://a:1/path"]).contains("https://HOST:PORT"));
    assert!(refused(&["--api-server=192.0.2.1:6443"]).contains("--api-server"));
    assert!(refused(&["--service-cidr=10.244.128.0/20"]).contains("overlaps"));
    assert!(refused(&["--image=a b"]).contains("--image"));
    assert!(refused(&["--mtu=100"]).contains("1280"));
}

#[test]
fn addresses_of_dns_follow_the_service_ranges() {
    let dual = values(&[
        "--dns=towpath",
        "--service-cidr=10.100.0.0/16,fd00:9::/112",
        "--cluster-cidr=10.8.0.0/16,fd00:8::/48",
    ]);
    assert_eq!(
        dual.unwrap().cluster_dns,
        ["10.100.0.10".parse::<std::net::IpAddr>().unwrap(), "fd00:9::a".parse().unwrap()]
    );
    let six = values(&["--service-cidr=fd00:9::/112", "--cluster-cidr=fd00:8::/48"]).unwrap();
    assert_eq!(six.carry_probe, "fd00:7470::a");
    assert!(refused(&["--dns=towpath", "--service-cidr=10.100.0.0/30"]).contains("--cluster-dns"));
}
