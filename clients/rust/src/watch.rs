//! Watches: changes of keys as they happen. The decisions are those of
//! [`crate::watch_state`]; here they meet the network.

use std::{sync::Arc, time::Duration};

use conclave_proto::etcd::etcdserverpb::{
    WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    watch_client::WatchClient, watch_create_request::FilterType, watch_request::RequestUnion,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, metadata::MetadataValue};

use crate::{
    client::PATIENCE,
    error::{Error, Failure},
    keys::{Event, KeyRange},
    transport::{ANSWER_BYTES_MAX, ATTEMPT_TIMEOUT, Answer as _, Backoff, Transport},
    watch_state::{Step, WatchEnd, WatchState},
};

/// Asks a server to end the stream when it has lost the leader, so that the watch goes
/// on at one that has not.
const REQUIRE_LEADER: &str = "hasleader";

/// After so long without a word the server is asked whether it is still there: one whose
/// disk hangs keeps its connections, and tells nothing.
const QUIET: Duration = Duration::from_secs(5);
/// How long it may take to answer, and to begin a watch.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// What to watch.
#[derive(Clone, Debug, PartialEq)]
pub struct Watch(WatchCreateRequest);

impl Watch {
    /// Watches one key, or a range, for what is to come.
    pub fn new(keys: impl Into<KeyRange>) -> Watch {
        let KeyRange { key, end } = keys.into();
        Watch(WatchCreateRequest {
            key,
            range_end: end,
            ..WatchCreateRequest::default()
        })
    }

    /// Also what has happened, from this revision on. After reading at revision `r`,
    /// a watch from `r + 1` misses nothing.
    pub fn from_revision(mut self, revision: i64) -> Watch {
        self.0.start_revision = revision;
        self
    }

    /// Asks for what was there before each event.
    pub fn previous(mut self) -> Watch {
        self.0.prev_kv = true;
        self
    }

    /// Leaves out the events of keys that are written.
    pub fn no_puts(mut self) -> Watch {
        self.0.filters.push(FilterType::Noput.into());
        self
    }

    /// Leaves out the events of keys that are deleted.
    pub fn no_deletes(mut self) -> Watch {
        self.0.filters.push(FilterType::Nodelete.into());
        self
    }
}

/// A watch that is live. It goes on by itself when its stream breaks, at another
/// server if need be: no event is lost or told twice, and those of one revision come
/// together. Dropped, it ends.
///
/// A server that says nothing is asked for a sign of life now and then (etcd: since 3.4),
/// and left if it gives none.
///
/// What is not asked for is not kept here: a reader that is slow is waited for by the
/// server, as long as that has the history.
///
/// ```no_run
/// # async fn example(client: conclave_client::Client) -> Result<(), conclave_client::Error> {
/// use conclave_client::{Error, Get, KeyRange, Watch};
///
/// let keys = KeyRange::prefix("config/");
/// loop {
///     // What is there, and then each change of it.
///     let found = client.kv().get(Get::new(keys.clone())).await?;
///     let watch = Watch::new(keys.clone()).from_revision(found.revision + 1);
///     let mut watching = client.watch(watch).await?;
///     let error = loop {
///         match watching.next().await {
///             Ok(events) => println!("{events:?}"),
///             Err(error) => break error,
///         }
///     };
///     // Away for so long that history is gone: begin anew.
///     if !matches!(error, Error::Compacted { .. }) {
///         return Err(error);
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Watching {
    transport: Arc<Transport>,
    state: WatchState,
    stream: Option<Open>,
    backoff: Backoff,
    /// Why the last stream broke.
    broken: Option<String>,
    ended: Option<Error>,
}

/// A stream on which the server tells.
#[derive(Debug)]
struct Open {
    /// Which server's.
    index: usize,
    /// Kept open: some servers take its end for that of the watch.
    requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
    /// If nothing is heard until then, something must be done.
    deadline: Instant,
    /// Questions since the last word of the server.
    unanswered: u32,
}

impl Open {
    /// The next word of the server, which may leave so many questions unanswered.
    async fn hear(&mut self, unanswered_max: u32) -> Result<WatchResponse, Status> {
        loop {
            match timeout_at(self.deadline, self.answers.message()).await {
                Ok(heard) => {
                    self.deadline = Instant::now() + QUIET;
                    self.unanswered = 0;
                    return heard?.ok_or_else(|| Status::unavailable("the stream has ended"));
                }
                Err(_) if self.unanswered >= unanswered_max => {
                    return Err(Status::deadline_exceeded("the server is silent"));
                }
                Err(_) => self.ask(),
            }
        }
    }

