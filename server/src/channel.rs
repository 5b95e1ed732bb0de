//! `conclave.v1.Channel`: many calls on one stream.
//!
//! The stream of answers does all the work when it is polled: it takes in what
//! has arrived, runs it, and gathers what is answered into one frame. So answers
//! that the loop thread made in one turn leave in one message, and a client that
//! reads nothing is not read either.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use conclave_core::{limits, replica::Failure};
use conclave_proto::v1::{self, call::Request as Body, channel_server::Channel, reply::Outcome};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    election,
    gateway::Gateway,
    lock,
    metrics::{Counted, Method},
    session,
    status::Refusal,
    validate::Invalid,
};

/// With so many calls of one stream under way, as many as the replica takes, those
/// that want a session, a lock or leadership are refused.
const RUNNING_MAX: usize = limits::PENDING_COMMANDS_MAX;
/// With so many, no more are read until answers have left. Not all of them wait for
/// locks, so that does not take long, unless the client does not read.
const TAKEN_MAX: usize = 2 * RUNNING_MAX;
/// Frames taken in before others on this thread have their turn: a client sends some
/// hundred calls in one.
const FRAMES_MAX: usize = 4;
/// Answers of one frame. The largest has some 2 KiB.
const REPLIES_MAX: usize = 512;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct ChannelService(pub(crate) Arc<Gateway>);

#[async_trait]
impl Channel for ChannelService {
    type ConnectStream = Counted<Replies>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let open = async {
            Ok(Replies {
                gateway: Arc::clone(&self.0),
                closed: Box::pin(self.0.hub.closed()),
                frames: Some(request.into_inner()),
                running: FuturesUnordered::new(),
            })
        };
        self.0.stream(Method::ChannelConnect, open).await
    }
}

type Running = Pin<Box<dyn Future<Output = v1::Reply> + Send>>;

/// The answers to the calls of one stream.
pub(crate) struct Replies {
    gateway: Arc<Gateway>,
    /// The server stops: no more calls are taken.
    closed: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// `None` once there are no more.
    frames: Option<Streaming<v1::ClientFrame>>,
    running: FuturesUnordered<Running>,
}

impl Stream for Replies {
    type Item = Result<v1::ServerFrame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        this.take_calls(cx)?;
        let mut replies = Vec::new();
        while replies.len() < REPLIES_MAX
            && let Poll::Ready(Some(reply)) = this.running.poll_next_unpin(cx)
        {
            replies.push(reply);
        }
        if !replies.is_empty() {
            return Poll::Ready(Some(Ok(v1::ServerFrame { replies })));
        }
        match this.frames {
            None if this.running.is_empty() => Poll::Ready(None),
            _ => Poll::Pending,
        }
    }
}

impl Replies {
    /// Begins the calls that have arrived. An error ends the stream.
    fn take_calls(&mut self, cx: &mut Context<'_>) -> Result<(), Status> {
        if self.frames.is_some() && self.closed.as_mut().poll(cx).is_ready() {
            self.frames = None;
        }
        for _ in 0..FRAMES_MAX {
            if self.running.len() >= TAKEN_MAX {
                return Ok(());
            }
            let Some(frames) = &mut self.frames else {
                return Ok(());
            };
            let Poll::Ready(next) = frames.poll_next_unpin(cx) else {
                return Ok(());
            };
            match next.transpose()? {
                Some(frame) => frame.calls.into_iter().for_each(|call| self.begin(call)),
                None => self.frames = None,
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    fn begin(&mut self, call: v1::Call) {
        let wants = matches!(
            call.request,
            Some(Body::OpenSession(_) | Body::AcquireLock(_) | Body::Campaign(_))
        );
        let running = if !wants || self.running.len() < RUNNING_MAX {
            run(&self.gateway, call)
        } else {
            let error = self.gateway.status_of(Failure::Overloaded.into());
            Box::pin(async move { failed(call.tag, &error) })
        };
        self.running.push(running);
    }
}

/// Has a call done as its service would do it.
fn run(gateway: &Arc<Gateway>, call: v1::Call) -> Running {
    let gateway = Arc::clone(gateway);
    let tag = call.tag;
    macro_rules! call {
        ($method:ident, $work:path, $request:ident, $outcome:ident) => {
            Box::pin(async move {
                let work = $work(&gateway, $request);
                match gateway.serve(Method::$method, work).await {
                    Ok(response) => v1::Reply {
                        tag,
                        outcome: Some(Outcome::$outcome(response.into_inner())),
                    },
                    Err(status) => failed(tag, &status),
                }
            })
        };
    }
    match call.request {
        Some(Body::OpenSession(request)) => {
            call!(SessionOpen, session::open, request, OpenSession)
        }
        Some(Body::RenewSession(request)) => {
            call!(SessionRenew, session::renew, request, RenewSession)
        }
        Some(Body::CloseSession(request)) => {
            call!(SessionClose, session::close, request, CloseSession)
        }
        Some(Body::AcquireLock(request)) => {
            call!(LockAcquire, lock::acquire, request, AcquireLock)
        }
        Some(Body::ReleaseLock(request)) => {
            call!(LockRelease, lock::release, request, ReleaseLock)
        }
        Some(Body::CancelLock(request)) => {
            call!(LockCancel, lock::cancel, request, CancelLock)
        }
        Some(Body::Campaign(request)) => {
            call!(ElectionCampaign, election::campaign, request, Campaign)
        }
        Some(Body::Proclaim(request)) => {
            call!(ElectionProclaim, election::proclaim, request, Proclaim)
        }
        Some(Body::Resign(request)) => {
            call!(ElectionResign, election::resign, request, Resign)
        }
        None => Box::pin(async move {
            let unknown = Invalid::Argument("request: there is none that this server knows");
            failed(tag, &gateway.status_of(Refusal::from(unknown)))
        }),
    }
}

fn failed(tag: u64, status: &Status) -> v1::Reply {
    let error = v1::CallError {
        code: status.code() as u32,
        message: status.message().to_owned(),
        details: status.details().to_vec().into(),
    };
    v1::Reply {
        tag,
        outcome: Some(Outcome::Error(error)),
    }
}
