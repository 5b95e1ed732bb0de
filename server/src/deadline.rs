//! Deadlines that clients give with their calls (`grpc-timeout`): a call that has not
//! ended by then fails with DEADLINE_EXCEEDED, whether it has begun to answer or not.
//!
//! tonic keeps them too, but not of streams that have begun to answer, and says
//! CANCELLED, which over plain HTTP is a success without content: who asked for a lock
//! would believe to have it. That cannot be turned off. So this is inside of it: its
//! timer is set before tonic's, and looked at before it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Either};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{self, Sleep};
use tonic::{
    Status,
    body::Body,
    codegen::{
        Service,
        http::{HeaderMap, Request, Response},
    },
};

use crate::{etcd::json, http::is_grpc};

const HEADER: &str = "grpc-timeout";
/// As the specification of gRPC has it.
const DIGITS_MAX: usize = 8;

/// A service that keeps the deadlines of its calls.
#[derive(Clone, Debug)]
pub(crate) struct Deadlines<S>(pub(crate) S);

impl<S> Service<Request<Body>> for Deadlines<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(timeout) = asked(request.headers()) else {
            return Either::Left(self.0.call(request));
        };
        let form = Form::of(&request);
        let mut timer = Box::pin(time::sleep(timeout));
        let work = self.0.call(request);
        Either::Right(Box::pin(async move {
            tokio::select! {
                biased;
                answer = work => Ok(form.bounded(answer?, timer)),
                () = timer.as_mut() => Ok(form.refused()),
            }
        }))
    }
}

/// How long a call may take, if its client said so in a way that is understood.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > DIGITS_MAX || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

fn exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

/// In what form a call is answered.
#[derive(Clone, Copy, Debug)]
enum Form {
    Grpc,
    /// One answer, or none.
    Http,
    /// Messages in JSON, line by line.
    JsonLines,
}

impl Form {
    fn of<B>(request: &Request<B>) -> Self {
        if is_grpc(request.headers()) {
            Self::Grpc
        } else if json::is_stream(request.uri().path()) {
            Self::JsonLines
        } else {
            Self::Http
        }
    }

    /// In place of an answer.
    fn refused(self) -> Response<Body> {
        match self {
            Self::Grpc => exceeded().into_http(),
            Self::Http => json::refused(&exceeded(), false).map(Body::new),
            Self::JsonLines => json::refused(&exceeded(), true).map(Body::new),
        }
    }

    /// An answer that comes to its end in time. Over plain HTTP, all of one that is no
    /// stream is there with its head.
    fn bounded(self, answer: Response<Body>, timer: Pin<Box<Sleep>>) -> Response<Body> {
        let form = self;
        match self {
            Self::Grpc | Self::JsonLines => {
                answer.map(|body| Body::new(Bounded { body, timer, form }))
            }
            Self::Http => answer,
        }
    }

    /// What a stream ends with that has begun.
    fn last(self) -> Frame<Bytes> {
        match self {
            Self::Grpc => {
                let mut trailers = HeaderMap::new();
                // Fails only for texts that no header can have.
                exceeded().add_header(&mut trailers).ok();
                Frame::trailers(trailers)
            }
            Self::Http | Self::JsonLines => Frame::data(json::error_line(&exceeded())),
        }
    }
}

/// The rest of an answer, until its time is over.
struct Bounded {
    body: Body,
    timer: Pin<Box<Sleep>>,
    form: Form,
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = Status;