    fn ask(&mut self) {
        let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
        let progress = WatchRequest {
            request_union: Some(progress),
        };
        if self.requests.try_send(progress).is_err() {
            tracing::trace!("the last question was not even sent");
        }
        self.unanswered += 1;
        self.deadline = Instant::now() + ANSWERS_WITHIN;
    }
}

impl Watching {
    pub(crate) async fn open(transport: Arc<Transport>, watch: Watch) -> Result<Watching, Error> {
        if watch.0.start_revision < 0 {
            return Err(Error::InvalidArgument {
                reason: "INVALID_REVISION".to_owned(),
                message: "a watch cannot begin at a negative revision".to_owned(),
            });
        }
        let mut watching = Watching {
            transport,
            state: WatchState::new(watch.0),
            stream: None,
            backoff: Backoff::default(),
            broken: None,
            ended: None,
        };
        let live = async {
            while watching.step().await? != Step::Live {}
            Ok(())
        };
        if let Ok(begun) = timeout(PATIENCE, live).await {
            return begun.map(|()| watching);
        }
        let cause = watching.broken.as_deref().unwrap_or("no answer");
        let message = format!("no server has begun the watch: {cause}");
        Err(watching.transport.unreachable(message))
    }

    /// The next events: at least one, in order, all of their revision or revisions.
    /// Waits as long as there are none, also while no server can be reached. May be
    /// dropped and called again without losing any.
    ///
    /// # Errors
    /// [`Error::Compacted`] if history is gone that was not told yet, and what a server
    /// refuses. The watch is over then, and goes on to say so.
    pub async fn next(&mut self) -> Result<Vec<Event>, Error> {
        loop {
            if let Step::Events(events) = self.step().await? {
                return Ok(events);
            }
        }
    }

    /// All events up to this revision have been told. A later watch may go on from
    /// the one behind it. It grows also while nothing happens to these keys, now and
    /// then, as long as [`Watching::next`] is awaited.
    pub fn revision(&self) -> i64 {
        self.state.revision().unwrap_or(0)
    }

    /// Hears one thing from a server.
    async fn step(&mut self) -> Result<Step, Error> {
        if let Some(error) = &self.ended {
            return Err(error.clone());
        }
        let heard = match &mut self.stream {
            Some(open) => match open.hear(self.state.unanswered_max()).await {
                Ok(answer) => {
                    if let (true, Some(sender)) = (answer.created, answer.sender()) {
                        self.transport.note_sender(open.index, sender);
                    }
                    Ok(self.state.received(answer))
                }
                Err(status) => Err((open.index, status)),
            },
            None => self.connect().await.map(|()| Step::Nothing),
        };
        match heard {
            Ok(Step::Ended(end)) => Err(self.end(end.into())),
            Ok(step) => {
                if step != Step::Nothing {
                    self.backoff = Backoff::default();
                }
                Ok(step)
            }
            Err((index, status)) => {
                self.stream = None;
                let failure = Failure::from(status);
                let moved = self.transport.note_failure(index, &failure);
                if let Failure::Refused(error) = failure {
                    return Err(self.end(error));
                }
                tracing::debug!(?failure, "a watch goes on with another stream");
                self.broken = Some(failure.message());
                self.backoff.pause(moved).await;
                Ok(Step::Nothing)
            }
        }
    }

    fn end(&mut self, error: Error) -> Error {
        self.stream = None;
        self.ended.insert(error).clone()
    }

    /// Opens a stream that begins where the one before broke.
    async fn connect(&mut self) -> Result<(), (usize, Status)> {
        let (index, channel) = self.transport.server();
        let (requests, receiver) = mpsc::channel(1);
        let create = RequestUnion::CreateRequest(self.state.begin());
        let create = WatchRequest {
            request_union: Some(create),
        };
        let sent = requests.try_send(create);
        sent.expect("there is room for one");
        let mut request = Request::new(ReceiverStream::new(receiver));
        let metadata = request.metadata_mut();
        metadata.insert(REQUIRE_LEADER, MetadataValue::from_static("true"));
        let mut client = WatchClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let opened = timeout(ATTEMPT_TIMEOUT, client.watch(request)).await;
        let opened = opened.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
        self.stream = Some(Open {
            index,
            requests,
            answers: opened.map_err(|status| (index, status))?.into_inner(),
            deadline: Instant::now() + ANSWERS_WITHIN,
            unanswered: 0,
        });
        Ok(())
    }
}

impl From<WatchEnd> for Error {
    fn from(end: WatchEnd) -> Error {
        match end {
            WatchEnd::Compacted { compacted } => Error::Compacted { compacted },
            WatchEnd::Refused { reason } => Error::Server {
                reason: "WATCH_REFUSED".to_owned(),
                message: reason,
            },
        }
    }
}
