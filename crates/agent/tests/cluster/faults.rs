//! Faults between a client and an API server, above HTTP: answers that the server never gave, and answers cut or held back.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use kube::client::Body;
use tower::{BoxError, Layer, Service};

/// What becomes of a request.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// This status, with `Retry-After` in seconds if there is one.
    Status(u16, Option<u32>),
    /// This body instead of the server's answer, after some time.
    Instead(Duration, String),
    /// The server's answer, of which only so many bytes arrive before the connection breaks.
    Cut(usize),
    /// The server's answer, after some time.
    Late(Duration),
}

#[derive(Debug)]
struct Rule {
    resource: &'static str,
    watch: bool,
    times: usize,
    fault: Fault,
}

/// The faults that are still to come, and the requests so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    rules: Arc<Mutex<Vec<Rule>>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Faults {
    /// The next `times` lists (or watches) of a resource get this.
    pub(crate) fn add(&self, resource: &'static str, watch: bool, times: usize, fault: Fault) {
        self.rules.lock().unwrap().push(Rule { resource, watch, times, fault });
    }

    /// How many lists of a resource were asked for.
    pub(crate) fn lists(&self, resource: &str) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|uri| of(uri, resource) && !is_watch(uri)).count()
    }

    fn meet(&self, uri: &str) -> Option<Fault> {
        self.seen.lock().unwrap().push(uri.to_owned());
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|r| r.times > 0 && of(uri, r.resource) && r.watch == is_watch(uri))?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }
}

fn of(uri: &str, resource: &str) -> bool {
    uri.split('?').next().is_some_and(|path| path.ends_with(&format!("/{resource}")))
}

fn is_watch(uri: &str) -> bool {
    uri.contains("watch=true") || uri.contains("watch=1")
}

impl<S> Layer<S> for Faults {
    type Service = Faulty<S>;

    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty { inner, faults: self.clone() }
    }
}

/// A service that meets faults.
#[derive(Debug)]
pub(crate) struct Faulty<S> {
    inner: S,
    faults: Faults,
}

type Answer = Response<http_body_util::combinators::UnsyncBoxBody<hyper::body::Bytes, BoxError>>;

fn answer(status: u16, retry_after: Option<u32>, text: String) -> Answer {
    let body = Full::from(text).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::builder().status(status).header("content-type", "application/json");
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds.to_string());
    }
    response.body(body).unwrap()
}

impl<S, B> Service<Request<Body>> for Faulty<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
    B: hyper::body::Body<Data = hyper::body::Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Answer, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let fault = self.faults.meet(&request.uri().to_string());
        let forwarded = self.inner.call(request);
        let whole = async move { Ok(forwarded.await?.map(|body| body.map_err(Into::into).boxed_unsync())) };
        match fault {
            None => Box::pin(whole),
            Some(Fault::Status(code, retry_after)) => Box::pin(async move {
                let text = format!(
                    r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","message":"injected","reason":"Injected","code":{code}}}"#
                );
                Ok(answer(code, retry_after, text))
            }),
            Some(Fault::Instead(after, text)) => Box::pin(async move {
                tokio::time::sleep(after).await;
                Ok(answer(200, None, text))
            }),
            Some(Fault::Late(after)) => Box::pin(async move {
                tokio::time::sleep(after).await;
                whole.await
            }),
            Some(Fault::Cut(bytes)) => Box::pin(async move {
                let response = whole.await?;
                Ok(response.map(|body| CutOff { body, left: bytes }.boxed_unsync()))
            }),
        }
    }
}

/// A body that breaks off.
struct CutOff<B> {
    body: B,
    left: usize,
}

impl<B: hyper::body::Body<Data = hyper::body::Bytes, Error = BoxError> + Unpin> hyper::body::Body for CutOff<B> {
    type Data = hyper::body::Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<hyper::body::Bytes>, BoxError>>> {
        if self.left == 0 {
            return Poll::Ready(Some(Err("connection reset by a fault".into())));
        }
        let polled = Pin::new(&mut self.body).poll_frame(context);
        polled.map(|frame| {
            frame.map(|frame| {
                frame.map(|frame| {
                    frame.map_data(|data| {
                        let kept = data.slice(..data.len().min(self.left));
                        self.left -= kept.len();
                        kept
                    })
                })
            })
        })
    }
}
