//! Observing an election: who leads, and what it proclaims, across failures of servers.

use std::{sync::Arc, time::Duration};

use conclave_proto::v1::{
    Leader, LeaderRequest, ObserveRequest, ObserveResponse, election_client::ElectionClient,
};
use tokio::time::{Instant, timeout};
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    client::PATIENCE,
    error::{Error, Failure},
    transport::{ANSWER_BYTES_MAX, ATTEMPT_TIMEOUT, Backoff, Transport},
};

/// How often it is looked whether the rest of the client uses another server.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// After so long without a word the server is asked whether it still serves: one whose
/// disk hangs keeps its connections, and tells nothing.
const QUIET: Duration = Duration::from_secs(5);
/// How long it may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// Follows an election; made by [`crate::Client::observe`].
///
/// ```no_run
/// # async fn example(client: conclave_client::Client) -> Result<(), conclave_client::Error> {
/// let mut observer = client.observe("primary");
/// loop {
///     match observer.next().await?.leader {
///         Some(leader) => println!("{:?} leads in term {}", leader.value, leader.term),
///         None => println!("nobody leads"),
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Observer {
    transport: Arc<Transport>,
    name: String,
    /// The last revision that was told; 0 before the first.
    told: u64,
    missed: bool,
    stream: Option<Open>,
}

/// A stream on which a server tells.
#[derive(Debug)]
struct Open {
    /// Which server's.
    index: usize,
    channel: Channel,
    told: Streaming<ObserveResponse>,
    /// When the server was certainly there.
    heard: Instant,
}

/// How an election stands from a revision on.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Which revision.
    pub revision: u64,
    /// Who leads then, if anybody does.
    pub leader: Option<Leader>,
    /// Something may have happened between this and what was told before it: the
    /// observer was away for so long that it is not known any more.
    pub missed: bool,
}

impl Observer {
    pub(crate) fn new(transport: &Arc<Transport>, name: String) -> Observer {
        Observer {
            transport: Arc::clone(transport),
            name,
            told: 0,
            missed: false,
            stream: None,
        }
    }

    /// First how the election stands, then every change: another leader, none, another
    /// value; in order, and none is left out, whichever servers fail. Safe to drop and
    /// call again.
    ///
    /// # Errors
    /// If no server can be asked for some seconds, or the name is none. It may be called
    /// again, and goes on where it was.
    pub async fn next(&mut self) -> Result<Observed, Error> {
        // A stream may have been quiet for hours: patience begins when it breaks.
        let mut give_up: Option<Instant> = None;
        let mut backoff = Backoff::default();
        loop {
            let (index, status) = match self.step().await {
                Ok(observed) => return Ok(observed),
                Err(broken) => broken,
            };
            if self.stream.take().is_some() {
                give_up = None;
            }
            let Some(status) = status else {
                continue;
            };
            let until = *give_up.get_or_insert_with(|| Instant::now() + PATIENCE);
            let failure = Failure::from(status);
            let moved = self.transport.note_failure(index, &failure);
            match failure.into_error(false) {
                Error::Server { reason, .. } if reason == "REVISION_COMPACTED" => {
                    (self.told, self.missed) = (0, true);
                }
                error if !error.is_retryable() || Instant::now() >= until => return Err(error),
                _ => backoff.pause(moved).await,
            }
        }
    }

    /// What the stream says next. The server and the reason, if it broke; without one,
    /// there is a better server.
    async fn step(&mut self) -> Result<Observed, (usize, Option<Status>)> {
        let open = match &mut self.stream {
            Some(open) => open,
            None => {
                let (index, channel) = self.transport.server();
                let mut client = ElectionClient::new(channel.clone())
                    .max_decoding_message_size(ANSWER_BYTES_MAX);
                let opening = client.observe(ObserveRequest {
                    name: self.name.clone(),
                    after_revision: self.told,
                });
                let opened = timeout(ATTEMPT_TIMEOUT, opening).await;
                let opened = opened.unwrap_or_else(|_| Err(Status::unavailable("no answer")));
                let opened = opened.map_err(|status| (index, Some(status)))?;
                self.stream.insert(Open {
                    index,
                    channel,
                    told: opened.into_inner(),
                    heard: Instant::now(),
                })
            }
        };
        let index = open.index;
        loop {
            match timeout(LOOK_AROUND, open.told.message()).await {
                Ok(Ok(Some(told))) => {
                    open.heard = Instant::now();
                    self.told = told.revision;
                    return Ok(Observed {
                        revision: told.revision,
                        leader: told.leader,
                        missed: std::mem::take(&mut self.missed),
                    });
                }
                Ok(Ok(None)) => {
                    let ended = Status::unavailable("the server ended the stream");
                    return Err((index, Some(ended)));
                }
                Ok(Err(status)) => return Err((index, Some(status))),
                Err(_) if !self.transport.is_current(index) => return Err((index, None)),
                Err(_) if open.heard.elapsed() < QUIET => {}
                Err(_) => {
                    let serves = serves(open.channel.clone(), &self.name).await;
                    serves.map_err(|status| (index, Some(status)))?;
                    open.heard = Instant::now();
                }
            }
        }
    }
}

/// Whether a server that tells nothing still serves.
async fn serves(channel: Channel, name: &str) -> Result<(), Status> {
    let name = name.to_owned();
    let mut client = ElectionClient::new(channel);
    let asked = timeout(ANSWERS_WITHIN, client.leader(LeaderRequest { name })).await;
    match asked.unwrap_or_else(|_| Err(Status::deadline_exceeded("the server is silent"))) {
        Ok(_) => Ok(()),
        // A word is a word.
        Err(status) => match Failure::from(status.clone()) {
            Failure::Refused(_) | Failure::Overloaded { .. } => Ok(()),
            Failure::NotApplied { .. } | Failure::Unknown { .. } => Err(status),
        },
    }
}
