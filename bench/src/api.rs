//! Kubernetes objects of a lab: through `kubectl proxy` (kept-alive requests, so that many objects take seconds), or through
//! `towpath lab …` where there is no kubectl.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::place::Place;
use crate::worker;

/// Connections that load objects at once.
const LANES: usize = 4;
/// Longest wait for one answer.
const SILENCE: Duration = Duration::from_secs(30);

/// A kind that the benchmark uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Namespace,
    ServiceAccount,
    Pod,
    NetworkPolicy,
}

impl Kind {
    fn of(object: &Value) -> Result<Self> {
        Ok(match object.get("kind").and_then(Value::as_str).context("an object without a kind")? {
            "Namespace" => Kind::Namespace,
            "Pod" => Kind::Pod,
            "NetworkPolicy" => Kind::NetworkPolicy,
            other => bail!("the benchmark makes no {other}"),
        })
    }

    fn plural(self) -> &'static str {
        match self {
            Kind::Namespace => "namespaces",
            Kind::ServiceAccount => "serviceaccounts",
            Kind::Pod => "pods",
            Kind::NetworkPolicy => "networkpolicies",
        }
    }

    fn path(self, namespace: &str) -> String {
        let plural = self.plural();
        match self {
            Kind::Namespace => format!("/api/v1/{plural}"),
            Kind::NetworkPolicy => format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/{plural}"),
            _ => format!("/api/v1/namespaces/{namespace}/{plural}"),
        }
    }
}

/// One HTTP/1.1 connection, to the proxy or to an agent.
#[derive(Debug)]
pub(crate) struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(port: u16) -> Result<Self> {
        Self::over(TcpStream::connect(("127.0.0.1", port)).context("connect to kubectl proxy")?)
    }

    /// Over a stream that is connected.
    ///
    /// # Errors
    /// It has no options.
    pub(crate) fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// A request; status code and JSON answer, or text where it is none.
    ///
    /// # Errors
    /// The other side closed the connection, or speaks no HTTP.
    pub(crate) fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        self.0.get_mut().write_all(format!("{head}{body}").as_bytes()).context("send to kubectl proxy")?;
        let status_line = self.line()?;
        let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("kubectl proxy answered {status_line:?}"))?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let header = self.line()?.to_ascii_lowercase();
            match header.split_once(':').map(|(name, value)| (name, value.trim())) {
                None => break,
                Some(("content-length", value)) => length = value.parse().context("a Content-Length")?,
                Some(("transfer-encoding", "chunked")) => chunked = true,
                Some(_) => {}
            }
        }
        let text = if chunked { self.chunks()? } else { self.exactly(length)? };
        let value = serde_json::from_slice(&text)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&text).into_owned()));
        Ok((status, value))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line).context("read from kubectl proxy")? == 0 {
            bail!("kubectl proxy closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }

    fn exactly(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut text = vec![0; length];
        self.0.read_exact(&mut text).context("read from kubectl proxy")?;
        Ok(text)
    }

    fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        loop {
            let size = self.line()?;
            let size = usize::from_str_radix(size.split(';').next().unwrap_or(""), 16)
                .with_context(|| format!("{size:?} is no size of a chunk"))?;
            text.extend(self.exactly(size)?);
            self.line()?;
            if size == 0 {
                return Ok(text);
            }
        }
    }
}

/// Runs `kubectl proxy`.
#[derive(Debug)]
struct Proxy {
    child: Child,
    port: u16,
    connection: Option<Connection>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxy {
    fn start(kubeconfig: &Path) -> Result<Self> {
        let mut child = worker::command(&Place::default(), &["run", "--", "kubectl", "proxy", "--port=0"])?
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start kubectl proxy")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).context("read what kubectl proxy says")?;
        }
        let port = line.trim().rsplit(':').next().and_then(|port| port.parse().ok());
        let mut proxy = Self { child, port: 0, connection: None };
        proxy.port = port.with_context(|| format!("kubectl proxy did not say its port, but {line:?}"))?;
        Ok(proxy)
    }

    fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => Connection::open(self.port)?,
        };
        let answer = connection.request(method, path, body)?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

/// Who speaks to the API server.
#[derive(Debug)]
enum Way {
    Proxy(Proxy),
    Lab { towpath: std::path::PathBuf, lab: String },
}

/// Objects of one namespace of a lab.
#[derive(Debug)]
pub(crate) struct Api {
    way: Way,
    namespace: String,
}

impl Api {
    /// Speaks to a lab's API server.
    ///
    /// # Errors
    /// `kubectl proxy` does not start.
    pub(crate) fn open(towpath: &Path, lab: &str, kubeconfig: &Path, namespace: &str) -> Result<Self> {
        let way = if has_kubectl() {
            Way::Proxy(Proxy::start(kubeconfig)?)
        } else {
            Way::Lab { towpath: towpath.to_owned(), lab: lab.to_owned() }
        };
        Ok(Self { way, namespace: namespace.to_owned() })
    }

    /// An object; none when it is not there.
    ///
    /// # Errors
    /// The API server cannot be asked, or refuses.
    pub(crate) fn get(&mut self, kind: Kind, name: &str) -> Result<Option<Value>> {
        match &mut self.way {
            Way::Proxy(proxy) => {
                match proxy.request("GET", &format!("{}/{name}", kind.path(&self.namespace)), None)? {
                    (404, _) => Ok(None),
                    (200, value) => Ok(Some(value)),
                    (status, value) => bail!("get {} {name}: {status} {value}", kind.plural()),
                }
            }
            Way::Lab { towpath, lab } => {
                let arguments = ["lab", "get", "--name", lab, "-n", &self.namespace, kind.plural(), name, "-o", "json"];
                let output = Command::new(towpath).args(arguments).output().context("run towpath lab get")?;
                Ok(output.status.success().then(|| serde_json::from_slice(&output.stdout)).transpose()?)
            }
        }
    }

