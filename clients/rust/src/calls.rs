//! The calls under way to one server, all on one stream (`Channel.Connect`):
//! those that begin together leave in one message. The stream is opened when
//! first used, and opened again by the first call after it broke.

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use conclave_proto::v1::{
    self, ClientFrame, ServerFrame, call::Request, channel_client::ChannelClient, reply::Outcome,
};
use prost::Message as _;
use tokio::{runtime::Handle, sync::oneshot};
use tokio_stream::Stream;
use tonic::{Code, Status, transport::Channel};

/// Calls of one message: a server takes 2 MiB, and most calls have a few KiB at most.
const FRAME_CALLS_MAX: usize = 256;
/// Bytes after which a message takes no more calls: what is proclaimed may have 64 KiB.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// A request that can be sent on the stream.
pub(crate) trait Call {
    /// Its answer.
    type Answer;

    /// As it is sent.
    fn into_request(self) -> Request;

    /// The answer, if it is one to this kind of request.
    fn answer(outcome: Outcome) -> Option<Self::Answer>;
}

macro_rules! calls {
    ($($request:ident => $answer:ident as $name:ident),* $(,)?) => {
        $(impl Call for v1::$request {
            type Answer = v1::$answer;

            fn into_request(self) -> Request {
                Request::$name(self)
            }

            fn answer(outcome: Outcome) -> Option<v1::$answer> {
                match outcome {
                    Outcome::$name(answer) => Some(answer),
                    _ => None,
                }
            }
        })*
    };
}

calls!(
    OpenSessionRequest => OpenSessionResponse as OpenSession,
    RenewSessionRequest => RenewSessionResponse as RenewSession,
    CloseSessionRequest => CloseSessionResponse as CloseSession,
    AcquireRequest => AcquireResponse as AcquireLock,
    ReleaseRequest => ReleaseResponse as ReleaseLock,
    CancelRequest => CancelResponse as CancelLock,
    CampaignRequest => CampaignResponse as Campaign,
    ProclaimRequest => ProclaimResponse as Proclaim,
    ResignRequest => ResignResponse as Resign,
);

/// See the module.
pub(crate) struct Calls {
    channel: Channel,
    runtime: Handle,
    line: Mutex<Arc<Line>>,
}

/// One stream, from its first call to its end.
#[derive(Default)]
struct Line(Mutex<State>);

#[derive(Default)]
struct State {
    phase: Phase,
    last_tag: u64,
    /// Who waits for which answer.
    waiting: BTreeMap<u64, oneshot::Sender<Result<Outcome, Status>>>,
    unsent: Vec<v1::Call>,
    /// Of the task that sends.
    sender: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// It has carried no call yet.
    #[default]
    Unused,
    Open,
    /// It takes no more calls.
    Ended,
}

impl Calls {
    /// Over this connection; nothing is sent yet.
    pub(crate) fn new(channel: Channel, runtime: Handle) -> Calls {
        Calls {
            channel,
            runtime,
            line: Mutex::default(),
        }
    }

    /// Sends a request and waits for its answer. Dropped before, the request may
    /// have its effect all the same.
    pub(crate) async fn call<C: Call>(&self, request: C) -> Result<C::Answer, Status> {
        let (tag, line, answer) = self.begin(request.into_request());
        let waiting = Waiting { line, tag };
        let outcome = answer.await;
        drop(waiting);
        match outcome {
            Ok(Ok(outcome)) => C::answer(outcome)
                .ok_or_else(|| Status::internal("the answer belongs to another kind of request")),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::unavailable("the stream of calls ended")),
        }
    }

    fn begin(
        &self,
        request: Request,
    ) -> (u64, Arc<Line>, oneshot::Receiver<Result<Outcome, Status>>) {
        let mut line = self.line.lock().expect("no panic while this is locked");
        if line.state().phase == Phase::Ended {
            *line = Arc::default();
        }
        let mut state = line.state();
        if state.phase == Phase::Unused {
            state.phase = Phase::Open;
            let client = ChannelClient::new(self.channel.clone());
            self.runtime.spawn(Arc::clone(&line).run(client));
        }
        let (sender, answer) = oneshot::channel();
        let tag = state.begin(request, sender);
        drop(state);
        (tag, Arc::clone(&line), answer)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let line = self.line.get_mut().expect("no panic while this is locked");
        line.state().end();
    }
}

impl Line {
    /// Carries calls and answers until the stream ends.
    async fn run(self: Arc<Self>, client: ChannelClient<Channel>) {
        let status = match self.carry(client).await {
            Ok(()) => Status::unavailable("the server ended the stream of calls"),
            Err(status) => status,
        };
        let waiting = {
            let mut state = self.state();
            state.end();
            state.unsent.clear();
            std::mem::take(&mut state.waiting)
        };
        for caller in waiting.into_values() {
            // An error means that nobody waits for it any more.
            caller.send(Err(status.clone())).ok();
        }
    }

    async fn carry(self: &Arc<Self>, mut client: ChannelClient<Channel>) -> Result<(), Status> {
        let mut frames = client
            .connect(Sending(Arc::clone(self)))
            .await?
            .into_inner();
        while let Some(frame) = frames.message().await? {
            self.state().answered(frame);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while this is locked")
    }
}

impl State {
    fn begin(&mut self, request: Request, caller: oneshot::Sender<Result<Outcome, Status>>) -> u64 {
        self.last_tag += 1;
        let tag = self.last_tag;
        self.waiting.insert(tag, caller);
        self.unsent.push(v1::Call {
            tag,
            request: Some(request),
        });
        self.wake();
        tag
    }

    fn answered(&mut self, frame: ServerFrame) {
        for v1::Reply { tag, outcome } in frame.replies {
            let Some(caller) = self.waiting.remove(&tag) else {
                continue;
            };
            let result = match outcome {
                Some(Outcome::Error(error)) => Err(status(error)),
                Some(outcome) => Ok(outcome),
                None => Err(Status::internal("an answer of an unknown kind")),
            };
            // An error means that nobody waits for it any more.
            caller.send(result).ok();
        }
    }

    /// The next message, if there are calls to send.
    fn frame(&mut self) -> Option<ClientFrame> {
        if self.unsent.is_empty() {
            return None;
        }
        let (mut count, mut bytes) = (0, 0);
        for call in self.unsent.iter().take(FRAME_CALLS_MAX) {
            if bytes >= FRAME_BYTES_MAX {
                break;
            }
            bytes += call.encoded_len();
            count += 1;
        }
        let rest = self.unsent.split_off(count);
        let calls = std::mem::replace(&mut self.unsent, rest);
        Some(ClientFrame { calls })
    }

    fn end(&mut self) {
        self.phase = Phase::Ended;
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.wake();
        }
    }
}

/// The messages of one stream.
struct Sending(Arc<Line>);

impl Stream for Sending {
    type Item = ClientFrame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<ClientFrame>> {
        let mut state = self.0.state();
        match state.frame() {
            Some(frame) => Poll::Ready(Some(frame)),
            None if state.phase == Phase::Ended => Poll::Ready(None),
            None => {
                state.sender = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// A caller that waits. Dropped before the answer, what was not sent yet never is.
struct Waiting {
    line: Arc<Line>,
    tag: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.line.state();
        if state.waiting.remove(&self.tag).is_some() {
            state.unsent.retain(|call| call.tag != self.tag);
        }
    }
}

/// The status that a call of its own would have ended with.
fn status(error: v1::CallError) -> Status {
    let code = i32::try_from(error.code).map_or(Code::Unknown, Code::from);
    Status::with_details(code, error.message, error.details)
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").finish_non_exhaustive()
    }
}
