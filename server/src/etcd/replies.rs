//! What tonic says by itself, in etcd's words: a message that is too long, a method
//! that there is not.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use super::status;

/// A service of this API.
#[derive(Clone, Debug)]
pub(super) struct Replies<S>(pub(super) S);

impl<S: NamedService> NamedService for Replies<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Replies<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Reply<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let uri = request.uri().clone();
        let work = self.0.call(request);
        Reply { uri, work }
    }
}

/// The answer to a call.
#[derive(Debug)]
pub(super) struct Reply<F> {
    uri: http::Uri,
    work: F,
}

impl<F> Future for Reply<F>
where
    F: Future<Output = Result<http::Response<Body>, Infallible>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let response = ready!(Pin::new(&mut self.work).poll(context))?;
        Poll::Ready(Ok(reworded(response, self.uri.path())))
    }
}

/// Only an answer that is nothing but an error has its status among the headers.
fn reworded(response: http::Response<Body>, path: &str) -> http::Response<Body> {
    let Some(told) = Status::from_header_map(response.headers()) else {
        return response;
    };
    if told.code() == Code::Unimplemented && told.message().is_empty() {
        return status::unknown_method(path).into_http();
    }
    match status::too_long(&told) {
        Some(status) => status.into_http(),
        None => response,
    }
}