    /// All objects of a kind.
    ///
    /// # Errors
    /// The API server cannot be asked, or refuses.
    pub(crate) fn list(&mut self, kind: Kind) -> Result<Vec<Value>> {
        let mut all = match &mut self.way {
            Way::Proxy(proxy) => match proxy.request("GET", &kind.path(&self.namespace), None)? {
                (200, value) => value,
                (status, value) => bail!("list {}: {status} {value}", kind.plural()),
            },
            Way::Lab { towpath, lab } => {
                let arguments = ["lab", "get", "--name", lab, "-n", &self.namespace, kind.plural(), "-o", "json"];
                let output = Command::new(towpath).args(arguments).output().context("run towpath lab get")?;
                serde_json::from_slice(&output.stdout)?
            }
        };
        match all.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok(items),
            _ => bail!("list {}: no items in {all}", kind.plural()),
        }
    }

    /// Makes objects, several at once. One that is there already stays as it is.
    ///
    /// # Errors
    /// One was refused.
    pub(crate) fn create(&mut self, objects: &[Value]) -> Result<()> {
        match &self.way {
            Way::Proxy(proxy) => {
                let requests = objects.iter().map(|object| {
                    Ok(Errand { method: "POST", path: Kind::of(object)?.path(&self.namespace), body: Some(object) })
                });
                run_errands(proxy.port, &requests.collect::<Result<Vec<_>>>()?)
            }
            Way::Lab { towpath, lab } => {
                let text = objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n");
                let mut command = Command::new(towpath);
                command.args(["lab", "apply", "--name", lab, "-n", &self.namespace, "-f", "-"]);
                feed(command, &text)
            }
        }
    }

    /// Deletes objects at once, without a time of grace, several at a time; one that is not there is fine. They may be there for
    /// a moment longer.
    ///
    /// # Errors
    /// The API server refuses.
    pub(crate) fn delete(&mut self, kind: Kind, names: &[String]) -> Result<()> {
        match &self.way {
            Way::Proxy(proxy) => {
                let path = kind.path(&self.namespace);
                let errand =
                    |name| Errand { method: "DELETE", path: format!("{path}/{name}?gracePeriodSeconds=0"), body: None };
                run_errands(proxy.port, &names.iter().map(errand).collect::<Vec<_>>())
            }
            Way::Lab { towpath, lab } => {
                // Names that are not there end the command early: one by one.
                for name in names {
                    let arguments =
                        ["lab", "delete", "--name", lab, "-n", &self.namespace, "--wait", "false", kind.plural(), name];
                    let mut command = Command::new(towpath);
                    command.args(arguments).stdout(Stdio::null()).status().context("run towpath lab delete")?;
                }
                Ok(())
            }
        }
    }
}

/// A request among many.
struct Errand<'a> {
    method: &'static str,
    path: String,
    body: Option<&'a Value>,
}

/// Does many requests on a few connections. What is there already, or gone already, is no failure.
fn run_errands(port: u16, errands: &[Errand<'_>]) -> Result<()> {
    let lane = |part: &[Errand<'_>]| {
        let mut connection = Connection::open(port)?;
        for errand in part {
            let (status, value) = connection.request(errand.method, &errand.path, errand.body)?;
            if !matches!(status, 200..=202 | 404 | 409) || (status == 404 && errand.body.is_some()) {
                bail!("{} {}: {status} {value}", errand.method, errand.path);
            }
        }
        Ok(())
    };
    let share = errands.len().div_ceil(LANES).max(1);
    std::thread::scope(|scope| {
        let lanes: Vec<_> = errands.chunks(share).map(|part| scope.spawn(move || lane(part))).collect();
        lanes.into_iter().try_for_each(|lane| match lane.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a thread that speaks to the API server died"),
        })
    })
}

/// Whether there is a `kubectl`.
pub(crate) fn has_kubectl() -> bool {
    let mut command = Command::new("kubectl");
    command.args(["version", "--client"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs a command with a text as its input.
///
/// # Errors
/// It failed; what it said is in the message.
pub(crate) fn feed(mut command: Command, input: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn answers_of_both_framings_are_read_on_one_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut buffer = [0; 4096];
            for answer in [
                "HTTP/1.1 201 Created\r\nContent-Length: 7\r\n\r\n{\"a\":1}",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n3\r\n:2}\r\n0\r\n\r\n",
                "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\noops",
            ] {
                assert!(stream.read(&mut buffer).unwrap() > 0);
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut connection = Connection::open(port).unwrap();
        let body = serde_json::json!({"kind": "Pod"});
        assert_eq!(connection.request("POST", "/x", Some(&body)).unwrap(), (201, serde_json::json!({"a": 1})));
        assert_eq!(connection.request("GET", "/x", None).unwrap(), (200, serde_json::json!({"a": 2})));
        assert_eq!(connection.request("GET", "/x", None).unwrap(), (404, Value::String("oops".to_owned())));
        assert!(connection.request("GET", "/x", None).is_err());
        server.join().unwrap();
    }
}