    /// The timer first: a stream need not ever pause.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.body.is_end_stream() {
            return Poll::Ready(None);
        }
        if self.timer.as_mut().poll(context).is_ready() {
            // With it ends the call.
            self.body = Body::empty();
            return Poll::Ready(Some(Ok(self.form.last())));
        }
        Poll::Ready(ready!(Pin::new(&mut self.body).poll_frame(context)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};

    use axum::{Router, routing::post};
    use futures_util::{StreamExt as _, stream};
    use tonic::{Code, codegen::http::header, service::Routes};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    /// Says something, and then nothing any more; or nothing at all.
    fn service() -> Deadlines<Routes> {
        let says = || async {
            let said = stream::iter([Ok::<_, Status>(Bytes::from_static(b"said\n"))]);
            axum::body::Body::from_stream(said.chain(stream::pending()))
        };
        let router = Router::new()
            .route("/s.S/Says", post(says))
            .route("/v3/watch", post(says))
            .route("/{*any}", post(pending::<()>));
        Deadlines(Routes::from(router))
    }

    async fn call(path: &str, kind: &str, timeout: &str) -> Response<Body> {
        let request = Request::post(path)
            .header(header::CONTENT_TYPE, kind)
            .header(HEADER, timeout)
            .body(Body::empty())
            .unwrap();
        let answer = time::timeout(LONG, service().call(request)).await;
        answer.expect("an end in time").unwrap()
    }

    /// The next part of an answer that comes.
    async fn frame(answer: &mut Response<Body>) -> Option<Frame<Bytes>> {
        let frame = poll_fn(|context| Pin::new(answer.body_mut()).poll_frame(context));
        let frame = time::timeout(LONG, frame).await.expect("a part in time");
        frame.map(Result::unwrap)
    }

    async fn data(answer: &mut Response<Body>) -> String {
        let frame = frame(answer).await.unwrap();
        String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
    }

    const GRPC: &str = "application/grpc";
    const JSON: &str = "application/json";

    #[tokio::test]
    async fn a_call_that_is_not_answered_in_time_fails() {
        let answer = call("/s.S/Waits", GRPC, "20m").await;
        let status = Status::from_header_map(answer.headers()).unwrap();
        let told = (status.code(), status.message());
        assert_eq!(told, (Code::DeadlineExceeded, "context deadline exceeded"));

        let mut answer = call("/v3/lock/lock", JSON, "20000u").await;
        assert_eq!(answer.status().as_u16(), 504);
        let text = "context deadline exceeded";
        let body = format!(r#"{{"code":4,"error":"{text}","message":"{text}"}}"#);
        assert_eq!(data(&mut answer).await, body);

        let mut answer = call("/v3/election/observe", JSON, "20m").await;
        assert_eq!(answer.status().as_u16(), 504);
        assert!(
            data(&mut answer)
                .await
                .starts_with(r#"{"error":{"code":4,"#)
        );
    }

    #[tokio::test]
    async fn a_stream_that_has_begun_ends_in_time() {
        let mut answer = call("/s.S/Says", GRPC, "20m").await;
        assert_eq!(data(&mut answer).await, "said\n");
        let last = frame(&mut answer).await.unwrap().into_trailers().unwrap();
        let status = Status::from_header_map(&last).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(frame(&mut answer).await.is_none());

        let mut answer = call("/v3/watch", JSON, "20m").await;
        assert_eq!(answer.status().as_u16(), 200);
        assert_eq!(data(&mut answer).await, "said\n");
        let last = data(&mut answer).await;
        assert!(last.starts_with(r#"{"error":{"code":4,"#) && last.ends_with('\n'));
        assert!(frame(&mut answer).await.is_none());
    }

    #[tokio::test]
    async fn a_call_without_a_deadline_may_take_its_time() {
        for timeout in ["", "1", "m", "1x", "-1m", "+1m", "123456789n", "ä"] {
            let waits = call("/s.S/Waits", GRPC, timeout);
            let answered = time::timeout(Duration::from_millis(5), waits).await;
            assert!(answered.is_err(), "{timeout}");
        }
    }

    #[test]
    fn all_units_are_known() {
        let asked = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, text.parse().unwrap());
            asked(&headers)
        };
        assert_eq!(asked("2H"), Some(Duration::from_secs(7_200)));
        assert_eq!(asked("3M"), Some(Duration::from_secs(180)));
        assert_eq!(asked("4S"), Some(Duration::from_secs(4)));
        assert_eq!(asked("5m"), Some(Duration::from_millis(5)));
        assert_eq!(asked("6u"), Some(Duration::from_micros(6)));
        assert_eq!(asked("99999999n"), Some(Duration::from_nanos(99_999_999)));
    }
}
