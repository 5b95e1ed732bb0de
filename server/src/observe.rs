//! Streams that observe an election, for the services of both APIs.
//!
//! One reads the keys of the election at a revision, and watches what happens behind
//! it; who leads follows from that ([`Observer`]).

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use conclave_core::{
    ids::Revision,
    keyspace::{Filter, Interest, KeyRange, Record, RevisionError},
    replica::{AnswerBody, Failure, Query},
    watch::{Notice, Request},
};
use conclave_primitives::observer::{Observation, Observer};
use futures_util::stream::{self, Stream};

use crate::{gateway::Gateway, readers::Reader, status::Refusal};

const ANOTHER_KIND: Refusal = Refusal::Internal("observer");

/// One observer.
struct Observing {
    observer: Observer,
    reader: Reader,
    /// Up to where it has been told everything.
    told: Revision,
    ready: VecDeque<Observation>,
    is_over: Pin<Box<dyn Future<Output = Failure> + Send>>,
}

/// Tells how an election stands, and every change from then on; or the changes behind a
/// revision, if that is not 0. Ends with an error only; if the client wants a leader to be
/// known, also when it is lost: cut off from the others, this member hears of nothing.
pub(crate) async fn observe(
    gateway: &Arc<Gateway>,
    name: &str,
    after: Revision,
    wants_leader: bool,
) -> Result<impl Stream<Item = Result<Observation, Refusal>> + Send + use<>, Refusal> {
    let revision = (after != 0).then_some(after);
    let range = Observer::range(name);
    let (told, records) = read(gateway, range.clone(), revision).await?;
    let observer = Observer::new(name, records);
    let mut ready = VecDeque::new();
    if revision.is_none() {
        let leader = observer.leader();
        ready.push_back(Observation {
            revision: told,
            leader,
        });
    }
    let reader = gateway.reader();
    reader.ask(Request::Create {
        stream: reader.id(),
        watcher: reader.watcher(),
        of: Interest {
            range,
            puts: true,
            deletes: true,
        },
        start: Some(told + 1),
    })?;
    let observing = Observing {
        observer,
        reader,
        told,
        ready,
        is_over: Box::pin(Arc::clone(gateway).is_over(wants_leader)),
    };
    Ok(stream::unfold(Some(observing), |observing| async {
        let mut observing = observing?;
        match observing.next().await {
            Ok(observation) => Some((Ok(observation), Some(observing))),
            Err(refusal) => Some((Err(refusal), None)),
        }
    }))
}

/// The keys of a range at a revision, or now, and which revision that is.
async fn read(
    gateway: &Gateway,
    range: KeyRange,
    mut at: Option<Revision>,
) -> Result<(Revision, Vec<Record>), Refusal> {
    let mut records = Vec::new();
    let mut rest = range;
    loop {
        let query = Query::Range {
            range: rest.clone(),
            revision: at,
            filter: Filter::default(),
            limit: usize::MAX,
        };
        let answer = match records.is_empty() {
            true => gateway.read(query).await?,
            // Of a revision that has been confirmed.
            false => gateway.read_local(query).await?,
        };
        let AnswerBody::Range(Ok(piece)) = answer.body else {
            return Err(ANOTHER_KIND);
        };
        let at = *at.get_or_insert(answer.revision);
        records.extend(piece.records);
        match piece.next {
            Some(key) => rest = rest.from(key),
            None => return Ok((at, records)),
        }
    }
}

impl Observing {
    async fn next(&mut self) -> Result<Observation, Refusal> {
        loop {
            if let Some(observation) = self.ready.pop_front() {
                return Ok(observation);
            }
            let notice = tokio::select! {
                failure = &mut self.is_over => return Err(failure.into()),
                notice = self.reader.next() => notice,
            };
            self.take(notice)?;
        }
    }

    fn take(&mut self, notice: Notice) -> Result<(), Refusal> {
        match notice {
            Notice::Events {
                revision,
                events,
                bytes,
                ..
            } => {
                self.ready.extend(self.observer.take(&events));
                self.told = revision;
                let stream = self.reader.id();
                // Refused, it ends the stream: the client goes on behind what was told.
                self.reader.ask(Request::Consumed { stream, bytes })?;
            }
            Notice::Canceled {
                compacted: Some(compacted),
                ..
            } => {
                let asked = self.told + 1;
                return Err(RevisionError::Compacted { asked, compacted }.into());
            }
            Notice::Canceled {
                compacted: None, ..
            } => return Err(ANOTHER_KIND),
            Notice::Refused { .. } => return Err(Failure::Overloaded.into()),
            Notice::Created { .. } | Notice::Progress { .. } => {}
        }
        Ok(())
    }
}
