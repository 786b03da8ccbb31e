//! Serves an API server on 127.0.0.1 and writes a kubeconfig: `cargo run --example serve -- DIRECTORY [PORT]`.

use std::net::TcpListener;
use std::path::PathBuf;

use towpath_apiserver::{ApiServer, Config};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory: PathBuf = arguments.next().ok_or("name a directory for the server's state")?.into();
    let port: u16 = arguments.next().map_or(Ok(0), |port| port.parse())?;
    let server = ApiServer::start(Config::new(directory.join("data"))).await?;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let url = format!("https://{}", listener.local_addr()?);
    server.serve(listener)?;
    let admin = server.client_credentials("kubernetes-admin", &["system:masters"])?;
    let kubeconfig = directory.join("kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig(&url, &admin))?;
    println!("export KUBECONFIG={}", kubeconfig.display());
    tokio::signal::ctrl_c().await?;
    server.shutdown().await;
    Ok(())
}
