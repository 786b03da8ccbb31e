//! Deadlines on answers: a layer around whatever sends requests.
//!
//! Time counts only while somebody waits: who reads a watch slowly loses nothing.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use kube::client::Body;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tower::{BoxError, Layer, Service};

use crate::Patience;

/// A server that said nothing for too long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{request}: the API server has said nothing for {} s; given up", .waited.as_secs_f32())]
pub struct Silent {
    /// Method and path.
    pub request: String,
    /// How long it was waited for.
    pub waited: Duration,
}

/// Puts deadlines on what a service answers.
#[derive(Clone, Debug)]
pub(crate) struct Deadlines {
    patience: Patience,
}

impl Deadlines {
    pub(crate) fn new(patience: Patience) -> Self {
        Self { patience }
    }
}

impl<S> Layer<S> for Deadlines {
    type Service = WithDeadlines<S>;

    fn layer(&self, inner: S) -> WithDeadlines<S> {
        WithDeadlines { inner, patience: self.patience }
    }
}

/// See [`Deadlines`].
#[derive(Clone, Debug)]
pub(crate) struct WithDeadlines<S> {
    inner: S,
    patience: Patience,
}

impl<S, B> Service<Request<Body>> for WithDeadlines<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: 'static,
{
    type Response = Response<Paced<B>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Patience { peer: _, answer, part, watch } = self.patience;
        let kind = Kind::of(&request);
        let name = format!("{} {}", request.method(), request.uri().path());
        let between = match kind {
            Kind::Watch => watch,
            Kind::Whole => part,
        };
        let answered = timeout(answer, self.inner.call(request));
        async move {
            match answered.await {
                Ok(Ok(response)) => Ok(response.map(|body| Paced::new(body, kind, name, between))),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(Silent { request: name, waited: answer }.into()),
            }
        }
        .boxed()
    }
}

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An object, or a list: worth nothing unless all of it comes.
    Whole,
    /// What happens, as it happens.
    Watch,
}

impl Kind {
    fn of(request: &Request<Body>) -> Self {
        let asked = request.uri().query().unwrap_or_default();
        let watches = asked.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"));
        if watches { Self::Watch } else { Self::Whole }
    }
}

/// An answer whose parts may be so far from each other.
#[derive(Debug)]
pub(crate) struct Paced<B> {
    inner: B,
    kind: Kind,
    request: String,
    between: Duration,
    alarm: Pin<Box<Sleep>>,
    /// Whether somebody waits for the next part, since when the alarm was set.
    waiting: bool,
    ended: bool,
}

impl<B> Paced<B> {
    fn new(inner: B, kind: Kind, request: String, between: Duration) -> Self {
        Self { inner, kind, request, between, alarm: Box::pin(sleep(between)), waiting: false, ended: false }
    }
}

impl<B> HttpBody for Paced<B>
where
    B: HttpBody + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(part) = Pin::new(&mut this.inner).poll_frame(context) {
            this.waiting = false;
            return Poll::Ready(part.map(|frame| frame.map_err(Into::into)));
        }
        if !this.waiting {
            this.waiting = true;
            this.alarm.as_mut().reset(Instant::now() + this.between);
        }
        ready!(this.alarm.as_mut().poll(context));
        this.ended = true;
        let silent = Silent { request: std::mem::take(&mut this.request), waited: this.between };
        match this.kind {
            Kind::Whole => Poll::Ready(Some(Err(silent.into()))),
            // Most likely nothing happens. If nobody is there any more, the next request finds out.
            Kind::Watch => {
                tracing::debug!(%silent, "a watch is begun again");
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
